"""Low-rank additions to products of a few rows in Triton: `add_low_rank`, and what adapted experts need beside their matrices.

Factors are read where an optimiser changes them and in the type in which it does, and rounded in registers to the type that
computes. What A makes of an input is a few numbers; what B makes of those is added in registers by whoever computes the outputs
anyway or, where that kernel knows nothing of it, by one more. A row's result is the same whatever stands beside it.

T tokens, k experts a token, E experts, D model width, F expert width, r rank, N outputs, K inputs. A source is t · k + slot. A
segment is one addition's outputs among those of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from keyecli.kernels.reference import Added, LowRank

# Additions to one linear layer: q, k and v.
MOST_ADDED = 3
# Numbers of a factor that a program holds at once; the longer its rank, the fewer inputs or columns of it.
HELD = 4096
MOST_INNER, MOST_COLUMNS = 256, 64
INNER_STAGES = tl.constexpr(3)
# Outputs of a program of `_add_kernel`.
ADDED_OUTPUTS = 64
WARPS = 4


# Linear layers.


@triton.jit
def _factor_row(held, first, rank, own, kind: tl.constexpr, K, inner):
    """held, and one row of A [r, K] where `own` says so."""
    values = tl.load(first + rank * K + inner, mask=(inner < K) & own, other=0.0)
    return held + values.to(kind).to(tl.float32)


@triton.jit
def _inner_kernel(
    x, low, first_0, first_1, first_2, rank_0, rank_1, rank_2, scale_0, scale_1, scale_2, K, x_row,
    ROWS: tl.constexpr, K_PADDED: tl.constexpr, RANKS: tl.constexpr, SEGMENTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """low[row, segment, rank] = scale · A x of every row, for one rank of one segment; zeros where a rank is padding."""
    let_next_begin(DEPENDENT)
    rank = tl.program_id(0)
    segment = tl.program_id(1)
    inner = tl.arange(0, K_PADDED)
    kind: tl.constexpr = x.dtype.element_ty
    factor = _factor_row(
        tl.zeros([K_PADDED], tl.float32), first_0, rank, (segment == 0) & (rank < rank_0), kind, K, inner
    )
    scale = scale_0
    if first_1 is not None:
        factor = _factor_row(factor, first_1, rank, (segment == 1) & (rank < rank_1), kind, K, inner)
        scale = tl.where(segment == 1, scale_1, scale)
    if first_2 is not None:
        factor = _factor_row(factor, first_2, rank, (segment == 2) & (rank < rank_2), kind, K, inner)
        scale = tl.where(segment == 2, scale_2, scale)
    wait_for_previous(DEPENDENT)
    for row in tl.static_range(ROWS):
        vector = tl.load(x + row * x_row + inner, mask=inner < K, other=0.0).to(tl.float32)
        total = tl.sum(factor * vector, 0) * scale
        # Rounded, as the definition's are.
        tl.store(low + (row * SEGMENTS + segment) * RANKS + rank, total.to(kind).to(tl.float32))


@triton.jit
def _factor_outputs(held, second, begin, count, rank, kind: tl.constexpr, outputs, ranks):
    """held [outputs, r], and the rows of B [count, r] of those outputs that are its own; which those are."""
    places = outputs - begin
    own = (places >= 0) & (places < count)
    present = own[:, None] & (ranks < rank)[None, :]
    values = tl.load(second + places[:, None] * rank + ranks[None, :], mask=present, other=0.0)
    return held + values.to(kind).to(tl.float32), own


@triton.jit
def output_factors(
    outputs, second_0, second_1, second_2, begin_0, begin_1, begin_2, count_0, count_1, count_2, rank_0, rank_1, rank_2,
    kind: tl.constexpr, OUTPUTS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """B of these outputs [OUTPUTS, RANKS], zeros where nothing is added, and their segments [OUTPUTS]."""
    ranks = tl.arange(0, RANKS)
    factors = tl.zeros([OUTPUTS, RANKS], tl.float32)
    segments = tl.zeros([OUTPUTS], tl.int32)
    factors, _ = _factor_outputs(factors, second_0, begin_0, count_0, rank_0, kind, outputs, ranks)
    if second_1 is not None:
        factors, own = _factor_outputs(factors, second_1, begin_1, count_1, rank_1, kind, outputs, ranks)
        segments = tl.where(own, 1, segments)
    if second_2 is not None:
        factors, own = _factor_outputs(factors, second_2, begin_2, count_2, rank_2, kind, outputs, ranks)
        segments = tl.where(own, 2, segments)
    return factors, segments


@triton.jit
def outer_products(low, row, factors, segments, RANKS: tl.constexpr, SEGMENTS: tl.constexpr):
    """What is added to these outputs of one row, once `low` is there."""
    ranks = tl.arange(0, RANKS)
    vectors = tl.load(low + (row * SEGMENTS + segments)[:, None] * RANKS + ranks[None, :])
    return tl.sum(factors * vectors, 1)


@triton.jit
def _add_kernel(
    out, low, second_0, second_1, second_2, begin_0, begin_1, begin_2, count_0, count_1, count_2, rank_0, rank_1, rank_2,
    N, out_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, RANKS: tl.constexpr, SEGMENTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out += B · low for a few outputs of every row."""
    let_next_begin(DEPENDENT)
    outputs = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    kind: tl.constexpr = out.dtype.element_ty
    factors, segments = output_factors(
        outputs, second_0, second_1, second_2, begin_0, begin_1, begin_2, count_0, count_1, count_2,
        rank_0, rank_1, rank_2, kind, OUTPUTS, RANKS,
    )  # fmt: skip
    wait_for_previous(DEPENDENT)
    for row in tl.static_range(ROWS):
        places = out + row * out_row + outputs
        total = tl.load(places, mask=outputs < N, other=0.0).to(tl.float32)
        total += outer_products(low, row, factors, segments, RANKS, SEGMENTS)
        tl.store(places, total.to(kind), mask=outputs < N)


def inner_products(x: Tensor, added: Sequence[Added]) -> Tensor:
    """What the additions' A make of x [B, K], scaled: fp32 [B, segments, ranks], ranks the next power of two."""
    if len(added) > MOST_ADDED:
        raise ValueError(f"{len(added)} additions to one linear layer: {MOST_ADDED} at most")
    rows, inner = x.shape
    for part in added:
        if part.first.shape[1] != inner or part.first.shape[0] != part.second.shape[1]:
            shapes = f"x {list(x.shape)}, A {list(part.first.shape)} and B {list(part.second.shape)}"
            raise ValueError(f"{shapes} do not fit together")
    x = x if x.stride(1) == 1 else x.contiguous()
    ranks = triton.next_power_of_2(max(len(part.first) for part in added))
    low = torch.empty(rows, len(added), ranks, dtype=torch.float32, device=x.device)
    _inner_kernel[(ranks, len(added))](
        x, low,
        *_filled([part.first.contiguous() for part in added], None), *_filled([len(part.first) for part in added], 0),
        *_filled([part.scale for part in added], 0.0), inner, x.stride(0),
        ROWS=rows, K_PADDED=triton.next_power_of_2(inner), RANKS=ranks, SEGMENTS=len(added),
        num_warps=WARPS, **dependent_launch(x.device), **same_sums(x.dtype),
    )  # fmt: skip
    return low


def outer_arguments(added: Sequence[Added]) -> dict[str, Any]:
    """The arguments of `output_factors` by their names, all None and 0 without additions."""
    lists = {
        "second": _filled([part.second.contiguous() for part in added], None),
        "begin": _filled([part.begin for part in added], 0),
        "count": _filled([len(part.second) for part in added], 0),
        "rank": _filled([part.second.shape[1] for part in added], 0),
    }
    return {f"{name}_{place}": value for name, values in lists.items() for place, value in enumerate(values)}


def _filled(values: list[Any], missing: Any) -> list[Any]:
    return values + [missing] * (MOST_ADDED - len(values))


def add_low_rank(out: Tensor, x: Tensor, added: Sequence[Added]) -> Tensor:
    """`reference.add_low_rank` of a few rows: out [B, N], contiguous rows, is changed in place; x [B, K]."""
    low = inner_products(x, added)
    rows, outputs = out.shape
    _add_kernel[(triton.cdiv(outputs, ADDED_OUTPUTS),)](
        out, low, **outer_arguments(added), N=outputs, out_row=out.stride(0),
        ROWS=rows, OUTPUTS=ADDED_OUTPUTS, RANKS=low.shape[2], SEGMENTS=len(added), num_warps=WARPS,
        **dependent_launch(out.device), **same_sums(x.dtype),
    )  # fmt: skip
    return out


# Experts.


@triton.jit
def routed_inner(
    x, first, low, source, expert, part, D,
    PARTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """low[source, part] = x · A[expert] over a part of x [D]; for programs that a kernel has beside its own."""
    inner = tl.arange(0, INNER)
    ranks = tl.arange(0, RANKS)
    span = tl.cdiv(tl.cdiv(D, INNER), PARTS) * INNER
    begin = part * span
    end = tl.minimum(begin + span, D)
    kind: tl.constexpr = x.dtype.element_ty
    places = first + expert * D * RANK + inner[:, None] * RANK + ranks[None, :]
    # Products pile up elementwise, and the sum across threads is taken once, after the loop.
    total = tl.zeros([INNER, RANKS], tl.float32)
    for start in tl.range(begin, end, INNER, num_stages=INNER_STAGES):
        inside = start + inner < D
        vector = tl.load(x + start + inner, mask=inside, other=0.0).to(tl.float32)
        present = inside[:, None] & (ranks < RANK)[None, :]
        factor = tl.load(places + start * RANK, mask=present, other=0.0).to(kind).to(tl.float32)
        total += vector[:, None] * factor
    tl.store(low + (source * PARTS + part) * RANKS + ranks, tl.sum(total, 0))


@triton.jit
def routed_low(
    low,
    sources,
    present,
    scale,
    kind: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    RANKS: tl.constexpr,
):
    """scale · x · A [sources, RANKS], its parts added up, rounded as the definition's."""
    parts = tl.arange(0, PADDED)
    ranks = tl.arange(0, RANKS)
    places = (sources[:, None] * PARTS + parts[None, :])[:, :, None] * RANKS + ranks[None, None, :]
    inside = present[:, None] & (parts < PARTS)[None, :]
    values = tl.load(low + places, mask=inside[:, :, None], other=0.0)
    return (tl.sum(values, 1) * scale).to(kind).to(tl.float32)


@triton.jit
def source_low(
    low, source, scale, kind: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, RANKS: tl.constexpr
):
    """`routed_low` of one source, [RANKS]."""
    sources = source + tl.arange(0, 1)
    return tl.reshape(routed_low(low, sources, sources >= 0, scale, kind, PARTS, PADDED, RANKS), [RANKS])


@triton.jit
def _activate_kernel(
    x, sums, experts, low, second, first, hidden, hidden_low, scale, F,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    NEXT_RANK: tl.constexpr, NEXT_RANKS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """hidden[source] = silu(gate) · up, rounded to x's type, of sums [split, source, 2F] and what is added to them, for one
    source and some columns; and their part of hidden · A of the matrix behind.

    The experts were chosen before the kernel that this one follows, which lets it begin only then, so that the factors are on
    their way while the sums are still worked out.
    """
    let_next_begin(DEPENDENT)
    source = tl.program_id(1)
    expert = tl.load(experts + source).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < F
    kind: tl.constexpr = x.dtype.element_ty
    if second is not None:
        ranks = tl.arange(0, RANKS)
        present = (ranks < RANK)[:, None] & inside[None, :]
        places = second + (expert * RANK + ranks)[:, None] * (2 * F) + columns[None, :]
        gate_factors = tl.load(places, mask=present, other=0.0).to(kind).to(tl.float32)
        up_factors = tl.load(places + F, mask=present, other=0.0).to(kind).to(tl.float32)
    if first is not None:
        next_ranks = tl.arange(0, NEXT_RANKS)
        present = inside[:, None] & (next_ranks < NEXT_RANK)[None, :]
        places = first + (expert * F + columns)[:, None] * NEXT_RANK + next_ranks[None, :]
        factors = tl.load(places, mask=present, other=0.0).to(kind).to(tl.float32)
    wait_for_previous(DEPENDENT)
    gate = tl.zeros([COLUMNS], tl.float32)
    up = tl.zeros([COLUMNS], tl.float32)
    for split in tl.static_range(SPLITS):
        place = sums + (split * tl.num_programs(1) + source) * (2 * F) + columns
        gate += tl.load(place, mask=inside, other=0.0)
        up += tl.load(place + F, mask=inside, other=0.0)
    if second is not None:
        vector = source_low(low, source, scale, kind, PARTS, PARTS_PADDED, RANKS)[:, None]
        gate += tl.sum(vector * gate_factors, 0)
        up += tl.sum(vector * up_factors, 0)
    activated = (gate / (1 + tl.exp(-gate)) * up).to(kind).to(tl.float32)
    tl.store(hidden + source * F + columns, activated, mask=inside)
    if first is not None:
        place = hidden_low + (source * tl.num_programs(0) + tl.program_id(0)) * NEXT_RANKS
        tl.store(place + next_ranks, tl.sum(activated[:, None] * factors, 0))


class RoutedFactors:
    """The factors of experts' two matrices for `sources` choices, and the buffers between the kernels that use them.

    gate_up: A [E, D, r] and B [E, r, 2F]; down: A [E, F, r] and B [E, r, D]; either may be None. width: F.
    """

    def __init__(
        self,
        x: Tensor,
        sources: int,
        gate_up: LowRank | None,
        down: LowRank | None,
        scale: float,
        width: int,
        parts: int,
    ) -> None:
        """parts: programs that share the product of one source with A of gate_up."""
        self.scale = scale
        longest, most = (MOST_INNER, MOST_COLUMNS) if device_capability(x.device) else (16, 16)
        self.gate_up, self.down = _contiguous(gate_up), _contiguous(down)
        self.rank = _rank_of(self.gate_up)
        self.next_rank = _rank_of(self.down)
        self.ranks, self.next_ranks = map(triton.next_power_of_2, (self.rank, self.next_rank))
        self.inner = max(16, min(longest, HELD // self.ranks))
        self.columns = max(16, min(most, HELD // max(self.ranks, self.next_ranks)))
        self.parts = 0 if gate_up is None else parts
        self.next_parts = triton.cdiv(width, self.columns)

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=x.device)

        self.low = None if gate_up is None else buffer(sources, self.parts, self.ranks)
        self.hidden_low = None if down is None else buffer(sources, self.next_parts, self.next_ranks)
        self.hidden = buffer(sources, width)

    def gate_up_arguments(self) -> dict[str, Any]:
        """What a kernel of gate and up takes to have programs for `routed_inner`."""
        return {
            "first": None if self.gate_up is None else self.gate_up[0],
            "low": self.low,
            "PARTS": self.parts,
            "RANK": self.rank,
            "RANKS": self.ranks,
            "PART": self.inner,
        }

    def activate(self, x: Tensor, sums: Tensor, experts: Tensor) -> Tensor:
        """sums fp32 [splits, sources, 2F] → the inputs of down, fp32 [sources, F]."""
        splits, sources, double = sums.shape
        width = double // 2
        _activate_kernel[(self.next_parts, sources)](
            x, sums, experts, self.low, None if self.gate_up is None else self.gate_up[1],
            None if self.down is None else self.down[0], self.hidden, self.hidden_low, self.scale, width,
            SPLITS=splits, PARTS=self.parts, PARTS_PADDED=triton.next_power_of_2(max(1, self.parts)),
            RANK=self.rank, RANKS=self.ranks, NEXT_RANK=self.next_rank, NEXT_RANKS=self.next_ranks,
            COLUMNS=self.columns, num_warps=WARPS, **dependent_launch(x.device),
        )  # fmt: skip
        return self.hidden

    def down_arguments(self) -> dict[str, Any]:
        """What a kernel of down takes to add B to its products."""
        return {
            "low": self.hidden_low,
            "second": None if self.down is None else self.down[1],
            "factor_scale": self.scale,
            "PARTS": self.next_parts,
            "PARTS_PADDED": triton.next_power_of_2(self.next_parts),
            "RANK": self.next_rank,
            "RANKS": self.next_ranks,
        }


# Of kernels that nothing is added in.
WITHOUT_GATE_UP = {"first": None, "low": None, "PARTS": 0, "RANK": 1, "RANKS": 1, "PART": 1}
WITHOUT_DOWN = {
    "low": None,
    "second": None,
    "factor_scale": 0.0,
    "PARTS": 1,
    "PARTS_PADDED": 1,
    "RANK": 1,
    "RANKS": 1,
}


def _contiguous(pair: LowRank | None) -> LowRank | None:
    return None if pair is None else (pair[0].contiguous(), pair[1].contiguous())


def _rank_of(pair: LowRank | None) -> int:
    return 1 if pair is None else pair[0].shape[2]


def factor_type(argument: str) -> str:
    """The type of a kernel's argument in the 30B shape: factors and what they make are fp32, the rest are counts."""
    return "*fp32" if argument.startswith(("first", "second", "low")) else "i32"


def missing_factors(kernel: Any, added: int) -> dict[str, None]:
    """Arguments of a kernel for fewer additions than there can be."""
    names = [f"{name}_{place}" for name in ("first", "second") for place in range(added, MOST_ADDED)]
    return {name: None for name in names if name in kernel.arg_names}


def compile_cases(capability: int) -> list[CompileCase]:
    """What stands beside the products, as an adapter of rank 16 on the 30B model launches it."""
    cases = []
    dependent = {"DEPENDENT": capability >= 90}
    scales = dict.fromkeys(("scale", *(f"scale_{place}" for place in range(MOST_ADDED))), "fp32")
    others = {
        "x": "*bf16",
        "out": "*bf16",
        "experts": "*i32",
        "sums": "*fp32",
        "hidden": "*fp32",
        "hidden_low": "*fp32",
    }

    def add(name: str, kernel: Any, constants: dict[str, Any]) -> None:
        constants = constants | dependent
        types = others | scales | dict.fromkeys(constants, "constexpr")
        signature = {argument: types.get(argument, factor_type(argument)) for argument in kernel.arg_names}
        aligned = tuple(name for name, kind in signature.items() if kind not in ("constexpr", "fp32"))
        cases.append(CompileCase(name, kernel, signature, constants, WARPS, 3, aligned))

    for added in (1, MOST_ADDED):
        shape = {"ROWS": 8, "RANKS": 16, "SEGMENTS": added}
        for name, kernel, further in (
            ("inner", _inner_kernel, {"K_PADDED": 2048}),
            ("outer", _add_kernel, {"OUTPUTS": ADDED_OUTPUTS}),
        ):
            add(
                f"{name} products, {added} added",
                kernel,
                {**shape, **further, **missing_factors(kernel, added)},
            )
    ranks = {"RANK": 16, "RANKS": 16, "NEXT_RANK": 16, "NEXT_RANKS": 16}
    parts = {"SPLITS": 2, "PARTS": 1, "PARTS_PADDED": 1, "COLUMNS": MOST_COLUMNS}
    add("adapted experts, activate", _activate_kernel, {**ranks, **parts})
    return cases
