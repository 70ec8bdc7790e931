"""Questions that share a prefill get the answers that they would get alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyecli.batch.questions import SharedQuestions
from keyecli.errors import KeyeWarning, UsageError
from keyecli.session import Keye, load
from keyecli.tasks.options import ask_settings
from keyecli.video.source import probe
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def keye(tiny_checkpoint: Path) -> Keye:
    return load(tiny_checkpoint, device="cpu")


def without_times(answer: Any) -> dict[str, Any]:
    return {name: value for name, value in answer.to_dict().items() if name != "timings"}


@pytest.mark.filterwarnings("ignore::keyecli.errors.KeyeWarning")
def test_answers_are_those_of_ask(keye: Keye, short_clips: list[Path], tmp_path: Path) -> None:
    lines = tmp_path / "lines.srt"
    lines.write_text("1\n00:00:00,500 --> 00:00:00,800\nHello there\n")
    options: list[dict[str, Any]] = [
        {"max_tokens": 12},
        {"max_tokens": 5, "think": False},
        {"max_tokens": 9, "temperature": 0.8, "seed": 3},
        {"max_tokens": 7, "subtitles": lines},
    ]
    questions = [
        (f"What is number {number}?", ask_settings(keye.preprocessor, **given))
        for number, given in enumerate(options)
    ]
    shared = SharedQuestions(keye.loaded, [probe(short_clips[1])], questions)
    for question, settings in questions:
        together = without_times(shared.answer(question, settings))
        assert together == without_times(keye.ask(short_clips[1], question, settings=settings))


@pytest.mark.filterwarnings("ignore::keyecli.errors.KeyeWarning")
def test_answers_that_fill_the_context(make_checkpoint: Callable[..., Path], short_clips: list[Path]) -> None:
    keye = load(make_checkpoint(config=tiny_config(max_position_embeddings=240)), device="cpu")
    settings = ask_settings(keye.preprocessor, think=False)
    questions = ["What?", "What is to be seen at the end?"]
    shared = SharedQuestions(
        keye.loaded, [probe(short_clips[0])], [(question, settings) for question in questions]
    )
    for question in questions:
        together = without_times(shared.answer(question, settings))
        assert together["settings"]["max_tokens"] < 200
        assert together == without_times(keye.ask(short_clips[0], question, settings=settings))


def test_a_question_that_is_too_long_fails_alone(keye: Keye, short_clips: list[Path]) -> None:
    settings = ask_settings(keye.preprocessor, max_tokens=4, think=False)
    questions = [("What?", settings), ("Why? " * 1000, settings), ("Who?", settings)]
    shared = SharedQuestions(keye.loaded, [probe(short_clips[0])], questions)
    for question in ("What?", "Who?"):
        with pytest.warns(KeyeWarning, match="cut off after 4"):
            together = without_times(shared.answer(question, settings))
        with pytest.warns(KeyeWarning, match="cut off after 4"):
            assert together == without_times(keye.ask(short_clips[0], question, settings=settings))
        with pytest.raises(UsageError, match="context"):
            shared.answer(questions[1][0], settings)
