"""Ctrl-C while the libraries are being imported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from keyecli.console import console
from keyecli.errors import ExitCode


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Inside the block Ctrl-C ends the process with exit code 130.

    For imports only: the libraries' own import code may swallow a KeyboardInterrupt or answer it with another error, and
    nothing has begun yet that would have to be cleaned up.
    """
    in_charge = threading.current_thread() is threading.main_thread()
    if not in_charge or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: Any) -> NoReturn:
    console.error("interrupted")
    os._exit(ExitCode.INTERRUPTED)
