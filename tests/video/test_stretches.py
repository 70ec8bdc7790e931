"""Decoding keyframe by keyframe without needless packets: bit for bit what decoding every frame in sequence gives."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from keyecli.errors import KeyeWarning
from keyecli.video import decode as decode_module
from keyecli.video import stretches as stretches_module
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import SamplingPlan, SamplingSettings, plan_video
from keyecli.video.scale import FrameScaler
from keyecli.video.source import VideoInfo, probe
from keyecli.video.stretches import split_at_entries
from tests.video.conftest import write_clip

FRAMES = 130

X265 = "log-level=none:keyint=30:"
STRUCTURES: dict[str, dict[str, Any]] = {
    "plain.mp4": {"options": {"preset": "medium", "g": "30"}},
    "pyramid-normal.mp4": {"options": {"g": "40", "bf": "7", "x264-params": "b-pyramid=normal:b-adapt=0:ref=5"}},
    "pyramid-strict.mkv": {"options": {"g": "40", "bf": "5", "x264-params": "b-pyramid=strict:b-adapt=0"}},
    "pyramid-none.mp4": {"options": {"g": "40", "bf": "5", "x264-params": "b-pyramid=none:b-adapt=0:direct=temporal"}},
    "open.mp4": {"options": {"g": "20", "bf": "3", "x264-params": "open-gop=1:b-adapt=0"}},
    "open.ts": {"options": {"g": "20", "bf": "5", "x264-params": "open-gop=1:b-adapt=0:b-pyramid=normal"}},
    "refresh.mp4": {"options": {"g": "30", "bf": "2", "x264-params": "intra-refresh=1"}},
    "refresh.ts": {"options": {"g": "30", "bf": "2", "x264-params": "intra-refresh=1"}},
    "no-b.mp4": {"options": {"g": "25", "bf": "0"}},
    "baseline.ts": {"options": {"g": "25", "profile": "baseline"}},
    "long.mp4": {"options": {"g": "1000", "sc_threshold": "0"}},
    "slices.mkv": {"options": {"g": "30", "bf": "3", "x264-params": "slices=4:slice-max-size=300"}},
    "matrices.mp4": {"options": {"g": "30", "bf": "3", "x264-params": "cqm=jvt"}},
    "ten-bit.mp4": {"pixel_format": "yuv420p10le", "options": {"g": "30", "bf": "3"}},
    "intra.mp4": {"options": {"g": "1"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": X265 + "open-gop=0:bframes=4"}},
    "hevc-open.mp4": {"codec": "libx265", "options": {"x265-params": X265 + "open-gop=1:bframes=6:b-adapt=0"}},
    "hevc-open.ts": {"codec": "libx265", "options": {"x265-params": X265 + "open-gop=1:bframes=3:b-pyramid=0"}},
    "hevc-radl.mp4": {"codec": "libx265", "options": {"x265-params": X265 + "open-gop=0:radl=2:bframes=4"}},
    "hevc-layers.mkv": {"codec": "libx265", "options": {"x265-params": X265 + "temporal-layers=3:bframes=7"}},
    "hevc-timed.mkv": {"codec": "libx265", "options": {"x265-params": X265 + "hrd=1:vbv-maxrate=900:vbv-bufsize=900:hash=1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "30"}},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "10", "crf": "30", "g": "32"}},
}  # fmt: skip

OTHERWISE: dict[str, dict[str, Any]] = {  # decoded in one sequence, as their structure does not tell enough
    "timed.mp4": {
        "options": {"g": "30", "x264-params": "nal-hrd=vbr:vbv-maxrate=900:vbv-bufsize=900:pic-struct=1"}
    },
    "interlaced.mp4": {"options": {"g": "30", "x264-params": "tff=1"}},
    "full-chroma.mp4": {"pixel_format": "yuv444p", "options": {"g": "30", "bf": "3"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
}


def moving_picture(number: int) -> np.ndarray:
    """uint8 RGB [96, 160, 3]: a texture that drifts, noise that stays, another texture after 77 frames."""
    shot, step = divmod(number, 77)
    texture = (
        np.random.default_rng(shot)
        .integers(0, 160, (16, 24, 3))
        .astype(np.float32)
        .repeat(16, 0)
        .repeat(16, 1)
    )
    noise = np.random.default_rng(number).integers(0, 12, (96, 160, 1))
    x, y = 2 * step % 200, step % 150
    return np.clip(texture[y : y + 96, x : x + 160] + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``clips(name)``: the clip of that name in STRUCTURES or OTHERWISE, written once."""
    folder = tmp_path_factory.mktemp("structures")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            arguments = (STRUCTURES | OTHERWISE)[name]
            write_clip(folder / name, FRAMES, picture=moving_picture, **arguments)
        return folder / name

    return get


def every_picture(info: VideoInfo, plan: SamplingPlan) -> dict[Fraction, np.ndarray]:
    """The definition: every packet decoded in sequence by one thread, every frame scaled."""
    scaler = FrameScaler(plan.height, plan.width)
    with av.open(str(info.path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return {
            (frame.pts - info.start_pts) * info.frame_times.time_base: scaler(frame).copy()
            for frame in container.decode(stream)
            if frame.pts is not None
        }


def plans_of(info: VideoInfo) -> Iterator[SamplingPlan]:
    for fps in (2, 7.3, 25):
        yield plan_video(info, SamplingSettings(fps=fps))
    yield plan_video(info, SamplingSettings(fps=3, start_s=Fraction("1.93"), end_s=Fraction("4.4")))
    size, picks = plan_video(info, SamplingSettings()), random.Random(0)
    for count in (1, 9):
        chosen = sorted(picks.sample(range(len(info.frame_times)), count))
        yield replace(size, times_s=tuple(info.frame_times[n] for n in chosen))


@pytest.mark.parametrize("name", [*STRUCTURES, *(n for n in OTHERWISE if n != "interlaced.mp4")])
def test_pictures_are_those_of_a_full_decode(clips: Callable[[str], Path], name: str) -> None:
    info = probe(clips(name))
    pictures = every_picture(info, plan_video(info, SamplingSettings()))
    assert len(pictures) == FRAMES
    for plan in plans_of(info):
        found = [
            (time_s, picture)
            for chunk in decode_frames(info, plan, strict=True)
            for time_s, picture in zip(chunk.times_s, chunk.frames, strict=True)
        ]
        assert tuple(time_s for time_s, _ in found) == plan.times_s
        for time_s, picture in found:
            np.testing.assert_array_equal(picture, pictures[time_s])


class Count:
    """Stands in for what reads a stream's references, and counts the packets that are needed and those that are not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.needed = self.needless = 0
        self._plain = stretches_module.references_of
        monkeypatch.setattr(stretches_module, "references_of", self.of)

    def of(self, stream: Any) -> Any:
        references = self._plain(stream)
        if references is not None:
            is_needed = references.is_needed

            def counting(data: bytes) -> bool:
                needed = is_needed(data)
                self.needed += needed
                self.needless += not needed
                return needed

            references.is_needed = counting  # type: ignore[method-assign]
        return references


def never(*_: Any) -> Iterator[Any]:
    raise AssertionError("decoded in one sequence")


@pytest.mark.parametrize("name", [*STRUCTURES, *OTHERWISE])
def test_what_is_decoded_in_stretches(
    clips: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files whose structure is understood never need the slower way; of B-frames, about those that are wanted are decoded."""
    info = probe(clips(name))
    plan = plan_video(info, SamplingSettings())
    pts = [int(time_s / info.frame_times.time_base) + info.start_pts for time_s in plan.times_s]
    count = Count(monkeypatch)
    stretches = split_at_entries(info, pts)
    if name in OTHERWISE:
        assert not stretches
        return
    assert len(stretches) == (1 if name.startswith(("refresh", "long")) else min(11, len(info.keyframes.pts)))
    assert [number for stretch in stretches for number in stretch.wanted] == pts
    for way in ("_quickly", "_plainly"):
        monkeypatch.setattr(decode_module._SampledVideo, way, never)
    assert sum(len(chunk.times_s) for chunk in decode_frames(info, plan)) == 11
    if name.split("-")[0] in ("plain.mp4", "pyramid", "open.mp4", "hevc"):
        assert count.needless > FRAMES * 0.3
    assert count.needed + count.needless <= FRAMES + 8  # leading pictures of an open group are read twice


def test_no_packet_behind_the_last_wanted_one(
    clips: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = probe(clips("plain.mp4"))
    size = plan_video(info, SamplingSettings())
    for number, most in ((0, 1), (30, 1), (33, 8), (59, 30)):
        count = Count(monkeypatch)
        plan = replace(size, times_s=(info.frame_times[number],))
        assert [chunk.times_s for chunk in decode_frames(info, plan)] == [plan.times_s]
        assert count.needed + count.needless <= most


def test_variable_rate_and_a_late_start(clips: Callable[[str], Path], tmp_path: Path) -> None:
    pts = [500 + n * n for n in range(90)]
    options = {"g": "20", "bf": "3"}
    path = write_clip(
        tmp_path / "vfr.mkv",
        90,
        pts=pts,
        time_base=Fraction(1, 1000),
        picture=moving_picture,
        options=options,
    )
    info = probe(path)
    plan = plan_video(info, SamplingSettings(fps=4))
    pictures = every_picture(info, plan)
    (found,) = [
        list(zip(c.times_s, c.frames, strict=True)) for c in decode_frames(info, plan, chunk_frames=99)
    ]
    assert tuple(time_s for time_s, _ in found) == plan.times_s
    for time_s, picture in found:
        np.testing.assert_array_equal(picture, pictures[time_s])


def marked(data: bytearray, path: Path, number: int) -> int:
    """Where the first slice of this frame (in decoding order) begins in an H.264 MP4 file of one slice a frame."""
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
        units = bytes(packet)
    place = 0
    while units[place + 4] & 31 not in (1, 5):
        place += 4 + int.from_bytes(units[place : place + 4], "big")
    return data.index(units) + place + 4


def test_a_reference_that_claims_to_be_none(
    clips: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flipped marks show in frame_num: the file is then decoded in sequence, with whatever that gives."""
    whole = clips("no-b.mp4")
    info = probe(whole)
    plan = plan_video(info, SamplingSettings())
    data = bytearray(whole.read_bytes())
    place = marked(data, whole, 40)
    assert data[place] & 0x60
    data[place] &= ~0x60
    path = tmp_path / "marked.mp4"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KeyeWarning)
        found = [frame for chunk in decode_frames(probe(path), plan) for frame in chunk.frames]
        monkeypatch.setattr(decode_module, "split_at_entries", lambda info, wanted: [])
        expected = [frame for chunk in decode_frames(probe(path), plan) for frame in chunk.frames]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["pyramid-normal.mp4", "open.ts", "hevc-open.mp4", "hevc.mp4", "slices.mkv"])
def test_damage_falls_back_to_decoding_in_sequence(
    clips: Callable[[str], Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures before the damage, and from the second keyframe behind it on, are those of the whole file."""
    whole = clips(name)
    info = probe(whole)
    plan = plan_video(info, SamplingSettings(fps=6))
    pictures = every_picture(info, plan)
    noise = random.Random(name)
    for trial in range(4):
        data = bytearray(whole.read_bytes())
        place = round(len(data) * noise.uniform(0.3, 0.6))
        data[place : place + 40] = bytes(noise.randrange(256) for _ in range(40))
        path = tmp_path / f"{trial}-{name}"
        path.write_bytes(data)
        damaged = probe(path)
        if list(damaged.frame_times) != list(info.frame_times):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KeyeWarning)
            chunks = list(decode_frames(damaged, plan))
        for chunk in chunks:
            for time_s, picture in zip(chunk.times_s, chunk.frames, strict=True):
                if not Fraction(1, 5) < time_s / info.duration_s < Fraction(9, 10):
                    np.testing.assert_array_equal(picture, pictures[time_s])


def test_closing_early_leaves_no_thread_and_no_open_file(clips: Callable[[str], Path]) -> None:
    info = probe(clips("plain.mp4"))
    plan = plan_video(info, SamplingSettings(fps=25))
    before = threading.active_count()
    for taken in (0, 1, 40):
        chunks = decode_frames(info, plan, chunk_frames=1)
        for _ in range(taken):
            next(chunks)
        chunks.close()  # type: ignore[attr-defined]
        assert threading.active_count() == before
    list(decode_frames(info, plan))
    assert threading.active_count() == before
