"""The vision tower against transformers' PaddleOCR-VL tower with the same weights, the projector against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRVisionConfig
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRVisionModel

from tests import naive
from tests.compare import assert_close
from tests.model.test_trunk import direct
from tests.tiny import random_tensors, tiny_config

# Below, at and above the 7 × 7 learned grid, wide, tall and odd ones (merging is the projector's, not the tower's).
GRIDS = [(2, 2), (4, 6), (7, 7), (10, 4), (14, 14), (2, 20), (5, 3)]


def patches_of(grids: list[tuple[int, int]], seed: int = 0) -> Tensor:
    count = sum(rows * columns for rows, columns in grids)
    return torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


def their_tower(config: dict[str, Any], tensors: dict[str, Tensor]) -> PaddleOCRVisionModel:
    vision = {key: value for key, value in config["vision_config"].items() if key != "packing_positions"}
    rope = {"rope_type": "axial", "rope_theta": 10000.0}
    tower = PaddleOCRVisionModel(
        PaddleOCRVisionConfig(**vision, rope_parameters=rope, attn_implementation="eager")
    )
    state = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    del state["vision_model.embeddings.packing_position_embedding.weight"]
    tower.load_state_dict(state, strict=True)
    return tower.eval()


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("frames", [1, 3])
def test_tower_equals_paddleocr_vl(grid: tuple[int, int], frames: int) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    patches = patches_of([grid] * frames)
    rows, columns = grid
    ours = direct(config, tensors).visual(patches.view(frames, rows * columns, 3, 14, 14), rows, columns)
    thw = torch.tensor([[1, rows, columns]] * frames)
    theirs = their_tower(config, tensors)(pixel_values=patches[None], grid_thw=thw).last_hidden_state
    assert_close(ours.flatten(0, 1), theirs.view(-1, 32), relative=1e-5, what="features")


@torch.no_grad()
def test_tower_with_the_official_head_size_equals_paddleocr_vl() -> None:
    """Head dim 72 and the 27 × 27 grid, as released; one layer and few channels less."""
    config = tiny_config()
    config["vision_config"].update(
        hidden_size=144, num_attention_heads=2, image_size=384, num_hidden_layers=1
    )
    tensors = random_tensors(config)
    patches = patches_of([(6, 10)])
    ours = direct(config, tensors).visual(patches[None], 6, 10)
    theirs = their_tower(config, tensors)(
        pixel_values=patches[None], grid_thw=torch.tensor([[1, 6, 10]])
    ).last_hidden_state
    assert_close(ours[0], theirs.view(-1, 144), relative=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 6), (6, 2)])
def test_projector_equals_its_formula(rows: int, columns: int) -> None:
    """Blocks of 2 × 2 in row-major order, inside a block (row, column, channel); then norm, linear, exact GELU, linear."""
    config = tiny_config()
    tensors = random_tensors(config)
    features = torch.randn(2, rows * columns, 32, generator=torch.Generator().manual_seed(0))
    ours = direct(config, tensors).mlp_AR(features, rows, columns)
    weights = {
        name.removeprefix("mlp_AR."): t.double() for name, t in tensors.items() if name.startswith("mlp_AR.")
    }
    for frame in range(2):
        grid = features[frame].view(rows, columns, 32).double()
        for index in range(rows * columns // 4):
            r, c = 2 * (index // (columns // 2)), 2 * (index % (columns // 2))
            block = torch.cat((grid[r, c], grid[r, c + 1], grid[r + 1, c], grid[r + 1, c + 1]))
            normed = naive.layer_norm(block, weights["pre_norm.weight"], weights["pre_norm.bias"], 1e-5)
            inner = weights["linear_1.weight"] @ normed + weights["linear_1.bias"]
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            expected = weights["linear_2.weight"] @ inner + weights["linear_2.bias"]
            assert_close(ours[frame, index], expected, relative=1e-5, what=f"token {frame, index}")


@torch.no_grad()
@pytest.mark.parametrize("limit", [1, 16, 50, 100, 10**6])
def test_chunked_frames_equal_unchunked(limit: int) -> None:
    config = tiny_config()
    model = direct(config, random_tensors(config))
    grids = [(4, 4)] * 5 + [(2, 6)] * 2 + [(4, 4)]
    patches = patches_of(grids)
    one_by_one, begin = [], 0
    for rows, columns in grids:
        one_by_one.append(model.encode_frames(patches[begin : begin + rows * columns], [(rows, columns)]))
        begin += rows * columns
    together = model.encode_frames(patches, grids, limit_patches=limit)
    assert together.shape == (len(patches) // 4, 64)
    assert_close(together, torch.cat(one_by_one), relative=1e-5)


@torch.no_grad()
def test_a_frame_does_not_see_another() -> None:
    config = tiny_config()
    model = direct(config, random_tensors(config))
    patches = patches_of([(4, 4)] * 3)
    before = model.encode_frames(patches, [(4, 4)] * 3)
    patches[16:32] += 1
    after = model.encode_frames(patches, [(4, 4)] * 3)
    assert_close(after[:4], before[:4])
    assert_close(after[8:], before[8:])
    assert float((after[4:8] - before[4:8]).abs().max()) > 0.01


def test_grids_that_do_not_fit_are_refused() -> None:
    config = tiny_config()
    model = direct(config, random_tensors(config))
    with pytest.raises(ValueError, match="even"):
        model.encode_frames(patches_of([(3, 4)]), [(3, 4)])
    with pytest.raises(ValueError, match="16 patches"):
        model.encode_frames(patches_of([(4, 4), (2, 2)]), [(4, 4)])
