"""Ends a text before the first stop string in it, piece by piece as the text arrives."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through that can no longer be a part of a stop string.

    A text ends where the stop string that is complete first begins, the longest of them when several end together; where
    the pieces are cut makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """One more piece; returns what is now certain, and nothing any more once a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        held = self._held_length(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The end of the text: what was held back because it could have been the beginning of a stop string."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        """The longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        ends = (text[len(text) - size :] for size in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
