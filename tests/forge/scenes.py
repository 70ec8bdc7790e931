"""Hand-written scenes whose truth is known without sampling, and the brute-force definition of visibility."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from keyecli.forge import Appearance, Scene, Track
from keyecli.forge.scene import WAVES, Backdrop


def plain_backdrop(level: float = 40.0, noise_sigma: float = 0.0) -> Backdrop:
    """One flat grey, nothing that moves."""
    return Backdrop(
        colour=np.full(3, level),
        waves=np.zeros((WAVES, 3)),
        wave_colours=np.zeros((WAVES, 3)),
        shake=np.zeros((2, 2, 3)),
        noise_sigma=noise_sigma,
        noise_offset=12345,
    )


RED_CIRCLE = Track(
    "red circle",
    "red",
    30.0,
    (Appearance(1.0, 3.0, 30.0, 30.0), Appearance(4.5, 6.0, 30.0, 90.0)),
    shape="circle",
)
BLUE_SQUARE = Track(
    "blue square",
    "blue",
    30.0,
    (Appearance(0.0, 5.0, 60.0, 30.0, "right", 1.0, 3.0, dx=60.0),),
    shape="square",
)
GREEN_STAR = Track(
    "green star",
    "green",
    36.0,
    (Appearance(2.5, 4.5, 125.0, 90.0, "spin", 2.5, 4.5, turns=-0.4),),
    shape="star",
)
RED_HEART = Track(
    "red heart",
    "red",
    30.0,
    (
        Appearance(0.5, 2.5, 40.0, 80.0, "grow", 0.5, 2.5, growth=(0.6, 1.5)),
        Appearance(4.0, 5.5, 40.0, 80.0),
    ),
    shape="heart",
)
WORD_GATE = Track("word GATE", "white", 3.0, (Appearance(3.0, 5.0, 75.0, 70.0),), text="GATE")


def hand_scene() -> Scene:
    """Six seconds, 12 frames a second, 160x120: a circle twice, a square that moves, a star that spins, a word."""
    tracks = (RED_CIRCLE, BLUE_SQUARE, GREEN_STAR, WORD_GATE)
    return Scene(0, 6.0, 12, 160, 120, tracks, (), plain_backdrop())


def heart_scene() -> Scene:
    """The same six seconds with a heart, which grows the first time it is there, and the star."""
    tracks = (RED_HEART, GREEN_STAR)
    return Scene(0, 6.0, 12, 160, 120, tracks, (), plain_backdrop(), ("heart", "star"), ("grow", "spin"))


def without(scene: Scene, track: Track) -> Scene:
    """The same scene with one object missing."""
    return replace(scene, tracks=tuple(other for other in scene.tracks if other is not track))


def is_visible(track: Track, time_s: float, duration_s: float) -> bool:
    """The definition, word by word."""
    return any(
        start <= time_s < end or (end == duration_s and time_s == duration_s) for start, end in track.spans
    )
