"""`keye pull` without its words: what is here, what is missing, whether it fits, then fetch, verify and show the model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, Literal

from keyecli.hub.cache import ModelCache, checksum_of, size_text
from keyecli.hub.choose import LeftOut, choose
from keyecli.hub.listing import Listing, RemoteFile, list_files
from keyecli.hub.transfer import DiskSpaceError, Stopped, fetch
from keyecli.hub.whole import require_whole
from keyecli.model.companions import load_config
from keyecli.model.shards import CONFIG_FILE

CONNECTIONS = 4
REPORT_EVERY_S = 0.1

State = Literal["missing", "partial", "here", "fetched", "resumed", "verified"]
"""Of a plan: nothing of it is here, a part, all. After a pull: fetched whole, in parts, or here before and read again."""

OnProgress = Callable[[str, float, float | None], None]
OnFile = Callable[[RemoteFile, State], None]


@dataclass(frozen=True)
class PlannedFile:
    """A file to have, what there is of it, and how many of its bytes are here."""

    file: RemoteFile
    state: State
    here_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.file.path,
            "bytes": self.file.bytes,
            self.file.algorithm.replace("-", "_"): self.file.checksum,
            "state": self.state,
        }


@dataclass(frozen=True)
class PullPlan:
    """Everything known before a byte is fetched. `folder` is where the model will stand, `free_bytes` the disk's room."""

    listing: Listing
    files: tuple[PlannedFile, ...]
    left_out: tuple[LeftOut, ...]
    folder: Path
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(item.file.bytes for item in self.files)

    @property
    def needed_bytes(self) -> int:
        """What is still to be fetched."""
        return self.total_bytes - sum(item.here_bytes for item in self.files)

    def check(self) -> None:
        """DiskSpaceError when what is missing does not fit on the disk."""
        if self.needed_bytes > self.free_bytes:
            raise DiskSpaceError(
                f"{self.listing.name} needs {size_text(self.needed_bytes)} more on the disk of {self.folder.parents[2]} and "
                f"{size_text(self.free_bytes)} are free: make room, or set HF_HOME to a folder on a larger disk"
            )


@dataclass(frozen=True)
class Pulled:
    """A model that is whole and verified in the cache, and what became of each of its files."""

    plan: PullPlan
    files: tuple[PlannedFile, ...]
    seconds: float


def plan_pull(name: str, revision: str | None = None) -> PullPlan:
    """Ask the hub what `name` is made of and compare with the cache; nothing is written. Errors: `list_files`, `choose`."""
    listing = list_files(name, revision)
    wanted, left = choose(listing)
    cache = ModelCache(name)
    files = tuple(_look(cache, listing.commit, file) for file in wanted)
    return PullPlan(listing, files, left, cache.snapshot(listing.commit), cache.free_bytes())


def pull(
    plan: PullPlan,
    *,
    verify: bool = False,
    on_progress: OnProgress | None = None,
    on_file: OnFile | None = None,
) -> Pulled:
    """Fetch what is missing and show the model in the cache under its commit and its revision.

    Every file that arrives is verified; with `verify` those already here are read again too, and fetched again when they
    are damaged. The configuration comes first: another kind of model is a ModelError before its weights are fetched. The
    revision is written last, so that a name never leads to a part of a model. Errors besides: `fetch`, `require_whole`.
    """
    plan.check()
    begin = time.perf_counter()
    cache = ModelCache(plan.listing.name)
    cache.prepare()
    work = _Work(plan, cache, verify, on_progress, on_file)
    work.run([item for item in plan.files if item.file.path == CONFIG_FILE])
    _require_family(cache, plan)
    work.run([item for item in plan.files if item.file.path != CONFIG_FILE])
    for item in plan.files:
        cache.place(plan.listing.commit, item.file)
    require_whole(plan.folder)
    cache.point(plan.listing.revision, plan.listing.commit)
    return Pulled(plan, tuple(work.done[item.file.path] for item in plan.files), time.perf_counter() - begin)


class _Work:
    """Files being brought here over several connections, and how far that is."""

    def __init__(
        self,
        plan: PullPlan,
        cache: ModelCache,
        verify: bool,
        on_progress: OnProgress | None,
        on_file: OnFile | None,
    ) -> None:
        self.done: dict[str, PlannedFile] = {}
        self._plan, self._cache, self._verify = plan, cache, verify
        self._on_progress, self._on_file = on_progress, on_file
        self._arrived = 0 if verify else sum(item.here_bytes for item in plan.files)
        self._stop, self._lock = Event(), Lock()
        self._next_report = 0.0

    def run(self, items: Sequence[PlannedFile]) -> None:
        """Bring all of them; the first that fails stops the others, which keep what they have."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                for future in as_completed([pool.submit(self._bring, item) for item in items]):
                    item = future.result()
                    self.done[item.file.path] = item
                    if self._on_file is not None:
                        self._on_file(item.file, item.state)
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _bring(self, item: PlannedFile) -> PlannedFile:
        file, commit = item.file, self._plan.listing.commit
        state: State = item.state
        if state == "here" and self._verify:
            path = self._cache.find(commit, file)
            if path is not None and checksum_of(path, file.algorithm, self._count) == file.checksum:
                return PlannedFile(file, "verified", file.bytes)
            self._count(-file.bytes)
            self._cache.remove(commit, file)
            state = "missing"
        elif self._verify:
            self._count(item.here_bytes)
        if state == "here":
            return item
        fetch(self._cache, self._plan.listing, file, self._count, self._stop)
        return PlannedFile(file, "resumed" if state == "partial" else "fetched", file.bytes)

    def _count(self, more: int) -> None:
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            self._arrived += more
            now, total = time.monotonic(), self._plan.total_bytes
            if self._on_progress is None or (now < self._next_report and self._arrived < total):
                return
            self._next_report = now + REPORT_EVERY_S
            self._on_progress(f"{size_text(self._arrived)} of {size_text(total)}", self._arrived, total)


def _look(cache: ModelCache, commit: str, file: RemoteFile) -> PlannedFile:
    if cache.find(commit, file) is not None:
        return PlannedFile(file, "here", file.bytes)
    partial = cache.partial_bytes(file)
    return PlannedFile(file, "partial" if partial else "missing", partial)


def _require_family(cache: ModelCache, plan: PullPlan) -> None:
    """ModelError when the configuration describes another kind of model; read where nobody takes it for a model."""
    file = next(item.file for item in plan.files if item.file.path == CONFIG_FILE)
    path = cache.find(plan.listing.commit, file)
    assert path is not None, "the configuration was fetched just now"
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / CONFIG_FILE).write_bytes(path.read_bytes())
        load_config(name)
