"""What stands between the matrix products of new tokens, in Triton: residual and norm; norms, rotary and cache.

`reference.add_norm` and `reference.place_projections` are the definitions. A step of one token spends as long on starting
kernels as on reading weights, and a prompt's tokens would be read and written six times over, so all that happens to a
projection before attention is one kernel, and all that happens between two blocks of a step is another.

B sequences of T new tokens each, S room of the cache, D width, H query heads, G key/value heads, d head dim, J indexer
heads, e indexer dim. A row of the joint projection is q, k, v, the indexer's queries, its gates, its key:
W = (H + 2G) · d + J · e + J + e.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import dependent_launch, let_next_begin, wait_for_previous
from keyecli.kernels.fp8 import as_written, writable
from keyecli.kernels.reference import Branches, StepShape


@triton.jit
def _add_norm_kernel(
    x, delta, weight, normed, x_row, delta_row, D, eps,
    ADD: tl.constexpr, D_PADDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x += delta, normed = x / rms(x) · weight, one row a program. ADD false: there is no delta."""
    let_next_begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D_PADDED)
    inside = columns < D
    kind = x.dtype.element_ty
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(DEPENDENT)
    value = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * delta_row + columns, mask=inside, other=0.0).to(tl.float32)
        # Rounded, as what the next block adds to is.
        value = value.to(kind).to(tl.float32)
        tl.store(x + row * x_row + columns, value.to(kind), mask=inside)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(normed + row * D + columns, (value * scale * gain).to(kind), mask=inside)


@triton.jit
def _rotated(value, other, cos, sin, KIND: tl.constexpr):
    """value · cos + other · sin with each product rounded, as PyTorch does it."""
    first = (value * cos).to(KIND).to(tl.float32)
    second = (other * sin).to(KIND).to(tl.float32)
    return (first + second).to(KIND)


@triton.jit
def _head(source, START, HALF: tl.constexpr, columns, inside):
    """Both halves of a head as fp32."""
    first = tl.load(source + START + columns, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + START + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=["T", "shared", "room"])
def _place_kernel(
    projected, cos, sin, index_cos, index_sin, lengths, T, q_weight, k_weight, iq_weight, ik_weight, ik_bias,
    q, k_cache, v_cache, iq, gates, ik_cache, shared, room, projected_row,
    k_batch, k_token, v_batch, v_token, ik_batch, ik_token, eps, index_eps,
    H: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, J: tl.constexpr, J_PADDED: tl.constexpr,
    INDEX_DIM: tl.constexpr, HALF_PADDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One head of one token a program: the query heads, the key/value heads, the indexer's queries, its key with its gates.

    Heads run side by side: they lie beside each other, and a GPU takes few programs along its second axis.
    """
    let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
    parts: tl.constexpr = H + G + J + 1
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts).to(tl.int64)
    sequence = token // T
    place = tl.load(lengths + sequence).to(tl.int64) + token % T
    place += tl.where(place < shared, 0, sequence * room)
    row = projected + token * projected_row
    kind: tl.constexpr = projected.dtype.element_ty
    half: tl.constexpr = DIM // 2
    index_half: tl.constexpr = INDEX_DIM // 2
    columns = tl.arange(0, HALF_PADDED)
    if part < H + G:
        inside = columns < half
        is_query = part < H
        first, second = _head(row, part * DIM, half, columns, inside)
        scale = 1 / tl.sqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / DIM + eps)
        weight = q_weight if is_query else k_weight
        gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        other_gain = tl.load(weight + half + columns, mask=inside, other=0.0).to(tl.float32)
        first = (first * scale * gain).to(kind).to(tl.float32)
        second = (second * scale * other_gain).to(kind).to(tl.float32)
        # Both halves of a table are the same.
        cosine = tl.load(cos + token * DIM + columns, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + token * DIM + columns, mask=inside, other=0.0).to(tl.float32)
        low = _rotated(first, -second, cosine, sine, kind)
        high = _rotated(second, first, cosine, sine, kind)
        if is_query:
            target = q + (token * H + part) * DIM
            tl.store(target + columns, low, mask=inside)
            tl.store(target + half + columns, high, mask=inside)
        else:
            head = part - H
            held: tl.constexpr = k_cache.dtype.element_ty
            k_place = k_cache + sequence * k_batch + place * k_token + head * DIM
            tl.store(k_place + columns, as_written(low, held), mask=inside)
            tl.store(k_place + half + columns, as_written(high, held), mask=inside)
            source = row + (H + G + head) * DIM
            v_place = v_cache + sequence * v_batch + place * v_token + head * DIM
            low = tl.load(source + columns, mask=inside)
            high = tl.load(source + half + columns, mask=inside)
            tl.store(v_place + columns, as_written(low, held), mask=inside)
            tl.store(v_place + half + columns, as_written(high, held), mask=inside)
    else:
        inside = columns < index_half
        head = part - (H + G)
        start = (H + 2 * G) * DIM
        cosine = tl.load(index_cos + token * INDEX_DIM + columns, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(index_sin + token * INDEX_DIM + columns, mask=inside, other=0.0).to(tl.float32)
        if head < J:
            first, second = _head(row, start + head * INDEX_DIM, index_half, columns, inside)
            squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            scale = 1 / tl.sqrt(squares / INDEX_DIM + index_eps)
            gain = tl.load(iq_weight + columns, mask=inside, other=0.0).to(tl.float32)
            other_gain = tl.load(iq_weight + index_half + columns, mask=inside, other=0.0).to(tl.float32)
            first = (first * scale * gain).to(kind).to(tl.float32)
            second = (second * scale * other_gain).to(kind).to(tl.float32)
            target = iq + (token * J + head) * INDEX_DIM
        else:
            heads = tl.arange(0, J_PADDED)
            all_gates = tl.load(row + start + J * INDEX_DIM + heads, mask=heads < J, other=0.0)
            tl.store(gates + token * J + heads, all_gates, mask=heads < J)
            first, second = _head(row, start + J * INDEX_DIM + J, index_half, columns, inside)
            mean = (tl.sum(first, 0) + tl.sum(second, 0)) / INDEX_DIM
            first = tl.where(inside, first - mean, 0.0)
            second = tl.where(inside, second - mean, 0.0)
            squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            scale = 1 / tl.sqrt(squares / INDEX_DIM + index_eps)
            gain = tl.load(ik_weight + columns, mask=inside, other=0.0).to(tl.float32)
            other_gain = tl.load(ik_weight + index_half + columns, mask=inside, other=0.0).to(tl.float32)
            bias = tl.load(ik_bias + columns, mask=inside, other=0.0).to(tl.float32)
            other_bias = tl.load(ik_bias + index_half + columns, mask=inside, other=0.0).to(tl.float32)
            first = (first * scale * gain + bias).to(kind).to(tl.float32)
            second = (second * scale * other_gain + other_bias).to(kind).to(tl.float32)
            target = ik_cache + sequence * ik_batch + place * ik_token
        low = _rotated(first, -second, cosine, sine, kind)
        high = _rotated(second, first, cosine, sine, kind)
        tl.store(target + columns, low, mask=inside)
        tl.store(target + index_half + columns, high, mask=inside)


@triton.jit
def _tables_kernel(
    positions, frequencies, cos, sin, HALF, HALF_PADDED: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Cosines and sines of one token a program, each half of a row the same."""
    let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, HALF_PADDED)
    inside = columns < HALF
    angles = tl.load(positions + token).to(tl.float32) * tl.load(
        frequencies + columns, mask=inside, other=0.0
    )
    cosine = tl.cos(angles).to(cos.dtype.element_ty)
    sine = tl.sin(angles).to(sin.dtype.element_ty)
    place = token * 2 * HALF + columns
    tl.store(cos + place, cosine, mask=inside)
    tl.store(cos + HALF + place, cosine, mask=inside)
    tl.store(sin + place, sine, mask=inside)
    tl.store(sin + HALF + place, sine, mask=inside)


def token_tables(
    positions: Tensor, frequencies: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.token_tables`, where a dozen small kernels would do the work of two."""
    tables = []
    for part in frequencies:
        cos, sin = torch.empty(2, len(positions), 1, 2 * len(part), dtype=dtype, device=positions.device)
        _tables_kernel[(len(positions),)](
            positions, part, cos, sin, len(part), HALF_PADDED=triton.next_power_of_2(len(part)), num_warps=1,
            **dependent_launch(positions.device),
        )  # fmt: skip
        tables += [cos, sin]
    return tables[0], tables[1], tables[2], tables[3]


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """`reference.add_norm`: x [B, D], contiguous rows, becomes x + delta; returns its root-mean-square norm [B, D]."""
    rows, width = x.shape
    normed = torch.empty_like(x)
    _add_norm_kernel[(rows,)](
        x, x if delta is None else delta, weight, normed, x.stride(0), 0 if delta is None else delta.stride(0),
        width, eps, ADD=delta is not None, D_PADDED=triton.next_power_of_2(width), num_warps=8 if width > 1024 else 4,
        **dependent_launch(x.device),
    )  # fmt: skip
    return normed


def place_projections(
    projected: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: Tensor,
    norms: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    caches: tuple[Tensor, Tensor, Tensor],
    shape: StepShape,
    branches: Branches | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.place_projections`; one kernel, no copies, nothing that a CUDA graph cannot hold."""
    k_cache, v_cache, ik_cache = caches
    batch, tokens, width = projected.shape
    kind, device = projected.dtype, projected.device
    rows = projected.reshape(-1, width)
    q = torch.empty((batch, tokens, shape.heads, shape.dim), dtype=kind, device=device)
    iq = torch.empty((batch, tokens, shape.index_heads, shape.index_dim), dtype=kind, device=device)
    gates = torch.empty((batch, tokens, shape.index_heads), dtype=kind, device=device)
    parts = shape.heads + shape.groups + shape.index_heads + 1
    # Branches share the buffers, so that only their rows tell them apart.
    shared, room = (k_cache.shape[1], 0) if branches is None else (branches.shared, branches.room)
    strides = [0 if branches and axis == 0 else cache.stride(axis) for cache in caches for axis in (0, 1)]
    _place_kernel[(parts * batch * tokens,)](
        rows, *(table.contiguous() for table in tables), lengths, tokens, *norms, q, writable(k_cache), writable(v_cache), iq,
        gates, ik_cache, shared, room, rows.stride(0), *strides, shape.eps, shape.index_eps,
        H=shape.heads, G=shape.groups, DIM=shape.dim, J=shape.index_heads, J_PADDED=triton.next_power_of_2(shape.index_heads),
        INDEX_DIM=shape.index_dim, HALF_PADDED=triton.next_power_of_2(max(shape.dim, shape.index_dim) // 2), num_warps=1,
        **dependent_launch(device),
    )  # fmt: skip
    return q, iq, gates


def compile_cases(capability: int) -> list[CompileCase]:
    """The kernels in the 30B shape, bf16; placing into an FP8 cache too."""
    norm = {
        "x": "*bf16",
        "delta": "*bf16",
        "weight": "*bf16",
        "normed": "*bf16",
        "x_row": "i32",
        "delta_row": "i32",
    }
    norm |= {"D": "i32", "eps": "fp32", "ADD": "constexpr", "D_PADDED": "constexpr", "DEPENDENT": "constexpr"}
    sizes: dict[str, Any] = {
        "H": 32,
        "G": 4,
        "DIM": 128,
        "J": 16,
        "J_PADDED": 16,
        "INDEX_DIM": 64,
        "HALF_PADDED": 64,
        "DEPENDENT": capability >= 90,
    }
    place = {}
    for name in _place_kernel.arg_names:
        if name in sizes:
            place[name] = "constexpr"
        elif name in ("eps", "index_eps"):
            place[name] = "fp32"
        elif name.endswith(("_batch", "_token", "_row")):
            place[name] = "i64"
        else:
            place[name] = {"lengths": "*i32", "T": "i32", "shared": "i32", "room": "i32"}.get(name, "*bf16")
    aligned = tuple(name for name, kind in place.items() if kind.startswith("*") or kind == "i64")
    tables = {"positions": "*i64", "frequencies": "*fp32", "cos": "*bf16", "sin": "*bf16", "HALF": "i32"}
    turning: dict[str, Any] = {"HALF_PADDED": 64, "DEPENDENT": capability >= 90}
    return [
        CompileCase(
            "tables", _tables_kernel, tables | dict.fromkeys(turning, "constexpr"), turning, 1, 2, (*tables,)
        ),
        CompileCase(
            "add and norm", _add_norm_kernel, norm,
            {"ADD": True, "D_PADDED": 2048, "DEPENDENT": capability >= 90}, 8, 2,
            ("x", "delta", "weight", "normed", "x_row", "delta_row", "D"),
        ),
        CompileCase("place projections", _place_kernel, place, sizes, 1, 2, aligned),
        CompileCase(
            "place projections into fp8", _place_kernel, place | dict.fromkeys(("k_cache", "v_cache"), "*u8"), sizes,
            1, 2, aligned,
        ),
    ]  # fmt: skip
