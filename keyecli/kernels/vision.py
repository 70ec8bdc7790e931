"""Attention inside frames in Triton: `frame_attention`, defined by its namesake in `reference`.

N frames, P patches a frame, d head dim. The tower's d is 72: padded to 128, which is what a single block would need, nearly
half of the arithmetic would be wasted. So a head is two blocks, the largest power of two in d and the rest (64 + 16 with 8
columns masked), and every product with it is two products. A frame's keys are few, so a row of programs reads them from the
cache and nothing P × P is ever written. The backward pass recomputes the probabilities from the saved log-sum-exp.

The rotary embedding is a kernel of its own: its pairs (i, i + d/2) lie in different blocks of a head, and rotating keys inside
the attention would repeat the work, and the reading of the tables, for every tile of queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import device_capability, precision_of

LOG2_E = math.log2(math.e)
MAX_HEAD_DIM = 128
ROTARY_PATCHES = 1


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a block, warps and pipeline stages of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """Tiles of the forward pass and of the two backward passes, by queries (dq) and by keys (dk, dv)."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile


def plan_for(capability: int, itemsize: int) -> Plan:
    """Tiles for a compute capability (0: the interpreter) and an element size."""
    if capability == 0:
        return Plan(Tile(16, 16, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1))
    if itemsize == 4:
        # Without tensor cores every operand of a product sits in registers.
        return Plan(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if capability == 90:
        return Plan(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
    return Plan(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))


def head_blocks(dim: int) -> tuple[int, int]:
    """The two blocks of a head: the largest power of two in it (at least 16), and one that holds the rest, or 0.

    72 → 64 and 16; 48 → 32 and 16; 64 → 64 and 0; 8 → 16 and 0.
    """
    main = max(16, 1 << (dim.bit_length() - 1))
    rest = dim - main
    return main, 0 if rest <= 0 else max(16, triton.next_power_of_2(rest))


# fmt: off
@triton.jit
def _load_rows(
    pointer, rows, row_stride, count, START: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr
):
    """Columns START … START + WIDTH of some rows of one head; zeros past the head and, when MASKED, past the last row."""
    columns = START + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * row_stride + columns[None, :]
    if START + WIDTH > HEAD:
        if MASKED:
            return tl.load(pointers, mask=(rows < count)[:, None] & (columns < HEAD)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(columns < HEAD)[None, :], other=0.0)
    else:
        if MASKED:
            return tl.load(pointers, mask=(rows < count)[:, None], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def _store_rows(
    pointer, value, rows, row_stride, count, START: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr
):
    columns = START + tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * row_stride + columns[None, :]
    present = (rows < count)[:, None] & (columns < HEAD)[None, :]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=present)


@triton.jit
def _attend(
    main, rest, largest, denominator, q_main, q_rest, k, v, start, k_stride, v_stride, P, scale,
    KEYS: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys into the running softmax: (main, rest) unnormalised output, largest logit, denominator."""
    keys = start + tl.arange(0, KEYS)
    k_main = _load_rows(k, keys, k_stride, P, 0, MAIN, HEAD, MASKED)
    logits = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
    if REST > 0:
        k_rest = _load_rows(k, keys, k_stride, P, MAIN, REST, HEAD, MASKED)
        logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision=PRECISION)
    if MASKED:
        logits = tl.where((keys < P)[None, :], logits, float("-inf"))
    # Logits stay unscaled until the exponent, where scaling and shifting are one instruction.
    new_largest = tl.maximum(largest, tl.max(logits, 1) * scale)
    power = tl.exp2(logits * scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    denominator = denominator * shrink + tl.sum(power, 1)
    main = main * shrink[:, None]
    v_main = _load_rows(v, keys, v_stride, P, 0, MAIN, HEAD, MASKED)
    power = power.to(v_main.dtype)
    main = tl.dot(power, v_main, main, input_precision=PRECISION)
    if REST > 0:
        rest = rest * shrink[:, None]
        v_rest = _load_rows(v, keys, v_stride, P, MAIN, REST, HEAD, MASKED)
        rest = tl.dot(power, v_rest, rest, input_precision=PRECISION)
    return main, rest, new_largest, denominator


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, P, heads, scale, q_frame, q_stride, k_frame, k_stride, v_frame, v_stride,
    HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, STORE_LSE: tl.constexpr, PRECISION: tl.constexpr,
):
    """One block of queries of one head of one frame against all keys of the frame.

    *_frame and *_stride: elements from one frame and one patch to the next. scale: d^(−1/2) · log2(e). lse, in base 2 and
    scaled: fp32 [N, heads, P].
    """
    tiles = tl.cdiv(P, QUERIES)
    # Blocks of the same head are neighbours in the grid: they read the same keys.
    frame_head = tl.program_id(0) // tiles
    frame = (frame_head // heads).to(tl.int64)
    offset = (frame_head % heads) * HEAD
    rows = (tl.program_id(0) % tiles) * QUERIES + tl.arange(0, QUERIES)
    q += frame * q_frame + offset
    k += frame * k_frame + offset
    v += frame * v_frame + offset
    q_main = _load_rows(q, rows, q_stride, P, 0, MAIN, HEAD, True)
    q_rest = q_main
    main = tl.zeros([QUERIES, MAIN], tl.float32)
    rest = main
    if REST > 0:
        q_rest = _load_rows(q, rows, q_stride, P, MAIN, REST, HEAD, True)
        rest = tl.zeros([QUERIES, REST], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    denominator = tl.zeros([QUERIES], tl.float32)
    for start in range(0, P, KEYS):
        main, rest, largest, denominator = _attend(
            main, rest, largest, denominator, q_main, q_rest, k, v, start, k_stride, v_stride, P, scale,
            KEYS, HEAD, MAIN, REST, not EVEN, PRECISION,
        )
    out_stride = heads * HEAD
    out += frame * P * out_stride + offset
    _store_rows(out, main / denominator[:, None], rows, out_stride, P, 0, MAIN, HEAD)
    if REST > 0:
        _store_rows(out, rest / denominator[:, None], rows, out_stride, P, MAIN, REST, HEAD)
    if STORE_LSE:
        pointers = lse + frame_head.to(tl.int64) * P + rows
        tl.store(pointers, largest + tl.log2(denominator), mask=rows < P)


@triton.jit
def _query_gradient_kernel(
    q, k, v, out, gradient, lse, delta, q_gradient, P, heads, scale, softmax_scale,
    q_frame, q_stride, k_frame, k_stride, v_frame, v_stride,
    HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq of one block of queries, and delta = Σ out · gradient of its rows for the other kernel, fp32 [N, heads, P]."""
    tiles = tl.cdiv(P, QUERIES)
    frame_head = tl.program_id(0) // tiles
    frame = (frame_head // heads).to(tl.int64)
    offset = (frame_head % heads) * HEAD
    rows = (tl.program_id(0) % tiles) * QUERIES + tl.arange(0, QUERIES)
    stride = heads * HEAD
    q += frame * q_frame + offset
    k += frame * k_frame + offset
    v += frame * v_frame + offset
    out += frame * P * stride + offset
    gradient += frame * P * stride + offset
    q_gradient += frame * P * stride + offset
    statistics = frame_head.to(tl.int64) * P + rows
    q_main = _load_rows(q, rows, q_stride, P, 0, MAIN, HEAD, True)
    gradient_main = _load_rows(gradient, rows, stride, P, 0, MAIN, HEAD, True)
    out_main = _load_rows(out, rows, stride, P, 0, MAIN, HEAD, True)
    row_delta = tl.sum(gradient_main.to(tl.float32) * out_main.to(tl.float32), 1)
    main = tl.zeros([QUERIES, MAIN], tl.float32)
    if REST > 0:
        q_rest = _load_rows(q, rows, q_stride, P, MAIN, REST, HEAD, True)
        gradient_rest = _load_rows(gradient, rows, stride, P, MAIN, REST, HEAD, True)
        out_rest = _load_rows(out, rows, stride, P, MAIN, REST, HEAD, True)
        row_delta += tl.sum(gradient_rest.to(tl.float32) * out_rest.to(tl.float32), 1)
        rest = tl.zeros([QUERIES, REST], tl.float32)
    tl.store(delta + statistics, row_delta, mask=rows < P)
    row_lse = tl.load(lse + statistics, mask=rows < P, other=float("inf"))
    for start in range(0, P, KEYS):
        keys = start + tl.arange(0, KEYS)
        k_main = _load_rows(k, keys, k_stride, P, 0, MAIN, HEAD, not EVEN)
        v_main = _load_rows(v, keys, v_stride, P, 0, MAIN, HEAD, not EVEN)
        logits = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
        slope = tl.dot(gradient_main, tl.trans(v_main), input_precision=PRECISION)
        if REST > 0:
            k_rest = _load_rows(k, keys, k_stride, P, MAIN, REST, HEAD, not EVEN)
            v_rest = _load_rows(v, keys, v_stride, P, MAIN, REST, HEAD, not EVEN)
            logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision=PRECISION)
            slope = tl.dot(gradient_rest, tl.trans(v_rest), slope, input_precision=PRECISION)
        if not EVEN:
            logits = tl.where((keys < P)[None, :], logits, float("-inf"))
        probability = tl.exp2(logits * scale - row_lse[:, None])
        slope = (probability * (slope - row_delta[:, None])).to(k_main.dtype)
        main = tl.dot(slope, k_main, main, input_precision=PRECISION)
        if REST > 0:
            rest = tl.dot(slope, k_rest, rest, input_precision=PRECISION)
    _store_rows(q_gradient, main * softmax_scale, rows, stride, P, 0, MAIN, HEAD)
    if REST > 0:
        _store_rows(q_gradient, rest * softmax_scale, rows, stride, P, MAIN, REST, HEAD)


@triton.jit
def _key_gradient_kernel(
    q, k, v, gradient, lse, delta, k_gradient, v_gradient, P, heads, scale, softmax_scale,
    q_frame, q_stride, k_frame, k_stride, v_frame, v_stride,
    HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one block of keys: queries go by, logits are held transposed, keys × queries."""
    tiles = tl.cdiv(P, KEYS)
    frame_head = tl.program_id(0) // tiles
    frame = (frame_head // heads).to(tl.int64)
    offset = (frame_head % heads) * HEAD
    keys = (tl.program_id(0) % tiles) * KEYS + tl.arange(0, KEYS)
    stride = heads * HEAD
    q += frame * q_frame + offset
    k += frame * k_frame + offset
    v += frame * v_frame + offset
    gradient += frame * P * stride + offset
    k_gradient += frame * P * stride + offset
    v_gradient += frame * P * stride + offset
    lse += frame_head.to(tl.int64) * P
    delta += frame_head.to(tl.int64) * P
    k_main = _load_rows(k, keys, k_stride, P, 0, MAIN, HEAD, True)
    v_main = _load_rows(v, keys, v_stride, P, 0, MAIN, HEAD, True)
    dk_main = tl.zeros([KEYS, MAIN], tl.float32)
    dv_main = tl.zeros([KEYS, MAIN], tl.float32)
    if REST > 0:
        k_rest = _load_rows(k, keys, k_stride, P, MAIN, REST, HEAD, True)
        v_rest = _load_rows(v, keys, v_stride, P, MAIN, REST, HEAD, True)
        dk_rest = tl.zeros([KEYS, REST], tl.float32)
        dv_rest = tl.zeros([KEYS, REST], tl.float32)
    for start in range(0, P, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        # Rows past the end have an infinite denominator, so every probability of theirs is 0.
        row_lse = tl.load(lse + rows, mask=rows < P, other=float("inf"))
        row_delta = tl.load(delta + rows, mask=rows < P, other=0.0)
        q_main = _load_rows(q, rows, q_stride, P, 0, MAIN, HEAD, True)
        gradient_main = _load_rows(gradient, rows, stride, P, 0, MAIN, HEAD, True)
        logits = tl.dot(k_main, tl.trans(q_main), input_precision=PRECISION)
        slope = tl.dot(v_main, tl.trans(gradient_main), input_precision=PRECISION)
        if REST > 0:
            q_rest = _load_rows(q, rows, q_stride, P, MAIN, REST, HEAD, True)
            gradient_rest = _load_rows(gradient, rows, stride, P, MAIN, REST, HEAD, True)
            logits = tl.dot(k_rest, tl.trans(q_rest), logits, input_precision=PRECISION)
            slope = tl.dot(v_rest, tl.trans(gradient_rest), slope, input_precision=PRECISION)
        probability = tl.exp2(logits * scale - row_lse[None, :])
        slope = (probability * (slope - row_delta[None, :])).to(q_main.dtype)
        probability = probability.to(q_main.dtype)
        dv_main = tl.dot(probability, gradient_main, dv_main, input_precision=PRECISION)
        dk_main = tl.dot(slope, q_main, dk_main, input_precision=PRECISION)
        if REST > 0:
            dv_rest = tl.dot(probability, gradient_rest, dv_rest, input_precision=PRECISION)
            dk_rest = tl.dot(slope, q_rest, dk_rest, input_precision=PRECISION)
    _store_rows(v_gradient, dv_main, keys, stride, P, 0, MAIN, HEAD)
    _store_rows(k_gradient, dk_main * softmax_scale, keys, stride, P, 0, MAIN, HEAD)
    if REST > 0:
        _store_rows(v_gradient, dv_rest, keys, stride, P, MAIN, REST, HEAD)
        _store_rows(k_gradient, dk_rest * softmax_scale, keys, stride, P, MAIN, REST, HEAD)


@triton.jit
def _rotate_tile(source, target, offsets, target_offsets, cos, sin, present, HALF: tl.constexpr):
    first = tl.load(source + offsets, mask=present, other=0.0).to(tl.float32)
    second = tl.load(source + offsets + HALF, mask=present, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target + target_offsets, (first * cos - second * sin).to(kind), mask=present)
    tl.store(target + target_offsets + HALF, (second * cos + first * sin).to(kind), mask=present)


@triton.jit
def _rotary_kernel(
    q, k, cos, sin, q_out, k_out, P, heads, q_frame, q_stride, k_frame, k_stride,
    HEAD: tl.constexpr, HEADS_PADDED: tl.constexpr, HALF_PADDED: tl.constexpr, PATCHES: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """Some patches of one frame, q and k, all heads: the tables are read once for all of them. BACKWARDS turns the other way."""
    tiles = tl.cdiv(P, PATCHES)
    half: tl.constexpr = HEAD // 2
    frame = (tl.program_id(0) // tiles).to(tl.int64)
    patches = (tl.program_id(0) % tiles) * PATCHES + tl.arange(0, PATCHES)[:, None, None]
    head = tl.arange(0, HEADS_PADDED)[None, :, None]
    column = tl.arange(0, HALF_PADDED)[None, None, :]
    in_table = (patches < P) & (column < half)
    cosine = tl.load(cos + patches * HEAD + column, mask=in_table, other=0.0)
    sine = tl.load(sin + patches * HEAD + column, mask=in_table, other=0.0)
    if BACKWARDS:
        sine = -sine
    present = in_table & (head < heads)
    within = head * HEAD + column
    target = frame * P * heads * HEAD + patches * (heads * HEAD) + within
    _rotate_tile(q + frame * q_frame, q_out, patches * q_stride + within, target, cosine, sine, present, half)
    _rotate_tile(k + frame * k_frame, k_out, patches * k_stride + within, target, cosine, sine, present, half)
# fmt: on


def packed(x: Tensor) -> Tensor:
    """x [N, P, heads, d] with its heads side by side, as a projection leaves them; a copy only when they are not.

    Patches and frames may stand apart, so parts of one wide projection are read where they are.
    """
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def strides_of(*tensors: Tensor) -> list[int]:
    """Frame and patch stride of each."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def head_constants(dim: int, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    main, rest = head_blocks(dim)
    return {
        "HEAD": dim,
        "MAIN": main,
        "REST": rest,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "PRECISION": precision_of(dtype),
    }


def launch_options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


class _Rotary(torch.autograd.Function):
    """A rotation: its gradient is the opposite rotation, so only the tables are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rotate(q, k, cos, sin, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_gradient: Tensor, k_gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *rotate(packed(q_gradient), packed(k_gradient), cos, sin, backwards=True), None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
    """q and k, packed, turned in fp32 by the angles of their patches, or back."""
    frames, patches, heads, dim = q.shape
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    with torch.cuda.device_of(q):
        _rotary_kernel[(frames * triton.cdiv(patches, ROTARY_PATCHES),)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            patches,
            heads,
            *strides_of(q, k),
            HEAD=dim,
            HEADS_PADDED=triton.next_power_of_2(heads),
            HALF_PADDED=triton.next_power_of_2(dim // 2),
            PATCHES=ROTARY_PATCHES,
            BACKWARDS=backwards,
        )
    return q_out, k_out


class _FrameAttention(torch.autograd.Function):
    """Keeps its inputs, its output and one statistic a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames, patches, heads, dim = q.shape
        tile = plan_for(device_capability(q.device), q.element_size()).forward
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        differentiable = any(ctx.needs_input_grad)
        lse = out
        if differentiable:
            lse = torch.empty(frames, heads, patches, dtype=torch.float32, device=q.device)
            ctx.save_for_backward(q, k, v, out, lse)
        with torch.cuda.device_of(q):
            _forward_kernel[(frames * heads * triton.cdiv(patches, tile.queries),)](
                q,
                k,
                v,
                out,
                lse,
                patches,
                heads,
                dim**-0.5 * LOG2_E,
                *strides_of(q, k, v),
                EVEN=patches % tile.keys == 0,
                STORE_LSE=differentiable,
                **head_constants(dim, tile, q.dtype),
                **launch_options(tile),
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        frames, patches, heads, dim = q.shape
        plan = plan_for(device_capability(q.device), q.element_size())
        gradient = gradient.contiguous()
        delta = torch.empty_like(lse)
        results = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        scales = (dim**-0.5 * LOG2_E, dim**-0.5)
        with torch.cuda.device_of(q):
            tile = plan.query_gradient
            _query_gradient_kernel[(frames * heads * triton.cdiv(patches, tile.queries),)](
                q,
                k,
                v,
                out,
                gradient,
                lse,
                delta,
                results[0],
                patches,
                heads,
                *scales,
                *strides_of(q, k, v),
                EVEN=patches % tile.keys == 0,
                **head_constants(dim, tile, q.dtype),
                **launch_options(tile),
            )
            tile = plan.key_gradient
            _key_gradient_kernel[(frames * heads * triton.cdiv(patches, tile.keys),)](
                q,
                k,
                v,
                gradient,
                lse,
                delta,
                results[1],
                results[2],
                patches,
                heads,
                *scales,
                *strides_of(q, k, v),
                **head_constants(dim, tile, q.dtype),
                **launch_options(tile),
            )
        return results


def frame_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """Full attention inside each of N frames: q, k, v [N, P, heads, d] → [N, P, heads, d]. Defined by
    `reference.frame_attention`.

    bf16, fp16 or fp32, d at most 128, any N and P. With cos and sin, fp32 [P, d] whose rows have two equal halves, q and k are
    first rotated in fp32, pairs (i, i + d/2), and rounded to their type. Differentiable once in q, k and v. Heads that do not
    stand side by side are copied. Raises ValueError when shapes or types do not fit.
    """
    dim = q.shape[3]
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        described = ", ".join(f"{x.dtype} {list(x.shape)}" for x in (q, k, v))
        raise ValueError(f"q, k and v must have one shape and one type: {described}")
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"a head of {dim} is wider than {MAX_HEAD_DIM}")
    if q.numel() == 0:
        return torch.zeros_like(q)
    q, k, v = packed(q), packed(k), packed(v)
    if cos is not None and sin is not None:
        if cos.shape != (q.shape[1], dim) or sin.shape != cos.shape or dim % 2:
            raise ValueError(f"tables {list(cos.shape)} and {list(sin.shape)} do not fit q {list(q.shape)}")
        q, k = _Rotary.apply(q, k, cos.float().contiguous(), sin.float().contiguous())
    return _FrameAttention.apply(q, k, v)


# Types of the arguments for the released tower; what is not named here points to bf16.
ARGUMENT_TYPES = {
    **dict.fromkeys(("lse", "delta", "cos", "sin"), "*fp32"),
    **dict.fromkeys(("scale", "softmax_scale"), "fp32"),
    **dict.fromkeys(("P", "heads"), "i32"),
    **dict.fromkeys(("q_frame", "q_stride", "k_frame", "k_stride", "v_frame", "v_stride"), "i32"),
}


def case_of(name: str, kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> CompileCase:
    """A kernel with the types above; pointers, strides and the number of heads are multiples of 16, patches are not."""
    signature = {
        argument: "constexpr" if argument in constants else ARGUMENT_TYPES.get(argument, "*bf16")
        for argument in kernel.arg_names
    }
    multiples = tuple(
        argument
        for argument, kind in signature.items()
        if kind.startswith("*") or argument == "heads" or argument.endswith(("_frame", "_stride"))
    )
    return CompileCase(
        name, kernel, signature, constants, options["num_warps"], options.get("num_stages", 3), multiples
    )


def compile_cases(capability: int) -> list[CompileCase]:
    """Every kernel as the released tower launches it in bf16 (16 heads of 72), and with heads of 64."""
    plan = plan_for(capability, 2)
    cases = []
    for dim in (72, 64):
        for name, kernel, tile, flags in (
            ("forward even", _forward_kernel, plan.forward, {"EVEN": True, "STORE_LSE": False}),
            ("forward", _forward_kernel, plan.forward, {"EVEN": False, "STORE_LSE": True}),
            ("query gradient", _query_gradient_kernel, plan.query_gradient, {"EVEN": False}),
            ("key gradient", _key_gradient_kernel, plan.key_gradient, {}),
        ):
            constants = head_constants(dim, tile, torch.bfloat16) | flags
            cases.append(case_of(f"{name} {dim}", kernel, constants, launch_options(tile)))
        constants = {"HEAD": dim, "HEADS_PADDED": 16, "HALF_PADDED": triton.next_power_of_2(dim // 2)}
        constants |= {"PATCHES": ROTARY_PATCHES, "BACKWARDS": False}
        cases.append(case_of(f"rotary {dim}", _rotary_kernel, constants, {"num_warps": 4}))
    return cases
