"""Keye-VL-2.0 from Python: `keyecli.load().ask("clip.mp4", "What happens?").text`; loaded lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keyecli.session import Keye as Keye
    from keyecli.session import load as load
    from keyecli.tasks.ask import Answer as Answer
    from keyecli.tasks.chapters import Chapter as Chapter
    from keyecli.tasks.chat import Chat as Chat
    from keyecli.tasks.ground import Grounding as Grounding
    from keyecli.tasks.ground import Span as Span
    from keyecli.tasks.summarize import Summary as Summary
    from keyecli.tasks.transcript import Turn as Turn

__version__ = "0.1.0"

_HOMES = {
    "load": "keyecli.session",
    "Keye": "keyecli.session",
    "Answer": "keyecli.tasks.ask",
    "Chapter": "keyecli.tasks.chapters",
    "Chat": "keyecli.tasks.chat",
    "Grounding": "keyecli.tasks.ground",
    "Span": "keyecli.tasks.ground",
    "Summary": "keyecli.tasks.summarize",
    "Turn": "keyecli.tasks.transcript",
}

__all__ = [
    "Answer", "Chapter", "Chat", "Grounding", "Keye", "Span", "Summary", "Turn", "__version__", "load", "register"
]  # fmt: skip


def register() -> None:
    """Make the model known to transformers' Auto classes; from here on `from_pretrained(folder)` finds it.

    Not done by `import keyecli` itself, which would have to import torch for it.
    """
    import_module("keyecli.model.keye")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'keyecli' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
