"""Checking a data file against its videos, row by row: what is wrong with each, and how many tokens it takes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keyecli.engine.loaded import ModelFiles
from keyecli.engine.plan import InputPlan
from keyecli.engine.stream import visual_of
from keyecli.errors import InputError, KeyeError
from keyecli.model.companions import load_tokenizer
from keyecli.tasks.options import ask_settings
from keyecli.tasks.parse import split_answer
from keyecli.training.data.answers import span_fault, spans_in_answer, spans_in_list, turned
from keyecli.training.data.parity import parity_fault
from keyecli.training.data.source import DataFile
from keyecli.training.data.timelens import spans_text
from keyecli.training.data.visuals import PlaceholderError
from keyecli.training.examples import Example, lay_out_row, plan_row
from keyecli.training.rows import RowError, TrainingRow, VisualRef
from keyecli.video.source import VideoInfo, probe

FindingKind = Literal[
    "row", "placeholders", "clip", "sampling", "layout", "length", "span", "duplicate", "parity"
]

WINDOW_ROWS = 256
KEPT_CLIPS = 4096
_THREADS = 8


@dataclass(frozen=True)
class TextFix:
    """An answer in the place of another: how a finding can be repaired."""

    old: str
    new: str


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a row; fix: how to repair it, where that is beyond doubt."""

    kind: FindingKind
    message: str
    fix: TextFix | None = None


@dataclass(frozen=True)
class RowCheck:
    """What came of a row. tokens, visual_tokens and learnt_tokens are None for one that could not be laid out."""

    number: int
    source: str
    line: int
    findings: tuple[Finding, ...]
    tokens: int | None = None
    visual_tokens: int | None = None
    learnt_tokens: int | None = None

    @property
    def usable(self) -> bool:
        """Whether nothing is wrong with it, or only what can be repaired."""
        return all(finding.fix is not None for finding in self.findings)


class Clips:
    """Files that were looked into, each once, several at a time; the last KEPT_CLIPS are remembered, failures all."""

    def __init__(self) -> None:
        self._infos: OrderedDict[Path, VideoInfo] = OrderedDict()
        self._errors: dict[Path, InputError] = {}
        self._threads = ThreadPoolExecutor(min(_THREADS, 2 * (os.cpu_count() or 1)))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def look(self, paths: Iterable[Path]) -> None:
        """Look into those that are not known yet."""
        new = [path for path in dict.fromkeys(paths) if path not in self._infos and path not in self._errors]
        for path, info in zip(new, self._threads.map(_probed, new), strict=True):
            self._remember(path, info)

    def info(self, path: Path) -> VideoInfo:
        """InputError for a file that cannot be read."""
        if path in self._errors:
            raise self._errors[path]
        if path not in self._infos:
            self._remember(path, _probed(path))
            return self.info(path)
        self._infos.move_to_end(path)
        return self._infos[path]

    def _remember(self, path: Path, info: VideoInfo | InputError) -> None:
        if isinstance(info, InputError):
            self._errors[path] = info
            return
        self._infos[path] = info
        if len(self._infos) > KEPT_CLIPS:
            self._infos.popitem(last=False)


def _probed(path: Path) -> VideoInfo | InputError:
    try:
        return probe(path)
    except InputError as error:
        return error


@dataclass
class Checker:
    """Checks the rows of a file for a model, of which only the small files are read.

    options: how visuals are sampled, as `AskOptions`; max_length: tokens that a row may have, None: the model's context;
    parity: compare each row with the prompt of answering, too.
    """

    data: DataFile
    files: ModelFiles
    options: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    parity: bool = False

    def __post_init__(self) -> None:
        self._settings = ask_settings(self.files.preprocessor, **self.options)
        self._tokenizer = load_tokenizer(self.files.folder)
        self._seen: dict[bytes, int] = {}
        self._clips = Clips()

    def rows(self) -> Iterator[RowCheck]:
        """All rows in order."""
        try:
            for begin in range(0, len(self.data), WINDOW_ROWS):
                numbers = range(begin, min(begin + WINDOW_ROWS, len(self.data)))
                rows = [self._read(number) for number in numbers]
                self._clips.look(
                    visual.path for row in rows if isinstance(row, TrainingRow) for visual in row.visuals
                )
                for number, row in zip(numbers, rows, strict=True):
                    yield self._checked(number, row)
        finally:
            self._clips.close()

    def _read(self, number: int) -> TrainingRow | RowError:
        try:
            return self.data.row(number)
        except RowError as error:
            return error

    def _checked(self, number: int, row: TrainingRow | RowError) -> RowCheck:
        source, line = self.data.source(number), self.data.line(number)
        if isinstance(row, RowError):
            kind: FindingKind = "placeholders" if isinstance(row, PlaceholderError) else "row"
            return RowCheck(number, source, line, (Finding(kind, without_source(row, source)),))
        findings = [*self._clip_findings(row)]
        example: Example | None = None
        plans: Sequence[InputPlan] = ()
        if not findings:
            found: FindingKind = "sampling"
            try:
                plans = plan_row(row, self._settings.sampling, self._clips.info)
                found = "layout"
                visuals = [visual_of(plan) for plan in plans]
                example = lay_out_row(self._tokenizer, self.files.config, row, visuals)
            except (KeyeError, ValueError) as error:  # ValueError: the template and the visuals do not match
                findings.append(Finding(found, without_source(error, source)))
        findings += self._span_findings(row)
        findings += self._duplicate_findings(number, row)
        if example is None:
            return RowCheck(number, source, line, tuple(findings))
        findings += self._length_findings(example)
        if self.parity:
            fault = parity_fault(row, example, plans, self.files, self._tokenizer, self.options)
            findings += [Finding("parity", fault)] if fault else []
        counts = example.tokens, example.visual_tokens, example.learnt_tokens
        return RowCheck(number, source, line, tuple(findings), *counts)

    def _clip_findings(self, row: TrainingRow) -> Iterator[Finding]:
        for visual in dict.fromkeys((visual.kind, visual.path) for visual in row.visuals):
            kind, path = visual
            try:
                info = self._clips.info(path)
            except InputError as error:
                yield Finding("clip", str(error))
                continue
            if (info.kind == "image") != (kind == "image"):
                real = "an image" if info.kind == "image" else "a video"
                yield Finding("clip", f"{path} is {real}, and the row has it as {_article(kind)}")
            elif self._settings.strict and info.truncated_at_s is not None:
                yield Finding("clip", f"{path} is cut off at {float(info.truncated_at_s):.1f} s")

    def _span_findings(self, row: TrainingRow) -> Iterator[Finding]:
        begin_s, end_s = self._part_seen(row)
        for message in row.messages:
            if message.role != "assistant":
                continue
            answer = split_answer(message.text)[1].strip()
            spans = spans_in_answer(answer)
            faults = [fault for span in spans if (fault := span_fault(span, begin_s, end_s))]
            if not faults:
                continue
            fix = None
            if spans_in_list(answer) is not None:
                right = turned(spans)
                if not any(span_fault(span, begin_s, end_s) for span in right):
                    fix = TextFix(answer, spans_text(right))
            yield from (Finding("span", fault, fix) for fault in dict.fromkeys(faults))

    def _part_seen(self, row: TrainingRow) -> tuple[float, float]:
        """What a span may cover, in seconds: the part that is sampled of the row's only video."""
        videos = [visual for visual in row.visuals if visual.kind == "video"]
        if len(videos) != 1:
            return 0.0, float("inf")
        try:
            length_s = float(self._clips.info(videos[0].path).duration_s)
            own = ask_settings(self.files.preprocessor, **{**self.options, **videos[0].sampling}).sampling
        except KeyeError:  # told as another finding
            return 0.0, float("inf")
        end_s = length_s if own.end_s is None else min(length_s, float(own.end_s))
        return float(own.start_s or 0), end_s

    def _duplicate_findings(self, number: int, row: TrainingRow) -> Iterator[Finding]:
        first = self._seen.setdefault(_fingerprint(row), number)
        if first != number:
            yield Finding("duplicate", f"the row says the same as {self.data.source(first)}")

    def _length_findings(self, example: Example) -> Iterator[Finding]:
        context = self.files.config.max_position_embeddings
        limit = context if self.max_length is None else min(context, self.max_length)
        if example.tokens > limit:
            what = "the model's context holds" if limit == context else "--max-length allows"
            yield Finding(
                "length",
                f"the row takes {example.tokens:,} tokens and {what} {limit:,}, so that its answer would be cut off",
            )


@dataclass
class Summary:
    """What the checks of all rows come to."""

    rows: int = 0
    wrong_rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=list)
    visual_tokens: int = 0
    learnt_tokens: int = 0

    def add(self, check: RowCheck) -> None:
        self.rows += 1
        self.wrong_rows += bool(check.findings)
        self.kinds.update({finding.kind for finding in check.findings})
        if check.tokens is not None:
            self.tokens.append(check.tokens)
            self.visual_tokens += check.visual_tokens or 0
            self.learnt_tokens += check.learnt_tokens or 0


def histogram(counts: Sequence[int], most_bars: int = 10) -> list[tuple[int, int, int]]:
    """(from, below, how many) of equally wide classes that cover `counts`, their edges being round numbers."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    width = 1
    while (high // width) - (low // width) + 1 > most_bars:
        # 1, 2, 5, 10, 20, 50 …
        width = width * 5 // 2 if str(width).startswith("2") else width * 2
    classes = Counter(count // width for count in counts)
    first, last = low // width, high // width
    return [(place * width, (place + 1) * width, classes[place]) for place in range(first, last + 1)]


def without_source(error: Exception, source: str) -> str:
    """What an error says, without the row's name before it."""
    return str(error).removeprefix(f"{source}: ")


def _fingerprint(row: TrainingRow) -> bytes:
    """Equal for rows that give the model the same to see, to read and to learn."""
    said = [
        [message.role, message.learnt, [_said(part) for part in message.parts]] for message in row.messages
    ]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()


def _said(part: str | VisualRef) -> Any:
    if isinstance(part, str):
        return part
    return [
        part.kind,
        str(part.path.resolve()),
        sorted((key, str(value)) for key, value in part.sampling.items()),
    ]


def _article(kind: str) -> str:
    return "an image" if kind == "image" else "a video"
