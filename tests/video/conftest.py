"""Makes clips whose every frame says its own number, so that a test can tell which frame it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

BARS = 10  # bits of the frame number, the highest at the left
CORNERS = np.array(
    [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8
)  # red green / blue white


def numbered_picture(number: int, width: int = 160, height: int = 96) -> np.ndarray:
    """uint8 RGB [H, W, 3]: ten vertical bars, light for a 1 bit."""
    bits = [(number >> (BARS - 1 - bar)) & 1 for bar in range(BARS)]
    levels = np.array([200 if bit else 40 for bit in bits], np.uint8)
    row = levels[np.arange(width) * BARS // width]
    return np.repeat(np.repeat(row[None, :, None], height, axis=0), 3, axis=2)


def read_number(picture: np.ndarray) -> int:
    """The number drawn by numbered_picture(), at any size."""
    height, width, _ = picture.shape
    middles = [round((bar + 0.5) * width / BARS) for bar in range(BARS)]
    row = picture[height // 3 : height * 2 // 3].mean(axis=(0, 2))
    return sum((row[middle] > 120) << (BARS - 1 - bar) for bar, middle in enumerate(middles))


def corner_picture(width: int = 160, height: int = 96) -> np.ndarray:
    """uint8 RGB [H, W, 3]: four quarters of different colours."""
    return CORNERS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def read_corners(picture: np.ndarray) -> list[list[tuple[int, ...]]]:
    """The colours in the middle of the four quarters, each channel rounded to 0 or 255."""
    height, width, _ = picture.shape
    rows, columns = (height // 4, height * 3 // 4), (width // 4, width * 3 // 4)
    return [[tuple(255 * int(v > 127) for v in picture[r, c]) for c in columns] for r in rows]


def write_clip(
    path: Path,
    frames: int = 50,
    *,
    codec: str = "libx264",
    rate: int = 25,
    size: tuple[int, int] = (160, 96),
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    picture: Callable[[int], np.ndarray] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> Path:
    """Encode a clip; `pts` in units of `time_base` (one frame each by default), `prepare(stream)` before the first frame."""
    defaults = {"libx264": {"preset": "veryfast"}, "libx265": {"x265-params": "log-level=none"}}
    time_base = time_base or Fraction(1, rate)
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(
            codec, rate=rate, options={**defaults.get(codec, {}), **(options or {})}
        )
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = time_base
        if prepare is not None:
            prepare(stream)
        for number in range(frames):
            pixels = picture(number) if picture else numbered_picture(number, *size)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = (number if pts is None else pts[number]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Callable[..., Path]:
    """``clip("name.mp4", frames=50, codec=..., ...)``: write_clip() into the test's own folder."""

    def make(name: str = "clip.mp4", frames: int = 50, **arguments: Any) -> Path:
        return write_clip(tmp_path / name, frames, **arguments)

    return make
