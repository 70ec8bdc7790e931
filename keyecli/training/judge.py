"""Rewards that a judge gives: for captions, and for answers by the reasoning that led to them.

Where the judge does not answer there is no score, never a 0: the model is not to be punished for a server's trouble.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from keyecli.errors import UsageError
from keyecli.training.attempts import Attempt, Reward
from keyecli.training.judge_client import Judge, JudgeError, JudgeSettings
from keyecli.training.judge_prompts import (
    MOST_POINTS,
    ProcessVerdict,
    caption_conversation,
    process_conversation,
    read_points,
    read_process,
    shown_reasoning,
)

__all__ = [
    "JUDGE_REWARDS",
    "CaptionReward",
    "ContextReward",
    "Judge",
    "JudgeError",
    "JudgeSettings",
    "caption_score",
    "judge_reward",
]

JUDGE_REWARDS: Mapping[str, tuple[str, ...]] = {"caption": (), "context": ("least", "format")}
"""Their names, and what options each has."""
FAILED_PROCESS = 0.1
HALLUCINATED_POINTS, HALLUCINATED_MOST = 1, 0.5
LEAST_OUTCOME = 0.5

_NO_REASONING = ProcessVerdict(False, "it shows no reasoning")


class CaptionReward:
    """How good captions are: the mean over CAPTION_DIMENSIONS of points ÷ 4, from 0 to 1 (P, training.md §4).

    "Hallucination caps at 0.5" is read as (R): with 1 point or less for hallucination, 4 being none, no more than 0.5. An
    answer that is none is 0 unasked. InputError for a row without a reference.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def __call__(self, attempts: Sequence[Attempt]) -> list[float | None]:
        scores: list[float | None] = [0.0] * len(attempts)
        conversations = {
            place: caption_conversation(attempt) for place, attempt in enumerate(attempts) if attempt.answer
        }
        verdicts = self._judge.verdicts(list(conversations.values()), read_points)
        for place, points in zip(conversations, verdicts, strict=True):
            scores[place] = None if points is None else caption_score(points)
        return scores


def caption_score(points: Mapping[str, float]) -> float:
    """Points of all dimensions → reward."""
    score = sum(points.values()) / (MOST_POINTS * len(points))
    return min(score, HALLUCINATED_MOST) if points["hallucination"] <= HALLUCINATED_POINTS else score


class ContextReward:
    """format · outcome · (1 if the process passes, else 0.1), which keeps right answers from paying for wrong reasoning (R, §5).

    Only attempts whose outcome is at least `least` are judged; the others have not passed either, so that one that is nearly
    right never earns more than one that is right for wrong reasons. reports: place in the last batch → why its reasoning was
    rejected; judged, rejected: of the whole run.
    """

    def __init__(
        self,
        judge: Judge,
        outcome: Reward,
        format: Callable[[Attempt], float] | None = None,
        least: float = LEAST_OUTCOME,
    ) -> None:
        self.reports: dict[int, str] = {}
        self.judged = self.rejected = 0
        self._judge, self._outcome, self._format, self._least = judge, outcome, format, least

    def __call__(self, attempts: Sequence[Attempt]) -> list[float | None]:
        self.reports = {}
        outcomes = list(self._outcome(attempts))
        formats = [1.0 if self._format is None else self._format(attempt) for attempt in attempts]
        right = [
            place
            for place, (outcome, format) in enumerate(zip(outcomes, formats, strict=True))
            if outcome is not None and outcome >= self._least and format > 0
        ]
        factors: list[float | None] = [FAILED_PROCESS] * len(attempts)
        for place, verdict in zip(right, self._verdicts([attempts[place] for place in right]), strict=True):
            factors[place] = self._factor(place, verdict)
        return [
            None if outcome is None or factor is None else format * outcome * factor
            for format, outcome, factor in zip(formats, outcomes, factors, strict=True)
        ]

    def _verdicts(self, attempts: Sequence[Attempt]) -> list[ProcessVerdict | None]:
        """Of answers that are right."""
        verdicts: list[ProcessVerdict | None] = [_NO_REASONING] * len(attempts)
        conversations = {
            place: process_conversation(attempt)
            for place, attempt in enumerate(attempts)
            if shown_reasoning(attempt)
        }
        found = self._judge.verdicts(list(conversations.values()), read_process)
        for place, verdict in zip(conversations, found, strict=True):
            verdicts[place] = verdict
        return verdicts

    def _factor(self, place: int, verdict: ProcessVerdict | None) -> float | None:
        if verdict is None:
            return None
        self.judged += 1
        if verdict.passes:
            return 1.0
        self.rejected += 1
        self.reports[place] = verdict.why
        return FAILED_PROCESS


def judge_reward(
    name: str,
    options: Mapping[str, str],
    judge: Judge,
    outcome: Reward | None,
    format: Callable[[Attempt], float] | None = None,
) -> Reward:
    """The reward `caption` or `context`, as its options say. UsageError for those that there are not, or without an outcome."""
    if name not in JUDGE_REWARDS:
        raise UsageError(f"the judge gives no reward {name}; known are {', '.join(JUDGE_REWARDS)}")
    known = JUDGE_REWARDS[name]
    for option in options:
        if option not in known:
            hint = f"known are {', '.join(known)}" if known else "it has none"
            raise UsageError(f"the reward {name} has no option {option}; {hint}")
    if name == "caption":
        return CaptionReward(judge)
    if outcome is None:
        raise UsageError("the reward context needs another one that tells which answers are right")
    return ContextReward(judge, outcome, _format_of(options, format), _least_of(options))


def _format_of(
    options: Mapping[str, str], format: Callable[[Attempt], float] | None
) -> Callable[[Attempt], float] | None:
    wanted = options.get("format")
    if wanted not in (None, "true", "false"):
        raise UsageError(f"the reward context has format {wanted}, which must be true or false")
    if wanted == "true" and format is None:
        raise UsageError("the reward context is to count the format, and there is no reward for it")
    return None if wanted == "false" else format


def _least_of(options: Mapping[str, str]) -> float:
    text = options.get("least")
    if text is None:
        return LEAST_OUTCOME
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise UsageError(f"the reward context has least {text}, which must be a number above 0 and at most 1")
