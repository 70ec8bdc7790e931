"""Kernels that read experts in the host's memory by its address, in steps that a CUDA graph holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli.engine.static import StaticDecoder
from keyecli.kernels.dispatch import by_vectors
from keyecli.model import placement
from keyecli.model.cache import KeyeCache
from keyecli.model.checkpoint import load_model
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.placement import one_device
from keyecli.model.quantize import Quantization
from tests.kernels.on_device import CUDA, DEVICE
from tests.tiny import random_tensors, tiny_config

CONFIG = tiny_config(moe_intermediate_size=64, num_experts=6, num_hidden_layers=3 if CUDA else 1)
STEPS = 4 if CUDA else 1
KINDS = [None, Quantization("int4"), Quantization("int8"), Quantization("fp8")]


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    if not CUDA:
        # The interpreter reads any memory of the host.
        monkeypatch.setattr(
            placement, "pinned_tensor", lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype)
        )
    return make_checkpoint(config=CONFIG, tensors=random_tensors(CONFIG))


def loaded(folder: Path, quantization: Quantization | None, host: bool) -> KeyeVL2ForConditionalGeneration:
    places = one_device(DEVICE, CONFIG["num_hidden_layers"], host)
    model = load_model(folder, device=places, quantization=quantization)
    model.set_kernel_backend("triton")
    return model


@pytest.mark.parametrize("quantization", KINDS if CUDA else KINDS[:1], ids=str)
@torch.inference_mode()
def test_steps_with_experts_in_the_host_are_the_same(folder: Path, quantization: Quantization | None) -> None:
    results = []
    for host in (False, True):
        model = loaded(folder, quantization, host)
        cache = KeyeCache(model.config, 16 + STEPS, device=DEVICE)
        ids = torch.arange(12, device=DEVICE)[None]
        model.set_kernel_backend("triton" if CUDA else "reference")
        model.decode(model.embed(ids), ids.expand(3, 1, -1), cache)
        model.set_kernel_backend("triton")
        decoder = StaticDecoder(model, cache)
        decoder.begin([12], [12])
        if host:
            buffers = model.model.layers[0].mlp.experts.host.buffers
            buffers.tensors = no_copy
        results.append([decoder.step(torch.tensor([7 + i], device=DEVICE)).clone() for i in range(STEPS)])
    for resident, offloaded in zip(*results, strict=True):
        assert bool(resident.isfinite().all())
        assert torch.equal(resident, offloaded)


def no_copy(layer: int) -> Any:
    raise AssertionError(f"the experts of layer {layer} were copied for one token")


@torch.inference_mode()
def test_few_tokens_read_the_experts_where_they_are(folder: Path) -> None:
    model = loaded(folder, None, host=True)
    mixture = model.model.layers[0].mlp
    buffers = mixture.experts.host.buffers
    original = buffers.tensors
    buffers.tensors = no_copy
    x, logits = torch.randn(9, 64, device=DEVICE), torch.randn(9, 6, device=DEVICE)
    few = mixture.routed(x[:2], logits[:2])
    with pytest.raises(AssertionError, match="layer 0 were copied"):
        mixture.routed(x, logits)
    mixture.backend = "reference"
    with pytest.raises(AssertionError, match="layer 0 were copied"):
        mixture.routed(x[:1], logits[:1])
    buffers.tensors = original
    assert torch.allclose(few, mixture.routed(x, logits)[:2], atol=1e-4)


def test_what_goes_by_vectors() -> None:
    x = torch.randn(9, 64, device=DEVICE)
    assert not by_vectors(x[:1], "triton")  # gradients may be wanted
    with torch.no_grad():
        assert by_vectors(x[:8], "triton")
        assert not by_vectors(x, "triton")
        assert not by_vectors(x[:1], "reference")
