"""A conversation about videos and images that are prefilled once; each turn reuses what the cache holds of it.

T tokens of the whole conversation, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from keyecli.engine.generate import GenerationSettings, StopReason, generate, stop_token_ids
from keyecli.engine.loaded import (
    LoadedModel,
    OnProgress,
    free_cache_bytes,
    memory_limits,
    new_cache,
    run_arguments,
)
from keyecli.engine.plan import (
    DTYPE_BYTES,
    InputPlan,
    RunPlan,
    cache_bytes_per_token,
    gib,
    plan_run,
    prefill_chunk_tokens,
)
from keyecli.engine.static import StaticDecoder, decoder_for
from keyecli.engine.stream import StreamSettings, Timings, cache_tokens, prefill_stream, visual_end, visual_of
from keyecli.engine.thinking import AnswerSplitter, Pieces
from keyecli.errors import MemoryLimitError, ModelError, UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import Prompt, Visual, build_prompt

OnText = Callable[[str], None]

EndReason = StopReason | Literal["interrupted"]

# What a cache is made for beyond the visuals and one answer, and what it grows by when a conversation needs more.
ROOM_TOKENS = 8192
# The same on a device that has no memory for so much.
QUESTION_TOKENS = 256


@dataclass(frozen=True)
class Reply:
    """An answer: `text` without `reasoning`.

    `prompt_tokens` are those of the whole conversation up to the answer, `reused_tokens` of them were in the cache.
    `max_tokens` is the longest answer there was room for. `stop_reason` is "stop" when the model ended by itself, "length"
    when the room did, "interrupted" when Ctrl-C did.
    """

    text: str
    reasoning: str
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    max_tokens: int
    stop_reason: EndReason


class AnswerInterrupted(KeyboardInterrupt):
    """Ctrl-C while an answer was on its way; `reply` is what had come. The conversation can go on."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


class Conversation:
    """Visuals in a cache, and behind them as much of what was said as still stands.

    What was said is given anew with every question. The cache keeps the longest common beginning of the new conversation
    and the tokens that it holds, so that going on, another wording of an earlier question, a second try and forgetting all
    turns are one operation. `times_s` are the frames that came, for each input, in seconds of its file.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: KeyeCache,
        held_ids: Tensor,
        visuals: Sequence[Visual],
        times_s: tuple[tuple[Fraction, ...], ...],
        *,
        preface: str,
        chunk_tokens: int,
    ) -> None:
        self.loaded = loaded
        self.times_s = times_s
        self.length = visual_end(loaded, held_ids)
        self._cache = cache
        # The tokens whose keys and values are known to stand in the cache; it may hold more that nobody relies on.
        self._held_ids = held_ids
        self._visuals = visuals
        self._preface = preface
        self._chunk_tokens = chunk_tokens
        self._static: StaticDecoder | None = None

    @classmethod
    def prefill(
        cls,
        loaded: LoadedModel,
        plans: Sequence[InputPlan],
        *,
        answer_tokens: int,
        preface: str = "",
        think: bool = True,
        strict: bool = False,
        exact_resize: bool = False,
        settings: StreamSettings | None = None,
        timings: Timings | None = None,
        on_progress: OnProgress | None = None,
    ) -> Conversation:
        """Decode, encode and prefill `plans`, with room for turns and for answers of `answer_tokens`.

        `preface` stands between the visuals and the first question. UsageError when the context is too small,
        MemoryLimitError when the device is, InputError for what cannot be read. Warns as `prefill_stream` does.
        """
        settings = settings or StreamSettings()

        def lay_out(visuals: Sequence[Visual]) -> Prompt:
            return _lay_out(loaded, visuals, preface, ("",), think)

        prompt_tokens = len(lay_out([visual_of(plan) for plan in plans]).input_ids)
        planned = _planned(loaded, plans, prompt_tokens, answer_tokens)
        with memory_limits(loaded.device):
            cache = new_cache(loaded, cache_tokens(plans, planned.total_tokens))
            prefilled = prefill_stream(
                loaded,
                plans,
                lay_out,
                cache,
                exact_resize=exact_resize,
                strict=strict,
                settings=settings,
                timings=timings,
                on_progress=on_progress,
            )
        return cls(
            loaded,
            cache,
            prefilled.prompt.input_ids,
            prefilled.visuals,
            prefilled.times_s,
            preface=preface,
            chunk_tokens=settings.chunk_tokens or prefill_chunk_tokens(loaded.device, loaded.offload),
        )

    @torch.inference_mode()
    def answer(
        self,
        said: Sequence[str],
        settings: GenerationSettings,
        *,
        think: bool = True,
        timings: Timings | None = None,
        on_text: OnText | None = None,
        on_reasoning: OnText | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Reply:
        """Answer the last of `said`: questions and answers in turn, the first and the last of them questions.

        `on_text` and `on_reasoning` get the pieces as they come, `on_token` the number of tokens so far. UsageError when the
        conversation is longer than the context, MemoryLimitError when it is larger than the device, AnswerInterrupted for
        Ctrl-C; after each of them the conversation can go on.
        """
        loaded = self.loaded
        timings = timings or Timings(device=loaded.device)
        prompt = _lay_out(loaded, self._visuals, self._preface, said, think)
        tokens, context = len(prompt.input_ids), loaded.config.max_position_embeddings
        if tokens >= context:
            raise UsageError(
                f"the conversation takes {tokens:,} tokens with this question and the model's context holds {context:,}: "
                "shorten the question, or forget turns with /undo or /clear"
            )
        limit = min(settings.max_tokens, context - tokens)
        # The last token is fed even where the cache holds it: what it leads to is not kept.
        reused = min(_common_beginning(prompt.input_ids, self._held_ids), tokens - 1)
        if reused < self.length:
            raise ModelError(
                f"the chat template of {loaded.name} lays a longer conversation out differently from its beginning on, "
                "so that the videos would have to be read again: ask single questions with `keye ask`"
            )
        splitter = AnswerSplitter(prompt.thinking_open)
        written = 0

        def deliver(pieces: Pieces) -> None:
            if pieces.reasoning and on_reasoning:
                on_reasoning(pieces.reasoning)
            if pieces.text and on_text:
                on_text(pieces.text)

        def count(token: int) -> None:
            nonlocal written
            written = token
            if on_token:
                on_token(token)

        def reply(stop_reason: EndReason) -> Reply:
            deliver(splitter.finish())
            return Reply(splitter.text, splitter.reasoning, tokens, reused, written, limit, stop_reason)

        try:
            with memory_limits(loaded.device):
                with timings.measure("prefill_s"):
                    self._forget_from(reused)
                    self._make_room(tokens + limit)
                    hidden = self._feed(prompt, reused)
                with timings.measure("generate_s"):
                    self._static = decoder_for(loaded.model, self._cache, self._static)
                    generation = generate(
                        loaded.model,
                        loaded.tokenizer,
                        self._cache,
                        hidden,
                        prompt.next_position,
                        replace(settings, max_tokens=limit),
                        stop_ids=stop_token_ids(loaded.config, loaded.tokenizer, loaded.generation_config),
                        prompt_ids=prompt.input_ids,
                        static=self._static,
                        on_text=lambda piece: deliver(splitter.add(piece)),
                        on_token=count,
                    )
        except KeyboardInterrupt as stop:
            self._static = None  # it may have been stopped while it was being captured
            raise AnswerInterrupted(reply("interrupted")) from stop
        # Where a template repeats an answer as it was written, its tokens need not be fed again.
        ids = torch.cat([prompt.input_ids, torch.tensor(generation.token_ids, dtype=torch.int64)])
        self._held_ids = ids[: self._cache.length]
        return reply(generation.stop_reason)

    def _forget_from(self, length: int) -> None:
        self._held_ids = self._held_ids[:length]
        self._cache.truncate(length)

    def _make_room(self, tokens: int) -> None:
        """Move what the cache holds into a larger one where it has no room for `tokens`; MemoryLimitError when there is none."""
        if tokens <= self._cache.capacity:
            return
        loaded, held = self.loaded, len(self._held_ids)
        need = tokens * cache_bytes_per_token(loaded.config, DTYPE_BYTES[loaded.dtype], loaded.kv)
        free = free_cache_bytes(loaded)
        if free is not None and need > free:
            raise MemoryLimitError(
                f"the conversation has outgrown its cache: a larger one takes {gib(need)} and {gib(free)} are free on "
                f"{loaded.devices}; forget turns with /undo or /clear, or shorten the answers with --max-tokens"
            )
        larger = min(tokens + ROOM_TOKENS, max(tokens, loaded.config.max_position_embeddings))
        if free is not None and larger * need > free * tokens:
            larger = tokens
        cache = new_cache(loaded, larger)
        cache.copy_from(self._cache, held)
        self._cache, self._static = cache, None

    def _feed(self, prompt: Prompt, begin: int) -> Tensor:
        """Prefill the prompt from token `begin` on and return the last token's state [1, 1, D]."""
        model, device = self.loaded.model, self._cache.device
        total = len(prompt.input_ids)
        while True:
            end = min(begin + self._chunk_tokens, total)
            ids = prompt.input_ids[begin:end].to(device)[None]
            positions = prompt.position_ids[:, begin:end].to(device)[:, None]
            hidden = model.decode(model.embed(ids), positions, self._cache)[:, -1:]
            self._held_ids = prompt.input_ids[:end]
            if end == total:
                return hidden.to(device)
            begin = end


def _lay_out(
    loaded: LoadedModel, visuals: Sequence[Visual], preface: str, said: Sequence[str], think: bool
) -> Prompt:
    first: list[dict[str, str]] = [{"type": visual.kind} for visual in visuals]
    first.append({"type": "text", "text": preface + said[0]})
    messages: list[dict[str, Any]] = [{"role": "user", "content": first}]
    for place, text in enumerate(said[1:]):
        messages.append({"role": ("assistant", "user")[place % 2], "content": text})
    return build_prompt(loaded.tokenizer, loaded.config, messages, visuals, think=think)


def _planned(
    loaded: LoadedModel, plans: Sequence[InputPlan], prompt_tokens: int, answer_tokens: int
) -> RunPlan:
    """The plan of a conversation: with room for many turns, or for one question where the device has no memory for more.

    `prompt_tokens`: an empty question's. UsageError and MemoryLimitError when not even that fits.
    """
    spare = max(0, loaded.config.max_position_embeddings - prompt_tokens - answer_tokens)

    def plan(room: int) -> RunPlan:
        planned = plan_run(
            plans,
            loaded.config,
            **run_arguments(loaded),
            max_tokens=answer_tokens,
            prompt_tokens=prompt_tokens + min(room, spare),
            weights_loaded=True,
        )
        planned.check()
        return planned

    try:
        return plan(ROOM_TOKENS)
    except MemoryLimitError:
        return plan(QUESTION_TOKENS)


def _common_beginning(one: Tensor, other: Tensor) -> int:
    """How many tokens two sequences of ids begin with alike."""
    shorter = min(len(one), len(other))
    differ = (one[:shorter] != other[:shorter]).nonzero()
    return int(differ[0]) if len(differ) else shorter
