"""`keye summarize`: what happens in a video, as a summary and timed chapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.ask import NANO_NOTICE
from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import (
    ANSWER,
    FRAMES,
    MODEL,
    OUTPUT,
    DryRun,
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
from keyecli.console import console
from keyecli.errors import KeyeError, UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.export.files import OutputRequest
    from keyecli.export.markdown import ClipSummary
    from keyecli.export.timeline import Segment
    from keyecli.tasks.chapters import Chapter
    from keyecli.tasks.events import Event
    from keyecli.tasks.summarize import Summary

OWN_FORMATS = {"json": ".json", "jsonl": ".jsonl", "md": ".md", "html": ".html"}


def _option(*names: str, metavar: str | None = None, help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel="Answer")


@with_settings(MODEL, FRAMES, ANSWER, OUTPUT)
def summarize(
    videos: Videos = None,
    style: Annotated[
        str | None, _option("--style", metavar="STYLE", help="brief (default), detailed or bullets.")
    ] = None,
    chapters: Annotated[
        str, _option("--chapters", metavar="N", help="How many chapters. Default: auto, as many as it takes.")
    ] = "auto",
    language: Annotated[
        str | None, _option("--language", metavar="NAME", help="Language to write in, as in German.")
    ] = None,
    snap: Annotated[
        bool, _option("--snap/--no-snap", help="Move chapter edges to cuts within a second. Default: --snap.")
    ] = True,
    start: Start = None,
    end: End = None,
    duration: Duration = None,
    subtitles: Subtitles = None,
    formats: formats_option(*OWN_FORMATS) = None,  # type: ignore[valid-type]
    output: Output = None,
    overwrite: Overwrite = False,
    rate: Rate = None,
    start_timecode: StartTimecode = None,
    drop_frame: DropFrame = None,
    dry_run: DryRun = False,
    *,
    settings: Settings,
) -> None:
    """Summarise videos, each by itself, with timed chapters.

    Prints the summary and a line `start - end title` for each chapter. -f writes the chapters in the formats of players
    and editors, and the whole as Markdown, or as an HTML page with pictures that opens offline. Videos that are too long
    for the model are looked at in parts.
    """
    if not videos:
        raise UsageError("nothing to look at: give at least one video, as in `keye summarize clip.mp4`")
    refuse_stdin(videos)
    if subtitles is not None and len(videos) > 1:
        raise UsageError(f"--subtitles goes with exactly one video, and {len(videos)} were given")
    from keyecli.tasks.summary_request import check_request

    count = _count(chapters)
    check_request(style=style, chapters=count, language=language)
    asked = {
        **ask_options(settings, start=start, end=end, duration=duration, subtitles=subtitles),
        "style": style,
        "chapters": count,
        "language": language,
        "snap": snap,
    }
    request = output_request(
        formats,
        output,
        overwrite=overwrite,
        rate=rate,
        start_timecode=start_timecode,
        drop_frame=drop_frame,
        own=OWN_FORMATS,
    )
    if settings.json and request.wanted and request.output is None:
        raise UsageError(
            f"--json and -f {request.formats[0]} cannot share stdout: give a file for one with -o"
        )
    if "chapters" in request.formats:
        from keyecli.export.chapters import YOUTUBE_SECONDS

        asked["min_chapter_s"] = float(YOUTUBE_SECONDS)

    with leaving_at_once():
        from keyecli import session
        from keyecli.commands.plan import print_plan
        from keyecli.export.timeline import Timeline

    # Planned first: an input that is wrong, or a place that cannot be written to, is told before weights are read.
    plans = [session.plan_summary(video, **load_arguments(settings), **asked) for video in videos]
    if dry_run:
        for part in (part for parts in plans for part in parts):
            print_plan(part.run, settings)
        return
    for part in (part for parts in plans for part in parts):
        part.run.check()
    infos = [parts[0].input.info for parts in plans]
    request.check([Timeline.of(info) for info in infos])

    with console.progress() as on_progress:
        keye = session.load(**load_arguments(settings), on_progress=on_progress)
    if keye.is_nano:
        console.notice(NANO_NOTICE)
    summaries: list[Summary] = []
    try:
        for info in infos:
            with console.progress() as on_progress:
                summary = keye.summarize(
                    info,
                    on_reasoning=None if settings.json else _reasoning(settings),
                    on_progress=on_progress,
                    **asked,
                )
            console.end_reasoning()
            console.end_result()
            summaries.append(summary)
            if settings.json:
                console.result(json.dumps(summary.to_dict(), ensure_ascii=False))
            elif not request.wanted:
                _print(summary, len(summaries) - 1, len(infos))
            console.detail(
                f"{summary.prompt_tokens} prompt tokens and {summary.completion_tokens} new ones "
                f"in {summary.timings['total_s']:.1f} s"
            )
    finally:
        # What is done is written, though a later video failed.
        if request.wanted and summaries:
            _deliver(request, summaries, settings)


def _count(chapters: str) -> int | None:
    """How many chapters --chapters names, None for auto."""
    if chapters.strip().lower() == "auto":
        return None
    try:
        return int(chapters)
    except ValueError:
        raise UsageError(f"--chapters must be a number or auto, not {chapters!r}") from None


def _reasoning(settings: Settings) -> Callable[[str], None]:
    if not settings.show_thinking:
        return console.reasoning
    return lambda piece: console.result(piece, end="")


def _deliver(request: OutputRequest, summaries: Sequence[Summary], settings: Settings) -> None:
    """Write what was asked for; where that fails, the text goes to stdout, so that the work is not lost."""
    try:
        _write(request, summaries)
    except KeyeError:
        if request.output is not None and not settings.json:
            for place, summary in enumerate(summaries):
                _print(summary, place, len(summaries))
        raise


def _write(request: OutputRequest, summaries: Sequence[Summary]) -> None:
    from keyecli.export.timeline import Timeline

    def render_own(format: str, clips: Sequence[int]) -> str:
        chosen = [summaries[clip] for clip in clips]
        if format in ("json", "jsonl"):
            return "".join(json.dumps(summary.to_dict(), ensure_ascii=False) + "\n" for summary in chosen)
        pages = [_page(summary) for summary in chosen]
        if format == "md":
            from keyecli.export.markdown import render_markdown

            return render_markdown(pages, request.options.title)
        from keyecli.export.report import render_report

        return render_report(pages, request.options.title, generator=f"keye {chosen[0].keye_version}")

    deliver(
        request,
        [
            Timeline.of(summary.info, [_segment(chapter) for chapter in summary.chapters])
            for summary in summaries
        ],
        render_own,
    )


def _page(summary: Summary) -> ClipSummary:
    from keyecli.export.markdown import ClipSummary

    return ClipSummary(
        info=summary.info,
        text=summary.prose,
        chapters=[_segment(chapter) for chapter in summary.chapters],
        events=[_segment(event) for event in summary.events],
        made_by=f"Written by {summary.model} ({summary.weights_revision}) with keye {summary.keye_version}; "
        "it may be wrong.",
    )


def _segment(part: Chapter | Event) -> Segment:
    from keyecli.export.timeline import Segment

    return Segment(part.start_s, part.end_s, part.title, part.text)


def _print(summary: Summary, place: int, clips: int) -> None:
    """The text, and a line a chapter, below the name of the clip where there are several."""
    from keyecli.video.timecode import format_time

    if clips > 1:
        console.result(f"\n{summary.info.path}" if place else str(summary.info.path))
    console.result(summary.text)
    if summary.chapters:
        console.result("")
    for chapter in summary.chapters:
        console.result(f"{format_time(chapter.start_s)} - {format_time(chapter.end_s)} {chapter.title}")
