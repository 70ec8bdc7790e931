"""Attention of a few new tokens over their index lists in Triton: the list split over many programs, then combined.

`reference.attend_indices` is the definition. One token has one program a key/value head at most, far too few for the chip,
so each list is split: every part makes its own softmax, and a second kernel weighs the parts. Everything follows from the
shapes of the arguments, nothing waits for the device, so a step can be captured in a CUDA graph.

B batch, T new tokens of each sequence, S keys, H query heads, G key/value heads, d head dim, K most keys a query selects.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.attention import (
    LOG2_E,
    Tile,
    attend_list,
    check,
    rows_of,
)
from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import (
    dependent_launch,
    device_capability,
    let_next_begin,
    precision_of,
    wait_for_previous,
)
from keyecli.kernels.fp8 import element_type, readable
from keyecli.kernels.reference import Branches
from keyecli.kernels.unions import GROUP

# About two programs for each processor of the largest chips (132): enough rows on their way to keep the memory busy.
PROGRAMS = 256
# The combining kernel holds all parts of a row in registers.
MOST_PARTS = 64


def tile_of(capability: int, element_bytes: int) -> Tile:
    """By compute capability (0: the interpreter) and bytes of an element."""
    if capability == 0:
        return Tile(16, 4, 1)
    return Tile(64, 4, 2) if element_bytes == 2 else Tile(32, 4, 1)


def stages_of(tile: Tile, as_queries: bool) -> int:
    """Stages of the software pipeline; `as_queries`: keys have the queries' type. Others are converted on their way, and what
    the pipeline brings into shared memory would have to leave it for that: they come straight into registers."""
    return tile.stages if as_queries else 1


def parts_of(groups: int, length: int, tile_keys: int) -> tuple[int, int]:
    """In how many parts a list of `length` entries is split, and how many entries, whole tiles, a part has.

    As one token alone wants it: a token's sums must not depend on how many others there are.
    """
    wanted = max(1, min(PROGRAMS // groups, MOST_PARTS, triton.cdiv(length, tile_keys)))
    entries = triton.cdiv(triton.cdiv(length, wanted), tile_keys) * tile_keys
    return triton.cdiv(length, entries), entries


def decode_workspace(q: Tensor, k: Tensor, indices: Tensor) -> Tensor:
    """The fp32 memory that `decode_attention` needs for arguments of these shapes, for callers that keep it."""
    batch, tokens, heads, dim = q.shape
    tile = tile_of(device_capability(q.device), q.element_size())
    parts, _ = parts_of(k.shape[2], indices.shape[-1], tile.keys)
    return torch.empty(batch * tokens * heads * parts * (dim + 2), dtype=torch.float32, device=q.device)


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    branches: Branches | None = None,
) -> Tensor:
    """Grouped-query attention of new tokens over their own keys: the output of `reference.attend_indices`.

    q: [B, T, H, d]; k, v: [B, S, G, d], also FP8, any strides (cache buffers are read in place, whatever stands in rows that
    nobody selects), with `branches` [1, rows, G, d]; indices: int32 [B, T, K], −1 for none. out: contiguous [B, T, H, d] in q's
    type, and workspace, as `decode_workspace` makes it, spare the allocations. Returns `out`; 0 for a token without keys. No
    gradients.
    """
    batch, tokens, heads, dim = q.shape
    if branches is None:
        check(q, k, v, indices)
    else:
        check(q, k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), indices)
    groups, length = k.shape[2], indices.shape[-1]
    q, k, v, indices = rows_of(q), rows_of(k), rows_of(v), indices.to(torch.int32).contiguous()
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if workspace is None:
        workspace = decode_workspace(q, k, indices)
    tile = tile_of(device_capability(q.device), q.element_size())
    parts, entries = parts_of(groups, length, tile.keys)
    rows = batch * tokens * heads
    if not out.is_contiguous() or out.shape != q.shape or workspace.numel() < rows * parts * (dim + 2):
        raise ValueError("out or workspace do not suit the arguments")
    # Branches share the buffers, so that only their rows tell them apart.
    shared, room = (k.shape[1], 0) if branches is None else (branches.shared, branches.room)
    strides = [0 if branches and axis == 0 else cache.stride(axis) for cache in (k, v) for axis in range(3)]
    _part_kernel[(batch * tokens * groups * parts,)](
        q, readable(k), readable(v), indices, workspace, tokens, length, groups, parts, entries, rows, shared, room,
        *q.stride()[:3], *strides, dim**-0.5 * LOG2_E.value,
        RATIO=heads // groups, DIM=dim, KEYS=tile.keys, PRECISION=precision_of(q.dtype),
        num_warps=tile.warps, num_stages=stages_of(tile, k.dtype == q.dtype), **dependent_launch(q.device),
    )  # fmt: skip
    _combine_kernel[(rows,)](
        workspace, out, parts, rows, DIM=dim, PARTS=triton.next_power_of_2(parts), num_warps=4,
        **dependent_launch(q.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "shared", "room"])
def _part_kernel(
    q,
    k,
    v,
    indices,
    workspace,
    tokens,
    length,
    key_heads,
    parts,
    entries,
    rows,
    shared,
    room,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_key,
    k_head,
    v_batch,
    v_key,
    v_head,
    scale,
    RATIO: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One part of one token's list for one key/value head.

    The workspace holds sums [rows, parts, DIM], then maxima and denominators [rows, parts].
    """
    let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
    part = tl.program_id(0) % parts
    key_head = tl.program_id(0) // parts % key_heads
    row = (tl.program_id(0) // parts // key_heads).to(tl.int64)
    batch = row // tokens
    token = row % tokens
    dims = tl.arange(0, DIM)
    heads = tl.arange(0, GROUP)
    inside = heads < RATIO
    head = (key_head * RATIO + heads).to(tl.int64)
    q_rows = q + batch * q_batch + token * q_token + head * q_head
    queries = tl.load(q_rows[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
    begin = part * entries
    sums, maximum, total = attend_list(
        queries,
        k + batch * k_batch + key_head.to(tl.int64) * k_head,
        v + batch * v_batch + key_head.to(tl.int64) * v_head,
        indices + row * length,
        begin,
        tl.minimum(begin + entries, length),
        k_key,
        v_key,
        shared,
        (batch * room).to(tl.int32),
        scale,
        KEYS,
        DIM,
        PRECISION,
    )
    place = (row * (key_heads * RATIO) + head) * parts + part
    tl.store(workspace + place[:, None] * DIM + dims[None, :], sums, mask=inside[:, None])
    statistics = workspace + tl.cast(rows, tl.int64) * parts * DIM
    tl.store(statistics + place, maximum, mask=inside)
    tl.store(statistics + tl.cast(rows, tl.int64) * parts + place, total, mask=inside)


@triton.jit
def _combine_kernel(
    workspace, out, parts, rows, DIM: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Weigh one row's parts by their largest logits."""
    let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM)
    part = tl.arange(0, PARTS)
    there = part < parts
    place = row * parts + part
    statistics = workspace + tl.cast(rows, tl.int64) * parts * DIM
    maximum = tl.load(statistics + place, mask=there, other=float("-inf"))
    total = tl.load(statistics + tl.cast(rows, tl.int64) * parts + place, mask=there, other=0.0)
    sums = tl.load(workspace + place[:, None] * DIM + dims[None, :], mask=there[:, None], other=0.0)
    largest = tl.max(maximum, 0)
    weights = tl.exp2(maximum - tl.where(largest == float("-inf"), 0.0, largest))
    whole = tl.sum(weights * total, 0)
    result = tl.sum(weights[:, None] * sums, 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * DIM + dims, result.to(out.dtype.element_ty))


def compile_cases(capability: int) -> list[CompileCase]:
    """Both kernels as the 30B model launches them for one token of 2048 selected keys, and in fp32; also over FP8."""
    cases = []
    fp8 = element_type(capability)
    for kind, element_bytes, dim, key_kind in (
        ("bf16", 2, 128, "bf16"), ("bf16", 2, 64, "bf16"), ("fp32", 4, 128, "fp32"), ("bf16", 2, 128, fp8)
    ):  # fmt: skip
        tile = tile_of(capability, element_bytes)
        precision = "ieee" if kind == "fp32" else "tf32"
        constants: dict[str, Any] = {"RATIO": 8, "DIM": dim, "KEYS": tile.keys, "PRECISION": precision}
        constants["DEPENDENT"] = capability >= 90
        tensors = {"q": f"*{kind}", **dict.fromkeys(("k", "v"), f"*{key_kind}")}
        tensors |= {"indices": "*i32", "workspace": "*fp32"}
        counts = dict.fromkeys(
            ("tokens", "length", "key_heads", "parts", "entries", "rows", "shared", "room"), "i32"
        )
        strides = {f"{name}": "i64" for name in _part_kernel.arg_names if name[1:2] == "_"}
        signature = {**tensors, **counts, **strides, "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
        aligned = (*tensors, *strides, "length", "entries")
        stages = stages_of(tile, key_kind == kind)
        name = f"{kind} {dim}" if key_kind == kind else f"{kind} {dim} over fp8"
        cases.append(
            CompileCase(f"part {name}", _part_kernel, signature, constants, tile.warps, stages, aligned)
        )
        if key_kind != kind:
            continue  # the parts are combined as they were
        combine = {"workspace": "*fp32", "out": f"*{kind}", "parts": "i32", "rows": "i32"}
        combine |= dict.fromkeys(("DIM", "PARTS", "DEPENDENT"), "constexpr")
        cases.append(
            CompileCase(
                f"combine {name}",
                _combine_kernel,
                combine,
                {"DIM": dim, "PARTS": 32, "DEPENDENT": capability >= 90},
                divisible_by_16=("workspace", "out"),
            )
        )
    return cases
