"""Reads the timed lines out of a summary as models write them: lines, lists, tables, JSON; what is left is the prose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

MAX_TITLE = 80  # characters; what is longer keeps its whole wording in the text

_UNIT = r"(?:seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|Sekunden?|秒钟?|分钟?|小时)(?![a-z])"
_NUMBER = r"\d+(?:[.,]\d+)?(?![.,]?\d|:\d)"
_CLOCK = r"(?:\d+:)?\d{1,3}:\d{2}(?:[.,]\d+)?"
_SPOKEN = rf"(?:{_NUMBER}\s*{_UNIT}\s*){{1,3}}"  # 90 s, 1 min 30 s, 1分30秒
_TIME = rf"(?:{_CLOCK}|{_SPOKEN}|{_NUMBER})"
_OPEN, _CLOSE = r"[\[(<{【（]?\s*", r"\s*[\])>}】）]?"
_TO = r"\s*(?:-{1,2}>|[-–—−~～→]|\b(?:to|until|bis)\b|至|到)\s*"
_FROM = r"(?:(?:from|von|从)\s*)?"


def _edge(name: str, time: str = _TIME) -> str:
    return rf"(?P<{name}>{time})(?:\s*{_UNIT})?" if name else rf"{time}(?:\s*{_UNIT})?"


def _range(start: str = "start", end: str = "end") -> str:
    """`3.0 - 7.5`, each time or both in brackets or not, or `[3.0, 7.5]`; the groups' names, "" for no group."""
    return rf"{_OPEN}{_FROM}{_OPEN}{_edge(start)}{_CLOSE}{_TO}{_OPEN}{_edge(end)}{_CLOSE}{_CLOSE}"


def _pair(start: str = "start", end: str = "end") -> str:
    plain = rf"(?:{_CLOCK}|\d+(?:\.\d+)?)"
    return rf"[\[(]\s*{_edge(start, plain)}\s*,\s*{_edge(end, plain)}\s*[\])]"


_FLAGS = re.IGNORECASE | re.ASCII
# What follows must not go on with the number: "3-7x", "1:30 - 2:00pm" and "2024-11-22" are something else.
_BEHIND = r"(?![\w%]|-\d|\s*[ap]\.?m\b)\s*(?:[:：,，、.|–—-]\s*)?(?P<rest>.*)"
# One time alone must look like one: "3 red circles" is no event at 3 seconds.
_ALONE = rf"(?:[\[(【]\s*(?P<framed>{_TIME})\s*[\])】]|(?P<start>{_CLOCK}|{_SPOKEN}(?=\s*[:：–—-])))"
_BEGINS_WITH_TIME = tuple(re.compile(form + _BEHIND, _FLAGS) for form in (_pair(), _range(), _ALONE))
_ENDS_WITH_TIME = re.compile(
    rf"(?P<rest>\S.*?)\s*[|:：,–—-]*\s*{_range()}\.?(?:\s*[:：–—-]\s*(?P<more>\S.*))?", _FLAGS
)
_IS_RANGE = re.compile(rf"{_range()}|{_pair('left', 'right')}", _FLAGS)
_IS_TIME = re.compile(rf"{_OPEN}(?P<start>{_TIME}){_CLOSE}", _FLAGS)
_TIMES = rf"(?:{_range('', '')}|{_pair('', '')}|{_OPEN}{_TIME}{_CLOSE})"

_ITEM = re.compile(r"\s*(?:[-*+•·▪>]|\(?\d{1,3}[.)]|#{1,6})\s+")
_BOLD = re.compile(r"\*\*|__|`")
_BOLD_TIMES = re.compile(rf"\s*(?:\*\*|__|`)\s*(?P<times>{_TIMES})\s*[:：]?\s*(?:\*\*|__|`)", _FLAGS)
_BOLD_TITLE = re.compile(
    rf"(?P<lead>(?:\s*{_TIMES}\W*?)?)(?:\*\*|__)(?P<title>.+?)[:：]?\s*(?:\*\*|__)\s*[:：|–—-]*\s*(?P<text>\S.*)",
    _FLAGS,
)
_SPLIT = re.compile(r"\s*\|\s*|\s+[–—]\s+")
_RULE = re.compile(r"[\s|:-]*-{2,}[\s|:-]*")
_FENCE = re.compile(r"\s*```\w*\s*")
_COUNT = re.compile(r"\s*\d+\s*")  # SubRip numbers its entries
_BLANKS = re.compile(r"[^\S\n]{2,}")
_RUN = re.compile(r"((\W)\2{7})\2+")
_HEADING = re.compile(
    r"\s*(?:#{1,6}\s.*|[^\s.!?。！？][^.!?。！？]{0,40}[:：]\W*|(?:\*\*|__)[^*_]{1,60}(?:\*\*|__)\W*)"
)
_LABEL = re.compile(r"\W*(?:summary|overview|摘要|总结)\W{0,3}[:：](?:\*\*|__)?\s*(?=\S)", re.IGNORECASE)

_MAX_BRACKETS = 100  # places where JSON may begin
_START_KEYS = ("start_s", "start", "start_time", "begin", "from", "time", "timestamp", "time_range")
_END_KEYS = ("end_s", "end", "end_time", "to", "until")
_TITLE_KEYS = ("title", "event", "name", "label", "chapter", "heading")
_TEXT_KEYS = ("text", "description", "summary", "content", "caption", "details")
_PROSE_KEYS = ("summary", "text", "overview", "description")
_SECONDS = {"h": 3600.0, "小": 3600.0, "m": 60.0, "分": 60.0, "s": 1.0, "秒": 1.0}


@dataclass(frozen=True)
class Event:
    """Something that happens in [start_s, end_s], seconds from the clip's first frame; text: more about it, or ""."""

    start_s: float
    end_s: float
    title: str
    text: str = ""

    @property
    def line(self) -> str:
        """`3.0 - 7.5: red circle moves left`"""
        more = f" | {self.text}" if self.text else ""
        return f"{self.start_s:.1f} - {self.end_s:.1f}: {self.title}{more}"


@dataclass(frozen=True)
class TimedLine:
    """A line as written: `end_s` is None where it names one time only, and an end may come before its start."""

    start_s: float
    end_s: float | None
    title: str
    text: str = ""


@dataclass(frozen=True)
class ParsedSummary:
    """An answer taken apart: the prose without headings, and the timed lines in the order written."""

    text: str
    lines: tuple[TimedLine, ...]


def parse_summary(answer: str) -> ParsedSummary:
    """Take an answer apart. JSON in it that holds timed entries wins over lines.

    A line is timed when it begins, behind a list mark, with a range ("3.0 - 7.5", "[0:03 - 0:07]", "from 3 to 7.5 seconds",
    "00:00:03,000 --> 00:00:07,500", "1分3秒至1分7秒", "[3.0, 7.5]") or with one time that can be no count ("0:03", "[3.0]",
    "3 s"); as an item of a list it may also end with a range. A bold beginning, a bar or a spaced dash splits title and
    text. Untimed lines right below a timed one, without an empty line between, are more of its text, or its title where
    it had times only.
    """
    found = _parse_json(answer)
    if found is not None:
        return found
    lines: list[TimedLine] = []
    prose: list[str] = []
    below_timed = False
    for raw in _lines_of(answer):
        if _FENCE.fullmatch(raw) or _COUNT.fullmatch(raw):
            continue
        if _RULE.fullmatch(raw):
            if "|" in raw and prose:
                prose.pop()  # the head of the table
            continue
        line = _timed_line(raw)
        if line is not None:
            lines.append(line)
            below_timed = True
        elif not raw.strip():
            prose.append("")
            below_timed = False
        elif below_timed:
            mark = _ITEM.match(raw)
            more = _plain(raw[mark.end() :] if mark else raw)
            lines[-1] = _with_more(lines[-1], more)
        elif not _HEADING.fullmatch(raw):
            prose.append(_plain(_LABEL.sub("", raw, count=1)))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(prose)).strip()
    return ParsedSummary(text, tuple(line for line in lines if line.title))


def settle(lines: Sequence[TimedLine], begin_s: float, end_s: float) -> tuple[list[Event], int]:
    """Events inside [begin_s, end_s], ascending, each once; and how many lines lay outside and were left out.

    A line with one time lasts until the next line's start, the last one to the end; a reversed range is turned; what
    reaches over an edge is cut there.
    """
    starts = sorted(line.start_s if line.end_s is None else min(line.start_s, line.end_s) for line in lines)
    events: dict[Event, None] = {}
    outside = 0
    for line in lines:
        start_s, stop_s = line.start_s, line.end_s
        if stop_s is None or stop_s == start_s:
            stop_s = next((other for other in starts if other > start_s), end_s)
        start_s, stop_s = max(min(start_s, stop_s), begin_s), min(max(start_s, stop_s), end_s)
        if start_s < stop_s:
            events[Event(start_s, stop_s, line.title, line.text)] = None
        else:
            outside += 1
    return sorted(events, key=lambda event: (event.start_s, event.end_s)), outside


def read_time(text: str) -> float | None:
    """Seconds of "7.5", "7,5 s", "1:15", "1:02:03.250", "1 min 30 s" or "1分30秒"; None for anything else."""
    text = text.strip()
    if re.fullmatch(_CLOCK, text, _FLAGS):
        seconds = 0.0
        for part in text.replace(",", ".").split(":"):
            seconds = seconds * 60 + float(part)
        return seconds
    if re.fullmatch(_SPOKEN, text, _FLAGS):
        parts = re.findall(rf"({_NUMBER})\s*({_UNIT})", text, _FLAGS)
        return sum(float(number.replace(",", ".")) * _SECONDS[unit[0].lower()] for number, unit in parts)
    return float(text.replace(",", ".")) if re.fullmatch(_NUMBER, text, _FLAGS) else None


def _timed_line(raw: str) -> TimedLine | None:
    if raw.strip().startswith("|"):
        return _timed_row([_plain(cell) for cell in raw.strip().strip("|").split("|")])
    mark = _ITEM.match(raw)
    body = raw[mark.end() :] if mark else raw
    body = _BOLD_TIMES.sub(r"\g<times> ", body, count=1)
    body = _plain(_BOLD_TITLE.sub(r"\g<lead>\g<title> | \g<text>", body, count=1))
    for form in _BEGINS_WITH_TIME:
        match = form.fullmatch(body)
        if match:
            found = match.groupdict()
            return _line(found["start"] or found["framed"], found.get("end"), match["rest"])
    match = _ENDS_WITH_TIME.fullmatch(body) if mark else None
    if match:
        return _line(match["start"], match["end"], f"{match['rest']} | {match['more'] or ''}")
    return None


def _timed_row(cells: Sequence[str]) -> TimedLine | None:
    """A table's row: [number |] start - end | title [| text], or [number |] start | end | title [| text]."""
    for skip in (0, 1):
        rest = cells[skip:]
        whole = _IS_RANGE.fullmatch(rest[0]) if len(rest) > 1 else None
        if whole:
            start, end = whole["start"] or whole["left"], whole["end"] or whole["right"]
            return _line(start, end, " | ".join(rest[1:]))
        if len(rest) > 2 and (skip or not _is_number(cells[0])):
            first, second = (_IS_TIME.fullmatch(cell) for cell in rest[:2])
            if first and second:
                return _line(first["start"], second["start"], " | ".join(rest[2:]))
    return None


def _line(start: str, end: str | None, rest: str) -> TimedLine | None:
    start_s, end_s = read_time(start), None if end is None else read_time(end)
    if start_s is None or (end is not None and end_s is None):
        return None
    title, _, text = (part.strip() for part in _SPLIT.sub("|", rest, count=1).partition("|"))
    return _fitted(start_s, end_s, title.strip(" :：|"), re.sub(r"\s*\|\s*", " | ", text).strip(" |"))


def _with_more(line: TimedLine, more: str) -> TimedLine:
    """The line with what stands below it: its title, where it had none, else more of its text."""
    if not line.title:
        return _fitted(line.start_s, line.end_s, *f"{_SPLIT.sub('|', more, count=1)}|".split("|", 1))
    return replace(line, text=f"{line.text} {more}".strip())


def _fitted(start_s: float, end_s: float | None, title: str, text: str) -> TimedLine:
    """A title that is too long is cut at a word, and its whole wording goes into the text."""
    title, text = " ".join(title.split()), text.strip(" |")
    if len(title) > MAX_TITLE:
        text = f"{title} {text}".strip()
        title = title[: MAX_TITLE - 1].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"
    return TimedLine(start_s, end_s, title, text)


def _plain(text: str) -> str:
    return _BOLD.sub("", text).strip()


def _parse_json(answer: str) -> ParsedSummary | None:
    """The first JSON value in the answer that holds timed entries; what stands around it is prose, as is its "summary"."""
    decoder = json.JSONDecoder()
    for bracket in islice(re.finditer(r"[\[{]", answer), _MAX_BRACKETS):
        try:
            value, end = decoder.raw_decode(answer, bracket.start())
        except (ValueError, RecursionError):
            continue
        lines = tuple(_entries(value))
        if not lines:
            continue
        around = [answer[: bracket.start()], answer[end:]]
        inside = _first(value, _PROSE_KEYS) if isinstance(value, dict) and not _times_of(value) else None
        prose = [inside if isinstance(inside, str) else "", *(_prose_of(part) for part in around)]
        return ParsedSummary("\n\n".join(part for part in prose if part), lines)
    return None


def _lines_of(text: str) -> list[str]:
    """Its lines, without long runs of one character, which no line needs and patterns would try to divide in every way."""
    return [_RUN.sub(r"\1", _BLANKS.sub(" ", line)) for line in text.splitlines()]


def _prose_of(text: str) -> str:
    kept = [line for line in _lines_of(text) if not (_FENCE.fullmatch(line) or _HEADING.fullmatch(line))]
    return _plain(_LABEL.sub("", "\n".join(kept), count=1))


def _entries(value: Any) -> Iterator[TimedLine]:
    """Timed entries anywhere in a JSON value: objects with a time and a title, or lists [start, end, title]."""
    if isinstance(value, dict):
        times = _times_of(value)
        title, text = _first(value, _TITLE_KEYS), _first(value, _TEXT_KEYS)
        said = [str(part) for part in (title, text) if isinstance(part, str) and part.strip()]
        if times and said:
            yield _fitted(*times, said[0], "".join(said[1:]))
        else:
            for item in value.values():
                yield from _entries(item)
    elif isinstance(value, list):
        times = _edges(value[0], value[1]) if len(value) in (3, 4) else None
        if times and all(isinstance(part, str) for part in value[2:]):
            yield _fitted(*times, *value[2:], *([""] * (4 - len(value))))
        else:
            for item in value:
                yield from _entries(item)


def _times_of(entry: dict[str, Any]) -> tuple[float, float | None] | None:
    start = _first(entry, _START_KEYS)
    if isinstance(start, str):
        whole = _IS_RANGE.fullmatch(start.strip())
        if whole:
            return _edges(whole["start"] or whole["left"], whole["end"] or whole["right"])
    if isinstance(start, list) and len(start) == 2:
        return _edges(*start)
    return _edges(start, _first(entry, _END_KEYS))


def _edges(start: Any, end: Any) -> tuple[float, float | None] | None:
    start_s, end_s = _seconds(start), None if end is None else _seconds(end)
    return None if start_s is None or (end is not None and end_s is None) else (start_s, end_s)


def _seconds(value: Any) -> float | None:
    if isinstance(value, str):
        return read_time(value)
    return float(value) if type(value) in (int, float) and value >= 0 else None


def _first(entry: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+\.?", text, re.ASCII) is not None
