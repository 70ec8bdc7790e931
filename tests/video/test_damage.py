"""Files that are cut off or damaged: what decodes is given, at its own times, and said once."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from keyecli.errors import InputError, KeyeWarning
from keyecli.video.decode import decode_frames
from keyecli.video.integrity import check_integrity
from keyecli.video.sampling import SamplingPlan, SamplingSettings, plan_video
from keyecli.video.source import VideoInfo, probe
from keyecli.video.timecode import parse_time
from tests.video.conftest import read_number

Clip = Callable[..., Path]


def every_frame(info: VideoInfo) -> SamplingPlan:
    return replace(plan_video(info, SamplingSettings()), times_s=tuple(info.frame_times))


def decode(path: Path, plan: SamplingPlan | None = None) -> tuple[list[Fraction], list[int], list[str]]:
    """Times, numbers drawn on the frames, and warnings; every frame unless there is a plan."""
    info = probe(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chunks = list(decode_frames(info, plan or every_frame(info)))
    assert all(w.category is KeyeWarning for w in caught)
    times = [time for chunk in chunks for time in chunk.times_s]
    numbers = [read_number(frame) for chunk in chunks for frame in chunk.frames]
    return times, numbers, [str(w.message) for w in caught]


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    shorter = path.with_stem("cut")
    shorter.write_bytes(data[: int(len(data) * share) | 1])  # never whole packets of 188 bytes
    return shorter


CUTTABLE = {
    "faststart.mp4": {"container_options": {"movflags": "faststart"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "10"}},
    "clip.mkv": {},
    "clip.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "clip.avi": {"codec": "mpeg4"},
    "clip.ts": {},
    "clip.gif": {"codec": "gif", "pixel_format": "rgb8"},
}


@pytest.mark.parametrize("name", CUTTABLE)
def test_cut_in_the_middle(clip: Clip, name: str) -> None:
    whole = clip(name, 100, **CUTTABLE[name])
    assert check_integrity(whole) == "whole"
    path = cut(whole, 0.6)
    assert check_integrity(path) == "cut"
    info = probe(path)
    assert info.truncated_at_s == info.duration_s
    assert 20 < len(info.frame_times) < 95

    times, numbers, messages = decode(path)
    assert times == list(info.frame_times)
    assert numbers == [round(time * 25) for time in times]
    assert len(messages) == 1
    assert "cut.mp4" in messages[0] or "cut." in messages[0]
    assert "can be read only up to 0:00:0" in messages[0]
    with pytest.raises(InputError, match="cut off"):
        list(decode_frames(info, every_frame(info), strict=True))


def test_whole_files_say_nothing(clip: Clip) -> None:
    for name in ("a.mp4", "a.mkv", "a.ts"):
        info = probe(clip(name))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list(decode_frames(info, every_frame(info), strict=True))


def damaged(path: Path, size: int = 1500) -> Path:
    """The same file with some bytes of its middle overwritten."""
    data = bytearray(path.read_bytes())
    noise = random.Random(1)
    middle = len(data) // 2
    data[middle : middle + size] = bytes(noise.randrange(256) for _ in range(size))
    path.write_bytes(data)
    return path


def doubtful(message: str) -> tuple[Fraction, Fraction]:
    """The stretch that a warning calls possibly wrong."""
    match = re.search(r"the picture may be wrong from (\S+) (?:up to (\S+)$|on$)", message)
    assert match is not None, message
    return parse_time(match[1]), parse_time(match[2]) if match[2] else Fraction(10**6)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_damaged_in_the_middle(clip: Clip, codec: str) -> None:
    """The frames that decode come with their own numbers and times; those that do not are never passed off as others."""
    keyframes = {
        "libx264": {"g": "20", "crf": "8"},
        "libx265": {"x265-params": "log-level=none:keyint=20:crf=4"},
    }[codec]
    path = damaged(clip("clip.mp4", 100, codec=codec, options=keyframes), 400)
    info = probe(path)
    assert (len(info.frame_times), info.truncated_at_s) == (100, None)
    times, numbers, messages = decode(path)
    assert set(times) < set(info.frame_times)
    assert times[:10] == list(info.frame_times)[:10]
    assert len(messages) == 1
    assert "of the 100 frames wanted cannot be decoded" in messages[0]
    first, last = doubtful(messages[0])
    assert last - first < 2
    clean = [(t, n) for t, n in zip(times, numbers, strict=True) if t < first or t >= last]
    assert len(clean) > 50
    assert [n for _, n in clean] == [round(t * 25) for t, _ in clean]
    with pytest.raises(InputError, match="is damaged"):
        list(decode_frames(info, every_frame(info), strict=True))


def wipe_pictures(path: Path, numbers: range) -> None:
    """Zero some pictures of a motion JPEG AVI, in which every picture stands alone, leaving the container whole."""
    data = bytearray(path.read_bytes())
    starts = [
        i
        for i in range(8, len(data) - 3)
        if data[i : i + 3] == b"\xff\xd8\xff" and data[i - 8 : i - 4] == b"00dc"
    ]
    for number in numbers:
        start = starts[number]
        size = int.from_bytes(data[start - 4 : start], "little")
        data[start : start + size] = bytes(size)
    path.write_bytes(data)


def motion_jpeg(clip: Clip, frames: int) -> Path:
    return clip("clip.avi", frames, codec="mjpeg", pixel_format="yuvj420p")


def test_a_damaged_frame_is_replaced_by_a_neighbour_with_its_own_time(clip: Clip) -> None:
    path = motion_jpeg(clip, 51)
    wipe_pictures(path, range(25, 26))
    plan = plan_video(probe(path), SamplingSettings(fps=5))
    assert plan.times_s[5] == 1
    times, numbers, messages = decode(path, plan)
    assert times == [*plan.times_s[:5], Fraction(24, 25), *plan.times_s[6:]]
    assert numbers == [round(time * 25) for time in times]
    assert len(messages) == 1
    assert (
        "1 of the 11 frames wanted cannot be decoded at 0:00:01.000 (1 replaced by the nearest good"
        in messages[0]
    )

    # With every frame wanted there is no neighbour left to take.
    times, numbers, messages = decode(path)
    assert numbers == [n for n in range(51) if n != 25]
    assert times == [Fraction(n, 25) for n in numbers]
    assert "1 left out" in messages[0]


def test_neighbours_of_a_longer_gap(clip: Clip) -> None:
    """Three wanted frames are lost: the good frame before the gap and the one behind it are used, once each."""
    path = motion_jpeg(clip, 51)
    wipe_pictures(path, range(18, 34))
    plan = plan_video(probe(path), SamplingSettings(fps=5))
    times, numbers, messages = decode(path, plan)
    assert numbers == [0, 5, 10, 15, 17, 34, 35, 40, 45, 50]
    assert times == [Fraction(n, 25) for n in numbers]
    assert "3 of the 11 frames wanted cannot be decoded between 0:00:00.800 and 0:00:01.200" in messages[0]
    assert "(2 replaced by the nearest good frame, at its own time, 1 left out)" in messages[0]


def test_an_end_that_does_not_decode(clip: Clip) -> None:
    """The container is whole but the last pictures are not: what decodes is given, and up to where is said."""
    path = motion_jpeg(clip, 50)
    wipe_pictures(path, range(40, 50))
    _, numbers, messages = decode(path)
    assert numbers == list(range(40))
    assert len(messages) == 1
    assert "can be decoded only up to 0:00:01.560, 10 of the 50 frames wanted are missing" in messages[0]


def test_lost_transport_packets(clip: Clip) -> None:
    path = clip("clip.ts", 100, options={"g": "25", "crf": "8"})
    data = path.read_bytes()
    middle = len(data) // 188 // 2 * 188
    path.write_bytes(data[:middle] + data[middle + 188 * 12 :])
    times, numbers, messages = decode(path)
    assert len(messages) == 1
    first, last = doubtful(messages[0])
    clean = [(t, n) for t, n in zip(times, numbers, strict=True) if t < first or t >= last]
    assert len(clean) > 50
    assert [n for _, n in clean] == [round(t * 25) for t, _ in clean]


def test_nothing_decodes(clip: Clip) -> None:
    path = motion_jpeg(clip, 5)
    info = probe(path)
    wipe_pictures(path, range(5))
    with pytest.raises(InputError, match="no picture that can be decoded"):
        probe(path)
    # The same when the file changes after it was planned.
    with pytest.raises(InputError, match="no picture that can be decoded"):
        list(decode_frames(info, every_frame(info)))
