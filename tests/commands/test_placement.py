"""--offload and --device as a user gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands.conftest import Keye
from tests.kernels.on_device import CUDA

no_gpu = pytest.mark.skipif(CUDA, reason="this machine has a GPU")


@no_gpu
def test_experts_stay_where_there_is_no_gpu(keye: Keye, clip: Path) -> None:
    code, out, err = keye("ask", str(clip), "What?", "--offload", "experts")
    assert (code, out) == (2, "")
    assert err == (
        "keye: --offload experts keeps a GPU's experts in this machine's memory, and the device is cpu: leave the option out\n"
    )


@no_gpu
def test_offload_from_the_environment_and_the_file(
    keye: Keye, clip: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "keye.toml").write_text('offload = "experts"\n')
    assert keye("plan", str(clip))[0] == 2
    code, _, err = keye("plan", str(clip), "--offload", "none")
    assert (code, err) == (0, "")
    monkeypatch.setenv("KEYE_OFFLOAD", "none")
    assert keye("plan", str(clip))[0] == 0


def test_what_is_not_known(keye: Keye, clip: Path) -> None:
    code, _, err = keye("plan", str(clip), "--offload", "layers")
    assert (code, err) == (2, "keye: --offload must be none or experts, not layers\n")


@pytest.mark.parametrize("device", ["cuda:0,cpu", "cuda,1", "0,1", "cuda:0,", "cuda:0, 1"])
def test_what_is_no_list_of_gpus(keye: Keye, clip: Path, device: str) -> None:
    code, out, err = keye("plan", str(clip), "--device", device)
    assert (code, out) == (2, "")
    assert err == f"keye: --device must be auto, cpu, cuda, cuda:N or cuda:N,M, not {device}\n"


@no_gpu
@pytest.mark.parametrize("device", ["cuda:0,1", "cuda:0,cuda:1", "cuda:7,0"])
def test_gpus_that_are_not_there(keye: Keye, clip: Path, device: str) -> None:
    code, out, err = keye("ask", str(clip), "What?", "--device", device)
    assert (code, out) == (2, "")
    first = device.partition(",")[0]
    assert (
        err
        == f"keye: --device {first} does not exist: this machine has no CUDA device; leave the option out\n"
    )


def test_two_gpus_in_a_plan(
    keye: Keye, clip: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("keyecli.engine.loaded.free_memory_bytes", lambda device: 2**31)
    plan = ("plan", str(clip), "-m", str(tiny_checkpoint), "--device", "cuda:0,1", "--kernels", "reference")
    code, out, _ = keye(*plan)
    assert code == 0
    assert "bf16 on cuda:0,cuda:1" in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("on ")] == [
        ["on", "cuda:0"],
        ["on", "cuda:1"],
    ]
    data = json.loads(keye(*plan, "--json")[1])
    assert data["device"] == "cuda:0,cuda:1"
    assert sum(row["total_bytes"] for row in data["devices"]) == data["total_bytes"]
    code, out, _ = keye(*plan, "--offload", "experts")
    assert code == 0
    assert "in this machine's memory" in out


def test_the_cpu_answers_in_bf16_and_int8(keye: Keye, tmp_path: Path) -> None:
    from keyecli.forge import SceneOptions, write_dataset

    write_dataset(tmp_path / "set", 1, 0, SceneOptions(2.0, 2.0))
    ask = ("ask", str(tmp_path / "set/clips/000000.mp4"), "What happens?", "--no-think", "--device", "cpu")
    expected = keye(*ask)
    assert expected[0] == 0
    assert expected[1].strip()
    for flags in (("--dtype", "bf16"), ("--quant", "int8"), ("--dtype", "bf16", "--quant", "int8")):
        assert keye(*ask, *flags)[:2] == expected[:2]
