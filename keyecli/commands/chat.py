"""`keye chat`: a conversation about videos and images, at a prompt or with a question a line from stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.ask import NANO_NOTICE, AnswerPrinter
from keyecli.commands.inputs import expand
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
from keyecli.errors import KeyeError, UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.engine.plan import RunPlan
    from keyecli.tasks.ask import AskSettings
    from keyecli.tasks.chat import Chat
    from keyecli.tasks.transcript import Turn

PROMPT = "> "
HELP = {
    "/retry": "answer the last question again; with --temperature, with another seed",
    "/edit TEXT": "ask TEXT in the place of the last question",
    "/undo": "forget the last question and its answer",
    "/clear": "forget all of them, not the video",
    "/save FILE": "write the conversation: .md to read, .json to go on from with --load; /save! replaces a file",
    "/help": "this list",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


@with_settings(MODEL, FRAMES, ANSWER, OUTPUT)
def chat(
    videos: Videos = None,
    saved: Annotated[
        Path | None,
        typer.Option(
            "--load",
            metavar="FILE",
            help="Go on with a conversation that /save wrote as JSON, about the same files.",
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
    """Talk about one or several videos and images, which the model looks at once.

    Questions are typed at a prompt; /help lists what else can be typed there. Ctrl-C stops an answer, Ctrl-D leaves.

    When stdin is no terminal, each of its lines is a question. Answers go to stdout, one after the other, and all else to
    stderr; --json prints a line for each answer. A question that fails is told on stderr, the others are answered, and
    the exit code is 1.

    Without --model the embedded keye-nano answers, which knows nothing but the synthetic clips of `keye forge`.
    """
    if not videos and saved is None:
        raise UsageError("nothing to look at: give a video, as in `keye chat clip.mp4`")
    refuse_stdin(videos or [])
    asked = ask_options(settings, start=start, end=end, duration=duration, subtitles=subtitles)
    inputs = expand(videos or [])

    with leaving_at_once():
        from keyecli import session
        from keyecli.commands.plan import print_plan
        from keyecli.tasks.chat import begin_chat

    planned, chosen, turns = _plan(inputs, saved, asked, settings)
    if dry_run:
        print_plan(planned, settings)
        return
    planned.check()
    with console.progress() as on_progress:
        keye = session.load(**load_arguments(settings), on_progress=on_progress)
        if keye.is_nano:
            console.notice(NANO_NOTICE)
        infos = [item.info for item in planned.inputs]
        begun = begin_chat(keye.loaded, infos, chosen, turns=turns, on_progress=on_progress)
    _Dialog(begun, chosen, settings).run()


def _plan(
    inputs: list[str], saved: Path | None, asked: dict[str, Any], settings: Settings
) -> tuple[RunPlan, AskSettings, tuple[Turn, ...]]:
    """What looking at the inputs takes, the settings of the conversation, and the turns that were had before.

    Planned first: an input that is wrong, or too large for the machine, is told before weights are read.
    """
    from keyecli import session
    from keyecli.model.checkpoint import load_preprocessor, resolve_model
    from keyecli.tasks.options import ask_settings
    from keyecli.tasks.transcript import read_transcript, require_utf8, resume

    preprocessor = load_preprocessor(resolve_model(settings.model, settings.revision))
    chosen = ask_settings(preprocessor, **asked)
    paths: list[str | Path] = list(inputs)
    turns: tuple[Turn, ...] = ()
    if saved is not None:
        transcript = read_transcript(saved)
        paths, chosen = resume(transcript, paths, chosen, ask_settings(preprocessor).sampling)
        turns = transcript.turns
    if settings.json:
        require_utf8(paths)
    return session.plan(paths, settings=chosen, **load_arguments(settings)), chosen, turns


class _Dialog:
    """Lines in, answers out, until the lines end or /exit."""

    def __init__(self, chat: Chat, asked: AskSettings, settings: Settings) -> None:
        self._chat = chat
        self._asked = asked.generation
        self._settings = settings
        self._typed = sys.stdin.isatty()
        self._read = _typed_line if self._typed else _piped_line
        self._done = self._failed = 0

    def run(self) -> None:
        """KeyeError, at the end: a line of several from a file or a pipe failed."""
        if self._typed:
            _edit_lines()
            frames = sum(report.frames for report in self._chat.inputs)
            console.notice(
                f"{frames} frames are read, {self._chat.visual_tokens:,} tokens: ask, or /help"
                + (f"; turns so far: {len(self._chat.turns)}" if self._chat.turns else "")
            )
        while True:
            with self._telling():
                line = self._read()
                if line is None or line.strip() == "/exit":
                    break
                if line.strip():
                    self._do_stoppable(line.strip())
                    self._done += 1
        if self._failed and not self._typed:
            lines = self._done + self._failed
            raise KeyeError(f"{self._failed} of {lines} lines failed, as told above")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside the block, what is wrong with one line ends the block alone."""
        try:
            yield
        except KeyeError as error:
            self._failed += 1
            console.end_reasoning()
            console.end_result()
            console.error(str(error))

    def _do_stoppable(self, line: str) -> None:
        """Ctrl-C stops what a typed line began, and everything where nobody types."""
        try:
            self._do(line)
        except KeyboardInterrupt:
            if not self._typed:
                raise
            console.notice("stopped")

    def _do(self, line: str) -> None:
        command, argument = [*line.split(maxsplit=1), ""][:2]
        if not command.startswith("/"):
            self._answer(lambda **listeners: self._chat.ask(line, **listeners))
        elif command == "/edit":
            number = len(self._chat.turns)
            self._answer(lambda **listeners: self._chat.edit(number, argument, **listeners))
        elif command in ("/save", "/save!"):
            self._save(argument, overwrite=command == "/save!")
        elif argument or command not in HELP:
            raise UsageError(f"{line} is no command; there are {', '.join(HELP)}")
        else:
            {"/retry": self._retry, "/undo": self._undo, "/clear": self._clear, "/help": _help}[command]()

    def _retry(self) -> None:
        if self._chat.turns and self._asked.temperature == 0:
            console.notice("without --temperature the likeliest answer comes again")
        self._answer(self._chat.retry)

    def _undo(self) -> None:
        self._chat.undo()
        console.notice(f"forgotten; turns left: {len(self._chat.turns)}")

    def _clear(self) -> None:
        self._chat.clear()
        console.notice("all turns are forgotten; the video is not")

    def _answer(self, begin: Callable[..., Turn]) -> None:
        before = self._chat.turns
        printer = AnswerPrinter(show_thinking=self._settings.show_thinking)
        quiet = self._settings.json
        try:
            with console.progress() as on_progress:
                begin(
                    on_text=None if quiet else printer.text,
                    on_reasoning=None if quiet else printer.reasoning,
                    on_progress=on_progress,
                )
        except KeyboardInterrupt:
            printer.finish()
            if not self._typed or self._chat.turns is before:
                raise
        printer.finish()
        self._tell(self._chat.turns[-1])

    def _tell(self, turn: Turn) -> None:
        """Print what remains when an answer has ended."""
        if self._settings.json:
            console.result(json.dumps(turn.to_dict(), ensure_ascii=False))
        if turn.stop_reason == "interrupted":
            console.notice("stopped; what came is kept: /retry answers again, /undo forgets it")
        elif turn.stop_reason == "length":
            full = turn.settings["max_tokens"] < self._asked.max_tokens
            way = "the context is full: /undo or /clear make room" if full else "raise --max-tokens"
            console.warning(f"the answer was cut off after {turn.completion_tokens} tokens; {way}")
        console.detail(
            f"{turn.prompt_tokens} prompt tokens, {turn.reused_tokens} of them known, and {turn.completion_tokens} new "
            f"ones in {turn.timings['total_s']:.1f} s"
        )

    def _save(self, name: str, *, overwrite: bool) -> None:
        if not name:
            raise UsageError("say where to, as in /save talk.md or /save talk.json")
        path = Path(name).expanduser()
        if self._typed and not overwrite and path.is_file():
            overwrite = _agreed(f"{path} exists; replace it? [y/N] ")
            if not overwrite:
                console.notice("nothing was written")
                return
        self._chat.save(path, overwrite=overwrite)
        console.notice(f"wrote {path}")


def _help() -> None:
    width = max(map(len, HELP))
    for name, meaning in HELP.items():
        sys.stderr.write(f"{name:{width}}  {meaning}\n")


def _edit_lines() -> None:
    """Arrow keys, history and searching at the prompt, where this Python has them."""
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` uses it once it is imported


def _typed_line() -> str | None:
    """A line from the terminal, None for Ctrl-D. KeyboardInterrupt when Ctrl-C comes twice in a row."""
    stopped = False
    while True:
        try:
            return _prompted(PROMPT)
        except EOFError:
            sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            if stopped:
                raise
            stopped = True
            console.notice("Ctrl-C again, or Ctrl-D, leaves")
        except UnicodeDecodeError:
            raise UsageError("what was typed is not UTF-8 text") from None


def _piped_line() -> str | None:
    """The next line of stdin, None at its end."""
    line = sys.stdin.buffer.readline()
    try:
        return line.decode("utf-8-sig") if line else None
    except UnicodeDecodeError:
        raise UsageError("a line of stdin is not UTF-8 text") from None


def _agreed(question: str) -> bool:
    try:
        return _prompted(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        sys.stderr.write("\n")
        return False


def _prompted(prompt: str) -> str:
    """What is typed behind `prompt`, which stands on stderr where stdout is not the terminal. EOFError for Ctrl-D."""
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")
