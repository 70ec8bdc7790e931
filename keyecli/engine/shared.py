"""Inputs that are decoded, encoded and prefilled once, and any number of questions about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from keyecli.engine.generate import (
    Begun,
    Constraint,
    Generation,
    GenerationSettings,
    StopReason,
    generate,
    generate_together,
    stop_token_ids,
)
from keyecli.engine.loaded import (
    LoadedModel,
    ModelFiles,
    OnProgress,
    memory_limits,
    new_cache,
    run_arguments,
)
from keyecli.engine.plan import DTYPE_BYTES, InputPlan, RunPlan, cache_bytes_per_token, plan_run
from keyecli.engine.static import StaticDecoder, decoder_for
from keyecli.engine.stream import Timings, cache_tokens, prefill_stream, visual_end, visual_of
from keyecli.engine.thinking import AnswerSplitter, Pieces
from keyecli.errors import UsageError
from keyecli.kernels.dispatch import DECODE_TOKENS
from keyecli.kernels.reference import Branches
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import Prompt, Visual, build_prompt

OnText = Callable[[str], None]

# What choosing a token holds for each entry of the vocabulary, of one sequence: logits, sorted scores and ids, weights, sums.
SAMPLING_BYTES_PER_ENTRY = 48
# By so much of itself a plan may be wrong; what only saves time must not be what fills the device.
PLAN_ERROR = 0.05

MakeConstraint = Callable[[int, bool], Constraint]
"""Told how many tokens an answer may have and whether it begins inside `<think>`; a new constraint for it."""


@dataclass(frozen=True)
class Question:
    """What is asked behind a prefix. think: None is what the prefix was made with. See `SharedPrefix.answer`."""

    text: str
    settings: GenerationSettings
    think: bool | None = None


@dataclass(frozen=True)
class _Asked:
    """A question laid out; the settings' `max_tokens` are those that there is room for."""

    prompt: Prompt
    settings: GenerationSettings


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

    `together` is how many answers are decoded at the same time, where several questions are asked at once.
    `times_s` are the frames that came, for each input, in seconds of its file. `frame_tokens` are the places of
    each frame's tokens in the cache, one (begin, end) a frame, the inputs one after the other.
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
        together: int,
        room: int,
    ) -> None:
        """room: rows that the cache has for each sequence but the first one."""
        self.loaded = loaded
        self.times_s = times_s
        self.length = length
        self.frame_tokens = frame_tokens
        self.timings = timings
        self._cache = cache
        self._visuals = visuals
        self._think = think
        self.together = together
        self._room = room
        # Each one's graph is captured once for all questions; by how many sequences it decodes.
        self._static: dict[int, StaticDecoder] = {}

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
        together: int = 1,
        timings: Timings | None = None,
        on_progress: OnProgress | None = None,
    ) -> SharedPrefix:
        """Decode, encode and prefill `plans` with room for questions and answers of up to so many tokens.

        `question_room_tokens` is everything that follows the visuals (see `question_tokens`). `origins_s`, one an
        input, is the time of its file that the prompt calls 0.0. `together`: decode up to so many answers at the same
        time, as far as the device has room for them. UsageError when the context is too small,
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
        room = question_room_tokens + planned.max_tokens
        together = sequences_together(loaded, planned, room, together)
        with memory_limits(loaded.device):
            rows = cache_tokens(plans, planned.total_tokens) + (together - 1) * room
            cache = new_cache(loaded, rows)
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
        ids = prefilled.prompt.input_ids
        return cls(
            loaded,
            cache,
            _counted_from(prefilled.visuals, origins),
            prefilled.times_s,
            visual_end(loaded, ids),
            _frame_tokens(loaded, ids, prefilled.visuals),
            think=think,
            timings=timings,
            together=together,
            room=room,
        )

    @torch.inference_mode()
    def answers(self, questions: Sequence[Question]) -> list[SharedAnswer]:
        """Answer several questions, `together` of them at a time; each gets the answer that `answer` would give it.

        Errors are those of `answer`, for all of them.
        """
        asked = [self._ask(one.text, one.settings, one.think) for one in questions]
        found: list[SharedAnswer] = []
        for first in range(0, len(asked), self.together):
            found += self._answer_together(asked[first : first + self.together])
        return found

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
        asked = self._ask(text, settings, think, prefill_text)
        splitter = AnswerSplitter(asked.prompt.thinking_open)
        splitter.add(prefill_text)

        def deliver(pieces: Pieces) -> None:
            if pieces.reasoning and on_reasoning:
                on_reasoning(pieces.reasoning)
            if pieces.text and on_text:
                on_text(pieces.text)

        most, thinks = asked.settings.max_tokens, asked.prompt.thinking_open
        generation = self._generate(
            asked,
            constraint(most, thinks) if constraint else None,
            lambda piece: deliver(splitter.add(piece)),
        )
        deliver(splitter.finish())
        return _shared_answer(asked, generation, splitter)

    def _ask(
        self, text: str, settings: GenerationSettings, think: bool | None, prefill_text: str = ""
    ) -> _Asked:
        """UsageError when the question leaves no room for an answer."""
        think = self._think if think is None else think
        prompt = _lay_out(self.loaded, self._visuals, text, think, prefill_text)
        # The last generated token is never fed back, so that it needs no place.
        rows = self._cache.capacity - (self.together - 1) * self._room
        room = rows - len(prompt.input_ids) + 1
        context = self.loaded.config.max_position_embeddings - len(prompt.input_ids)
        if min(room, context) < 1:
            tokens = len(prompt.input_ids) - self.length
            raise UsageError(f"the question takes {tokens} tokens, more than there is room for; shorten it")
        return _Asked(prompt, replace(settings, max_tokens=min(settings.max_tokens, room, context)))

    def _generate(
        self, asked: _Asked, constraint: Constraint | None = None, on_text: OnText | None = None
    ) -> Generation:
        loaded, cache = self.loaded, self._cache
        with memory_limits(loaded.device):
            with self.timings.measure("prefill_s"):
                hidden = self._prefill(asked.prompt)
            with self.timings.measure("generate_s"):
                return generate(
                    loaded.model,
                    loaded.tokenizer,
                    cache,
                    hidden,
                    asked.prompt.next_position,
                    asked.settings,
                    stop_ids=stop_token_ids(loaded.config, loaded.tokenizer, loaded.generation_config),
                    prompt_ids=asked.prompt.input_ids,
                    constraint=constraint,
                    static=self._decoder(1),
                    on_text=on_text,
                )

    def _answer_together(self, asked: Sequence[_Asked]) -> list[SharedAnswer]:
        """At most `together` of them; one by one where they cannot be decoded side by side."""
        longest = max(len(one.prompt.input_ids) for one in asked) - self.length
        # A sequence that has ended goes on beside the others.
        rows = longest + max(one.settings.max_tokens for one in asked) - 1
        decoder = self._decoder(len(asked)) if len(asked) > 1 and rows <= self._room else None
        if decoder is None:
            generations = [self._generate(one) for one in asked]
        else:
            generations = self._generate_together(decoder, asked)
        found = []
        for one, generation in zip(asked, generations, strict=True):
            splitter = AnswerSplitter(one.prompt.thinking_open)
            splitter.add(generation.text)
            splitter.finish()
            found.append(_shared_answer(one, generation, splitter))
        return found

    def _generate_together(self, decoder: StaticDecoder, asked: Sequence[_Asked]) -> list[Generation]:
        loaded, branches = self.loaded, self._branches(len(asked))
        begun: list[Begun] = []
        with memory_limits(loaded.device):
            with self.timings.measure("prefill_s"):
                # Each where the first one has its place, from which it then moves away.
                for number, one in reversed(list(enumerate(asked))):
                    hidden = self._prefill(one.prompt)
                    logits, length = loaded.model.logits(hidden[0, -1]), len(one.prompt.input_ids)
                    position, ids = one.prompt.next_position, one.prompt.input_ids
                    begun.insert(0, Begun(logits, length, position, one.settings, ids))
                    self._cache.copy_to_branch(branches, number, length)
            with self.timings.measure("generate_s"):
                return generate_together(
                    loaded.config,
                    loaded.tokenizer,
                    decoder,
                    begun,
                    stop_ids=stop_token_ids(loaded.config, loaded.tokenizer, loaded.generation_config),
                    ahead=begun[0].logits.is_cuda,
                )

    def _prefill(self, prompt: Prompt) -> Tensor:
        """Put what follows the prefix into the cache, behind it; returns the last token's state, [1, 1, D]."""
        model, device, cache = self.loaded.model, self.loaded.device, self._cache
        cache.truncate(self.length)
        ids = prompt.input_ids[self.length :].to(device)[None]
        positions = prompt.position_ids[:, self.length :].to(device)[:, None]
        return model.decode(model.embed(ids), positions, cache)[:, -1:].to(device)

    def _branches(self, count: int) -> Branches:
        return Branches(self.length, self._room, count)

    def _decoder(self, count: int) -> StaticDecoder | None:
        branches = None if count == 1 else self._branches(count)
        made = decoder_for(self.loaded.model, self._cache, self._static.get(count), branches)
        if made is not None:
            self._static[count] = made
        return made


def sequences_together(files: ModelFiles, planned: RunPlan, room: int, wanted: int) -> int:
    """How many sequences, `wanted` at most, can be decoded at the same time; each but the first needs `room` rows of its own.

    One, where nothing is gained because the kernels do not compute, or where the device has no room for another.
    """
    if files.kernels != "triton":
        return 1
    per_row = cache_bytes_per_token(files.config, DTYPE_BYTES[files.dtype], files.kv)
    fit = wanted
    for share in planned.shares:
        rows = room * per_row * share.memory.cache_bytes // planned.memory.cache_bytes
        each = rows + files.config.vocab_size * SAMPLING_BYTES_PER_ENTRY
        if share.free_bytes is not None:
            needed = planned.needed_on(share) + int(planned.needed_on(share) * PLAN_ERROR)
            fit = min(fit, 1 + (share.free_bytes - needed) // each)
    return max(1, min(fit, DECODE_TOKENS))


def shared_plan(
    loaded: LoadedModel, plans: Sequence[InputPlan], *, question_room_tokens: int, answer_tokens: int
) -> RunPlan:
    """What `SharedPrefix.prefill` with the same arguments takes; `max_tokens` is the longest answer that fits."""
    visuals = [visual_of(plan) for plan in plans]
    shared = visual_end(loaded, _lay_out(loaded, visuals, "", True).input_ids)
    return plan_run(
        plans,
        loaded.config,
        **run_arguments(loaded),
        max_tokens=answer_tokens,
        prompt_tokens=shared + question_room_tokens,
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
            lengths.append(len(prompt.input_ids) - visual_end(loaded, prompt.input_ids))
    return max(lengths)


def _shared_answer(asked: _Asked, generation: Generation, splitter: AnswerSplitter) -> SharedAnswer:
    return SharedAnswer(
        text=splitter.text,
        reasoning=splitter.reasoning,
        token_ids=generation.token_ids,
        log_probabilities=generation.log_probabilities,
        prompt_tokens=len(asked.prompt.input_ids),
        stop_reason=generation.stop_reason,
    )


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
