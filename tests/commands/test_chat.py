"""`keye chat` with a random toy model: questions from a pipe, from a terminal, and conversations from a file."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import Keye
from tests.commands.test_interrupt import Terminal

FEW = ("--no-think", "--max-tokens", "8")
CTRL_D = b"\x04"
CUT_OFF = "keye: warning: the answer was cut off after 8 tokens; raise --max-tokens\n"
READ = "keye: 5 frames are read, 75 tokens: ask, or /help\n"


@pytest.fixture(autouse=True)
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    return tiny_checkpoint


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], None]:
    """Puts text into a pipe that is stdin."""

    def pipe(text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return pipe


class Typist:
    """A terminal at which these lines are typed; an exception is what a key raises. Ctrl-D follows."""

    def __init__(self, lines: list[str | type[BaseException]]) -> None:
        self._lines = iter(lines)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        line = next(self._lines, "")
        if isinstance(line, str):
            return line and line + "\n"
        raise line


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *lines: monkeypatch.setattr(sys, "stdin", Typist(list(lines)))


@pytest.fixture(scope="module")
def answers(tiny_checkpoint: Path, clips: Callable[..., Path]) -> Callable[..., list[str]]:
    """`answers("When?", "Why?")`: what a conversation of these questions is answered with, from Python."""
    from keyecli import load

    keye = load(tiny_checkpoint)

    def answer(*questions: str) -> list[str]:
        chat = keye.chat(clips(), think=False, max_tokens=8)
        return [chat.ask(question).text for question in questions]

    return answer


def test_a_question_a_line(
    keye: Keye, clip: Path, piped: Callable[..., None], answers: Callable[..., list[str]]
) -> None:
    expected = answers("When?", "Why?")
    piped("When?\n\n  Why? \r\n")
    assert keye("chat", str(clip), *FEW) == (0, "".join(f"{text}\n" for text in expected), 2 * CUT_OFF)
    piped("\ufeffWhen?\nWhy?")
    assert keye("chat", str(clip), *FEW, "-q") == (0, "".join(f"{text}\n" for text in expected), "")
    piped("")
    assert keye("chat", str(clip), *FEW) == (0, "", "")


def test_json_lines(
    keye: Keye, clip: Path, piped: Callable[..., None], answers: Callable[..., list[str]]
) -> None:
    piped("When?\nWhy?\n")
    code, out, err = keye("chat", str(clip), *FEW, "--json", "-v")
    turns = [json.loads(line) for line in out.splitlines()]
    assert (code, [turn["number"] for turn in turns]) == (0, [1, 2])
    assert [turn["schema"] for turn in turns] == ["keye.chat/1"] * 2
    assert [turn["text"] for turn in turns] == answers("When?", "Why?")
    assert turns[1]["inputs"][0]["path"] == str(clip)
    assert turns[1]["reused_tokens"] > turns[0]["reused_tokens"] > 0
    assert (
        f"{turns[1]['prompt_tokens']} prompt tokens, {turns[1]['reused_tokens']} of them known, and 8 new"
        in err
    )


def test_reasoning_goes_to_stderr_or_before_the_answer(
    keye: Keye, clip: Path, piped: Callable[..., None]
) -> None:
    piped("When?\n")
    _, out, _ = keye("chat", str(clip), "--max-tokens", "8", "--json")
    reasoning = json.loads(out)["reasoning"]
    assert reasoning
    shown = "".join(character for character in reasoning if character.isprintable() or character in "\n\t")
    piped("When?\n")
    assert keye("chat", str(clip), "--max-tokens", "8") == (0, "", f"{shown}\n{CUT_OFF}")
    piped("When?\n")
    assert keye("chat", str(clip), "--max-tokens", "8", "--show-thinking")[1] == f"{reasoning}\n"


def test_what_can_be_typed_can_be_piped(
    keye: Keye, clip: Path, piped: Callable[..., None], answers: Callable[..., list[str]], folder: Path
) -> None:
    when, why = answers("When?", "Why?")
    (who,) = answers("Who?")
    piped("When?\n/retry\nWhy?\n/undo\n/edit Who?\n/clear\nWho?\n/save talk.md\n/exit\nWhy?\n")
    code, out, err = keye("chat", str(clip), *FEW)
    assert (code, out) == (0, "".join(f"{text}\n" for text in (when, when, why, who, who)))
    assert err == (
        f"{CUT_OFF}keye: without --temperature the likeliest answer comes again\n{CUT_OFF}{CUT_OFF}"
        f"keye: forgotten; turns left: 1\n{CUT_OFF}keye: all turns are forgotten; the video is not\n{CUT_OFF}"
        "keye: wrote talk.md\n"
    )
    page = (folder / "talk.md").read_text()
    assert page.startswith("# clip.mp4\n\n## Who?\n\n")
    assert page.count("## ") == 1


def test_drawn_again(keye: Keye, clip: Path, piped: Callable[..., None]) -> None:
    piped("When?\n/retry\n/retry\n")
    code, out, _ = keye("chat", str(clip), *FEW, "--temperature", "1.5", "--json", "--seed", "7")
    turns = [json.loads(line) for line in out.splitlines()]
    assert (code, [turn["seed"] for turn in turns]) == (0, [7, 8, 9])
    assert len({turn["text"] for turn in turns}) == 3
    assert {turn["number"] for turn in turns} == {1}


def test_a_line_that_fails_leaves_the_others_alone(
    keye: Keye, clip: Path, piped: Callable[..., None], answers: Callable[..., list[str]]
) -> None:
    lines = [
        "/retry",
        "When?",
        "What is <|im_end|>?",
        "/fly",
        "/undo now",
        "/save",
        "/save talk.txt",
        "/edit",
        "Why?",
    ]
    piped("\n".join(lines).encode() + b"\n\xff\n" + b"x" * 5000)
    code, out, err = keye("chat", str(clip), *FEW)
    assert (code, out) == (1, "".join(f"{text}\n" for text in answers("When?", "Why?")))
    names = "/retry, /edit TEXT, /undo, /clear, /save FILE, /help, /exit"
    # The tokenizer has something to say too.
    own = [line for line in err.replace(CUT_OFF, "").splitlines() if line.startswith("keye: ")]
    told = [line.removeprefix("keye: ") for line in own]
    assert told[:8] == [
        "nothing was asked yet",
        "the question contains <|im_end|>, a mark of the model's own: leave it out",
        f"/fly is no command; there are {names}",
        f"/undo now is no command; there are {names}",
        "say where to, as in /save talk.md or /save talk.json",
        "the name talk.txt does not tell a format: end it in .md or .json",
        "the question is empty: say what you want to know about the video",
        "a line of stdin is not UTF-8 text",
    ]
    assert told[8].startswith("the conversation takes 5,")
    assert told[9:] == ["9 of 11 lines failed, as told above"]


def test_a_saved_file_is_not_replaced_unasked(
    keye: Keye, clip: Path, piped: Callable[..., None], folder: Path
) -> None:
    (folder / "talk.md").write_text("mine")
    piped("/save talk.md\n")
    code, _, err = keye("chat", str(clip), *FEW)
    assert code == 1
    assert err.splitlines()[0].startswith(
        "keye: talk.md exists: give another name, or replace it with /save!"
    )
    assert (folder / "talk.md").read_text() == "mine"
    piped("/save! talk.md\n")
    assert keye("chat", str(clip), *FEW) == (0, "", "keye: wrote talk.md\n")
    assert (folder / "talk.md").read_text() == "# clip.mp4\n"


def test_a_saved_conversation_goes_on(
    keye: Keye, clip: Path, piped: Callable[..., None], answers: Callable[..., list[str]], folder: Path
) -> None:
    _, why = answers("When?", "Why?")
    piped("When?\n/save talk.json\n")
    assert keye("chat", str(clip), *FEW)[0] == 0
    piped("Why?\n")
    assert keye("chat", "--load", "talk.json", *FEW) == (0, f"{why}\n", CUT_OFF)
    piped("Why?\n")
    code, out, _ = keye("chat", str(clip), "--load", "talk.json", *FEW, "--json")
    turn = json.loads(out)
    assert (code, turn["number"], turn["text"]) == (0, 2, why)
    code, out, _ = keye("chat", "--load", "talk.json", "--dry-run", "--json")
    assert (code, json.loads(out)["visual_tokens"]) == (0, turn["inputs"][0]["tokens"])
    wrong: list[tuple[list[str], int, str]] = [
        (
            ["--load", "talk.json", "--fps", "1"],
            2,
            "talk.json has frames of its own: leave out --fps, --start",
        ),
        (
            [str(clip), str(clip), "--load", "talk.json"],
            2,
            "talk.json is not about so many files (2) but 1: name",
        ),
        (["--load", "nowhere.json"], 3, "the conversation nowhere.json cannot be read: No such file"),
        (
            [str(folder / "other.mp4"), "--load", "talk.json"],
            3,
            f"{folder / 'other.mp4'} is another file than",
        ),
    ]
    (folder / "other.mp4").write_bytes(clip.read_bytes() + b"\0")
    for arguments, expected, message in wrong:
        code, out, err = keye("chat", *arguments)
        assert (code, out) == (expected, "")
        assert err.startswith(f"keye: {message}")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "nothing to look at: give a video, as in `keye chat clip.mp4`"),
        (["-"], 2, "videos are not read from stdin: save it to a file and name that"),
        (["nowhere.mp4"], 3, "nowhere.mp4 does not exist"),
        (["*.avi"], 3, "*.avi does not exist, and as a pattern it matches nothing"),
        (
            ["clip.mp4", "--start", "100"],
            2,
            "the part begins at 0:01:40.000, but clip.mp4 ends at 0:00:02.040",
        ),
        (["clip.mp4", "-m", "./nowhere"], 4, "there is no model folder ./nowhere"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], code: int, message: str, keye: Keye, clip: Path, folder: Path
) -> None:
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    found, out, err = keye("chat", *arguments)
    assert (found, out) == (code, "")
    assert err.startswith(f"keye: {message}")
    assert err.count("\n") == 1


def test_the_embedded_model_says_what_it_is(
    keye: Keye, clip: Path, model: Path, piped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyecli.model import companions

    monkeypatch.delenv("KEYE_MODEL")
    monkeypatch.setattr(companions, "NANO_FOLDER", model)
    piped("")
    assert keye("chat", str(clip))[2].startswith("keye: keye-nano answers, which knows nothing but synthetic")


# At a terminal. Its stdout is a file here, so that the prompt stands on stderr.


def test_typed_questions(
    keye: Keye, clip: Path, typed: Callable[..., None], answers: Callable[..., list[str]], folder: Path
) -> None:
    (folder / "talk.md").write_text("mine")
    typed("When?", "/save talk.md", "no", "/save talk.md", "y", "/save! talk.md", "/fly", "/help")
    code, out, err = keye("chat", str(clip), *FEW)
    assert (code, out) == (0, answers("When?")[0] + "\n")
    asked = "talk.md exists; replace it? [y/N] "
    assert err.startswith(
        f"{READ}> {CUT_OFF}> {asked}keye: nothing was written\n> {asked}keye: wrote talk.md\n> keye: wrote talk.md\n"
        "> keye: /fly is no command; there are /retry, "
    )
    assert "/clear      forget all of them, not the video\n" in err
    assert err.endswith("\n> \n")
    assert "When?" in (folder / "talk.md").read_text()


def test_ctrl_c_at_the_prompt(keye: Keye, clip: Path, typed: Callable[..., None]) -> None:
    said = "> \nkeye: Ctrl-C again, or Ctrl-D, leaves\n> "
    typed(KeyboardInterrupt)
    assert keye("chat", str(clip), *FEW) == (0, "", f"{READ}{said}\n")
    typed(KeyboardInterrupt, "/clear", KeyboardInterrupt, KeyboardInterrupt)
    code, out, err = keye("chat", str(clip), *FEW)
    assert (code, out) == (130, "")
    assert err == f"{READ}{said}keye: all turns are forgotten; the video is not\n{said}\nkeye: interrupted\n"


def test_ctrl_c_stops_an_answer(
    keye: Keye,
    clip: Path,
    typed: Callable[..., None],
    piped: Callable[..., None],
    answers: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from keyecli.commands.chat import AnswerPrinter

    write = AnswerPrinter.text
    pieces = 0

    def stopped(self: Any, piece: str) -> None:
        nonlocal pieces
        write(self, piece)
        pieces += 1
        if pieces == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerPrinter, "text", stopped)
    typed("When?", "/retry", "/exit")
    code, out, err = keye("chat", str(clip), *FEW)
    (whole,) = answers("When?")
    begun, again = out.removesuffix(f"{whole}\n"), out[-len(whole) - 1 :]
    assert (code, again) == (0, f"{whole}\n")
    assert whole.startswith(begun.removesuffix("\n"))
    assert len(begun) > 1
    assert "keye: stopped; what came is kept: /retry answers again, /undo forgets it\n> keye: without" in err
    pieces = 0
    piped("When?\nWhy?\n")
    code, out, err = keye("chat", str(clip), *FEW)
    assert (code, out, err) == (130, begun, "keye: interrupted\n")


class Keyboard(Terminal):
    """A terminal whose keys are pressed."""

    def type(self, line: str) -> None:
        self.press(line.encode() + b"\n")

    def press(self, keys: bytes) -> None:
        os.write(self._mine, keys)


@pytest.fixture
def keyboard(clip: Path, isolated: dict[str, str]) -> Iterator[Keyboard]:
    options = ["--no-think", "--max-tokens", "3000"]  # the toy model then writes some 600 tokens
    command = [sys.executable, "-m", "keyecli", "chat", str(clip), *options]
    opened = Keyboard(command, isolated | {"TERM": "dumb"})
    try:
        yield opened
    finally:
        opened.close()


def test_a_real_terminal(keyboard: Keyboard) -> None:
    def prompt_after(words: bytes) -> None:
        keyboard.read_until(lambda seen: seen.rpartition(words)[2].endswith(b"\n> ") and words in seen)

    prompt_after(b"ask, or /help")
    keyboard.type("When?")
    begun = b"> When?\r\n"
    keyboard.read_until(lambda seen: len(seen.partition(begun)[2]) > 8)
    keyboard.process.send_signal(signal.SIGINT)
    prompt_after(b"stopped; what came is kept")
    keyboard.type("/undo")
    prompt_after(b"forgotten; turns left: 0")
    keyboard.type("/help")
    prompt_after(b"Ctrl-C stops an answer")
    keyboard.press(CTRL_D)
    assert keyboard.end() == 0
    assert keyboard.seen.endswith(b"> \r\n")
    assert b"Traceback" not in keyboard.seen
