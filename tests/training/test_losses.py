"""The balance loss on routings worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from keyecli.training.losses import load_balance

EVERYTHING = torch.ones(4, dtype=torch.bool)


def test_an_even_routing_costs_one() -> None:
    # Each of four tokens prefers another expert, all by the same margin.
    logits = torch.eye(4) * 3.0
    assert float(load_balance(logits, EVERYTHING, top_k=1)) == pytest.approx(1.0)


def test_one_expert_for_all_costs_its_probability_times_the_experts() -> None:
    logits = torch.zeros(4, 4)
    logits[:, 2] = 5.0
    probability = math.exp(5) / (math.exp(5) + 3)
    assert float(load_balance(logits, EVERYTHING, top_k=1)) == pytest.approx(4 * probability)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 4)
    valid = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(
        load_balance(logits, valid, top_k=2),
        load_balance(logits[valid], torch.ones(4, dtype=torch.bool), top_k=2),
    )


def test_its_gradient_draws_tokens_from_the_full_expert() -> None:
    logits = torch.zeros(4, 4)
    logits[:, 2] = 1.0
    logits.requires_grad_()
    load_balance(logits, EVERYTHING, top_k=1).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 2] > 0).all()
    assert (logits.grad[:, [0, 1, 3]] < 0).all()
