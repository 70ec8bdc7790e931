"""The streamed prefill: step sizes change nothing, memory does not grow, and lost frames leave the prompt in step."""

from __future__ import annotations

import itertools
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch

from keyecli.batch.questions import own_warnings
from keyecli.engine import stream
from keyecli.engine.generate import GenerationSettings, generate
from keyecli.engine.loaded import LoadedModel
from keyecli.engine.plan import InputPlan
from keyecli.engine.stream import (
    Prefilled,
    PromptFeeder,
    StreamSettings,
    Timings,
    cache_tokens,
    prefill_stream,
    visual_of,
)
from keyecli.errors import InputError, KeyeWarning
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import Prompt, Visual, build_prompt
from keyecli.video.decode import FrameChunk
from tests.compare import assert_close
from tests.engine.scenes import all_embeds, fake_decoder, planned

ANSWER_TOKENS = 8
INPUTS = [planned("a.mp4", 7), planned("b.png", 1, 3, 4, kind="image"), planned("c.mp4", 4, 3, 2)]


class Layouts:
    """Lays out a question about `inputs` and remembers what it was asked for."""

    def __init__(self, loaded: LoadedModel, inputs: Sequence[InputPlan]) -> None:
        self.loaded, self.inputs = loaded, inputs
        self.asked: list[list[Visual]] = []

    def __call__(self, visuals: Sequence[Visual]) -> Prompt:
        self.asked.append(list(visuals))
        content = [{"type": item.sampling.kind} for item in self.inputs] + [
            {"type": "text", "text": "What happens?"}
        ]
        messages = [{"role": "user", "content": content}]
        return build_prompt(self.loaded.tokenizer, self.loaded.config, messages, visuals)


def prefill(
    loaded: LoadedModel, inputs: Sequence[InputPlan], settings: StreamSettings | None = None, **arguments: Any
) -> tuple[Prefilled, KeyeCache]:
    layouts = Layouts(loaded, inputs)
    prompt_tokens = len(layouts([visual_of(item) for item in inputs]).input_ids)
    cache = KeyeCache(loaded.config, cache_tokens(inputs, prompt_tokens) + ANSWER_TOKENS)
    return prefill_stream(loaded, inputs, layouts, cache, settings=settings, **arguments), cache


def answer(loaded: LoadedModel, prefilled: Prefilled, cache: KeyeCache) -> tuple[int, ...]:
    settings = GenerationSettings(max_tokens=ANSWER_TOKENS)
    position = prefilled.prompt.next_position
    generation = generate(
        loaded.model, loaded.tokenizer, cache, prefilled.hidden, position, settings, stop_ids=()
    )
    return generation.token_ids


def one_after_the_other(loaded: LoadedModel, inputs: Sequence[InputPlan]) -> tuple[Prefilled, KeyeCache]:
    """The definition: every frame is decoded, then each goes through the vision tower, then the whole prompt is fed."""
    visuals = tuple(map(visual_of, inputs))
    prompt = Layouts(loaded, inputs)(visuals)
    cache = KeyeCache(loaded.config, len(prompt.input_ids) + ANSWER_TOKENS)
    with torch.inference_mode():
        embeds = loaded.model.embed(prompt.input_ids[None], all_embeds(loaded, inputs))
        hidden = loaded.model.decode(embeds, prompt.position_ids[:, None], cache)[:, -1:]
    return Prefilled(prompt, hidden, tuple(item.sampling.times_s for item in inputs), visuals), cache


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "decode_frames", fake_decoder())


def test_equals_one_forward_over_everything(loaded: LoadedModel) -> None:
    prefilled, cache = prefill(loaded, INPUTS)
    expected, _ = one_after_the_other(loaded, INPUTS)
    assert_close(prefilled.hidden, expected.hidden, what="last hidden state")
    assert cache.length == len(expected.prompt.input_ids) > 10 * loaded.config.sa_config["topk"]
    assert prefilled.times_s == expected.times_s


@pytest.mark.parametrize("group_patches", [1, 24, 60, 100_000])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 100_000])
def test_step_sizes_do_not_change_the_tokens(
    loaded: LoadedModel, group_patches: int, chunk_tokens: int
) -> None:
    prefilled, cache = prefill(loaded, INPUTS, StreamSettings(group_patches, chunk_tokens))
    assert answer(loaded, prefilled, cache) == answer(loaded, *one_after_the_other(loaded, INPUTS))


def test_chunks_are_whole_and_few_embeddings_wait(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, waiting = [], []
    decode, add = loaded.model.decode, PromptFeeder.add

    def watched_decode(embeds: torch.Tensor, *arguments: Any) -> torch.Tensor:
        lengths.append(embeds.shape[1])
        return decode(embeds, *arguments)

    def watched_add(self: PromptFeeder, embeds: torch.Tensor) -> None:
        add(self, embeds)
        waiting.append(sum(len(part) for part in self._embeds))

    monkeypatch.setattr(loaded.model, "decode", watched_decode)
    monkeypatch.setattr(PromptFeeder, "add", watched_add)
    prefilled, _ = prefill(
        loaded, [planned("long.mp4", 120)], StreamSettings(group_patches=48, chunk_tokens=32)
    )
    assert set(lengths[:-1]) == {32}
    assert sum(lengths) == len(prefilled.prompt.input_ids)
    assert len(waiting) == 60
    assert max(waiting) < 32


@pytest.mark.parametrize("lost", [[0], [3], [6], [0, 1, 2], [2, 4], [5, 6]])
@pytest.mark.parametrize("chunk_tokens", [5, 4096])
def test_lost_frames_leave_the_prompt_in_step(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, lost: list[int], chunk_tokens: int
) -> None:
    settings = StreamSettings(group_patches=48, chunk_tokens=chunk_tokens)
    gone = [Fraction(index, 2) for index in lost]
    inputs = [planned("a.mp4", 7), planned("b.png", 1, kind="image")]
    there = [time_s for time_s in inputs[0].sampling.times_s if time_s not in gone]
    image_is_lost = Fraction(0) in gone
    if image_is_lost:
        inputs = inputs[:1]

    monkeypatch.setattr(stream, "decode_frames", fake_decoder(gone))
    prefilled, cache = prefill(loaded, inputs, settings)
    visuals = [Visual("video", (2, 3), tuple(map(float, there)))] + [visual_of(item) for item in inputs[1:]]
    expected = Layouts(loaded, inputs)(visuals)
    assert torch.equal(prefilled.prompt.input_ids, expected.input_ids)
    assert torch.equal(prefilled.prompt.position_ids, expected.position_ids)
    assert prefilled.times_s[0] == tuple(there)
    assert cache.length == len(expected.input_ids)

    # The very answer that a plan of only those frames gives.
    monkeypatch.setattr(stream, "decode_frames", fake_decoder())
    sampling = inputs[0].sampling
    only = InputPlan(
        inputs[0].info, type(sampling)(tuple(there), sampling.height, sampling.width, "video", sampling.fps)
    )
    assert answer(loaded, prefilled, cache) == answer(loaded, *prefill(loaded, [only, *inputs[1:]]))


@pytest.mark.parametrize("chunk_tokens", [5, 4096])
def test_a_neighbour_stands_in_with_its_own_time(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    item = planned("a.mp4", 21)
    # The frame at 9.5 s is damaged, and the next good one has a longer time.
    moved = {Fraction(19, 2): Fraction(3997, 400)}
    monkeypatch.setattr(stream, "decode_frames", fake_decoder(moved=moved))
    prefilled, cache = prefill(loaded, [item], StreamSettings(48, chunk_tokens))
    times_s = tuple(moved.get(time_s, time_s) for time_s in item.sampling.times_s)
    expected = Layouts(loaded, [item])([Visual("video", (2, 3), tuple(map(float, times_s)))])
    assert prefilled.times_s == (times_s,)
    assert torch.equal(prefilled.prompt.input_ids, expected.input_ids)
    assert cache.length == len(expected.input_ids)
    assert len(answer(loaded, prefilled, cache)) == ANSWER_TOKENS


class Watched:
    """A decoder that remembers how many groups it gave and which thread closed it; raises `error` at the third group."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.given = 0
        self.closed_in: list[threading.Thread] = []

    def __call__(self, *arguments: Any, **options: Any) -> Iterator[FrameChunk]:
        try:
            for chunk in fake_decoder()(*arguments, **options):
                if self.given == 2 and self.error is not None:
                    raise self.error
                self.given += 1
                yield chunk
        finally:
            self.closed_in.append(threading.current_thread())


def raise_at(count: int, error: BaseException) -> Callable[..., None]:
    """Raises at its `count`-th call."""
    calls = itertools.count(1)

    def call(*_: Any) -> None:
        if next(calls) == count:
            raise error

    return call


@pytest.mark.parametrize("stage", ["decode", "patches", "encode", "prefill", "progress"])
@pytest.mark.parametrize(
    "error", [InputError("the clip is damaged"), KeyboardInterrupt(), MemoryError(), GeneratorExit()]
)
def test_whatever_stops_a_stage_stops_all(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    decoder = Watched(error if stage == "decode" else None)
    monkeypatch.setattr(stream, "decode_frames", decoder)
    fail = raise_at(3, error)
    for name, owner, attribute in (
        ("patches", stream, "frames_to_patches"),
        ("encode", loaded.model, "encode_frames"),
        ("prefill", loaded.model, "decode"),
    ):
        if name == stage:
            plain = getattr(owner, attribute)
            monkeypatch.setattr(owner, attribute, lambda *a, plain=plain: (fail(), plain(*a))[1])
    threads = threading.enumerate()
    settings = StreamSettings(group_patches=24, chunk_tokens=5)
    with pytest.raises(type(error)) as raised:
        prefill(loaded, INPUTS, settings, on_progress=fail if stage == "progress" else None)
    assert raised.value is error
    assert threading.enumerate() == threads
    assert len(decoder.closed_in) >= 1
    assert threading.current_thread() not in decoder.closed_in


def test_frames_do_not_pile_up(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Watched()
    monkeypatch.setattr(stream, "decode_frames", decoder)
    item = planned("long.mp4", 120)
    frame_bytes = 3 * item.sampling.height * item.sampling.width
    monkeypatch.setattr(stream, "WAITING_BYTES", 5 * frame_bytes)
    ahead, used = [], itertools.count(1)

    def slowly(*_: Any) -> None:
        time.sleep(0.002)
        ahead.append(decoder.given - next(used))

    prefill(loaded, [item], StreamSettings(group_patches=24), on_progress=slowly)
    assert decoder.given == 120
    assert 1 <= max(ahead) <= 6  # those that wait, and one that has no place yet


def test_warnings_come_with_the_frames(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(info: Any, *arguments: Any, **options: Any) -> Iterator[FrameChunk]:
        yield from fake_decoder()(info, *arguments, **options)
        warnings.warn(f"{info.path} is damaged", KeyeWarning, stacklevel=2)

    monkeypatch.setattr(stream, "decode_frames", warning)
    with own_warnings() as said:
        prefill(loaded, INPUTS, StreamSettings(group_patches=24))
    assert said == [f"{item.info.path} is damaged" for item in INPUTS]


def test_progress_and_timings(loaded: LoadedModel) -> None:
    seen: list[tuple[str, float, float | None]] = []
    timings = Timings()
    prefill(
        loaded,
        INPUTS,
        StreamSettings(group_patches=24, chunk_tokens=40),
        timings=timings,
        on_progress=lambda *report: seen.append(report),
    )
    assert [done for _, done, _ in seen] == [*range(1, 13), 12]
    assert {total for _, _, total in seen} == {12}
    words = r"reading frames (\d+)/12 decoded, (\d+) encoded, (\d+) prefilled(, \d+ s left)?"
    found = [re.fullmatch(words, description) for description, _, _ in seen]
    stages = [tuple(map(int, match.groups()[:3])) for match in found if match]
    assert len(stages) == 13
    assert all(decoded >= encoded >= prefilled for decoded, encoded, prefilled in stages)
    assert stages == sorted(stages)
    assert 0 < stages[-2][2] < 12
    assert stages[-1] == (12, 12, 12)
    assert [bool(match and match[4]) for match in found] == [0 < stage[2] < 12 for stage in stages]
    assert set(timings.seconds) == {"decode_s", "encode_s", "prefill_s"}
    assert all(seconds > 0 for seconds in timings.seconds.values())


def test_feeder_refuses_a_layout_that_rewrites_the_past(loaded: LoadedModel) -> None:
    inputs = [planned("a.mp4", 3)]
    layouts = Layouts(loaded, inputs)
    prompt = layouts([Visual("video", (2, 3), (0.0, 0.5, 1.0))])
    cache = KeyeCache(loaded.config, len(prompt.input_ids))
    feeder = PromptFeeder(loaded.model, cache, prompt, 16, layouts, Timings())
    with torch.inference_mode():
        feeder.add(torch.zeros(6, loaded.config.hidden_size))
        with pytest.raises(ValueError, match="already fed"):
            feeder.lay_out([Visual("video", (2, 3), (0.2, 0.5))])
        with pytest.raises(ValueError, match="18 placeholders, but 6"):
            feeder.finish()
