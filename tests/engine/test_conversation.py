"""A conversation: every answer is that of a fresh prefill of all that was said, and the video is read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch

from keyecli.engine import conversation as module
from keyecli.engine import stream
from keyecli.engine.conversation import AnswerInterrupted, Conversation, Reply
from keyecli.engine.generate import GenerationSettings, generate, stop_token_ids
from keyecli.engine.loaded import LoadedModel
from keyecli.engine.plan import cache_bytes_per_token
from keyecli.engine.stream import StreamSettings
from keyecli.errors import MemoryLimitError, ModelError, UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import Visual, build_prompt
from tests.engine.scenes import all_embeds, fake_decoder, planned

PLANS = [planned("a.mp4", 5), planned("b.png", 1, kind="image")]
SETTINGS = GenerationSettings(max_tokens=10)
SAID = ["When?", "At 0.5.", "Where does the circle go?", "To the left", "Why?"]


@pytest.fixture(autouse=True)
def decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "decode_frames", fake_decoder())


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The tokens of each answer of a conversation."""
    tokens: list[tuple[int, ...]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        generation = generate(*arguments, **options)
        tokens.append(generation.token_ids)
        return generation

    monkeypatch.setattr(module, "generate", watched)
    return tokens


def begin(loaded: LoadedModel, plans: Any = PLANS, **arguments: Any) -> Conversation:
    return Conversation.prefill(loaded, plans, **{"answer_tokens": 10, **arguments})


def afresh(
    loaded: LoadedModel,
    said: Sequence[str],
    plans: Any = PLANS,
    *,
    preface: str = "",
    think: bool = True,
    settings: GenerationSettings = SETTINGS,
    visuals: list[Visual] | None = None,
) -> tuple[int, ...]:
    """The tokens that answer a conversation, which is prefilled in one forward pass."""
    visuals = visuals or [stream.visual_of(plan) for plan in plans]
    first = [{"type": visual.kind} for visual in visuals] + [{"type": "text", "text": preface + said[0]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": first}]
    messages += [
        {"role": "user" if place % 2 == 0 else "assistant", "content": text}
        for place, text in enumerate(said)
        if place
    ]
    prompt = build_prompt(loaded.tokenizer, loaded.config, messages, visuals, think=think)
    cache = KeyeCache(loaded.config, len(prompt.input_ids) + settings.max_tokens)
    with torch.inference_mode():
        embeds = loaded.model.embed(prompt.input_ids[None], all_embeds(loaded, plans))
        hidden = loaded.model.decode(embeds, prompt.position_ids[:, None], cache)[:, -1:]
    stops = stop_token_ids(loaded.config, loaded.tokenizer)
    return generate(
        loaded.model, loaded.tokenizer, cache, hidden, prompt.next_position, settings, stop_ids=stops
    ).token_ids


@pytest.mark.parametrize(
    ("group_patches", "chunk_tokens", "think"), [(1, 1, True), (60, 7, False), (8192, 4096, True)]
)
def test_every_turn_is_that_of_a_fresh_prefill(
    loaded: LoadedModel,
    written: list[tuple[int, ...]],
    group_patches: int,
    chunk_tokens: int,
    think: bool,
) -> None:
    stepping = StreamSettings(group_patches, chunk_tokens)
    conversation = begin(loaded, settings=stepping, think=think)
    said: list[str] = []
    for question in SAID[::2]:
        said.append(question)
        reply = conversation.answer(said, SETTINGS, think=think)
        assert written[-1] == afresh(loaded, said, think=think)
        assert reply.completion_tokens == len(written[-1])
        said.append(reply.text)
    # Drawn, and with the reasoning of another kind than before.
    drawn = GenerationSettings(max_tokens=10, temperature=1.0, seed=5)
    conversation.answer(said[:3], drawn, think=not think)
    assert written[-1] == afresh(loaded, said[:3], think=not think, settings=drawn)


# What is said in the place of SAID, which was said before: going on, other words, a second try, less, nothing of it.
OTHERS = {
    "the next question": [*SAID, "Because.", "Really?"],
    "other last words": [*SAID[:-1], "Who?"],
    "other first words": ["Where?", *SAID[1:]],
    "another answer": [*SAID[:3], "To the right", SAID[4]],
    "a second try": SAID,
    "one turn less": SAID[:3],
    "all turns forgotten": ["What?"],
    "what was said begins alike": ["When", "At 0.5.", "Where"],
}


@pytest.mark.parametrize("said", OTHERS.values(), ids=list(OTHERS))
def test_what_was_said_before_changes_nothing(
    loaded: LoadedModel, written: list[tuple[int, ...]], said: list[str]
) -> None:
    conversation = begin(loaded)
    conversation.answer(SAID, SETTINGS)
    conversation.answer(said, SETTINGS)
    conversation.answer(SAID, SETTINGS)
    assert written[1] == afresh(loaded, said)
    assert written[0] == written[2] == afresh(loaded, SAID)


def test_as_much_as_can_be_is_reused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy template leaves the thought out of what is said: everything up to it stands."""
    opened: list[str] = []
    fed: list[int] = []
    decode = loaded.model.decode

    def watched_frames(info: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        opened.append(str(info.path))
        return fake_decoder()(info, *arguments, **options)

    def watched_decode(embeds: torch.Tensor, *arguments: Any) -> torch.Tensor:
        fed.append(embeds.shape[1])
        return decode(embeds, *arguments)

    monkeypatch.setattr(stream, "decode_frames", watched_frames)
    conversation = begin(loaded)
    monkeypatch.setattr(loaded.model, "decode", watched_decode)
    monkeypatch.setattr(loaded.model, "encode_frames", None)
    open_answer = "<|im_end|>\n<|im_start|>assistant\n<think>\n"

    def tokens(text: str) -> int:
        return len(loaded.tokenizer.encode(text, add_special_tokens=False))

    def fed_for(said: list[str]) -> tuple[Reply, int]:
        fed.clear()
        reply = conversation.answer(said, SETTINGS)
        assert reply.reused_tokens + fed[0] == reply.prompt_tokens
        return reply, fed[0]

    first, new = fed_for(["When?"])
    assert first.reused_tokens == conversation.length
    assert new == tokens("When?" + open_answer)
    second, new = fed_for(["When?", "Now.", "Why?"])
    assert second.reused_tokens == first.prompt_tokens - tokens("<think>\n")
    assert new == tokens("Now.<|im_end|>\n<|im_start|>user\nWhy?" + open_answer)
    assert fed_for(["When?", "Now.", "Why?"])[1] == 1  # a second try: the last token alone
    assert fed_for(["When?", "Now.", "Who?"])[1] == tokens("o?" + open_answer)
    assert opened == ["a.mp4", "b.png"]


def test_an_answer_that_the_template_repeats_is_not_fed_again(
    loaded: LoadedModel, written: list[tuple[int, ...]]
) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    head, generation = tokenizer.chat_template.split("{%- if add_generation_prompt %}")
    assert "<think>" in generation
    tokenizer.chat_template = (
        head + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    plain = replace(loaded, tokenizer=tokenizer)
    conversation = begin(plain)
    said = ["When?"]
    reply = conversation.answer(said, SETTINGS)
    # Not what the toy model wrote, which is no text, but its first tokens' bytes where they are.
    text = tokenizer.decode(written[0][:1])
    second = conversation.answer([*said, text, "Why?"], SETTINGS)
    assert second.reused_tokens > reply.prompt_tokens
    assert written[1] == afresh(plain, [*said, text, "Why?"])


@pytest.mark.parametrize("room", [0, 40])
def test_a_conversation_outgrows_its_cache(
    loaded: LoadedModel, written: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(module, "ROOM_TOKENS", room)
    conversation = begin(loaded)
    capacity = conversation._cache.capacity
    for said in (SAID[:1], SAID[:3], SAID, SAID[:1]):
        conversation.answer(said, SETTINGS)
        assert written[-1] == afresh(loaded, said)
    assert conversation._cache.capacity > capacity


def test_a_larger_cache_needs_memory(
    loaded: LoadedModel, written: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOM_TOKENS", 20)
    conversation = begin(loaded)
    conversation.answer(SAID[:1], SETTINGS)
    cache = conversation._cache
    monkeypatch.setattr(module, "free_cache_bytes", lambda files: 10_000)
    with pytest.raises(MemoryLimitError, match=r"has outgrown its cache: a larger one takes .* forget turns"):
        conversation.answer([*SAID, "x" * 100, "Why?"], SETTINGS)
    assert conversation._cache is cache
    conversation.answer(["Who?"], SETTINGS)
    assert written[-1] == afresh(loaded, ["Who?"])
    # With memory for what is needed and not for more, the cache grows by no more.
    tokens = 300 + cache.capacity
    monkeypatch.setattr(
        module, "free_cache_bytes", lambda files: tokens * cache_bytes_per_token(loaded.config, 4) + 1
    )
    reply = conversation.answer(["x" * 300], SETTINGS)
    assert conversation._cache.capacity <= tokens
    assert reply.prompt_tokens + 10 <= conversation._cache.capacity


def test_room_is_planned(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = sum(plan.sampling.frames for plan in PLANS)
    wide = begin(loaded)
    context = loaded.config.max_position_embeddings
    assert wide._cache.capacity == context + frames  # 8,192 more than the videos take are not to be had here
    from keyecli.engine.plan import RunPlan

    check = RunPlan.check

    def small(self: RunPlan) -> None:
        if self.total_tokens > 1000:
            raise MemoryLimitError("the run needs too much")
        check(self)

    monkeypatch.setattr(RunPlan, "check", small)
    narrow = begin(loaded)
    assert narrow.length + 256 < narrow._cache.capacity < narrow.length + 300 + frames
    with pytest.raises(MemoryLimitError, match="too much"):
        begin(loaded, answer_tokens=1000)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="the model's context holds 4,096"):
        begin(loaded, [planned("a.mp4", 700)])


def test_a_conversation_longer_than_the_context_goes_on(
    loaded: LoadedModel, written: list[tuple[int, ...]]
) -> None:
    conversation = begin(loaded)
    conversation.answer(SAID, SETTINGS)
    with pytest.raises(UsageError, match=r"takes 4,\d\d\d tokens .* holds 4,096: shorten the question"):
        conversation.answer([*SAID, "x" * 4096, "Why?"], SETTINGS)
    # As long as just fits: the answer gets what is left.
    spare = 4096 - conversation.answer(["When?"], SETTINGS).prompt_tokens
    reply = conversation.answer(["When?" + "x" * (spare - 4)], SETTINGS)
    assert (reply.prompt_tokens, reply.max_tokens) == (4092, 4)
    assert reply.completion_tokens <= 4
    assert conversation.answer(SAID, SETTINGS).max_tokens == 10
    assert written[-1] == written[0]


def test_an_interrupted_answer_is_kept(loaded: LoadedModel, written: list[tuple[int, ...]]) -> None:
    conversation = begin(loaded, think=False)
    whole: list[str] = []
    conversation.answer(SAID[:1], SETTINGS, think=False, on_text=whole.append)
    pieces: list[str] = []

    def stop(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(AnswerInterrupted) as caught:
        conversation.answer(SAID[:1], SETTINGS, think=False, on_text=stop)
    reply = caught.value.reply
    assert isinstance(caught.value, KeyboardInterrupt)
    assert reply.stop_reason == "interrupted"
    assert "".join(whole).startswith(reply.text)
    assert reply.text == "".join(pieces) != ""
    said = [SAID[0], reply.text, "Go on."]
    conversation.answer(said, SETTINGS, think=False)
    assert written[-1] == afresh(loaded, said, think=False)


def test_an_interrupted_prefill_leaves_what_was_fed(
    loaded: LoadedModel, written: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = begin(loaded, settings=StreamSettings(chunk_tokens=8))
    decode, calls = loaded.model.decode, 0

    def stopped(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return decode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loaded.model, "decode", stopped)
        with pytest.raises(AnswerInterrupted) as caught:
            conversation.answer(SAID, SETTINGS)
    assert (caught.value.reply.text, caught.value.reply.completion_tokens) == ("", 0)
    reply = conversation.answer(SAID, SETTINGS)
    assert reply.reused_tokens == conversation.length + 16
    assert written == [afresh(loaded, SAID)]


def test_static_buffers_are_kept_while_they_fit(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One decoder for all turns; another one for a larger cache, and after Ctrl-C, which may have come while it was captured."""
    used: list[tuple[object, KeyeCache]] = []
    monkeypatch.setattr(module, "ROOM_TOKENS", 60)
    monkeypatch.setattr(module, "decoder_for", lambda model, cache, made: made or object())

    def watched(
        model: Any, tokenizer: Any, cache: KeyeCache, *rest: Any, static: object, **options: Any
    ) -> Any:
        used.append((static, cache))
        return generate(model, tokenizer, cache, *rest, **options)

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "generate", watched)
    conversation = begin(loaded, think=False)
    conversation.answer(["When?"], SETTINGS, think=False)
    conversation.answer(["Why?"], SETTINGS, think=False)
    conversation.answer(["Why?" + "x" * 80], SETTINGS, think=False)
    with pytest.raises(AnswerInterrupted):
        conversation.answer(["Why?"], SETTINGS, think=False, on_text=stop)
    conversation.answer(["Why?"], SETTINGS, think=False)
    decoders, caches = zip(*used, strict=True)
    assert [decoders.index(decoder) for decoder in decoders] == [0, 0, 2, 2, 4]
    assert [caches.index(cache) for cache in caches] == [0, 0, 2, 2, 2]


def test_frames_that_never_come(
    loaded: LoadedModel, written: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "decode_frames", fake_decoder(lost={Fraction(1)}))
    conversation = begin(loaded, PLANS[:1])
    came = tuple(Fraction(index, 2) for index in (0, 1, 3, 4))
    assert conversation.times_s == (came,)
    conversation.answer(SAID, SETTINGS)
    there = replace(PLANS[0], sampling=replace(PLANS[0].sampling, times_s=came))
    assert written == [afresh(loaded, SAID, [there])]


def test_a_preface_stands_before_the_first_question(
    loaded: LoadedModel, written: list[tuple[int, ...]]
) -> None:
    preface = "Subtitles:\n[0.0 - 1.0] Hello\n\n"
    conversation = begin(loaded, preface=preface)
    assert conversation.answer(SAID[:1], SETTINGS).reused_tokens == conversation.length + len(preface)
    conversation.answer(SAID, SETTINGS)
    assert written == [afresh(loaded, said, preface=preface) for said in (SAID[:1], SAID)]


def test_a_template_that_changes_the_beginning_is_refused(loaded: LoadedModel) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "{{- messages | length }}" + tokenizer.chat_template
    conversation = begin(replace(loaded, tokenizer=tokenizer))
    conversation.answer(SAID[:1], SETTINGS)
    with pytest.raises(
        ModelError, match="the chat template of tiny lays a longer conversation out differently"
    ):
        conversation.answer(SAID[:3], SETTINGS)
