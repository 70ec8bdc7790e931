"""Constrained lists of spans: the automaton is exact, and whatever the logits say, every answer is valid."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from keyecli.engine.generate import GenerationSettings, generate
from keyecli.engine.grammar import (
    ListState,
    ListVocabulary,
    SpanAutomaton,
    SpanConstraint,
    SpanRange,
    list_vocabulary,
)
from keyecli.engine.loaded import LoadedModel
from keyecli.engine.thinking import split_answer
from keyecli.errors import ModelError, UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import build_prompt

LIST_SIGNS = "[]0123456789., "
QWEN_VOCABULARY = 151_936


def spelled(units: int, decimals: int) -> str:
    return f"{units / 10**decimals:.{decimals}f}"


def valid_lists(low: int, high: int, decimals: int) -> Iterator[str]:
    """Every valid list, spelled by brute force."""
    numbers = range(low, high + 1)
    for count in range(0, len(numbers) + 1, 2):
        for chosen in combinations(numbers, count):
            texts = [spelled(number, decimals) for number in chosen]
            pairs = [f"[{start}, {end}]" for start, end in zip(texts[::2], texts[1::2], strict=True)]
            yield f"[{', '.join(pairs)}]"


def assert_valid(text: str, high: int, decimals: int = 1) -> None:
    """The answer parses and is a list of spans as promised; written without the automaton."""
    number = rf"(?:0|[1-9]\d*)\.\d{{{decimals}}}" if decimals else r"(?:0|[1-9]\d*)"
    assert re.fullmatch(rf"\[(\[{number}, {number}\](, \[{number}, {number}\])*)?\]", text), text
    edges = [edge for pair in json.loads(text) for edge in pair]
    assert all(before < after for before, after in pairwise(edges)), text
    assert all(0 <= edge <= high / 10**decimals for edge in edges), text


@pytest.mark.parametrize(
    ("low", "high", "decimals"), [(0, 9, 1), (96, 104, 1), (0, 1, 1), (7, 13, 0), (97, 103, 2)]
)
def test_the_automaton_is_exactly_the_language(low: int, high: int, decimals: int) -> None:
    automaton = SpanAutomaton(SpanRange(low, high, decimals))
    shortest: dict[str, int] = {}
    for text in valid_lists(low, high, decimals):
        for length in range(len(text) + 1):
            rest = len(text) - length
            shortest[text[:length]] = min(rest, shortest.get(text[:length], rest))
    for prefix, rest in shortest.items():
        state = automaton.run(ListState(), prefix)
        assert state is not None, prefix
        assert automaton.closing_length(state) == rest <= automaton.longest_closing, prefix
        alive = {sign for sign in LIST_SIGNS if automaton.step(state, sign) is not None}
        assert alive == {sign for sign in LIST_SIGNS if prefix + sign in shortest}, prefix


def test_the_range_of_a_clip() -> None:
    assert SpanRange.of_seconds(10.0) == SpanRange(0, 100)
    assert SpanRange.of_seconds(9.99) == SpanRange(0, 99)
    # 0.3 is a little less than three tenths in binary.
    assert SpanRange.of_seconds(0.1 + 0.2) == SpanRange(0, 3)
    assert SpanRange.of_seconds(0.3) == SpanRange(0, 3)
    # A clip of one frame still has a span.
    assert SpanRange.of_seconds(0.04) == SpanRange(0, 1)
    with pytest.raises(ValueError, match="no span fits"):
        SpanRange(4, 4)


def byte_level(vocabulary_size: int, texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def random_list(draw: random.Random, high: int) -> str:
    edges = sorted(draw.sample(range(high + 1), 2 * draw.randint(0, 3)))
    pairs = [f"[{a / 10:.1f}, {b / 10:.1f}]" for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return f"[{', '.join(pairs)}]"


@pytest.fixture(scope="module")
def merged_tokenizer() -> Any:
    """A vocabulary in which lists have long tokens such as `.0], [1`, as merges across everything make them."""
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    texts = [random_list(draw, 600) for _ in range(300)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(700, texts))
    spellings = ListVocabulary(tokenizer).spellings.values()
    assert {"], [", "[["} <= set(spellings)
    assert any(re.search(r"\d\], \[\d", spelling) for spelling in spellings)
    return tokenizer


def answer_at_random(
    tokenizer: Any, draw: random.Random, high: int, max_tokens: int, stop: float = 0.0, **thinking: Any
) -> str:
    """One answer of a model whose logits are noise: tokens drawn evenly, the reasoning's end with a chance of `stop`."""
    constraint = SpanConstraint(
        tokenizer,
        SpanRange(0, high),
        max_tokens=max_tokens,
        answer_tokens=12,
        **{"thinking_open": False, **thinking},
    )
    close_id = tokenizer.convert_tokens_to_ids("</think>")
    ids: list[int] = []
    while True:
        allowed = constraint.allowed()
        if allowed is None:
            ids.append(close_id if draw.random() < stop else draw.randrange(256))
            constraint.accept(ids[-1], None)
            continue
        if not allowed:
            break
        ids.append(draw.choice(allowed))
        constraint.accept(ids[-1], torch.full((len(allowed),), -1.0))
    assert len(ids) <= max_tokens
    return tokenizer.decode(ids)


@pytest.mark.parametrize(("which", "count"), [("tiny", 9000), ("merged", 1000)])
def test_ten_thousand_random_answers_are_valid(
    which: str, count: int, tiny_tokenizer: Any, merged_tokenizer: Any
) -> None:
    """With both vocabularies together."""
    tokenizer = {"tiny": tiny_tokenizer, "merged": merged_tokenizer}[which]
    draw = random.Random(1)
    empty = 0
    for _ in range(count):
        high = int(10 ** draw.uniform(0, 4.5))
        text = answer_at_random(tokenizer, draw, high, draw.randint(5, 60), think=False)
        assert_valid(text, high)
        empty += text == "[]"
    assert 0.02 * count < empty < 0.98 * count


@pytest.mark.parametrize("opened", [True, False])
def test_reasoning_is_free_and_closed_in_time(opened: bool, tiny_tokenizer: Any) -> None:
    draw = random.Random(2)
    closed_by_itself = 0
    for _ in range(300):
        output = answer_at_random(tiny_tokenizer, draw, 605, 80, stop=0.02, thinking_open=opened)
        assert output.startswith("<think>\n") is not opened
        head, close, text = output.rpartition("</think>\n\n")
        assert close
        assert_valid(text, 605)
        closed_by_itself += len(head) < 40
    assert 50 < closed_by_itself < 280


def test_an_open_thought_is_closed_at_once_when_none_is_wanted(tiny_tokenizer: Any) -> None:
    output = answer_at_random(tiny_tokenizer, random.Random(3), 605, 60, thinking_open=True, think=False)
    assert output.startswith("\n</think>\n\n[")


def test_room_for_no_answer_is_refused(tiny_tokenizer: Any) -> None:
    numbers = SpanRange(0, 100)
    for thinking_open, least in ((False, 2), (True, 6)):
        arguments = {"answer_tokens": 30, "thinking_open": thinking_open, "think": thinking_open}
        SpanConstraint(tiny_tokenizer, numbers, max_tokens=least, **arguments)
        with pytest.raises(UsageError, match=f"at least {least} tokens, not {least - 1}: raise --max-tokens"):
            SpanConstraint(tiny_tokenizer, numbers, max_tokens=least - 1, **arguments)


def test_a_model_that_says_anything_answers_validly(loaded: LoadedModel) -> None:
    """Through `generate`, with a random model at every temperature."""
    prompt = build_prompt(loaded.tokenizer, loaded.config, [{"role": "user", "content": "When?"}], [])
    assert prompt.thinking_open
    cache = KeyeCache(loaded.config, len(prompt.input_ids) + 48)
    with torch.inference_mode():
        embeds = loaded.model.embed(prompt.input_ids[None])
        hidden = loaded.model.decode(embeds, prompt.position_ids[:, None], cache)[:, -1:]
    for seed in range(20):
        cache.truncate(len(prompt.input_ids))
        settings = GenerationSettings(max_tokens=48, temperature=(seed % 3) * 4.0, seed=seed)
        constraint = SpanConstraint(
            loaded.tokenizer,
            SpanRange(0, 10 * (seed + 1)),
            max_tokens=48,
            answer_tokens=40,
            thinking_open=True,
        )
        stop = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
        generation = generate(
            loaded.model,
            loaded.tokenizer,
            cache,
            hidden,
            prompt.next_position,
            settings,
            stop_ids={stop},
            constraint=constraint,
        )
        text = split_answer(generation.text, thinking_open=True)[1]
        assert text == constraint.text
        assert_valid(text, 10 * (seed + 1))
        assert generation.stop_reason == "stop"
        assert len(generation.token_ids) == len(generation.log_probabilities) <= 48


def test_scores_are_those_of_the_allowed_tokens(tiny_tokenizer: Any) -> None:
    constraint = SpanConstraint(
        tiny_tokenizer, SpanRange(0, 20), max_tokens=40, answer_tokens=40, thinking_open=False, think=False
    )
    ids = tiny_tokenizer.get_vocab()
    # "[" is the only beginning; a span then has three quarters.
    shares = {"[": {"[": 1.0}, "[[": {"[": 0.75, "]": 0.25}}
    for written in ("[", "[[", "[[1", "[[1.", "[[1.5", "[[1.5,", "[[1.5, "):
        allowed = constraint.allowed()
        assert allowed is not None
        wanted = shares.get(written, {})
        log = torch.tensor([wanted.get(tiny_tokenizer.decode([index]), 0.5) for index in allowed]).log()
        constraint.accept(ids[{" ": "Ġ"}.get(written[-1], written[-1])], log)
    assert constraint.text == "[[1.5, "
    assert constraint.log_odds_present == pytest.approx(1.0986, abs=1e-4)
    assert [round(token.log_probability, 4) for token in constraint.tokens[:3]] == [0.0, -0.2877, -0.6931]


def test_a_vocabulary_of_qwen_s_size_costs_its_list_tokens_only() -> None:
    """Tokens of other characters are never looked at again once the tree is made."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    for token in ("[[", "]]", "Ġ[", "Ġ[[", "],", "],Ġ[", "[]", "..", "],["):
        vocabulary[token] = len(vocabulary)
    while len(vocabulary) < QWEN_VOCABULARY:
        vocabulary[f"w{len(vocabulary)}"] = len(vocabulary)
    tokenizer: Any = SimpleNamespace(get_vocab=lambda: vocabulary, added_tokens_decoder={})
    list_tokens = ListVocabulary(tokenizer)
    assert len(list_tokens.spellings) == 15 + 9
    automaton = SpanAutomaton(SpanRange(0, 20_000))

    def following(text: str, room: int = 100) -> set[str]:
        state = automaton.run(ListState(), text)
        assert state is not None
        reached = dict(list_tokens.continuations(automaton, state, room))
        return {list_tokens.spellings[index] for index in reached}

    assert following("") == {"[", "[[", "[]"}
    assert following("[[1") == {*"0123456789", "."}

    assert following("[[200") == {"."}
    assert following("[[1.0, 2.0") == {"]", "],", "], [", "]]"}
    assert following("[[1.0, 2.0", room=2) == {"]", "]]"}
    assert following("[[1.0, 2.0", room=1) == {"]]"}
    # Behind the last possible start comes its end, and behind that no second span.
    assert following("[[1999.9, ") == {"2"}
    assert following("[[1.0, 2000.0") == {"]", "]]"}


def test_a_vocabulary_that_cannot_spell_lists_is_refused() -> None:
    tokenizer: Any = SimpleNamespace(
        get_vocab=lambda: {sign: i for i, sign in enumerate("[].,012345678Ġ")}, added_tokens_decoder={}
    )
    with pytest.raises(ModelError, match="no token for '9'"):
        ListVocabulary(tokenizer)


def test_the_tree_is_kept(tiny_tokenizer: Any) -> None:
    assert list_vocabulary(tiny_tokenizer) is list_vocabulary(tiny_tokenizer)
