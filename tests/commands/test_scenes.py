"""`keye scenes`: what it prints and writes, without a model, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import Keye
from tests.video.test_damage import cut
from tests.video.test_scenes import shots

Clips = Callable[..., Path]


@pytest.fixture
def movie(clips: Clips) -> Path:
    """Three seconds at 25 frames a second with cuts at 0.8 and 2.0 s."""
    return clips("shots.mp4", 75, picture=shots(20, 30, 25))


LINES = "0:00:00.000 - 0:00:00.800\n0:00:00.800 - 0:00:02.000\n0:00:02.000 - 0:00:03.000\n"


def test_a_line_a_scene(keye: Keye, movie: Path) -> None:
    assert keye("scenes", str(movie)) == (0, LINES, "")


def test_several_videos(keye: Keye, movie: Path, clips: Clips) -> None:
    calm = clips("calm-shots.mp4", 25, picture=shots(25))
    code, out, _ = keye("scenes", str(movie), str(calm))
    assert (code, out) == (0, f"{movie}\n{LINES}\n{calm}\n0:00:00.000 - 0:00:01.000\n")


def test_json(keye: Keye, movie: Path, clips: Clips) -> None:
    calm = clips("calm-shots.mp4", 25, picture=shots(25))
    code, out, _ = keye("scenes", str(movie), str(calm), "--detector", "adaptive", "--json", "--end", "2.76")
    first, second = map(json.loads, out.splitlines())
    assert (code, second["path"], len(second["scenes"])) == (0, str(calm), 1)
    version = first.pop("keye_version")
    assert version
    assert first == {
        "schema": "keye.scenes/1",
        "path": str(movie),
        "duration_s": 3.0,
        "frames": 75,
        "scenes": [
            {"start_s": 0.0, "end_s": 0.8, "start_frame": 0, "end_frame": 20},
            {"start_s": 0.8, "end_s": 2.0, "start_frame": 20, "end_frame": 50},
            {"start_s": 2.0, "end_s": 2.8, "start_frame": 50, "end_frame": 70},
        ],
        "detector": "adaptive",
        "threshold": 3.0,
        "min_scene_s": 0.6,
        "start_s": None,
        "end_s": 2.76,
        "truncated_at_s": None,
    }


def test_formats(keye: Keye, movie: Path, folder: Path) -> None:
    code, out, _ = keye("scenes", str(movie), "-f", "csv")
    rows = [line.split(",") for line in out.splitlines()]
    assert (code, [row[1:3] + row[5:7] + [row[8]] for row in rows[1:]]) == (
        0,
        [
            ["0.000", "0.800", "0", "20", "Scene 1"],
            ["0.800", "2.000", "20", "50", "Scene 2"],
            ["2.000", "3.000", "50", "75", "Scene 3"],
        ],
    )
    code, out, err = keye("scenes", str(movie), "-f", "edl", "-f", "json", "-o", "out/")
    assert (code, out) == (0, "")
    assert err == "keye: wrote out/shots.edl\nkeye: wrote out/shots.json\n"
    assert json.loads((folder / "out/shots.json").read_text())["scenes"][1]["start_frame"] == 20
    assert "00:00:00:20 00:00:02:00" in (folder / "out/shots.edl").read_text()


def test_no_model_is_loaded(movie: Path, isolated: dict[str, str]) -> None:
    program = (
        "import sys\n"
        "from keyecli.cli import run\n"
        f"code = run(['scenes', {str(movie)!r}])\n"
        "heavy = [name for name in sys.modules if name.split('.')[0] in ('torch', 'transformers')]\n"
        "own = [name for name in sys.modules if name.startswith(('keyecli.model', 'keyecli.engine', 'keyecli.tasks'))]\n"
        "print(heavy + own, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=isolated, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, LINES, "[]\n")


def test_a_damaged_file(keye: Keye, clips: Clips) -> None:
    whole = clips("damaged-shots.mkv", 200, picture=shots(60, 90, 50), options={"g": "10"})
    code, out, err = keye("scenes", str(cut(whole, 0.6)))
    assert (code, out.splitlines()[0]) == (0, "0:00:00.000 - 0:00:02.400")
    assert err.count("\n") == err.count("keye: warning: ")
    assert "is cut off: it can be read only up to" in err
    code, out, err = keye("scenes", str(cut(whole, 0.6)), "--strict")
    assert (code, out) == (3, "")
    assert "is cut off after" in err


BAD = {
    "nothing": ([], 2, "nothing to look at: give at least one video, as in `keye scenes clip.mp4`"),
    "stdin": (["-"], 2, "videos are not read from stdin: save it to a file and name that"),
    "no such file": (["none.mp4"], 3, "none.mp4 does not exist; check the path"),
    "text": (
        ["text.mp4"],
        3,
        "text.mp4 is not a video or image that FFmpeg can read; check that it is the right file",
    ),
    "image": (["still.png"], 3, "still.png is a still image, which has no scenes; name a video"),
    "detector": (
        ["MOVIE", "--detector", "magic"],
        2,
        "there is no scene detector 'magic'; there are content, adaptive",
    ),
    "threshold": (
        ["MOVIE", "--threshold", "-3"],
        2,
        "--threshold must be above 0 and at most 255, not -3",
    ),
    "min scene": (["MOVIE", "--min-scene", "-1"], 2, "--min-scene must be 0 seconds or more, not -1.0"),
    "part": (
        ["MOVIE", "--start", "9"],
        2,
        "the part begins at 0:00:09.000, but shots.mp4 ends at 0:00:03.000",
    ),
    "two on stdout": (
        ["MOVIE", "-f", "srt", "--json"],
        2,
        "--json and -f srt cannot share stdout: give a file for one with -o",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "message"), BAD.values(), ids=list(BAD))
def test_bad_input(
    keye: Keye, movie: Path, folder: Path, arguments: list[str], code: int, message: str
) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(folder / "still.png")
    (folder / "text.mp4").write_text("no video at all")
    given = [str(movie) if argument == "MOVIE" else argument for argument in arguments]
    assert keye("scenes", *given) == (code, "", f"keye: {message}\n")


def test_an_unknown_format_and_a_taken_place(keye: Keye, movie: Path, folder: Path) -> None:
    (folder / "taken.srt").write_text("mine")
    code, out, err = keye("scenes", str(movie), "-o", "taken.srt")
    assert (code, out, "exists" in err) == (2, "", True)
    assert (folder / "taken.srt").read_text() == "mine"
    code, out, err = keye("scenes", str(movie), "-f", "docx")
    assert (code, out, "there is no format 'docx'" in err) == (2, "", True)
    assert keye("scenes", str(movie), "-o", "taken.srt", "--overwrite")[0] == 0
    assert "Scene 3" in (folder / "taken.srt").read_text()
