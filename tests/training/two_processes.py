"""Steps of training under torchrun: `python -m torch.distributed.run … -m tests.training.two_processes FILE`.

Writes what `steps` gives for every case of `CASES` to FILE; `test_distributed.py` compares it with one process.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from keyecli.bench.finetune import RandomRows, random_loaded, trainer_of
from keyecli.model.config import KeyeVL2Config
from keyecli.training.distributed import Processes, joined, whole
from tests.tiny import tiny_config

STEPS = 2
LONG, SHORT = 48, 30


@dataclass(frozen=True)
class Case:
    """Rows of a step, no two of which fit into one pack; sharded matters to several processes alone."""

    rows: tuple[int, ...]
    sharded: bool
    dtype: torch.dtype = torch.float32


CASES = {
    "whole": Case((LONG, SHORT), sharded=False),
    "sharded": Case((LONG, SHORT), sharded=True),
    "whole, one has a pack more": Case((LONG, SHORT, SHORT), sharded=False),
    "sharded, one has a pack more": Case((LONG, SHORT, SHORT), sharded=True),
    "whole, one has nothing": Case((LONG,), sharded=False),
    "sharded, one has nothing": Case((LONG,), sharded=True),
    "sharded, in bf16": Case((LONG, SHORT, SHORT), sharded=True, dtype=torch.bfloat16),
}


def steps(case: Case, processes: Processes) -> dict[str, Any]:
    """Losses and norms of gradients of some steps; the gradients of the first, the adapter behind the last, whole."""
    loaded = random_loaded(KeyeVL2Config(**tiny_config()), "cpu")
    loaded.model.to(case.dtype)
    if case.dtype == torch.bfloat16:
        loaded = replace(loaded, dtype="bf16")
    rows = RandomRows(loaded.config, case.rows, learnt_tokens=20)
    shared_out = replace(processes, sharded=case.sharded and processes.count > 1)
    trainer = trainer_of(loaded, rows, shared_out, rank=2, lr=1e-2, moved_factors=True)
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, master in zip(trainer.names, trainer.optimizers[0].masters, strict=True):
            if name not in gradients:
                assert master.grad is not None
                gradients[name] = whole(master.grad).clone()

    trainer.optimizers[0].adamw.register_step_pre_hook(keep)
    figures = [trainer.step(rows.step(), 0.5) for _ in range(STEPS)]
    return {
        "losses": [each.loss for each in figures],
        "norms": [each.norm for each in figures],
        "tokens": [each.tokens for each in figures],
        "gradients": gradients,
        "adapter": {
            name: whole(parameter.detach()).clone()
            for name, parameter in zip(trainer.names, trainer.parameters, strict=True)
        },
    }


def main() -> None:
    with joined("cpu", None) as (processes, _):
        found = {name: steps(case, processes) for name, case in CASES.items()}
        if processes.first:
            torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
