"""`keye plan`: what a question about these inputs would take; no frame is decoded, no weight read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import (
    ANSWER,
    FRAMES,
    MODEL,
    OUTPUT,
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
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from keyecli.engine.plan import MemoryEstimate, RunPlan


@with_settings(MODEL, FRAMES, ANSWER, OUTPUT)
def plan(
    videos: Videos = None,
    start: Start = None,
    end: End = None,
    duration: Duration = None,
    subtitles: Subtitles = None,
    *,
    settings: Settings,
) -> None:
    """Show what a question would take, before anything runs.

    Prints frames, their size, tokens, the share of the model's context, and an estimate of the memory that the
    weights, the key-value cache and the activations need.
    """
    if not videos:
        raise UsageError("nothing to look at: give at least one video, as in `keye plan clip.mp4`")
    refuse_stdin(videos)
    asked = ask_options(settings, start=start, end=end, duration=duration, subtitles=subtitles)

    with leaving_at_once():
        from keyecli import session

    print_plan(session.plan(videos, **load_arguments(settings), **asked), settings)


def print_plan(plan: RunPlan, settings: Settings) -> None:
    """A plan on stdout: a table of the inputs and one of the run, or one JSON object with --json."""
    if settings.json:
        console.result(json.dumps(plan.to_dict(), ensure_ascii=False))
        return
    console.table(_inputs_table(plan))
    console.table(_run_table(plan))


def _inputs_table(plan: RunPlan) -> Table:
    from rich.table import Table

    from keyecli.video.timecode import format_time

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("input", overflow="fold")
    for heading in ("from", "to", "frames", "fps", "size", "tokens/frame", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in plan.inputs:
        sampling = item.sampling
        table.add_row(
            str(item.info.path),
            format_time(sampling.times_s[0]),
            format_time(sampling.times_s[-1]),
            f"{sampling.frames:,}",
            "-" if sampling.kind == "image" else f"{sampling.fps:.2f}",
            f"{sampling.width}x{sampling.height}",
            f"{sampling.tokens_per_frame:,}",
            f"{sampling.tokens:,}",
        )
    return table


def _run_table(plan: RunPlan) -> Table:
    from rich.table import Table

    from keyecli.engine.plan import gib

    memory = plan.memory
    free = "unknown" if plan.free_bytes is None else gib(plan.free_bytes)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in (
        ("model", f"{plan.model}, {plan.dtype} on {plan.device}"),
        ("frames", f"{plan.frames:,}"),
        ("visual tokens", f"{plan.visual_tokens:,}"),
        (
            "prompt tokens",
            f"{plan.prompt_tokens:,}, {plan.context_share:.1%} of {plan.context_tokens:,}",
        ),
        ("answer tokens", f"up to {plan.max_tokens:,}"),
        ("weights", gib(memory.weights_bytes)),
        *_offloaded_rows(memory),
        ("KV cache", f"{gib(memory.cache_bytes)}{f' in {plan.kv}' if plan.kv else ''}"),
        ("activations", gib(memory.workspace_bytes)),
        ("memory in all", f"{gib(memory.total_bytes)}, {free} free on {plan.device}"),
        *_device_rows(plan),
    ):
        table.add_row(name, value)
    return table


def _offloaded_rows(memory: MemoryEstimate) -> list[tuple[str, str]]:
    from keyecli.engine.plan import gib

    if not memory.host_bytes:
        return []
    return [
        ("experts", f"{gib(memory.host_bytes)} in this machine's memory"),
        ("expert buffers", gib(memory.buffer_bytes)),
    ]


def _device_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """Of several devices, each one's own."""
    from keyecli.engine.plan import gib

    if len(plan.shares) == 1:
        return []
    rows = []
    for share in plan.shares:
        free = "unknown" if share.free_bytes is None else gib(share.free_bytes)
        rows.append((f"on {share.device}", f"{gib(share.memory.total_bytes)}, {free} free"))
    return rows
