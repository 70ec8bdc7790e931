"""Timelines of clips that need no file, at any rate, and titles that formats choke on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from keyecli.export.timeline import Segment, Timeline
from keyecli.video.sound import Sound
from keyecli.video.source import FrameTimes

NTSC = Fraction(30_000, 1001)
FILM = Fraction(24_000, 1001)
# One of these in each format tells whether its escaping is right.
TITLES = [
    "plain",
    "two\nlines and\ttab",
    "quotes \" and ' and `",
    "<b>bold</b> & <i>more</i> a<b",
    "red 红球 弹起来",
    "emoji 🎬👩‍🚀",
    "equals = semicolon ; hash # backslash \\N \\\\ {\\an8} {braces}",
    "00:00:01,000 --> 00:00:02,000",
    "-1 %s $x ]]> *",
    "",
    "   ",
    "nul \x00 bell \x07 escape \x1b[31m end",
    "broken \ud800 character",
    "line\u2028separator and \r\n windows",
    "# comment",
    "[CHAPTER]",
    "7",
]


def make_timeline(
    segments: Sequence[Segment] = (),
    *,
    rate: Fraction | int = 25,
    frames: int = 1000,
    path: str = "/clips/my clip.mp4",
    sound: Sound | None = None,
    times: FrameTimes | None = None,
) -> Timeline:
    """A clip that is on no disk: `frames` at `rate`, or frames at `times` (the last one lasts as long as the first)."""
    rate = Fraction(rate)
    times = times or FrameTimes(
        (rate.denominator * index for index in range(frames)), 1 / Fraction(rate.numerator)
    )
    duration = times[-1] + (times[1] if len(times) > 1 else 0)
    return Timeline(Path(path), float(duration), 640, 360, times, tuple(segments), sound)


def shown(titles: Sequence[str], step_s: float = 1.0) -> list[Segment]:
    """A segment of 0.5 s a title, each `step_s` after the one before."""
    return [Segment(index * step_s, index * step_s + 0.5, title) for index, title in enumerate(titles)]


@pytest.fixture
def variable() -> Timeline:
    """Two seconds at 30 and at 15 frames a second in turn, as phones record."""
    ticks = [0]
    while ticks[-1] < 240:
        ticks.append(ticks[-1] + (2 if (ticks[-1] // 60) % 2 == 0 else 4))
    return make_timeline([Segment(0.5, 1.5, "one")], times=FrameTimes(ticks, Fraction(1, 60)))


@pytest.fixture(autouse=True)
def no_stray_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """Libraries must not be given what they warn about; what keye itself says is for the test to expect."""
    from keyecli.errors import KeyeWarning

    yield
    assert [
        str(w.message) for w in recwarn if not issubclass(w.category, (KeyeWarning, DeprecationWarning))
    ] == []
