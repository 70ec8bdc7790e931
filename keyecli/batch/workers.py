"""Processes that each hold the model, one a GPU: they are given groups of jobs, and one that is lost is replaced."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from keyecli import errors
from keyecli.batch.answering import Outcome, error_of
from keyecli.batch.identity import Work
from keyecli.errors import KeyeError, KeyeWarning, UsageError

AHEAD = 2  # groups that a worker has: the one it answers and the next, whose files it opens meanwhile
MOST_LOSSES = (
    2  # a job at which so many workers were lost has failed, and so has the model after so many in a row
)


class WorkerLost(KeyeError):
    """A job at which worker processes ended without an answer."""


def devices_of(device: str | None, count: int) -> list[str]:
    """The device of each worker. UsageError for more workers than there are GPUs."""
    import torch

    if device == "cpu" or (device in (None, "auto") and not torch.cuda.is_available()):
        return ["cpu"] * count
    present = torch.cuda.device_count()
    if device not in (None, "auto", "cuda"):
        raise UsageError(f"--device {device} is one device: leave it out with --workers {count}")
    if count > present:
        raise UsageError(f"--workers {count} is one GPU each, and this machine has {present}")
    return [f"cuda:{number}" for number in range(count)]


class _Worker:
    """One process and the groups it has been given, the one it works on first."""

    def __init__(self, device: str, environment: Mapping[str, str], first_line: Mapping[str, Any]) -> None:
        self.device = device
        self.groups: deque[deque[Work]] = deque()
        self.ready = False
        self._unfinished = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keyecli.batch.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            process_group=0,  # Ctrl-C is for the process that decides
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        self.send(first_line)

    def send(self, message: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which its stdout will tell
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def give(self, group: Sequence[Work]) -> None:
        self.groups.append(deque(group))
        self.send([work.job.to_dict() for work in group])

    def messages(self) -> list[dict[str, Any]] | None:
        """What has come; None when the process has ended."""
        piece = os.read(self.stdout.fileno(), 1 << 20)
        if not piece:
            return None
        *lines, self._unfinished = (self._unfinished + piece).split(b"\n")
        return [json.loads(line) for line in lines]

    def take(self) -> Work:
        """The job whose outcome has come."""
        work = self.groups[0].popleft()
        if not self.groups[0]:
            self.groups.popleft()
        return work

    def end(self) -> int:
        """Kill the process, which keeps nothing that would be lost, and return its exit code."""
        self.process.kill()
        code = self.process.wait()
        self.stdout.close()
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        return code


class WorkerPool:
    """As many workers as there are `devices`."""

    def __init__(
        self,
        devices: Sequence[str],
        load: Mapping[str, Any],
        defaults: Mapping[str, Any],
        *,
        timeout_s: float | None = None,
        debug: bool = False,
        on_ready: Callable[[bool], None] | None = None,
    ) -> None:
        """`load`: what `keyecli.load` is given, but the device. `on_ready` is told by each whether it holds keye-nano."""
        self._first_line = {"defaults": dict(defaults), "timeout_s": timeout_s, "debug": debug}
        self._load = dict(load)
        self._on_ready = on_ready
        self._environment = dict(os.environ)
        if devices[0] == "cpu":
            threads = max(1, (os.cpu_count() or 1) // len(devices))
            self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._selector = selectors.DefaultSelector()
        self._losses: dict[str, int] = {}
        self._lost_loading = 0
        self._again: deque[Sequence[Work]] = deque()
        self._workers = [self._start(device) for device in devices]

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._selector.close()

    def answer(self, groups: Iterator[Sequence[Work]]) -> Iterator[tuple[Work, Outcome]]:
        """The outcome of every job, as they come. KeyeError when the model cannot be loaded."""
        while True:
            self._hand_out(groups)
            if not any(worker.groups for worker in self._workers):
                return
            for key, _ in self._selector.select():
                worker: _Worker = key.data
                messages = worker.messages()
                if messages is None:
                    yield from self._replace(worker)
                    continue
                for message in messages:
                    if "outcome" in message:
                        yield worker.take(), Outcome(**message["outcome"])
                    else:
                        self._hear(worker, message)

    def _hand_out(self, groups: Iterator[Sequence[Work]]) -> None:
        """Give each worker what it should have, those that have least first."""
        for held in range(AHEAD):
            for worker in self._workers:
                if len(worker.groups) == held:
                    group = self._again.popleft() if self._again else next(groups, None)
                    if group is None:
                        return
                    worker.give(group)

    def _hear(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        if "ready" in message:
            worker.ready = True
            self._lost_loading = 0
            for text in message["warnings"]:
                warnings.warn(text, KeyeWarning, stacklevel=2)
            if self._on_ready is not None:
                self._on_ready(message["ready"])
            return
        stopped = message["stopped"]
        kind = getattr(errors, stopped["kind"], KeyeError)
        # A model that cannot be loaded once cannot be loaded again; a GPU that is lost is tried by the next process.
        if not worker.ready:
            raise kind(stopped["message"])
        warnings.warn(stopped["message"], KeyeWarning, stacklevel=2)

    def _replace(self, worker: _Worker) -> Iterator[tuple[Work, Outcome]]:
        """Start another worker in the place of one that has ended, with the jobs that it has left."""
        self._selector.unregister(worker.stdout)
        code = worker.end()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        left = [list(group) for group in worker.groups]
        if not worker.ready:
            self._lost_loading += 1
            if self._lost_loading >= MOST_LOSSES:
                raise KeyeError(f"worker processes end while they load the model, the last one with {how}")
        elif left:
            work = left[0][0]
            losses = self._losses[work.job.id] = self._losses.get(work.job.id, 0) + 1
            if losses >= MOST_LOSSES:
                del left[0][0]
                message = f"{losses} worker processes ended at this job, the last one with {how}"
                yield work, _lost(WorkerLost(message))
        self._again.extendleft(group for group in reversed(left) if group)
        self._workers[self._workers.index(worker)] = self._start(worker.device)

    def _start(self, device: str) -> _Worker:
        load = {**self._load, "device": device}
        worker = _Worker(device, self._environment, {"load": load, **self._first_line})
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker


def _lost(error: WorkerLost) -> Outcome:
    from datetime import UTC, datetime

    return Outcome(datetime.now(UTC).isoformat(timespec="milliseconds"), 0.0, error=error_of(error))
