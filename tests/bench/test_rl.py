"""The benchmark of reinforcement learning in small: a step, its check, and that a wrong one is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from keyecli.bench import rl
from keyecli.bench.finetune import adapted_network
from keyecli.bench.rl import RLMeasurement, check_policy, measure_step, speaking
from keyecli.engine.loaded import LoadedModel
from keyecli.kernels import dispatch
from keyecli.model.config import KeyeVL2Config
from tests.tiny import tiny_config

PROMPT, ANSWERS, ANSWER = 24, 3, 4


def loaded() -> LoadedModel:
    return speaking(KeyeVL2Config(**tiny_config(num_hidden_layers=1)), "cpu")


def test_a_step_draws_scores_and_learns() -> None:
    model = loaded()
    asked: list[list[Any]] = []
    compose = rl.compose

    def watched(names: Any) -> Any:
        score = compose(names)

        def scored(attempts: Any) -> Any:
            asked.append(attempts)
            return score(attempts)

        return scored

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "compose", watched)
        found = measure_step(
            adapted_network(model, 2),
            model,
            PROMPT,
            prompts=2,
            rollouts=ANSWERS,
            answer_tokens=ANSWER,
            minibatches=2,
            engine_tokens_per_s=100.0,
        )
    # One group compiles what is needed; each answer is as long as it may be, in words of the vocabulary.
    assert [len(attempts) for attempts in asked] == [ANSWERS] * 3
    assert all(len(attempt.response.split("w")) == ANSWER + 1 for attempts in asked for attempt in attempts)
    assert (found.prompts, found.rollouts, found.prompt_tokens, found.answer_tokens) == (2, 3, PROMPT, ANSWER)
    assert found.seconds == found.generate_s + found.reward_s + found.train_s
    assert 0 < found.old_s < found.train_s
    assert found.mismatch < 1e-5
    row = found.to_dict()
    assert row["schema"] == "keye.bench.rl/1"
    assert row["rollouts_per_s"] == pytest.approx(6 / found.generate_s)
    assert row["share"] == pytest.approx(6 * ANSWER / found.generate_s / 100)


def test_a_row_by_hand() -> None:
    row = RLMeasurement("bf16", 8, 8, 32768, 512, 100.0, 64.0, 1.0, 35.0, 8.0, 2**35, 2**34, 0.012, 1024.0)
    assert row.line() == (
        "reinforcement learning, bf16: 8 × 8 answers of 512 tokens behind 32768 in 100.0 s (generate 64%, reward 1%, train 35%), "
        "1.00 rollouts/s, 512 tokens/s, 50% of decoding alone (1024); peak 32.0 GiB, estimated 16.0 GiB; engine and trainer "
        "differ by 1.2e-02 in a token's log p"
    )
    assert "of decoding alone" not in replace(row, engine_tokens_per_s=None).line()


def test_the_check_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check_policy(loaded(), PROMPT, ANSWERS, ANSWER, rank=2)
    assert right.tokens == PROMPT + ANSWERS * ANSWER
    assert max(right.gradient_errors.values()) < 1e-5
    assert right.line().startswith(
        "reinforcement learning, 1 layers and 36 tokens against the definitions: loss "
    )
    right.require()
    plain = dispatch.lora_experts

    def wrong(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        result = plain(x, *arguments)
        return result if arguments[-1] else result * 1.5 - (result * 0.5).detach()

    monkeypatch.setattr(dispatch, "lora_experts", wrong)
    with pytest.raises(RuntimeError, match="a step is not what the definitions give: reinforcement learning"):
        check_policy(loaded(), PROMPT, ANSWERS, ANSWER, rank=2).require()
