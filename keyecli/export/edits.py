"""Segments as edits: whole frames of clips at one rate, put one after another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from keyecli.errors import KeyeWarning
from keyecli.export.options import ExportOptions
from keyecli.export.text import one_line, title_of
from keyecli.export.timeline import Segment, Timeline, within_clip
from keyecli.video.timecode import Timebase

_HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Edit:
    """Frames [first, end) of clip number `clip`, counted from its first one, which stand at `record` in the whole."""

    clip: int
    segment: Segment
    title: str
    first: int
    end: int
    record: int

    @property
    def frames(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class EditList:
    """Edits one after another, without a gap, in the order of the clips and of their segments.

    frames: of each clip, at the list's rate. start: the frame that the start timecode names; the first frame of every
    clip has that timecode, and the first edit is recorded there.
    """

    title: str
    timebase: Timebase
    start: int
    clips: tuple[Timeline, ...]
    frames: tuple[int, ...]
    edits: tuple[Edit, ...]

    @property
    def duration(self) -> int:
        """Frames of all edits."""
        return sum(edit.frames for edit in self.edits)

    @classmethod
    def of(cls, timelines: Sequence[Timeline], options: ExportOptions) -> EditList:
        """All segments of all clips. A segment shorter than a frame becomes one frame long, and a KeyeWarning says so.

        UsageError as in `ExportOptions.timebase`.
        """
        timebase, start = options.timebase(timelines)
        edits: list[Edit] = []
        record = 0
        for clip, timeline in enumerate(timelines):
            for number, segment in enumerate(timeline.segments, 1):
                first, end = frames_on(timebase.rate, timeline, segment)
                edits.append(Edit(clip, segment, title_of(segment, number), first, end, record))
                record += end - first
            _tell_short(timeline, timebase.rate)
        return cls(
            title=one_line(options.title_of(timelines)) or "keye",
            timebase=timebase,
            start=start,
            clips=tuple(timelines),
            frames=tuple(clip_frames(timebase.rate, timeline) for timeline in timelines),
            edits=tuple(edits),
        )


def frames_on(rate: Fraction, timeline: Timeline, segment: Segment) -> tuple[int, int]:
    """First frame of a segment and the one behind its last, at a rate; at least one frame.

    At the clip's own rate these are its frames; at another, the nearest to the times.
    """
    if rate == timeline.rate:
        return timeline.frames_of(segment)
    first, end = (math.floor(Fraction(time_s) * rate + _HALF) for time_s in (segment.start_s, segment.end_s))
    return within_clip(first, end, clip_frames(rate, timeline))


def clip_frames(rate: Fraction, timeline: Timeline) -> int:
    """How many frames the whole clip has at a rate."""
    if rate == timeline.rate:
        return len(timeline.frame_times)
    return max(1, math.floor(Fraction(timeline.duration_s) * rate + _HALF))


def _tell_short(timeline: Timeline, rate: Fraction) -> None:
    frame_s = float(1 / rate)
    short = sum(segment.end_s - segment.start_s < 0.99 * frame_s for segment in timeline.segments)
    if short:
        parts = "a part of it is" if short == 1 else f"{short} parts of it are"
        warnings.warn(
            KeyeWarning(f"{timeline.path}: {parts} shorter than a frame and become one frame long"),
            stacklevel=3,
        )
