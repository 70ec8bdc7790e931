"""Decoding from static buffers over several devices: a step cut anywhere into stages has the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keyecli.engine import static
from keyecli.engine.static import StaticDecoder
from keyecli.kernels.reference import Branches
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests.kernels.on_device import CUDA, DEVICE
from tests.model.test_training import fresh
from tests.model.test_trunk import text

TOKENS, STEPS = 12, 4 if CUDA else 2
LAYERS = 3 if CUDA else 1
CUTS = [[1, 2, 3], [2, 3, 3]] if CUDA else [[1, 1]]


def prefilled(model: KeyeVL2ForConditionalGeneration, rows: int) -> KeyeCache:
    cache = KeyeCache(model.config, rows, device=DEVICE)
    positions = torch.arange(TOKENS, device=DEVICE).expand(3, 1, TOKENS)
    model.set_kernel_backend("reference")
    with torch.no_grad():
        model.decode(model.embed(text(1, TOKENS).to(DEVICE)), positions, cache)
    model.set_kernel_backend("triton")
    return cache


@pytest.mark.parametrize("ends", CUTS)
def test_stages_have_the_bits_of_the_whole(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(num_hidden_layers=LAYERS).to(DEVICE)
    device = model.model.norm.weight.device

    def steps() -> list[Tensor]:
        branches = Branches(TOKENS, STEPS, 2)
        decoder = StaticDecoder(model, prefilled(model, branches.rows), branches)
        decoder.begin([TOKENS, TOKENS], [TOKENS, TOKENS + 3])
        return [decoder.step(torch.tensor([5 + i, 9], device=DEVICE)).clone() for i in range(STEPS)]

    whole = steps()
    stages = [(device, range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
    monkeypatch.setattr(static, "stages_of", lambda _: stages)
    for expected, actual in zip(whole, steps(), strict=True):
        assert bool(expected.isfinite().all())
        assert torch.equal(expected, actual)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize("cut", [1, 2])
@torch.inference_mode()
def test_two_gpus_have_the_bits_of_one(cut: int) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    results = []
    for layers in ([first] * LAYERS, [first] * cut + [second] * (LAYERS - cut)):
        model = fresh(num_hidden_layers=LAYERS).to(first)
        for layer, device in zip(model.model.layers, layers, strict=True):
            layer.to(device)
        model.model.norm.to(layers[-1])
        model.lm_head.to(layers[-1])
        cache = KeyeCache(model.config, TOKENS + STEPS, device=layers)
        positions = torch.arange(TOKENS, device=first).expand(3, 1, TOKENS)
        hidden = model.decode(model.embed(text(1, TOKENS).to(first)), positions, cache).to(first)
        decoder = StaticDecoder(model, cache)
        decoder.begin([TOKENS], [TOKENS])
        steps = [decoder.step(torch.tensor([5 + i], device=first)).clone() for i in range(STEPS)]
        assert {step.device for step in steps} == {first}
        results.append([model.logits(hidden), *steps])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)
