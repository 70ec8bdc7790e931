"""Runs `keye batch` in forked processes, kills each at a random moment, and lets the last one finish.

python -m tests.batch.killing JOBS OUT MODEL KILLS SEED: everything is imported and the model is loaded once, so that fifty
starts take seconds. Prints how long an undisturbed run took and how many processes were really killed at work.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from typing import Any

PAUSE_S = 0.002  # between the two halves of a line, so that a kill can come there


def main(jobs: str, out: str, model: str, kills: int, seed: int) -> None:
    from keyecli import session
    from keyecli.batch import ledger, run  # noqa: F401  imported here and not in every child
    from keyecli.cli import run as run_keye

    loaded = session.load(model, device="cpu")
    session.load = lambda *_, **__: loaded  # type: ignore[assignment]

    def start(output: str) -> int:
        process = os.fork()
        if process == 0:
            ledger.os = _HalfWrites()  # type: ignore[assignment]
            code = run_keye(
                ["batch", jobs, "-o", output, "-m", model, "-q", "--no-think", "--max-tokens", "4"]
            )
            os._exit(code)
        return process

    def timed() -> float:
        begin = time.perf_counter()
        _, status = os.waitpid(start(f"{out}.whole"), 0)
        assert os.waitstatus_to_exitcode(status) == 1, "one of the jobs is about a broken file"
        return time.perf_counter() - begin

    whole_s, idle_s = timed(), timed()
    draw, killed = random.Random(seed), 0
    for _ in range(kills):
        process = start(out)
        time.sleep(draw.uniform(0, idle_s + 2 * (whole_s - idle_s) / kills))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    _, status = os.waitpid(start(out), 0)
    print(f"{whole_s:.2f} {idle_s:.2f} {killed} {os.waitstatus_to_exitcode(status)}")


class _HalfWrites:
    """The module os, but `write` waits a moment and then takes half of what it is given."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: Any) -> int:
        time.sleep(PAUSE_S)
        return os.write(descriptor, bytes(data)[: max(1, len(data) // 2)])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
