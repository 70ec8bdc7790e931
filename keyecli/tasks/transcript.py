"""What was said in a conversation, and the files that keep it: Markdown to read, JSON to go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from keyecli.engine.conversation import EndReason
from keyecli.errors import InputError, UsageError
from keyecli.export.markdown import escaped, prose
from keyecli.export.text import one_line
from keyecli.tasks.ask import AskSettings, InputReport
from keyecli.video.sampling import FrameBudget, SamplingSettings

SCHEMA = "keye.conversation/1"
TURN_SCHEMA = "keye.chat/1"
SUFFIXES = (".json", ".md", ".markdown")

CUT_OFF = {"length": "cut off: the room for the answer was full", "interrupted": "cut off: stopped by hand"}
"""What is said below an answer that did not end by itself."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer: `text` is the answer alone, `reasoning` what the model thought first.

    `number` counts from 1. `prompt_tokens` are those of the whole conversation up to the answer; `reused_tokens` of them
    were in the cache. `stop_reason` is "stop" when the model ended by itself, "length" when the room for the answer did and
    "interrupted" when Ctrl-C did. `timings` are seconds: prefill_s, generate_s, total_s.
    """

    number: int
    question: str
    text: str
    reasoning: str
    inputs: tuple[InputReport, ...]
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    stop_reason: EndReason
    timings: dict[str, float]
    settings: dict[str, Any]
    model: str
    weights_revision: str
    keye_version: str
    device: str
    dtype: str
    seed: int

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The turn as plain data, schema keye.chat/1."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"schema": TURN_SCHEMA, **said, "inputs": [report.to_dict() for report in self.inputs]}


@dataclass(frozen=True)
class SavedFile:
    """A file that a conversation is about; sha256 of its content, None when that changed while the conversation went on."""

    path: str
    sha256: str | None


@dataclass(frozen=True)
class Transcript:
    """A conversation as it is saved: its turns, and all that is needed to show the model the same pictures again.

    `where` is what to call it in a message.
    """

    files: tuple[SavedFile, ...]
    subtitles: SavedFile | None
    sampling: SamplingSettings
    turns: tuple[Turn, ...]
    where: str = "the conversation"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, schema keye.conversation/1. The inputs stand once, as they do in each turn of keye.chat/1."""
        reports = [report.to_dict() for turn in self.turns[:1] for report in turn.inputs]
        if not reports:
            reports = [{"path": file.path} for file in self.files]
        inputs = [{**report, "sha256": file.sha256} for report, file in zip(reports, self.files, strict=True)]
        turns = [turn.to_dict() for turn in self.turns]
        for turn in turns:
            del turn["inputs"]
        return {
            "schema": SCHEMA,
            "inputs": inputs,
            "subtitles": None if self.subtitles is None else asdict(self.subtitles),
            "sampling": _plain_sampling(self.sampling),
            "turns": turns,
        }

    def markdown(self) -> str:
        """A page to read. What was said is text and never markup."""
        blocks = ["# " + ", ".join(escaped(one_line(Path(file.path).name)) for file in self.files)]
        for turn in self.turns:
            blocks.append(f"## {escaped(one_line(turn.question))}")
            if turn.text:
                blocks.append(prose(turn.text))
            if turn.stop_reason in CUT_OFF:
                blocks.append(f"*({CUT_OFF[turn.stop_reason]})*")
        if self.turns:
            last = self.turns[-1]
            blocks.append(f"*{escaped(one_line(last.model))}, keye {last.keye_version}*")
        return "\n\n".join(blocks) + "\n"


def resume(
    transcript: Transcript, paths: Sequence[str | Path], settings: AskSettings, default: SamplingSettings
) -> tuple[list[str | Path], AskSettings]:
    """The inputs and settings that go on with a saved conversation: its own frames, and the rest as in `settings`.

    `paths`: where its files are now, in their order, none for where they were. `default`: the model's own sampling.
    UsageError: another number of files, frames asked for that are not the saved ones. InputError: a file that is not there,
    or whose content is not that which the conversation is about.
    """
    if settings.sampling not in (default, transcript.sampling):
        raise UsageError(
            f"{transcript.where} has frames of its own: leave out --fps, --start and all else that chooses frames, "
            "or begin a new conversation"
        )
    if paths and len(paths) != len(transcript.files):
        raise UsageError(
            f"{transcript.where} is not about so many files ({len(paths)}) but {len(transcript.files)}: "
            "name the same ones in their order, or none"
        )
    if settings.subtitles is not None and transcript.subtitles is None:
        raise UsageError(f"{transcript.where} has no subtitles: leave --subtitles out")
    chosen = list(paths) or [file.path for file in transcript.files]
    for path, file in zip(chosen, transcript.files, strict=True):
        _check_content(path, file, transcript.where)
    subtitles = settings.subtitles
    if transcript.subtitles is not None:
        subtitles = subtitles or Path(transcript.subtitles.path)
        _check_content(subtitles, transcript.subtitles, transcript.where)
    return chosen, replace(settings, sampling=transcript.sampling, subtitles=subtitles)


def require_utf8(paths: Iterable[str | Path]) -> None:
    """InputError for a name that JSON cannot hold."""
    for path in paths:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        if shown != str(path):
            raise InputError(f"the name of {shown} is not UTF-8: give the file another one")


def content_hash(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal. OSError when it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_transcript(path: str | Path) -> Transcript:
    """A conversation that was saved as JSON. InputError: it cannot be read, is none, or is damaged."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"the conversation {path} cannot be read: {error.strerror}; give what /save wrote"
        ) from error
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no JSON, or was cut off; give what /save wrote as JSON") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InputError(f"{path} is no saved conversation; give what /save wrote as JSON")
    try:
        subtitles = record["subtitles"]
        return Transcript(
            files=tuple(_saved_file(item) for item in _typed(record, "inputs", list)),
            subtitles=None if subtitles is None else _saved_file(subtitles),
            sampling=_read_sampling(_typed(record, "sampling", dict)),
            turns=tuple(
                _read_turn(turn, place) for place, turn in enumerate(_typed(record, "turns", list), 1)
            ),
            where=str(path),
        )
    except (LookupError, TypeError, ValueError, ArithmeticError, UsageError) as error:
        said = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is damaged: {said}") from error


def _check_content(path: str | Path, file: SavedFile, where: str) -> None:
    name = Path(file.path).name
    if file.sha256 is None:
        raise InputError(
            f"{where} cannot be continued: {name} changed while the conversation went on, so that its frames are unknown"
        )
    try:
        found = content_hash(path)
    except OSError as error:
        raise InputError(
            f"{path}, which {where} is about, cannot be read: {error.strerror}; name the file where it is now"
        ) from error
    if found != file.sha256:
        raise InputError(f"{path} is another file than the {name} that {where} is about")


def _plain_sampling(sampling: SamplingSettings) -> dict[str, Any]:
    """As JSON has it: fractions as text, so that nothing is rounded."""
    plain = asdict(sampling)
    for name in ("start_s", "end_s"):
        plain[name] = None if plain[name] is None else str(plain[name])
    return plain


def _read_sampling(record: Mapping[str, Any]) -> SamplingSettings:
    budget = _typed(record, "budget", dict)
    kept = {field.name: _typed(budget, field.name, _KINDS[str(field.type)]) for field in fields(FrameBudget)}
    times = {
        name: None if record[name] is None else Fraction(_typed(record, name, str))
        for name in ("start_s", "end_s")
    }
    return SamplingSettings(
        fps=float(_typed(record, "fps", (int, float))),
        max_frames=None if record["max_frames"] is None else _typed(record, "max_frames", int),
        budget=FrameBudget(**kept),
        exact_resize=_typed(record, "exact_resize", bool),
        **times,
    )


# With postponed annotations a field's type is its source text.
_KINDS: dict[str, Any] = {
    "int": int,
    "bool": bool,
    "str": str,
    "EndReason": str,
    "dict[str, float]": dict,
    "dict[str, Any]": dict,
}


def _read_turn(record: Any, number: int) -> Turn:
    if not isinstance(record, dict):
        raise TypeError(f"turn {number} is no object")
    own = [field for field in fields(Turn) if field.name not in ("number", "inputs")]
    values = {field.name: _typed(record, field.name, _KINDS[str(field.type)]) for field in own}
    known = [reason for part in get_args(EndReason) for reason in get_args(part) or (part,)]
    if values["stop_reason"] not in known:
        raise ValueError(f"stop_reason of turn {number} is none of {', '.join(known)}")
    return Turn(number=number, inputs=(), **values)


def _saved_file(record: Any) -> SavedFile:
    if not isinstance(record, dict):
        raise TypeError("an input is no object")
    sha256 = record["sha256"]
    return SavedFile(_typed(record, "path", str), None if sha256 is None else _typed(record, "sha256", str))


def _typed(record: Mapping[str, Any], name: str, kind: Any) -> Any:
    """A field of one type; KeyError when it is not there, TypeError when it is another one."""
    value = record[name]
    wanted = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise TypeError(f"{name} is no {wanted[0].__name__}")
    return value
