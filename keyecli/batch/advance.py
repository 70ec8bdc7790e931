"""The next item while this one is used."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def in_advance(items: Iterable[Item]) -> Generator[Item, None, None]:
    """`items`, of which a thread works out the next one while the caller uses the last; never more than one.

    What `items` raises is raised where the item would have come. The thread ends when the iterator is closed.
    """
    wanted, ready = threading.Semaphore(1), threading.Semaphore(0)
    made: list[Item] = []
    failed: list[BaseException] = []
    closed = False

    def work() -> None:
        try:
            iterator = iter(items)
            while True:
                wanted.acquire()
                if closed:
                    return
                for item in iterator:
                    made.append(item)
                    break
                else:
                    return
                ready.release()
        except BaseException as error:  # carried over to the thread that asked
            failed.append(error)
        finally:
            ready.release()

    # A daemon: an interrupted command does not wait until a file of many gigabytes has been read.
    threading.Thread(target=work, name="keye-in-advance", daemon=True).start()
    try:
        while True:
            ready.acquire()
            if failed:
                raise failed[0]
            if not made:
                return
            item = made.pop()
            wanted.release()
            yield item
    finally:
        closed = True
        wanted.release()
