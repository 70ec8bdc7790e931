"""From a scene and times to compact numpy arrays, one row a frame, with all that the renderer needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import SupportsFloat

import numpy as np

from keyecli.forge.font import BLANK, MAX_TEXT_LENGTH, text_codes
from keyecli.forge.scene import (
    COLOURS,
    EXTRA_SHAPES,
    MAX_DISTRACTORS,
    MAX_TRACKS,
    SHAPES,
    WAVES,
    Appearance,
    Scene,
)

DRAWN_SHAPES = (*SHAPES, "blob", "bar", *EXTRA_SHAPES)
SHAPE_SLOTS = MAX_DISTRACTORS + MAX_TRACKS  # drawn in this order: distractors lie under the named shapes
TEXT_SLOTS = 2  # one word and one number, over everything else
HIDDEN = -1

_NOISE_TICKS_PER_S = 240  # every frame time of every rate is a whole number of ticks
_NOISE_STRIDE = 104_729  # values between the noise of neighbouring ticks
NOISE_OFFSETS = 2**20


@dataclass(frozen=True)
class StateArrays:
    """Everything about N frames, one row a frame, lengths in scene pixels; cheap to pickle and to join.

    size: float32 [N, 2], scene width and height. colour: float32 [N, 3], mean RGB of the background.
    waves: float32 [N, WAVES, 3], radians a pixel along x and y, phase. wave_colours: float32 [N, WAVES, 3].
    noise_sigma: float32 [N], of 255, at the scene's own size. noise_offset: int32 [N].
    shape_kind: int16 [N, 8], index into DRAWN_SHAPES or HIDDEN. shape_colour: uint8 [N, 8, 3].
    shape_place: float32 [N, 8, 4]: x, y, radius, angle in turns.
    text_code: int16 [N, 2, 5], glyph codes. text_colour: uint8 [N, 2, 3].
    text_place: float32 [N, 2, 4]: x, y, dot side, characters (0: hidden).
    """

    size: np.ndarray
    colour: np.ndarray
    waves: np.ndarray
    wave_colours: np.ndarray
    noise_sigma: np.ndarray
    noise_offset: np.ndarray
    shape_kind: np.ndarray
    shape_place: np.ndarray
    shape_colour: np.ndarray
    text_code: np.ndarray
    text_place: np.ndarray
    text_colour: np.ndarray

    @property
    def frames(self) -> int:
        return len(self.size)


def concatenate_arrays(parts: Sequence[StateArrays]) -> StateArrays:
    """The frames of several clips one after another."""
    names = [field.name for field in fields(StateArrays)]
    return StateArrays(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def frame_state_arrays(scene: Scene, times_s: Sequence[SupportsFloat] | np.ndarray) -> StateArrays:
    """Arrays for the frames of `scene` at `times_s` (seconds, any order, moved into the clip if outside)."""
    times = np.clip(np.asarray([float(time) for time in times_s], dtype=np.float64), 0.0, scene.duration_s)
    count = len(times)
    backdrop = scene.backdrop
    shake = backdrop.shake  # [axis, wave, (amplitude, rate, phase)]
    swings = shake[:, :, 0, None] * np.sin(shake[:, :, 1, None] * times + shake[:, :, 2, None])
    shake_x, shake_y = swings.sum(axis=1)  # [N] each
    waves = np.empty((count, WAVES, 3), dtype=np.float32)
    waves[:] = backdrop.waves
    # The texture moves with the camera: shifting a wave is a change of its phase.
    waves[:, :, 2] -= shake_x[:, None] * backdrop.waves[:, 0] + shake_y[:, None] * backdrop.waves[:, 1]
    ticks = np.rint(times * _NOISE_TICKS_PER_S).astype(np.int64)

    shape_kind = np.full((count, SHAPE_SLOTS), HIDDEN, dtype=np.int16)
    shape_place = np.zeros((count, SHAPE_SLOTS, 4), dtype=np.float32)
    shape_colour = np.zeros((count, SHAPE_SLOTS, 3), dtype=np.uint8)
    text_code = np.full((count, TEXT_SLOTS, MAX_TEXT_LENGTH), BLANK, dtype=np.int16)
    text_place = np.zeros((count, TEXT_SLOTS, 4), dtype=np.float32)
    text_colour = np.zeros((count, TEXT_SLOTS, 3), dtype=np.uint8)

    share = times / scene.duration_s
    for slot, blob in enumerate(scene.distractors):
        shape_kind[:, slot] = DRAWN_SHAPES.index(blob.shape)
        shape_place[:, slot, 0] = blob.x + blob.dx * share + shake_x
        shape_place[:, slot, 1] = blob.y + blob.dy * share + shake_y
        shape_place[:, slot, 2] = blob.radius_px
        shape_place[:, slot, 3] = blob.angle
        shape_colour[:, slot] = blob.grey

    shape_slot, text_slot = MAX_DISTRACTORS, 0
    for track in scene.tracks:
        for appearance in track.appearances:
            rows = np.flatnonzero(_visible(appearance, times, scene.duration_s))
            if not len(rows):
                continue
            progress = _progress(appearance, times[rows])
            x = appearance.x + appearance.dx * progress + shake_x[rows]
            y = appearance.y + appearance.dy * progress + shake_y[rows]
            if track.shape:
                shape_kind[rows, shape_slot] = DRAWN_SHAPES.index(track.shape)
                shape_place[rows, shape_slot, 0] = x
                shape_place[rows, shape_slot, 1] = y
                first, last = appearance.growth
                shape_place[rows, shape_slot, 2] = track.size_px / 2 * (first + (last - first) * progress)
                # A finished spin ends on a symmetry of the shape: upright, without rounding.
                shape_place[rows, shape_slot, 3] = np.where(progress < 1.0, appearance.turns * progress, 0.0)
                shape_colour[rows, shape_slot] = COLOURS[track.colour]
            else:
                text_code[rows, text_slot] = text_codes(track.text)
                text_place[rows, text_slot, 0] = x
                text_place[rows, text_slot, 1] = y
                text_place[rows, text_slot, 2] = track.size_px
                text_place[rows, text_slot, 3] = len(track.text)
                text_colour[rows, text_slot] = COLOURS[track.colour]
        if track.shape:
            shape_slot += 1
        else:
            text_slot += 1

    return StateArrays(
        size=np.broadcast_to(np.array((scene.width, scene.height), dtype=np.float32), (count, 2)),
        colour=np.broadcast_to(backdrop.colour.astype(np.float32), (count, 3)),
        waves=waves,
        wave_colours=np.broadcast_to(backdrop.wave_colours.astype(np.float32), (count, WAVES, 3)),
        noise_sigma=np.full(count, backdrop.noise_sigma, dtype=np.float32),
        noise_offset=((backdrop.noise_offset + ticks * _NOISE_STRIDE) % NOISE_OFFSETS).astype(np.int32),
        shape_kind=shape_kind,
        shape_place=shape_place,
        shape_colour=shape_colour,
        text_code=text_code,
        text_place=text_place,
        text_colour=text_colour,
    )


def _visible(appearance: Appearance, times: np.ndarray, duration_s: float) -> np.ndarray:
    end_s = appearance.end_s if appearance.end_s < duration_s else math.inf
    return (times >= appearance.start_s) & (times < end_s)


def _progress(appearance: Appearance, times: np.ndarray) -> np.ndarray:
    length_s = appearance.motion_end_s - appearance.motion_start_s
    if length_s <= 0:
        return np.zeros(len(times))
    return np.clip((times - appearance.motion_start_s) / length_s, 0.0, 1.0)
