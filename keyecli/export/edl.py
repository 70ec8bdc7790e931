"""Segments as an edit decision list, CMX 3600: the lines that every editing program reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from keyecli.errors import UsageError
from keyecli.export.edits import Edit, EditList
from keyecli.export.options import ExportOptions
from keyecli.export.text import one_line, score_text
from keyecli.export.timeline import Timeline
from keyecli.video.sound import Sound
from keyecli.video.timecode import format_rate

EVENTS = 999  # event numbers have three digits
REEL_CHARACTERS = 8
_MOST_FRAMES_A_SECOND = 100  # frame numbers have two digits
_RESERVED_REELS = {"AX", "BL", "BLACK", "BARS"}  # a source unknown, black, colour bars


def edl(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """One cut a segment, recorded one after another; outs are exclusive.

    Timecode drops frames at 29.97 and 59.94 unless `drop_frame` is False. The first frame of a clip, and the first
    cut, have the start timecode. Comments name the clip and carry title and score; pictures are cut together with
    their sound (AA/V, B with one channel), or alone (V). UsageError as in `ExportOptions.timebase`, for more than 999
    segments, more than 100 frames a second, and timecode beyond 24 hours.
    """
    edits = EditList.of(timelines, options)
    timebase = edits.timebase
    if len(edits.edits) > EVENTS:
        raise UsageError(
            f"an edl holds {EVENTS} events, and there are {len(edits.edits)}: keep fewer, or write otio or fcpxml"
        )
    if timebase.nominal > _MOST_FRAMES_A_SECOND:
        raise UsageError(
            f"an edl has no room to count {format_rate(timebase.rate)} frames a second: give a lower --rate"
        )
    if edits.start + max((edits.duration, *edits.frames)) > timebase.day:
        raise UsageError(
            "timecode ends at 24 hours, and this edl goes beyond: give an earlier --start-timecode"
        )
    reels = reel_names([timeline.name for timeline in timelines])
    lines = [f"TITLE: {edits.title}", f"FCM: {'DROP FRAME' if timebase.drop_frame else 'NON-DROP FRAME'}"]
    for number, edit in enumerate(edits.edits, 1):
        lines += ["", _event(number, edits, edit, reels[edit.clip]), *_comments(edits, edit)]
    return "\n".join(lines) + "\n"


def reel_names(names: Sequence[str]) -> list[str]:
    """A reel name for each clip name: up to 8 capitals and digits, no two alike."""
    reels: list[str] = []
    taken = set(_RESERVED_REELS)
    counts: Counter[str] = Counter()
    for name in names:
        letters = re.sub("[^A-Z0-9]", "", name.upper())[:REEL_CHARACTERS]
        wanted = letters or "CLIP"
        reel = letters
        while not reel or reel in taken:
            counts[wanted] += 1
            ending = str(counts[wanted])
            reel = wanted[: REEL_CHARACTERS - len(ending)] + ending
        taken.add(reel)
        reels.append(reel)
    return reels


def _event(number: int, edits: EditList, edit: Edit, reel: str) -> str:
    source, record = edits.start + edit.first, edits.start + edit.record
    times = (source, source + edit.frames, record, record + edit.frames)
    channels = _channels(edits.clips[edit.clip].sound)
    timecodes = " ".join(edits.timebase.format(time) for time in times)
    return f"{number:03d}  {reel:<{REEL_CHARACTERS}} {channels:<5} C        {timecodes}"


def _channels(sound: Sound | None) -> str:
    if sound is None:
        return "V"
    return "AA/V" if sound.channels > 1 else "B"


def _comments(edits: EditList, edit: Edit) -> list[str]:
    segment = edit.segment
    comments = [
        f"* FROM CLIP NAME: {one_line(edits.clips[edit.clip].path.name)}",
        f"* COMMENT: {edit.title}",
    ]
    if one_line(segment.text):
        comments.append(f"* COMMENT: {one_line(segment.text)}")
    if segment.score is not None:
        comments.append(f"* SCORE: {score_text(segment.score)}")
    return comments
