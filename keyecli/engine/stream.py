"""The streamed prefill: while a thread decodes the next group of frames, the last one is encoded and fed to the decoder.

What stays in memory is the cache, a few groups of frames that wait for the vision tower and the embeddings of at most one
group and one chunk, however long the clips are. On a GPU the loop hands over work and never waits for a result.
T prompt tokens, V visual tokens at hand, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol, cast

import torch
from torch import Tensor

from keyecli.engine.loaded import LoadedModel, ModelFiles, OnProgress, torch_dtype
from keyecli.engine.pipeline import Ahead, InFlight
from keyecli.engine.plan import ENCODE_GROUP_PATCHES, InputPlan, merge_area, prefill_chunk_tokens
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.prompt import Prompt, Visual
from keyecli.video.decode import FrameChunk, decode_frames
from keyecli.video.patches import frames_to_patches

WAITING_BYTES = 2**26
"""Of decoded frames that wait for the vision tower."""


class Timings:
    """Seconds spent in each stage: on a GPU those between two marks in its own queue, so that nobody waits for it meanwhile."""

    def __init__(self, seconds: dict[str, float] | None = None, device: str = "cpu") -> None:
        self.device = device
        self._seconds = {} if seconds is None else seconds
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> dict[str, float]:
        """Stage → seconds so far. Waits until the GPU has done what was measured."""
        for stage, begin, end in self._marks:
            end.synchronize()
            self.add(stage, begin.elapsed_time(end) / 1e3)
        self._marks.clear()
        return self._seconds

    def add(self, stage: str, seconds: float) -> None:
        """Count what was measured elsewhere."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """The block counts into `stage`; on a GPU, when it succeeds."""
        if self.device.startswith("cuda"):
            begin = self._mark()
            yield
            self._marks.append((stage, begin, self._mark()))
            return
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start_s)

    def _mark(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.device))
        return mark


@dataclass(frozen=True)
class StreamSettings:
    """Sizes of the stream's steps; they change memory and speed, never the result. chunk_tokens None: by the device."""

    group_patches: int = ENCODE_GROUP_PATCHES
    chunk_tokens: int | None = None


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the cache holds entirely.

    hidden: [1, 1, D], the last token's state; times_s: the frames that really came, for each input; visuals: the inputs as they
    are laid out with these.
    """

    prompt: Prompt
    hidden: Tensor
    times_s: tuple[tuple[Fraction, ...], ...]
    visuals: tuple[Visual, ...]


class PromptFeeder:
    """Feeds a prompt to the decoder as its visual embeddings arrive, always in chunks of the same size.

    The prompt may be replaced while frames are still to come (a frame that cannot be decoded leaves it), as
    long as the tokens up to the last embedding at hand stay the same.
    """

    def __init__(
        self,
        model: KeyeVL2ForConditionalGeneration,
        cache: KeyeCache,
        prompt: Prompt,
        chunk_tokens: int,
        lay_out: Callable[[Sequence[Visual]], Prompt],
        timings: Timings,
    ) -> None:
        self._model = model
        self._lay_out = lay_out
        self._timings = timings
        self._cache = cache
        self._chunk_tokens = chunk_tokens
        self._device = cache.device
        self._embeds: list[Tensor] = []
        self._received = 0
        self._fed = 0
        self.hidden: Tensor | None = None
        self._set_prompt(prompt)

    @property
    def prefilled(self) -> int:
        """How many of the visual embeddings the decoder has seen."""
        return self._received - sum(map(len, self._embeds))

    def lay_out(self, visuals: Sequence[Visual]) -> None:
        """Go on with the layout of other visuals; ValueError when it differs in what is already fixed."""
        prompt = self._lay_out(visuals)
        fixed = self._ready()
        if not torch.equal(prompt.input_ids[:fixed], self.prompt.input_ids[:fixed]):
            raise ValueError("the new layout changes tokens that were already fed")
        self._set_prompt(prompt)

    def add(self, embeds: Tensor) -> None:
        """The next visual embeddings [V, D] in prompt order; feeds every whole chunk they complete."""
        self._embeds.append(embeds)
        self._received += len(embeds)
        with self._timings.measure("prefill_s"):
            self._feed(self._ready(), whole_chunks=True)

    def finish(self) -> Tensor:
        """Feed the rest and return the last token's state [1, 1, D]; ValueError for missing embeddings."""
        if self._received != len(self._placeholders):
            raise ValueError(
                f"{len(self._placeholders)} placeholders, but {self._received} visual embeddings came"
            )
        with self._timings.measure("prefill_s"):
            self._feed(len(self.prompt.input_ids), whole_chunks=False)
            assert self.hidden is not None
            self.hidden = self.hidden.to(self._device)
        return self.hidden

    def _set_prompt(self, prompt: Prompt) -> None:
        self.prompt = prompt
        config = self._model.config
        is_visual = (prompt.input_ids == config.image_token_id) | (prompt.input_ids == config.video_token_id)
        self._is_visual = is_visual
        self._placeholders = is_visual.nonzero()[:, 0]
        self._ids = _moved(prompt.input_ids, self._device)
        self._positions = _moved(prompt.position_ids, self._device)

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
            embeds = self._model.embed(self._ids[None, part], visual)
            positions = self._positions[:, None, part]
            self.hidden = self._model.decode(embeds, positions, self._cache)[:, -1:]
            self._fed = end

    def _take(self, count: int) -> Tensor | None:
        if not count:
            return None
        waiting = torch.cat(self._embeds)
        # A copy, so that the group behind a small rest can be freed.
        self._embeds = [waiting[count:].clone()]
        return waiting[:count]


class Sink(Protocol):
    """Takes visual embeddings in prompt order as they come. `lay_out` is called when other frames come than were planned."""

    def lay_out(self, visuals: Sequence[Visual]) -> None: ...

    def add(self, embeds: Tensor) -> None: ...

    def finish(self) -> object: ...


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

    Frames that `loaded.frame_cache` keeps are neither decoded nor encoded; those of other inputs it is given. What any
    stage raises is raised here, when the other stages have stopped.
    """
    settings = settings or StreamSettings()
    timings = timings or Timings(device=loaded.device)
    chunk_tokens = settings.chunk_tokens or prefill_chunk_tokens(loaded.device, loaded.offload)
    prompt = lay_out([visual_of(item) for item in inputs])
    feeder = PromptFeeder(loaded.model, cache, prompt, chunk_tokens, lay_out, timings)
    visuals, came = stream_visuals(
        loaded,
        inputs,
        feeder,
        exact_resize=exact_resize,
        strict=strict,
        settings=settings,
        timings=timings,
        on_progress=on_progress,
        prefilled=lambda: feeder.prefilled,
    )
    assert feeder.hidden is not None
    return Prefilled(feeder.prompt, feeder.hidden, came, visuals)


class _Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.embeds: list[Tensor] = []

    def lay_out(self, visuals: Sequence[Visual]) -> None:
        """Nothing is laid out here."""

    def add(self, embeds: Tensor) -> None:
        self.embeds.append(embeds)

    def finish(self) -> None:
        """Everything came."""


@torch.no_grad()
def encode_visuals(
    loaded: LoadedModel,
    inputs: Sequence[InputPlan],
    *,
    exact_resize: bool = False,
    strict: bool = False,
    timings: Timings | None = None,
) -> tuple[Tensor, tuple[Visual, ...]]:
    """What `prefill_stream` feeds to the decoder, bit for bit: embeddings [V, D] on the model's device, and the visuals
    as they came. Errors, warnings and the cache of frames as there."""
    kept = _Kept()
    visuals, _ = stream_visuals(
        loaded, inputs, kept, exact_resize=exact_resize, strict=strict, timings=timings
    )
    width = loaded.config.hidden_size
    empty = torch.empty(0, width, dtype=torch_dtype(loaded.dtype), device=loaded.device)
    return torch.cat(kept.embeds) if kept.embeds else empty, visuals


def stream_visuals(
    loaded: LoadedModel,
    inputs: Sequence[InputPlan],
    sink: Sink,
    *,
    exact_resize: bool = False,
    strict: bool = False,
    settings: StreamSettings | None = None,
    timings: Timings | None = None,
    on_progress: OnProgress | None = None,
    prefilled: Callable[[], int] | None = None,
) -> tuple[tuple[Visual, ...], tuple[tuple[Fraction, ...], ...]]:
    """Decode and encode `inputs` group by group into a sink, decoding ahead in a thread. Returns the visuals and, for each input,
    the frames that really came. `prefilled` tells the progress how many embeddings the decoder has seen."""
    settings = settings or StreamSettings()
    timings = timings or Timings(device=loaded.device)
    visuals = [visual_of(item) for item in inputs]
    reader = _Reader(loaded, inputs, settings, exact_resize, strict)
    progress = _Progress(inputs, reader, prefilled or (lambda: 0), on_progress)
    in_flight = InFlight(loaded.device)
    came: list[tuple[Fraction, ...]] = []

    with ExitStack() as stages:
        recorder = None
        if loaded.frame_cache is not None:
            recorder = stages.enter_context(loaded.frame_cache.recorder(inputs))
        groups = stages.enter_context(Ahead(reader.groups, _nbytes, WAITING_BYTES))
        for number, item in enumerate(inputs):
            planned = list(item.sampling.times_s)
            expected, times = planned, list[Fraction]()
            draft = None
            warned = groups.warnings_shown
            for group in iter(groups.__next__, None):
                assert group is not None
                if tuple(expected[len(times) : len(times) + len(group.times_s)]) != group.times_s:
                    after = [time_s for time_s in expected if time_s > group.times_s[-1]]
                    expected = [*times, *group.times_s, *after]
                    visuals[number] = with_times(visuals[number], expected)
                    sink.lay_out(visuals)
                if recorder is not None and not times and not group.encoded:
                    draft = recorder.draft(loaded, item, exact_resize)
                times += group.times_s
                timings.add("cache_s" if group.encoded else "decode_s", group.seconds)
                embeds = _embeds(loaded, group, timings)
                sink.add(embeds)
                if draft is not None:
                    draft.add(len(group.times_s), embeds)
                in_flight.launched()
                progress.encoded(group)
            if draft is not None and (times != planned or groups.warnings_shown > warned):
                draft.discard()
            if times != planned:
                visuals[number] = with_times(visuals[number], times)
                sink.lay_out(visuals)
            came.append(tuple(times))
        sink.finish()
        progress.finished()
        if recorder is not None:
            recorder.keep()
    return tuple(visuals), tuple(came)


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


def visual_end(files: ModelFiles, input_ids: Tensor) -> int:
    """Tokens of a prompt up to and including the end mark of its last visual."""
    return int((input_ids == files.config.vision_end_token_id).nonzero()[-1]) + 1


def with_times(visual: Visual, times_s: Sequence[Fraction]) -> Visual:
    """A visual with the frames that came."""
    if visual.kind == "image":
        return visual
    return replace(visual, times_s=tuple(float(time_s) for time_s in times_s))


@dataclass(frozen=True)
class _Group:
    """Neighbouring frames on their way to the decoder.

    data: pictures uint8 [N, H, W, 3], pinned where they go to a GPU, or with `encoded` their embeddings [V, D] of an
    earlier run. seconds: what it took to get them.
    """

    times_s: tuple[Fraction, ...]
    data: Tensor
    encoded: bool
    seconds: float


def _nbytes(group: _Group | None) -> int:
    return 0 if group is None else group.data.nbytes


class _Reader:
    """The first stage, which a thread of its own runs: groups of frames, from the frame cache or decoded."""

    def __init__(
        self,
        loaded: LoadedModel,
        inputs: Sequence[InputPlan],
        settings: StreamSettings,
        exact_resize: bool,
        strict: bool,
    ) -> None:
        self._loaded, self._inputs, self._settings = loaded, inputs, settings
        self._exact_resize, self._strict = exact_resize, strict
        self.decoded = self.cached = 0  # frames that came, for whoever watches

    def groups(self) -> Generator[_Group | None, None, None]:
        """The groups of all inputs in order, None behind the last one of each input."""
        for item in self._inputs:
            begin_s = time.perf_counter()
            read = 0
            for times_s, data, encoded in self._parts(item):
                self.cached += len(times_s) * encoded
                self.decoded += len(times_s) * (not encoded)
                read += len(times_s)
                pinned = _pinned(data, self._loaded.device)
                yield _Group(times_s, pinned, encoded, time.perf_counter() - begin_s)
                begin_s = time.perf_counter()
            yield None

    def _parts(self, item: InputPlan) -> Iterator[tuple[tuple[Fraction, ...], Tensor, bool]]:
        """(times, data, whether it is encoded) of each group of one input."""
        done = 0
        if self._loaded.frame_cache is not None:
            stored = self._loaded.frame_cache.find(self._loaded, item, self._exact_resize)
            for frames, embeds in stored or ():
                yield item.sampling.times_s[done : done + frames], embeds, True
                done += frames
        if done == item.sampling.frames:
            return
        # Where an entry of the cache breaks off, the rest is decoded.
        last_s = item.sampling.times_s[done - 1] if done else None
        with closing(self._decode(item)) as chunks:
            for chunk in chunks:
                new = [i for i, time_s in enumerate(chunk.times_s) if last_s is None or time_s > last_s]
                if new:
                    yield chunk.times_s[new[0] :], torch.from_numpy(chunk.frames[new[0] :]), False

    def _decode(self, item: InputPlan) -> Generator[FrameChunk, None, None]:
        read = self._loaded.read_frames or decode_frames
        chunks = read(
            item.info,
            item.sampling,
            exact_resize=self._exact_resize,
            strict=self._strict,
            chunk_frames=group_frames(self._loaded, item, self._settings),
        )
        return cast(Generator[FrameChunk, None, None], chunks)


class _Progress:
    """Tells how far each stage is."""

    def __init__(
        self,
        inputs: Sequence[InputPlan],
        reader: _Reader,
        prefilled: Callable[[], int],
        on_progress: OnProgress | None,
    ) -> None:
        self._inputs, self._reader, self._seen, self._tell = inputs, reader, prefilled, on_progress
        self._total = sum(item.sampling.frames for item in inputs)
        self._encoded = 0
        self._begin_s = time.monotonic()

    def encoded(self, group: _Group) -> None:
        """A group has gone through the vision tower and to the decoder."""
        self._encoded += len(group.times_s)
        self._report(self._prefilled())

    def finished(self) -> None:
        """Everything is prefilled."""
        if self._total:
            self._report(self._encoded)

    def _report(self, prefilled: int) -> None:
        if self._tell is None:
            return
        reader, total = self._reader, self._total
        words = [f"reading frames {reader.decoded + reader.cached}/{total} decoded"]
        if reader.cached:
            words = [f"reading frames {reader.cached}/{total} encoded before"]
            words += [f"{reader.decoded} decoded"] if reader.decoded else []
        words += [f"{self._encoded} encoded", f"{prefilled} prefilled"]
        if 0 < prefilled < total:
            left_s = (time.monotonic() - self._begin_s) * (total - prefilled) / prefilled
            words.append(f"{left_s:.0f} s left")
        self._tell(", ".join(words), self._encoded, total)

    def _prefilled(self) -> int:
        """Frames of which the decoder has seen everything."""
        tokens, frames = self._seen(), 0
        for item in self._inputs:
            whole = min(tokens // item.sampling.tokens_per_frame, item.sampling.frames)
            frames += whole
            tokens -= whole * item.sampling.tokens_per_frame
            if whole < item.sampling.frames:
                break
        return frames


def _embeds(loaded: LoadedModel, group: _Group, timings: Timings) -> Tensor:
    """The visual embeddings [V, D] of a group, on the model's device."""
    if group.encoded:
        return group.data.to(loaded.device, non_blocking=True)
    with timings.measure("encode_s"):
        patch = loaded.config.vision_config.patch_size
        pixels = group.data.to(loaded.device, non_blocking=True)
        preprocessor = loaded.preprocessor
        patches = frames_to_patches(
            pixels, preprocessor.mean, preprocessor.std, patch, torch_dtype(loaded.dtype)
        )
        grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
        return loaded.model.encode_frames(patches, [grid] * len(pixels))


def _pinned(data: Tensor, device: str) -> Tensor:
    """In memory from which a GPU copies without anybody waiting."""
    if not device.startswith("cuda"):
        return data
    with torch.cuda.device(device):
        return data.pin_memory()


def _moved(data: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return _pinned(data, str(device)).to(device, non_blocking=True)
