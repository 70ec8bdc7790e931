"""Time spans in answers: reading them, strictly or in any spelling, and comparing them with the truth."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

Pair = tuple[float, float]
"""Start and end in seconds."""

_HOUR, _MINUTE, _SECOND = r"hours?|hrs?|h|小时|时", r"minutes?|mins?|m|分钟|分", r"seconds?|secs?|s|秒钟|秒"
_UNIT = rf"(?:{_HOUR}|{_MINUTE}|{_SECOND})(?![a-z])"
_NUMBER = r"\d+(?:\.\d+)?"
# Decimals behind a comma as SubRip has them: exactly three digits, or [0:12,0:15] would be read as one time.
_CLOCK = r"(?:\d+:[0-5]?\d|\d+):[0-5]?\d(?:\.\d+|,\d{3}(?!\d))?"
_SPOKEN = rf"{_NUMBER}\s*-?\s*{_UNIT}(?:\s*{_NUMBER}\s*{_UNIT})*"
_TIME = rf"(?:{_CLOCK}|{_SPOKEN}|{_NUMBER})"
_QUOTE = r"[\"'`]?"
_BEFORE, _BEHIND = r"(?<![\d.:])", r"(?![\d:]|\.\d)"
_AT = r"(?:at|from|is|about|around|approximately|第|于|在|[:=])"
_TO = r"(?:-{1,2}>|[-–—−~→]|\b(?:to|until|till|through)\b|至|到)"


def _pair(between: str, start: str = "", end: str = "") -> re.Pattern[str]:
    """Two times with `between` them, the first behind `start`, the second before `end`."""
    first, second = rf"{_QUOTE}(?P<start>{_TIME}){_QUOTE}", rf"{_QUOTE}(?P<end>{_TIME}){_QUOTE}"
    return re.compile(rf"{start}\s*{_BEFORE}{first}\s*{between}\s*{second}{_BEHIND}\s*{end}", re.IGNORECASE)


# In this order, since what one form has read is not offered to the next.
_FORMS = (
    # [3.0, 7.5], ("0:03", "0:07")
    _pair(r"[,;]", start=r"[\[({]", end=r"[\])}]"),
    # "start": 3.0, "end": 7.5; starts at 3 s and ends at 7.5 s; 开始于3秒，结束于7秒
    _pair(
        rf"[^\d]{{0,24}}?(?:end|stop|finish|disappear|结束|消失)\w*{_QUOTE}\s*(?:{_AT}\s*)*",
        start=rf"(?:start|begin|appear|开始|出现)\w*{_QUOTE}\s*(?:{_AT}\s*)*",
    ),
    # between 3 and 7.5 seconds
    _pair(r"\band\b", start=r"\bbetween\b(?:\s+about)?"),
    # 3.0 - 7.5, from 0:03 to 0:07, 第3秒到第7.5秒
    _pair(rf"{_TO}\s*(?:about\s+|第)?"),
)

_NOT_THERE = re.compile(
    r"\b(?:not|never|isn'?t|doesn'?t|didn'?t|wasn'?t|cannot|can'?t)\b[^.\n]{0,40}?"
    r"\b(?:there|appears?|visible|seen|shown|present|happens?|occurs?|found|exists?|on screen|in the (?:video|clip))\b"
    r"|\bno\s+(?:such|spans?|times?|moments?|occurrences?|match(?:es)?|events?|instances?)\b"
    r"|\b(?:never|none|n/a)\b|^\s*(?:no|nothing)\W*$|\[\s*\]"
    r"|没有|不存在|未(?:曾)?(?:出现|找到|发现)|从未|从不|不在|看不到",
    re.IGNORECASE,
)


def parse_spans(text: str) -> list[Pair] | None:
    """Spans in seconds of an answer that is exactly a JSON list of [start, end] pairs; None when it is anything else.

    An empty list means that the event is not there. A pair that does not run forward makes the answer invalid.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, list):
        return None
    spans = []
    for pair in value:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(type(edge) in (int, float) for edge in pair)
        ):
            return None
        if not pair[0] < pair[1]:
            return None
        spans.append((float(pair[0]), float(pair[1])))
    return spans


def find_spans(text: str) -> list[Pair] | None:
    """Spans in seconds that an answer names in any spelling, in its order; [] when it says that there are none.

    Understood are seconds, m:ss, h:mm:ss.mmm, units (s, minutes, 1m30s, 秒, 分 …), in brackets, as JSON fields, with a
    dash, "from … to", "between … and", 到 and 至. A number without a unit has that of the other end, else seconds. A
    pair that runs backward is turned around, one without a length is left out. None when no span is named, and it is
    not said that there is none.
    """
    text = unicodedata.normalize("NFKC", text)
    found: dict[int, Pair] = {}
    for form in _FORMS:
        for match in form.finditer(text):
            unit = _only_unit(match["end"]) or _only_unit(match["start"])
            found[match.start("start")] = _seconds(match["start"], unit), _seconds(match["end"], unit)
        text = form.sub(lambda match: "\0" * len(match[0]), text)
    if not found:
        return [] if _NOT_THERE.search(text) else None
    pairs = [found[place] for place in sorted(found)]
    return [(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]] or None


def _only_unit(text: str) -> str:
    """The unit of a time that has exactly one, as in "2 minutes"."""
    units = re.findall(_UNIT, text, re.IGNORECASE)
    return units[0] if len(units) == 1 else ""


def _seconds(text: str, unit: str) -> float:
    """A time in seconds; a plain number is in `unit`."""
    if ":" in text:
        seconds = 0.0
        for part in text.replace(",", ".").split(":"):
            seconds = seconds * 60 + float(part)
        return seconds
    parts = re.findall(rf"({_NUMBER})\s*-?\s*({_UNIT})?", text, re.IGNORECASE)
    return sum(float(number) * _unit_seconds(own or unit) for number, own in parts)


def _unit_seconds(unit: str) -> int:
    for pattern, seconds in ((_HOUR, 3600), (_MINUTE, 60)):
        if re.fullmatch(pattern, unit, re.IGNORECASE):
            return seconds
    return 1


def merged(spans: Sequence[Pair]) -> list[Pair]:
    """The same time as ascending spans that neither overlap nor touch."""
    result: list[Pair] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def temporal_iou(predicted: Sequence[Pair], truth: Sequence[Pair]) -> float:
    """Intersection over union of the time that each side covers, in [0, 1]; splitting a span changes nothing.

    Two empty sides agree: 1.
    """
    left, right = merged(predicted), merged(truth)
    if not left and not right:
        return 1.0
    shared = sum(
        max(0.0, min(a_end, b_end) - max(a_start, b_start))
        for a_start, a_end in left
        for b_start, b_end in right
    )
    total = sum(end - start for start, end in left) + sum(end - start for start, end in right) - shared
    return shared / total if total > 0 else 0.0
