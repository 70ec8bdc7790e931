"""The forms of a row in training data: which columns tell them apart, and what they say, before files are looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from keyecli.training.data.timelens import ground_turns
from keyecli.training.data.turns import DEFAULT_TAGS, Tags, Turn, turns_of
from keyecli.training.rows import RowError

Shape = Literal["messages", "conversations", "prompt", "query", "instruction", "timelens"]

# What a user calls a format → the shapes that its rows may have, in order of preference.
FORMATS: dict[str, tuple[Shape, ...]] = {
    "swift": ("messages", "conversations", "query", "instruction"),
    "sharegpt": ("conversations", "messages"),
    "openai": ("messages",),
    "alpaca": ("instruction",),
    "trl": ("messages", "prompt"),
    "qwen": ("messages",),
    "timelens": ("timelens",),
    "forge": ("messages",),
}
KNOWN = (
    "messages; conversations; prompt with completion; query with response; instruction with output; "
    "video_path with events"
)
# Of these a row may have only the question, when it is to be answered in training.
_QUESTION_ALONE: tuple[tuple[Shape, str], ...] = (("prompt", "prompt"), ("query", "query"))
_PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")
_REFUSED = {
    "tools": "offers tools, of which the model is not told here",
    "audios": "names sound files, which the model does not hear",
    "audio": "names sound files, which the model does not hear",
}


@dataclass(frozen=True)
class Draft:
    """A row whose placeholders and files have not met yet. media_folders: where else below the data its files may be;
    extra: the columns that nothing here is made of."""

    turns: Sequence[Turn]
    videos: Sequence[Any] = ()
    images: Sequence[Any] = ()
    media_folders: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def shape_of(row: Mapping[str, Any], format: str | None = None) -> Shape:
    """The form of a row by its columns; `format` leaves only its own. RowError: none fits, or several do."""
    found = [shape for shape, fits in _FITS.items() if fits(row)]
    if not found:
        found = [shape for shape, column in _QUESTION_ALONE if column in row and not _has_preferences(row)]
    allowed: Sequence[Shape] = tuple(_FITS) if format is None else FORMATS[format]
    fitting = [shape for shape in allowed if shape in found]
    columns = ", ".join(row) or "no columns at all"
    if not fitting:
        if _has_preferences(row):
            raise RowError(f"the row compares two answers ({columns}), and only one can be learnt")
        known = KNOWN if format is None else f"{format} has {_needs(format)}"
        raise RowError(f"the row has {columns}, which is no known form: known are {known}")
    if format is None and len(fitting) > 1:
        forms = " and ".join(fitting)
        raise RowError(f"the row has {columns}, which may be read as {forms}: say which with --format")
    return fitting[0]


def draft_of(row: Mapping[str, Any], shape: Shape, part: int = 0, tags: Tags = DEFAULT_TAGS) -> Draft:
    """What a row of this shape says; `part` is the event of a row that has several. RowError for what cannot be understood."""
    for column, reason in _REFUSED.items():
        if row.get(column):
            raise RowError(f"the row {reason}: take out {column}")
    if shape == "timelens":
        return Draft(ground_turns(row, part), media_folders=("videos", "video_shards"), extra=dict(row))
    turns, used = _TURNS[shape](row, tags)
    system = row.get("system")
    if isinstance(system, str) and system and not (turns and turns[0].role == "system"):
        turns = [Turn("system", system), *turns]
    if not turns:
        raise RowError("the conversation is empty")
    used |= {"system", "videos", "video", "images", "image", *_REFUSED}
    return Draft(
        turns=turns,
        videos=_files(row, "videos", "video"),
        images=_files(row, "images", "image"),
        extra={name: value for name, value in row.items() if name not in used},
    )


def _messages(row: Mapping[str, Any], tags: Tags) -> tuple[list[Turn], set[str]]:
    return turns_of(row["messages"], tags), {"messages"}


def _conversations(row: Mapping[str, Any], tags: Tags) -> tuple[list[Turn], set[str]]:
    column = "conversations" if "conversations" in row else "conversation"
    return turns_of(row[column], tags), {column}


def _prompt(row: Mapping[str, Any], tags: Tags) -> tuple[list[Turn], set[str]]:
    """TRL's: only the completion is learnt, though the prompt may hold earlier answers."""
    prompt, completion = row["prompt"], row.get("completion")
    asked = [Turn("user", prompt)] if isinstance(prompt, str) else turns_of(prompt, tags)
    turns = [Turn(turn.role, turn.content, False if turn.role == "assistant" else None) for turn in asked]
    if isinstance(completion, str):
        turns.append(Turn("assistant", completion))
    elif completion is not None:
        turns += turns_of(completion, tags)
    return turns, {"prompt", "completion"}


def _query(row: Mapping[str, Any], tags: Tags) -> tuple[list[Turn], set[str]]:
    turns = [*_history(row), Turn("user", _text(row, "query"))]
    if row.get("response") is not None:
        turns.append(Turn("assistant", _text(row, "response")))
    return turns, {"query", "response", "history"}


def _instruction(row: Mapping[str, Any], tags: Tags) -> tuple[list[Turn], set[str]]:
    question = "\n".join(text for text in (_text(row, "instruction"), row.get("input")) if text)
    turns = [*_history(row), Turn("user", question), Turn("assistant", _text(row, "output"))]
    return turns, {"instruction", "input", "output", "history"}


def _history(row: Mapping[str, Any]) -> list[Turn]:
    """Earlier questions with their answers, which are learnt too, as ms-swift and LLaMA-Factory do."""
    turns = []
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError("history must be a list of [question, answer] pairs")
        if not all(isinstance(text, str) for text in pair):
            raise RowError("history must be a list of [question, answer] pairs of text")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"{column} must be text")
    return value


def _files(row: Mapping[str, Any], *columns: str) -> list[Any]:
    """The files of a column under its first name that is there; one file need not be in a list."""
    for column in columns:
        if (value := row.get(column)) is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


def _has_preferences(row: Mapping[str, Any]) -> bool:
    return any(row.get(column) is not None for column in _PREFERENCE)


def _needs(format: str) -> str:
    return ", or ".join(_COLUMNS[shape] for shape in FORMATS[format])


_COLUMNS: dict[Shape, str] = {
    "messages": "messages",
    "conversations": "conversations",
    "prompt": "prompt with completion",
    "query": "query with response",
    "instruction": "instruction with output",
    "timelens": "video_path with events, or with query and span",
}
_FITS: dict[Shape, Callable[[Mapping[str, Any]], bool]] = {
    "messages": lambda row: "messages" in row and not _has_preferences(row),
    "conversations": lambda row: (
        ("conversations" in row or "conversation" in row) and not _has_preferences(row)
    ),
    "prompt": lambda row: "prompt" in row and "completion" in row,
    "query": lambda row: "query" in row and "response" in row and not _has_preferences(row),
    "instruction": lambda row: "instruction" in row and "output" in row,
    "timelens": lambda row: "video_path" in row and ("events" in row or ("query" in row and "span" in row)),
}
_TURNS: dict[Shape, Callable[[Mapping[str, Any], Tags], tuple[list[Turn], set[str]]]] = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt": _prompt,
    "query": _query,
    "instruction": _instruction,
}
