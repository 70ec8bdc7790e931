"""The table, read back by the csv module."""

from __future__ import annotations

import csv
import io

import pytest

from keyecli.errors import KeyeWarning, UsageError
from keyecli.export.formats import render
from keyecli.export.options import ExportOptions
from keyecli.export.table import COLUMNS
from keyecli.export.text import writable
from keyecli.export.timeline import Segment, Timeline
from keyecli.video.timecode import parse_rate
from tests.export.conftest import NTSC, TITLES, make_timeline, shown


def rows(timelines: list[Timeline], options: ExportOptions | None = None) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render(timelines, "csv", options), newline="")))


def test_a_row_is_exact() -> None:
    segment = Segment(1.0, 2.5, "ball", "it bounces", 0.87654)
    assert render([make_timeline([segment])], "csv") == (
        "clip,start_s,end_s,start_timecode,end_timecode,start_frame,end_frame,score,title,text\n"
        "/clips/my clip.mp4,1.000,2.500,00:00:01:00,00:00:02:13,25,63,0.877,ball,it bounces\n"
    )


def test_titles_and_texts_survive() -> None:
    segments = [Segment(0, 1, title, f"text of {title}") for title in TITLES]
    read = rows([make_timeline(segments)])
    assert [row["title"] for row in read] == [writable(title) for title in TITLES]
    assert [row["text"] for row in read] == [writable(f"text of {title}") for title in TITLES]


def test_nothing_but_names() -> None:
    assert render([make_timeline()], "csv") == ",".join(COLUMNS) + "\n"


def test_several_clips_each_with_its_own_rate() -> None:
    read = rows(
        [
            make_timeline(shown(["a"]), path="a.mp4"),
            make_timeline([Segment(60.1, 61, "b")], rate=NTSC, frames=2000, path="b.mp4"),
        ]
    )
    assert [(row["clip"], row["start_timecode"]) for row in read] == [
        ("a.mp4", "00:00:00:00"),
        ("b.mp4", "00:01:00;04"),
    ]
    assert read[0]["score"] == ""


def test_start_timecode_and_rate() -> None:
    options = ExportOptions(rate=parse_rate("50"), start_timecode="10:00:00:00")
    (row,) = rows([make_timeline([Segment(1, 2.02, "a")])], options)
    assert (row["start_timecode"], row["end_timecode"]) == ("10:00:01:00", "10:00:02:01")
    assert (row["start_frame"], row["end_frame"]) == ("25", "51")


def test_a_variable_rate_leaves_timecode_empty_and_says_so(variable: Timeline) -> None:
    with pytest.warns(KeyeWarning, match="variable frame rate.*give a rate.*timecode columns are empty"):
        (row,) = rows([variable])
    assert (row["start_timecode"], row["end_timecode"]) == ("", "")
    assert (row["start_frame"], row["end_frame"]) == ("15", "38")
    (row,) = rows([variable], ExportOptions(rate=NTSC))
    assert (row["start_timecode"], row["end_timecode"]) == ("00:00:00;15", "00:00:01;15")


def test_what_was_asked_for_is_not_left_out(variable: Timeline) -> None:
    with pytest.raises(UsageError, match="variable frame rate"):
        rows([variable], ExportOptions(start_timecode="01:00:00:00"))
    with pytest.raises(UsageError, match="not a timecode"):
        rows([make_timeline()], ExportOptions(start_timecode="1:00"))
