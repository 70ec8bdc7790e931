"""What an answer says: its reasoning and its text, and the time spans that it names in whatever spelling."""

from __future__ import annotations

from keyecli.engine.thinking import AnswerSplitter, Pieces, split_answer

__all__ = ["AnswerSplitter", "Pieces", "split_answer"]
