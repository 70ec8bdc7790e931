"""Two processes, each with the whole model or with a part of it, against one: the same losses, gradients and adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keyecli.cli import run
from keyecli.engine.loaded import open_model
from keyecli.errors import UsageError
from keyecli.training.distributed import Processes, joined
from keyecli.training.metrics import read_metrics
from tests.compare import assert_close
from tests.training.rows import write_data
from tests.training.test_teachers import adapter_in
from tests.training.two_processes import CASES, LONG, POLICIES, SHORT, Case, policy_steps, steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # One start of two processes for all.
    pytest.mark.xdist_group("two processes"),
]

ROUTES = """
[[teacher]]
adapter = "first"
modalities = ["video"]

[[teacher]]
adapter = "second"
"""


@pytest.fixture(scope="module")
def distill(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> list[str]:
    """What begins `keye distill` with two teachers, of which one adapts the output head; `-o` names what comes out."""
    folder = tmp_path_factory.mktemp("distill")
    files = open_model(tiny_checkpoint, device="cpu")
    adapter_in(folder / "first", files, 1, targets=("attention", "head"))
    adapter_in(folder / "second", files, 2)
    (folder / "routes.toml").write_text(ROUTES, encoding="utf-8")
    data = write_data(folder / "rows.jsonl", texts=2, videos=1)
    held_out = write_data(folder / "held_out.jsonl", texts=1, videos=0)
    return [
        "distill", "--data", str(data), "--teachers", str(folder / "routes.toml"), "--eval-data", str(held_out),
        "-m", str(tiny_checkpoint), "--device", "cpu", "--targets", "attention,experts,head", "--rank", "2",
        "--prompts", "3", "--max-tokens", "4", "--max-length", "1200", "--fps", "0.5", "--no-cache", "-q",
        "--steps", "2", "--lr", "1e-3", "--reward", "exact",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rl(distill: list[str], tiny_checkpoint: Path) -> list[str]:
    """What begins `keye rl` on the same rows, with passes of every kind; `-o` names what comes out."""
    folder = Path(distill[distill.index("--data") + 1]).parent
    return [
        "rl", "--data", str(folder / "rows.jsonl"), "--eval-data", str(folder / "held_out.jsonl"),
        "-m", str(tiny_checkpoint), "--device", "cpu", "--rank", "2", "--reward", "tests.training.two_processes:evenness",
        "--prompts", "2", "--rollouts", "3", "--minibatches", "1", "--refills", "1", "--watch-steps", "1",
        "--difficulty", "0:1", "--max-tokens", "4", "--max-length", "1200", "--fps", "0.5", "--no-cache", "-q",
        "--steps", "2", "--lr", "1e-3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes put what commands make."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, distill: list[str], rl: list[str], made: Path
) -> dict[str, Any]:
    """What two processes make of all cases, started as accelerate would that is to shard."""
    folder = tmp_path_factory.mktemp("two")
    out, commands = folder / "steps.pt", folder / "commands.json"
    lines = [
        [*distill, "-o", str(made / "whole"), "--no-shard"],
        [*distill, "-o", str(made / "sharded")],
        [*rl, "-o", str(made / "rl")],
    ]
    commands.write_text(json.dumps(lines), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    ran = subprocess.run(
        [sys.executable, *command, "tests.training.two_processes", str(out), str(commands)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = torch.load(out)
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(name: str, two: dict[str, Any]) -> None:
    case = CASES[name]
    one, both = steps(case, Processes()), two[name]
    # Sums come in another order; in bf16 each process rounds its own.
    exact = case.dtype == torch.float32
    assert both["tokens"] == one["tokens"] == [sum(case.rows)] * 2
    assert both["losses"] == pytest.approx(one["losses"], rel=1e-5 if exact else 1e-2)
    assert both["norms"] == pytest.approx(one["norms"], rel=1e-4 if exact else 3e-2)
    assert one["losses"][1] < one["losses"][0]
    assert both["gradients"].keys() == one["gradients"].keys()
    for part in ("gradients", "adapter"):
        for parameter, expected in one[part].items():
            assert_close(both[part][parameter], expected, relative=1e-3 if exact else 5e-2)


@pytest.mark.parametrize("name", POLICIES)
def test_two_processes_reinforce_what_one_does(name: str, two: dict[str, Any]) -> None:
    one, both = policy_steps(POLICIES[name], Processes()), two[name]
    for expected, found in zip(one["figures"], both["figures"], strict=True):
        for figure in ("answers", "tokens", "entropy", "clipped", "mismatch", "norm"):
            assert found[figure] == pytest.approx(expected[figure], rel=1e-4), figure
    # From the start, of one pass of each process.
    whole = two[name.removesuffix(", sharded")]
    assert both["figures"][0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert both["figures"][1]["divergence"] > 1e-3
    assert both["figures"][1]["divergence"] == pytest.approx(whole["figures"][1]["divergence"], rel=1e-4)
    for parameter, expected in one["weights"].items():
        assert_close(both["weights"][parameter], expected, relative=1e-5)


def test_two_processes_distill_what_one_does(
    two: dict[str, Any], distill: list[str], made: Path, tmp_path: Path
) -> None:
    # Of three prompts one process has two: from the second step on, others than one process would have asked.
    assert run([*distill, "-o", str(tmp_path / "one"), "--steps", "1"]) == 0
    metrics = [
        read_metrics(folder / "metrics.jsonl")
        for folder in (tmp_path / "one", made / "whole", made / "sharded")
    ]
    one, whole, sharded = ([row for row in rows if row["kind"] == "step"] for rows in metrics)
    assert (len(one), len(whole), len(sharded)) == (1, 2, 2)
    for name in ("loss", "divergence", "entropy", "norm", "reward", "length"):
        assert sharded[0][name] == pytest.approx(one[0][name], rel=1e-4), name
        for row, expected in zip(sharded, whole, strict=True):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    assert all([row["rows"] for row in rows if row["kind"] == "eval"] == [1, 1] for rows in metrics)
    left, right = (load_file(made / name / "adapter_model.safetensors") for name in ("whole", "sharded"))
    assert left.keys() == right.keys()
    for parameter, expected in left.items():
        # The gradient of a word that nobody thinks of is rounding, of which Adam makes much.
        allowed = {"absolute": 2e-4, "cosine": 1e-3} if "lm_head" in parameter else {}
        assert_close(right[parameter], expected, relative=1e-5, **allowed)


def test_two_processes_with_parts_of_the_model_answer_as_one_does(
    two: dict[str, Any], rl: list[str], made: Path, tmp_path: Path
) -> None:
    assert run([*rl, "-o", str(tmp_path / "rl")]) == 0
    one, both = (read_metrics(folder / "rl" / "metrics.jsonl") for folder in (tmp_path, made))
    assert [row["kind"] for row in one] == [row["kind"] for row in both] == ["eval", "step", "step", "eval"]
    told = ("reward", "length", "rows", "answers", "groups", "drawn_tokens", "norm", "agreement")
    for row, expected in zip(both, one, strict=True):
        for name in expected.keys() & set(told):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
        # The engine answers with the weights that the trainer has by then.
        assert row.get("mismatch", 0.0) < 1e-4
    left, right = (load_file(folder / "rl" / "adapter_model.safetensors") for folder in (tmp_path, made))
    assert left.keys() == right.keys()
    for parameter, expected in left.items():
        assert_close(right[parameter], expected, relative=1e-5)


def test_a_row_left_out_would_show() -> None:
    whole = steps(Case((LONG, SHORT), sharded=False), Processes())
    part = steps(Case((LONG,), sharded=False), Processes())
    assert part["losses"] != pytest.approx(whole["losses"], rel=1e-3)


def test_one_process_has_nobody_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="--shard shares the model out"), joined("cpu", True):
        pass
    with joined("cpu", None) as (processes, device):
        assert (processes, device) == (Processes(), "cpu")
