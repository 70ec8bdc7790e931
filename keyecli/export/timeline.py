"""What every export is given: a clip and the named parts of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from keyecli.video.sound import Sound, sound_of
from keyecli.video.source import FrameTimes, VideoInfo
from keyecli.video.timecode import nearest_rate

# Gaps between frames that differ no more than this are equal: containers round times to milliseconds.
_CONSTANT_WITHIN_S = Fraction(2, 1000)
_RATE_WITHIN = Fraction(1, 5000)  # a rate that a container writes rounded: 23.98, 2997/100
_RATE_WITHIN_AT_MOST = Fraction(1, 100)
_TOUCH_S = Fraction(
    1, 10_000
)  # a time this little behind a frame's own is that frame's: it was rounded when written


@dataclass(frozen=True)
class Segment:
    """A named part of a clip, [start_s, end_s) in seconds from the clip's first frame.

    title: one line. text: a longer description, "" for none. score: probability that the part is right, None if unknown.
    """

    start_s: float
    end_s: float
    title: str
    text: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Timeline:
    """A clip and its segments, ascending by start.

    frame_times: presentation times of all frames, seconds, the first is 0. duration_s includes the last frame's own
    time. width, height: display size in pixels. sound: None where the clip has none.
    """

    path: Path
    duration_s: float
    width: int
    height: int
    frame_times: Sequence[Fraction]
    segments: tuple[Segment, ...]
    sound: Sound | None = None

    @classmethod
    def of(cls, info: VideoInfo, segments: Sequence[Segment] = ()) -> Timeline:
        """The timeline of a probed clip. InputError when the file is not there any more."""
        ordered = tuple(sorted(segments, key=lambda segment: (segment.start_s, segment.end_s)))
        return cls(
            path=info.path,
            duration_s=float(info.duration_s),
            width=info.width,
            height=info.height,
            frame_times=info.frame_times,
            segments=ordered,
            sound=sound_of(info),
        )

    @property
    def name(self) -> str:
        """The clip's file name without folder and suffix."""
        return self.path.stem

    def frame_at(self, time_s: float) -> int:
        """Index of the first frame that is shown at `time_s` or later; the number of frames behind the last."""
        return bisect_left(self.frame_times, Fraction(time_s) - _TOUCH_S)

    def frames_of(self, segment: Segment) -> tuple[int, int]:
        """First frame of a segment and the one behind its last; at least one frame, and all of them in the clip."""
        return within_clip(
            self.frame_at(segment.start_s), self.frame_at(segment.end_s), len(self.frame_times)
        )

    @cached_property
    def rate(self) -> Fraction | None:
        """Frames a second where they are constant, None where they vary or there is one frame only."""
        ticks, unit_s = _ticks(self.frame_times)
        gaps = len(ticks) - 1
        if gaps < 1:
            return None
        span = ticks[-1] - ticks[0]
        allowed = math.floor(_CONSTANT_WITHIN_S / unit_s * gaps)
        if any(abs((tick - ticks[0]) * gaps - index * span) > allowed for index, tick in enumerate(ticks)):
            return None
        measured = Fraction(gaps) / (span * unit_s)
        # Both ends may be half a tick off, which matters in a short clip with coarse times.
        within = min(max(_RATE_WITHIN, Fraction(1, span)), _RATE_WITHIN_AT_MOST)
        return nearest_rate(measured, within) or measured


def within_clip(first: int, end: int, frames: int) -> tuple[int, int]:
    """[first, end) cut to `frames` frames, with one frame at least."""
    first = max(0, min(first, frames - 1))
    return first, max(first + 1, min(end, frames))


def _ticks(times: Sequence[Fraction]) -> tuple[Sequence[int], Fraction]:
    """Times as whole numbers of a unit in seconds."""
    if isinstance(times, FrameTimes):
        return times.ticks, times.time_base
    unit = math.lcm(*(time.denominator for time in times))
    return [int(time * unit) for time in times], Fraction(1, unit)
