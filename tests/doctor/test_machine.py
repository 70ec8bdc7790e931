"""Findings about the machine, its video library, its kernels and the room in it, good and bad."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keyecli.doctor import codecs, kernels, machine, room
from keyecli.doctor.codecs import CODECS, Codec, check_codec, check_codecs
from keyecli.doctor.finding import Finding, exit_code, worst
from keyecli.doctor.kernels import Case, cases, check_case, check_kernels, compare
from keyecli.doctor.room import MODES, Fit, Mode, check_room, judge, model_fits, official_fits
from keyecli.engine.plan import GIB, MemoryEstimate, parameter_count
from keyecli.errors import KernelError
from keyecli.kernels import dispatch

CPU = torch.device("cpu")


def found(section: Any, status: Any) -> Finding:
    return Finding(section, "x", status, "text", None if status == "ok" else "do this")


@pytest.mark.parametrize(
    ("findings", "status", "code"),
    [
        ([], "ok", 0),
        ([found("machine", "ok"), found("room", "warning")], "warning", 0),
        ([found("video", "problem"), found("room", "warning")], "problem", 1),
        ([found("model", "problem"), found("video", "problem")], "problem", 4),
        ([found("answers", "problem")], "problem", 4),
        ([found("model", "warning")], "warning", 0),
    ],
)
def test_the_exit_code_follows_the_worst(findings: list[Finding], status: str, code: int) -> None:
    assert worst(findings) == status
    assert exit_code(findings) == code


def test_a_remedy_belongs_to_what_is_not_well() -> None:
    with pytest.raises(ValueError, match="remedy"):
        Finding("machine", "x", "warning", "text")
    with pytest.raises(ValueError, match="remedy"):
        Finding("machine", "x", "ok", "text", "do this")


def test_the_four_codecs_are_really_decoded() -> None:
    findings = {finding.name: finding for finding in check_codecs()}
    assert list(findings) == ["PyAV", "H.264", "HEVC", "VP9", "AV1"]
    for title in ("H.264", "HEVC", "VP9", "AV1"):
        assert findings[title].status == "ok", findings[title]
        assert findings[title].details == {"decoder": True, "decoded": True}


def test_missing_decoders_and_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_codec(Codec("Nothing", "nothing", {})).status == "problem"
    only_decoder = check_codec(Codec("H.264", "h264", {"nothing": {}}))
    assert (only_decoder.status, only_decoder.details["decoded"]) == ("ok", False)
    with monkeypatch.context() as patch:
        patch.setattr(codecs, "_decode", lambda content: [0] * 6)
        wrong = check_codec(CODECS[0])
    assert (wrong.status, wrong.remedy) == ("problem", codecs.REINSTALL)
    monkeypatch.setattr(codecs, "_encode", lambda codec, encoder: b"no video at all")
    assert "the decoder fails" in check_codec(CODECS[0]).text


def test_what_the_machine_is(tmp_path: Path) -> None:
    findings = {finding.name: finding for finding in machine.check_machine(tmp_path / "not" / "there")}
    assert {"keyecli", "Python", "platform", "torch", "memory", "disk"} <= set(findings)
    assert findings["Python"].details["version"] in findings["Python"].text
    assert findings["disk"].details["folder"] == str(tmp_path / "not" / "there")
    assert not (tmp_path / "not").exists()


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Toy")


@pytest.mark.parametrize(("capability", "status"), [((9, 0), "ok"), ((8, 0), "ok"), ((7, 5), "warning")])
def test_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], status: str) -> None:
    gpu(monkeypatch, capability)
    finding = machine.check_gpu(0)
    assert finding.status == status
    assert finding.text.startswith(
        f"NVIDIA Toy, compute capability {capability[0]}.{capability[1]}, 20.0 GiB of 24.0 GiB free"
    )


@pytest.mark.parametrize(
    ("cuda", "driver", "available", "status", "part"),
    [
        (None, None, False, "ok", "built without CUDA"),
        ("13.0", "580.1", True, "ok", "built for CUDA 13.0; NVIDIA driver 580.1"),
        ("13.0", None, False, "ok", "built for CUDA 13.0"),
        (None, "580.1", False, "problem", "the GPU stays unused"),
        ("13.0", "470.9", False, "problem", "torch cannot use the GPU"),
    ],
)
def test_torch_and_driver(
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    driver: str | None,
    available: bool,
    status: str,
    part: str,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    finding = machine.check_torch(driver)
    assert finding.status == status
    assert part in finding.text


def test_the_driver_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n")
    monkeypatch.setattr(machine, "DRIVER_FILE", file)
    assert machine.driver_version() == "580.159.04"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6\n")
    assert machine.driver_version() == "535.54.03"
    file.unlink()
    query = tmp_path / "query"
    query.write_text("#!/bin/sh\necho 550.90.07\n")
    query.chmod(0o755)
    monkeypatch.setattr(machine, "DRIVER_QUERY", (str(query),))
    assert machine.driver_version() == "550.90.07"
    query.write_text("#!/bin/sh\nexit 9\n")
    assert machine.driver_version() is None
    query.unlink()
    assert machine.driver_version() is None


def test_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "interprets", lambda: True)
    finding = machine.check_triton()
    assert finding is not None
    assert (finding.status, finding.remedy) == ("warning", "unset TRITON_INTERPRET")
    monkeypatch.setattr(machine, "has_triton", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.check_triton() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finding = machine.check_triton()
    assert finding is not None
    assert finding.remedy == "pip install triton"


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.check_memory(GIB).status == "warning"
    assert machine.check_memory(8 * GIB).status == "ok"
    assert machine.check_memory(None).status == "ok"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB))
    assert machine.check_disk(tmp_path).status == "warning"
    assert machine.check_platform("Windows").status == "warning"


def test_every_operation_is_checked() -> None:
    """What `dispatch` offers with a choice of backend is what the doctor compares."""
    offered = {
        name
        for name, value in vars(dispatch).items()
        if inspect.isfunction(value) and "backend" in inspect.signature(value).parameters
    }
    checked = set()
    with torch.no_grad():
        for case in cases(CPU, torch.float32):
            outputs = case.run("reference")
            assert all(bool(output.float().isfinite().all()) for output in outputs)
            assert compare(case, outputs, outputs, CPU, 0.0).status == "ok"
            checked.add(case.operation.split()[0])
    assert checked == offered - {"backend_of", "by_vectors"}


def test_a_wrong_kernel_is_a_problem() -> None:
    case, right = Case("toy", lambda backend: ()), torch.ones(4)
    assert compare(case, (right * 1.001,), (right,), CPU, 0.0).status == "ok"
    for wrong in (right * 1.1, right * float("nan"), torch.zeros(4)):
        finding = compare(case, (wrong,), (right,), CPU, 0.0)
        assert finding.status == "problem"
        assert "--kernels reference" in str(finding.remedy)
    exact = Case("toy", lambda backend: (), exact=True)
    assert (
        compare(exact, (torch.tensor([1, 2]),), (torch.tensor([1, 2], dtype=torch.int32),), CPU, 0.0).status
        == "ok"
    )
    assert compare(exact, (torch.tensor([1, 3]),), (torch.tensor([1, 2]),), CPU, 0.0).status == "problem"


def test_a_kernel_that_does_not_compile_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(backend: str) -> Any:
        raise KernelError("the Triton kernel for a toy does not compile for this card: no")

    finding = check_case(Case("toy", run), CPU)
    assert (finding.status, finding.remedy) == ("problem", kernels.WITHOUT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run")
def test_without_a_gpu_the_definitions_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check_kernels(lambda what: None)
    assert (finding.status, finding.details) == ("ok", {"backend": "reference"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    (finding,) = check_kernels(lambda what: None)
    assert (finding.status, finding.remedy) == ("warning", "pip install triton")


def test_the_released_model_takes_what_the_plan_says() -> None:
    fits = official_fits("cpu")
    assert [(row.mode, row.tokens) for row in fits[:3]] == [
        ("bf16", 32768),
        ("bf16", 131072),
        ("bf16", 262144),
    ]
    # Experts in host memory are for a GPU beside it.
    assert len(fits) == 3 * (len(MODES) - 1)
    assert [round(row.memory.weights_bytes / 1e9, 1) for row in fits[::3]] == [62.2, 33.7, 18.8, 18.8]
    assert fits[-1].memory.cache_bytes == 262_144 * 48 * (2 * 4 * 128 + 2 * 64)
    assert fits[0].memory.weights_bytes == 2 * 31_122_082_160 == 2 * parameter_count(room.official_config())
    # k, v and the indexer's key of a token in 48 layers.
    assert fits[2].memory.cache_bytes == 262_144 * 48 * (2 * 4 * 128 + 64) * 2


def row(tokens: int, total: int, free: int | None, flags: str = "--dtype bf16") -> Fit:
    mode = Mode("toy", flags, {})
    return Fit("model", mode.name, mode.flags, tokens, MemoryEstimate(total, 0, 0), "cpu", free)


def test_other_models_have_their_own_rows() -> None:
    assert [(row.model, row.tokens) for row in model_fits(None, None, "cpu")[:1]] == [("keye-nano", 8192)]
    assert model_fits("someone/nothing", None, "cpu") == []


def test_how_far_a_model_goes() -> None:
    rows = [row(1000, 10 * GIB, 25 * GIB), row(2000, 20 * GIB, 25 * GIB), row(4000, 40 * GIB, 25 * GIB)]
    finding = judge(rows)
    assert (finding.status, finding.details["tokens"]) == ("ok", 2000)
    assert finding.text == "fits on cpu with --dtype bf16, up to 2,000 tokens: 20.0 GiB of 25.0 GiB free"
    small = judge([row(1000, 10 * GIB, GIB), row(1000, 4 * GIB, GIB, "--quant int4")])
    assert small.status == "warning"
    assert "1,000 tokens with --quant int4 need 4.0 GiB, 1.0 GiB are free" in small.text
    assert judge([row(1000, 10 * GIB, None)]).status == "ok"
    assert [finding.name for finding in check_room(rows)] == ["keye-nano", "model"]
