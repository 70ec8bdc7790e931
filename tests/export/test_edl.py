"""Edit decision lists, read back by OpenTimelineIO's CMX 3600 adapter."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest

from keyecli.errors import KeyeWarning, UsageError
from keyecli.export.edl import reel_names
from keyecli.export.formats import render
from keyecli.export.options import ExportOptions
from keyecli.export.text import one_line
from keyecli.export.timeline import Segment, Timeline
from keyecli.video.sound import Sound
from tests.export.conftest import FILM, NTSC, TITLES, make_timeline, shown

otio: Any = pytest.importorskip("opentimelineio")
pytest.importorskip("otio_cmx3600_adapter")


def read(text: str, rate: Fraction | int = 25) -> Any:
    """The timeline. Hold it as long as its tracks are looked at: they go with it."""
    return otio.adapters.read_from_string(text, "cmx_3600", rate=float(rate))


def spans(timeline: Any) -> list[tuple[int, int]]:
    """(first, end) frames of each clip of the first track in its source."""
    track = timeline.tracks[0]
    ranges = [clip.source_range for clip in track.find_clips()]
    return [(round(r.start_time.value), round(r.end_time_exclusive().value)) for r in ranges]


def test_exact_text() -> None:
    segments = [Segment(1, 2.5, "ball", "it\nbounces", 0.875), Segment(2, 3, "red 红 🎬")]
    assert render([make_timeline(segments)], "edl") == (
        "TITLE: my clip\n"
        "FCM: NON-DROP FRAME\n"
        "\n"
        "001  MYCLIP   V     C        00:00:01:00 00:00:02:13 00:00:00:00 00:00:01:13\n"
        "* FROM CLIP NAME: my clip.mp4\n"
        "* COMMENT: ball\n"
        "* COMMENT: it bounces\n"
        "* SCORE: 0.875\n"
        "\n"
        "002  MYCLIP   V     C        00:00:02:00 00:00:03:00 00:00:01:13 00:00:02:13\n"
        "* FROM CLIP NAME: my clip.mp4\n"
        "* COMMENT: red 红 🎬\n"
    )


def test_titles_survive() -> None:
    timeline = read(render([make_timeline(shown(TITLES))], "edl", ExportOptions(title="a\nb")))
    assert timeline.name == "a b"
    (track,) = timeline.tracks
    assert [clip.name for clip in track] == ["my clip.mp4"] * len(TITLES)
    assert [list(clip.metadata["cmx_3600"]["comments"]) for clip in track] == [
        [f"COMMENT: {one_line(title) or f'Part {index + 1}'}"] for index, title in enumerate(TITLES)
    ]
    assert {clip.metadata["cmx_3600"]["reel"] for clip in track} == {"MYCLIP"}


@pytest.mark.parametrize(
    "rate", [Fraction(24), FILM, Fraction(25), NTSC, Fraction(30), Fraction(50), 2 * NTSC]
)
def test_an_hour_and_more(rate: Fraction) -> None:
    """Frames at minutes where numbers are dropped, at both sides of the hour, and at the clip's end."""
    frames = int(rate * 3700)
    minute = round(rate * 60)
    wanted = [(first, first + 3) for first in range(minute - 2, frames, minute)] + [(frames - 1, frames)]
    unit = float(1 / rate)
    segments = [Segment(first * unit, end * unit, "") for first, end in wanted]
    text = render([make_timeline(segments, rate=rate, frames=frames)], "edl")
    assert ("FCM: DROP FRAME" in text) == (rate in (NTSC, 2 * NTSC))
    assert spans(read(text, rate)) == wanted
    # One after another: the record side is without gaps.
    records = [line.split()[-2:] for line in text.splitlines() if re.match(r"\d{3} ", line)]
    assert records[0][0] in ("00:00:00:00", "00:00:00;00")
    assert [out for _, out in records[:-1]] == [begin for begin, _ in records[1:]]


def test_drop_frame_can_be_left_off() -> None:
    segment = Segment(60.06, 61.061, "a")
    lines = [
        render(
            [make_timeline([segment], rate=NTSC, frames=3000)], "edl", ExportOptions(drop_frame=drop)
        ).splitlines()
        for drop in (None, True, False)
    ]
    assert lines[0] == lines[1]
    assert (lines[0][1], lines[0][3][29:52]) == ("FCM: DROP FRAME", "00:01:00;02 00:01:01;02")
    assert (lines[2][1], lines[2][3][29:52]) == ("FCM: NON-DROP FRAME", "00:01:00:00 00:01:01:00")


def test_start_timecode_is_that_of_the_first_frame_and_of_the_first_cut() -> None:
    text = render([make_timeline([Segment(2, 3, "a")])], "edl", ExportOptions(start_timecode="10:00:00:00"))
    assert spans(read(text)) == [(900_050, 900_075)]
    assert "10:00:02:00 10:00:03:00 10:00:00:00 10:00:01:00" in text


def test_zero_segments() -> None:
    text = render([make_timeline()], "edl")
    assert text == "TITLE: my clip\nFCM: NON-DROP FRAME\n"
    assert len(read(text).tracks) == 0


def test_overlapping_spans_and_the_clips_end() -> None:
    segments = [
        Segment(1, 5, "a"),
        Segment(2, 3, "b"),
        Segment(39.96, 40, "end"),
        Segment(39.99, 40, "short"),
    ]
    with pytest.warns(KeyeWarning, match="a part of it is shorter"):
        text = render([make_timeline(segments)], "edl")
    assert spans(read(text)) == [(25, 125), (50, 75), (999, 1000), (999, 1000)]


def test_spans_shorter_than_a_frame_are_said_and_one_frame_long() -> None:
    segments = [Segment(1, 1.01, "a"), Segment(2, 2.04, "one frame"), Segment(3.001, 3.002, "b")]
    with pytest.warns(KeyeWarning, match="2 parts of it are shorter than a frame and become one frame long"):
        text = render([make_timeline(segments)], "edl")
    assert spans(read(text)) == [(25, 26), (50, 51), (76, 77)]


def test_variable_rate_wants_a_rate(variable: Timeline) -> None:
    with pytest.raises(UsageError, match=r"variable frame rate.*give a rate, as in --rate 30"):
        render([variable], "edl")
    text = render([variable], "edl", ExportOptions(rate=Fraction(30)))
    assert spans(read(text, 30)) == [(15, 45)]


def test_another_rate_takes_the_nearest_frames() -> None:
    text = render([make_timeline([Segment(1.01, 2.02, "a")])], "edl", ExportOptions(rate=Fraction(24)))
    assert spans(read(text, 24)) == [(24, 48)]


def test_as_many_events_as_there_are_numbers() -> None:
    segments = [Segment(index * 0.04, index * 0.04 + 0.04, "") for index in range(1000)]
    text = render([make_timeline(segments[:999])], "edl")
    assert "\n999  MYCLIP" in text
    assert len(spans(read(text))) == 999
    with pytest.raises(UsageError, match="an edl holds 999 events, and there are 1000"):
        render([make_timeline(segments)], "edl")


def test_timecode_ends_with_the_day() -> None:
    timeline = make_timeline([Segment(0, 40, "all")])
    assert "23:59:20:00 24:00:00:00" in render([timeline], "edl", ExportOptions(start_timecode="23:59:20:00"))
    with pytest.raises(UsageError, match="timecode ends at 24 hours"):
        render([timeline], "edl", ExportOptions(start_timecode="23:59:20:01"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ExportOptions(rate=Fraction(25, 2)), "timecode cannot count 12.5 frames a second"),
        (ExportOptions(rate=Fraction(120)), "no room to count 120 frames"),
        (ExportOptions(drop_frame=True), "drop frame is for 29.97 and 59.94 frames a second, not for 25"),
        (ExportOptions(start_timecode="01:00:00;00"), "01:00:00;00 is drop frame, and 25 frames"),
        (ExportOptions(start_timecode="01:00:00:25"), "there is no timecode 01:00:00:25 at 25"),
        (ExportOptions(start_timecode="1:00:00"), "'1:00:00' is not a timecode"),
        (ExportOptions(rate=NTSC, start_timecode="00:01:00;01"), "drop frame leaves that number out"),
    ],
)
def test_what_cannot_be_counted(options: ExportOptions, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        render([make_timeline(shown(["a"]))], "edl", options)


def test_several_clips() -> None:
    clips = [make_timeline(shown(["a", "b"]), path=f"/x/interview-{name}.mov") for name in ("one", "two")]
    timeline = read(render(clips, "edl"))
    (track,) = timeline.tracks
    assert [(clip.name, clip.metadata["cmx_3600"]["reel"]) for clip in track] == [
        ("interview-one.mov", "INTERVIE"),
        ("interview-one.mov", "INTERVIE"),
        ("interview-two.mov", "INTERVI1"),
        ("interview-two.mov", "INTERVI1"),
    ]


def test_several_clips_of_different_rates_want_one() -> None:
    clips = [make_timeline(path="a.mp4"), make_timeline(path="b.mp4", rate=30)]
    with pytest.raises(UsageError, match=r"a\.mp4 and b\.mp4 differ in frame rate: give one for both"):
        render(clips, "edl")
    assert render(clips, "edl", ExportOptions(rate=Fraction(30)))


@pytest.mark.parametrize(
    ("sound", "channels", "tracks"),
    [(None, "V", ["V"]), (Sound(1, 44_100), "B", ["V", "A1"]), (Sound(6, 48_000), "AA/V", ["V", "A1", "A2"])],
)
def test_sound_is_cut_along(sound: Sound | None, channels: str, tracks: list[str]) -> None:
    text = render([make_timeline(shown(["a"]), sound=sound)], "edl")
    assert re.search(rf"^001  MYCLIP   {channels:<5} C  ", text, flags=re.MULTILINE)
    timeline = read(text)
    assert [track.name for track in timeline.tracks] == tracks


def test_reel_names() -> None:
    assert reel_names(["clip", "CLIP!", "红球", "ax", "", "a_very_long_name", "A very long one"]) == [
        "CLIP",
        "CLIP1",
        "CLIP2",
        "AX1",
        "CLIP3",
        "AVERYLON",
        "AVERYLO1",
    ]
    many = reel_names(["same name every time"] * 1200)
    assert len(set(many)) == 1200
    assert all(re.fullmatch("[A-Z0-9]{1,8}", reel) for reel in many)
