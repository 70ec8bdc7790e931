"""A question that is about text alone: no picture, one prefill, one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from keyecli.engine.generate import GenerationSettings, generate, stop_token_ids
from keyecli.engine.loaded import LoadedModel, memory_limits, new_cache, run_arguments
from keyecli.engine.plan import plan_run
from keyecli.engine.shared import OnText, SharedAnswer
from keyecli.engine.stream import Timings, prefill_stream
from keyecli.engine.thinking import AnswerSplitter, Pieces
from keyecli.model.prompt import Prompt, Visual, build_prompt


@torch.inference_mode()
def answer_text(
    loaded: LoadedModel,
    text: str,
    settings: GenerationSettings,
    *,
    think: bool = True,
    timings: Timings | None = None,
    on_reasoning: OnText | None = None,
) -> SharedAnswer:
    """Answer `text` by itself. UsageError when it is longer than the context, MemoryLimitError when the device is full.

    `settings.max_tokens` is cut to what the context leaves.
    """
    timings = timings or Timings(device=loaded.device)

    def lay_out(visuals: Sequence[Visual]) -> Prompt:
        content = [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return build_prompt(loaded.tokenizer, loaded.config, messages, visuals, think=think)

    prompt_tokens = len(lay_out(()).input_ids)
    planned = plan_run(
        (),
        loaded.config,
        **run_arguments(loaded),
        max_tokens=settings.max_tokens,
        prompt_tokens=prompt_tokens,
        weights_loaded=True,
    )
    planned.check()
    with memory_limits(loaded.device):
        cache = new_cache(loaded, planned.total_tokens)
        prefilled = prefill_stream(loaded, (), lay_out, cache, timings=timings)
        splitter = AnswerSplitter(prefilled.prompt.thinking_open)

        def deliver(pieces: Pieces) -> None:
            if pieces.reasoning and on_reasoning:
                on_reasoning(pieces.reasoning)

        with timings.measure("generate_s"):
            generation = generate(
                loaded.model,
                loaded.tokenizer,
                cache,
                prefilled.hidden,
                prefilled.prompt.next_position,
                replace(settings, max_tokens=planned.max_tokens),
                stop_ids=stop_token_ids(loaded.config, loaded.tokenizer, loaded.generation_config),
                prompt_ids=prefilled.prompt.input_ids,
                on_text=lambda piece: deliver(splitter.add(piece)),
            )
            deliver(splitter.finish())
    return SharedAnswer(
        text=splitter.text,
        reasoning=splitter.reasoning,
        token_ids=generation.token_ids,
        log_probabilities=generation.log_probabilities,
        prompt_tokens=prompt_tokens,
        stop_reason=generation.stop_reason,
    )
