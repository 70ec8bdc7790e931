"""Reads subtitle files (SRT, WebVTT, ASS/SSA) as timed lines of plain text."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from keyecli.errors import InputError


@dataclass(frozen=True)
class Cue:
    """One line of dialogue; times in seconds, text without markup."""

    start_s: Fraction
    end_s: Fraction
    text: str


def read_subtitles(path: str | Path) -> list[Cue]:
    """The cues of a subtitle file, by start time; comments and empty lines are left out.

    UTF-8 and UTF-16 (with a byte-order mark) are recognised; anything else is read as Windows-1252, the
    usual encoding of old files. Raises InputError when the file is missing or no subtitle file.
    """
    import pysubs2

    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"the subtitle file {path} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(
            f"{path} is a directory, not a subtitle file; name one .srt, .vtt or .ass file"
        ) from None
    except OSError as error:
        raise InputError(f"the subtitle file {path} cannot be read: {error.strerror}") from error
    try:
        events = pysubs2.SSAFile.from_string(_decode_text(data)).events
    except (pysubs2.exceptions.Pysubs2Error, ValueError) as error:
        raise InputError(f"{path} is not a subtitle file that can be read; use SRT, WebVTT or ASS") from error
    cues = []
    for event in events:
        text = " ".join(event.plaintext.split())
        if text and not event.is_comment and not event.is_drawing:
            cues.append(Cue(Fraction(event.start, 1000), Fraction(event.end, 1000), text))
    return sorted(cues, key=lambda cue: (cue.start_s, cue.end_s))


def _decode_text(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
