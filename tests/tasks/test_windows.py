"""Overlapping windows: they cover the clip, and what is found in them does not depend on where they lie."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyecli.tasks.windows import (
    ScoredSpan,
    Window,
    join_windows,
    mean_score,
    merge_near,
    plan_windows,
    suppress_overlaps,
)

TENTH = 0.1


def spans(*pairs: tuple[float, ...]) -> list[ScoredSpan]:
    return [ScoredSpan(*pair) for pair in pairs]


def pairs(found: list[ScoredSpan]) -> list[tuple[float, float]]:
    return [(span.start_s, span.end_s) for span in found]


def answers(window: Window, truth: list[tuple[float, float]]) -> list[ScoredSpan]:
    """What a model without fault says about a window: its part of every event, to a tenth of a second."""
    begin, end = float(window.start_s), float(window.end_s)
    seen = []
    for start_s, end_s in truth:
        first = round(max(start_s, begin) - begin, 1)
        last = round(min(end_s, end) - begin, 1)
        if last - first >= TENTH / 2:
            seen.append(ScoredSpan(begin + first, begin + last, 0.5))
    return seen


def test_a_short_clip_is_one_window() -> None:
    assert plan_windows(Fraction(0), Fraction(10), Fraction(10)) == [
        Window(Fraction(0), Fraction(10), Fraction(0), Fraction(10))
    ]


def test_windows_by_hand() -> None:
    windows = plan_windows(Fraction(0), Fraction(21), Fraction(8))
    assert [(window.start_s, window.end_s) for window in windows] == [(0, 8), (6, 14), (12, 20), (13, 21)]
    # Each is believed up to the middle of what it shares with the next.
    assert [(window.own_start_s, window.own_end_s) for window in windows] == [
        (0, 7),
        (7, 13),
        (13, 16.5),
        (16.5, 21),
    ]


@given(st.integers(0, 400), st.integers(21, 900), st.integers(4, 60), st.integers(0, 40))
def test_windows_cover_everything(start: int, span: int, length: int, offset: int) -> None:
    start_s, end_s, length_s = Fraction(start, 10), Fraction(start + span, 10), Fraction(length, 2)
    windows = plan_windows(start_s, end_s, length_s, Fraction(offset, 2))
    assert windows[0].start_s == start_s
    assert windows[-1].end_s == end_s
    assert windows[0].own_start_s == start_s
    assert windows[-1].own_end_s == end_s
    for window in windows:
        assert window.end_s - window.start_s <= length_s
        assert window.start_s <= window.own_start_s < window.own_end_s <= window.end_s
        assert (window.start_s - start_s) % Fraction(1, 2) == 0
    for before, after in itertools.pairwise(windows):
        assert before.start_s < after.start_s < before.end_s
        assert before.own_end_s == after.own_start_s


EVENTS = st.lists(st.tuples(st.integers(4, 80), st.integers(5, 300)), min_size=1, max_size=6)


@given(EVENTS, st.integers(4, 40), st.integers(0, 30))
def test_the_result_does_not_depend_on_the_windows(
    gaps: list[tuple[int, int]], length: int, offset: int
) -> None:
    """Events of half a second and more, at least 0.4 s apart, at any hundredth; windows of any length and offset."""
    truth, place = [], 0.013
    for gap, event in gaps:
        truth.append((place + gap / 10, place + gap / 10 + event / 10))
        place = truth[-1][1]
    end_s = Fraction(str(round(place + 0.737, 3)))
    windows = plan_windows(Fraction(0), end_s, Fraction(length), Fraction(offset, 2))
    found = join_windows(windows, [answers(window, truth) for window in windows])
    assert len(found) == len(truth)
    for span, event in zip(pairs(found), truth, strict=True):
        assert span == pytest.approx(event, abs=TENTH)
    assert [span.score for span in found] == pytest.approx([0.5] * len(found))


def two(border: float = 10.0) -> list[Window]:
    """Two windows that share four seconds around the border."""
    edge = Fraction(border)
    return [
        Window(Fraction(0), edge + 2, Fraction(0), edge),
        Window(edge - 2, edge + 10, edge, edge + 10),
    ]


@pytest.mark.parametrize(
    ("left", "right", "joined"),
    [
        # the same event, seen by both
        ([(5, 12)], [(8, 15)], [(5, 15)]),
        # they differ about an edge: the one that is believed there is right
        ([(9, 11.8)], [(9.2, 11.5)], [(9, 11.5)]),
        ([(4, 9.4)], [(8, 9.9)], [(4, 9.4)]),
        # a gap that only one of them sees
        ([(5, 7), (8.5, 12)], [(8, 15)], [(5, 7), (8.5, 15)]),
        # an edge at the border, a little before it for one and a little behind it for the other
        ([(9.9, 12)], [(10.1, 14)], [(9.9, 14)]),
        ([(5, 10.2)], [(8, 9.9)], [(5, 10)]),
        # seen by one of them only: kept where most of it lies where that one is believed
        ([(8.5, 10.4)], [], [(8.5, 10.4)]),
        ([(9.8, 12)], [], []),
        ([], [(9.5, 11)], [(9.5, 11)]),
        # different events
        ([(1, 3)], [(15, 17)], [(1, 3), (15, 17)]),
        ([(1, 8.5)], [(10.5, 12)], [(1, 8.5), (10.5, 12)]),
        ([], [], []),
    ],
)
def test_joining_by_hand(left: list, right: list, joined: list) -> None:
    assert pairs(join_windows(two(), [spans(*left), spans(*right)])) == joined


def test_an_edge_is_never_made_up_by_a_border() -> None:
    """The middle window misses what the others see: each edge is one that a window named."""
    windows = plan_windows(Fraction(0), Fraction(32), Fraction(16))
    assert [(window.own_start_s, window.own_end_s) for window in windows] == [(0, 14), (14, 22), (22, 32)]
    found = [spans((4, 16)), spans((12, 15)), spans((16, 32))]
    assert pairs(join_windows(windows, found)) == [(4, 15), (16, 32)]


def test_joined_scores_weigh_by_length() -> None:
    found = join_windows(two(), [spans((7, 12, 0.9)), spans((8, 11, 0.5))])
    assert found == [ScoredSpan(7, 11, pytest.approx(0.8))]
    assert mean_score(spans((0, 1, 0.4), (2, 3, None))) is None


def test_a_joined_span_is_as_sure_as_where_its_edges_come_from() -> None:
    left, right = ScoredSpan(7, 12, 0.9, (1.0, 2.0)), ScoredSpan(8, 11, 0.5, (3.0, 4.0))
    (found,) = join_windows(two(), [[left], [right]])
    assert found.certainty == (1.0, 4.0)
    (alone,) = merge_near([left], 0.0)
    assert alone.certainty == (1.0, 2.0)
    (mixed,) = merge_near([left, ScoredSpan(12, 13)], 0.0)
    assert mixed.certainty is None


def test_near_spans_are_merged() -> None:
    found = spans((1.0, 2.9, 0.5), (3.1, 4.0, 0.7), (6.0, 7.0, 0.9))
    assert pairs(merge_near(found, 0.0)) == pairs(found)
    assert pairs(merge_near(found, 0.2)) == [(1.0, 4.0), (6.0, 7.0)]
    assert pairs(merge_near(found, 2.0)) == [(1.0, 7.0)]
    assert pairs(merge_near(spans((1, 5), (2, 3), (5, 6)), 0.0)) == [(1, 6)]


def test_of_two_that_mostly_overlap_the_better_stays() -> None:
    found = spans((0, 4, 0.6), (0.5, 4, 0.9), (3.5, 8, 0.2))
    assert suppress_overlaps(found) == spans((0.5, 4, 0.9), (3.5, 8, 0.2))
    assert suppress_overlaps(found, iou=0.05) == spans((0.5, 4, 0.9))
    assert suppress_overlaps(spans((0, 4), (0, 4))) == spans((0, 4))
