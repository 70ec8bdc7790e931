"""A model over several devices: who gets which layers, what is refused, and what moves at the borders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli.bench.network import official_config
from keyecli.engine.loaded import (
    ModelFiles,
    choose_devices,
    free_cache_bytes,
    new_cache,
    open_model,
    require_room,
    run_arguments,
)
from keyecli.engine.plan import DevicePart, RunPlan, estimate_memory, plan_run
from keyecli.engine.shared import sequences_together
from keyecli.engine.split import places_of, split_layers
from keyecli.engine.static import stages_of
from keyecli.errors import MemoryLimitError, UsageError
from keyecli.kernels.reference import Branches
from keyecli.model.cache import KeyeCache
from keyecli.model.checkpoint import load_model
from keyecli.model.config import KeyeVL2Config
from keyecli.model.placement import WeightPlaces
from keyecli.model.quantize import Quantization
from tests.engine.scenes import planned
from tests.tiny import random_tensors, tiny_config

GIB = 2**30
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """A machine with two GPUs, and what is free there."""
    free: dict[str, int | None] = {"cuda:0": 80 * GIB, "cuda:1": 80 * GIB}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("keyecli.engine.loaded.free_memory_bytes", lambda device: free.get(device))
    return free


@pytest.mark.parametrize("device", ["cuda:0,1", "cuda:0,cuda:1"])
def test_lists_of_devices(device: str, gpus: object) -> None:
    assert choose_devices(device) == ("cuda:0", "cuda:1")
    assert choose_devices(device.replace("0", "2").replace("1", "0").replace("2", "1")) == (
        "cuda:1",
        "cuda:0",
    )
    assert choose_devices("cpu") == ("cpu",)
    assert choose_devices("cuda:1") == ("cuda:1",)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:0,7", "--device cuda:7 does not exist: this machine has 2 CUDA devices"),
        ("cuda:0,cpu", "--device cuda:0,cpu is no list of GPUs; write it as cuda:0,1"),
        ("cuda,1", "is no list of GPUs"),
        ("0,1", "is no list of GPUs"),
        ("cuda:0,", "is no list of GPUs"),
        ("cuda:0,0", "--device cuda:0,0 names a GPU twice"),
        ("cuda:1,cuda:0,cuda:1", "names a GPU twice"),
    ],
)
def test_lists_that_are_none(device: str, said: str, gpus: object) -> None:
    with pytest.raises(UsageError, match=said):
        choose_devices(device)


def devices(count: int) -> list[str]:
    return [f"cuda:{number}" for number in range(count)]


def held(config: KeyeVL2Config, part: DevicePart, offload: Any = None) -> int:
    sizes: dict[str, Any] = {"dtype": "bf16", "device": "cuda", "kernels": "triton", "offload": offload}
    return estimate_memory(config, 0, 0, part=part, **sizes).loaded_bytes


@pytest.mark.parametrize(
    ("free", "quantization"),
    [([80, 80], None), ([24, 24, 24, 24], None), ([40, 20], None), ([12, 12], Quantization("int4"))],
    ids=str,
)
def test_the_official_model_over_gpus(free: Sequence[int], quantization: Quantization | None) -> None:
    """Every device gives about the same share of what is free there."""
    config = official_config()
    if quantization:
        config.quantization_config = quantization.to_dict()
    parts = split_layers(
        config, devices(len(free)), [size * GIB for size in free], torch.bfloat16, quantization, False, 2**26
    )
    assert [part.device for part in parts] == devices(len(free))
    assert sum(part.layers for part in parts) == 48
    assert [part.first for part in parts] == [True] + [False] * (len(free) - 1)
    assert [part.last for part in parts] == [False] * (len(free) - 1) + [True]
    shares = [
        (held(config, part) + part.layers * 2**26) / size / GIB
        for part, size in zip(parts, free, strict=True)
    ]
    assert max(shares) / min(shares) < 1.35
    places = places_of(parts, host_experts=False)
    assert len(places.layers) == 48
    assert places.device_of("model.embed_tokens.weight") == torch.device("cuda:0")
    assert places.device_of("lm_head.weight") == places.layers[-1] == torch.device("cuda", len(free) - 1)


def test_a_full_device_still_gets_its_part() -> None:
    config = KeyeVL2Config(**tiny_config(num_hidden_layers=8))
    first, second = split_layers(config, devices(2), [0, GIB], torch.float32)
    assert (first.first, first.last, second.first, second.last) == (True, False, False, True)
    assert 1 <= first.layers < second.layers


def test_experts_in_the_host_take_no_part_in_it() -> None:
    config = official_config()
    parts = split_layers(config, devices(2), [GIB, GIB], torch.bfloat16, None, True, 2**26)
    assert [part.first for part in parts] == [True, False]
    # The vision tower and the embedding are as large as a dozen layers without their experts.
    assert 8 < parts[0].layers < parts[1].layers


def test_a_head_that_is_the_embedding_stays_there(make_checkpoint: Callable[..., Path]) -> None:
    config = KeyeVL2Config(**tiny_config(tie_word_embeddings=True, num_hidden_layers=4))
    parts = split_layers(config, ["cuda:0", "cuda:1"], [10**6, 10**6], torch.float32, cache_bytes=10**6)
    assert [(part.first, part.last) for part in parts] == [(True, True), (False, False)]
    places = places_of(parts, host_experts=False)
    assert (
        places.device_of("lm_head.weight") == places.device_of("model.norm.weight") == torch.device("cuda:0")
    )


def test_opening_a_model_on_two_gpus(
    make_checkpoint: Callable[..., Path], gpus: dict[str, int | None]
) -> None:
    config = tiny_config(num_hidden_layers=6)
    folder = make_checkpoint(config=config, tensors=random_tensors(config))
    files = open_model(folder, device="cuda:0,1", kernels="reference")
    assert (files.device, files.devices, files.dtype) == ("cuda:0", "cuda:0,cuda:1", "bf16")
    assert sum(part.layers for part in files.parts) == 6
    assert open_model(folder, device="cuda:1", kernels="reference").parts == ()

    gpus |= {"cuda:0": 10**6, "cuda:1": 3 * 10**6}
    arguments = run_arguments(files)
    plan = plan_run([planned("a.mp4", 3)], files.config, max_tokens=8, **arguments)
    assert plan.device == "cuda:0,cuda:1"
    assert [share.free_bytes for share in plan.shares] == [10**6, 3 * 10**6]
    assert plan.free_bytes == 4 * 10**6
    whole = plan_run([planned("a.mp4", 3)], files.config, max_tokens=8, **{**arguments, "parts": ()})
    assert plan.memory.weights_bytes == whole.memory.weights_bytes
    assert plan.memory.cache_bytes == whole.memory.cache_bytes
    assert [row["device"] for row in plan.to_dict()["devices"]] == ["cuda:0", "cuda:1"]
    first, last = files.parts
    assert free_cache_bytes(files) == min(10**6 * 6 // first.layers, 3 * 10**6 * 6 // last.layers)

    gpus["cuda:1"] = held(files.config, last) - 1
    gpus["cuda:0"] = held(files.config, first)
    with pytest.raises(
        MemoryLimitError, match=rf"^{last.layers} layers of .* are free on cuda:1: "
    ) as refusal:
        require_room(files)
    assert refusal.value.exit_code == 5
    gpus["cuda:1"] = None
    require_room(files)


def test_the_device_that_is_too_small_is_named(gpus: dict[str, int | None]) -> None:
    config = official_config()
    parts = (DevicePart("cuda:0", 24, True, False), DevicePart("cuda:1", 24, False, True))
    sizes: dict[str, Any] = {
        "model": "m",
        "device": "cuda:0",
        "dtype": "bf16",
        "kernels": "triton",
        "max_tokens": 100,
    }

    def plan(free: int) -> RunPlan:
        return plan_run(
            [planned("a.mp4", 20)], config, parts=[(parts[0], 80 * GIB), (parts[1], free)], **sizes
        )

    plan(40 * GIB).check()
    with pytest.raises(
        MemoryLimitError, match=r"on cuda:1 \(weights .* and 20.0 GiB are free: use --offload experts"
    ):
        plan(20 * GIB).check()


def test_more_devices_than_layers(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 9)
    monkeypatch.setattr("keyecli.engine.loaded.free_memory_bytes", lambda device: 10**9)
    with pytest.raises(UsageError, match=r"has layers for [123] of them only; name fewer devices"):
        open_model(make_checkpoint(), device="cuda:0,1,2,3,4", kernels="reference")


def test_sequences_together_fit_the_fullest_device(
    make_checkpoint: Callable[..., Path], gpus: dict[str, int | None]
) -> None:
    files = replace(
        open_model(make_checkpoint(), device="cpu"),
        kernels="triton",
        parts=(DevicePart("cuda:0", 1, True, False), DevicePart("cuda:1", 1, False, True)),
    )
    both = []
    for second in (10**9, 10**12):
        gpus |= {"cuda:0": 10**12, "cuda:1": second}
        plan = plan_run((), files.config, max_tokens=8, prompt_tokens=8, **run_arguments(files))
        both.append(sequences_together(files, replace(plan, weights_loaded=True), 4_000_000, 8))
    assert both == [1, 8]


# What a machine without a GPU can show of the borders: devices "cpu" and "meta", which computes shapes alone.


def test_a_cache_of_two_devices() -> None:
    config = KeyeVL2Config(**tiny_config(num_hidden_layers=5))
    cache = KeyeCache(config, 12, device=[CPU, CPU, META, META, META])
    assert [len(part.k) for part in cache.parts] == [2, 3]
    assert cache.device == CPU
    assert [cache.layer(layer)[0].device for layer in range(5)] == [CPU, CPU, META, META, META]
    with pytest.raises(ValueError, match="on several devices"):
        cache.k  # noqa: B018
    for part in cache.parts:
        for buffer in part.buffers:
            buffer.fill_(3)
    k, v = torch.randn(2, 1, 4, 2, 32)
    cache.append(1, k, v, torch.randn(1, 4, 16))
    assert torch.equal(cache.layer(1)[0][:, :4], k)
    assert bool((cache.layer(0)[0] == 3).all())
    cache.advance(4)
    cache.copy_to_branch(Branches(2, 4, 2), 1, 4)
    assert torch.equal(cache.layer(1)[1][:, 6:8], v[:, 2:])
    larger = KeyeCache(config, 20, device=[CPU, CPU, META, META, META])
    larger.copy_from(cache, 4)
    assert larger.length == 4
    assert torch.equal(larger.layer(1)[0][:, :4], k)
    with pytest.raises(ValueError, match="no room for 13"):
        cache.copy_from(larger, 13)


@torch.inference_mode()
def test_states_move_at_the_border(make_checkpoint: Callable[..., Path]) -> None:
    config = tiny_config(num_hidden_layers=4, num_experts=None)
    folder = make_checkpoint(config=config, tensors=random_tensors(config))
    places = WeightPlaces(CPU, (CPU, CPU, META, META), META)
    model = load_model(folder)
    assert stages_of(model) == [(CPU, range(4))]
    for name, parameter in list(model.named_parameters()):
        if places.device_of(name) == META:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(
                owner, name.rpartition(".")[2], torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            )
    assert stages_of(model) == [(CPU, range(2)), (META, range(2, 4))]
    cache = KeyeCache(model.config, 6, device=places.layers)
    ids = torch.arange(6)[None]
    for part in (slice(0, 4), slice(4, 6)):
        hidden = model.decode(model.embed(ids[:, part]), ids[:, part].expand(3, 1, -1), cache)
        assert (hidden.device, hidden.shape) == (META, (1, part.stop - part.start, 64))
    assert cache.length == 6
    assert model.logits(hidden).device == META
    plain = load_model(folder)
    other = KeyeCache(plain.config, 6)
    plain.decode(plain.embed(ids), ids.expand(3, 1, -1), other)
    torch.testing.assert_close(cache.layer(1)[0], other.layer(1)[0])
    # A tied head is back on the first device.
    model.model.norm.to_empty(device="cpu")
    assert stages_of(model) == [(CPU, range(2)), (META, range(2, 4)), (CPU, range(4, 4))]


def test_a_cache_is_where_its_layers_are(make_checkpoint: Callable[..., Path]) -> None:
    files: ModelFiles = open_model(make_checkpoint(), device="cpu")
    assert len(new_cache(files, 3).parts) == 1
    split = replace(files, parts=(DevicePart("cpu", 1, True, False), DevicePart("meta", 1, False, True)))
    assert [part.k.device for part in new_cache(split, 3).parts] == [CPU, META]
