"""A list of the keys of all work that was ever done, which several outputs may share."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from keyecli.errors import KeyeError, UsageError

_KEY = re.compile(rb"[0-9a-f]{64}")


class Archive:
    """A file with a key a line. Several processes may add to it; each knows what was there when it opened it."""

    def __init__(self, path: Path) -> None:
        """UsageError: a place that cannot be written to, a file that holds other things."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(
                f"cannot write {path}: {error.strerror}; give another file with --archive"
            ) from error
        *lines, last = path.read_bytes().split(b"\n")
        if not all(_KEY.fullmatch(line) for line in lines) or not re.fullmatch(rb"[0-9a-f]{0,64}", last):
            self.close()
            raise UsageError(f"{path} is no archive of keye batch: give another file with --archive")
        self._keys = {line.decode() for line in lines}

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def close(self) -> None:
        os.close(self._descriptor)

    def add(self, key: str) -> None:
        """Write a key that is not there yet; KeyeError when the disk does not take it."""
        if key in self._keys:
            return
        self._keys.add(key)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._descriptor).st_size
            # A line that a killed process left unfinished is cut off: nobody is writing it now.
            os.ftruncate(self._descriptor, size - size % (len(key) + 1))
            os.write(self._descriptor, key.encode() + b"\n")
            os.fsync(self._descriptor)
        except OSError as error:
            raise KeyeError(f"cannot write {self.path}: {error.strerror}") from error
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
