"""The whole model computed by the kernels, against the same model computed by the definitions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from keyecli.errors import KernelError
from keyecli.kernels import decode, dispatch, selection
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests.compare import assert_close
from tests.kernels.on_device import CUDA, DEVICE
from tests.model.test_training import fresh, video_batch
from tests.model.test_trunk import text
from tests.tiny import TINY_CONFIG


def pair() -> dict[dispatch.Backend, KeyeVL2ForConditionalGeneration]:
    """Twins; under the interpreter, which takes milliseconds a tile, of a single layer."""
    models: dict[dispatch.Backend, KeyeVL2ForConditionalGeneration] = {}
    layers = 2 if CUDA else 1
    vision = {**TINY_CONFIG["vision_config"], "num_hidden_layers": layers}
    model = fresh(num_hidden_layers=layers, vision_config=vision).to(DEVICE)
    for backend in ("reference", "triton"):
        models[backend] = copy.deepcopy(model)
        models[backend].set_kernel_backend(backend)
    return models


def assert_same_gradients(models: dict[dispatch.Backend, KeyeVL2ForConditionalGeneration]) -> None:
    expected = dict(models["reference"].named_parameters())
    compared = 0
    for name, parameter in models["triton"].named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, expected[name].grad, relative=2e-4, what=f"gradient of {name}")
            compared += 1
    assert compared > 10


def test_a_video_batch_has_the_same_loss_and_gradients() -> None:
    """30 tokens and 8 selected keys: vision, routing, experts, selection and attention, forward and backward."""
    models = pair()
    losses = []
    for model in models.values():
        batch = {key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in video_batch().items()}
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    assert_close(losses[1], losses[0], relative=1e-5)
    assert_same_gradients(models)


def test_teaching_over_packed_documents() -> None:
    """The indexer's divergence and its gradients, with documents, a shared prefix and padding."""
    models = pair()
    segments = torch.tensor([[0] * 4 + [1] * 11 + [2] * 10 + [-1] * 2], device=DEVICE)
    tokens = segments.shape[1]
    positions = torch.arange(tokens, device=DEVICE).expand(3, 1, tokens)
    results = {}
    real = (segments != -1)[0]
    for backend, model in models.items():
        embeds = model.embed(text(1, tokens).to(DEVICE))
        hidden, divergence = model.model(embeds, positions, segments=segments, teach_indexer=True)
        assert divergence is not None
        (hidden[:, real].square().mean() + divergence[:, real].mean()).backward()
        results[backend] = hidden[:, real].detach(), divergence[:, real].detach()
    for kernel, definition in zip(results["triton"], results["reference"], strict=True):
        assert_close(kernel, definition)
    assert_same_gradients(models)


@torch.no_grad()
def test_chunks_and_single_tokens_through_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    original = decode.decode_attention
    monkeypatch.setattr(
        decode, "decode_attention", lambda *a, **named: steps.append(a[0].shape[1]) or original(*a, **named)
    )
    models = pair()
    ids = text(2, 17).to(DEVICE)
    outputs = {}
    for backend, model in models.items():
        cache = KeyeCache(model.config, 24, batch=2, device=DEVICE)
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
        parts, start = [], 0
        for count in (12, 3, 1, 1):
            positions = torch.arange(start, start + count, device=DEVICE).expand(3, 2, count)
            parts.append(model.decode(model.embed(ids[:, start : start + count]), positions, cache))
            start += count
        outputs[backend] = torch.cat(parts, dim=1)
    assert_close(outputs["triton"], outputs["reference"])
    assert steps == [count for count in (3, 1, 1) for _ in models["triton"].model.layers]


def test_the_device_chooses_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.zeros(1, device=DEVICE)
    assert dispatch.backend_of(here, None) == ("triton" if CUDA else "reference")
    assert dispatch.backend_of(here, "triton") == "triton"
    assert dispatch.backend_of(here, "reference") == "reference"
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert dispatch.backend_of(here, None) == "reference"


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def too_large(*arguments: Any, **named: Any) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(selection, "select_keys", too_large)
    model = pair()["triton"]
    positions = torch.arange(20, device=DEVICE).expand(3, 1, 20)
    with pytest.raises(KernelError) as raised:
        model.decode(model.embed(text(1, 20).to(DEVICE)), positions)
    message = str(raised.value)
    assert message.startswith("the Triton kernel for the selection of keys does not compile for ")
    assert "shared memory, Required: 300000" in message
    assert message.endswith("; --kernels reference does without")


def test_every_choice_is_the_definition() -> None:
    """Each function of the dispatch, asked for the definition and for the kernel."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    q, k, v = randn(1, 5, 4, 32), randn(1, 40, 2, 32), randn(1, 40, 2, 32)
    index_q, w, index_k = randn(1, 5, 2, 16), randn(1, 5, 2), randn(1, 40, 16)
    lists = [dispatch.select_keys(index_q, w, index_k, 8, backend=b) for b in ("reference", "triton")]
    assert torch.equal(*lists)
    indices = lists[0]
    outputs = [dispatch.attend_indices(q, k, v, indices, b) for b in ("reference", "triton")]
    for definition, kernel in zip(*outputs, strict=True):
        assert_close(kernel, definition)
    for backend in ("reference", "triton"):
        with torch.no_grad():
            assert_close(dispatch.attended(q, k, v, indices, backend), outputs[0][0])
        assert_close(
            dispatch.selected_probabilities(q, k, indices, outputs[0][1], backend).sum(-1),
            torch.ones(1, 5, device=DEVICE),
        )
    frames = randn(2, 6, 2, 16)
    tables = (randn(6, 8).repeat(1, 2), randn(6, 8).repeat(1, 2))
    attended = [dispatch.frame_attention(frames, frames, frames, *tables, b) for b in ("reference", "triton")]
    assert_close(attended[1], attended[0])
    routed = [dispatch.route(randn(1, 4).expand(7, 4), 2, True, b)[1] for b in ("reference", "triton")]
    assert routed[0].shape == routed[1].shape == (7, 2)
    arguments = (randn(3, 16), randn(3, 2), torch.tensor([[0, 1], [1, 3], [2, 0]], device=DEVICE))
    weights = (randn(4, 16, 16), randn(4, 8, 16))
    mixed = [dispatch.moe_experts(*arguments, *weights, b) for b in ("reference", "triton")]
    assert_close(mixed[1], mixed[0])
