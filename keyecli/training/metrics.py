"""What a training run tells as it goes: metrics.jsonl, a line for each step, evaluation and sample, and TensorBoard if wanted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from keyecli.errors import InputError, KeyeError, UsageError

SCHEMA = "keye.finetune.metrics/1"


class Metrics:
    """Appends one JSON object a line, each handed to the system when `write` returns.

    resume_step: the last step whose weights a resumed run has; lines of later steps are taken away, since those steps come again.
    None begins an empty file. tensorboard: a folder for its events.
    """

    def __init__(self, path: Path, *, resume_step: int | None, tensorboard: Path | None = None) -> None:
        """UsageError: a place that cannot be written to, a file of another program, TensorBoard that is not installed."""
        self.path = path
        self._writer = None if tensorboard is None else _tensorboard_writer(tensorboard, resume_step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                path.write_bytes(b"")
            elif path.exists():
                _drop_after(path, resume_step)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; give another place with -o") from error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Add a line. Figures are numbers, texts, or lists and mappings of them; tensors of one value and numpy's numbers count
        as numbers, and what is not finite becomes null. KeyeError when the disk does not take the line whole: none of it stays.
        """
        record = {"schema": SCHEMA, "kind": kind, "step": step, **_plain(figures)}
        line = json.dumps(record, allow_nan=False).encode("ascii") + b"\n"
        begin = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(begin)
            raise KeyeError(
                f"cannot write {self.path}: {error.strerror}; make room and go on with --resume"
            ) from error
        if self._writer is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; a last line that was never finished is passed over.

    InputError for a file that cannot be read, or that keye's training did not write.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a metrics.jsonl") from error
    try:
        return [record for _, record in _records(content)]
    except ValueError as error:
        raise InputError(f"{path} was not written by keye's training: {error}") from error


def _drop_after(path: Path, step: int) -> None:
    """Take away the lines of steps after `step`, and a torn last line: the file is the old one or the new one, never less."""
    content = path.read_bytes()
    try:
        kept = b"".join(line for line, record in _records(content) if record["step"] <= step)
    except ValueError as error:
        raise UsageError(
            f"{path} was not written by keye's training ({error}): move it, or give another place with -o"
        ) from error
    if kept == content:
        return
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _records(content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line with its end, and what it says; ValueError names a line that is not of this schema."""
    records = []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        torn = number == len(lines) and not line.endswith(b"\n")
        # A machine that crashes can leave zeros where a line was to be.
        if torn or not line.strip(b"\0\n"):
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if (
            not isinstance(record, dict)
            or record.get("schema") != SCHEMA
            or not isinstance(record.get("step"), int)
        ):
            raise ValueError(f"line {number} is none of {SCHEMA}")
        records.append((line, record))
    return records


def _plain(value: Any) -> Any:
    """The same in JSON's types; null for a number that is not finite."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _tensorboard_writer(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs the package tensorboard, which is not installed: pip install tensorboard"
        ) from error
    # What an earlier run wrote of steps that come again is hidden.
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
