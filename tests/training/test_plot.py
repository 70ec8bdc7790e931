"""What the plot shows is where the figures say, whatever is missing among them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keyecli.training.plot import (
    HEIGHT_PX,
    HELD_OUT_COLOUR,
    RATE_COLOUR,
    TRAINING_COLOUR,
    WIDTH_PX,
    draw_losses,
    loss_plot,
    smoothed,
    ticks,
)

# Of the picture: below the legend, above the learning rate; and the learning rate's part.
LOSSES, RATES = slice(76, 456), slice(486, 582)


def step(number: int, loss: float | None, lr: float | None = 1e-4) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": loss, "lr": lr}


def evaluated(number: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "loss": loss}


def places(image: Image.Image, colour: tuple[int, int, int], rows: slice) -> np.ndarray:
    """(y, x) of the pixels of exactly this colour."""
    return np.argwhere((np.asarray(image)[rows] == colour).all(-1))


def test_a_falling_loss_falls_from_left_to_right(tmp_path: Path) -> None:
    rows = [step(number, 3.0 - 0.02 * number) for number in range(1, 101)]
    loss_plot(rows, tmp_path / "loss.png", "keye-nano, lora")
    image = Image.open(tmp_path / "loss.png")
    assert image.size == (WIDTH_PX, HEIGHT_PX)
    line = places(image, TRAINING_COLOUR, LOSSES)
    heights = [line[abs(line[:, 1] - x) < 12][:, 0].mean() for x in (120, 400, 700, 1000, 1150)]
    assert heights == sorted(heights)
    assert heights[0] < 100
    assert heights[-1] > 200
    assert len(places(image, HELD_OUT_COLOUR, LOSSES)) == 0


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [step(1, 2.0), step(2, 1.0), evaluated(2, 1.5)]
    for name in ("a.png", "b.png"):
        loss_plot(rows, tmp_path / name, "title")
    loss_plot([step(1, 7.0)], tmp_path / "b.png", "another")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    loss_plot(rows, tmp_path / "b.png", "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_held_out_losses_stand_at_their_steps_and_values() -> None:
    image = draw_losses([evaluated(0, 1.0), evaluated(10, 2.0), step(5, 1.5)], "")
    dots = places(image, HELD_OUT_COLOUR, LOSSES)
    left, right = dots[dots[:, 1] < 100], dots[dots[:, 1] > 1160]
    assert left[:, 0].mean() > right[:, 0].mean() + 200
    middle = places(image, TRAINING_COLOUR, LOSSES)
    assert middle.mean(0) == pytest.approx((left.mean(0) + right.mean(0)) / 2, abs=6)


def test_large_ranges_are_drawn_over_the_logarithm() -> None:
    # Over the logarithm a loss that halves at every step is a straight line.
    image = draw_losses([evaluated(number, 8.0 * 0.5**number) for number in range(9)], "")
    line = places(image, HELD_OUT_COLOUR, LOSSES)
    ends = [line[abs(line[:, 1] - x) < 3][:, 0].mean() for x in (150, 650, 1150)]
    assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2, abs=2)


def test_one_point_missing_values_and_nothing_at_all() -> None:
    one = draw_losses([step(7, 2.0)], "one")
    assert len(places(one, TRAINING_COLOUR, LOSSES)) > 10
    assert len(places(one, RATE_COLOUR, RATES)) > 10
    holes = [step(1, None), step(2, 1.0, None), {"kind": "step", "step": 3}, evaluated(3, None), step(4, 0.5)]
    holes += [step(5, math.nan), {"kind": "sample", "step": 5, "loss": 9.0}]
    assert draw_losses(holes, "x").tobytes() == (
        draw_losses([step(2, 1.0, None), step(4, 0.5), step(1, None), step(5, None)], "x").tobytes()
    )
    nothing = draw_losses([], "none")
    for colour in (TRAINING_COLOUR, HELD_OUT_COLOUR, RATE_COLOUR):
        assert len(places(nothing, colour, slice(None))) == 0
    for values in ((0.0, 0.0), (-1.0, 5.0), (1e-9, 1e9)):
        draw_losses([step(number, value) for number, value in enumerate(values)], "any\nrange")


def test_a_long_title_stays_in_the_picture() -> None:
    image = np.asarray(draw_losses([step(1, 1.0)], "word " * 500))
    assert (image[:44, -10:] == 255).all()
    assert (image[:44, -60:-20] != 255).any()


def test_smoothing_is_a_weighted_mean_of_what_came_before() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 8.0, 3.0]
    keep = 0.8  # five steps at least
    expected = [
        sum(keep ** (now - past) * values[past] for past in range(now + 1))
        / sum(keep ** (now - past) for past in range(now + 1))
        for now in range(len(values))
    ]
    line = smoothed([(float(number), value) for number, value in enumerate(values)])
    assert [value for _, value in line] == pytest.approx(expected)
    assert smoothed([]) == []


@pytest.mark.parametrize(
    ("low", "high", "most"),
    [(0.0, 1.0, 8), (1.37, 1.42, 5), (0.0, 3e-7, 3), (-4.0, 977.0, 12), (100, 159, 12)],
)
def test_ticks_are_round_few_and_inside(low: float, high: float, most: int) -> None:
    found = ticks(low, high, most)
    assert 2 <= len(found) <= most
    slack = 1e-6 * (high - low)
    assert low - slack <= found[0] < found[-1] <= high + slack
    step_size = (found[-1] - found[0]) / (len(found) - 1)
    mantissa = step_size / 10 ** math.floor(math.log10(step_size) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 5)
