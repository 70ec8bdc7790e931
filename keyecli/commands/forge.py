"""`keye forge`: synthetic clips with exact ground truth, as videos and training rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import OUTPUT, with_settings
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings


@with_settings(OUTPUT)
def forge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the clips and data.jsonl.")],
    count: Annotated[int, typer.Option("--count", "-n", metavar="N", help="Number of clips.")] = 10,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="The same seed gives the same clips. Default: 0."),
    ] = None,
    min_duration: Annotated[
        float, typer.Option("--min-duration", metavar="S", help="Shortest clip, seconds, a multiple of 0.5.")
    ] = 2.0,
    max_duration: Annotated[
        float, typer.Option("--max-duration", metavar="S", help="Longest clip, seconds, a multiple of 0.5.")
    ] = 60.0,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Frame size. Default: drawn clip by clip.")
    ] = None,
    rate: Annotated[
        int | None,
        typer.Option("--rate", metavar="N", help="Frames a second, even. Default: drawn clip by clip."),
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", help="Questions a clip, at most.")
    ] = 4,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Only these tasks; a wrong name lists them.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            metavar="A,B",
            help="Shapes to draw. Default: all but the extra ones; a wrong name lists them.",
        ),
    ] = None,
    motions: Annotated[
        str | None,
        typer.Option("--motions", metavar="A,B", help="What shapes do besides standing still, likewise."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    *,
    settings: Settings,
) -> None:
    """Write synthetic clips with exact ground truth.

    OUT/clips gets H.264 videos of shapes, words and digits that come, go, move and spin; OUT/data.jsonl gets
    questions about them with answers, as chat messages and as columns (task, answer, solution spans in seconds).
    """
    frame_size = None if size is None else _parse_size(size)
    asked = () if tasks is None else tuple(name.replace("-", "_") for name in _parse_names(tasks))

    with leaving_at_once():
        from keyecli.forge.scene import MOTIONS, SHAPES, SceneOptions
    # Checked before torch is imported, which takes seconds.
    options = SceneOptions(
        min_duration,
        max_duration,
        frame_size,
        rate,
        SHAPES if shapes is None else _parse_names(shapes),
        MOTIONS if motions is None else _parse_names(motions),
    )
    with leaving_at_once():
        from keyecli.forge.write import write_dataset

    chosen_seed = (settings.seed or 0) if seed is None else seed
    with console.progress() as report:
        report("writing clips", 0, count)
        written = write_dataset(
            out,
            count,
            chosen_seed,
            options,
            questions_per_clip=questions,
            tasks=asked,
            overwrite=overwrite,
            on_clip=lambda done: report("writing clips", done, count),
        )
    if settings.json:
        summary = {
            "schema": "keye.forge/1",
            "folder": str(written.folder),
            "seed": chosen_seed,
            "clips": written.clips,
            "questions": written.questions,
            "frames": written.frames,
            "duration_s": written.duration_s,
        }
        console.result(json.dumps(summary))
    else:
        console.result(
            f"{written.folder}: {written.clips} clips, {written.questions} questions, "
            f"{written.duration_s:.1f} s of video"
        )


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if match is None:
        raise UsageError(f"--size is {text!r}, but it must be WIDTHxHEIGHT, as in 320x240")
    return int(match[1]), int(match[2])
