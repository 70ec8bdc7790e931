"""Objectives of reinforcement learning against their formulas written out, on tries of different lengths."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from keyecli.training.policy_loss import (
    ALGORITHMS,
    CLIPPING,
    Algorithm,
    advantages,
    answer_means,
    divergence_estimate,
    has_variance,
    mismatch_weights,
    objective,
)

LENGTHS = (3, 1, 5)
ROWS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
ADVANTAGES = torch.tensor([1.5, -0.5, -1.0])


def drawn(seed: int = 0) -> Tensor:
    return -torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(seed)) - 0.1


def gradient(algorithm: Algorithm, log_probs: Tensor, old: Tensor, engine: Tensor | None = None) -> Tensor:
    leaf = log_probs.clone().requires_grad_(True)
    objective(algorithm, leaf, old, old if engine is None else engine, ROWS, ADVANTAGES).total.backward()
    assert leaf.grad is not None
    return leaf.grad


def test_advantages_compare_within_a_group() -> None:
    rewards = [random.Random(1).random() for _ in range(8)]
    expected = [(reward - fmean(rewards)) / (stdev(rewards) + 1e-4) for reward in rewards]
    assert advantages(rewards) == pytest.approx(expected, rel=1e-9)
    assert sum(advantages(rewards)) == pytest.approx(0, abs=1e-9)


def test_a_group_without_variance_says_nothing() -> None:
    assert [has_variance(rewards) for rewards in ([1.0, 1.0, 1.0], [0.0, 0.0], [0.5], [])] == [False] * 4
    assert has_variance([0.0, 0.01, 0.0])


def test_before_the_first_update_it_is_reinforce_with_the_mean_of_each_answer() -> None:
    old = drawn()
    by_hand = torch.tensor([float(ADVANTAGES[row]) / LENGTHS[row] for row in ROWS.tolist()])
    for algorithm in ("gspo", "reinforce"):
        torch.testing.assert_close(gradient(algorithm, old, old), by_hand)  # type: ignore[arg-type]
    # By token every token counts as much, whoever's it is.
    torch.testing.assert_close(gradient("grpo", old, old), ADVANTAGES[ROWS])


@pytest.mark.parametrize("algorithm", ["gspo", "grpo"])
def test_ratios_are_clipped_only_on_the_side_that_their_advantage_says(algorithm: Algorithm) -> None:
    low, high = CLIPPING[algorithm]
    old = drawn()
    for move in (-2 * low, 2 * high, -0.5 * low, 0.5 * high):
        log_probs = old + math.log1p(move)
        found = objective(algorithm, log_probs, old, old, ROWS, ADVANTAGES)
        beyond = move > high or move < -low
        per_answer = [beyond and (move > 0) == (gain > 0) for gain in ADVANTAGES.tolist()]
        expected = per_answer if algorithm == "gspo" else [per_answer[row] for row in ROWS.tolist()]
        assert found.clipped.tolist() == expected
        moved = gradient(algorithm, log_probs, old)
        assert [value == 0 for value in moved.tolist()] == [per_answer[row] for row in ROWS.tolist()]


def test_gspo_is_its_formula() -> None:
    old, log_probs = drawn(0), drawn(1) * 0.001 + drawn(0)
    low, high = CLIPPING["gspo"]
    total = 0.0
    for row, gain in enumerate(ADVANTAGES.tolist()):
        own = row == ROWS
        ratio = math.exp(float((log_probs - old)[own].double().mean()))
        total += min(ratio * gain, min(max(ratio, 1 - low), 1 + high) * gain)
    found = objective("gspo", log_probs, old, old, ROWS, ADVANTAGES)
    assert float(found.total) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_the_engine_drew_otherwise_counts_as_much_as_it_was_likelier_at_most_twice(
    algorithm: Algorithm,
) -> None:
    old = drawn()
    engine = old - torch.tensor([0.1, 5.0, -0.2])[ROWS]
    shares = torch.tensor([math.exp(0.1), 2.0, math.exp(-0.2)])
    weights = mismatch_weights(old, engine, ROWS, len(LENGTHS), algorithm)
    torch.testing.assert_close(weights, shares[ROWS] if algorithm == "grpo" else shares)
    ratio = gradient(algorithm, old, old, engine) / gradient(algorithm, old, old)
    torch.testing.assert_close(ratio, shares[ROWS])


def test_means_of_answers() -> None:
    values = torch.arange(9.0)
    assert answer_means(values, ROWS, 4).tolist() == [1.0, 3.0, 6.0, 0.0]


def test_the_estimate_of_the_divergence_has_no_bias_and_no_sign() -> None:
    now, start = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    estimates = divergence_estimate(now, start)
    assert (estimates >= 0).all()
    exact = (now.exp() * (now - start)).sum()
    torch.testing.assert_close((now.exp() * estimates).sum(), exact)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_bandit_converges(algorithm: Algorithm) -> None:
    """Four arms, of which the third is best; the policy sees nothing but the rewards of what it drew."""
    torch.manual_seed(0)
    logits = torch.zeros(4, requires_grad=True)
    rewards = torch.tensor([0.1, 0.4, 1.0, 0.6])
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        with torch.no_grad():
            probabilities = logits.softmax(0)
            arms = torch.multinomial(probabilities, 16, replacement=True)
            old = probabilities.log()[arms]
        gains = torch.tensor(advantages(rewards[arms].tolist()))
        for _ in range(1 if algorithm == "reinforce" else 2):
            now = logits.log_softmax(0)[arms]
            found = objective(algorithm, now, old, old, torch.arange(16), gains)
            optimizer.zero_grad()
            (-found.total / 16).backward()
            optimizer.step()
    assert float(logits.softmax(0)[2].detach()) > 0.9
