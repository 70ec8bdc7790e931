"""Where a model is put: which places are refused, and what helps instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keyecli.engine.loaded import (
    ModelFiles,
    choose_offload,
    load_weights,
    open_model,
    run_arguments,
)
from keyecli.engine.plan import estimate_memory, layer_expert_bytes
from keyecli.errors import MemoryLimitError, UsageError
from keyecli.model.config import KeyeVL2Config
from tests.tiny import tiny_config

MIB = 2**20


def test_where_experts_can_be_kept() -> None:
    moe = KeyeVL2Config(**tiny_config())
    for device in ("cpu", "cuda"):
        assert choose_offload(None, device, moe) is choose_offload("none", device, moe) is None
    assert choose_offload("experts", "cuda:1", moe) == "experts"
    with pytest.raises(UsageError, match="--offload layers is not known; use experts"):
        choose_offload("layers", "cuda", moe)
    with pytest.raises(UsageError, match="the device is cpu: leave the option out"):
        choose_offload("experts", "cpu", moe)
    with pytest.raises(UsageError, match="models with routed experts"):
        choose_offload("experts", "cuda", KeyeVL2Config(**tiny_config(num_experts=None)))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """What is free on each device, which a test may set; nothing is known of others."""
    sizes: dict[str, int | None] = {}
    monkeypatch.setattr("keyecli.engine.loaded.free_memory_bytes", lambda device: sizes.get(device))
    return sizes


@pytest.fixture
def on_gpu(tiny_checkpoint: Path) -> ModelFiles:
    """The toy model as on a machine with a GPU."""
    return replace(open_model(tiny_checkpoint, device="cpu"), device="cuda", dtype="bf16", kernels="triton")


def sizes_of(files: ModelFiles, **changes: Any) -> Any:
    return estimate_memory(files.config, 0, 0, dtype=files.dtype, device="cuda", kernels="triton", **changes)


def test_a_gpu_too_small_for_all_weights(on_gpu: ModelFiles, free: dict[str, int | None]) -> None:
    whole = sizes_of(on_gpu)
    free["cuda"] = whole.loaded_bytes - 1
    # Two layers have nothing to gain from two buffers.
    with pytest.raises(
        MemoryLimitError, match=r"are free on cuda: use --quant int4, or use a larger device"
    ) as refusal:
        load_weights(on_gpu)
    assert "--offload" not in str(refusal.value)
    on_gpu.config.num_hidden_layers = 6
    whole, apart = sizes_of(on_gpu), sizes_of(on_gpu, offload="experts")
    assert apart.host_bytes == 6 * layer_expert_bytes(on_gpu.config, 2)
    free["cuda"] = apart.loaded_bytes
    with pytest.raises(
        MemoryLimitError, match="use --offload experts, which keeps the experts in this machine's memory, or"
    ):
        load_weights(on_gpu)
    free["cpu"] = apart.host_bytes - 1
    with pytest.raises(MemoryLimitError) as refusal:
        load_weights(on_gpu)
    assert "--offload" not in str(refusal.value)
    free["cuda"] = apart.loaded_bytes - 1
    free["cpu"] = None
    with pytest.raises(MemoryLimitError, match="are free on cuda: use"):
        load_weights(replace(on_gpu, offload="experts"))


def test_a_host_too_small_for_the_experts(on_gpu: ModelFiles, free: dict[str, int | None]) -> None:
    needed = sizes_of(on_gpu, offload="experts").host_bytes
    free |= {"cpu": needed - 1, "cuda": 2**40}
    with pytest.raises(MemoryLimitError, match="of experts in this machine's memory and") as refusal:
        load_weights(replace(on_gpu, offload="experts"))
    assert refusal.value.exit_code == 5


def test_a_plan_is_told_where_the_experts_are(on_gpu: ModelFiles, free: dict[str, int | None]) -> None:
    free |= {"cpu": 7, "cuda": 8}
    plain, apart = run_arguments(on_gpu), run_arguments(replace(on_gpu, offload="experts"))
    assert (plain["offload"], plain["host_free_bytes"], plain["free_bytes"]) == (None, None, 8)
    assert (apart["offload"], apart["host_free_bytes"], apart["free_bytes"]) == ("experts", 7, 8)


def test_options_that_cannot_be(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    with pytest.raises(UsageError, match="the device is cpu"):
        open_model(folder, device="cpu", offload="experts")
    assert open_model(folder, device="cpu", offload="none").offload is None
