"""Times as people type them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from keyecli.errors import UsageError
from keyecli.video.timecode import Timebase, format_time, parse_rate, parse_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("75", Fraction(75)),
        ("0", Fraction(0)),
        (" 75.5 ", Fraction(151, 2)),
        (".5", Fraction(1, 2)),
        ("1:15", Fraction(75)),
        ("01:15.1", Fraction(751, 10)),
        ("90:00", Fraction(5400)),
        ("1:02:03.250", Fraction(14893, 4)),
    ],
)
def test_parse_time(text: str, seconds: Fraction) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1e3", "1:60", "1:60:00", "1:2:3:4", "abc", "1:", ":30", "1.5:00", "nan", "١"]
)
def test_parse_time_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is not a time"):
        parse_time(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00.000"),
        (75.25, "0:01:15.250"),
        (Fraction(59_9996, 10_000), "0:01:00.000"),
        (Fraction(1, 3), "0:00:00.333"),
        (36_000, "10:00:00.000"),
        (-1.5, "-0:00:01.500"),
        (Fraction(-1, 10_000), "0:00:00.000"),
    ],
)
def test_format_time(seconds: Fraction | float, text: str) -> None:
    assert format_time(seconds) == text


def test_round_trip() -> None:
    assert parse_time(format_time(Fraction(3_723_250, 1000))) == Fraction(3_723_250, 1000)


NTSC = Fraction(30_000, 1001)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("25", Fraction(25)),
        (" 12.5 ", Fraction(25, 2)),
        ("30000/1001", NTSC),
        ("29.97", NTSC),
        ("29.9700", NTSC),
        ("59.94", 2 * NTSC),
        ("119.88", 4 * NTSC),
        ("23.976", Fraction(24_000, 1001)),
        ("23.98", Fraction(24_000, 1001)),
        ("14.985", NTSC / 2),
        ("30.0", Fraction(30)),
        ("29.9", Fraction(299, 10)),
        ("1000", Fraction(1000)),
    ],
)
def test_parse_rate(text: str, rate: Fraction) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "0", "0/1", "1/0", "-25", "1e2", "25 fps", "nan", "1001", "29.97/1", "1/2/3", "٢٥"]
)
def test_parse_rate_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="frame rate"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("rate", "frame", "timecode"),
    [
        (Fraction(25), 0, "00:00:00:00"),
        (Fraction(25), 25 * 3661 + 24, "01:01:01:24"),
        (Fraction(24_000, 1001), 24 * 3600, "01:00:00:00"),
        (NTSC, 1799, "00:00:59;29"),
        (NTSC, 1800, "00:01:00;02"),
        (NTSC, 17_981, "00:09:59;29"),
        (NTSC, 17_982, "00:10:00;00"),
        (NTSC, 107_892, "01:00:00;00"),  # an hour of it is 107,892 frames
        (2 * NTSC, 3599, "00:00:59;59"),
        (2 * NTSC, 3600, "00:01:00;04"),
        (2 * NTSC, 215_784, "01:00:00;00"),
        (4 * NTSC, 7200, "00:01:00;008"),
        (Fraction(120), 119, "00:00:00:119"),
        (Fraction(25), 25 * 3600 * 30, "30:00:00:00"),
    ],
)
def test_timecode(rate: Fraction, frame: int, timecode: str) -> None:
    assert Timebase.of(rate).format(frame) == timecode


@pytest.mark.parametrize("rate", [Fraction(24), NTSC, 2 * NTSC, Fraction(50)])
@pytest.mark.parametrize("drop_frame", [None, False])
def test_timecode_as_opentimelineio_counts_it(rate: Fraction, drop_frame: bool | None) -> None:
    opentime = pytest.importorskip("opentimelineio").opentime
    timebase = Timebase.of(rate, drop_frame)
    for frame in range(0, int(rate * 3600 * 3), 997):
        theirs = opentime.to_timecode(
            opentime.RationalTime(frame, float(rate)), float(rate), timebase.drop_frame
        )
        assert timebase.format(frame) == theirs
        assert timebase.parse(theirs) == frame


def test_drop_frame_never_drifts_by_more_than_its_numbers() -> None:
    timebase = Timebase.of(NTSC)
    for frame in range(0, timebase.day, 8999):
        hours, minutes, seconds, frames = (
            int(part) for part in timebase.format(frame).replace(";", ":").split(":")
        )
        clock = (hours * 60 + minutes) * 60 + seconds + Fraction(frames, 30)
        assert abs(clock - frame / NTSC) < Fraction(3, 20)  # 0.086 s by the end of the day, and two numbers


@pytest.mark.parametrize(
    ("rate", "text", "said"),
    [
        (Fraction(25), "1:00:00:00", "is not a timecode"),
        (Fraction(25), "01:00:00", "is not a timecode"),
        (Fraction(25), "01:00:00.00", "is not a timecode"),
        (Fraction(25), "-01:00:00:00", "is not a timecode"),
        (Fraction(25), "24:00:00:00", "there is no timecode"),
        (Fraction(25), "00:60:00:00", "there is no timecode"),
        (Fraction(25), "00:00:60:00", "there is no timecode"),
        (Fraction(25), "00:00:00:25", "there is no timecode"),
        (Fraction(25), "00:00:00;01", "is drop frame"),
        (NTSC, "00:01:00;00", "leaves that number out"),
        (NTSC, "00:59:00:01", "leaves that number out"),
        (2 * NTSC, "00:01:00;03", "leaves that number out"),
    ],
)
def test_timecode_refuses(rate: Fraction, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Timebase.of(rate).parse(text)


def test_a_colon_will_do_for_drop_frame() -> None:
    assert Timebase.of(NTSC).parse("00:01:00:02") == 1800
    assert Timebase.of(NTSC).parse("00:10:00;00") == 17_982


@pytest.mark.parametrize("rate", [Fraction(25, 2), Fraction(299, 10), Fraction(0)])
def test_rates_that_timecode_cannot_count(rate: Fraction) -> None:
    with pytest.raises(UsageError, match="timecode cannot count"):
        Timebase.of(rate)


def test_drop_frame_where_it_is_defined() -> None:
    assert [
        Timebase.of(rate).drop_frame for rate in (NTSC, 2 * NTSC, Fraction(30), Fraction(24_000, 1001))
    ] == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(UsageError, match=r"drop frame is for 29\.97 and 59\.94 frames a second, not for 30"):
        Timebase.of(Fraction(30), drop_frame=True)
