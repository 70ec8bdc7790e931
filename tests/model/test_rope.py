"""Rotary tables against pairs rotated one by one."""

from __future__ import annotations

import pytest
import torch

from keyecli.model.rope import grid_tables, mrope_tables, rotate_half_split, scale_sections
from tests import naive
from tests.compare import assert_close


@pytest.mark.parametrize(
    ("dim", "sections"), [(128, [16, 24, 24]), (64, [8, 12, 12]), (32, [4, 6, 6]), (16, [2, 3, 3])]
)
def test_three_axes_turn_their_own_pairs(dim: int, sections: list[int]) -> None:
    generator = torch.Generator().manual_seed(dim)
    positions = torch.randint(0, 500, (3, 2, 5), generator=generator)
    x = torch.randn(2, 5, 3, dim, generator=generator, dtype=torch.float64)
    cos, sin = mrope_tables(positions, dim, 1e7, sections, torch.float64)
    turned = rotate_half_split(x, cos, sin)
    for b in range(2):
        for t in range(5):
            for head in range(3):
                expected = naive.rotate(x[b, t, head], positions[:, b, t], 1e7, sections)
                assert_close(turned[b, t, head], expected, relative=2e-5, what=f"vector {b, t, head}")


def test_equal_positions_are_plain_rotary() -> None:
    positions = torch.arange(7).expand(3, 1, 7)
    one_axis = mrope_tables(positions, 32, 1e4, [16, 0, 0], torch.float32)
    three = mrope_tables(positions, 32, 1e4, [4, 6, 6], torch.float32)
    for a, b in zip(one_axis, three, strict=True):
        assert_close(a, b)


def test_sections_scale_to_the_indexer() -> None:
    assert scale_sections([16, 24, 24], 128, 64) == [8, 12, 12]
    assert scale_sections([4, 6, 6], 32, 16) == [2, 3, 3]
    with pytest.raises(ValueError, match="does not scale"):
        scale_sections([2, 3, 3], 16, 8)


def test_the_indexers_tables_are_not_a_slice_of_the_texts() -> None:
    positions = torch.randint(0, 500, (3, 1, 9), generator=torch.Generator().manual_seed(0))
    own, _ = mrope_tables(positions, 64, 1e7, [8, 12, 12], torch.float32)
    text, _ = mrope_tables(positions, 128, 1e7, [16, 24, 24], torch.float32)
    assert float((own - text[..., :64]).abs().max()) > 0.1


@pytest.mark.parametrize(("rows", "columns", "dim"), [(2, 4, 16), (3, 5, 72), (1, 1, 8)])
def test_two_axes_of_the_vision_tower(rows: int, columns: int, dim: int) -> None:
    """Row angles, then column angles, each over dim / 4 frequencies theta^(−2i / (dim / 2)), repeated twice."""
    cos, sin = grid_tables(rows, columns, dim, 10000.0, torch.device("cpu"))
    quarter = dim // 4
    assert cos.shape == sin.shape == (rows * columns, dim)
    for r in range(rows):
        for c in range(columns):
            frequencies = [10000.0 ** (-2 * i / (dim / 2)) for i in range(quarter)]
            angles = torch.tensor(
                [r * f for f in frequencies] + [c * f for f in frequencies], dtype=torch.float64
            ).repeat(2)
            assert_close(cos[r * columns + c], angles.cos(), what=f"cosine of patch {r, c}")
            assert_close(sin[r * columns + c], angles.sin(), what=f"sine of patch {r, c}")
