"""From timed events, which may overlap, to chapters, which follow each other without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from keyecli.tasks.events import MAX_TITLE, Event

# The shortest automatic chapter, and the shares of the clip between which it stays.
MIN_CHAPTER_S = 2.0
LARGEST_SHARE, SMALLEST_SHARE = 8, 40
SNAP_S = 1.0
PART_BORDER_S = 1.0
INTRO = "Intro"
_FILLS_WITHIN_S = 0.15  # lines have one decimal


@dataclass(frozen=True)
class Chapter:
    """A stretch [start_s, end_s) of a clip; `text` is what its title cannot say, "" when there is no more.

    Where a chapter is made of other events than one that fills it, `text` is their lines, each with its own times.
    """

    start_s: float
    end_s: float
    title: str
    text: str = ""


def chapters_of(
    events: Sequence[Event],
    begin_s: float,
    end_s: float,
    *,
    count: int | None = None,
    shortest_s: float | None = None,
    scene_cuts_s: Sequence[float] = (),
) -> list[Chapter]:
    """Chapters that cover [begin_s, end_s], ascending, from `events` inside it, ascending; [] without events.

    Edges. A chapter begins where an event begins. Going forward, a beginning less than the shortest length behind the
    last edge makes no edge, and neither does one less than that before the end; the shortest length is `shortest_s`, by
    default 2 s, but no more than an eighth and no less than a fortieth of the clip. Time before the first event is a
    chapter of its own, "Intro", if it is that long, and else belongs to the first chapter.

    Count. With `count`, the default shortest length is at most half of an even share, and then, while there are too
    many chapters, the two neighbours that are shortest together become one. There are fewer than `count` when too few
    events begin at different times.

    Titles. A chapter is named after the events that begin in it, in their order, as many as fit; the rest is in its
    text.

    Snapping. Then each inner edge moves to the nearest of `scene_cuts_s` within one second, unless a nearer edge took
    that cut or a chapter would become too short. The events keep their times.
    """
    if not events:
        return []
    if shortest_s is None:
        span_s = end_s - begin_s
        shortest_s = max(min(MIN_CHAPTER_S, span_s / LARGEST_SHARE), span_s / SMALLEST_SHARE)
        if count is not None:
            shortest_s = min(shortest_s, span_s / (2 * count))
    edges = _edges(events, begin_s, end_s, count, shortest_s)
    named = [
        _named([event for event in events if start_s <= event.start_s < stop_s], start_s, stop_s)
        for start_s, stop_s in pairwise([*edges, end_s])
    ]
    snapped = [*_snapped(edges, end_s, scene_cuts_s, shortest_s), end_s]
    return [
        replace(chapter, start_s=start_s, end_s=stop_s)
        for chapter, (start_s, stop_s) in zip(named, pairwise(snapped), strict=True)
    ]


def joined_parts(parts: Sequence[Sequence[Event]], borders_s: Sequence[float]) -> list[Event]:
    """The events of a clip that was looked at in parts, `borders_s` between them, ascending.

    Two events of the same title are one when they overlap. Two that a border cut are one as well, that is when one ends
    and the other begins within a second of it, and the title of one begins with that of the other: "red circle" and "red
    circle moves left" are a "red circle", which is true of both.
    """
    joined: list[Event] = []
    for event in sorted(
        (event for part in parts for event in part), key=lambda event: (event.start_s, event.end_s)
    ):
        place = next((place for place, other in enumerate(joined) if _same(other, event, borders_s)), None)
        if place is None:
            joined.append(event)
            continue
        other = joined[place]
        joined[place] = replace(
            other,
            end_s=max(other.end_s, event.end_s),
            title=min(other.title, event.title, key=len),
            text=other.text or event.text,
        )
    return joined


def _same(earlier: Event, later: Event, borders_s: Sequence[float]) -> bool:
    if earlier.title == later.title and later.start_s < earlier.end_s:
        return True
    shorter, longer = sorted((earlier.title, later.title), key=len)
    return f"{longer} ".startswith(f"{shorter} ") and any(
        abs(earlier.end_s - border_s) <= PART_BORDER_S and abs(later.start_s - border_s) <= PART_BORDER_S
        for border_s in borders_s
    )


def _edges(
    events: Sequence[Event], begin_s: float, end_s: float, count: int | None, shortest_s: float
) -> list[float]:
    """Where chapters begin, the first at `begin_s`."""
    edges = [begin_s]
    for event in events:
        if event.start_s - edges[-1] >= shortest_s and end_s - event.start_s >= shortest_s:
            edges.append(event.start_s)
    while count is not None and len(edges) > count:
        ends = [*edges, end_s]
        shortest = min(range(1, len(edges)), key=lambda place: ends[place + 1] - ends[place - 1])
        del edges[shortest]
    return edges


def _named(events: Sequence[Event], start_s: float, end_s: float) -> Chapter:
    if not events:
        return Chapter(start_s, end_s, INTRO)
    first = events[0]
    fills = max(abs(first.start_s - start_s), abs(first.end_s - end_s)) <= _FILLS_WITHIN_S
    if len(events) == 1 and fills:
        return Chapter(start_s, end_s, first.title, first.text)
    titles = list(dict.fromkeys(event.title for event in events))
    title = titles[0]
    for other in titles[1:]:
        if len(title) + len(other) + len("; ; …") > MAX_TITLE:
            title += "; …"
            break
        title = f"{title}; {other}"
    return Chapter(start_s, end_s, title, "\n".join(event.line for event in events))


def _snapped(edges: Sequence[float], end_s: float, cuts_s: Sequence[float], shortest_s: float) -> list[float]:
    moves = sorted(
        (abs(cut_s - edges[place]), place, cut_s)
        for place in range(1, len(edges))
        for cut_s in cuts_s
        if abs(cut_s - edges[place]) <= SNAP_S
    )
    result = list(edges)
    moved: set[int] = set()
    for _, place, cut_s in moves:
        following = result[place + 1] if place + 1 < len(result) else end_s
        if place not in moved and min(cut_s - result[place - 1], following - cut_s) >= shortest_s:
            result[place] = cut_s
            moved.add(place)
    return result
