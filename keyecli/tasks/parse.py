"""Reasoning and answer told apart, for the tasks; `keyecli.engine.thinking` does it."""

from __future__ import annotations

from keyecli.engine.thinking import AnswerSplitter, Pieces, split_answer

__all__ = ["AnswerSplitter", "Pieces", "split_answer"]
