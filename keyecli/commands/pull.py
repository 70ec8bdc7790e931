"""`keye pull`: a model's files from the Hugging Face hub into its cache, verified; the one command that needs the network."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import OUTPUT, with_settings
from keyecli.console import console
from keyecli.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from keyecli.hub.listing import RemoteFile
    from keyecli.hub.pull import Pulled, PullPlan


@with_settings(OUTPUT)
def pull(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Hub name. Default: Kwai-Keye/Keye-VL-2.0-30B-A3B."),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="REV", help="Branch, tag or commit. Default: main."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read what is already here again and compare its checksums too."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be fetched and stop.", rich_help_panel="Output"),
    ] = False,
    *,
    settings: Settings,
) -> None:
    """Fetch a model from the Hugging Face hub, for -m NAME.

    Weights in safetensors, tokenizer and configuration go to the Hugging Face cache (HF_HOME), every file verified by the
    checksum that the hub lists; code and pickles are left out. The revision is pinned to its commit. Interrupted, the
    same command goes on where it stopped. HF_ENDPOINT names a mirror, HF_TOKEN gives access.
    """
    with leaving_at_once():
        from keyecli.hub.listing import DEFAULT_MODEL
        from keyecli.hub.pull import plan_pull
        from keyecli.hub.pull import pull as fetch

    plan = plan_pull(name or DEFAULT_MODEL, revision)
    _announce(plan)
    if dry_run:
        _print_plan(plan, settings)
        return
    with console.progress() as on_progress:
        try:
            pulled = fetch(plan, verify=verify, on_progress=on_progress, on_file=_say)
        except KeyboardInterrupt:
            console.notice("what has arrived is kept: the same command goes on from there")
            raise
    if settings.json:
        console.result(json.dumps(_report(plan, pulled)))
    else:
        files = len(pulled.files)
        console.result(
            f"{plan.folder}: {files} files, {_size(plan.total_bytes)}, commit {plan.listing.commit}"
        )


def _announce(plan: PullPlan) -> None:
    """On stderr: the pinned commit, how much is to come, and what is left out."""
    from keyecli.hub.choose import named
    from keyecli.model.shards import first_of

    listing = plan.listing
    here = plan.total_bytes - plan.needed_bytes
    console.notice(
        f"{listing.name} at commit {listing.commit} ({listing.revision}) from {listing.endpoint}: {_size(plan.total_bytes)} in "
        f"{len(plan.files)} files, {_size(here)} of them here, {_size(plan.needed_bytes)} to fetch, "
        f"{_size(plan.free_bytes)} free"
    )
    for reason, why in (
        ("code", "remote code, which keye never runs"),
        ("pickle", "pickles, which keye never opens"),
    ):
        names = named(plan.left_out, reason)  # type: ignore[arg-type]
        if names:
            console.notice(f"left out {first_of(names)}: {why}")


def _say(file: RemoteFile, state: str) -> None:
    if state != "here":
        console.notice(f"{file.path}: {_size(file.bytes)}, {state}, {file.algorithm} as listed")


def _print_plan(plan: PullPlan, settings: Settings) -> None:
    if settings.json:
        console.result(json.dumps(_report(plan, None)))
        return
    console.table(_table(plan))


def _table(plan: PullPlan) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("is", no_wrap=True)
    for item in plan.files:
        state = f"partial, {_size(item.here_bytes)}" if item.state == "partial" else item.state
        table.add_row(item.file.path, _size(item.file.bytes), state)
    for left in plan.left_out:
        table.add_row(left.path, _size(left.bytes), f"left out: {left.reason}")
    return table


def _report(plan: PullPlan, pulled: Pulled | None) -> dict[str, Any]:
    """Schema keye.pull/1; `pulled` is None for a dry run."""
    from dataclasses import asdict

    from keyecli import __version__

    listing = plan.listing
    return {
        "schema": "keye.pull/1",
        "model": listing.name,
        "revision": listing.revision,
        "commit": listing.commit,
        "endpoint": listing.endpoint,
        "folder": str(plan.folder),
        "dry_run": pulled is None,
        "files": [item.to_dict() for item in (pulled or plan).files],
        "left_out": [asdict(left) for left in plan.left_out],
        "total_bytes": plan.total_bytes,
        "needed_bytes": plan.needed_bytes,
        "free_bytes": plan.free_bytes,
        "seconds": None if pulled is None else round(pulled.seconds, 3),
        "keye_version": __version__,
    }


def _size(count: int) -> str:
    from keyecli.hub.cache import size_text

    return size_text(count)
