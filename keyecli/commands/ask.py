"""`keye ask`: a question about videos and images, answered on stdout as the words come."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.inputs import MEDIA_SUFFIXES, STDIN, expand, media_below, read_list
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
from keyecli.errors import InputError, KeyeError, MemoryLimitError, UsageError
from keyecli.settings import Settings
from keyecli.tasks.ask_request import check_samples

if TYPE_CHECKING:
    from keyecli.session import Keye
    from keyecli.tasks.ask import Answer, AskSettings, Sample

NANO_NOTICE = (
    "keye-nano answers, which knows nothing but synthetic FrameForge clips: "
    "for real footage choose a model with --model"
)
EXAMPLE = 'keye ask clip.mp4 "What happens?"'

Question = Annotated[
    str | None, typer.Argument(metavar="QUESTION", help="The question; - reads it from stdin.")
]


@with_settings(MODEL, FRAMES, ANSWER, OUTPUT)
def ask(
    videos: Videos = None,
    question: Question = None,
    listed: Annotated[
        str | None,
        typer.Option(
            "--inputs", "-i", metavar="LIST", help="Ask about each file in LIST, one path a line; - is stdin."
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Ask about each file in the folders, and below them.")
    ] = False,
    each: Annotated[
        bool, typer.Option("--each", help="Ask about each VIDEO by itself, not about all together.")
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            "-n",
            metavar="N",
            help="Draw so many answers; each has the seed of the one before, plus 1.",
            rich_help_panel="Answer",
        ),
    ] = None,
    start: Start = None,
    end: End = None,
    duration: Duration = None,
    subtitles: Subtitles = None,
    dry_run: DryRun = False,
    *,
    settings: Settings,
) -> None:
    """Answer a question about one or several videos and images.

    The answer streams on stdout; the model's reasoning goes to stderr, dim. Several videos are seen together and get one
    answer. With -n there are several answers, all at the end, each below a line with its number. With -i, -r or --each
    there is an answer for each, below its name; one that cannot be used is told on stderr, the others are answered, and
    the exit code is 1. A pattern in quotes is matched as the shell would.

    Without --model the embedded keye-nano answers, which knows nothing but the synthetic clips of `keye forge`.
    """
    # No default of the option's own: Typer would load pydantic to validate it in every run.
    samples = 1 if samples is None else samples
    check_samples(samples, settings.temperature)
    one_by_one = each or recursive or listed is not None
    inputs, question = split_arguments(videos, question, listed=listed, recursive=recursive)
    if one_by_one and subtitles is not None:
        raise UsageError("--subtitles goes with exactly one video, and -i, -r and --each ask about several")
    asked = ask_options(settings, start=start, end=end, duration=duration, subtitles=subtitles)
    question = read_question(question)
    inputs = expand(inputs, recursive=recursive)
    if one_by_one:
        named = chain(inputs, [] if listed is None else read_list(listed))
        _ask_each(named, question, asked, settings, samples=samples, recursive=recursive, dry_run=dry_run)
    else:
        _ask_together(inputs, question, asked, settings, samples=samples, dry_run=dry_run)


def _ask_together(
    inputs: list[str],
    question: str,
    asked: dict[str, Any],
    settings: Settings,
    *,
    samples: int,
    dry_run: bool,
) -> None:
    """One answer about all inputs."""
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
    streamed = _streamed(printer, settings, samples)
    with console.progress() as on_progress:
        keye = session.load(**load_arguments(settings), on_progress=on_progress)
        if keye.is_nano:
            console.notice(NANO_NOTICE)
        answer = keye.ask(
            [item.info for item in planned.inputs],
            question,
            n=samples,
            on_progress=on_progress,
            **streamed,
            **asked,
        )
    _finish(printer, answer, settings)


def _ask_each(
    named: Iterable[str],
    question: str,
    asked: dict[str, Any],
    settings: Settings,
    *,
    samples: int,
    recursive: bool,
    dry_run: bool,
) -> None:
    """An answer about each file, in their order; what is wrong with one of them leaves the others alone.

    KeyeError, at the end: some of them failed. InputError: nothing was named.
    """
    with leaving_at_once():
        from keyecli import session
        from keyecli.commands.plan import print_plan

    keye = None if dry_run else _load(settings)
    if keye is not None:
        asked = {"settings": _checked_settings(keye, question, asked)}
    tally = _Tally()
    printer = AnswerPrinter(show_thinking=settings.show_thinking)
    for name in named:
        files = []
        with tally.telling(name):
            files = media_below(name) if recursive and Path(name).is_dir() else [name]
        for path in files:
            with tally.telling(path):
                _require_utf8(path)
                if keye is None:
                    print_plan(session.plan(path, question, **load_arguments(settings), **asked), settings)
                else:
                    _answer_one(keye, path, question, asked, settings, samples, printer)
                tally.done += 1
    tally.check()


class _Tally:
    """Counts the inputs that were answered and those that failed, and tells on stderr why."""

    def __init__(self) -> None:
        self.done = self.failed = 0

    @contextmanager
    def telling(self, name: str) -> Iterator[None]:
        """Inside the block, what is wrong with one input ends the block alone."""
        try:
            yield
        except (InputError, UsageError, MemoryLimitError) as error:
            self.failed += 1
            console.end_reasoning()
            console.end_result()
            shown = _shown(name)
            console.error(str(error) if shown in str(error) else f"{shown}: {error}")

    def check(self) -> None:
        """KeyeError when an input failed, InputError when there was none."""
        if self.failed:
            raise KeyeError(f"{self.failed} of {self.done + self.failed} inputs failed, as told above")
        if not self.done:
            raise InputError("nothing to look at: the list names no file")


def _load(settings: Settings) -> Keye:
    from keyecli import session

    with console.progress() as on_progress:
        keye = session.load(**load_arguments(settings), on_progress=on_progress)
    if keye.is_nano:
        console.notice(NANO_NOTICE)
    return keye


def _checked_settings(keye: Keye, question: str, asked: dict[str, Any]) -> AskSettings:
    """The settings of every run. UsageError for what would be wrong in each of them."""
    from keyecli.tasks.ask import refuse_reserved_words
    from keyecli.tasks.options import ask_settings

    refuse_reserved_words(question, keye.tokenizer)
    return ask_settings(keye.preprocessor, **asked)


def _require_utf8(path: str) -> None:
    """InputError for a name that JSON cannot hold."""
    shown = _shown(path)
    if shown != path:
        raise InputError(f"the name of {shown} is not UTF-8: give the file another one")


def _shown(path: str) -> str:
    """A name as it can be written, bytes that are no UTF-8 as escapes."""
    return path.encode("utf-8", "backslashreplace").decode()


def _answer_one(
    keye: Keye,
    path: str,
    question: str,
    asked: dict[str, Any],
    settings: Settings,
    samples: int,
    printer: AnswerPrinter,
) -> None:
    if not settings.json:
        printer.begin(path)
    with console.progress() as on_progress:
        answer = keye.ask(
            path,
            question,
            n=samples,
            on_progress=on_progress,
            **_streamed(printer, settings, samples),
            **asked,
        )
    _finish(printer, answer, settings)


def _streamed(printer: AnswerPrinter, settings: Settings, samples: int) -> dict[str, Any]:
    """Who gets the pieces of an answer; nobody where it is printed when it is complete."""
    if settings.json or samples > 1:
        return {}
    return {"on_text": printer.text, "on_reasoning": printer.reasoning}


def _finish(printer: AnswerPrinter, answer: Answer, settings: Settings) -> None:
    """Print what remains when an answer is complete."""
    if settings.json:
        console.result(json.dumps(answer.to_dict(), ensure_ascii=False))
    elif len(answer.answers) > 1:
        for number, sample in enumerate(answer.answers, 1):
            printer.sample(number, len(answer.answers), sample)
    else:
        printer.finish()
    console.detail(
        f"{answer.prompt_tokens} prompt tokens and {sum(one.completion_tokens for one in answer.answers)} new ones "
        f"in {answer.timings['total_s']:.1f} s"
    )


class AnswerPrinter:
    """Puts the pieces where they belong: text on stdout, reasoning on stderr, or before the text if it is shown."""

    def __init__(self, *, show_thinking: bool) -> None:
        self._show_thinking = show_thinking
        self._thought = False
        self._wrote = False
        self._heading = ""
        self._headed = False

    def begin(self, name: str) -> None:
        """What comes is about this file: its name goes above all that is printed, with a line between it and the last."""
        self._heading = f"\n{name}" if self._headed else name
        self._thought = self._wrote = False

    def reasoning(self, piece: str) -> None:
        if self._show_thinking:
            self._write(piece)
            self._thought = True
        else:
            console.reasoning(piece)

    def text(self, piece: str) -> None:
        console.end_reasoning()
        if self._thought and not self._wrote:
            console.result("\n")
        self._write(piece)
        self._wrote = True

    def sample(self, number: int, count: int, sample: Sample) -> None:
        """One whole answer of several, below a line that numbers it, with a line between it and the last."""
        self._thought = self._wrote = False
        self._write(("\n" if number > 1 else "") + f"{number} of {count}:\n")
        if sample.reasoning:
            self.reasoning(sample.reasoning)
        if sample.text:
            self.text(sample.text)
        self.finish()

    def finish(self) -> None:
        console.end_reasoning()
        if self._heading:
            self._write("")
        console.end_result()

    def _write(self, piece: str) -> None:
        if self._heading:
            console.result(self._heading)
            self._heading, self._headed = "", True
        console.result(piece, end="")


def split_arguments(
    videos: list[str] | None, question: str | None, *, listed: str | None = None, recursive: bool = False
) -> tuple[list[str], str]:
    """The inputs and the question; UsageError when one of them is missing.

    `listed`: there is a list of inputs, so that none need be named. `recursive`: an input may be a folder.
    """
    if question is not None and (_is_media(question) or (recursive and _is_folder(question))):
        raise UsageError(f"no question after {question}: give one, as in `{EXAMPLE}`")
    if question is None or not (videos or listed):
        raise UsageError(f"nothing to look at: give a video and a question, as in `{EXAMPLE}`")
    if listed == STDIN and question == STDIN:
        raise UsageError("stdin can be the list or the question, not both")
    refuse_stdin(videos or [])
    return videos or [], question


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


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except (OSError, ValueError):
        return False
