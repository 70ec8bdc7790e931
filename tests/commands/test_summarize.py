"""`keye summarize` with a random toy model: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyecli.engine.shared import SharedAnswer, SharedPrefix
from keyecli.errors import InputError
from tests.commands.conftest import Keye
from tests.video.test_scenes import shots

Clips = Callable[..., Path]
SAID = "A ball rolls.\n\n- 0:00 - 0:12: Ball | It is red.\n- 0:12 - 0:24: Box\n- 0:24 - 0:40: Ring"
CHAPTERS = "0:00:00.000 - 0:00:12.000 Ball\n0:00:12.000 - 0:00:24.000 Box\n0:00:24.000 - 0:00:40.000 Ring\n"


@pytest.fixture(autouse=True)
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    monkeypatch.setenv("KEYE_FPS", "0.5")  # 20 frames of 40 seconds
    return tiny_checkpoint


@pytest.fixture
def movie(clips: Clips) -> Path:
    """40 seconds at 2 frames a second, one shot."""
    return clips("talk.mp4", 80, rate=2, picture=shots(80))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`says(answer, ...)`: what the model answers, the last one again and again; returns what it is asked."""

    def set_answers(*answers: str) -> list[str]:
        asked: list[str] = []

        def answer(
            self: SharedPrefix, text: str, settings: Any, on_reasoning: Any = None, **_: Any
        ) -> SharedAnswer:
            asked.append(text)
            if on_reasoning:
                on_reasoning("I look.")
            said = answers[min(len(asked), len(answers)) - 1]
            return SharedAnswer(said, "I look.", (1, 2), (0.0, 0.0), 9, "stop")

        monkeypatch.setattr(SharedPrefix, "answer", answer)
        return asked

    set_answers(SAID)
    return set_answers


def test_text_and_chapters(keye: Keye, movie: Path, says: Any) -> None:
    assert keye("summarize", str(movie)) == (0, f"A ball rolls.\n\n{CHAPTERS}", "I look.\n")
    assert keye("summarize", str(movie), "-q") == (0, f"A ball rolls.\n\n{CHAPTERS}", "")


def test_show_thinking(keye: Keye, movie: Path, says: Any) -> None:
    code, out, err = keye("summarize", str(movie), "--show-thinking")
    assert (code, out, err) == (0, f"I look.\nA ball rolls.\n\n{CHAPTERS}", "")


def test_several_videos_each_by_itself(keye: Keye, movie: Path, clips: Clips, says: Any) -> None:
    says(SAID, "Nothing but rain.\n0.0 - 1.0: rain")
    short = clips("talk-short.mp4", 26)
    code, out, _ = keye("summarize", str(movie), str(short), "-q")
    assert code == 0
    assert out == (
        f"{movie}\nA ball rolls.\n\n{CHAPTERS}\n{short}\nNothing but rain.\n\n0:00:00.000 - 0:00:01.040 rain\n"
    )


def test_json(keye: Keye, movie: Path, clips: Clips, says: Any) -> None:
    code, out, err = keye(
        "summarize", str(movie), str(clips("talk-short.mp4", 26)), "--json", "--style", "bullets"
    )
    first, second = map(json.loads, out.splitlines())
    assert (code, first["schema"], first["settings"]["style"]) == (0, "keye.summary/1", "bullets")
    assert [chapter["title"] for chapter in first["chapters"]] == ["Ball", "Box", "Ring"]
    assert first["inputs"][0]["path"] == str(movie)
    # 1.04 seconds hold the beginning of the first event only.
    assert [event["end_s"] for event in second["events"]] == [1.04]
    assert "2 lines lie outside of talk-short.mp4 and are left out" in err


def test_what_is_asked(keye: Keye, movie: Path, says: Any, folder: Path) -> None:
    asked = says(SAID)
    (folder / "lines.srt").write_text("1\n00:00:05,000 --> 00:00:06,000\nHello\n")
    code, _, _ = keye(
        "summarize", str(movie), "--style", "detailed", "--chapters", "2", "--language", "German", "--subtitles", "lines.srt"
    )  # fmt: skip
    assert code == 0
    (question,) = asked
    assert question.startswith("Subtitles:\n[5.0 - 6.0] Hello\n\n")
    for words in ("several paragraphs", "exactly 2 such lines", "in German"):
        assert words in question


def test_number_of_chapters_and_snapping(keye: Keye, clips: Clips, says: Any) -> None:
    cut = clips("talk-cut.mp4", 80, rate=2, picture=shots(25, 55))  # at 12.5 s
    code, out, _ = keye("summarize", str(cut), "-q", "--chapters", "2")
    assert (code, out.splitlines()[2:]) == (
        0,
        ["0:00:00.000 - 0:00:24.000 Ball; Box", "0:00:24.000 - 0:00:40.000 Ring"],
    )
    _, out, _ = keye("summarize", str(cut), "-q")
    assert out.splitlines()[2] == "0:00:00.000 - 0:00:12.500 Ball"
    _, out, _ = keye("summarize", str(cut), "-q", "--no-snap")
    assert out.splitlines()[2] == "0:00:00.000 - 0:00:12.000 Ball"


def test_formats(keye: Keye, movie: Path, folder: Path, says: Any) -> None:
    names = ("json", "jsonl", "md", "html", "csv", "srt", "vtt", "ffmetadata", "chapters", "mkv", "edl")
    options = [word for name in names for word in ("-f", name)]
    code, out, err = keye("summarize", str(movie), *options, "-o", "out/")
    assert (code, out) == (0, "")
    assert err.count("keye: wrote out/talk.") == len(names)
    assert (folder / "out/talk.chapters.txt").read_text() == "0:00 Ball\n0:12 Box\n0:24 Ring\n"
    record = json.loads((folder / "out/talk.json").read_text())
    assert record["text"] == "A ball rolls."
    assert (folder / "out/talk.jsonl").read_text() == (folder / "out/talk.json").read_text()
    assert (folder / "out/talk.md").read_text().startswith("# talk.mp4\n\nA ball rolls.\n\n## Chapters\n\n")
    page = (folder / "out/talk.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 3
    assert page.startswith("<!DOCTYPE html>")
    import pysubs2

    cues = pysubs2.load(str(folder / "out/talk.srt"))
    assert [(cue.start, cue.end, cue.plaintext) for cue in cues] == [
        (0, 12_000, "Ball\nIt is red."),
        (12_000, 24_000, "Box"),
        (24_000, 40_000, "Ring"),
    ]


def test_one_page_for_several_videos(keye: Keye, movie: Path, clips: Clips, folder: Path, says: Any) -> None:
    code, _, _ = keye(
        "summarize", str(movie), str(clips("talk-two.mp4", 80, rate=2, picture=shots(80))), "-o", "both.html"
    )
    page = (folder / "both.html").read_text()
    assert (code, page.count("<article")) == (0, 2)
    assert "<h1>2 videos</h1>" in page


def test_chapters_for_youtube_are_long_enough(keye: Keye, movie: Path, folder: Path, says: Any) -> None:
    says("0.0 - 4.0: a\n4.0 - 11.0: b\n11.0 - 19.0: c\n21.5 - 33.0: d\n33.0 - 40.0: e")
    assert keye("summarize", str(movie), "-f", "chapters", "-q") == (0, "0:00 a; b\n0:11 c\n0:21 d; e\n", "")
    # What cannot be such chapters is not lost.
    says("It rains.\n0.0 - 20.0: rain\n20.0 - 40.0: sun")
    code, out, err = keye("summarize", str(movie), "-f", "chapters", "-f", "html", "-o", "out/", "-q")
    assert code == 2
    assert out == "It rains.\n\n0:00:00.000 - 0:00:20.000 rain\n0:00:20.000 - 0:00:40.000 sun\n"
    assert "chapters for YouTube must be 3 or more" in err
    assert not (folder / "out").exists()


def test_what_is_done_is_written_though_a_later_video_fails(
    keye: Keye, movie: Path, clips: Clips, folder: Path, says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = clips("talk-two.mp4", 80, rate=2, picture=shots(80))
    answer = SharedPrefix.answer

    def fail_at_the_other(self: SharedPrefix, *arguments: Any, **options: Any) -> SharedAnswer:
        if len(done) == 1:
            raise InputError("the second video fails")
        done.append(1)
        return answer(self, *arguments, **options)

    done: list[int] = []
    monkeypatch.setattr(SharedPrefix, "answer", fail_at_the_other)
    code, _, err = keye("summarize", str(movie), str(other), "-o", "out/", "-f", "json", "-q")
    assert (code, err) == (3, "keye: the second video fails\n")
    assert [path.name for path in (folder / "out").iterdir()] == ["talk.json"]


def test_dry_run_is_the_plan_of_every_part(keye: Keye, movie: Path, says: Any) -> None:
    asked = says(SAID)
    code, out, err = keye("summarize", str(movie), "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, err, plan["schema"], plan["frames"]) == (0, "", "keye.plan/1", 20)
    code, out, _ = keye("summarize", str(movie), "--dry-run", "--json", "--max-tokens-video", "32")
    parts = [json.loads(line) for line in out.splitlines()]
    assert [part["inputs"][0]["start_s"] for part in parts] == [0.0, 20.0]
    assert asked == []
    code, out, _ = keye("summarize", str(movie), "--dry-run")
    assert "visual tokens" in out


def test_nothing_but_the_result_on_stdout(keye: Keye, movie: Path) -> None:
    """The toy model itself: it says nothing that has times."""
    code, out, err = keye("summarize", str(movie), "--no-think", "--max-tokens", "8", "--json")
    record = json.loads(out)
    assert (code, record["chapters"], record["stop_reason"]) == (0, [], "length")
    assert err.splitlines() == [
        "keye: warning: an answer was cut off after 8 tokens; raise --max-tokens",
        "keye: warning: no line of the answer about talk.mp4 has times, so there are no chapters",
    ]


BAD = {
    "nothing": ([], 2, "nothing to look at: give at least one video, as in `keye summarize clip.mp4`"),
    "stdin": (["-"], 2, "videos are not read from stdin: save it to a file and name that"),
    "no such file": (["none.mp4"], 3, "none.mp4 does not exist; check the path"),
    "image": (
        ["still.png"],
        3,
        "still.png is a still image, in which nothing happens; ask about it with keye ask",
    ),
    "no model": (["MOVIE", "-m", "nowhere"], 4, None),
    "style": (["MOVIE", "--style", "long"], 2, "there is no style long; there are brief, detailed, bullets"),
    "chapters": (["MOVIE", "--chapters", "few"], 2, "--chapters must be a number or auto, not 'few'"),
    "no chapters": (["MOVIE", "--chapters", "0"], 2, "--chapters must be from 1 to 1000, or auto, not 0"),
    "language": (["MOVIE", "--language", "<|x|>"], 2, "--language must be a language's name, as in German, not '<|x|>'"),
    "format": (["MOVIE", "-f", "docx"], 2, None),
    "two on stdout": (
        ["MOVIE", "-f", "srt", "-f", "md"],
        2,
        "srt and md cannot share stdout: give a folder for their files with -o",
    ),
    "json and srt": (
        ["MOVIE", "-f", "srt", "--json"],
        2,
        "--json and -f srt cannot share stdout: give a file for one with -o",
    ),
    "subtitles of several": (
        ["MOVIE", "MOVIE", "--subtitles", "a.srt"],
        2,
        "--subtitles goes with exactly one video, and 2 were given",
    ),
    "no subtitles": (["MOVIE", "--subtitles", "a.srt"], 3, "the subtitle file a.srt does not exist; check the path"),
    "taken": (["MOVIE", "-o", "taken.md"], 2, "taken.md exists; give another place with -o, or --overwrite to replace it"),
    "end": (["MOVIE", "--start", "50"], 2, "the part begins at 0:00:50.000, but talk.mp4 ends at 0:00:40.000"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), BAD.values(), ids=list(BAD))
def test_bad_input(
    keye: Keye,
    movie: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str | None,
) -> None:
    """Told before any weight is read."""
    from PIL import Image

    from keyecli import session

    def no_weights(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(session, "load_weights", no_weights)
    Image.new("RGB", (64, 64)).save(folder / "still.png")
    (folder / "taken.md").write_text("mine")
    given = [str(movie) if argument == "MOVIE" else argument for argument in arguments]
    got, out, err = keye("summarize", *given)
    assert (got, out, err.count("\n")) == (code, "", 1)
    if message is not None:
        assert err == f"keye: {message}\n"
    assert (folder / "taken.md").read_text() == "mine"


@pytest.mark.parametrize(
    "flag", [["--style", "long"], ["--chapters", "0"], ["--language", "7"], ["-f", "docx"]]
)
def test_a_wrong_flag_is_told_before_anything_heavy_is_imported(
    isolated: dict[str, str], flag: list[str]
) -> None:
    program = (
        "import sys\n"
        "from keyecli.cli import run\n"
        f"code = run(['summarize', 'none.mp4', *{flag}])\n"
        "print('heavy:', *(name for name in ('torch', 'transformers', 'rich') if name in sys.modules))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=isolated, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "heavy:\n")
