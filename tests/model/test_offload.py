"""Experts in the host's memory: what is where, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keyecli.errors import MemoryLimitError
from keyecli.model import offload, placement
from keyecli.model.cache import KeyeCache
from keyecli.model.checkpoint import load_model
from keyecli.model.offload import ExpertBuffers, pinned_tensor, share_buffers
from keyecli.model.placement import WeightPlaces, one_device
from keyecli.model.quantize import Quantization
from tests.kernels.on_device import CUDA, DEVICE
from tests.tiny import random_tensors, tiny_config

META = torch.device("meta")
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not CUDA, reason="pinned memory is made by CUDA")


def plain_tensor(shape: Any, dtype: torch.dtype) -> Tensor:
    """In the place of pinned memory, where there is no GPU."""
    return torch.empty(tuple(shape), dtype=dtype)


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        monkeypatch.setattr(placement, "pinned_tensor", plain_tensor)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("visual.vision_model.post_layernorm.weight", "cpu"),
        ("mlp_AR.linear_1.weight", "cpu"),
        ("model.embed_tokens.weight", "cpu"),
        ("model.layers.0.mlp.gate.weight", "cpu"),
        ("model.layers.1.self_attn.q_proj.codes", "meta"),
        ("model.layers.1.mlp.experts.gate_up_proj", "meta"),
        ("model.norm.weight", "meta"),
        ("lm_head.weight", "meta"),
    ],
)
def test_a_tensor_computes_where_its_layer_does(name: str, device: str) -> None:
    places = WeightPlaces(CPU, (CPU, META), META)
    assert places.device_of(name) == torch.device(device)
    assert places.empty(name, (2, 3), torch.float16).device == torch.device(device)


def test_only_routed_experts_are_in_the_host(unpinned: None) -> None:
    places = one_device("meta", 2, host_experts=True)
    for name in ("experts.gate_up_proj", "experts.down_proj", "experts.down_proj.codes"):
        made = places.empty(f"model.layers.1.mlp.{name}", (2, 3), torch.int32)
        assert (made.device, made.shape, made.dtype) == (CPU, (2, 3), torch.int32)
    for name in ("gate.weight", "gate_proj.weight"):
        assert places.empty(f"model.layers.1.mlp.{name}", (1,), torch.float32).is_meta


def layers_of(count: int, device: torch.device = CPU) -> list[dict[str, Tensor]]:
    make = pinned_tensor if CUDA else plain_tensor
    layers = []
    for layer in range(count):
        tensors = {"a": make((3, 5), torch.float32), "b": make((7,), torch.int32)}
        tensors["a"].copy_(torch.randn(3, 5))
        tensors["b"].fill_(layer)
        layers.append(tensors)
    return layers


def assert_holds(buffer: Any, tensors: dict[str, Tensor]) -> None:
    assert list(buffer) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(buffer[name].cpu(), tensor)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_two_buffers_serve_any_order(count: int) -> None:
    torch.manual_seed(0)
    layers = layers_of(count)
    buffers = ExpertBuffers(layers, torch.device(DEVICE))
    assert buffers.nbytes == min(2, count) * (15 * 4 + 7 * 4)
    passes = [*range(count), *range(count), 0, 0, count - 1, count // 2]
    for layer in passes:
        assert_holds(buffers.tensors(layer), layers[layer])


def test_the_next_layer_is_under_way_and_nothing_is_copied_twice() -> None:
    layers = layers_of(4)
    buffers = ExpertBuffers(layers, torch.device(DEVICE))
    copied: list[int] = []
    copy = buffers._copy
    buffers._copy = lambda layer: (copied.append(layer), copy(layer))[1]  # type: ignore[method-assign]
    buffers.tensors(0)
    assert copied == [0, 1]
    for layer in (1, 2, 3):
        assert_holds(buffers.tensors(layer), layers[layer])
    assert copied == [0, 1, 2, 3]


def grown(config: dict[str, Any]) -> dict[str, Any]:
    """Wide enough for groups of 64, and three layers, so that a buffer is used twice."""
    return {**config, "num_hidden_layers": 3, "moe_intermediate_size": 64, "num_experts": 6}


@pytest.mark.parametrize(
    "quantization", [None, Quantization("int4"), Quantization("int8"), Quantization("fp8")], ids=str
)
@torch.inference_mode()
def test_an_offloaded_model_computes_the_same(
    make_checkpoint: Callable[..., Path], unpinned: None, quantization: Quantization | None
) -> None:
    config = tiny_config(**grown({}))
    folder = make_checkpoint(config=config, tensors=random_tensors(config))
    whole = load_model(folder, device=DEVICE, quantization=quantization)
    places = one_device(DEVICE, 3, host_experts=True)
    apart = load_model(folder, device=places, quantization=quantization)
    for layer in apart.model.layers:
        assert {tensor.device for tensor in layer.mlp.experts.state_dict().values()} == {CPU}
        assert layer.mlp.experts.host is not None

    ids = torch.randint(0, 256, (1, 40), device=DEVICE)
    places_of_tokens = torch.arange(40, device=DEVICE).expand(3, 1, -1)
    results = []
    for model in (whole, apart):
        cache = KeyeCache(model.config, 40, device=DEVICE)
        parts = [
            model.decode(model.embed(ids[:, part]), places_of_tokens[..., part], cache)
            for part in (slice(0, 30), slice(30, 39), slice(39, 40))
        ]
        results.append(model.logits(torch.cat(parts, 1)))
    assert torch.equal(*results)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(apart.state_dict()[name].cpu(), tensor.cpu())


def test_layers_share_buffers_on_their_own_device(make_checkpoint: Callable[..., Path]) -> None:
    config = tiny_config(**grown({}))
    model = load_model(make_checkpoint(config=config, tensors=random_tensors(config)))
    model.model.layers[2].mlp.gate.to("meta")
    first, second = share_buffers(model.model.layers)
    assert [layer.mlp.experts.host.buffers for layer in model.model.layers] == [first, first, second]
    assert [layer.mlp.experts.host.number for layer in model.model.layers] == [0, 1, 0]
    assert first.nbytes == 2 * second.nbytes


def test_memory_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(offload, "_Pages", refuse)
    with pytest.raises(MemoryLimitError, match=r"no further 2.0 GiB of pinned memory .* --quant int4"):
        pinned_tensor((2**29,), torch.float32)


@needs_gpu
def test_pinned_memory_has_its_own_size_and_is_given_back() -> None:
    tensor = pinned_tensor((3, 5), torch.bfloat16)
    assert tensor.is_pinned()
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((3, 5), torch.bfloat16, 30)
    tensor.fill_(2)
    assert bool((tensor.to("cuda", non_blocking=True) == 2).all())
    place = tensor.data_ptr()
    del tensor
    assert torch.cuda.cudart().cudaHostUnregister(place) != torch.cuda.cudart().cudaError.success
