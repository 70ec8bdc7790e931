"""What the model is asked: the default questions, a model's own, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyecli.errors import ModelError, UsageError
from keyecli.tasks.prompts import ground_question, own_prompts, prompt_for

OWN = {
    "ground": [["(moves|spins)$", "When does the {query}?"], ["", "Find the {query} in it."]],
    "summarize": "Tell.",
    "longest_clip_s": 60,
}


def model(folder: Path, content: Any = None) -> Any:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "keye_prompts.json").write_text(text)
    return SimpleNamespace(folder=folder)


def test_without_a_file_the_defaults_are_asked(tmp_path: Path) -> None:
    files = model(tmp_path)
    assert own_prompts(tmp_path) is None
    question = ground_question(" a  dog runs ", files)
    assert "this happens: a dog runs\n" in question
    assert "[[3.0, 7.5], [12.0, 14.5]]" in question
    assert "{query}" in prompt_for("ground", files)
    assert "{style}" in prompt_for("summarize", files)
    assert "{parts}" in (prompt_for("combine", files) or "")


def test_a_model_s_own_questions_win(tmp_path: Path) -> None:
    files = model(tmp_path, OWN)
    assert ground_question("red circle", files) == "Find the red circle in it."
    assert ground_question("the red circle", files) == "Find the red circle in it."
    assert ground_question("A red circle", files) == "Find the red circle in it."
    assert ground_question("theatre", files) == "Find the theatre in it."
    assert ground_question("red circle moves", files) == "When does the red circle moves?"
    assert prompt_for("summarize", files) == "Tell."
    assert prompt_for("combine", files) is None
    own = own_prompts(tmp_path)
    assert own is not None
    assert own.longest_clip_s == 60.0


@pytest.mark.parametrize("query", ["When does the dog run?", "Find the dog.", "Find it!", "狗什么时候跑？"])
def test_a_sentence_is_asked_as_it_is(tmp_path: Path, query: str) -> None:
    assert ground_question(f"  {query} ", model(tmp_path, OWN)) == query


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_query_is_refused(tmp_path: Path, query: str) -> None:
    with pytest.raises(UsageError, match="a query is empty"):
        ground_question(query, model(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold an object"),
        ({"find": "x"}, "has a question for find; known are ground, summarize, combine"),
        ({"ground": "Find it"}, "has no place for {query}"),
        ({"ground": 3}, "ground must be a text or a list"),
        ({"ground": [["a"]]}, "ground must be a text or a list"),
        ({"ground": [["(", "{query}"]]}, "is not a pattern"),
        ({"longest_clip_s": 0}, "longest_clip_s must be a number of seconds above 0"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ModelError) as error:
        ground_question("x", model(tmp_path, content))
    assert message in str(error.value)
    assert "keye_prompts.json" in str(error.value)
