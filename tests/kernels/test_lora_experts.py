"""Experts with an adapter, in blocks of tokens, against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from keyecli.kernels import lora_experts as kernels
from keyecli.kernels import reference
from tests.compare import assert_close
from tests.kernels.on_device import DEVICE, HALF

TOKENS, WIDTH, INNER, EXPERTS, CHOSEN, RANK = 50, 64, 32, 5, 2, 8


def operands(rank: int = RANK, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(DEVICE, dtype).requires_grad_()

    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    logits[:, 3] = -100.0  # an expert without rows
    weights, experts = reference.route(logits.to(DEVICE), CHOSEN, True)
    return {
        "x": drawn(TOKENS, WIDTH),
        "weights": weights.requires_grad_(),
        "experts": experts,
        "gate_up": drawn(EXPERTS, WIDTH, 2 * INNER).detach(),
        "down": drawn(EXPERTS, INNER, WIDTH).detach(),
        "gate_up_factors": (drawn(EXPERTS, WIDTH, rank), drawn(EXPERTS, rank, 2 * INNER)),
        "down_factors": (drawn(EXPERTS, INNER, rank), drawn(EXPERTS, rank, WIDTH)),
        "scale": 2.0,
    }


def gradients(output: Tensor, values: dict[str, Any]) -> list[Tensor]:
    factors = (*(values["gate_up_factors"] or ()), *(values["down_factors"] or ()))
    learnt = (values["x"], values["weights"], *factors)
    return list(torch.autograd.grad(output.square().sum(), learnt))


@pytest.mark.parametrize("block", [7, 64], ids=["blocks", "whole"])
def test_blocks_are_the_definition(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_TOKENS", block)
    values = operands()
    expected = reference.lora_experts(**values)
    output = kernels.lora_experts(**values)
    assert_close(output, expected, relative=1e-5)
    for mine, theirs in zip(gradients(output, values), gradients(expected, values), strict=True):
        assert_close(mine, theirs, relative=1e-5)


@pytest.mark.parametrize("left_out", ["gate_up_factors", "down_factors"])
def test_either_matrix_may_be_left_alone(left_out: str) -> None:
    values = {**operands(rank=3), left_out: None}
    expected, output = reference.lora_experts(**values), kernels.lora_experts(**values)
    assert_close(output, expected, relative=1e-5)
    for mine, theirs in zip(gradients(output, values), gradients(expected, values), strict=True):
        assert_close(mine, theirs, relative=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """What comes of 16-bit operands is as near to their result in fp32 as that of the definition, or nearer."""
    values = operands(dtype=dtype)
    exact = {
        name: tuple(part.float() for part in value)
        if isinstance(value, tuple)
        else value.float()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in values.items()
    }
    expected = reference.lora_experts(**exact)
    mine, defined = kernels.lora_experts(**values), reference.lora_experts(**values)
    errors = [float((out.detach().double() - expected.detach()).norm()) for out in (mine, defined)]
    assert errors[0] <= errors[1]
    truth = gradients(expected, exact)
    both = gradients(mine, values), gradients(defined, values)
    for own, theirs, right in zip(*both, truth, strict=True):
        limits = [float((one.double() - right).norm()) for one in (own, theirs)]
        assert limits[0] <= 1.1 * limits[1]


def test_a_checkpoint_does_not_compute_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer adds last is not needed for its gradients, which make of the rows what they need."""
    plain, calls = F.grouped_mm, [0]

    def counted(*arguments: Any, **named: Any) -> Tensor:
        calls[0] += 1
        return plain(*arguments, **named)

    monkeypatch.setattr(F, "grouped_mm", counted)
    values = operands()
    expected = gradients(reference.lora_experts(**values), values)
    calls[0] = 0

    def layer(x: Tensor) -> Tensor:
        return x + kernels.lora_experts(**{**values, "x": x.clone()}) - x

    output = checkpoint(layer, values["x"], use_reentrant=False)
    # Twice a matrix and its two factors, of which B is applied elsewhere.
    assert calls == [4]
    found = gradients(output, values)
    # Gate and up again with A, A of down; the way back of both with B; four factors.
    assert calls == [4 + 3 + 4 + 4]
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, relative=1e-4)


def test_an_expert_without_rows_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_TOKENS", 7)
    values = operands()
    for gradient in gradients(kernels.lora_experts(**values), values)[2:]:
        assert not gradient[3].any()
        assert gradient[0].any()
