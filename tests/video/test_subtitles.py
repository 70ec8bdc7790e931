"""Subtitle files become timed plain text."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from keyecli.errors import InputError
from keyecli.video.subtitles import Cue, read_subtitles

SRT = "2\n00:00:03,000 --> 00:00:04,500\nSecond\nline\n\n1\n00:00:01,250 --> 00:00:02,000\n<i>Grüße</i>\n"
EXPECTED = [
    Cue(Fraction(5, 4), Fraction(2), "Grüße"),
    Cue(Fraction(3), Fraction(9, 2), "Second line"),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_srt_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.srt"
    path.write_bytes(SRT.encode(encoding))
    assert read_subtitles(path) == EXPECTED


def test_vtt(tmp_path: Path) -> None:
    path = tmp_path / "a.vtt"
    path.write_text(
        "WEBVTT\n\n00:01.250 --> 00:02.000\n<v Ann>Grüße</v>\n\n00:03.000 --> 00:04.500\nSecond\nline\n",
        "utf-8",
    )
    assert read_subtitles(path) == EXPECTED


def test_ass_drops_comments_and_styling(tmp_path: Path) -> None:
    path = tmp_path / "a.ass"
    path.write_text(
        "[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\nFormat: Name, Fontname\nStyle: Default,Arial\n\n[Events]\n"
        "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
        "Comment: 0,0:00:00.00,0:00:09.00,Default,,0,0,0,,not spoken\n"
        "Dialogue: 0,0:00:03.00,0:00:04.50,Default,,0,0,0,,{\\b1}Second\\Nline\n"
        "Dialogue: 0,0:00:01.25,0:00:02.00,Default,,0,0,0,,Grüße\n",
        "utf-8",
    )
    assert read_subtitles(path) == EXPECTED


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_subtitles(tmp_path / "missing.srt")
    with pytest.raises(InputError, match="is a directory"):
        read_subtitles(tmp_path)
    other = tmp_path / "video.srt"
    other.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(InputError, match="not a subtitle file"):
        read_subtitles(other)
