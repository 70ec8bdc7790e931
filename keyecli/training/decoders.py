"""A process that decodes frames for another one: what the two say to each other, and frames that go over in shared memory.

The process imports neither torch nor the model. Each chunk of frames lies in a nameless file in memory, whose descriptor is
passed along: when whoever maps it is gone, however that happens, nothing is left behind.
"""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from keyecli.engine.plan import InputPlan
from keyecli.errors import InputError, KeyeError, KeyeWarning
from keyecli.video.decode import FrameChunk, decode_frames

LEAVING_S = 5.0
_SIZE = struct.Struct("!Q")
_SERVE = "import sys; from keyecli.training.decoders import serve; serve(*map(int, sys.argv[1:]))"


@dataclass(frozen=True)
class DecodeOrder:
    """What a worker is to decode, as `decode_frames`; the first `known_chunks` chunks are decoded, but not handed over."""

    item: InputPlan
    chunk_frames: int
    exact_resize: bool = False
    strict: bool = False
    known_chunks: int = 0


@dataclass(frozen=True)
class Decoded:
    """A chunk (None: one that was known) and what was warned of on the way to it."""

    chunk: FrameChunk | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class DecodeEnd:
    """Behind the last chunk: what was warned of there, and the error that ended the decoding."""

    error: KeyeError | None
    warnings: tuple[str, ...]


class WorkerLostError(Exception):
    """A worker that ended by itself or was killed; the message says how."""


def decode(order: DecodeOrder) -> Generator[FrameChunk, None, None]:
    """`decode_frames`, with each failure a KeyeError that names the file: one bad file must not end a training."""
    info = order.item.info
    try:
        yield from decode_frames(
            info,
            order.item.sampling,
            exact_resize=order.exact_resize,
            strict=order.strict,
            chunk_frames=order.chunk_frames,
        )
    except KeyeError:
        raise
    except Exception as error:
        raise InputError(
            f"{info.path} cannot be decoded ({type(error).__name__}: {error}): leave it out, or get a complete copy of it"
        ) from error


class DecodeWorker:
    """A worker as the process that gives it work sees it: `begin` an order, then `next` until a DecodeEnd comes, or `stop`.

    Whatever waits for a worker raises WorkerLostError when there is none any more; `kill` may come from any thread.
    """

    def __init__(self, number: int = 0, workers: int = 1) -> None:
        """The `number`th of `workers`, which share the processor's cores. KeyeError when no process can be started."""
        ours, theirs = socket.socketpair()
        self._link, self._ready = _Link(ours), False
        command = [sys.executable, "-c", _SERVE, str(theirs.fileno()), str(number), str(workers)]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # Ctrl-C is for the process that decides
                )
        except OSError as error:
            ours.close()
            raise KeyeError(f"{_NO_START} ({error.strerror or error}): {_NO_WORKERS}") from error

    @property
    def process_id(self) -> int:
        return self._process.pid

    def begin(self, order: DecodeOrder) -> None:
        """Nothing is decoded before the first `next`. KeyeError when the process ends by itself before it is ready."""
        if not self._ready:
            self._wait_until_ready()
        self._send(order)

    def next(self, timeout_s: float) -> Decoded | DecodeEnd:
        """Let it decode another chunk. TimeoutError when that takes longer; the worker is then of no more use."""
        self._send(True)
        message, file = self._receive(timeout_s)
        if isinstance(message, _Laid):
            if message.shape is None:
                return Decoded(None, message.warnings)
            if file is None:  # the system drops a descriptor for which there is no room
                raise KeyeError(
                    "frames cannot be taken over: too many files are open; raise the limit (ulimit -n)"
                )
            return Decoded(FrameChunk(message.times_s, _frames_in(file, message.shape)), message.warnings)
        assert isinstance(message, DecodeEnd)
        return message

    def stop(self) -> None:
        """The rest of the order is not wanted."""
        self._send(False)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Kill the process, which keeps nothing that would be lost, and wait for it."""
        self._process.kill()
        self._process.wait()
        self._link.close()

    def _wait_until_ready(self) -> None:
        try:
            self._receive(None)
        except WorkerLostError as lost:
            if self._process.returncode < 0:
                raise
            raise KeyeError(f"{_NO_START} ({lost}): {_NO_WORKERS}") from lost
        self._ready = True

    def _send(self, message: Any) -> None:
        try:
            self._link.send(message)
        except OSError as error:
            raise self._lost() from error

    def _receive(self, timeout_s: float | None) -> tuple[Any, int | None]:
        try:
            return self._link.receive(timeout_s)
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            raise self._lost() from error

    def _lost(self) -> WorkerLostError:
        # It may have closed its socket and not be gone yet; killed on its way out, it would not say why it went.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVING_S)
        self._process.kill()
        code = self._process.wait()
        return WorkerLostError(f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")


_NO_START = "a process that decodes frames cannot be started"
_NO_WORKERS = "see what it printed, or decode without workers"


@dataclass(frozen=True)
class _Laid:
    """A chunk on its way: its frames [N, H, W, 3] are in the file that comes along; shape None: it was known."""

    times_s: tuple[Fraction, ...]
    shape: tuple[int, ...] | None
    warnings: tuple[str, ...]


class _Link:
    """One end of a socket over which objects go, each with a descriptor or none."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: Any, file: int | None = None) -> None:
        content = pickle.dumps(message)
        self._end.settimeout(None)
        size = _SIZE.pack(len(content))
        if file is None:
            self._end.sendall(size + content)
            return
        socket.send_fds(self._end, [size], [file])
        self._end.sendall(content)

    def receive(self, timeout_s: float | None = None) -> tuple[Any, int | None]:
        """EOFError when the other end is closed, TimeoutError when it says nothing for so long."""
        self._end.settimeout(timeout_s)
        size, files, _, _ = socket.recv_fds(self._end, _SIZE.size, 1)
        if not size:
            raise EOFError
        size += self._exactly(_SIZE.size - len(size))
        content = self._exactly(_SIZE.unpack(size)[0])
        return pickle.loads(content), files[0] if files else None

    def close(self) -> None:
        self._end.close()

    def _exactly(self, size: int) -> bytes:
        pieces = []
        while size:
            piece = self._end.recv(min(size, 2**20))
            if not piece:
                raise EOFError
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


def _frames_in(file: int, shape: tuple[int, ...]) -> np.ndarray:
    """The frames of a file, which is closed; its memory goes with the array."""
    try:
        shared = mmap.mmap(file, int(np.prod(shape)))
    finally:
        os.close(file)
    return np.frombuffer(shared, np.uint8).reshape(shape)


def _nameless_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):  # in memory, and, unlike /dev/shm, without a limit of its own
        return os.fdopen(os.memfd_create("keye-frames"), "w+b")
    return tempfile.TemporaryFile()


def serve(descriptor: int, number: int, workers: int) -> None:
    """A worker's life: orders come over the socket `descriptor` until its other end is closed."""
    link = _Link(socket.socket(fileno=descriptor))
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    try:
        preload()
        _take_cores(number, workers)
        link.send(None)
        # A thread of its own, so that a decoder that never comes back does not outlive whom it decodes for.
        threading.Thread(target=_listen, args=(link, orders), daemon=True).start()
        while True:
            _carry_out(orders.get(), orders, link)
    except ConnectionError:  # nobody waits for it any more
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def preload() -> None:
    """Import what decoding needs, which must not count as the first clip's time."""
    import av  # noqa: F401
    import PIL.Image
    import PIL.ImageOps  # noqa: F401


def _take_cores(number: int, workers: int) -> None:
    """Decoders start as many threads as there are cores for them: each worker takes its share, and never less than one."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[number::workers] or [cores[number % len(cores)]]))


def _listen(link: _Link, orders: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            orders.put(link.receive()[0])
    except (EOFError, OSError):
        os._exit(0)


def _carry_out(order: DecodeOrder, steps: queue.SimpleQueue[Any], link: _Link) -> None:
    """Decode a chunk for each True that comes, until the end or a False."""
    with warnings.catch_warnings(record=True) as caught, closing(decode(order)) as chunks:
        warnings.simplefilter("always")
        error, known = None, order.known_chunks
        while steps.get():
            chunk = None
            try:
                chunk = next(chunks, None)
            except KeyeError as raised:
                error = raised
            said = tuple(str(item.message) for item in caught if issubclass(item.category, KeyeWarning))
            caught.clear()
            if chunk is None:
                link.send(DecodeEnd(error, said))
                return
            if known:
                known -= 1
                link.send(_Laid(chunk.times_s, None, said))
                continue
            with _nameless_file() as file:
                file.write(chunk.frames.data)
                file.flush()
                link.send(_Laid(chunk.times_s, chunk.frames.shape, said), file.fileno())
