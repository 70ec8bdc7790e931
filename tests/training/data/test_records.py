"""Records of a file: any of them at any time, with its line, and files that are none."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from keyecli.errors import InputError, KeyeError, UsageError
from keyecli.training.data.records import open_records
from keyecli.training.rows import RowError

ROWS: list[dict[str, Any]] = [
    {"id": 0, "text": "größer"},
    {"id": 1, "text": "a\n]b"},
    {"id": 2, "text": "子"},
]


def read(path: Path) -> list[tuple[int, Any]]:
    """All records from the last to the first, so that nothing depends on their order, then turned around."""
    records = open_records(path)
    numbers = range(len(records) - 1, -1, -1)
    return [(records.line(number), records.value(number)) for number in numbers][::-1]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines(tmp_path: Path, end: str, mark: bytes) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(mark + end.join([lines[0], "", lines[1], "  ", lines[2]]).encode())
    assert read(path) == [(1, ROWS[0]), (3, ROWS[1]), (5, ROWS[2])]
    records = open_records(path)
    assert [records.raw(number).decode() for number in range(3)] == lines
    assert records.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "data.json"
    text = json.dumps(ROWS, ensure_ascii=False, indent=indent)
    path.write_text("\n\n" + text, "utf-8")
    lines = (3, 3, 3) if indent is None else (4, 8, 12)
    assert read(path) == list(zip(lines, ROWS, strict=True))
    raw = [open_records(path).raw(number).decode() for number in range(3)]
    assert all(piece in text for piece in raw)
    assert [json.loads(piece) for piece in raw] == ROWS


def test_a_broken_line_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": \nnot json\n"text"\n{"id": "\xff"}\n{"id": 5}\n')
    records = open_records(path)
    assert (records.value(0), records.value(5)) == ({"id": 0}, {"id": 5})
    for number, words in ((1, "not JSON"), (2, "not JSON"), (3, "not a text"), (4, "not UTF-8")):
        with pytest.raises(RowError, match=words):
            records.value(number)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    rows = [{"id": number, "text": "x" if number % 3 else None} for number in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    known = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert read(path) == list(enumerate(known, 1))
    copy = pickle.loads(pickle.dumps(open_records(path)))
    assert copy.value(7) == known[7]
    assert json.loads(copy.raw(0)) == {"id": 0}


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 and more")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_records(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        open_records(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no rows"),
        (b" \n\n", "has no rows"),
        (b"[]", "has no rows"),
        (b"hello\nworld\n", "is not JSON"),
        (b"\x00\x01\x02", "is not text"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b'[{"id": 1}', "no comma or ]"),
        (b'[{"id": 1},]', "is not JSON"),
        (b'[{"id": 1}] []', "something follows"),
        (b'[{"id": "\xff"}]', "not UTF-8"),
    ],
)
def test_what_is_no_data(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as raised:
        open_records(path)
    assert str(path) in str(raised.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "none.jsonl", "does not exist")):
        with pytest.raises(KeyeError, match=words):
            open_records(path)
