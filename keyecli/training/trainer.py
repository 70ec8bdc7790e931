"""Steps of training: rows are looked at, packed, shared out among processes, and make one update; held-out rows are measured.

Every process works out the same plan of a step and computes its own packs; sums over all give one process's loss and gradients.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keyecli.engine.loaded import LoadedModel
from keyecli.errors import InputError, KeyeWarning
from keyecli.model.keye import IGNORED_LABEL
from keyecli.training.distributed import Processes, add_gradients, last_backward
from keyecli.training.examples import Example
from keyecli.training.feed import PlannedRow, Planner, Step
from keyecli.training.learner import Learner
from keyecli.training.network import Network, Sight, loss_of, moved, row_losses
from keyecli.training.packing import Pack, best_fit_decreasing, pack, pack_tokens, share_out
from keyecli.training.recall import watching
from keyecli.training.schedule import Schedule
from keyecli.training.sight import see, together

Look = Callable[[PlannedRow], LoadedModel]
"""What a row's frames are read with: the model, perhaps with a reader that has decoded them before."""

HELD_OUT_ROWS = 64
# By name, of each layer: what `HeldOut` has of the indexer.
Recalls = dict[str, list[float | None]]


@dataclass
class Figures:
    """What a step came to, over all processes. frames_imbalance: visual tokens of the busiest process over the mean, less 1."""

    loss: float = 0.0
    entropy: float = 0.0
    divergence: float | None = None
    norm: float = 0.0
    lr: float = 0.0
    tokens: int = 0
    learnt_tokens: int = 0
    rows: int = 0
    seconds: float = 0.0
    fullest_expert: float = 0.0
    peak_bytes: int = 0
    imbalance: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class HeldOut:
    """What held-out rows came to: mean entropy of a learnt token, share of rows whose learnt tokens are all the likeliest ones
    (as teacher-forced decoding would write them), and of each layer the indexer's recall, the best possible, and that of
    answers."""

    loss: float
    exact: float
    rows: int
    indexer_recall: list[float | None] | None = None
    best_recall: list[float | None] | None = None
    answer_recall: list[float | None] | None = None


class Trainer(Learner):
    """Learns what rows answer; `step` makes one update."""

    def __init__(
        self,
        loaded: LoadedModel,
        network: Network,
        planner: Planner,
        schedule: Schedule,
        processes: Processes,
        *,
        capacity: int,
        optimizer: str = "adamw",
        exact_resize: bool = False,
        strict: bool = False,
        look: Look | None = None,
    ) -> None:
        super().__init__(loaded, network, schedule, processes, optimizer)
        self.planner, self.capacity = planner, capacity
        self.exact_resize, self.strict = exact_resize, strict
        self.look = look or (lambda row: loaded)
        self.left_out: dict[str, str] = {}

    def step(self, step: Step, share: float) -> Figures:
        """One update, at `share` of the plan. NotFiniteError when a loss is not a number: nothing is updated then."""
        begin_s = time.perf_counter()
        self.parts_s = {}
        self.training()
        packs, figures = self._packs(step)
        supervised, tokens, count = self._totals(packs)
        losses = torch.zeros(3, device=self.device)
        bad: list[str] = []
        with self.timed("train_s"):
            rounds = self.rounds(len(packs))
            for number in range(rounds):
                with last_backward(self.network, self.processes, number == rounds - 1):
                    if number < len(packs):
                        bad += self._backward(*packs[number], supervised, tokens, count, losses)
                    else:
                        self.learn_nothing()
            add_gradients(self.parameters, self.processes)
        self.processes.sum(losses)
        loss, entropy, divergence = losses.tolist()
        figures.lr = self.schedule.learning_rate(share)
        self._refuse_not_finite(loss, bad, step)
        figures.norm = self.update(figures.lr)
        figures.loss = loss
        figures.entropy = entropy / max(1.0, supervised)
        figures.divergence = divergence / max(1.0, tokens) if self.network.what.teaches_indexer else None
        figures.tokens, figures.learnt_tokens = int(tokens), int(supervised)
        figures.fullest_expert = self.network.fullest_expert()
        figures.seconds = time.perf_counter() - begin_s
        figures.peak_bytes = self.peak_bytes()
        figures.parts_s = dict(self.parts_s)
        return figures

    @torch.no_grad()
    def held_out(self, rows: Sequence[PlannedRow]) -> HeldOut | None:
        """Measure rows that training does not see; None where there is none."""
        rows = rows[:HELD_OUT_ROWS]
        if not rows:
            return None
        self.network.eval()
        processes, totals = self.processes, torch.zeros(4, device=self.device)
        recalls: list[Recalls] = []
        for place in range(0, len(rows), processes.count):
            # A process without a row of its own computes along without being counted: shards need everyone.
            counted = place + processes.rank < len(rows)
            row = rows[min(place + processes.rank, len(rows) - 1)]
            seen = see(self.look(row), row.plans, learning=False, exact_resize=self.exact_resize)
            batch = moved(pack([self.planner.lay_out(row.row, seen.visuals)]), self.device)
            entropy, right, recall = self._measure(batch, seen.sight)
            if counted:
                learnt = batch.learnt_tokens
                totals += torch.tensor([entropy, learnt, right, 1.0], device=self.device)
                recalls.append(recall)
        processes.sum(totals)
        entropy, learnt, right, count = totals.tolist()
        gathered = [row for part in processes.gathered(recalls) for row in part]  # type: ignore[attr-defined]
        return HeldOut(
            entropy / max(1.0, learnt),
            right / max(1.0, count),
            int(count),
            **{name: _mean_of_layers([row[name] for row in gathered]) for name in gathered[0]},
        )

    def _measure(self, batch: Pack, sight: Sight) -> tuple[float, float, Recalls]:
        """Summed entropy of a row, 1 when every learnt token is the likeliest, and the recalls of each layer."""
        decoder = self.loaded.model.model
        answers = batch.targets[0] != IGNORED_LABEL
        watched = watching(decoder, answers) if self.network.what.teaches_indexer else nullcontext()
        with watched as recall:
            sums = self.network(batch, sight, measuring=True)
        assert sums.likeliest is not None
        right = float(sums.likeliest.all())
        recalls: Recalls = {} if recall is None else {
            "indexer_recall": recall.layers, "best_recall": recall.best, "answer_recall": recall.of_answers
        }  # fmt: skip
        return float(sums.entropies.sum()), right, recalls

    def _packs(self, step: Step) -> tuple[list[tuple[Pack, Sight]], Figures]:
        """This process's packs of a step, looked at."""
        lengths = [row.example.tokens for row in step.rows]
        bins = best_fit_decreasing(lengths, pack_tokens(lengths, self.capacity, self.loaded.kernels))
        visual = [sum(step.rows[place].example.visual_tokens for place in places) for places in bins]
        whole = [sum(lengths[place] for place in places) for places in bins]
        # Tokens of frames cost twice: in the tower and in the decoder.
        shares = share_out([a + b for a, b in zip(whole, visual, strict=True)], self.processes.count)
        loads = [sum(visual[number] for number in share) for share in shares]
        mean = sum(loads) / len(loads)
        figures = Figures(rows=len(step.rows), imbalance=max(loads) / mean - 1 if mean else 0.0)
        packs = []
        for number in shares[self.processes.rank]:
            made = self._looked_at([step.rows[place] for place in bins[number]])
            if made is not None:
                packs.append(made)
        return packs, figures

    def _looked_at(self, rows: Sequence[PlannedRow]) -> tuple[Pack, Sight] | None:
        """A pack of those rows whose frames can be read; None when there are none."""
        examples: list[Example] = []
        sights: list[Sight] = []
        for row in rows:
            try:
                with self.timed("frames_s"):
                    seen = see(
                        self.look(row),
                        row.plans,
                        learning=self.network.what.sees,
                        exact_resize=self.exact_resize,
                    )
                    examples.append(self.planner.lay_out(row.row, seen.visuals))
                sights.append(seen.sight)
            except InputError as error:
                self.leave_out(row.row.source, error)
        return (pack(examples), together(sights)) if examples else None

    def leave_out(self, source: str, error: InputError) -> None:
        """Name and count a row that cannot be used; raises it with `strict`."""
        if self.strict:
            raise error
        if source not in self.left_out:
            self.left_out[source] = str(error)
            named = str(error) if source in str(error) else f"{source}: {error}"
            warnings.warn(f"a row is left out: {named}", KeyeWarning, stacklevel=2)

    def _totals(self, packs: Sequence[tuple[Pack, Sight]]) -> tuple[float, float, int]:
        """Supervised tokens, tokens and packs of all processes."""
        own = [
            sum(batch.learnt_tokens for batch, _ in packs) if self.network.what.answers else 0,
            sum(batch.tokens for batch, _ in packs),
            len(packs),
        ]
        summed = self.processes.sum(torch.tensor(own, dtype=torch.float64, device=self.device)).tolist()
        return summed[0], summed[1], int(summed[2])

    def _backward(
        self,
        batch: Pack,
        sight: Sight,
        supervised: float,
        tokens: float,
        packs: int,
        losses: Tensor,
    ) -> list[str]:
        """Gradients of one pack; adds to `losses`, names rows that are no number."""
        sums = self.network(moved(batch, self.device), sight)
        loss = loss_of(sums, supervised, tokens, packs)
        loss.backward()
        divergence = torch.zeros(()) if sums.divergence is None else sums.divergence.detach()
        losses += torch.stack(
            [loss.detach(), sums.entropies.detach().sum(), divergence.to(losses.device)]
        ).to(losses.dtype)
        each = row_losses(sums, len(batch.sources))
        if not bool(torch.isfinite(each).all() & torch.isfinite(loss.detach())):
            finite = torch.isfinite(each).tolist()
            return [name for name, ok in zip(batch.sources, finite, strict=True) if not ok] or [
                *batch.sources
            ]
        return []

    def _refuse_not_finite(self, loss: float, bad: list[str], step: Step) -> None:
        if not math.isfinite(loss) and not self.processes.any(bool(bad), self.device):
            bad = [row.row.source for row in step.rows] if self.processes.first else []
        self.refuse_not_finite(bad, "nothing was updated; ")


def _mean_of_layers(rows: Sequence[Sequence[float | None]]) -> list[float | None] | None:
    """The mean of each layer over rows that have one."""
    if not any(rows):
        return None
    means: list[float | None] = []
    for layer in zip(*[row for row in rows if row], strict=True):
        known = [value for value in layer if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means
