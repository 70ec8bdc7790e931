"""Refinement: the neighbourhood of each boundary is looked at again at a higher rate, and asked about again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from keyecli.engine.loaded import OnProgress
from keyecli.tasks.lookup import PRECISION_S, Looker
from keyecli.tasks.windows import ScoredSpan

# A neighbourhood: so long, at so many times the rate of the first look.
NEIGHBOURHOOD_S = Fraction(8)
RATE_FACTOR = 4
# A boundary shares the neighbourhood of an earlier one when it lies at least so far from its end.
MARGIN_S = Fraction(2)
# How far a boundary may move: steps of the first look, and at least a second.
FURTHEST_STEPS = 2
FURTHEST_S = 1.0


@dataclass(frozen=True)
class Boundary:
    """An edge of a span of one query; `is_start` tells which.

    certainty: the log odds that the first look gave it, −inf where it gave none.
    """

    query: int
    span: int
    is_start: bool
    time_s: float
    certainty: float = -math.inf


@dataclass(frozen=True)
class Neighbourhood:
    """A part of the clip, in seconds, and the boundaries that are looked for in it."""

    start_s: Fraction
    end_s: Fraction
    boundaries: tuple[Boundary, ...]


def refine(
    looker: Looker,
    questions: Sequence[str],
    found: Sequence[Sequence[ScoredSpan]],
    start_s: Fraction,
    end_s: Fraction,
    rate: float,
    on_progress: OnProgress | None = None,
) -> list[list[ScoredSpan]]:
    """The spans of each question with better boundaries; scores stay.

    `rate` is that of the first look, in frames a second. Boundaries at the ends of the searched part, from `start_s` to
    `end_s`, are no boundaries of the event and stay. A boundary moves to that of the new answer that is nearest, if one
    lies near enough and the model is at least as sure of it: where the first look happened to hit the very frame, a
    second one has nothing to add.
    """
    places = neighbourhoods(boundaries_of(found, float(start_s), float(end_s)), start_s, end_s)
    sampling = replace(looker.settings.sampling, fps=rate * RATE_FACTOR, max_frames=None)
    furthest_s = max(FURTHEST_S, FURTHEST_STEPS / rate)
    moved: dict[tuple[int, int, bool], float] = {}
    for number, place in enumerate(places):
        if on_progress:
            on_progress("refining", number, len(places))
        queries = sorted({boundary.query for boundary in place.boundaries})
        look = looker.look(place.start_s, place.end_s, sampling, [questions[query] for query in queries])
        for boundary in place.boundaries:
            spans = look.findings[queries.index(boundary.query)].spans
            time_s = nearest_boundary(boundary, spans, float(place.start_s), float(place.end_s), furthest_s)
            if time_s is not None:
                moved[boundary.query, boundary.span, boundary.is_start] = time_s
    return [
        [_with_boundaries(span, query, index, moved) for index, span in enumerate(spans)]
        for query, spans in enumerate(found)
    ]


def boundaries_of(found: Sequence[Sequence[ScoredSpan]], start_s: float, end_s: float) -> list[Boundary]:
    """Every boundary inside the searched part, ascending by time."""
    boundaries = [
        Boundary(query, index, is_start, *edge)
        for query, spans in enumerate(found)
        for index, span in enumerate(spans)
        for is_start, edge in zip((True, False), _edges(span), strict=True)
        if start_s + PRECISION_S < edge[0] < end_s - PRECISION_S
    ]
    return sorted(boundaries, key=lambda boundary: (boundary.time_s, boundary.query, boundary.span))


def _edges(span: ScoredSpan) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end, each with its certainty."""
    start, end = span.certainty or (-math.inf, -math.inf)
    return (span.start_s, start), (span.end_s, end)


def neighbourhoods(boundaries: Sequence[Boundary], start_s: Fraction, end_s: Fraction) -> list[Neighbourhood]:
    """Few neighbourhoods in which every boundary lies, well inside where the searched part allows it."""
    places: list[Neighbourhood] = []
    for boundary in boundaries:
        before = places[-1] if places else None
        if before and (before.end_s == end_s or boundary.time_s <= before.end_s - MARGIN_S):
            places[-1] = replace(before, boundaries=(*before.boundaries, boundary))
            continue
        # On whole seconds, so that times inside it are round outside of it too; the last one may be a little longer.
        latest = Fraction(math.floor(end_s - NEIGHBOURHOOD_S))
        begin = max(start_s, min(Fraction(int(boundary.time_s - NEIGHBOURHOOD_S / 2)), latest))
        end = end_s if begin == latest else min(end_s, begin + NEIGHBOURHOOD_S)
        places.append(Neighbourhood(begin, end, (boundary,)))
    return places


def nearest_boundary(
    boundary: Boundary, spans: Sequence[ScoredSpan], start_s: float, end_s: float, furthest_s: float
) -> float | None:
    """The boundary of the same kind that is nearest; None when none is near, or the model is less sure of it.

    The ends of what was looked at, from `start_s` to `end_s`, are no boundaries.
    """
    edges = [_edges(span)[0 if boundary.is_start else 1] for span in spans]
    near = [
        (abs(time_s - boundary.time_s), time_s, certainty)
        for time_s, certainty in edges
        if start_s + PRECISION_S / 2 < time_s < end_s - PRECISION_S / 2
        and abs(time_s - boundary.time_s) <= furthest_s
    ]
    if not near:
        return None
    _, time_s, certainty = min(near)
    return time_s if certainty >= boundary.certainty else None


def _with_boundaries(
    span: ScoredSpan, query: int, index: int, moved: dict[tuple[int, int, bool], float]
) -> ScoredSpan:
    start_s = moved.get((query, index, True), span.start_s)
    end_s = moved.get((query, index, False), span.end_s)
    return replace(span, start_s=start_s, end_s=end_s) if start_s < end_s else span
