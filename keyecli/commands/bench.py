"""`keye bench`: what this machine does, measured beside what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import OUTPUT, with_settings
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.bench.measure import Measurement

KERNELS = ("selection", "attention", "experts", "vision")
WHAT = ("kernels", "prefill", "decode")


@with_settings(OUTPUT)
def bench(
    what: Annotated[
        str | None, typer.Argument(metavar="WHAT", help="What to measure: kernels, prefill, decode.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="A,B", help="Only these: selection, attention, experts, vision."),
    ] = None,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,M", help="Numbers of tokens to measure at.")
    ] = "4096,32768,131072,262144",
    *,
    settings: Settings,
) -> None:
    """Measure this machine's GPU in the shape of the 30B model: its kernels, or the whole decoder with random weights.

    Every result is checked before it is timed. A line gives the median time, what the operation reaches of the floor
    that arithmetic and memory set on one H200, and its time over the baseline's, both from the same run.
    """
    if what not in WHAT:
        raise UsageError(f"keye bench measures {', '.join(WHAT)}: name one, as in `keye bench kernels`")
    if only is not None and what != "kernels":
        raise UsageError("--only chooses among the kernels: it goes with `keye bench kernels`")
    rooms = _chosen(only)
    sizes = _lengths(lengths)

    with leaving_at_once():
        import torch

    if not torch.cuda.is_available():
        raise UsageError(f"{what} is measured on an NVIDIA GPU, and this machine has none that torch can use")
    console.detail(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for measurement in _measurements(what, rooms, sizes):
        if settings.json:
            console.result(json.dumps(measurement.to_dict()))
        else:
            console.result(line(measurement))


def _measurements(what: str, rooms: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[Measurement]:
    if what == "kernels":
        for room in rooms:
            yield from import_module(f"keyecli.bench.{room}").measure(sizes)
    else:
        yield from getattr(import_module("keyecli.bench.network"), f"measure_{what}")(sizes)


def line(measurement: Measurement) -> str:
    """One row for a reader: operation, case, time and spread, share of the floor, ratio to the baseline."""
    text = f"{measurement.operation:<28} {measurement.case:<34} {_time(measurement.seconds)} ±{_time(measurement.spread_s)}"
    if measurement.floor_s:
        text += f"  {measurement.floor_s / measurement.seconds:4.0%} of the floor"
    if measurement.baseline_s is not None:
        text += f"  {measurement.ratio:5.2f} × {measurement.baseline} ({_time(measurement.baseline_s)})"
    return text


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:9.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:9.1f} µs"


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
