"""Segments as a Final Cut Pro project, FCPXML 1.9, which DaVinci Resolve reads too."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from xml.etree import ElementTree

from keyecli.export.edits import Edit, EditList
from keyecli.export.options import ExportOptions
from keyecli.export.text import one_line, score_text, writable
from keyecli.export.timeline import Timeline

VERSION = "1.9"
# The sampling rates that a sequence can have.
_SEQUENCE_RATES = {
    32_000: "32k",
    44_100: "44.1k",
    48_000: "48k",
    88_200: "88.2k",
    96_000: "96k",
    176_400: "176.4k",
    192_000: "192k",
}


def fcpxml(timelines: Sequence[Timeline], options: ExportOptions) -> str:
    """One project: the segments one after another as clips of their files, with text and score as notes.

    All times are whole frames, as fractions of seconds. UsageError as in `ExportOptions.timebase`.
    """
    edits = EditList.of(timelines, options)
    root = ElementTree.Element("fcpxml", version=VERSION)
    resources = ElementTree.SubElement(root, "resources")
    formats = _formats(resources, edits)
    for clip, timeline in enumerate(edits.clips):
        _asset(resources, edits, clip, formats[timeline.width, timeline.height])
    event = ElementTree.SubElement(ElementTree.SubElement(root, "library"), "event", name=edits.title)
    project = ElementTree.SubElement(event, "project", name=edits.title)
    sequence = ElementTree.SubElement(project, "sequence", _sequence(edits))
    spine = ElementTree.SubElement(sequence, "spine")
    for edit in edits.edits:
        _asset_clip(spine, edits, edit)
    ElementTree.indent(root)
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n'
    return f"{head}{ElementTree.tostring(root, encoding='unicode')}\n"


def _formats(resources: ElementTree.Element, edits: EditList) -> dict[tuple[int, int], str]:
    """A format for each frame size, the first clip's is first and the sequence's own; → their ids."""
    ids: dict[tuple[int, int], str] = {}
    frame = 1 / edits.timebase.rate
    for timeline in edits.clips:
        size = (timeline.width, timeline.height)
        if size not in ids:
            ids[size] = f"r{len(ids) + 1}"
            ElementTree.SubElement(
                resources,
                "format",
                id=ids[size],
                frameDuration=f"{frame.numerator}/{frame.denominator}s",
                width=str(timeline.width),
                height=str(timeline.height),
            )
    return ids


def _asset(resources: ElementTree.Element, edits: EditList, clip: int, format: str) -> None:
    timeline = edits.clips[clip]
    attributes = {
        "id": _asset_id(clip),
        "name": one_line(timeline.name),
        "start": _time(edits, edits.start),
        "duration": _time(edits, edits.frames[clip]),
        "hasVideo": "1",
        "format": format,
    }
    if timeline.sound is not None:
        attributes |= {
            "hasAudio": "1",
            "audioSources": "1",
            "audioChannels": str(timeline.sound.channels),
            "audioRate": str(timeline.sound.rate),
        }
    asset = ElementTree.SubElement(resources, "asset", attributes)
    ElementTree.SubElement(asset, "media-rep", kind="original-media", src=timeline.path.resolve().as_uri())


def _sequence(edits: EditList) -> dict[str, str]:
    attributes = {
        "format": "r1",
        "duration": _time(edits, edits.duration),
        "tcStart": _time(edits, edits.start),
        "tcFormat": _counting(edits),
    }
    sound = next((clip.sound for clip in edits.clips if clip.sound is not None), None)
    if sound is not None:
        attributes["audioLayout"] = "stereo"
        attributes["audioRate"] = _SEQUENCE_RATES.get(sound.rate, "48k")
    return attributes


def _asset_clip(spine: ElementTree.Element, edits: EditList, edit: Edit) -> None:
    clip = ElementTree.SubElement(
        spine,
        "asset-clip",
        ref=_asset_id(edit.clip),
        name=edit.title,
        offset=_time(edits, edits.start + edit.record),  # counted from where the sequence's timecode begins
        start=_time(edits, edits.start + edit.first),
        duration=_time(edits, edit.frames),
        tcFormat=_counting(edits),
    )
    segment = edit.segment
    score = [] if segment.score is None else [f"score {score_text(segment.score)}"]
    note = "\n".join([*score, *writable(segment.text).strip().splitlines()])
    if note:
        ElementTree.SubElement(clip, "note").text = note


def _asset_id(clip: int) -> str:
    return f"clip{clip + 1}"


def _counting(edits: EditList) -> str:
    return "DF" if edits.timebase.drop_frame else "NDF"


def _time(edits: EditList, frames: int) -> str:
    """Frames as seconds, whole or a fraction: "5s", "1001/30000s"."""
    time_s = Fraction(frames) / edits.timebase.rate
    if time_s.denominator == 1:
        return f"{time_s.numerator}s"
    return f"{time_s.numerator}/{time_s.denominator}s"
