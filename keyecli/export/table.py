"""Segments as a table, comma-separated, for spreadsheets and programs."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence

from keyecli.errors import KeyeWarning, UsageError
from keyecli.export.edits import frames_on
from keyecli.export.options import ExportOptions
from keyecli.export.text import score_text, writable
from keyecli.export.timeline import Timeline

COLUMNS = (
    "clip",
    "start_s",
    "end_s",
    "start_timecode",
    "end_timecode",
    "start_frame",
    "end_frame",
    "score",
    "title",
    "text",
)


def comma_separated(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """A line a segment, under a line of names: `COLUMNS`. Ends are exclusive.

    Frames are the clip's own, counted from 0. Timecode is empty, and a KeyeWarning says so, where a clip has no rate
    that timecode counts and none is given. An unknown score is empty. UsageError for a start timecode that does not
    exist.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for timeline in timelines:
        table.writerows(_rows(timeline, options))
    return text.getvalue()


def _rows(timeline: Timeline, options: ExportOptions) -> list[list[str]]:
    timecodes = _timecodes(timeline, options)
    return [
        [
            writable(str(timeline.path)),
            f"{segment.start_s:.3f}",
            f"{segment.end_s:.3f}",
            *timecode,
            *(str(frame) for frame in timeline.frames_of(segment)),
            "" if segment.score is None else score_text(segment.score),
            writable(segment.title),
            writable(segment.text),
        ]
        for segment, timecode in zip(timeline.segments, timecodes, strict=True)
    ]


def _timecodes(timeline: Timeline, options: ExportOptions) -> list[tuple[str, str]]:
    try:
        timebase, start = options.timebase([timeline])
    except UsageError as error:
        if options.asks_for_timecode:
            raise
        warnings.warn(KeyeWarning(f"{error}; the timecode columns are empty"), stacklevel=2)
        return [("", "")] * len(timeline.segments)
    spans = [frames_on(timebase.rate, timeline, segment) for segment in timeline.segments]
    return [(timebase.format(start + first), timebase.format(start + end)) for first, end in spans]
