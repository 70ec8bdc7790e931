"""Questions and samples that the kernels decode together behind one prefix: the same tokens as one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli.engine import stream
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.loaded import LoadedModel
from keyecli.engine.sampling import Sampler
from keyecli.engine.shared import Question, SharedPrefix, question_tokens
from keyecli.model.checkpoint import load_model
from keyecli.model.vision import VisionAttention
from tests.engine.scenes import fake_decoder, loaded_from, planned
from tests.kernels.on_device import CUDA, DEVICE
from tests.tiny import tiny_config

TOKENS = 40 if CUDA else 2  # a step of the interpreter takes seconds
QUESTIONS = [
    Question("When?", GenerationSettings(max_tokens=TOKENS)),
    Question("Who is it?", GenerationSettings(max_tokens=TOKENS, temperature=1.5, seed=3)),
    Question("Why?", GenerationSettings(max_tokens=TOKENS // 2, repetition_penalty=1.5), think=False),
]


@pytest.fixture
def kernels(
    make_checkpoint: Callable[..., Path], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> LoadedModel:
    """A model that the kernels compute; under the interpreter, its new tokens alone."""
    folder = make_checkpoint(config=tiny_config(num_hidden_layers=2 if CUDA else 1))
    model = load_model(folder, device=DEVICE)
    model.set_kernel_backend("triton")
    decode = model.decode

    def by_definition(*arguments: Any) -> Any:
        model.set_kernel_backend("reference")
        try:
            return decode(*arguments)
        finally:
            model.set_kernel_backend("triton")

    if not CUDA:
        monkeypatch.setattr(model, "decode", by_definition)
        for module in model.visual.modules():
            if isinstance(module, VisionAttention):
                module.backend = "reference"
    monkeypatch.setattr(stream, "decode_frames", fake_decoder())
    return replace(loaded_from(folder, model, tiny_tokenizer), device=DEVICE, kernels="triton")


@pytest.mark.skipif(not CUDA, reason="a CPU has nothing to wait for")
def test_choosing_never_waits_for_the_device() -> None:
    settings = [replace(one.settings, max_tokens=8, top_k=50, top_p=0.9, min_p=0.01) for one in QUESTIONS]
    prompts = [torch.arange(9) for _ in settings]
    sampler = Sampler(settings, 152_000, DEVICE, banned_ids=[3], prompts=prompts)
    logits = torch.randn((len(settings), 152_000), device=DEVICE)
    sampler.pick(logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            sampler.pick(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_answers_are_those_of_questions_asked_one_by_one(kernels: LoadedModel) -> None:
    questions = QUESTIONS if CUDA else QUESTIONS[:2]
    plans = [planned("a.mp4", 2, rows=1)]
    room = question_tokens(kernels, plans, [question.text for question in questions])

    def prefix_of(together: int) -> SharedPrefix:
        return SharedPrefix.prefill(
            kernels, plans, question_room_tokens=room, answer_tokens=TOKENS, together=together
        )

    prefix = prefix_of(len(questions))
    assert prefix.together == len(questions)
    answers = prefix.answers(questions)
    lone = prefix_of(1)
    alone = [lone.answer(one.text, one.settings, think=one.think) for one in questions]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    if CUDA:  # once more from the graph that was captured, in other places
        again = prefix.answers(questions[::-1])
        assert again[::-1] == answers == alone
