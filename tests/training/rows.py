"""Small rows to train on, about one clip of the repository and about nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keyecli.training.rows import Message, TrainingRow, VisualRef

CLIP = Path(__file__).resolve().parents[2] / "examples" / "clips" / "red-circle.mp4"
WORDS = ("one", "two", "three", "four", "five", "six")


def text_row(number: int, answer: str | None = None) -> TrainingRow:
    """A conversation without visuals."""
    word = WORDS[number % len(WORDS)]
    said = f"<think>\nit is {word}\n</think>\n\n{word * (1 + number % 3)}" if answer is None else answer
    return TrainingRow(f"rows:{number}", (Message("user", (f"Say {word}.",)), Message("assistant", (said,))))


def video_row(number: int = 0, fps: float = 1.0) -> TrainingRow:
    """A question about the clip, of which few frames are sampled."""
    visual = VisualRef("video", CLIP, {"fps": fps})
    question = Message("user", (visual, f"What about {WORDS[number % len(WORDS)]}?"))
    return TrainingRow(
        f"rows:{number}", (question, Message("assistant", ("<think>\nseen\n</think>\n\nred",)))
    )


class Listed:
    """Rows by number."""

    def __init__(self, rows: list[TrainingRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> TrainingRow:
        return self.rows[index]


def write_data(path: Path, texts: int = 10, videos: int = 2, **columns: Any) -> Path:
    """A data file of ms-swift's form: `texts` rows of text and `videos` rows about the clip."""
    lines = []
    for number in range(texts + videos):
        word = WORDS[number % len(WORDS)]
        about = number >= texts
        messages = [
            {"role": "user", "content": f"{'<video>' if about else ''}Say {word}, number {number}."},
            {"role": "assistant", "content": f"<think>\n{word}\n</think>\n\n{word * (1 + number % 3)}"},
        ]
        lines.append(
            json.dumps({"messages": messages, **({"videos": [str(CLIP)]} if about else {}), **columns})
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
