"""Three-axis positions and the prompt's layout against tables worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keyecli.model.config import KeyeVL2Config
from keyecli.model.prompt import Visual, build_prompt, frame_prefix, multimodal_positions
from tests.compare import assert_same
from tests.model.test_trunk import direct
from tests.tiny import TOKEN_IDS, random_tensors, tiny_config

T, V = 1, 9  # A text token and a visual placeholder.


def table(ids: list[int], grids: list[tuple[int, int]]) -> tuple[list[list[int]], int]:
    positions, following = multimodal_positions(np.array(ids), grids, (V,))
    assert positions.dtype == np.int64
    return positions.tolist(), following


def test_text_counts_up_in_all_three() -> None:
    assert table([T] * 5, []) == ([[0, 1, 2, 3, 4]] * 3, 5)
    assert table([], []) == ([[], [], []], 0)


def test_an_image_between_text() -> None:
    """2 × 3 tokens that start at 2: the largest position is 2 + 2, so text goes on at 5."""
    ids = [T, T, V, V, V, V, V, V, T, T]
    assert table(ids, [(2, 3)]) == (
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
        ],
        7,
    )


def test_a_tall_image_pushes_by_its_height() -> None:
    assert table([V, V, V, T], [(3, 1)]) == ([[0, 0, 0, 3], [0, 1, 2, 3], [0, 0, 0, 3]], 4)


def test_several_frames_with_their_times_between_them() -> None:
    """Each frame is a grid of its own: start token, time (2 tokens), 2 × 2; time (1), 2 × 2; time (3), 2 × 2; end."""
    ids = [T, T, T, *[V] * 4, T, *[V] * 4, T, T, T, *[V] * 4, T]
    assert table(ids, [(2, 2)] * 3) == (
        [
            [0, 1, 2, 3, 3, 3, 3, 5, 6, 6, 6, 6, 8, 9, 10, 11, 11, 11, 11, 13],
            [0, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9, 10, 11, 11, 12, 12, 13],
            [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11, 12, 11, 12, 13],
        ],
        14,
    )


def test_frames_without_text_between_them() -> None:
    assert table([*[V] * 2, *[V] * 2, T], [(1, 2), (2, 1)]) == (
        [[0, 0, 2, 2, 4], [0, 0, 2, 3, 4], [0, 1, 2, 2, 4]],
        5,
    )


def test_several_videos_of_different_grids() -> None:
    """Text, a video of two 1 × 2 frames, text, a video of one 2 × 1 frame and one 1 × 3 image after it."""
    ids = [T, V, V, T, V, V, T, T, V, V, T, V, V, V, T]
    assert table(ids, [(1, 2), (1, 2), (2, 1), (1, 3)]) == (
        [
            [0, 1, 1, 3, 4, 4, 6, 7, 8, 8, 10, 11, 11, 11, 14],
            [0, 1, 1, 3, 4, 4, 6, 7, 8, 9, 10, 11, 11, 11, 14],
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 10, 11, 12, 13, 14],
        ],
        15,
    )


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([T, V, V], [(1, 3)]),
        ([T, V, V], []),
        ([T], [(1, 1)]),
        ([V, T, V], [(1, 2)]),
        ([V, V, T, V], [(1, 3)]),
    ],
)
def test_placeholders_that_do_not_match_are_refused(ids: list[int], grids: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"visual placeholders|broken up"):
        table(ids, grids)


def config() -> KeyeVL2Config:
    return KeyeVL2Config.from_dict(tiny_config())


def encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


PAD, IMAGE = TOKEN_IDS["<|video_pad|>"], TOKEN_IDS["<|image_pad|>"]
START, END, FRAME = TOKEN_IDS["<|vision_start|>"], TOKEN_IDS["<|vision_end|>"], TOKEN_IDS["<|frame|>"]


def test_a_video_prompt_token_by_token(tiny_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]}]
    prompt = build_prompt(tiny_tokenizer, config(), messages, [Visual("video", (1, 2), (0.0, 10.46))])
    before = encoded(tiny_tokenizer, "<|im_start|>user\n")
    times = [encoded(tiny_tokenizer, text) for text in ("0.0", "10.5")]
    after = encoded(tiny_tokenizer, "Why?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    expected = [*before, START, FRAME, *times[0], PAD, PAD, FRAME, *times[1], PAD, PAD, END, *after]
    assert prompt.input_ids.tolist() == expected
    assert prompt.input_ids.dtype == prompt.position_ids.dtype == torch.int64
    assert prompt.visual_tokens == 4
    assert prompt.thinking_open
    # A 1 × 2 frame takes two tokens and two positions: every token's first axis lags by one in each frame's second token.
    first = len(before) + 2 + len(times[0])
    second = first + 2 + 1 + len(times[1])
    time_axis = list(range(len(expected)))
    time_axis[first + 1] = first
    time_axis[second + 1] = second
    assert prompt.position_ids[0].tolist() == time_axis
    assert prompt.position_ids[1].tolist() == time_axis
    assert prompt.position_ids[2].tolist() == list(range(len(expected)))
    assert prompt.next_position == len(expected)


def test_next_position_falls_behind_the_tokens_by_what_frames_save(tiny_tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "?"}]}
    ]
    visuals = [Visual("image", (4, 3)), Visual("video", (2, 2), (0.0, 0.5, 1.0))]
    prompt = build_prompt(tiny_tokenizer, config(), messages, visuals, think=False)
    # 12 tokens in 4 positions, then three times 4 tokens in 2.
    assert prompt.next_position == len(prompt.input_ids) - 8 - 3 * 2
    assert prompt.visual_tokens == 24
    assert not prompt.thinking_open
    assert prompt.input_ids.tolist().count(IMAGE) == 12
    assert prompt.input_ids.tolist().count(PAD) == 12


def test_a_message_of_plain_text_needs_no_visual(tiny_tokenizer: Any) -> None:
    prompt = build_prompt(tiny_tokenizer, config(), [{"role": "user", "content": "Hello"}], [])
    assert_same(prompt.position_ids, torch.arange(len(prompt.input_ids)).expand(3, -1))
    assert prompt.next_position == len(prompt.input_ids)


@pytest.mark.parametrize(
    ("parts", "visuals"),
    [
        (["video"], []),
        ([], [Visual("image", (1, 1))]),
        (["image"], [Visual("video", (1, 1), (0.0,))]),
        (["video", "video"], [Visual("video", (1, 1), (0.0,))]),
    ],
)
def test_visuals_must_match_the_message(tiny_tokenizer: Any, parts: list[str], visuals: list[Visual]) -> None:
    messages = [{"role": "user", "content": [{"type": part} for part in parts]}]
    with pytest.raises(ValueError, match=r"video|image"):
        build_prompt(tiny_tokenizer, config(), messages, visuals)


def test_a_frames_time_has_one_decimal() -> None:
    assert [frame_prefix(time) for time in (0, 0.04, 9.96, 3600.5)] == [
        "<|frame|>0.0",
        "<|frame|>0.0",
        "<|frame|>10.0",
        "<|frame|>3600.5",
    ]


@torch.no_grad()
def test_the_transformers_way_in_works_out_the_same_positions() -> None:
    """A batch of two rows with different visuals: `grids` in patches, rows in order."""
    model = direct(tiny_config(), random_tensors(tiny_config()))
    rows = [[5, START, *[PAD] * 4, END, 6, 7], [*[PAD] * 2, 8, *[PAD] * 2, 9, 10, 11, 12]]
    merged = [[(2, 2)], [(1, 2), (2, 1)]]
    grids = [(2 * r, 2 * c) for row in merged for r, c in row]
    patches = torch.randn(sum(r * c for r, c in grids), 3, 14, 14, generator=torch.Generator().manual_seed(0))
    positions: list[Tensor] = []
    for row, own in zip(rows, merged, strict=True):
        positions.append(torch.from_numpy(multimodal_positions(np.array(row), own, (PAD, IMAGE))[0]))
    ids = torch.tensor(rows)
    implied = model(input_ids=ids, pixel_values=patches, grids=grids).logits
    given = model(
        input_ids=ids, pixel_values=patches, grids=grids, position_ids=torch.stack(positions, dim=1)
    ).logits
    assert_same(implied, given)
    plain = model(
        input_ids=ids, pixel_values=patches, grids=grids, position_ids=torch.arange(9).expand(2, -1)
    ).logits
    assert float((plain - given).abs().max()) > 0.01
