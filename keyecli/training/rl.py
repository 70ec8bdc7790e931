"""A run of reinforcement learning: prompts are answered by the model as it is, answers are scored, and what was better becomes
likelier; it may be interrupted anywhere, and resumed."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch

from keyecli.engine.loaded import ModelFiles
from keyecli.errors import InputError, KeyeWarning, UsageError
from keyecli.training.agreement import selection_agreement
from keyecli.training.buckets import Answered, BucketScaling
from keyecli.training.data import DataFile
from keyecli.training.distributed import Processes
from keyecli.training.estimate import TrainingEstimate
from keyecli.training.network import Network
from keyecli.training.on_policy import (
    EvalFigures,
    Finished,
    OnFirstPass,
    OnPolicyRun,
    OnPolicySettings,
    ShownGroup,
    mean,
    told_of,
)
from keyecli.training.policy_loss import ALGORITHMS, Algorithm, advantages, has_variance
from keyecli.training.policy_trainer import PolicyFigures, PolicyTrainer, ScoredGroup
from keyecli.training.rewards import Composite, Scores
from keyecli.training.rollouts import Group, Rollout
from keyecli.training.run import opened
from keyecli.training.schedule import Schedule
from keyecli.training.sight import Seen

DIFFICULTY_FILE = "difficulty.jsonl"

OnStep = Callable[[int, float, "StepFigures"], None]
"""Told after each step: its number, the share of the run that is done, and its figures."""


@dataclass(frozen=True)
class RLSettings(OnPolicySettings):
    """Everything that decides a run besides its model, data and rewards.

    decays: whether the learning rate falls to nothing; partial_tokens: what a try may write in one step, None: all; refills: how
    often prompts are drawn to make up for groups that say nothing; watch_steps: what costs passes of its own is measured so
    often; difficulty: the mean rewards, in a first pass, of rows that are kept; bucket_scaling: advantages are made comparable
    between easy and hard prompts, and short and long answers.
    """

    algorithm: Algorithm = "gspo"
    clipping: tuple[float, float] | None = None
    decays: bool = False
    minibatches: int = 4
    partial_tokens: int | None = None
    refills: int = 10
    watch_steps: int = 10
    difficulty: tuple[float, float] | None = None
    bucket_scaling: bool = False

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("refills", "watch_steps", *OnPolicySettings.AT_LEAST_ONE)
    INCIDENTAL: ClassVar[tuple[str, ...]] = (*OnPolicySettings.INCIDENTAL, "watch_steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollouts < 2:
            raise UsageError(
                f"--rollouts must be at least 2, not {self.rollouts}: tries are compared with each other"
            )
        if self.partial_tokens is not None and self.partial_tokens < 1:
            raise UsageError(f"--partial-tokens must be at least 1, not {self.partial_tokens}")
        if self.algorithm not in ALGORITHMS:
            raise UsageError(f"--algorithm {self.algorithm} is not known; use {', '.join(ALGORITHMS)}")
        if self.algorithm == "reinforce" and self.minibatches != 1:
            raise UsageError(
                "--algorithm reinforce makes one update from what was drawn: use --minibatches 1"
            )
        low, high = self.difficulty or (0.0, 1.0)
        if not low < high:
            raise UsageError(f"--difficulty {low}:{high} must rise, as 0.1:0.9 does")


@dataclass
class StepFigures(PolicyFigures):
    """What a step came to, over all processes. reward and reward_std: of all tries that were scored, mean and spread within a
    group; families: mean reward by task; truncated: share of tries cut off at the longest; dropped: groups whose tries were all
    as good; unscored: tries without a score; waiting: groups that go on in the next step."""

    reward: float | None = None
    reward_std: float | None = None
    families: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    length: float | None = None
    truncated: float | None = None
    groups: int = 0
    dropped: int = 0
    unscored: int = 0
    waiting: int = 0
    agreement: float | None = None
    drawn_tokens: int = 0
    rollouts_per_s: float = 0.0
    seconds: float = 0.0
    generate_s: float = 0.0
    reward_s: float = 0.0
    train_s: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Reinforced:
    """What a run made: `folder` holds an adapter or a model; before and after are the held-out rows' figures."""

    folder: Path
    train: str
    steps: int
    tries: int
    groups: int
    dropped: int
    left_out: int
    seconds: float
    reward_first: float | None
    reward_last: float | None
    peak_bytes: int
    before: EvalFigures | None
    after: EvalFigures | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, schema keye.rl/1."""
        return {"schema": "keye.rl/1", **asdict(self), "folder": str(self.folder)}


def reinforce(
    files: ModelFiles,
    data: Path,
    out: Path,
    settings: RLSettings,
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
    on_first_pass: OnFirstPass | None = None,
    on_step: OnStep | None = None,
) -> Reinforced:
    """Train and write OUT; errors as `keyecli.training.finetune.finetune`, and those of rewards. on_first_pass: told of how many
    rows of how many the difficulty is known."""
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
        run = _Reinforcing(
            begun.files, begun.rows, begun.held_out, out, settings, begun.processes, frame_cache, score
        )
        return run.write(run.run(resume, on_estimate, on_first_pass, on_step))


@dataclass(frozen=True)
class _Scored:
    """A group whose tries have all ended, what its prompt became, and the score of each."""

    group: Group
    seen: Seen
    scores: Sequence[Scores]

    @property
    def known(self) -> list[tuple[Rollout, float]]:
        """Tries that have a score: one that the judge did not answer about takes part in nothing."""
        pairs = zip(self.group.rollouts, self.scores, strict=True)
        return [(rollout, scores.total) for rollout, scores in pairs if scores.total is not None]

    @property
    def rewards(self) -> list[float]:
        return [reward for _, reward in self.known]


class _Reinforcing(OnPolicyRun):
    """One run of reinforcement learning: what has been done so far, and the tries that go on."""

    settings: RLSettings

    def __init__(
        self,
        files: ModelFiles,
        rows: DataFile,
        held_out: DataFile | None,
        out: Path,
        settings: RLSettings,
        processes: Processes,
        frame_cache: Any,
        score: Composite,
    ) -> None:
        super().__init__(files, rows, held_out, out, settings, processes, frame_cache, score)
        self.waiting: list[Group] = []
        self.buckets = BucketScaling() if settings.bucket_scaling else None
        self.totals: dict[str, Any] = {"tries": 0, "groups": 0, "dropped": 0, "seconds": 0.0, "peak": 0}
        self.rewards: list[float] = []

    def prepare(self, network: Network, on_first_pass: OnFirstPass | None) -> PolicyTrainer:
        settings = self.settings
        self.trainer = PolicyTrainer(
            self.loaded,
            network,
            Schedule(settings.rate, weight_decay=settings.weight_decay, decays=settings.decays),
            self.processes,
            algorithm=settings.algorithm,
            clipping=settings.clipping,
            max_length=settings.max_length,
            minibatches=settings.minibatches,
            optimizer=settings.optimizer,
        )
        self.learn_from(self._chosen(on_first_pass))
        return self.trainer

    def one_step(self, step: int, total: int) -> StepFigures:
        """Draw, score, learn."""
        begin_s = time.perf_counter()
        figures = StepFigures()
        watch = step % self.settings.watch_steps == 0
        scored, kept = self._gather(step, figures)
        groups = self._advantaged(kept)
        learnt_s = time.perf_counter()
        learnt = self.trainer.step(groups, step / total, watch=watch)
        figures.train_s = time.perf_counter() - learnt_s
        for name, value in asdict(learnt).items():
            setattr(figures, name, value)
        if watch:
            figures.agreement = self._agreement(groups)
        self._summarise(figures, scored, kept)
        if not figures.groups and not figures.waiting and self.processes.first:
            warnings.warn(
                f"in step {step + 1} all tries of each of {figures.dropped} prompts were equally good, so nothing was learnt: "
                "take harder or easier rows (--difficulty), more --rollouts, or another --reward",
                KeyeWarning,
                stacklevel=2,
            )
        figures.seconds = time.perf_counter() - begin_s
        figures.peak_bytes = self.trainer.peak_bytes()
        self.write_tries(step + 1, self._shown(scored, groups))
        self.totals["seconds"] += figures.seconds
        self.totals["peak"] = max(self.totals["peak"], figures.peak_bytes)
        self.totals["groups"] += figures.groups
        self.totals["dropped"] += figures.dropped
        if figures.reward is not None:
            self.rewards.append(figures.reward)
        return figures

    def _gather(self, step: int, figures: StepFigures) -> tuple[list[_Scored], list[_Scored]]:
        """Groups whose tries ended in this step, and those of them that say something, as many as a step takes."""
        wanted = self.own_prompts()
        scored: list[_Scored] = []
        kept: list[_Scored] = []
        going, self.waiting = self.waiting, []
        with self.answering():
            for _ in range(self.settings.refills):
                missing = wanted - len(kept) - len(self.waiting)
                if missing <= 0:
                    break
                # Tries of former steps come first, and take the place of new prompts.
                batch = going + self.taken(max(0, missing - len(going)))
                going = []
                found = self._scored(self._drawn(batch, step, figures), figures)
                scored += found
                kept += [one for one in found if has_variance(one.rewards)]
        return scored, kept

    def _drawn(
        self, batch: Sequence[Group], version: int, figures: StepFigures
    ) -> Iterator[tuple[Group, Seen]]:
        """Let the tries of some groups go on; gives those groups whose tries have all ended, the others wait."""
        for group in batch:
            begin_s = time.perf_counter()
            try:
                seen = self.see(group.prompt)
            except InputError as error:
                self.leave_out(group.prompt.index, error)
                continue
            figures.drawn_tokens += self.policy.roll_out(
                group.prompt, seen, group.rollouts, version, most_tokens=self.settings.partial_tokens
            )
            figures.generate_s += time.perf_counter() - begin_s
            if group.done:
                yield group, seen
            else:
                self.waiting.append(group)

    def _scored(self, drawn: Iterator[tuple[Group, Seen]], figures: StepFigures) -> list[_Scored]:
        """Groups with the scores of their tries; rows that hold nothing to compare answers with are left out."""
        found = []
        for group, seen in drawn:
            begin_s = time.perf_counter()
            try:
                scores = self.score([self.attempt(group.prompt, rollout) for rollout in group.rollouts])
                found.append(_Scored(group, seen, scores))
            except InputError as error:
                self.leave_out(group.prompt.index, error)
            figures.reward_s += time.perf_counter() - begin_s
        return found

    def _advantaged(self, kept: Sequence[_Scored]) -> list[ScoredGroup]:
        """Groups as they are learnt from."""
        groups = []
        for one in kept:
            group = replace(one.group, rollouts=[rollout for rollout, _ in one.known])
            prompt = self.policy.lay_out(group.prompt, one.seen)
            groups.append(ScoredGroup(group, prompt, one.seen, advantages(one.rewards)))
        return groups if self.buckets is None else self._rescaled(self.buckets, kept, groups)

    def _rescaled(
        self, buckets: BucketScaling, kept: Sequence[_Scored], groups: Sequence[ScoredGroup]
    ) -> list[ScoredGroup]:
        own = [
            Answered(fmean(one.rewards), len(rollout.token_ids), gain)
            for one, group in zip(kept, groups, strict=True)
            for rollout, gain in zip(group.group.rollouts, group.advantages, strict=True)
        ]
        gathered: list[list[Answered]] = self.processes.gathered(own)  # type: ignore[assignment]
        scales = iter(buckets.scales(own, [one for part in gathered for one in part]))
        return [
            replace(group, advantages=[gain * next(scales) for gain in group.advantages]) for group in groups
        ]

    def _agreement(self, groups: Sequence[ScoredGroup]) -> float | None:
        """Of the first try of this process's first group; the mean over processes that know it."""
        own = None
        with self.answering():
            if groups:
                first = groups[0]
                own = selection_agreement(
                    self.loaded, self.network, first.prompt, first.seen, first.group.rollouts[0]
                )
        every: list[float | None] = self.processes.gathered(own)  # type: ignore[assignment]
        known = [value for value in every if value is not None]
        return mean(known)

    def _summarise(self, figures: StepFigures, scored: Sequence[_Scored], kept: Sequence[_Scored]) -> None:
        """Means over all processes of what was drawn in this step."""
        tries = self.all_tries(
            (one.group, rollout, scores)
            for one in scored
            for rollout, scores in zip(one.group.rollouts, one.scores, strict=True)
        )
        for name, value in told_of(tries).items():
            setattr(figures, name, value)
        own = (
            [float(torch.tensor(one.rewards).std()) for one in scored if len(one.rewards) > 1],
            [len(kept), len(scored) - len(kept), len(self.waiting), figures.drawn_tokens],
        )
        gathered: list[tuple[list[float], list[int]]] = self.processes.gathered(own)  # type: ignore[assignment]
        figures.reward_std = mean([spread for spreads, _ in gathered for spread in spreads])
        figures.groups, figures.dropped, figures.waiting, figures.drawn_tokens = (
            sum(column) for column in zip(*[counts for _, counts in gathered], strict=True)
        )
        figures.rollouts_per_s = len(tries) / figures.generate_s if figures.generate_s else 0.0
        self.totals["tries"] += len(tries)

    # Rows: which are used, and which are not.

    def _chosen(self, on_first_pass: OnFirstPass | None) -> list[int]:
        """The rows to learn from: all, or those of the wanted difficulty, which a first pass finds and DIFFICULTY_FILE keeps."""
        if self.settings.difficulty is None:
            return list(range(len(self.rows)))
        path = self.out / DIFFICULTY_FILE
        rewards = self._known_difficulty(path)
        missing = [index for index in range(len(self.rows)) if index not in rewards]
        own = missing[self.processes.rank :: self.processes.count]
        file = path.with_suffix(f".{self.processes.rank}.part") if self.processes.rank else path
        with file.open("a", encoding="utf-8") as lines, self.answering():
            for index in own:
                rewards[index] = self._difficulty(index)
                record = {
                    "row": index,
                    "source": self.rows.source(index),
                    "reward": rewards[index],
                    "run": self._identity,
                }
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                if on_first_pass and self.processes.first:
                    on_first_pass(len(rewards), len(self.rows))
        gathered: list[dict[int, float | None]] = self.processes.gathered(rewards)  # type: ignore[assignment]
        low, high = self.settings.difficulty
        found = {index: mean for part in gathered for index, mean in part.items() if mean is not None}
        chosen = sorted(index for index, mean in found.items() if low <= mean <= high)
        if not chosen:
            raise InputError(
                f"no row of {self.rows.path} has a mean reward from {low} to {high}: widen --difficulty, or see {path}"
            )
        return chosen

    def _known_difficulty(self, path: Path) -> dict[int, float | None]:
        """What a first pass of the same run has found so far, before it was interrupted."""
        found: dict[int, float | None] = {}
        for file in (path, *path.parent.glob(f"{path.stem}.*.part")):
            if file.is_file():
                for line in file.read_text(encoding="utf-8").splitlines():
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue
                    if record["run"] == self._identity:
                        found[record["row"]] = record["reward"]
        return found

    @cached_property
    def _identity(self) -> str:
        """Settings, data and weights of this run, in short: another run's difficulties are others."""
        told = json.dumps([self.settings.decisive(), self.rows.sha256, self.loaded.revision])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def _difficulty(self, index: int) -> float | None:
        """The mean reward of a row's tries before anything is learnt; None for a row that cannot be answered or scored."""
        try:
            prompt = self.planner.plan(index)
            group = self.group(-1 - index, prompt)
            self.policy.roll_out(prompt, self.see(prompt), group.rollouts, 0)
            scores = self.score([self.attempt(prompt, rollout) for rollout in group.rollouts])
        except InputError as error:
            self.leave_out(index, error)
            return None
        known = [one.total for one in scores if one.total is not None]
        return mean(known)

    # Checkpoints.

    def state(self) -> dict[str, Any]:
        return {
            "waiting": self.processes.gathered([group.state() for group in self.waiting]),
            "totals": self.totals,
            "rewards": self.rewards,
            "buckets": None if self.buckets is None else self.buckets.state(),
        }

    def take_state(self, state: Mapping[str, Any]) -> None:
        own = state["waiting"][self.processes.rank]
        self.waiting = [Group.of(one, self.planner.plan(one["index"])) for one in own]
        self.totals, self.rewards = state["totals"], state["rewards"]
        if self.buckets is not None:
            self.buckets.take(state["buckets"])

    # What is told.

    def _shown(self, scored: Sequence[_Scored], learnt: Sequence[ScoredGroup]) -> list[ShownGroup]:
        """Groups for whoever reads along: those that were learnt from first."""
        gains = {
            id(rollout): gain
            for group in learnt
            for rollout, gain in zip(group.group.rollouts, group.advantages, strict=True)
        }
        shown = []
        for one in scored:
            each = [gains.get(id(rollout)) for rollout in one.group.rollouts]
            shown.append(ShownGroup(one.group, one.scores, each, any(gain is not None for gain in each)))
        return sorted(shown, key=lambda one: not one.kept)

    # What comes out.

    def write(self, end: Finished) -> Reinforced:
        """Everything that the run made, and what it came to."""
        totals, settings = self.totals, self.settings
        result = Reinforced(
            folder=self.out,
            train=str(settings.train),
            steps=end.step,
            tries=totals["tries"],
            groups=totals["groups"],
            dropped=totals["dropped"],
            left_out=len(self.left_out),
            seconds=totals["seconds"],
            reward_first=self.rewards[0] if self.rewards else None,
            reward_last=self.rewards[-1] if self.rewards else None,
            peak_bytes=totals["peak"],
            before=self.before,
            after=end.after,
        )
        method = f"reinforcement learning ({settings.algorithm}) from {', '.join(settings.rewards)}"
        names = ("steps", "tries", "reward_first", "reward_last", "seconds", "peak_bytes")
        self.deliver(self.trainer, end, {name: getattr(result, name) for name in names}, method)
        return result
