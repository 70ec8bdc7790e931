"""Spans in answers: those of answers about spans, as they are written, and none of those that only name numbers."""

from __future__ import annotations

import pytest

from keyecli.training.data.answers import span_fault, spans_in_answer, turned


@pytest.mark.parametrize(
    ("answer", "spans"),
    [
        ("[[3.0, 7.5], [12, 14.5]]", [(3.0, 7.5), (12.0, 14.5)]),
        ("[[7.5, 3.0]]", [(7.5, 3.0)]),
        ("[]", []),
        ("The event happens in 3.0 - 7.5 seconds.", [(3.0, 7.5)]),
        ("The event happens in 12.0 - 3.5 seconds, 1:02 - 1:10.5.", [(12.0, 3.5), (62.0, 70.5)]),
        ("From 3 to 7 seconds", [(3.0, 7.0)]),
        ("A talk.\n\n0.0 - 4.0: she comes in\n- 4.0 - 2.0 s: she goes", [(0.0, 4.0), (4.0, 2.0)]),
        ("The final score is 2-1.", []),
        ("It was built in 1990 - 1995.", []),
        ("2 - 1: a win", []),
        ("He waits from 3.0 to 7.5 seconds and then he leaves with the 2 others.", []),
        ("[1, 2, 3]", []),
        ('["3.0", 7.5]', []),
        ("A dog.", []),
        ("", []),
    ],
)
def test_spans_in_answers(answer: str, spans: list[tuple[float, float]]) -> None:
    assert spans_in_answer(answer) == spans


@pytest.mark.parametrize(
    ("span", "words"),
    [
        ((1.0, 2.0), None),
        ((1.0, 10.1), None),
        ((0.9, 2.0), None),
        ((2.0, 1.0), "is reversed"),
        ((2.0, 2.0), "has no length"),
        ((9.0, 10.2), "is outside of the clip, which is seen from 1.0 to 10.0 s"),
        ((0.8, 2.0), "is outside"),
    ],
)
def test_faults(span: tuple[float, float], words: str | None) -> None:
    fault = span_fault(span, 1.0, 10.0)
    assert fault is None if words is None else fault is not None and words in fault


def test_turned() -> None:
    assert turned([(9.0, 7.0), (1.0, 2.0)]) == [(1.0, 2.0), (7.0, 9.0)]
