"""Rewards by rule: each compares an answer with the truth in its row, from 0 to 1 (training.md §4: P, but for what says R).

All read the truth first, so that any attempt, even an empty one, tells of a row without one: RowError, never a score of 0.
column: the only column to look for it in. An answer that is none, or that stands in the reasoning, is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any, Literal, TypeVar

from keyecli.engine.thinking import ANSWER_CLOSE, ANSWER_OPEN, TAGS, THINK_OPEN
from keyecli.tasks.spans import Pair, temporal_iou
from keyecli.training.attempts import Attempt
from keyecli.training.reward_reading import (
    SPAN_COLUMNS,
    TEXT_COLUMNS,
    letter_in,
    lines_in,
    number_in,
    options_of,
    plain,
    row_name,
    said,
    says_none,
    spans_in,
    spans_of,
    text_of,
    time_in,
    truth_of,
)
from keyecli.training.rows import RowError

MOST_SPANS = 8
Read = TypeVar("Read")


def iou(
    attempt: Attempt,
    *,
    mode: Literal["union", "single", "hungarian"] = "union",
    most: int = MOST_SPANS,
    column: str | None = None,
) -> float:
    """Temporal intersection over union of the spans in an answer and those of its row, both cut at the ends of the video.

    union: of the time that each side covers, so that splitting a span changes nothing. single: of one span; several are 0.
    hungarian: Σ IoU of the best pairing ÷ the larger number of spans. Where nothing happens, 1 for saying so. 0 for what is
    not written as `reward_reading.spans_in` wants it, and for more than `most` spans, or twice the truth's if that is more.

    >>> iou(Attempt("[[1.0, 3.0]]", {"solution": [[2.0, 4.0]]}))
    0.3333333333333333
    >>> iou(Attempt("[[0.0, 2.0], [4.0, 5.0]]", {"solution": [[0.0, 2.0]]}), mode="hungarian")
    0.5
    """
    truth = _true_spans(attempt, column)
    if mode == "single" and len(truth) > 1:
        raise RowError(f"{row_name(attempt)} has {len(truth)} spans, and iou:mode=single compares one")
    answer = said(attempt)
    if answer is None:
        return 0.0
    given = spans_in(answer)
    if not truth:
        return float(given == [] or (given is None and says_none(answer)))
    if not given or len(given) > max(most, 2 * len(truth)) or (mode == "single" and len(given) > 1):
        return 0.0
    given = _cut(given, attempt.duration_s)
    if mode == "hungarian":
        return _paired([[temporal_iou([one], [other]) for other in truth] for one in given])
    return min(1.0, temporal_iou(given, truth))


def format(attempt: Attempt) -> float:
    """1 for exactly one `<answer>…</answer>` that holds something, behind closed reasoning or none, and nothing outside.

    >>> format(Attempt("I saw it.</think><answer>B</answer>", opened=True)), format(Attempt("B"))
    (1.0, 0.0)
    """
    reasoning, text = attempt.parts
    if text is None or THINK_OPEN in reasoning:
        return 0.0
    inside = text.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
    whole = len(text) == len(ANSWER_OPEN) + len(inside) + len(ANSWER_CLOSE)
    return float(whole and bool(inside.strip()) and not any(tag in inside for tag in TAGS))


def exact(attempt: Attempt, *, column: str | None = None) -> float:
    """1 for the very text of the row, but for case, space, form of Unicode and a full stop at the end.

    >>> exact(Attempt("It stays  still.", {"answer": "it stays still"}))
    1.0
    """
    return float(_true(attempt, column, plain, "text") == _given(attempt, plain))


def choice(attempt: Attempt, *, column: str | None = None) -> float:
    """1 for the letter of the right option, or its words where the row's column `options` has them; 0 for two letters.

    >>> choice(Attempt("The answer is (B).", {"solution": "<answer>B</answer>"}))
    1.0
    >>> choice(Attempt("red", {"answer": "B", "options": ["blue", "red"]}))
    1.0
    """
    read = partial(letter_in, options=options_of(attempt))
    return float(_true(attempt, column, read, "letter of an option") == _given(attempt, read))


def count(attempt: Attempt, *, column: str | None = None) -> float:
    """1 for the right whole number, in digits or as a word up to twenty, and no other number beside it.

    >>> count(Attempt("Three times.", {"answer": "3"})), count(Attempt("3 or 4", {"answer": "3"}))
    (1.0, 0.0)
    """
    return float(_true(attempt, column, number_in, "number") == _given(attempt, number_in))


def timestamp(attempt: Attempt, *, tau: float | None = None, column: str | None = None) -> float:
    """max(0, 1 − |Δ| ÷ tau) of one time; tau in seconds, of itself 1 s or two frames' distance, whichever is longer.

    >>> timestamp(Attempt("0:07", {"answer": 7.5}))
    0.5
    """
    truth, time_s = _true(attempt, column, time_in, "time"), _given(attempt, time_in)
    if time_s is None:
        return 0.0
    return max(0.0, 1 - abs(time_s - truth) / (tau or max(1.0, 2 * (attempt.frame_interval_s or 0.0))))


def order(attempt: Attempt, *, column: str | None = None) -> float:
    """1 for what came first, or "before", "after" and the like, in the row's own words, with "the" or without.

    Where the row's column `options` shows some, shuffled, as `choice`.

    >>> order(Attempt("Red circle.", {"answer": "the red circle"}))
    1.0
    """
    if options_of(attempt):
        return choice(attempt, column=column)
    return float(_true(attempt, column, _without_article, "text") == _given(attempt, _without_article))


def cooccurrence(attempt: Attempt, *, column: str | None = None) -> float:
    """1 for the right one of "yes" and "no", or of the row's `options`, as `choice`. RowError for any other truth.

    >>> cooccurrence(Attempt("Yes.", {"answer": "yes"})), cooccurrence(Attempt("yes and no", {"answer": "yes"}))
    (1.0, 0.0)
    """
    if options_of(attempt):
        return choice(attempt, column=column)
    return float(_true(attempt, column, _yes_or_no, "yes or no") == _given(attempt, _yes_or_no))


def text(attempt: Attempt, *, exact: bool = False, column: str | None = None) -> float:
    """1 − character error rate of what is to be read on the screen, at least 0. exact: all or nothing, and case counts.

    >>> text(Attempt("gats", {"answer": "GATE"})), text(Attempt("gate", {"answer": "GATE"}), exact=True)
    (0.75, 0.0)
    """
    truth, answer = _true(attempt, column, _on_one_line, "text"), _given(attempt, _on_one_line)
    if answer is None:
        return 0.0
    if exact:
        return float(answer == truth)
    truth, answer = truth.casefold(), answer.casefold()
    # Each character too many is an error, and so long an answer need not be looked at.
    return 0.0 if len(answer) >= 2 * len(truth) else max(0.0, 1 - _edits(answer, truth) / len(truth))


def summary(attempt: Attempt, *, most: int = MOST_SPANS, column: str | None = None) -> float:
    """Σ IoU of the best pairing of lines `3.0 - 7.5: what happens` with the same words ÷ the larger number of lines (R).

    Of the truth's lines alone it would pay to write each many times. 0 for more than `most` lines, or twice the truth's.

    >>> truth = "0.0 - 2.0: red circle spins\\n1.0 - 3.0: word GATE"
    >>> summary(Attempt("0.0 - 2.0: Red circle spins.", {"answer": truth}))
    0.5
    """
    truth, given = _true(attempt, column, lines_in, "timed lines"), _given(attempt, lines_in)
    if not given or len(given) > max(most, 2 * len(truth)):
        return 0.0
    return _paired(
        [
            [temporal_iou([span], [other]) if words == expected else 0.0 for other, expected in truth]
            for span, words in given
        ]
    )


def auto(attempt: Attempt) -> float:
    """The reward of the row's `task` as `keye forge` names them, so that one run can learn from all; `exact` for other tasks.

    Rows of TimeLens, which name no task, are about spans.

    >>> auto(Attempt("two", {"task": "count_objects", "answer": "2"}))
    1.0
    """
    task = attempt.row.get("task")
    if task is None and ("span" in attempt.row or "events" in attempt.row):
        return iou(attempt)
    if not isinstance(task, str):
        raise RowError(f"{row_name(attempt)} has no column task, by which auto chooses a reward")
    return count(attempt) if task.startswith("count_") else _BY_TASK.get(task, exact)(attempt)


_BY_TASK: dict[str, Callable[[Attempt], float]] = {
    "ground": iou,
    "ground_motion": iou,
    "order": order,
    "cooccurrence": cooccurrence,
    "read_word": partial(text, exact=True),
    "read_number": partial(text, exact=True),
    "summary": summary,
}
BUILTIN: dict[str, Callable[..., float]] = {
    rule.__name__: rule
    for rule in (iou, format, exact, choice, count, timestamp, order, cooccurrence, text, summary, auto)
}
"""Name → (attempt, **options) → score from 0 to 1."""


def _true_spans(attempt: Attempt, column: str | None) -> list[Pair]:
    """The spans of a row inside its video; [] where nothing happens."""
    spans = truth_of(attempt, SPAN_COLUMNS, column, spans_of, "spans")
    inside = [(start, end) for start, end in _cut(spans, attempt.duration_s) if start < end]
    if spans and not inside:
        raise RowError(
            f"{row_name(attempt)} has no span inside of its video: its times count from the clip's start"
        )
    return inside


def _true(attempt: Attempt, column: str | None, read: Callable[[str], Read | None], what: str) -> Read:
    """What `read` makes of the text that is true; RowError where it can make nothing of it."""

    def read_value(value: Any) -> Read | None:
        text = text_of(value)
        return None if text is None else read(text)

    return truth_of(attempt, TEXT_COLUMNS, column, read_value, what)


def _given(attempt: Attempt, read: Callable[[str], Read | None]) -> Read | None:
    """What `read` makes of the answer, None where there is none."""
    answer = said(attempt)
    return None if answer is None else read(answer)


def _cut(spans: Sequence[Pair], duration_s: float | None) -> list[Pair]:
    """The same number of spans, each inside the video; one outside of it is left without a length, and still counts."""
    last = inf if duration_s is None else duration_s
    return [(min(max(start, 0.0), last), min(max(end, 0.0), last)) for start, end in spans]


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _without_article(text: str) -> str:
    return plain(text).removeprefix("the ")


def _yes_or_no(text: str) -> str | None:
    word = plain(text)
    return word if word in ("yes", "no") else None


def _paired(scores: Sequence[Sequence[float]]) -> float:
    """The mean score of the best pairing of rows with columns, those without a partner counting as 0."""
    return min(1.0, _best_sum(scores) / max(len(scores), len(scores[0])))


def _best_sum(scores: Sequence[Sequence[float]]) -> float:
    """The largest sum of scores, 0 or above, that pairs no row or column twice: the Hungarian method with prices, exact."""
    if len(scores) > len(scores[0]):
        scores = list(zip(*scores, strict=True))
    columns = len(scores[0])
    row_prices, prices = [0.0] * len(scores), [0.0] * (columns + 1)
    # The row of each column, −1 of a free one; a row begins its search at one column more.
    owners = [-1] * (columns + 1)
    for row in range(len(scores)):
        column, owners[columns] = columns, row
        slacks, before, seen = [inf] * columns, [columns] * columns, {columns}
        while (owner := owners[column]) >= 0:
            unseen = [other for other in range(columns) if other not in seen]
            for other in unseen:
                slack = -scores[owner][other] - row_prices[owner] - prices[other]
                if slack < slacks[other]:
                    slacks[other], before[other] = slack, column
            column = min(unseen, key=slacks.__getitem__)
            step = slacks[column]
            for other in seen:
                row_prices[owners[other]] += step
                prices[other] -= step
            for other in unseen:
                slacks[other] -= step
            seen.add(column)
        while column != columns:
            owners[column], column = owners[before[column]], before[column]
    return sum(scores[owner][column] for column, owner in enumerate(owners[:columns]) if owner >= 0)


def _edits(left: str, right: str) -> int:
    """How few characters have to be added, taken out or changed to make one text of the other."""
    row = list(range(len(right) + 1))
    for number, letter in enumerate(left, 1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(right, 1):
            diagonal, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != other)),
            )
    return row[-1]
