"""Rows of TimeLens-100K: a video with events, each a query and its spans, as questions and answers of `keye ground`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from keyecli.training.data.turns import Turn
from keyecli.training.rows import RowError

_SAMPLING = ("fps", "max_frames", "min_pixels", "max_pixels", "total_pixels", "video_start", "video_end")


def events_of(row: Mapping[str, Any]) -> list[Any]:
    """The events of a row; of one that was taken apart before, its own. RowError when there is no list of them."""
    if "events" not in row:
        return [{"query": row["query"], "span": row["span"]}]
    events = row["events"]
    if not isinstance(events, list) or not events:
        raise RowError("events must be a list of objects with query and span")
    return events


def ground_turns(row: Mapping[str, Any], number: int) -> list[Turn]:
    """The question about an event, which is `keye ground`'s own, and its answer: spans in seconds, in order of time.

    Each event is a row by itself, as in the data set's own loader, so that no answer follows another one.
    """
    from keyecli.tasks.prompts import GROUND

    event = events_of(row)[number]
    if not isinstance(event, Mapping) or not isinstance(event.get("query"), str):
        raise RowError(f"event {number + 1} must have a query, which is text, and a span")
    # As the data set's own loader cleans it.
    query = " ".join(event["query"].split()).strip(". ")
    if not query:
        raise RowError(f"event {number + 1} has an empty query")
    video = {
        "type": "video",
        "video": row["video_path"],
        **{key: row[key] for key in _SAMPLING if key in row},
    }
    question = {"type": "text", "text": GROUND.replace("{query}", query)}
    return [Turn("user", [video, question]), Turn("assistant", spans_text(spans_of(event, number)))]


def spans_of(event: Mapping[str, Any], number: int) -> list[tuple[float, float]]:
    """The spans of an event, [start, end] or a list of such; RowError for anything else."""
    span = event.get("span")
    pairs: Any = [span] if _is_pair(span) else span
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise RowError(
            f"event {number + 1} has the span {json.dumps(span)}, and it must be [[start, end], …] in seconds"
        )
    return sorted((float(start), float(end)) for start, end in pairs)


def spans_text(spans: Sequence[tuple[float, float]]) -> str:
    """Spans as an answer writes them, with one decimal as the times that the model is given."""
    return json.dumps([[round(start, 1), round(end, 1)] for start, end in spans])


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in value)
    )
