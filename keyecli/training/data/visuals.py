"""Videos and images of a row: their files found, how each is to be sampled, and their places in the conversation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from keyecli.engine.plan import MERGED_PIXELS
from keyecli.training.data.shapes import Draft
from keyecli.training.data.turns import Turn
from keyecli.training.rows import Message, RowError, VisualRef
from keyecli.video.timecode import MAX_RATE

Kind = Literal["video", "image"]


class PlaceholderError(RowError):
    """Files and the places for them in the text do not match."""


_PLACEHOLDER = re.compile(r"(<video>|<image>)")
_KIND_OF: dict[str, Kind] = {"<video>": "video", "<image>": "image"}
_KINDS: tuple[Kind, ...] = ("video", "image")
_PATH_KEYS = ("video", "image", "video_url", "image_url", "url", "path")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)


def messages_of(draft: Draft, folder: Path) -> tuple[Message, ...]:
    """The conversation with its files in their places; relative paths count from `folder`.

    Placeholders and typed parts that name no file take the files of the columns in order. Where a row has files and
    no place for them, they stand before the first text of the user, videos first. RowError with both numbers when
    they do not match.
    """
    folders = [folder, *(folder / name for name in draft.media_folders)]
    waiting = {
        kind: [
            _referred(kind, entry, folders) for entry in (draft.videos if kind == "video" else draft.images)
        ]
        for kind in _KINDS
    }
    turns = list(draft.turns)
    places = {kind: sum(_places(turn, kind) for turn in turns) for kind in _KINDS}
    named = [part for turn in turns for part in _parts(turn) if _names_file(part)]
    if not any(places.values()) and any(waiting.values()):
        if named:
            _require_the_same(named, waiting, folders)
            waiting = {kind: [] for kind in _KINDS}
        else:
            turns = _with_places_first(turns, waiting)
    else:
        for kind in _KINDS:
            _require_as_many(kind, places[kind], len(waiting[kind]))
    messages = tuple(_message(turn, waiting, folders) for turn in turns)
    return _totals_shared(messages)


def _message(turn: Turn, waiting: Mapping[Kind, list[VisualRef]], folders: Sequence[Path]) -> Message:
    parts: list[str | VisualRef] = []
    if isinstance(turn.content, str):
        for piece in _PLACEHOLDER.split(turn.content):
            if piece in _KIND_OF:
                parts.append(waiting[_KIND_OF[piece]].pop(0))
            elif piece:
                parts.append(piece)
    else:
        for part in turn.content:
            kind = _kind_of(part)
            if kind != "text":
                parts.append(_referred(kind, part, folders) if _names_file(part) else waiting[kind].pop(0))
            elif part["text"]:
                parts.append(part["text"])
    return Message(turn.role, tuple(parts), turn.supervised)


def _places(turn: Turn, kind: Kind) -> int:
    """Placeholders, and typed parts that name no file."""
    if isinstance(turn.content, str):
        return turn.content.count(f"<{kind}>")
    return sum(_kind_of(part) == kind and not _names_file(part) for part in turn.content)


def _parts(turn: Turn) -> Sequence[Any]:
    return () if isinstance(turn.content, str) else turn.content


def _kind_of(part: Any) -> Literal["video", "image", "text"]:
    """The kind of a typed part, by its type or by what it has."""
    if not isinstance(part, Mapping):
        raise RowError("a part of a message must be an object with a type")
    type_ = part.get("type")
    if type_ in ("video", "video_url") or (type_ is None and part.get("video") is not None):
        return "video"
    if type_ in ("image", "image_url") or (type_ is None and part.get("image") is not None):
        return "image"
    if type_ in ("text", None) and isinstance(part.get("text"), str):
        return "text"
    if type_ == "text":
        raise RowError("a part of type text has no text")
    raise RowError(f"a part of a message is of type {type_!r}, and known are video, image and text")


def _names_file(part: Any) -> bool:
    return _kind_of(part) != "text" and any(part.get(key) is not None for key in _PATH_KEYS)


def _with_places_first(turns: list[Turn], waiting: Mapping[Kind, list[VisualRef]]) -> list[Turn]:
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise PlaceholderError(
            "the row names files, but it has neither a placeholder nor a question to put them before"
        )
    turn = turns[first]
    if isinstance(turn.content, str):
        content: str | list[Any] = "".join(f"<{kind}>" * len(waiting[kind]) for kind in _KINDS) + turn.content
    else:
        content = [{"type": kind} for kind in _KINDS for _ in waiting[kind]] + list(turn.content)
    return [*turns[:first], replace(turn, content=content), *turns[first + 1 :]]


def _require_the_same(
    named: Sequence[Any], waiting: Mapping[Kind, list[VisualRef]], folders: Sequence[Path]
) -> None:
    """Columns may list again what the parts name; anything else leaves open which files are meant."""
    for kind in _KINDS:
        parts = [_referred(kind, part, folders).path for part in named if _kind_of(part) == kind]
        listed = [visual.path for visual in waiting[kind]]
        if listed and parts != listed:
            raise PlaceholderError(
                f"the messages name {_count(len(parts), kind)}, and the column of {kind}s names others, {len(listed)}"
            )


def _require_as_many(kind: Kind, places: int, files: int) -> None:
    if places != files:
        has = f"the messages have {_count(places, f'<{kind}> placeholder')}"
        raise PlaceholderError(f"{has}, and the row names {_count(files, kind)}")


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _referred(kind: Kind, entry: Any, folders: Sequence[Path]) -> VisualRef:
    """The file that a column's entry or a typed part names, and how it is to be sampled."""
    sampling = sampling_of(entry) if isinstance(entry, Mapping) else {}
    value = entry
    if isinstance(entry, Mapping):
        value = next((entry[key] for key in (kind, *_PATH_KEYS) if entry.get(key) is not None), None)
        value = value.get("url") if isinstance(value, Mapping) else value
    if isinstance(value, list):
        raise RowError(f"a {kind} is given as a list of frames: name the file that they were taken from")
    if not isinstance(value, str) or not value:
        raise RowError(f"a {kind} must be the path of a file")
    return VisualRef(kind, _found(value, folders), sampling)


def _found(text: str, folders: Sequence[Path]) -> Path:
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() == "file":
        text = text[len("file:") :].removeprefix("//")
    elif scheme and scheme[1].lower() == "data":
        raise RowError("a file is spelled out inside the row: save it to a file and name that")
    elif scheme and "://" in text:
        raise RowError(f"{text} is an address: download the file and name it by its path")
    candidates = [folder / text for folder in folders]
    return next((path for path in candidates if path.exists()), candidates[0])


def sampling_of(part: Mapping[str, Any]) -> dict[str, Any]:
    """How a part is to be sampled, from the keys of qwen-vl-utils.

    nframes takes so many frames evenly; total_pixels bounds the tokens of this video, one for 784 pixels.
    resized_height × resized_width gives the area of a frame, whose shape stays that of the video. min_frames says nothing
    here: a clip has the frames that it has.
    """
    given = {key: part[key] for key in _RANGES if part.get(key) is not None}
    for key, value in given.items():
        low = _RANGES[key]
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value < math.inf:
            raise RowError(f"{key} is {value!r}, and it must be a number of {low:g} or more")
    if "fps" in given and "nframes" in given:
        raise RowError("fps and nframes say different things: keep one of them")
    sampling: dict[str, Any] = {}
    for key, name in _SAME.items():
        if key in given:
            sampling[name] = int(given[key]) if key in _WHOLE else given[key]
    if "nframes" in given:
        sampling |= {"fps": float(MAX_RATE), "max_frames": int(given["nframes"])}
    if "total_pixels" in given:
        sampling["max_tokens_video"] = max(1, int(given["total_pixels"]) // MERGED_PIXELS)
    if "resized_height" in given and "resized_width" in given:
        area = int(given["resized_height"] * given["resized_width"])
        sampling |= {"min_pixels": area, "max_pixels": area}
    return sampling


# Key → its smallest value.
_RANGES: dict[str, float] = {
    "fps": 0.001,
    "nframes": 1,
    "min_frames": 0,
    "max_frames": 1,
    "min_pixels": 1,
    "max_pixels": 1,
    "total_pixels": 1,
    "video_start": 0,
    "video_end": 0,
    "resized_height": 1,
    "resized_width": 1,
}
_SAME = {
    "fps": "fps",
    "max_frames": "max_frames",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "video_start": "start",
    "video_end": "end",
}
_WHOLE = ("max_frames", "min_pixels", "max_pixels")


def _totals_shared(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A limit of all tokens is shared equally by the videos of a prompt, so that of one video is that many times as large."""
    videos = sum(visual.kind == "video" for message in messages for visual in message.visuals)

    def shared(part: str | VisualRef) -> str | VisualRef:
        if isinstance(part, str) or "max_tokens_video" not in part.sampling:
            return part
        return replace(
            part, sampling={**part.sampling, "max_tokens_video": part.sampling["max_tokens_video"] * videos}
        )

    return tuple(replace(message, parts=tuple(map(shared, message.parts))) for message in messages)
