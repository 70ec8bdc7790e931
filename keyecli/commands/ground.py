"""`keye ground`: when something is on screen in a video, or happens in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
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
    ask_options,
    load_arguments,
    refuse_stdin,
    with_settings,
)
from keyecli.commands.output import (
    DropFrame,
    Formats,
    Output,
    Overwrite,
    Rate,
    StartTimecode,
    deliver,
    output_request,
)
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings
from keyecli.tasks.search_request import check_search

if TYPE_CHECKING:
    from keyecli.export.files import OutputRequest
    from keyecli.export.timeline import Timeline
    from keyecli.tasks.ground import FrameEvidence, Grounding
    from keyecli.video.source import VideoInfo

EXAMPLE = 'keye ground clip.mp4 "the red circle"'
LONGEST_QUERY = 500  # characters
SHOWN_FRAMES = 6  # of the evidence of a query, on stdout and on the strip


def _option(panel: str, *names: str, metavar: str | None = None, help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)


@with_settings(MODEL, FRAMES, ANSWER, OUTPUT)
def ground(
    video: Annotated[str | None, typer.Argument(metavar="VIDEO", help="A video or animation.")] = None,
    queries: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY...", help="What to look for; - reads queries from stdin, one a line."),
    ] = None,
    queries_file: Annotated[
        Path | None,
        _option("Search", "--queries", metavar="FILE", help="Queries, one a line; # begins a comment."),
    ] = None,
    refine: Annotated[
        bool, _option("Search", "--refine", help="Look again around each boundary, at four times the rate.")
    ] = False,
    window: Annotated[
        float | None,
        _option(
            "Search",
            "--window",
            metavar="S",
            help="Search overlapping windows of S seconds. Default: as few as the model needs.",
        ),
    ] = None,
    top: Annotated[
        int | None, _option("Search", "--top", metavar="N", help="At most N spans a query, the best.")
    ] = None,
    min_score: Annotated[
        float | None, _option("Search", "--min-score", metavar="P", help="Leave out spans below this score.")
    ] = None,
    merge_gap: Annotated[
        float | None,
        _option(
            "Search", "--merge-gap", metavar="S", help="Spans at most S seconds apart are one. Default: 0."
        ),
    ] = None,
    unconstrained: Annotated[
        bool,
        _option(
            "Search", "--unconstrained", help="Let the model answer in any form; spans have no score then."
        ),
    ] = False,
    explain: Annotated[
        bool, _option("Search", "--explain", help="Show which frames each answer attended to.")
    ] = False,
    explain_strip: Annotated[
        Path | None,
        _option("Search", "--explain-strip", metavar="FILE", help="Draw those frames side by side (png)."),
    ] = None,
    start: Start = None,
    end: End = None,
    duration: Duration = None,
    subtitles: Subtitles = None,
    formats: Formats = None,
    output: Output = None,
    overwrite: Overwrite = False,
    rate: Rate = None,
    start_timecode: StartTimecode = None,
    drop_frame: DropFrame = None,
    clip: Annotated[
        Path | None, _option("Output", "--clip", metavar="DIR", help="Cut the spans out into this folder.")
    ] = None,
    exact: Annotated[
        bool, _option("Output", "--exact", help="Cut at the span's frames, by encoding again; with --clip.")
    ] = False,
    contact_sheet: Annotated[
        Path | None,
        _option("Output", "--contact-sheet", metavar="FILE", help="Draw three frames of each span (png)."),
    ] = None,
    plot: Annotated[
        Path | None, _option("Output", "--plot", metavar="FILE", help="Draw the spans over time (png).")
    ] = None,
    dry_run: DryRun = False,
    *,
    settings: Settings,
) -> None:
    """Find when something is on screen in a video, or happens.

    Prints a line `start - end  score  query` in seconds for each span, and `not there: query` where there is none. The
    score is the probability that the span is right. All queries share one look at the video.
    """
    if video is None:
        raise UsageError(f"nothing to look at: give a video and a query, as in `{EXAMPLE}`")
    refuse_stdin([video])
    if exact and clip is None:
        raise UsageError("--exact says how to cut: give --clip DIR with it")
    check_search(
        window_s=window, top=top, min_score=min_score, merge_gap_s=merge_gap, constrained=not unconstrained
    )
    asked = {
        **ask_options(settings, start=start, end=end, duration=duration, subtitles=subtitles),
        "refine": refine,
        "window": window,
        "top": top,
        "min_score": min_score,
        "merge_gap": merge_gap,
        "constrained": not unconstrained,
        "explain": explain or explain_strip is not None,
    }
    request = output_request(
        formats,
        output,
        overwrite=overwrite,
        rate=rate,
        start_timecode=start_timecode,
        drop_frame=drop_frame,
        own={"json": ".json", "jsonl": ".jsonl"},
    )
    if settings.json and request.wanted and request.output is None:
        raise UsageError(
            f"--json and -f {request.formats[0]} cannot share stdout: give a file for one with -o"
        )
    wanted = read_queries(queries or [], queries_file)

    with leaving_at_once():
        from keyecli import session
        from keyecli.commands.plan import print_plan
        from keyecli.export.timeline import Timeline

    # Planned first: an input that is wrong, or a place that cannot be written to, is told before weights are read.
    planned = session.plan_ground(video, wanted, **load_arguments(settings), **asked)
    if dry_run:
        for run in planned.runs:
            print_plan(run, settings)
        return
    planned.check()
    request.check([Timeline.of(planned.info)])
    pictures = _Pictures(explain_strip, contact_sheet, plot, overwrite)
    pictures.check()
    with console.progress() as on_progress:
        keye = session.load(**load_arguments(settings), on_progress=on_progress)
        if keye.is_nano:
            console.notice(NANO_NOTICE)
        results = keye.ground(
            planned.info,
            wanted,
            on_reasoning=None if settings.json else _reasoning(settings),
            on_progress=on_progress,
            **asked,
        )
    console.end_reasoning()
    console.end_result()
    if settings.json:
        _print_json(results)
    elif not request.wanted:
        _print(results)
    timeline = _write(request, results)
    pictures.draw(planned.info, results, timeline)
    if clip is not None:
        _cut(planned.info, timeline, clip, exact=exact, overwrite=overwrite)
    console.detail(f"{len(results)} queries in {results[0].timings['total_s']:.1f} s")


def read_queries(given: Sequence[str], file: Path | None) -> list[str]:
    """The queries of the command line, of stdin for "-", and of a file, in this order.

    UsageError: none at all, a query that is a file, and a line that is no query, with its number.
    """
    queries: list[str] = []
    for query in given:
        if query == "-":
            if sys.stdin.isatty():
                console.notice("type one query a line, then Ctrl-D")
            queries += _query_lines(sys.stdin.buffer.read(), "stdin")
        elif _is_file(query):
            raise UsageError(f"{query} is a file, not a query: name one video, then what to look for")
        else:
            queries.append(_checked(query, "a query"))
    if file is not None:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UsageError(f"the queries in {file} cannot be read: {error.strerror}") from error
        queries += _query_lines(content, str(file))
    if not queries:
        raise UsageError(f"nothing to look for: give a query, as in `{EXAMPLE}`")
    return queries


def _query_lines(content: bytes, name: str) -> list[str]:
    queries = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        where = f"line {number} of {name}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UsageError(f"{where} is not UTF-8 text") from None
        if text and not text.startswith("#"):
            queries.append(_checked(text, where))
    return queries


def _checked(query: str, where: str) -> str:
    query = query.strip()
    if not query:
        raise UsageError(f"{where} is empty: say what to look for, as in `{EXAMPLE}`")
    if not query.isprintable():
        raise UsageError(f"{where} has control characters in it: {query!r}")
    if len(query) > LONGEST_QUERY:
        raise UsageError(f"{where} has {len(query)} characters, and a query has at most {LONGEST_QUERY}")
    return query


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a query can be longer than any file name
        return False


def _reasoning(settings: Settings) -> Callable[[str], None]:
    if not settings.show_thinking:
        return console.reasoning
    return lambda piece: console.result(piece, end="")


def _print(results: Sequence[Grounding]) -> None:
    for result in results:
        for span in result.spans:
            score = "" if span.score is None else f"  {span.score:.2f}"
            console.result(f"{seconds(span.start_s)} - {seconds(span.end_s)}{score}  {result.query}")
        if not result.found:
            console.result(f"not there: {result.query}")
        for frame in shown_evidence(result):
            console.result(f"  frame {seconds(frame.time_s)}  {frame.weight:.2f}")


def _print_json(results: Iterable[Grounding]) -> None:
    for result in results:
        console.result(json.dumps(result.to_dict(), ensure_ascii=False))


def _write(request: OutputRequest, results: Sequence[Grounding]) -> Timeline:
    """Write what -f and -o ask for, if anything."""
    from keyecli.tasks.ground import timeline_of

    def render_own(format: str, clips: Sequence[int]) -> str:
        records = [result.to_dict() for result in results]
        if format == "json" and len(records) > 1:
            return json.dumps(records, ensure_ascii=False) + "\n"
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    timeline = timeline_of(results)
    if request.wanted:
        deliver(request, [timeline], render_own)
    return timeline


class _Pictures:
    """The pictures that were asked for."""

    def __init__(self, strip: Path | None, sheet: Path | None, plot: Path | None, overwrite: bool) -> None:
        self._strip, self._sheet, self._plot, self._overwrite = strip, sheet, plot, overwrite

    def check(self) -> None:
        """UsageError for a place that cannot be written to; told before the work."""
        paths = [path for path in (self._strip, self._sheet, self._plot) if path is not None]
        if paths:
            from keyecli.export.pictures import check_picture_path

            for path in paths:
                check_picture_path(path, self._overwrite)

    def draw(self, info: VideoInfo, results: Sequence[Grounding], timeline: Timeline) -> None:
        if self._strip is self._sheet is self._plot is None:
            return
        from keyecli.export import pictures

        if self._strip is not None:
            shown = [(result, frame) for result in results for frame in shown_evidence(result)]
            captions = [
                f"{seconds(frame.time_s)} s  {frame.weight:.2f}  {result.query}" for result, frame in shown
            ]
            times_s, weights = [frame.time_s for _, frame in shown], [frame.weight for _, frame in shown]
            self._save(pictures.strip(info, times_s, captions, weights), self._strip)
        if self._sheet is not None:
            self._save(pictures.contact_sheet(info, timeline.segments), self._sheet)
        if self._plot is not None:
            self._save(pictures.span_plot([timeline], [result.query for result in results]), self._plot)

    def _save(self, picture: Any, path: Path) -> None:
        from keyecli.export.pictures import save_picture

        save_picture(picture, path, self._overwrite)
        console.notice(f"wrote {path}")


def _cut(info: VideoInfo, timeline: Timeline, folder: Path, *, exact: bool, overwrite: bool) -> None:
    from keyecli.video.cut import cut

    spans = [(segment.start_s, segment.end_s) for segment in timeline.segments]
    if not spans:
        console.notice("there is no span to cut out")
        return
    with console.progress() as on_progress:
        clips = cut(info, spans, folder, exact=exact, overwrite=overwrite, on_progress=on_progress)
    for made in clips:
        console.notice(f"wrote {made.path}")


def shown_evidence(result: Grounding) -> list[FrameEvidence]:
    """The frames with the most weight, ascending by time."""
    heaviest = sorted(result.evidence, key=lambda frame: (-frame.weight, frame.time_s))[:SHOWN_FRAMES]
    return sorted(heaviest, key=lambda frame: frame.time_s)


def seconds(time_s: float) -> str:
    """12.0, 12.5, 12.125: one decimal, and more where they say something."""
    text = f"{time_s:.3f}".rstrip("0")
    return text + "0" if text.endswith(".") else text
