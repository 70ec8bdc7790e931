"""Lines that survive a killed run, a resumed one, and figures that no JSON can hold."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from keyecli.errors import InputError, KeyeError, UsageError
from keyecli.training.metrics import SCHEMA, Metrics, read_metrics


def written(path: Path, steps: int = 4) -> list[dict[str, Any]]:
    with Metrics(path, resume_step=None) as metrics:
        for step in range(1, steps + 1):
            metrics.write("step", step, loss=1 / step)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_one_object_and_there_before_the_run_ends(tmp_path: Path) -> None:
    path = tmp_path / "out" / "metrics.jsonl"
    metrics = Metrics(path, resume_step=None)
    metrics.write("step", 1, loss=2.5, learning_rate=1e-4)
    metrics.write("sample", 1, answer="line\nline – ü", source="a.jsonl:3")
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"schema": SCHEMA, "kind": "step", "step": 1, "loss": 2.5, "learning_rate": 1e-4},
        {"schema": SCHEMA, "kind": "sample", "step": 1, "answer": "line\nline – ü", "source": "a.jsonl:3"},
    ]
    assert read_metrics(path) == [json.loads(line) for line in lines]
    metrics.close()


def test_what_is_not_finite_is_null_and_tensors_are_numbers(tmp_path: Path) -> None:
    with Metrics(tmp_path / "m.jsonl", resume_step=None) as metrics:
        metrics.write(
            "step",
            3,
            loss=float("nan"),
            norm=torch.tensor(float("inf")),
            rate=torch.tensor(0.5),
            rows=np.int64(7),
            recall=[0.5, np.float32("nan"), (1,)],
            named={"bad": True, "none": None, "low": float("-inf")},
        )
    (record,) = read_metrics(tmp_path / "m.jsonl")
    assert {name: record[name] for name in list(record)[3:]} == {
        "loss": None,
        "norm": None,
        "rate": 0.5,
        "rows": 7,
        "recall": [0.5, None, [1]],
        "named": {"bad": True, "none": None, "low": None},
    }
    assert isinstance(record["rows"], int)


def test_resuming_drops_what_comes_again_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    before = written(path)
    with path.open("ab") as file:
        file.write(b'{"schema": "keye.fin')
    assert read_metrics(path) == before
    with Metrics(path, resume_step=2) as metrics:
        metrics.write("eval", 2, loss=0.1)
        metrics.write("step", 3, loss=0.3)
    assert [(record["kind"], record["step"]) for record in read_metrics(path)] == [
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_torn_line_alone_is_cut_so_that_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    before = written(path, 2)
    with path.open("ab") as file:
        file.write(b'{"schema": "keye.finetune.metrics/1", "kind": "step", "step": 3')
    with Metrics(path, resume_step=9) as metrics:
        metrics.write("step", 3, loss=0.3)
    assert read_metrics(path)[:2] == before
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_zeros_of_a_crashed_machine_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    before = written(path, 2)
    with path.open("ab") as file:
        file.write(b"\0" * 300)
    assert read_metrics(path) == before
    Metrics(path, resume_step=5).close()
    assert b"\0" not in path.read_bytes()


def test_a_new_run_begins_an_empty_file_and_resuming_without_one_begins_it(tmp_path: Path) -> None:
    written(tmp_path / "m.jsonl")
    Metrics(tmp_path / "m.jsonl", resume_step=None).close()
    assert read_metrics(tmp_path / "m.jsonl") == []
    Metrics(tmp_path / "new.jsonl", resume_step=3).close()
    assert read_metrics(tmp_path / "new.jsonl") == []


def test_another_programs_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UsageError, match="was not written by keye's training"):
        Metrics(path, resume_step=1)
    assert path.read_text() == '{"loss": 1}\n'
    with pytest.raises(InputError, match="line 1"):
        read_metrics(path)
    with pytest.raises(InputError, match="cannot read"):
        read_metrics(tmp_path / "missing.jsonl")


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        Metrics(tmp_path / "file" / "m.jsonl", resume_step=None)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    before = written(path, 2)
    metrics = Metrics(path, resume_step=2)
    real = metrics._file

    def half(data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real.write(data[: len(data) // 2])

    metrics._file = SimpleNamespace(  # type: ignore[assignment]
        write=half, fileno=real.fileno, truncate=real.truncate, close=real.close
    )
    with pytest.raises(KeyeError, match="No space left on device; make room and go on with --resume"):
        metrics.write("step", 3, loss=0.1)
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == before


def test_tensorboard_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            seen.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with Metrics(tmp_path / "m.jsonl", resume_step=6, tensorboard=tmp_path / "events") as metrics:
        metrics.write("step", 7, loss=0.5, skipped=True, text="x", bad=float("nan"), tokens=12)
    assert seen == [(str(tmp_path / "events"), 7), ("step/loss", 0.5, 7), ("step/tokens", 12, 7), "closed"]


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        Metrics(tmp_path / "m.jsonl", resume_step=None, tensorboard=tmp_path / "events")
    assert not (tmp_path / "m.jsonl").exists()
