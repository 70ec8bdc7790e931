"""The Hugging Face cache of one model, in its ordinary layout: blobs by checksum, snapshots by commit, refs by name."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from keyecli.hub.listing import Algorithm, RemoteFile

READ_BYTES = 2**20
PARTIAL_SUFFIX = ".incomplete"


class ModelCache:
    """Where the files of the model `name` lie below HF_HUB_CACHE; nothing is made before it is needed."""

    def __init__(self, name: str) -> None:
        self.root = Path(constants.HF_HUB_CACHE).expanduser()
        folder = "models--" + name.replace("/", "--")
        self.folder = self.root / folder
        self._locks = self.root / ".locks" / folder

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / file.checksum

    def partial(self, file: RemoteFile) -> Path:
        """What has arrived of a file, until it is whole and verified."""
        return self.folder / "blobs" / (file.checksum + PARTIAL_SUFFIX)

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def find(self, commit: str, file: RemoteFile) -> Path | None:
        """The file where it is already here with the size it should have: its blob, or a copy in the snapshot."""
        for path in (self.blob(file), self.snapshot(commit) / file.path):
            if path.is_file() and path.stat().st_size == file.bytes:
                return path
        return None

    def partial_bytes(self, file: RemoteFile) -> int:
        path = self.partial(file)
        return min(path.stat().st_size, file.bytes) if path.is_file() else 0

    def prepare(self) -> None:
        """Make the folders that every reader of the cache expects of a model."""
        for path in (self.folder / "blobs", self.folder / "snapshots", self._locks):
            path.mkdir(parents=True, exist_ok=True)

    def remove(self, commit: str, file: RemoteFile) -> None:
        """Forget a file that is not what it should be."""
        for path in (self.blob(file), self.snapshot(commit) / file.path):
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, file: RemoteFile) -> Iterator[None]:
        """One process at a time writes a blob; the lock is the one that huggingface_hub takes too."""
        with WeakFileLock(self._locks / f"{file.checksum}.lock"):
            yield

    def place(self, commit: str, file: RemoteFile) -> None:
        """Show a whole blob under its name in the snapshot; moved there where the disk knows no symbolic links."""
        pointer = self.snapshot(commit) / file.path
        blob = self.blob(file)
        if not blob.is_file():  # a copy stands in the snapshot already
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        if pointer.exists() and pointer.samefile(blob):
            return
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(Path(os.path.relpath(blob, pointer.parent)))
        except OSError:
            shutil.move(blob, pointer)

    def point(self, revision: str, commit: str) -> None:
        """From now on `revision` means `commit`: the last step, so that a name never leads to a part of a model."""
        if revision == commit:
            return
        ref = self.folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh = ref.with_name(f".{ref.name}.{os.getpid()}.tmp")
        try:
            fresh.write_text(commit, encoding="utf-8")
            fresh.replace(ref)
        finally:
            fresh.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Room on the disk that holds the cache, or will."""
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def new_digest(algorithm: Algorithm, size: int) -> hashlib._Hash:
    """A hash object for a file of `size` bytes; git hashes a header before the content."""
    if algorithm == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def checksum_of(path: Path, algorithm: Algorithm, on_bytes: Callable[[int], None]) -> str:
    """The checksum of a whole file, read piece by piece; `on_bytes` is told the size of each."""
    digest = new_digest(algorithm, path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def size_text(count: int) -> str:
    """A file's size for a reader: "23.1 GiB", "4.0 MiB", "712 bytes"."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
