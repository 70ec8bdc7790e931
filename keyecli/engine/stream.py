"""The streamed prefill: frames are decoded, encoded and fed to the decoder group by group.

What stays in memory is the cache, one group of frames and the embeddings of at most one group and one
chunk, however long the clips are. T prompt tokens, V visual tokens at hand, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import cast

import numpy as np
import torch
from torch import Tensor

from keyecli.engine.loaded import LoadedModel, ModelFiles, OnProgress, torch_dtype
from keyecli.engine.plan import ENCODE_GROUP_PATCHES, InputPlan, merge_area, prefill_chunk_tokens
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.prompt import Prompt, Visual
from keyecli.video.decode import FrameChunk, decode_frames
from keyecli.video.patches import frames_to_patches


@dataclass
class Timings:
    """Seconds spent in each stage; each waits for the GPU at its end, so that it pays for its own work."""

    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
            if self.device.startswith("cuda"):
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True)
class StreamSettings:
    """Sizes of the stream's steps; they change memory and speed, never the result. chunk_tokens None: by the device."""

    group_patches: int = ENCODE_GROUP_PATCHES
    chunk_tokens: int | None = None


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the cache holds entirely.

    hidden: [1, 1, D], the last token's state; times_s: the frames that really came, for each input.
    """

    prompt: Prompt
    hidden: Tensor
    times_s: tuple[tuple[Fraction, ...], ...]


class PromptFeeder:
    """Feeds a prompt to the decoder as its visual embeddings arrive, always in chunks of the same size.

    The prompt may be replaced while frames are still to come (a frame that cannot be decoded leaves it), as
    long as the tokens up to the last embedding at hand stay the same.
    """

    def __init__(
        self, model: KeyeVL2ForConditionalGeneration, cache: KeyeCache, prompt: Prompt, chunk_tokens: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._chunk_tokens = chunk_tokens
        self._device = cache.k.device
        self._embeds: list[Tensor] = []
        self._received = 0
        self._fed = 0
        self.hidden: Tensor | None = None
        self._set_prompt(prompt)

    def replace_prompt(self, prompt: Prompt) -> None:
        """Go on with another layout; ValueError when it differs in what is already fixed."""
        fixed = self._ready()
        if not torch.equal(prompt.input_ids[:fixed], self.prompt.input_ids[:fixed]):
            raise ValueError("the new layout changes tokens that were already fed")
        self._set_prompt(prompt)

    def add(self, embeds: Tensor) -> None:
        """The next visual embeddings [V, D] in prompt order; feeds every whole chunk they complete."""
        self._embeds.append(embeds)
        self._received += len(embeds)
        self._feed(self._ready(), whole_chunks=True)

    def finish(self) -> Tensor:
        """Feed the rest and return the last token's state [1, 1, D]; ValueError for missing embeddings."""
        if self._received != len(self._placeholders):
            raise ValueError(
                f"{len(self._placeholders)} placeholders, but {self._received} visual embeddings came"
            )
        self._feed(len(self.prompt.input_ids), whole_chunks=False)
        assert self.hidden is not None
        return self.hidden

    def _set_prompt(self, prompt: Prompt) -> None:
        self.prompt = prompt
        config = self._model.config
        is_visual = (prompt.input_ids == config.image_token_id) | (prompt.input_ids == config.video_token_id)
        self._is_visual = is_visual
        self._placeholders = is_visual.nonzero()[:, 0]

    def _ready(self) -> int:
        """Tokens that can no longer change: up to the last placeholder whose embedding is here.

        Not up to the next placeholder: the tokens between are the next frame's time, and that frame may
        never come.
        """
        return int(self._placeholders[self._received - 1]) + 1 if self._received else 0

    def _feed(self, ready: int, *, whole_chunks: bool) -> None:
        while self._fed < ready and (not whole_chunks or ready - self._fed >= self._chunk_tokens):
            end = min(self._fed + self._chunk_tokens, ready)
            part = slice(self._fed, end)
            visual = self._take(int(self._is_visual[part].sum()))
            ids = self.prompt.input_ids[part].to(self._device)[None]
            positions = self.prompt.position_ids[:, part].to(self._device)[:, None]
            self.hidden = self._model.decode(self._model.embed(ids, visual), positions, self._cache)[:, -1:]
            self._fed = end

    def _take(self, count: int) -> Tensor | None:
        if not count:
            return None
        waiting = torch.cat(self._embeds)
        # A copy, so that the group behind a small rest can be freed.
        self._embeds = [waiting[count:].clone()]
        return waiting[:count]


@torch.inference_mode()
def prefill_stream(
    loaded: LoadedModel,
    inputs: Sequence[InputPlan],
    lay_out: Callable[[Sequence[Visual]], Prompt],
    cache: KeyeCache,
    *,
    exact_resize: bool = False,
    strict: bool = False,
    settings: StreamSettings | None = None,
    timings: Timings | None = None,
    on_progress: OnProgress | None = None,
) -> Prefilled:
    """Decode, encode and prefill `inputs` into an empty cache.

    `lay_out` makes the prompt for given visuals. It is first called with the planned frames. When others come
    out of a file (a damaged or cut-off one yields fewer, or neighbours with times of their own; `decode_frames`
    warns of it, or refuses with `strict`), it is called again with the frames that are there. The cache needs
    room for `cache_tokens(inputs, prompt length)` tokens.
    """
    settings = settings or StreamSettings()
    timings = timings or Timings(device=loaded.device)
    visuals = [visual_of(item) for item in inputs]
    chunk_tokens = settings.chunk_tokens or prefill_chunk_tokens(loaded.device)
    feeder = PromptFeeder(loaded.model, cache, lay_out(visuals), chunk_tokens)
    total_frames = sum(item.sampling.frames for item in inputs)
    came: list[tuple[Fraction, ...]] = []

    for number, item in enumerate(inputs):
        planned = list(item.sampling.times_s)
        expected, times = planned, list[Fraction]()
        decoded = _decoded(loaded, item, group_frames(loaded, item, settings), timings, exact_resize, strict)
        # Closed here and not when it is collected: an interruption must leave no decoder threads behind.
        with closing(decoded) as chunks:
            for chunk in chunks:
                if tuple(expected[len(times) : len(times) + len(chunk.times_s)]) != chunk.times_s:
                    after = [time_s for time_s in expected if time_s > chunk.times_s[-1]]
                    expected = [*times, *chunk.times_s, *after]
                    visuals[number] = _with_times(visuals[number], expected)
                    feeder.replace_prompt(lay_out(visuals))
                times += chunk.times_s
                with timings.measure("encode_s"):
                    embeds = _encode(loaded, chunk.frames)
                with timings.measure("prefill_s"):
                    feeder.add(embeds)
                if on_progress:
                    on_progress("reading frames", sum(map(len, came)) + len(times), total_frames)
        if times != planned:
            visuals[number] = _with_times(visuals[number], times)
            feeder.replace_prompt(lay_out(visuals))
        came.append(tuple(times))

    with timings.measure("prefill_s"):
        hidden = feeder.finish()
    return Prefilled(feeder.prompt, hidden, tuple(came))


def cache_tokens(inputs: Sequence[InputPlan], prompt_tokens: int) -> int:
    """Room for a prompt in which a neighbour, whose time may be a digit longer, stands in for any frame."""
    return prompt_tokens + sum(item.sampling.frames for item in inputs)


def group_frames(files: ModelFiles, item: InputPlan, settings: StreamSettings | None = None) -> int:
    """How many frames of an input are decoded and encoded together."""
    patches = item.sampling.tokens_per_frame * merge_area(files.config)
    return max(1, (settings or StreamSettings()).group_patches // patches)


def visual_of(item: InputPlan) -> Visual:
    """A planned input as the prompt layout sees it."""
    sampling = item.sampling
    times_s = tuple(float(time_s) for time_s in sampling.times_s) if sampling.kind == "video" else ()
    return Visual(kind=sampling.kind, grid=sampling.grid, times_s=times_s)


def _with_times(visual: Visual, times_s: Sequence[Fraction]) -> Visual:
    if visual.kind == "image":
        return visual
    return replace(visual, times_s=tuple(float(time_s) for time_s in times_s))


def _decoded(
    loaded: LoadedModel,
    item: InputPlan,
    chunk_frames: int,
    timings: Timings,
    exact_resize: bool,
    strict: bool,
) -> Generator[FrameChunk, None, None]:
    """Groups of frames as they are decoded."""
    read = loaded.read_frames or decode_frames
    chunks = read(
        item.info, item.sampling, exact_resize=exact_resize, strict=strict, chunk_frames=chunk_frames
    )
    with closing(cast(Generator[FrameChunk, None, None], chunks)):
        while True:
            with timings.measure("decode_s"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


def _encode(loaded: LoadedModel, frames: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] → visual embeddings [V, D] on the model's device."""
    patch = loaded.config.vision_config.patch_size
    pixels = torch.from_numpy(frames).to(loaded.device)
    preprocessor = loaded.preprocessor
    patches = frames_to_patches(pixels, preprocessor.mean, preprocessor.std, patch, torch_dtype(loaded.dtype))
    grid = (frames.shape[1] // patch, frames.shape[2] // patch)
    return loaded.model.encode_frames(patches, [grid] * len(frames))
