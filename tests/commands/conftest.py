"""Ways to run `keye` from a test, in this process and in one of its own, and something to ask about."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Keye(Protocol):
    """`keye("ask", ...)` → exit code, stdout, stderr."""

    def __call__(self, *arguments: str) -> tuple[int, str, str]: ...


def run_keye(*arguments: str, env: Mapping[str, str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m keyecli` in a process of its own."""
    command = [sys.executable, "-m", "keyecli", *arguments]
    return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and neither settings nor models of the user's own."""
    for name in os.environ:
        if name.startswith(("KEYE_", "XDG_")) and name != "KEYE_CACHE_DIR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def isolated(folder: Path) -> dict[str, str]:
    """The environment of a process of its own."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def keye(capsys: pytest.CaptureFixture[str]) -> Iterator[Keye]:
    """Runs a command line in this process; what it says of the console, as -q does, ends with the test."""
    from keyecli.cli import run
    from keyecli.console import console

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    console.configure()


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`clips("name.mp4", frames=..., ...)`: a small clip, made once for all tests."""
    from tests.video.conftest import write_clip

    made = tmp_path_factory.mktemp("clips")

    def make(name: str = "clip.mp4", frames: int = 51, **arguments: object) -> Path:
        # A name may stand for several clips: each kind has a folder of its own.
        kind = zlib.crc32(repr((frames, arguments)).encode())
        path = made / f"{kind:08x}" / name
        path.parent.mkdir(exist_ok=True)
        return path if path.exists() else write_clip(path, frames, **arguments)  # type: ignore[arg-type]

    return make


@pytest.fixture
def clip(clips: Callable[..., Path]) -> Path:
    """Two seconds of video: 51 frames at 25 a second, 160x96 pixels."""
    return clips()
