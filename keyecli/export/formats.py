"""The formats that segments are written in, each with its writer, under the name that `-f` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keyecli.errors import UsageError
from keyecli.export.captions import srt, vtt
from keyecli.export.chapters import ffmetadata, matroska, youtube
from keyecli.export.edl import edl
from keyecli.export.fcpxml import fcpxml
from keyecli.export.options import ExportOptions
from keyecli.export.otio import otio, require_opentimelineio
from keyecli.export.table import comma_separated
from keyecli.export.timeline import Timeline

Write = Callable[[Sequence[Timeline], ExportOptions], str]


@dataclass(frozen=True)
class Format:
    """A way to write timelines.

    suffix: of a file's name. several: one file can hold several clips. counts_frames: needs a rate that is constant.
    """

    suffix: str
    description: str
    write: Write
    several: bool = False
    counts_frames: bool = False


FORMATS: dict[str, Format] = {
    "csv": Format(".csv", "table: seconds, timecode, frames, score, title", comma_separated, several=True),
    "srt": Format(".srt", "SubRip subtitles", srt),
    "vtt": Format(".vtt", "WebVTT subtitles", vtt),
    "ffmetadata": Format(".ffmetadata", "chapters for FFmpeg", ffmetadata),
    "chapters": Format(".chapters.txt", "chapters for a YouTube description", youtube),
    "mkv": Format(".chapters.xml", "chapters for Matroska (mkvmerge)", matroska),
    "edl": Format(".edl", "edit decision list, CMX 3600", edl, several=True, counts_frames=True),
    "otio": Format(".otio", "OpenTimelineIO timeline", otio, several=True, counts_frames=True),
    "fcpxml": Format(
        ".fcpxml", "Final Cut Pro and Resolve project", fcpxml, several=True, counts_frames=True
    ),
}


def render(timelines: Sequence[Timeline], format: str, options: ExportOptions | None = None) -> str:
    """The timelines as the text of one file.

    UsageError: no such format, no clip, several clips in a format that holds one, and what the format cannot say, as its writer
    tells. KeyeWarning where a writer had to change something.
    """
    chosen = format_named(format)
    if not timelines:
        raise UsageError("there is no clip to write")
    if len(timelines) > 1 and not chosen.several:
        raise UsageError(
            f"{format} holds the parts of one clip, and there are {len(timelines)}: "
            "write a file for each into a folder with -o"
        )
    return chosen.write(timelines, options or ExportOptions())


def check(timelines: Sequence[Timeline], format: str, options: ExportOptions | None = None) -> None:
    """UsageError for what can be known before there are segments: the rate, the start timecode, a missing package."""
    chosen = format_named(format)
    options = options or ExportOptions()
    if chosen.counts_frames:
        options.timebase(timelines)
    elif format == "csv" and options.asks_for_timecode:
        for timeline in timelines:
            options.timebase([timeline])
    if format == "otio":
        require_opentimelineio()


def format_named(name: str) -> Format:
    """A format by its name. UsageError, with all names, when there is none."""
    if name not in FORMATS:
        raise UsageError(f"there is no format {name}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
