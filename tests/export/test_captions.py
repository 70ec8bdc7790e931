"""Subtitles, read back by pysubs2 and by FFmpeg."""

from __future__ import annotations

import html
import io
import re

import av
import pysubs2
import pytest

from keyecli.errors import UsageError
from keyecli.export.formats import render
from keyecli.export.text import one_line
from keyecli.export.timeline import Segment
from tests.export.conftest import TITLES, make_timeline, shown


def read(text: str, format: str) -> list[tuple[int, int, str]]:
    """(start ms, end ms, text) of each cue, as pysubs2 understands them."""
    events = pysubs2.SSAFile.from_string(text, format, keep_unknown_html_tags=format == "vtt").events
    return [
        (event.start, event.end, html.unescape(event.text) if format == "vtt" else event.text)
        for event in events
    ]


def as_shown(title: str, number: int, format: str) -> str:
    """What a cue says for a title: a backslash looks like one, times are no cue, and SubRip cannot show tags."""
    line = (one_line(title) or f"Part {number}").replace("\\", "∖")
    line = re.sub(r"(:\d\d)(,\d{3})", "\\1\u2060\\2", line)
    if format == "srt":
        line = line.replace("-->", "→")
    return re.sub(r"<( */? *[A-Za-z][^>]*)>", r"‹\1›", line) if format == "srt" else line


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_titles_survive(format: str) -> None:
    cues = read(render([make_timeline(shown(TITLES))], format), format)
    expected = [
        (1000 * index, 1000 * index + 500, as_shown(title, index + 1, format))
        for index, title in enumerate(TITLES)
    ]
    assert cues == expected


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_ffmpeg_reads_the_same(format: str) -> None:
    texts = ["plain", "红球 🎬 & more", "a {b} c", "∖N", "two\nlines"]
    segments = [Segment(index, index + 0.75, "title", text) for index, text in enumerate(texts)]
    file = io.BytesIO(render([make_timeline(segments)], format).encode())
    with av.open(file, format={"srt": "srt", "vtt": "webvtt"}[format]) as container:
        packets = [
            (float(p.pts * p.time_base), float(p.duration * p.time_base), bytes(p).decode())
            for p in container.demux(container.streams.subtitles[0])
            if p.pts is not None and p.size
        ]
    escaped = [text.replace("&", "&amp;") if format == "vtt" else text for text in texts]
    assert packets == [(index, 0.75, f"title\n{text}") for index, text in enumerate(escaped)]


def test_exact_srt() -> None:
    segments = [Segment(0, 1.25, "One", "more\n\nof it"), Segment(3661.0004, 3661.9996, "Two")]
    assert render([make_timeline(segments, frames=100_000)], "srt") == (
        "1\n00:00:00,000 --> 00:00:01,250\nOne\nmore\nof it\n\n2\n01:01:01,000 --> 01:01:02,000\nTwo\n\n"
    )


def test_exact_vtt() -> None:
    assert render([make_timeline([Segment(0, 1.25, "a < b")])], "vtt") == (
        "WEBVTT\n\n1\n00:00:00.000 --> 00:00:01.250\na &lt; b\n\n"
    )


@pytest.mark.parametrize(("format", "text"), [("srt", ""), ("vtt", "WEBVTT\n\n")])
def test_nothing_to_say(format: str, text: str) -> None:
    assert render([make_timeline()], format) == text


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_overlapping_and_tiny_cues_keep_their_times(format: str) -> None:
    segments = [Segment(1.0, 5.0, "a"), Segment(2.0, 3.0, "b"), Segment(2.5, 2.5001, "c")]
    assert [cue[:2] for cue in read(render([make_timeline(segments)], format), format)] == [
        (1000, 5000),
        (2000, 3000),
        (2500, 2501),
    ]


@pytest.mark.parametrize("format", ["srt", "vtt"])
def test_many_hours(format: str) -> None:
    late = make_timeline([Segment(99 * 3600, 99 * 3600 + 1, "late")])
    assert read(render([late], format), format) == [(356_400_000, 356_401_000, "late")]
    too_late = make_timeline([Segment(100 * 3600, 100 * 3600 + 1, "late")])
    with pytest.raises(UsageError, match="ends at 100 hours"):
        render([too_late], format)


@pytest.mark.parametrize("format", ["srt", "vtt", "ffmetadata", "chapters", "mkv"])
def test_one_clip_a_file(format: str) -> None:
    with pytest.raises(UsageError, match=f"{format} holds the parts of one clip, and there are 2"):
        render([make_timeline(), make_timeline()], format)
