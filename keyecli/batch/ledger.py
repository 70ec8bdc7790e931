"""The output that is its own ledger: a line a job, synced to the disk before the next one is begun."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyecli.errors import KeyeError, UsageError

SCHEMA = "keye.batch/1"
BEGINNING = f'{{"schema": "{SCHEMA}"'.encode()
EARLY_SUFFIX = ".early"


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A record as the line that is written of it."""
    full = {"schema": SCHEMA, **record}
    try:
        return json.dumps(full, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half a character, of a file name that is no UTF-8; escapes can say it
        return json.dumps(full).encode("ascii") + b"\n"


class SyncedLines:
    """A file to which whole lines are appended, each on the disk when `append` returns; locked against other writers.

    A last line without its end, left by a process that was killed, is cut off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        """UsageError: a place that cannot be written to, a file that another process writes, one that holds other things."""
        self.path = path
        self.cut_bytes = 0
        new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; give another file with -o") from error
        try:
            self._lock()
            self.end = self._cut_torn_line()
        except BaseException:
            os.close(self._descriptor)
            raise
        if new:
            _sync_folder(path.parent)

    def close(self) -> None:
        """Let go of the file and of its lock."""
        os.close(self._descriptor)

    def append(self, line: bytes) -> int:
        """Write one line with its end and return where it begins; KeyeError when the disk does not take it whole."""
        begin, rest = self.end, memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, begin)
            raise KeyeError(
                f"cannot write {self.path}: {error.strerror}; what is done stands there, make room and start again"
            ) from error
        self.end += len(line)
        return begin

    def read(self, begin: int, length: int) -> bytes:
        """`length` bytes from `begin` on."""
        return os.pread(self._descriptor, length, begin)

    def line_at(self, begin: int) -> bytes:
        """The line that begins there, with its end."""
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.readline()

    def empty(self) -> None:
        """Take away all lines."""
        os.ftruncate(self._descriptor, 0)
        os.fsync(self._descriptor)
        self.end = 0

    def records(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(where the line begins, its length, its record); UsageError for a line that keye batch did not write."""
        begin = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield begin, len(line), parse_record(line, self.path, number)
                begin += len(line)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another keye batch is writing {self.path}: wait for it, or give another file with -o"
            ) from None
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be locked ({error.strerror}): give a file on a disk of this machine with -o"
            ) from error

    def _cut_torn_line(self) -> int:
        size = os.fstat(self._descriptor).st_size
        whole = _end_of_last_line(self._descriptor, size)
        torn = os.pread(self._descriptor, len(BEGINNING), whole)
        # Of another program's file nothing may be taken away. A crash of the machine can leave zeros.
        if torn and not (BEGINNING.startswith(torn) or torn == BEGINNING or not torn.strip(b"\0")):
            raise UsageError(f"{self.path} was not written by keye batch: name another file")
        if size > whole:
            os.ftruncate(self._descriptor, whole)
            self.cut_bytes = size - whole
        return whole


@dataclass(frozen=True)
class Entry:
    """Where a job's last line stands in the ledger, and whether it was done."""

    done: bool
    begin: int
    length: int


class Ledger:
    """What has been done, by (id, key), and where what is done now is written: in the jobs' order, unless `ordered` is off.

    What comes before its turn waits, synced as well, in a file beside the output, whose name ends in `.early`.
    """

    def __init__(self, path: Path, *, ordered: bool = True) -> None:
        """Opens or makes the file. Errors: see `SyncedLines`."""
        self._lines = SyncedLines(path)
        self._ordered = ordered
        self._early: SyncedLines | None = None
        self._early_path = path.with_name(path.name + EARLY_SUFFIX)
        self._next = 0
        self._waiting: dict[int, Entry] = {}  # place → where its line stands in the early file
        self._passed: set[int] = set()  # places behind the next one at which nothing is left to write
        self._held: dict[tuple[str, str], Entry] = {}  # lines of an earlier run whose turn has not come
        self.entries: dict[tuple[str, str], Entry] = {}
        self.files: list[dict[str, Any]] = []
        self._done_keys: dict[str, int] = {}
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        return self._lines.path

    @property
    def cut_bytes(self) -> int:
        """Bytes of a line that was not finished and is gone."""
        return self._lines.cut_bytes

    @property
    def waiting(self) -> int:
        """Lines that wait for their turn."""
        return len(self._held) + len(self._waiting)

    def close(self) -> None:
        self._lines.close()
        if self._early is not None:
            self._early.close()
            if not self.waiting:
                self._early_path.unlink(missing_ok=True)

    def record_of(self, id: str, key: str) -> dict[str, Any]:
        """What the job's last line says; KeyError for one that is not there."""
        entry = self.entries[(id, key)]
        return json.loads(self._lines.read(entry.begin, entry.length))

    def is_done(self, key: str) -> bool:
        """Whether the work stands in the ledger as done, whatever its id."""
        return key in self._done_keys

    def done_under(self, key: str) -> dict[str, Any] | None:
        """A record of the same work, whatever its id."""
        begin = self._done_keys.get(key)
        return None if begin is None else json.loads(self._lines.line_at(begin))

    def status_of(self, id: str, key: str) -> str | None:
        """ "done" or "failed" for a job that has a line, also one that waits for its turn; None for another one."""
        name = (id, key)
        entry = self._held.get(name) or self.entries.get(name)
        return None if entry is None else "done" if entry.done else "failed"

    def keep(self, place: int, id: str, key: str) -> None:
        """The job at this place has a line: the one that stands in the ledger, or the one that waits, which moves there."""
        entry = self._held.pop((id, key), None)
        if entry is not None and not self._ordered:
            self._write_early(entry)
        self._come(place, entry if self._ordered else None)

    def skip(self, place: int) -> None:
        """The job at this place gets no line."""
        self._come(place, None)

    def drop_held(self, id: str, key: str) -> None:
        """Forget a line that waits: its job is tried again."""
        self._held.pop((id, key), None)

    def put(self, place: int, record: Mapping[str, Any]) -> None:
        """Write a record; `place` counts all jobs from 0, and each is put, kept or skipped once."""
        line = encode_record(record)
        if not self._ordered or place == self._next:
            self._write(line)
            self._come(place, None)
            return
        if self._early is None:
            self._early = SyncedLines(self._early_path)
        begin = self._early.append(line)
        self._come(place, Entry(record["status"] == "done", begin, len(line)))

    def finish(self) -> None:
        """Every place has been put: what still waits belongs to jobs that are not asked for any more."""
        for entry in self._held.values():
            self._write_early(entry)
        self._held.clear()

    def _come(self, place: int, entry: Entry | None) -> None:
        """Note what is to stand at a place, None for nothing more, and write all whose turn it is now."""
        if not self._ordered:
            return
        if entry is None:
            self._passed.add(place)
        else:
            self._waiting[place] = entry
        while self._next in self._passed or self._next in self._waiting:
            self._passed.discard(self._next)
            if self._next in self._waiting:
                self._write_early(self._waiting.pop(self._next))
            self._next += 1
        if self._early is not None and self._early.end and not self.waiting:
            self._early.empty()

    def _write_early(self, entry: Entry) -> None:
        assert self._early is not None, "an entry that waits stands in the early file"
        self._write(self._early.read(entry.begin, entry.length))

    def _write(self, line: bytes) -> None:
        begin = self._lines.append(line)
        self._note(begin, len(line), json.loads(line))

    def _read(self) -> None:
        for begin, length, record in self._lines.records():
            self._note(begin, length, record)
            self.files += record["files"]
        if self._early_path.exists():
            self._early = SyncedLines(self._early_path)
            for begin, length, record in self._early.records():
                name = (record["id"], record["key"])
                if name not in self.entries or (record["status"] == "done" and not self.entries[name].done):
                    self._held[name] = Entry(record["status"] == "done", begin, length)
                self.files += record["files"]

    def _note(self, begin: int, length: int, record: Mapping[str, Any]) -> None:
        done = record["status"] == "done"
        self.entries[(record["id"], record["key"])] = Entry(done, begin, length)
        if done:
            self._done_keys.setdefault(record["key"], begin)


def parse_record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """A line's record; UsageError for one that keye batch did not write."""
    try:
        record = json.loads(line)
        if record["schema"] != SCHEMA or record["status"] not in ("done", "failed"):
            raise ValueError
        for name in ("id", "key", "files", "task"):
            record[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(
            f"line {number} of {path} was not written by keye batch: name another file"
        ) from None
    return record


def _end_of_last_line(descriptor: int, size: int) -> int:
    """Where the last whole line ends; 0 when there is none."""
    position, step = size, 65536
    while position:
        begin = max(0, position - step)
        found = os.pread(descriptor, position - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        position = begin
    return 0


def _sync_folder(folder: Path) -> None:
    """Put the name of a new file on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot do that for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
