"""A linear layer of a few rows in Triton: `linear`, defined by `torch.nn.functional.linear`, bound by reading the weights.

Libraries choose another algorithm for another number of rows, and then the same row gives other last bits. Here a row's
result is the same whatever stands beside it, so that sequences decoded together give what each alone would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import (
    dependent_launch,
    device_capability,
    let_next_begin,
    same_sums,
    wait_for_previous,
)
from keyecli.kernels.low_rank import (
    factor_type,
    inner_products,
    missing_factors,
    outer_arguments,
    outer_products,
    output_factors,
)
from keyecli.kernels.reference import Added

# A program holds whole rows of the weights.
LONGEST_INNER = 8192


@dataclass(frozen=True)
class Tile:
    """Outputs of a program, and its warps."""

    outputs: int
    warps: int


def tile_of(capability: int, inner: int) -> Tile:
    """By compute capability (0: the interpreter) and the number of inputs: small programs, so that they are many."""
    if capability == 0:
        return Tile(16, 1)
    return Tile(4, 2) if inner <= 2048 else Tile(4, 4)


@triton.jit
def _linear_kernel(
    x, weight, out, N, K, x_row, weight_row, out_row,
    low, second_0, second_1, second_2, begin_0, begin_1, begin_2, count_0, count_1, count_2, rank_0, rank_1, rank_2,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, K_PADDED: tl.constexpr, EVEN: tl.constexpr,
    RANKS: tl.constexpr, SEGMENTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A few outputs of every row, and B · low where given; the weights, read once, are on their way before x is there."""
    let_next_begin(DEPENDENT)
    outputs = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    inner = tl.arange(0, K_PADDED)
    places = weight + outputs[:, None] * weight_row + inner[None, :]
    if EVEN:
        weights = tl.load(places, eviction_policy="evict_first")
    else:
        present = (outputs < N)[:, None] & (inner < K)[None, :]
        weights = tl.load(places, mask=present, other=0.0, eviction_policy="evict_first")
    kind: tl.constexpr = weight.dtype.element_ty
    if low is not None:
        factors, segments = output_factors(
            outputs, second_0, second_1, second_2, begin_0, begin_1, begin_2, count_0, count_1, count_2,
            rank_0, rank_1, rank_2, kind, OUTPUTS, RANKS,
        )  # fmt: skip
    wait_for_previous(DEPENDENT)
    for row in tl.static_range(ROWS):
        vector = tl.load(x + row * x_row + inner, mask=inner < K, other=0.0)
        total = tl.sum(weights.to(tl.float32) * vector.to(tl.float32)[None, :], 1)
        if low is not None:
            total += outer_products(low, row, factors, segments, RANKS, SEGMENTS)
        tl.store(out + row * out_row + outputs, total.to(kind).to(out.dtype.element_ty), mask=outputs < N)


def linear(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None, added: Sequence[Added] = ()
) -> Tensor:
    """x [B, K] · weight [N, K]ᵀ → [B, N], rounded to their type and then stored as `out_dtype` (default: the same); with
    `added` as in `reference.add_low_rank`.

    Made for few rows: one program reads its weights once for all of them. ValueError for shapes that do not fit together
    and more than `LONGEST_INNER` inputs.
    """
    (rows, inner), (outputs, weight_inner) = x.shape, weight.shape
    if inner != weight_inner or inner > LONGEST_INNER or x.dtype != weight.dtype:
        raise ValueError(
            f"x {x.dtype} {list(x.shape)} and weight {weight.dtype} {list(weight.shape)} do not fit"
        )
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    out = torch.empty(rows, outputs, dtype=out_dtype or x.dtype, device=x.device)
    tile = tile_of(device_capability(x.device), inner)
    padded = triton.next_power_of_2(inner)
    low = inner_products(x, added) if added else None
    _linear_kernel[(triton.cdiv(outputs, tile.outputs),)](
        x, weight, out, outputs, inner, x.stride(0), weight.stride(0), out.stride(0), low, **outer_arguments(added),
        ROWS=rows, OUTPUTS=tile.outputs, K_PADDED=padded, EVEN=padded == inner and outputs % tile.outputs == 0,
        RANKS=1 if low is None else low.shape[2], SEGMENTS=len(added), num_warps=tile.warps,
        **dependent_launch(x.device), **same_sums(x.dtype),
    )  # fmt: skip
    return out


def compile_cases(capability: int) -> list[CompileCase]:
    """Projections of the 30B model for one sequence and for eight, and its language head; those of an adapted model."""
    cases = []
    for rows, inner, out, added in (
        (1, 2048, "bf16", 0),
        (8, 4096, "bf16", 0),
        (1, 2048, "fp32", 0),
        (8, 2048, "bf16", 3),
        (8, 4096, "bf16", 1),
    ):
        tile = tile_of(capability, inner)
        constants: dict[str, Any] = {
            "ROWS": rows, "OUTPUTS": tile.outputs, "K_PADDED": inner, "EVEN": True,
            "RANKS": 16 if added else 1, "SEGMENTS": added, "DEPENDENT": capability >= 90,
        }  # fmt: skip
        constants |= missing_factors(_linear_kernel, added) | ({} if added else {"low": None})
        tensors = {"x": "*bf16", "weight": "*bf16", "out": f"*{out}"}
        signature = {
            name: "constexpr" if name in constants else tensors.get(name, factor_type(name))
            for name in _linear_kernel.arg_names
        }
        cases.append(
            CompileCase(
                f"linear, {rows} rows of {inner}, {out}, {added} added", _linear_kernel, signature, constants,
                tile.warps, 2, tuple(name for name, kind in signature.items() if kind != "constexpr"),
            )
        )  # fmt: skip
    return cases
