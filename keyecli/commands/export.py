"""`keye export`: saved results as files for players, editors and programs, without a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.options import OUTPUT, with_settings
from keyecli.commands.output import (
    DropFrame,
    Output,
    Overwrite,
    Rate,
    StartTimecode,
    deliver,
    formats_option,
    output_request,
)
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.export.files import OutputRequest, RenderOwn
    from keyecli.export.markdown import ClipSummary
    from keyecli.tasks.saved import SavedClip, SavedResult
    from keyecli.video.source import VideoInfo

EXAMPLE = "keye export found.jsonl -f srt"
OWN_FORMATS = {"json": ".json", "jsonl": ".jsonl", "md": ".md", "html": ".html"}
PAGES = ("md", "html")  # of summaries

Results = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE...]",
        help="Results of keye ground, summarize or scenes, as JSON. Default: - for stdin.",
    ),
]


@with_settings({name: option for name, option in OUTPUT.items() if name != "json"})
def export(
    files: Results = None,
    formats: formats_option(*OWN_FORMATS) = None,  # type: ignore[valid-type]
    output: Output = None,
    overwrite: Overwrite = False,
    rate: Rate = None,
    start_timecode: StartTimecode = None,
    drop_frame: DropFrame = None,
    *,
    settings: Settings,
) -> None:
    """Write saved results in the formats of players and editors, without a model.

    Reads what `keye ground`, `keye summarize` and `keye scenes` printed with --json. Spans of all queries about a video
    go into one file. The video itself is needed where frames are counted or shown: csv, edl, otio, fcpxml, md, html.
    """
    request = output_request(
        formats,
        output,
        overwrite=overwrite,
        rate=rate,
        start_timecode=start_timecode,
        drop_frame=drop_frame,
        own=OWN_FORMATS,
    )
    if not request.wanted:
        raise UsageError(f"say what to write with -f, or where with -o, as in `{EXAMPLE}`")
    from keyecli.tasks.saved import clips_of

    clips = clips_of(read_all(files, f"give results that were saved with --json, as in `{EXAMPLE}`"))
    chosen = _formats(request, clips)
    for format in PAGES:
        if format in chosen:
            _require_summaries(clips, format)
    infos = _open(clips) if any(map(_needs_video, chosen)) else None
    timelines = [clip.timeline(infos[place] if infos else None) for place, clip in enumerate(clips)]
    request.check(timelines)
    deliver(request, timelines, _render_own(request, clips, infos or []))


def read_all(files: Sequence[str] | None, advice: str) -> list[SavedResult]:
    """The results in the files, or in stdin, in their order; UsageError when stdin is a terminal and nothing is named."""
    from keyecli.tasks.saved import STDIN, read_results

    if not files:
        if sys.stdin.isatty():
            raise UsageError(f"nothing to read: {advice}")
        files = [STDIN]
    if list(files).count(STDIN) > 1:
        raise UsageError("stdin can be read only once: name - once")
    return [result for file in files for result in read_results(file)]


def one_line_json(record: dict[str, Any]) -> str:
    """A record on one line; what UTF-8 cannot hold stays an escape."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def _formats(request: OutputRequest, clips: Sequence[SavedClip]) -> set[str]:
    """What will be written, whether it is told by -f or by the file's suffix."""
    if request.output is None:
        return set(request.formats)
    return {target.format for target in request.targets([clip.timeline() for clip in clips])}


def _needs_video(format: str) -> bool:
    from keyecli.export.formats import FORMATS

    if format in OWN_FORMATS:
        return format in PAGES
    return FORMATS[format].counts_frames or format == "csv"


def _require_summaries(clips: Sequence[SavedClip], format: str) -> None:
    for result in (result for clip in clips for result in clip.results):
        if result.schema != "keye.summary/1":
            raise UsageError(f"{format} is a page about summaries, and {result.where} is {result.schema}")


def _open(clips: Sequence[SavedClip]) -> list[VideoInfo]:
    """What is known of every clip; a file that several results are about is looked into once."""
    opened: dict[tuple[Path, float], VideoInfo] = {}
    infos = []
    for clip in clips:
        key = (clip.path, clip.results[0].duration_s)
        if key not in opened:
            opened[key] = clip.open()
        infos.append(opened[key])
    return infos


def _render_own(request: OutputRequest, clips: Sequence[SavedClip], infos: Sequence[VideoInfo]) -> RenderOwn:
    def render(format: str, places: Sequence[int]) -> str:
        if format in PAGES:
            pages = [_page(clips[place].results[0], infos[place]) for place in places]
            if format == "md":
                from keyecli.export.markdown import render_markdown

                return render_markdown(pages, request.options.title)
            from keyecli import __version__
            from keyecli.export.report import render_report

            return render_report(pages, request.options.title, generator=f"keye {__version__}")
        records = [one_line_json(result.record) for place in places for result in clips[place].results]
        if format == "json" and len(records) > 1:
            return f"[{', '.join(records)}]\n"
        return "".join(record + "\n" for record in records)

    return render


def _page(summary: SavedResult, info: VideoInfo) -> ClipSummary:
    from keyecli.export.markdown import ClipSummary

    return ClipSummary(
        info=info,
        text=summary.text("prose"),
        chapters=summary.segments,
        events=summary.events,
        made_by=f"Written by {summary.text('model')} ({summary.text('weights_revision')}) "
        f"with keye {summary.text('keye_version')}; it may be wrong.",
    )
