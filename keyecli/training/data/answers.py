"""Spans that an answer of a training row names, as it writes them: reversed ones too, which reading an answer never gives."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from keyecli.tasks.spans import Pair

_CLOCK = r"(?:\d+:)?\d{1,3}:\d{2}(?:\.\d+)?"
# A number without decimals or unit may be a score, a year or a count.
_TIME = rf"(?:{_CLOCK}|\d+\.\d+|\d+(?:\.\d+)?(?=\s*(?:s|secs?|seconds?)\b))"
_LOOSE = rf"(?:{_CLOCK}|\d+(?:\.\d+)?)"
_TO = r"\s*(?:-|–|—|to)\s*"
_UNIT = r"(?:\s*(?:s|secs?|seconds?)\b)?"
_SPAN = rf"(?:from\s+)?(?P<start>{_LOOSE}){_UNIT}{_TO}(?P<end>{_TIME}){_UNIT}"
_ANY_SPAN = re.compile(_SPAN, re.IGNORECASE)
_NAMELESS = re.sub(r"\?P<\w+>", "?:", _SPAN)
# "The event happens in 3.0 - 7.5 seconds, 12.0 - 14.5 seconds.": nothing but spans behind a few words.
_SENTENCE = re.compile(rf"[^\d\n]{{0,80}}{_NAMELESS}(?:\s*(?:,|;|and)+\s*{_NAMELESS})*\s*\.?", re.IGNORECASE)
# A line of a summary, "3.0 - 7.5: what happens".
_LINE = re.compile(rf"^\s*(?:[-*]\s+)?{_SPAN}\s*:\s*\S", re.IGNORECASE | re.MULTILINE)


def spans_in_list(text: str) -> list[Pair] | None:
    """The pairs of an answer that is a JSON list of [start, end] and nothing else, in its order and theirs; else None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list):
        return None
    for pair in value:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or any(type(edge) not in (int, float) for edge in pair)
        ):
            return None
    return [(float(start), float(end)) for start, end in value]


def spans_in_answer(text: str) -> list[Pair]:
    """Spans in seconds of an answer that is about spans: a JSON list, a sentence of nothing else, or lines of a summary.

    As written, so that a pair may run backward. An answer that only happens to name times gives none.
    """
    text = text.strip()
    if (listed := spans_in_list(text)) is not None:
        return listed
    form = _ANY_SPAN if _SENTENCE.fullmatch(text) else _LINE
    return [(_seconds(match["start"]), _seconds(match["end"])) for match in form.finditer(text)]


def span_fault(span: Pair, begin_s: float, end_s: float) -> str | None:
    """What is wrong with a span of a clip that is seen from `begin_s` to `end_s`, None for nothing.

    Times in answers have one decimal, and so much may a span reach over the clip.
    """
    start, end = span
    name = f"the span {start:g} - {end:g} s"
    if start > end:
        return f"{name} is reversed"
    if start == end:
        return f"{name} has no length"
    # A tenth, and what is lost in writing it in binary.
    if end > end_s + 0.1 + 1e-6 or start < begin_s - 0.1 - 1e-6:
        return f"{name} is outside of the clip, which is seen from {begin_s:.1f} to {end_s:.1f} s"
    return None


def turned(spans: Sequence[Pair]) -> list[Pair]:
    """The same spans running forward, in order of time."""
    return sorted((min(span), max(span)) for span in spans)


def _seconds(text: str) -> float:
    seconds = 0.0
    for part in text.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds
