"""Time spans in answers: reading `[[start, end], …]` and comparing spans with the truth."""

from __future__ import annotations

import json
from collections.abc import Sequence

Span = tuple[float, float]


def parse_spans(text: str) -> list[Span] | None:
    """Spans in seconds of an answer that is exactly a JSON list of [start, end] pairs; None when it is anything else.

    An empty list means that the event is not there. A pair that does not run forward makes the answer invalid.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, list):
        return None
    spans = []
    for pair in value:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(type(edge) in (int, float) for edge in pair)
        ):
            return None
        if not pair[0] < pair[1]:
            return None
        spans.append((float(pair[0]), float(pair[1])))
    return spans


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same time as ascending spans that neither overlap nor touch."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def temporal_iou(predicted: Sequence[Span], truth: Sequence[Span]) -> float:
    """Intersection over union of the time that each side covers, in [0, 1]; splitting a span changes nothing.

    Two empty sides agree: 1.
    """
    left, right = merged(predicted), merged(truth)
    if not left and not right:
        return 1.0
    shared = sum(
        max(0.0, min(a_end, b_end) - max(a_start, b_start))
        for a_start, a_end in left
        for b_start, b_end in right
    )
    total = sum(end - start for start, end in left) + sum(end - start for start, end in right) - shared
    return shared / total if total > 0 else 0.0
