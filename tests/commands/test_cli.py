"""What the command line says and does without a model: help, version, completion, usage errors, failures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keyecli import __version__, cli, settings
from keyecli.commands import COMMANDS
from keyecli.commands import plan as plan_command
from keyecli.errors import InputError, KeyeError, MemoryLimitError, ModelError, UsageError
from tests.commands.conftest import Keye, run_keye

HEAVY = ("torch", "transformers", "av", "numpy", "rich")
# Completion looks for the shell above it, which a test that was started in the background has not.
IN_A_SHELL = ("bash", "-c", '"$@"; exit $?', "bash")


LIGHT = {
    "help": (["--help"], 0),
    "short help": (["-h"], 0),
    "version": (["--version"], 0),
    "help of a command": (["ask", "--help"], 0),
    "help of forge": (["forge", "--help"], 0),
    "completion script": (["--show-completion"], 0),
    "nothing": ([], 2),
    "unknown command": (["aks"], 2),
    "unknown option": (["ask", "clip.mp4", "What?", "--frames", "3"], 2),
    "unknown option of keye": (["--frames"], 2),
    "no arguments": (["ask"], 2),
    "no question": (["ask", "clip.mp4"], 2),
    "no video": (["ask", "What?"], 2),
    "empty question": (["ask", "clip.mp4", " "], 2),
    "option without value": (["ask", "clip.mp4", "What?", "--fps"], 2),
    "no number": (["ask", "clip.mp4", "What?", "--fps", "fast"], 2),
    "out of range": (["ask", "clip.mp4", "What?", "--top-p", "2"], 2),
    "no time": (["ask", "clip.mp4", "What?", "--start", "soon"], 2),
    "nothing between the times": (["ask", "clip.mp4", "What?", "--start", "2", "--end", "2"], 2),
    "no length": (["ask", "clip.mp4", "What?", "--duration", "0"], 2),
    "end and duration": (["plan", "clip.mp4", "--end", "2", "--duration", "2"], 2),
    "no such config": (["plan", "clip.mp4", "--config", "none.toml"], 2),
    "plan of nothing": (["plan"], 2),
    "forge without folder": (["forge"], 2),
}


@pytest.mark.parametrize(("arguments", "code"), LIGHT.values(), ids=list(LIGHT))
def test_nothing_heavy_is_imported_before_work_begins(
    arguments: list[str], code: int, isolated: dict[str, str]
) -> None:
    program = (
        "import sys\n"
        "from keyecli.cli import run\n"
        "code = run(sys.argv[1:])\n"
        f"print('heavy:', *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    ended = subprocess.run(
        [*IN_A_SHELL, sys.executable, "-c", program, *arguments],
        env=isolated,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr.splitlines()[-1] == "heavy:"
    assert ended.returncode == code


def test_completion_imports_nothing_heavy(isolated: dict[str, str]) -> None:
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('heavy:', *(n for n in {HEAVY} if n in sys.modules), file=sys.stderr))\n"
        "from keyecli.cli import main\n"
        "main()"
    )
    for words, index, expected in (
        ("keye ", "1", "\n".join(COMMANDS)),
        ("keye ask --max-t", "2", "--max-tokens"),
    ):
        environment = isolated | {"_KEYE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": index}
        ended = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.stdout.startswith(expected)
        assert ended.stderr.splitlines() == ["heavy:"]


def test_version(keye: Keye) -> None:
    assert keye("--version") == (0, f"keye {__version__}\n", "")


def test_help_names_every_command(keye: Keye) -> None:
    code, out, err = keye("--help")
    assert (code, err) == (0, "")
    for name, summary in COMMANDS.items():
        assert f"  {name} " in out
        assert summary in out


def test_keye_alone_shows_its_help_and_is_a_usage_error(keye: Keye) -> None:
    code, out, err = keye()
    assert (code, out) == (2, "")
    assert err == keye("--help")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_opening_sentence_and_options_with_help(command: str, keye: Keye) -> None:
    code, out, _ = keye(command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: keye {command} [OPTIONS]")
    function = getattr(__import__(f"keyecli.commands.{command}", fromlist=[command]), command)
    assert function.__doc__.split("\n")[0].endswith(".")
    context = cli.build().make_context("keye", [], resilient_parsing=True)
    for param in cli.build().get_command(context, command).params:
        assert param.help, f"{command}: {param.name} has no help"


ONE_SENTENCE = {
    "aks": "keye: there is no command aks; did you mean ask?\n",
    "dance": f"keye: there is no command dance; there are {', '.join(COMMANDS)}\n",
    "ask": 'keye: nothing to look at: give a video and a question, as in `keye ask clip.mp4 "What happens?"`\n',
    "ask clip.mp4": 'keye: no question after clip.mp4: give one, as in `keye ask clip.mp4 "What happens?"`\n',
    "plan": "keye: nothing to look at: give at least one video, as in `keye plan clip.mp4`\n",
    "plan a.mp4 --fps 0": "keye: --fps must be above 0, not 0.0\n",
    "plan a.mp4 --fps": "keye: option '--fps' requires an argument; see keye plan --help\n",
    "plan - --fps 1": "keye: videos are not read from stdin: save it to a file and name that\n",
    "ask - What?": "keye: videos are not read from stdin: save it to a file and name that\n",
    "plan a.mp4 --zzz": "keye: no such option: --zzz; see keye plan --help\n",
}


@pytest.mark.parametrize("line", ONE_SENTENCE)
def test_a_usage_error_is_one_sentence(line: str, keye: Keye) -> None:
    assert keye(*line.split()) == (2, "", ONE_SENTENCE[line])


def test_an_existing_file_is_an_input_whatever_its_name(keye: Keye, folder: Path) -> None:
    (folder / "clip").touch()
    assert keye("ask", "other.mp4", "clip")[2].startswith("keye: no question after clip:")


def test_underscores_in_flags(keye: Keye) -> None:
    assert (
        keye("plan", "a.mp4", "--max_tokens_video=0")[2]
        == "keye: --max-tokens-video must be at least 1, not 0\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyeError("it broke"), 1, "it broke"),
        (UsageError("not so"), 2, "not so"),
        (InputError("no video"), 3, "no video"),
        (ModelError("no weights"), 4, "no weights"),
        (MemoryLimitError("too much"), 5, "too much"),
        (MemoryError(), 5, "not enough memory: sample less with --max-frames or --max-tokens-video"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            RuntimeError("a\nb"),
            1,
            "RuntimeError (a b); this is a fault in keye: run again with --debug for the traceback",
        ),
        (KeyeError("two\nlines \x1b[2J"), 1, "two lines ?[2J"),
    ],
)
def test_each_failure_has_its_code_and_one_sentence(
    error: BaseException, code: int, said: str, keye: Keye, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(plan_command, "ask_options", fail)
    assert keye("plan", "clip.mp4") == (code, "", f"keye: {said}\n")


def test_debug_shows_the_traceback(keye: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("deep inside")

    monkeypatch.setattr(plan_command, "ask_options", fail)
    code, out, err = keye("plan", "clip.mp4", "--debug")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):")
    assert "deep inside" in err


def test_settings_come_from_the_project_file(keye: Keye, folder: Path) -> None:
    (folder / "keye.toml").write_text("[plan]\nfps = -2\n")
    assert keye("plan", "clip.mp4") == (2, "", "keye: --fps must be above 0, not -2.0\n")
    (folder / "other.toml").write_text("fps = -3\n")
    assert keye("plan", "clip.mp4", "--config", "other.toml")[2] == "keye: --fps must be above 0, not -3.0\n"


def test_the_user_file_is_where_the_platform_keeps_it() -> None:
    assert settings.user_file().parts[-2:] == ("keye", "config.toml")


def test_a_reader_that_goes_away_is_no_complaint(isolated: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "keyecli", "--help"],
        env=isolated,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 1


def test_a_full_disk_is_one_sentence(isolated: dict[str, str]) -> None:
    program = (
        "import errno\n"
        "from keyecli import cli\n"
        "def full(): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "cli.build = full\n"
        "cli.main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], env=isolated, capture_output=True, text=True, check=False
    )
    said = "keye: the output cannot be written: no space is left where it goes\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", said)


def test_python_m_keyecli(isolated: dict[str, str]) -> None:
    ended = run_keye("--version", env=isolated)
    assert (ended.returncode, ended.stdout) == (0, f"keye {__version__}\n")
