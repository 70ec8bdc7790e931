"""Draws results: a contact sheet of segments, a plot of segments over time, a strip of weighted frames, thumbnails."""

from __future__ import annotations

import base64
import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from keyecli.errors import KeyeError, UsageError
from keyecli.export.files import check_writable
from keyecli.export.text import one_line, score_text, title_of
from keyecli.export.timeline import Segment, Timeline
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import SamplingPlan
from keyecli.video.source import VideoInfo
from keyecli.video.timecode import format_time

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (32, 32, 32)
PALE_INK: Colour = (128, 128, 128)
FAINT: Colour = (228, 228, 228)
# Colours that people with any colour vision tell apart (Okabe and Ito), without the two that are pale on white.
ROW_COLOURS: tuple[Colour, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
)
_LIGHT_FROM = 420  # sum of red, green and blue from which dark letters read better
FAINTEST = 0.25  # how much of its colour a bar with score 0 has

MARGIN_PX = 16
TILE_PX = 280  # the longer side of a frame on a contact sheet
STRIP_TILE_PX = 200
STRIP_COLUMNS = 6
PLOT_WIDTH_PX = 1200
ROW_PX = 34
BAR_PX = 22
_LABELS_PX = 300  # most of a plot's width that names of rows may take
_TICK_APART_PX = 80
_WEIGHT_BAR_PX = 10
_TEXT_PX, _SMALL_PX, _HEADING_PX = 16, 14, 20
_LINE_PX = 24
_GAP_PX = 8
_LARGEST_PX = 60_000  # Pillow and PNG readers give up somewhere above
_JPEG_QUALITY = 80
_TOUCH_S = Fraction(1, 1000)  # times are printed with three decimals, and then still name their frame
_TICK_STEPS_S = (
    *(Fraction(n, 100) for n in (1, 2, 5, 10, 20, 50)),
    *map(Fraction, (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400)),
)
_PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class Still:
    """A frame of a clip as a picture, upright, with its presentation time in seconds."""

    time_s: Fraction
    picture: Image


def frames_at(info: VideoInfo, times_s: Sequence[float | Fraction], max_side: int) -> list[Still]:
    """The frame on screen at each of `times_s` (seconds, any order), its longer side at most `max_side` pixels.

    One pass over the clip decodes all of them. Pictures are never enlarged. A time behind the end gives the last frame, a
    frame that cannot be decoded the nearest one that can. InputError and warnings as `decode_frames`.
    """
    from PIL import Image

    if not times_s:
        return []
    times = info.frame_times
    wanted = [
        times[
            max(0, bisect_right(times.ticks, math.floor((Fraction(time_s) + _TOUCH_S) / times.time_base)) - 1)
        ]
        for time_s in times_s
    ]
    width, height = _fitted(info, max_side)
    kind: Literal["video", "image"] = "image" if info.kind == "image" else "video"
    plan = SamplingPlan(tuple(sorted(set(wanted))), height, width, kind, 0.0)
    found: dict[Fraction, Image.Image] = {}
    for chunk in decode_frames(info, plan):
        for time_s, frame in zip(chunk.times_s, chunk.frames, strict=True):
            found[time_s] = Image.fromarray(frame)
    nearest = [min(found, key=lambda time_s: (abs(time_s - target), time_s)) for target in wanted]
    return [Still(time_s, found[time_s]) for time_s in nearest]


def contact_sheet(info: VideoInfo, segments: Sequence[Segment]) -> Image:
    """The first, middle and last frame of each segment, one row each, with their times, the title and the score.

    Without segments the sheet says so.
    """
    heading = f"{info.path.name} ({_clock(info.duration_s)})"
    if not segments:
        return _notice(f"{heading}: there is no segment to show")
    stills = frames_at(info, [time_s for s in segments for time_s in _three_times(info, s)], TILE_PX)
    cell, tile_height = _cell(info, TILE_PX)
    block = _LINE_PX + _GAP_PX + tile_height + _LINE_PX + MARGIN_PX
    image, draw = _blank(4 * MARGIN_PX + 3 * cell, 2 * MARGIN_PX + 2 * _LINE_PX + len(segments) * block)
    _write(draw, (MARGIN_PX, MARGIN_PX), heading, _HEADING_PX, image.width - 2 * MARGIN_PX)
    for number, segment in enumerate(segments):
        top = MARGIN_PX + 2 * _LINE_PX + number * block
        _segment_line(draw, segment, number, (MARGIN_PX, top, image.width - MARGIN_PX))
        top += _LINE_PX + _GAP_PX
        for column, name in enumerate(("start", "middle", "end")):
            still = stills[3 * number + column]
            left = MARGIN_PX + column * (cell + MARGIN_PX)
            _paste(image, still.picture, (left, top), cell, tile_height)
            caption = f"{name} {_clock(still.time_s)}"
            _write(draw, (left, top + tile_height + 3), caption, _SMALL_PX, cell)
    return image


def span_plot(timelines: Sequence[Timeline], rows: Sequence[str] = ()) -> Image:
    """The segments of each clip over its time, a row for each title, ticks below; 1200 pixels wide.

    `rows` are titles that get a row first and even without a segment (the queries that were asked). A bar's colour is the
    fuller the higher its score, which is written on it or beside it; without a score it is full.
    """
    if not timelines:
        return _notice("There is no clip to plot.")
    panels = [(timeline, _rows_of(timeline, rows)) for timeline in timelines]
    labels = max((_length(title, _TEXT_PX) for _, titles in panels for title in titles), default=0.0)
    left = 2 * MARGIN_PX + math.ceil(min(labels, _LABELS_PX))
    heights = [2 * _LINE_PX + max(1, len(titles)) * ROW_PX + MARGIN_PX for _, titles in panels]
    image, draw = _blank(PLOT_WIDTH_PX, MARGIN_PX + sum(heights))
    top = MARGIN_PX
    for (timeline, titles), height in zip(panels, heights, strict=True):
        _draw_panel(draw, timeline, titles, (left, top, image.width - 2 * MARGIN_PX))
        top += height
    return image


def strip(
    info: VideoInfo,
    times_s: Sequence[float | Fraction],
    captions: Sequence[str],
    weights: Sequence[float] | None = None,
) -> Image:
    """Frames side by side, six in a row, each over its caption and, with `weights`, a bar: the largest fills the width.

    Without times the picture says so. ValueError when there are more or fewer captions or weights than times.
    """
    if len(captions) != len(times_s) or (weights is not None and len(weights) != len(times_s)):
        raise ValueError(f"{len(times_s)} frames need as many captions and weights")
    if not times_s:
        return _notice(f"{info.path.name}: there is no frame to show")
    cell, tile_height = _cell(info, STRIP_TILE_PX)
    columns = min(STRIP_COLUMNS, len(times_s))
    block = tile_height + _LINE_PX + (_WEIGHT_BAR_PX if weights is not None else 0) + MARGIN_PX
    image, draw = _blank(
        MARGIN_PX + columns * (cell + MARGIN_PX), MARGIN_PX + math.ceil(len(times_s) / columns) * block
    )
    largest = max(weights, default=0.0) if weights is not None else 0.0
    for number, still in enumerate(frames_at(info, times_s, STRIP_TILE_PX)):
        left = MARGIN_PX + number % columns * (cell + MARGIN_PX)
        top = MARGIN_PX + number // columns * block
        _paste(image, still.picture, (left, top), cell, tile_height)
        top += tile_height
        _write(draw, (left, top + 3), captions[number], _SMALL_PX, cell)
        if weights is not None:
            share = weights[number] / largest if largest > 0 else 0.0
            _bar(draw, (left, top + _LINE_PX), cell, _WEIGHT_BAR_PX, share, ROW_COLOURS[0])
    return image


def thumbnail_data_uri(info: VideoInfo, time_s: float | Fraction, width: int) -> str:
    """The frame on screen at `time_s` as a JPEG in a data: URI, `width` pixels wide or less."""
    return thumbnail_data_uris(info, [time_s], width)[0]


def thumbnail_data_uris(info: VideoInfo, times_s: Sequence[float | Fraction], width: int) -> list[str]:
    """The same for several times, in one pass over the clip."""
    longer = max(width, round(width * info.height / info.width))
    uris = []
    for still in frames_at(info, times_s, longer):
        data = io.BytesIO()
        still.picture.save(data, "JPEG", quality=_JPEG_QUALITY)
        uris.append("data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii"))
    return uris


def check_picture_path(path: Path, overwrite: bool = False) -> None:
    """UsageError when `save_picture` could not write there: a suffix that is no picture's, or as `check_writable`."""
    if path.suffix.lower() not in _PICTURE_FORMATS:
        raise UsageError(
            f"{path} does not end in {', '.join(_PICTURE_FORMATS)}; give the picture such a name"
        )
    check_writable([path], overwrite=overwrite)


def save_picture(image: Image, path: Path, overwrite: bool = False) -> None:
    """Write a picture under its name when it is complete; the suffix tells the format. KeyeError when the disk fails."""
    check_picture_path(path, overwrite)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(unfinished, _PICTURE_FORMATS[path.suffix.lower()])
        unfinished.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise KeyeError(f"cannot write {path}: {reason}; give another place") from error
    finally:
        unfinished.unlink(missing_ok=True)


def tick_step_s(duration_s: float, width_px: int) -> Fraction:
    """The smallest of the usual steps whose ticks stand far enough apart for their labels."""
    most = max(1, width_px // _TICK_APART_PX)
    fitting = (step for step in _TICK_STEPS_S if duration_s / step <= most)
    return next(fitting, _TICK_STEPS_S[-1] * math.ceil(duration_s / _TICK_STEPS_S[-1] / most))


def _three_times(info: VideoInfo, segment: Segment) -> tuple[Fraction, Fraction, Fraction]:
    """When the first frame, the middle and the last frame of [start, end) are on screen."""
    times = info.frame_times
    start_s, end_s = Fraction(segment.start_s), Fraction(segment.end_s)
    first = min(
        bisect_right(times.ticks, math.ceil((start_s - _TOUCH_S) / times.time_base) - 1), len(times) - 1
    )
    last = bisect_right(times.ticks, math.ceil((end_s - _TOUCH_S) / times.time_base) - 1) - 1
    last = max(first, last)
    return times[first], max(times[first], (start_s + min(end_s, info.duration_s)) / 2), times[last]


def _rows_of(timeline: Timeline, rows: Sequence[str]) -> dict[str, list[Segment]]:
    """Segments by title, the titles in `rows` first."""
    titles: dict[str, list[Segment]] = {one_line(row): [] for row in rows}
    for number, segment in enumerate(timeline.segments, 1):
        titles.setdefault(title_of(segment, number), []).append(segment)
    return titles


def _draw_panel(
    draw: ImageDraw, timeline: Timeline, titles: dict[str, list[Segment]], box: tuple[int, int, int]
) -> None:
    """One clip: heading, rows, axis. box: left end of time 0, top, right end of the clip."""
    left, top, right = box
    duration_s = max(timeline.duration_s, 1e-3)
    _write(draw, (MARGIN_PX, top), timeline.path.name, _TEXT_PX, right - MARGIN_PX)
    top += _LINE_PX
    bottom = top + max(1, len(titles)) * ROW_PX
    _axis(draw, duration_s, (left, top, right, bottom))
    if not titles:
        _write(draw, (left + _GAP_PX, top + _GAP_PX), "there is no segment to show", _TEXT_PX, right - left)
    for row, (title, segments) in enumerate(titles.items()):
        middle = top + row * ROW_PX + ROW_PX // 2
        _write(draw, (MARGIN_PX, middle - _TEXT_PX // 2 - 2), title, _TEXT_PX, left - 2 * MARGIN_PX)
        if not segments:
            draw.text((left + _GAP_PX, middle), "none", fill=PALE_INK, font=_font(_SMALL_PX), anchor="lm")
        bars = [(segment, *_ends(segment, duration_s, left, right)) for segment in segments]
        edges = sorted({right, *(begin for _, begin, _ in bars)})
        # The best on top, where segments lie over each other.
        for segment, begin, end in sorted(
            bars, key=lambda bar: 1.0 if bar[0].score is None else bar[0].score
        ):
            following = edges[min(bisect_left(edges, end), len(edges) - 1)]
            _draw_span(
                draw, segment.score, ROW_COLOURS[row % len(ROW_COLOURS)], (begin, middle, end), following
            )


def _ends(segment: Segment, duration_s: float, left: int, right: int) -> tuple[int, int]:
    """Where a segment begins and ends, in pixels; two apart at least."""
    begin, end = (
        left + round((right - left) * min(max(time_s / duration_s, 0.0), 1.0))
        for time_s in (segment.start_s, segment.end_s)
    )
    begin = min(begin, right - 2)
    return begin, max(end, begin + 2)


def _draw_span(
    draw: ImageDraw, score: float | None, colour: Colour, place: tuple[int, int, int], following: int
) -> None:
    """One bar with its score, in it or behind it or before it. place: left, vertical middle, right; `following`: where
    the next bar or the margin begins."""
    begin, middle, end = place
    strength = 1.0 if score is None else FAINTEST + (1 - FAINTEST) * min(max(score, 0.0), 1.0)
    fill = _blend(colour, strength)
    draw.rectangle(
        (begin, middle - BAR_PX // 2, end - 1, middle + BAR_PX // 2 - 1), fill=fill, outline=colour
    )
    if score is None:
        return
    text, font = score_text(score), _font(_SMALL_PX)
    length = math.ceil(font.getlength(text)) + 6
    if end - begin >= length:
        ink = PAPER if sum(fill) < _LIGHT_FROM else INK
        draw.text(((begin + end) / 2, middle), text, fill=ink, font=font, anchor="mm")
    elif end + length <= following:
        draw.text((end + 3, middle), text, fill=INK, font=font, anchor="lm")
    else:
        draw.text((begin - 3, middle), text, fill=INK, font=font, anchor="rm")


def _axis(draw: ImageDraw, duration_s: float, box: tuple[int, int, int, int]) -> None:
    """A line below the rows with a tick, a faint line through the rows and a time at every step."""
    left, top, right, bottom = box
    draw.line((left, bottom, right, bottom), fill=INK)
    step_s = tick_step_s(duration_s, right - left)
    font = _font(_SMALL_PX)
    for number in range(int(duration_s / step_s) + 1):
        time_s = number * step_s
        x = left + round((right - left) * float(time_s) / duration_s)
        draw.line((x, top, x, bottom - 1), fill=FAINT)
        draw.line((x, bottom, x, bottom + 4), fill=INK)
        draw.text((x, bottom + 6), _tick_label(time_s, step_s), fill=INK, font=font, anchor="mt")


def _tick_label(time_s: Fraction, step_s: Fraction) -> str:
    """75 at steps of 15 s is "1:15", 0.5 at steps below 1 s is "0:00.50"."""
    clock = _clock(time_s)
    return clock.partition(".")[0] if step_s >= 1 else clock[:-1]


def _segment_line(draw: ImageDraw, segment: Segment, number: int, box: tuple[int, int, int]) -> None:
    """A segment's number and title on the left; its times, and its score as a number and a bar, on the right."""
    left, top, right = box
    if segment.score is not None:
        bar = 80
        _bar(draw, (right - bar, top + 5), bar, _WEIGHT_BAR_PX, segment.score, ROW_COLOURS[0])
        right -= bar + _GAP_PX
    score = "" if segment.score is None else f"   score {score_text(segment.score)}"
    times = f"{_clock(segment.start_s)} - {_clock(segment.end_s)}{score}"
    draw.text((right, top), times, fill=INK, font=_font(_SMALL_PX), anchor="ra")
    room = right - left - math.ceil(_font(_SMALL_PX).getlength(times)) - MARGIN_PX
    _write(draw, (left, top - 2), f"{number + 1}. {title_of(segment, number + 1)}", _TEXT_PX, room)


def _bar(
    draw: ImageDraw, corner: tuple[int, int], width: int, height: int, share: float, colour: Colour
) -> None:
    """A bar of which `share` is filled from the left."""
    left, top = corner
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=FAINT)
    filled = round(width * min(max(share, 0.0), 1.0))
    if filled:
        draw.rectangle((left, top, left + filled - 1, top + height - 1), fill=colour)


def _blank(width: int, height: int) -> tuple[Image, ImageDraw]:
    from PIL import Image, ImageDraw

    if max(width, height) > _LARGEST_PX:
        raise UsageError(
            f"a picture of {width}x{height} pixels is larger than programs can show; show fewer parts"
        )
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def _notice(sentence: str) -> Image:
    """A picture that holds only a sentence."""
    sentence = one_line(sentence)
    width = min(math.ceil(_length(sentence, _TEXT_PX)), PLOT_WIDTH_PX) + 2 * MARGIN_PX
    image, draw = _blank(width, 2 * MARGIN_PX + _LINE_PX)
    _write(draw, (MARGIN_PX, MARGIN_PX), sentence, _TEXT_PX, width - 2 * MARGIN_PX)
    return image


def _cell(info: VideoInfo, max_side: int) -> tuple[int, int]:
    """Width of a cell, wide enough for a caption, and height of the frame in it."""
    width, height = _fitted(info, max_side)
    return max(width, math.ceil(_length("middle 00:00:00.000", _SMALL_PX))), height


def _fitted(info: VideoInfo, max_side: int) -> tuple[int, int]:
    """Width and height of the clip's picture with the longer side at most `max_side`."""
    scale = min(1.0, max_side / max(info.width, info.height))
    return max(1, round(info.width * scale)), max(1, round(info.height * scale))


def _paste(image: Image, picture: Image, corner: tuple[int, int], width: int, height: int) -> None:
    """A picture in the middle of a cell."""
    left, top = corner
    image.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))


def _write(draw: ImageDraw, place: tuple[int, int], text: str, size: int, width: float) -> None:
    """One line of text, shortened to `width` pixels."""
    draw.text(place, _clipped(one_line(text), size, width), fill=INK, font=_font(size))


def _clipped(text: str, size: int, width: float) -> str:
    """The text, or as much of its beginning as fits with three dots."""
    if _length(text, size) <= width:
        return text
    fits, too_many = 0, len(text)
    while fits + 1 < too_many:
        count = (fits + too_many) // 2
        if _length(text[:count].rstrip() + "...", size) <= width:
            fits = count
        else:
            too_many = count
    return text[:fits].rstrip() + "..."


def _length(text: str, size: int) -> float:
    return _font(size).getlength(text)


@lru_cache(maxsize=8)
def _font(size: int) -> FreeTypeFont | ImageFont:
    """Pillow's own font; letters it lacks are drawn as boxes."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _blend(colour: Colour, strength: float) -> Colour:
    """The colour on paper with this opacity."""
    red, green, blue = (
        round(strength * ink + (1 - strength) * paper) for ink, paper in zip(colour, PAPER, strict=True)
    )
    return red, green, blue


def _clock(time_s: float | Fraction) -> str:
    """1:02:03.250, or 2:03.250 below an hour."""
    return format_time(time_s).removeprefix("0:").removeprefix("0")
