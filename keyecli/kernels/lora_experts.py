"""Routed experts with a low-rank addition on a GPU: `reference.lora_experts`, in blocks of tokens, whose rows are made again in
the backward pass, so that memory does not grow with the length of a pack.

Matrix products are torch's grouped ones; what stands between them goes through memory once, by kernels of Triton: a token's rows
have known places, so that what PyTorch gathers and adds up by sorted indices are plain sums of k rows here, and what the factors
add is added in registers on the way.

Everything that a backward pass needs is kept before anything is computed. A checkpoint around a layer, which computes it again up
to the last thing that was kept, then does not compute the experts again, who do so themselves, and without their last product.

T tokens, E experts, F expert width, D model width, k experts of a token, R = T · k rows sorted by expert, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from keyecli.kernels import reference
from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import precision_of
from keyecli.kernels.quantized_weights import QuantizedMatrix
from keyecli.kernels.reference import LowRank

# 8 rows a token: in the 30B shape what a block needs for its backward pass is some 6 GiB in bf16.
BLOCK_TOKENS = 32768
WARPS = 4
# Of a tile of sorted rows that something is added to; for the backward pass of the activation, which holds three of them.
ROWS, COLUMNS, BACKWARD_COLUMNS = 32, 128, 64


def lora_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor | QuantizedMatrix,
    down: Tensor | QuantizedMatrix,
    gate_up_factors: LowRank | None,
    down_factors: LowRank | None,
    scale: float,
) -> Tensor:
    """`reference.lora_experts`; quantised matrices, as `quantized_weights.quantized_lora_experts` takes them, are read back for
    each block, and again in its backward pass."""
    how = _Experts(gate_up, down, gate_up_factors is not None, down_factors is not None, scale)
    factors = (*(gate_up_factors or ()), *(down_factors or ()))
    if not torch.is_grad_enabled():
        return how.forward(x, weights, experts, factors)
    handle = _Kept.apply(how, x, weights, experts, *factors)
    return _Computed.apply(handle, lambda: how.forward(x, weights, experts, factors))


class _Kept(torch.autograd.Function):
    """Keeps what the backward pass needs, and stands for the output, whose gradient it gets from `_Computed`."""

    @staticmethod
    def forward(ctx: Any, how: _Experts, x: Tensor, *others: Tensor) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, *others)
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, experts, *factors = ctx.saved_tensors
        of_x, of_weights, of_factors = ctx.how.backward(gradient, x, weights, experts, factors)
        return None, of_x, of_weights, None, *of_factors


class _Computed(torch.autograd.Function):
    """What a function computes, and whose gradient belongs to the handle. Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class _Sorted:
    """Rows by expert: `order` int64 [R], place → source t · k + slot; `restore` the way back; `ends` int32 [E]; of each place,
    `experts` int64 and `weights` fp32 [R]."""

    order: Tensor
    restore: Tensor
    ends: Tensor
    experts: Tensor
    weights: Tensor
    top_k: int

    @classmethod
    def of(cls, weights: Tensor, experts: Tensor, num_experts: int) -> _Sorted:
        order, ends = reference.by_expert(experts, num_experts)
        places = experts.flatten()[order]
        return cls(
            order, reference.inverse(order), ends, places, weights.flatten()[order].float(), experts.shape[1]
        )

    def rows(self, x: Tensor) -> Tensor:
        """Tokens [T, D] → their copies by expert [R, D]."""
        x = x.contiguous()
        copies = x.new_empty(len(self.order), x.shape[1])
        _copy_kernel[(len(x),)](
            x, self.restore, copies, x.shape[1], TOP_K=self.top_k,
            COLUMNS=triton.next_power_of_2(x.shape[1]), num_warps=WARPS,
        )  # fmt: skip
        return copies


@dataclass(frozen=True)
class _Half:
    """One of the two products: its matrix [E, K, N] and its factors A [E, K, r] and B [E, r, N] in the type that computes, whose
    rank is made up to rows of whole 16 bytes, as grouped products want them."""

    weight: Tensor
    first: Tensor | None
    second: Tensor | None
    scale: float

    @classmethod
    def of(cls, weight: Tensor, factors: tuple[Tensor, ...], scale: float) -> _Half:
        if not factors:
            return cls(weight, None, None, scale)
        missing = -factors[0].shape[2] % reference.GROUPED_ALIGNMENT
        first = F.pad(factors[0].to(weight.dtype), (0, missing))
        return cls(weight, first, F.pad(factors[1].to(weight.dtype), (0, 0, 0, missing)), scale)

    def product(self, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor | None]:
        """rows · W [R, N], and scale · rows · A [R, r], to which B is still to be applied."""
        low = None if self.first is None else F.grouped_mm(rows, self.first, offs=ends) * self.scale
        return F.grouped_mm(rows, self.weight, offs=ends), low

    def product_back(self, gradient: Tensor, ends: Tensor) -> tuple[Tensor, Tensor | None]:
        """gradient · Wᵀ [R, K], and scale · gradient · Bᵀ [R, r], to which Aᵀ is still to be applied."""
        low = None
        if self.second is not None:
            low = F.grouped_mm(gradient, self.second.transpose(1, 2), offs=ends) * self.scale
        return F.grouped_mm(gradient, self.weight.transpose(1, 2), offs=ends), low


@dataclass(frozen=True)
class _Experts:
    """The matrices, which of them have factors, and the factors' scale."""

    gate_up: Tensor | QuantizedMatrix
    down: Tensor | QuantizedMatrix
    adapts_gate_up: bool
    adapts_down: bool
    scale: float

    def _gate_up_half(self, dtype: torch.dtype, factors: tuple[Tensor, ...]) -> _Half:
        return _Half.of(_dense(self.gate_up, dtype), factors[:2] if self.adapts_gate_up else (), self.scale)

    def _down_half(self, dtype: torch.dtype, factors: tuple[Tensor, ...]) -> _Half:
        return _Half.of(_dense(self.down, dtype), factors[-2:] if self.adapts_down else (), self.scale)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """The output [T, D], block by block."""
        out = torch.empty_like(x)
        for block in _blocks(len(x)):
            rows = _Sorted.of(weights[block], experts[block], self.gate_up.shape[0])
            half = self._gate_up_half(x.dtype, factors)
            inner = _activated(*half.product(rows.rows(x[block]), rows.ends), half.second, rows)
            half = self._down_half(x.dtype, factors)
            routed, low = half.product(inner, rows.ends)
            _add_low_rank(routed, low, half.second, rows)
            _add_up(routed, weights[block], rows.restore, out[block])
        return out

    def backward(
        self, gradient: Tensor, x: Tensor, weights: Tensor, experts: Tensor, factors: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of x, weights and the factors; those of the latter are added up over blocks in fp32."""
        of_x, of_weights = torch.empty_like(x), torch.empty_like(weights)
        of_factors: list[Tensor] = []
        for block in _blocks(len(x)):
            rows = _Sorted.of(weights[block], experts[block], self.gate_up.shape[0])
            made = self._block_backward(
                gradient[block], x[block], rows, factors, of_x[block], of_weights[block]
            )
            own = [part.float() for part in made]
            of_factors = (
                [total.add_(part) for total, part in zip(of_factors, own, strict=True)] if of_factors else own
            )
        given = zip(of_factors, factors, strict=True)
        return of_x, of_weights, [total[tuple(map(slice, one.shape))].to(one.dtype) for total, one in given]

    def _block_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        rows: _Sorted,
        factors: tuple[Tensor, ...],
        of_x: Tensor,
        of_weights: Tensor,
    ) -> list[Tensor]:
        """Writes what x and the weights get; returns what the factors get."""
        ends, half = rows.ends, self._gate_up_half(x.dtype, factors)
        inputs = rows.rows(x)
        gate_up, low = half.product(inputs, ends)
        of_factors: list[Tensor] = []

        behind = self._down_half(x.dtype, factors)
        # What reaches a row of a token's sum, but for its weight.
        arriving = rows.rows(gradient)
        of_inner, back = behind.product_back(arriving, ends)
        of_gate_up = torch.empty_like(gate_up)
        inner = torch.empty_like(of_inner) if self.adapts_down else None
        weight_gradient = _activate_backward(
            gate_up, low, half.second, of_inner, back, behind.first, rows, of_gate_up, inner
        )
        of_weights.view(-1)[rows.order] = weight_gradient
        if inner is not None and back is not None and behind.first is not None:
            share = rows.weights[:, None]
            inner_low = F.grouped_mm(inner, behind.first, offs=ends) * self.scale
            of_factors = [
                F.grouped_mm(inner.t(), (back * share).to(x.dtype), offs=ends),
                F.grouped_mm((inner_low * share).to(x.dtype).t(), arriving, offs=ends),
            ]
        del arriving, of_inner, inner, gate_up

        of_inputs, back = half.product_back(of_gate_up, ends)
        _add_low_rank(of_inputs, back, None if half.first is None else half.first.transpose(1, 2), rows)
        _add_up(of_inputs, None, rows.restore, of_x)
        if low is not None and back is not None:
            of_factors = [
                F.grouped_mm(inputs.t(), back, offs=ends),
                F.grouped_mm(low.t(), of_gate_up, offs=ends),
                *of_factors,
            ]
        return of_factors


def _blocks(tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, BLOCK_TOKENS):
        yield slice(first, first + BLOCK_TOKENS)


def _dense(matrix: Tensor | QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """A base's matrix [E, in, out]; no gradient reaches it."""
    if isinstance(matrix, Tensor):
        return matrix
    from keyecli.kernels.quantized import read_back

    return read_back(matrix, dtype)


# What stands between the products.


def _activated(gate_up: Tensor, low: Tensor | None, second: Tensor | None, rows: _Sorted) -> Tensor:
    """Gate and up side by side [R, 2F], and what is added to them → silu(gate) · up [R, F]."""
    width = gate_up.shape[1] // 2
    inner = gate_up.new_empty(len(gate_up), width)
    _activate_kernel[(triton.cdiv(len(gate_up), ROWS), triton.cdiv(width, COLUMNS))](
        gate_up, low, second, rows.experts, inner, len(gate_up), width, **_ranks(low),
        ROWS=ROWS, COLUMNS=COLUMNS, PRECISION=precision_of(gate_up.dtype), num_warps=WARPS,
    )  # fmt: skip
    return inner


def _activate_backward(
    gate_up: Tensor,
    low: Tensor | None,
    second: Tensor | None,
    of_inner: Tensor,
    back: Tensor | None,
    first: Tensor | None,
    rows: _Sorted,
    of_gate_up: Tensor,
    inner: Tensor | None,
) -> Tensor:
    """From what reaches the inner rows, but for their weights and for back · firstᵀ: writes the gradients of gate and up, and the
    inner rows themselves where they are wanted; returns those of the rows' weights, fp32 [R]."""
    width = of_inner.shape[1]
    parts = triton.cdiv(width, BACKWARD_COLUMNS)
    products = rows.weights.new_empty(parts, len(gate_up))
    _activate_backward_kernel[(triton.cdiv(len(gate_up), ROWS), parts)](
        gate_up, low, second, of_inner, back, first, rows.experts, rows.weights, of_gate_up, products, inner,
        len(gate_up), width, **_ranks(low), **_ranks(back, "BACK_"),
        ROWS=ROWS, COLUMNS=BACKWARD_COLUMNS, PRECISION=precision_of(gate_up.dtype), num_warps=WARPS,
    )  # fmt: skip
    return products.sum(0)


def _add_low_rank(out: Tensor, low: Tensor | None, factor: Tensor | None, rows: _Sorted) -> None:
    """out [R, N] += low [R, r] · factor [E, r, N] of each row's expert."""
    if low is None or factor is None:
        return
    _add_kernel[(triton.cdiv(len(out), ROWS), triton.cdiv(out.shape[1], COLUMNS))](
        out, low, factor, rows.experts, len(out), out.shape[1], *factor.stride(), **_ranks(low),
        ROWS=ROWS, COLUMNS=COLUMNS, PRECISION=precision_of(out.dtype), num_warps=WARPS,
    )  # fmt: skip


def _ranks(low: Tensor | None, prefix: str = "") -> dict[str, int]:
    """The rank, and what a matrix unit makes of it."""
    rank = 0 if low is None else low.shape[1]
    return {f"{prefix}RANK": rank, f"{prefix}RANKS": max(16, triton.next_power_of_2(rank))}


def _add_up(rows: Tensor, weights: Tensor | None, restore: Tensor, out: Tensor) -> None:
    """out[token] = Σ over the token's slots, in their order, of weight · row."""
    _add_up_kernel[(len(out),)](
        rows, weights, restore, out, rows.shape[1], TOP_K=len(restore) // len(out),
        COLUMNS=triton.next_power_of_2(rows.shape[1]), num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _add_up_kernel(rows, weights, restore, out, width, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """One program a token, all its columns at once."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in tl.static_range(TOP_K):
        place = tl.load(restore + token * TOP_K + slot)
        row = tl.load(rows + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        if weights is not None:
            row *= tl.load(weights + token * TOP_K + slot)
        total += row
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _copy_kernel(x, restore, copies, width, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """One program a token, which goes to the places of its slots."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    row = tl.load(x + token * width + columns, mask=inside)
    for slot in tl.static_range(TOP_K):
        place = tl.load(restore + token * TOP_K + slot)
        tl.store(copies + place * width + columns, row, mask=inside)


@triton.jit
def _tile(experts, R, ROWS: tl.constexpr):
    """Places of a tile of sorted rows, which of them there are, their experts, and the first and last of those."""
    begin = tl.program_id(0).to(tl.int64) * ROWS
    places = begin + tl.arange(0, ROWS)
    present = places < R
    own = tl.load(experts + places, mask=present, other=-1)
    return places, present, own, tl.load(experts + begin), tl.load(experts + tl.minimum(begin + ROWS, R) - 1)


@triton.jit
def _low_of(low, places, present, RANK: tl.constexpr, RANKS: tl.constexpr):
    """low [R, r] of these places."""
    ranks = tl.arange(0, RANKS)
    inside = present[:, None] & (ranks < RANK)[None, :]
    return tl.load(low + places[:, None] * RANK + ranks[None, :], mask=inside, other=0.0)


@triton.jit
def _added(
    total, low, own, first, last, factor, columns, inside, of_expert, of_rank, of_column,
    RANK: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + low · factor of each row's expert: those of a tile, mostly one or two, one after the other."""
    ranks = tl.arange(0, RANKS)
    places = ranks[:, None] * of_rank + columns[None, :] * of_column
    present = (ranks < RANK)[:, None] & inside[None, :]
    for expert in range(first, last + 1):
        part = tl.load(factor + expert * of_expert + places, mask=present, other=0.0)
        mine = tl.where((own == expert)[:, None], low, tl.zeros_like(low))
        total = tl.dot(mine, part, total, input_precision=PRECISION)
    return total


@triton.jit
def _add_kernel(
    out, low, factor, experts, R, N, of_expert, of_rank, of_column,
    RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    places, present, own, first, last = _tile(experts, R, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    cells = out + places[:, None] * N + columns[None, :]
    there = present[:, None] & inside[None, :]
    total = tl.load(cells, mask=there, other=0.0).to(tl.float32)
    vectors = _low_of(low, places, present, RANK, RANKS)
    total = _added(
        total, vectors, own, first, last, factor, columns, inside, of_expert, of_rank, of_column,
        RANK, RANKS, PRECISION,
    )  # fmt: skip
    tl.store(cells, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _gate_and_up(
    cells, low, second, places, present, own, first, last, columns, inside, F,
    RANK: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gate and up of a tile, whose products lie side by side, with what is added to them."""
    there = present[:, None] & inside[None, :]
    gate = tl.load(cells, mask=there, other=0.0).to(tl.float32)
    up = tl.load(cells + F, mask=there, other=0.0).to(tl.float32)
    if low is not None:
        vectors = _low_of(low, places, present, RANK, RANKS)
        gate = _added(
            gate, vectors, own, first, last, second, columns, inside, RANK * 2 * F, 2 * F, 1, RANK, RANKS, PRECISION
        )  # fmt: skip
        up = _added(
            up, vectors, own, first, last, second + F, columns, inside, RANK * 2 * F, 2 * F, 1, RANK, RANKS, PRECISION
        )  # fmt: skip
    return gate, up


@triton.jit
def _activate_kernel(
    gate_up, low, second, experts, inner, R, F,
    RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    places, present, own, first, last = _tile(experts, R, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < F
    there = present[:, None] & inside[None, :]
    cells = gate_up + places[:, None] * (2 * F) + columns[None, :]
    gate, up = _gate_and_up(
        cells, low, second, places, present, own, first, last, columns, inside, F, RANK, RANKS, PRECISION
    )  # fmt: skip
    activated = gate * tl.sigmoid(gate) * up
    tl.store(inner + places[:, None] * F + columns[None, :], activated.to(inner.dtype.element_ty), mask=there)


@triton.jit
def _activate_backward_kernel(
    gate_up, low, second, of_inner, back, first_factor, experts, weights, of_gate_up, products, inner, R, F,
    RANK: tl.constexpr, RANKS: tl.constexpr, BACK_RANK: tl.constexpr, BACK_RANKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows and columns. A row's weight gets the product of its inner row with what reaches it, which is that of its
    output with the token's gradient; products [parts, R] has the part of these columns."""
    places, present, own, first, last = _tile(experts, R, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < F
    there = present[:, None] & inside[None, :]
    cells = places[:, None] * (2 * F) + columns[None, :]
    inner_cells = places[:, None] * F + columns[None, :]
    gate, up = _gate_and_up(
        gate_up + cells, low, second, places, present, own, first, last, columns, inside, F, RANK, RANKS, PRECISION
    )  # fmt: skip
    towards = tl.load(of_inner + inner_cells, mask=there, other=0.0).to(tl.float32)
    if back is not None:
        vectors = _low_of(back, places, present, BACK_RANK, BACK_RANKS)
        # A [E, F, r], read as its transpose.
        towards = _added(
            towards, vectors, own, first, last, first_factor, columns, inside, F * BACK_RANK, 1, BACK_RANK,
            BACK_RANK, BACK_RANKS, PRECISION,
        )  # fmt: skip
    kind: tl.constexpr = of_gate_up.dtype.element_ty
    share = tl.sigmoid(gate)
    activated = (gate * share * up).to(kind)
    if inner is not None:
        tl.store(inner + inner_cells, activated, mask=there)
    tl.store(
        products + tl.program_id(1) * R + places, tl.sum(activated.to(tl.float32) * towards, 1), mask=present
    )
    towards *= tl.load(weights + places, mask=present, other=0.0)[:, None]
    of_gate = towards * up * share * (1.0 + gate * (1.0 - share))
    tl.store(of_gate_up + cells, of_gate.to(kind), mask=there)
    tl.store(of_gate_up + cells + F, (towards * gate * share).to(kind), mask=there)


def compile_cases(capability: int) -> list[CompileCase]:
    """What stands between the products, as an adapter of rank 16 on the 30B model launches it."""
    cases = []
    ranks = {"RANK": 16, "RANKS": 16}
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS, "PRECISION": "tf32"}
    back = {"BACK_RANK": 16, "BACK_RANKS": 16, "COLUMNS": BACKWARD_COLUMNS}
    for name, kernel, constants in (
        ("copy", _copy_kernel, {"TOP_K": 8, "COLUMNS": 2048}),
        ("add up", _add_up_kernel, {"TOP_K": 8, "COLUMNS": 2048}),
        ("add", _add_kernel, {**ranks, **tile}),
        ("activate", _activate_kernel, {**ranks, **tile}),
        ("activate backward", _activate_backward_kernel, {**ranks, **tile, **back}),
    ):
        types = dict.fromkeys(("weights", "products"), "*fp32") | dict.fromkeys(
            ("restore", "experts"), "*i64"
        )
        types |= dict.fromkeys(("R", "F", "N", "width", "of_expert", "of_rank", "of_column"), "i32")
        types |= dict.fromkeys(constants, "constexpr")
        signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
        aligned = tuple(
            name for name, kind in signature.items() if kind != "constexpr" and name != "of_column"
        )
        cases.append(CompileCase(f"adapted experts, {name}", kernel, signature, constants, WARPS, 3, aligned))
    return cases
