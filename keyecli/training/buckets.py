"""Advantages made comparable between easy and hard prompts, and short and long answers ("bucket advantage scaling", R: published
by name alone)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PASS_QUARTERS, LENGTH_THIRDS = 4, 3
LEAST_SCALE, MOST_SCALE = 0.5, 2.0
FLOOR = 1e-3
DECAY = 0.9  # of what was seen before, a step


@dataclass(frozen=True)
class Answered:
    """An answer: the mean reward of its group, its own tokens, and its advantage."""

    pass_rate: float
    tokens: int
    advantage: float


class BucketScaling:
    """Running means m of |advantage| over all answers, and m_b over those of a bucket, a quarter of pass rates and a third of
    lengths; an advantage becomes itself times m / m_b, at least half of it and at most twice."""

    def __init__(self) -> None:
        # Bucket → decayed sum and count.
        self.sums: dict[str, list[float]] = {}

    def scales(self, own: Sequence[Answered], everybody: Sequence[Answered]) -> list[float]:
        """What this process's answers are to be multiplied by, after those of all processes in this step were counted."""
        bounds = third_bounds([one.tokens for one in everybody])
        for pair in self.sums.values():
            pair[:] = [DECAY * value for value in pair]
        for one in everybody:
            pair = self.sums.setdefault(bucket_of(one, bounds), [0.0, 0.0])
            pair[0] += abs(one.advantage)
            pair[1] += 1.0
        total = [sum(column) for column in zip(*self.sums.values(), strict=True)]
        return [self._scale(bucket_of(one, bounds), total) for one in own]

    def _scale(self, bucket: str, total: Sequence[float]) -> float:
        added, count = self.sums[bucket]
        scale = (total[0] / total[1]) / (added / count + FLOOR)
        return min(MOST_SCALE, max(LEAST_SCALE, scale))

    def state(self) -> dict[str, Any]:
        """Plain data, which `take` goes on from."""
        return {bucket: list(pair) for bucket, pair in self.sums.items()}

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.sums = {bucket: list(pair) for bucket, pair in state.items()}


def third_bounds(tokens: Sequence[int]) -> tuple[int, int]:
    """The longest answers of the shortest third and of the middle one."""
    ordered = sorted(tokens)
    if not ordered:
        return 0, 0
    last = len(ordered) - 1
    return ordered[last // LENGTH_THIRDS], ordered[2 * last // LENGTH_THIRDS]


def bucket_of(one: Answered, bounds: tuple[int, int]) -> str:
    """Its quarter of pass rates and its third of lengths."""
    quarter = min(PASS_QUARTERS - 1, max(0, int(PASS_QUARTERS * one.pass_rate)))
    return f"{quarter}:{sum(one.tokens > bound for bound in bounds)}"
