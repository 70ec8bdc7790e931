"""What a model that is being trained answers to held-out rows, by the engine that answers everybody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from keyecli.engine.generate import GenerationSettings, generate, stop_token_ids
from keyecli.engine.loaded import LoadedModel, new_cache
from keyecli.engine.stream import cache_tokens, prefill_stream
from keyecli.engine.thinking import split_answer
from keyecli.model.prompt import Prompt, Visual, layout
from keyecli.training.examples import segments
from keyecli.training.feed import PlannedRow

SPARE_TOKENS = 16
"""How much longer than the expected answer one may be."""


@torch.inference_mode()
def answer_rows(
    loaded: LoadedModel, rows: Sequence[PlannedRow], exact_resize: bool = False
) -> list[dict[str, Any]]:
    """The likeliest answer to the prompt before the first learnt answer of each row: source, question, expected and answer."""
    return [_answered(loaded, row, exact_resize) for row in rows]


def _answered(loaded: LoadedModel, row: PlannedRow, exact_resize: bool) -> dict[str, Any]:
    prompt, expected = _prompt_and_answer(loaded, row)

    def lay_out(visuals: Sequence[Visual]) -> Prompt:
        return layout(loaded.tokenizer, loaded.config, prompt, visuals)

    most = len(loaded.tokenizer.encode(expected, add_special_tokens=False)) + SPARE_TOKENS
    length = row.example.tokens
    cache = new_cache(loaded, cache_tokens(row.plans, length + most))
    prefilled = prefill_stream(loaded, row.plans, lay_out, cache, exact_resize=exact_resize)
    generation = generate(
        loaded.model,
        loaded.tokenizer,
        cache,
        prefilled.hidden,
        prefilled.prompt.next_position,
        GenerationSettings(max_tokens=most),
        stop_ids=stop_token_ids(loaded.config, loaded.tokenizer, loaded.generation_config),
        prompt_ids=prefilled.prompt.input_ids,
    )
    opened = prefilled.prompt.thinking_open
    question = next((message.text for message in row.row.messages if message.role == "user"), "")
    return {
        "source": row.row.source,
        "question": question,
        "expected": split_answer(expected, opened)[1],
        "answer": split_answer(generation.text, opened)[1],
    }


def _prompt_and_answer(loaded: LoadedModel, row: PlannedRow) -> tuple[str, str]:
    """The templated text up to the first learnt answer, and that answer."""
    before = ""
    for text, learnt in segments(loaded.tokenizer, row.row):
        if learnt:
            return before, text
        before += text
    raise ValueError("a planned row has an answer to learn")
