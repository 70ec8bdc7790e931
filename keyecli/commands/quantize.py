"""`keye quantize`: a model's experts and large layers in 4 or 8 bits, saved as a folder of its own."""

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

DEFAULT_QUANT = "int4"
_SHARED = {name: MODEL[name] for name in ("revision", "device")}
_QUANT = Annotated[
    str | None,
    typer.Option(
        "--quant", metavar="KIND", help="int4, int8 or fp8. Default: int4.", rich_help_panel="Model"
    ),
]


@with_settings(_SHARED, {"quant": _QUANT}, OUTPUT)
def quantize(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder, or hub name of a downloaded model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write; it must not be there yet.")
    ] = None,
    group: Annotated[
        int,
        typer.Option(
            "--group",
            metavar="N",
            help="Inputs that share a scale: 64, or 128 for less memory.",
            rich_help_panel="Model",
        ),
    ] = 64,
    *,
    settings: Settings,
) -> None:
    """Save a model with its experts and large linear layers in 4 or 8 bits, for -m OUT.

    Router, norms, embeddings, indexer, vision tower, projector and output head stay as they are. Weights stream shard by shard:
    no GPU is needed, and no memory for the whole model. The new folder needs nothing of the original.
    """
    if model is None or out is None:
        raise UsageError(
            "give a model and a folder to write, as in `keye quantize models/keye models/keye-int4`"
        )
    quant = DEFAULT_QUANT if settings.quant in (None, "none") else settings.quant
    with leaving_at_once():
        from keyecli.engine.loaded import choose_device, memory_limits
        from keyecli.engine.plan import gib
        from keyecli.model.companions import resolve_model
        from keyecli.model.quantize import quantization_of
        from keyecli.model.quantized_folder import quantize_folder

    quantization = quantization_of(str(quant), group)
    folder = resolve_model(model, settings.revision)
    device = choose_device(settings.device)
    with console.progress() as on_progress, memory_limits(device):
        written = quantize_folder(
            folder,
            out,
            quantization,
            device=device,
            on_progress=lambda done, total: on_progress("quantising", done, total),
        )
    report: dict[str, Any] = {
        "schema": "keye.quantize/1",
        "model": model,
        "folder": str(written.folder),
        "quant": quantization.method,
        "group": quantization.group,
        "matrices": written.matrices,
        "bytes": written.bytes,
        "source_bytes": written.source_bytes,
    }
    if settings.json:
        console.result(json.dumps(report))
    else:
        console.result(
            f"{written.folder}: {quantization}, {gib(written.bytes)} in the place of {gib(written.source_bytes)}"
        )
