"""`keye clip`: the parts that saved results name, cut out into files of their own, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.export import one_line_json, read_all
from keyecli.commands.options import OUTPUT, with_settings
from keyecli.console import console
from keyecli.errors import UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.export.timeline import Segment
    from keyecli.tasks.saved import SavedClip
    from keyecli.video.cut import CutClip
    from keyecli.video.source import VideoInfo

EXAMPLE = "keye clip found.jsonl cuts/"


@with_settings(OUTPUT)
def clip(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE...]",
            help="Results of keye ground, summarize or scenes, as JSON. Default: - for stdin.",
        ),
    ] = None,
    folder: Annotated[
        str | None, typer.Argument(metavar="DIR", help="Folder for the clips; made if it is not there.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Cut at the parts' frames, by encoding again.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    *,
    settings: Settings,
) -> None:
    """Cut the parts that saved results name out into files, without a model.

    Prints the path of each file. By default packets are copied, which is fast and loses nothing, from the keyframe at or
    before a part's start on. Of two videos of one name, the second one's parts go into a folder of their own in DIR.
    """
    if folder is None or folder == "-" or Path(folder).is_file():
        after = "" if folder is None else f" after {folder}"
        raise UsageError(f"no folder{after}: say where the clips go, as in `{EXAMPLE}`")
    from keyecli.tasks.saved import clips_of

    clips = clips_of(read_all(files, f"give results that were saved with --json, as in `{EXAMPLE}`"))
    clips = [clip for clip in clips if clip.segments]
    if not clips:
        console.notice("there is no span to cut out")
        return
    # All are opened first: a video that is gone or another one is told before anything is written.
    infos = [clip.open() for clip in clips]
    for clip, info, place in zip(clips, infos, _folders(clips, Path(folder)), strict=True):
        _cut(clip, info, place, settings, exact=exact, overwrite=overwrite)


def _cut(
    clip: SavedClip, info: VideoInfo, folder: Path, settings: Settings, *, exact: bool, overwrite: bool
) -> None:
    from keyecli.video.cut import cut

    segments = clip.timeline(info).segments
    spans = [(segment.start_s, segment.end_s) for segment in segments]
    with console.progress() as on_progress:
        made = cut(info, spans, folder, exact=exact, overwrite=overwrite, on_progress=on_progress)
    for segment, part in zip(segments, made, strict=True):
        console.result(one_line_json(_report(info, segment, part)) if settings.json else str(part.path))


def _folders(clips: Sequence[SavedClip], folder: Path) -> list[Path]:
    """Where each clip's parts go: those of videos whose names are alike must not meet, since they could be the same."""
    taken: dict[str, int] = {}
    folders = []
    for clip in clips:
        # Coarser than the names that are written: signs and capitals make no difference.
        name = "".join(filter(str.isalnum, clip.path.stem)).casefold()
        count = taken[name] = taken.get(name, 0) + 1
        folders.append(folder if count == 1 else folder / str(count))
    return folders


def _report(info: VideoInfo, segment: Segment, part: CutClip) -> dict[str, Any]:
    """Schema keye.clip/1."""
    from keyecli import __version__

    return {
        "schema": "keye.clip/1",
        "path": str(part.path),
        "source": str(info.path),
        "title": segment.title,
        "score": segment.score,
        "span_start_s": segment.start_s,
        "span_end_s": segment.end_s,
        "start_s": part.start_s,
        "end_s": part.end_s,
        "keye_version": __version__,
    }
