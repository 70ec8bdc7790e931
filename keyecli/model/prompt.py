"""The layout of the model's input: chat text, timestamps, visual placeholders and their three-axis positions.

One layout serves answering and training alike. T tokens; a frame of r × c merged tokens takes r · c placeholders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from keyecli.model.config import KeyeVL2Config

VIDEO_PLACEHOLDER = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
PLACEHOLDERS = re.compile(f"({re.escape(VIDEO_PLACEHOLDER)}|{re.escape(IMAGE_PLACEHOLDER)})")


@dataclass(frozen=True)
class Visual:
    """One video or image as the prompt sees it.

    grid: merged (rows, columns) of one frame; times_s: presentation time of every frame in seconds, empty for an image.
    """

    kind: Literal["video", "image"]
    grid: tuple[int, int]
    times_s: tuple[float, ...] = ()

    @property
    def frames(self) -> int:
        return len(self.times_s) if self.kind == "video" else 1

    @property
    def tokens(self) -> int:
        """Placeholders in all."""
        return self.frames * self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Prompt:
    """A laid-out input.

    input_ids: int64 [T]; position_ids: int64 [3, T]; next_position: the position of the first generated token, in all
    three axes; visual_tokens: how many placeholders stand in input_ids; thinking_open: the prompt ends inside `<think>`.
    """

    input_ids: Tensor
    position_ids: Tensor
    next_position: int
    visual_tokens: int
    thinking_open: bool


def frame_prefix(time_s: float) -> str:
    """What stands before a frame's placeholders: the frame mark and its time in seconds with one decimal."""
    return f"<|frame|>{time_s:.1f}"


def build_prompt(
    tokenizer: Any,
    config: KeyeVL2Config,
    messages: Sequence[dict[str, Any]],
    visuals: Sequence[Visual],
    *,
    think: bool = True,
) -> Prompt:
    """Lay out a conversation that ends where the answer begins.

    messages: roles with text or typed content ({"type": "video" | "image" | "text"}); visuals: one for each video or image
    part, in order. The chat template is the tokenizer's own. ValueError when placeholders and visuals do not match.
    """
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=think
    )
    return layout(tokenizer, config, text, visuals)


def layout(tokenizer: Any, config: KeyeVL2Config, text: str, visuals: Sequence[Visual]) -> Prompt:
    """Tokens and positions of templated text whose placeholders stand for `visuals`, in order."""
    waiting = list(visuals)
    input_ids = np.asarray(token_ids(tokenizer, config, text, waiting), dtype=np.int64)
    if waiting:
        raise ValueError(f"{len(waiting)} videos or images have no placeholder in the prompt")
    positions, next_position = prompt_positions(config, input_ids, visuals)
    return Prompt(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        next_position=next_position,
        visual_tokens=sum(visual.tokens for visual in visuals),
        thinking_open=text.rstrip().endswith("<think>"),
    )


def token_ids(tokenizer: Any, config: KeyeVL2Config, text: str, waiting: list[Visual]) -> list[int]:
    """Tokens of templated text; each of its placeholders takes the first of the `waiting` visuals off the list.

    ValueError for a placeholder for which no visual of its kind waits.
    """
    ids: list[int] = []
    for piece in PLACEHOLDERS.split(text):
        if piece in (VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER):
            kind = "video" if piece == VIDEO_PLACEHOLDER else "image"
            if not waiting or waiting[0].kind != kind:
                raise ValueError(f"the prompt has a {kind} where no {kind} was given")
            ids.extend(_visual_ids(tokenizer, config, waiting.pop(0)))
        elif piece:
            ids.extend(tokenizer.encode(piece, add_special_tokens=False))
    return ids


def prompt_positions(
    config: KeyeVL2Config, input_ids: np.ndarray, visuals: Sequence[Visual]
) -> tuple[np.ndarray, int]:
    """`multimodal_positions` of a sequence that holds these visuals."""
    grids = [visual.grid for visual in visuals for _ in range(visual.frames)]
    return multimodal_positions(input_ids, grids, (config.image_token_id, config.video_token_id))


def _visual_ids(tokenizer: Any, config: KeyeVL2Config, visual: Visual) -> list[int]:
    per_frame = visual.grid[0] * visual.grid[1]
    ids = [config.vision_start_token_id]
    if visual.kind == "image":
        ids += [config.image_token_id] * per_frame
    else:
        for time_s in visual.times_s:
            ids += _encoded(tokenizer, frame_prefix(time_s))
            ids += [config.video_token_id] * per_frame
    ids.append(config.vision_end_token_id)
    return ids


@lru_cache(maxsize=65536)
def _encoded(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Timestamps repeat over clips, and training lays out thousands of clips a second."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def multimodal_positions(
    input_ids: np.ndarray, grids: Sequence[tuple[int, int]], placeholder_ids: Sequence[int]
) -> tuple[np.ndarray, int]:
    """Three-axis positions of a sequence.

    input_ids: int [T]; grids: merged (rows, columns) of every frame and image in order. Text counts up by one in all
    axes; a frame that starts at p gives its token (a, b) the positions (p, p + a, p + b); what follows starts at one more
    than the largest so far. Returns int64 [3, T] and the next position. ValueError when the placeholders do not match.
    """
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    placeholders = np.flatnonzero(np.isin(input_ids, placeholder_ids))
    expected = sum(rows * columns for rows, columns in grids)
    if len(placeholders) != expected:
        raise ValueError(
            f"the sequence has {len(placeholders)} visual placeholders and the frames need {expected}"
        )
    token, used, position = 0, 0, 0
    for rows, columns in grids:
        begin, count = int(placeholders[used]), rows * columns
        if placeholders[used + count - 1] != begin + count - 1:
            raise ValueError(f"a frame of {count} tokens is broken up by other tokens after token {begin}")
        text = begin - token
        positions[:, token:begin] = np.arange(position, position + text)
        position += text
        positions[0, begin : begin + count] = position
        positions[1, begin : begin + count] = position + np.repeat(np.arange(rows), columns)
        positions[2, begin : begin + count] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        token, used = begin + count, used + count
    text = len(input_ids) - token
    positions[:, token:] = np.arange(position, position + text)
    return positions, position + text
