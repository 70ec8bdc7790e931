"""Splits what the model writes into its reasoning and its answer, piece by piece as it arrives."""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE = "<think>", "</think>", "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

_TAG = re.compile("|".join(re.escape(tag) for tag in TAGS), re.IGNORECASE)
_ANSWER_BLOCK = re.compile(r"<answer>(?P<answer>(?:(?!<answer>).)*)</answer>\s*$", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Pieces:
    """What one step adds to each channel; either may be empty."""

    reasoning: str = ""
    text: str = ""


class _Channel:
    """Trims the ends of a growing text: leading space is dropped, trailing space waits for what follows."""

    def __init__(self) -> None:
        self.text = ""
        self._waiting = ""

    def add(self, piece: str) -> str:
        whole = self._waiting + piece
        if not self.text:
            whole = whole.lstrip()
        shown = whole.rstrip()
        if not shown:
            self._waiting = whole
            return ""
        self._waiting = whole[len(shown) :]
        self.text += shown
        return shown


class AnswerSplitter:
    """Feeds on pieces of the model's output and says which part is reasoning and which is the answer.

    `<think> … </think>` is reasoning, wherever it stands; `thinking_open` says that the prompt itself ended
    inside `<think>`. `<answer>` and `</answer>` are removed from the answer, and a tag may be cut anywhere
    by the pieces. What `add` and `finish` return adds up to exactly `reasoning` and `text`, which have no
    space at their ends, with one exception: when the reasoning never closes but ends with `<answer> …
    </answer>`, that answer was streamed as reasoning, and `finish` moves it over to the text.
    """

    def __init__(self, thinking_open: bool = False) -> None:
        self._thinking = thinking_open
        self._held = ""
        self._reasoning = _Channel()
        self._text = _Channel()
        self._moved: str | None = None

    @property
    def reasoning(self) -> str:
        return self._reasoning.text if self._moved is None else self._moved

    @property
    def text(self) -> str:
        return self._text.text

    def add(self, piece: str) -> Pieces:
        """One more piece of output; returns what is now certain."""
        pending = self._held + piece
        reasoning: list[str] = []
        text: list[str] = []
        position = 0
        for tag in _TAG.finditer(pending):
            self._say(pending[position : tag.start()], reasoning, text)
            self._read_tag(tag.group(), reasoning)
            position = tag.end()
        rest = pending[position:]
        held = _cut_tag_length(rest)
        self._say(rest[: len(rest) - held], reasoning, text)
        self._held = rest[len(rest) - held :]
        return Pieces("".join(reasoning), "".join(text))

    def finish(self) -> Pieces:
        """The end of the output: returns what was held back because it could have been the start of a tag."""
        reasoning: list[str] = []
        text: list[str] = []
        self._say(self._held, reasoning, text)
        self._held = ""
        if self._thinking and not self.text:
            block = _ANSWER_BLOCK.search(self._reasoning.text)
            if block:
                self._moved = self._reasoning.text[: block.start()].rstrip()
                text.append(self._text.add(block["answer"]))
        return Pieces("".join(reasoning), "".join(text))

    def _say(self, piece: str, reasoning: list[str], text: list[str]) -> None:
        if self._thinking:
            reasoning.append(self._reasoning.add(piece))
        else:
            text.append(self._text.add(piece))

    def _read_tag(self, tag: str, reasoning: list[str]) -> None:
        spelling = tag.lower()
        if spelling == THINK_OPEN and not self._thinking:
            self._thinking = True
            if self._reasoning.text:
                reasoning.append(self._reasoning.add("\n"))
        elif spelling == THINK_CLOSE:
            self._thinking = False
        elif self._thinking and spelling in (ANSWER_OPEN, ANSWER_CLOSE):
            # Reasoning may speak about the tags; they only mean something outside of it.
            reasoning.append(self._reasoning.add(tag))


def split_answer(output: str, thinking_open: bool = False) -> tuple[str, str]:
    """The whole output at once → (reasoning, text)."""
    splitter = AnswerSplitter(thinking_open)
    splitter.add(output)
    splitter.finish()
    return splitter.reasoning, splitter.text


def _cut_tag_length(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a tag."""
    start = text.rfind("<")
    if start < 0:
        return 0
    tail = text[start:].lower()
    return len(tail) if any(tag.startswith(tail) for tag in TAGS) else 0
