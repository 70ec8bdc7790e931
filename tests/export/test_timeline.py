"""A clip's rate, and which frames a segment holds."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from keyecli.errors import InputError
from keyecli.export.timeline import Segment, Timeline
from keyecli.video.sound import Sound
from keyecli.video.source import FrameTimes, probe
from tests.export.conftest import FILM, NTSC, make_timeline
from tests.video.conftest import write_clip


@pytest.mark.parametrize(
    "rate", [Fraction(25), NTSC, FILM, Fraction(60_000, 1001), Fraction(50), Fraction(25, 2)]
)
@pytest.mark.parametrize("frames", [2, 3, 100, 20_000])
def test_exact_times_give_the_exact_rate(rate: Fraction, frames: int) -> None:
    assert make_timeline(rate=rate, frames=frames).rate == rate


@pytest.mark.parametrize("rate", [Fraction(25), NTSC, Fraction(60)])
@pytest.mark.parametrize("frames", [50, 500, 20_000])
def test_times_rounded_to_milliseconds_give_the_rate_they_mean(rate: Fraction, frames: int) -> None:
    times = FrameTimes([round(1000 * index / rate) for index in range(frames)], Fraction(1, 1000))
    assert make_timeline(times=times).rate == rate


def test_few_rounded_times_give_a_rate_that_can_be_counted() -> None:
    """0, 33, 67, 100, 133 ms: 30.075 frames a second by measure, and no camera has that."""
    times = FrameTimes([0, 33, 67, 100, 133], Fraction(1, 1000))
    assert make_timeline(times=times).rate == 30


def test_times_that_vary_have_no_rate(variable: Timeline) -> None:
    assert variable.rate is None


def test_a_missing_frame_makes_the_rate_variable() -> None:
    ticks = [index for index in range(500) if index != 250]
    assert make_timeline(times=FrameTimes(ticks, Fraction(1, 25))).rate is None


def test_one_frame_has_no_rate() -> None:
    assert make_timeline(times=FrameTimes([0], Fraction(1, 25))).rate is None


@pytest.mark.parametrize(
    ("start", "end", "frames"),
    [
        (0.0, 1.0, (0, 25)),
        (0.04, 0.08, (1, 2)),
        (0.05, 0.09, (2, 3)),  # the first that begins inside, the first that begins behind
        (0.041, 0.042, (2, 3)),  # shorter than a frame
        (39.96, 40.0, (999, 1000)),  # up to the clip's end
        (39.99, 40.0, (999, 1000)),  # behind the last frame's beginning
        (39.0, 99.0, (975, 1000)),
        (0.1 + 0.2, 0.4, (8, 10)),
        (float(Fraction(7, 25)), float(Fraction(8, 25)), (7, 8)),
    ],
)
def test_frames_of_a_segment(start: float, end: float, frames: tuple[int, int]) -> None:
    assert make_timeline().frames_of(Segment(start, end, "")) == frames


@pytest.mark.parametrize("rate", [NTSC, FILM])
def test_every_frame_time_as_a_float_is_that_frame(rate: Fraction) -> None:
    timeline = make_timeline(rate=rate, frames=3000)
    for frame in range(0, 2999, 7):
        times = timeline.frame_times
        assert timeline.frames_of(Segment(float(times[frame]), float(times[frame + 1]), "")) == (
            frame,
            frame + 1,
        )


def test_frames_of_a_variable_clip_are_its_own(variable: Timeline) -> None:
    first, end = variable.frames_of(Segment(0.9, 1.2, ""))
    assert [float(time) for time in variable.frame_times[first:end]] == pytest.approx(
        [27 / 30, 28 / 30, 29 / 30, 1.0, 1.0 + 4 / 60, 1.0 + 8 / 60], abs=0.034
    )
    assert all(0.8999 <= time < 1.1999 for time in variable.frame_times[first:end])


def test_of_a_probed_clip(tmp_path: Path) -> None:
    info = probe(write_clip(tmp_path / "clip.mp4", 50))
    timeline = Timeline.of(info, [Segment(1.0, 2.0, "b"), Segment(0.5, 1.0, "a")])
    assert (timeline.rate, timeline.duration_s, timeline.name) == (25, 2.0, "clip")
    assert (timeline.width, timeline.height, timeline.sound) == (160, 96, None)
    assert [segment.title for segment in timeline.segments] == ["a", "b"]


def test_sound_is_found(tmp_path: Path) -> None:
    path = write_clip_with_sound(tmp_path / "loud.mp4")
    assert Timeline.of(probe(path)).sound == Sound(2, 48_000)


def test_a_clip_that_went_away(tmp_path: Path) -> None:
    info = probe(write_clip(tmp_path / "clip.mp4", 5))
    info.path.unlink()
    with pytest.raises(InputError, match=r"clip\.mp4 can no longer be read"):
        Timeline.of(info)


def write_clip_with_sound(path: Path) -> Path:
    """Ten frames and 0.4 s of stereo silence."""
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=25)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=48_000, layout="stereo")
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
        silence = av.AudioFrame.from_ndarray(
            np.zeros((2, 19_200), np.float32), format="fltp", layout="stereo"
        )
        silence.sample_rate = 48_000
        container.mux(sound.encode(silence))
        container.mux([*picture.encode(), *sound.encode()])
    return path
