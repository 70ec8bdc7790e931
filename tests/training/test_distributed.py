"""Two processes, each with the whole model or with a part of it, against one: the same losses, gradients and adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli.errors import UsageError
from keyecli.training.distributed import Processes, joined
from tests.compare import assert_close
from tests.training.two_processes import CASES, LONG, SHORT, Case, steps

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes make of all cases, started as a user would."""
    out = tmp_path_factory.mktemp("two") / "steps.pt"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    made = subprocess.run(
        [sys.executable, *command, "tests.training.two_processes", str(out)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-4000:]
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
