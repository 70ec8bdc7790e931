"""One file from the hub to its blob: continued where it stopped, hashed while it arrives, kept only when the hash is right."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from keyecli import __version__
from keyecli.errors import ExitCode, KeyeError
from keyecli.hub.cache import READ_BYTES, ModelCache, new_digest, size_text
from keyecli.hub.listing import Listing, RemoteFile, explaining
from keyecli.model.shards import one_line

# Before each attempt that follows one without a new byte; when they are used up the pull gives up.
WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0)
TRY_AGAIN_STATUSES = (408, 429, 500, 502, 503, 504)
PARTIAL_CONTENT = 206

OnBytes = Callable[[int], None]
"""Told how many more bytes of a file are here; a negative number takes back what turned out to be of no use."""


class Stopped(Exception):
    """The transfer was told to stop; what has arrived is kept for the next one."""


class DiskSpaceError(KeyeError):
    """Not enough room on a disk; the message says what is needed and what there is."""

    exit_code = ExitCode.MEMORY


class DamagedError(KeyeError):
    """What arrived is not what the hub lists; it has been removed."""


class Partial:
    """The beginning of a file on the disk together with its hash; opened, it takes the bytes that follow."""

    def __init__(self, cache: ModelCache, file: RemoteFile, stop: Event) -> None:
        self.file = file
        self.path = cache.partial(file)
        self.have = 0
        self._stop = stop
        self._digest = new_digest(file.algorithm, file.bytes)
        self._stream = self.path.open("ab+")
        self._stream.seek(0)
        while piece := self._stream.read(READ_BYTES):
            self._count(piece)
        if self.have > file.bytes:
            self.restart()

    def add(self, piece: bytes) -> None:
        self._stream.write(piece)
        self._count(piece)

    def restart(self) -> None:
        """Forget everything: it does not belong to what comes now."""
        self._stream.truncate(0)
        self._digest = new_digest(self.file.algorithm, self.file.bytes)
        self.have = 0

    def checksum(self) -> str:
        return self._digest.hexdigest()

    def save(self) -> None:
        """Bytes on the disk for good, before the file gets its name."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()

    def _count(self, piece: bytes) -> None:
        if self._stop.is_set():
            raise Stopped
        self._digest.update(piece)
        self.have += len(piece)


def fetch(cache: ModelCache, listing: Listing, file: RemoteFile, on_bytes: OnBytes, stop: Event) -> None:
    """Bring `file` to its blob; nothing to do when it is there.

    `on_bytes` counts from what `cache.partial_bytes` said before. KeyeError: the connection breaks again and again without
    a new byte, or what arrived has another checksum (then nothing of it is kept); DiskSpaceError: the disk is full; Stopped.
    """
    with cache.locked(file), _writing(cache, file):
        before = cache.partial_bytes(file)
        if cache.find(listing.commit, file) is not None:  # another process was faster
            on_bytes(file.bytes - before)
            return
        try:
            _complete(cache, listing, file, on_bytes, stop)
        except DamagedError:
            # The beginning was from an earlier run and may be what is wrong: once more, from the first byte.
            if not before:
                raise
            _complete(cache, listing, file, on_bytes, stop)


def _complete(cache: ModelCache, listing: Listing, file: RemoteFile, on_bytes: OnBytes, stop: Event) -> None:
    """Fetch what is missing of the partial file, compare, and give it the blob's name."""
    partial = Partial(cache, file, stop)
    try:
        failures = 0
        while partial.have < file.bytes:
            before = partial.have
            problem = _attempt(partial, listing, on_bytes)
            failures = 0 if partial.have != before else failures + 1
            if failures == len(WAITS_S):
                raise problem
            if stop.wait(WAITS_S[failures]):
                raise Stopped
        partial.save()
    finally:
        partial.close()
    if partial.checksum() != file.checksum:
        partial.path.unlink()
        on_bytes(-file.bytes)
        raise DamagedError(
            f"{file.path} arrived damaged (its {file.algorithm} is {partial.checksum()}, and {listing.endpoint} lists "
            f"{file.checksum}): nothing of it was kept, pull again"
        )
    partial.path.replace(cache.blob(file))


def _attempt(partial: Partial, listing: Listing, on_bytes: OnBytes) -> KeyeError:
    """Ask for the rest and take what comes; the answer says why there was no more, if there was not.

    KeyeError at once for a refusal that another attempt would meet again.
    """
    file, start = partial.file, partial.have
    url = hf_hub_url(listing.name, file.path, revision=listing.commit, endpoint=listing.endpoint)
    headers = build_hf_headers(library_name="keyecli", library_version=__version__)
    # Compressed on the way, a part could not be put behind another.
    headers["Accept-Encoding"] = "identity"
    if start:
        headers["Range"] = f"bytes={start}-"
    reason = "it ended early"
    try:
        with explaining(listing.name, listing.revision):
            try:
                with get_session().stream(
                    "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
                ) as response:
                    hf_raise_for_status(response)
                    if start and response.status_code != PARTIAL_CONTENT:  # the whole file again
                        partial.restart()
                        on_bytes(-start)
                    # Pieces as they come: gathered into larger ones, the last would be lost with the connection.
                    for piece in response.iter_bytes():
                        piece = piece[: file.bytes - partial.have]
                        partial.add(piece)
                        on_bytes(len(piece))
                        if partial.have == file.bytes:
                            break
            except HfHubHTTPError as error:
                if error.response.status_code not in TRY_AGAIN_STATUSES:
                    raise
                reason = f"error {error.response.status_code}"
    except KeyeError as error:
        if not isinstance(error.__cause__, HTTPError) or isinstance(error.__cause__, HfHubHTTPError):
            raise
        reason = one_line(error.__cause__) or type(error.__cause__).__name__
    return KeyeError(
        f"{file.path} could not be fetched from {listing.endpoint} to its end ({reason}): what has arrived is kept, "
        "the same command goes on from there"
    )


@contextmanager
def _writing(cache: ModelCache, file: RemoteFile) -> Iterator[None]:
    """What the system says about the cache's disk becomes a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            missing = file.bytes - cache.partial_bytes(file)
            raise DiskSpaceError(
                f"the disk of {cache.root} is full: {size_text(missing)} of {file.path} are still to come and "
                f"{size_text(cache.free_bytes())} are free; make room and pull again, what has arrived is kept"
            ) from error
        raise KeyeError(
            f"cannot write to {cache.root} ({error.strerror or error}): check its permissions, or set HF_HOME to another "
            "folder"
        ) from error
