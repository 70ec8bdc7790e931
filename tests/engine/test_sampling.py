"""Choosing tokens: each row against a plain definition in numpy, alone and among others, on ordinary and on odd logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from keyecli.engine.generate import GenerationSettings
from keyecli.engine.sampling import BEST_WEIGHT, Sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 40
INF = float("inf")
BANNED = (3, 17)


def chosen(
    logits: Tensor, settings: GenerationSettings, uniform: float, said: set[int], allowed: set[int] | None
) -> int:
    """One choice of one row, step by step over its ids."""
    scores = {
        index: float(score)
        for index, score in enumerate(logits.tolist())
        if index not in BANNED and (allowed is None or index in allowed)
    }
    penalty = float(np.float32(settings.repetition_penalty))
    for index in said & set(scores):
        exact = scores[index] / penalty if scores[index] > 0 else scores[index] * penalty
        scores[index] = float(np.float32(exact))
    order = sorted(scores, key=lambda index: (-scores[index], index))
    if settings.temperature == 0:
        return order[0]
    best = scores[order[0]]
    weights = []
    for index in order:
        below = 0.0 if scores[index] == best else scores[index] - best
        weights.append(int(np.exp(np.float64(below) / settings.temperature) * BEST_WEIGHT))
    if settings.top_k:
        weights = weights[: settings.top_k]
    wanted, kept = np.ceil(sum(weights) * np.float64(settings.top_p)), 0
    while sum(weights[:kept]) < wanted:
        kept += 1
    weights = [weight for weight in weights[: max(kept, 1)] if weight >= settings.min_p * BEST_WEIGHT]
    point = int(uniform * np.float64(sum(weights)))
    for index, weight in zip(order, weights, strict=False):
        point -= weight
        if point < 0:
            return index
    raise AssertionError("the point lies behind the last weight")


def random_settings(generator: np.random.Generator, seed: int) -> GenerationSettings:
    return GenerationSettings(
        max_tokens=5,
        temperature=float(generator.choice([0.0, 0.3, 1.0, 1.7, 50.0])),
        top_k=int(generator.choice([0, 1, 2, 7, VOCABULARY, 1000])),
        top_p=float(generator.choice([1.0, 0.999, 0.9, 0.5, 1e-9])),
        min_p=float(generator.choice([0.0, 0.01, 0.3, 1.0])),
        repetition_penalty=float(generator.choice([1.0, 1.0, 1.3, 0.7, 4.0])),
        seed=seed,
    )


def odd_logits(generator: np.random.Generator) -> Tensor:
    kind = generator.integers(8)
    logits = generator.normal(size=VOCABULARY) * 4
    if kind == 0:
        logits[:] = 1.5
    elif kind == 1:
        logits[generator.random(VOCABULARY) < 0.8] = -INF
        logits[5] = 0.0
    elif kind == 2:
        logits[11] = 1e30
    elif kind == 3:
        logits = np.round(logits)  # many ties
    elif kind == 4:
        logits[:] = np.where(np.arange(VOCABULARY) % 2, 0.0, -0.0)
    elif kind == 5:
        logits[7] = INF
    elif kind == 6:
        logits[list(BANNED)] = 100.0
    return torch.tensor(logits, dtype=torch.float32)


@pytest.mark.parametrize("trial", range(60))
def test_rows_are_chosen_by_the_definition_whatever_stands_beside_them(trial: int) -> None:
    generator = np.random.default_rng(trial)
    rows = int(generator.integers(1, 6))
    settings = [random_settings(generator, seed=trial * 10 + row) for row in range(rows)]
    prompts = [
        torch.tensor(generator.integers(0, VOCABULARY, size=6)) if generator.random() < 0.7 else None
        for _ in range(rows)
    ]
    together = Sampler(settings, VOCABULARY, DEVICE, banned_ids=BANNED, prompts=prompts)
    alone = [
        Sampler([one], VOCABULARY, DEVICE, banned_ids=BANNED, prompts=[prompt])
        for one, prompt in zip(settings, prompts, strict=True)
    ]
    said = [set() if prompt is None else set(prompt.tolist()) for prompt in prompts]
    uniforms = [
        torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(one.seed)).tolist()
        for one in settings
    ]
    for step in range(5):
        logits = torch.stack([odd_logits(generator) for _ in range(rows)]).to(DEVICE)
        before = logits.clone()
        allowed = [
            {5, *generator.integers(0, VOCABULARY, size=4).tolist()} - set(BANNED)
            if generator.random() < 0.3
            else None
            for _ in range(rows)
        ]
        forbidden = torch.tensor(
            [[ids is not None and index not in ids for index in range(VOCABULARY)] for ids in allowed],
            device=DEVICE,
        )
        ids, log_probabilities = together.pick(logits, forbidden)
        expected = [
            chosen(logits[row], settings[row], uniforms[row][step], said[row], allowed[row])
            for row in range(rows)
        ]
        assert ids.tolist() == expected
        for row, sampler in enumerate(alone):
            own, own_log_probability = sampler.pick(logits[row : row + 1], forbidden[row : row + 1])
            assert own.item() == expected[row]
            assert (
                torch.equal(own_log_probability, log_probabilities[row : row + 1])
                or logits[row].isinf().any()
            )
            said[row].add(expected[row])
            if not logits[row].isinf().any():
                exact = logits[row].double().log_softmax(-1)[expected[row]]
                assert log_probabilities[row].item() == pytest.approx(exact.item(), abs=1e-5)
        assert torch.equal(logits, before)


def counts(probabilities: list[float], **values: Any) -> list[float]:
    """The shares of 4000 draws, each by a seed of its own."""
    settings = [
        GenerationSettings(max_tokens=1, seed=seed, **{"temperature": 1.0, **values}) for seed in range(4000)
    ]
    logits = torch.tensor(probabilities).log().expand(4000, -1)
    drawn, _ = Sampler(settings, len(probabilities)).pick(logits)
    return [float((drawn == index).float().mean()) for index in range(len(probabilities))]


@pytest.mark.parametrize(
    ("probabilities", "options", "expected"),
    [
        ([0.4, 0.3, 0.2, 0.1], {}, [0.4, 0.3, 0.2, 0.1]),
        ([0.1, 0.2, 0.3, 0.4], {"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ([0.4, 0.3, 0.2, 0.1], {"min_p": 0.45}, [4 / 9, 3 / 9, 2 / 9, 0]),
        # Of the three that top_k leaves, the first two are 7 / 9.
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 3, "top_p": 0.75}, [4 / 7, 3 / 7, 0, 0]),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.72, "min_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),
        ([0.5, 0.25, 0.25], {"temperature": 0.5}, [4 / 6, 1 / 6, 1 / 6]),
    ],
)
def test_draws_are_in_proportion(
    probabilities: list[float], options: dict[str, float], expected: list[float]
) -> None:
    shares = counts(probabilities, **options)
    assert shares == pytest.approx(expected, abs=0.03)
    assert [share == 0 for share in shares] == [share == 0 for share in expected]


@pytest.mark.parametrize(("top_p", "size"), [(0.1, 1), (0.3, 3), (0.5, 5), (0.7, 7), (0.9, 9), (1.0, 10)])
def test_of_equals_at_the_edge_of_the_nucleus_the_lower_ids_stay(top_p: float, size: int) -> None:
    shares = counts([0.1] * 10, top_p=top_p)
    assert [share > 0 for share in shares] == [True] * size + [False] * (10 - size)


def test_the_penalty_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, VOCABULARY, (8,), generator=generator)
    sampler = Sampler(
        [GenerationSettings(max_tokens=30, repetition_penalty=1.4)], VOCABULARY, prompts=[prompt]
    )
    process = RepetitionPenaltyLogitsProcessor(1.4)
    ids = prompt[None]
    for _ in range(30):
        logits = torch.randn((1, VOCABULARY), generator=generator)
        expected = process(ids, logits).argmax(-1)
        assert torch.equal(sampler.pick(logits)[0], expected)
        ids = torch.cat([ids, expected[:, None]], dim=1)


def test_a_longer_room_draws_the_same_numbers() -> None:
    logits = torch.randn((8, 1, VOCABULARY), generator=torch.Generator().manual_seed(1))
    settings = GenerationSettings(max_tokens=8, temperature=1.0, seed=9)
    drawn = [
        [int(sampler.pick(row)[0]) for row in logits]
        for sampler in (
            Sampler([settings], VOCABULARY),
            Sampler([replace(settings, max_tokens=5000)], VOCABULARY),
        )
    ]
    assert drawn[0] == drawn[1]
