"""`keye report`: what became of a batch, as a table, as JSON, or as one HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keyecli.commands.options import OUTPUT, with_settings
from keyecli.commands.output import Overwrite
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.batch.report import BatchReport

_COLUMNS = ("task", "done", "failed", "mean", "median", "90%", "longest")


@with_settings(OUTPUT)
def report(
    outputs: Annotated[
        list[Path] | None, typer.Argument(metavar="OUT...", help="What keye batch wrote; several are one.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.html",
            help="Write an HTML page that opens offline.",
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: Overwrite = False,
    *,
    settings: Settings,
) -> None:
    """Show what became of a batch: counts, failures by kind, durations, throughput.

    Reads only what keye batch wrote, also while it is still writing.
    """
    if not outputs:
        raise UsageError("nothing to report on: name an output of keye batch, as in `keye report out.jsonl`")
    if output is not None:
        from keyecli.export.files import check_writable

        if output.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"a report is an HTML page: give -o a name that ends in .html, not {output}")
        check_writable([output], overwrite=overwrite)

    from keyecli.batch.report import read_report, render_html

    made = read_report(outputs)
    if output is not None:
        from keyecli import __version__
        from keyecli.export.files import write_texts

        write_texts([(output, render_html(made, generator=f"keye {__version__}"))], overwrite=overwrite)
        console.notice(f"wrote {output}")
    if settings.json:
        console.result(json.dumps(made.to_dict(), ensure_ascii=False))
    elif output is None:
        _print(made)


def _print(made: BatchReport) -> None:
    from rich.table import Table
    from rich.text import Text

    from keyecli.batch.report import facts, task_row
    from keyecli.export.text import one_line

    whole = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts(made):
        whole.add_row(name, Text(value))
    console.table(whole)
    if made.tasks:
        console.result("")
        tasks = Table(box=None, pad_edge=False)
        for place, name in enumerate(_COLUMNS):
            tasks.add_column(name, justify="right" if place else "left")
        for task in made.tasks:
            tasks.add_row(*task_row(task))
        console.table(tasks)
    if made.kinds:
        console.result("")
        kinds = Table(box=None, pad_edge=False)
        for name in ("failures", "jobs", "the first of them"):
            kinds.add_column(name, justify="right" if name == "jobs" else "left")
        for kind, count, message in made.kinds:
            kinds.add_row(Text(kind), str(count), Text(one_line(message)))
        console.table(kinds)
