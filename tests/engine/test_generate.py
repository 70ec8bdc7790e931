"""Decoding: the cache changes nothing, seeds repeat, the stop rule holds, and no character is ever cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keyecli.engine.generate import (
    GenerationSettings,
    Sampler,
    TextStream,
    generate,
    hidden_token_ids,
    placeholder_ids,
    stop_token_ids,
)
from keyecli.engine.loaded import LoadedModel
from keyecli.errors import UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import Prompt, build_prompt

PROMPT_LENGTH_BEYOND_TOP_K = 8


def text_prompt(loaded: LoadedModel, text: str = "What happens at the end?") -> Prompt:
    prompt = build_prompt(loaded.tokenizer, loaded.config, [{"role": "user", "content": text}], [])
    assert len(prompt.input_ids) > PROMPT_LENGTH_BEYOND_TOP_K
    return prompt


def run(loaded: LoadedModel, settings: GenerationSettings, stop_ids: Any = (), **callbacks: Any) -> Any:
    prompt = text_prompt(loaded)
    cache = KeyeCache(loaded.config, len(prompt.input_ids) + settings.max_tokens)
    with torch.inference_mode():
        embeds = loaded.model.embed(prompt.input_ids[None])
        hidden = loaded.model.decode(embeds, prompt.position_ids[:, None], cache)[:, -1:]
    return generate(
        loaded.model,
        loaded.tokenizer,
        cache,
        hidden,
        prompt.next_position,
        settings,
        stop_ids=stop_ids,
        **callbacks,
    )


def test_greedy_equals_argmax_of_full_forwards_without_cache(loaded: LoadedModel) -> None:
    generation = run(loaded, GenerationSettings(max_tokens=12))
    prompt = text_prompt(loaded)
    ids = prompt.input_ids.tolist()
    banned = sorted(placeholder_ids(loaded.config))
    for token_id in generation.token_ids:
        positions = torch.arange(len(ids)).expand(3, 1, -1)
        with torch.no_grad():
            hidden = loaded.model.decode(loaded.model.embed(torch.tensor([ids])), positions)
            logits = loaded.model.logits(hidden[0, -1]).clone()
        logits[banned] = float("-inf")
        assert int(logits.argmax()) == token_id
        ids.append(token_id)
    assert len(generation.token_ids) == 12
    assert generation.stop_reason == "length"


def test_stops_at_a_stop_id_and_leaves_it_out(loaded: LoadedModel) -> None:
    whole = run(loaded, GenerationSettings(max_tokens=12, temperature=1.0, seed=3))
    stop_id = whole.token_ids[5]
    first = whole.token_ids.index(stop_id)
    stopped = run(loaded, GenerationSettings(max_tokens=12, temperature=1.0, seed=3), stop_ids={stop_id})
    assert stopped.stop_reason == "stop"
    assert stopped.token_ids == whole.token_ids[:first]


def test_callbacks_add_up_to_the_text(loaded: LoadedModel) -> None:
    pieces: list[str] = []
    counts: list[int] = []
    settings = GenerationSettings(max_tokens=40, temperature=1.0, seed=1)
    generation = run(loaded, settings, on_text=pieces.append, on_token=counts.append)
    assert "".join(pieces) == generation.text
    assert counts == list(range(1, 41))


def test_same_seed_same_tokens_other_seed_other_tokens(loaded: LoadedModel) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        return run(loaded, GenerationSettings(max_tokens=16, temperature=1.0, top_p=0.9, seed=seed)).token_ids

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)


def test_sampler_draws_from_the_nucleus_in_proportion() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampler = Sampler(GenerationSettings(temperature=1.0, top_p=0.8, seed=0))
    counts = torch.bincount(torch.tensor([sampler.pick(logits) for _ in range(4000)]), minlength=4)
    assert counts[2:].sum() == 0
    assert abs(int(counts[0]) / 4000 - 0.625) < 0.03


def test_sampler_always_keeps_one_token() -> None:
    sampler = Sampler(GenerationSettings(temperature=1.0, top_p=1e-9))
    assert {sampler.pick(torch.tensor([0.0, 1.0, 0.5])) for _ in range(50)} == {1}


def test_temperature_sharpens() -> None:
    logits = torch.tensor([1.0, 0.0])
    sampler = Sampler(GenerationSettings(temperature=0.05))
    assert sum(sampler.pick(logits) for _ in range(200)) == 0


def test_greedy_ties_go_to_the_lower_id_and_banned_ids_never_come() -> None:
    logits = torch.tensor([0.0, 2.0, 2.0, 3.0])
    assert Sampler(GenerationSettings(), banned_ids=[3]).pick(logits) == 1
    assert logits.tolist() == [0.0, 2.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_usage_errors(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(values)).replace("_", "-")):
        GenerationSettings(**values)


@pytest.mark.parametrize("text", ["naïve", "日本語です", "👍🏽 ok 👨‍👩‍👧", "a\u0301 ünd", "\ufffd kept"])
def test_text_stream_never_emits_half_a_character(tiny_tokenizer: Any, text: str) -> None:
    # The toy tokenizer has one token a byte, so every character beyond ASCII is cut.
    ids = tiny_tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    stream = TextStream(tiny_tokenizer)
    shown = ""
    for token_id in ids:
        shown += stream.add(token_id)
        assert text.startswith(shown)
    shown += stream.finish()
    assert shown == stream.text == text


def test_text_stream_emits_a_character_with_its_last_byte(tiny_tokenizer: Any) -> None:
    stream = TextStream(tiny_tokenizer)
    ids = tiny_tokenizer.encode("日a", add_special_tokens=False)
    assert [stream.add(token_id) for token_id in ids] == ["", "", "日", "a"]


def test_text_stream_of_broken_bytes_goes_on(tiny_tokenizer: Any) -> None:
    start_of_character = tiny_tokenizer.encode("日", add_special_tokens=False)[0]
    letter = tiny_tokenizer.encode("a", add_special_tokens=False)[0]
    stream = TextStream(tiny_tokenizer)
    pieces = [stream.add(i) for i in [start_of_character, letter, start_of_character, start_of_character]]
    assert pieces == ["", "\ufffda", "", "\ufffd"]
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_no_text_but_the_thinking_tags_are(tiny_tokenizer: Any) -> None:
    vocabulary = tiny_tokenizer.get_vocab()
    hidden = hidden_token_ids(tiny_tokenizer)
    assert {vocabulary["<|im_end|>"], vocabulary["<|frame|>"], vocabulary["<|vision_start|>"]} <= hidden
    stream = TextStream(tiny_tokenizer, hidden)
    ids = tiny_tokenizer.encode("a<think>b</think><|frame|>c<|im_end|>", add_special_tokens=False)
    assert "".join(stream.add(i) for i in ids) + stream.finish() == "a<think>b</think>c"


def test_stop_ids_come_from_every_source(tiny_tokenizer: Any) -> None:
    vocabulary = tiny_tokenizer.get_vocab()
    config = SimpleNamespace(eos_token_id=3)
    found = stop_token_ids(config, tiny_tokenizer, SimpleNamespace(eos_token_id=[4, 5]))
    assert found == {3, 4, 5, vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]}
