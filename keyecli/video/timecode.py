"""Reads and writes the times people type: seconds, m:ss and h:mm:ss, and the parts of a clip that they name."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from keyecli.errors import UsageError

# ASCII digits only, so that "١:٠٠" is refused instead of being half understood.
_TIME = re.compile(r"(?:(?:([0-9]+):)?([0-9]+):)?([0-9]+(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII)

Time = str | float | Fraction
"""Seconds as a number, or text such as "75", "1:15" or "1:02:03.250"."""


def parse_time(text: str) -> Fraction:
    """Seconds, exactly, from ``"75"``, ``"75.5"``, ``"1:15"`` or ``"1:02:03.250"``.

    Minutes and seconds behind a colon must be below 60. Raises UsageError for anything else, signs
    included.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not a time; write seconds (75.5), m:ss (1:15) or h:mm:ss (1:02:03.250)"
        )
    hours, minutes, seconds = match[1], match[2], Fraction(match[3])
    if (minutes is not None and seconds >= 60) or (hours is not None and int(minutes) >= 60):
        raise UsageError(f"{text!r} is not a time; minutes and seconds after a colon must be below 60")
    return (int(hours or 0) * 60 + int(minutes or 0)) * 60 + seconds


def parse_span(
    start: Time | None, end: Time | None, duration: Time | None
) -> tuple[Fraction | None, Fraction | None]:
    """Begin and end in seconds of the part that --start and either --end or --duration name; None where it is open.

    UsageError for what is no time, for both of --end and --duration, and for a part with nothing in it.
    """
    if end is not None and duration is not None:
        raise UsageError("--end and --duration say the same thing: give one of them")
    start_s, end_s = _seconds("--start", start), _seconds("--end", end)
    length_s = _seconds("--duration", duration)
    if length_s is not None:
        end_s = (start_s or Fraction(0)) + length_s
    check_span(start_s, end_s)
    return start_s, end_s


def check_span(start_s: Fraction | None, end_s: Fraction | None) -> None:
    """UsageError unless the part begins at 0 s or later and ends behind its beginning."""
    begin_s = start_s or Fraction(0)
    if begin_s < 0:
        raise UsageError(f"a part cannot begin before 0 s, and {format_time(begin_s)} does")
    if end_s is not None and end_s <= begin_s:
        raise UsageError(
            f"the part from {format_time(begin_s)} to {format_time(end_s)} is empty: "
            "the end must come after the start"
        )


def _seconds(flag: str, value: Time | None) -> Fraction | None:
    if value is None:
        return None
    if isinstance(value, str):
        return parse_time(value)
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{flag} must be a time of 0 seconds or more, not {value}")
    # Through the shortest decimal spelling: 0.1 means one tenth, not its binary neighbour.
    return Fraction(str(value))


def format_time(seconds: Fraction | float | int) -> str:
    """``h:mm:ss.mmm``, rounded to the nearest millisecond: 75.25 is ``"0:01:15.250"``."""
    milliseconds = round(abs(Fraction(seconds)) * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    sign = "-" if seconds < 0 and (hours or minutes or milliseconds) else ""
    return f"{sign}{hours}:{minutes:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"
