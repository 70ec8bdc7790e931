"""Chapters out of events: they cover the clip, begin where something begins, and keep every event with its times."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyecli.tasks.chapters import Chapter, chapters_of, joined_parts
from keyecli.tasks.events import Event

RED = Event(0.0, 4.0, "red circle")
WORD = Event(3.0, 9.0, "word CAT")
STAR = Event(9.0, 12.0, "blue star", "It spins.")


def starts(chapters: list[Chapter]) -> list[float]:
    return [chapter.start_s for chapter in chapters]


def test_events_that_overlap() -> None:
    assert chapters_of([RED, WORD, STAR], 0.0, 12.0) == [
        Chapter(0.0, 3.0, "red circle", "0.0 - 4.0: red circle"),
        Chapter(3.0, 9.0, "word CAT"),
        Chapter(9.0, 12.0, "blue star", "It spins."),
    ]


def test_events_that_begin_close_to_each_other_share_a_chapter() -> None:
    near = Event(4.2, 8.0, "green ring")
    assert chapters_of([RED, WORD, near, STAR], 0.0, 12.0)[1] == Chapter(
        3.0, 9.0, "word CAT; green ring", "3.0 - 9.0: word CAT\n4.2 - 8.0: green ring"
    )
    # And one that begins right before the end has no chapter of its own.
    late = Event(10.6, 12.0, "ring")
    assert chapters_of([RED, WORD, STAR, late], 0.0, 12.0)[-1] == Chapter(
        9.0, 12.0, "blue star; ring", "9.0 - 12.0: blue star | It spins.\n10.6 - 12.0: ring"
    )


def test_time_before_the_first_event() -> None:
    assert starts(chapters_of([WORD, STAR], 0.0, 12.0)) == [0.0, 3.0, 9.0]
    assert chapters_of([WORD, STAR], 0.0, 12.0)[0] == Chapter(0.0, 3.0, "Intro")
    soon = Event(1.4, 9.0, "word CAT")
    assert chapters_of([soon, STAR], 0.0, 12.0)[0] == Chapter(0.0, 9.0, "word CAT", "1.4 - 9.0: word CAT")


def test_long_clips_have_longer_chapters_and_short_ones_shorter() -> None:
    moments = [Event(start / 2, start / 2 + 0.5, f"event {start}") for start in range(16)]
    assert starts(chapters_of(moments, 0.0, 8.0)) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert starts(chapters_of(moments, 0.0, 60.0)) == [0.0, 2.0, 4.0, 6.0]
    events = [Event(start, start + 5, f"event {start}") for start in range(0, 1200, 5)]
    chapters = chapters_of(events, 0.0, 1200.0)
    assert len(chapters) == 40
    assert min(chapter.end_s - chapter.start_s for chapter in chapters) == 30.0


def test_as_many_chapters_as_asked_for() -> None:
    events = [Event(start, start + 1, f"event {start}") for start in (0, 1, 2, 10, 11, 20, 29)]
    assert starts(chapters_of(events, 0.0, 30.0, count=1)) == [0.0]
    assert starts(chapters_of(events, 0.0, 30.0, count=3)) == [0.0, 10.0, 20.0]
    # More than automatic ones: the shortest length gives way.
    assert starts(chapters_of(events, 0.0, 30.0)) == [0.0, 2.0, 10.0, 20.0]
    assert starts(chapters_of(events, 0.0, 30.0, count=20)) == [0.0, 1.0, 2.0, 10.0, 11.0, 20.0, 29.0]


def test_a_shortest_chapter() -> None:
    events = [Event(start, start + 1, f"event {start}") for start in (0, 4, 11, 14, 25)]
    assert starts(chapters_of(events, 0.0, 30.0, shortest_s=10.0)) == [0.0, 11.0]
    assert starts(chapters_of(events, 0.0, 30.0, shortest_s=10.0, count=4)) == [0.0, 11.0]


def test_titles_fit_and_say_each_thing_once() -> None:
    events = [
        Event(0.0, 1.0, "ball"),
        Event(0.5, 2.0, "ball"),
        Event(1.0, 3.0, "x" * 75),
        Event(1.2, 3.0, "late"),
    ]
    (chapter,) = chapters_of(events, 0.0, 3.0, shortest_s=2.0)
    assert chapter.title == "ball; …"
    assert chapter.text.splitlines() == [event.line for event in events]


def test_edges_snap_to_scenes() -> None:
    cuts = [0.5, 3.8, 8.2, 11.0]
    snapped = chapters_of([RED, WORD, STAR], 0.0, 12.0, scene_cuts_s=cuts)
    assert [(chapter.start_s, chapter.end_s) for chapter in snapped] == [(0.0, 3.8), (3.8, 8.2), (8.2, 12.0)]
    # The events keep their times, and a cut that is further than a second away moves nothing.
    assert snapped[0].text == "0.0 - 4.0: red circle"
    assert starts(chapters_of([RED, WORD, STAR], 0.0, 12.0, scene_cuts_s=[1.9, 10.1])) == [0.0, 3.0, 9.0]


def test_the_nearest_edge_takes_a_cut_and_no_chapter_becomes_too_short() -> None:
    events = [Event(0, 5, "a"), Event(5, 7, "b"), Event(7, 12, "c")]
    assert starts(chapters_of(events, 0.0, 12.0, scene_cuts_s=[6.1])) == [0.0, 5.0, 7.0]
    assert starts(chapters_of(events, 0.0, 12.0, scene_cuts_s=[7.6, 7.4])) == [0.0, 5.0, 7.4]
    assert starts(chapters_of(events, 0.0, 12.0, scene_cuts_s=[4.4])) == [0.0, 4.4, 7.0]


def test_nothing_happens() -> None:
    assert chapters_of([], 0.0, 12.0) == []


EVENTS = st.lists(
    st.tuples(st.integers(0, 199), st.integers(1, 80), st.sampled_from("abc")), min_size=1, max_size=20
).map(
    lambda entries: sorted(
        {Event(start / 10, min(start + length, 200) / 10, title) for start, length, title in entries},
        key=lambda event: (event.start_s, event.end_s),
    )
)


@settings(deadline=None, max_examples=200)
@given(
    EVENTS,
    st.one_of(st.none(), st.integers(1, 12)),
    st.lists(st.integers(1, 199).map(lambda tenths: tenths / 10), max_size=8),
)
def test_chapters_always_cover_the_clip(events: list[Event], count: int | None, cuts: list[float]) -> None:
    chapters = chapters_of(events, 0.0, 20.0, count=count, scene_cuts_s=cuts)
    assert (chapters[0].start_s, chapters[-1].end_s) == (0.0, 20.0)
    assert all(first.end_s == second.start_s for first, second in pairwise(chapters))
    assert all(chapter.start_s < chapter.end_s and chapter.title for chapter in chapters)
    if count is not None:
        assert len(chapters) <= count
    begins = {event.start_s for event in events} | set(cuts)
    assert set(starts(chapters)) - {0.0} <= begins
    # Every event is told, at its own times, in exactly one chapter, or is one.
    for event in events:
        told = sum(event.line in chapter.text.splitlines() for chapter in chapters)
        is_one = any(chapter.title == event.title and not chapter.text for chapter in chapters)
        assert told == 1 or is_one


@pytest.mark.parametrize(
    ("parts", "borders", "expected"),
    [
        ([[RED]], [], [RED]),
        (
            [[Event(40.0, 50.0, "ring")], [Event(50.0, 62.0, "ring"), Event(55.0, 60.0, "star")]],
            [50.0],
            [Event(40.0, 62.0, "ring"), Event(55.0, 60.0, "star")],
        ),
        # Through a part that it fills.
        (
            [[Event(45.0, 49.5, "ring")], [Event(50.0, 100.0, "ring")], [Event(100.5, 103.0, "ring")]],
            [50.0, 100.0],
            [Event(45.0, 103.0, "ring")],
        ),
        # One part saw more of it than the other.
        (
            [[Event(40.0, 50.0, "ring")], [Event(50.0, 62.0, "ring spins")], []],
            [50.0, 62.0],
            [Event(40.0, 62.0, "ring")],
        ),
        (
            [[Event(40.0, 50.0, "ring spins")], [Event(50.0, 62.0, "ring")], [Event(62.0, 63.0, "rings")]],
            [50.0, 62.0],
            [Event(40.0, 62.0, "ring"), Event(62.0, 63.0, "rings")],
        ),
        # Something else, or the same again later, is not the same event.
        (
            [[Event(40.0, 50.0, "ring")], [Event(50.0, 62.0, "star")]],
            [50.0],
            [Event(40.0, 50.0, "ring"), Event(50.0, 62.0, "star")],
        ),
        (
            [[Event(40.0, 48.0, "ring")], [Event(50.0, 62.0, "ring")]],
            [50.0],
            [Event(40.0, 48.0, "ring"), Event(50.0, 62.0, "ring")],
        ),
        # Lines of one thing that overlap are one; those that only touch are two.
        ([[Event(2.5, 29.5, "ring"), Event(20.5, 49.5, "ring")]], [], [Event(2.5, 49.5, "ring")]),
        ([[Event(2.0, 5.0, "ring"), Event(5.0, 9.0, "ring")]], [], [Event(2.0, 5.0, "ring"), Event(5.0, 9.0, "ring")]),
    ],
)  # fmt: skip
def test_joined_parts(parts: list[list[Event]], borders: list[float], expected: list[Event]) -> None:
    assert joined_parts(parts, borders) == expected
