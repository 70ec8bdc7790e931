"""Steps of fine-tuning in the released shape with random weights, beside those of transformers and PEFT, without a download."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from keyecli.bench import finetune_peft
from keyecli.bench.finetune_figures import FinetuneCheck, FinetuneComparison, FinetuneMeasurement
from keyecli.bench.measure import relative_error
from keyecli.bench.network import official_config, random_network, random_tokens
from keyecli.bench.parts import PartTimer
from keyecli.engine.loaded import LoadedModel, free_memory_bytes, torch_dtype
from keyecli.errors import KeyeWarning
from keyecli.kernels.dispatch import Backend
from keyecli.model.checkpoint import Preprocessor
from keyecli.model.config import KeyeVL2Config
from keyecli.model.decoder import DecoderLayer
from keyecli.model.keye import IGNORED_LABEL, KeyeVL2ForConditionalGeneration
from keyecli.model.lora import LoraSettings, add_lora, lora_parameters
from keyecli.training.distributed import Processes, shard
from keyecli.training.estimate import estimate_training
from keyecli.training.examples import Example
from keyecli.training.feed import PlannedRow, Planner, Position, Step
from keyecli.training.network import Network, Sight, Trained, freeze, loss_of, moved
from keyecli.training.packing import pack
from keyecli.training.rows import TrainingRow
from keyecli.training.schedule import Schedule
from keyecli.training.trainer import Figures, Trainer
from keyecli.video.sampling import FrameBudget

Row = FinetuneCheck | FinetuneComparison | FinetuneMeasurement

KEYE = "keye"
RANK = 16
LEARNT_TOKENS = 512
LR = 1e-4
CHECK_LAYERS, CHECK_TOKENS = 2, 4096
# Of longer steps fewer are timed.
LONG_STEP_S, VERY_LONG_STEP_S = 10.0, 20.0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class RandomRows(Planner):
    """Rows of text without a file, one of each length: the vocabulary in its order from a random place on, so that tokens are as
    alike as its neighbouring embeddings; the last `learnt_tokens` are learnt."""

    def __init__(
        self, config: KeyeVL2Config, lengths: Sequence[int], learnt_tokens: int = LEARNT_TOKENS, seed: int = 0
    ) -> None:
        visual = (config.image_token_id, config.video_token_id)
        words = np.setdiff1d(np.arange(config.vocab_size), visual)
        random = np.random.Generator(np.random.PCG64(seed))
        self.max_length = max(lengths)
        self.examples: list[Example] = []
        for place, tokens in enumerate(lengths):
            ids = words[(random.integers(len(words)) + np.arange(tokens + 1)) % len(words)]
            targets = np.where(np.arange(tokens) < tokens - learnt_tokens, IGNORED_LABEL, ids[1:])
            positions = np.arange(tokens)[None].repeat(3, axis=0)
            self.examples.append(Example(str(place), ids[:-1], positions, targets, 0))

    def lay_out(self, row: TrainingRow, visuals: Sequence[Any]) -> Example:
        return self.examples[int(row.source)]

    def step(self, *places: int) -> Step:
        """A step of these rows; of all where none is named."""
        chosen = [self.examples[place] for place in places] or self.examples
        rows = [
            PlannedRow(int(example.source), TrainingRow(example.source, ()), (), example)
            for example in chosen
        ]
        return Step(tuple(rows), Position())


def measure(lengths: Sequence[int], quant: str | None = None) -> Iterator[Row]:
    """A check at a short length, steps of each length, and those of transformers with PEFT up to the longest that it holds.

    RuntimeError when the check fails, NotFiniteError for a loss that is no number; a KeyeWarning for a length that does not fit.
    """
    check = check_step(random_loaded(_layers(official_config(quant), CHECK_LAYERS), "cuda"), CHECK_TOKENS)
    yield check
    check.require()
    ours: dict[int, FinetuneMeasurement] = {}
    for figure in _ours(lengths, quant):
        ours[figure.tokens] = figure
        yield figure
    if find_spec("peft") is None:
        warnings.warn("transformers with PEFT is not measured: pip install peft", KeyeWarning, stacklevel=2)
        return
    _free()
    longest: dict[str, FinetuneMeasurement] = {}
    for figure in finetune_peft.measure(official_config(), RANK, LEARNT_TOKENS):
        longest[figure.network] = figure
        yield figure
    for figure in _ours(sorted({other.tokens for other in longest.values()} - set(ours)), quant):
        ours[figure.tokens] = figure
        yield figure
    for name, other in longest.items():
        if other.tokens in ours:
            same = ours[other.tokens]
            yield FinetuneComparison(name, other.tokens, same.tokens_per_s, other.tokens_per_s, max(ours))


def _ours(lengths: Sequence[int], quant: str | None) -> Iterator[FinetuneMeasurement]:
    """Our steps of each length that fits, in the released shape on the GPU."""
    if not lengths:
        return
    _free()
    loaded = random_loaded(official_config(quant), "cuda")
    yield from measure_lengths(loaded, lengths)


def random_loaded(config: KeyeVL2Config, device: str) -> LoadedModel:
    """A model of this shape with random weights: on the GPU in bf16 with neighbouring embeddings alike, on the CPU in fp32."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        model = random_network(config)
        for part in (model.visual, model.mlp_AR):
            part.to_empty(device="cuda")
            part.apply(model._init_weights)
        with torch.no_grad():
            embeddings = cast(Tensor, model.model.embed_tokens.weight)
            embeddings.copy_(random_tokens(*embeddings.shape)[0])
    else:
        torch.manual_seed(0)
        model = KeyeVL2ForConditionalGeneration(config)
        model.apply(model._init_weights)
    return LoadedModel(
        name="random weights", folder=Path("random"), config=config,
        preprocessor=Preprocessor(mean=(0.5,) * 3, std=(0.5,) * 3, budget=FrameBudget(), fps=2.0),
        device=device, dtype="bf16" if on_gpu else "fp32", kernels="triton" if on_gpu else "reference",
        revision="random", model=model.eval(), tokenizer=None, generation_config=None,
    )  # fmt: skip


def trainer_of(
    loaded: LoadedModel,
    rows: RandomRows,
    processes: Processes | None = None,
    *,
    rank: int = RANK,
    lr: float = LR,
    clip_norm: float = 1.0,
    moved_factors: bool = False,
) -> Trainer:
    """What makes LoRA steps of these rows, with gradient checkpointing; with `moved_factors` no factor is zero, so that all have
    gradients."""
    processes = processes or Processes()
    network = adapted_network(loaded, rank, moved_factors=moved_factors)
    if processes.sharded:
        shard(network, processes, loaded.device)
    return Trainer(
        loaded,
        network,
        rows,
        Schedule(lr, warm_up=0.0, clip_norm=clip_norm),
        processes,
        capacity=rows.max_length,
    )


def adapted_network(loaded: LoadedModel, rank: int, *, moved_factors: bool = False) -> Network:
    """The model with an adapter that learns, with gradient checkpointing."""
    what = Trained("lora")
    torch.manual_seed(0)
    freeze(loaded.model, what)
    add_lora(loaded.model, LoraSettings(rank=rank))
    if moved_factors:
        for name, parameter in lora_parameters(loaded.model).items():
            if name.endswith("_B"):
                nn.init.normal_(parameter, std=0.02)
    network = Network(loaded.model, what)
    network.checkpoint_activations()
    return network


def measure_lengths(
    loaded: LoadedModel, lengths: Sequence[int], *, rank: int = RANK, learnt_tokens: int = LEARNT_TOKENS
) -> Iterator[FinetuneMeasurement]:
    """Steps of one sequence of each length; a KeyeWarning for one that does not fit."""
    rows = RandomRows(loaded.config, lengths, learnt_tokens)
    trainer = trainer_of(loaded, rows, rank=rank)
    timer = PartTimer(loaded.device)
    with timer.watching(parts_of(loaded.model)):
        for place, tokens in enumerate(lengths):
            planned = estimate_training(
                loaded.config, train=("lora",), dtype=loaded.dtype, lora_rank=rank, pack_tokens=tokens,
                device=loaded.device, patches_per_row=0,
            )  # fmt: skip
            room_bytes = planned.room_bytes(free_memory_bytes(loaded.device))
            trainer.network.keeper.room_bytes = room_bytes
            try:
                figures, shares = _timed_steps(trainer, rows.step(place), timer)
            except torch.OutOfMemoryError:
                for parameter in trainer.parameters:
                    parameter.grad = None
                warnings.warn(f"{tokens} tokens do not fit: {planned.describe()}", KeyeWarning, stacklevel=2)
                continue
            times = [each.seconds for each in figures]
            yield FinetuneMeasurement(
                KEYE, loaded.quant or loaded.dtype, tokens, figures[-1].learnt_tokens, statistics.median(times),
                max(times) - min(times), len(times), max(each.peak_bytes for each in figures), figures[-1].loss,
                planned.total_bytes + room_bytes, shares,
            )  # fmt: skip


def _timed_steps(trainer: Trainer, step: Step, timer: PartTimer) -> tuple[list[Figures], dict[str, float]]:
    """Figures of steps after a first one that compiles what is needed, and the shares of the last one's time."""
    if trainer.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    first_s = trainer.step(step, 0.0).seconds
    repeats = 1 if first_s > VERY_LONG_STEP_S else 2 if first_s > LONG_STEP_S else 3
    figures = []
    for _ in range(repeats):
        timer.begin()
        figures.append(trainer.step(step, 0.0))
    last = figures[-1]
    seconds = {**timer.seconds(), "optimiser": last.parts_s["update_s"]}
    named = ("attention", "projections", "experts", "loss", "optimiser")
    shares = {part: seconds.get(part, 0.0) / last.seconds for part in named}
    return figures, {**shares, "rest": 1 - sum(shares.values())}


def parts_of(model: KeyeVL2ForConditionalGeneration) -> dict[nn.Module, str]:
    """Modules by the part of a step that they are: attention with the indexer, its four projections, experts with their router,
    the output head; the rest of a layer is norms and sums."""
    parts: dict[nn.Module, str] = {model.lm_head: "loss"}
    for module in model.model.layers:
        layer = cast(DecoderLayer, module)
        parts |= {layer: "rest", layer.self_attn: "attention", layer.mlp: "experts"}
        parts |= {getattr(layer.self_attn, name): "projections" for name in PROJECTIONS}
    return parts


def check_step(loaded: LoadedModel, tokens: int, *, rank: int = RANK) -> FinetuneCheck:
    """Loss and gradients of one sequence by the device's kernels, beside those of the definitions."""
    rows = RandomRows(loaded.config, [tokens], min(LEARNT_TOKENS, tokens // 2))
    network = adapted_network(loaded, rank, moved_factors=True)
    return gradient_check(loaded, network, lambda: example_loss(loaded, network, rows.examples[0]), tokens)


def example_loss(loaded: LoadedModel, network: Network, example: Example) -> Tensor:
    """Of one sequence of text."""
    batch = moved(pack([example]), loaded.device)
    return loss_of(network(batch, no_sight(loaded)), batch.learnt_tokens, batch.tokens, 1)


def no_sight(loaded: LoadedModel) -> Sight:
    """Of text alone."""
    width = loaded.config.hidden_size
    return Sight(embeds=torch.empty(0, width, dtype=torch_dtype(loaded.dtype), device=loaded.device))


def gradient_check(
    loaded: LoadedModel,
    network: Network,
    loss: Callable[[], Tensor],
    tokens: int,
    training: str = "fine-tuning",
) -> FinetuneCheck:
    """A loss through `network` and its gradients by the device's kernels, beside those of the definitions."""
    found, gradients = gradients_of(loaded, network, loss, None)
    expected, definitions = gradients_of(loaded, network, loss, "reference")
    errors: dict[str, float] = {}
    for name, gradient in gradients.items():
        adapter = ".".join(name.split(".")[-2:])
        errors[adapter] = max(errors.get(adapter, 0.0), _error(gradient, definitions[name]))
    layers = loaded.config.num_hidden_layers
    return FinetuneCheck(tokens, layers, found, abs(found - expected) / abs(expected), errors, training)


def _error(gradient: Tensor, expected: Tensor) -> float:
    """`relative_error`; infinite where it is no number, which `max` would lose."""
    error = relative_error(gradient, expected)
    return error if error == error else float("inf")


def gradients_of(
    loaded: LoadedModel, network: Network, loss: Callable[[], Tensor], backend: Backend | None
) -> tuple[float, dict[str, Tensor]]:
    """A loss and the gradients of everything that learns, by the kernels of `backend`."""
    loaded.model.set_kernel_backend(backend)
    found = loss()
    found.backward()
    gradients = {}
    for name, parameter in network.learning().items():
        assert parameter.grad is not None
        gradients[name], parameter.grad = parameter.grad, None
    return float(found.detach()), gradients


def _layers(config: KeyeVL2Config, layers: int) -> KeyeVL2Config:
    config.num_hidden_layers = layers
    return config


def _free() -> None:
    """What the last network held goes back before the next one comes."""
    gc.collect()
    torch.cuda.empty_cache()
