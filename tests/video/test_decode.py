"""decode_frames(): the frames given are those whose presentation times the plan asked for, upright and at its size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyecli.video import decode as decode_module
from keyecli.video.decode import FrameChunk, decode_frames
from keyecli.video.sampling import FrameBudget, SamplingPlan, SamplingSettings, plan_video
from keyecli.video.source import VideoInfo, probe
from tests.video.conftest import CORNERS, corner_picture, read_corners, read_number, write_clip

Clip = Callable[..., Path]


def every_frame(info: VideoInfo) -> SamplingPlan:
    return replace(plan_video(info, SamplingSettings()), times_s=tuple(info.frame_times))


def numbers_of(chunks: Iterator[FrameChunk]) -> list[int]:
    return [read_number(frame) for chunk in chunks for frame in chunk.frames]


FORMATS = {
    "b-frames.mp4": {"options": {"bf": "3"}},
    "h264.mkv": {},
    "h264.avi": {},
    "h264.ts": {},
    "raw.h264": {},
    "hevc.mp4": {"codec": "libx265"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "10", "crf": "12"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "motion-jpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "picture.gif": {"codec": "gif", "pixel_format": "rgb8"},
    "interlaced.ts": {"options": {"x264-params": "tff=1"}},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exact", [False, True])
def test_every_format_gives_the_planned_frames(clip: Clip, name: str, exact: bool) -> None:
    info = probe(clip(name, **FORMATS[name]))
    plan = plan_video(info, SamplingSettings(fps=5))
    chunks = list(decode_frames(info, plan, exact_resize=exact, chunk_frames=4))
    assert tuple(time for chunk in chunks for time in chunk.times_s) == plan.times_s
    assert numbers_of(iter(chunks)) == [round(time * 25) for time in plan.times_s]
    assert [len(chunk.times_s) for chunk in chunks] == [4, 4, 2]
    for chunk in chunks:
        assert chunk.frames.shape == (len(chunk.times_s), plan.height, plan.width, 3)
        assert chunk.frames.dtype == np.uint8
        assert chunk.frames.flags.c_contiguous
    assert numbers_of(decode_frames(info, every_frame(info), exact_resize=exact)) == list(range(50))


def test_variable_rate(clip: Clip) -> None:
    """The frame at a time is found by its timestamp, not by time x rate."""
    pts = [n * n for n in range(60)]
    info = probe(clip("vfr.mp4", 60, pts=pts, time_base=Fraction(1, 1000)))
    plan = plan_video(info, SamplingSettings())
    assert plan.frames == 7
    numbers = numbers_of(decode_frames(info, plan))
    assert [pts[number] for number in numbers] == [time * 1000 for time in plan.times_s]
    span = plan.times_s[-1]
    for step, time in enumerate(plan.times_s):
        target = span * step / 6
        assert abs(time - target) == min(abs(t - target) for t in info.frame_times)


def test_edit_list(clip: Clip) -> None:
    info = probe(clip("edited.mp4", pts=[n - 10 for n in range(50)]))
    assert numbers_of(decode_frames(info, every_frame(info))) == list(range(10, 50))


SEEKABLE = {
    "closed.mp4": {"options": {"g": "20"}},
    "open.mp4": {"options": {"g": "20", "bf": "3", "x264-params": "open-gop=1"}},
    "open-hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=20:open-gop=1"}},
    "late.mkv": {"options": {"g": "20"}, "pts": [n + 500 for n in range(300)]},
    "h264.ts": {"options": {"g": "20"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "20"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "20"}},
    "refresh.mp4": {"options": {"g": "20", "x264-params": "intra-refresh=1"}},
    "fragmented.mp4": {"options": {"g": "20"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
}


@pytest.mark.parametrize("name", SEEKABLE)
def test_seeking_gives_what_decoding_from_the_start_gives(
    clip: Clip, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures far in, and far apart, are bit for bit those of a full decode, wherever they lie between keyframes.

    In one sequence, as files are decoded whose structure does not tell enough; tests/video/test_stretches.py has the
    others.
    """
    monkeypatch.setattr(decode_module, "split_at_entries", lambda info, wanted: [])
    info = probe(clip(name, 300, **SEEKABLE[name]))
    size = plan_video(info, SamplingSettings())
    whole = [frame.copy() for chunk in decode_frames(info, every_frame(info)) for frame in chunk.frames]
    assert [read_number(frame) for frame in whole] == list(range(300))

    decoded = 0
    plain = decode_module.decode_packets

    def counting(*arguments: Any) -> Iterator[Any]:
        nonlocal decoded
        for frame in plain(*arguments):
            decoded += 1
            yield frame

    monkeypatch.setattr(decode_module, "decode_packets", counting)
    for wanted in ([199, 200, 201], [219, 221], [5, 110, 111, 240], [299], [0, 299]):
        plan = replace(size, times_s=tuple(info.frame_times[n] for n in wanted))
        decoded = 0
        pictures = [frame for chunk in decode_frames(info, plan) for frame in chunk.frames]
        assert [read_number(picture) for picture in pictures] == wanted
        for number, picture in zip(wanted, pictures, strict=True):
            np.testing.assert_array_equal(picture, whole[number])
        if name != "refresh.mp4":  # has a single keyframe
            assert decoded <= 110


def test_a_range_far_in(clip: Clip) -> None:
    info = probe(clip("clip.mp4", 300, options={"g": "25"}))
    plan = plan_video(info, SamplingSettings(start_s=Fraction(10), end_s=Fraction(11)))
    assert plan.times_s == (10, Fraction(263, 25), 11)
    assert numbers_of(decode_frames(info, plan)) == [250, 263, 275]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_rotation(clip: Clip, degrees: int, flip: bool, exact: bool) -> None:
    """The display matrix is applied: PyAV writes a rotation (counter-clockwise), then a mirroring."""

    def prepare(stream: Any) -> None:
        stream.set_display_rotation(-degrees, hflip=flip)

    info = probe(clip("turned.mp4", 3, picture=lambda _: corner_picture(), prepare=prepare))
    plan = plan_video(info, SamplingSettings())
    assert (plan.height > plan.width) == bool(degrees % 180)
    picture = next(decode_frames(info, plan, exact_resize=exact)).frames[0]
    expected = np.rot90(CORNERS, -degrees // 90)
    if flip:
        expected = expected[:, ::-1]
    assert read_corners(picture) == [[tuple(cell) for cell in row] for row in expected.tolist()]


def test_pixel_aspect(clip: Clip) -> None:
    def prepare(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    info = probe(clip("anamorphic.mp4", 3, prepare=prepare))
    plan = plan_video(info, SamplingSettings())
    assert abs(plan.width / plan.height - 320 / 96) < 0.4
    assert numbers_of(decode_frames(info, every_frame(info))) == [0, 1, 2]


def test_interlaced_frames_lose_their_combs(clip: Clip) -> None:
    """A bar moves between the two fields of a frame; after deinterlacing no row differs from its neighbours as fields do."""

    def woven(number: int) -> np.ndarray:
        # The bottom field, odd rows, is the earlier one: PyAV cannot mark frames as top field first.
        picture = np.full((96, 160, 3), 40, np.uint8)
        for parity in (0, 1):
            left = 8 * number + 4 * (1 - parity)
            picture[parity::2, left : left + 20] = 200
        return picture

    def combing(picture: np.ndarray) -> float:
        rows = picture.astype(np.int32).mean(axis=2)
        return float(np.abs(rows[1:-1] * 2 - rows[:-2] - rows[2:]).mean())

    options = {"crf": "4", "x264-params": "tff=1"}
    info = probe(clip("interlaced.mp4", 12, picture=woven, options=options))
    assert info.interlaced
    plan = replace(every_frame(info), height=96, width=160)
    chunk = next(decode_frames(info, plan))
    assert chunk.times_s == tuple(info.frame_times)
    for number in range(1, 11):
        assert combing(chunk.frames[number]) < combing(woven(number)) / 3
        bar = np.flatnonzero(chunk.frames[number][40:56].mean(axis=(0, 2)) > 120)
        assert abs(bar.mean() - (8 * number + 10)) < 3  # where the first field had it


def test_chunks(clip: Clip) -> None:
    info = probe(clip())
    plan = plan_video(info, SamplingSettings(fps=5))
    chunks = list(decode_frames(info, plan, chunk_frames=3))
    assert [len(chunk.frames) for chunk in chunks] == [3, 3, 3, 1]
    # A chunk that was kept is not overwritten by later ones.
    assert numbers_of(iter(chunks)) == [round(time * 25) for time in plan.times_s]
    with pytest.raises(ValueError, match="at least 1"):
        decode_frames(info, plan, chunk_frames=0)


def test_a_plan_of_another_file_is_refused(clip: Clip) -> None:
    info = probe(clip())
    plan = replace(plan_video(info, SamplingSettings()), times_s=(Fraction(1, 3),))
    with pytest.raises(ValueError, match="no frame"):
        list(decode_frames(info, plan))


def test_decoding_can_be_abandoned(clip: Clip) -> None:
    info = probe(clip())
    chunks = decode_frames(info, every_frame(info), chunk_frames=1)
    assert read_number(next(chunks).frames[0]) == 0
    chunks.close()  # type: ignore[attr-defined]


MEMORY_PROBE = """
import resource, sys
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import FrameBudget, SamplingSettings, plan_video
from keyecli.video.source import probe

info = probe(sys.argv[1])
plan = plan_video(info, SamplingSettings(fps=100, budget=FrameBudget(total_tokens=10**6)))
peaks, count = [], 0
for chunk in decode_frames(info, plan):
    count += len(chunk.times_s)
    if not peaks and count >= 300:
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(count, plan.height * plan.width * 3, *peaks)
"""


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """3300 frames of 150 KB pass through while the process stays within 24 MB of what 300 frames took."""
    path = write_clip(tmp_path / "long.mp4", 3300, size=(96, 64), options={"preset": "ultrafast", "g": "50"})
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    frames, frame_bytes, early_kb, final_kb = map(int, result.stdout.split())
    assert frames == 3300
    assert frames * frame_bytes > 450e6
    assert final_kb - early_kb < 24_000


def test_the_budget_is_what_comes_out(clip: Clip) -> None:
    info = probe(clip(size=(320, 192)))
    plan = plan_video(info, SamplingSettings(budget=FrameBudget(min_tokens=4, max_tokens=16)))
    chunk = next(decode_frames(info, plan))
    assert chunk.frames.shape[1] * chunk.frames.shape[2] <= 16 * 28 * 28
