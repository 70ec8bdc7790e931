"""`keye data check`: training data against its videos, row by row, without the model's weights."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import FRAMES, MODEL, OUTPUT, with_settings
from keyecli.console import console
from keyecli.errors import InputError, UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.training.data.check import Finding, RowCheck, Summary
    from keyecli.training.data.repair import GoodRows
    from keyecli.training.data.source import DataFile

ACTIONS = ("check",)
SCHEMA = "keye.data/1"
BAR_CHARACTERS = 40
_SHARED = {name: MODEL[name] for name in ("model", "revision")}
_KINDS = {
    "row": "of no known form",
    "placeholders": "whose placeholders and files do not match",
    "clip": "with clips that cannot be used",
    "sampling": "that cannot be sampled",
    "layout": "that cannot be laid out",
    "length": "that are too long",
    "span": "with wrong spans",
    "duplicate": "that are there twice",
    "parity": "that differ from answering",
}


def _option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


@with_settings(_SHARED, FRAMES, OUTPUT)
def data(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="check.")],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="JSON lines, a JSON array, Parquet, dataset_info.json."),
    ] = None,
    format: Annotated[
        str | None,
        _option(
            "Data",
            "--format",
            metavar="FORMAT",
            help="swift, sharegpt, openai, alpaca, trl, qwen, timelens or forge. Default: told by the columns.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        _option("Data", "--dataset", metavar="NAME", help="Which data set of a dataset_info.json."),
    ] = None,
    media_root: Annotated[
        Path | None,
        _option(
            "Data",
            "--media-root",
            metavar="DIR",
            help="What relative paths count from. Default: FILE's folder.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        _option(
            "Data", "--max-length", metavar="N", help="Tokens a row may have. Default: the model's context."
        ),
    ] = None,
    parity: Annotated[
        bool,
        _option(
            "Data", "--parity", help="Prove that each row is, bit for bit, what answering gives the model."
        ),
    ] = False,
    fix: Annotated[
        Path | None,
        _option(
            "Data", "--fix", metavar="OUT", help="Write the good rows here, and those that can be repaired."
        ),
    ] = None,
    overwrite: Annotated[bool, _option("Data", "--overwrite", help="Replace OUT if it is there.")] = False,
    *,
    settings: Settings,
) -> None:
    """Check training data against its videos.

    Tells line by line of clips that cannot be read, placeholders without files, spans outside of the clip or reversed, rows
    that are too long or there twice; then how many tokens the rows take. Clips are looked into, not
    decoded through, and no weights are read.
    """
    if action not in ACTIONS:
        raise UsageError(f"keye data can {' and '.join(ACTIONS)}, not {action}")
    if file is None:
        raise UsageError("name the data to check, as in `keye data check train.jsonl`")
    if max_length is not None and max_length < 1:
        raise UsageError(f"--max-length must be at least 1, not {max_length}")
    if overwrite and fix is None:
        raise UsageError("--overwrite goes with --fix OUT")

    with leaving_at_once():
        from keyecli.training.data.source import open_data
    rows = open_data(file, format=format, dataset=dataset, media_root=media_root)
    with leaving_at_once():
        from keyecli.engine.loaded import open_model
        from keyecli.training.data.check import Checker, Summary

    files = open_model(settings.model, device="cpu", kernels="reference", revision=settings.revision)
    options = {name: value for name in FRAMES if (value := getattr(settings, name)) is not None}
    checker = Checker(rows, files, options, max_length, parity)
    summary = Summary()
    with ExitStack() as stack:
        good = stack.enter_context(_good_rows(rows, fix, overwrite)) if fix is not None else None
        report = stack.enter_context(console.progress())
        for check in checker.rows():
            summary.add(check)
            _tell(check, rows, as_json=settings.json)
            if good is not None:
                good.add(check)
            report("checking rows", summary.rows, len(rows))
    _tell_summary(summary, rows, good, parity=parity, as_json=settings.json)
    if good is not None:
        _tell_good(good, rows, media_root)
    if summary.wrong_rows:
        raise InputError(_verdict(summary))


def _good_rows(rows: DataFile, out: Path, overwrite: bool) -> GoodRows:
    from keyecli.training.data.repair import GoodRows

    return GoodRows(rows, out, overwrite=overwrite)


def _tell(check: RowCheck, rows: DataFile, *, as_json: bool) -> None:
    from keyecli.export.text import one_line

    for finding in check.findings:
        if as_json:
            console.result(json.dumps(_finding_object(check, finding, rows), ensure_ascii=False))
        else:
            console.result(one_line(f"{check.source}: {finding.message}"))


def _finding_object(check: RowCheck, finding: Finding, rows: DataFile) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "type": "finding",
        "file": str(rows.path),
        "line": check.line,
        "row": check.number,
        "source": check.source,
        "kind": finding.kind,
        "message": finding.message,
        "repairable": finding.fix is not None,
    }


def _tell_summary(
    summary: Summary, rows: DataFile, good: GoodRows | None, *, parity: bool, as_json: bool
) -> None:
    from keyecli.training.data.check import histogram

    counts = sorted(summary.tokens)
    bars = histogram(counts)
    middle = counts[len(counts) // 2] if counts else None
    if as_json:
        said = {
            "schema": SCHEMA,
            "type": "summary",
            "file": str(rows.path),
            "sha256": rows.sha256,
            "rows": summary.rows,
            "wrong_rows": summary.wrong_rows,
            "kinds": dict(summary.kinds),
            "parity": parity,
            "counted_rows": len(counts),
            "tokens": sum(counts),
            "visual_tokens": summary.visual_tokens,
            "learnt_tokens": summary.learnt_tokens,
            "min_tokens": counts[0] if counts else None,
            "median_tokens": middle,
            "max_tokens": counts[-1] if counts else None,
            "histogram": [{"from": low, "below": high, "rows": count} for low, high, count in bars],
            "good_rows": None if good is None else good.rows,
            "repaired_rows": None if good is None else good.repaired,
        }
        console.result(json.dumps(said, ensure_ascii=False))
        return
    console.result(f"{_count(summary.rows)}, {summary.wrong_rows:,} with something wrong")
    if parity:
        same = len(counts) - summary.kinds["parity"]
        console.result(
            f"training gives the model what answering does, bit for bit: {same:,} of {_count(len(counts))}"
        )
    if not counts:
        return
    console.result(
        f"tokens of a row: {counts[0]:,} at least, {middle:,} in the middle, {counts[-1]:,} at most; "
        f"{sum(counts):,} in all, {summary.visual_tokens:,} of them visual, {summary.learnt_tokens:,} learnt"
    )
    for line in _bars(bars):
        console.result(line)


def _bars(bars: list[tuple[int, int, int]]) -> list[str]:
    edge = max(len(f"{high - 1:,}") for _, high, _ in bars)
    most = max(count for *_, count in bars)
    return [
        f"{low:>{edge},} - {high - 1:>{edge},}  {'#' * -(-BAR_CHARACTERS * count // most):<{BAR_CHARACTERS}}  {count:,}"
        for low, high, count in bars
    ]


def _tell_good(good: GoodRows, rows: DataFile, media_root: Path | None) -> None:
    repaired = f", {good.repaired:,} of them repaired" if good.repaired else ""
    console.notice(f"wrote {good.out}: {_count(good.rows)}{repaired}")
    if media_root is None and good.out.resolve().parent != rows.path.resolve().parent:
        console.notice(
            f"relative paths in it count from {rows.media_root}: use it with --media-root {rows.media_root}"
        )
    if rows.entry is not None:
        console.notice(
            f"its columns are those of {rows.entry.name}: describe it in its folder's dataset_info.json too"
        )


def _verdict(summary: Summary) -> str:
    kinds = ", ".join(
        f"{summary.kinds[kind]:,} {words}" for kind, words in _KINDS.items() if summary.kinds[kind]
    )
    have = "has" if summary.wrong_rows == 1 else "have"
    them = "it" if summary.wrong_rows == 1 else "them"
    return f"{summary.wrong_rows:,} of {_count(summary.rows)} {have} something wrong with {them}: {kinds}"


def _count(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"
