"""OpenTimelineIO and Final Cut Pro projects, read back by OpenTimelineIO and its adapter, and by their own rules."""

from __future__ import annotations

import re
import sys
from fractions import Fraction
from typing import Any
from xml.etree import ElementTree

import pytest

from keyecli.errors import UsageError
from keyecli.export.formats import check, render
from keyecli.export.options import ExportOptions
from keyecli.export.text import one_line
from keyecli.export.timeline import Segment, Timeline
from keyecli.video.sound import Sound
from tests.export.conftest import FILM, NTSC, TITLES, make_timeline, shown

otio: Any = pytest.importorskip("opentimelineio")

RATES = [Fraction(24), FILM, Fraction(25), NTSC, Fraction(30), Fraction(50), 2 * NTSC]


def frames(time_range: Any) -> tuple[float, float]:
    return time_range.start_time.value, time_range.duration.value


class TestOtio:
    def read(self, *timelines: Timeline, options: ExportOptions | None = None) -> Any:
        return otio.adapters.read_from_string(render(timelines, "otio", options), "otio_json")

    def test_clips(self) -> None:
        segments = [Segment(1, 2.5, "ball", "it bounces", 0.875), Segment(2, 3, "red 红 🎬")]
        timeline = self.read(make_timeline(segments), options=ExportOptions(start_timecode="01:00:00:00"))
        assert timeline.name == "my clip"
        assert timeline.global_start_time == otio.opentime.RationalTime(90_000, 25)
        (track,) = timeline.video_tracks()
        assert [clip.name for clip in track] == ["ball", "red 红 🎬"]
        assert [frames(clip.source_range) for clip in track] == [(90_025, 38), (90_050, 25)]
        assert [frames(track.range_of_child(clip)) for clip in track] == [(0, 38), (38, 25)]
        assert dict(track[0].metadata["keye"]) == {
            "start_s": 1,
            "end_s": 2.5,
            "text": "it bounces",
            "score": 0.875,
        }
        assert "score" not in track[1].metadata["keye"]
        media = track[0].media_reference
        assert media.target_url == "file:///clips/my%20clip.mp4"
        assert frames(media.available_range) == (90_000, 1000)
        assert timeline.audio_tracks() == []

    def test_titles_survive(self) -> None:
        timeline = self.read(make_timeline(shown(TITLES)))
        (track,) = timeline.video_tracks()
        assert [clip.name for clip in track] == [
            one_line(title) or f"Part {index + 1}" for index, title in enumerate(TITLES)
        ]

    def test_sound_follows_on_a_track_of_its_own(self) -> None:
        silent = make_timeline(shown(["a"]), path="/clips/silent.mp4")
        loud = make_timeline(shown(["b"]), path="/clips/loud.mp4", sound=Sound(2, 48_000))
        timeline = self.read(silent, loud)
        (video,), (audio,) = timeline.video_tracks(), timeline.audio_tracks()
        assert [type(item).__name__ for item in audio] == ["Gap", "Clip"]
        assert audio.range_of_child(audio[1]) == video.range_of_child(video[1])

    @pytest.mark.parametrize("rate", RATES)
    def test_rates(self, rate: Fraction) -> None:
        unit = float(1 / rate)
        count = int(rate * 3700)
        segments = [Segment(first * unit, (first + 1) * unit, "") for first in range(0, count, 997)]
        timeline = self.read(make_timeline(segments, rate=rate, frames=count))
        (track,) = timeline.video_tracks()
        assert [frames(clip.source_range) for clip in track] == [(first, 1) for first in range(0, count, 997)]
        assert track[0].source_range.start_time.rate == pytest.approx(float(rate), abs=1e-9)

    def test_zero_segments(self) -> None:
        timeline = self.read(make_timeline())
        (track,) = timeline.video_tracks()
        assert len(track) == 0

    def test_the_package_may_be_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opentimelineio", None)
        for attempt in (render, check):
            with pytest.raises(UsageError, match=r'not installed: pip install "keyecli\[otio\]"'):
                attempt([make_timeline()], "otio")


class TestFcpxml:
    # Order of children in Apple's document type for 1.9, of the elements that are written.
    ORDER = {
        "fcpxml": ["resources", "library"],
        "resources": ["format", "asset"],
        "asset": ["media-rep"],
        "library": ["event"],
        "event": ["project"],
        "project": ["sequence"],
        "sequence": ["spine"],
        "spine": ["asset-clip"],
        "asset-clip": ["note"],
    }
    ATTRIBUTES = {
        "fcpxml": {"version"},
        "format": {"id", "frameDuration", "width", "height"},
        "asset": {"id", "name", "start", "duration", "hasVideo", "format", "hasAudio", "audioSources", "audioChannels",
                  "audioRate"},
        "media-rep": {"kind", "src"},
        "event": {"name"},
        "project": {"name"},
        "sequence": {"format", "duration", "tcStart", "tcFormat", "audioLayout", "audioRate"},
        "asset-clip": {"ref", "name", "offset", "start", "duration", "tcFormat"},
    }  # fmt: skip

    def tree(self, *timelines: Timeline, options: ExportOptions | None = None) -> ElementTree.Element:
        """The document, after checks that hold for every one."""
        text = render(timelines, "fcpxml", options)
        assert text.startswith(
            '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n<fcpxml version="1.9">'
        )
        root = ElementTree.fromstring(text)
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(set(ids)) == len(ids)
        for element in root.iter():
            tags = list(dict.fromkeys(child.tag for child in element))
            allowed = self.ORDER.get(element.tag, [])
            assert tags == [tag for tag in allowed if tag in tags], element.tag
            assert set(element.attrib) <= self.ATTRIBUTES.get(element.tag, set()), element.tag
            for name in ("ref", "format"):
                assert element.get(name) is None or element.get(name) in ids
        frame = seconds(root.find(".//format"), "frameDuration")
        for element in root.iter():
            for name in ("offset", "start", "duration", "tcStart"):
                if element.get(name) is not None:
                    assert (seconds(element, name) / frame).denominator == 1, "not on a frame"
        return root

    def test_exact_text(self) -> None:
        segments = [Segment(1, 2.5, "ball", "it\nbounces", 0.875), Segment(2, 3, "red")]
        timeline = make_timeline(segments, sound=Sound(2, 44_100))
        text = render([timeline], "fcpxml", ExportOptions(start_timecode="01:00:00:00"))
        assert text == (
            '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n<fcpxml version="1.9">\n'
            "  <resources>\n"
            '    <format id="r1" frameDuration="1/25s" width="640" height="360" />\n'
            '    <asset id="clip1" name="my clip" start="3600s" duration="40s" hasVideo="1" format="r1" hasAudio="1" '
            'audioSources="1" audioChannels="2" audioRate="44100">\n'
            '      <media-rep kind="original-media" src="file:///clips/my%20clip.mp4" />\n'
            "    </asset>\n"
            "  </resources>\n"
            "  <library>\n"
            '    <event name="my clip">\n'
            '      <project name="my clip">\n'
            '        <sequence format="r1" duration="63/25s" tcStart="3600s" tcFormat="NDF" audioLayout="stereo" '
            'audioRate="44.1k">\n'
            "          <spine>\n"
            '            <asset-clip ref="clip1" name="ball" offset="3600s" start="3601s" duration="38/25s" '
            'tcFormat="NDF">\n'
            "              <note>score 0.875\nit\nbounces</note>\n"
            "            </asset-clip>\n"
            '            <asset-clip ref="clip1" name="red" offset="90038/25s" start="3602s" duration="1s" '
            'tcFormat="NDF" />\n'
            "          </spine>\n"
            "        </sequence>\n"
            "      </project>\n"
            "    </event>\n"
            "  </library>\n"
            "</fcpxml>\n"
        )

    def test_titles_survive(self) -> None:
        root = self.tree(make_timeline(shown(TITLES)), options=ExportOptions(title="<a> & \n b"))
        assert [clip.get("name") for clip in root.iter("asset-clip")] == [
            one_line(title) or f"Part {index + 1}" for index, title in enumerate(TITLES)
        ]
        project = root.find(".//project")
        assert project is not None
        assert project.get("name") == "<a> & b"

    def test_titles_survive_in_notes(self) -> None:
        root = self.tree(make_timeline([Segment(0, 1, "a", "1 < 2 & ]]> \x00 红 🎬", 0.5)]))
        assert root.findtext(".//note") == "score 0.500\n1 < 2 & ]]>  红 🎬"

    @pytest.mark.parametrize("rate", RATES)
    def test_rates(self, rate: Fraction) -> None:
        unit = float(1 / rate)
        count = int(rate * 3700)
        firsts = range(0, count, 997)
        segments = [Segment(first * unit, (first + 2) * unit, "") for first in firsts]
        root = self.tree(make_timeline(segments, rate=rate, frames=count))
        clips = list(root.iter("asset-clip"))
        assert [seconds(clip, "start") * rate for clip in clips] == list(firsts)
        assert [seconds(clip, "offset") * rate for clip in clips] == [
            2 * index for index in range(len(clips))
        ]
        assert {clip.get("tcFormat") for clip in clips} == {"DF" if rate in (NTSC, 2 * NTSC) else "NDF"}
        assert seconds(root.find(".//format"), "frameDuration") == 1 / rate

    def test_the_adapter_reads_it(self) -> None:
        pytest.importorskip("otio_fcpx_xml_adapter")
        segments = [Segment(1, 2.5, "ball 红"), Segment(2, 3, "red <b>"), Segment(39.96, 40, "end")]
        text = render([make_timeline(segments)], "fcpxml")
        (timeline,) = otio.adapters.read_from_string(text, "fcpx_xml")
        assert timeline.name == "my clip"
        (track,) = timeline.tracks
        assert [clip.name for clip in track] == ["ball 红", "red <b>", "end"]
        assert [frames(clip.source_range) for clip in track] == [(25, 38), (50, 25), (999, 1)]
        assert [frames(track.range_of_child(clip)) for clip in track] == [(0, 38), (38, 25), (63, 1)]

    def test_several_clips(self) -> None:
        small = make_timeline(shown(["a"]), path="/clips/a #1.mp4")
        large = Timeline(small.path.with_name("b.mp4"), 40.0, 1920, 1080, small.frame_times, small.segments)
        root = self.tree(small, large, small)
        assert [format.get("width") for format in root.iter("format")] == ["640", "1920"]
        assert [asset.get("format") for asset in root.iter("asset")] == ["r1", "r2", "r1"]
        assert [clip.get("ref") for clip in root.iter("asset-clip")] == ["clip1", "clip2", "clip3"]
        sources = [media.get("src") for media in root.iter("media-rep")]
        assert sources == ["file:///clips/a%20%231.mp4", "file:///clips/b.mp4", "file:///clips/a%20%231.mp4"]

    def test_zero_segments(self) -> None:
        root = self.tree(make_timeline())
        assert root.find(".//spine") is not None
        assert seconds(root.find(".//sequence"), "duration") == 0

    def test_unusual_sound_becomes_a_rate_that_projects_have(self) -> None:
        root = self.tree(make_timeline(shown(["a"]), sound=Sound(1, 22_050)))
        sequence, asset = root.find(".//sequence"), root.find(".//asset")
        assert sequence is not None
        assert asset is not None
        assert (sequence.get("audioRate"), asset.get("audioRate")) == ("48k", "22050")


@pytest.mark.parametrize("format", ["otio", "fcpxml"])
def test_variable_rate_wants_a_rate(format: str, variable: Timeline) -> None:
    for attempt in (render, check):
        with pytest.raises(UsageError, match="variable frame rate"):
            attempt([variable], format)
    assert render([variable], format, ExportOptions(rate=NTSC))


def seconds(element: ElementTree.Element | None, name: str) -> Fraction:
    assert element is not None
    match = re.fullmatch(r"(\d+)(?:/(\d+))?s", element.get(name, ""))
    assert match is not None, (element.tag, name, element.get(name))
    return Fraction(int(match[1]), int(match[2] or 1))
