"""probe(): sizes, kinds and the exact presentation time of every frame, on clips of many formats."""

from __future__ import annotations

import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from keyecli.errors import InputError
from keyecli.video.source import probe
from tests.video.conftest import corner_picture, numbered_picture

Clip = Callable[..., Path]


def decoded_times(path: Path) -> list[Fraction]:
    """Presentation times of all frames as a full decode gives them, the first at 0."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pts = [frame.pts for frame in container.decode(stream)]
        assert stream.time_base is not None
        return [(tick - pts[0]) * stream.time_base for tick in pts]  # type: ignore[operator]


FORMATS = {
    "b-frames.mp4": {"options": {"bf": "3"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264.mkv": {},
    "h264.ts": {},
    "h264.flv": {},
    "hevc.mp4": {"codec": "libx265"},
    "vp8.webm": {
        "codec": "libvpx",
        "options": {"deadline": "good", "cpu-used": "4", "auto-alt-ref": "1", "lag-in-frames": "16"},
    },
    "vp9.webm": {
        "codec": "libvpx-vp9",
        "options": {"deadline": "good", "cpu-used": "8", "lag-in-frames": "16"},
    },
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}, "format": "vob"},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "motion-jpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "motion-jpeg.mjpeg": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "lossless.mkv": {"codec": "ffv1", "pixel_format": "yuv420p10le"},
    "picture.gif": {"codec": "gif", "pixel_format": "rgb8"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_packet_times_are_the_decoded_frames_times(clip: Clip, name: str) -> None:
    info = probe(clip(name, **FORMATS[name]))
    assert len(info.frame_times) == 50
    assert list(info.frame_times) == decoded_times(info.path)
    assert info.matching == "pts"
    assert (info.width, info.height) == (160, 96)
    assert info.kind == ("animation" if name.endswith(".gif") else "video")
    assert info.truncated_at_s is None
    assert abs(info.duration_s - 2) <= Fraction(1, 40)
    assert abs(float(info.average_rate) - 25) < 0.2


@pytest.mark.parametrize("name", ["h264.avi", "raw.h264", "raw.hevc"])
def test_packets_that_cannot_tell_are_decoded(clip: Clip, name: str) -> None:
    """AVI stores decoding times only, raw streams none at all: the decoder's order and the rate are used."""
    info = probe(clip(name, codec="libx265" if name.endswith("hevc") else "libx264"))
    assert info.matching == "order"
    assert [round(time * 25, 6) for time in info.frame_times] == list(range(50))
    assert info.duration_s == 2


def test_variable_rate(clip: Clip) -> None:
    """Times grow apart; an index divided by the average rate would be wrong by over half a second."""
    pts = [n * n for n in range(50)]
    for name in ("vfr.mp4", "vfr.mkv", "vfr.ts"):
        info = probe(clip(name, pts=pts, time_base=Fraction(1, 1000)))
        assert list(info.frame_times) == [Fraction(t, 1000) for t in pts]
        assert info.average_rate == Fraction(49 * 1000, 49 * 49)
    assert max(abs(t - n / info.average_rate) for n, t in enumerate(info.frame_times)) > 0.5


def test_start_is_subtracted(clip: Clip) -> None:
    for name in ("late.mp4", "late.mkv", "late.ts"):
        info = probe(clip(name, pts=[n + 137 for n in range(50)]))
        assert list(info.frame_times) == [Fraction(n, 25) for n in range(50)]
        assert info.start_pts > 0


def test_edit_list_cuts_the_beginning(clip: Clip) -> None:
    """Frames before time zero are in the file, but the edit list says not to show them."""
    info = probe(clip("edited.mp4", pts=[n - 10 for n in range(50)]))
    assert list(info.frame_times) == [Fraction(n, 25) for n in range(40)]
    assert decoded_times(info.path) == list(info.frame_times)


def test_joined_transport_streams(clip: Clip, tmp_path: Path) -> None:
    """Timestamps that start again are continued one frame later."""
    part = clip("part.ts").read_bytes()
    joined = tmp_path / "joined.ts"
    joined.write_bytes(part + part)
    info = probe(joined)
    assert info.matching == "order"
    assert list(info.frame_times) == [Fraction(n, 25) for n in range(100)]


def test_unknown_duration(clip: Clip) -> None:
    """A live WebM has no duration in its header."""
    path = clip(
        "live.webm",
        codec="libvpx-vp9",
        options={"deadline": "realtime", "cpu-used": "8"},
        container_options={"live": "1"},
    )
    with av.open(str(path)) as container:
        assert container.duration is None
    assert probe(path).duration_s == 2


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation(clip: Clip, degrees: int, flip: bool) -> None:
    def prepare(stream: Any) -> None:
        stream.set_display_rotation(-degrees, hflip=flip)  # PyAV counts counter-clockwise

    info = probe(clip("turned.mp4", 3, picture=lambda _: corner_picture(), prepare=prepare))
    assert (info.width, info.height) == ((96, 160) if degrees % 180 else (160, 96))
    assert (info.coded_width, info.coded_height) == (160, 96)
    assert info.mirrored == flip
    assert info.rotation_degrees in (degrees, (360 - degrees) % 360)


def test_pixel_aspect(clip: Clip) -> None:
    def prepare(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    info = probe(clip("anamorphic.mp4", 3, prepare=prepare))
    assert info.pixel_aspect == Fraction(4, 3)
    assert (info.width, info.height, info.coded_width) == (213, 96, 160)


def test_interlaced_flag(clip: Clip) -> None:
    assert probe(clip("interlaced.ts", options={"x264-params": "tff=1"})).interlaced
    assert not probe(clip("progressive.ts")).interlaced


def test_transfer(clip: Clip) -> None:
    for number, name in ((16, "pq"), (18, "hlg"), (1, "sdr")):

        def prepare(stream: Any, number: int = number) -> None:
            stream.codec_context.color_trc = number

        info = probe(clip(f"{name}.mp4", 3, codec="libx265", pixel_format="yuv420p10le", prepare=prepare))
        assert info.transfer == name


def test_the_largest_video_stream_is_taken_and_covers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream, (width, height) in zip(streams, [(64, 48), (160, 96)], strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(5):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(numbered_picture(number, stream.width, stream.height))
                frame.pts = number
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
        for stream in streams:
            container.mux(stream.encode())
    info = probe(path)
    assert (info.width, info.height, len(info.frame_times)) == (160, 96, 5)


def test_one_frame_of_a_video(clip: Clip) -> None:
    info = probe(clip("one.mp4", 1))
    assert (info.kind, list(info.frame_times), info.average_rate) == ("video", [0], 0)
    assert info.duration_s == Fraction(1, 25)


def test_odd_names(clip: Clip, tmp_path: Path) -> None:
    """Names that FFmpeg would take for a pattern or a protocol are plain files here."""
    for name in ("shot%03d.mp4", "a:b.mp4", "pipe:0.mp4", "-i.mp4"):
        path = clip("plain.mp4", 2).rename(tmp_path / name)
        assert len(probe(path).frame_times) == 2


def test_refused_inputs(tmp_path: Path, clip: Clip) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            probe(path)
        assert path.name in str(caught.value)

    refused(tmp_path / "missing.mp4", "does not exist")
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    refused(folder, "is a directory")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    refused(empty, "is empty")
    text = tmp_path / "text.mp4"
    text.write_text("This is not a video.\n" * 50)
    refused(text, "not a video or image")
    refused(text.rename(tmp_path / "notes.txt"), "not a video or image")
    sound = tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\1" * 8000)
    refused(sound, "sound but no pictures")
    whole = clip("whole.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    refused(cut, "cut off before its index")
    heic = tmp_path / "photo.heic"
    heic.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(100))
    refused(heic, "HEIC")


def test_a_playlist_does_not_reach_the_network(tmp_path: Path) -> None:
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(InputError):
        probe(playlist)
