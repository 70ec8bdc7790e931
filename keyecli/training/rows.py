"""One training example as its file describes it: a conversation whose videos and images stand where the model sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keyecli.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]


class RowError(InputError):
    """A row that cannot be trained on; the message names the row and what is wrong with it."""


@dataclass(frozen=True)
class VisualRef:
    """A video or image of a row. sampling: how this one is to be sampled where the row says so, in the names of
    `keyecli.tasks.options.AskOptions` (fps, max_frames, min_pixels, max_pixels, start, end: seconds)."""

    kind: Literal["video", "image"]
    path: Path
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """What one side says: text and visuals in order. supervised None: answers are learnt, all else is not."""

    role: Role
    parts: tuple[str | VisualRef, ...]
    supervised: bool | None = None

    @property
    def learnt(self) -> bool:
        """Whether the model is to learn to write it; only what the assistant says can be."""
        return self.role == "assistant" and self.supervised is not False

    @property
    def text(self) -> str:
        """The text alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def visuals(self) -> tuple[VisualRef, ...]:
        return tuple(part for part in self.parts if isinstance(part, VisualRef))


@dataclass(frozen=True)
class TrainingRow:
    """A conversation. source: file and line, "data.jsonl:17"; extra: the row's other columns, untouched (task, answer, …)."""

    source: str
    messages: tuple[Message, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def visuals(self) -> tuple[VisualRef, ...]:
        """In the order of the prompt."""
        return tuple(visual for message in self.messages for visual in message.visuals)
