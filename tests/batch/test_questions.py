"""Questions that share a prefill get the answers that they would get alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyecli.batch.answering import answer_group, open_group
from keyecli.batch.jobs import make_jobs
from keyecli.batch.questions import SharedQuestions, own_warnings
from keyecli.engine import shared as shared_engine
from keyecli.engine.shared import SharedPrefix
from keyecli.errors import KeyeError, KeyeWarning, MemoryLimitError, UsageError
from keyecli.session import Keye, load
from keyecli.tasks.ask import AskSettings
from keyecli.tasks.options import ask_settings
from keyecli.video.source import probe
from tests.engine.branches import BranchByBranch
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


@pytest.fixture
def widths(keye: Keye, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets questions be answered together, by the definition; how many were, each time."""
    seen: list[int] = []
    answers = SharedPrefix.answers

    def counted(self: SharedPrefix, questions: Any) -> Any:
        seen.append(len(questions))
        return answers(self, questions)

    monkeypatch.setattr(SharedPrefix, "answers", counted)
    monkeypatch.setattr(
        shared_engine, "sequences_together", lambda files, planned, room, wanted: min(wanted, 3)
    )
    monkeypatch.setattr(
        shared_engine,
        "decoder_for",
        lambda model, cache, made=None, branches=None: (
            made or (None if branches is None else BranchByBranch(model, cache, branches))
        ),
    )
    return seen


@pytest.mark.filterwarnings("ignore::keyecli.errors.KeyeWarning")
def test_together_as_one_by_one(keye: Keye, short_clips: list[Path], widths: list[int]) -> None:
    """Four that fit beside each other, of which three go together, between some that fail or come twice."""
    given: list[tuple[str, dict[str, Any]]] = [
        ("What is it?", {"max_tokens": 8}),
        ("Is it <|im_end|>?", {}),
        (" Which? ", {"max_tokens": 3, "think": False}),
        ("Whose?", {"max_tokens": 5, "subtitles": "missing.srt"}),
        ("What is it?", {"max_tokens": 8}),
        ("Why?", {"max_tokens": 8, "temperature": 1.0, "seed": 7}),
        ("Who?", {"max_tokens": 6, "stop": "e"}),
        ("   ", {}),
    ]
    questions = [(text, ask_settings(keye.preprocessor, **options)) for text, options in given]

    def outcome(ask: Any, text: str, settings: AskSettings) -> Any:
        with own_warnings() as said:
            try:
                return without_times(ask(text, settings)), said
            except KeyeError as error:
                return type(error), str(error), said

    def asked_alone(text: str, settings: AskSettings) -> Any:
        return keye.ask(short_clips[1], text, settings=settings)

    alone = [outcome(asked_alone, *question) for question in questions]
    for together, expected in ((True, [3]), (False, [])):
        widths.clear()
        shared = SharedQuestions(keye.loaded, [probe(short_clips[1])], questions, together=together)
        assert [outcome(shared.answer, *question) for question in questions] == alone
        assert widths[:1] == expected


@pytest.mark.filterwarnings("ignore::keyecli.errors.KeyeWarning")
def test_one_by_one_where_memory_is_short_after_all(
    keye: Keye, short_clips: list[Path], widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, questions: Any) -> Any:
        widths.append(len(questions))
        raise MemoryLimitError("the device is full")

    monkeypatch.setattr(SharedPrefix, "answers", full)
    settings = ask_settings(keye.preprocessor, max_tokens=4)
    questions = [(text, settings) for text in ("What?", "Who?", "Why?")]
    shared = SharedQuestions(keye.loaded, [probe(short_clips[0])], questions)
    for text, one in questions:
        together = without_times(shared.answer(text, one))
        assert together == without_times(keye.ask(short_clips[0], text, settings=one))
    assert widths == [3]


@pytest.mark.filterwarnings("ignore::keyecli.errors.KeyeWarning")
@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_jobs_about_one_clip(
    keye: Keye, short_clips: list[Path], widths: list[int], timeout_s: float | None
) -> None:
    """Together, unless each has a time limit; the failure of one is its own."""
    texts = ["What?", "Is it <|im_end|>?", "Who is it?", "Why?"]
    jobs = make_jobs(
        (f"line {number}", {"task": "ask", "inputs": str(short_clips[0]), "question": text})
        for number, text in enumerate(texts, 1)
    )
    settings = ask_settings(keye.preprocessor, max_tokens=5)
    group = open_group([(job, settings) for job in jobs])
    outcomes = list(answer_group(keye, group, timeout_s=timeout_s))
    assert [job for job, _ in outcomes] == jobs
    assert widths == ([3] if timeout_s is None else [])
    for job, outcome in outcomes:
        if "<|" in job.prompt[0]:
            assert outcome.error is not None
            assert outcome.error["code"] == 2
            continue
        (result,) = outcome.results
        expected = keye.ask(short_clips[0], job.prompt[0], settings=settings).to_dict()
        assert {**result, "timings": 0} == {**expected, "timings": 0}
        assert outcome.warnings == ["the answer was cut off after 5 tokens; raise --max-tokens"]


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
