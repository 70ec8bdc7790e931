"""Train keye-nano from nothing on forged clips: `python examples/nano/train.py OUT --steps 20000`.

Four phases, the sizes of which the options set:
1. sight: only the tower and the projector, which learn to name what stands where (sight.py);
2. dense: next-token loss with dense attention, clips growing from a few seconds to a minute;
3. warm-up: everything frozen but the lightning indexers, which learn the attention's own distribution;
4. sparse: attention over the selected keys only, next-token loss for the network, divergence for the indexers.
Sight goes on beside the next-token loss, or the tower forgets what it has learnt; beside it the decoder's states half-way up
learn to say what moves.

The same seed, steps and options draw the same clips in the same order. Under `torchrun --nproc-per-node N` every process
has a GPU and batches of its own, and their gradients are averaged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import recipe
import sight
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from keyecli.forge import (
    Draws,
    FrameStates,
    SceneOptions,
    concatenate_arrays,
    draw_frames,
    frame_state_arrays,
    noise_bank,
    questions,
    render,
    sample_scene,
)
from keyecli.forge.scene import SIZES
from keyecli.model.checkpoint import load_model, save_model
from keyecli.model.keye import IGNORED_LABEL, KeyeVL2ForConditionalGeneration
from keyecli.model.prompt import Visual
from keyecli.training.collate import Turn, collate, encode_clip
from keyecli.training.losses import load_balance
from keyecli.training.optimizer import MasterAdamW
from keyecli.video.patches import frames_to_patches
from keyecli.video.sampling import resize_to_budget

QUESTIONS_PER_CLIP = 6
OTHER_RATES = (
    1.25,
    3.5,
)  # one batch in four is sampled somewhere between these instead of at two frames a second
HELD_OUT_SEED = 500_000_000


@dataclass(frozen=True)
class Options:
    """Everything that decides the result, besides the machine."""

    seed: int = 0
    steps: int = 14_000
    minutes: float = 0.0  # if the plan would take longer, the schedule follows the clock instead and ends here; 0: no limit
    tokens: int = 48_000  # in a batch, padding included
    lr: float = 8e-4
    lr_end: float = 2e-5
    warm_up_share: float = 0.015  # of the plan, as all shares
    sight_share: float = 0.15
    dense_share: float = 0.60
    indexer_share: float = 0.03
    grow_from: int = 3_500  # the step at which clips begin to grow
    grow_steps: int = 2_500  # until the longest clips
    weight_decay: float = 0.05
    balance_weight: float = 1e-2
    sight_weight: float = 0.5
    motion_weight: float = 0.5
    indexer_weight: float = 1.0
    indexer_lr: float = 1e-3

    def share(self, step: int, elapsed_s: float) -> float:
        """How much of the plan is done, 0 to 1."""
        by_clock = elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        return max(step / self.steps, by_clock)

    def phase(self, share: float) -> str:
        ends = (self.sight_share, self.dense_share, self.indexer_share)
        for phase, end in zip(("sight", "dense", "warm-up"), itertools.accumulate(ends), strict=True):
            if share < end:
                return phase
        return "sparse"

    def learning_rate(self, share: float) -> float:
        """Linear warm-up, then a cosine down to `lr_end`: at once in the sight phase, over the last 60% of the rest."""
        phase = self.phase(share)
        if phase == "warm-up":
            return self.indexer_lr
        if phase == "sight":
            begun, late = 0.0, share / self.sight_share
        else:
            begun, late = self.sight_share, max(0.0, (share - 0.4) / 0.6)
        warm = min(1.0, (share - begun) / self.warm_up_share)
        return self.lr_end + (self.lr * warm - self.lr_end) * 0.5 * (1 + math.cos(math.pi * late))

    def longest_s(self, step: int) -> float:
        """Longest clip at this step: 6 s up to `grow_from`, 60 s `grow_steps` later."""
        grown = min(1.0, max(0.0, (step - self.grow_from) / self.grow_steps))
        return 6.0 * 10.0**grown


def make_batch(
    index: int, seed: int, longest_s: float, options: Options, tokenizer: Any, config: Any
) -> dict[str, Any]:
    """Batch `index`: clips of one picture size and about one length, laid out and ready to be drawn."""
    draws = Draws((options.seed, index, seed % 2**31))
    size = draws.choice(SIZES)
    height, width = resize_to_budget(size[1], size[0], recipe.BUDGET.min_tokens, recipe.BUDGET.max_tokens)
    top = max(2.0, round(2 * draws.log_uniform(2.0, longest_s)) / 2)
    scene_options = SceneOptions(max(2.0, round(1.5 * top) / 2), top, size=size)
    fps = recipe.FPS if draws.chance(0.75) else draws.log_uniform(*OTHER_RATES)
    grid = (height // 28, width // 28)
    per_frame = grid[0] * grid[1] + 5
    clips = max(2, int(options.tokens // (per_frame * (1 + top * fps) + 70 * QUESTIONS_PER_CLIP)))
    encoded, states, motions, tasks = [], [], [], []
    for place in range(clips):
        scene = sample_scene(seed + place, scene_options)
        times = scene.sampled_times(fps)
        items = _choose(draws, questions(scene, draws))
        turns = [
            Turn(item.question, item.answer, None if draws.chance(0.2) else item.reasoning) for item in items
        ]
        visual = Visual("video", grid, tuple(float(value) for value in times))
        encoded.append(encode_clip(tokenizer, config, visual, turns))
        states.append(frame_state_arrays(scene, times))
        motions.append(sight.motions_of(scene, times))
        tasks.append([item.task for item in items])
    batch = collate(encoded, config.pad_token_id)
    return {
        "input_ids": torch.from_numpy(batch.input_ids),
        "position_ids": torch.from_numpy(batch.position_ids),
        "segments": torch.from_numpy(batch.segments),
        "targets": torch.from_numpy(batch.targets),
        "weights": torch.from_numpy(batch.weights),
        "supervised": torch.from_numpy(np.flatnonzero(batch.targets != IGNORED_LABEL)),
        "shared_prefix": batch.shared_prefix,
        "visual": torch.from_numpy(np.flatnonzero(batch.input_ids == config.video_token_id)),
        "motions": torch.from_numpy(np.concatenate(motions)),
        "states": FrameStates.from_arrays(concatenate_arrays(states)),
        "size": (height, width),
        "tasks": tasks,
    }


def _choose(draws: Draws, items: list[Any]) -> list[Any]:
    """A few questions about a clip, of different tasks where possible; always one that asks for times and, where a shape
    allows it, one about motion, which is the hardest to learn."""
    shuffled = draws.sample(items, len(items))
    chosen = [next(item for item in shuffled if item.task == "ground")]
    chosen += [item for item in shuffled if item.task in ("motion", "ground_motion")][:1]
    seen = {item.task for item in chosen}
    for item in shuffled:
        if len(chosen) < QUESTIONS_PER_CLIP and item.task not in seen:
            chosen.append(item)
            seen.add(item.task)
    return chosen


class Batches(IterableDataset):
    """Batches in the order of their index, whatever the number of workers; of `world` processes each has its own."""

    def __init__(
        self, options: Options, tokenizer: Tokenizer, config: Any, draw_every: int, rank: int, world: int
    ) -> None:
        self.options, self.config, self.draw_every = options, config, draw_every
        self.rank, self.world = rank, world
        self.serialised = tokenizer.to_str()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        torch.set_num_threads(1)
        tokenizer = wrapped(Tokenizer.from_str(self.serialised))
        info = get_worker_info()
        offset, stride = (info.id, info.num_workers) if info else (0, 1)
        for step in range(offset, self.options.steps, stride):
            index = step * self.world + self.rank
            seed = recipe.FIRST_TRAINING_SEED + index * 4096
            batch = make_batch(
                index, seed, self.options.longest_s(step), self.options, tokenizer, self.config
            )
            if self.draw_every and step % self.draw_every == 0:
                batch["frames"] = render(batch["states"], *batch["size"])
            batch["states"] = vars(batch["states"])
            yield batch


def as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    """A loader's collate function for batches that are made whole (a lambda could not be sent to a worker)."""
    return batch


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = recipe.CHAT_TEMPLATE
    return fast


class Trainer:
    """The network, its optimisers and one step of each phase."""

    def __init__(
        self, model: KeyeVL2ForConditionalGeneration, options: Options, device: torch.device
    ) -> None:
        self.model, self.options, self.device = model, options, device
        self.gates = [layer.mlp.gate for layer in model.model.layers]
        for gate in self.gates:
            gate.register_forward_hook(lambda module, args, output: setattr(module, "last_logits", output))
        # Half-way up, so that the layers above can still tell the answer what was seen here.
        self.middle = model.model.layers[model.config.num_hidden_layers // 2 - 1]
        self.middle.register_forward_hook(
            lambda module, args, output: setattr(module, "last_hidden", output[0])
        )
        named = list(model.named_parameters())
        self.indexer = [parameter for name, parameter in named if "sa_indexer" in name]
        self.draw: Callable[[FrameStates, int, int], Tensor] = render
        self.heads = sight.Heads(model.config.hidden_size).to(device, model.dtype)
        self.network = [parameter for name, parameter in named if "sa_indexer" not in name]
        self.network += self.heads.parameters()
        self.network_adamw = MasterAdamW(self.network, options.lr, options.weight_decay)
        self.indexer_adamw = MasterAdamW(self.indexer, options.indexer_lr)

    def see(self, batch: dict[str, Any]) -> Tensor:
        """Visual tokens [V, D] of a batch's clips."""
        height, width = batch["size"]
        frames = batch["frames"] if "frames" in batch else self.draw(batch["states"], height, width)
        patches = frames_to_patches(frames, recipe.MEAN, recipe.STD, dtype=self.model.dtype)
        grids = [(height // 14, width // 14)] * len(frames)
        return self.model.encode_frames(patches, grids, limit_patches=len(patches))

    def read(
        self, batch: dict[str, Any], visual: Tensor, teach_indexer: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the supervised tokens [rows, vocabulary], and the indexers' mean divergence over all tokens."""
        hidden, divergence = self.model.model(
            self.model.embed(batch["input_ids"], visual),
            batch["position_ids"],
            segments=batch["segments"],
            shared_prefix=batch["shared_prefix"],
            teach_indexer=teach_indexer,
        )
        logits = self.model.logits(hidden.flatten(0, 1)[batch["supervised"]])
        if divergence is None:
            return logits, None
        valid = batch["segments"] >= 0
        return logits, (divergence * valid).sum() / valid.sum()

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        moved = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        moved["states"] = FrameStates(**batch["states"]).to(self.device)
        return moved

    def step(self, batch: dict[str, Any], share: float) -> dict[str, Tensor]:
        """One update, at `share` of the plan. Returns the figures of the step, on the device."""
        phase, options = self.options.phase(share), self.options
        batch = self.to_device(batch)
        self.model.model.mode = "sparse" if phase == "sparse" else "dense"
        for parameter in self.network:
            parameter.requires_grad_(phase != "warm-up")
        figures: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        visual = self.see(batch)
        wanted = sight.targets(batch["states"], batch["motions"], *batch["size"])
        if phase != "warm-up":
            loss, named = sight.sight_loss(self.heads, visual, wanted)
            figures |= named
            total = total + (1.0 if phase == "sight" else options.sight_weight) * loss
        if phase != "sight":
            logits, divergence = self.read(batch, visual, teach_indexer=phase != "dense")
            total = total + self._text_loss(batch, phase, logits, divergence, figures)
        if phase in ("dense", "sparse"):
            hidden = self.middle.last_hidden.flatten(0, 1)[batch["visual"]]
            loss, moved = sight.motion_loss(self.heads, hidden, wanted)
            figures |= moved
            total = total + options.motion_weight * loss
        total.backward()
        average_gradients(self.network + self.indexer)
        lr = options.learning_rate(share)
        if phase != "warm-up":
            figures["norm"] = self.network_adamw.step(lr)
        if phase in ("warm-up", "sparse"):
            self.indexer_adamw.step(lr if phase == "warm-up" else min(lr, options.indexer_lr))
        return {key: value.detach() for key, value in figures.items()}

    def _text_loss(
        self,
        batch: dict[str, Any],
        phase: str,
        logits: Tensor,
        divergence: Tensor | None,
        figures: dict[str, Tensor],
    ) -> Tensor:
        rows = batch["supervised"]
        targets, weights = batch["targets"].flatten()[rows], batch["weights"].flatten()[rows]
        entropies = F.cross_entropy(logits, targets, reduction="none")
        figures["answer"] = (entropies * weights).sum() / weights.sum()
        total = torch.zeros((), device=self.device)
        if phase != "warm-up":
            chosen = self.model.config.num_experts_per_tok
            valid = (batch["segments"] >= 0).flatten()
            balance = torch.stack(
                [load_balance(gate.last_logits, valid, chosen) for gate in self.gates]
            ).mean()
            total = figures["answer"] + self.options.balance_weight * balance
        if divergence is not None:
            figures["divergence"] = divergence
            total = total + self.options.indexer_weight * divergence
        return total

    @torch.no_grad()
    def exact(self, batches: list[dict[str, Any]]) -> str:
        """Share of answers, by task, that teacher-forced decoding would write exactly: a quick look, not the card's table."""
        right: Counter[str] = Counter()
        every: Counter[str] = Counter()
        for raw in batches:
            batch = self.to_device(raw)
            logits, _ = self.read(batch, self.see(batch))
            rows = batch["supervised"]
            wrong = torch.zeros(batch["targets"].numel(), dtype=torch.bool, device=self.device)
            wrong[rows] = logits.argmax(-1) != batch["targets"].flatten()[rows]
            wrong_by_row = wrong.view_as(batch["targets"]).cpu()
            segments = raw["segments"]
            for row, tasks in enumerate(raw["tasks"]):
                for segment, task in enumerate(tasks, start=1):
                    every[task] += 1
                    right[task] += not bool(wrong_by_row[row][segments[row] == segment].any())
        return " ".join(f"{task} {right[task] / every[task]:.2f}" for task in sorted(every))


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """The mean over all processes of the gradients that exist, in one exchange."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    parts = joined.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
    )


def agreed(share: float) -> float:
    """The first process's share of the plan: the clocks of all would put them into different phases."""
    if not dist.is_initialized():
        return share
    value = torch.tensor(share, dtype=torch.float64)
    dist.broadcast(value, src=0)
    return float(value)


def save(model: KeyeVL2ForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder)
    recipe.write_tokenizer_files(tokenizer, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    for field in fields(Options):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    parser.add_argument(
        "--init", type=Path, default=None, help="start from this folder instead of random weights"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--report-every", type=int, default=250)
    parser.add_argument("--exact-every", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=4000)
    parser.add_argument(
        "--draw",
        choices=("both", "compiled"),
        default="both",
        help="who draws the clips: workers and device by turns, or the device alone with a compiled renderer",
    )
    parser.add_argument("--stop-after", type=int, default=0, help="stop after this many steps of the plan")
    arguments = parser.parse_args()
    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    run(options, arguments)


def batches(
    options: Options, tokenizer: Tokenizer, config: Any, arguments: argparse.Namespace, rank: int, world: int
) -> Iterable[dict[str, Any]]:
    """Batches made ahead by worker processes, which also do half of the drawing: neither they nor the device can keep
    up alone."""
    return DataLoader(
        Batches(options, tokenizer, config, 2 if arguments.draw == "both" else 0, rank, world),
        batch_size=None,
        num_workers=arguments.workers,
        prefetch_factor=3 if arguments.workers else None,
        collate_fn=as_it_is,
        pin_memory=arguments.device.startswith("cuda"),
    )


def held_out_batches(options: Options, tokenizer: Tokenizer, config: Any) -> list[dict[str, Any]]:
    """A few batches of all lengths that training never draws."""
    fast = wrapped(tokenizer)
    made = [
        make_batch(index, HELD_OUT_SEED + index * 4096, longest, options, fast, config)
        for index, longest in enumerate((8.0, 15.0, 30.0, 60.0, 60.0, 60.0))
    ]
    return [{**batch, "states": vars(batch["states"])} for batch in made]


def run(options: Options, arguments: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if arguments.device == "cuda":
            arguments.device = f"cuda:{rank}"
            torch.cuda.set_device(rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device(arguments.device)
    # cuDNN builds a plan for every new shape of attention, and here nearly every batch has its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")  # the router's product, which took a tenth of a step
    torch.manual_seed(options.seed)
    tokenizer = recipe.train_tokenizer(recipe.forged_text(recipe.TOKENIZER_SEEDS))
    config = recipe.nano_config(tokenizer)
    dtype = getattr(torch, arguments.dtype)
    if arguments.init:
        model = load_model(arguments.init, device=device, dtype=dtype)
    else:
        model = KeyeVL2ForConditionalGeneration(config).to(device, dtype)
    model.train()
    if rank == 0:
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters; {json.dumps(asdict(options))}",
            flush=True,
        )
    trainer = Trainer(model, options, device)
    if arguments.draw == "compiled":
        drawn = torch.compile(draw_frames, dynamic=True)
        trainer.draw = lambda states, height, width: drawn(states, noise_bank(device), height, width)
    held_out = held_out_batches(options, tokenizer, config)
    started = last = asked = time.monotonic()
    done, reported, clips, waited_s = 0, 0, 0, 0.0
    for step, batch in enumerate(batches(options, tokenizer, config, arguments, rank, world)):
        waited_s += time.monotonic() - asked
        share = agreed(options.share(step, time.monotonic() - started))
        if share >= 1.0:
            break
        figures = trainer.step(batch, share)
        clips += len(batch["tasks"])
        done = step + 1
        if done == arguments.stop_after:
            break
        asked = time.monotonic()
        if rank > 0:
            continue
        if done % arguments.report_every == 0 or done in (1, 10):
            now = time.monotonic()
            rate = (done - reported) / (now - last)
            values = " ".join(f"{key} {float(value):.4f}" for key, value in figures.items())
            print(
                f"{done} {options.phase(share)} {values} lr {options.learning_rate(share):.2e} "
                f"{rate:.1f} steps/s waited {waited_s / (now - last):.0%} {clips} clips {now - started:.0f} s",
                flush=True,
            )
            last, reported, waited_s = now, done, 0.0
        if done % arguments.exact_every == 0:
            print(f"  exact {trainer.exact(held_out)}", flush=True)
        if done % arguments.save_every == 0:
            save(model, tokenizer, arguments.out)
        asked = time.monotonic()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    save(model, tokenizer, arguments.out)
    print(f"  exact {trainer.exact(held_out)}", flush=True)
    print(f"done after {time.monotonic() - started:.0f} s, {done} steps and {clips} clips", flush=True)


if __name__ == "__main__":
    main()
