"""The frames of the next jobs, decoded while the model works on the present one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, cast

from keyecli.engine.loaded import LoadedModel, ModelFiles
from keyecli.engine.plan import InputPlan
from keyecli.engine.stream import group_frames
from keyecli.video.decode import FrameChunk, decode_frames
from keyecli.video.sampling import SamplingPlan
from keyecli.video.source import VideoInfo

BUDGET_BYTES = 2**29
"""Of decoded frames that wait for their job; a longer clip is decoded further when its job has begun."""


@dataclass
class _Begun:
    """The first chunks of a clip, and the decoder that goes on behind them; complete when `ready` is set.

    rest: None where nothing was decoded that can be used.
    """

    item: InputPlan
    chunk_frames: int
    chunks: list[FrameChunk] = field(default_factory=list)
    rest: Any = None
    ready: threading.Event = field(default_factory=threading.Event)
    dropped: bool = False


class FramesAhead:
    """`begin` is called by a thread that is one group of jobs ahead, `read` by the engine; they may run at once."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._present: dict[Any, _Begun] = {}
        self._next: dict[Any, _Begun] = {}
        self._loaded: LoadedModel | None = None

    def serve(self, loaded: LoadedModel) -> LoadedModel:
        """The same model, which takes frames that have been decoded; from now on, what it keeps encoded is not decoded."""
        self._loaded = loaded
        return replace(loaded, read_frames=self.read)

    def begin(
        self, files: ModelFiles, plans: Sequence[InputPlan], *, exact_resize: bool, strict: bool
    ) -> None:
        """Let a thread decode the next group's frames, as far as there is room for them.

        What is damaged is left alone: its warnings and errors belong to the job that reads it.
        """
        for begun in self._present.values():  # nobody asks for it any more
            begun.dropped = True
        self._present, self._next = self._next, {}
        made = [
            _Begun(item, group_frames(files, item))
            for item in plans
            if item.info.truncated_at_s is None and not self._is_kept(item, exact_resize)
        ]
        for begun in made:
            self._next[(begun.item.info.path, begun.item.sampling, exact_resize, strict)] = begun
        # A daemon: a decoder that hangs holds up its own job, until its time is up, and nothing else.
        threading.Thread(
            target=_decode_all,
            args=(made, self._budget_bytes, exact_resize, strict),
            name="keye-frames-ahead",
            daemon=True,
        ).start()

    def _is_kept(self, item: InputPlan, exact_resize: bool) -> bool:
        loaded = self._loaded
        if loaded is None or loaded.frame_cache is None:
            return False
        return loaded.frame_cache.holds(loaded, item, exact_resize)

    def read(
        self,
        info: VideoInfo,
        plan: SamplingPlan,
        *,
        exact_resize: bool = False,
        strict: bool = False,
        chunk_frames: int = 16,
    ) -> Iterator[FrameChunk]:
        """As `decode_frames`, beginning with what is there already."""
        name = (info.path, plan, exact_resize, strict)
        begun = self._next.pop(name, None) or self._present.pop(name, None)
        if begun is not None:
            begun.ready.wait()
        if begun is None or begun.rest is None or begun.chunk_frames != chunk_frames:
            yield from decode_frames(
                info, plan, exact_resize=exact_resize, strict=strict, chunk_frames=chunk_frames
            )
            return
        with closing(begun.rest):
            while begun.chunks:
                yield begun.chunks.pop(0)
            yield from begun.rest


def _decode_all(made: Sequence[_Begun], room_bytes: int, exact_resize: bool, strict: bool) -> None:
    for begun in made:
        try:
            if room_bytes > 0 and not begun.dropped:
                room_bytes -= _decode(begun, room_bytes, exact_resize, strict)
        except Exception:  # it comes again, and is told, when the job reads the frames itself
            begun.rest = None
        finally:
            begun.ready.set()


def _decode(begun: _Begun, room_bytes: int, exact_resize: bool, strict: bool) -> int:
    """Fill in chunks and return their bytes; nothing is filled in when anything comes out other than planned."""
    plan = begun.item.sampling
    chunks = decode_frames(
        begun.item.info,
        plan,
        exact_resize=exact_resize,
        strict=strict,
        chunk_frames=begun.chunk_frames,
    )
    frames = used_bytes = 0
    for chunk in chunks:
        if chunk.times_s != plan.times_s[frames : frames + len(chunk.times_s)]:
            break
        begun.chunks.append(chunk)
        frames += len(chunk.times_s)
        used_bytes += chunk.frames.nbytes
        # Behind the last frame the decoder would say what was damaged.
        if frames == plan.frames or used_bytes >= room_bytes or begun.dropped:
            begun.rest = cast(Any, chunks)
            return used_bytes
    begun.chunks.clear()
    return 0
