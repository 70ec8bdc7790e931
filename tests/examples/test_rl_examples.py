"""The parts of examples/rl_nano.sh and examples/distill_nano.sh that judge, and the rows that they learn from."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.examples.test_finetune_examples import EXAMPLES, run
from tests.test_docs import load_script


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    path = tmp_path / "figures.json"
    path.write_text(
        json.dumps(
            {
                "nano": {"ground": 0.48, "old table": 0.96},
                "grounding": {"ground": 0.64, "old table": 0.93},
                "student": {"ground": 0.625},
            }
        )
    )
    return path


def test_aims(figures: Path) -> None:
    code, out = run("rl_nano/aims.py", figures, "grounding:ground:+0.15", "student:ground:grounding")
    assert (code, out) == (0, "all aims are reached\n")
    code, out = run("rl_nano/aims.py", figures, "grounding:ground:+0.2", "grounding:old table:-0.02")
    assert code == 1
    assert out.splitlines() == [
        "grounding has 0.640 in ground, and 0.680 was aimed at",
        "grounding has 0.930 in old table, and 0.940 was aimed at",
    ]


def test_the_share_of_right_answers_with_the_wrong_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "rl_nano")
    share = load_script(EXAMPLES / "rl_nano" / "rejected.py").rejected_share
    assert share([0.1, 1.0, 0.0, None, 0.1, 1.0]) == (0.5, 4)
    assert share([0.0, None]) == (0.0, 0)


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    return load_script(EXAMPLES / "rl_nano" / "judge.py")


@pytest.mark.parametrize(
    ("solution", "reasoning", "process"),
    [
        ("blue star, red ring", "red ring, blue star", "pass"),
        ("blue star, red ring", "red ring, blue ring", "fail"),
        ("red ring: [[1.0, 3.0]]", "red ring: [[1.0, 3.5]]", "pass"),
        ("red ring: [[1.0, 3.0]]", "red ring: [[4.0, 5.5]]", "fail"),
        ("red ring: [[1.0, 3.0]]", "blue ring: [[1.0, 3.0]]", "fail"),
        ("red ring: [[1.0, 3.0]]", "red ring: [[1.0, 2.0], [2.0, 3.0]]", "fail"),
        ("red ring: [[1.0, 3.0]]", "", "fail"),
    ],
)
def test_the_judge_compares_what_was_seen(
    judge: ModuleType, solution: str, reasoning: str, process: str
) -> None:
    question = (
        f"<verified_solution>\n{solution}\n\n1\n</verified_solution>\n\n"
        f"<rollout_reasoning>\n{reasoning}\n</rollout_reasoning>"
    )
    assert judge.verdict(question)["process"] == process


def test_rows_say_their_own_rate(tmp_path: Path) -> None:
    code, out = run("rl_nano/make_data.py", tmp_path / "data", "--tasks", "both", "--count", "2")
    assert code == 0
    assert out.endswith("4 rows about 2 clips\n")
    rows = [json.loads(line) for line in (tmp_path / "data" / "data.jsonl").read_text().splitlines()]
    for row in rows:
        video, text = row["messages"][0]["content"]
        assert (video["fps"], text["text"]) == (0.5, row["question"])
        assert (tmp_path / "data" / video["video"]).is_file()
