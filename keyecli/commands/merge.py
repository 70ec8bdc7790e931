"""`keye merge`: an adapter put into the weights of its base, saved as a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import MODEL, OUTPUT, with_settings
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

_BASE = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="BASE",
        help="Folder, or hub name of a downloaded model. Default: KEYE_MODEL, else what the adapter was trained on.",
        rich_help_panel="Model",
    ),
]
_SHARED = {name: MODEL[name] for name in ("revision", "device")}


@with_settings({"model": _BASE}, _SHARED, OUTPUT)
def merge(
    adapter: Annotated[
        Path | None, typer.Argument(metavar="ADAPTER", help="Folder of an adapter that training wrote.")
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write; it must not be there yet.")
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Put an adapter into the weights of its base and save the whole as a model in the official layout, for -m OUT.

    It answers as the base with --adapter does, bit for bit. Weights stream shard by shard: no GPU is needed, and no memory for
    the whole model. The new folder needs neither base nor adapter.
    """
    if adapter is None or out is None:
        raise UsageError("give an adapter and a folder to write, as in `keye merge runs/first models/mine`")
    with leaving_at_once():
        from keyecli.engine.loaded import memory_limits, open_model, warn_of_another_base
        from keyecli.engine.plan import gib
        from keyecli.model.adapter import load_adapter
        from keyecli.model.merged_folder import merge_folder

    files = open_model(settings.model, device=settings.device, adapter=adapter, revision=settings.revision)
    loaded = load_adapter(adapter)
    warn_of_another_base(loaded, files)
    with console.progress() as on_progress, memory_limits(files.device):
        written = merge_folder(
            files.folder,
            loaded,
            out,
            device=files.device,
            on_progress=lambda done, total: on_progress("merging", done, total),
        )
    report: dict[str, Any] = {
        "schema": "keye.merge/1",
        "model": files.name,
        "adapter": str(loaded.folder),
        "folder": str(written.folder),
        "matrices": written.added,
        "replaced": written.replaced,
        "bytes": written.bytes,
    }
    if settings.json:
        console.result(json.dumps(report))
    else:
        console.result(f"{written.folder}: {files.name} with {loaded.folder}, {gib(written.bytes)}")
