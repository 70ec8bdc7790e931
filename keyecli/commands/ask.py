"""`keye ask`: a question about videos and images, answered on stdout as the words come."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import (
    ANSWER,
    FRAMES,
    MODEL,
    OUTPUT,
    DryRun,
    Duration,
    End,
    Start,
    Subtitles,
    Videos,
    ask_options,
    load_arguments,
    refuse_stdin,
    with_settings,
)
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

NANO_NOTICE = (
    "keye-nano answers, which knows nothing but synthetic FrameForge clips: "
    "for real footage choose a model with --model"
)
EXAMPLE = 'keye ask clip.mp4 "What happens?"'
MEDIA_SUFFIXES = {
    ".3gp", ".avi", ".bmp", ".flv", ".gif", ".jpeg", ".jpg", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".ogv", ".png", ".tif", ".tiff", ".ts", ".webm", ".webp", ".wmv",
}  # fmt: skip

Question = Annotated[
    str | None, typer.Argument(metavar="QUESTION", help="The question; - reads it from stdin.")
]


@with_settings(MODEL, FRAMES, ANSWER, OUTPUT)
def ask(
    videos: Videos = None,
    question: Question = None,
    start: Start = None,
    end: End = None,
    duration: Duration = None,
    subtitles: Subtitles = None,
    dry_run: DryRun = False,
    *,
    settings: Settings,
) -> None:
    """Answer a question about one or several videos and images.

    The answer streams on stdout; the model's reasoning goes to stderr, dim. Without --model the embedded
    keye-nano answers, which knows nothing but the synthetic clips of `keye forge`.
    """
    inputs, question = split_arguments(videos, question)
    asked = ask_options(settings, start=start, end=end, duration=duration, subtitles=subtitles)
    question = read_question(question)

    with leaving_at_once():
        from keyecli import session
        from keyecli.commands.plan import print_plan

    # Planned first: an input that is wrong, or too large for the machine, is told before weights are read.
    planned = session.plan(inputs, question, **load_arguments(settings), **asked)
    if dry_run:
        print_plan(planned, settings)
        return
    planned.check()
    printer = AnswerPrinter(show_thinking=settings.show_thinking)
    with console.progress() as on_progress:
        keye = session.load(**load_arguments(settings), on_progress=on_progress)
        if keye.is_nano:
            console.notice(NANO_NOTICE)
        answer = keye.ask(
            [item.info for item in planned.inputs],
            question,
            on_text=None if settings.json else printer.text,
            on_reasoning=None if settings.json else printer.reasoning,
            on_progress=on_progress,
            **asked,
        )
    printer.finish()
    if settings.json:
        console.result(json.dumps(answer.to_dict(), ensure_ascii=False))
    console.detail(
        f"{answer.prompt_tokens} prompt tokens and {answer.completion_tokens} new ones "
        f"in {answer.timings['total_s']:.1f} s"
    )


class AnswerPrinter:
    """Puts the pieces where they belong: text on stdout, reasoning on stderr, or before the text if it is shown."""

    def __init__(self, *, show_thinking: bool) -> None:
        self._show_thinking = show_thinking
        self._thought = False
        self._wrote = False

    def reasoning(self, piece: str) -> None:
        if self._show_thinking:
            console.result(piece, end="")
            self._thought = True
        else:
            console.reasoning(piece)

    def text(self, piece: str) -> None:
        console.end_reasoning()
        if self._thought and not self._wrote:
            console.result("\n")
        console.result(piece, end="")
        self._wrote = True

    def finish(self) -> None:
        console.end_reasoning()
        console.end_result()


def split_arguments(videos: list[str] | None, question: str | None) -> tuple[list[str], str]:
    """The inputs and the question; UsageError when one of them is missing."""
    if question is not None and _is_media(question):
        raise UsageError(f"no question after {question}: give one, as in `{EXAMPLE}`")
    if question is None or not videos:
        raise UsageError(f"nothing to look at: give a video and a question, as in `{EXAMPLE}`")
    refuse_stdin(videos)
    return videos, question


def read_question(question: str) -> str:
    """The question itself, from stdin for "-"; UsageError when it is empty."""
    if question == "-":
        if sys.stdin.isatty():
            console.notice("type the question, then Ctrl-D")
        question = sys.stdin.read()
    if not question.strip():
        raise UsageError("the question is empty: say what you want to know about the video")
    return question


def _is_media(text: str) -> bool:
    """True for what must be an input: an existing file, or one word that ends as media files do."""
    try:
        if Path(text).is_file():
            return True
    except (OSError, ValueError):  # a question can be longer than any file name
        return False
    return Path(text).suffix.lower() in MEDIA_SUFFIXES and not any(map(str.isspace, text))
