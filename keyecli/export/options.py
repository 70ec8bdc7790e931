"""What the user may say about an export: rate, drop frame, start timecode, title; and the time base that follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from keyecli.errors import UsageError
from keyecli.export.timeline import Timeline
from keyecli.video.timecode import Timebase


@dataclass(frozen=True)
class ExportOptions:
    """Options of the exports that can use them; None is the clip's own, or the usual.

    rate: frames a second that timecode counts, in the place of the clip's own. drop_frame: None drops frame numbers at
    29.97 and its multiples only. start_timecode: the timecode of a clip's first frame, hh:mm:ss:ff or hh:mm:ss;ff.
    title: of the whole file; by default the clip's name.
    """

    rate: Fraction | None = None
    drop_frame: bool | None = None
    start_timecode: str | None = None
    title: str | None = None

    @property
    def asks_for_timecode(self) -> bool:
        """True when something was said that is about timecode alone."""
        return self.rate is not None or self.drop_frame is not None or self.start_timecode is not None

    def title_of(self, timelines: Sequence[Timeline]) -> str:
        """The title, else the name of the only clip, else that of the first and how many more there are."""
        if self.title is not None:
            return self.title
        more = len(timelines) - 1
        return timelines[0].name + (f" and {more} more" if more else "")

    def timebase(self, timelines: Sequence[Timeline]) -> tuple[Timebase, int]:
        """The one time base of all these clips, and the frame that the start timecode names, 0 without one.

        UsageError when the rate is not given and a clip has no constant one or two clips differ; when timecode
        cannot count the rate; for a start timecode that does not exist there.
        """
        timebase = Timebase.of(self.rate or _common_rate(timelines), self.drop_frame)
        return timebase, timebase.parse(self.start_timecode) if self.start_timecode is not None else 0


def _common_rate(timelines: Sequence[Timeline]) -> Fraction:
    for timeline in timelines:
        if timeline.rate is None:
            what = "has a variable frame rate" if len(timeline.frame_times) > 1 else "is a single picture"
            raise UsageError(
                f"{timeline.path} {what}, so it has no timecode of its own: give a rate, as in --rate 30"
            )
    rates = {timeline.rate: timeline for timeline in timelines if timeline.rate is not None}
    if len(rates) > 1:
        (_, one), (_, other) = list(rates.items())[:2]
        raise UsageError(
            f"{one.path} and {other.path} differ in frame rate: give one for both, as in --rate 30, "
            "or write a file for each into a folder"
        )
    return next(iter(rates))
