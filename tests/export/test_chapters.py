"""Chapters, read back by FFmpeg and mkvtoolnix, and YouTube's rules."""

from __future__ import annotations

import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import av
import pytest

from keyecli.errors import UsageError
from keyecli.export.formats import render
from keyecli.export.options import ExportOptions
from keyecli.export.text import one_line, writable
from keyecli.export.timeline import Segment
from tests.export.conftest import TITLES, make_timeline, shown
from tests.video.conftest import write_clip

Chapter = tuple[Fraction, Fraction, str]


def chapters_of(path: Path, format: str | None = None) -> list[Chapter]:
    """(start s, end s, title) as FFmpeg reads them."""
    with av.open(str(path), format=format) as container:
        return [
            (
                chapter["start"] * chapter["time_base"],
                chapter["end"] * chapter["time_base"],
                title_of(chapter),
            )
            for chapter in container.chapters()
        ]


def title_of(chapter: object) -> str:
    return chapter["metadata"].get("title", "")  # type: ignore[index]


def starts(*seconds: float) -> list[Segment]:
    return [Segment(start, start + 5, f"chapter {index}") for index, start in enumerate(seconds)]


class TestFfmetadata:
    def read(self, text: str, folder: Path) -> list[Chapter]:
        path = folder / "chapters.ffmetadata"
        path.write_bytes(text.encode())
        return chapters_of(path, "ffmetadata")

    def test_titles_survive(self, tmp_path: Path) -> None:
        read = self.read(render([make_timeline(shown(TITLES))], "ffmetadata"), tmp_path)
        assert read == [
            (index, index + Fraction(1, 2), writable(title).strip() or f"Part {index + 1}")
            for index, title in enumerate(TITLES)
        ]

    def test_files_title_survives(self, tmp_path: Path) -> None:
        path = tmp_path / "chapters.ffmetadata"
        options = ExportOptions(title="a = b; # c \\ d\ne 红")
        path.write_bytes(render([make_timeline()], "ffmetadata", options).encode())
        with av.open(str(path), format="ffmetadata") as container:
            assert container.metadata["title"] == "a = b; # c \\ d\ne 红"
            assert container.chapters() == []

    def test_exact_text(self) -> None:
        timeline = make_timeline([Segment(0.0004, 12.3456, "a=b\nc")])
        assert render([timeline], "ffmetadata") == (
            ";FFMETADATA1\ntitle=my clip\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=12346\ntitle=a\\=b\\\nc\n"
        )

    def test_overlaps_tiny_parts_and_hours_keep_their_times(self, tmp_path: Path) -> None:
        segments = [
            Segment(1, 5, "a"),
            Segment(2, 3, "b"),
            Segment(7, 7.0001, "c"),
            Segment(90_000, 90_001.5, "d"),
        ]
        read = self.read(render([make_timeline(segments)], "ffmetadata"), tmp_path)
        assert [(float(start), float(end)) for start, end, _ in read] == [
            (1, 5),
            (2, 3),
            (7, 7.001),
            (90_000, 90_001.5),
        ]


class TestMatroska:
    # The order that mkvtoolnix's document type asks for, of the elements that are written.
    ORDER = {
        "Chapters": ["EditionEntry"],
        "EditionEntry": [
            "EditionUID",
            "EditionFlagHidden",
            "EditionFlagOrdered",
            "EditionFlagDefault",
            "ChapterAtom",
        ],
        "ChapterAtom": [
            "ChapterTimeStart",
            "ChapterTimeEnd",
            "ChapterUID",
            "ChapterFlagHidden",
            "ChapterFlagEnabled",
            "ChapterDisplay",
        ],
        "ChapterDisplay": ["ChapterString", "ChapterLanguage"],
    }

    def test_elements_and_titles(self) -> None:
        root = ElementTree.fromstring(render([make_timeline(shown(TITLES))], "mkv"))
        assert root.tag == "Chapters"
        for element in root.iter():
            tags = list(dict.fromkeys(child.tag for child in element))
            assert tags == self.ORDER.get(element.tag, [])
        assert [element.text for element in root.iter("ChapterString")] == [
            one_line(title) or f"Part {index + 1}" for index, title in enumerate(TITLES)
        ]
        uids = [int(element.text or "") for element in root.iter("ChapterUID")]
        assert len(set(uids)) == len(TITLES)
        assert all(0 < uid < 2**63 for uid in uids)

    def test_times_are_nanoseconds(self) -> None:
        root = ElementTree.fromstring(render([make_timeline([Segment(1 / 3, 100 * 3600 + 0.25, "")])], "mkv"))
        assert root.findtext(".//ChapterTimeStart") == "00:00:00.333333333"
        assert root.findtext(".//ChapterTimeEnd") == "100:00:00.250000000"

    def test_uids_follow_from_the_chapter(self) -> None:
        def uids(*segments: Segment, path: str = "/a/clip.mp4") -> list[str]:
            return re.findall(r"<ChapterUID>(\d+)", render([make_timeline(segments, path=path)], "mkv"))

        one, two = Segment(1, 2, "one"), Segment(3, 4, "two")
        assert uids(one, two) == uids(one, two, path="/elsewhere/clip.mp4")
        assert uids(one, two)[0] == uids(one)[0]
        assert uids(one, one)[0] != uids(one, one)[1]
        assert uids(one) != uids(one, path="/a/other.mp4")

    def test_no_chapters_no_edition(self) -> None:
        assert len(ElementTree.fromstring(render([make_timeline()], "mkv"))) == 0

    @pytest.mark.skipif(shutil.which("mkvmerge") is None, reason="mkvmerge is not installed")
    def test_mkvmerge_and_ffmpeg_read_them(self, tmp_path: Path) -> None:
        clip = write_clip(tmp_path / "clip.mp4", 10)
        chapters, merged = tmp_path / "chapters.xml", tmp_path / "out.mkv"
        chapters.write_bytes(render([make_timeline(shown(TITLES))], "mkv").encode())
        done = subprocess.run(
            ["mkvmerge", "--output", merged, "--chapters", chapters, clip],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout  # 1 would be a warning
        assert chapters_of(merged) == [
            (index, index + Fraction(1, 2), one_line(title) or f"Part {index + 1}")
            for index, title in enumerate(TITLES)
        ]


class TestYouTube:
    def lines(self, *segments: Segment, frames: int = 100_000) -> list[str]:
        return render([make_timeline(segments, frames=frames)], "chapters").splitlines()

    def test_hours(self) -> None:
        assert self.lines(*starts(0, 61, 3599, 3661.9)) == [
            "0:00 chapter 0",
            "1:01 chapter 1",
            "59:59 chapter 2",
            "1:01:01 chapter 3",
        ]

    @pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
    def test_a_first_chapter_within_a_second_is_moved_to_zero(self, start: float) -> None:
        assert self.lines(*starts(start, 20, 40))[0] == "0:00 chapter 0"

    def test_before_a_later_one_comes_an_intro(self) -> None:
        assert self.lines(*starts(10, 25)) == ["0:00 Intro", "0:10 chapter 0", "0:25 chapter 1"]

    def test_every_line_is_what_youtube_looks_for(self) -> None:
        lines = self.lines(*shown(TITLES, 15.0))
        assert len(lines) == len(TITLES)
        for index, line in enumerate(lines):
            minutes, seconds = divmod(15 * index, 60)
            assert re.fullmatch(rf"{minutes}:{seconds:02d} [^\s<>][^<>]*", line)

    def test_an_almost_whole_second_is_whole(self) -> None:
        assert self.lines(*starts(0, 9.9999999, 20))[1] == "0:10 chapter 1"

    @pytest.mark.parametrize(
        ("segments", "said"),
        [
            ([], "must be 3 or more, and /clips/my clip.mp4 has 0"),
            (starts(0, 20), "must be 3 or more, and /clips/my clip.mp4 has 2"),
            (starts(15), "must be 3 or more, and /clips/my clip.mp4 has 2"),
            (starts(0, 9, 30), "'chapter 0' of /clips/my clip.mp4 lasts from 0:00 to 0:09"),
            (starts(0, 20, 20), "'chapter 1' of /clips/my clip.mp4 lasts from 0:20 to 0:20"),
            (starts(5, 20, 30), "'Intro' of /clips/my clip.mp4 lasts from 0:00 to 0:05"),
            (starts(0, 20, 31), "'chapter 2' of /clips/my clip.mp4 lasts from 0:31 to 0:40"),
        ],
    )
    def test_what_breaks_the_rules(self, segments: list[Segment], said: str) -> None:
        with pytest.raises(UsageError, match=re.escape(said)):
            self.lines(*segments, frames=1000)

    def test_the_last_chapter_may_last_just_ten_seconds(self) -> None:
        assert len(self.lines(*starts(0, 20, 30), frames=1000)) == 3
