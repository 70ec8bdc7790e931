"""Reads and writes times: those that people type (seconds, m:ss, h:mm:ss), the parts they name, and editors' timecode."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from keyecli.errors import UsageError

MAX_RATE = 1000  # frames a second
# A rate as it is typed or rounded, 23.98 or 29.97, is this near to the one it stands for.
_TYPED_WITHIN = Fraction(1, 4000)
_DROP_UNIT = Fraction(30_000, 1001)  # drop frame is defined for this rate and its multiples

# ASCII digits only, so that "١:٠٠" is refused instead of being half understood.
_TIME = re.compile(r"(?:(?:([0-9]+):)?([0-9]+):)?([0-9]+(?:\.[0-9]+)?|\.[0-9]+)", re.ASCII)
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:/([0-9]{1,9}))?", re.ASCII)
_TIMECODE = re.compile(r"([0-9]{2}):([0-9]{2}):([0-9]{2})([:;])([0-9]{2,3})", re.ASCII)

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


def parse_rate(text: str) -> Fraction:
    """Frames a second from ``"25"``, ``"12.5"``, ``"30000/1001"``, or the usual rounding of such a rate, ``"29.97"``.

    UsageError for what is no rate, for 0 and above 1000.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None or (match[2] is not None and ("." in match[1] or not int(match[2]))):
        raise UsageError(f"{text!r} is not a frame rate; write 25, 29.97 or 30000/1001")
    rate = Fraction(match[1]) / int(match[2] or 1)
    if not 0 < rate <= MAX_RATE:
        raise UsageError(f"a frame rate is above 0 and at most {MAX_RATE}, and {text.strip()} is not")
    return rate if match[2] else nearest_rate(rate, _TYPED_WITHIN) or rate


def nearest_rate(rate: Fraction, within: Fraction) -> Fraction | None:
    """The nearest rate that timecode counts: whole, or 1000/1001 of a multiple of 15 or 24; None if none is near.

    `within` is a share of the rate; an exact rate is its own nearest.
    """
    whole = [Fraction(math.floor(rate)), Fraction(math.ceil(rate))]
    slowed = [
        Fraction(1000 * count, 1001)
        for count in (math.floor(rate), math.ceil(rate), math.ceil(rate) + 1)
        if count % 15 == 0 or count % 24 == 0
    ]
    near = [known for known in (*whole, *slowed) if known and abs(rate / known - 1) <= within]
    return min(near, key=lambda known: abs(rate - known), default=None)


def format_rate(rate: Fraction) -> str:
    """A rate as people write it: ``"25"``, ``"29.97"``, ``"23.976"``."""
    return f"{float(rate):.3f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Timebase:
    """A frame rate that timecode can count, hh:mm:ss:ff, or hh:mm:ss;ff where it drops frame numbers.

    Of 29.97 frames a second timecode counts 30, and would fall behind by 3.6 s an hour. Drop frame skips two
    numbers (four at 59.94) at the start of every minute but each tenth; no picture is dropped.
    """

    rate: Fraction
    drop_frame: bool

    @classmethod
    def of(cls, rate: Fraction, drop_frame: bool | None = None) -> Timebase:
        """The time base of a rate; without `drop_frame`, 29.97 and its multiples drop frames and the others do not.

        UsageError for a rate that is neither whole nor 1000/1001 of a whole one, and for drop frame where it is
        not defined.
        """
        if rate <= 0 or nearest_rate(rate, Fraction(0)) is None:
            raise UsageError(
                f"timecode cannot count {format_rate(rate)} frames a second: give a rate as 24, 25, 29.97 or 30"
            )
        can_drop = (rate / _DROP_UNIT).denominator == 1
        if drop_frame and not can_drop:
            raise UsageError(
                f"drop frame is for 29.97 and 59.94 frames a second, not for {format_rate(rate)}"
            )
        return cls(rate, can_drop if drop_frame is None else drop_frame)

    @property
    def nominal(self) -> int:
        """Frame numbers of a second: 30 of 29.97."""
        return math.ceil(self.rate)

    @property
    def day(self) -> int:
        """Frames until timecode begins again, 24 hours."""
        return 144 * self._frames_of_ten_minutes

    def format(self, frame: int) -> str:
        """The timecode of a frame, counted from 00:00:00:00; hours go on beyond 23."""
        number = frame + self._dropped_before(frame)
        seconds, frames = divmod(number, self.nominal)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        mark = ";" if self.drop_frame else ":"
        return f"{hours:02d}:{minutes:02d}:{seconds:02d}{mark}{frames:0{len(str(self.nominal - 1))}d}"

    def parse(self, text: str) -> int:
        """The frame that a timecode names, counted from 00:00:00:00; a colon will do before the frames of drop frame.

        UsageError for what is no timecode, for ";" where no frames are dropped, and for a number that is dropped.
        """
        match = _TIMECODE.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"{text!r} is not a timecode; write hh:mm:ss:ff, or hh:mm:ss;ff for drop frame")
        hours, minutes, seconds, frames = (int(match[group]) for group in (1, 2, 3, 5))
        if hours > 23 or minutes > 59 or seconds > 59 or frames >= self.nominal:
            raise UsageError(
                f"there is no timecode {text.strip()} at {format_rate(self.rate)} frames a second"
            )
        if match[4] == ";" and not self.drop_frame:
            raise UsageError(
                f"{text.strip()} is drop frame, and {format_rate(self.rate)} frames a second are counted without it"
            )
        if self.drop_frame and minutes % 10 and seconds == 0 and frames < self._dropped_a_minute:
            raise UsageError(f"there is no timecode {text.strip()}: drop frame leaves that number out")
        minutes += 60 * hours
        number = (60 * minutes + seconds) * self.nominal + frames
        return number - self._dropped_a_minute * (minutes - minutes // 10)

    @property
    def _dropped_a_minute(self) -> int:
        return self.nominal // 15 if self.drop_frame else 0

    @property
    def _frames_of_ten_minutes(self) -> int:
        return 600 * self.nominal - 9 * self._dropped_a_minute

    def _dropped_before(self, frame: int) -> int:
        """Frame numbers that were left out up to this frame."""
        tens, rest = divmod(frame, self._frames_of_ten_minutes)
        # The first of ten minutes is whole, the nine others are short.
        behind_first = rest - 60 * self.nominal
        short = 0 if behind_first < 0 else 1 + behind_first // (60 * self.nominal - self._dropped_a_minute)
        return self._dropped_a_minute * (9 * tens + short)
