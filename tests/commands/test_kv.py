"""`--kv`: what the commands make of it, wherever it is set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import keyecli
from tests.commands.conftest import Keye

FEW = ("--max-tokens", "12", "--no-think")


@pytest.fixture(autouse=True)
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    return tiny_checkpoint


def test_an_answer_over_an_fp8_cache(keye: Keye, clip: Path, tiny_checkpoint: Path) -> None:
    code, out, err = keye("ask", str(clip), "What happens?", *FEW, "--kv", "fp8")
    assert (code, err) == (
        0,
        "keye: warning: the answer was cut off after 12 tokens; raise --max-tokens\n",
    )
    loaded = keyecli.load(tiny_checkpoint, kv="fp8")
    assert loaded.loaded.kv == "fp8"
    assert out == loaded.ask(clip, "What happens?", max_tokens=12, think=False).text + "\n"


@pytest.mark.parametrize("way", ["flag", "environment", "file"])
def test_plans_show_it(keye: Keye, clip: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(keye("plan", str(clip), "--json")[1])
    assert before["kv"] == before["dtype"] == "fp32"
    if way == "environment":
        monkeypatch.setenv("KEYE_KV", "fp8")
    elif way == "file":
        Path("keye.toml").write_text("kv = 'fp8'")
    flag = ("--kv", "fp8") if way == "flag" else ()
    plan = json.loads(keye("ask", str(clip), "What?", "--dry-run", "--json", *flag)[1])
    assert plan["kv"] == "fp8"
    tokens = plan["prompt_tokens"] + plan["max_tokens"]
    # Two layers of 2 · 2 · 32 keys and values in a byte each, and 16 of the indexer's key in four.
    assert plan["cache_bytes"] == tokens * 2 * (2 * 2 * 32 + 4 * 16)
    lines = [" ".join(line.split()) for line in keye("plan", str(clip), *flag)[1].splitlines()]
    assert "KV cache 1 MiB in fp8" in lines


@pytest.mark.parametrize("task", ["ground", "summarize"])
def test_other_tasks_run_over_it(keye: Keye, clip: Path, task: str) -> None:
    query = ("the circle",) if task == "ground" else ()
    code, out, _ = keye(task, str(clip), *query, *FEW, "--kv", "fp8", "--json")
    assert code == 0
    assert json.loads(out)["dtype"] == "fp32"


@pytest.mark.parametrize("value", ["int8", "FP8"])
def test_anything_else_is_refused(keye: Keye, clip: Path, value: str) -> None:
    code, out, err = keye("ask", str(clip), "What?", "--kv", value)
    assert (code, out, err) == (2, "", f"keye: --kv must be auto or fp8, not {value}\n")


def test_a_batch_answers_anew_with_another_cache(keye: Keye, clip: Path) -> None:
    job = {"id": "a", "task": "ask", "inputs": str(clip), "question": "What?"}
    Path("jobs.jsonl").write_text(json.dumps(job) + "\n")
    keys = []
    for kv in ("auto", "auto", "fp8", "fp8"):
        assert keye("batch", "jobs.jsonl", "-o", "out.jsonl", *FEW, "--kv", kv)[0] == 0
        keys.append([json.loads(line)["key"] for line in Path("out.jsonl").read_text().splitlines()])
    assert [len(found) for found in keys] == [1, 1, 2, 2]
    assert keys[3][0] != keys[3][1]
