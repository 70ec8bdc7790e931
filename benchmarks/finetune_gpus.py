"""Fine-tuning on several processes beside one: the same loss and gradients, and how many more tokens a second.

    python benchmarks/finetune_gpus.py --save one.pt
    torchrun --nproc-per-node 2 benchmarks/finetune_gpus.py --against one.pt [--shard]

The released widths with random weights in bf16, `--layers` of them; a step has `--rows` rows of `--row-tokens` tokens, each a
pack of its own. Steps have learning rate 0, so that all of them see the same weights. `--tiny` measures nothing: toy layers on
the CPU. Prints one JSON object; `noise` is how far two steps of the same processes are apart, whose sums have no fixed order.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keyecli.bench.finetune import RandomRows, random_loaded, trainer_of
from keyecli.bench.measure import relative_error
from keyecli.bench.network import official_config
from keyecli.model.config import KeyeVL2Config
from keyecli.training.distributed import joined, whole
from keyecli.training.trainer import Trainer

NO_CLIPPING = 1e9
Gradients = dict[str, Tensor]


def main() -> None:
    wanted = arguments()
    with joined("cpu" if wanted.tiny else "cuda", wanted.shard) as (processes, device):
        config = tiny_config() if wanted.tiny else official_config()
        config.num_hidden_layers = wanted.layers
        loaded = random_loaded(config, device)
        rows = RandomRows(config, [wanted.row_tokens] * wanted.rows)
        trainer = trainer_of(loaded, rows, processes, lr=0.0, clip_norm=NO_CLIPPING, moved_factors=True)
        losses, kept = steps_with_gradients(trainer, rows, 2)
        times = [trainer.step(rows.step(), 0.0).seconds for _ in range(wanted.repeats)]
        seconds = statistics.median(times)
        found: dict[str, Any] = {
            "processes": processes.count,
            "sharded": processes.sharded,
            "layers": wanted.layers,
            "tokens": wanted.row_tokens * wanted.rows,
            "loss": losses[0],
            "seconds": seconds,
            "spread_s": max(times) - min(times),
            "tokens_per_s": wanted.row_tokens * wanted.rows / seconds,
            "peak_bytes": 0 if wanted.tiny else torch.cuda.max_memory_allocated(),
            "noise": worst(kept[1], kept[0]),
        }
        if wanted.save is not None:
            torch.save({"found": found, "gradients": kept[0]}, wanted.save)
        if not processes.first:
            return
        if wanted.against is not None:
            one = torch.load(wanted.against)
            found["loss_error"] = abs(found["loss"] - one["found"]["loss"]) / abs(one["found"]["loss"])
            found["gradient_error"] = worst(kept[0], one["gradients"])
            found["speedup"] = found["tokens_per_s"] / one["found"]["tokens_per_s"]
        print(json.dumps(found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--row-tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shard", action="store_true", help="a part of every layer a process (FSDP2)")
    parser.add_argument("--tiny", action="store_true", help="toy layers on the CPU")
    parser.add_argument("--save", type=Path, help="keep loss, speed and gradients in this file")
    parser.add_argument("--against", type=Path, help="compare with such a file")
    return parser.parse_args()


def steps_with_gradients(
    trainer: Trainer, rows: RandomRows, count: int
) -> tuple[list[float], list[Gradients]]:
    """Losses of so many steps, and what the optimisers were given in each, whole and on the CPU."""
    kept: list[Gradients] = []
    places = {id(parameter): name for name, parameter in zip(trainer.names, trainer.parameters, strict=True)}

    def keep(adamw: torch.optim.Optimizer, *_: Any) -> None:
        for optimizer in trainer.optimizers:
            if optimizer.adamw is adamw:
                for parameter, master in zip(optimizer.parameters, optimizer.masters, strict=True):
                    assert master.grad is not None
                    kept[-1][places[id(parameter)]] = whole(master.grad).cpu()

    handles = [optimizer.adamw.register_step_pre_hook(keep) for optimizer in trainer.optimizers]
    losses = []
    for _ in range(count):
        kept.append({})
        losses.append(trainer.step(rows.step(), 0.0).loss)
    for handle in handles:
        handle.remove()
    return losses, kept


def worst(gradients: Gradients, expected: Gradients) -> float:
    """The largest relative error of any parameter's gradient; infinite where one is no number."""
    assert gradients.keys() == expected.keys()
    errors = [relative_error(gradients[name], expected[name]) for name in gradients]
    return max(error if error == error else float("inf") for error in errors)


def tiny_config() -> KeyeVL2Config:
    """Small enough for two processes on a laptop."""
    return KeyeVL2Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, vocab_size=256, image_token_id=250, video_token_id=251,
        rope_scaling={"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]},
        sa_config={"indexer_head_dim": 16, "indexer_num_heads": 2, "topk": 8, "q_chunk_size": 16},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1,
                       "image_size": 98},
    )  # fmt: skip


if __name__ == "__main__":
    main()
