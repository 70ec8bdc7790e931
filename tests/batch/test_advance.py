"""One item ahead, never more; errors come where the item would have come."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from keyecli.batch.advance import in_advance


def test_the_next_item_is_worked_out_while_one_is_used_and_not_the_one_behind_it() -> None:
    made: list[int] = []
    reached = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            reached[number].set()
            yield number

    ahead = in_advance(items())
    assert next(ahead) == 0
    assert reached[1].wait(10)
    assert made == [0, 1]
    assert list(ahead) == [1, 2, 3]


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ZeroDivisionError

    ahead = in_advance(items())
    assert next(ahead) == 0
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    ahead = in_advance(iter(range(100)))
    next(ahead)
    ahead.close()
    for thread in threading.enumerate():
        if thread.name == "keye-in-advance":
            thread.join(10)
    assert threading.active_count() == before
