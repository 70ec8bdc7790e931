"""A data file as training rows, at random: any of the known forms, told apart by their columns, with their videos found."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keyecli.errors import InputError, UsageError
from keyecli.training.data.dataset_info import DatasetEntry, find_entry
from keyecli.training.data.records import ParquetRecords, TextRecords, open_records
from keyecli.training.data.shapes import FORMATS, draft_of, shape_of
from keyecli.training.data.timelens import events_of
from keyecli.training.data.turns import DEFAULT_TAGS
from keyecli.training.data.visuals import messages_of
from keyecli.training.rows import RowError, TrainingRow


class DataFile:
    """The rows of a file, numbered from 0. Only where each begins is in memory.

    A record of the file is one row, but for those of TimeLens, which are one for each of their events. entry: what a
    dataset_info.json says about the file. media_root: what relative paths in the rows count from.
    """

    def __init__(
        self,
        records: TextRecords | ParquetRecords,
        *,
        format: str | None = None,
        entry: DatasetEntry | None = None,
        media_root: Path | None = None,
    ) -> None:
        self.records = records
        self.path = records.path
        self.format = format
        self.entry = entry
        self.media_root = self.path.parent if media_root is None else media_root
        self._record_of, self._part_of = array("q"), array("q")  # empty: each record is a row
        if self._has_events():
            self._take_apart()

    def __len__(self) -> int:
        return len(self._record_of) or len(self.records)

    @property
    def sha256(self) -> str:
        """Of the file's content, in hexadecimal digits."""
        return self.records.sha256

    def place(self, number: int) -> tuple[int, int]:
        """The record of a row, and which of its events the row is; both from 0 on."""
        return (self._record_of[number], self._part_of[number]) if self._record_of else (number, 0)

    def line(self, number: int) -> int:
        """The line of a row in the file, from 1 on."""
        return self.records.line(self.place(number)[0])

    def source(self, number: int) -> str:
        """What to call a row: "data.jsonl:17", or "data.jsonl:17 event 2"."""
        record, part = self.place(number)
        shared = self._record_of and record in (
            self._record_of[number - 1] if number else None,
            self._record_of[number + 1] if number + 1 < len(self) else None,
        )
        return f"{self.path}:{self.records.line(record)}" + (f" event {part + 1}" if shared else "")

    def row(self, number: int) -> TrainingRow:
        """A row. RowError, which names it, when it cannot be understood."""
        record, part = self.place(number)
        source = self.source(number)
        try:
            return self._row(self.records.value(record), part, source)
        except RowError as error:
            raise type(error)(f"{source}: {error}") from None

    def rows(self) -> Iterator[TrainingRow | RowError]:
        """All rows in order; in the place of one that cannot be understood, why."""
        for number in range(len(self)):
            try:
                yield self.row(number)
            except RowError as error:
                yield error

    def _row(self, value: dict[str, Any], part: int, source: str) -> TrainingRow:
        if self.entry is None:
            shape, tags = shape_of(value, self.format), DEFAULT_TAGS
        else:
            value = self.entry.renamed(value)
            shape, tags = self.entry.shape, self.entry.tags
            self._require_columns(value)
        if shape == "timelens" and not self._record_of and len(events_of(value)) > 1:
            raise RowError(
                "a row with events stands among rows of other forms: give those with events a file of their own"
            )
        draft = draft_of(value, shape, part, tags)
        return TrainingRow(source, messages_of(draft, self.media_root), draft.extra)

    def _require_columns(self, value: dict[str, Any]) -> None:
        assert self.entry is not None
        needed = ("conversations",) if self.entry.shape == "conversations" else ("instruction", "output")
        for column in needed:
            if column not in value:
                name = self.entry.columns[column]
                raise RowError(f"the row has no column {name}, in which {self.entry.name} keeps its {column}")

    def _has_events(self) -> bool:
        """Whether the first record that can be read is one of TimeLens."""
        if self.entry is not None or self.format not in (None, "timelens"):
            return False
        for number in range(len(self.records)):
            try:
                return shape_of(self.records.value(number), self.format) == "timelens"
            except RowError:
                continue
        return False

    def _take_apart(self) -> None:
        for number in range(len(self.records)):
            try:
                parts = len(events_of(self.records.value(number)))
            except (RowError, KeyError):
                parts = 1  # and reading it says what is wrong
            self._record_of.extend([number] * parts)
            self._part_of.extend(range(parts))


def open_data(
    path: str | Path,
    *,
    format: str | None = None,
    dataset: str | None = None,
    media_root: str | Path | None = None,
) -> DataFile:
    """A data file: JSON lines, a JSON array or Parquet, or a dataset_info.json, whose data set is called `dataset`.

    `format` is one of FORMATS, None: told by each row's columns. UsageError: a format or data set that is not known, a
    `media_root` that is no folder; InputError: a file that cannot be read, has no rows, or is not of these kinds. A
    row that is wrong is told when it is read.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise UsageError(f"there is no format {format}; known are {', '.join(FORMATS)}")
    root = None if media_root is None else Path(media_root)
    if root is not None and not root.is_dir():
        raise UsageError(f"--media-root {root} is not a folder: give the one that the rows' paths count from")
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path")
    entry = None if format is not None and dataset is None else find_entry(path, dataset)
    records = open_records(path if entry is None else entry.path)
    return DataFile(records, format=format, entry=entry, media_root=root)
