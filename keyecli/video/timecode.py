"""Reads and writes the times people type: seconds, m:ss and h:mm:ss."""

from __future__ import annotations

import re
from fractions import Fraction

from keyecli.errors import UsageError

# ASCII digits only, so that "١:٠٠" is refused instead of being half understood.
_TIME = re.compile(r"(?:(?:([0-9]+):)?([0-9]+):)?([0-9]+(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII)


def parse_time(text: str) -> Fraction:
    """Seconds, exactly, from ``"75"``, ``"75.5"``, ``"1:15"`` or ``"1:02:03.250"``.

    Minutes and seconds behind a colon must be below 60. Raises UsageError for anything else, signs
    included.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not a time; write seconds (75.5), m:ss (1:15) or h:mm:ss (1:02:03.250)."
        )
    hours, minutes, seconds = match[1], match[2], Fraction(match[3])
    if (minutes is not None and seconds >= 60) or (hours is not None and int(minutes) >= 60):
        raise UsageError(f"{text!r} is not a time; minutes and seconds after a colon must be below 60.")
    return (int(hours or 0) * 60 + int(minutes or 0)) * 60 + seconds


def format_time(seconds: Fraction | float | int) -> str:
    """``h:mm:ss.mmm``, rounded to the nearest millisecond: 75.25 is ``"0:01:15.250"``."""
    milliseconds = round(abs(Fraction(seconds)) * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    sign = "-" if seconds < 0 and (hours or minutes or milliseconds) else ""
    return f"{sign}{hours}:{minutes:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"
