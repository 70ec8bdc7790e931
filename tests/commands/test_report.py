"""`keye report`: figures of an output as a table, as JSON and as a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import Keye


def record(id: str, begin_s: int, seconds: float, **more: Any) -> dict[str, Any]:
    """A line of keye batch about a question that was answered, begun so many seconds after noon."""
    answer = {
        "schema": "keye.ask/1",
        "inputs": [{"duration_s": 30.0}],
        "completion_tokens": 10,
        "timings": {"decode_s": 0.5, "generate_s": seconds - 0.5},
        "model": "keye-nano",
        "weights_revision": "0123456789ab",
        "device": "cpu",
        "dtype": "fp32",
        "keye_version": "0.1.0",
    }
    line = {
        "schema": "keye.batch/1",
        "id": id,
        "key": id * 3,
        "status": "done",
        "task": "ask",
        "job": {},
        "files": [],
        "started_at": f"2026-01-02T12:00:{begin_s:02}.000+00:00",
        "seconds": seconds,
        "shared_with": None,
        "copy_of": None,
        "warnings": [],
        "error": None,
        "results": [answer],
    }
    if "error" in more:
        line |= {"status": "failed", "results": []}
    return {**line, **more}


ERROR = {"code": 3, "kind": "InputError", "message": "<b>.mp4 does not exist; check the path"}


@pytest.fixture
def out(folder: Path) -> Path:
    lines = [
        record("again", 0, 1.0, error={**ERROR, "message": "an old failure"}),
        record("a", 0, 2.0),
        record("b", 1, 4.0, warnings=["cut off"], shared_with="a"),
        record("same", 2, 0.0, copy_of="a"),
        record("bad", 30, 1.0, error=ERROR),
        record("worse", 31, 1.0, task="ground", error={**ERROR, "code": 1, "kind": "JobTimeout"}),
        record("worst", 32, 1.0, error=ERROR),
        record("again", 40, 2.0),
    ]
    path = folder / "out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"schema": "keye.batch/1", "id"')
    return path


def test_the_figures(keye: Keye, out: Path) -> None:
    code, printed, err = keye("report", str(out), "--json")
    assert (code, err) == (0, "")
    report = json.loads(printed)
    assert report["schema"] == "keye.batch_report/1"
    assert (report["jobs"], report["done"], report["failed"], report["copied"], report["warned"]) == (
        7,
        4,
        3,
        1,
        1,
    )
    assert report["failures_by_kind"] == {"InputError": 2, "JobTimeout": 1}
    assert [failure["id"] for failure in report["failures"]] == ["bad", "worse", "worst"]
    # a and b from 0 to 5 s, three failures from 30 to 33 s, one more from 40 to 42 s.
    assert report["busy_s"] == pytest.approx(10)
    assert report["jobs_an_hour"] == pytest.approx(6 / 10 * 3600)
    assert (report["footage_s"], report["tokens"]) == (60.0, 30)
    assert report["stages_s"] == pytest.approx({"decode_s": 1.5, "generate_s": 6.5})
    # Three jobs that were done themselves took 8 seconds.
    assert report["idle_share"] == pytest.approx(1.5 / 8)
    ask, ground = report["tasks"]
    assert (ask["done"], ask["failed"], ask["median_s"], ask["p90_s"], ask["longest_s"]) == (
        4,
        2,
        2.0,
        4.0,
        4.0,
    )
    assert ask["mean_s"] == pytest.approx(8 / 3)
    assert (ground["done"], ground["failed"], ground["mean_s"]) == (0, 1, None)
    assert report["begun_at"].startswith("2026-01-02T12:00:00")
    assert report["ended_at"].startswith("2026-01-02T12:00:42")


def test_the_table(keye: Keye, out: Path) -> None:
    code, printed, err = keye("report", str(out))
    assert (code, err) == (0, "")
    lines = [re.sub(r"  +", " | ", line.strip()) for line in printed.splitlines()]
    for line in (
        "jobs | 7",
        "failed | 3",
        "jobs an hour | 2,160",
        "task | done | failed | mean | median | 90% | longest",
        "ask | 4 | 2 | 2.67 s | 2.00 s | 4.00 s | 4.00 s",
        "InputError | 2 | <b>.mp4 does not exist; check the path",
    ):
        assert line in lines


def test_shards_are_one_batch(keye: Keye, out: Path) -> None:
    other = out.with_name("other.jsonl")
    other.write_text(json.dumps(record("a", 4, 3.0)) + "\n")
    _, printed, _ = keye("report", str(out), str(other), "--json")
    assert json.loads(printed)["jobs"] == 8
    assert json.loads(printed)["busy_s"] == pytest.approx(12)


class Page(HTMLParser):
    """What a page would load or run, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        self.loads += [str(names[name]) for name in ("src", "href", "onclick", "onload") if name in names]
        if tag in ("script", "link", "iframe", "b"):
            self.loads.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_everything_and_loads_nothing(keye: Keye, out: Path, folder: Path) -> None:
    assert keye("report", str(out), "-o", "report.html") == (0, "", "keye: wrote report.html\n")
    page = Page((folder / "report.html").read_text())
    assert (page.loads, page.open) == ([], [])
    for words in (
        "out.jsonl",
        "keye-nano (0123456789ab) on cpu in fp32",
        "2.67 s",
        "<b>.mp4 does not exist",
        "worst",
    ):
        assert words in page.text
    assert keye("report", str(out), "-o", "report.html")[0] == 2
    assert keye("report", str(out), "-o", "report.html", "--overwrite")[0] == 0


def test_an_empty_output(keye: Keye, folder: Path) -> None:
    (folder / "out.jsonl").write_text("")
    code, printed, _ = keye("report", "out.jsonl", "--json")
    assert (code, json.loads(printed)["jobs"], json.loads(printed)["jobs_an_hour"]) == (0, 0, None)
    assert keye("report", "out.jsonl", "-o", "report.html")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to report on: name an output of keye batch, as in `keye report out.jsonl`"),
        (["none.jsonl"], "none.jsonl cannot be read: No such file or directory"),
        (["list.txt"], "line 1 of list.txt was not written by keye batch: name another file"),
        (
            ["list.txt", "-o", "a.pdf"],
            "a report is an HTML page: give -o a name that ends in .html, not a.pdf",
        ),
    ],
)
def test_wrong_usage(keye: Keye, folder: Path, arguments: list[str], sentence: str) -> None:
    (folder / "list.txt").write_text("milk\n")
    assert keye("report", *arguments) == (2, "", f"keye: {sentence}\n")
