"""Does pieces of work in several threads and gives their results in order, holding a bounded number of them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from threading import Condition, Thread
from typing import Generic, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")
Worker = Callable[[], AbstractContextManager[Callable[[Piece], Iterable[Result]]]]


def in_order(
    pieces: Sequence[Piece], worker: Worker[Piece, Result], *, threads: int, room: int
) -> Iterator[Result]:
    """The results of all pieces, one piece after the other, while later pieces are worked on.

    Each thread enters a `worker()` of its own, once, and does the next piece whenever it is free. At most
    `room` results of the piece whose turn it is wait to be taken, and as many of all later ones together. An
    exception comes where the piece's next result would have come. Whatever ends the iteration, be it an
    exception or close(), ends the threads: each stops at the next result it has, and is waited for.
    """
    crew = _Crew(pieces, worker, room)
    # Daemons: an iteration that is neither finished nor closed does not keep the program alive.
    started = [Thread(target=crew.work, name="keye-decode", daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    try:
        yield from crew.results()
    finally:
        crew.stop()
        for thread in started:
            thread.join()


class _Crew(Generic[Piece, Result]):
    """What the threads and the one who takes the results share; pieces are known by their number."""

    def __init__(self, pieces: Sequence[Piece], worker: Worker[Piece, Result], room: int) -> None:
        self._pieces, self._worker, self._room = pieces, worker, room
        self._changed = Condition()
        self._next = 0  # to be worked on
        self._turn = -1  # to be given out
        self._waiting: defaultdict[int, deque[Result]] = defaultdict(deque)
        self._later = 0  # results that wait for their piece's turn
        self._ends: dict[int, BaseException | None] = {}
        self._stopped = False

    def results(self) -> Iterator[Result]:
        for number in range(len(self._pieces)):
            with self._changed:
                waiting = self._waiting[number]
                self._turn, self._later = number, self._later - len(waiting)
                self._changed.notify_all()
            while True:
                with self._changed:
                    while not waiting and number not in self._ends:
                        self._changed.wait()
                    if not waiting:
                        break
                    result = waiting.popleft()
                    self._changed.notify_all()
                yield result
            del self._waiting[number]
            if (error := self._ends.pop(number)) is not None:
                raise error

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def work(self) -> None:
        """One thread's life."""
        work: Callable[[Piece], Iterable[Result]] | None = None
        with ExitStack() as stack:
            while (number := self._take()) is not None:
                error: BaseException | None = None
                try:
                    if work is None:
                        work = stack.enter_context(self._worker())
                    for result in work(self._pieces[number]):
                        if not self._give(number, result):
                            return
                except BaseException as raised:  # carried over to the one who takes the results
                    error = raised
                with self._changed:
                    self._ends[number] = error
                    self._changed.notify_all()

    def _take(self) -> int | None:
        with self._changed:
            if self._stopped or self._next == len(self._pieces):
                return None
            self._next += 1
            return self._next - 1

    def _give(self, number: int, result: Result) -> bool:
        """Wait for room and hand over a result; False when nobody wants it any more."""
        with self._changed:
            while not self._stopped and self._is_full(number):
                self._changed.wait()
            if self._stopped:
                return False
            self._waiting[number].append(result)
            self._later += number != self._turn
            self._changed.notify_all()
            return True

    def _is_full(self, number: int) -> bool:
        waiting = len(self._waiting[number]) if number == self._turn else self._later
        return waiting >= self._room
