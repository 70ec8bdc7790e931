"""FrameForge: scripted synthetic clips with exact ground truth, drawn alike for files and for training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keyecli.forge.questions import TASKS, Question, format_spans, pick_questions, questions
from keyecli.forge.scene import Appearance, Draws, Scene, SceneOptions, Track, clip_seed, sample_scene
from keyecli.forge.states import StateArrays, concatenate_arrays, frame_state_arrays

if TYPE_CHECKING:
    from keyecli.forge.renderer import (
        FrameStates,
        draw_frames,
        frame_states,
        iterate_clips,
        noise_bank,
        render,
    )
    from keyecli.forge.write import WrittenDataset, write_dataset

__all__ = [
    "TASKS",
    "Appearance",
    "Draws",
    "FrameStates",
    "Question",
    "Scene",
    "SceneOptions",
    "StateArrays",
    "Track",
    "WrittenDataset",
    "clip_seed",
    "concatenate_arrays",
    "draw_frames",
    "format_spans",
    "frame_state_arrays",
    "frame_states",
    "iterate_clips",
    "noise_bank",
    "pick_questions",
    "questions",
    "render",
    "sample_scene",
    "write_dataset",
]

# These need torch; worker processes that only make up scenes and states start without it.
_HOMES = dict.fromkeys(
    ("FrameStates", "draw_frames", "noise_bank", "frame_states", "iterate_clips", "render"),
    "keyecli.forge.renderer",
) | dict.fromkeys(("WrittenDataset", "write_dataset"), "keyecli.forge.write")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'keyecli.forge' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
