"""The options that say how results are written, `-f`, `-o` and what editors need, and delivering by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.console import console

if TYPE_CHECKING:
    from keyecli.export.files import OutputRequest, RenderOwn
    from keyecli.export.timeline import Timeline

# keyecli.export.formats.FORMATS in words; that module takes too long to import for a help page.
FORMAT_NAMES = ("csv", "srt", "vtt", "ffmetadata", "chapters", "mkv", "edl", "otio", "fcpxml")


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Output")


def formats_option(*own: str) -> Any:
    """`-f`, for a command that writes formats of its own besides those of every command."""
    names = ", ".join((*own, *FORMAT_NAMES))
    return Annotated[
        list[str] | None,
        _option("--format", "-f", metavar="FORMAT", help=f"Write this; may be repeated: {names}."),
    ]


Formats = formats_option("json", "jsonl")
Output = Annotated[
    str | None,
    _option(
        "--output",
        "-o",
        metavar="PATH",
        help="A file, or a folder (ends in /) for a file of each video and format. Default: stdout.",
    ),
]
Overwrite = Annotated[bool, _option("--overwrite", help="Replace files that are there.")]
Rate = Annotated[
    str | None,
    _option(
        "--rate", metavar="RATE", help="Frames a second of timecode, as 25 or 29.97. Default: the video's."
    ),
]
StartTimecode = Annotated[
    str | None,
    _option(
        "--start-timecode", metavar="TC", help="Timecode of the first frame: hh:mm:ss:ff or hh:mm:ss;ff."
    ),
]
DropFrame = Annotated[
    bool | None,
    _option("--drop-frame/--no-drop-frame", help="Drop-frame timecode. Default: at 29.97 and 59.94 only."),
]


def output_request(
    formats: Sequence[str] | None,
    output: str | None,
    *,
    overwrite: bool = False,
    rate: str | None = None,
    start_timecode: str | None = None,
    drop_frame: bool | None = None,
    title: str | None = None,
    own: Mapping[str, str] | None = None,
) -> OutputRequest:
    """What the options come to. `own`: formats the task writes itself, name → suffix.

    UsageError for a rate that is none and a format that does not exist; `request.check(timelines)` finds the rest
    before the work begins.
    """
    from keyecli.export.files import OutputRequest
    from keyecli.export.options import ExportOptions
    from keyecli.video.timecode import parse_rate

    names = [name.strip().lower() for given in formats or () for name in given.split(",")]
    request = OutputRequest(
        formats=tuple(names),
        output=None if output in (None, "-") else output,
        overwrite=overwrite,
        options=ExportOptions(
            rate=None if rate is None else parse_rate(rate),
            drop_frame=drop_frame,
            start_timecode=start_timecode,
            title=title,
        ),
        own=own or {},
    )
    request.check_names()
    return request


def deliver(
    request: OutputRequest, timelines: Sequence[Timeline], render_own: RenderOwn | None = None
) -> None:
    """Print the one format that was asked for, or write the files and name them on stderr.

    `render_own(format, clips)` gives the text of a format of the task's own for the clips of these indices.
    """
    if request.output is None:
        console.result(request.text(timelines, render_own), end="")
        console.end_result()
        return
    for path in request.write(timelines, render_own):
        console.notice(f"wrote {path}")
