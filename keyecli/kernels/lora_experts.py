"""Routed experts with a low-rank addition on a GPU: `reference.lora_experts` in blocks of tokens, whose rows are made again in
the backward pass, so that memory does not grow with the length of a pack.

Matrix products are torch's grouped ones; what stands between them goes through memory once, by kernels of Triton: a token's rows
have known places, so that what PyTorch gathers and adds up by sorted indices are plain sums of k rows here.

T tokens, E experts, F expert width, D model width, k experts of a token, R = T · k rows sorted by expert, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from keyecli.kernels import reference
from keyecli.kernels.compile import CompileCase
from keyecli.kernels.quantized_weights import QuantizedMatrix
from keyecli.kernels.reference import LowRank

# 8 rows a token: in the 30B shape what a block keeps for its backward pass is some 7 GiB in bf16.
BLOCK_TOKENS = 32768
WARPS = 4


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

    def computed(x: Tensor, weights: Tensor, experts: Tensor, *factors: Tensor) -> Tensor:
        parts = list(factors)
        pairs = [
            None if given is None else (parts.pop(0), parts.pop(0))
            for given in (gate_up_factors, down_factors)
        ]
        order, ends = reference.by_expert(experts, gate_up.shape[0])
        restore = reference.inverse(order)
        rows = _Rows.apply(x, order, restore, experts.shape[1])
        gate_and_up = reference.adapted_rows(rows, _dense(gate_up, x.dtype), pairs[0], scale, ends)
        inner = _SwiGLU.apply(gate_and_up)
        routed = reference.adapted_rows(inner, _dense(down, x.dtype), pairs[1], scale, ends)
        return _Combined.apply(routed, weights, restore)

    factors = (*(gate_up_factors or ()), *(down_factors or ()))
    blocks = list(
        zip(x.split(BLOCK_TOKENS), weights.split(BLOCK_TOKENS), experts.split(BLOCK_TOKENS), strict=True)
    )
    again = torch.is_grad_enabled() and (len(blocks) > 1 or isinstance(gate_up, QuantizedMatrix))
    outputs = [
        # Nothing here is random, so no state of random numbers has to be kept.
        checkpoint(computed, *block, *factors, use_reentrant=False, preserve_rng_state=False)
        if again
        else computed(*block, *factors)
        for block in blocks
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _dense(matrix: Tensor | QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """A base's matrix [E, in, out]; no gradient reaches it."""
    if isinstance(matrix, Tensor):
        return matrix
    from keyecli.kernels.quantized import read_back

    return read_back(matrix, dtype)


class _Rows(torch.autograd.Function):
    """Tokens [T, D] → their copies sorted by expert [R, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, restore: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(restore)
        ctx.shape = x.shape
        return x[order // top_k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (restore,) = ctx.saved_tensors
        added = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device)
        _add_up(gradient, None, restore, added)
        return added, None, None, None


class _Combined(torch.autograd.Function):
    """Rows [R, D] → each token's sum [T, D] by its weights fp32 [T, k]."""

    @staticmethod
    def forward(ctx: Any, routed: Tensor, weights: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(routed, weights, restore)
        out = torch.empty(len(weights), routed.shape[1], dtype=routed.dtype, device=routed.device)
        _add_up(routed, weights, restore, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        routed, weights, restore = ctx.saved_tensors
        tokens, top_k = weights.shape
        routed_gradient, weight_gradient = torch.empty_like(routed), torch.empty_like(weights)
        _spread_kernel[(tokens,)](
            gradient.contiguous(), routed, weights, restore, routed_gradient, weight_gradient, routed.shape[1],
            TOP_K=top_k, COLUMNS=triton.next_power_of_2(routed.shape[1]), num_warps=WARPS,
        )  # fmt: skip
        return routed_gradient, weight_gradient, None


class _SwiGLU(torch.autograd.Function):
    """Gate and up side by side [R, 2F] → silu(gate) · up [R, F]."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        rows, width = gate_and_up.shape
        out = torch.empty(rows, width // 2, dtype=gate_and_up.dtype, device=gate_and_up.device)
        _swiglu_kernel[(rows,)](
            gate_and_up, out, width // 2, COLUMNS=triton.next_power_of_2(width // 2), num_warps=WARPS
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        rows, width = gate_and_up.shape
        result = torch.empty_like(gate_and_up)
        _swiglu_backward_kernel[(rows,)](
            gate_and_up, gradient.contiguous(), result, width // 2,
            COLUMNS=triton.next_power_of_2(width // 2), num_warps=WARPS,
        )  # fmt: skip
        return result


def _add_up(rows: Tensor, weights: Tensor | None, restore: Tensor, out: Tensor) -> None:
    """out[token] = Σ over the token's slots, in their order, of weight · row."""
    rows = rows.contiguous()
    _add_up_kernel[(len(out),)](
        rows, weights, restore, out, rows.shape[1], TOP_K=len(restore) // len(out),
        COLUMNS=triton.next_power_of_2(rows.shape[1]), num_warps=WARPS,
    )  # fmt: skip


# One program a token or row, all its columns at once.


@triton.jit
def _add_up_kernel(rows, weights, restore, out, width, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
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
def _spread_kernel(
    gradient,
    rows,
    weights,
    restore,
    row_gradient,
    weight_gradient,
    width,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of `_add_up_kernel`: each slot's row gets the token's times its weight, its weight their product."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    of_token = tl.load(gradient + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(TOP_K):
        place = tl.load(restore + token * TOP_K + slot)
        row = tl.load(rows + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + token * TOP_K + slot)
        scaled = (of_token * weight).to(row_gradient.dtype.element_ty)
        tl.store(row_gradient + place * width + columns, scaled, mask=inside)
        tl.store(weight_gradient + token * TOP_K + slot, tl.sum(of_token * row, 0))


@triton.jit
def _swiglu_kernel(gate_and_up, out, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    gate = tl.load(gate_and_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside
    )


@triton.jit
def _swiglu_backward_kernel(gate_and_up, gradient, result, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    gate = tl.load(gate_and_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    towards = tl.load(gradient + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    open_part = tl.sigmoid(gate)
    of_gate = towards * up * open_part * (1.0 + gate * (1.0 - open_part))
    kind = result.dtype.element_ty
    tl.store(result + row * 2 * width + columns, of_gate.to(kind), mask=inside)
    of_up = towards * gate * open_part
    tl.store(result + (row * 2 + 1) * width + columns, of_up.to(kind), mask=inside)


def compile_cases(capability: int) -> list[CompileCase]:
    """What stands between the products, as the 30B model launches it."""
    cases = []
    for kernel, constants in (
        (_add_up_kernel, {"TOP_K": 8, "COLUMNS": 2048}),
        (_spread_kernel, {"TOP_K": 8, "COLUMNS": 2048}),
        (_swiglu_kernel, {"COLUMNS": 1024}),
        (_swiglu_backward_kernel, {"COLUMNS": 1024}),
    ):
        types = {"weights": "*fp32", "weight_gradient": "*fp32", "restore": "*i64", "width": "i32"}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
        aligned = tuple(name for name, kind in signature.items() if kind != "constexpr")
        name = kernel.__name__.strip("_").replace("_", " ")
        cases.append(CompileCase(f"adapted experts, {name}", kernel, signature, constants, WARPS, 3, aligned))
    return cases
