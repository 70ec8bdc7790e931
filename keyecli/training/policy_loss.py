"""Objectives of reinforcement learning on whole answers: GSPO, token-level GRPO, REINFORCE.

N answers, S tokens of all of them, each with the number of its answer in `rows` int64 [S]. P published, C what comparable public
code does, R our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Algorithm = Literal["gspo", "grpo", "reinforce"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

# How far a ratio may be below and above 1 (C): a sequence's is a mean over its tokens, so that small steps count.
CLIPPING: dict[Algorithm, tuple[float, float]] = {
    "gspo": (3e-4, 4e-4),
    "grpo": (0.2, 0.28),
    "reinforce": (0.0, 0.0),
}
MOST_WEIGHT = 2.0  # of what engine and trainer disagree about (C)
STD_FLOOR = 1e-4
EQUAL = 1e-6  # rewards that differ by less than this are one


@dataclass(frozen=True)
class Objective:
    """What is to be made as large as possible: fp32, a sum over answers (GSPO, REINFORCE) or tokens (GRPO), by whose number the
    caller divides; clipped: bool [N] or [S], whose gradient the clipping took away."""

    total: Tensor
    clipped: Tensor


def advantages(rewards: Sequence[float]) -> list[float]:
    """(r − mean) / (std + 1e-4) within a group, std being that of a sample (P, C)."""
    values = torch.tensor(rewards, dtype=torch.float64)
    return ((values - values.mean()) / (values.std() + STD_FLOOR)).tolist()


def has_variance(rewards: Sequence[float]) -> bool:
    """Whether a group says anything: answers that are all as good, or bad, are no reason to prefer one (P)."""
    return len(rewards) > 1 and max(rewards) - min(rewards) > EQUAL


def answer_means(values: Tensor, rows: Tensor, answers: int) -> Tensor:
    """The mean of each answer's tokens: values [S] → [N]; 0 for an answer without any."""
    zeros = torch.zeros(answers, dtype=values.dtype, device=values.device)
    counts = zeros.index_add(0, rows, torch.ones_like(values))
    return zeros.index_add(0, rows, values) / counts.clamp(min=1)


def mismatch_weights(old: Tensor, engine: Tensor, rows: Tensor, answers: int, algorithm: Algorithm) -> Tensor:
    """How much more likely the trainer found what the engine drew, at most 2, without gradient: exp of the mean difference of an
    answer's logarithms [N] for ratios of whole answers, of each token's [S] for GRPO (C: truncated importance sampling; R: the
    mean, as in the ratio itself)."""
    difference = (old - engine).detach()
    if algorithm != "grpo":
        difference = answer_means(difference, rows, answers)
    return difference.exp().clamp(max=MOST_WEIGHT)


def objective(
    algorithm: Algorithm,
    log_probs: Tensor,
    old: Tensor,
    engine: Tensor,
    rows: Tensor,
    advantage: Tensor,
    clipping: tuple[float, float] | None = None,
) -> Objective:
    """log_probs: fp32 [S] with gradient; old: the same under the weights that the step began with; engine: as the engine drew
    them; advantage [N]; clipping: below and above 1, by default `CLIPPING`.

    GSPO (P): Σ_i min(s_i Â_i, clip(s_i) Â_i), s_i = exp(mean_t (log π − log π_old)). GRPO: the same with each token's ratio,
    summed over tokens (C: DAPO). REINFORCE: Σ_i Â_i mean_t log π, for weights that have not moved since the answers were drawn.
    """
    answers = len(advantage)
    weights = mismatch_weights(old, engine, rows, answers, algorithm)
    low, high = CLIPPING[algorithm] if clipping is None else clipping
    if algorithm == "reinforce":
        means = answer_means(log_probs, rows, answers)
        return Objective((weights * advantage * means).sum(), torch.zeros(answers, dtype=torch.bool))
    if algorithm == "gspo":
        ratio, gain = answer_means(log_probs - old, rows, answers).exp(), advantage
    else:
        ratio, gain = (log_probs - old).exp(), advantage[rows]
    kept = ratio.clamp(1 - low, 1 + high)
    clipped = (ratio * gain > kept * gain).detach()
    return Objective((weights * torch.minimum(ratio * gain, kept * gain)).sum(), clipped)


def divergence_estimate(log_probs: Tensor, start: Tensor) -> Tensor:
    """KL(π ‖ π_start) of each drawn token, fp32 [S]: r − 1 − log r with r = π_start / π, never negative, without bias (C: k3)."""
    logarithm = start - log_probs
    return logarithm.exp() - 1 - logarithm
