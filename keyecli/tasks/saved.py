"""Reads saved results again: what `keye ground`, `summarize` and `scenes` wrote as JSON, and the output of `keye batch`."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyecli.errors import InputError, KeyeWarning
from keyecli.export.timeline import Segment, Timeline
from keyecli.video.source import VideoInfo, probe
from keyecli.video.timecode import format_time

STDIN = "-"
_ANSWER, _JOB = "keye.ask/1", "keye.batch/1"
_SPACE = re.compile(r"\s*")
_SAME_LENGTH_S = 0.01  # JSON keeps all digits of a length; another file is off by a frame at least


@dataclass(frozen=True)
class SavedResult:
    """One result as it was saved.

    schema: keye.ground/1, keye.summary/1 or keye.scenes/1. path, duration_s: the clip it is about, as it was named, and
    the clip's length in seconds. segments: its spans, chapters or scenes, in the order of the record. record: all of it.
    where: what to call it in a message, such as "line 3 of found.jsonl".
    """

    schema: str
    path: Path
    duration_s: float
    segments: tuple[Segment, ...]
    record: dict[str, Any]
    where: str

    @property
    def events(self) -> list[Segment]:
        """The events of a summary. InputError when they are damaged."""
        return list(_titled(self.record, "events", self.where))

    def text(self, name: str) -> str:
        """A field that must be text. InputError when it is not."""
        return _text(self.record, name, self.where)


@dataclass(frozen=True)
class SavedClip:
    """A clip and the results that belong together on its timeline, one at least."""

    results: tuple[SavedResult, ...]

    @property
    def path(self) -> Path:
        return self.results[0].path

    @property
    def segments(self) -> list[Segment]:
        return [segment for result in self.results for segment in result.segments]

    def timeline(self, info: VideoInfo | None = None) -> Timeline:
        """The segments on the clip's timeline; without `info` it has no frames, which is enough where times are written."""
        if info is not None:
            return Timeline.of(info, self.segments)
        ordered = sorted(self.segments, key=lambda segment: (segment.start_s, segment.end_s))
        return Timeline(self.path, self.results[0].duration_s, 0, 0, frame_times=(), segments=tuple(ordered))

    def open(self) -> VideoInfo:
        """Look into the clip. InputError: it is not there, cannot be read, or is not as long as it was."""
        first = self.results[0]
        if not self.path.exists():
            raise InputError(
                f"{self.path}, which {first.where} is about, does not exist; "
                "run this in the folder where the result was made"
            )
        info = probe(self.path)
        if abs(float(info.duration_s) - first.duration_s) > _SAME_LENGTH_S:
            raise InputError(
                f"{self.path} is another file than the one that {first.where} is about: "
                f"it lasts {format_time(info.duration_s)}, and that one {format_time(first.duration_s)}"
            )
        return info


def read_results(source: str) -> list[SavedResult]:
    """All results in a file, or in stdin for "-", in their order; at least one.

    JSON lines, one JSON object, a list of them, or any of these one after another, however they are broken into lines. Of
    what `keye batch` wrote, the last line of each job counts; answers without times are passed over, and a KeyeWarning
    tells how many jobs failed. InputError: what cannot be read, is no JSON, or is no result with times in it.
    """
    name = "stdin" if source == STDIN else source
    try:
        content = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the results in {name} cannot be read: {reason}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text; give what keye printed with --json") from None
    results = [_result(record, where) for record, where in _without_jobs(_records(text, name), name)]
    if not results:
        raise InputError(f"there is no result in {name}; give what keye printed with --json")
    return results


def clips_of(results: Iterable[SavedResult]) -> list[SavedClip]:
    """The clips that the results are about, in the order in which they first appear.

    Spans of all queries about a clip belong together. A summary and a list of scenes each cover the clip, and stand alone.
    """
    groups: dict[object, list[SavedResult]] = {}
    for number, result in enumerate(results):
        shared = result.schema == "keye.ground/1"
        groups.setdefault((result.path, result.duration_s) if shared else number, []).append(result)
    return [SavedClip(tuple(group)) for group in groups.values()]


def _records(text: str, name: str) -> Iterator[tuple[Any, str]]:
    """Every JSON value in the text, lists taken apart, with its place."""
    decoder = json.JSONDecoder()
    position, line = 0, 1
    while True:
        begin = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        if begin == len(text):
            return
        line += text.count("\n", position, begin)
        where = f"line {line} of {name}"
        try:
            value, position = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            raise InputError(
                f"{where} is no JSON, or was cut off; give what keye printed with --json"
            ) from None
        line += text.count("\n", begin, position)
        if isinstance(value, list):
            yield from ((part, f"result {number} in {where}") for number, part in enumerate(value, 1))
        else:
            yield value, where


def _without_jobs(records: Iterable[tuple[Any, str]], name: str) -> Iterator[tuple[Any, str]]:
    """The records, in the place of each job its results that have times."""
    latest: dict[object, tuple[Any, str]] = {}
    for number, (record, where) in enumerate(records):
        # A job has another line when it was tried again, or was asked something else under its old name.
        latest[_text(record, "id", where) if _is(record, _JOB) else number] = record, where
    failed = 0
    for record, where in latest.values():
        if not _is(record, _JOB):
            yield record, where
        elif record.get("status") == "done":
            results = _objects(record, "results", where)
            yield from ((result, where) for result in results if not _is(result, _ANSWER))
        else:
            failed += 1
    if failed:
        jobs = "a job" if failed == 1 else f"{failed} jobs"
        warnings.warn(KeyeWarning(f"{jobs} in {name} failed and left no result"), stacklevel=3)


def _is(record: Any, schema: str) -> bool:
    return isinstance(record, dict) and record.get("schema") == schema


def _result(record: Any, where: str) -> SavedResult:
    schema = record.get("schema") if isinstance(record, dict) else None
    if not isinstance(schema, str) or schema not in _SEGMENTS:
        what = f"{schema}, which has no times" if isinstance(schema, str) else "no result of keye"
        raise InputError(f"{where} is {what}; there must be one of {', '.join(_SEGMENTS)}")
    clip = record
    if schema != "keye.scenes/1":
        clip = next(iter(_objects(record, "inputs", where)), None)
        if clip is None:
            raise _damaged(where, "inputs is empty")
    path = _text(clip, "path", where)
    if not path:
        raise _damaged(where, "path is empty")
    return SavedResult(
        schema=schema,
        path=Path(path),
        duration_s=_number(clip, "duration_s", where),
        segments=tuple(_SEGMENTS[schema](record, where)),
        record=record,
        where=where,
    )


def _spans(record: dict[str, Any], where: str) -> Iterator[Segment]:
    query = _text(record, "query", where)
    for span in _objects(record, "spans", where):
        score = None if span.get("score") is None else _number(span, "score", where)
        yield Segment(*_times(span, where), query, score=score)


def _chapters(record: dict[str, Any], where: str) -> Iterator[Segment]:
    return _titled(record, "chapters", where)


def _scenes(record: dict[str, Any], where: str) -> Iterator[Segment]:
    for number, scene in enumerate(_objects(record, "scenes", where), 1):
        yield Segment(*_times(scene, where), f"Scene {number}")


_SEGMENTS: dict[str, Callable[[dict[str, Any], str], Iterator[Segment]]] = {
    "keye.ground/1": _spans,
    "keye.summary/1": _chapters,
    "keye.scenes/1": _scenes,
}


def _titled(record: dict[str, Any], name: str, where: str) -> Iterator[Segment]:
    for part in _objects(record, name, where):
        yield Segment(*_times(part, where), _text(part, "title", where), _text(part, "text", where))


def _times(part: dict[str, Any], where: str) -> tuple[float, float]:
    start_s, end_s = _number(part, "start_s", where), _number(part, "end_s", where)
    if end_s < start_s:
        raise _damaged(where, f"a part goes from {start_s:g} back to {end_s:g} s")
    return start_s, end_s


def _objects(record: dict[str, Any], name: str, where: str) -> Sequence[dict[str, Any]]:
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise _damaged(where, f"{name} is no list of objects")
    return value


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise _damaged(where, f"{name} is no text")
    return value


def _number(record: dict[str, Any], name: str, where: str) -> float:
    """A number that is 0 or above and finite."""
    value = record.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return float(value)
    raise _damaged(where, f"{name} is no number of 0 or more")


def _damaged(where: str, what: str) -> InputError:
    return InputError(f"{where} is damaged: {what}")
