"""`keye ground` with a random toy model: what is printed and written, and how it fails."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyecli import session
from keyecli.tasks.ground import FrameEvidence, Grounding, Span
from keyecli.video.source import probe
from tests.commands.conftest import Keye

FEW = ("--max-tokens", "28")


@pytest.fixture(autouse=True)
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    return tiny_checkpoint


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The model finds "the dog" twice and nothing else; what it was asked with."""
    calls: list[dict[str, Any]] = []

    def ground(self: Any, item: Any, queries: list[str], **options: Any) -> list[Grounding]:
        calls.append({"queries": queries, **options})
        frames = (FrameEvidence(0.0, 0.25), FrameEvidence(0.5, 0.7), FrameEvidence(1.0, 0.05))
        return [
            Grounding(
                query=query,
                spans=(Span(0.2, 0.8, 0.934), Span(1.0, 1.525, 0.4)) if query == "the dog" else (),
                presence=0.9,
                question=query,
                windows=(),
                evidence=frames if options["explain"] else (),
                reasoning="",
                input=SimpleNamespace(to_dict=dict),  # type: ignore[arg-type]
                prompt_tokens=1,
                completion_tokens=1,
                stop_reason="stop",
                timings={"total_s": 0.5},
                settings={},
                model="m",
                weights_revision="r",
                keye_version="v",
                device="cpu",
                dtype="fp32",
                quant=None,
                kv=None,
                seed=0,
                info=item,
            )
            for query in queries
        ]

    monkeypatch.setattr(session.Keye, "ground", ground)
    return calls


def test_a_line_a_span(keye: Keye, clip: Path, asked: list[Any]) -> None:
    code, out, err = keye("ground", str(clip), "the dog", "a cat")
    lines = ["0.2 - 0.8  0.93  the dog", "1.0 - 1.525  0.40  the dog", "not there: a cat"]
    assert (code, out.splitlines(), err) == (0, lines, "")
    assert asked[0]["constrained"] is True


def test_evidence_below_the_spans(keye: Keye, clip: Path, asked: list[Any]) -> None:
    _, out, _ = keye("ground", str(clip), "a cat", "--explain")
    assert out.splitlines() == [
        "not there: a cat",
        "  frame 0.0  0.25",
        "  frame 0.5  0.70",
        "  frame 1.0  0.05",
    ]


def test_what_the_model_finds_is_printed(keye: Keye, clip: Path) -> None:
    arguments = ("ground", str(clip), "the dog", "a cat", *FEW, "--temperature", "3", "--no-think")
    code, out, _ = keye(*arguments, "--json")
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["query"] for record in records] == ["the dog", "a cat"]
    assert {record["schema"] for record in records} == {"keye.ground/1"}
    expected = []
    for record in records:
        for span in record["spans"]:
            expected.append(
                f"{span['start_s']:.1f} - {span['end_s']:.1f}  {span['score']:.2f}  {record['query']}"
            )
        if not record["found"]:
            expected.append(f"not there: {record['query']}")
    code, out, err = keye(*arguments)
    assert (code, out.splitlines(), err) == (0, expected, "")


def test_reasoning_goes_to_stderr(keye: Keye, clip: Path) -> None:
    _, record, _ = keye("ground", str(clip), "the dog", *FEW, "--json")
    reasoning = json.loads(record)["reasoning"]
    code, out, err = keye("ground", str(clip), "the dog", *FEW)
    assert code == 0
    # A terminal must not be steered by it, so that control characters are left out.
    printable = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", reasoning)
    assert printable
    assert err == printable + "\n"
    shown = keye("ground", str(clip), "the dog", *FEW, "--show-thinking")
    assert shown == (0, reasoning + "\n" + out, "")


def test_options_reach_the_search(keye: Keye, clip: Path, asked: list[Any]) -> None:
    flags = "--refine --window 3 --top 2 --min-score 0.3 --merge-gap 0.5 --fps 4 --start 0.5"
    assert keye("ground", str(clip), "the dog", *flags.split())[0] == 0
    assert keye("ground", str(clip), "the dog", "--unconstrained")[0] == 0
    first, second = asked
    wanted = {
        "refine": True,
        "window": 3.0,
        "top": 2,
        "min_score": 0.3,
        "merge_gap": 0.5,
        "fps": 4.0,
        "start": 0.5,
    }
    assert {name: first[name] for name in wanted} == wanted
    assert second["constrained"] is False


def test_queries_from_a_file_and_from_stdin(
    keye: Keye, clip: Path, asked: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "queries.txt").write_text("\ufeff# what to find\nthe dog\n\n  a cat  \r\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ein Löwe\n# no\n".encode())))
    assert keye("ground", str(clip), "a bird", "-", "--queries", "queries.txt")[0] == 0
    assert asked[0]["queries"] == ["a bird", "ein Löwe", "the dog", "a cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the dog\na \xff cat\n", "line 2 of queries.txt is not UTF-8 text"),
        (b"the dog\n\na\tb\x07\n", "line 3 of queries.txt has control characters in it: 'a\\tb\\x07'"),
        (b"# c\n" + b"x" * 501, "line 2 of queries.txt has 501 characters, and a query has at most 500"),
        (
            b"# only a comment\n",
            'nothing to look for: give a query, as in `keye ground clip.mp4 "the red circle"`',
        ),
    ],
)
def test_bad_query_files(keye: Keye, clip: Path, folder: Path, content: bytes, message: str) -> None:
    (folder / "queries.txt").write_bytes(content)
    assert keye("ground", str(clip), "--queries", "queries.txt") == (2, "", f"keye: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], 'nothing to look at: give a video and a query, as in `keye ground clip.mp4 "the red circle"`'),
        (["CLIP"], 'nothing to look for: give a query, as in `keye ground clip.mp4 "the red circle"`'),
        (
            ["CLIP", " "],
            'a query is empty: say what to look for, as in `keye ground clip.mp4 "the red circle"`',
        ),
        (["CLIP", "CLIP"], "CLIP is a file, not a query: name one video, then what to look for"),
        (
            ["CLIP", "x", "--queries", "no.txt"],
            "the queries in no.txt cannot be read: No such file or directory",
        ),
        (["CLIP", "x", "--exact"], "--exact says how to cut: give --clip DIR with it"),
        (["CLIP", "x", "--top", "0"], "--top must be at least 1, not 0"),
        (
            ["CLIP", "x", "--json", "-f", "srt"],
            "--json and -f srt cannot share stdout: give a file for one with -o",
        ),
        (["CLIP", "x", "--plot", "p.gif"], None),
        (
            ["CLIP", "x", "-f", "srt", "-f", "vtt"],
            "srt and vtt cannot share stdout: give a folder for their files with -o",
        ),
    ],
)
def test_wrong_usage(keye: Keye, clip: Path, arguments: list[str], message: str | None) -> None:
    code, out, err = keye("ground", *[argument.replace("CLIP", str(clip)) for argument in arguments])
    assert (code, out) == (2, "")
    if message is None:
        assert "p.gif" in err
    else:
        assert err == f"keye: {message.replace('CLIP', str(clip))}\n"


def test_what_cannot_be_used_is_told_before_the_weights_are_read(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(session, "load", load)
    (folder / "there.srt").write_text("mine")
    (folder / "there.png").write_text("mine")
    for flags in (["-o", "there.srt"], ["--plot", "there.png"], ["--contact-sheet", "there.png"]):
        code, _, err = keye("ground", str(clip), "the dog", *flags)
        assert code == 2, flags
        assert "exists" in err
    assert keye("ground", "missing.mp4", "the dog")[0] == 3
    assert keye("ground", str(clip), "x", "--model", "nowhere/at-all")[0] == 4
    assert sorted(path.name for path in folder.iterdir()) == ["there.png", "there.srt"]


def test_dry_run_shows_every_window(keye: Keye, clip: Path) -> None:
    code, out, _ = keye("ground", str(clip), "the dog", "--dry-run", "--json", "--window", "2")
    assert code == 0
    plans = [json.loads(line) for line in out.splitlines()]
    assert [plan["schema"] for plan in plans] == ["keye.plan/1"] * len(plans)
    assert len(plans) == 2


def test_formats(keye: Keye, clip: Path, asked: list[Any], folder: Path) -> None:
    code, out, _ = keye("ground", str(clip), "the dog", "-f", "srt")
    assert (code, out.splitlines()[:3]) == (0, ["1", "00:00:00,200 --> 00:00:00,800", "the dog"])
    code, out, err = keye("ground", str(clip), "the dog", "a cat", "-f", "csv,jsonl", "-o", "out/")
    assert (code, out) == (0, "")
    assert re.findall(r"wrote (\S+)", err) == ["out/clip.csv", "out/clip.jsonl"]
    assert len((folder / "out/clip.csv").read_text().splitlines()) == 3
    records = [json.loads(line) for line in (folder / "out/clip.jsonl").read_text().splitlines()]
    assert [record["found"] for record in records] == [True, False]
    _, out, _ = keye("ground", str(clip), "the dog", "a cat", "-f", "json")
    assert json.loads(out) == records
    _, out, _ = keye("ground", str(clip), "the dog", "-f", "json")
    assert json.loads(out) == records[0]
    assert records[0]["spans"][0] == {
        "start_s": 0.2,
        "end_s": 0.8,
        "start_frame": 5,
        "end_frame": 20,
        "start_timecode": "00:00:00:05",
        "end_timecode": "00:00:00:20",
        "score": 0.934,
    }


def test_pictures_and_clips(keye: Keye, clip: Path, asked: list[Any], folder: Path) -> None:
    from PIL import Image

    flags = "--contact-sheet sheet.png --plot plot.png --explain-strip strip.png --clip cut --exact"
    code, out, err = keye("ground", str(clip), "the dog", "a cat", *flags.split())
    assert code == 0
    assert "frame 0.5" in out
    for name in ("sheet.png", "plot.png", "strip.png"):
        assert f"wrote {name}\n" in err
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 50
    cut = sorted((folder / "cut").iterdir())
    assert [float(probe(path).duration_s) for path in cut] == pytest.approx([0.6, 0.525], abs=0.05)
    code, _, err = keye("ground", str(clip), "a cat", "--clip", "none")
    assert (code, err) == (0, "keye: there is no span to cut out\n")
    assert not (folder / "none").exists()


def test_timecode_of_a_variable_rate_clip_is_null(
    keye: Keye, clips: Callable[..., Path], asked: list[Any]
) -> None:
    pts = [40 * index + 10 * (index % 3) for index in range(51)]
    path = clips("variable.mkv", pts=pts, time_base=Fraction(1, 1000))
    _, out, _ = keye("ground", str(path), "the dog", "--json")
    first, second = json.loads(out)["spans"]
    assert first["start_timecode"] is first["end_timecode"] is None
    assert first["start_frame"] == next(i for i, time in enumerate(sorted(pts)) if time >= 200)
    assert second["end_frame"] == next(i for i, time in enumerate(sorted(pts)) if time >= 1525)
