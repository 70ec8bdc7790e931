"""Answers that are decoded at the same time, behind one prefix, are those that are decoded one by one, token for token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from keyecli.engine import generate as generating
from keyecli.engine import samples, shared, stream
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.loaded import LoadedModel
from keyecli.engine.plan import cache_bytes_per_token, plan_run
from keyecli.engine.samples import draw_samples
from keyecli.engine.shared import (
    Question,
    SharedPrefix,
    question_tokens,
    sequences_together,
    shared_plan,
)
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import build_prompt
from tests.engine.branches import BranchByBranch
from tests.engine.scenes import fake_decoder, planned

QUESTIONS = [
    Question("When?", GenerationSettings(max_tokens=5)),
    Question(
        "How often does the red circle move?", GenerationSettings(max_tokens=6, temperature=1.0, seed=3)
    ),
    Question("Who?", GenerationSettings(max_tokens=3, repetition_penalty=1.5), think=False),
]


@pytest.fixture
def kernels(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The toy model as if kernels computed it, whose branches are decoded by their definition."""

    def decoder_for(model: Any, cache: Any, made: Any = None, branches: Any = None) -> Any:
        return None if branches is None else made or BranchByBranch(model, cache, branches)

    for module in (shared, samples):
        monkeypatch.setattr(module, "decoder_for", decoder_for)
    return replace(loaded, kernels="triton")


@pytest.fixture(autouse=True)
def decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "decode_frames", fake_decoder())


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each run of the generation had."""
    seen: list[int] = []
    together = generating.generate_together

    def counted(config: Any, tokenizer: Any, decoder: Any, prompts: Any, **arguments: Any) -> Any:
        seen.append(len(prompts))
        return together(config, tokenizer, decoder, prompts, **arguments)

    for module in (generating, shared, samples):
        monkeypatch.setattr(module, "generate_together", counted)
    return seen


def prefix_of(loaded: LoadedModel, **arguments: Any) -> SharedPrefix:
    plans = [planned("a.mp4", 2, rows=1)]
    room = question_tokens(loaded, plans, [question.text for question in QUESTIONS])
    return SharedPrefix.prefill(
        loaded, plans, **{"question_room_tokens": room, "answer_tokens": 6, **arguments}
    )


def test_answers_are_those_of_questions_asked_one_by_one(kernels: LoadedModel, widths: list[int]) -> None:
    lone = prefix_of(kernels)
    assert lone.together == 1
    alone = [lone.answer(one.text, one.settings, think=one.think) for one in QUESTIONS]
    prefix = prefix_of(kernels, together=2)
    widths.clear()
    assert prefix.answers(QUESTIONS) == alone
    assert widths == [2, 1]
    # Once more from the same cache, in another order and company.
    assert prefix.answers([QUESTIONS[2], QUESTIONS[0]]) == [alone[2], alone[0]]
    assert prefix.answer(QUESTIONS[1].text, QUESTIONS[1].settings) == alone[1]
    assert lone.answers(QUESTIONS[:2]) == alone[:2]
    assert widths == [2, 1, 2, 1, 1, 1]


def test_an_answer_that_could_run_into_its_neighbour_is_decoded_alone(
    kernels: LoadedModel, widths: list[int]
) -> None:
    """A long question with little room beside a short one with much."""
    short = Question("When?", GenerationSettings(max_tokens=40))
    long = Question(QUESTIONS[1].text, GenerationSettings(max_tokens=1))
    prefix = prefix_of(kernels, together=2, answer_tokens=4)
    widths.clear()
    together = prefix.answers([short, long])
    assert widths == [1, 1]
    lone = prefix_of(kernels, answer_tokens=4)
    assert together == [lone.answer(one.text, one.settings) for one in (short, long)]


def test_samples_are_those_of_runs_of_their_own(kernels: LoadedModel, widths: list[int]) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    prompt = build_prompt(kernels.tokenizer, kernels.config, messages, [])
    settings = [GenerationSettings(max_tokens=4, temperature=1.0, seed=seed) for seed in range(3)]
    cache = KeyeCache(kernels.config, len(prompt.input_ids) + 2 * 4)
    with torch.inference_mode():
        embeds = kernels.model.embed(prompt.input_ids[None])
        hidden = kernels.model.decode(embeds, prompt.position_ids[:, None], cache)[:, -1:]
    arguments: Any = {"stop_ids": (), "prompt_ids": prompt.input_ids}
    counts: list[int] = []
    found = []
    for together in (1, 2):
        cache.truncate(len(prompt.input_ids))
        found.append(
            draw_samples(
                kernels,
                cache,
                hidden,
                prompt.next_position,
                settings,
                together=together,
                on_token=counts.append,
                **arguments,
            )
        )
    assert found[0] == found[1]
    assert len({one.token_ids for one in found[0]}) == 3
    assert widths == [1, 1, 1, 2, 1]
    assert counts == [*range(1, 13)] * 2


@pytest.mark.parametrize("together", [1, 3])
def test_samples_go_on_where_they_were_interrupted(kernels: LoadedModel, together: int) -> None:
    """Side by side, too, after pieces of different lengths: the same tokens as in one go."""
    messages = [{"role": "user", "content": "Why?"}]
    prompt = build_prompt(kernels.tokenizer, kernels.config, messages, [])
    # Room for the longest beginning and the longest rest.
    cache = KeyeCache(kernels.config, len(prompt.input_ids) + 3 * (5 + 7))
    with torch.inference_mode():
        embeds = kernels.model.embed(prompt.input_ids[None])
        hidden = kernels.model.decode(embeds, prompt.position_ids[:, None], cache)[:, -1:]

    def drawn(tokens: list[int], begun: list[tuple[int, ...]] | None = None) -> list[tuple[int, ...]]:
        cache.truncate(len(prompt.input_ids))
        settings = [
            GenerationSettings(max_tokens=count, temperature=1.0, seed=seed, repetition_penalty=1.2)
            for seed, count in enumerate(tokens)
        ]
        found = draw_samples(
            kernels, cache, hidden, prompt.next_position, settings, stop_ids=(), prompt_ids=prompt.input_ids,
            together=together, begun=begun,
        )  # fmt: skip
        return [one.token_ids for one in found]

    whole = drawn([8, 8, 8])
    first = drawn([1, 5, 3])
    rest = drawn([7, 3, 5], first)
    assert [one + other for one, other in zip(first, rest, strict=True)] == whole
    assert len(set(whole)) == 3


def test_as_many_as_there_is_room_for(kernels: LoadedModel) -> None:
    arguments: Any = {
        "model": "toy",
        "device": "cpu",
        "dtype": "fp32",
        "kernels": "triton",
        "max_tokens": 10,
        "prompt_tokens": 50,
        "weights_loaded": True,
    }
    need = int(plan_run((), kernels.config, **arguments).needed_bytes * 1.05)
    each = 20 * cache_bytes_per_token(kernels.config, 4) + kernels.config.vocab_size * 48

    def fit(free_bytes: int | None, wanted: int, files: LoadedModel = kernels) -> int:
        return sequences_together(
            files, plan_run((), files.config, free_bytes=free_bytes, **arguments), 20, wanted
        )

    assert fit(None, 5) == 5
    assert fit(None, 100) == 8
    assert [fit(need + more, 5) for more in (-1, 0, each - 1, each, 3 * each, 9 * each)] == [1, 1, 1, 2, 4, 5]
    assert fit(None, 5, replace(kernels, kernels="reference")) == 1


def test_room_for_the_others_is_no_room_for_one(kernels: LoadedModel) -> None:
    """The longest answer is as long as where nothing is decoded together."""
    plans = [planned("a.mp4", 2, rows=1)]
    least = shared_plan(kernels, plans, question_room_tokens=100, answer_tokens=4)
    assert least.max_tokens == 4
    settings = GenerationSettings(max_tokens=60)
    answers = [
        prefix_of(kernels, together=together, answer_tokens=2).answer("When?", settings)
        for together in (1, 3)
    ]
    assert answers[0] == answers[1]
