"""The load benchmark: its checkpoint is one, what is loaded is checked, and what cannot be measured is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keyecli.bench import load
from keyecli.bench.load import LoadMeasurement, RandomCheckpoint, load_once, measure, sized_config
from keyecli.errors import ExitCode, MemoryLimitError, UsageError
from keyecli.model.config import KeyeVL2Config
from keyecli.model.quantize import Quantization
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def small_config() -> KeyeVL2Config:
    return KeyeVL2Config(**tiny_config(hidden_size=128, moe_intermediate_size=64))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "POOL_VALUES", 10_007)
    monkeypatch.setattr(load, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(load, "sized_config", lambda size_gib: small_config())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def checkpoint(small: None, tmp_path: Path) -> RandomCheckpoint:
    return RandomCheckpoint.write(tmp_path, small_config(), shard_bytes=200_000)


def test_its_files_hold_what_it_says(checkpoint: RandomCheckpoint) -> None:
    assert len(checkpoint.files) > 2
    stored = {name: tensor for file in checkpoint.files for name, tensor in load_file(file).items()}
    assert set(stored) == set(checkpoint.shapes)
    for name, tensor in stored.items():
        assert torch.equal(tensor, checkpoint.tensor(name)), name
    assert len({tensor.view(-1)[:8].tolist().__str__() for tensor in stored.values()}) == len(stored)
    assert abs(float(checkpoint.pool.float().std()) - load.STD) < 0.001


def test_loads_are_measured(small: None, tmp_path: Path) -> None:
    plain, packed = measure(1.0, "int4", tmp_path)
    assert (plain.how, packed.how) == ("bf16", "int4")
    assert plain.read_bytes == packed.read_bytes == plain.final_bytes > packed.final_bytes > 0
    assert min(plain.seconds, packed.seconds, plain.disk_bytes_per_s) > 0
    assert plain.disk_rates == packed.disk_rates
    assert set(plain.disk_rates) <= {load.way_name(*way) for way in load.WAYS}
    assert list(tmp_path.iterdir()) == [], "the checkpoint is removed"
    record = json.loads(json.dumps(plain.to_dict()))
    assert record["schema"] == "keye.bench.load/1"
    assert record["share"] == plain.share


def test_figures() -> None:
    found = LoadMeasurement("bf16", "a GPU", 8 * 10**9, 4.0, 8 * 10**9, 9 * 10**9, {"a way": 1e9, "b": 2.5e9})
    assert found.share == 0.8
    assert found.disk_way == "b"
    assert found.peak_ratio == 1.125
    assert "2.00 GB/s (80% of the disk's 2.50, as aimed, 70% or more" in found.line()
    assert "NOT at most 1.1" in found.line()


@pytest.mark.parametrize("quantization", [None, Quantization("int8")])
def test_wrong_weights_are_not_timed(checkpoint: RandomCheckpoint, quantization: Quantization | None) -> None:
    load_once(checkpoint, quantization, CPU)
    with checkpoint.files[-1].open("r+b") as file:  # the last tensor ends the last file
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3f")
    with pytest.raises(RuntimeError, match="was not loaded as the file holds it"):
        load_once(checkpoint, quantization, CPU)


def test_the_size_is_made_of_layers_of_the_released_shape() -> None:
    assert sized_config(16).num_hidden_layers == 11
    assert sized_config(1000).num_hidden_layers == 48
    config = sized_config(8)
    size = sum(torch.Size(shape).numel() * 2 for shape in load.shapes_of(config).values())
    assert 6.5 < size / 2**30 <= 8
    with pytest.raises(UsageError, match="--gib 1 is too small: the released shape with one layer takes"):
        sized_config(1)


def test_what_cannot_be(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        next(measure(1.0, None, tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--quant int3 is not known"):
        next(measure(1.0, "int3", tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(MemoryLimitError, match=r"are free on the disk of .* give --gib less") as caught:
        next(measure(1.0, None, tmp_path))
    assert caught.value.exit_code is ExitCode.MEMORY
    assert list(tmp_path.iterdir()) == []
