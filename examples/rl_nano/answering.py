"""What models answer to rows of make_data.py, for the scripts beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import keyecli
from keyecli.training.attempts import Attempt

NANO = "nano"


def answers(keye: keyecli.Keye, data: Path) -> list[Attempt]:
    """The likeliest answer to each row."""
    attempts = []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        video = row["messages"][0]["content"][0]
        answer = keye.ask(data.parent / video["video"], row["question"], fps=video["fps"])
        response = (
            f"<think>\n{answer.reasoning}\n</think>\n\n{answer.text}" if answer.reasoning else answer.text
        )
        attempts.append(Attempt(response, row, question=row["question"], duration_s=row["duration_s"]))
    return attempts


def named(pairs: Sequence[str]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}
