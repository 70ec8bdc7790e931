"""Stages that run at once: a thread makes items ahead of the one that uses them, and the device is kept a few groups behind."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")

GRACE_S = 2.0
"""How long a stopped thread is waited for; one that is inside a library for longer ends by itself when it comes back."""

GROUPS_IN_FLIGHT = 4


class Ahead(Generic[Item]):
    """`with Ahead(make, size, room_bytes) as items: for item in items: …`

    A thread runs the generator that `make()` returns and closes it, up to `room_bytes` of items ahead (at least one item).
    What the generator raises is raised by the iteration where the item would have come; what its thread warns of is shown by
    the iterating thread, between the same items. Leaving the block, however that happens, stops the thread and waits for it.
    """

    def __init__(
        self, make: Callable[[], Generator[Item, None, None]], size: Callable[[Item], int], room_bytes: int
    ) -> None:
        self.warnings_shown = 0
        self._make, self._size, self._room_bytes = make, size, room_bytes
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Item | _Warned, int]] = deque()  # each with its size
        self._end: BaseException | None = None  # what comes behind them
        self._stopped = False
        # A daemon: a decoder that hangs does not keep an interrupted command alive.
        self._thread = threading.Thread(target=self._work, name="keye-ahead", daemon=True)
        self._show: Callable[..., Any] = warnings.showwarning

    def __enter__(self) -> Ahead[Item]:
        self._show, warnings.showwarning = warnings.showwarning, self._note_warning
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()
        try:
            self._thread.join(GRACE_S)
        finally:
            warnings.showwarning = self._show

    def __iter__(self) -> Ahead[Item]:
        return self

    def __next__(self) -> Item:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._end is not None)
                if not self._waiting:
                    assert self._end is not None
                    raise self._end
                item, _ = self._waiting.popleft()
                self._changed.notify_all()
            if not isinstance(item, _Warned):
                return item
            self.warnings_shown += 1
            item.show()

    def _work(self) -> None:
        end: BaseException = StopIteration()
        try:
            with closing(self._make()) as items:
                for item in items:
                    if not self._put(item, self._size(item)):
                        return
        except BaseException as error:  # carried over to the thread that iterates
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def _put(self, item: Item | _Warned, size: int) -> bool:
        """Wait for room and add to the queue; False when nobody wants it any more."""
        most = max(size, self._room_bytes)
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or sum(waits for _, waits in self._waiting) + size <= most
            )
            if self._stopped:
                return False
            self._waiting.append((item, size))
            self._changed.notify_all()
            return True

    def _note_warning(self, *arguments: Any, **named: Any) -> None:
        """In the place of `warnings.showwarning`, for every thread; the filters have let this warning pass."""
        if threading.current_thread() is self._thread:
            self._put(_Warned(partial(self._show, *arguments, **named)), 0)
        else:
            self._show(*arguments, **named)


@dataclass(frozen=True)
class _Warned:
    """Stands among the items for a warning."""

    show: Callable[[], Any]


class InFlight:
    """Keeps the host from running ahead of a GPU with ever more frames; elsewhere work is done when the call returns."""

    def __init__(self, device: str, groups: int = GROUPS_IN_FLIGHT) -> None:
        self._device, self._groups = torch.device(device), groups
        self._ends: deque[torch.cuda.Event] = deque()

    def launched(self) -> None:
        """A group's work has been given to the device; waits until at most `groups` of them are unfinished."""
        if self._device.type != "cuda":
            return
        end = torch.cuda.Event(blocking=True)  # sleeps, and leaves the core to the decoder
        end.record(torch.cuda.current_stream(self._device))
        self._ends.append(end)
        if len(self._ends) > self._groups:
            self._ends.popleft().synchronize()
