"""Refinement without a model: which neighbourhoods are looked at, and which boundaries move."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from keyecli.tasks.refine import Boundary, boundaries_of, nearest_boundary, neighbourhoods, refine
from keyecli.tasks.windows import ScoredSpan
from keyecli.video.sampling import SamplingSettings

END = Fraction(60)


def spans(*pairs: tuple[float, ...]) -> list[ScoredSpan]:
    return [ScoredSpan(*pair) for pair in pairs]


class Oracle:
    """Answers like a model that sees boundaries exactly, to a tenth of a second."""

    def __init__(self, truth: dict[str, list[tuple[float, float]]]) -> None:
        self.truth = truth
        self.settings = SimpleNamespace(sampling=SamplingSettings(fps=1.0, max_frames=30))
        self.looks: list[tuple[float, float, float, list[str]]] = []

    def look(self, start_s: Fraction, end_s: Fraction, sampling: Any, questions: list[str]) -> Any:
        assert sampling.max_frames is None
        self.looks.append((float(start_s), float(end_s), sampling.fps, questions))
        findings = []
        for question in questions:
            seen = [
                (max(start, float(start_s)), min(end, float(end_s)))
                for start, end in self.truth[question]
                if start < end_s and end > start_s
            ]
            findings.append(SimpleNamespace(spans=spans(*[(round(a, 1), round(b, 1)) for a, b in seen])))
        return SimpleNamespace(findings=findings)


def run(oracle: Oracle, found: dict[str, list[ScoredSpan]]) -> dict[str, list[ScoredSpan]]:
    questions = list(found)
    results = refine(oracle, questions, list(found.values()), Fraction(0), END, 1.0)  # type: ignore[arg-type]
    return dict(zip(questions, results, strict=True))


def test_boundaries_move_to_where_they_are_seen() -> None:
    oracle = Oracle({"a": [(10.3, 20.7), (40.2, 41.6)], "b": [(11.6, 60.0)]})
    found = run(oracle, {"a": spans((10.0, 21.0, 0.9), (40.0, 42.0, 0.8)), "b": spans((12.0, 60.0, 0.7))})
    assert found == {"a": spans((10.3, 20.7, 0.9), (40.2, 41.6, 0.8)), "b": spans((11.6, 60.0, 0.7))}
    # One look for the boundaries at 10 and 12, one for 21, one for 40 and 42; the clip's end is no boundary.
    assert oracle.looks == [(6, 14, 4, ["a", "b"]), (17, 25, 4, ["a"]), (36, 44, 4, ["a"])]


def test_a_boundary_that_is_not_seen_stays() -> None:
    oracle = Oracle({"a": [], "b": [(5.0, 60.0)]})
    before = {"a": spans((10.0, 21.0)), "b": spans((12.0, 30.0))}
    assert run(oracle, before) == before


def test_a_span_that_would_turn_around_stays() -> None:
    oracle = Oracle({"a": [(10.9, 12.0), (8.0, 10.4)]})
    found = run(oracle, {"a": spans((10.2, 11.0))})
    assert found["a"][0].start_s < found["a"][0].end_s


def test_a_boundary_moves_only_where_the_model_is_surer() -> None:
    boundary = Boundary(0, 0, True, 10.0, certainty=2.0)
    for certainty, expected in ((1.9, None), (2.0, 9.5), (5.0, 9.5)):
        seen = [ScoredSpan(9.5, 12.0, 0.9, (certainty, 9.0)), ScoredSpan(9.0, 9.2, 0.9, (9.0, 9.0))]
        assert nearest_boundary(boundary, seen, 6.0, 14.0, 2.0) == expected
    # An answer that was not constrained says nothing of itself: what is nearer is taken.
    assert nearest_boundary(Boundary(0, 0, True, 10.0), spans((9.5, 12.0)), 6.0, 14.0, 2.0) == 9.5
    found = [[ScoredSpan(1.0, 2.0, 0.5, (3.0, 4.0))]]
    assert [found.certainty for found in boundaries_of(found, 0.0, 9.0)] == [3.0, 4.0]


def test_nothing_found_costs_nothing() -> None:
    oracle = Oracle({"a": []})
    assert run(oracle, {"a": []}) == {"a": []}
    assert run(oracle, {"a": spans((0.0, 60.0))}) == {"a": spans((0.0, 60.0))}
    assert oracle.looks == []


def test_boundaries_are_those_inside() -> None:
    found = [spans((0.0, 4.0), (5.0, 59.95)), spans((3.0, 4.0))]
    assert [(b.query, b.span, b.is_start, b.time_s) for b in boundaries_of(found, 0.0, 60.0)] == [
        (1, 0, True, 3.0), (0, 0, False, 4.0), (1, 0, False, 4.0), (0, 1, True, 5.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("times", "end", "expected"),
    [
        ([59.0], 60.04, [(52, 60.04)]),
        ([10.2], 60, [(6, 14)]),
        ([1.0], 60, [(0, 8)]),
        ([59.0], 60, [(52, 60)]),
        ([2.0], 5, [(0, 5)]),
        ([10.0, 12.0, 12.1], 60, [(6, 14), (8, 16)]),
        ([53.0, 59.5], 60, [(49, 57), (52, 60)]),
        ([57.0, 59.5], 60, [(52, 60)]),
    ],
)
def test_neighbourhoods_by_hand(times: list[float], end: float, expected: list[tuple[float, float]]) -> None:
    boundaries = [Boundary(0, index, True, time_s) for index, time_s in enumerate(times)]
    places = neighbourhoods(boundaries, Fraction(0), Fraction(str(end)))
    assert [(float(place.start_s), float(place.end_s)) for place in places] == expected
    assert [boundary for place in places for boundary in place.boundaries] == boundaries


@pytest.mark.parametrize(
    ("is_start", "expected"),
    [(True, 9.5), (False, 10.9)],
)
def test_the_nearest_of_the_same_kind(is_start: bool, expected: float) -> None:
    seen = spans((6.0, 8.0), (9.5, 10.9), (13.0, 14.0))
    assert nearest_boundary(Boundary(0, 0, is_start, 10.0), seen, 6.0, 14.0, 2.0) == expected
    # The ends of what was looked at are not boundaries, and what is far away is another event.
    assert nearest_boundary(Boundary(0, 0, is_start, 10.0), spans((6.0, 14.0)), 6.0, 14.0, 9.0) is None
    assert nearest_boundary(Boundary(0, 0, is_start, 10.0), spans((7.0, 13.0)), 6.0, 14.0, 2.0) is None
