"""A run of distillation: a student answers, the teacher of each row says what it would have written there, and the student moves
towards it (multi-teacher on-policy distillation); it may be interrupted anywhere, and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from keyecli.engine.loaded import LoadedModel, ModelFiles
from keyecli.errors import InputError, UsageError
from keyecli.model.prompt import Prompt, Visual
from keyecli.training.data import DataFile
from keyecli.training.distill_loss import (
    Aligned,
    Estimator,
    Metrics,
    Sampled,
    Side,
    check_same,
    distill_losses,
    repetition_penalty,
    token_weights,
)
from keyecli.training.distributed import Processes, add_gradients, last_backward, whole_layers
from keyecli.training.estimate import TrainingEstimate
from keyecli.training.learner import Learner
from keyecli.training.network import Main, Network, balance_loss, moved
from keyecli.training.on_policy import (
    EvalFigures,
    Finished,
    OnFirstPass,
    OnPolicyRun,
    OnPolicySettings,
    ShownGroup,
    means,
    told_of,
)
from keyecli.training.packing import Pack
from keyecli.training.rewards import Composite, Scores
from keyecli.training.rollouts import Group, Rollout, group_pack, passes
from keyecli.training.run import opened
from keyecli.training.schedule import LEARNING_RATES, Schedule
from keyecli.training.sight import Seen
from keyecli.training.teachers import Route, Teacher, load_teachers, route_of

OnStep = Callable[[int, float, "DistillFigures"], None]
"""Told after each step: its number, the share of the run that is done, and its figures."""

UNSCORED = Scores(None, {})


@dataclass(frozen=True)
class DistillSettings(OnPolicySettings):
    """Everything that decides a run besides its student, its teachers and its data. routes: as their file gives them."""

    rollouts: int = 1
    prompts: int = 16
    estimator: Estimator = field(default_factory=Estimator)
    weighs: bool = True
    routes: tuple[str, ...] = ()

    COMMAND: ClassVar[str] = "keye distill"
    RATES: ClassVar[Mapping[Main, float]] = LEARNING_RATES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator.k < 1:
            raise UsageError(f"--top-k must be at least 1, not {self.estimator.k}")


@dataclass
class DistillFigures:
    """What a step came to, over all processes. advantage, divergence, overlap, support: means over the sampled tokens, see
    `distill_loss.Metrics`; teachers: the divergence from each; entropy: mean −log p of the sampled tokens, as they were drawn."""

    loss: float | None = None
    advantage: float | None = None
    divergence: float | None = None
    overlap: float | None = None
    support: float | None = None
    entropy: float | None = None
    teachers: dict[str, float] = field(default_factory=dict)
    reward: float | None = None
    families: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    length: float | None = None
    truncated: float | None = None
    unscored: int = 0
    groups: int = 0
    tokens: int = 0
    norm: float | None = None
    lr: float = 0.0
    rollouts_per_s: float = 0.0
    seconds: float = 0.0
    generate_s: float = 0.0
    train_s: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Distilled:
    """What a run made: `folder` holds an adapter or a model; before and after are the held-out rows' figures."""

    folder: Path
    train: str
    steps: int
    tries: int
    left_out: int
    seconds: float
    divergence_first: float | None
    divergence_last: float | None
    peak_bytes: int
    before: EvalFigures | None
    after: EvalFigures | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, schema keye.distill/1."""
        return {"schema": "keye.distill/1", **asdict(self), "folder": str(self.folder)}


def distill(
    files: ModelFiles,
    data: Path,
    out: Path,
    settings: DistillSettings,
    routes: Sequence[Route],
    score: Composite,
    *,
    format: str | None = None,
    dataset: str | None = None,
    media_root: Path | None = None,
    eval_data: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    frame_cache: Any = None,
    on_estimate: Callable[[TrainingEstimate], None] | None = None,
    on_start: Callable[[Processes], None] | None = None,
    on_step: OnStep | None = None,
) -> Distilled:
    """Train and write OUT; errors as `keyecli.training.rl.reinforce`, and those of routes and teachers."""
    with opened(
        files,
        data,
        out,
        settings,
        format=format,
        dataset=dataset,
        media_root=media_root,
        eval_data=eval_data,
        resume=resume,
        overwrite=overwrite,
        on_start=on_start,
    ) as begun:
        run = _Distilling(
            begun.files, begun.rows, begun.held_out, out, settings, begun.processes, frame_cache, score, routes
        )  # fmt: skip
        return run.write(run.run(resume, on_estimate, None, on_step))


@dataclass(frozen=True)
class TaughtGroup:
    """What the student wrote about a prompt, and who teaches it there."""

    group: Group
    prompt: Prompt
    seen: Seen
    teacher: Teacher


@dataclass(frozen=True)
class Judged:
    """Some answers of a group that go through the student together, as a pack on its device, and what their teacher says."""

    taught: TaughtGroup
    chosen: Sequence[Rollout]
    pack: Pack
    teacher: Side


class DistillTrainer(Learner):
    """A student that moves towards the teachers of what it wrote; `step` makes one update for each minibatch."""

    def __init__(
        self, loaded: LoadedModel, network: Network, processes: Processes, settings: DistillSettings
    ) -> None:
        schedule = Schedule(settings.rate, weight_decay=settings.weight_decay)
        super().__init__(loaded, network, schedule, processes, settings.optimizer)
        self.settings = settings

    def step(self, groups: Sequence[TaughtGroup], share: float) -> DistillFigures:
        """Learn from this process's groups, at `share` of the run. NotFiniteError when a loss is not a number."""
        settings = self.settings
        figures = DistillFigures(lr=self.schedule.learning_rate(share))
        self.training()
        told: list[dict[str, Any]] = []
        for number in range(settings.minibatches):
            batch = groups[number :: settings.minibatches]
            own = sum(len(one.token_ids) for taught in batch for one in taught.group.rollouts)
            total = self.processes.sum(torch.tensor(float(own), device=self.device)).clamp(min=1)
            with self.timed("train_s"):
                with whole_layers(self.network, self.processes):
                    judged = [one for taught in batch for one in self._judged(taught)]
                rounds = self.rounds(len(judged))
                passed = int(self.processes.sum(torch.tensor(float(len(judged)), device=self.device)))
                for place in range(rounds):
                    with last_backward(self.network, self.processes, place == rounds - 1):
                        if place < len(judged):
                            told.append(self._learn(judged[place], total, passed))
                        else:
                            self.learn_nothing()
                self.refuse_not_finite(
                    sorted({one["source"] for one in told if not math.isfinite(one["loss"])})
                )
                add_gradients(self.parameters, self.processes)
            figures.norm = max(figures.norm or 0.0, self.update(figures.lr))
        gathered: list[list[dict[str, Any]]] = self.processes.gathered(told)  # type: ignore[assignment]
        self._tell(figures, [one for part in gathered for one in part])
        return figures

    def _judged(self, taught: TaughtGroup) -> Iterator[Judged]:
        """The passes of a group, each with what the teacher says of its answers."""
        rollouts = taught.group.rollouts
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        source = taught.group.prompt.row.source
        view, view_seen = taught.teacher.view(taught.group.prompt, taught.prompt, taught.seen)
        for places in passes(len(taught.prompt.input_ids), lengths, self.settings.max_length):
            chosen = [rollouts[place] for place in places]
            batch = moved(group_pack(taught.prompt, source, chosen), self.device)
            theirs = moved(group_pack(view, source, chosen), taught.teacher.loaded.device)
            check_same(aligned(batch, taught.seen, taught.prompt), aligned(theirs, view_seen, view))
            yield Judged(taught, chosen, batch, taught.teacher.side(theirs, view_seen.sight))

    def _learn(self, judged: Judged, total: Tensor, passes: int) -> dict[str, Any]:
        """Gradients of a pass; gives the sums of its figures."""
        taught, chosen = judged.taught, judged.chosen
        student = Side(self.network.states(judged.pack, taught.seen.sight), self.loaded.model.logits)
        losses, found = distill_losses(
            student, judged.teacher, self._sampled(taught, chosen), self.settings.estimator
        )
        (losses.sum() / total + balance_loss(self.network.balance(), passes)).backward()
        return self._sums(taught, losses.detach(), found, chosen)

    def _sampled(self, taught: TaughtGroup, chosen: Sequence[Rollout]) -> Sampled:
        ids = [torch.tensor(rollout.token_ids) for rollout in chosen]
        weights = [
            token_weights(self.loaded.tokenizer, rollout.token_ids, taught.prompt.thinking_open)
            if self.settings.weighs
            else torch.ones(len(rollout.token_ids))
            for rollout in chosen
        ]
        penalties = [repetition_penalty(one) for one in ids]
        return Sampled(*(torch.cat(each).to(self.device) for each in (ids, weights, penalties)))

    def _sums(
        self, taught: TaughtGroup, losses: Tensor, found: Metrics, chosen: Sequence[Rollout]
    ) -> dict[str, Any]:
        drawn = [value for rollout in chosen for value in rollout.log_probs]
        return {
            "source": taught.group.prompt.row.source,
            "teacher": taught.teacher.name,
            "tokens": len(losses),
            "loss": float(losses.sum()),
            "entropy": -sum(drawn),
            **{
                name: float(getattr(found, name).float().sum())
                for name in ("advantage", "divergence", "overlap", "support")
            },
        }

    def _tell(self, figures: DistillFigures, told: Sequence[dict[str, Any]]) -> None:
        """Means over the sampled tokens of all processes."""
        figures.tokens = sum(one["tokens"] for one in told)
        if not figures.tokens:
            return
        for name in ("loss", "advantage", "divergence", "overlap", "support", "entropy"):
            setattr(figures, name, sum(one[name] for one in told) / figures.tokens)
        figures.teachers = means(
            (one["teacher"], one["divergence"] / one["tokens"]) for one in told if one["tokens"]
        )


def aligned(batch: Pack, seen: Seen, prompt: Prompt) -> Aligned:
    """What of a pack has to be the same for student and teacher; positions count from where the answers begin, since templates
    may differ before that."""
    learnt = batch.rows[0] >= 0
    targets = batch.targets[0][learnt].tolist()
    positions = (batch.position_ids[0, 0][learnt] - (prompt.next_position - 1)).tolist()
    return Aligned(
        response_ids=targets,
        visual_tokens=[visual.tokens for visual in seen.visuals],
        frame_times_s=[time_s for visual in seen.visuals for time_s in times_of(visual)],
        response_positions=positions,
    )


def times_of(visual: Visual) -> tuple[float, ...]:
    """When the frames of a visual are shown; an image is one at no time."""
    return visual.times_s or (0.0,)


class _Distilling(OnPolicyRun):
    """One run of distillation: what has been done so far."""

    settings: DistillSettings

    def __init__(
        self,
        files: ModelFiles,
        rows: DataFile,
        held_out: DataFile | None,
        out: Path,
        settings: DistillSettings,
        processes: Processes,
        frame_cache: Any,
        score: Composite,
        routes: Sequence[Route],
    ) -> None:
        super().__init__(files, rows, held_out, out, settings, processes, frame_cache, score)
        self.routes = routes
        self.totals: dict[str, Any] = {"tries": 0, "seconds": 0.0, "peak": 0}
        self.divergences: list[float] = []

    def prepare(self, network: Network, on_first_pass: OnFirstPass | None) -> DistillTrainer:
        self.teachers = load_teachers(self.routes, self.files, self.loaded, network)
        self.trainer = DistillTrainer(self.loaded, network, self.processes, self.settings)
        self.learn_from(range(len(self.rows)))
        return self.trainer

    def one_step(self, step: int, total: int) -> DistillFigures:
        """Draw, ask the teachers, learn."""
        begin_s = time.perf_counter()
        with self.answering():
            asked = self.taken(self.own_prompts())
            groups = [taught for group in asked if (taught := self._taught(group, step))]
        drawn_s = time.perf_counter()
        figures = self.trainer.step(groups, step / total)
        figures.train_s, figures.generate_s = time.perf_counter() - drawn_s, drawn_s - begin_s
        scores = [self._scores(taught.group) for taught in groups]
        tries = self.all_tries(
            (taught.group, rollout, one)
            for taught, own in zip(groups, scores, strict=True)
            for rollout, one in zip(taught.group.rollouts, own, strict=True)
        )
        for name, value in told_of(tries).items():
            setattr(figures, name, value)
        figures.groups = len(tries) // self.settings.rollouts
        figures.rollouts_per_s = len(tries) / figures.generate_s
        figures.seconds = time.perf_counter() - begin_s
        figures.peak_bytes = self.trainer.peak_bytes()
        nothing = [None] * self.settings.rollouts
        self.write_tries(
            step + 1,
            [ShownGroup(taught.group, own, nothing) for taught, own in zip(groups, scores, strict=True)],
        )
        self.totals["tries"] += len(tries)
        self.totals["seconds"] += figures.seconds
        self.totals["peak"] = max(self.totals["peak"], figures.peak_bytes)
        if figures.divergence is not None:
            self.divergences.append(figures.divergence)
        return figures

    def _taught(self, group: Group, version: int) -> TaughtGroup | None:
        """A group that the student has answered; None where its frames cannot be read."""
        teacher = self.teachers[route_of(self.routes, group.prompt)]
        try:
            seen = self.see(group.prompt)
        except InputError as error:
            self.leave_out(group.prompt.index, error)
            return None
        self.policy.roll_out(group.prompt, seen, group.rollouts, version)
        return TaughtGroup(group, self.policy.lay_out(group.prompt, seen), seen, teacher)

    def _scores(self, group: Group) -> Sequence[Scores]:
        """For whoever watches: nothing is learnt from them, and a row need not have any."""
        try:
            return self.score([self.attempt(group.prompt, rollout) for rollout in group.rollouts])
        except InputError:
            return [UNSCORED] * len(group.rollouts)

    # Checkpoints, and what comes out.

    def state(self) -> dict[str, Any]:
        return {"totals": self.totals, "divergences": self.divergences}

    def take_state(self, state: Mapping[str, Any]) -> None:
        self.totals, self.divergences = state["totals"], state["divergences"]

    def write(self, end: Finished) -> Distilled:
        """Everything that the run made, and what it came to."""
        result = Distilled(
            folder=self.out,
            train=str(self.settings.train),
            steps=end.step,
            tries=self.totals["tries"],
            left_out=len(self.left_out),
            seconds=self.totals["seconds"],
            divergence_first=self.divergences[0] if self.divergences else None,
            divergence_last=self.divergences[-1] if self.divergences else None,
            peak_bytes=self.totals["peak"],
            before=self.before,
            after=end.after,
        )
        teachers = ", ".join(dict.fromkeys(Path(route.name).name for route in self.routes))
        method = f"on-policy distillation ({self.settings.estimator.mode}) from {teachers}"
        names = ("steps", "tries", "divergence_first", "divergence_last", "seconds", "peak_bytes")
        self.deliver(self.trainer, end, {name: getattr(result, name) for name in names}, method)
        return result
