"""Lines of a jobs file → jobs, everything about them checked that needs neither the model nor the clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from keyecli.errors import UsageError

Task = Literal["ask", "ground", "summarize"]
TASKS: tuple[Task, ...] = get_args(Task)
EXAMPLE = '{"task": "ask", "inputs": "clip.mp4", "question": "What happens?"}'
DIGEST_CHARACTERS = 8  # of an id that keye makes up

_INPUT_NAMES = ("inputs", "input", "video", "videos")
_PROMPT_NAMES: dict[str, tuple[str, ...]] = {
    "ask": ("question",),
    "ground": ("query", "queries"),
    "summarize": (),
}
_NUMBER, _WHOLE, _FLAG, _TEXT, _TIME = "a number", "a whole number", "true or false", "text", "a time"
_TEXTS, _COUNT = "text or a list of texts", "a whole number or auto"
_KINDS: dict[str, tuple[type, ...]] = {
    _NUMBER: (int, float),
    _WHOLE: (int,),
    _FLAG: (bool,),
    _TEXT: (str,),
    _TIME: (int, float, str),
}
_ASK_OPTIONS = {
    "fps": _NUMBER, "max_frames": _WHOLE, "max_tokens_video": _WHOLE, "min_pixels": _WHOLE, "max_pixels": _WHOLE,
    "adaptive_budget": _FLAG, "start": _TIME, "end": _TIME, "duration": _TIME, "exact_resize": _FLAG,
    "strict": _FLAG, "subtitles": _TEXT, "max_tokens": _WHOLE, "temperature": _NUMBER, "top_k": _WHOLE,
    "top_p": _NUMBER, "min_p": _NUMBER, "repetition_penalty": _NUMBER, "seed": _WHOLE, "stop": _TEXTS, "think": _FLAG,
}  # fmt: skip
OPTIONS: dict[Task, dict[str, str]] = {
    "ask": _ASK_OPTIONS,
    "ground": {
        **_ASK_OPTIONS, "constrained": _FLAG, "refine": _FLAG, "window": _NUMBER, "top": _WHOLE,
        "min_score": _NUMBER, "merge_gap": _NUMBER, "explain": _FLAG,
    },
    "summarize": {
        **_ASK_OPTIONS, "style": _TEXT, "chapters": _COUNT, "language": _TEXT, "snap": _FLAG,
        "min_chapter_s": _NUMBER,
    },
}  # fmt: skip
"""Task → the options it takes, by the names that Python knows them by, and what each of them is."""


@dataclass(frozen=True)
class Job:
    """One line of a jobs file.

    number: its place among the jobs, from 0. where: how to name the line to a user. prompt: the question, the queries, or
    nothing. options: as the line gives them, without those that are null.
    """

    number: int
    where: str
    id: str
    task: Task
    inputs: tuple[str, ...]
    prompt: tuple[str, ...]
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The job as a line that means the same."""
        line: dict[str, Any] = {"id": self.id, "task": self.task, "inputs": list(self.inputs)}
        if self.task == "ask":
            line["question"] = self.prompt[0]
        elif self.task == "ground":
            line["queries"] = list(self.prompt)
        return {**line, "options": dict(self.options)}


def read_jobs(content: bytes, name: str) -> list[Job]:
    """The jobs of a whole file, one JSON object a line, empty lines left out; `name` is the file's, for errors.

    A job without an id gets one that follows from its first input and from everything else it says; a line that is there
    twice without an id is one job. UsageError with the line's number: no JSON, a task, a name or a value that cannot be
    used, an id that is there twice.
    """
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    given = [(f"line {number} of {name}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return make_jobs((where, _parsed(line, where)) for where, line in given)


def make_jobs(lines: Iterable[tuple[str, Any]]) -> list[Job]:
    """Jobs out of (where, object) pairs. UsageError as in `read_jobs`."""
    jobs: list[Job] = []
    seen: dict[str, tuple[str, bool]] = {}
    for where, line in lines:
        job = _job(line, where, len(jobs))
        own_id = line.get("id") is not None
        if job.id in seen:
            before, before_own = seen[job.id]
            if own_id or before_own:
                raise UsageError(f"{where} has the id {job.id!r}, which {before} has too")
            continue
        seen[job.id] = (where, own_id)
        jobs.append(job)
    return jobs


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"{where} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{where} is not JSON; a job is an object such as {EXAMPLE}") from None


def _job(line: Any, where: str, number: int) -> Job:
    if not isinstance(line, dict):
        raise UsageError(f"{where} is no JSON object; a job is one such as {EXAMPLE}")
    task = line.get("task")
    if task not in TASKS:
        raise UsageError(f"{where} has the task {task!r}, and there are {', '.join(TASKS)}")
    known = ("id", "task", *_INPUT_NAMES, *_PROMPT_NAMES[task], "options")
    for name in line:
        if name not in known:
            raise UsageError(f"{where} has {name!r}, which a job of {task} does not take{_hint(name, known)}")
    inputs = _inputs(line, where)
    if task != "ask" and len(inputs) != 1:
        raise UsageError(f"{where} names {len(inputs)} inputs, and {task} looks at one")
    prompt = _prompt(line, task, where)
    options = _options(line.get("options"), task, where)
    id = line.get("id")
    if id is None:
        said = json.dumps([task, inputs, prompt, options], ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
        id = f"{Path(inputs[0]).stem}-{digest[:DIGEST_CHARACTERS]}"
    elif not isinstance(id, str) or not id.strip():
        raise UsageError(f"{where} has the id {id!r}, and an id is text")
    return Job(number, where, id, task, inputs, prompt, options)


def _inputs(line: Mapping[str, Any], where: str) -> tuple[str, ...]:
    names = [name for name in _INPUT_NAMES if line.get(name) is not None]
    if len(names) != 1:
        said = " and ".join(names) or "no inputs"
        raise UsageError(f"{where} has {said}: name what to look at once, as in {EXAMPLE}")
    value = line[names[0]]
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) and path for path in paths):
        raise UsageError(f"{where} has {names[0]} that are neither a path nor a list of paths")
    for path in paths:
        if path == "-":
            raise UsageError(f"{where} names stdin, from which videos are not read: save it to a file first")
        if "\0" in path:
            raise UsageError(f"{where} names a path with a NUL character in it")
    return tuple(paths)


def _prompt(line: Mapping[str, Any], task: Task, where: str) -> tuple[str, ...]:
    names = _PROMPT_NAMES[task]
    if not names:
        return ()
    given = [name for name in names if line.get(name) is not None]
    if len(given) != 1:
        raise UsageError(f"{where} needs {' or '.join(names)} to {task}")
    value = line[given[0]]
    texts = value if given[0] == "queries" else [value]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where} has a {given[0]} that is not text")
    if not all(text.strip() for text in texts):
        raise UsageError(f"{where} has a {given[0]} that is empty")
    return tuple(text.strip() for text in texts)


def _options(given: Any, task: Task, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UsageError(f"{where} has options that are no JSON object")
    kinds = OPTIONS[task]
    for name, value in given.items():
        if name not in kinds:
            raise UsageError(
                f"{where} has the option {name!r}, which {task} does not take{_hint(name, kinds)}"
            )
        if value is not None and not _is_kind(value, kinds[name]):
            raise UsageError(f"{where} sets {name} to {value!r}, but it is {kinds[name]}")
    return {name: value for name, value in given.items() if value is not None}


def _is_kind(value: Any, kind: str) -> bool:
    if kind == _COUNT:
        return value == "auto" or type(value) is int
    if kind == _TEXTS:
        return all(isinstance(text, str) for text in (value if isinstance(value, list) else [value]))
    return type(value) in _KINDS[kind]


def _hint(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
