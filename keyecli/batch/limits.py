"""A job that takes too long is stopped, wherever it is."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keyecli.errors import KeyeError

_AGAIN_S = 0.5  # rings once more, in case a library swallowed it the first time


class JobTimeout(KeyeError):
    """A job that took longer than it may."""


class _TimeIsUp(BaseException):
    """Passes everything that catches ordinary exceptions."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """JobTimeout when the block takes longer than `seconds`; None is no limit.

    For the main thread only. Work inside a library's own code is stopped when it comes back to Python.
    """
    if seconds is None:
        yield
        return
    running = True

    def ring(number: int, frame: Any) -> None:
        if running:
            raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    except _TimeIsUp:
        raise JobTimeout(f"the job took longer than the {seconds:g} s that --timeout allows") from None
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
