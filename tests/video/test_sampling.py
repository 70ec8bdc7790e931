"""Frame counts, times, budgets and sizes on worked values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from keyecli.errors import InputError, UsageError
from keyecli.video.sampling import (
    FrameBudget,
    SamplingSettings,
    frame_token_budget,
    plan_image,
    plan_video,
    resize_to_budget,
)
from keyecli.video.source import FrameTimes, VideoInfo


def info_of(times: Sequence[Fraction | int], width: int = 640, height: int = 360) -> VideoInfo:
    """A video with frames at the given times in seconds."""
    ticks = [int(Fraction(time) * 90_000) for time in times]
    return VideoInfo(
        path=Path("clip.mp4"),
        kind="video",
        width=width,
        height=height,
        coded_width=width,
        coded_height=height,
        rotation_degrees=0,
        pixel_aspect=Fraction(1),
        codec="h264",
        pixel_format="yuv420p",
        interlaced=False,
        transfer="sdr",
        frame_times=FrameTimes(ticks, Fraction(1, 90_000)),
        duration_s=Fraction(times[-1]) + Fraction(1, 25),
        average_rate=Fraction(25),
    )


def steady(frames: int, rate: int = 25, **size: int) -> VideoInfo:
    return info_of([Fraction(i, rate) for i in range(frames)], **size)


def test_ten_seconds_give_twenty_one_frames() -> None:
    plan = plan_video(steady(251), SamplingSettings())
    # 0.5 s lies between the frames at 0.48 and 0.52, equally near: the later one is taken.
    assert plan.frames == 21
    assert (plan.times_s[0], plan.times_s[1], plan.times_s[2], plan.times_s[-1]) == (
        0,
        Fraction(13, 25),
        1,
        10,
    )
    assert plan.fps == 2.0


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "expected"),
    [
        (1, 25, 2.0, 1),  # all there is
        (2, 25, 2.0, 2),  # 0.04 s: still first and last
        (13, 25, 2.0, 2),  # 0.48 s: 1 + floor(0.96), raised to two
        (26, 25, 2.0, 3),  # exactly 1 s
        (25, 25, 2.0, 2),  # 0.96 s
        (11, 1, 2.0, 11),  # one frame a second: never above the video's own rate
        (101, 10, 30.0, 101),
        (301, 1, 0.1, 31),  # 0.1 means a tenth, not the binary fraction just above it
        (100_001, 25, 2.0, 2880),  # 184,320 / 64
    ],
)
def test_frame_count(frames: int, rate: int, fps: float, expected: int) -> None:
    plan = plan_video(steady(frames, rate), SamplingSettings(fps=fps))
    assert plan.frames == expected
    assert plan.times_s[0] == (0 if expected > 1 else plan.times_s[0])
    assert all(a < b for a, b in zip(plan.times_s, plan.times_s[1:], strict=False))


@pytest.mark.parametrize(("limit", "times"), [(3, (0, 5, 10)), (2, (0, 10)), (1, (5,))])
def test_max_frames(limit: int, times: tuple[int, ...]) -> None:
    assert plan_video(steady(251), SamplingSettings(max_frames=limit)).times_s == times


def test_variable_rate_takes_real_times_once() -> None:
    times = [Fraction(t, 10) for t in (0, 1, 2, 3, 40, 41, 100)]
    plan = plan_video(info_of(times), SamplingSettings())
    # Targets 0, 10/6, 20/6, 5, 40/6, 50/6, 10: the nearest real frames, repeats dropped.
    assert plan.times_s == (0, Fraction(3, 10), 4, Fraction(41, 10), 10)


def test_range() -> None:
    info = steady(251)
    plan = plan_video(info, SamplingSettings(start_s=Fraction(2), end_s=Fraction(4)))
    assert plan.times_s == (2, Fraction(63, 25), 3, Fraction(88, 25), 4)
    assert plan_video(info, SamplingSettings(start_s=Fraction(9))).times_s[-1] == 10
    assert plan_video(info, SamplingSettings(end_s=Fraction(3600))).frames == 21
    # Between two frames: the one on screen.
    assert plan_video(
        steady(5, 1), SamplingSettings(start_s=Fraction(5, 4), end_s=Fraction(7, 4))
    ).times_s == (1,)
    assert plan_video(info, SamplingSettings(start_s=Fraction(1001, 100))).times_s == (10,)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (5, 5, "is empty"),
        (5, 4, "is empty"),
        (None, 0, "is empty"),
        (-1, None, "before 0 s"),
        (11, None, r"part begins at 0:00:11.000, but clip.mp4 ends at 0:00:10.040"),
        (11, 20, "ends at 0:00:10.040"),
    ],
)
def test_refused_ranges(start: int | None, end: int | None, message: str) -> None:
    start_s, end_s = (None if time is None else Fraction(time) for time in (start, end))
    with pytest.raises(UsageError, match=message):
        plan_video(steady(251), SamplingSettings(start_s=start_s, end_s=end_s))


@pytest.mark.parametrize(
    ("n_frames", "tokens"),
    [
        (1, 256),
        (720, 256),
        (721, 256),
        (722, 256),
        (723, 255),
        (1000, 185),
        (2000, 93),
        (2836, 65),
        (2880, 65),
        (9999, 64),
    ],
)
def test_frame_token_budget(n_frames: int, tokens: int) -> None:
    assert frame_token_budget(n_frames, FrameBudget()) == tokens


@pytest.mark.parametrize(
    ("height", "width", "least", "most", "expected"),
    [
        (448, 448, 64, 256, (448, 448)),  # fits as it is
        (360, 640, 64, 256, (336, 588)),  # 13 x 23 = 299 tokens: / sqrt(230400 / 200704), floor
        (1080, 1920, 64, 256, (336, 588)),
        (1920, 1080, 64, 256, (588, 336)),
        (144, 176, 64, 256, (224, 252)),  # 5 x 6 tokens: x sqrt(50176 / 25344), ceil
        (1, 1, 64, 256, (224, 224)),
        (42, 70, 1, 256, (56, 56)),  # halves round to even: 1.5 and 2.5 are both 2
        (1, 200, 1, 256, (28, 196)),
        (10, 2000, 4, 50, (28, 1400)),  # one row thick, and length is cut to the limit
        (2000, 10, 4, 50, (1400, 28)),
        (4000, 6000, 4, 20_480, (3248, 4900)),
    ],
)
def test_resize_to_budget(height: int, width: int, least: int, most: int, expected: tuple[int, int]) -> None:
    assert resize_to_budget(height, width, least, most) == expected


def test_resize_stays_in_budget_and_keeps_the_aspect() -> None:
    for height in (1, 17, 100, 240, 719, 1080, 4320):
        for width in (20, 33, 180, 641, 1920, 7680):
            if max(height, width) > 200 * min(height, width):
                continue
            rows, columns = (side // 28 for side in resize_to_budget(height, width, 64, 256))
            assert rows * columns <= 256
            assert rows * 28 == resize_to_budget(height, width, 64, 256)[0]
            if max(height, width) <= 4 * min(height, width):
                assert rows * columns >= 64
                assert 0.8 < (columns / rows) / (width / height) < 1.25


def test_too_narrow_is_refused() -> None:
    with pytest.raises(InputError, match="narrower than 200:1"):
        resize_to_budget(10, 2001, 64, 256)


@pytest.mark.parametrize("frames", [700, 720, 721, 900, 1000, 1500, 2000, 2836, 2879, 2880, 5000])
@pytest.mark.parametrize("size", [(640, 360), (448, 448), (1920, 800), (300, 1000), (3000, 20)])
def test_the_true_total_is_never_exceeded(frames: int, size: tuple[int, int]) -> None:
    plan = plan_video(steady(frames, 2, width=size[0], height=size[1]), SamplingSettings())
    assert plan.tokens <= 184_320
    assert plan.frames == min(frames, 2880) or plan.tokens_per_frame > 64
    assert plan.tokens == plan.frames * plan.grid[0] * plan.grid[1]


def test_videos_share_the_total() -> None:
    info = steady(2001, 2, width=448, height=448)
    alone, shared = plan_video(info, SamplingSettings()), plan_video(info, SamplingSettings(), videos=2)
    assert alone.frames == 2001
    assert shared.frames == 92_160 // 64
    assert shared.tokens <= 92_160
    assert plan_video(steady(51), SamplingSettings(), videos=2).tokens_per_frame == 12 * 21


@pytest.mark.parametrize(
    ("span_s", "total"), [(100, 23_040), (256, 23_040), (257, 46_080), (1000, 92_160), (1025, 184_320)]
)
def test_adaptive_budget(span_s: int, total: int) -> None:
    info = steady(span_s * 2 + 1, 2, width=448, height=448)
    settings = SamplingSettings(budget=FrameBudget(adaptive=True))
    same = SamplingSettings(budget=FrameBudget(total_tokens=total))
    assert plan_video(info, settings) == plan_video(info, same)
    assert plan_video(info, settings).tokens <= total


def test_images() -> None:
    info = replace(info_of([0], width=6000, height=4000), kind="image")
    plan = plan_image(info, SamplingSettings())
    assert (plan.kind, plan.times_s, plan.height, plan.width, plan.fps) == ("image", (0,), 3248, 4900, 0.0)
    tiny = replace(info_of([0], width=1, height=1), kind="image")
    assert plan_image(tiny, SamplingSettings()).tokens == 4


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_refused_rates(fps: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        SamplingSettings(fps=fps)


def test_refused_limits() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        SamplingSettings(max_frames=0)
    with pytest.raises(UsageError, match="least <= most"):
        FrameBudget(min_tokens=300)
    with pytest.raises(UsageError, match="too few for one frame"):
        plan_video(steady(10), SamplingSettings(budget=FrameBudget(total_tokens=100)), videos=2)
