"""Workers that each hold the model: they are given groups of jobs, and one that is lost is replaced."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from keyecli import errors
from keyecli.batch.answering import Outcome, error_of
from keyecli.batch.hosts import Ended, Host, Link
from keyecli.batch.identity import Work
from keyecli.errors import KeyeError, KeyeWarning

AHEAD = 2  # groups that a worker has: the one it answers and the next, whose files it opens meanwhile


class WorkerLost(KeyeError):
    """A job at which worker processes ended without an answer."""


class _Worker:
    """A worker and the groups it has been given, the one it works on first."""

    def __init__(self, device: str, link: Link) -> None:
        self.device = device
        self.link = link
        self.groups: deque[deque[Work]] = deque()
        self.ready = False

    @property
    def room(self) -> int:
        """Groups it should have: before its model is loaded it opens no files, and others may be there sooner."""
        return AHEAD if self.ready else int(self.link.started)

    def give(self, group: Sequence[Work]) -> None:
        self.groups.append(deque(group))
        self.link.send([work.job.to_dict() for work in group])

    def take(self) -> Work:
        """The job whose outcome has come."""
        work = self.groups[0].popleft()
        if not self.groups[0]:
            self.groups.popleft()
        return work


class WorkerPool:
    """As many workers as their host has devices for."""

    def __init__(
        self,
        host: Host[Any],
        first_message: Mapping[str, Any],
        *,
        on_ready: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        """`first_message`: see `worker.main`; its device is filled in. `on_ready` is told what each says when it has loaded."""
        self._host = host
        self._first_message = dict(first_message)
        self._on_ready = on_ready
        self._losses: dict[str, int] = {}
        self._lost_loading = 0
        self._again: deque[Sequence[Work]] = deque()
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        try:
            for device in self._host.devices:
                self._workers.append(self._start(device))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.link.end()
        self._host.close()

    def answer(self, groups: Iterator[Sequence[Work]]) -> Iterator[tuple[Work, Outcome]]:
        """The outcome of every job, as they come. KeyeError when the model cannot be loaded."""
        while self._hand_out(groups):
            for link, heard in self._host.listen([worker.link for worker in self._workers]):
                worker = next(worker for worker in self._workers if worker.link is link)
                if isinstance(heard, Ended):
                    yield from self._replace(worker, heard.how)
                    continue
                for message in heard:
                    if "outcome" in message:
                        yield worker.take(), Outcome(**message["outcome"])
                    else:
                        self._hear(worker, message)

    def _hand_out(self, groups: Iterator[Sequence[Work]]) -> bool:
        """Give each worker what it should have, those that have least first; False when there is nothing to wait for."""
        for held in range(AHEAD):
            for worker in self._workers:
                if len(worker.groups) == held < worker.room and not self._give_next(worker, groups):
                    break
        if any(worker.groups for worker in self._workers) or self._again:
            return True
        # Nobody is there who could take anything: is there anything?
        group = next(groups, None)
        if group is not None:
            self._again.append(group)
        return group is not None

    def _give_next(self, worker: _Worker, groups: Iterator[Sequence[Work]]) -> bool:
        group = self._again.popleft() if self._again else next(groups, None)
        if group is not None:
            worker.give(group)
        return group is not None

    def _hear(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        if "fault" in message:
            sys.stderr.write(message["fault"])
            return
        if "ready" in message:
            worker.ready = True
            self._lost_loading = 0
            for text in message["ready"]["warnings"]:
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

    def _replace(self, worker: _Worker, how: str) -> Iterator[tuple[Work, Outcome]]:
        """Start another worker in the place of one that has ended, with the jobs that it has left."""
        worker.link.end()
        left = [list(group) for group in worker.groups]
        worker.groups.clear()
        most = self._host.most_losses
        if not worker.ready:
            self._lost_loading += 1
            if self._lost_loading >= most:
                raise KeyeError(f"worker processes end while they load the model, the last one with {how}")
        elif left:
            work, *others = left.pop(0)
            # Questions are answered together: this one is tried alone, so that it does not answer for the others.
            left[:0] = [[work], others]
            losses = self._losses[work.job.id] = self._losses.get(work.job.id, 0) + 1
            if losses >= most:
                del left[0]
                message = f"{losses} worker processes ended at this job, the last one with {how}"
                yield work, _lost(WorkerLost(message))
        self._again.extendleft(group for group in reversed(left) if group)
        self._workers[self._workers.index(worker)] = self._start(worker.device)

    def _start(self, device: str) -> _Worker:
        load = {**self._first_message["load"], "device": device}
        return _Worker(device, self._host.start({**self._first_message, "load": load}))


def _lost(error: WorkerLost) -> Outcome:
    from datetime import UTC, datetime

    return Outcome(datetime.now(UTC).isoformat(timespec="milliseconds"), 0.0, error=error_of(error))
