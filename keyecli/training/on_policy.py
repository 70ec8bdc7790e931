"""A run in which a model learns from its own answers: which prompts, what it answers to them, and how held-out rows come out."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from keyecli.engine.loaded import ModelFiles, free_memory_bytes, memory_limits
from keyecli.errors import InputError, KeyeWarning, UsageError
from keyecli.export.files import write_texts
from keyecli.model.companions import load_tokenizer
from keyecli.training.attempts import Attempt
from keyecli.training.data import DataFile
from keyecli.training.distributed import Processes, whole_layers
from keyecli.training.estimate import TrainingEstimate, estimate_training
from keyecli.training.learner import Learner
from keyecli.training.metrics import Metrics
from keyecli.training.network import Main, Network
from keyecli.training.rewards import Composite, Scores
from keyecli.training.rollout_page import SCHEMA, write_page
from keyecli.training.rollouts import (
    Group,
    PlannedPrompt,
    Policy,
    PromptOrder,
    PromptPlanner,
    Rollout,
    seed_of,
)
from keyecli.training.run import METRICS_FILE, Run, RunSettings, stopping
from keyecli.training.schedule import POLICY_RATES
from keyecli.training.sight import Seen, see

OnFirstPass = Callable[[int, int], None]
"""Told, where rows are looked at before anything is learnt, how many of how many were."""

ROLLOUTS_FILE = "rollouts.jsonl"
PAGE_FILE = "rollouts.html"
SHOWN_GROUPS = 2  # of each step, in ROLLOUTS_FILE
EVAL_ROWS = 256
SAMPLES = 4


@dataclass(frozen=True)
class OnPolicySettings(RunSettings):
    """What decides such a run besides its model and data.

    prompts: of a step, over all processes; rollouts: tries of each; answer_tokens: the longest try; rewards: how tries are
    scored, as they were asked for.
    """

    steps: int | None = 100
    save_steps: int = 20
    prompts: int = 8
    rollouts: int = 8
    minibatches: int = 1
    answer_tokens: int = 512
    think: bool = True
    rewards: tuple[str, ...] = ()

    COMMAND: ClassVar[str] = "keye rl"
    RATES: ClassVar[Mapping[Main, float]] = POLICY_RATES
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        "prompts",
        "rollouts",
        "minibatches",
        *RunSettings.AT_LEAST_ONE,
    )

    def __post_init__(self) -> None:
        what = self.train
        if what.main not in POLICY_RATES or set(what.extras) - {"router"}:
            raise UsageError(
                f"--train {what} does not go with {self.COMMAND}, which freezes the indexer, the tower and the projector: "
                "use lora or full, and with them router"
            )
        super().__post_init__()
        if self.answer_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, not {self.answer_tokens}")
        if self.minibatches > self.prompts:
            raise UsageError(
                f"--minibatches {self.minibatches} cannot be made of {self.prompts} prompts: raise --prompts"
            )
        if self.lora.dropout:
            raise UsageError(f"--dropout would change what a try's probability was: {self.COMMAND} needs 0")


@dataclass(frozen=True)
class EvalFigures:
    """The likeliest answers to held-out rows: mean reward, in all and by task, mean length in tokens; None without a score."""

    reward: float | None
    families: dict[str, float]
    rows: int
    length: float | None


@dataclass(frozen=True)
class Finished:
    """The end of a run: its last step, and the figures and a few answers of held-out rows."""

    step: int
    after: EvalFigures | None
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class ShownGroup:
    """A group for whoever reads along: the score of each try, and what it was pushed by; kept: whether it was learnt from."""

    group: Group
    scores: Sequence[Scores]
    gains: Sequence[float | None]
    kept: bool = True


@dataclass(frozen=True)
class Told:
    """What is told of a try. family: its row's task; parts: its rewards by name; cut: whether it ended for want of room."""

    family: str
    score: float | None
    parts: Mapping[str, float | None]
    tokens: int
    cut: bool


class OnPolicyRun(Run):
    """Prompts, the policy that answers them, and rows that were left out."""

    settings: OnPolicySettings
    network: Network
    policy: Policy
    order: PromptOrder

    def __init__(
        self,
        files: ModelFiles,
        rows: DataFile,
        held_out: DataFile | None,
        out: Path,
        settings: OnPolicySettings,
        processes: Processes,
        frame_cache: Any,
        score: Composite,
    ) -> None:
        super().__init__(files, rows, out, settings, processes, frame_cache)
        self.held_out_rows, self.score = held_out, score
        self.left_out: dict[str, str] = {}
        self.before: EvalFigures | None = None
        tokenizer = load_tokenizer(files.folder)
        self.planner = PromptPlanner(
            rows, tokenizer, files.config, settings.sampling, settings.think, settings.answer_tokens, settings.max_length
        )  # fmt: skip

    def load(self) -> Network:
        """As for any run; the weights can answer from then on, see `answering`."""
        self.network = super().load()
        self.policy = Policy(self.loaded, self.settings.answer_tokens)
        return self.network

    @contextmanager
    def answering(self) -> Iterator[None]:
        """The model answers as it is now: processes enter together, and each may answer as much as it likes."""
        self.loaded.model.eval()
        with whole_layers(self.network, self.processes):
            yield

    def learn_from(self, chosen: Sequence[int]) -> None:
        """The rows whose prompts are asked."""
        self.order = PromptOrder(self.planner, chosen, self.settings.seed, self.processes, self.leave_out)

    # What kinds of such runs differ in.

    def prepare(self, network: Network, on_first_pass: OnFirstPass | None) -> Learner:
        """Make what learns, and say which rows it learns from."""
        raise NotImplementedError

    def one_step(self, step: int, total: int) -> Any:
        """Draw and learn; the figures of the step, a dataclass."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides weights and what all such runs have."""
        raise NotImplementedError

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        raise NotImplementedError

    # The order of events.

    def run(
        self,
        resume: bool,
        on_estimate: Callable[[TrainingEstimate], None] | None,
        on_first_pass: OnFirstPass | None,
        on_step: Callable[[int, float, Any], None] | None,
    ) -> Finished:
        """All steps that are left, between two looks at held-out rows."""
        estimate = self.estimate()
        if on_estimate and self.processes.first:
            on_estimate(estimate)
        estimate.check(free_memory_bytes(self.files.device))
        with memory_limits(self.files.device), ExitStack() as stack:
            network = self.load()
            learner = self.prepare(network, on_first_pass)
            network.keeper.room_bytes = estimate.room_bytes(free_memory_bytes(self.files.device))
            step = self._resume(learner) if resume else 0
            metrics = self.metrics(stack, step if resume else None)
            self.keep_rollouts_until(step)
            held_out = self.held_out_prompts()
            if step == 0:
                self.before, _ = self.evaluated(held_out)
                self.tell_eval(metrics, 0, self.before)
            step = self._train(learner, metrics, held_out, step, on_step)
            after, samples = self.evaluated(held_out)
            self.tell_eval(metrics, step, after)
        return Finished(step, after, samples)

    def _train(
        self,
        learner: Learner,
        metrics: Metrics | None,
        held_out: Sequence[PlannedPrompt],
        step: int,
        on_step: Callable[[int, float, Any], None] | None,
    ) -> int:
        settings = self.settings
        total = settings.steps or 1
        with stopping() as stop:
            while step < total:
                figures = self.one_step(step, total)
                step += 1
                if metrics is not None:
                    metrics.write("step", step, **asdict(figures))
                if on_step and self.processes.first:
                    on_step(step, step / total, figures)
                self.save_in_time(learner, step, stop, self._whole_state())
                if settings.eval_steps and step % settings.eval_steps == 0 and step < total:
                    self.tell_eval(metrics, step, self.evaluated(held_out)[0])
        self.save(learner, step, self._whole_state())
        return step

    def _whole_state(self) -> dict[str, Any]:
        return {
            "taken": self.processes.gathered(self.order.taken),
            "before": None if self.before is None else asdict(self.before),
            "left_out": self.left_out,
            **self.state(),
        }

    def _resume(self, learner: Learner) -> int:
        state = self.resume(learner)
        count = len(state["taken"])
        if count != self.processes.count:
            raise UsageError(
                f"the run in {self.out} has {count} processes and this one {self.processes.count}: --resume needs as many"
            )
        self.order.taken = state["taken"][self.processes.rank]
        self.before = None if state["before"] is None else EvalFigures(**state["before"])
        self.left_out = state["left_out"]
        self.take_state(state)
        return state["step"]

    def estimate(self) -> TrainingEstimate:
        """The memory of a step, by the longest of the first prompts."""
        settings, files = self.settings, self.files
        longest = 0
        for index in range(min(len(self.rows), 32)):
            try:
                longest = max(longest, self.planner.plan(index).tokens)
            except InputError:
                continue
        whole = longest + settings.rollouts * settings.answer_tokens
        return estimate_training(
            files.config,
            train=(settings.train.main, *settings.train.extras),
            dtype=files.dtype,
            lora_rank=settings.lora.rank,
            lora_targets=settings.lora.targets,
            pack_tokens=min(settings.max_length, whole) if longest else settings.max_length,
            device=files.device,
            world=self.processes.count,
            sharded=self.processes.sharded,
            optimizer=settings.optimizer,
            checkpointing=settings.checkpointing,
            accumulates=True,
            answers=True,
        )

    def deliver(self, learner: Learner, end: Finished, results: Mapping[str, Any], method: str) -> None:
        """Write the weights, the page of tries, and the card with `results` and those of held-out rows."""
        self.write_weights(learner.network)
        if self.processes.first:
            title = f"{self.out.name}: {self.settings.COMMAND}"
            write_page(self.out / METRICS_FILE, self.out / ROLLOUTS_FILE, self.out / PAGE_FILE, title)
            held_out = {
                "held_out_reward_before": self.before and self.before.reward,
                "held_out_reward_after": end.after and end.after.reward,
            }
            self.write_run_card({**results, **held_out}, end.samples, len(self.left_out), method)
        self.processes.wait()

    def own_prompts(self) -> int:
        """Of a step's prompts those that this process answers."""
        count, rank = self.processes.count, self.processes.rank
        return self.settings.prompts // count + (rank < self.settings.prompts % count)

    def taken(self, count: int) -> list[Group]:
        """The next prompts, with tries to be made."""
        return [self.group(place, prompt) for place, prompt in self.order.take(count)]

    def group(self, place: int, prompt: PlannedPrompt) -> Group:
        """Tries of a prompt that are still to be made."""
        seeds = [seed_of(self.settings.seed, place, number) for number in range(self.settings.rollouts)]
        return Group(place, prompt, [Rollout(seed) for seed in seeds])

    def attempt(self, prompt: PlannedPrompt, rollout: Rollout) -> Attempt:
        """A try as rewards see it."""
        return self.policy.attempt(prompt, rollout, self.settings.think)

    def see(self, prompt: PlannedPrompt) -> Seen:
        """The visuals of a prompt, by the frozen tower. InputError for what cannot be read."""
        return see(
            self.loaded, prompt.plans, learning=False, exact_resize=self.settings.sampling.exact_resize
        )

    def leave_out(self, index: int, error: InputError) -> None:
        """Name and count a row that cannot be used; raises it with `strict`."""
        if self.settings.strict:
            raise error
        source = self.rows.source(index)
        if source not in self.left_out:
            self.left_out[source] = str(error)
            named = str(error) if source in str(error) else f"{source}: {error}"
            warnings.warn(f"a row is left out: {named}", KeyeWarning, stacklevel=2)

    # Held-out rows.

    def held_out_prompts(self) -> list[PlannedPrompt]:
        """Rows of `--eval-data` that can be answered."""
        if self.held_out_rows is None:
            return []
        planner = replace(self.planner, rows=self.held_out_rows)
        found = []
        for index in range(min(len(self.held_out_rows), EVAL_ROWS)):
            try:
                found.append(planner.plan(index))
            except InputError as error:
                warnings.warn(f"a held-out row is left out: {error}", KeyeWarning, stacklevel=2)
        return found

    def evaluated(self, prompts: Sequence[PlannedPrompt]) -> tuple[EvalFigures | None, list[dict[str, Any]]]:
        """The likeliest answers, scored; and a few of them."""
        if not prompts:
            return None, []
        with self.answering():
            own = [self._evaluated(prompt) for prompt in prompts[self.processes.rank :: self.processes.count]]
        gathered: list[list[Any]] = self.processes.gathered(own)  # type: ignore[assignment]
        every = [one for part in gathered for one in part]
        known = [one for one in every if one[1] is not None]
        figures = EvalFigures(
            reward=mean([one[1] for one in known]),
            families=means((one[0], one[1]) for one in known if one[0]),
            rows=len(known),
            length=mean([one[2] for one in every]),
        )
        return figures, [one[3] for one in every[:SAMPLES]]

    def _evaluated(self, prompt: PlannedPrompt) -> tuple[str, float | None, int, dict[str, str]]:
        """The likeliest answer to a prompt: its task, score, tokens, and how it is shown."""
        rollout = Rollout(0)
        self.policy.roll_out(prompt, self.see(prompt), [rollout], 0, temperature=0.0)
        attempt = self.attempt(prompt, rollout)
        (scores,) = self.score([attempt])
        sample = {
            "source": prompt.row.source,
            "question": prompt.question,
            "expected": truth_of(prompt.columns),
            "answer": attempt.answer or "",
        }
        return prompt.family, scores.total, len(rollout.token_ids), sample

    # What is told.

    def all_tries(self, own: Iterable[tuple[Group, Rollout, Scores]]) -> list[Told]:
        """The tries of this process and of all others."""
        mine = [
            Told(
                group.prompt.family,
                scores.total,
                dict(scores.parts),
                len(one.token_ids),
                one.ended == "length",
            )
            for group, one, scores in own
        ]
        gathered: list[list[Told]] = self.processes.gathered(mine)  # type: ignore[assignment]
        return [told for part in gathered for told in part]

    def write_tries(self, step: int, shown: Sequence[ShownGroup]) -> None:
        """Some groups in full, of the first process."""
        if self.processes.first:
            with (self.out / ROLLOUTS_FILE).open("a", encoding="utf-8") as lines:
                for one in shown[:SHOWN_GROUPS]:
                    lines.write(json.dumps(self._record(step, one)) + "\n")

    def _record(self, step: int, one: ShownGroup) -> dict[str, Any]:
        prompt = one.group.prompt
        tries = []
        for rollout, scores, gain in zip(one.group.rollouts, one.scores, one.gains, strict=True):
            attempt = self.attempt(prompt, rollout)
            tries.append(
                {
                    "text": attempt.response,
                    "reasoning": attempt.reasoning,
                    "answer": attempt.answer,
                    "score": scores.total,
                    "parts": dict(scores.parts),
                    "advantage": gain,
                    "tokens": len(rollout.token_ids),
                    "ended": rollout.ended,
                    "versions": rollout.versions,
                }
            )
        return {
            "schema": SCHEMA,
            "step": step,
            "source": prompt.row.source,
            "family": prompt.family,
            "question": prompt.question,
            "truth": truth_of(prompt.columns),
            "videos": [str(plan.info.path) for plan in prompt.plans],
            "mean": mean([scores.total for scores in one.scores if scores.total is not None]),
            "kept": one.kept,
            "rollouts": tries,
        }

    def tell_eval(self, metrics: Metrics | None, step: int, figures: EvalFigures | None) -> None:
        """Write figures of held-out rows, where there are any."""
        if metrics is not None and figures is not None:
            metrics.write("eval", step, **asdict(figures))

    def keep_rollouts_until(self, step: int) -> None:
        """Take away the tries of steps that come again."""
        path = self.out / ROLLOUTS_FILE
        if not self.processes.first:
            return
        kept = []
        if step and path.is_file():
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        write_texts([(path, "".join(f"{line}\n" for line in kept))], overwrite=True)


def told_of(tries: Sequence[Told]) -> dict[str, Any]:
    """Figures of tries by name: reward, families, parts, length, truncated, unscored."""
    known = [one for one in tries if one.score is not None]
    return {
        "reward": mean([one.score for one in known if one.score is not None]),
        "families": means((one.family, one.score) for one in known if one.family and one.score is not None),
        "parts": means(
            (name, value) for one in known for name, value in one.parts.items() if value is not None
        ),
        "length": mean([one.tokens for one in tries]),
        "truncated": mean([float(one.cut) for one in tries]),
        "unscored": len(tries) - len(known),
    }


def means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the values of each name, by name."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, value in pairs:
        found[name].append(value)
    return {name: fmean(found[name]) for name in sorted(found)}


def mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def truth_of(columns: Mapping[str, Any]) -> str:
    """What a row gives as its right answer, as it is shown."""
    known = next((columns[name] for name in ("answer", "solution", "ground_truth") if name in columns), "")
    return known if isinstance(known, str) else json.dumps(known)


def _lines(path: Path) -> list[str]:
    """The lines of a file, without one that a kill left unfinished."""
    whole = [line for line in path.read_bytes().split(b"\n")[:-1] if line.strip(b"\0")]
    return [line.decode() for line in whole]
