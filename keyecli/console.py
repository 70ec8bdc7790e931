"""Where words go: results on stdout, everything else on stderr, and nothing moves when nobody watches."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

_DIM, _RED, _YELLOW, _RESET = "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
# C0 and C1 control characters except newline and tab: a file name or a model's answer must not steer the terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PLAIN_TABLE_WIDTH = 200  # columns of a table on a pipe or in a file: wide enough that no cell is wrapped


class ProgressReport(Protocol):
    """What a running task is told: how many of how many units are done."""

    def __call__(self, description: str, done: float, total: float | None) -> None: ...


def one_line(text: str) -> str:
    """`text` on a single line, without control characters."""
    return _CONTROLS.sub("?", " ".join(text.split()))


class Console:
    """The two streams of a command. `configure` is called once, when the options are known."""

    def __init__(self) -> None:
        self.quiet = False
        self.verbose = False
        self.debug = False
        self._animate = True
        self._in_reasoning = False
        self._in_result = False
        self._bar: Progress | None = None

    def configure(
        self, *, quiet: bool = False, verbose: bool = False, progress: bool = True, debug: bool = False
    ) -> None:
        """Set what stderr shows: `quiet` leaves errors only, `verbose` adds details, `progress=False` stops animation."""
        self.quiet, self.verbose, self.debug, self._animate = quiet, verbose, debug, progress

    @property
    def animated(self) -> bool:
        """True where a progress bar may be drawn: stderr is a terminal that can move its cursor, and nobody objected."""
        return self._animate and not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def result(self, text: str, end: str = "\n") -> None:
        """Write a result (or a piece of one) to stdout and flush it, so that a reader on a pipe sees it at once."""
        self._end_bar()
        if sys.stdout.isatty():
            text = _CONTROLS.sub("", text)
        sys.stdout.write(text + end)
        sys.stdout.flush()
        self._in_result = not (text + end).endswith("\n")

    def end_result(self) -> None:
        """Finish the line that `result` may have left open."""
        if self._in_result:
            self.result("")

    def notice(self, text: str) -> None:
        """One line that is good to know; silent with --quiet."""
        if not self.quiet:
            self._line(text, _DIM)

    def detail(self, text: str) -> None:
        """One line for --verbose."""
        if self.verbose and not self.quiet:
            self._line(text, _DIM)

    def warning(self, text: str) -> None:
        """One line about something that was not as it should be; silent with --quiet."""
        if not self.quiet:
            self._line(f"warning: {text}", _YELLOW)

    def error(self, text: str) -> None:
        """One line that says why the command stops; always shown."""
        self._line(text, _RED)

    def reasoning(self, text: str) -> None:
        """A piece of the model's reasoning, dim, as it comes; silent with --quiet."""
        if self.quiet or not text:
            return
        self._end_bar()
        sys.stderr.write(self._styled(_CONTROLS.sub("", text), _DIM))
        sys.stderr.flush()
        self._in_reasoning = not text.endswith("\n")

    def end_reasoning(self) -> None:
        """Finish the line that `reasoning` may have left open."""
        if self._in_reasoning:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._in_reasoning = False

    def table(self, table: Table) -> None:
        """Print a rich table on stdout; on a pipe it is plain text that is not wrapped."""
        from rich.console import Console as RichConsole

        on_terminal = sys.stdout.isatty()
        RichConsole(
            file=sys.stdout,
            width=None if on_terminal else _PLAIN_TABLE_WIDTH,
            color_system="auto" if on_terminal and _colours_wanted() else None,
            highlight=False,
        ).print(table)

    @contextmanager
    def progress(self) -> Iterator[ProgressReport]:
        """Show a bar on stderr, where it may be drawn, until a result is written or the block ends; then it is gone."""
        if not self.animated:
            yield _ignore_progress
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        stderr = RichConsole(file=sys.stderr, color_system="auto" if _colours_wanted() else None)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
        )
        bar = Progress(*columns, console=stderr, transient=True)
        task = bar.add_task("starting", total=None, amount="")

        def report(description: str, done: float, total: float | None) -> None:
            amount = f"{done / total:.0%}" if total else f"{done:g}"
            bar.update(task, description=description, completed=done, total=total, amount=amount)

        try:
            bar.start()
            self._bar = bar
            yield report
        finally:
            self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, text: str, style: str) -> None:
        self.end_reasoning()
        if sys.stdout.isatty():  # both streams meet on the screen
            self.end_result()
        line = self._styled(f"keye: {one_line(text)}", style) + "\n"
        if self._bar is None:
            sys.stderr.write(line)
            sys.stderr.flush()
        else:  # above the bar, which moves down
            self._bar.console.out(line, end="", highlight=False)

    def _styled(self, text: str, style: str) -> str:
        return f"{style}{text}{_RESET}" if _is_coloured(sys.stderr) else text


def _ignore_progress(description: str, done: float, total: float | None) -> None:
    """The report of a console that draws nothing."""


def _colours_wanted() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _is_coloured(stream: TextIO) -> bool:
    return stream.isatty() and _colours_wanted()


console = Console()
"""The console of this process; commands configure it from their options."""
