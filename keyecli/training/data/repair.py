"""The good rows of a data file in a file of their own: unchanged where nothing is wrong, repaired where that is beyond doubt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from keyecli.errors import InputError, KeyeError
from keyecli.export.files import check_writable
from keyecli.training.data.answers import spans_in_list
from keyecli.training.data.check import RowCheck, TextFix
from keyecli.training.data.records import TextRecords
from keyecli.training.data.source import DataFile
from keyecli.training.rows import RowError


class GoodRows:
    """Writes records as their checks come, in order; the file is there under its name only when all went well.

    JSON lines keep their bytes and an array stays one; Parquet becomes JSON lines. Used as a context: leaving it by an
    exception, or without a good row, writes nothing.
    """

    def __init__(self, data: DataFile, out: Path, *, overwrite: bool = False) -> None:
        """UsageError for a file that is there (without `overwrite`), or cannot be written."""
        check_writable([out], overwrite=overwrite)
        self.out = out
        self.rows, self.repaired = 0, 0
        self._data = data
        self._is_array = isinstance(data.records, TextRecords) and data.records.is_array
        self._part = out.with_name(f".{out.name}.part")
        self._file: IO[bytes] | None = None
        self._waiting: list[RowCheck] = []

    def __enter__(self) -> Self:
        try:
            self._file = self._part.open("wb")
        except OSError as error:
            raise KeyeError(f"cannot write to {self._part.parent}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if error is None:
                self._finish()
        except OSError as failure:
            raise KeyeError(f"{self.out} cannot be written: {failure.strerror}") from failure
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)

    def add(self, check: RowCheck) -> None:
        """The next row's check; rows of one record come one behind the other."""
        if self._waiting and self._record(self._waiting[0]) != self._record(check):
            self._write()
        self._waiting.append(check)

    def _finish(self) -> None:
        assert self._file is not None
        if self._waiting:
            self._write()
        if not self.rows:
            raise InputError(f"{self._data.path} has no good row, so that {self.out} was not written")
        if self._is_array:
            self._file.write(b"\n]\n")
        self._file.close()
        self._part.replace(self.out)

    def _write(self) -> None:
        """The record of the waiting checks, as far as it is good."""
        assert self._file is not None
        checks, self._waiting = self._waiting, []
        kept = [check for check in checks if check.usable]
        if not kept:
            return
        repaired = sum(bool(check.findings) for check in kept)
        if repaired or len(kept) < len(checks):
            text = self._changed(checks, kept)
            if text is None:
                return
        else:
            text = self._data.records.raw(self._record(kept[0]))
        begin = (b",\n" if self.rows else b"[\n") if self._is_array else b""
        try:
            self._file.write(begin + text + (b"" if self._is_array else b"\n"))
        except OSError as error:
            raise KeyeError(f"{self.out} cannot be written: {error.strerror}") from error
        self.rows += len(kept)
        self.repaired += repaired

    def _changed(self, checks: list[RowCheck], kept: list[RowCheck]) -> bytes | None:
        """The record without its bad events, answers repaired; None when an answer is not found where it must be."""
        try:
            value = self._data.records.value(self._record(kept[0]))
        except RowError:
            return None
        if "events" in value and len(value["events"]) == len(checks):
            numbers = {self._data.place(check.number)[1]: bool(check.findings) for check in kept}
            events = [
                _forward(value["events"][number]) if fixed else value["events"][number]
                for number, fixed in numbers.items()
            ]
            return _text({**value, "events": events})
        for fix in dict.fromkeys(
            finding.fix for check in kept for finding in check.findings if finding.fix is not None
        ):
            changed = _forward(value) if "span" in value else _replaced(value, fix)
            if changed == value:
                return None
            value = changed
        return _text(value)

    def _record(self, check: RowCheck) -> int:
        return self._data.place(check.number)[0]


def _forward(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event whose spans run forward."""
    span = event["span"]
    right = (
        sorted(span)
        if all(isinstance(edge, int | float) for edge in span)
        else [sorted(pair) for pair in span]
    )
    return {**event, "span": right}


def _replaced(value: Any, fix: TextFix) -> Any:
    """`value` with the new answer wherever the old one stands: alone, behind its reasoning, or as a list of spans."""
    if isinstance(value, str):
        stripped = value.rstrip()
        behind_thought = stripped.startswith("<think>") and stripped.endswith(fix.old)
        if stripped.strip() == fix.old or behind_thought:
            end = len(stripped)
            return value[: end - len(fix.old)] + fix.new + value[end:]
        return value
    if isinstance(value, dict):
        return {key: _replaced(item, fix) for key, item in value.items()}
    if isinstance(value, list):
        old, new = spans_in_list(fix.old), spans_in_list(fix.new)
        if old and new and value == [list(span) for span in old]:
            return [list(span) for span in new]
        return [_replaced(item, fix) for item in value]
    return value


def _text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
