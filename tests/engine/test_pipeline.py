"""A thread that works ahead: the same items in the same order, bounded, and gone whatever ends the block."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Generator

import pytest

from keyecli.batch.questions import own_warnings
from keyecli.engine.pipeline import Ahead
from keyecli.errors import InputError, KeyeWarning


class Source:
    """Yields numbers, raises or warns where it is told to, and remembers which thread closed it."""

    def __init__(self, count: int, *, fails_at: int = -1, warns_at: tuple[int, ...] = ()) -> None:
        self.count, self.fails_at, self.warns_at = count, fails_at, warns_at
        self.made = 0
        self.closed_in: threading.Thread | None = None

    def __call__(self) -> Generator[int, None, None]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise InputError("the clip is damaged")
                if number in self.warns_at:
                    warnings.warn(f"before {number}", KeyeWarning, stacklevel=2)
                self.made += 1
                yield number
        finally:
            self.closed_in = threading.current_thread()


def ahead(source: Source, room: int = 3, size: int = 1) -> Ahead[int]:
    return Ahead(source, lambda item: size, room)


def assert_gone(source: Source) -> None:
    assert [thread.name for thread in threading.enumerate() if thread.name == "keye-ahead"] == []
    assert source.closed_in is not None
    assert source.closed_in is not threading.current_thread()


@pytest.mark.parametrize("room", [0, 1, 3, 10**6])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_items_come_in_order(room: int, count: int) -> None:
    source = Source(count)
    with ahead(source, room) as items:
        assert list(items) == list(range(count))
        assert list(items) == []  # and then never again
    assert_gone(source)


@pytest.mark.parametrize(("room", "size", "most"), [(3, 1, 3), (10, 4, 2), (1, 100, 1)])
def test_no_more_wait_than_there_is_room_for(room: int, size: int, most: int) -> None:
    source = Source(20)
    with ahead(source, room, size) as items:
        for used in range(1, 8):
            next(items)
            deadline = time.monotonic() + 10
            while source.made <= used + most and time.monotonic() < deadline:
                if source.made == used + most:  # one more has been made and waits for its place
                    time.sleep(0.02)
                    break
                time.sleep(0.001)
            assert source.made <= used + most + 1
            assert len(items._waiting) <= most
    assert_gone(source)


def test_a_failure_comes_where_the_item_would_have() -> None:
    source = Source(9, fails_at=4)
    with ahead(source) as items:
        assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(InputError, match="the clip is damaged"):
            next(items)
    assert_gone(source)


def leave_by(error: BaseException, items: Ahead[int]) -> None:
    with items:
        next(items)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_whatever_ends_the_block_ends_the_thread(error: type[BaseException]) -> None:
    source = Source(10**9)
    shown = warnings.showwarning
    with pytest.raises(error):
        leave_by(error(), ahead(source))
    assert_gone(source)
    assert warnings.showwarning is shown
    made = source.made
    time.sleep(0.02)
    assert source.made == made < 10


def test_left_early() -> None:
    source = Source(10**9)

    def two() -> Generator[int, None, None]:
        with ahead(source) as items:
            yield from items

    numbers = two()
    assert [next(numbers), next(numbers)] == [0, 1]
    del numbers  # abandoned
    assert_gone(source)


def test_never_used() -> None:
    source = Source(3)
    with ahead(source):
        pass
    assert_gone(source)


def test_a_thread_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyecli.engine.pipeline.GRACE_S", 0.05)
    released = threading.Event()
    source = Source(5)

    def hangs() -> Generator[int, None, None]:
        for number in source():
            if number == 2:
                released.wait(60)
            yield number

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        leave_by(KeyboardInterrupt(), Ahead(hangs, lambda item: 1, 1))
    assert time.monotonic() - begin < 30
    released.set()
    for thread in threading.enumerate():
        if thread.name == "keye-ahead":
            thread.join(10)
    assert_gone(source)


def test_warnings_come_between_the_items_in_the_thread_that_uses_them() -> None:
    source = Source(6, warns_at=(0, 3, 5))
    heard: list[tuple[str, bool]] = []
    seen: list[object] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", KeyeWarning)
        here = threading.current_thread()

        def show(message: Warning | str, *_: object) -> None:
            seen.append(str(message))
            heard.append((str(message), threading.current_thread() is here))

        warnings.showwarning = show  # type: ignore[assignment]
        with ahead(source, 100) as items:
            for item in items:
                seen.append(item)
                if item == 1:
                    warnings.warn("from the user", KeyeWarning, stacklevel=2)
            assert items.warnings_shown == 3
    assert seen == ["before 0", 0, 1, "from the user", 2, "before 3", 3, 4, "before 5", 5]
    assert all(own for _, own in heard)


def test_warnings_reach_those_who_gather_them() -> None:
    with own_warnings() as said, ahead(Source(4, warns_at=(1, 2))) as items:
        assert list(items) == [0, 1, 2, 3]
    assert said == ["before 1", "before 2"]
    with pytest.warns(KeyeWarning, match="before 1"), ahead(Source(4, warns_at=(1,))) as items:
        list(items)


def test_warnings_may_be_silenced_or_errors() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", KeyeWarning)
        with ahead(Source(3, warns_at=(1,))) as items:
            assert list(items) == [0, 1, 2]
        assert caught == []
        warnings.simplefilter("error", KeyeWarning)
        with pytest.raises(KeyeWarning, match="before 1"), ahead(Source(3, warns_at=(1,))) as items:
            list(items)
