"""Routing and the experts against plain loops."""

from __future__ import annotations

import pytest
import torch

from keyecli.kernels import reference
from tests import naive
from tests.compare import assert_close

EXPERTS, WIDTH, INNER = 6, 16, 12


@pytest.mark.parametrize("tokens", [1, 2, 19])
@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("normalise", [True, False])
def test_equals_loops(tokens: int, top_k: int, normalise: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, gate = (
        torch.randn(tokens, WIDTH, generator=generator),
        torch.randn(EXPERTS, WIDTH, generator=generator),
    )
    gate_up = torch.randn(EXPERTS, WIDTH, 2 * INNER, generator=generator) / 4
    down = torch.randn(EXPERTS, INNER, WIDTH, generator=generator) / 4
    weights, chosen = reference.route(x @ gate.t(), top_k, normalise)
    expected = naive.experts(x.double(), gate.double(), gate_up.double(), down.double(), top_k, normalise)
    assert_close(reference.moe_experts(x, weights, chosen, gate_up, down), expected)


def test_weights_add_up_to_one_only_when_normalised() -> None:
    logits = torch.randn(7, EXPERTS, generator=torch.Generator().manual_seed(0))
    weights, _ = reference.route(logits, 2, True)
    assert weights.dtype == torch.float32
    assert_close(weights.sum(-1), torch.ones(7))
    assert bool((reference.route(logits, 2, False)[0].sum(-1) < 0.999).all())


def test_experts_without_tokens_change_nothing_and_get_no_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, WIDTH, generator=generator)
    gate_up = torch.randn(EXPERTS, WIDTH, 2 * INNER, generator=generator).requires_grad_()
    down = torch.randn(EXPERTS, INNER, WIDTH, generator=generator).requires_grad_()
    chosen = torch.tensor([[1, 4]] * 5)
    out = reference.moe_experts(x, torch.full((5, 2), 0.5), chosen, gate_up, down)
    out.sum().backward()
    for name, parameter in (("gate_up", gate_up), ("down", down)):
        touched = parameter.grad.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == [False, True, False, False, True, False], name
    only_used = torch.zeros(EXPERTS, 1, 1)
    only_used[[1, 4]] = 1
    again = reference.moe_experts(x, torch.full((5, 2), 0.5), chosen, gate_up * only_used, down * only_used)
    assert_close(again, out, relative=1e-6)
