"""Segments as an OpenTimelineIO timeline."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from keyecli.errors import UsageError
from keyecli.export.edits import Edit, EditList
from keyecli.export.options import ExportOptions
from keyecli.export.text import writable
from keyecli.export.timeline import Timeline


def require_opentimelineio() -> ModuleType:
    """The package. UsageError, with the command that installs it, when it is missing."""
    try:
        import opentimelineio
    except ModuleNotFoundError as error:
        if error.name != "opentimelineio":
            raise
        raise UsageError(
            'otio is written by OpenTimelineIO, which is not installed: pip install "keyecli[otio]"'
        ) from error
    return opentimelineio


def otio(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """A video track of the segments one after another, and the same on an audio track where clips have sound.

    A clip's source range lies in its file's available range, which begins at the start timecode. metadata["keye"] of
    each holds start_s, end_s, text and score. UsageError as in `ExportOptions.timebase`, and without the package.
    """
    library = require_opentimelineio()
    edits = EditList.of(timelines, options)
    timeline = library.schema.Timeline(name=edits.title, global_start_time=_time(library, edits, edits.start))
    timeline.tracks.append(_track(library, edits, "V1", library.schema.TrackKind.Video))
    if any(clip.sound for clip in timelines):
        timeline.tracks.append(_track(library, edits, "A1", library.schema.TrackKind.Audio))
    return library.adapters.write_to_string(timeline, "otio_json") + "\n"


def _track(library: ModuleType, edits: EditList, name: str, kind: str) -> Any:
    track = library.schema.Track(name=name, kind=kind)
    for edit in edits.edits:
        silent = kind == library.schema.TrackKind.Audio and edits.clips[edit.clip].sound is None
        track.append(_gap(library, edits, edit) if silent else _clip(library, edits, edit))
    return track


def _clip(library: ModuleType, edits: EditList, edit: Edit) -> Any:
    segment = edit.segment
    reference = library.schema.ExternalReference(
        target_url=edits.clips[edit.clip].path.resolve().as_uri(),
        available_range=_range(library, edits, edits.start, edits.frames[edit.clip]),
    )
    known = {"start_s": segment.start_s, "end_s": segment.end_s, "text": writable(segment.text)}
    if segment.score is not None:
        known["score"] = segment.score
    return library.schema.Clip(
        name=edit.title,
        media_reference=reference,
        source_range=_range(library, edits, edits.start + edit.first, edit.frames),
        metadata={"keye": known},
    )


def _gap(library: ModuleType, edits: EditList, edit: Edit) -> Any:
    return library.schema.Gap(source_range=_range(library, edits, 0, edit.frames))


def _time(library: ModuleType, edits: EditList, frame: int) -> Any:
    return library.opentime.RationalTime(frame, float(edits.timebase.rate))


def _range(library: ModuleType, edits: EditList, first: int, frames: int) -> Any:
    return library.opentime.TimeRange(_time(library, edits, first), _time(library, edits, frames))
