"""`kv` fp8 through the engine: caches, what is planned for them, questions behind one prefix and in a conversation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from keyecli.engine import conversation as conversation_module
from keyecli.engine import stream
from keyecli.engine.conversation import Conversation
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.loaded import LoadedModel, choose_kv, new_cache, run_arguments
from keyecli.engine.plan import (
    DTYPE_BYTES,
    KVFormat,
    cache_bytes_per_token,
    estimate_memory,
    plan_run,
)
from keyecli.engine.shared import SharedPrefix, question_tokens
from keyecli.errors import MemoryLimitError, UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.config import KeyeVL2Config
from tests.engine.scenes import fake_decoder, planned
from tests.tiny import tiny_config

SETTINGS = GenerationSettings(max_tokens=10)
QUESTIONS = ["When?", "How often does the red circle move to the left?"]


@pytest.fixture(autouse=True)
def decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "decode_frames", fake_decoder())


@pytest.fixture
def in_fp8(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, kv="fp8")


@pytest.fixture(scope="module")
def official() -> KeyeVL2Config:
    return KeyeVL2Config(
        num_experts=128, sa_config={"indexer_head_dim": 64, "indexer_num_heads": 16, "topk": 2048}
    )


def test_what_is_chosen() -> None:
    assert choose_kv(None) is None
    assert choose_kv("auto") is None
    assert choose_kv("fp8") == "fp8"
    with pytest.raises(UsageError, match="--kv int8 is not known; use auto or fp8"):
        choose_kv("int8")


@pytest.mark.parametrize("kv", [None, "fp8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"sa_config": None}], ids=["sparse", "dense"])
def test_a_token_takes_what_is_planned(
    loaded: LoadedModel, changes: dict[str, Any], dtype: str, kv: KVFormat | None
) -> None:
    config = KeyeVL2Config(**tiny_config(**changes))
    cache = new_cache(replace(loaded, config=config, dtype=dtype, kv=kv), 10)
    held = sum(buffer.nbytes for buffer in (cache.k, cache.v, cache.index_k) if buffer is not None)
    assert held == 10 * cache_bytes_per_token(config, DTYPE_BYTES[dtype], kv)


def test_worked_figures_of_the_released_shape(official: KeyeVL2Config) -> None:
    """48 layers of 2 · 4 · 128 keys and values in a byte each, and 64 of the indexer's key in two."""
    assert cache_bytes_per_token(official, 2, "fp8") == 48 * (2 * 4 * 128 + 2 * 64) == 55_296
    sizes: dict[str, Any] = {"dtype": "bf16", "device": "cuda", "kernels": "triton"}
    narrow, wide = (estimate_memory(official, 262_144, 0, **sizes, kv=kv) for kv in ("fp8", None))
    assert narrow.cache_bytes == 262_144 * 55_296
    assert wide.total_bytes - narrow.total_bytes == 262_144 * (104_448 - 55_296)


def test_a_plan_says_so(in_fp8: LoadedModel) -> None:
    sizes: dict[str, Any] = {"max_tokens": 10, "prompt_tokens": 100}
    plan = plan_run((), in_fp8.config, **run_arguments(in_fp8), **sizes)
    assert plan.kv == plan.to_dict()["kv"] == "fp8"
    assert plan.memory.cache_bytes == 110 * cache_bytes_per_token(in_fp8.config, 4, "fp8")
    assert (
        plan_run((), in_fp8.config, **run_arguments(replace(in_fp8, kv=None)), **sizes).to_dict()["kv"]
        == "fp32"
    )


def test_bf16_is_said_to_halve_only_what_it_halves(official: KeyeVL2Config) -> None:
    sizes: dict[str, Any] = {
        "model": "m",
        "device": "cuda",
        "dtype": "fp32",
        "kernels": "triton",
        "kv": "fp8",
    }
    needed = plan_run((), official, **sizes, max_tokens=10, prompt_tokens=1000).needed_bytes
    plan = plan_run((), official, **sizes, max_tokens=10, prompt_tokens=1000, free_bytes=needed * 2 // 3)
    with pytest.raises(MemoryLimitError, match=r"use --dtype bf16, which halves weights$"):
        plan.check()


def test_questions_behind_one_prefix(in_fp8: LoadedModel, loaded: LoadedModel) -> None:
    """In any order, each gets the answer that a prefix of its own gives; and the cache makes a difference."""
    plans = [planned("a.mp4", 5)]
    room = question_tokens(in_fp8, plans, QUESTIONS)

    def prefix(of: LoadedModel) -> SharedPrefix:
        return SharedPrefix.prefill(of, plans, question_room_tokens=room, answer_tokens=10)

    shared = prefix(in_fp8)
    answers = [shared.answer(question, SETTINGS) for question in (*QUESTIONS, QUESTIONS[0])]
    for question, answer in zip((*QUESTIONS, QUESTIONS[0]), answers, strict=True):
        assert answer.token_ids == prefix(in_fp8).answer(question, SETTINGS).token_ids
    exact = prefix(loaded).answer(QUESTIONS[0], SETTINGS)
    assert answers[0].log_probabilities[0] != exact.log_probabilities[0]
    assert answers[0].log_probabilities[0] == pytest.approx(exact.log_probabilities[0], abs=0.5)


def test_a_conversation_moves_into_a_larger_cache(
    in_fp8: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[KeyeCache] = []

    def keep(*arguments: Any) -> KeyeCache:
        made.append(new_cache(*arguments))
        return made[-1]

    monkeypatch.setattr(conversation_module, "new_cache", keep)
    monkeypatch.setattr(conversation_module, "ROOM_TOKENS", 20)
    conversation = Conversation.prefill(in_fp8, [planned("a.mp4", 5)], answer_tokens=10)
    first = conversation.answer(["When?"], SETTINGS)
    conversation.answer(["x" * 100], SETTINGS)
    assert len(made) == 2
    assert {cache.k.dtype for cache in made} == {torch.float8_e4m3fn}
    assert conversation.answer(["When?"], SETTINGS) == replace(first, reused_tokens=first.reused_tokens)
