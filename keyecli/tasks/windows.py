"""Clips that are searched in overlapping windows: where the windows lie, and one result out of their answers.

Of two windows that overlap, each is believed in its own half of the overlap: there it sees what comes before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

# The share of a window that the next one sees again.
OVERLAP_SHARE = Fraction(1, 4)
# Windows begin on this grid, in seconds, so that their own times are round in the clip's times too.
GRID_S = Fraction(1, 2)


@dataclass(frozen=True)
class Window:
    """A part of the clip that is looked at at once, and the part of it in which it is believed; in seconds."""

    start_s: Fraction
    end_s: Fraction
    own_start_s: Fraction
    own_end_s: Fraction


@dataclass(frozen=True)
class ScoredSpan:
    """A span in seconds of the clip.

    score: the probability that it is right. certainty: log odds of its start and of its end. None where nothing is
    known of it.
    """

    start_s: float
    end_s: float
    score: float | None = None
    certainty: tuple[float, float] | None = None

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    def shared_s(self, other: ScoredSpan) -> float:
        """Seconds that both cover; 0 when they touch, negative when they are apart."""
        return min(self.end_s, other.end_s) - max(self.start_s, other.start_s)


def plan_windows(
    start_s: Fraction, end_s: Fraction, length_s: Fraction, offset_s: Fraction = Fraction(0)
) -> list[Window]:
    """Windows of `length_s` that cover the part from `start_s` to `end_s`, ascending; one where it is short enough.

    Each sees the last quarter of the one before again, the last two may share more. `offset_s` moves all but the first.
    """
    if end_s - start_s <= length_s:
        return [Window(start_s, end_s, start_s, end_s)]
    step = max(GRID_S, (length_s - length_s * OVERLAP_SHARE) // GRID_S * GRID_S)
    starts = [start_s]
    place = start_s + (offset_s % step or step)
    while starts[-1] + length_s < end_s:
        # The last window is a whole one too, and so it begins before its turn.
        last = start_s + -(-(end_s - length_s - start_s) // GRID_S) * GRID_S
        starts.append(min(place, last))
        place += step
    ends = [min(begin + length_s, end_s) for begin in starts]
    borders = [(begin + end) / 2 for begin, end in zip(starts[1:], ends, strict=False)]
    return [
        Window(begin, end, own_start, own_end)
        for begin, end, own_start, own_end in zip(
            starts, ends, [start_s, *borders], [*borders, end_s], strict=True
        )
    ]


def join_windows(windows: Sequence[Window], found: Sequence[Sequence[ScoredSpan]]) -> list[ScoredSpan]:
    """One list out of what was found in each window, in seconds of the clip, ascending.

    Every edge comes from the window that is believed there. Spans of neighbours that share time are the same event, cut
    at the border between them, and become one again. What reaches over a border to where the neighbour should have seen
    it and did not is kept as it is; all of a span, however, only when most of it lies where its own window is believed.
    """
    pieces: list[_Piece] = []
    for number, (window, spans) in enumerate(zip(windows, found, strict=True)):
        before = found[number - 1] if number else ()
        behind = found[number + 1] if number + 1 < len(windows) else ()
        for span in spans:
            own_start_s = max(span.start_s, float(window.own_start_s))
            own_end_s = min(span.end_s, float(window.own_end_s))
            seen_before = any(span.shared_s(other) > 0 for other in before)
            seen_behind = any(span.shared_s(other) > 0 for other in behind)
            start_s = own_start_s if seen_before else span.start_s
            end_s = own_end_s if seen_behind else span.end_s
            mostly_own = own_end_s - own_start_s >= span.length_s / 2
            if start_s < end_s and (seen_before or seen_behind or mostly_own):
                pieces.append(_Piece(start_s, end_s, number, span))
    joined: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (piece.start_s, piece.window)):
        last = joined[-1][-1] if joined else None
        if last and piece.window != last.window and piece.whole.shared_s(last.whole) > 0:
            joined[-1].append(piece)
        else:
            joined.append([piece])
    return [
        _united([replace(piece.whole, start_s=piece.start_s, end_s=piece.end_s) for piece in group])
        for group in joined
    ]


@dataclass(frozen=True)
class _Piece:
    """The part of a span that lies where its window is believed."""

    start_s: float
    end_s: float
    window: int
    whole: ScoredSpan


def mean_score(spans: Sequence[ScoredSpan]) -> float | None:
    """The mean of the scores, weighted by length; None when one is unknown."""
    total = 0.0
    for span in spans:
        if span.score is None:
            return None
        total += span.score * span.length_s
    return total / sum(span.length_s for span in spans)


def merge_near(spans: Sequence[ScoredSpan], gap_s: float) -> list[ScoredSpan]:
    """Spans that overlap, touch or lie at most `gap_s` apart become one, with the mean of their scores."""
    groups: list[list[ScoredSpan]] = []
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        # A little more than asked for, since 3.1 - 2.9 is not quite 0.2.
        if groups and span.start_s - max(before.end_s for before in groups[-1]) <= gap_s + 1e-6:
            groups[-1].append(span)
        else:
            groups.append([span])
    return [_united(group) for group in groups]


def _united(spans: Sequence[ScoredSpan]) -> ScoredSpan:
    """One span over all of them, which ascend by start; each edge is as sure as that of the span it comes from."""
    last = max(spans, key=lambda span: span.end_s)
    start, end = spans[0].certainty, last.certainty
    certainty = None if start is None or end is None else (start[0], end[1])
    return ScoredSpan(spans[0].start_s, last.end_s, mean_score(spans), certainty)


def suppress_overlaps(spans: Sequence[ScoredSpan], iou: float = 0.5) -> list[ScoredSpan]:
    """Non-maximum suppression: of two spans whose IoU is above `iou` the better one stays, the earlier of equals."""
    kept: list[ScoredSpan] = []
    for span in sorted(spans, key=lambda span: (-(span.score or 0.0), span.start_s, span.end_s)):
        if all(_iou(span, other) <= iou for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda span: (span.start_s, span.end_s))


def _iou(span: ScoredSpan, other: ScoredSpan) -> float:
    shared = max(0.0, span.shared_s(other))
    return shared / (span.length_s + other.length_s - shared)
