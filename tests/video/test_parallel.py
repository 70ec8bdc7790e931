"""in_order(): results come in the order of the pieces, few wait, errors keep their place, and threads end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from keyecli.video.parallel import in_order


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "keye-decode"]


class Bench:
    """A worker that counts: piece (count, delay in seconds) gives (piece's delay, 0), (…, 1) … as far as `count`."""

    def __init__(self) -> None:
        self.made = 0
        self.entered = 0
        self.left = 0

    @contextmanager
    def __call__(self) -> Iterator[Callable[[tuple[int, float]], Iterator[tuple[float, int]]]]:
        self.entered += 1
        try:
            yield self.work
        finally:
            self.left += 1

    def work(self, piece: tuple[int, float]) -> Iterator[tuple[float, int]]:
        count, delay_s = piece
        for number in range(count):
            time.sleep(delay_s)
            self.made += 1
            yield delay_s, number


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("room", [1, 3, 100])
def test_results_come_in_order(threads: int, room: int) -> None:
    pieces = [(3, 0.01), (0, 0.0), (7, 0.0), (1, 0.02), (5, 0.001)]
    worker = Bench()
    found = list(in_order(pieces, worker, threads=threads, room=room))
    assert found == [(delay, number) for count, delay in pieces for number in range(count)]
    assert worker.entered == worker.left <= threads
    assert not running()


def test_few_results_wait() -> None:
    """Whoever takes slowly is not overrun: `room` of the piece at hand, `room` of later ones, one in each thread's hands."""
    worker = Bench()
    pieces = [(40, 0.0)] * 5
    with closing(in_order(pieces, worker, threads=3, room=4)) as results:
        taken = 0
        for _ in results:
            taken += 1
            time.sleep(0.001)
            assert worker.made - taken <= 4 + 4 + 3
    assert taken == 200


def test_an_error_keeps_its_place() -> None:
    class Broken(Bench):
        def work(self, piece: tuple[int, float]) -> Iterator[tuple[float, int]]:
            yield from super().work(piece)
            if piece[0] == 2:
                raise LookupError("second")

    results = in_order([(3, 0.01), (2, 0.0), (3, 0.0)], Broken(), threads=2, room=10)
    assert [next(results)[1] for _ in range(5)] == [0, 1, 2, 0, 1]
    with pytest.raises(LookupError, match="second"):
        next(results)
    assert not running()


def test_a_worker_that_cannot_begin() -> None:
    @contextmanager
    def worker() -> Iterator[Any]:
        raise OSError("gone")
        yield

    with pytest.raises(OSError, match="gone"):
        list(in_order([1, 2, 3], worker, threads=2, room=1))
    assert not running()


def test_closing_stops_the_threads() -> None:
    """Also those that wait for room, and those in the middle of a long piece."""
    worker = Bench()
    results = in_order([(10**9, 0.0), (10**9, 0.001), (10**9, 0.0)], worker, threads=3, room=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not running()
    assert worker.entered == worker.left
