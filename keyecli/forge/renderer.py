"""The renderer: frame states to pictures, in torch operations that give the same picture on CPU and GPU.

Legend: N frames, H and W rendered rows and columns, C = 3 colours, K background waves, G columns of a text's
bitmap. Everything is drawn in scene pixels: a picture's column covers scene width / W of them, a row scene
height / H, so any picture size and a slightly different aspect ratio give what a resized video frame would show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from keyecli.forge.font import CELL_COLUMNS, CELLS, GLYPH_ROWS, MAX_TEXT_LENGTH
from keyecli.forge.scene import MAX_DISTRACTORS, Scene, SceneOptions, clip_seed, sample_scene
from keyecli.forge.states import (
    DRAWN_SHAPES,
    HIDDEN,
    NOISE_OFFSETS,
    SHAPE_SLOTS,
    TEXT_SLOTS,
    StateArrays,
    frame_state_arrays,
)

MAX_PIXELS = 2**20  # of a rendered frame; the noise bank is this much longer than its offsets reach
PLATE_COLOUR = 10.0  # the near-black plate behind a text
PLATE_OPACITY = 0.85
_TEXT_COLUMNS = MAX_TEXT_LENGTH * CELL_COLUMNS
_CPU_CHUNK_BYTES = 2**21  # of float canvas: what stays in a core's cache
_GPU_CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class FrameStates:
    """`StateArrays` as torch tensors of the same names, shapes and meanings (indices as int64)."""

    size: Tensor
    colour: Tensor
    waves: Tensor
    wave_colours: Tensor
    noise_sigma: Tensor
    noise_offset: Tensor
    shape_kind: Tensor
    shape_place: Tensor
    shape_colour: Tensor
    text_code: Tensor
    text_place: Tensor
    text_colour: Tensor

    @classmethod
    def from_arrays(cls, arrays: StateArrays, device: torch.device | str = "cpu") -> FrameStates:
        """The tensors of `arrays` on `device`: float32 and, for what indexes something, int64."""
        tensors = []
        for field in fields(StateArrays):
            array = np.require(getattr(arrays, field.name), requirements=["C", "W"])
            tensor = torch.from_numpy(array).to(device, non_blocking=True)
            is_index = array.dtype in (np.int16, np.int32)
            tensors.append(tensor.to(torch.int64 if is_index else torch.float32))
        return cls(*tensors)

    def to(self, device: torch.device | str) -> FrameStates:
        """The same states on `device`."""
        return FrameStates(
            *(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self))
        )

    def __getitem__(self, rows: slice) -> FrameStates:
        """Some of the frames."""
        return FrameStates(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def frames(self) -> int:
        return self.size.shape[0]

    @property
    def device(self) -> torch.device:
        return self.size.device


def frame_states(scene: Scene, times_s: Sequence[SupportsFloat] | np.ndarray) -> FrameStates:
    """States of the frames of `scene` at `times_s` (seconds), on the CPU."""
    return FrameStates.from_arrays(frame_state_arrays(scene, times_s))


def render(states: FrameStates, height: int, width: int) -> Tensor:
    """Pictures of all frames: uint8 RGB [N, height, width, 3], on the device of `states`.

    On a CPU only the parts of a frame that an object touches are worked on; elsewhere `draw_frames` draws
    everything. Both give the same picture up to one level of rounding. ValueError above `MAX_PIXELS` pixels a frame.
    """
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height}x{width} is more than {MAX_PIXELS} pixels a frame")
    on_cpu = states.device.type == "cpu"
    draw = _draw_frames_where_visible if on_cpu else draw_frames
    bank = noise_bank(states.device)
    chunk = max(1, (_CPU_CHUNK_BYTES if on_cpu else _GPU_CHUNK_BYTES) // (12 * height * width))
    pictures = torch.empty((states.frames, height, width, 3), dtype=torch.uint8, device=states.device)
    for start in range(0, states.frames, chunk):
        rows = slice(start, start + chunk)
        pictures[rows] = draw(states[rows], bank, height, width)
    return pictures


def iterate_clips(
    seed: int,
    options: SceneOptions | None = None,
    *,
    count: int | None = None,
    fps: float | None = 2.0,
    height: int | None = None,
    width: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, np.ndarray, Scene]]:
    """Clips without files, the ones that `write_dataset` writes for `seed`: (frames, times, scene) one by one.

    frames: uint8 RGB [N, height, width, 3] on `device`, by default at the scene's size.
    times: float64 [N], seconds.
    `fps` samples frames as `keye ask` does, None takes all. Endless when `count` is None.
    """
    for index in itertools.count() if count is None else range(count):
        scene = sample_scene(clip_seed(seed, index), options)
        times = scene.frame_times() if fps is None else scene.sampled_times(fps)
        states = FrameStates.from_arrays(frame_state_arrays(scene, times), device)
        yield render(states, height or scene.height, width or scene.width), times, scene


class Bank(NamedTuple):
    """What all frames take from: noise float32 [NOISE_OFFSETS + MAX_PIXELS] and glyph cells float32 [37, 7, 6]."""

    noise: Tensor
    cells: Tensor


@lru_cache(maxsize=8)
def noise_bank(device: torch.device) -> Bank:
    """The one bank there is, on `device`: normal noise of mean 0 and sigma 1, beside it `font.CELLS`."""
    generator = np.random.Generator(np.random.PCG64(20_240_229))
    # Box-Muller from raw uniform draws: the stream of uniforms is the same in every numpy version.
    radius, angle = generator.random((2, (NOISE_OFFSETS + MAX_PIXELS) // 2))
    length = np.sqrt(-2.0 * np.log1p(-radius))
    values = np.concatenate((length * np.cos(2 * np.pi * angle), length * np.sin(2 * np.pi * angle)))
    noise = torch.from_numpy(values.astype(np.float32))
    return Bank(noise.to(device), torch.from_numpy(CELLS).to(device))


def draw_frames(states: FrameStates, bank: Bank, height: int, width: int) -> Tensor:
    """Draw all frames, all objects, all pixels: uint8 RGB [N, height, width, 3].

    `bank` is `noise_bank(device)`. No control flow depends on data, so `torch.compile` can fuse it; call it with
    few enough frames that [N, 3, height, width] in float32 fits several times.
    """
    x, y = _pixel_centres(states, height, width)
    canvas = _background(states, x, y)
    pixels_per_scene_pixel = _scale(states, height, width)
    for slot in range(SHAPE_SLOTS):
        kind = states.shape_kind[:, slot, None, None]
        place = states.shape_place[:, slot]
        u, v = _shape_coordinates(place, x, y, rotate=True)
        first, *others = _BLOB_CODES if slot < MAX_DISTRACTORS else _SHAPE_CODES
        distance = _DISTANCES[first](u, v)
        for code in others:
            distance = torch.where(kind == code, _DISTANCES[code](u, v), distance)
        alpha = _edge(distance, place[:, 2] * pixels_per_scene_pixel) * (kind != HIDDEN)
        canvas = _blend(canvas, alpha, states.shape_colour[:, slot])
    for slot in range(TEXT_SLOTS):
        plate, ink = _text_coverage(states, bank.cells, slot, x, y, height, width)
        canvas = _blend(
            canvas, plate * PLATE_OPACITY, torch.full_like(states.text_colour[:, slot], PLATE_COLOUR)
        )
        canvas = _blend(canvas, ink, states.text_colour[:, slot])
    return _finish(canvas + _noise(states, bank.noise, height, width))


def _draw_frames_where_visible(states: FrameStates, bank: Bank, height: int, width: int) -> Tensor:
    """`draw_frames` that skips hidden objects and works only inside the rectangle an object can touch."""
    x, y = _pixel_centres(states, height, width)
    canvas = _background(states, x, y)
    pixels_per_scene_pixel = _scale(states, height, width)
    for slot in range(SHAPE_SLOTS):
        place = states.shape_place[:, slot]
        reach = 1.15 * place[:, 2] + 2.0 / pixels_per_scene_pixel
        for kind, rows in _runs(states.shape_kind[:, slot]):
            if kind == HIDDEN:
                continue
            window = _window(states, place[rows, :2], reach[rows], reach[rows], rows, height, width)
            turned = bool(place[rows, 3].any())
            u, v = _shape_coordinates(place[rows], x[rows, window[1]], y[rows, window[0]], rotate=turned)
            alpha = _edge(_DISTANCES[kind](u, v), (place[:, 2] * pixels_per_scene_pixel)[rows])
            _blend_into(canvas[rows, :, window[0], window[1]], alpha, states.shape_colour[rows, slot])
    for slot in range(TEXT_SLOTS):
        place = states.text_place[:, slot]
        for characters, rows in _runs(place[:, 3].to(torch.int64)):
            if not characters:
                continue
            dot = place[rows, 2]
            margin = 2.0 / pixels_per_scene_pixel[rows]
            half_width, half_height = (6 * characters + 1) / 2 * dot + margin, 4.5 * dot + margin
            window = _window(states, place[rows, :2], half_width, half_height, rows, height, width)
            plate, ink = _text_coverage(
                states[rows], bank.cells, slot, x[rows, window[1]], y[rows, window[0]], height, width
            )
            target = canvas[rows, :, window[0], window[1]]
            colour = states.text_colour[rows, slot]
            _blend_into(target, plate * PLATE_OPACITY, torch.full_like(colour, PLATE_COLOUR))
            _blend_into(target, ink, colour)
    canvas += _noise(states, bank.noise, height, width)
    return _finish(canvas)


def _runs(values: Tensor) -> Iterator[tuple[int, slice]]:
    """(value, rows) of each run of equal values in an int64 tensor [N]."""
    numbers = values.numpy()
    borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for start, end in itertools.pairwise(borders):
        yield int(numbers[start]), slice(start, end)


def _window(
    states: FrameStates,
    centre: Tensor,
    reach_x: Tensor,
    reach_y: Tensor,
    rows: slice,
    height: int,
    width: int,
) -> tuple[slice, slice]:
    """Rows and columns of the smallest rectangle with everything within reach of the centres in all `rows`."""
    size = states.size[rows]
    windows = []
    for axis, (reach, pixels) in enumerate(((reach_x, width), (reach_y, height))):
        scale = pixels / size[:, axis]
        low = int(((centre[:, axis] - reach) * scale).min())
        high = math.ceil(float(((centre[:, axis] + reach) * scale).max()))
        windows.append(slice(min(max(low, 0), pixels), min(max(high, 0), pixels)))
    return windows[1], windows[0]


def _pixel_centres(states: FrameStates, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Scene positions of the pixel centres, float32 [N, W] and [N, H]."""
    columns = (torch.arange(width, device=states.device, dtype=torch.float32) + 0.5) / width
    lines = (torch.arange(height, device=states.device, dtype=torch.float32) + 0.5) / height
    return states.size[:, 0:1] * columns, states.size[:, 1:2] * lines


def _scale(states: FrameStates, height: int, width: int) -> Tensor:
    """Rendered pixels a scene pixel, the mean of both directions, float32 [N]."""
    return torch.sqrt(height * width / (states.size[:, 0] * states.size[:, 1]))


def _background(states: FrameStates, x: Tensor, y: Tensor) -> Tensor:
    """The texture, float32 [N, 3, H, W]: colour + sum over waves of wave colour x cos(kx x + ky y + phase).

    The cosine of a sum splits into products of a row part and a column part: all waves are one matrix product.
    """
    along = states.waves[:, :, 0:1] * x[:, None]  # [N, K, W]
    down = states.waves[:, :, 1:2] * y[:, None] + states.waves[:, :, 2:3]  # [N, K, H]
    columns = torch.cat((torch.cos(along), torch.sin(along)), dim=1)  # [N, 2K, W]
    lines = torch.cat((torch.cos(down), -torch.sin(down)), dim=1)  # [N, 2K, H]
    amplitudes = torch.cat((states.wave_colours, states.wave_colours), dim=1)  # [N, 2K, C]
    lines = (amplitudes.transpose(1, 2)[:, :, None] * lines.transpose(1, 2)[:, None]).flatten(
        1, 2
    )  # [N, C * H, 2K]
    texture = torch.bmm(lines, columns).view(x.shape[0], 3, y.shape[1], x.shape[1])
    return texture + states.colour[:, :, None, None]


def _noise(states: FrameStates, noise: Tensor, height: int, width: int) -> Tensor:
    """Grey noise, float32 [N, 1, H, W]; frames drawn smaller than their scene have less, as averaging would give."""
    strength = states.noise_sigma * torch.clamp(_scale(states, height, width), max=1.0)
    pixels = height * width
    windows = noise[: NOISE_OFFSETS + pixels].unfold(0, pixels, 1)[states.noise_offset]
    return (windows * strength[:, None]).view(-1, 1, height, width)


def _shape_coordinates(place: Tensor, x: Tensor, y: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """Pixel positions relative to a shape of radius 1 that stands upright: broadcastable to [N, H, W]."""
    inverse_radius = 1.0 / torch.clamp(place[:, 2:3], min=1e-6)
    u = ((x - place[:, 0:1]) * inverse_radius)[:, None, :]
    v = ((y - place[:, 1:2]) * inverse_radius)[:, :, None]
    if not rotate:
        return u, v
    angle = 2 * math.pi * place[:, 3]
    cosine, sine = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    return cosine * u + sine * v, cosine * v - sine * u


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.sqrt(u * u + v * v) - 1.0


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return torch.abs(torch.sqrt(u * u + v * v) - 0.77) - 0.23


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(torch.abs(u), torch.abs(v)) - 0.8


def _blob(u: Tensor, v: Tensor) -> Tensor:
    return 0.6 * (torch.sqrt(u * u + (v / 0.6) * (v / 0.6)) - 1.0)


def _bar(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(torch.abs(u) - 1.0, torch.abs(v) - 0.22)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    u, v = torch.abs(u), torch.abs(v)
    return torch.maximum(torch.maximum(u, v) - 1.0, torch.minimum(u, v) - 0.33)


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    # Equilateral, point up, corners 1.12 from its centre.
    return torch.maximum(v, math.sqrt(0.75) * torch.abs(u) - 0.5 * v) - 0.56


_STAR_NORMALS = [(math.sin(math.radians(angle)), -math.cos(math.radians(angle))) for angle in (72, 144)]
_STAR_INRADIUS = 0.36  # of the inner pentagon; the points reach 0.36 / cos(72 degrees) = 1.165


def _star(u: Tensor, v: Tensor) -> Tensor:
    # Five lines bound a pentagram, point up: what is outside of at most one of them lies inside the star, so the
    # second largest of the five signed distances decides. Lines off the axis come in mirror pairs: |u| does both.
    u = torch.abs(u)
    (upper_x, upper_y), (lower_x, lower_y) = _STAR_NORMALS
    upper = upper_x * u + upper_y * v
    lower = lower_x * u + lower_y * v
    highest = torch.maximum(upper, lower)
    second = torch.minimum(upper, lower)
    for line in (-v, torch.maximum(upper - 2 * upper_x * u, lower - 2 * lower_x * u)):
        second = torch.maximum(second, torch.minimum(highest, line))
        highest = torch.maximum(highest, line)
    return second - _STAR_INRADIUS


_HEART_SIDE = 0.88  # from the middle of its square to a corner; the lobes reach 1.114
_HEART_DROP = 0.22  # of the square's middle below the origin, so that point and lobes reach about equally far


def _heart(u: Tensor, v: Tensor) -> Tensor:
    # A square on its corner, and on each of its two upper sides the circle that has this side as its diameter.
    u, v = torch.abs(u), v - _HEART_DROP
    square = math.sqrt(0.5) * (u + torch.abs(v) - _HEART_SIDE)
    across, down = u - _HEART_SIDE / 2, v + _HEART_SIDE / 2
    lobe = torch.sqrt(across * across + down * down) - math.sqrt(0.5) * _HEART_SIDE
    return torch.minimum(square, lobe)


_DISTANCE_OF_SHAPE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "blob": _blob,
    "bar": _bar,
    "heart": _heart,
}
_DISTANCES = [_DISTANCE_OF_SHAPE[shape] for shape in DRAWN_SHAPES]
_BLOB_CODES = [DRAWN_SHAPES.index(shape) for shape in ("blob", "bar")]
_SHAPE_CODES = [code for code in range(len(DRAWN_SHAPES)) if code not in _BLOB_CODES]


def _edge(distance: Tensor, radius_px: Tensor) -> Tensor:
    """Coverage 0..1 from signed distances in radii: a ramp one rendered pixel wide across the edge."""
    return torch.clamp(0.5 - distance * radius_px[:, None, None], 0.0, 1.0)


def _text_coverage(
    states: FrameStates, glyphs: Tensor, slot: int, x: Tensor, y: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Coverage of the plate and the ink of one text, float32 [N, H, W] each: exact areas of pixel and dot overlap.

    Dots and pixels are both axis-aligned, so the overlap is a product of a row part and a column part.
    """
    place = states.text_place[:, slot]
    dot, characters = place[:, 2:3], place[:, 3:4]
    left = place[:, 0:1] - (CELL_COLUMNS * characters - 1) / 2 * dot
    top = place[:, 1:2] - GLYPH_ROWS / 2 * dot
    right = left + (CELL_COLUMNS * characters - 1) * dot
    pixel_x, pixel_y = states.size[:, 0:1] / width, states.size[:, 1:2] / height
    shown = (characters > 0).to(torch.float32)[:, :, None]
    plate_x = _overlap(x, pixel_x, left - dot, right + dot)  # [N, W]
    plate_y = _overlap(y, pixel_y, top - dot, top + (GLYPH_ROWS + 1) * dot)  # [N, H]
    column = torch.arange(_TEXT_COLUMNS, device=x.device, dtype=torch.float32)
    line = torch.arange(GLYPH_ROWS, device=x.device, dtype=torch.float32)
    column_left = (left + column * dot)[:, :, None]  # [N, G, 1]
    line_top = (top + line * dot)[:, :, None]  # [N, 7, 1]
    ink_x = _overlap(x[:, None], pixel_x[:, :, None], column_left, column_left + dot[:, :, None])  # [N, G, W]
    ink_y = _overlap(y[:, None], pixel_y[:, :, None], line_top, line_top + dot[:, :, None])  # [N, 7, H]
    cells = glyphs[states.text_code[:, slot]]  # [N, 5, 7, 6]
    bitmap = cells.transpose(1, 2).reshape(-1, GLYPH_ROWS, _TEXT_COLUMNS)
    ink = torch.bmm(ink_y.transpose(1, 2), torch.bmm(bitmap, ink_x))
    return plate_y[:, :, None] * plate_x[:, None] * shown, ink * shown


def _overlap(centre: Tensor, side: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Share of the pixels centred at `centre`, `side` wide, that lies between `low` and `high`."""
    half = side / 2
    return torch.clamp(torch.minimum(centre + half, high) - torch.maximum(centre - half, low), min=0.0) / side


def _blend(canvas: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
    return canvas + alpha[:, None] * (colour[:, :, None, None] - canvas)


def _blend_into(canvas: Tensor, alpha: Tensor, colour: Tensor) -> None:
    canvas += alpha[:, None] * (colour[:, :, None, None] - canvas)


def _finish(canvas: Tensor) -> Tensor:
    return (torch.clamp(canvas, 0.0, 255.0) + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
