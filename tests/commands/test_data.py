"""`keye data check`: its lines, its objects, its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import Keye
from tests.test_docs import assert_named
from tests.training.data.conftest import question

Check = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(keye: Keye, folder: Path, clip: Path, tiny_checkpoint: Path) -> Check:
    """`check(row, …, options=(…))`: the command on a file of these rows beside a.mp4, which is 2.04 s long."""
    shutil.copy(clip, folder / "a.mp4")

    def run(*rows: Any, options: tuple[str, ...] = (), name: str = "data.jsonl") -> tuple[int, str, str]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / name).write_text("".join(line + "\n" for line in lines))
        return keye("data", "check", name, "-m", str(tiny_checkpoint), *options)

    return run


GOOD = (question(), question("A cat.", text="Who?"))
BAD = (question(videos=["b.mp4"]), "{", question("[[1.0, 9.0]]"), question())


def test_good_rows(check: Check) -> None:
    code, out, err = check(*GOOD, options=("--parity",))
    assert (code, err) == (0, "")
    first, proof, tokens, *bars = out.splitlines()
    assert first == "2 rows, 0 with something wrong"
    assert proof == "training gives the model what answering does, bit for bit: 2 of 2 rows"
    assert tokens.startswith("tokens of a row: ")
    assert tokens.endswith(" 16 learnt")  # a token a byte, and the two that end each answer
    assert sum(int(bar.split()[-1]) for bar in bars) == 2


def test_a_line_a_finding(check: Check) -> None:
    code, out, err = check(*GOOD, *BAD)
    assert code == 3
    lines = out.splitlines()
    assert lines[0] == "data.jsonl:3: b.mp4 does not exist; check the path"
    assert lines[1].startswith("data.jsonl:4: the line is not JSON: ")
    assert lines[2] == (
        "data.jsonl:5: the span 1 - 9 s is outside of the clip, which is seen from 0.0 to 2.0 s"
    )
    assert lines[3] == "data.jsonl:6: the row says the same as data.jsonl:1"
    assert lines[4] == "6 rows, 4 with something wrong"
    assert err == (
        "keye: 4 of 6 rows have something wrong with them: 1 of no known form, 1 with clips that cannot be used, "
        "1 with wrong spans, 1 that are there twice\n"
    )


def test_json(check: Check) -> None:
    code, out, err = check(*GOOD, *BAD, options=("--json", "--fix", "good.jsonl", "-q"))
    assert code == 3
    assert err.startswith("keye: 4 of 6 rows")
    *findings, summary = map(json.loads, out.splitlines())
    assert [(found["line"], found["kind"]) for found in findings] == [
        (3, "clip"), (4, "row"), (5, "span"), (6, "duplicate"),
    ]  # fmt: skip
    assert (summary["rows"], summary["wrong_rows"], summary["good_rows"]) == (6, 4, 2)
    assert summary["tokens"] == summary["min_tokens"] + summary["max_tokens"] + 2 * summary["median_tokens"]
    assert sum(bar["rows"] for bar in summary["histogram"]) == summary["counted_rows"] == 4
    assert {said["schema"] for said in (*findings, summary)} == {"keye.data/1"}
    assert_named(
        "keye.data/1 (`keye data check --json`)",
        *findings,
        summary,
        summary["histogram"][0],
        summary["kinds"],
    )


def test_fix(check: Check, folder: Path) -> None:
    """What was fixed is good; a file in another folder needs to be told where its clips are."""
    (folder / "other").mkdir()
    code, _, err = check(*GOOD, *BAD, question("[[1.5, 0.5]]"), options=("--fix", "other/good.jsonl"))
    assert code == 3
    assert "keye: wrote other/good.jsonl: 3 rows, 1 of them repaired\n" in err
    assert "use it with --media-root ." in err
    assert check(*(folder / "other" / "good.jsonl").read_text().splitlines())[0] == 0
    code, _, err = check(*GOOD, options=("--fix", "other/good.jsonl"))
    assert code == 2
    assert "--overwrite" in err


def test_lengths_and_frames(check: Check) -> None:
    """Fewer frames take fewer tokens."""
    most = [
        json.loads(check(GOOD[0], options=("--json", *few))[1])["tokens"]
        for few in ((), ("--max-frames", "2"))
    ]
    assert most[1] < most[0]
    code, out, _ = check(GOOD[0], options=("--max-length", str(most[0] - 1)))
    assert code == 3
    assert f"takes {most[0]} tokens and --max-length allows {most[0] - 1}" in out
    assert check(GOOD[0], options=("--max-length", str(most[0] - 1), "--max-frames", "2"))[0] == 0


def test_a_dataset_by_name(check: Check, keye: Keye, folder: Path, tiny_checkpoint: Path) -> None:
    info = {
        "mine": {
            "file_name": "mine.json",
            "columns": {"prompt": "ask", "response": "reply", "videos": "videos"},
        }
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    row = {"ask": "<video>What?", "reply": "A dog.", "videos": ["a.mp4"]}
    assert check(row, name="mine.json")[0] == 0
    arguments = ("data", "check", "dataset_info.json", "-m", str(tiny_checkpoint), "--dataset")
    assert keye(*arguments, "mine")[0] == 0
    assert keye(*arguments, "yours")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("count", "data.jsonl"), 2, "keye data can check, not count"),
        (("check",), 2, "name the data to check"),
        (("check", "data.jsonl", "--format", "other"), 2, "there is no format other"),
        (("check", "data.jsonl", "--max-length", "0"), 2, "--max-length must be at least 1"),
        (("check", "data.jsonl", "--overwrite"), 2, "--overwrite goes with --fix"),
        (("check", "data.jsonl", "--media-root", "none"), 2, "--media-root none is not a folder"),
        (("check", "none.jsonl"), 3, "none.jsonl does not exist"),
        (("check", "."), 3, "is a folder"),
        (("check", "empty.jsonl"), 3, "has no rows"),
        (("check", "words.txt"), 3, "is not JSON"),
        (("check", "a.mp4"), 3, "is not text"),
    ],
)
def test_refused(
    keye: Keye, folder: Path, clip: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    shutil.copy(clip, folder / "a.mp4")
    (folder / "data.jsonl").write_text(json.dumps(question()))
    (folder / "empty.jsonl").touch()
    (folder / "words.txt").write_text("hello\n")
    result, out, err = keye("data", *arguments)
    assert (result, out) == (code, "")
    assert err.startswith("keye: ")
    assert err.count("\n") == 1
    assert words in err


def test_usage_errors_are_quick(isolated: dict[str, str]) -> None:
    program = (
        "import sys; from keyecli.cli import run; code = run(['data', 'count', 'x']); "
        "print(code, [name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=isolated, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 []\n"
