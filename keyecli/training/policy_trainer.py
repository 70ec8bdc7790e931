"""Updates of a policy from groups of scored answers: old probabilities, minibatches, and what is watched meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keyecli.engine.loaded import LoadedModel
from keyecli.model.prompt import Prompt
from keyecli.training.distributed import (
    Processes,
    add_gradients,
    last_backward,
    own_part,
    whole_layers,
)
from keyecli.training.learner import Learner
from keyecli.training.network import Network, Sums, balance_loss, moved
from keyecli.training.packing import Pack
from keyecli.training.policy_loss import Algorithm, divergence_estimate, objective
from keyecli.training.rollouts import Group, group_pack, passes
from keyecli.training.schedule import Schedule
from keyecli.training.sight import Seen


@dataclass(frozen=True)
class ScoredGroup:
    """A group whose answers are to be made likelier or less likely: what its prompt became, and each answer's advantage."""

    group: Group
    prompt: Prompt
    seen: Seen
    advantages: Sequence[float]


@dataclass
class Pass:
    """Some answers of a group that go through the network together, and the logarithms of their tokens' probabilities: as the
    engine drew them and under the weights before the step, fp32 [S]; rows int64 [S]."""

    pack: Pack
    seen: Seen
    advantages: Tensor
    engine: Tensor
    rows: Tensor
    old: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class PolicyFigures:
    """What an update came to, over all processes. entropy: mean −log p of the drawn tokens; clipped: share of answers (GRPO:
    tokens) whose gradient was taken away; mismatch: mean |log p| between engine and trainer; divergence: of drawn tokens from
    the weights at the start of the run, None where it was not measured. All but lr are None where there was nothing to learn."""

    answers: int = 0
    tokens: int = 0
    entropy: float | None = None
    clipped: float | None = None
    mismatch: float | None = None
    divergence: float | None = None
    norm: float | None = None
    lr: float = 0.0


class PolicyTrainer(Learner):
    """A policy that learns from its own answers; `step` makes one update for each minibatch."""

    def __init__(
        self,
        loaded: LoadedModel,
        network: Network,
        schedule: Schedule,
        processes: Processes,
        *,
        algorithm: Algorithm,
        clipping: tuple[float, float] | None,
        max_length: int,
        minibatches: int,
        optimizer: str = "adamw",
    ) -> None:
        super().__init__(loaded, network, schedule, processes, optimizer)
        self.algorithm, self.clipping = algorithm, clipping
        self.max_length, self.minibatches = max_length, minibatches
        self._start = [part.to("cpu", copy=True) for part in self._parts()]

    def step(self, groups: Sequence[ScoredGroup], share: float, *, watch: bool = False) -> PolicyFigures:
        """Learn from this process's groups, at `share` of the run; watch: also measure the divergence from the start.

        Old probabilities are those that the trainer itself finds before the first update (C): the engine computes in another
        order, and what it is off by would be clipped. NotFiniteError when a loss is not a number; updates before it stay.
        """
        lr = self.schedule.learning_rate(share)
        figures = PolicyFigures(lr=lr)
        self.training()
        batches = [self._passes(groups[number :: self.minibatches]) for number in range(self.minibatches)]
        with self.timed("old_s"):
            made = [one for batch in batches for one in batch]
            with whole_layers(self.network, self.processes):
                for one in made:
                    one.old = self._log_probs(one)
            self._watch(figures, made, watch)
        if not figures.answers:
            return figures
        clipped = torch.zeros(2, device=self.device)
        for batch in batches:
            with self.timed("train_s"):
                self._backward(batch, clipped)
                add_gradients(self.parameters, self.processes)
            figures.norm = max(figures.norm or 0.0, self.update(lr))
        self.processes.sum(clipped)
        figures.clipped = float(clipped[0] / clipped[1])
        return figures

    def _passes(self, groups: Sequence[ScoredGroup]) -> list[Pass]:
        made = []
        for scored in groups:
            rollouts = scored.group.rollouts
            lengths = [len(rollout.token_ids) for rollout in rollouts]
            for places in passes(len(scored.prompt.input_ids), lengths, self.max_length):
                chosen = [rollouts[place] for place in places]
                pack = group_pack(scored.prompt, scored.group.prompt.row.source, chosen)
                counts = torch.tensor([lengths[place] for place in places])
                made.append(
                    Pass(
                        pack,
                        scored.seen,
                        torch.tensor([scored.advantages[place] for place in places], device=self.device),
                        torch.tensor(
                            [value for one in chosen for value in one.log_probs], device=self.device
                        ),
                        torch.arange(len(places)).repeat_interleave(counts).to(self.device),
                    )
                )
        return made

    def _forward(self, one: Pass) -> Sums:
        return self.network(moved(one.pack, self.device), one.seen.sight)

    @torch.no_grad()
    def _log_probs(self, one: Pass) -> Tensor:
        """Logarithms of the drawn tokens' probabilities, fp32 [S]."""
        return -self._forward(one).entropies

    def _backward(self, batch: Sequence[Pass], clipped: Tensor) -> None:
        """Gradients of one minibatch; adds to `clipped` what was clipped, and of how many."""
        per_token = self.algorithm == "grpo"
        own = sum(len(one.rows) if per_token else len(one.advantages) for one in batch)
        counts = self.processes.sum(torch.tensor([float(own), float(len(batch))], device=self.device))
        total, passes = counts.clamp(min=1).tolist()
        bad: list[str] = []
        rounds = self.rounds(len(batch))
        for number in range(rounds):
            with last_backward(self.network, self.processes, number == rounds - 1):
                if number >= len(batch):
                    self.learn_nothing()
                    continue
                one = batch[number]
                sums = self._forward(one)
                found = objective(
                    self.algorithm, -sums.entropies, one.old, one.engine, one.rows, one.advantages, self.clipping
                )  # fmt: skip
                (balance_loss(sums.balance, int(passes)) - found.total / total).backward()
            clipped += torch.tensor([float(found.clipped.sum()), float(len(found.clipped))]).to(clipped)
            if not math.isfinite(float(found.total.detach())):
                bad += one.pack.sources
        self.refuse_not_finite(bad)

    @torch.no_grad()
    def _watch(self, figures: PolicyFigures, made: Sequence[Pass], start: bool) -> None:
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for one in made:
            off = (one.old - one.engine).abs().sum()
            sums += torch.stack(
                [torch.tensor(float(len(one.rows)), device=self.device), -one.old.sum(), off,
                 torch.tensor(float(len(one.advantages)), device=self.device)]
            ).double()  # fmt: skip
        self.processes.sum(sums)
        tokens, entropy, off, answers = sums.tolist()
        figures.tokens, figures.answers = int(tokens), int(answers)
        if not answers:
            return
        figures.entropy, figures.mismatch = entropy / tokens, off / tokens
        if start:
            figures.divergence = self._divergence(made[:1])

    def _divergence(self, made: Sequence[Pass]) -> float:
        """From the start, of the drawn tokens of one pass of each process."""
        found = torch.zeros(2, device=self.device)
        with self._at_start(), whole_layers(self.network, self.processes):
            for one in made:
                estimates = divergence_estimate(one.old, self._log_probs(one))
                found += torch.stack([estimates.sum(), torch.tensor(float(len(estimates))).to(found)])
        self.processes.sum(found)
        return float(found[0] / found[1].clamp(min=1))

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """With the weights that the run began with."""
        now = [part.clone() for part in self._parts()]
        for part, start in zip(self._parts(), self._start, strict=True):
            part.copy_(start)
        try:
            yield
        finally:
            for part, own in zip(self._parts(), now, strict=True):
                part.copy_(own)

    def _parts(self) -> list[Tensor]:
        """What this process holds of what learns."""
        return [own_part(parameter.detach()) for parameter in self.parameters]
