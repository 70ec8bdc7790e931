"""Reading spans strictly, and comparing them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyecli.tasks.spans import merged, parse_spans, temporal_iou

SPANS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (float(pair[0]), float(sum(pair)))),
    max_size=5,
)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("[[3.0, 7.5]]", [(3.0, 7.5)]),
        ("[[1, 2], [5.5, 6]]", [(1.0, 2.0), (5.5, 6.0)]),
        ("[]", []),
        ("[[7.5, 3.0]]", None),
        ("[[3.0, 3.0]]", None),
        ("[3.0, 7.5]", None),
        ("[[3.0, 7.5, 9.0]]", None),
        ('[["3", 7.5]]', None),
        ("[[true, 7.5]]", None),
        ("from 3.0 to 7.5", None),
        ("[[3.0, 7.5]", None),
        ("{}", None),
        ("", None),
    ],
)
def test_only_the_exact_form_is_read(text: str, spans: list[tuple[float, float]] | None) -> None:
    assert parse_spans(text) == spans


@pytest.mark.parametrize(
    ("predicted", "truth", "iou"),
    [
        ([(0.0, 4.0)], [(2.0, 6.0)], 2 / 6),
        ([(0.0, 4.0)], [(0.0, 4.0)], 1.0),
        ([(0.0, 1.0)], [(2.0, 3.0)], 0.0),
        ([], [(2.0, 3.0)], 0.0),
        ([(2.0, 3.0)], [], 0.0),
        ([], [], 1.0),
        ([(0.0, 2.0), (4.0, 6.0)], [(1.0, 5.0)], 2 / 6),
        ([(0.0, 3.0), (2.0, 5.0)], [(0.0, 5.0)], 1.0),
    ],
)
def test_temporal_iou_by_hand(predicted: list, truth: list, iou: float) -> None:
    assert temporal_iou(predicted, truth) == pytest.approx(iou)


@given(SPANS, SPANS)
def test_temporal_iou_is_symmetric_and_bounded(left: list, right: list) -> None:
    assert 0.0 <= temporal_iou(left, right) <= 1.0
    assert temporal_iou(left, right) == pytest.approx(temporal_iou(right, left))


@given(SPANS)
def test_splitting_a_span_changes_nothing(spans: list) -> None:
    halves = [half for start, end in spans for half in ((start, (start + end) / 2), ((start + end) / 2, end))]
    assert temporal_iou(halves, spans) == pytest.approx(1.0)
    assert merged(halves) == merged(spans)
