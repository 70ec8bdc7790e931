"""The file of good rows: their bytes, those that could be repaired, and nothing where something failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from keyecli.engine.loaded import open_model
from keyecli.errors import InputError, UsageError
from keyecli.training.data import open_data
from keyecli.training.data.check import Checker
from keyecli.training.data.repair import GoodRows
from tests.training.data.conftest import WriteRows, question


def repaired(path: Path, model: Path, out: Path, **arguments: Any) -> tuple[int, int]:
    """Rows written, and how many of them repaired."""
    data = open_data(path)
    with GoodRows(data, out, **arguments) as good:
        for check in Checker(data, open_model(model, device="cpu", kernels="reference")).rows():
            good.add(check)
    return good.rows, good.repaired


def test_good_lines_keep_their_bytes(write: WriteRows, media: Path, tiny_checkpoint: Path) -> None:
    asked = '{"role":"user","content":"<video>gr\\u00f6ßer?"}'
    odd = '  {"videos":["a.mp4"],  "messages":[' + asked + ',{"role":"assistant","content":"Ja"}] }'
    path = write(
        odd, "", question(videos=["none.mp4"]), "{", question(), question(), question("[[1.0, 9.0]]")
    )
    assert repaired(path, tiny_checkpoint, media / "good.jsonl") == (2, 0)
    lines = path.read_bytes().splitlines()
    assert (media / "good.jsonl").read_bytes() == lines[0] + b"\n" + lines[4] + b"\n"
    assert not list(media.glob(".*"))


def test_reversed_spans_are_turned(write: WriteRows, media: Path, tiny_checkpoint: Path) -> None:
    """In the message, and in the columns that say the same; reasoning and other columns stay as they are."""
    row = question(
        "<think>\nIt lights up at 0.5.\n</think>\n\n[[1.5, 0.5], [0.1, 0.2]]",
        answer="[[1.5, 0.5], [0.1, 0.2]]",
        solution=[[1.5, 0.5], [0.1, 0.2]],
        other=[1.5, 0.5],
    )
    sentence = question("The event happens in 1.5 - 0.5 seconds.")
    assert repaired(write(row, sentence), tiny_checkpoint, media / "good.jsonl") == (1, 1)
    (line,) = (media / "good.jsonl").read_text().splitlines()
    value = json.loads(line)
    right = "[[0.1, 0.2], [0.5, 1.5]]"
    assert value["messages"][1]["content"] == "<think>\nIt lights up at 0.5.\n</think>\n\n" + right
    assert (value["answer"], value["solution"], value["other"]) == (right, json.loads(right), [1.5, 0.5])
    assert {**row, **{name: value[name] for name in ("messages", "answer", "solution")}} == value
    assert repaired(media / "good.jsonl", tiny_checkpoint, media / "again.jsonl") == (1, 0)


def test_bad_events_leave_their_row(write: WriteRows, media: Path, tiny_checkpoint: Path) -> None:
    good, bad = {"query": "a", "span": [[0.5, 1.0]]}, {"query": "b", "span": [[1.0, 9.0]]}
    back = {"query": "c", "span": [[1.5, 1.0]]}
    rows = [
        {"video_path": "a.mp4", "duration": 2.0, "events": events} for events in ([good, bad, back], [bad])
    ]
    one = {"video_path": "b.mp4", "query": "d", "span": [0.8, 0.4]}
    assert repaired(write(*rows, one), tiny_checkpoint, media / "good.jsonl") == (3, 2)
    first, second = map(json.loads, (media / "good.jsonl").read_text().splitlines())
    assert first == {**rows[0], "events": [good, {**back, "span": [[1.0, 1.5]]}]}
    assert second == {**one, "span": [0.4, 0.8]}


def test_an_array_stays_one(media: Path, tiny_checkpoint: Path) -> None:
    rows = [question(), question("[[1.5, 0.5]]"), question(), question("A cat.")]
    (media / "data.json").write_text(json.dumps(rows, indent=1))
    assert repaired(media / "data.json", tiny_checkpoint, media / "good.json") == (3, 1)
    assert json.loads((media / "good.json").read_text()) == [rows[0], question("[[0.5, 1.5]]"), rows[3]]


def test_parquet_becomes_json_lines(media: Path, tiny_checkpoint: Path) -> None:
    rows = [question(), question(videos=["none.mp4"]), question("A cat.")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), media / "data.parquet")
    assert repaired(media / "data.parquet", tiny_checkpoint, media / "good.jsonl") == (2, 0)
    assert [json.loads(line) for line in (media / "good.jsonl").read_text().splitlines()] == rows[::2]


def test_nothing_is_lost_or_left(write: WriteRows, media: Path, tiny_checkpoint: Path) -> None:
    """Neither a file that is there, nor half of one."""
    out = media / "good.jsonl"
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        repaired(write(question()), tiny_checkpoint, out)
    with pytest.raises(InputError, match="no good row"):
        repaired(write("{", question(videos=["none.mp4"])), tiny_checkpoint, out, overwrite=True)
    with pytest.raises(ZeroDivisionError), GoodRows(open_data(write(question())), out, overwrite=True):
        1 / 0  # noqa: B018
    assert out.read_text() == "precious"
    assert not list(media.glob(".*"))
    assert repaired(write(question()), tiny_checkpoint, out, overwrite=True) == (1, 0)
    assert json.loads(out.read_text()) == question()


def test_a_file_may_be_replaced_by_its_good_rows(write: WriteRows, tiny_checkpoint: Path) -> None:
    path = write("{", question())
    assert repaired(path, tiny_checkpoint, path, overwrite=True) == (1, 0)
    assert json.loads(path.read_text()) == question()
