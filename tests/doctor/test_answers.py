"""The known-answer test: what it asks, how it grades, and that wrong answers are found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyecli.doctor.answers import (
    CHOICES,
    CLIPS,
    THRESHOLDS,
    Graded,
    Known,
    ask,
    first_named,
    judge,
    known_answers,
    known_questions,
    known_scenes,
)


class Oracle:
    """Answers as told; remembers what it was asked."""

    def __init__(self, text: str = "", spans: tuple[tuple[float, float], ...] = ()) -> None:
        self.text, self.spans = text, spans
        self.asked: list[tuple[Path, str]] = []

    def ask(self, clip: Path, question: str, **options: Any) -> Any:
        assert options["temperature"] == 0.0
        assert clip.is_file()
        self.asked.append((clip, question))
        return SimpleNamespace(text=self.text)

    def ground(self, clip: Path, query: str, **options: Any) -> Any:
        self.asked.append((clip, query))
        return [SimpleNamespace(start_s=start, end_s=end) for start, end in self.spans]


def test_questions_cover_every_topic_and_are_always_the_same() -> None:
    scenes = list(known_scenes(CLIPS))
    questions = [known for clip, scene in enumerate(scenes) for known in known_questions(clip, scene)]
    again = [
        known for clip, scene in enumerate(known_scenes(CLIPS)) for known in known_questions(clip, scene)
    ]
    assert questions == again
    assert {known.topic for known in questions} == set(THRESHOLDS)
    for topic in THRESHOLDS:
        assert sum(known.topic == topic for known in questions) >= 4
    for known in questions:
        if known.topic == "events":
            assert known.spans
        else:
            assert known.truth in CHOICES[known.topic]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("red", "red"),
        ("The circle is **Red**.", "red"),
        ("It is blue, not red", "blue"),
        ("reddish", None),
        ("", None),
    ],
)
def test_the_first_word_that_is_a_choice_counts(text: str, named: str | None) -> None:
    assert first_named(text, CHOICES["colours"]) == named


def test_grading(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.touch()
    word = Known(0, "words", "Which word is shown?", "ICE")
    assert ask(Oracle('The word is "ice".'), clip, word).score == 1.0  # type: ignore[arg-type]
    assert ask(Oracle("FIRE"), clip, word).score == 0.0  # type: ignore[arg-type]
    event = Known(0, "events", "the red circle", "[[1.0, 3.0]]", ((1.0, 3.0),))
    graded = ask(Oracle(spans=((1.0, 2.0),)), clip, event)  # type: ignore[arg-type]
    assert (graded.score, graded.given) == (0.5, "[[1.0, 2.0]]")
    assert ask(Oracle(), clip, event).score == 0.0  # type: ignore[arg-type]


def test_a_model_that_sees_nothing_fails() -> None:
    oracle = Oracle("red")
    heard: list[tuple[str, float, float | None]] = []
    graded = list(known_answers(oracle, clips=2, on_progress=lambda *told: heard.append(told)))  # type: ignore[arg-type]
    assert len(graded) == len(oracle.asked) == len(heard) == heard[-1][2]
    assert len({path for path, _ in oracle.asked}) == 2
    assert not any(path.exists() for path, _ in oracle.asked)
    findings = {finding.name: finding for finding in judge(graded, "oracle")}
    assert list(findings) == ["words", "colours", "shapes", "events"]
    assert findings["words"].status == findings["events"].status == "problem"
    assert "--hashes" in str(findings["words"].remedy)


@pytest.mark.parametrize(("score", "status"), [(0.75, "ok"), (0.74, "problem")])
def test_thresholds(score: float, status: str) -> None:
    graded = [Graded(Known(0, topic, "?", "!"), "!", score) for topic in THRESHOLDS]
    words = next(judge(graded, "model"))
    assert (words.status, words.details["score"]) == (status, score)
