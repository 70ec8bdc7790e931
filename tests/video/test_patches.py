"""Patches hold the right pixels, normalised, in the right order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keyecli.video.patches import frames_to_patches

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def test_order_and_values() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 28, 56, 3), dtype=np.uint8)
    patches = frames_to_patches(frames, MEAN, STD)
    assert patches.shape == (2 * 2 * 4, 3, 14, 14)
    assert patches.dtype == torch.float32
    for frame in range(2):
        for row in range(2):
            for column in range(4):
                block = frames[frame, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14].astype(
                    np.float32
                )
                expected = ((block / 255 - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)
                np.testing.assert_allclose(patches[frame * 8 + row * 4 + column].numpy(), expected, atol=1e-6)


def test_tensors_dtype_and_patch_size() -> None:
    frames = torch.full((1, 28, 28, 3), 255, dtype=torch.uint8)
    assert frames_to_patches(frames, MEAN, STD, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert frames_to_patches(frames, MEAN, STD, patch=28).shape == (1, 3, 28, 28)
    assert frames_to_patches(frames[:, ::2, ::2], (0, 0, 0), (1, 1, 1)).unique().tolist() == [1.0]
    assert frames_to_patches(frames[:0], MEAN, STD).shape == (0, 3, 14, 14)
    assert int(frames.min()) == 255  # the input is not written to


@pytest.mark.parametrize(
    "frames", [np.zeros((1, 20, 28, 3), np.uint8), np.zeros((28, 28, 3), np.uint8), np.zeros((1, 28, 28, 3))]
)
def test_refuses_wrong_input(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"frame"):
        frames_to_patches(frames, MEAN, STD)
