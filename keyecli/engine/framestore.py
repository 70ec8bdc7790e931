"""The folder of encoded frames: which entries there are, what they take, which go; and what files hold, by their hash.

An entry is a folder: `entry.json`, which describes it, and shards of embeddings. It is written under another name and renamed
when it is complete, and renamed again before it is removed, so that several processes may share the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from keyecli.settings import cache_folder

DEFAULT_BYTES = 10 * 2**30
DESCRIPTION = "entry.json"
STALE_S = 24 * 3600.0  # after which what an interrupted process left behind is removed
REMEMBERED_FILES = 4096
_BLOCK_BYTES = 2**20
_UNFINISHED = "unfinished-"


@dataclass(frozen=True)
class Entry:
    """One clip's encoded frames as `keye cache` lists them: `bytes` on disk, `used_at` in seconds since 1970."""

    folder: Path
    clip: str
    model: str
    frames: int
    tokens: int
    bytes: int
    used_at: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class FileState:
    """By these a file is taken for the one whose content was hashed before."""

    path: str
    size: int
    modified_ns: int
    inode: int


class FrameStore:
    """Entries in a folder, at most `limit_bytes` of them together; the least recently used go first.

    folder: `frames` below `keyecli.settings.cache_folder()` when None, looked up at each use.
    """

    def __init__(self, limit_bytes: int = DEFAULT_BYTES, folder: Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where the entries are; it need not exist."""
        return self._folder or cache_folder() / "frames"

    @property
    def _notes(self) -> Path:
        """Where the hashes of files are remembered."""
        return self.folder.parent / "files"

    def fresh_folder(self) -> Path:
        """A new place that nobody looks for, to fill and then to rename; it is not made."""
        return self.folder / f"{_UNFINISHED}{uuid4().hex}"

    def place_of(self, how: str, size: int, content: str) -> Path:
        """The folder of an entry: `how` it was encoded, and the size and sha256 of the file."""
        return self.folder / f"{how}-{size}-{content[:32]}"

    def entries(self) -> list[Entry]:
        """What is kept, the most recently used first."""
        found = []
        for folder in self._folders():
            try:
                said = json.loads((folder / DESCRIPTION).read_bytes())
                found.append(
                    Entry(
                        folder, str(said["clip"]), str(said["model"]), int(said["frames"]), int(said["tokens"]),
                        _size_of(folder), folder.stat().st_mtime,
                    )
                )  # fmt: skip
            except (OSError, ValueError, KeyError, TypeError):
                # Gone meanwhile, or damaged: then it is listed, so that it can be removed.
                with suppress(OSError):
                    found.append(Entry(folder, "", "", 0, 0, _size_of(folder), folder.stat().st_mtime))
        return sorted(found, key=lambda entry: entry.used_at, reverse=True)

    def remove(self, entry: Path) -> None:
        """Take an entry's folder away at once; a run that reads it decodes the rest. OSError when that is not allowed."""
        doomed = self.fresh_folder()
        with suppress(FileNotFoundError):
            entry.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def forget_files(self) -> None:
        """Forget the content of every file that was read."""
        for path in self._remembered():
            path.unlink(missing_ok=True)

    def trim(self) -> None:
        """Remove entries beyond the limit, and what interrupted processes left behind."""
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        while entries and total > self.limit_bytes:
            oldest = entries.pop()
            self.remove(oldest.folder)
            total -= oldest.bytes
        old = time.time() - STALE_S
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            with suppress(OSError):
                if left.stat().st_mtime < old:
                    shutil.rmtree(left, ignore_errors=True)
        for path in self._remembered()[REMEMBERED_FILES:]:
            path.unlink(missing_ok=True)

    def content_of(self, state: FileState, stop: threading.Event | None = None) -> str | None:
        """The sha256 of a file, remembered while its size, time and place on the disk stay; None when it changes meanwhile
        or `stop` is set."""
        note = self._notes / f"{sha256_of(os.fsencode(state.path))[:32]}.json"
        try:
            said = json.loads(note.read_bytes())
            if said["state"] == asdict(state):
                return str(said["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = hashlib.sha256()
        with Path(state.path).open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                if stop is not None and stop.is_set():
                    return None
                digest.update(block)
        if state_of(Path(state.path)) != state:
            return None
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh = note.with_name(f"{_UNFINISHED}{uuid4().hex}")
        fresh.write_text(json.dumps({"state": asdict(state), "sha256": digest.hexdigest()}))
        fresh.replace(note)
        return digest.hexdigest()

    def _folders(self) -> list[Path]:
        with suppress(OSError):
            return [
                path
                for path in self.folder.iterdir()
                if path.is_dir() and not path.name.startswith(_UNFINISHED)
            ]
        return []

    def _remembered(self) -> list[Path]:
        """The notes about files, the newest first."""
        notes = []
        for path in self._notes.glob("*"):
            with suppress(OSError):
                notes.append((path.stat().st_mtime, path))
        return [path for _, path in sorted(notes, reverse=True)]


def state_of(path: Path) -> FileState | None:
    """None for what is no ordinary file: reading a pipe would take away what is in it."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return FileState(os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ino)  # noqa: PTH100


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
