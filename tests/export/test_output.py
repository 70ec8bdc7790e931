"""The options of commands that write files: as a command line takes them, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from keyecli.commands.output import (
    FORMAT_NAMES,
    DropFrame,
    Formats,
    Output,
    Overwrite,
    Rate,
    StartTimecode,
    deliver,
    output_request,
)
from keyecli.errors import UsageError
from keyecli.export.formats import FORMATS
from keyecli.export.timeline import Segment
from tests.export.conftest import NTSC, make_timeline

app = typer.Typer()
CLIP = make_timeline([Segment(1, 2, "ball")], rate=NTSC, frames=300, path="ball.mp4")


@app.command()
def command(
    formats: Formats = None,
    output: Output = None,
    overwrite: Overwrite = False,
    rate: Rate = None,
    start_timecode: StartTimecode = None,
    drop_frame: DropFrame = None,
) -> None:
    """Deliver one clip."""
    request = output_request(
        formats,
        output,
        overwrite=overwrite,
        rate=rate,
        start_timecode=start_timecode,
        drop_frame=drop_frame,
        own={"json": ".json"},
    )
    request.check([CLIP])
    deliver(request, [CLIP], own)


def own(format: str, clips: Sequence[int]) -> str:
    return f"{format} {list(clips)}"


def run(*arguments: str) -> tuple[str, str]:
    """stdout and stderr; what the command raised is raised."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout, result.stderr


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_help_names_every_format() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES


def test_one_format_on_stdout() -> None:
    assert run("-f", "srt") == ("1\n00:00:01,000 --> 00:00:02,000\nball\n\n", "")
    assert run("-f", "JSON", "-o", "-") == ("json [0]\n", "")


def test_files_are_named_on_stderr(folder: Path) -> None:
    assert run("-f", "srt,edl", "-f", "json", "-o", "out/") == (
        "",
        "keye: wrote out/ball.srt\nkeye: wrote out/ball.edl\nkeye: wrote out/ball.json\n",
    )
    assert Path("out/ball.json").read_text() == "json [0]"
    with pytest.raises(UsageError, match=r"out/ball\.srt exists"):
        run("-f", "srt", "-o", "out/")
    run("-f", "srt", "-o", "out/", "--overwrite")


def test_what_editors_need() -> None:
    text, _ = run("-f", "edl", "--rate", "29.97", "--start-timecode", "01:00:00;00")
    assert "FCM: DROP FRAME" in text
    assert "01:00:01;00 01:00:02;00 01:00:00;00 01:00:01;00" in text
    text, _ = run("-f", "edl", "--no-drop-frame", "--start-timecode", "01:00:00:00")
    assert "01:00:01:00 01:00:02:00 01:00:00:00 01:00:01:00" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-f", "avi"], "there is no format 'avi'; there are json, csv"),
        (["-f", ""], "there is no format ''"),
        (["-f", "srt", "-f", "vtt"], "cannot share stdout"),
        (["-f", "edl", "--rate", "fast"], "'fast' is not a frame rate"),
        (["-f", "edl", "--rate", "0"], "a frame rate is above 0"),
        (["-f", "edl", "--rate", "12.5"], "timecode cannot count 12.5"),
        (["-f", "edl", "--start-timecode", "00:01:00;00"], "drop frame leaves that number out"),
        (["-f", "edl", "--rate", "25", "--drop-frame"], "not for 25"),
        (["-o", "out/"], "say what to write into out with -f"),
    ],
)
def test_wrong_usage(folder: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run(*arguments)
    assert list(folder.iterdir()) == []
