"""A summary as one HTML file that holds everything it shows: it opens offline, without scripts, in light and dark."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from keyecli.export.markdown import ClipSummary
from keyecli.export.text import one_line, title_of, writable
from keyecli.export.timeline import Segment
from keyecli.video.source import VideoInfo
from keyecli.video.timecode import format_time

if TYPE_CHECKING:
    from jinja2 import Template

Thumbnails = Callable[[VideoInfo, Sequence[float], int], Sequence[str]]

THUMBNAIL_WIDTH_PX = 320
_TEMPLATE = "report.html.jinja"
_BAND = 1000  # units of the drawing of all chapters


def render_report(
    clips: Sequence[ClipSummary],
    title: str | None = None,
    *,
    generator: str = "keye",
    thumbnails: Thumbnails | None = None,
) -> str:
    """The page about the clips, with a picture of each chapter, taken at its middle.

    `thumbnails(info, times_s, width)` gives such pictures as data URIs; None decodes them from the clip. `title` is the
    page's; by default the clip's name. Everything that is not the page's own is escaped, and the page's own policy
    forbids scripts and whatever is not inside the file. InputError for a clip that cannot be decoded any more.
    """
    if thumbnails is None:
        from keyecli.export.pictures import thumbnail_data_uris

        thumbnails = thumbnail_data_uris
    heading = one_line(title or (clips[0].name if len(clips) == 1 else f"{len(clips)} videos"))
    return _template().render(
        title=heading,
        generator=one_line(generator),
        several=len(clips) > 1,
        clips=[_clip(clip, thumbnails) for clip in clips],
        made_by=list(dict.fromkeys(one_line(clip.made_by) for clip in clips)),
        thumbnail_width=THUMBNAIL_WIDTH_PX,
    )


def _clip(clip: ClipSummary, thumbnails: Thumbnails) -> dict[str, Any]:
    info = clip.info
    text = writable(clip.text).strip()
    begin_s, end_s = (clip.chapters[0].start_s, clip.chapters[-1].end_s) if clip.chapters else (0.0, 1.0)
    scale = _BAND / (end_s - begin_s)
    middles_s = [(chapter.start_s + chapter.end_s) / 2 for chapter in clip.chapters]
    pictures = thumbnails(info, middles_s, THUMBNAIL_WIDTH_PX) if middles_s else []
    return {
        "name": clip.name,
        "facts": f"{format_time(info.duration_s)}, {info.width}×{info.height}, {one_line(info.codec)}",
        "text": text,
        "paragraphs": re.split(r"\n\s*\n", text),
        "chapters": [
            {
                **_segment(chapter, place),
                "left": round((chapter.start_s - begin_s) * scale, 1),
                "width": round((chapter.end_s - chapter.start_s) * scale, 1),
                "thumbnail": picture,
            }
            for place, (chapter, picture) in enumerate(zip(clip.chapters, pictures, strict=True), 1)
        ],
        "events": [_segment(event, place) for place, event in enumerate(clip.own_events, 1)],
    }


def _segment(segment: Segment, place: int) -> dict[str, Any]:
    return {
        "title": title_of(segment, place),
        "text": writable(segment.text).strip(),
        "times": f"{format_time(segment.start_s)} – {format_time(segment.end_s)}",
    }


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string((files("keyecli.export") / _TEMPLATE).read_text(encoding="utf-8"))
