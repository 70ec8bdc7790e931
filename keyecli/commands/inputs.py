"""Which files a command is about, where they are not named one by one: patterns, folders, lists."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from keyecli.console import console
from keyecli.errors import InputError

STDIN = "-"
MEDIA_SUFFIXES = {
    ".3gp", ".avi", ".bmp", ".flv", ".gif", ".jpeg", ".jpg", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".ogv", ".png", ".tif", ".tiff", ".ts", ".webm", ".webp", ".wmv",
}  # fmt: skip
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def expand(named: Sequence[str], *, recursive: bool = False) -> list[str]:
    """What was named, in its order, patterns replaced by what matches them and, with `recursive`, folders by their media.

    A pattern is matched as a shell would that was not given it in quotes; ** stands for folders at any depth. InputError:
    one that nothing matches, a folder without `recursive`, without media, or that cannot be read.
    """
    paths: list[str] = []
    for name in named:
        for path in _matches(name):
            if not Path(path).is_dir():
                paths.append(path)
            elif recursive:
                paths += media_below(path)
            else:
                raise InputError(f"{path} is a directory, not a video; name files, or add -r for all in it")
    return paths


def media_below(folder: str) -> list[str]:
    """Files in a folder, and in those below it, that end as media files do, sorted by name; hidden ones are left out.

    Links to folders are not followed. InputError: there is none, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    found: list[str] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(place, name)  # noqa: PTH118  # keeps the folder as it was named, "./" included
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in MEDIA_SUFFIXES
        ]
    if not found:
        raise InputError(f"the folder {folder} holds no videos or images")
    return found


def read_list(source: str) -> Iterator[str]:
    """The paths in a file, or in stdin for "-", one a line, each as soon as its line is there.

    Nothing but line ends and empty lines is left out, so that every name comes through that has no line end in it.
    InputError: a file that cannot be read, which is told at once, or that is no text.
    """
    if source != STDIN:
        try:
            lines = Path(source).read_bytes().splitlines(keepends=True)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the list {source} cannot be read: {reason}") from error
        return _paths(iter(lines), source)
    if sys.stdin.isatty():
        console.notice("type one path a line, then Ctrl-D")
    return _paths(iter(sys.stdin.buffer), "stdin")


def _paths(lines: Iterator[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if b"\0" in line:
            raise InputError(f"line {number} of {name} is no path: a list is text with one path a line")
        path = os.fsdecode(line.removeprefix(_BYTE_ORDER_MARK).rstrip(b"\r\n"))
        if path:
            yield path


def _matches(name: str) -> list[str]:
    if not glob.has_magic(name) or os.path.lexists(name):  # a file's own name may look like a pattern
        return [name]
    found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
    if not found:
        raise InputError(f"{name} does not exist, and as a pattern it matches nothing")
    return found
