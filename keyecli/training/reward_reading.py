"""Reads what an answer says and what its row holds to be true: spans, times, numbers, letters, texts; strictly, never a guess."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase
from textwrap import shorten
from typing import Any, TypeVar

from keyecli.engine.thinking import THINK_CLOSE, THINK_OPEN
from keyecli.tasks.events import read_time
from keyecli.tasks.spans import Pair, find_spans
from keyecli.training.attempts import Attempt
from keyecli.training.rows import RowError

Truth = TypeVar("Truth")
Line = tuple[Pair, str]
"""A line of a summary: its span in seconds, and what happens."""

SPAN_COLUMNS = ("solution", "spans", "ground_truth", "answer", "span")
TEXT_COLUMNS = ("answer", "solution", "ground_truth")

_NUMBER = r"-?\d+(?:\.\d+)?"
_CLOCK = r"(?:\d+:[0-5]?\d|\d+):[0-5]\d(?:\.\d+)?"
_EDGE = rf"(?:{_CLOCK}|\"{_CLOCK}\"|{_NUMBER})"
_BRACKETS = rf"\[\s*{_EDGE}\s*,\s*{_EDGE}\s*\]"
_LIST = re.compile(rf"\[\s*\]|{_BRACKETS}|\[\s*{_BRACKETS}(?:\s*,\s*{_BRACKETS})*\s*\]")
_ANY_CLOCK = re.compile(rf"(?<!\d){_CLOCK}")
_PAIR = re.compile(rf"\[\s*({_EDGE})\s*,\s*({_EDGE})\s*\]")
_CLOCK_PAIR = re.compile(
    rf"(?<![\d.:])({_CLOCK})\s*(?:-{{1,2}}>|[-–—−~→]|\bto\b|\buntil\b|至|到)\s*({_CLOCK})(?![\d:])",
    re.I,
)
_LINE = re.compile(rf"(?:[-*]\s+)?({_EDGE})\s*[-–—]\s*({_EDGE})\s*:\s*(\S.*)")
_MARKED_TIME = re.compile(
    rf"(?<![\d.:])(?:{_CLOCK}(?![\d:])|\d+(?:\.\d+)?\s*(?:s|secs?|seconds?|秒)(?![a-z]))", re.I
)
_TOO_LARGE = 1e15  # for a time or a count, and what is not finite is so too
_LONGEST_DENIAL = 500  # characters; what says that nothing is there is a sentence

# fmt: off
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# Larger ones are seen, or "thirty two" would be 2, and are not understood.
_LARGER_WORDS = (
    "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand", "million", "dozen",
)
# fmt: on
_ANY_NUMBER = re.compile(rf"(?:(?<!\w)-)?\d+(?:[.,:/]\d+)*|\b(?:{'|'.join(_WORDS + _LARGER_WORDS)})\b", re.I)
_WHOLE_NUMBER = re.compile(r"-?\d{1,18}")

_LONE_LETTER = re.compile(r"[\W_]*([a-z])[\W_]*", re.I | re.A)
_LABEL = re.compile(r"\(?([A-Z])(?:\)\s*|[.:]\s+)(?=\S)", re.I)
# A and I before another word are words, unless they are spoken of.
_LETTER = re.compile(
    r"(?<![A-Za-z0-9])(?![AI]\s+(?!(?:or|and|nor|but|not|is|was|because|since|as)\b)[a-z])([A-Z])(?![A-Za-z0-9]|['’][a-z])"
)
_NAMED_LETTER = re.compile(
    r"\b(?i:option|choice|answer(?:\s+is|\s*:)?)\s+[(\"'*]*([A-Z])(?![A-Za-z0-9]|['’][a-z])"
)
_MOST_LETTERS = 10  # where a row does not list its options: A to J


def said(attempt: Attempt) -> str | None:
    """The answer, in one form of Unicode; None for none, and for one with reasoning in it, out of which nothing is read."""
    answer = attempt.answer
    if answer is None or THINK_OPEN in answer or THINK_CLOSE in answer:
        return None
    return unicodedata.normalize("NFKC", answer).strip()


def plain(text: str) -> str:
    """The text without what makes no difference: case, kind and amount of space, the full stop at its end."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.removesuffix(".").removesuffix("。").rstrip()


def spans_in(text: str) -> list[Pair] | None:
    """Spans in seconds that a text gives as JSON, [[3.0, 7.5]], or by the clock, 0:03 - 0:07.5; None when it does neither.

    [] is none. Words may stand around them, but no other brackets, and no time of a clock that is in no span. None too when a
    span does not run forward. No other number is read as a time.
    """
    if "[" in text or "]" in text:
        rest = _LIST.sub(" ", text)
        return None if "[" in rest or "]" in rest else _forward(_PAIR.findall(text))
    if _ANY_CLOCK.search(_CLOCK_PAIR.sub(" ", text)):
        return None
    return _forward(_CLOCK_PAIR.findall(text)) or None


def says_none(text: str) -> bool:
    """Whether a text says in words that it did not happen, and names no span in any spelling."""
    return len(text) <= _LONGEST_DENIAL and find_spans(text) == []


def lines_in(text: str) -> list[Line] | None:
    """Lines of the form `3.0 - 7.5: what happens`, None without any; others are passed over, a reversed span has no length."""
    found = []
    for line in text.splitlines():
        if match := _LINE.fullmatch(" ".join(line.split())):
            start, end = _seconds(match[1]), _seconds(match[2])
            found.append(((start, max(start, end)), plain(match[3])))
    return found or None


def time_in(text: str) -> float | None:
    """The one time of a text in seconds: "7.5", "0:07.5", or in words "at 7.5 seconds" with no other number; else None."""
    text = " ".join(text.split()).rstrip(".。 ")
    found = _MARKED_TIME.findall(text)
    if len(found) == 1 and not re.search(r"\d", _MARKED_TIME.sub(" ", text)):
        return read_time(found[0])
    return read_time(text)


def number_in(text: str) -> int | None:
    """The one number of a text, in digits or as a word up to twenty; None for none, several, and what is no whole number."""
    found = _ANY_NUMBER.findall(text)
    if len(found) != 1:
        return None
    word = found[0].casefold()
    if word in _WORDS:
        return _WORDS.index(word)
    return int(word) if _WHOLE_NUMBER.fullmatch(word) else None


def letter_in(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a text chooses: "b", "(B)", "B) red", "The answer is B", or the words of an option; None for none or two.

    options: letter → words, as `options_of` gives them.
    """
    if lone := _LONE_LETTER.fullmatch(text):
        found = {lone[1].upper()}
    else:
        label, words = _LABEL.match(text), plain(text)
        found = {letter for letter, option in options.items() if option == words}
        if label and options.get(label[1].upper()) == plain(text[label.end() :]):
            found.add(label[1].upper())
        if not found:
            found = {
                *_LETTER.findall(text),
                *_NAMED_LETTER.findall(text),
                *(label[1].upper() if label else ""),
            }
    found &= set(options or ascii_uppercase[:_MOST_LETTERS])
    return found.pop() if len(found) == 1 else None


def options_of(attempt: Attempt) -> dict[str, str]:
    """Letter → words of the options in the column `options`: a list in the order shown, or an object of letters; {} without."""
    options = attempt.row.get("options")
    if not options:
        return {}
    if (
        isinstance(options, Sequence)
        and not isinstance(options, str)
        and len(options) <= len(ascii_uppercase)
    ):
        options = dict(zip(ascii_uppercase, options, strict=False))
    if not isinstance(options, Mapping) or not all(isinstance(text, str) for text in options.values()):
        raise RowError(
            f"{row_name(attempt)} has options that are neither a list of texts nor an object of letters"
        )
    return {
        str(letter).upper(): _without_label(text, str(letter).upper()) for letter, text in options.items()
    }


def truth_of(
    attempt: Attempt,
    columns: Sequence[str],
    column: str | None,
    read: Callable[[Any], Truth | None],
    what: str,
) -> Truth:
    """What `read` makes of the first of these columns that it can read; `column` is then the only one. RowError for none."""
    tried = columns if column is None else (column,)
    for name in tried:
        value = attempt.row.get(name)
        truth = None if value is None else read(value)
        if truth is not None:
            return truth
    raise RowError(f"{row_name(attempt)} holds no {what} to compare answers with: tried {', '.join(tried)}")


def text_of(value: Any) -> str | None:
    """The text of a column, of `<answer>…</answer>` what is inside; None for what is no text, or empty."""
    if isinstance(value, str):
        return said(Attempt(value)) or None
    if _is_number(value):
        return str(int(value) if value == int(value) else value)
    return None


def spans_of(value: Any) -> list[Pair] | None:
    """The spans of a column: [[start, end], …], one [start, end], or text as answers have it."""
    if isinstance(value, str):
        text = text_of(value)
        return None if text is None else spans_in(text)
    if not isinstance(value, list | tuple):
        return None
    pairs = [value] if len(value) == 2 and all(map(_is_number, value)) else value
    if not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs
    ):
        return None
    spans = [(float(start), float(end)) for start, end in pairs]
    return spans if all(start < end for start, end in spans) else None


def row_name(attempt: Attempt) -> str:
    """What to call a row in a sentence."""
    if (name := attempt.row.get("id")) is not None:
        return f"row {name}"
    question = shorten(attempt.question, 80, placeholder=" …")
    return f'the row "{question}"' if question else "a row"


def _forward(pairs: Sequence[tuple[str, str]]) -> list[Pair] | None:
    spans = [(_seconds(start), _seconds(end)) for start, end in pairs]
    return spans if all(start < end for start, end in spans) else None


def _seconds(text: str) -> float:
    seconds = 0.0
    for part in text.strip('"').split(":"):
        seconds = seconds * 60 + float(part)
    return seconds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE


def _without_label(text: str, letter: str) -> str:
    """The words of an option that may be written with its letter, "B) red"."""
    label = _LABEL.match(text)
    return plain(text[label.end() :] if label is not None and label[1].upper() == letter else text)
