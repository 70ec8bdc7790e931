"""Evidence: what is recorded is what a float64 forward of plain loops says, and recording changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from keyecli.engine.evidence import AttentionRecord, record_attention
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests import naive
from tests.compare import assert_close, assert_same
from tests.model.test_trunk import direct
from tests.tiny import random_tensors, tiny_config

PROMPT, TOKENS = 20, 24
EACH_KEY = [(key, key + 1) for key in range(PROMPT)]
IDS = torch.randint(0, 200, (TOKENS,), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(TOKENS).expand(3, TOKENS)


def toy(**changes: Any) -> tuple[KeyeVL2ForConditionalGeneration, dict[str, Tensor], dict[str, Any]]:
    config = tiny_config(**changes)
    tensors = random_tensors(config, seed=4)
    return direct(config, tensors), tensors, config


@torch.inference_mode()
def decoded(model: KeyeVL2ForConditionalGeneration) -> Tensor:
    """The prompt in one pass, then token by token, as an answer is: all hidden states [T, D]."""
    cache = KeyeCache(model.config, TOKENS)
    embeds = model.embed(IDS[None])
    edges = [0, *range(PROMPT, TOKENS + 1)]
    parts = [
        model.decode(embeds[:, begin:end], POSITIONS[:, None, begin:end], cache)
        for begin, end in itertools.pairwise(edges)
    ]
    return torch.cat(parts, dim=1)[0]


def recorded(model: KeyeVL2ForConditionalGeneration) -> AttentionRecord:
    with record_attention(model) as record:
        decoded(model)
    return record


def expected_contributions(
    tensors: dict[str, Tensor], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Σ_layers Σ_heads α · ‖W_O v‖ of every query and key, one product at a time: float64 [T, T]."""
    total = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    layers: Iterator[int] = iter(range(config["num_hidden_layers"]))
    plain = naive.attention

    def observed(q: Tensor, k: Tensor, v: Tensor, chosen: list[set[int]]) -> Tensor:
        output = tensors[f"model.layers.{next(layers)}.self_attn.o_proj.weight"].double()
        heads, dim = q.shape[1:]
        for t in range(TOKENS):
            for h in range(heads):
                group = h // (heads // k.shape[1])
                exponentials = {s: float((q[t, h] @ k[s, group] * dim**-0.5).exp()) for s in chosen[t]}
                for s, value in exponentials.items():
                    written = output[:, h * dim : (h + 1) * dim] @ v[s, group]
                    total[t, s] += value / sum(exponentials.values()) * written.norm()
        return plain(q, k, v, chosen)

    monkeypatch.setattr(naive, "attention", observed)
    naive.decoder_logits(tensors, config, IDS.tolist(), POSITIONS)
    return total


@pytest.mark.parametrize(
    "changes", [{}, {"sa_config": None}, {"num_experts": None}], ids=["sparse", "dense", "mlp"]
)
def test_weights_are_what_the_definition_says(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tensors, config = toy(**changes)
    record = recorded(model)
    expected = expected_contributions(tensors, config, monkeypatch)
    rows = expected[PROMPT - 1 :, :PROMPT].float()
    assert record.steps == len(rows) == 1 + TOKENS - PROMPT
    for step, row in enumerate(rows):
        weights = record.frame_weights(EACH_KEY, [step])
        assert_close(weights, row / row.sum(), what=f"step {step}")
        if not changes:  # the indexer chose 8 keys in each of two layers
            assert int((weights > 0).sum()) <= 16
    summed = rows.sum(0)
    assert_close(record.frame_weights(EACH_KEY), summed / summed.sum(), what="all steps")
    frames = [(2, 6), (7, 11), (15, 20)]
    shares = torch.stack([summed[begin:end].sum() for begin, end in frames])
    assert_close(record.frame_weights(frames), shares / shares.sum(), what="frames")


def test_dense_mode_records_every_key() -> None:
    model, *_ = toy()
    model.model.mode = "dense"
    record = recorded(model)
    assert all(bool((record.frame_weights(EACH_KEY, [step]) > 0).all()) for step in range(record.steps))


def test_recording_changes_no_bit_and_leaves_nothing_behind() -> None:
    model, *_ = toy()
    before = decoded(model)
    with record_attention(model) as record:
        assert_same(decoded(model), before)
        steps = record.steps
    assert_same(decoded(model), before)
    assert record.steps == steps == 1 + TOKENS - PROMPT
    assert all(layer.self_attn.observer is None for layer in model.model.layers)
    weights = recorded(model).frame_weights([(0, 5), (5, 9)])
    assert weights.sum() == pytest.approx(1)
    assert_same(recorded(model).frame_weights([(0, 5), (5, 9)]), weights)


def test_an_error_in_the_block_ends_the_recording() -> None:
    model, *_ = toy()
    with pytest.raises(KeyboardInterrupt), record_attention(model):
        raise KeyboardInterrupt
    assert recorded(model).steps > 0


def test_a_pass_that_broke_off_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, *_ = toy()
    record = recorded(model)
    with record_attention(model) as second:
        with _failing_second_layer(model), pytest.raises(RuntimeError, match="out of memory"):
            decoded(model)
        assert second.steps == 0
        decoded(model)
    assert_same(second.frame_weights(EACH_KEY), record.frame_weights(EACH_KEY))


@contextmanager
def _failing_second_layer(model: Any) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_what_is_refused() -> None:
    model, *_ = toy()
    with record_attention(model) as record:
        with pytest.raises(ValueError, match="being recorded already"), record_attention(model):
            pass
        decoded(model)
        with pytest.raises(ValueError, match="one sequence at a time"):
            model.decode(model.embed(IDS.expand(2, -1)), POSITIONS[:, None].expand(3, 2, -1))
    with pytest.raises(ValueError, match="not every step saw token 20"):
        record.frame_weights([(0, 4), (19, 21)])
    record.frame_weights([(0, 4), (19, 21)], [1])
    with pytest.raises(IndexError):
        record.frame_weights([(0, 4)], [99])


def test_frames_that_were_not_looked_at() -> None:
    model, *_ = toy()
    record = recorded(model)
    chosen = record.frame_weights(EACH_KEY, [0])
    unseen = [(key, key + 1) for key in range(PROMPT) if chosen[key] == 0]
    assert unseen
    assert record.frame_weights(unseen, [0]).tolist() == [0.0] * len(unseen)
    assert record.frame_weights([], [0]).tolist() == []
    assert AttentionRecord(2).frame_weights([(0, 4)], []).tolist() == [0.0]
