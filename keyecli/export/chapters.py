"""Segments as chapters: YouTube's description lines, FFmpeg's metadata file, Matroska's XML."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree

from keyecli.errors import UsageError
from keyecli.export.options import ExportOptions
from keyecli.export.text import one_line, title_of, writable
from keyecli.export.timeline import Timeline

# https://support.google.com/youtube/answer/9884579: what YouTube asks of chapters; others it does not show at all.
YOUTUBE_CHAPTERS = 3
YOUTUBE_SECONDS = 10
_MOVED_TO_ZERO_S = 1.0
_INTRO = "Intro"
_ANGLES = str.maketrans("<>", "‹›")  # YouTube refuses a description with < or > in it
_FFMETADATA_SPECIAL = re.compile(r"([=;#\\\n])")


def youtube(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """One line a chapter, `0:00 Title`, for a YouTube description; a chapter lasts until the next one begins.

    The list must begin at 0:00: a first chapter that begins within a second is moved there, before a later one comes
    an "Intro". Starts are cut to whole seconds. UsageError, saying which, for fewer than three chapters and for one
    that is shorter than 10 s, the last one and the "Intro" included.
    """
    timeline = timelines[0]
    chapters = [
        (_whole_second(segment.start_s), title_of(segment, number).translate(_ANGLES))
        for number, segment in enumerate(timeline.segments, 1)
    ]
    if chapters and timeline.segments[0].start_s <= _MOVED_TO_ZERO_S:
        chapters[0] = (0, chapters[0][1])
    elif chapters:
        chapters.insert(0, (0, _INTRO))
    if len(chapters) < YOUTUBE_CHAPTERS:
        raise UsageError(
            f"chapters for YouTube must be {YOUTUBE_CHAPTERS} or more, and {timeline.path} has {len(chapters)}: "
            "write another format"
        )
    for (start, title), (end, _) in pairwise([*chapters, (_whole_second(timeline.duration_s), "")]):
        if end - start < YOUTUBE_SECONDS:
            raise UsageError(
                f"chapters for YouTube must last {YOUTUBE_SECONDS} s or more, and {title!r} of {timeline.path} lasts "
                f"from {_clock(start)} to {_clock(end)}: keep fewer chapters, or write another format"
            )
    return "".join(f"{_clock(start)} {title}\n" for start, title in chapters)


def ffmetadata(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """FFmpeg's metadata file, for `ffmpeg -i clip.mp4 -i FILE -map_metadata 1 -codec copy out.mp4`; times in 1/1000 s."""
    timeline = timelines[0]
    lines = [";FFMETADATA1", f"title={_ffmetadata_value(options.title_of(timelines))}"]
    for number, segment in enumerate(timeline.segments, 1):
        start_ms = round(segment.start_s * 1000)
        end_ms = max(start_ms + 1, round(segment.end_s * 1000))
        title = writable(segment.title).strip() or title_of(segment, number)
        lines += ["[CHAPTER]", "TIMEBASE=1/1000", f"START={start_ms}", f"END={end_ms}"]
        lines.append(f"title={_ffmetadata_value(title)}")
    return "\n".join(lines) + "\n"


def matroska(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """Matroska's chapter XML, for `mkvmerge --chapters FILE` and mkvpropedit; times in nanoseconds.

    Elements stand in the order of mkvtoolnix's document type. A chapter's UID follows from the clip's name, its times,
    title and number: the same chapter has the same one again.
    """
    timeline = timelines[0]
    root = ElementTree.Element("Chapters")
    if timeline.segments:  # an edition must hold a chapter
        edition = ElementTree.SubElement(root, "EditionEntry")
        _leaf(edition, "EditionUID", _uid(timeline.path.name))
        _leaf(edition, "EditionFlagHidden", 0)
        _leaf(edition, "EditionFlagOrdered", 0)
        _leaf(edition, "EditionFlagDefault", 1)
    for number, segment in enumerate(timeline.segments, 1):
        start_ns = round(segment.start_s * 1_000_000_000)
        end_ns = max(start_ns + 1, round(segment.end_s * 1_000_000_000))
        title = title_of(segment, number)
        atom = ElementTree.SubElement(edition, "ChapterAtom")
        _leaf(atom, "ChapterTimeStart", _nanoseconds(start_ns))
        _leaf(atom, "ChapterTimeEnd", _nanoseconds(end_ns))
        _leaf(atom, "ChapterUID", _uid(timeline.path.name, start_ns, end_ns, title, number))
        _leaf(atom, "ChapterFlagHidden", 0)
        _leaf(atom, "ChapterFlagEnabled", 1)
        display = ElementTree.SubElement(atom, "ChapterDisplay")
        _leaf(display, "ChapterString", title)
        _leaf(display, "ChapterLanguage", "und")
    ElementTree.indent(root)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE Chapters SYSTEM "matroskachapters.dtd">\n'
    return f"{head}{ElementTree.tostring(root, encoding='unicode')}\n"


def _whole_second(time_s: float) -> int:
    """The second that a time lies in; a millisecond is the finest that counts."""
    return round(time_s * 1000) // 1000


def _clock(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _ffmetadata_value(text: str) -> str:
    return _FFMETADATA_SPECIAL.sub(r"\\\1", writable(text))


def _leaf(parent: ElementTree.Element, tag: str, value: object) -> None:
    ElementTree.SubElement(parent, tag).text = str(value)


def _nanoseconds(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 1_000_000_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}.{rest:09d}"


def _uid(*parts: object) -> int:
    """A number from 1 to 2^63 - 1 that depends on the parts alone."""
    name = "\0".join(one_line(str(part)) for part in parts)
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % (2**63 - 1) + 1
