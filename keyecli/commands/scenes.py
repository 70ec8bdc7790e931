"""`keye scenes`: where one shot ends and the next begins, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import (
    FRAMES,
    OUTPUT,
    Duration,
    End,
    Start,
    Videos,
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

if TYPE_CHECKING:
    from keyecli.export.timeline import Segment
    from keyecli.video.scenes import Scene, SceneSettings
    from keyecli.video.source import VideoInfo


@with_settings({"strict": FRAMES["strict"]}, OUTPUT)
def scenes(
    videos: Videos = None,
    detector: Annotated[
        str,
        typer.Option(
            "--detector",
            metavar="NAME",
            help="content: frames that differ; adaptive: that differ more than their neighbours do.",
        ),
    ] = "content",
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="X",
            help="Difference that makes a cut. Default: 27 for content, 3 for adaptive.",
        ),
    ] = None,
    min_scene: Annotated[
        float, typer.Option("--min-scene", metavar="S", help="Shortest scene, seconds.")
    ] = 0.6,
    start: Start = None,
    end: End = None,
    duration: Duration = None,
    formats: Formats = None,
    output: Output = None,
    overwrite: Overwrite = False,
    rate: Rate = None,
    start_timecode: StartTimecode = None,
    drop_frame: DropFrame = None,
    *,
    settings: Settings,
) -> None:
    """Find the shots of a video, without a model.

    Prints a line `start - end` for each shot. Cuts are found by PySceneDetect's detectors in every frame, and told at
    the frame's own time; fades are not looked for.
    """
    if not videos:
        raise UsageError("nothing to look at: give at least one video, as in `keye scenes clip.mp4`")
    refuse_stdin(videos)
    from keyecli.video.timecode import parse_span

    start_s, end_s = parse_span(start, end, duration)
    with leaving_at_once():
        from keyecli.export.timeline import Timeline
        from keyecli.video.scenes import SceneSettings, detect_scenes, refuse_still
        from keyecli.video.source import probe
    how = SceneSettings(detector, threshold, min_scene, start_s, end_s, settings.strict)  # type: ignore[arg-type]
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
    infos = [probe(video) for video in videos]
    for info in infos:
        refuse_still(info)
    request.check([Timeline.of(info) for info in infos])

    found: list[list[Scene]] = []
    for place, info in enumerate(infos):
        with console.progress() as on_progress:
            found.append(detect_scenes(info, how, on_progress=on_progress))
        if settings.json:
            console.result(json.dumps(_report(info, found[-1], how), ensure_ascii=False))
        elif not request.wanted:
            _print(info, found[-1], place, len(infos))
    if request.wanted:
        timelines = [
            Timeline.of(info, [_segment(scene, count) for count, scene in enumerate(scenes, 1)])
            for info, scenes in zip(infos, found, strict=True)
        ]

        def render_own(format: str, clips: Sequence[int]) -> str:
            reports = [_report(infos[clip], found[clip], how) for clip in clips]
            return "".join(json.dumps(report, ensure_ascii=False) + "\n" for report in reports)

        deliver(request, timelines, render_own)


def _segment(scene: Scene, count: int) -> Segment:
    from keyecli.export.timeline import Segment

    return Segment(scene.start_s, scene.end_s, f"Scene {count}")


def _print(info: VideoInfo, scenes: Sequence[Scene], place: int, clips: int) -> None:
    """A line a scene, below the name of the clip where there are several."""
    from keyecli.video.timecode import format_time

    if clips > 1:
        console.result(f"\n{info.path}" if place else str(info.path))
    for scene in scenes:
        console.result(f"{format_time(scene.start_s)} - {format_time(scene.end_s)}")


def _report(info: VideoInfo, scenes: Sequence[Scene], how: SceneSettings) -> dict[str, Any]:
    """Schema keye.scenes/1."""
    from keyecli import __version__

    return {
        "schema": "keye.scenes/1",
        "path": str(info.path),
        "duration_s": float(info.duration_s),
        "frames": len(info.frame_times),
        "scenes": [asdict(scene) for scene in scenes],
        "detector": how.detector,
        "threshold": how.used_threshold,
        "min_scene_s": how.min_scene_s,
        "start_s": None if how.start_s is None else float(how.start_s),
        "end_s": None if how.end_s is None else float(how.end_s),
        "truncated_at_s": None if info.truncated_at_s is None else float(info.truncated_at_s),
        "keye_version": __version__,
    }
