"""The records of a data file, at random and without the file in memory: JSON lines, a JSON array, Parquet."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from keyecli.errors import InputError, UsageError
from keyecli.training.rows import RowError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_MARK = b"PAR1"
_GZIP_MARK = b"\x1f\x8b"
_HEAD_BYTES = 4096
_SPACE = " \t\r\n"


class Records(Protocol):
    """What a file holds, numbered from 0. `line`: from 1 on; errors of a record leave it to others to say which."""

    path: Path

    def __len__(self) -> int: ...

    def line(self, number: int) -> int: ...

    def raw(self, number: int) -> bytes: ...

    def value(self, number: int) -> dict[str, Any]:
        """The record; RowError for one that is no JSON object."""

    @property
    def sha256(self) -> str:
        """Of the file's content, in hexadecimal digits."""


class TextRecords:
    """JSON objects in a text file: where each begins, how long it is, and its line, 24 bytes a record.

    is_array: the file is one JSON array, else it has an object a line.
    """

    def __init__(self, path: Path, *, is_array: bool) -> None:
        self.path = path
        self.is_array = is_array
        self._begins, self._lengths, self._lines = array("q"), array("q"), array("q")
        for begin, length, line in _array_places(path) if is_array else _line_places(path):
            self._begins.append(begin)
            self._lengths.append(length)
            self._lines.append(line)

    def __len__(self) -> int:
        return len(self._begins)

    def line(self, number: int) -> int:
        return self._lines[number]

    def raw(self, number: int) -> bytes:
        """A record as its bytes stand in the file, without a line end."""
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(self._begins[number])
            return file.read(self._lengths[number])

    def value(self, number: int) -> dict[str, Any]:
        """The record; RowError for one that is no JSON object."""
        try:
            value = json.loads(self.raw(number).decode("utf-8"))
        except UnicodeDecodeError:
            raise RowError("the line is not UTF-8 text") from None
        except RecursionError:
            raise RowError("the row is nested too deeply to be read") from None
        except ValueError as error:
            raise RowError(f"the line is not JSON: {_reason(error)}") from None
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return {"messages": value}  # a conversation without columns, as for qwen-vl-utils
        if not isinstance(value, dict):
            raise RowError(f"a row is a JSON object with columns, not {_kind(value)}")
        return value

    @cached_property
    def sha256(self) -> str:
        return _digest(self.path)


class ParquetRecords:
    """The rows of a Parquet file, a row group at a time in memory. Their numbers, from 1 on, stand for lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import pyarrow.parquet
        except ImportError:
            raise UsageError(f"{path} is Parquet, which needs pyarrow: pip install pyarrow") from None
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path} cannot be read as Parquet: {_reason(error)}") from error
        groups = self._file.metadata.num_row_groups
        self._ends: list[int] = []
        for group in range(groups):
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + self._file.metadata.row_group(group).num_rows)
        self._group, self._rows = -1, []  # type: int, list[dict[str, Any]]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[type[ParquetRecords], tuple[Path]]:
        """An open file does not go to another process; that one opens its own."""
        return ParquetRecords, (self.path,)

    def line(self, number: int) -> int:
        return number + 1

    def raw(self, number: int) -> bytes:
        """A row as JSON."""
        return json.dumps(self.value(number), ensure_ascii=False, default=str).encode("utf-8")

    def value(self, number: int) -> dict[str, Any]:
        group = next(index for index, end in enumerate(self._ends) if number < end)
        if group != self._group:
            try:
                self._rows = self._file.read_row_group(group).to_pylist()
            except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
                raise RowError(f"the row cannot be read: {_reason(error)}") from error
            self._group = group
        row = self._rows[number - self._ends[group] + len(self._rows)]
        # A table has every column in each row: those that a row does not have are empty.
        return {name: value for name, value in row.items() if value is not None}

    @cached_property
    def sha256(self) -> str:
        return _digest(self.path)


def open_records(path: Path) -> TextRecords | ParquetRecords:
    """The records of a file, by what it holds, not by its name. InputError: missing, a folder, empty, no text, no JSON at all."""
    head = _head(path)
    if head.startswith(_PARQUET_MARK):
        return ParquetRecords(path)
    if head.startswith(_GZIP_MARK):
        raise InputError(f"{path} is compressed with gzip: unpack it first, with gunzip --keep {path}")
    if b"\0" in head:
        raise InputError(f"{path} is not text: training data is JSON lines, a JSON array or Parquet")
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not text:
        raise InputError(f"{path} has no rows: the file is empty")
    records = TextRecords(path, is_array=text.startswith(b"["))
    if not len(records):
        raise InputError(f"{path} has no rows: its list is empty")
    if not records.is_array and not text.startswith(b"{"):
        _require_an_object(records)
    return records


def read_json(path: Path) -> Any:
    """The one JSON value of a whole small file. InputError when it cannot be read."""
    with _reading(path):
        content = path.read_bytes()
    try:
        return json.loads(content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {_reason(error)}") from None


def _require_an_object(records: TextRecords) -> None:
    """InputError unless some line is a row: one that is broken is told by itself, a file of none is another kind of file."""
    for number in range(len(records)):
        try:
            records.value(number)
        except RowError:
            continue
        return
    raise InputError(
        f"{records.path} is not JSON: training data has a JSON object a line, or is one list of them"
    )


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the data file in it")
    with _reading(path), path.open("rb") as file:
        return file.read(_HEAD_BYTES)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the system says about a file into a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _line_places(path: Path) -> Iterator[tuple[int, int, int]]:
    """(begin, length, line) of every line that is not empty; bytes, counted from 0, lines from 1."""
    begin = 0
    with _reading(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            skipped = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
            text = line[skipped:].rstrip(b"\r\n")
            if text.strip():
                yield begin + skipped, len(text), number
            begin += len(line)


def _array_places(path: Path) -> Iterator[tuple[int, int, int]]:
    """The same for the items of a JSON array. The file is in memory while it is looked through."""
    with _reading(path):
        content = path.read_bytes()
    mark = len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0
    try:
        text = content[mark:].decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    decoder = json.JSONDecoder()
    at, begin, line, seen = _behind_space(text, text.index("[") + 1), mark, 1, 0
    while text[at : at + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {_reason(error)}") from None
        # Characters become bytes piece by piece, so that nothing is counted twice.
        begin += len(text[seen:at].encode("utf-8"))
        line += text.count("\n", seen, at)
        length = len(text[at:end].encode("utf-8"))
        yield begin, length, line
        begin, line, seen = begin + length, line + text.count("\n", at, end), end
        at = _behind_space(text, end)
        if text[at : at + 1] == ",":
            at = _behind_space(text, at + 1)
            if text[at : at + 1] == "]":
                raise InputError(f"{path} is not JSON: line {line} has a comma behind the last row")
        elif text[at : at + 1] != "]":
            raise InputError(f"{path} is not JSON: line {line} has no comma or ] behind a row")
    if text[at + 1 :].strip():
        raise InputError(f"{path} is not JSON: something follows the end of its list")


def _behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _digest(path: Path) -> str:
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "a text", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return names[type(value)]


def _reason(error: BaseException) -> str:
    """What a library says, as a part of a sentence."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    return text[:1].lower() + text[1:].rstrip(".")
