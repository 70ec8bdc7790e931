"""Decoding: the cache changes nothing, seeds repeat, the stop rule holds, and no character is ever cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keyecli.engine.eager import EagerDecoder
from keyecli.engine.generate import (
    Begun,
    GenerationSettings,
    TextStream,
    generate,
    generate_together,
    hidden_token_ids,
    placeholder_ids,
    stop_token_ids,
)
from keyecli.engine.loaded import LoadedModel
from keyecli.errors import UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import Prompt, build_prompt

PROMPT_LENGTH_BEYOND_TOP_K = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    assert stopped.stop_token == (stop_id, pytest.approx(whole.log_probabilities[first]))
    assert whole.stop_token is None


def test_the_cache_holds_the_prompt_and_what_was_generated(loaded: LoadedModel) -> None:
    prompt = text_prompt(loaded)
    embeds = loaded.model.embed(prompt.input_ids[None])
    for stop_ids in ((), set(range(0, 272, 7))):
        cache = KeyeCache(loaded.config, len(prompt.input_ids) + 12)
        with torch.inference_mode():
            hidden = loaded.model.decode(embeds, prompt.position_ids[:, None], cache)[:, -1:]
        settings = GenerationSettings(max_tokens=13, temperature=2.0)
        arguments = (loaded.tokenizer, cache, hidden, prompt.next_position, settings)
        generation = generate(loaded.model, *arguments, stop_ids=stop_ids)
        held = cache.length - len(prompt.input_ids)
        assert held == len(generation.token_ids) - (generation.stop_reason == "length")


def test_the_prompt_can_be_penalised(loaded: LoadedModel) -> None:
    plain = run(loaded, GenerationSettings(max_tokens=12))
    every = torch.arange(loaded.config.vocab_size)
    settings = GenerationSettings(max_tokens=12, repetition_penalty=1e6)
    assert len(set(run(loaded, settings).token_ids)) == 12
    # Of all ids alike, the order of those with positive logits is turned around by so much no more.
    assert run(loaded, GenerationSettings(max_tokens=12, repetition_penalty=1.5), prompt_ids=every) == plain


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


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"stop": ("a", "")},
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


class Scripted:
    """A decoder whose sequences say what they are to say: token i of row b is `scripts[b][i]`, whatever is fed."""

    def __init__(self, scripts: list[list[int]], vocabulary: int) -> None:
        self.scripts = scripts
        self.begun: Any = None
        self.fed: list[list[int]] = []
        self._logits = torch.empty(len(scripts), vocabulary, device=DEVICE)

    def begin(self, lengths: Any, positions: Any) -> None:
        self.begun = (list(lengths), list(positions))

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.fed.append(token_ids.tolist())
        return self.logits()

    def logits(self) -> torch.Tensor:
        """One buffer, as a captured step has it."""
        self._logits.fill_(-1.0)
        for row, script in zip(self._logits, self.scripts, strict=True):
            row[script[min(len(self.fed), len(script) - 1)]] = 3.0
        return self._logits


def said(
    loaded: LoadedModel,
    texts: list[str],
    settings: list[GenerationSettings],
    *,
    ahead: bool = False,
    **fields: Any,
) -> tuple[list[Any], list[list[str]], Scripted]:
    """Sequences that say `texts` again and again, their pieces, and the decoder."""
    scripts = [loaded.tokenizer.encode(text, add_special_tokens=False) * 30 for text in texts]
    decoder = Scripted(scripts, loaded.config.vocab_size)
    pieces: list[list[str]] = [[] for _ in texts]
    first = decoder.logits().clone()
    prompts = [
        Begun(first[row], 10 + row, 20 + row, one, on_text=pieces[row].append, **fields)
        for row, one in enumerate(settings)
    ]
    stop_ids = stop_token_ids(loaded.config, loaded.tokenizer)
    generations = generate_together(
        loaded.config, loaded.tokenizer, decoder, prompts, stop_ids=stop_ids, ahead=ahead
    )
    return generations, pieces, decoder


@pytest.mark.parametrize("ahead", [False, True])
def test_each_sequence_ends_for_a_reason_of_its_own(loaded: LoadedModel, ahead: bool) -> None:
    texts = ["one<|im_end|>", "two three", "日本", "four five", "six"]
    settings = [
        GenerationSettings(max_tokens=50),
        GenerationSettings(max_tokens=9, stop=("never",)),
        GenerationSettings(max_tokens=4),
        GenerationSettings(max_tokens=60, stop=("xx", "r fi")),
        GenerationSettings(max_tokens=1),
    ]
    generations, pieces, decoder = said(loaded, texts, settings, ahead=ahead)
    assert [generation.text for generation in generations] == ["one", "two three", "日\ufffd", "fou", "s"]
    assert [generation.stop_reason for generation in generations] == [
        "stop",
        "length",
        "length",
        "stop",
        "length",
    ]
    assert [len(generation.token_ids) for generation in generations] == [3, 9, 4, 7, 1]
    assert ["".join(row) for row in pieces] == [generation.text for generation in generations]
    assert decoder.begun == ([10, 11, 12, 13, 14], [20, 21, 22, 23, 24])
    # The longest takes nine tokens, of which the last is never fed; whoever looks ahead cannot know where it ends.
    assert len(decoder.fed) == 8 + ahead * 1
    for generation, script in zip(generations, decoder.scripts, strict=True):
        assert list(generation.token_ids) == script[: len(generation.token_ids)]
        best = torch.tensor([3.0] + [-1.0] * (loaded.config.vocab_size - 1)).log_softmax(-1)[0].item()
        assert generation.log_probabilities == pytest.approx([best] * len(generation.token_ids))


@pytest.mark.parametrize("ahead", [False, True])
def test_the_room_is_never_exceeded(loaded: LoadedModel, ahead: bool) -> None:
    for most in (1, 2, 7):
        settings = [GenerationSettings(max_tokens=2), GenerationSettings(max_tokens=most)]
        _, _, decoder = said(loaded, ["abc", "de"], settings, ahead=ahead)
        assert len(decoder.fed) == max(2, most) - 1


def test_together_with_others_as_alone(loaded: LoadedModel) -> None:
    """Sampled, on the logits of a model, with a penalty: rows of a cache of several, all of one length."""
    prompt = text_prompt(loaded)
    settings = [
        GenerationSettings(max_tokens=12, temperature=1.0, seed=3),
        GenerationSettings(max_tokens=7, temperature=1.5, top_k=20, repetition_penalty=1.3),
        GenerationSettings(max_tokens=10, min_p=0.1, temperature=0.7, seed=3),
    ]
    embeds = loaded.model.embed(prompt.input_ids[None].repeat(3, 1))
    cache = KeyeCache(loaded.config, len(prompt.input_ids) + 12, batch=3)
    with torch.inference_mode():
        positions = prompt.position_ids[:, None].repeat(1, 3, 1)
        logits = loaded.model.logits(loaded.model.decode(embeds, positions, cache)[:, -1])
    prompts = [
        Begun(row, len(prompt.input_ids), prompt.next_position, one, prompt.input_ids)
        for row, one in zip(logits, settings, strict=True)
    ]
    decoder = EagerDecoder(loaded.model, cache)
    together = generate_together(loaded.config, loaded.tokenizer, decoder, prompts, stop_ids=())
    for one, generation in zip(settings, together, strict=True):
        alone = run(loaded, one, prompt_ids=prompt.input_ids)
        assert (generation.token_ids, generation.text) == (alone.token_ids, alone.text)
    with pytest.raises(ValueError, match="tokens a row"):
        decoder.begin([1, 2, 3], [1, 2, 3])


class Spelling:
    """A constraint: free for so many tokens, then one text."""

    def __init__(self, free: int, ids: list[int]) -> None:
        self.free, self.ids = free, list(ids)
        self.shares: list[Any] = []

    def allowed(self) -> Any:
        return None if self.free else self.ids[:1] and sorted([self.ids[0], 100])

    def accept(self, token_id: int, log_probabilities: torch.Tensor | None) -> None:
        self.shares.append(log_probabilities)
        if self.free:
            self.free -= 1
        else:
            self.ids.pop(0)


def test_constrained_beside_free_ones(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode("xyz", add_special_tokens=False)
    # What it is scripted to say is the stop token, which free reasoning under a constraint cannot take.
    spelling = Spelling(2, ids)
    constraints = [spelling, None, Spelling(0, [])]
    scripts = [loaded.tokenizer.encode(text)[0] for text in ("<|im_end|>", "a", "b")]
    decoder = Scripted([[index] * 9 for index in scripts], loaded.config.vocab_size)
    first = decoder.logits().clone()
    prompts = [
        Begun(row, 5, 5, GenerationSettings(max_tokens=8, stop=("x", "aaaaaaa")), constraint=constraint)
        for row, constraint in zip(first, constraints, strict=True)
    ]
    stop_ids = stop_token_ids(loaded.config, loaded.tokenizer)
    spelled, free, nothing = generate_together(
        loaded.config, loaded.tokenizer, decoder, prompts, stop_ids=stop_ids, ahead=True
    )
    assert len(spelled.token_ids) == 5
    assert spelled.stop_reason == free.stop_reason == nothing.stop_reason == "stop"
    assert not set(spelled.token_ids) & stop_ids
    # Between two ids that are as likely, the lower one.
    assert list(spelled.token_ids[2:]) == [min(index, 100) for index in ids]
    assert (free.text, len(free.token_ids), nothing.token_ids) == ("", 7, ())
    shares = spelling.shares
    assert shares[:2] == [None, None]
    assert [share.tolist() for share in shares[2:]] == [pytest.approx([-0.6931, -0.6931], abs=1e-4)] * 3
