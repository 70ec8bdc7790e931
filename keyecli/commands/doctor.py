"""`keye doctor`: what this machine can do, whether a model is whole, and whether it answers what is known."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import MODEL, OUTPUT, load_arguments, with_settings
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from keyecli.doctor.examine import Report
    from keyecli.doctor.finding import Finding


# Whatever says how a model is loaded; what was encoded before must not answer for it.
LOADING = {name: option for name, option in MODEL.items() if not name.startswith("cache")}


@with_settings(LOADING, OUTPUT)
def doctor(
    ask: Annotated[
        bool,
        typer.Option("--ask", help="Load the model (default: keye-nano) and ask it what is known."),
    ] = False,
    hashes: Annotated[
        bool,
        typer.Option("--hashes", help="Read the model's files and compare their hashes, where known."),
    ] = False,
    *,
    settings: Settings,
) -> None:
    """Check this machine, and with --model a checkpoint.

    Every finding is ok, a warning or a problem, the latter two with a remedy: Python, torch, driver, GPUs, every kernel
    against its definition, video codecs, memory, disk, caches, and how many tokens fit. A model's names, shapes and types
    are compared with its configuration without loading it; --ask puts questions about forged clips to its real weights.
    Exit code 4 for a model that cannot be used, 1 for other problems.
    """
    if hashes and settings.model is None:
        raise UsageError("--hashes compares the files of a model: name one with --model")
    with leaving_at_once():
        from keyecli.doctor.examine import examine

    loading = {**load_arguments(settings), "cache": False}
    report = examine(
        loading, console.progress, _ignore if settings.json else _Sections().say, hashes=hashes, ask=ask
    )
    if settings.json:
        console.result(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        console.result("\nmemory")
        console.table(_fits_table(report))
        if report.answers:
            console.result("\nknown answers")
            console.table(_answers_table(report))
    if report.code:
        raise typer.Exit(report.code)


class _Sections:
    """Prints findings as they come, under a heading for each section."""

    def __init__(self) -> None:
        self._section: str | None = None

    def say(self, finding: Finding) -> None:
        if finding.section != self._section:
            console.result(f"\n{finding.section}" if self._section else finding.section)
            self._section = finding.section
        console.result(f"  {finding.status:<8} {finding.name}: {finding.text}")
        if finding.remedy is not None:
            console.result(f"           → {finding.remedy}")


def _ignore(finding: Finding) -> None:
    """With --json everything is printed at the end, as one object."""


def _fits_table(report: Report) -> Table:
    from rich.table import Table

    from keyecli.engine.plan import gib

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "flags"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens", "weights", "cache", "workspace", "in all", "free"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in report.fits:
        memory = row.memory
        sizes = (memory.weights_bytes, memory.cache_bytes, memory.workspace_bytes, memory.total_bytes)
        free = "unknown" if row.free_bytes is None else gib(row.free_bytes)
        fits = {True: f"yes, on {row.device}", False: "no", None: "unknown"}[row.fits]
        table.add_row(row.model, row.flags, f"{row.tokens:,}", *map(gib, sizes), free, fits)
    return table


def _answers_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("clip", "topic", "question", "truth", "given"):
        table.add_column(heading, overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    for item in report.answers:
        known = item.known
        table.add_row(
            str(known.clip + 1), known.topic, known.question, known.truth, item.given, f"{item.score:.2f}"
        )
    return table
