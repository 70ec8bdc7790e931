"""The one-liners of examples/pipelines.md, run by bash one after the other, print what stands below them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.examples import warm_keye
from tests.video.conftest import write_clip
from tests.video.test_scenes import shots

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "examples" / "pipelines.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^ *```(bash|text)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class OneLiner:
    command: str
    printed: str

    @property
    def needs_jq(self) -> bool:
        return "jq " in self.command


def read_page() -> list[OneLiner]:
    lines: list[OneLiner] = []
    for language, block in BLOCK.findall(PAGE):
        text = textwrap.dedent(block)
        if language == "bash":
            lines.append(OneLiner(text.rstrip("\n"), ""))
        else:
            lines[-1] = OneLiner(lines[-1].command, text)
    return lines


LINES = read_page()
# They share a folder, whose making takes its time.
pytestmark = pytest.mark.xdist_group("pipelines")
NOTICE = "keye: keye-nano answers, which knows nothing but synthetic FrameForge clips"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a `keye` to be found by bash."""
    place = tmp_path_factory.mktemp("warm")
    address = place / "socket"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYE_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HOME": str(place),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONUNBUFFERED", None)
    server = subprocess.Popen(
        [sys.executable, warm_keye.__file__, str(address)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        (place / "bin").mkdir()
        warm_keye.write_client(place / "bin" / "keye", address)
        yield place / "bin"
    finally:
        server.terminate()
        server.communicate()


@pytest.fixture(scope="module")
def ended(
    program: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """What came of each line, in one folder, since later ones use what earlier ones left."""
    folder = tmp_path_factory.mktemp("pipelines")
    write_clip(folder / "film.mp4", 80, rate=2, picture=shots(25, 55), options={"g": "5"})
    environment = {**os.environ, "PATH": f"{program}{os.pathsep}{os.environ['PATH']}"}
    return {
        line.command: subprocess.run(
            ["bash", "-c", line.command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for line in LINES
        if not line.needs_jq or shutil.which("jq")
    }


def test_there_are_ten_and_most_of_them_need_no_other_program() -> None:
    one_liners = LINES[1:]  # behind the one that makes the clips
    assert len(one_liners) >= 10
    assert all("\n" not in line.command for line in one_liners)
    assert sum(not line.needs_jq for line in one_liners) >= 10


@pytest.mark.parametrize("line", LINES, ids=[line.command[:40] for line in LINES])
def test_a_line_prints_what_stands_below_it(
    line: OneLiner, ended: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    if line.command not in ended:
        pytest.skip("jq is not installed")
    result = ended[line.command]
    said = [words for words in result.stderr.splitlines() if not words.startswith((NOTICE, "keye: wrote "))]
    assert (result.returncode, said) == (0, [])
    assert result.stdout == line.printed


def test_what_is_left_behind(ended: dict[str, subprocess.CompletedProcess[str]]) -> None:
    (command,) = (line.command for line in LINES if "edits/" in line.command)
    assert re.findall(r"wrote (\S+)", ended[command].stderr) == [
        "edits/000001.edl",
        "edits/000001.chapters.xml",
        "edits/000001.csv",
    ]
    (command,) = (line.command for line in LINES if "summary.html" in line.command)
    assert "wrote summary.html" in ended[command].stderr
