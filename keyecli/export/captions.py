"""Segments as subtitles, SubRip and WebVTT, written by pysubs2."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from keyecli.errors import UsageError
from keyecli.export.options import ExportOptions
from keyecli.export.text import title_of, writable
from keyecli.export.timeline import Segment, Timeline

_LIMIT_S = 100 * 3600  # both formats are written with two digits of hours
# What players of SubRip take for markup and do not show. SubRip has no way to write it otherwise.
_MARKUP = re.compile(r"<( */? *[A-Za-z][^>]*)>")
# Readers, pysubs2 is one, take a line with two times for the beginning of a cue. A sign between them and their fractions
# that has no width and allows no break keeps it text.
_TIME = re.compile(r"([0-9]{1,2}:[0-9]{2})(?=[.,][0-9])", re.ASCII)
_WORD_JOINER = "\u2060"


def srt(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """A cue a segment: its title, and its text below. UsageError for a cue at 100 hours or later.

    What looks like a tag gets ‹angle quotes›, since it would not be shown, and an arrow --> becomes one sign.
    """
    return _captions(timelines[0], "srt", _unmarked)


def vtt(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """A cue a segment: its title, and its text below, &, < and > escaped. UsageError as in `srt`."""
    return _captions(timelines[0], "vtt", _escaped)


def _unmarked(line: str) -> str:
    return _MARKUP.sub(r"‹\1›", line.replace("-->", "→"))


def _escaped(line: str) -> str:
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _captions(timeline: Timeline, format: str, escape: Callable[[str], str]) -> str:
    import pysubs2

    subtitles = pysubs2.SSAFile()
    for number, segment in enumerate(timeline.segments, 1):
        if segment.end_s >= _LIMIT_S:
            raise UsageError(f"{format} ends at 100 hours, and a part of {timeline.path} lies behind that")
        start_ms = round(segment.start_s * 1000)
        end_ms = max(start_ms + 1, round(segment.end_s * 1000))
        lines = [escape(line) for line in _lines(segment, number)]
        # pysubs2 reads \N, \n and \h as control codes, and so do players in SubRip: the sign for set difference looks
        # the same and is none.
        lines = [line.replace("\\", "∖") for line in lines]
        subtitles.append(pysubs2.SSAEvent(start=start_ms, end=end_ms, text=r"\N".join(lines)))
    # Text in braces would be left out as styling otherwise.
    return subtitles.to_string(format, keep_ssa_tags=True)


def _lines(segment: Segment, number: int) -> list[str]:
    """The title's line and those of the text; an empty line would end the cue."""
    lines = [" ".join(line.split()) for line in writable(segment.text).split("\n")]
    return [_no_cue(line) for line in (title_of(segment, number), *lines) if line]


def _no_cue(line: str) -> str:
    return _TIME.sub(rf"\1{_WORD_JOINER}", line) if len(_TIME.findall(line)) > 1 else line
