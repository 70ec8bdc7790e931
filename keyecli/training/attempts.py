"""What rewards are given: one answer that the model tried, with the row that asked for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keyecli.engine.thinking import THINK_CLOSE, THINK_OPEN

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_TAG = re.compile(r"</?answer>")


@dataclass(frozen=True)
class Attempt:
    """One answer and what it answers.

    response: everything the model wrote behind the generation prompt, without the end of its turn; opened: whether that prompt
    ended inside `<think>`. row: the columns of its row; duration_s and frame_interval_s: of the row's first video, None without.
    """

    response: str
    row: Mapping[str, Any] = field(default_factory=dict)
    question: str = ""
    opened: bool = False
    duration_s: float | None = None
    frame_interval_s: float | None = None

    @property
    def parts(self) -> tuple[str, str | None]:
        """Reasoning, and the text behind it: None when the reasoning never ends, for it is no answer then."""
        text = self.response
        if not self.opened:
            if not text.lstrip().startswith(THINK_OPEN):
                return "", text.strip()
            text = text.lstrip().removeprefix(THINK_OPEN)
        reasoning, closed, behind = text.partition(THINK_CLOSE)
        return reasoning.strip(), behind.strip() if closed else None

    @property
    def reasoning(self) -> str:
        return self.parts[0]

    @property
    def answer(self) -> str | None:
        """What counts as the answer: inside the one `<answer>…</answer>` behind the reasoning, or all that stands there when
        there is no such tag; None when there are several, one alone, or no end of the reasoning."""
        text = self.parts[1]
        if text is None:
            return None
        tags = _ANSWER_TAG.findall(text)
        if not tags:
            return text
        # Counted first: looking for the end of each of many tags takes its time.
        found = _ANSWER.search(text) if len(tags) == 2 else None
        return found[1].strip() if found else None


Reward = Callable[[Sequence[Attempt]], Sequence[float | None]]
"""Scores of attempts in their order, each from 0 to 1; None where no score could be had (a judge that did not answer), which is
never counted as 0."""
