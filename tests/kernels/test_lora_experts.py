"""Experts with an adapter, in blocks of tokens, against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keyecli.kernels import lora_experts as kernels
from keyecli.kernels import reference
from tests.compare import assert_close
from tests.kernels.on_device import DEVICE

TOKENS, WIDTH, INNER, EXPERTS, CHOSEN, RANK = 50, 64, 32, 5, 2, 8


def operands() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(DEVICE).requires_grad_()

    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    logits[:, 3] = -100.0  # an expert without rows
    weights, experts = reference.route(logits.to(DEVICE), CHOSEN, True)
    return {
        "x": drawn(TOKENS, WIDTH),
        "weights": weights.requires_grad_(),
        "experts": experts,
        "gate_up": drawn(EXPERTS, WIDTH, 2 * INNER).detach(),
        "down": drawn(EXPERTS, INNER, WIDTH).detach(),
        "gate_up_factors": (drawn(EXPERTS, WIDTH, RANK), drawn(EXPERTS, RANK, 2 * INNER)),
        "down_factors": (drawn(EXPERTS, INNER, RANK), drawn(EXPERTS, RANK, WIDTH)),
        "scale": 2.0,
    }


def gradients(output: Tensor, values: dict[str, Any]) -> list[Tensor]:
    learnt = (values["x"], values["weights"], *values["gate_up_factors"], *values["down_factors"])
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


def test_an_expert_without_rows_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_TOKENS", 7)
    values = operands()
    for gradient in gradients(kernels.lora_experts(**values), values)[2:]:
        assert not gradient[3].any()
        assert gradient[0].any()
