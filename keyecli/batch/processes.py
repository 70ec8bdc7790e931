"""Workers as processes of this machine, one a GPU."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from keyecli.batch.hosts import Ended
from keyecli.errors import UsageError

MOST_LOSSES = 2
LEAVING_S = 5.0  # of a process that has closed its stdout


def devices_of(device: str | None, count: int) -> list[str]:
    """The device of each worker. UsageError for more workers than there are GPUs."""
    import torch

    if device == "cpu" or (device in (None, "auto") and not torch.cuda.is_available()):
        return ["cpu"] * count
    present = torch.cuda.device_count()
    if device not in (None, "auto", "cuda"):
        raise UsageError(f"--device {device} is for one worker: leave it out with --workers {count}")
    if count > present:
        raise UsageError(f"--workers {count} is one GPU each, and this machine has {present}")
    return [f"cuda:{number}" for number in range(count)]


class WorkerProcess:
    """A process of `worker`, reached over its stdin and its stdout."""

    def __init__(
        self,
        first_message: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        folder: str | None = None,
    ) -> None:
        """`folder`: that paths are relative to, None for this process's own; OSError when it cannot be entered."""
        self._unfinished = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keyecli.batch.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            cwd=folder,
            process_group=0,  # Ctrl-C is for the process that decides
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        self.send(first_message)

    @property
    def started(self) -> bool:
        """A process of this machine needs no waiting for."""
        return True

    def send(self, message: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which its stdout will tell
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def hear(self) -> list[dict[str, Any]] | Ended:
        """Wait until it says something, or has ended."""
        piece = os.read(self.stdout.fileno(), 1 << 20)
        if not piece:
            with suppress(
                subprocess.TimeoutExpired
            ):  # what is killed on its way out would not say why it went
                self.process.wait(timeout=LEAVING_S)
            self.process.kill()
            code = self.process.wait()
            return Ended(f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        *lines, self._unfinished = (self._unfinished + piece).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """Kill the process, which keeps nothing that would be lost."""
        self.process.kill()
        self.process.wait()
        self.stdout.close()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()


class ProcessHost:
    """Starts processes on this machine, as many as there are `devices`."""

    most_losses = MOST_LOSSES

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = devices
        self._environment = dict(os.environ)
        if devices[0] == "cpu":
            threads = max(1, (os.cpu_count() or 1) // len(devices))
            self._environment.setdefault("OMP_NUM_THREADS", str(threads))

    def start(self, first_message: Mapping[str, Any]) -> WorkerProcess:
        return WorkerProcess(first_message, self._environment)

    def listen(
        self, links: Sequence[WorkerProcess]
    ) -> Iterator[tuple[WorkerProcess, list[dict[str, Any]] | Ended]]:
        with selectors.DefaultSelector() as selector:
            for link in links:
                selector.register(link.stdout, selectors.EVENT_READ, link)
            said = [key.data for key, _ in selector.select()]
        for link in said:
            yield link, link.hear()

    def close(self) -> None:
        """Nothing is left when the processes have ended."""
