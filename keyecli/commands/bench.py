"""`keye bench`: what this machine does, measured beside what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import OUTPUT, with_settings
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

KERNELS = ("selection", "attention", "experts", "vision")
LENGTHS = "4096,32768,131072,262144"
FINETUNE_LENGTHS = "32768,131072"
RL_LENGTHS = "32768"
OWN_OPTIONS = {
    "kernels": ("--only", "--lengths"),
    "prefill": ("--lengths",),
    "decode": ("--lengths", "--quant", "--kv", "--adapter-rank"),
    "memory": ("--lengths", "--quant", "--kv"),
    "finetune": ("--lengths", "--quant"),
    "rl": ("--lengths", "--quant"),
    "load": ("--gib", "--dir", "--quant"),
    "end-to-end": ("--hours",),
    "video": ("CLIP",),
}
"""What is measured → what can be said of it."""
WITHOUT_GPU = ("load", "video")


class Row(Protocol):
    """Figures of one case, for a reader and for a program."""

    def line(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


@with_settings(OUTPUT)
def bench(
    what: Annotated[
        str | None, typer.Argument(metavar="WHAT", help=f"What to measure: {', '.join(OWN_OPTIONS)}.")
    ] = None,
    clips: Annotated[
        list[Path] | None, typer.Argument(metavar="[CLIP]...", help="video: clips to read; none: made here.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", metavar="A,B", help="kernels: only these of selection, attention, experts, vision."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="N,M",
            help=f"Numbers of tokens to measure at; {LENGTHS} if not given, finetune: {FINETUNE_LENGTHS}, rl: {RL_LENGTHS}.",
        ),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option("--hours", metavar="H", help="end-to-end: length of the clip; 1 if not given."),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            metavar="HOW",
            help="decode, memory, finetune, rl: weights in int8, int4 or fp8; load: so as well as in bf16.",
        ),
    ] = None,
    kv: Annotated[
        str | None, typer.Option("--kv", metavar="HOW", help="decode, memory: keys and values in fp8.")
    ] = None,
    adapter_rank: Annotated[
        int | None,
        typer.Option(
            "--adapter-rank",
            metavar="R",
            help="decode: with a LoRA adapter of this rank in place, beside without; alone and 8 side by side.",
        ),
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(
            "--gib", metavar="N", help="load: size of the checkpoint that is written; 16 if not given."
        ),
    ] = None,
    place: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="FOLDER",
            help="load: where it is written, and removed afterwards; the temporary folder if not given.",
        ),
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Measure this machine in the shape of the 30B model with random weights; no download is needed.

    kernels: each kernel beside what PyTorch has for it. prefill, decode: the whole decoder. memory: the plan beside the
    peak. finetune: steps of an adapter on one sequence, beside transformers with PEFT. rl: a step of 8 × 8 answers of 512
    tokens, drawn, scored and learnt from. load: a checkpoint from the disk. end-to-end: a long clip from its file to the
    first token. video: reading frames. The last, and load into the host's memory, need no GPU.
    Every result is checked before it is timed. A line gives the median time, what the operation reaches of the floor
    that arithmetic and memory set on one H200, and its time over the baseline's, both from the same run.
    """
    if what not in OWN_OPTIONS:
        raise UsageError(
            f"keye bench measures {', '.join(OWN_OPTIONS)}: name one, as in `keye bench kernels`"
        )
    given = {
        "--only": only,
        "--lengths": lengths,
        "--hours": hours,
        "--quant": quant,
        "--kv": kv,
        "--adapter-rank": adapter_rank,
        "--gib": size,
        "--dir": place,
        "CLIP": clips or None,
    }
    for option, value in given.items():
        if value is not None and option not in OWN_OPTIONS[what]:
            places = " and ".join(
                f"`keye bench {name}`" for name, options in OWN_OPTIONS.items() if option in options
            )
            raise UsageError(f"{option} goes with {places}")
    rooms = _chosen(only)
    sizes = _lengths(lengths or {"finetune": FINETUNE_LENGTHS, "rl": RL_LENGTHS}.get(what, LENGTHS))

    with leaving_at_once():
        import torch

    if what not in WITHOUT_GPU:
        if not torch.cuda.is_available():
            raise UsageError(
                f"{what} is measured on an NVIDIA GPU, and this machine has none that torch can use"
            )
        console.detail(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = (
        import_module("keyecli.bench.load").measure(16.0 if size is None else size, quant, place)
        if what == "load"
        else _rows(what, rooms, sizes, 1.0 if hours is None else hours, clips or [], quant, kv, adapter_rank)
    )
    for row in rows:
        console.result(json.dumps(row.to_dict()) if settings.json else row.line())


def _rows(
    what: str,
    rooms: tuple[str, ...],
    sizes: tuple[int, ...],
    hours: float,
    clips: Sequence[Path],
    quant: str | None,
    kv: str | None,
    adapter_rank: int | None,
) -> Iterator[Row]:
    if what == "kernels":
        for room in rooms:
            yield from import_module(f"keyecli.bench.{room}").measure(sizes)
    elif what == "video":
        yield from import_module("keyecli.bench.video").measure(clips, on_step=console.detail)
    elif what == "end-to-end":
        yield from import_module("keyecli.bench.end_to_end").measure(hours)
    elif what == "memory":
        yield from import_module("keyecli.bench.memory").measure(sizes, quant, kv)
    elif what in ("finetune", "rl"):
        yield from import_module(f"keyecli.bench.{what}").measure(sizes, quant)
    elif what == "decode":
        network = import_module("keyecli.bench.network")
        if adapter_rank is None:
            yield from network.measure_decode(sizes, quant, kv)
        else:
            yield from network.measure_adapted_decode(sizes, adapter_rank, quant, kv)
    else:
        yield from import_module("keyecli.bench.network").measure_prefill(sizes)


def _chosen(only: str | None) -> tuple[str, ...]:
    if only is None:
        return KERNELS
    names = tuple(name.strip() for name in only.split(","))
    for name in names:
        if name not in KERNELS:
            raise UsageError(f"--only names {name!r}, and there is {', '.join(KERNELS)}")
    return names


def _lengths(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise UsageError(f"--lengths is {text!r}, but it must be numbers of tokens, as in 4096,32768")
    return sizes
