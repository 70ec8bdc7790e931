"""What the model is asked, in one place: a question for each task, which a model's own folder may replace."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, overload

from keyecli.engine.loaded import ModelFiles
from keyecli.errors import ModelError, UsageError

Task = Literal["ground", "summarize", "combine"]

PROMPTS_FILE = "keye_prompts.json"

GROUND = (
    "Find every time span of the video in which this happens: {query}\n"
    "Answer with a JSON list of [start, end] pairs in seconds with one decimal, in order of time, "
    "such as [[3.0, 7.5], [12.0, 14.5]]. Answer [] if it never happens."
)
SUMMARIZE = (
    "Summarise the video. {style} {language}\n"
    "Then list what happens in order of time, one line an event, each as `start - end: what happens` with both times "
    "in seconds with one decimal. {chapters}"
)
COMBINE = (
    "These are notes about consecutive parts of one video, with times in seconds:\n\n{parts}\n\n"
    "Summarise the whole video from them. {style} {language}\n"
    "Then list what happens in order of time, one line an event, each as `start - end: what happens` with both times "
    "in seconds with one decimal, as in the notes. {chapters}"
)
DEFAULTS: dict[Task, str] = {"ground": GROUND, "summarize": SUMMARIZE, "combine": COMBINE}

# What stands in the places of the summary's questions.
STYLE_SENTENCES = {
    "brief": "Write two or three sentences.",
    "detailed": "Write several paragraphs with every detail that matters.",
    "bullets": "Write a list of short points, each on a line of its own that begins with `- `.",
}
LANGUAGE_SENTENCE = "Write in {language}."
CHAPTERS_SENTENCE = "Write exactly {count} such lines."
AUTO_CHAPTERS_SENTENCE = "Write as many lines as there are different things to see."

# A query that ends like a sentence is a question of the user's own.
_SENTENCE = re.compile(r"[.?!。？！]\s*$")
_ARTICLE = re.compile(r"^(?:the|an|a)\s+(?=\S)", re.IGNORECASE)


@dataclass(frozen=True)
class OwnPrompts:
    """What a model's folder says: questions, one for each task or several to choose from by the query, and limits.

    longest_clip_s: the longest clip that the model was trained on, None where nothing is said.
    """

    questions: dict[str, tuple[tuple[str, str], ...]]
    longest_clip_s: float | None = None


@overload
def prompt_for(task: Literal["ground", "summarize"], files: ModelFiles) -> str: ...
@overload
def prompt_for(task: Literal["combine"], files: ModelFiles) -> str | None: ...
def prompt_for(task: Task, files: ModelFiles) -> str | None:
    """The question of a task, with its places `{query}`, `{style}` and so on: the model's own, else the default.

    A model with questions of its own that has none for "combine" was not made for it: None. ModelError for a
    keye_prompts.json that cannot be read.
    """
    own = own_prompts(files.folder)
    if own is not None and task in own.questions:
        return own.questions[task][-1][1]
    return None if own is not None and task == "combine" else DEFAULTS[task]


def ground_question(query: str, files: ModelFiles) -> str:
    """What the model is asked for a query.

    A query that ends in . ? or ! is a question already and is passed as it is. Anything else is put into the
    template, without its article where the template has one before it. UsageError for an empty query.
    """
    query = " ".join(query.split())
    if not query:
        raise UsageError('a query is empty: say what to look for, as in "the red circle"')
    if _SENTENCE.search(query):
        return query
    own = own_prompts(files.folder)
    choices = own.questions.get("ground", ()) if own is not None else ()
    template = next((text for match, text in choices if re.search(match, query, re.IGNORECASE)), GROUND)
    before = template.partition("{query}")[0].rstrip().rpartition(" ")[2]
    if before.lower() in ("the", "an", "a"):
        query = _ARTICLE.sub("", query, count=1)
    return template.replace("{query}", query)


def own_prompts(folder: Path) -> OwnPrompts | None:
    """What keye_prompts.json in a model's folder says, None without one. ModelError when it cannot be used."""
    path = folder / PROMPTS_FILE
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return _parsed(content, path)


@lru_cache(maxsize=8)
def _parsed(content: str, path: Path) -> OwnPrompts:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold an object of questions")
    limit = value.pop("longest_clip_s", None)
    if limit is not None and (type(limit) not in (int, float) or limit <= 0):
        raise ModelError(f"{path}: longest_clip_s must be a number of seconds above 0")
    questions = {task: _choices(task, given, path) for task, given in value.items()}
    return OwnPrompts(questions, None if limit is None else float(limit))


def _choices(task: str, given: Any, path: Path) -> tuple[tuple[str, str], ...]:
    """(pattern, template) pairs; one template alone fits every query."""
    if task not in get_args(Task):
        raise ModelError(f"{path} has a question for {task}; known are {', '.join(get_args(Task))}")
    pairs = [("", given)] if isinstance(given, str) else given
    if not isinstance(pairs, list) or not pairs:
        raise ModelError(f"{path}: {task} must be a text or a list of [pattern, text] pairs")
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ModelError(f"{path}: {task} must be a text or a list of [pattern, text] pairs")
        try:
            re.compile(pair[0])
        except re.error as error:
            raise ModelError(f"{path}: {pair[0]!r} is not a pattern: {error}") from error
        if task == "ground" and "{query}" not in pair[1]:
            raise ModelError(f"{path}: {pair[1]!r} has no place for {{query}}")
    return tuple((pattern, text) for pattern, text in pairs)
