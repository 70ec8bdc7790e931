"""Draws the losses of a training run over its steps, and the learning rate below them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keyecli.export.pictures import FAINT, INK, MARGIN_PX, PALE_INK, PAPER, ROW_COLOURS, Colour, save_picture
from keyecli.export.text import one_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

Point = tuple[float, float]

TRAINING_COLOUR, HELD_OUT_COLOUR, RATE_COLOUR = ROW_COLOURS[0], ROW_COLOURS[1], ROW_COLOURS[2]
POINT_COLOUR: Colour = (170, 206, 228)

WIDTH_PX, HEIGHT_PX = 1200, 640
_LEFT_PX, _RIGHT_PX = 84, 24
_LOSS_TOP_PX, _LOSS_BOTTOM_PX = 78, 452
_RATE_TOP_PX, _RATE_BOTTOM_PX = 486, 580
_TEXT_PX, _SMALL_PX, _HEADING_PX = 16, 14, 20
_SHARPER = 3  # lines are drawn this much larger and made smaller, so that they have smooth edges
_POINT_RADIUS_PX, _DOT_RADIUS_PX = 2.5, 4.5

# The smoothed line forgets over this share of the steps, and over a few steps at least.
SMOOTHED_SHARE, SMOOTHED_STEPS = 0.04, 5
# Losses that differ by more than this factor are drawn over their logarithm.
LOGARITHMIC_FROM = 20


@dataclass(frozen=True)
class Panel:
    """A rectangle of the picture, in pixels, over a range of steps and one of values, of powers of 10 with `logarithmic`."""

    top: int
    bottom: int
    steps: tuple[float, float]
    values: tuple[float, float]
    logarithmic: bool = False

    def place(self, step: float, value: float) -> Point:
        """Where a value stands; one outside of the range stands on its edge."""
        first, last = self.steps
        low, high = self.values
        value = math.log10(value) if self.logarithmic else value
        right = _LEFT_PX + (WIDTH_PX - _LEFT_PX - _RIGHT_PX) * (step - first) / (last - first)
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return right, self.bottom - (self.bottom - self.top) * share


def loss_plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Write a picture of lines as `read_metrics` gives them: each step's `loss` as a point and a smoothed line, the held-out
    `loss` of each evaluation, and the learning rate `lr` below. Figures that are null or missing are passed over.

    The same rows give the same picture. Replaces a picture that is there; UsageError and KeyeError as `save_picture`.
    """
    save_picture(draw_losses(rows, title), path, overwrite=True)


def draw_losses(rows: Sequence[dict[str, Any]], title: str) -> Image:
    """The picture itself, 1200 × 640 pixels."""
    from PIL import Image, ImageDraw

    training, held_out = _series(rows, "step", "loss"), _series(rows, "eval", "loss")
    rates = _series(rows, "step", "lr")
    losses = _loss_panel(training, held_out)
    learning = _rate_panel(rates, losses.steps)
    large = Image.new("RGB", (WIDTH_PX * _SHARPER, HEIGHT_PX * _SHARPER), PAPER)
    draw = ImageDraw.Draw(large)
    _draw_grid(draw, losses)
    _draw_grid(draw, learning)
    alone = len(training) == 1
    for step, loss in training:
        radius, colour = (_DOT_RADIUS_PX, TRAINING_COLOUR) if alone else (_POINT_RADIUS_PX, POINT_COLOUR)
        _dot(draw, losses.place(step, loss), radius, colour)
    _line(draw, [losses.place(*point) for point in smoothed(training)], TRAINING_COLOUR)
    _line(draw, [losses.place(*point) for point in held_out], HELD_OUT_COLOUR)
    for step, loss in held_out:
        _dot(draw, losses.place(step, loss), _DOT_RADIUS_PX, HELD_OUT_COLOUR)
    _line(draw, [learning.place(*point) for point in rates], RATE_COLOUR)
    if len(rates) == 1:
        _dot(draw, learning.place(*rates[0]), _DOT_RADIUS_PX, RATE_COLOUR)
    image = large.reduce(_SHARPER)
    _write_texts(ImageDraw.Draw(image), title, losses, learning, training, held_out)
    return image


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each value and those before it, the older the less: an exponential average without a bias at its beginning."""
    keep = 1 - 1 / max(SMOOTHED_STEPS, SMOOTHED_SHARE * len(points))
    total = weight = 0.0
    line = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        line.append((step, total / weight))
    return line


def ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most `most` of them, 2 or more."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.ceil(low / (factor * step) - 1e-9), math.floor(high / (factor * step) + 1e-9)
        if last - first < most:
            break
    return [number * factor * step for number in range(first, last + 1)]


def _series(rows: Sequence[dict[str, Any]], kind: str, name: str) -> list[Point]:
    """(step, figure) of the lines of a kind that have the figure, in the order of steps."""
    found = [
        (float(row["step"]), float(row[name]))
        for row in rows
        if row.get("kind") == kind and isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    ]
    return sorted(found)


def _loss_panel(training: Sequence[Point], held_out: Sequence[Point]) -> Panel:
    values = sorted(value for _, value in (*training, *held_out)) or [0.0, 1.0]
    steps = [step for step, _ in (*training, *held_out)] or [0.0, 1.0]
    logarithmic = values[0] > 0 and values[-1] > LOGARITHMIC_FROM * values[0]
    if logarithmic:
        span = math.log10(values[0]), math.log10(values[-1])
    else:
        span = min(0.0, values[0]) if values[0] < 0.5 * values[-1] else values[0], values[-1]
    room = 0.06 * (span[1] - span[0]) or abs(span[1]) or 1.0
    low = span[0] if span[0] == 0 and not logarithmic else span[0] - room
    return Panel(
        _LOSS_TOP_PX, _LOSS_BOTTOM_PX, _widened(min(steps), max(steps)), (low, span[1] + room), logarithmic
    )


def _rate_panel(rates: Sequence[Point], steps: tuple[float, float]) -> Panel:
    highest = max((rate for _, rate in rates), default=0.0) or 1.0
    return Panel(_RATE_TOP_PX, _RATE_BOTTOM_PX, steps, (0.0, 1.1 * highest))


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 1, high + 1)


def _value_ticks(panel: Panel) -> list[tuple[float, str]]:
    """Values with their labels."""
    low, high = panel.values
    if not panel.logarithmic:
        most = max(3, (panel.bottom - panel.top) // 45)
        return [(value, _number(value)) for value in ticks(low, high, most)]
    factors: tuple[int, ...] = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [(value, _number(value)) for value in values if low <= math.log10(value) <= high]


def _step_ticks(panel: Panel) -> list[float]:
    return [step for step in ticks(*panel.steps, 12) if step == round(step)]


def _number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"


def _draw_grid(draw: ImageDraw, panel: Panel) -> None:
    for value, _ in _value_ticks(panel):
        left, y = panel.place(panel.steps[0], value)
        _line(draw, [(left, y), (WIDTH_PX - _RIGHT_PX, y)], FAINT, 1)
    for step in _step_ticks(panel):
        x, _ = panel.place(step, 1.0)
        _line(draw, [(x, panel.top), (x, panel.bottom)], FAINT, 1)
    corner = (_LEFT_PX, panel.bottom)
    _line(draw, [(_LEFT_PX, panel.top), corner, (WIDTH_PX - _RIGHT_PX, panel.bottom)], INK, 1)


def _write_texts(
    draw: ImageDraw,
    title: str,
    losses: Panel,
    learning: Panel,
    training: Sequence[Point],
    held_out: Sequence[Point],
) -> None:
    heading = _clipped(one_line(title), WIDTH_PX - 2 * MARGIN_PX)
    draw.text((MARGIN_PX, 14), heading, fill=INK, font=_font(_HEADING_PX))
    _write_legend(draw, training, held_out)
    for panel in (losses, learning):
        for value, label in _value_ticks(panel):
            _, y = panel.place(panel.steps[0], value)
            draw.text((_LEFT_PX - 8, y), label, fill=INK, font=_font(_SMALL_PX), anchor="rm")
    for step in _step_ticks(learning):
        x, _ = learning.place(step, 0.0)
        draw.text((x, learning.bottom + 8), f"{step:.0f}", fill=INK, font=_font(_SMALL_PX), anchor="mt")
    middle = (_LEFT_PX + WIDTH_PX - _RIGHT_PX) / 2
    draw.text((middle, HEIGHT_PX - 12), "step", fill=INK, font=_font(_TEXT_PX), anchor="ms")
    draw.text((_LEFT_PX + 8, learning.top - 4), "learning rate", fill=INK, font=_font(_SMALL_PX), anchor="ls")
    if not training and not held_out:
        place = (middle, (losses.top + losses.bottom) / 2)
        draw.text(place, "there is no loss to show", fill=PALE_INK, font=_font(_TEXT_PX), anchor="mm")


def _write_legend(draw: ImageDraw, training: Sequence[Point], held_out: Sequence[Point]) -> None:
    """What the colours mean, with the last value of each line."""
    left, middle = _LEFT_PX, 60
    entries: list[tuple[str, Colour, Sequence[Point], Callable[[Sequence[Point]], list[Point]]]] = [
        ("training loss, smoothed", TRAINING_COLOUR, training, smoothed),
        ("held-out loss", HELD_OUT_COLOUR, held_out, list),
    ]
    for name, colour, points, line in entries:
        if not points:
            continue
        text = f"{name}: {line(points)[-1][1]:.4g} at step {points[-1][0]:.0f}"
        draw.rectangle((left, middle - 2, left + 22, middle + 1), fill=colour)
        draw.text((left + 30, middle), text, fill=INK, font=_font(_TEXT_PX), anchor="lm")
        left += 30 + math.ceil(_font(_TEXT_PX).getlength(text)) + 32


def _line(draw: ImageDraw, points: Sequence[Point], colour: Colour, width_px: float = 2) -> None:
    if len(points) > 1:
        enlarged = [(x * _SHARPER, y * _SHARPER) for x, y in points]
        draw.line(enlarged, fill=colour, width=round(width_px * _SHARPER), joint="curve")


def _dot(draw: ImageDraw, centre: Point, radius_px: float, colour: Colour) -> None:
    x, y, radius = centre[0] * _SHARPER, centre[1] * _SHARPER, radius_px * _SHARPER
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _clipped(text: str, width: float) -> str:
    """The text, or as much of its beginning as fits with three dots."""
    font = _font(_HEADING_PX)
    if font.getlength(text) <= width:
        return text
    text = text[: WIDTH_PX // 2]
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


@lru_cache(maxsize=4)
def _font(size: int) -> FreeTypeFont | ImageFont:
    """Pillow's own font; letters it lacks are drawn as boxes."""
    from PIL import ImageFont

    return ImageFont.load_default(size)
