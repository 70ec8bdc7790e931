"""A whole run: which jobs are still to be done, doing them, and writing down what became of each."""

from __future__ import annotations

import traceback
from array import array
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from keyecli import __version__
from keyecli.batch.advance import in_advance
from keyecli.batch.answering import OpenedGroup, Outcome, answer_group, open_group, reading_ahead
from keyecli.batch.archive import Archive
from keyecli.batch.frames import FramesAhead
from keyecli.batch.hosts import Host
from keyecli.batch.identity import Fingerprints, Work, plain, prefix_of, settings_of, work_of
from keyecli.batch.jobs import Job
from keyecli.batch.ledger import Ledger
from keyecli.batch.shard import Shard, share_of
from keyecli.batch.workers import WorkerPool
from keyecli.engine.loaded import ModelFiles, revision_of
from keyecli.model.quantize import quantization_in
from keyecli.session import Keye

LOOK_AHEAD_JOBS = 64
"""Jobs that see the same frames share a prefill when they are no further apart than this."""


@dataclass(frozen=True)
class BatchSettings:
    """How jobs are run. timeout_s: for each job; limit: begin at most so many jobs; ordered: lines in the jobs' order."""

    retry_failed: bool = False
    fail_fast: bool = False
    limit: int | None = None
    timeout_s: float | None = None
    ordered: bool = True
    shard: Shard | None = None
    debug: bool = False


@dataclass
class Tally:
    """Numbers of jobs. done, failed: in this run; the others were so before, or are done under another output's name.

    copied: of those done, the ones for which another job had asked for the very same. waiting: lines that wait for their
    turn beside the output. left: not begun, because the run ended before.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    done_before: int = 0
    failed_before: int = 0
    archived: int = 0
    copied: int = 0
    waiting: int = 0

    @property
    def left(self) -> int:
        return self.total - self.settled

    @property
    def settled(self) -> int:
        """Jobs about which nothing is left to do."""
        return self.done + self.failed + self.done_before + self.failed_before + self.archived

    def to_dict(self) -> dict[str, int]:
        names = ("total", "done", "failed", "done_before", "failed_before", "archived", "copied", "waiting")
        return {**{name: getattr(self, name) for name in names}, "left": self.left}


OnRecord = Callable[[Mapping[str, Any], Tally], None]
"""Told each record as it is written, and how far the run is."""


class Batch:
    """Jobs, a model that can be loaded, and the output. Use it as a context: the output is locked meanwhile."""

    def __init__(
        self,
        jobs: Sequence[Job],
        files: ModelFiles,
        output: Path,
        defaults: Mapping[str, Any],
        settings: BatchSettings,
        *,
        archive: Path | None = None,
    ) -> None:
        """`defaults`: options of every job that does not name them itself.

        UsageError: an option that cannot be used, with its job's line; an output or an archive that cannot be written.
        """
        if settings.shard is not None:
            jobs = share_of(jobs, settings.shard)
        self.settings = settings
        self.tally = Tally(total=len(jobs))
        self._files = files
        self.defaults = {name: plain(value) for name, value in defaults.items() if value is not None}
        self._jobs = list(jobs)
        # Settings are checked here and made again when a job's turn comes: of many jobs they would take much memory.
        numbers: dict[Any, int] = {}
        self._prefixes = array(
            "q",
            (
                numbers.setdefault(prefix_of(job, settings_of(job, files, self.defaults)), len(numbers))
                for job in jobs
            ),
        )
        self._revision = revision_of(files)
        # Weights that are quantised on the way give other answers, and so does a cache in FP8.
        quantization = quantization_in(files.config, files.folder)
        self._dtype = files.dtype if quantization is None else f"{files.dtype} {quantization}"
        if files.kv is not None:
            self._dtype += f" kv {files.kv}"
        self._resources = ExitStack()
        self.archive = None if archive is None else Archive(archive)
        if self.archive is not None:
            self._resources.callback(self.archive.close)
        try:
            self.ledger = Ledger(output, ordered=settings.ordered)
        except BaseException:
            self._resources.close()
            raise
        self._resources.callback(self.ledger.close)
        self._fingerprints = Fingerprints(self.ledger.files)
        self.ledger.files.clear()
        self._keys: dict[str, str] = {}
        self._places: dict[str, int] = {}  # id → where its line belongs, for jobs that have been looked at
        # Key of what is being done → other jobs that ask for the same.
        self._begun: dict[str, list[Work]] = {}
        self._begun_jobs = 0
        self._frames = FramesAhead()
        self._answers_here = True
        self._on_record: OnRecord | None = None

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(
        self,
        load: Callable[[], Keye],
        load_arguments: Mapping[str, Any],
        *,
        find_host: Callable[[], Host[Any]] | None = None,
        on_record: OnRecord | None = None,
        on_ready: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Tally:
        """Do what is to be done: here, with the model that `load` gives, or in workers of the host that `find_host` gives.

        Either is called when there is something to do. `load_arguments` are for workers, and `on_ready` is told what each
        says when it has loaded. Whatever ends the run, what is done is written. KeyeError: a model that cannot be loaded,
        a disk that is full, a GPU that is lost.
        """
        self._on_record = on_record
        self._answers_here = find_host is None
        try:
            with ExitStack() as running:
                groups = running.enter_context(closing(in_advance(self._groups())))
                pending = self._pending(groups)
                if find_host is None:
                    outcomes = self._answer_here(pending, load)
                else:
                    outcomes = self._answer_in_workers(pending, find_host, load_arguments, on_ready)
                self._record_all(running.enter_context(closing(outcomes)))
        finally:
            self.tally.waiting = self.ledger.waiting
        return self.tally

    def keys(self) -> list[tuple[Job, str]]:
        """Each job that was looked at, with its key, in the jobs' order."""
        return [(job, self._keys[job.id]) for job in self._jobs if job.id in self._keys]

    def _record_all(self, outcomes: Iterator[tuple[Work, Outcome]]) -> None:
        for work, outcome in outcomes:
            self._record(work, outcome)
            if self.settings.fail_fast and outcome.error is not None:
                return
        if not self.tally.left:
            self.ledger.finish()

    def _groups(self) -> Iterator[_Group]:
        """All jobs, those near each other that see the same frames together. Runs ahead in a thread, and writes nothing."""
        # Under a limit jobs are begun strictly in their order.
        reach = 1 if self.settings.limit is not None else LOOK_AHEAD_JOBS
        members: dict[int, list[int]] = {}
        for number, prefix in enumerate(self._prefixes):
            members.setdefault(prefix, []).append(number)
        taken = bytearray(len(self._jobs))
        asked: set[str] = set()
        for first, prefix in enumerate(self._prefixes):
            if taken[first]:
                continue
            same = members[prefix]
            at = bisect_left(same, first)
            near = [first]
            for number in same[at + 1 : at + LOOK_AHEAD_JOBS]:
                if number - (near[-1] if reach == 1 else first) > reach:
                    break
                near.append(number)
            works = []
            for number in near:
                taken[number] = True
                job = self._jobs[number]
                settings = settings_of(job, self._files, self.defaults)
                work = work_of(job, settings, self._fingerprints, self._revision, self._dtype)
                works.append((number, work))
            opened = None
            new = [work for _, work in works if work.key not in asked and self._is_open(work)]
            asked.update(work.key for work in new)
            if self._answers_here and new:
                assignments = [(work.job, work.settings) for _, work in works]
                opened = open_group(assignments, self._files, self._frames)
            yield _Group(works, opened)

    def _pending(self, groups: Iterator[_Group]) -> Iterator[tuple[list[Work], OpenedGroup | None]]:
        """What is to be done of the groups; about the rest is written and counted what there is."""
        for group in groups:
            wanted = []
            for number, work in group.works:
                if self._begun_jobs == self.settings.limit:
                    break
                self._places[work.job.id] = number
                self._keys[work.job.id] = work.key
                if self._settle(work):
                    continue
                self._begun_jobs += 1
                self._begun[work.key] = []
                wanted.append(work)
            if wanted:
                yield wanted, group.opened
            if self._begun_jobs == self.settings.limit:
                return

    def _is_open(self, work: Work) -> bool:
        """Whether a job may have to be done, as far as can be told without writing."""
        if self.archive is not None and work.key in self.archive:
            return False
        status = self.ledger.status_of(work.job.id, work.key)
        if status is None:
            return not self.ledger.is_done(work.key)
        return status == "failed" and self.settings.retry_failed

    def _settle(self, work: Work) -> bool:
        """True for a job that need not be done: it has been, or the same work has been or is just being done."""
        id, key = work.job.id, work.key
        status = self.ledger.status_of(id, key)
        if status == "failed" and self.settings.retry_failed:
            self.ledger.drop_held(id, key)
        elif status is not None:
            self.ledger.keep(self._places.pop(id), id, key)
            if status == "done":
                self.tally.done_before += 1
                if self.archive is not None:  # a process may have been killed between the two files
                    self.archive.add(key)
            else:
                self.tally.failed_before += 1
            return True
        if key in self._begun:
            self._begun[key].append(work)
            return True
        record = self.ledger.done_under(key)
        if record is not None:
            self._write(work, _copied(record, work))
            return True
        if self.archive is not None and key in self.archive:
            self.tally.archived += 1
            self.ledger.skip(self._places.pop(id))
            return True
        return False

    def _record(self, work: Work, outcome: Outcome) -> None:
        record = _record_of(work, outcome)
        self._write(work, record)
        for other in self._begun.pop(work.key):
            self._write(other, _copied(record, other))

    def _write(self, work: Work, record: Mapping[str, Any]) -> None:
        self.ledger.put(self._places.pop(work.job.id), record)
        done = record["status"] == "done"
        if done:
            self.tally.done += 1
            self.tally.copied += record["copy_of"] is not None
            if self.archive is not None:
                self.archive.add(work.key)
        else:
            self.tally.failed += 1
        if self._on_record is not None:
            self._on_record(record, self.tally)

    def _answer_here(
        self, pending: Iterator[tuple[list[Work], OpenedGroup | None]], load: Callable[[], Keye]
    ) -> Generator[tuple[Work, Outcome], None, None]:
        def fault(error: BaseException) -> None:
            if self.settings.debug:
                traceback.print_exception(error)

        keye: Keye | None = None
        for works, opened in pending:
            keye = keye or reading_ahead(load(), self._frames)
            wanted = [(work.job, work.settings) for work in works]
            # What another job asks for too was not opened again; now it is done after all, because that one failed.
            group = open_group(wanted) if opened is None else replace(opened, jobs=tuple(wanted))
            by_id = {work.job.id: work for work in works}
            outcomes = answer_group(keye, group, timeout_s=self.settings.timeout_s, on_fault=fault)
            for job, outcome in outcomes:
                yield by_id[job.id], outcome

    def _answer_in_workers(
        self,
        pending: Iterator[tuple[list[Work], OpenedGroup | None]],
        find_host: Callable[[], Host[Any]],
        load_arguments: Mapping[str, Any],
        on_ready: Callable[[Mapping[str, Any]], None] | None,
    ) -> Generator[tuple[Work, Outcome], None, None]:
        first = next(pending, None)
        if first is None:
            return
        first_message = {
            "keye_version": __version__,
            "weights_revision": self._revision,
            "load": dict(load_arguments),
            "defaults": self.defaults,
            "timeout_s": self.settings.timeout_s,
            "debug": self.settings.debug,
        }
        with WorkerPool(find_host(), first_message, on_ready=on_ready) as pool:
            yield from pool.answer(works for works, _ in chain([first], pending))


@dataclass(frozen=True)
class _Group:
    """Jobs, each with its place in the output, and their files where these have been opened already."""

    works: list[tuple[int, Work]]
    opened: OpenedGroup | None


def _record_of(work: Work, outcome: Outcome) -> dict[str, Any]:
    return {
        "id": work.job.id,
        "key": work.key,
        "status": "done" if outcome.error is None else "failed",
        "task": work.job.task,
        "job": work.job.to_dict(),
        "files": [file.to_dict() for file in work.files],
        "started_at": outcome.started_at,
        "seconds": round(outcome.seconds, 6),
        "shared_with": outcome.shared_with,
        "copy_of": None,
        "warnings": outcome.warnings,
        "error": outcome.error,
        "results": outcome.results,
    }


def _copied(record: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """The record of the same work under another id."""
    own = {
        "id": work.job.id,
        "job": work.job.to_dict(),
        "files": [file.to_dict() for file in work.files],
        "seconds": 0.0,
        "shared_with": None,
        "copy_of": record["copy_of"] or record["id"],
    }
    return {name: value for name, value in {**record, **own}.items() if name != "schema"}
