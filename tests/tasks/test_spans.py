"""Reading spans, strictly and in any spelling, and comparing them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyecli.tasks.spans import find_spans, merged, parse_spans, temporal_iou

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


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        # JSON, strict and loose
        ("[[3.0, 7.5]]", [(3.0, 7.5)]),
        ("[[3.0, 7.5], [9, 10.25]]", [(3.0, 7.5), (9.0, 10.25)]),
        ("[3.0, 7.5]", [(3.0, 7.5)]),
        ("[[3.0,7.5],[9.0,10.0]]", [(3.0, 7.5), (9.0, 10.0)]),
        ("The answer is:\n```json\n[[3.0, 7.5]]\n```", [(3.0, 7.5)]),
        ("[(3.0, 7.5), (9.0, 10.0)]", [(3.0, 7.5), (9.0, 10.0)]),
        ("[['0:03', '0:07']]", [(3.0, 7.0)]),
        ('[["00:12", "01:15.5"]]', [(12.0, 75.5)]),
        ("[[0:12, 0:15]]", [(12.0, 15.0)]),
        ("[0:12,0:15]", [(12.0, 15.0)]),
        ('{"start": 3.0, "end": 7.5}', [(3.0, 7.5)]),
        (
            '[{"start_time": "00:03", "end_time": "00:07"}, {"start_time": "1:00", "end_time": "1:02"}]',
            [(3.0, 7.0), (60.0, 62.0)],
        ),
        ("{'start_s': 3, 'end_s': 7.5, 'score': 0.9}", [(3.0, 7.5)]),
        # clocks
        ("0:03 - 0:07", [(3.0, 7.0)]),
        ("00:01:02.500 --> 00:01:04,250", [(62.5, 64.25)]),
        ("1:02:03.250-1:02:05", [(3723.25, 3725.0)]),
        ("from 12:05 until 12:30", [(725.0, 750.0)]),
        # sentences
        ("The event happens in 3.0 - 7.5 seconds.", [(3.0, 7.5)]),
        ("The ball bounces from 3 to 7.5 seconds.", [(3.0, 7.5)]),
        ("It is visible from 3.0s to 7.5s and again from 9s to 10s.", [(3.0, 7.5), (9.0, 10.0)]),
        ("between 3 and 7.5 seconds", [(3.0, 7.5)]),
        ("It starts at 3.0 seconds and ends at 7.5 seconds.", [(3.0, 7.5)]),
        ("Start: 3 s, End: 7.5 s", [(3.0, 7.5)]),
        ("It appears at 3 s and disappears at 7.5 s.", [(3.0, 7.5)]),
        ("1. 3.0 - 7.5\n2. 9.0 - 10.0", [(3.0, 7.5), (9.0, 10.0)]),
        ("- 3.0–7.5\n- 9.0—10.0", [(3.0, 7.5), (9.0, 10.0)]),
        ("3.0 ~ 7.5", [(3.0, 7.5)]),
        # units
        ("3 s - 7.5 s", [(3.0, 7.5)]),
        ("3sec - 7.5 secs", [(3.0, 7.5)]),
        ("from 1 to 2.5 minutes", [(60.0, 150.0)]),
        ("1 min 30 s to 2 min", [(90.0, 120.0)]),
        ("1m30s - 1m45s", [(90.0, 105.0)]),
        ("1h2m3s to 1h2m5s", [(3723.0, 3725.0)]),
        ("0.5 hours to 1 hour", [(1800.0, 3600.0)]),
        # backward and without length
        ("[[7.5, 3.0]]", [(3.0, 7.5)]),
        ("from 0:07 to 0:03", [(3.0, 7.0)]),
        ("[[3.0, 3.0], [4.0, 5.0]]", [(4.0, 5.0)]),
        ("[[3.0, 3.0]]", None),
        # Chinese
        ("3秒到7.5秒", [(3.0, 7.5)]),
        ("从第3秒至第7.5秒", [(3.0, 7.5)]),
        ("1分30秒到2分", [(90.0, 120.0)]),
        ("该事件发生在3.0-7.5秒，以及９：００到９：１０。", [(3.0, 7.5), (540.0, 550.0)]),
        ("开始于3秒，结束于7秒", [(3.0, 7.0)]),
        ("1分钟至1分钟20秒", [(60.0, 80.0)]),
        ("没有出现", []),
        ("视频中未出现红色圆圈。", []),
        # not there
        ("[]", []),
        ("[ ]", []),
        ("The red circle does not appear in the video.", []),
        ("It's never on screen", []),
        ("The event isn't shown.", []),
        ("There is no such event.", []),
        ("None", []),
        ("N/A", []),
        ("No.", []),
        # nothing said about times
        ("", None),
        ("A red circle moves.", None),
        ("I am not sure.", None),
        ("It appears at 3.0 seconds.", None),
        ("There are 3 circles.", None),
    ],
)
def test_any_spelling_is_understood(text: str, spans: list[tuple[float, float]] | None) -> None:
    found = find_spans(text)
    assert (found is None) == (spans is None)
    assert found == (spans if spans is None else [pytest.approx(span) for span in spans])


@given(SPANS)
def test_what_is_read_strictly_is_read_alike(spans: list) -> None:
    text = "[" + ", ".join(f"[{start:.1f}, {end:.1f}]" for start, end in spans) + "]"
    assert parse_spans(text) == find_spans(text) == spans


@given(st.text(max_size=80))
def test_no_text_breaks_the_reading(text: str) -> None:
    for start, end in find_spans(text) or []:
        assert 0 <= start < end
