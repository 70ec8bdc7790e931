"""cut(): a clip that was cut out holds the frames, sound and subtitles of its span, at the times they had in the source."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

from keyecli.errors import InputError, KeyeError, KeyeWarning, UsageError
from keyecli.video import cut as cut_module
from keyecli.video.cut import CutClip, cut
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import SamplingSettings, plan_video
from keyecli.video.source import VideoInfo, probe
from tests.video.conftest import CORNERS, corner_picture, read_corners, read_number
from tests.video.movies import lag, read_cues, read_sound, write_movie

Clip = Callable[..., Path]


def pictures(info: VideoInfo) -> list[np.ndarray]:
    """Every frame of a file, decoded without a fault."""
    plan = replace(plan_video(info, SamplingSettings()), times_s=tuple(info.frame_times))
    return [frame for chunk in decode_frames(info, plan, strict=True) for frame in chunk.frames]


def numbers(info: VideoInfo) -> list[int]:
    return [read_number(picture) for picture in pictures(info)]


def within(info: VideoInfo, clip: CutClip) -> list[int]:
    """The frames of the source that the clip says it holds."""
    begin_s, end_s = (Fraction(time_s).limit_denominator(10**6) for time_s in (clip.start_s, clip.end_s))
    return [index for index, time_s in enumerate(info.frame_times) if begin_s <= time_s < end_s]


COPIED: dict[str, dict[str, Any]] = {
    "b-frames.mp4": {"options": {"g": "20", "bf": "3"}},
    "b-frames.mkv": {"options": {"g": "20", "bf": "3"}},
    "b-frames.mov": {"options": {"g": "20", "bf": "3"}},
    "open.mp4": {"options": {"g": "20", "bf": "3", "sc_threshold": "0", "x264-params": "open-gop=1"}},
    "open-hevc.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=20:open-gop=1"}},
    "late.mkv": {"options": {"g": "20"}, "pts": [n + 500 for n in range(100)]},
    "h264.ts": {"options": {"g": "20", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "20"}},
    "hidden.webm": {"codec": "libvpx", "options": {"cpu-used": "5", "g": "20", "auto-alt-ref": "1", "lag-in-frames": "9"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "20", "bf": "2"}},
    "h264.flv": {"options": {"g": "20", "bf": "2"}},
    "fragmented.mp4": {"options": {"g": "20"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "variable.mp4": {"options": {"g": "20", "bf": "2"}, "pts": [n * n // 4 for n in range(2, 102)],
                     "time_base": Fraction(1, 1000)},
}  # fmt: skip


@pytest.mark.parametrize("name", COPIED)
def test_a_copy_has_the_frames_of_the_source(clip: Clip, tmp_path: Path, name: str) -> None:
    """Bit for bit, from a keyframe on, without a gap, at the times they had in the source."""
    info = probe(clip(name, 100, **COPIED[name]))
    whole = pictures(info)
    end_s = info.duration_s
    for start, end in [(end_s / 4, end_s / 3), (Fraction(0), end_s / 5), (end_s * 3 / 4, end_s * 2)]:
        [made] = cut(info, [(start, end)], tmp_path / "out", overwrite=True)
        assert made.path.suffix == info.path.suffix
        expected = within(info, made)
        keyframes = [pts - info.start_pts for pts in info.keyframes.pts]
        assert info.frame_times.ticks[expected[0]] in keyframes
        assert 0 <= made.start_s <= start < end_s
        assert made.start_s == 0 or not any(
            made.start_s < float(k * info.frame_times.time_base) <= start for k in keyframes
        )
        assert min(float(end), float(end_s)) - 1e-4 <= made.end_s <= float(end) + 0.5

        copied = probe(made.path)
        first = info.frame_times[expected[0]]
        assert list(copied.frame_times) == [info.frame_times[index] - first for index in expected]
        assert float(copied.duration_s) == pytest.approx(made.end_s - made.start_s, abs=0.02)
        for picture, index in zip(pictures(copied), expected, strict=True):
            np.testing.assert_array_equal(picture, whole[index])
        with av.open(str(made.path)) as container:
            shown = [p.pts for p in container.demux(container.streams.video[0]) if p.pts is not None]
        # Nothing is stored that players would have to leave out: frames in front of the keyframe that need what is gone.
        assert min(shown) == shown[0]


def test_a_copy_begins_at_zero(clip: Clip, tmp_path: Path) -> None:
    for name in ("late.mkv", "b-frames.mp4"):
        [made] = cut(probe(clip(name, 100, **COPIED[name] | {"pts": None})), [(2, 3)], tmp_path)
        with av.open(str(made.path)) as container:
            assert container.start_time == 0
            assert container.streams.video[0].start_time == 0


def test_frames_that_an_edit_list_hides_are_told(clip: Clip, tmp_path: Path) -> None:
    """The keyframe that the first frames need was cut away by its author: the copy shows it, and says so."""
    info = probe(clip("edited.mp4", 60, options={"g": "20"}, pts=[n - 10 for n in range(60)]))
    [made] = cut(info, [(0, 1)], tmp_path)
    assert -10 / 25 <= made.start_s < 0
    copied = probe(made.path)
    assert numbers(copied)[0] == 10 + round(made.start_s * 25)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_subtitles_are_copied(tmp_path: Path, name: str) -> None:
    """Those on screen in the part, moved with it and cut at its edges."""
    cues = [
        (0.1, 0.7, "before"),
        (0.9, 2.0, "across the start"),
        (2.2, 2.4, "é 中"),
        (2.5, 3.9, "across the end"),
    ]
    write_movie(tmp_path / name, cues=cues)
    [made] = cut(probe(tmp_path / name), [(1.7, 2.7)], tmp_path / "out")
    assert (made.start_s, made.end_s) == (1.6, 2.72)
    assert read_cues(made.path) == [
        (0, 0.4, "across the start"),
        (0.6, 0.8, "é 中"),
        (0.9, 1.12, "across the end"),
    ]
    with av.open(str(made.path)) as container:
        assert [stream.metadata.get("language") for stream in container.streams][1:] == ["deu", "fra"]


SOUNDS: dict[str, dict[str, Any]] = {
    "aac.mp4": {},
    "mono.mp4": {"sound_rate": 44_100, "layout": "mono"},
    "pcm.mkv": {"sound": "pcm_s16le"},
    "aac.ts": {},
    "pcm.avi": {"sound": "pcm_s16le", "codec": "mpeg4"},
}


@pytest.mark.parametrize(
    ("name", "exact"), [*itertools.product(SOUNDS, [True]), *itertools.product([*SOUNDS][:-1], [False])]
)
def test_sound_stays_in_step(tmp_path: Path, name: str, exact: bool) -> None:
    rate = SOUNDS[name].get("sound_rate", 48_000)
    write_movie(tmp_path / name, **SOUNDS[name])
    info = probe(tmp_path / name)
    source_begin_s, source = read_sound(tmp_path / name)
    # Matroska rounds times to milliseconds, and so does mp4 the beginning of a track.
    tolerance_s = 0.0001 if exact and not name.endswith(".mkv") else 0.001
    for made in cut(info, [(1.3, 2.9), (0, 1)], tmp_path / "out", exact=exact):
        begin_s, part = read_sound(made.path)
        length = round((made.end_s - made.start_s) * rate)
        assert -1e-6 <= begin_s < 0.05
        assert abs(begin_s * rate + len(part) - length) <= 2 * 1024
        first = round((made.start_s + begin_s - source_begin_s) * rate)
        part, reference = part[max(0, -first) :], source[max(0, first) :]
        late = lag(part, reference)
        assert abs(late) <= tolerance_s * rate
        part, reference = part[max(0, late) :], reference[max(0, -late) :]
        inner = slice(1024, min(len(part), len(reference)) - 1024)
        assert np.corrcoef(part[inner], reference[inner])[0, 1] > (0.99 if exact else 0.9998)
        if exact:
            assert begin_s == pytest.approx(0, abs=1e-3)
            with av.open(str(made.path)) as container:
                audio = container.streams.audio[0]
                assert (audio.codec_context.name, audio.sample_rate) == ("aac", rate)
                assert audio.duration is not None
                assert audio.time_base is not None
                assert abs(audio.duration * audio.time_base * rate - length) <= 1


def test_a_gap_in_the_sound_is_silence(tmp_path: Path) -> None:
    write_movie(tmp_path / "gap.mkv", sound="pcm_s16le", silent=(1.5, 2.0))
    [made] = cut(probe(tmp_path / "gap.mkv"), [(1, 3)], tmp_path, exact=True)
    _, part = read_sound(made.path)
    loud = [
        float(np.abs(part[round(t * 48_000) : round((t + 0.1) * 48_000)]).mean()) for t in (0.3, 0.7, 1.2)
    ]
    assert loud[1] < 0.01 < 0.1 < min(loud[0], loud[2])


@pytest.mark.parametrize("name", ["quad.mkv", "odd-rate.mkv"])
def test_sound_that_aac_does_not_take_is_converted(tmp_path: Path, name: str) -> None:
    arguments: dict[str, Any] = {"layout": "quad"} if name == "quad.mkv" else {"sound_rate": 18_900}
    write_movie(tmp_path / name, 50, sound="pcm_s16le", **arguments)
    [made] = cut(probe(tmp_path / name), [(0.4, 1.6)], tmp_path, exact=True)
    with av.open(str(made.path)) as container:
        audio = container.streams.audio[0]
        assert (audio.channels, audio.sample_rate) == (2, 48_000)
    _, part = read_sound(made.path)
    assert abs(len(part) - 1.2 * 48_000) <= 1024
    assert np.abs(part).mean() > 0.05


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("exact", [False, True])
def test_orientation(clip: Clip, tmp_path: Path, degrees: int, exact: bool) -> None:
    """A copy keeps the display matrix, an encoded clip is stored upright; both look like the source."""
    source = clip(
        "turned.mp4",
        20,
        picture=lambda _: corner_picture(),
        prepare=lambda s: s.set_display_rotation(-degrees),
    )
    info = probe(source)
    [made] = cut(info, [(0.2, 0.6)], tmp_path, exact=exact)
    copied = probe(made.path)
    assert (copied.width, copied.height) == (info.width, info.height)
    assert copied.rotation_degrees == (0 if exact else degrees)
    assert read_corners(pictures(copied)[0]) == [
        [tuple(c) for c in row] for row in np.rot90(CORNERS, -degrees // 90)
    ]


@pytest.mark.parametrize("name", ["wide.mp4", "wide.mkv"])
def test_pixel_aspect(tmp_path: Path, name: str) -> None:
    write_movie(tmp_path / name, 30, sound=None, pixel_aspect=Fraction(4, 3))
    info = probe(tmp_path / name)
    assert (info.width, info.height) == (213, 96)
    [copied] = cut(info, [(0, 1)], tmp_path)
    [encoded] = cut(info, [(0, 1)], tmp_path / "exact", exact=True)
    assert (probe(copied.path).width, probe(copied.path).pixel_aspect) == (213, Fraction(4, 3))
    assert (probe(encoded.path).width, probe(encoded.path).pixel_aspect) == (212, 1)


ENCODED: dict[str, dict[str, Any]] = {
    "open.mp4": COPIED["open.mp4"],
    "h264.avi": {},
    "raw.h264": {},
    "vp9.webm": COPIED["vp9.webm"],
    "ntsc.mp4": {"rate": Fraction(30_000, 1001), "time_base": Fraction(1001, 30_000)},
    "variable.mp4": COPIED["variable.mp4"],
    "edited.mp4": {"options": {"bf": "2"}, "pts": [n - 10 for n in range(100)]},
    "picture.gif": {"codec": "gif", "pixel_format": "rgb8"},
}


@pytest.mark.parametrize("name", ENCODED)
def test_an_exact_cut_has_the_frames_of_the_span(clip: Clip, tmp_path: Path, name: str) -> None:
    """No frame more or less, at the times they had, the last one as long as it was shown."""
    info = probe(clip(name, 100, **ENCODED[name]))
    whole, all_numbers = pictures(info), numbers(info)
    for first, behind in [(40, 60), (0, 1), (len(whole) - 9, len(whole))]:
        ends = [*info.frame_times, info.duration_s]
        begin_s, end_s = ends[first], ends[behind]
        # Times are typed with three decimals at most.
        span = (round(float(begin_s), 3), round(float(end_s), 3))
        [made] = cut(info, [span], tmp_path / "out", exact=True, overwrite=True)
        assert made.path.suffix == ".mp4"
        assert made.start_s == pytest.approx(float(begin_s))
        assert made.end_s == pytest.approx(float(end_s), abs=1e-3)
        made_info = probe(made.path)
        assert (made_info.codec, made_info.pixel_format) == ("h264", "yuv420p")
        assert list(made_info.frame_times) == [time_s - begin_s for time_s in ends[first:behind]]
        assert float(made_info.duration_s) == pytest.approx(made.end_s - made.start_s, abs=1e-4)
        found = pictures(made_info)
        assert [read_number(picture) for picture in found] == all_numbers[first:behind]
        for picture, index in zip(found, range(first, behind), strict=True):
            assert np.abs(picture.astype(int) - whole[index]).mean() < 8
        with av.open(str(made.path)) as container:
            assert container.start_time == 0


def test_colours_survive_encoding(clip: Clip, tmp_path: Path) -> None:
    info = probe(clip("corners.mp4", 10, picture=lambda _: corner_picture(), options={"crf": "8"}))
    [made] = cut(info, [(0, 0.4)], tmp_path, exact=True)
    old, new = (pictures(i)[4].astype(int) for i in (info, probe(made.path)))
    assert np.abs(old - new).mean() < 1
    height, width, _ = old.shape
    for row in (height // 4, height * 3 // 4):
        for column in (width // 4, width * 3 // 4):
            assert np.abs(old[row, column] - new[row, column]).max() <= 3
    with av.open(str(made.path)) as container:
        context: Any = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )


def test_a_frame_that_is_shown_for_long_is_cut_in_time(clip: Clip, tmp_path: Path) -> None:
    """Slides: what is on screen in the span is in the clip, for as long as it is."""
    info = probe(clip("slides.mp4", 4, pts=[0, 3000, 7000, 9000], time_base=Fraction(1, 1000)))
    [one, two] = cut(info, [(1, 2.5), (2, 7.5)], tmp_path, exact=True)
    assert (one.start_s, one.end_s) == (1, 2.5)
    assert (numbers(probe(one.path)), float(probe(one.path).duration_s)) == ([0], 1.5)
    made = probe(two.path)
    assert (numbers(made), [float(t) for t in made.frame_times]) == ([0, 1, 2], [0, 1, 5])
    assert float(made.duration_s) == 5.5


def test_a_boundary_moves_to_the_frame_behind_it_when_that_is_near(clip: Clip, tmp_path: Path) -> None:
    """As editors count: the first frame that is shown at the time or later, the end not included."""
    info = probe(clip("clip.mp4", 50))
    [made] = cut(info, [(0.41, 0.79)], tmp_path, exact=True)
    assert (made.start_s, made.end_s) == (0.44, 0.8)
    assert numbers(probe(made.path)) == list(range(11, 20))
    [short] = cut(info, [(0.41, 0.415)], tmp_path, exact=True)
    assert numbers(probe(short.path)) == [11]


def test_odd_sizes_become_even(clip: Clip, tmp_path: Path) -> None:
    info = probe(clip("odd.gif", 10, codec="gif", pixel_format="rgb8", size=(161, 97)))
    [made] = cut(info, [(0, 0.3)], tmp_path, exact=True)
    assert (probe(made.path).width, probe(made.path).height) == (160, 96)


def test_an_animation_of_pillow(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (64, 48), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=[200, 300, 500], lossless=True
    )
    [made] = cut(probe(tmp_path / "a.webp"), [(0.2, 1)], tmp_path, exact=True)
    info = probe(made.path)
    assert [float(time_s) for time_s in info.frame_times] == [0, 0.3]
    assert [int(picture[24, 32].argmax()) for picture in pictures(info)] == [1, 2]


def test_a_file_that_ends_early(clip: Clip, tmp_path: Path) -> None:
    whole = clip("whole.ts", 100, options={"g": "20", "bf": "2"})
    cut_off = tmp_path / "cut-off.ts"
    cut_off.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    info = probe(cut_off)
    [made] = cut(info, [(1, 30)], tmp_path)
    assert made.end_s == float(info.duration_s)
    assert numbers(probe(made.path)) == within(info, made)


def test_subtitles_are_missed_in_an_exact_cut(tmp_path: Path) -> None:
    write_movie(tmp_path / "a.mp4", 30, sound=None, cues=[(0, 1, "text")])
    with pytest.warns(
        KeyeWarning, match=r"^the subtitles of a\.mp4 are left out: only a cut without --exact keeps them$"
    ):
        cut(probe(tmp_path / "a.mp4"), [(0, 1)], tmp_path, exact=True)


REFUSED: dict[str, dict[str, Any]] = {
    "raw.h264": {},
    "picture.gif": {"codec": "gif", "pixel_format": "rgb8"},
    "h264.avi": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_copied_says_exact(clip: Clip, tmp_path: Path, name: str) -> None:
    info = probe(clip(name, 30, **REFUSED[name]))
    with pytest.raises(UsageError, match=f"^{re.escape(name)} .* can only be cut with --exact$"):
        cut(info, [(0, 1)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_codec_that_the_container_does_not_take(clip: Clip, tmp_path: Path) -> None:
    wrong = clip("really.mkv", 30).rename(tmp_path / "named.webm")
    with pytest.raises(
        UsageError, match=r"^a webm file cannot hold the clip's video \(h264\); cut it with --exact$"
    ):
        cut(probe(wrong), [(0, 1)], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_still_image(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    for exact in (False, True):
        with pytest.raises(UsageError, match=r"^a\.png is a still image, of which no part can be cut out$"):
            cut(probe(tmp_path / "a.png"), [(0, 1)], tmp_path, exact=exact)


def test_without_an_encoder(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = probe(clip(frames=10))
    monkeypatch.setattr(av, "codecs_available", {"aac"})
    with pytest.raises(KeyeError, match="has no libx264 to encode with"):
        cut(info, [(0, 0.2)], tmp_path, exact=True)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((1.0, 1.0), "from 1 to 1 s of clip.mp4 is empty"),
        ((1.5, 0.5), "from 1.5 to 0.5 s of clip.mp4 is empty"),
        ((-1.0, 1.0), "from -1 to 1 s of clip.mp4 is empty: it must begin at 0 or later"),
        ((2.0, 3.0), "from 0:00:02.000 on lies behind the end of clip.mp4, which lasts 0:00:02.000"),
        ((0.0, float("nan")), "goes from 0.0 to nan, which are no times"),
        ((0.0, float("inf")), "which are no times"),
    ],
)
def test_bad_spans(clip: Clip, tmp_path: Path, span: tuple[float, float], message: str) -> None:
    info = probe(clip())
    with pytest.raises(UsageError, match=re.escape(message)):
        cut(info, [(0.0, 1.0), span], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names(clip: Clip, tmp_path: Path) -> None:
    """Safe for shells and file systems, and in the order of the spans."""
    info = probe(clip("-my clip: 'a' & $b/../é.mp4".replace("/", "_"), 100, options={"g": "10"}))
    made = cut(info, [(2, 3), (0.04, 0.5), (1, Fraction(4, 3))], tmp_path / "new" / "folder")
    assert [clip.path.name for clip in made] == [
        "my_clip_a_b_.._é_001_2.0-3.0.mp4",
        "my_clip_a_b_.._é_002_0.04-0.5.mp4",
        "my_clip_a_b_.._é_003_1.0-1.333.mp4",
    ]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        c.path.name for c in made
    ]
    long = info.path.rename(tmp_path / ("ü" * 120 + ".mp4"))
    [one] = cut(probe(long), [(0, 1)], tmp_path)
    assert one.path.name == "ü" * 50 + "_001_0.0-1.0.mp4"
    assert cut(info, [], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_files_that_are_there(clip: Clip, tmp_path: Path) -> None:
    info = probe(clip(options={"g": "10"}))
    present = tmp_path / "clip_002_1.0-2.0.mp4"
    present.write_text("precious")
    with pytest.raises(
        UsageError,
        match=r"clip_002_1\.0-2\.0\.mp4 exists; give another folder, or --overwrite to replace it$",
    ):
        cut(info, [(0, 1), (1, 2)], tmp_path)
    assert present.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", present.name]
    cut(info, [(0, 1), (1, 2)], tmp_path, overwrite=True)
    assert len(probe(present).frame_times) >= 25
    with pytest.raises(UsageError, match=r"is a file; give a folder to write the clips into$"):
        cut(info, [(0, 1)], present)
    with pytest.raises(KeyeError, match=r"^cannot write .*Not a directory"):
        cut(info, [(0, 1)], present / "below")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, InputError("gone"), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("exact", [False, True])
def test_nothing_half_written(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, exact: bool
) -> None:
    """What was complete stays; of what was under way nothing is left, not even after an interruption."""
    info = probe(clip(options={"g": "10"}))
    function = "encode_part" if exact else "copy_part"
    original = getattr(cut_module, function)
    calls: list[Path] = []

    def failing(job: Any, path: Path, on_packet: Callable[[Fraction], None]) -> None:
        def stop(time_s: Fraction) -> None:
            if len(calls) == 2:
                raise error
            on_packet(time_s)

        calls.append(path)
        original(job, path, stop)

    monkeypatch.setattr(cut_module, function, failing)
    expected = KeyeError if isinstance(error, OSError) else error if isinstance(error, type) else type(error)
    with pytest.raises(expected) as caught:
        cut(info, [(0, 1), (1, 2)], tmp_path / "out", exact=exact)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip_001_0.0-1.0.mp4"]
    if isinstance(error, OSError):
        assert re.search(
            r"^cannot write .*clip_002.*: No space left on device; give another folder$", str(caught.value)
        )


@pytest.mark.parametrize("exact", [False, True])
def test_progress_counts_seconds(clip: Clip, tmp_path: Path, exact: bool) -> None:
    heard: list[tuple[str, int, int]] = []
    spans = [(0, 2), (2, 4)]
    cut(
        probe(clip(frames=100, options={"g": "50", "bf": "0", "sc_threshold": "0"})),
        spans,
        tmp_path,
        exact=exact,
        on_progress=lambda *a: heard.append(a),
    )
    assert heard == [("cutting", done, 4) for done in range(5)]
