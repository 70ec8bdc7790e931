"""How sure an answer is: token probabilities of a list of spans, turned into probabilities of being right."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from keyecli.engine.grammar import ScoredToken
from keyecli.engine.loaded import ModelFiles
from keyecli.errors import ModelError

CALIBRATION_FILE = "keye_calibration.json"

# Beyond these log odds (one in 8,000) differences are noise of the arithmetic.
_CERTAIN = 9.0
_NUMBER = re.compile(r"[\d.]+")


@dataclass(frozen=True)
class SpanCertainty:
    """Log odds, natural, of a span's three decisions: that there is such a span, its start, and its end.

    Each is the product of the probabilities of the tokens that decide it, among the tokens that were allowed.
    """

    there: float
    start: float
    end: float


@dataclass(frozen=True)
class Calibration:
    """Logistic maps from certainty to probability.

    `score` of a span is sigmoid(bias + there · log odds + start · log odds + end · log odds): the probability that it
    shares at least half of the time that it and an event cover together (IoU 0.5). `presence` is the probability
    that the event is there at all: sigmoid(presence_bias + presence · log odds). `provenance` says what they were
    fitted on.
    """

    provenance: str
    bias: float
    there: float
    start: float
    end: float
    presence_bias: float
    presence: float

    def score(self, certainty: SpanCertainty) -> float:
        log_odds = self.bias + self.there * certainty.there + self.start * certainty.start
        return sigmoid(log_odds + self.end * certainty.end)

    def presence_of(self, log_odds: float) -> float:
        return sigmoid(self.presence_bias + self.presence * log_odds_within(log_odds))


# Printed by `python examples/nano/calibrate.py --clips 60`, with a reliability table of clips of another seed.
DEFAULT_CALIBRATION = Calibration(
    provenance="keye-nano 5d11dfb6b4af on 894 questions (607 spans) about 60 forged clips of seed 21",
    bias=-0.1617,
    there=0.2234,
    start=0.3293,
    end=0.0278,
    presence_bias=-0.1987,
    presence=0.9426,
)


def calibration_for(files: ModelFiles) -> Calibration:
    """The model's own calibration where its folder has one, else the default. ModelError for one that cannot be read."""
    path = files.folder / CALIBRATION_FILE
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return DEFAULT_CALIBRATION
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return _calibration_of(content, path)


def _calibration_of(content: str, path: Path) -> Calibration:
    names = {field.name for field in fields(Calibration)}
    try:
        values = json.loads(content)["ground"]
    except (ValueError, TypeError, KeyError):
        values = None
    if not isinstance(values, Mapping) or set(values) != names:
        raise ModelError(f'{path} must hold {{"ground": {{…}}}} with exactly {", ".join(sorted(names))}')
    numbers = {name: value for name, value in values.items() if name != "provenance"}
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers.values()):
        raise ModelError(f"{path}: every value but provenance must be a number")
    return Calibration(str(values["provenance"]), **{name: float(value) for name, value in numbers.items()})


def span_certainties(tokens: Sequence[ScoredToken], log_odds_present: float) -> list[SpanCertainty]:
    """The certainty of each span of a list that was written token by token.

    The first span is there as surely as any is; a later one as its tokens between the last end and its start say.
    """
    text = "".join(token.text for token in tokens)
    numbers = [match.span() for match in _NUMBER.finditer(text)]
    edges: list[float] = []
    for begin, end in numbers:
        edges.append(sum(_logs_between(tokens, begin, end)))
    certainties = []
    for index in range(0, len(numbers) - 1, 2):
        there = log_odds_within(log_odds_present)
        if index:
            gap = (numbers[index - 1][1], numbers[index][0])
            there = log_odds(sum(_logs_between(tokens, *gap, outside=numbers)))
        certainties.append(SpanCertainty(there, log_odds(edges[index]), log_odds(edges[index + 1])))
    return certainties


def _logs_between(
    tokens: Sequence[ScoredToken], begin: int, end: int, outside: Sequence[tuple[int, int]] = ()
) -> list[float]:
    """Log probabilities of the tokens with a character in [begin, end), but none in the ranges `outside`."""
    found, place = [], 0
    for token in tokens:
        last = place + len(token.text)
        inside = place < end and last > begin
        if inside and not any(place < stop and last > start for start, stop in outside):
            found.append(token.log_probability)
        place = last
    return found


def log_odds(log_probability: float) -> float:
    """log(p / (1 − p)) of p given by its logarithm, within the same bounds."""
    missing = -math.expm1(log_probability)
    return _CERTAIN if missing <= 0 else log_odds_within(log_probability - math.log(missing))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def log_odds_within(value: float) -> float:
    """Log odds kept within what arithmetic can tell."""
    return max(-_CERTAIN, min(_CERTAIN, value))
