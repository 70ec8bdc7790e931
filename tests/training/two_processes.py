"""Steps of training under torchrun: `python -m torch.distributed.run … -m tests.training.two_processes FILE COMMANDS`.

Writes what `steps` gives for every case of `CASES` and `policy_steps` for every one of `POLICIES` to FILE, then runs the command
lines of COMMANDS (JSON); `test_distributed.py` compares all with one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from keyecli.bench.finetune import RandomRows, adapted_network, random_loaded, trainer_of
from keyecli.cli import run
from keyecli.model.config import KeyeVL2Config
from keyecli.model.prompt import Prompt
from keyecli.training.distributed import Processes, joined, shard, whole
from keyecli.training.learner import Learner
from keyecli.training.network import Network, Sight, Trained, freeze
from keyecli.training.policy_trainer import PolicyTrainer, ScoredGroup
from keyecli.training.rollouts import Group, PlannedPrompt, Rollout
from keyecli.training.rows import TrainingRow
from keyecli.training.schedule import Schedule
from keyecli.training.sight import Seen
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
        "adapter": learnt(trainer),
    }


def learnt(learner: Learner) -> dict[str, Tensor]:
    """Everything that learns, whole."""
    return {
        name: whole(parameter.detach()).clone()
        for name, parameter in zip(learner.names, learner.parameters, strict=True)
    }


@dataclass(frozen=True)
class PolicyCase:
    """What learns from three groups of tries, of which the first process has one or two: in the second minibatch, or in all of
    them, the other one has nothing."""

    train: str
    first_has: int
    sharded: bool


POLICIES = {
    f"{train}, {has} of 3 groups{', sharded' if sharded else ''}": PolicyCase(train, has, sharded)
    for train, has in (("lora", 2), ("full", 3))
    for sharded in (False, True)
}


def policy_steps(case: PolicyCase, processes: Processes) -> dict[str, Any]:
    """Figures of some updates, and what they made of the weights."""
    loaded = random_loaded(KeyeVL2Config(**tiny_config()), "cpu")
    if case.train == "lora":
        network = adapted_network(loaded, 2, moved_factors=True)
    else:
        what = Trained("full")
        freeze(loaded.model, what)
        network = Network(loaded.model, what)
        network.checkpoint_activations()
    shared_out = replace(processes, sharded=case.sharded and processes.count > 1)
    if shared_out.sharded:
        shard(network, shared_out, "cpu")
    trainer = PolicyTrainer(
        loaded, network, Schedule(1e-2, warm_up=0.0), shared_out, algorithm="grpo", clipping=None, max_length=1,
        minibatches=2,
    )  # fmt: skip
    groups = [scored_group(number) for number in range(3)]
    if processes.count > 1:
        groups = groups[: case.first_has] if processes.first else groups[case.first_has :]
    # Chunks of logits differ in number, too.
    with patch("keyecli.training.network.LOSS_CHUNK_TOKENS", 3):
        figures = [trainer.step(groups, 0.5, watch=True) for _ in range(STEPS)]
    return {"figures": [asdict(each) for each in figures], "weights": learnt(trainer)}


def scored_group(number: int) -> ScoredGroup:
    """Tries of a made-up prompt, one more and one token longer in each group."""
    generator = torch.Generator().manual_seed(number)
    lengths: Sequence[int] = [4 + number] * (2 + number)
    rollouts = [
        Rollout(0, torch.randint(5, 90, (length,), generator=generator).tolist(), [-5.0] * length)
        for length in lengths
    ]
    ids = torch.randint(5, 90, (9 + number,), generator=generator)
    prompt = Prompt(ids, torch.arange(len(ids)).expand(3, -1), len(ids), 0, False)
    planned = PlannedPrompt(number, TrainingRow(f"rows:{number}", ()), (), {}, len(ids))
    gains = [1.0 - 2 * (place % 2) for place in range(len(lengths))]
    return ScoredGroup(Group(number, planned, rollouts), prompt, Seen((), Sight()), gains)


def evenness(response: str, row: Any) -> float:
    """A reward that the noise of a toy model has more or less of."""
    return sum(ord(letter) % 2 == 0 for letter in response) / max(1, len(response))


def main() -> None:
    with joined("cpu", None) as (processes, _):
        found = {name: steps(case, processes) for name, case in CASES.items()}
        found |= {name: policy_steps(case, processes) for name, case in POLICIES.items()}
        if processes.first:
            torch.save(found, sys.argv[1])

        @contextmanager
        def as_before(device: str, shard: bool | None) -> Iterator[tuple[Processes, str]]:
            # Processes find each other once.
            yield replace(processes, sharded=processes.sharded if shard is None else shard), device

        with patch("keyecli.training.run.joined", as_before):
            for command in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
                if code := run(command):
                    sys.exit(code)


if __name__ == "__main__":
    main()
