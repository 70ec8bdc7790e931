"""Inputs that are decoded, encoded and prefilled once, and any number of questions about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from keyecli.engine.generate import (
    Constraint,
    GenerationSettings,
    StopReason,
    generate,
    stop_token_ids,
)
from keyecli.engine.loaded import LoadedModel, OnProgress, free_memory_bytes, memory_limits, torch_dtype
from keyecli.engine.plan import InputPlan, RunPlan, plan_run
from keyecli.engine.static import StaticDecoder, decoder_for
from keyecli.engine.stream import Timings, cache_tokens, prefill_stream, visual_of
from keyecli.engine.thinking import AnswerSplitter, Pieces
from keyecli.errors import UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import Prompt, Visual, build_prompt

OnText = Callable[[str], None]

MakeConstraint = Callable[[int, bool], Constraint]
"""Told how many tokens an answer may have and whether it begins inside `<think>`; a new constraint for it."""


@dataclass(frozen=True)
class SharedAnswer:
    """One answer: `text` without `reasoning`, the tokens and the logarithm of each one's probability under the model.

    `prompt_tokens` counts the shared part too. `stop_reason` is "stop" when the model, or a constraint that was
    complete, ended the answer and "length" when the room for it did.
    """

    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    prompt_tokens: int
    stop_reason: StopReason


class SharedPrefix:
    """A prompt up to the end of its visuals, kept in the cache; each question is laid behind it and forgotten again.

    `times_s` are the frames that came, for each input, in seconds of its file. `frame_tokens` are the places of each
    frame's tokens in the cache, one (begin, end) a frame, the inputs one after the other.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: KeyeCache,
        visuals: Sequence[Visual],
        times_s: tuple[tuple[Fraction, ...], ...],
        length: int,
        frame_tokens: tuple[tuple[int, int], ...],
        *,
        think: bool,
        timings: Timings,
    ) -> None:
        self.loaded = loaded
        self.times_s = times_s
        self.length = length
        self.frame_tokens = frame_tokens
        self.timings = timings
        self._cache = cache
        self._visuals = visuals
        self._think = think
        self._static: StaticDecoder | None = None

    @classmethod
    def prefill(
        cls,
        loaded: LoadedModel,
        plans: Sequence[InputPlan],
        *,
        question_room_tokens: int,
        answer_tokens: int,
        think: bool = True,
        strict: bool = False,
        exact_resize: bool = False,
        origins_s: Sequence[Fraction] | None = None,
        timings: Timings | None = None,
        on_progress: OnProgress | None = None,
    ) -> SharedPrefix:
        """Decode, encode and prefill `plans` with room for questions and answers of up to so many tokens.

        `question_room_tokens` is everything that follows the visuals (see `question_tokens`). `origins_s`, one an
        input, is the time of its file that the prompt calls 0.0. UsageError when the context is too small,
        MemoryLimitError when the device is, InputError for what cannot be read. Warns as `prefill_stream` does.
        """
        origins = [Fraction(0)] * len(plans) if origins_s is None else list(origins_s)
        timings = timings or Timings(device=loaded.device)

        def lay_out(visuals: Sequence[Visual]) -> Prompt:
            return _lay_out(loaded, _counted_from(visuals, origins), "", think)

        planned = shared_plan(
            loaded, plans, question_room_tokens=question_room_tokens, answer_tokens=answer_tokens
        )
        planned.check()
        with memory_limits(loaded.device):
            room = cache_tokens(plans, planned.total_tokens)
            cache = KeyeCache(loaded.config, room, dtype=torch_dtype(loaded.dtype), device=loaded.device)
            prefilled = prefill_stream(
                loaded,
                plans,
                lay_out,
                cache,
                exact_resize=exact_resize,
                strict=strict,
                timings=timings,
                on_progress=on_progress,
            )
        came = [
            replace(visual_of(plan), times_s=tuple(map(float, times_s)))
            if plan.sampling.kind == "video"
            else visual_of(plan)
            for plan, times_s in zip(plans, prefilled.times_s, strict=True)
        ]
        ids = prefilled.prompt.input_ids
        return cls(
            loaded,
            cache,
            _counted_from(came, origins),
            prefilled.times_s,
            _shared_length(loaded, prefilled.prompt),
            _frame_tokens(loaded, ids, came),
            think=think,
            timings=timings,
        )

    @torch.inference_mode()
    def answer(
        self,
        text: str,
        settings: GenerationSettings,
        *,
        think: bool | None = None,
        constraint: MakeConstraint | None = None,
        prefill_text: str = "",
        on_text: OnText | None = None,
        on_reasoning: OnText | None = None,
    ) -> SharedAnswer:
        """Answer one question. The answer begins with `prefill_text`, written in the model's place.

        `think` defaults to what the prefix was made with. `on_text` and `on_reasoning` get the pieces as they come.
        `settings.max_tokens` is cut to the room there is; UsageError when the question leaves none.
        """
        think = self._think if think is None else think
        loaded, cache = self.loaded, self._cache
        prompt = _lay_out(loaded, self._visuals, text, think, prefill_text)
        # The last generated token is never fed back, so that it needs no place.
        room = cache.capacity - len(prompt.input_ids) + 1
        context = loaded.config.max_position_embeddings - len(prompt.input_ids)
        if min(room, context) < 1:
            tokens = len(prompt.input_ids) - self.length
            raise UsageError(f"the question takes {tokens} tokens, more than there is room for; shorten it")
        settings = replace(settings, max_tokens=min(settings.max_tokens, room, context))
        cache.truncate(self.length)
        splitter = AnswerSplitter(prompt.thinking_open)
        splitter.add(prefill_text)

        def deliver(pieces: Pieces) -> None:
            if pieces.reasoning and on_reasoning:
                on_reasoning(pieces.reasoning)
            if pieces.text and on_text:
                on_text(pieces.text)

        with memory_limits(loaded.device):
            with self.timings.measure("prefill_s"):
                ids = prompt.input_ids[self.length :].to(loaded.device)[None]
                positions = prompt.position_ids[:, self.length :].to(loaded.device)[:, None]
                hidden = loaded.model.decode(loaded.model.embed(ids), positions, cache)[:, -1:]
            with self.timings.measure("generate_s"):
                # Its graph is captured once for all questions.
                self._static = decoder_for(loaded.model, cache, self._static) or self._static
                generation = generate(
                    loaded.model,
                    loaded.tokenizer,
                    cache,
                    hidden,
                    prompt.next_position,
                    settings,
                    stop_ids=stop_token_ids(loaded.config, loaded.tokenizer, loaded.generation_config),
                    constraint=constraint(settings.max_tokens, prompt.thinking_open) if constraint else None,
                    static=self._static,
                    on_text=lambda piece: deliver(splitter.add(piece)),
                )
                deliver(splitter.finish())
        return SharedAnswer(
            text=splitter.text,
            reasoning=splitter.reasoning,
            token_ids=generation.token_ids,
            log_probabilities=generation.log_probabilities,
            prompt_tokens=len(prompt.input_ids),
            stop_reason=generation.stop_reason,
        )


def shared_plan(
    loaded: LoadedModel, plans: Sequence[InputPlan], *, question_room_tokens: int, answer_tokens: int
) -> RunPlan:
    """What `SharedPrefix.prefill` with the same arguments takes; `max_tokens` is the longest answer that fits."""
    visuals = [visual_of(plan) for plan in plans]
    shared = _shared_length(loaded, _lay_out(loaded, visuals, "", True))
    return plan_run(
        plans,
        loaded.config,
        model=loaded.name,
        device=loaded.device,
        dtype=loaded.dtype,
        kernels=loaded.kernels,
        max_tokens=answer_tokens,
        prompt_tokens=shared + question_room_tokens,
        free_bytes=free_memory_bytes(loaded.device),
        weights_loaded=True,
    )


def question_tokens(
    loaded: LoadedModel, plans: Sequence[InputPlan], texts: Sequence[str], *, prefill_text: str = ""
) -> int:
    """Tokens that the longest of `texts` takes behind the visuals, the template's own and `prefill_text` included."""
    first = [_first_frame(visual_of(plan)) for plan in plans]
    lengths = []
    for text in texts or ("",):
        for think in (True, False):
            prompt = _lay_out(loaded, first, text, think, prefill_text)
            lengths.append(len(prompt.input_ids) - _shared_length(loaded, prompt))
    return max(lengths)


def _first_frame(visual: Visual) -> Visual:
    return replace(visual, times_s=visual.times_s[:1])


def _lay_out(
    loaded: LoadedModel, visuals: Sequence[Visual], text: str, think: bool, answer_begin: str = ""
) -> Prompt:
    content: list[dict[str, str]] = [{"type": visual.kind} for visual in visuals]
    content.append({"type": "text", "text": text})
    prompt = build_prompt(
        loaded.tokenizer, loaded.config, [{"role": "user", "content": content}], visuals, think=think
    )
    if not answer_begin:
        return prompt
    ids = torch.tensor(loaded.tokenizer.encode(answer_begin, add_special_tokens=False), dtype=torch.int64)
    following = prompt.next_position + torch.arange(len(ids))
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, ids]),
        position_ids=torch.cat([prompt.position_ids, following.expand(3, -1)], dim=1),
        next_position=prompt.next_position + len(ids),
    )


def _counted_from(visuals: Sequence[Visual], origins_s: Sequence[Fraction]) -> list[Visual]:
    return [
        replace(visual, times_s=tuple(time_s - float(origin) for time_s in visual.times_s))
        for visual, origin in zip(visuals, origins_s, strict=True)
    ]


def _shared_length(loaded: LoadedModel, prompt: Prompt) -> int:
    """Tokens up to and including the end mark of the last visual."""
    return int((prompt.input_ids == loaded.config.vision_end_token_id).nonzero()[-1]) + 1


def _frame_tokens(
    loaded: LoadedModel, input_ids: Tensor, visuals: Sequence[Visual]
) -> tuple[tuple[int, int], ...]:
    config = loaded.config
    places = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
    found = places.nonzero()[:, 0].tolist()
    ranges, used = [], 0
    for visual in visuals:
        size = visual.grid[0] * visual.grid[1]
        for _ in range(visual.frames):
            ranges.append((found[used], found[used] + size))
            used += size
    return tuple(ranges)
