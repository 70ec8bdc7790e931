"""Rotary position embeddings: three-axis for text and its indexer, two-axis for the vision tower.

Everything here is the half-split layout: dimension i pairs with dimension i + d/2, never with its neighbour.
Source: the released model, §5-7 of its description; T tokens, B batch, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of the last dimension.

    x: [..., T, heads, d]; cos, sin: [..., T, d] with their first half equal to their second. Returns x's shape and dtype.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def inverse_frequencies(dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """The `dim / 2` frequencies theta^(-2i/dim), fp32."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return theta**-exponents


def scale_sections(sections: Sequence[int], head_dim: int, other_dim: int) -> list[int]:
    """The three-axis sections of `head_dim` scaled to another head size; ValueError when they do not divide."""
    scaled = [section * other_dim for section in sections]
    if any(value % head_dim for value in scaled):
        raise ValueError(
            f"mrope_section {list(sections)} of head dim {head_dim} does not scale to {other_dim}"
        )
    return [value // head_dim for value in scaled]


def mrope_tables(
    position_ids: Tensor, dim: int, theta: float, sections: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of three-axis positions.

    position_ids: [3, B, T] (time, row, column). The first `sections[0]` frequencies turn by the time position, the
    next by the row, the last by the column. Returns two [B, T, dim] tables, worked out in fp32, given as `dtype`.
    """
    frequencies = inverse_frequencies(dim, theta, position_ids.device)
    parts = frequencies.split(list(sections))
    angles = torch.cat(
        [positions.unsqueeze(-1).float() * part for positions, part in zip(position_ids, parts, strict=True)],
        dim=-1,
    )
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def grid_tables(
    rows: int, columns: int, dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of a frame's patches in row-major order: `dim / 4` row angles, then `dim / 4` column angles, twice.

    Returns two [rows * columns, dim] fp32 tables.
    """
    frequencies = inverse_frequencies(dim // 2, theta, device)
    row = torch.arange(rows, device=device, dtype=torch.float32).repeat_interleave(columns)
    column = torch.arange(columns, device=device, dtype=torch.float32).repeat(rows)
    angles = torch.cat((row[:, None] * frequencies, column[:, None] * frequencies), dim=-1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
