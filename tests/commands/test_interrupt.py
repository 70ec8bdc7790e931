"""Ctrl-C: exit code 130, one line, a terminal as it was before; and what a terminal is shown while keye works."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
PATIENCE_S = 240  # for a process that has to import everything on a machine that is busy

# Frames arrive slowly, so that a signal can be sent while they do.
SLOW_DECODING = """\
import sys, time
from keyecli.engine import stream
decode = stream.decode_frames
def slow(*arguments, **options):
    for chunk in decode(*arguments, **options):
        print("decoding", flush=True)
        time.sleep(60)
        yield chunk
stream.decode_frames = slow
from keyecli.cli import main
main()
"""


class Terminal:
    """A process whose three streams are a terminal of its own; `seen` is what was written on it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.seen = b""

    def read_until(self, wanted: Callable[[bytes], object]) -> None:
        """Read until `wanted(seen)`, or to the end."""
        deadline = time.monotonic() + PATIENCE_S
        while not wanted(self.seen) and time.monotonic() < deadline:
            try:
                piece = os.read(self._mine, 4096)
            except OSError:  # Linux: the other side was closed
                piece = b""
            if not piece:
                return
            self.seen += piece

    def end(self) -> int:
        """Read the rest and return the exit code."""
        self.read_until(lambda seen: False)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._mine)


@contextmanager
def terminal(command: list[str], environment: dict[str, str]) -> Iterator[Terminal]:
    opened = Terminal(command, environment)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def question(clip: Path, tiny_checkpoint: Path) -> list[str]:
    return ["ask", str(clip), "What happens?", "-m", str(tiny_checkpoint)]


def assert_interrupted_and_sane(shown: Terminal) -> None:
    assert shown.end() == 130
    assert shown.seen.endswith(b"interrupted\x1b[0m\r\n") or shown.seen.endswith(b"interrupted\r\n")
    assert b"Traceback" not in shown.seen
    assert shown.seen.rfind(SHOW_CURSOR) >= shown.seen.rfind(HIDE_CURSOR)
    styles = re.findall(rb"\x1b\[([0-9;]*)m", shown.seen)
    assert not styles or styles[-1] in (b"0", b"")


@pytest.mark.parametrize("command", ["ask", "plan", "forge"])
def test_while_importing(command: str, question: list[str], isolated: dict[str, str], folder: Path) -> None:
    # Stands in the place of torch, and swallows what it is told, as some libraries do while they are imported.
    (folder / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('cannot be imported')\n"
    )
    environment = isolated | {"PYTHONPATH": f"{folder}{os.pathsep}{isolated['PYTHONPATH']}", "TERM": "xterm"}
    arguments = {"ask": question, "plan": ["plan", question[1]], "forge": ["forge", "shapes"]}[command]
    with terminal([sys.executable, "-m", "keyecli", *arguments], environment) as shown:
        shown.read_until(lambda seen: b"importing" in seen)
        shown.process.send_signal(signal.SIGINT)
        assert_interrupted_and_sane(shown)


def test_while_decoding(question: list[str], isolated: dict[str, str]) -> None:
    environment = isolated | {"TERM": "xterm-256color"}
    with terminal([sys.executable, "-c", SLOW_DECODING, *question], environment) as shown:
        shown.read_until(lambda seen: b"decoding" in seen)
        assert HIDE_CURSOR in shown.seen  # the bar is drawn
        shown.process.send_signal(signal.SIGINT)
        assert_interrupted_and_sane(shown)


def test_while_answering(question: list[str], isolated: dict[str, str]) -> None:
    environment = isolated | {"TERM": "xterm-256color"}
    options = ["--max-tokens", "3000", "--no-think"]  # the toy model then writes some 600 tokens
    # So slowly that a busy machine interrupts them too.
    slowly = (
        "import time\nfrom keyecli.engine.generate import TextStream\nadd = TextStream.add\n"
        "TextStream.add = lambda self, token: time.sleep(0.02) or add(self, token)\n"
        "from keyecli.cli import main\nmain()\n"
    )
    with terminal([sys.executable, "-c", slowly, *question, *options], environment) as shown:
        shown.read_until(lambda seen: SHOW_CURSOR in seen and seen.rpartition(SHOW_CURSOR)[2].strip())
        shown.process.send_signal(signal.SIGINT)
        assert_interrupted_and_sane(shown)


def test_a_warning_begins_on_a_line_of_its_own(question: list[str], isolated: dict[str, str]) -> None:
    command = [sys.executable, "-m", "keyecli", *question, "--no-think", "--max-tokens", "12"]
    with terminal(command, isolated | {"TERM": "dumb"}) as shown:
        assert shown.end() == 0
        assert b"\x1b" not in shown.seen
        answer, warning = shown.seen.rsplit(b"\r\n", 2)[:2]
        assert warning == b"keye: warning: the answer was cut off after 12 tokens; raise --max-tokens"
        assert answer
