"""Decides which frames of a video the model sees and at what size; pure functions, nothing is read here."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from keyecli.errors import InputError, UsageError
from keyecli.video.timecode import check_span, format_time

if TYPE_CHECKING:
    from keyecli.video.source import FrameTimes, VideoInfo

TOKEN_SIDE_PX = 28  # one merged token covers 2x2 patches of 14x14 pixels
MAX_ASPECT = 200

# The adaptive budget: (sampled span up to, in seconds; share of the total).
ADAPTIVE_SHARES = ((256, Fraction(1, 8)), (512, Fraction(1, 4)), (1024, Fraction(1, 2)))


@dataclass(frozen=True)
class FrameBudget:
    """How many merged tokens (28x28 pixels) a frame, all frames together, and a still image may take."""

    min_tokens: int = 64
    max_tokens: int = 256
    total_tokens: int = 184_320
    adaptive: bool = False
    image_min_tokens: int = 4
    image_max_tokens: int = 20_480

    def __post_init__(self) -> None:
        for low, high in ((self.min_tokens, self.max_tokens), (self.image_min_tokens, self.image_max_tokens)):
            if not 1 <= low <= high:
                raise UsageError(
                    f"a frame cannot take at least {low} and at most {high} tokens; use 1 <= least <= most"
                )


@dataclass(frozen=True)
class SamplingSettings:
    """What the user asked for: frames a second, limits, the part of the clip (seconds), the way of resizing.

    UsageError for a rate or a limit that is not positive, and for an empty or backward part.
    """

    fps: float = 2.0
    max_frames: int | None = None
    budget: FrameBudget = field(default_factory=FrameBudget)
    start_s: Fraction | None = None
    end_s: Fraction | None = None
    exact_resize: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise UsageError(f"frames a second must be a number above 0, not {self.fps}")
        if self.max_frames is not None and self.max_frames < 1:
            raise UsageError(f"the largest number of frames must be at least 1, not {self.max_frames}")
        check_span(self.start_s, self.end_s)


@dataclass(frozen=True)
class SamplingPlan:
    """Which frames to decode, at which size.

    `times_s` are presentation times of frames that exist in the file, in seconds from its first frame,
    strictly ascending, never empty; `height` and `width` are the pixels fed to the model, multiples of 28,
    upright; `fps` is the rate that came out, ``(frames − 1) / span`` (0 when there is one frame).
    """

    times_s: tuple[Fraction, ...]
    height: int
    width: int
    kind: Literal["video", "image"]
    fps: float

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.times_s)

    @property
    def grid(self) -> tuple[int, int]:
        """Merged token rows and columns of a frame."""
        return self.height // TOKEN_SIDE_PX, self.width // TOKEN_SIDE_PX

    @property
    def tokens_per_frame(self) -> int:
        """Merged tokens of one frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Merged tokens of all frames."""
        return self.frames * self.tokens_per_frame


def resize_to_budget(height: int, width: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Height and width (pixels, multiples of 28) nearest to the picture's own whose area is within the token budget.

    Both sides are rounded to the nearest multiple of 28. When that is too many tokens, the picture's own
    sides are divided by ``sqrt(area / largest)`` and rounded down; when too few, multiplied by
    ``sqrt(smallest / area)`` and rounded up. A side never falls below 28, and a picture so narrow that this
    alone would break the upper limit loses length instead. InputError above an aspect of 200:1.
    """
    if min(height, width) < 1:
        raise InputError(f"a picture of {width}x{height} pixels has no area")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"a picture of {width}x{height} pixels is narrower than {MAX_ASPECT}:1; crop it first"
        )
    side = TOKEN_SIDE_PX
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    area = height * width
    if rows * columns > max_tokens:
        shrink = math.sqrt(area / (max_tokens * side * side))
        rows = max(1, math.floor(height / shrink / side))
        columns = max(1, math.floor(width / shrink / side))
    elif rows * columns < min_tokens:
        grow = math.sqrt(min_tokens * side * side / area)
        rows, columns = math.ceil(height * grow / side), math.ceil(width * grow / side)
    if rows * columns > max_tokens:
        rows, columns = (rows, max_tokens // rows) if rows <= columns else (max_tokens // columns, columns)
    return rows * side, columns * side


def frame_token_budget(n_frames: int, budget: FrameBudget) -> int:
    """Token budget of each of `n_frames` frames that share ``budget.total_tokens``.

    The released binary search over [min_tokens, max_tokens] ends one above the largest budget with ``frames
    x budget <= total``, and never above max_tokens: 720 frames get 256 of 184,320, 1000 frames get 185,
    2880 frames get 65. Resizing rounds down, so the extra token seldom costs anything; plan_video() checks
    the true total.
    """
    largest = budget.total_tokens // max(1, n_frames)
    return max(budget.min_tokens, min(largest + 1, budget.max_tokens))


def plan_video(info: VideoInfo, settings: SamplingSettings, videos: int = 1) -> SamplingPlan:
    """The frames to take from a video or an animation when `videos` of them share the token total equally.

    Frames count as inside the range when ``start <= time <= end``; a range that holds no frame's time takes
    the frame on screen at its start. Over the `span` from the first to the last frame inside, ``n = 1 +
    floor(span x fps)``, never more than there are frames, at least 2, at most ``floor(total / min_tokens)``
    and max_frames. The n targets are evenly spaced, first and last frame included; each picks the nearest
    frame (the later one when two are equally near), none twice. A clip of 25 frames a second whose last
    frame is at 10.0 s gives 21 frames at 0.0, 0.5 ... 10.0.

    UsageError for a range that begins past the clip's end, or a total too small for one frame.
    """
    times = info.frame_times
    first, last = _frames_in_range(info, settings)
    span_s = times[last] - times[first]
    budget = settings.budget
    total = budget.total_tokens // max(1, videos)
    if budget.adaptive:
        total = int(total * next((share for limit, share in ADAPTIVE_SHARES if span_s <= limit), 1))
    budget = replace(budget, total_tokens=total)

    limit = total // budget.min_tokens
    if settings.max_frames is not None:
        limit = min(limit, settings.max_frames)
    if limit < 1:
        raise UsageError(
            f"{total} tokens a video are too few for one frame of {budget.min_tokens}; raise the total or name fewer videos"
        )
    available = last - first + 1
    # str() keeps 0.1 a tenth; the binary fraction nearest to it would lose a frame where span x fps is whole.
    wanted = 1 + math.floor(span_s * Fraction(str(settings.fps)))
    count = min(available, max(2, wanted), limit)

    def size(per_frame: int) -> tuple[int, int]:
        return resize_to_budget(info.height, info.width, min(budget.min_tokens, per_frame), per_frame)

    per_frame = frame_token_budget(count, budget)
    height, width = size(per_frame)
    if count * _tokens(height, width) > total:
        # The one token above the true limit did count.
        height, width = size(max(budget.min_tokens, min(budget.max_tokens, total // count)))
    if count * _tokens(height, width) > total:
        count = max(1, total // _tokens(height, width))
    picked = _evenly_spaced(times, first, last, count)
    return SamplingPlan(picked, height, width, "video", _rate(picked))


def plan_image(info: VideoInfo, settings: SamplingSettings) -> SamplingPlan:
    """The plan of a still image: one frame at time 0, `image_min_tokens` to `image_max_tokens` tokens."""
    budget = settings.budget
    height, width = resize_to_budget(
        info.height, info.width, budget.image_min_tokens, budget.image_max_tokens
    )
    return SamplingPlan((Fraction(0),), height, width, "image", 0.0)


def _frames_in_range(info: VideoInfo, settings: SamplingSettings) -> tuple[int, int]:
    """Indices of the first and the last frame inside the range the user asked for."""
    times, start_s, end_s = info.frame_times, settings.start_s, settings.end_s
    start_s = Fraction(0) if start_s is None else start_s
    if start_s > 0 and start_s >= max(info.duration_s, times[-1]):
        raise UsageError(
            f"the part begins at {format_time(start_s)}, but {info.path.name} ends at {format_time(info.duration_s)}"
        )
    first = bisect_left(times, start_s)
    last = len(times) - 1 if end_s is None else bisect_right(times, end_s) - 1
    if first > last:
        first = last = bisect_right(times, start_s) - 1
    return first, last


def _evenly_spaced(times: FrameTimes, first: int, last: int, count: int) -> tuple[Fraction, ...]:
    """`count` or fewer of times[first..last]: the nearest to evenly spaced targets; the middle one when count is 1."""
    ticks = times.ticks
    start, span = ticks[first], ticks[last] - ticks[first]
    # Targets are start + span * step / parts, kept whole by counting in parts of a tick.
    parts, steps = (2, range(1, 2)) if count == 1 else (count - 1, range(count))
    picked: list[int] = []
    for step in steps:
        target = start * parts + span * step
        index = bisect_left(ticks, -(-target // parts), first, last + 1)
        if index > first and target - ticks[index - 1] * parts < ticks[index] * parts - target:
            index -= 1
        if not picked or index > picked[-1]:
            picked.append(index)
    return tuple(times[index] for index in picked)


def _rate(times: Sequence[Fraction]) -> float:
    return float((len(times) - 1) / (times[-1] - times[0])) if len(times) > 1 else 0.0


def _tokens(height: int, width: int) -> int:
    return (height // TOKEN_SIDE_PX) * (width // TOKEN_SIDE_PX)
