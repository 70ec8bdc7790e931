"""A summary as a Markdown page: prose, chapters and events with their times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from keyecli.export.text import one_line, title_of, writable
from keyecli.export.timeline import Segment
from keyecli.video.source import VideoInfo
from keyecli.video.timecode import format_time

# What would be markup inside a line, wherever it stands; and what is markup at a line's beginning only.
_INLINE = re.compile(r"([\\`*_\[\]<>|~$&])")
_BLOCK = re.compile(r"^(\s*)(#|=+\s*$|-+\s*$|--|- -|\+)")
_INDENT = re.compile(r"^\s{4,}")  # would make the line code


@dataclass(frozen=True)
class ClipSummary:
    """What a page says about one clip.

    text: prose, "" where there is none beside the events. chapters follow each other, events may overlap; both ascend.
    made_by: what wrote it, for the last line.
    """

    info: VideoInfo
    text: str
    chapters: Sequence[Segment]
    events: Sequence[Segment]
    made_by: str

    @property
    def name(self) -> str:
        return one_line(self.info.path.name)

    @property
    def own_events(self) -> Sequence[Segment]:
        """The events, unless the chapters are the same ones."""
        same = [event.title for event in self.events] == [chapter.title for chapter in self.chapters]
        return () if same else self.events


def render_markdown(clips: Sequence[ClipSummary], title: str | None = None) -> str:
    """A page about the clips, one after the other; `title` stands above them, by default only where there are several.

    What the model wrote is text and never markup: no HTML, link or heading of its own comes through.
    """
    blocks: list[str] = []
    if title is not None or len(clips) > 1:
        blocks.append(f"# {escaped(one_line(title or f'{len(clips)} videos'))}")
    depth = "##" if blocks else "#"
    for clip in clips:
        blocks.append(f"{depth} {escaped(clip.name)}")
        if clip.text:
            blocks.append(prose(clip.text))
        for heading, segments in (("Chapters", clip.chapters), ("Events", clip.own_events)):
            if segments:
                blocks.append(f"{depth}# {heading}")
                blocks.append("\n".join(_item(segment, place) for place, segment in enumerate(segments, 1)))
        length = format_time(clip.info.duration_s)
        blocks.append(f"*{length}, {clip.info.width}x{clip.info.height}. {escaped(one_line(clip.made_by))}*")
    return "\n\n".join(blocks) + "\n"


def _item(segment: Segment, place: int) -> str:
    """A list item: times and title, and the lines of the text below it."""
    times = f"{format_time(segment.start_s)} - {format_time(segment.end_s)}"
    lines = [f"- **{times}** {escaped(title_of(segment, place))}"]
    lines += [f"  {_line(line)}" for line in writable(segment.text).splitlines() if line.strip()]
    return "  \n".join(lines)  # two spaces end a line without ending the paragraph


def prose(text: str) -> str:
    """Paragraphs and lists stay what they are."""
    paragraphs = re.split(r"\n\s*\n", writable(text).strip())
    return "\n\n".join("\n".join(_line(line) for line in part.splitlines()) for part in paragraphs)


def _line(line: str) -> str:
    return _BLOCK.sub(r"\1\\\2", _INDENT.sub("   ", escaped(line)))


def escaped(text: str) -> str:
    """One line whose characters all read as themselves."""
    return _INLINE.sub(r"\\\1", text)
