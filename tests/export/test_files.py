"""Which files are written, and that all of them are or none."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from keyecli.errors import KeyeError, KeyeWarning, UsageError
from keyecli.export import files
from keyecli.export.files import OutputRequest, write_outputs, write_texts
from keyecli.export.formats import FORMATS, render
from keyecli.export.options import ExportOptions
from keyecli.export.timeline import Segment, Timeline
from tests.export.conftest import make_timeline, shown


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clip() -> Timeline:
    """Forty seconds with three chapters."""
    return make_timeline([Segment(0, 10, "a"), Segment(10, 20, "b"), Segment(20, 40, "c 红")])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_every_format_into_a_folder(folder: Path, clip: Timeline) -> None:
    written = write_outputs([clip], list(FORMATS), "out/deep/")
    assert [path.name for path in written] == [
        "my clip.csv",
        "my clip.srt",
        "my clip.vtt",
        "my clip.ffmetadata",
        "my clip.chapters.txt",
        "my clip.chapters.xml",
        "my clip.edl",
        "my clip.otio",
        "my clip.fcpxml",
    ]
    assert [path.read_bytes().decode() for path in written] == [render([clip], format) for format in FORMATS]
    assert len(names(folder)) == 2 + len(FORMATS)


def test_an_existing_folder_needs_no_slash(folder: Path, clip: Timeline) -> None:
    assert write_outputs([clip], ["srt", "srt"], folder) == [folder / "my clip.srt"]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.srt", "srt"),
        ("a.VTT", "vtt"),
        ("a.csv", "csv"),
        ("a.edl", "edl"),
        ("a.otio", "otio"),
        ("a.fcpxml", "fcpxml"),
        ("chapters.txt", "chapters"),
        ("a.chapters.xml", "mkv"),
        ("a.ffmetadata", "ffmetadata"),
    ],
)
def test_a_suffix_tells_the_format(name: str, format: str, clip: Timeline) -> None:
    assert write_outputs([clip], [], name) == [Path(name)]
    assert Path(name).read_bytes().decode() == render([clip], format)


def test_a_named_format_wins_over_the_suffix(clip: Timeline) -> None:
    write_outputs([clip], ["ffmetadata"], "meta.txt")
    assert Path("meta.txt").read_text(encoding="utf-8").startswith(";FFMETADATA1\n")


def test_clips_of_the_same_name_get_different_files(folder: Path) -> None:
    clips = [make_timeline(path=path) for path in ("a/x.mp4", "b/X.mov", "c/x.mp4", "c/y.mp4")]
    written = write_outputs(clips, ["csv"], "out/")
    assert [path.name for path in written] == ["x.csv", "X-2.csv", "x-3.csv", "y.csv"]


def test_several_clips_in_one_file(clip: Timeline) -> None:
    write_outputs([clip, clip], [], "all.csv")
    assert len(Path("all.csv").read_text(encoding="utf-8").splitlines()) == 7


@pytest.mark.parametrize(
    ("formats", "output", "said"),
    [
        (["docx"], "out/", "there is no format 'docx'; there are csv, srt, vtt"),
        ([], "a.docx", "the name a.docx does not tell its format: say it with -f, one of csv, srt"),
        ([], "noname", "the name noname does not tell its format"),
        ([], "out/", "say what to write into out with -f"),
        (["srt", "vtt"], "a.srt", "a.srt would hold srt and vtt: give a folder, as in -o a/"),
        (["srt"], "file/inside.srt", "file is not a folder that can be written to"),
        (["srt"], "file/inside/", "file is not a folder that can be written to"),
        (["srt"], "file", "file exists; give another place with -o, or --overwrite"),
        (["srt"], "/dev/null", "/dev/null is not an ordinary file"),
    ],
)
def test_what_does_not_fit(folder: Path, clip: Timeline, formats: list[str], output: str, said: str) -> None:
    Path("file").write_text("mine")
    with pytest.raises(UsageError, match=re.escape(said)):
        write_outputs([clip], formats, output)
    assert names(folder) == ["file"]


def test_several_clips_do_not_fit_one_subtitle_file(folder: Path, clip: Timeline) -> None:
    with pytest.raises(UsageError, match="srt holds the parts of one clip, and there are 2: give a folder"):
        write_outputs([clip, clip], [], "a.srt")
    assert names(folder) == []


def test_a_format_that_fails_leaves_nothing(folder: Path, variable: Timeline, clip: Timeline) -> None:
    with pytest.raises(UsageError, match="variable frame rate"):
        write_outputs([clip, variable], ["srt", "edl"], "out/")
    with pytest.raises(UsageError, match="chapters for YouTube must be 3 or more"):
        write_outputs([make_timeline(shown(["a"]))], ["srt", "chapters"], "out/")
    assert names(folder) == []


def test_files_that_are_there(folder: Path, clip: Timeline) -> None:
    (folder / "my clip.srt").write_text("mine")
    with pytest.raises(UsageError, match=r"my clip\.srt exists; give another place with -o, or --overwrite"):
        write_outputs([clip], ["vtt", "srt"], folder)
    assert names(folder) == ["my clip.srt"]
    assert (folder / "my clip.srt").read_text() == "mine"
    write_outputs([clip], ["vtt", "srt"], folder, overwrite=True)
    assert (folder / "my clip.srt").read_text(encoding="utf-8").startswith("1\n00:00:00,000")
    assert names(folder) == ["my clip.srt", "my clip.vtt"]


def test_the_clip_itself_is_never_replaced(folder: Path) -> None:
    path = folder / "clip.mp4"
    path.write_bytes(b"precious")
    os.link(path, folder / "other.mp4")
    for output in ("clip.mp4", "./clip.mp4", "other.mp4"):
        with pytest.raises(UsageError, match=r"mp4 is the clip itself"):
            write_outputs([make_timeline(path=str(path))], ["srt"], output, overwrite=True)
    assert path.read_bytes() == b"precious"


def test_a_folder_without_permission(folder: Path, clip: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() == 0:  # who may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    with pytest.raises(UsageError, match="closed is not a folder that can be written to"):
        write_outputs([clip], ["srt"], closed)
    assert names(folder) == ["closed"]


def test_a_disk_that_fails_half_way_leaves_nothing(
    folder: Path, clip: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "my clip.srt").write_text("mine")
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith(".my clip.vtt"):
            real(path, data[:3])
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(KeyeError, match=r"cannot write .*my clip\.vtt: No space left on device"):
        write_outputs([clip], ["srt", "vtt"], folder, overwrite=True)
    assert names(folder) == ["my clip.srt"]
    assert (folder / "my clip.srt").read_text() == "mine"


def test_texts_go_the_same_way(folder: Path) -> None:
    assert write_texts([(Path("a/b.json"), "{}\n"), (Path("c.md"), "# 红\n")]) == [
        Path("a/b.json"),
        Path("c.md"),
    ]
    assert Path("c.md").read_bytes() == "# 红\n".encode()
    with pytest.raises(UsageError, match="exists"):
        write_texts([(Path("new.md"), ""), (Path("c.md"), "")])
    assert not Path("new.md").exists()


class TestRequest:
    """What commands use: formats of their own, and checks before the work."""

    OWN = {"json": ".json", "markdown": ".md"}

    def own(self, format: str, clips: Sequence[int]) -> str:
        return f"{format} of {list(clips)}\n"

    def test_own_formats_stand_beside_the_others(self, folder: Path, clip: Timeline) -> None:
        request = OutputRequest(("json", "srt"), "out/", own=self.OWN)
        other = make_timeline(path="other.mp4")
        request.check([clip, other])
        assert [path.name for path in request.write([clip, other], self.own)] == [
            "my clip.json",
            "my clip.srt",
            "other.json",
            "other.srt",
        ]
        assert Path("out/other.json").read_text() == "json of [1]\n"

    def test_own_formats_by_suffix_and_on_stdout(self, clip: Timeline) -> None:
        OutputRequest((), "a.md", own=self.OWN).write([clip, clip], self.own)
        assert Path("a.md").read_text() == "markdown of [0, 1]\n"
        assert OutputRequest(("json",), own=self.OWN).text([clip, clip], self.own) == "json of [0, 1]\n"

    def test_unknown_formats_name_them_all(self) -> None:
        with pytest.raises(UsageError, match="there is no format 'html'; there are json, markdown, csv, srt"):
            OutputRequest(("html",), own=self.OWN).check_names()

    def test_stdout_holds_one_format(self, clip: Timeline) -> None:
        with pytest.raises(UsageError, match="srt and vtt cannot share stdout"):
            OutputRequest(("srt", "vtt")).check([clip])
        with pytest.raises(UsageError, match="srt holds the parts of one clip, and there are 2"):
            OutputRequest(("srt",)).check([clip, clip])

    def test_a_rate_is_missed_before_the_work(self, folder: Path, clip: Timeline, variable: Timeline) -> None:
        bare = Timeline(variable.path, variable.duration_s, 1, 1, variable.frame_times, ())
        for output in (None, "a.edl", "out/"):
            with pytest.raises(UsageError, match="variable frame rate"):
                OutputRequest(("edl",), output).check([bare])
        OutputRequest(("chapters",), "out/").check([bare])  # how many there will be is not known yet

    def test_a_wrong_start_timecode_is_told_before_the_work(self, clip: Timeline) -> None:
        for format in ("csv", "edl"):
            with pytest.raises(UsageError, match="is not a timecode"):
                OutputRequest((format,), options=ExportOptions(start_timecode="1:00")).check([clip])

    def test_no_clip(self) -> None:
        with pytest.raises(UsageError, match="there is no clip to write"):
            render([], "csv")

    def test_nothing_wanted(self, clip: Timeline) -> None:
        assert not OutputRequest().wanted
        OutputRequest().check([clip, clip])
        assert OutputRequest((), "a.srt").wanted
        assert OutputRequest(("srt",)).wanted


def test_rounded_off_warnings_reach_the_user(clip: Timeline) -> None:
    with pytest.warns(KeyeWarning, match="a part of it is shorter than a frame"):
        files.render([make_timeline([Segment(1, 1.001, "tiny")])], "edl")
