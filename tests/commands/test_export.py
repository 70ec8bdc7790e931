"""`keye export`: saved results come out as the command that made them would have written them, and how it fails."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyecli.engine.shared import SharedAnswer, SharedPrefix
from keyecli.export.formats import FORMATS
from tests.commands.conftest import Keye
from tests.video.test_scenes import shots

Clips = Callable[..., Path]
Stdin = Callable[[str | bytes], None]
Span = tuple[float, float, float | None]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Stdin:
    """`stdin(content)`: what the next command reads there."""

    def give(content: str | bytes) -> None:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def grounding(path: Path | str, query: str, *spans: Span, duration_s: float = 2.04) -> dict[str, Any]:
    """A saved result with the fields that are read, and one that no version knows."""
    return {
        "schema": "keye.ground/1",
        "query": query,
        "spans": [{"start_s": start, "end_s": end, "score": score} for start, end, score in spans],
        "inputs": [{"path": str(path), "duration_s": duration_s}],
        "of_a_later_version": [1],
    }


def summary(path: Path | str, *titles: str, duration_s: float = 2.04) -> dict[str, Any]:
    parts = [
        {"start_s": float(number), "end_s": number + 1.0, "title": title, "text": ""}
        for number, title in enumerate(titles)
    ]
    return {
        "schema": "keye.summary/1",
        "prose": "It rains.",
        "chapters": parts,
        "events": parts,
        "inputs": [{"path": str(path), "duration_s": duration_s}],
        "model": "m",
        "weights_revision": "r",
        "keye_version": "v",
    }


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# The same as the command that made the results.


@pytest.fixture
def found(keye: Keye, clip: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A search whose spans are drawn at random: the command line, up to the format."""
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    words = "--temperature 3 --seed 2 --no-think --max-tokens 60"
    return ["ground", str(clip), "the dog", "a cat", "a bird", *words.split()]


def test_a_search_in_every_format(keye: Keye, found: list[str], stdin: Stdin, folder: Path) -> None:
    names = ["json", "jsonl", *(name for name in FORMATS if name != "chapters")]
    formats = [word for name in names for word in ("-f", name)]
    assert keye(*found, *formats, "-o", "direct/")[0] == 0
    saved = (folder / "direct/clip.jsonl").read_text()
    assert sum(len(json.loads(line)["spans"]) for line in saved.splitlines()) > 1
    code, out, err = keye("export", "direct/clip.jsonl", *formats, "-o", "later/")
    assert (code, out) == (0, "")
    written = sorted((folder / "later").iterdir())
    assert len(written) == len(names)
    for path in written:
        assert path.read_bytes() == (folder / "direct" / path.name).read_bytes()
        assert f"wrote later/{path.name}\n" in err
    stdin(saved)
    edl = (folder / "direct/clip.edl").read_text()
    assert keye("export", "-f", "edl", "-") == (0, edl, "")
    stdin((folder / "direct/clip.json").read_text())
    assert keye("export", "-f", "edl") == (0, edl, "")


def test_options_of_timecode(keye: Keye, found: list[str], folder: Path) -> None:
    options = ["-f", "edl", "--rate", "29.97", "--start-timecode", "01:00:00;00", "--drop-frame"]
    _, direct, _ = keye(*found, *options)
    assert keye(*found, "-o", "found.jsonl")[0] == 0
    assert keye("export", "found.jsonl", *options) == (0, direct, "")
    assert "01:00:00;" in direct


def test_a_summary_in_every_format(
    keye: Keye, clips: Clips, tiny_checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "A ball *rolls*.\n\n- 0:00 - 0:12: Ball | It is red.\n- 0:12 - 0:24: Box\n- 0:22 - 0:40: Ring\n- 0:25 - 0:30: Cat"
    answer = SharedAnswer(said, "", (1, 2), (0.0, 0.0), 9, "stop")
    monkeypatch.setattr(SharedPrefix, "answer", lambda *_, **__: answer)
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    movie = clips("talk.mp4", 80, rate=2, picture=shots(80))
    formats = [word for name in ("json", "jsonl", "md", "html", *FORMATS) for word in ("-f", name)]
    assert keye("summarize", str(movie), "--fps", "0.5", "--chapters", "3", *formats, "-o", "direct/")[0] == 0
    assert keye("export", "direct/talk.json", *formats, "-o", "later/")[0] == 0
    direct = {path.name: path.read_bytes() for path in (folder / "direct").iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "later").iterdir()} == direct
    assert b"## Events" in direct["talk.md"]


def test_scenes(keye: Keye, clips: Clips, folder: Path) -> None:
    cut = clips("talk-cut.mp4", 80, rate=2, picture=shots(25, 55))
    _, direct, _ = keye("scenes", str(cut), "-f", "csv")
    _, saved, _ = keye("scenes", str(cut), "--json")
    (folder / "scenes.json").write_text(saved)
    assert keye("export", "scenes.json", "-f", "csv") == (0, direct, "")
    assert len(direct.splitlines()) == 3


# What belongs together.


def test_results_about_one_clip_from_several_runs_are_one(keye: Keye, clip: Path, folder: Path) -> None:
    (folder / "a.jsonl").write_text(lines(grounding(clip, "dog", (1, 1.5, 0.9))))
    (folder / "b.jsonl").write_text(lines(grounding(clip, "cat", (0, 0.5, None)), grounding(clip, "cow")))
    code, out, _ = keye("export", "a.jsonl", "b.jsonl", "-f", "srt")
    assert code == 0
    assert out == "1\n00:00:00,000 --> 00:00:00,500\ncat\n\n2\n00:00:01,000 --> 00:00:01,500\ndog\n\n"


def test_several_clips_keep_their_order(keye: Keye, clips: Clips, clip: Path, folder: Path) -> None:
    other = clips("another.mp4", 51)
    records = (
        grounding(clip, "a", (0, 1, 0.5)),
        grounding(other, "b", (0, 1, 0.5)),
        grounding(clip, "c", (1, 2, 0.5)),
    )
    (folder / "found.jsonl").write_text(lines(*records))
    _, out, _ = keye("export", "found.jsonl", "-f", "csv")
    assert [row.split(",")[8] for row in out.splitlines()[1:]] == ["a", "c", "b"]
    _, out, _ = keye("export", "found.jsonl", "-f", "edl")
    assert [line[3:] for line in out.splitlines() if "FROM CLIP" in line] == [
        "ROM CLIP NAME: clip.mp4",
        "ROM CLIP NAME: clip.mp4",
        "ROM CLIP NAME: another.mp4",
    ]
    code, _, err = keye("export", "found.jsonl", "-f", "srt")
    assert (code, "srt holds the parts of one clip, and there are 2" in err) == (2, True)
    assert keye("export", "found.jsonl", "-f", "srt,jsonl", "-o", "out/")[0] == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "another.jsonl",
        "another.srt",
        "clip.jsonl",
        "clip.srt",
    ]
    assert (folder / "out/clip.jsonl").read_text() == lines(records[0], records[2])


def test_summaries_stand_alone(keye: Keye, clip: Path, folder: Path) -> None:
    (folder / "s.jsonl").write_text(lines(summary(clip, "sun"), summary(clip, "rain")))
    assert keye("export", "s.jsonl", "-f", "srt", "-o", "out/")[0] == 0
    assert "sun" in (folder / "out/clip.srt").read_text()
    assert "rain" in (folder / "out/clip-2.srt").read_text()
    code, page, _ = keye("export", "s.jsonl", "-f", "md")
    assert (code, page.count("## clip.mp4")) == (0, 2)


def test_the_output_of_a_batch(keye: Keye, folder: Path) -> None:
    def job(id: str, status: str, *results: dict[str, Any]) -> dict[str, Any]:
        return {"schema": "keye.batch/1", "id": id, "status": status, "results": list(results)}

    old, new = grounding("a.mp4", "dog", (0, 1, 0.5)), grounding("a.mp4", "cat", (1, 2, 0.5))
    jobs = (
        job("one", "done", old),
        job("two", "failed"),
        job("three", "done", {"schema": "keye.ask/1", "text": "A dog."}),
        job("four", "done", grounding("a.mp4", "cow", (2, 3, 0.5)), grounding("a.mp4", "pig", (3, 4, 0.5))),
        job("five", "failed"),
        job("one", "done", new),
        job("two", "done", grounding("a.mp4", "hen", (4, 5, 0.5))),
    )
    (folder / "out.jsonl").write_text(lines(*jobs))
    code, out, err = keye("export", "out.jsonl", "-f", "jsonl")
    assert [json.loads(line)["query"] for line in out.splitlines()] == ["cat", "hen", "cow", "pig"]
    assert (code, err) == (0, "keye: warning: a job in out.jsonl failed and left no result\n")


# How results may be written down.


@pytest.mark.parametrize(
    "text",
    [
        lambda *records: "\n\n".join(json.dumps(record, indent=2) for record in records),
        lambda *records: json.dumps(records),
        lambda *records: "\ufeff" + "\r\n".join(map(json.dumps, records)),
        lambda *records: "".join(map(json.dumps, records)),
        lambda *records: json.dumps(records[:1]) + lines(*records[1:]),
    ],
    ids=["pretty", "a list", "of Windows", "on one line", "a list and a line"],
)
def test_json_in_any_shape(text: Callable[..., str], keye: Keye, stdin: Stdin) -> None:
    records = [grounding("gone.mp4", query, (0, 1, 0.5)) for query in ("rot", "gr\u00fcn", "\u7ea2")]
    stdin(text(*records))
    code, out, _ = keye("export", "-f", "vtt")
    assert (code, out.splitlines()[4::4]) == (0, ["rot", "gr\u00fcn", "\u7ea2"])


def test_times_need_no_clip_and_frames_do(keye: Keye, folder: Path) -> None:
    (folder / "s.json").write_text(lines(summary("away/gone.mp4", "sun", "rain")))
    for name in ("srt", "vtt", "ffmetadata", "mkv", "json", "jsonl"):
        assert keye("export", "s.json", "-f", name)[0] == 0, name
    for name in ("csv", "edl", "otio", "fcpxml", "md", "html"):
        code, out, err = keye("export", "s.json", "-f", name)
        assert (code, out) == (3, ""), name
        assert err == (
            "keye: away/gone.mp4, which line 1 of s.json is about, does not exist; "
            "run this in the folder where the result was made\n"
        )


def test_a_clip_that_is_another_one_now_is_refused(keye: Keye, clip: Path, folder: Path) -> None:
    (folder / "old.jsonl").write_text(lines(grounding(clip, "dog", (0, 1, 0.9), duration_s=2.08)))
    code, out, err = keye("export", "old.jsonl", "-f", "edl")
    assert (code, out) == (3, "")
    assert err == (
        f"keye: {clip} is another file than the one that line 1 of old.jsonl is about: "
        "it lasts 0:00:02.040, and that one 0:00:02.080\n"
    )


def test_no_spans_is_no_error(keye: Keye, stdin: Stdin, clip: Path) -> None:
    stdin(lines(grounding(clip, "a unicorn")))
    code, out, err = keye("export", "-f", "csv")
    assert (code, len(out.splitlines()), err) == (0, 1, "")


def test_what_utf8_cannot_hold_stays_an_escape(keye: Keye, stdin: Stdin) -> None:
    text = lines(grounding("a.mp4", "half \ud83d", (0, 1, 0.5)))
    stdin(text)
    assert keye("export", "-f", "jsonl") == (0, text, "")
    stdin(text)
    assert "half \ufffd" in keye("export", "-f", "srt")[1]


# What can be wrong.


def without(name: str, record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


def with_span(start_s: Any, end_s: Any, score: Any = None) -> dict[str, Any]:
    return grounding("a.mp4", "x", (start_s, end_s, score))


NUMBER = "is no number of 0 or more"
GIVE = "give what keye printed with --json"
KINDS = "there must be one of keye.ground/1, keye.summary/1, keye.scenes/1"
GOOD = grounding("a.mp4", "dog", (0, 1, 0.5))
LINE = "line 1 of found.jsonl is"
BAD_RESULTS: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", f"there is no result in found.jsonl; {GIVE}"),
    "no result in a list": (" [] \n", f"there is no result in found.jsonl; {GIVE}"),
    "binary": (b"\x00\xff\xfe", f"found.jsonl is not UTF-8 text; {GIVE}"),
    "text": ("0.2 - 0.8 the dog\n", f"{LINE} no JSON, or was cut off; {GIVE}"),
    "a number": ("0.2\n", f"{LINE} no result of keye; {KINDS}"),
    "words": ("the dog\n", f"{LINE} no JSON, or was cut off; {GIVE}"),
    "cut off": (lines(GOOD, GOOD)[:-9], f"line 2 of found.jsonl is no JSON, or was cut off; {GIVE}"),
    "behind lines": ("\n\n[\n1\n]\n {", f"line 6 of found.jsonl is no JSON, or was cut off; {GIVE}"),
    "in lines": ("\n\n[\n1\n]\n", f"result 1 in line 3 of found.jsonl is no result of keye; {KINDS}"),
    "a job without name": ('{"schema": "keye.batch/1"}', f"{LINE} damaged: id is no text"),
    "a job without results": (
        '{"schema": "keye.batch/1", "id": "a", "status": "done"}',
        f"{LINE} damaged: results is no list of objects",
    ),
    "deep": ("[" * 100_000, f"{LINE} no JSON, or was cut off; {GIVE}"),
    "in a list": (json.dumps([GOOD, 7]), f"result 2 in {LINE} no result of keye; {KINDS}"),
    "an answer": ('{"schema": "keye.ask/1"}', f"{LINE} keye.ask/1, which has no times; {KINDS}"),
    "an odd schema": ('{"schema": []}', f"{LINE} no result of keye; {KINDS}"),
    "no query": (lines(without("query", GOOD)), f"{LINE} damaged: query is no text"),
    "no spans": (lines(GOOD | {"spans": 3}), f"{LINE} damaged: spans is no list of objects"),
    "odd spans": (lines(GOOD | {"spans": [[0, 1]]}), f"{LINE} damaged: spans is no list of objects"),
    "no input": (lines(GOOD | {"inputs": []}), f"{LINE} damaged: inputs is empty"),
    "no path": (lines(GOOD | {"inputs": [{"path": ""}]}), f"{LINE} damaged: path is empty"),
    "no duration": (lines(grounding("a.mp4", "x", duration_s=True)), f"{LINE} damaged: duration_s {NUMBER}"),
    "backwards": (lines(with_span(2, 1)), f"{LINE} damaged: a part goes from 2 back to 1 s"),
    "before the clip": (lines(with_span(-1, 1)), f"{LINE} damaged: start_s {NUMBER}"),
    "not a number": (lines(with_span(float("nan"), 1)), f"{LINE} damaged: start_s {NUMBER}"),
    "endless": (lines(with_span(0, 10**400)), f"{LINE} damaged: end_s {NUMBER}"),
    "a score in words": (lines(with_span(0, 1, "good")), f"{LINE} damaged: score {NUMBER}"),
}


@pytest.mark.parametrize(("content", "message"), BAD_RESULTS.values(), ids=list(BAD_RESULTS))
def test_results_that_cannot_be_read(content: str | bytes, message: str, keye: Keye, folder: Path) -> None:
    (folder / "found.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert keye("export", "found.jsonl", "-f", "srt") == (3, "", f"keye: {message}\n")


USAGE = {
    "no format": (["found.jsonl"], "say what to write with -f, or where with -o, as in `keye export found.jsonl -f srt`"),
    "no such format": (["found.jsonl", "-f", "doc"], None),
    "two on stdout": (
        ["found.jsonl", "-f", "srt,vtt"],
        "srt and vtt cannot share stdout: give a folder for their files with -o",
    ),
    "a page about spans": (
        ["found.jsonl", "-o", "page.html"],
        "html is a page about summaries, and line 1 of found.jsonl is keye.ground/1",
    ),
    "taken": (
        ["found.jsonl", "-o", "there.srt"],
        "there.srt exists; give another place with -o, or --overwrite to replace it",
    ),
    "stdin twice": (["-", "-", "-f", "srt"], "stdin can be read only once: name - once"),
    "no rate": (["found.jsonl", "-f", "edl", "--rate", "fast"], "'fast' is not a frame rate; write 25, 29.97 or 30000/1001"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=list(USAGE))
def test_wrong_usage(
    arguments: list[str], message: str | None, keye: Keye, folder: Path, clip: Path, stdin: Stdin
) -> None:
    (folder / "found.jsonl").write_text(lines(grounding(clip, "dog", (0, 1, 0.9))))
    (folder / "there.srt").write_text("mine")
    stdin("")
    code, out, err = keye("export", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    if message is not None:
        assert err == f"keye: {message}\n"
    assert (folder / "there.srt").read_text() == "mine"


def test_a_missing_file_of_results(keye: Keye) -> None:
    said = "keye: the results in no.jsonl cannot be read: No such file or directory\n"
    assert keye("export", "no.jsonl", "-f", "srt") == (3, "", said)


def test_a_terminal_is_not_waited_for(keye: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    code, _, err = keye("export", "-f", "srt")
    assert code == 2
    assert err.startswith("keye: nothing to read: give results that were saved with --json")


def test_no_torch_and_a_reader_that_goes_away(isolated: dict[str, str], folder: Path, clip: Path) -> None:
    spans = [(second / 10_000, 1.0, 0.5) for second in range(2000)]  # more than a pipe holds
    (folder / "found.jsonl").write_text(lines(grounding(clip, "dog", *spans)))
    program = (
        "import sys\n"
        "from keyecli.cli import run\n"
        "code = run(['export', 'found.jsonl', '-f', 'csv'])\n"
        "print('heavy:', *(n for n in ('torch', 'transformers') if n in sys.modules), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=isolated | {"PYTHONUNBUFFERED": ""},  # without a buffer Python itself would not see it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"clip,start_s")
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stderr:
        assert stderr.read() == b"heavy:\n"
    assert process.wait() == 1
