"""Lines of a jobs file: what they may say, and what is wrong with them by the number of the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keyecli.batch.jobs import OPTIONS, make_jobs, read_jobs
from keyecli.errors import UsageError


def read(*lines: Any) -> list[Any]:
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return read_jobs(content.encode(), "jobs.jsonl")


def test_every_spelling_of_a_job() -> None:
    for inputs in ({"inputs": "a.mp4"}, {"inputs": ["a.mp4"]}, {"video": "a.mp4"}, {"videos": ["a.mp4"]}):
        (job,) = read({"id": "x", "task": "ask", "question": " What? ", **inputs})
        assert (job.id, job.task, job.inputs, job.prompt) == ("x", "ask", ("a.mp4",), ("What?",))
    (one, many, told) = read(
        {"task": "ground", "video": "a.mp4", "query": "x"},
        "",
        {"task": "ground", "video": "a.mp4", "queries": ["x", "y"]},
        {"task": "summarize", "video": "a.mp4", "options": {"chapters": "auto", "fps": None}},
    )
    assert (one.prompt, many.prompt, told.prompt) == (("x",), ("x", "y"), ())
    assert (told.where, told.number, told.options) == ("line 4 of jobs.jsonl", 2, {"chapters": "auto"})


def test_a_job_as_a_line_is_the_same_job() -> None:
    jobs = read(
        {"task": "ask", "videos": ["a.mp4", "b.png"], "question": "What?", "options": {"start": "0:10"}},
        {"task": "ground", "video": "a.mp4", "query": "x"},
        {"task": "summarize", "video": "a.mp4"},
    )
    again = make_jobs((job.where, job.to_dict()) for job in jobs)
    assert again == jobs


def test_an_id_of_keyes_own_says_which_job_it_is() -> None:
    line = {"task": "ask", "inputs": "clips/a b.mp4", "question": "What?"}
    first, other = read(line, {**line, "question": "Who?"}, line)
    assert first.id.startswith("a b-")
    assert first.id != other.id
    assert read(line)[0].id == first.id


def test_options_are_those_of_python() -> None:
    from keyecli.tasks.options import AskOptions
    from keyecli.tasks.search import GroundOptions
    from keyecli.tasks.summarize import SummaryOptions

    words = {
        "float | None": "a number",
        "int | None": "a whole number",
        "bool | None": "true or false",
        "Time | None": "a time",
        "str | None": "text",
        "str | Path | None": "text",
        "str | Sequence[str] | None": "text or a list of texts",
        "Style | None": "text",
        'int | Literal["auto"] | None': "a whole number or auto",
    }
    for task, options in (("ask", AskOptions), ("ground", GroundOptions), ("summarize", SummaryOptions)):
        hints = {name: hint for kind in (AskOptions, options) for name, hint in kind.__annotations__.items()}
        spelled = {
            name: words[getattr(hint, "__forward_arg__", hint).replace("'", '"')]
            for name, hint in hints.items()
        }
        assert spelled == OPTIONS[task]  # type: ignore[index]


GOOD = {"task": "ask", "inputs": "a.mp4", "question": "What?"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "is not JSON; a job is an object such as"),
        ("[1]", "is no JSON object; a job is one such as"),
        ({}, "has the task None, and there are ask, ground, summarize"),
        ({**GOOD, "task": "sing"}, "has the task 'sing', and there are ask, ground, summarize"),
        (
            {**GOOD, "querry": "x"},
            "has 'querry', which a job of ask does not take; known are id, task, inputs",
        ),
        ({**GOOD, "option": {}}, "has 'option', which a job of ask does not take; did you mean options?"),
        ({**GOOD, "inputs": None}, "has no inputs: name what to look at once"),
        ({**GOOD, "video": "b.mp4"}, "has inputs and video: name what to look at once"),
        ({**GOOD, "inputs": []}, "has inputs that are neither a path nor a list of paths"),
        ({**GOOD, "inputs": "-"}, "names stdin, from which videos are not read: save it to a file first"),
        ({**GOOD, "question": None}, "needs question to ask"),
        ({**GOOD, "question": " "}, "has a question that is empty"),
        ({**GOOD, "question": 7}, "has a question that is not text"),
        ({"task": "ground", "inputs": ["a", "b"], "query": "x"}, "names 2 inputs, and ground looks at one"),
        (
            {"task": "ground", "inputs": "a", "query": "x", "queries": ["y"]},
            "needs query or queries to ground",
        ),
        ({**GOOD, "id": 7}, "has the id 7, and an id is text"),
        ({**GOOD, "options": []}, "has options that are no JSON object"),
        ({**GOOD, "options": {"fsp": 1}}, "has the option 'fsp', which ask does not take; did you mean fps?"),
        ({**GOOD, "options": {"fps": "two"}}, "sets fps to 'two', but it is a number"),
        ({**GOOD, "options": {"max_tokens": True}}, "sets max_tokens to True, but it is a whole number"),
        (
            {**GOOD, "options": {"stop": ["a", 1]}},
            "sets stop to ['a', 1], but it is text or a list of texts",
        ),
        ({**GOOD, "options": {"refine": True}}, "has the option 'refine', which ask does not take"),
        ({**GOOD, "id": "same"}, "has the id 'same', which line 1 of jobs.jsonl has too"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(line: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as raised:
        read({**GOOD, "id": "same"}, "", line)
    assert str(raised.value).startswith(f"line 3 of jobs.jsonl {sentence}")


def test_options_that_cannot_be_used_are_told_before_anything_runs(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from keyecli.batch.run import Batch, BatchSettings
    from keyecli.engine.loaded import open_model

    jobs = read({**GOOD, "options": {"start": "9", "end": "3"}})
    with pytest.raises(UsageError, match=r"^line 1 of jobs\.jsonl: "):
        Batch(jobs, open_model(tiny_checkpoint), tmp_path / "out.jsonl", {}, BatchSettings())
    assert not (tmp_path / "out.jsonl").exists()
