"""Times as people type them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from keyecli.errors import UsageError
from keyecli.video.timecode import format_time, parse_time


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
