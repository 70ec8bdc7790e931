"""Frames of training rows, decoded by processes of their own, in the order of training and a few rows ahead of it.

What waits is bounded in bytes, the frames are those that `decode_frames` gives, and nothing here needs to be saved with a
training: whoever goes on from row k begins with row k.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import deque
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from keyecli.engine.plan import InputPlan
from keyecli.errors import InputError, KeyeError, KeyeWarning
from keyecli.training.decoders import Decoded, DecodeEnd, DecodeOrder, DecodeWorker, WorkerLostError, decode
from keyecli.video.decode import FrameChunk
from keyecli.video.sampling import SamplingPlan
from keyecli.video.source import VideoInfo

if TYPE_CHECKING:
    from keyecli.engine.loaded import FrameReader, LoadedModel
    from keyecli.engine.stream import StreamSettings

AHEAD_BYTES = 2**30
CHUNK_FRAMES = 16
TIMEOUT_S = 300.0
MOST_RETRIES = 3
"""How often an input whose worker was lost is given to another one."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(eq=False)
class _Input:
    """One input of a row on its way. The pool's lock guards what changes.

    settled: nothing more will come, behind the waiting chunks stand `last_warnings` and `error`. awaited: somebody can do
    nothing before the next chunk comes. dropped: nobody wants it any more.
    """

    item: InputPlan
    chunk_frames: int
    waiting: deque[tuple[FrameChunk, tuple[str, ...]]] = field(default_factory=deque)
    received_chunks: int = 0
    received_frames: int = 0
    settled: bool = False
    error: KeyeError | None = None
    last_warnings: tuple[str, ...] = ()
    taken: bool = False
    awaited: bool = False
    dropped: bool = False

    @property
    def next_bytes(self) -> int:
        """The size of the next chunk, if it comes as planned."""
        plan = self.item.sampling
        frames = max(1, min(self.chunk_frames, plan.frames - self.received_frames))
        return frames * plan.height * plan.width * 3


class DecodePool:
    """`with DecodePool(workers) as pool:` request rows in the order in which they will be wanted, then take their frames.

    Each of `workers` processes decodes one input at a time, the next one whenever it is free. At most `ahead_bytes` of frames
    are decoded and wait, a quarter of that kept for inputs whose frames are being taken; of an input that somebody waits for,
    one chunk always has room. Frames come through shared memory. A worker that ends is replaced, and its input goes on with
    the chunk that had not come; after `MOST_RETRIES` of them it is the input that is refused. `timeout_s` is what a chunk may
    take. With 0 workers, whoever takes frames decodes them, and no time is limited.

    Any thread may call anything. Leaving the block, however that happens, ends the processes and waits for them.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        ahead_bytes: int = AHEAD_BYTES,
        timeout_s: float = TIMEOUT_S,
        exact_resize: bool = False,
        strict: bool = False,
    ) -> None:
        self._count, self._ahead_bytes, self._timeout_s = workers, ahead_bytes, timeout_s
        self._exact_resize, self._strict = exact_resize, strict
        self._changed = threading.Condition()
        self._rows: dict[Hashable, list[_Input]] = {}
        self._queue: deque[_Input] = deque()  # that no worker has begun
        self._held_up: list[_Input] = []  # whose workers wait for room
        self._threads: list[threading.Thread] = []
        self._workers: list[DecodeWorker] = []
        self._failure: KeyeError | None = None
        self._closed = False
        self.waiting_bytes = self.most_waiting_bytes = 0

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the workers that run now; one that is lost makes room for another when that is noticed."""
        with self._changed:
            return tuple(worker.process_id for worker in self._workers)

    def request(self, key: Hashable, plans: Sequence[InputPlan], chunk_frames: Sequence[int] = ()) -> None:
        """Queue the inputs of a row; `chunk_frames`, one an input, is the size in which their frames will be asked for."""
        sizes = chunk_frames or [CHUNK_FRAMES] * len(plans)
        inputs = [_Input(item, size) for item, size in zip(plans, sizes, strict=True)]
        with self._changed:
            if self._closed or key in self._rows:
                raise ValueError(
                    "the pool is closed" if self._closed else f"{key!r} has been requested already"
                )
            self._rows[key] = inputs
            self._queue.extend(inputs)
            self._changed.notify_all()
        self._start_threads()

    def frames(self, key: Hashable) -> Generator[FrameChunk, None, None]:
        """The frames of all inputs of a row in order, which is then forgotten. ValueError when it was not requested.

        As from `decode_frames`: InputError for an input that cannot be decoded, and KeyeWarnings, where they belong. Also an
        InputError: an input that takes too long or ends its workers. KeyeError when no worker can be started.
        """
        with self._changed:
            if key not in self._rows:
                raise ValueError(f"{key!r} has not been requested")
            inputs = self._rows[key]
        try:
            for wanted in inputs:
                wanted.taken = True
                yield from self._chunks_of(wanted)
        finally:
            self.forget(key)

    def reader(self, key: Hashable) -> FrameReader:
        """Takes the place of `decode_frames` for a row: what was requested comes from the workers, all else is decoded there
        and then. Each requested input is given once."""
        return partial(self._read, key)

    def forget(self, key: Hashable) -> None:
        """Nobody wants the frames of this row any more, if anybody did."""
        with self._changed:
            for wanted in self._rows.pop(key, ()):
                self._drop(wanted)

    def close(self) -> None:
        """End the processes and forget everything; whoever still waits for frames gets a ValueError."""
        with self._changed:
            self._closed = True
            for worker in self._workers:
                worker.kill()
            for key in list(self._rows):
                self.forget(key)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _read(
        self,
        key: Hashable,
        info: VideoInfo,
        plan: SamplingPlan,
        *,
        exact_resize: bool = False,
        strict: bool = False,
        chunk_frames: int = CHUNK_FRAMES,
    ) -> Generator[FrameChunk, None, None]:
        found = None
        if (exact_resize, strict) == (self._exact_resize, self._strict):
            found = self._take_input(key, info, plan)
        if found is None:
            with closing(
                decode(DecodeOrder(InputPlan(info, plan), chunk_frames, exact_resize, strict))
            ) as chunks:
                yield from chunks
            return
        with closing(self._chunks_of(found)) as chunks:
            yield from chunks if found.chunk_frames == chunk_frames else _regrouped(chunks, chunk_frames)

    def _take_input(self, key: Hashable, info: VideoInfo, plan: SamplingPlan) -> _Input | None:
        with self._changed:
            for wanted in self._rows.get(key, ()):
                if not wanted.taken and (wanted.item.info.path, wanted.item.sampling) == (info.path, plan):
                    wanted.taken = True
                    return wanted
        return None

    def _chunks_of(self, wanted: _Input) -> Generator[FrameChunk, None, None]:
        try:
            while True:
                chunk, warned = self._wait_for(wanted)
                for message in warned:
                    warnings.warn(message, KeyeWarning, stacklevel=2)
                if chunk is None:
                    break
                yield chunk
            if wanted.error is not None:
                raise wanted.error
            if not wanted.settled:
                yield from decode(self._order(wanted))
        finally:
            with self._changed:
                self._drop(wanted)

    def _wait_for(self, wanted: _Input) -> tuple[FrameChunk | None, tuple[str, ...]]:
        """The next chunk; None behind the last one, and, not settled, for an input that only the caller can decode."""
        with self._changed:
            wanted.awaited = True
            self._changed.notify_all()  # it may now have room
            self._changed.wait_for(
                lambda: (
                    wanted.waiting
                    or wanted.settled
                    or wanted.dropped
                    or self._failure
                    or self._is_stuck(wanted)
                )
            )
            wanted.awaited = False
            if wanted.waiting:
                chunk, warned = wanted.waiting.popleft()
                self._hold(-chunk.frames.nbytes)
                return chunk, warned
            if wanted.dropped:
                raise ValueError("the row has been forgotten")
            if self._failure is not None:
                raise self._failure
            if not wanted.settled:
                self._queue.remove(wanted)
            return None, wanted.last_warnings

    def _is_stuck(self, wanted: _Input) -> bool:
        """Whether no worker will come to it: each has decoded as much as may wait of something else, or there is none."""
        if wanted not in self._queue or len(self._held_up) < self._count:
            return False
        return not any(self._has_room(other) for other in self._held_up)

    def _has_room(self, wanted: _Input) -> bool:
        most = self._ahead_bytes if wanted.taken else self._ahead_bytes * 3 // 4
        return self.waiting_bytes + wanted.next_bytes <= most or (wanted.awaited and not wanted.waiting)

    def _hold(self, size: int) -> None:
        """So many bytes more wait, or will when they are decoded."""
        self.waiting_bytes += size
        self.most_waiting_bytes = max(self.most_waiting_bytes, self.waiting_bytes)
        self._changed.notify_all()

    def _drop(self, wanted: _Input) -> None:
        wanted.dropped = True
        if wanted in self._queue:
            self._queue.remove(wanted)
        self._hold(-sum(chunk.frames.nbytes for chunk, _ in wanted.waiting))
        wanted.waiting.clear()

    def _order(self, wanted: _Input) -> DecodeOrder:
        return DecodeOrder(
            wanted.item, wanted.chunk_frames, self._exact_resize, self._strict, wanted.received_chunks
        )

    def _start_threads(self) -> None:
        with self._changed:
            if self._threads or self._closed:
                return
            # Daemons: a pool that is not closed does not keep the program alive.
            self._threads = [
                threading.Thread(target=self._work, args=(number,), name="keye-decode-pool", daemon=True)
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self, number: int) -> None:
        """The life of a thread, which has one worker at a time."""
        worker: DecodeWorker | None = None
        try:
            while (wanted := self._next_input()) is not None:
                losses = 0
                while not (wanted.settled or wanted.dropped):
                    try:
                        worker = worker or self._started(number)
                        self._receive(wanted, worker)
                        continue
                    except TimeoutError:
                        self._settle(wanted, _too_slow(wanted, self._timeout_s))
                    except WorkerLostError as lost:
                        losses += 1
                        if losses > MOST_RETRIES:
                            self._settle(wanted, _ends_workers(wanted, losses, lost))
                    self._end(worker)
                    worker = None
        except KeyeError as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            self._end(worker)

    def _next_input(self) -> _Input | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            return None if self._closed else self._queue.popleft()

    def _started(self, number: int) -> DecodeWorker:
        worker = DecodeWorker(number, self._count)
        with self._changed:
            self._workers.append(worker)
            self._changed.notify_all()
            if self._closed:
                worker.kill()
        return worker

    def _end(self, worker: DecodeWorker | None) -> None:
        if worker is None:
            return
        worker.end()
        with self._changed:
            self._workers.remove(worker)

    def _receive(self, wanted: _Input, worker: DecodeWorker) -> None:
        """Let a worker decode an input until that is settled or dropped; TimeoutError, WorkerLostError."""
        order = self._order(wanted)
        worker.begin(order)
        for number in itertools.count():
            size = self._wait_for_room(wanted) if number >= order.known_chunks else 0
            try:
                if wanted.dropped:
                    worker.stop()
                    return
                reply = worker.next(self._timeout_s)
            finally:
                with self._changed:
                    self._hold(-size)
            if isinstance(reply, DecodeEnd):
                self._settle(wanted, reply.error, reply.warnings)
                return
            self._put(wanted, reply)

    def _wait_for_room(self, wanted: _Input) -> int:
        """Reserve room for its next chunk; how many bytes, 0 when nobody wants it any more."""
        with self._changed:
            if not self._has_room(wanted):
                self._held_up.append(wanted)
                self._changed.notify_all()
                self._changed.wait_for(lambda: wanted.dropped or self._has_room(wanted))
                self._held_up.remove(wanted)
            size = 0 if wanted.dropped else wanted.next_bytes
            self._hold(size)
            return size

    def _put(self, wanted: _Input, decoded: Decoded) -> None:
        chunk = decoded.chunk  # None: it has come before, with what was warned of
        with self._changed:
            if wanted.dropped or chunk is None:
                return
            wanted.received_chunks += 1
            wanted.received_frames += len(chunk.times_s)
            wanted.waiting.append((chunk, decoded.warnings))
            self._hold(chunk.frames.nbytes)

    def _settle(self, wanted: _Input, error: KeyeError | None, said: tuple[str, ...] = ()) -> None:
        with self._changed:
            wanted.settled, wanted.error, wanted.last_warnings = True, error, said
            self._changed.notify_all()


class RowFrames:
    """Keeps a pool a few rows ahead of a training. What `loaded.frame_cache` holds encoded is not decoded.

    `exact_resize` must be that of the pool.
    """

    def __init__(
        self,
        pool: DecodePool,
        loaded: LoadedModel,
        *,
        exact_resize: bool = False,
        settings: StreamSettings | None = None,
    ) -> None:
        self._pool, self._loaded = pool, loaded
        self._exact_resize, self._settings = exact_resize, settings
        self._numbers = itertools.count()

    def ahead(
        self, rows: Iterable[tuple[Key, Sequence[InputPlan]]], depth: int
    ) -> Generator[tuple[Key, Sequence[InputPlan], FrameReader], None, None]:
        """(key, plans, what reads its frames) of each row in order, while the next `depth` rows are decoded.

        A row's reader is good until the next row is asked for. Keys may come again. `rows` is read `depth` rows ahead.
        """
        rows = iter(rows)
        waiting: deque[tuple[Hashable, Key, Sequence[InputPlan]]] = deque()
        try:
            while True:
                for key, plans in itertools.islice(rows, depth + 1 - len(waiting)):
                    waiting.append((self._request(plans), key, plans))
                if not waiting:
                    return
                request, key, plans = waiting[0]
                yield key, plans, self._pool.reader(request)
                self._pool.forget(request)
                waiting.popleft()
        finally:
            for request, _, _ in waiting:
                self._pool.forget(request)

    def _request(self, plans: Sequence[InputPlan]) -> Hashable:
        """Queue what must be decoded, under a name of its own."""
        from keyecli.engine.stream import group_frames

        request = (id(self), next(self._numbers))
        needed = [item for item in plans if needs_decoding(self._loaded, [item], self._exact_resize)]
        sizes = [group_frames(self._loaded, item, self._settings) for item in needed]
        self._pool.request(request, needed, sizes)
        return request


def needs_decoding(loaded: LoadedModel, plans: Sequence[InputPlan], exact_resize: bool = False) -> bool:
    """Whether the frames of any of these inputs are not kept encoded. Of a clip that has an entry, the file may be read once,
    for its hash."""
    cache = loaded.frame_cache
    return cache is None or not all(cache.holds(loaded, item, exact_resize) for item in plans)


def _regrouped(chunks: Iterator[FrameChunk], size: int) -> Iterator[FrameChunk]:
    """The same frames, `size` at a time."""
    times_s: tuple[Fraction, ...] = ()
    frames: np.ndarray | None = None
    for chunk in chunks:
        times_s += chunk.times_s
        frames = chunk.frames if frames is None else np.concatenate([frames, chunk.frames])
        while len(times_s) >= size:
            yield FrameChunk(times_s[:size], frames[:size])
            times_s, frames = times_s[size:], frames[size:]
    if frames is not None and times_s:
        yield FrameChunk(times_s, frames)


def _too_slow(wanted: _Input, timeout_s: float) -> InputError:
    return InputError(
        f"{wanted.item.info.path} gives no frames within {timeout_s:g} s: leave it out, or get a complete copy of it"
    )


def _ends_workers(wanted: _Input, losses: int, lost: WorkerLostError) -> InputError:
    return InputError(
        f"{wanted.item.info.path} cannot be decoded, {losses} processes ended at it ({lost}): leave it out, or re-encode it"
    )
