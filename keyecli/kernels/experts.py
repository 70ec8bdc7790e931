"""Routing and the routed experts in Triton: `route`, `moe_experts` and `decode_experts`, defined in `reference`.

T tokens, k experts a token, R = T · k routed rows, E experts, D model width, F expert width. A routed row has two numbers: its
source t · k + slot, and its place after sorting by expert. `order` maps places to sources.

Prefill: the rows are sorted by expert on the device and cut into tiles that never mix experts. Nothing is padded and the host
waits for nothing: buffers hold the most tiles there can be, ceil(R / rows) + E, and the device knows how many are in use.
One kernel gathers rows of x and makes silu(gate) · up, one multiplies by `down` and writes scaled rows at their sources, one
adds up each token's k rows in the order of its slots. Every sum has one order, so results repeat to the bit.

Decode (a few new tokens): sorting would cost more than it saves, so every (token, slot) multiplies its vector by its expert's
matrices in two kernels that only stream weights, and finds out by itself which expert that is. With low-rank additions a kernel
of `low_rank` stands between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import (
    dependent_launch,
    device_capability,
    let_next_begin,
    precision_of,
    wait_for_previous,
)
from keyecli.kernels.low_rank import (
    WITHOUT_DOWN,
    WITHOUT_GATE_UP,
    RoutedFactors,
    routed_inner,
    source_low,
)
from keyecli.kernels.reference import LowRank

# With fewer rows an expert than this, on average, reading the weights bounds the time and tall tiles would be mostly empty.
CROWDED_ROWS = 48
# Tokens that go through the workspace at a time: 1.4 GiB in the 30B shape, and each weight is read for 2048 rows.
PREFILL_TOKENS = 32768
SORT_ROWS, SCAN_BLOCKS, MAP_TILES = 128, 1024, 32
COMBINE_COLUMNS, COMBINE_WARPS = 2048, 8
ROUTE_TOKENS = 16
# Of a thread of the decode kernels with additions, in 16-bit types: what those without take. The compiler, left alone, takes half
# as many again for some ranks, and then a multiprocessor holds fewer programs.
ADAPTED_REGISTERS = 128
CHOOSE_WARPS = 8


@dataclass(frozen=True)
class Tile:
    """Output columns, contraction length a step, warps and pipeline stages of one kernel."""

    columns: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The tiles of every kernel on one kind of device.

    rows: rows of one expert in a tile, shared by all kernels over sorted rows. gate_up: `columns` of gate and as many of up.
    backward: as gate_up, with a third accumulator. weight_gradient: a tile is `gradient_rows` × `columns`, `inner` rows a step.
    decode_gate_up: matrix-vector products, `inner` × `columns` weights of each a step, a sum shared by `decode_splits` programs.
    decode_down: the same, all steps of a program at once, whose weights must fit its registers. tma: read by tensor descriptors
    where possible.
    """

    rows: int
    gate_up: Tile
    down: Tile
    backward: Tile
    gradient_rows: int
    weight_gradient: Tile
    decode_gate_up: Tile
    decode_down: Tile
    decode_splits: int = 2
    tma: bool = False


def plan_for(capability: int, itemsize: int, crowded: bool = True) -> Plan:
    """Tiles for a compute capability (0: the interpreter), an element size, and many or few rows an expert."""
    if capability == 0:
        small = Tile(16, 16, 1, 1)
        return Plan(16, small, small, small, 16, small, small, small)
    decode_gate_up, decode_down = Tile(32, 128, 4, 3), Tile(64, 256, 8, 1)
    if itemsize == 4:
        # Without tensor cores the accumulators and the operands of every multiplication sit in registers.
        decode_gate_up, decode_down = Tile(32, 64, 4, 2), Tile(16, 256, 4, 1)
        single = Tile(32, 16, 4, 2)
        return Plan(64, single, Tile(64, 16, 4, 2), single, 64, single, decode_gate_up, decode_down)
    if capability == 90:
        # 128 × 256 accumulators are what half the registers of a multiprocessor hold; a smaller tile would ask more of the
        # second-level cache than it gives (85 operations a byte here, 64 at 128 × 128).
        if crowded:
            return Plan(
                rows=128,
                gate_up=Tile(128, 64, 8, 4),
                down=Tile(256, 64, 8, 4),
                backward=Tile(64, 64, 8, 3),
                gradient_rows=128,
                # The rows are found through `order`, so a stage holds half of what it says.
                weight_gradient=Tile(256, 64, 8, 5),
                decode_gate_up=decode_gate_up,
                decode_down=decode_down,
                tma=True,
            )
        narrow = Tile(64, 64, 4, 4)
        return Plan(
            rows=64,
            gate_up=narrow,
            down=Tile(128, 64, 4, 4),
            backward=Tile(32, 64, 4, 3),
            gradient_rows=128,
            weight_gradient=Tile(128, 64, 8, 5),
            decode_gate_up=decode_gate_up,
            decode_down=decode_down,
            tma=True,
        )
    rows = 128 if crowded else 64
    warps = 8 if crowded else 4
    return Plan(
        rows=rows,
        gate_up=Tile(64, 32, warps, 4),
        down=Tile(128, 32, warps, 4),
        backward=Tile(32, 32, warps, 3),
        gradient_rows=128,
        weight_gradient=Tile(128, 32, 8, 4),
        decode_gate_up=decode_gate_up,
        decode_down=decode_down,
    )


# Sorting by expert: count, scan, place. It is stable, so the rows of an expert are in token order and its sums repeat.


@triton.jit
def _count_kernel(experts, counts, R, blocks, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """counts[e, block]: how many of the block's rows go to expert e."""
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + rows, mask=rows < R, other=-1).to(tl.int32)
    bins = tl.arange(0, E_PADDED)
    count = tl.sum((expert[:, None] == bins[None, :]).to(tl.int32), 0)
    tl.store(counts + bins * blocks + block, count, mask=bins < E)


@triton.jit
def _scan_kernel(counts, totals, blocks, BLOCK: tl.constexpr):
    """One expert: counts[e, :] becomes the number of its rows in earlier blocks, totals[e] the number of all."""
    expert = tl.program_id(0)
    before = tl.full((), 0, tl.int32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        count = tl.load(counts + expert * blocks + block, mask=block < blocks, other=0)
        tl.store(counts + expert * blocks + block, before + tl.cumsum(count, 0) - count, mask=block < blocks)
        before += tl.sum(count, 0)
    tl.store(totals + expert, before)


@triton.jit
def _place_kernel(
    experts, counts, totals, order, R, blocks, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """order[place] = source, where place = rows of lower experts + rows of this expert before."""
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + rows, mask=rows < R, other=-1).to(tl.int32)
    bins = tl.arange(0, E_PADDED)
    total = tl.load(totals + bins, mask=bins < E, other=0)
    base = tl.cumsum(total, 0) - total + tl.load(counts + bins * blocks + block, mask=bins < E, other=0)
    chosen = (expert[:, None] == bins[None, :]).to(tl.int32)
    place = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + base[None, :]), 1)
    tl.store(order + place, rows, mask=rows < R)


@triton.jit
def _map_tiles_kernel(
    totals, tile_map, tiles, E: tl.constexpr, E_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """tile_map [3, tiles]: the expert of a tile, its first place, and the end of the expert's places; totals[E]: tiles in use."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bins = tl.arange(0, E_PADDED)
    total = tl.load(totals + bins, mask=bins < E, other=0)
    end = tl.cumsum(total, 0)
    count = (total + ROWS - 1) // ROWS
    tile_end = tl.cumsum(count, 0)
    # The expert of a tile is the number of experts whose tiles all come before it.
    expert = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), 1)
    own = (expert[:, None] == bins[None, :]).to(tl.int32)
    first = tl.sum(own * (end - total - (tile_end - count) * ROWS)[None, :], 1) + tile * ROWS
    last = tl.sum(own * end[None, :], 1)
    used = (tile < tiles) & (expert < E)
    tl.store(tile_map + tile, expert, mask=used)
    tl.store(tile_map + tiles + tile, first, mask=used)
    tl.store(tile_map + 2 * tiles + tile, last, mask=used)
    if tl.program_id(0) == 0:
        tl.store(totals + E, tl.sum(count, 0))


# Prefill.


@triton.jit
def _gate_up_kernel(
    x,
    gate_up,
    order,
    totals,
    tile_map,
    hidden,
    tiles,
    x_stride,
    D,
    F,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden[place] = silu(x · gate) · (x · up), a tile of places and columns at a time.

    Column tiles of one row tile are neighbours in the grid, so its rows of x and its expert's weights stay in the cache.
    """
    column_tiles = tl.cdiv(F, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    column_start = (tl.program_id(0) % column_tiles) * COLUMNS
    if tile >= tl.load(totals + E):
        return
    inner = tl.arange(0, INNER)
    columns = column_start + tl.arange(0, COLUMNS)
    expert = tl.load(tile_map + tile)
    places = tl.load(tile_map + tiles + tile) + tl.arange(0, ROWS)
    valid = places < tl.load(tile_map + 2 * tiles + tile)
    # Rows past the end compute token 0 and are not stored: cheaper than masking every load.
    tokens = tl.load(order + places, mask=valid, other=0) // TOP_K
    x_pointers = x + tokens.to(tl.int64)[:, None] * x_stride + inner[None, :]
    if not TMA:
        matrix = gate_up + expert.to(tl.int64) * D * (2 * F)
        weight_pointers = matrix + inner[:, None] * (2 * F) + columns[None, :]
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        if EVEN_INNER:
            rows = tl.load(x_pointers + start)
        else:
            rows = tl.load(x_pointers + start, mask=(start + inner < D)[None, :], other=0.0)
        if TMA:
            gate_weight = gate_up.load([expert * D + start, column_start])
            up_weight = gate_up.load([expert * D + start, F + column_start])
        else:
            if EVEN_INNER and EVEN_COLUMNS:
                gate_weight = tl.load(weight_pointers)
                up_weight = tl.load(weight_pointers + F)
            else:
                present = (start + inner < D)[:, None] & (columns < F)[None, :]
                gate_weight = tl.load(weight_pointers, mask=present, other=0.0)
                up_weight = tl.load(weight_pointers + F, mask=present, other=0.0)
            weight_pointers += INNER * 2 * F
        gate = tl.dot(rows, gate_weight, gate, input_precision=PRECISION)
        up = tl.dot(rows, up_weight, up, input_precision=PRECISION)
    activated = gate / (1 + tl.exp(-gate)) * up
    stored = valid[:, None] & (columns < F)[None, :]
    pointers = hidden + places.to(tl.int64)[:, None] * F + columns[None, :]
    tl.store(pointers, activated.to(hidden.dtype.element_ty), mask=stored)


@triton.jit
def _rows_kernel(
    rows_in,
    weight,
    order,
    totals,
    tile_map,
    scale,
    routed,
    tiles,
    K,
    N,
    E: tl.constexpr,
    SCALED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """routed[source] = scale[source] · rows_in[place] · weight[expert]: the down projection, and the way back to x.

    rows_in: [R, K] by place; weight: [E, K, N], or [E, N, K] when TRANSPOSED; routed: [R, N] by source.
    """
    column_tiles = tl.cdiv(N, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    column_start = (tl.program_id(0) % column_tiles) * COLUMNS
    if tile >= tl.load(totals + E):
        return
    inner = tl.arange(0, INNER)
    columns = column_start + tl.arange(0, COLUMNS)
    expert = tl.load(tile_map + tile)
    first = tl.load(tile_map + tiles + tile)
    places = first + tl.arange(0, ROWS)
    valid = places < tl.load(tile_map + 2 * tiles + tile)
    if not TMA:
        # Places past the end read row 0, which exists, and are not stored.
        row_pointers = rows_in + tl.where(valid, places, 0).to(tl.int64)[:, None] * K + inner[None, :]
        matrix = weight + expert.to(tl.int64) * K * N
        if TRANSPOSED:
            weight_pointers = matrix + columns[:, None] * K + inner[None, :]
        else:
            weight_pointers = matrix + inner[:, None] * N + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, INNER):
        if TMA:
            # Places past the end are rows of the next expert, or zeros at the very end.
            rows = rows_in.load([first, start])
            if TRANSPOSED:
                part = tl.trans(weight.load([expert * N + column_start, start]))
            else:
                part = weight.load([expert * K + start, column_start])
        else:
            if EVEN_INNER:
                rows = tl.load(row_pointers + start)
            else:
                rows = tl.load(row_pointers + start, mask=(start + inner < K)[None, :], other=0.0)
            if TRANSPOSED:
                if EVEN_INNER and EVEN_COLUMNS:
                    part = tl.trans(tl.load(weight_pointers))
                else:
                    present = (columns < N)[:, None] & (start + inner < K)[None, :]
                    part = tl.trans(tl.load(weight_pointers, mask=present, other=0.0))
                weight_pointers += INNER
            else:
                if EVEN_INNER and EVEN_COLUMNS:
                    part = tl.load(weight_pointers)
                else:
                    present = (start + inner < K)[:, None] & (columns < N)[None, :]
                    part = tl.load(weight_pointers, mask=present, other=0.0)
                weight_pointers += INNER * N
        total = tl.dot(rows, part, total, input_precision=PRECISION)
    sources = tl.load(order + places, mask=valid, other=0)
    if SCALED:
        total *= tl.load(scale + sources, mask=valid, other=0.0).to(tl.float32)[:, None]
    stored = valid[:, None] & (columns < N)[None, :]
    pointers = routed + sources.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(pointers, total.to(routed.dtype.element_ty), mask=stored)


@triton.jit
def _combine_kernel(routed, out, D, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """out[token] = Σ over slots, in their order, of routed[token · k + slot]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in tl.static_range(TOP_K):
        pointers = routed + (token * TOP_K + slot) * D + columns
        total += tl.load(pointers, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, total.to(out.dtype.element_ty), mask=columns < D)


# Decode.


@triton.jit
def choose_kernel(
    logits,
    weights,
    experts,
    stride,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`_route_kernel` for one token a program: every expert counts those before it, all at once, since the rounds of a search
    would take longer than a whole expert."""
    let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
    token = tl.program_id(0)
    bins = tl.arange(0, E_PADDED)
    logit = tl.load(logits + token * stride + bins, mask=bins < E, other=float("-inf")).to(tl.float32)
    power = tl.where(bins < E, tl.exp(logit - tl.max(logit, 0)), 0.0)
    total = tl.sum(power, 0)
    # A row with NaN still gets k different experts, all of them inside the tensors; its weights are NaN.
    share = tl.where(total == total, power / total, 0.0)
    share = tl.where(bins < E, share, -1.0)
    ahead = share[None, :] > share[:, None]
    ahead |= (share[None, :] == share[:, None]) & (bins[None, :] < bins[:, None])
    rank = tl.sum(ahead.to(tl.int32), 1)
    # Back to one value a thread: the sum stands where its rows did.
    share = tl.where(total == total, share, float("nan"))
    if NORMALISE:
        share = share / tl.sum(tl.where(rank < TOP_K, share, 0.0), 0)
    tl.store(weights + token * TOP_K + rank, share, mask=rank < TOP_K)
    tl.store(experts + token * TOP_K + rank, bins, mask=rank < TOP_K)


@triton.jit
def _decode_gate_up_kernel(
    x,
    gate_up,
    experts,
    sums,
    arrived,
    x_stride,
    first,
    low,
    D,
    F,
    down_tiles,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    DOWN_TILES_PADDED: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PART: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """sums[split, source] = x · gate and x · up over a part of D, for one source and a block of columns; clears the next
    kernel's counters. One program behind the last block of columns does the product with A, where there is one."""
    wait_for_previous(DEPENDENT)
    # Not before, so that the next kernel finds the experts chosen without waiting.
    let_next_begin(DEPENDENT)
    source = tl.program_id(1)
    token = source // TOP_K
    split = tl.program_id(2)
    if (tl.program_id(0) == 0) and (source % TOP_K == 0) and (split == 0):
        counters = tl.arange(0, DOWN_TILES_PADDED)
        zeros = tl.zeros([DOWN_TILES_PADDED], tl.int32)
        tl.store(arrived + token * down_tiles + counters, zeros, mask=counters < down_tiles)
    expert = tl.load(experts + source).to(tl.int64)
    if first is not None:
        blocks = tl.cdiv(F, COLUMNS)
        if tl.program_id(0) == blocks:
            # Not shared between splits: as much to read as for any of the others, and all of them run at once for one token.
            if split == 0:
                own = x + token.to(tl.int64) * x_stride
                routed_inner(own, first, low, source, expert, 0, D, PARTS, RANK, RANKS, PART)
            return
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    span = tl.cdiv(tl.cdiv(D, INNER), SPLITS) * INNER
    begin = split * span
    end = tl.minimum(begin + span, D)
    x_pointers = x + token.to(tl.int64) * x_stride + inner
    gate_pointers = gate_up + expert * D * (2 * F) + (begin + inner)[:, None] * (2 * F) + columns[None, :]
    # Products pile up elementwise, and the sum across threads is taken once, after the loop.
    gate = tl.zeros([INNER, COLUMNS], tl.float32)
    up = tl.zeros([INNER, COLUMNS], tl.float32)
    for start in tl.range(begin, end, INNER, num_stages=STAGES):
        if EVEN:
            vector = tl.load(x_pointers + start)
            gate_weight = tl.load(gate_pointers, eviction_policy="evict_first")
            up_weight = tl.load(gate_pointers + F, eviction_policy="evict_first")
        else:
            vector = tl.load(x_pointers + start, mask=start + inner < D, other=0.0)
            present = (start + inner < D)[:, None] & (columns < F)[None, :]
            gate_weight = tl.load(gate_pointers, mask=present, other=0.0)
            up_weight = tl.load(gate_pointers + F, mask=present, other=0.0)
        vector = vector.to(tl.float32)[:, None]
        gate += vector * gate_weight.to(tl.float32)
        up += vector * up_weight.to(tl.float32)
        gate_pointers += INNER * 2 * F
    place = sums + (split * tl.num_programs(1) + source) * (2 * F) + columns
    tl.store(place, tl.sum(gate, 0), mask=columns < F)
    tl.store(place + F, tl.sum(up, 0), mask=columns < F)


@triton.jit
def _decode_down_kernel(
    sums,
    down,
    experts,
    weights,
    partial,
    arrived,
    out,
    low,
    second,
    factor_scale,
    D,
    F,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """partial[source] = silu(gate) · up · down; whichever of a token's k programs comes last adds them up, in slot order.

    SPLITS 0: `sums` are silu(gate) · up already, [source, F]. With `second` what B makes of `low` is added.

    So the grid is k times larger than the output asks for, and still neither a float atomic nor a third kernel is needed.
    The experts were chosen before the kernel that this one follows, which lets it begin only then: a program's weights, all
    of them, are on their way while gate and up are still worked out.
    """
    let_next_begin(DEPENDENT)
    source = tl.program_id(1)
    token = source // TOP_K
    expert = tl.load(experts + source).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    weight_pointers = down + expert * F * D + inner[:, None] * D + columns[None, :]
    held = ()
    for chunk in tl.static_range(CHUNKS):
        if EVEN:
            tile = tl.load(weight_pointers + chunk * INNER * D, eviction_policy="evict_first")
        else:
            present = (chunk * INNER + inner < F)[:, None] & (columns < D)[None, :]
            tile = tl.load(weight_pointers + chunk * INNER * D, mask=present, other=0.0)
        held += (tile,)  # type: ignore[assignment]
    kind: tl.constexpr = down.dtype.element_ty
    wait_for_previous(DEPENDENT)
    total = tl.zeros([INNER, COLUMNS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        row = chunk * INNER + inner
        if SPLITS == 0:
            hidden = tl.load(sums + source * F + row, mask=row < F, other=0.0)
        else:
            gate = tl.zeros([INNER], tl.float32)
            up = tl.zeros([INNER], tl.float32)
            for split in tl.static_range(SPLITS):
                place = sums + (split * tl.num_programs(1) + source) * (2 * F) + row
                gate += tl.load(place, mask=row < F, other=0.0)
                up += tl.load(place + F, mask=row < F, other=0.0)
            # Rounded, as the definition's activations are.
            hidden = (gate / (1 + tl.exp(-gate)) * up).to(kind).to(tl.float32)
        total += hidden[:, None] * held[chunk].to(tl.float32)
    routed = tl.sum(total, 0)
    if second is not None:
        ranks = tl.arange(0, RANKS)
        present = (ranks < RANK)[:, None] & (columns < D)[None, :]
        places = second + (expert * RANK + ranks)[:, None] * D + columns[None, :]
        factors = tl.load(places, mask=present, other=0.0).to(kind).to(tl.float32)
        vector = source_low(low, source, factor_scale, kind, PARTS, PARTS_PADDED, RANKS)
        routed += tl.sum(vector[:, None] * factors, 0)
    tl.store(partial + source * D + columns, routed, mask=columns < D)
    # Every thread's part is stored before one thread announces the program; acquire and release order it for the reader.
    tl.debug_barrier()
    before = tl.atomic_add(arrived + token * tl.num_programs(0) + tl.program_id(0), 1, sem="acq_rel")
    if before == TOP_K - 1:
        mixed = tl.zeros([COLUMNS], tl.float32)
        for slot in tl.static_range(TOP_K):
            chosen = token * TOP_K + slot
            # Past the first-level cache, which is not coherent with what other multiprocessors wrote.
            part = tl.load(partial + chosen * D + columns, mask=columns < D, other=0.0, cache_modifier=".cg")
            mixed += part * tl.load(weights + chosen)
        tl.store(out + token * D + columns, mixed.to(out.dtype.element_ty), mask=columns < D)


# Backward.


@triton.jit
def _gate_up_backward_kernel(
    x,
    gradient,
    gate_up,
    down,
    weights,
    order,
    totals,
    tile_map,
    gate_up_gradient,
    scaled_hidden,
    weight_parts,
    tiles,
    x_stride,
    D,
    F,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gate and up again, and beside them gradient · downᵀ: everything elementwise about a tile is then known.

    gradient: [T, D], contiguous. Writes by place the gradients of gate and up [R, 2F] and weight · hidden [R, F] (for the
    gradient of `down`), and by source this tile's part of the gradient of the routing weight [R, column tiles].
    """
    column_tiles = tl.cdiv(F, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    if tile >= tl.load(totals + E):
        return
    expert = tl.load(tile_map + tile)
    places = tl.load(tile_map + tiles + tile) + tl.arange(0, ROWS)
    valid = places < tl.load(tile_map + 2 * tiles + tile)
    sources = tl.load(order + places, mask=valid, other=0)
    tokens = (sources // TOP_K).to(tl.int64)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    x_pointers = x + tokens[:, None] * x_stride + inner[None, :]
    gradient_pointers = gradient + tokens[:, None] * D + inner[None, :]
    matrix = expert.to(tl.int64) * D * F
    gate_pointers = gate_up + 2 * matrix + inner[:, None] * (2 * F) + columns[None, :]
    up_pointers = gate_pointers + F
    down_pointers = down + matrix + columns[:, None] * D + inner[None, :]
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    back = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, INNER):
        if EVEN_INNER:
            rows = tl.load(x_pointers)
            gradient_rows = tl.load(gradient_pointers)
        else:
            rows = tl.load(x_pointers, mask=(start + inner < D)[None, :], other=0.0)
            gradient_rows = tl.load(gradient_pointers, mask=(start + inner < D)[None, :], other=0.0)
        if EVEN_INNER and EVEN_COLUMNS:
            gate_weight = tl.load(gate_pointers)
            up_weight = tl.load(up_pointers)
            down_weight = tl.load(down_pointers)
        else:
            present = (start + inner < D)[:, None] & (columns < F)[None, :]
            gate_weight = tl.load(gate_pointers, mask=present, other=0.0)
            up_weight = tl.load(up_pointers, mask=present, other=0.0)
            present_down = (columns < F)[:, None] & (start + inner < D)[None, :]
            down_weight = tl.load(down_pointers, mask=present_down, other=0.0)
        gate = tl.dot(rows, gate_weight, gate, input_precision=PRECISION)
        up = tl.dot(rows, up_weight, up, input_precision=PRECISION)
        back = tl.dot(gradient_rows, tl.trans(down_weight), back, input_precision=PRECISION)
        x_pointers += INNER
        gradient_pointers += INNER
        gate_pointers += INNER * 2 * F
        up_pointers += INNER * 2 * F
        down_pointers += INNER
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    # Columns past F were read as zeros, so they add nothing here.
    part = tl.sum(silu * up * back, 1)
    tl.store(weight_parts + sources.to(tl.int64) * column_tiles + column_tile, part, mask=valid)
    weight = tl.load(weights + sources, mask=valid, other=0.0).to(tl.float32)[:, None]
    stored = valid[:, None] & (columns < F)[None, :]
    back *= weight
    pointers = gate_up_gradient + places.to(tl.int64)[:, None] * (2 * F) + columns[None, :]
    gate_gradient = back * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(pointers, gate_gradient.to(gate_up_gradient.dtype.element_ty), mask=stored)
    tl.store(pointers + F, (back * silu).to(gate_up_gradient.dtype.element_ty), mask=stored)
    if STORE_HIDDEN:
        pointers = scaled_hidden + places.to(tl.int64)[:, None] * F + columns[None, :]
        tl.store(pointers, (silu * up * weight).to(scaled_hidden.dtype.element_ty), mask=stored)


@triton.jit
def _weight_gradient_kernel(
    left,
    right,
    order,
    totals,
    out,
    left_stride,
    right_stride,
    M,
    N,
    E_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[expert] = Σ over the expert's places, in order, of left[place]ᵀ · right[place]; zeros for an expert without rows.

    left: [.., M] and right: [.., N], one of them by place and the other (GATHER_…) by token. out: [E, M, N].
    """
    expert = tl.program_id(1)
    row_start = (tl.program_id(0) // tl.cdiv(N, COLUMNS)) * ROWS
    column_start = (tl.program_id(0) % tl.cdiv(N, COLUMNS)) * COLUMNS
    bins = tl.arange(0, E_PADDED)
    total = tl.load(totals + bins, mask=bins <= expert, other=0)
    end = tl.sum(total, 0)
    begin = end - tl.sum(tl.where(bins == expert, total, 0), 0)
    rows = row_start + tl.arange(0, ROWS)
    columns = column_start + tl.arange(0, COLUMNS)
    gathered = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, INNER):
        places = start + tl.arange(0, INNER)
        valid = places < end
        tokens = tl.load(order + places, mask=valid, other=0) // TOP_K
        left_rows = (tokens if GATHER_LEFT else places).to(tl.int64)
        right_rows = (tokens if GATHER_RIGHT else places).to(tl.int64)
        left_present = valid[:, None]
        right_present = valid[:, None]
        if not EVEN:
            left_present = left_present & (rows < M)[None, :]
            right_present = right_present & (columns < N)[None, :]
        left_part = tl.load(
            left + left_rows[:, None] * left_stride + rows[None, :], mask=left_present, other=0.0
        )
        right_part = tl.load(
            right + right_rows[:, None] * right_stride + columns[None, :], mask=right_present, other=0.0
        )
        gathered = tl.dot(tl.trans(left_part), right_part, gathered, input_precision=PRECISION)
    pointers = out + expert.to(tl.int64) * M * N + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(pointers, gathered.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


# Routing.


@triton.jit
def _route_kernel(
    logits,
    weights,
    experts,
    T,
    stride,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax, then k times the largest that is left, the lower expert of equal ones."""
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    bins = tl.arange(0, E_PADDED)[None, :]
    slots = tl.arange(0, TOP_K_PADDED)[None, :]
    present = (tokens < T)[:, None] & (bins < E)
    logit = tl.load(logits + tokens[:, None] * stride + bins, mask=present, other=float("-inf")).to(
        tl.float32
    )
    # Rows past the end hold a number too, so that nothing below divides −inf by −inf.
    logit = tl.where((tokens < T)[:, None], logit, 0.0)
    power = tl.exp(logit - tl.max(logit, 1)[:, None])
    power = tl.where(bins < E, power, 0.0)
    total = tl.sum(power, 1)[:, None]
    # A row with NaN still gets k different experts, all of them inside the tensors; its weights are NaN.
    left = tl.where(total == total, power / total, 0.0)
    left = tl.where(bins < E, left, -1.0)
    weight = tl.zeros([BLOCK, TOP_K_PADDED], tl.float32)
    expert = tl.zeros([BLOCK, TOP_K_PADDED], tl.int32)
    for slot in tl.static_range(TOP_K):
        largest = tl.max(left, 1)
        best = tl.min(tl.where(left == largest[:, None], bins, E_PADDED), 1)
        chosen = bins == best[:, None]
        weight = tl.where(slots == slot, largest[:, None], weight)
        expert = tl.where(slots == slot, best[:, None], expert)
        left = tl.where(chosen, -2.0, left)
    if NORMALISE:
        weight = weight / tl.sum(weight, 1)[:, None]
    weight = tl.where(total == total, weight, float("nan"))
    stored = (tokens < T)[:, None] & (slots < TOP_K)
    tl.store(weights + tokens[:, None] * TOP_K + slots, weight, mask=stored)
    tl.store(experts + tokens[:, None] * TOP_K + slots, expert.to(tl.int64), mask=stored)


@triton.jit
def _route_backward_kernel(
    logits,
    experts,
    gradient,
    logits_gradient,
    T,
    stride,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w · (g − Σ w · g), with w the probabilities, or when normalised their softmax over the chosen experts alone."""
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    bins = tl.arange(0, E_PADDED)[None, :]
    inside = tokens < T
    present = inside[:, None] & (bins < E)
    logit = tl.load(logits + tokens[:, None] * stride + bins, mask=present, other=float("-inf")).to(
        tl.float32
    )
    logit = tl.where(inside[:, None], logit, 0.0)
    slope = tl.zeros([BLOCK, E_PADDED], tl.float32)
    picked = tl.zeros([BLOCK, E_PADDED], tl.int32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(experts + tokens * TOP_K + slot, mask=inside, other=slot).to(tl.int32)
        value = tl.load(gradient + tokens * TOP_K + slot, mask=inside, other=0.0)
        chosen = bins == expert[:, None]
        slope = tl.where(chosen, value[:, None], slope)
        picked = tl.where(chosen, 1, picked)
    if NORMALISE:
        logit = tl.where(picked != 0, logit, float("-inf"))
    power = tl.exp(logit - tl.max(logit, 1)[:, None])
    weight = power / tl.sum(power, 1)[:, None]
    result = weight * (slope - tl.sum(weight * slope, 1)[:, None])
    pointers = logits_gradient + tokens[:, None] * E + bins
    tl.store(pointers, result.to(logits_gradient.dtype.element_ty), mask=present)


# What callers see.


@dataclass(frozen=True)
class SortedRows:
    """Routed rows by expert, on the device.

    order: int32 [R], place → source. totals: int32 [E + 1], rows of each expert, then the number of tiles in use.
    tile_map: int32 [3, tiles]: expert, first place and end of the expert's places of every tile in use.
    """

    order: Tensor
    totals: Tensor
    tile_map: Tensor

    @property
    def tiles(self) -> int:
        return self.tile_map.shape[1]


def padded(size: int) -> int:
    """The next power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def sort_rows(experts: Tensor, num_experts: int, tile_rows: int) -> SortedRows:
    """experts: int [T, k], contiguous, each in [0, num_experts). Stable, without the host knowing any count."""
    rows = experts.numel()
    blocks = triton.cdiv(rows, SORT_ROWS)
    tiles = triton.cdiv(rows, tile_rows) + num_experts

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=experts.device)

    counts, totals, order = integers(num_experts, blocks), integers(num_experts + 1), integers(rows)
    tile_map = integers(3, tiles)
    bins = padded(num_experts)
    _count_kernel[(blocks,)](experts, counts, rows, blocks, num_experts, bins, SORT_ROWS, num_warps=8)
    _scan_kernel[(num_experts,)](counts, totals, blocks, min(SCAN_BLOCKS, padded(blocks)))
    _place_kernel[(blocks,)](
        experts, counts, totals, order, rows, blocks, num_experts, bins, SORT_ROWS, num_warps=8
    )
    _map_tiles_kernel[(triton.cdiv(tiles, MAP_TILES),)](
        totals, tile_map, tiles, num_experts, bins, tile_rows, MAP_TILES
    )
    return SortedRows(order, totals, tile_map)


def tile_constants(
    plan: Plan, tile: Tile, num_experts: int, inner: int, columns: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What the kernels over sorted rows are compiled for: `inner` is their contraction length, `columns` their width."""
    return {
        "E": num_experts,
        "ROWS": plan.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "EVEN_COLUMNS": columns % tile.columns == 0,
        "EVEN_INNER": inner % tile.inner == 0,
        "PRECISION": precision_of(dtype),
    }


def reads_by_descriptor(plan: Plan, tile: Tile, inner: int, columns: int, aligned: bool = True) -> bool:
    """Whether a kernel may: a descriptor wants rows of whole 16 bytes and, since one expert's matrix begins where another's
    ends, whole tiles."""
    return plan.tma and aligned and inner % tile.inner == 0 and columns % 8 == 0


def launch_options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def described(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A contiguous tensor as a matrix of its last dimension, to be read in blocks by the copy engine."""
    width = matrix.shape[-1]
    return TensorDescriptor(matrix, [matrix.numel() // width, width], [width, 1], list(block))


def plan_of(x: Tensor, rows: int, num_experts: int) -> Plan:
    return plan_for(device_capability(x.device), x.element_size(), rows >= CROWDED_ROWS * num_experts)


def activate_rows(x: Tensor, gate_up: Tensor, rows: SortedRows, top_k: int, plan: Plan) -> Tensor:
    """silu(x · gate) · (x · up) of every routed row: [R, F] by place."""
    (model, double), tile = gate_up.shape[1:], plan.gate_up
    width = double // 2
    hidden = x.new_empty(rows.order.shape[0], width)
    constants = tile_constants(plan, tile, gate_up.shape[0], model, width, x.dtype)
    constants["TMA"] = reads_by_descriptor(plan, tile, model, width, gate_up.data_ptr() % 16 == 0)
    weight = described(gate_up, (tile.inner, tile.columns)) if constants["TMA"] else gate_up
    _gate_up_kernel[(rows.tiles * triton.cdiv(width, tile.columns),)](
        x,
        weight,
        rows.order,
        rows.totals,
        rows.tile_map,
        hidden,
        rows.tiles,
        x.stride(0),
        model,
        width,
        TOP_K=top_k,
        **constants,
        **launch_options(tile),
    )
    return hidden


def multiply_rows(
    rows_in: Tensor, weight: Tensor, rows: SortedRows, scale: Tensor | None, transposed: bool, plan: Plan
) -> Tensor:
    """[R, K] by place times each row's expert of weight [E, K, N] (transposed: [E, N, K]) → [R, N] by source, scaled."""
    inner, columns = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
    tile = plan.down
    routed = rows_in.new_empty(rows_in.shape[0], columns)
    constants = tile_constants(plan, tile, weight.shape[0], inner, columns, rows_in.dtype)
    constants["TMA"] = reads_by_descriptor(plan, tile, inner, columns, weight.data_ptr() % 16 == 0)
    source, matrix = rows_in, weight
    if constants["TMA"]:
        block = (tile.columns, tile.inner) if transposed else (tile.inner, tile.columns)
        source, matrix = described(rows_in, (plan.rows, tile.inner)), described(weight, block)
    _rows_kernel[(rows.tiles * triton.cdiv(columns, tile.columns),)](
        source,
        matrix,
        rows.order,
        rows.totals,
        rows.tile_map,
        rows.order if scale is None else scale,
        routed,
        rows.tiles,
        inner,
        columns,
        SCALED=scale is not None,
        TRANSPOSED=transposed,
        **constants,
        **launch_options(tile),
    )
    return routed


def combine_rows(routed: Tensor, out: Tensor) -> None:
    """out [T, D], contiguous, becomes the sum of each token's rows of routed [T · k, D]."""
    tokens, model = out.shape
    columns = min(COMBINE_COLUMNS, padded(model))
    grid = (tokens, triton.cdiv(model, columns))
    _combine_kernel[grid](routed, out, model, routed.shape[0] // tokens, columns, num_warps=COMBINE_WARPS)


def prefill(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, out: Tensor) -> None:
    """Fills out [T, D] by way of sorted rows."""
    plan = plan_of(x, experts.numel(), gate_up.shape[0])
    rows = sort_rows(experts, gate_up.shape[0], plan.rows)
    hidden = activate_rows(x, gate_up, rows, experts.shape[1], plan)
    combine_rows(multiply_rows(hidden, down, rows, weights, False, plan), out)


def decode_experts(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    normalise: bool,
    gate_up: Tensor,
    down: Tensor,
    gate_up_factors: LowRank | None = None,
    down_factors: LowRank | None = None,
    scale: float = 1.0,
) -> Tensor:
    """A few tokens x [T, D] through the experts that their router logits [T, E] choose → [T, D], by matrix-vector products.

    Defined by `reference.routed_experts`, with factors by `reference.lora_experts`. A token's result is the same whatever stands
    beside it. Only kernels of fixed shape: a CUDA graph can hold it. The experts as in `moe_experts`, contiguous. No gradients.
    """
    (tokens, model), (num_experts, width, _) = x.shape, down.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    plan = plan_of(x, 1, 1)
    first, second = plan.decode_gate_up, plan.decode_down
    chunks = triton.cdiv(width, second.inner)
    down_tiles = triton.cdiv(model, second.columns)
    device = x.device
    out = torch.empty(x.shape, dtype=x.dtype, device=device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    sums = torch.empty(plan.decode_splits, tokens * top_k, 2 * width, dtype=torch.float32, device=device)
    partial = torch.empty(tokens * top_k, model, dtype=torch.float32, device=device)
    arrived = torch.empty(tokens, down_tiles, dtype=torch.int32, device=device)
    adapted: RoutedFactors | None = None
    if gate_up_factors is not None or down_factors is not None:
        adapted = RoutedFactors(x, tokens * top_k, gate_up_factors, down_factors, scale, width, 1)
    limit = {"maxnreg": ADAPTED_REGISTERS} if adapted is not None and x.element_size() == 2 else {}
    dependent = dependent_launch(device)
    choose_kernel[(tokens,)](
        logits,
        weights,
        experts,
        logits.stride(0),
        E=num_experts,
        E_PADDED=padded(num_experts),
        TOP_K=top_k,
        NORMALISE=normalise,
        num_warps=CHOOSE_WARPS,
        **dependent,
    )
    blocks = triton.cdiv(width, first.columns) + (gate_up_factors is not None)
    _decode_gate_up_kernel[(blocks, tokens * top_k, plan.decode_splits)](
        x,
        gate_up,
        experts,
        sums,
        arrived,
        x.stride(0),
        D=model,
        F=width,
        down_tiles=down_tiles,
        TOP_K=top_k,
        COLUMNS=first.columns,
        INNER=first.inner,
        SPLITS=plan.decode_splits,
        EVEN=model % first.inner == 0 and width % first.columns == 0,
        DOWN_TILES_PADDED=padded(down_tiles),
        STAGES=first.stages,
        **(WITHOUT_GATE_UP if adapted is None else adapted.gate_up_arguments()),
        num_warps=first.warps,
        **limit,
        **dependent,
    )
    hidden = sums if adapted is None else adapted.activate(x, sums, experts)
    _decode_down_kernel[(down_tiles, tokens * top_k)](
        hidden,
        down,
        experts,
        weights,
        partial,
        arrived,
        out,
        D=model,
        F=width,
        TOP_K=top_k,
        COLUMNS=second.columns,
        INNER=second.inner,
        CHUNKS=chunks,
        SPLITS=plan.decode_splits if adapted is None else 0,
        EVEN=width % second.inner == 0 and model % second.columns == 0,
        **(WITHOUT_DOWN if adapted is None else adapted.down_arguments()),
        num_warps=second.warps,
        **limit,
        **dependent,
    )
    return out


def weight_gradient(
    left: Tensor, right: Tensor, rows: SortedRows, gather_left: bool, top_k: int, out: Tensor, plan: Plan
) -> Tensor:
    """out [E, M, N] becomes Σ leftᵀ · right over each expert's rows: one of the two is [T, …] by token, the other by place."""
    num_experts, height, width = out.shape
    tile = plan.weight_gradient
    grid = (triton.cdiv(height, plan.gradient_rows) * triton.cdiv(width, tile.columns), num_experts)
    _weight_gradient_kernel[grid](
        left,
        right,
        rows.order,
        rows.totals,
        out,
        left.stride(0),
        right.stride(0),
        height,
        width,
        E_PADDED=padded(num_experts),
        TOP_K=top_k,
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=not gather_left,
        ROWS=plan.gradient_rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        EVEN=height % plan.gradient_rows == 0 and width % tile.columns == 0,
        PRECISION=precision_of(left.dtype),
        **launch_options(tile),
    )
    return out


class _Experts(torch.autograd.Function):
    """Keeps only its inputs: the backward pass sorts again and recomputes gate and up beside the first gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weights, experts, gate_up, down)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            for begin in range(0, len(x), PREFILL_TOKENS):
                part = slice(begin, begin + PREFILL_TOKENS)
                prefill(x[part], weights[part], experts[part], gate_up, down, out[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, experts, gate_up, down = ctx.saved_tensors
        wants_x, wants_weights, _, wants_gate_up, wants_down = ctx.needs_input_grad
        with torch.cuda.device_of(x):
            return _experts_backward(
                x,
                weights,
                experts,
                gate_up,
                down,
                gradient.contiguous(),
                (wants_x, wants_weights, wants_gate_up, wants_down),
            )


def _experts_backward(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gradient: Tensor,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weights, (experts), gate_up and down; None for what is not wanted."""
    (tokens, top_k), (num_experts, width, model) = experts.shape, down.shape
    plan = plan_of(x, experts.numel(), num_experts)
    rows = sort_rows(experts, num_experts, plan.rows)
    column_tiles = triton.cdiv(width, plan.backward.columns)
    by_place = x.new_empty(tokens * top_k, 2 * width)
    scaled_hidden = x.new_empty(tokens * top_k, width) if wanted[3] else by_place
    weight_parts = torch.empty(tokens * top_k, column_tiles, dtype=torch.float32, device=x.device)
    _gate_up_backward_kernel[(rows.tiles * column_tiles,)](
        x,
        gradient,
        gate_up,
        down,
        weights,
        rows.order,
        rows.totals,
        rows.tile_map,
        by_place,
        scaled_hidden,
        weight_parts,
        rows.tiles,
        x.stride(0),
        model,
        width,
        TOP_K=top_k,
        STORE_HIDDEN=wanted[3],
        **tile_constants(plan, plan.backward, num_experts, model, width, x.dtype),
        **launch_options(plan.backward),
    )
    x_gradient = weights_gradient = gate_up_gradient = down_gradient = None
    if wanted[0]:
        x_gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        combine_rows(multiply_rows(by_place, gate_up, rows, None, True, plan), x_gradient)
    if wanted[1]:
        weights_gradient = weight_parts.sum(1).view(tokens, top_k).to(weights.dtype)
    if wanted[2]:
        gate_up_gradient = weight_gradient(x, by_place, rows, True, top_k, torch.empty_like(gate_up), plan)
    if wanted[3]:
        down_gradient = weight_gradient(
            scaled_hidden, gradient, rows, False, top_k, torch.empty_like(down), plan
        )
    return x_gradient, weights_gradient, None, gate_up_gradient, down_gradient


def moe_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Σ over a token's experts of weight · down(silu(gate) · up). Defined by `reference.moe_experts`.

    x: [T, D]; weights: fp32 [T, k]; experts: int [T, k], each in [0, E); gate_up: [E, D, 2F], columns 0..F−1 gate, F..2F−1 up;
    down: [E, F, D]. x, gate_up and down share a type: bf16, fp16 or fp32. Returns [T, D]. Differentiable once in all but
    `experts`. The weights of the experts should be contiguous (a copy is made otherwise); x only needs contiguous rows.
    The forward pass needs R · (F + D) elements of workspace for at most `PREFILL_TOKENS` tokens at a time, the backward pass
    R · (3F + D) for all of them.
    Raises ValueError when shapes or types do not fit together.
    """
    (tokens, model), (num_experts, width, _) = x.shape, down.shape
    if (
        gate_up.shape != (num_experts, model, 2 * width)
        or down.shape[2] != model
        or weights.shape != experts.shape
        or len(experts) != tokens
    ):
        shapes = ", ".join(str(list(t.shape)) for t in (x, weights, experts, gate_up, down))
        raise ValueError(f"x, weights, experts, gate_up, down do not fit together: {shapes}")
    if not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(f"x is {x.dtype}, gate_up {gate_up.dtype} and down {down.dtype}: give one type")
    if tokens == 0:
        return torch.zeros_like(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    return _Experts.apply(
        x, weights.contiguous(), experts.contiguous(), gate_up.contiguous(), down.contiguous()
    )


class _Route(torch.autograd.Function):
    """Keeps the logits and the choice; the gradient takes one pass over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        tokens, num_experts = logits.shape
        weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
        experts = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
        ctx.save_for_backward(logits, experts)
        ctx.normalise = normalise
        ctx.mark_non_differentiable(experts)
        with torch.cuda.device_of(logits):
            _route_kernel[(triton.cdiv(tokens, ROUTE_TOKENS),)](
                logits,
                weights,
                experts,
                tokens,
                logits.stride(0),
                E=num_experts,
                E_PADDED=padded(num_experts),
                TOP_K=top_k,
                TOP_K_PADDED=triton.next_power_of_2(top_k),
                NORMALISE=normalise,
                BLOCK=ROUTE_TOKENS,
            )
        return weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, experts = ctx.saved_tensors
        tokens, num_experts = logits.shape
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        with torch.cuda.device_of(logits):
            _route_backward_kernel[(triton.cdiv(tokens, ROUTE_TOKENS),)](
                logits,
                experts,
                gradient.contiguous(),
                result,
                tokens,
                logits.stride(0),
                E=num_experts,
                E_PADDED=padded(num_experts),
                TOP_K=experts.shape[1],
                NORMALISE=ctx.normalise,
                BLOCK=ROUTE_TOKENS,
            )
        return result, None, None


def route(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] → fp32 weights [T, top_k] and experts int64 [T, top_k]. Defined by `reference.route`.

    Softmax over all experts in fp32, then the largest, the lower expert of equal ones; with `normalise` the chosen weights
    add up to one. The weights are differentiable. Weights of a row that holds NaN are NaN, its experts some k different ones.
    """
    tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"{top_k} of {num_experts} experts cannot be chosen")
    if tokens == 0:
        none = torch.empty(0, top_k, dtype=torch.int64, device=logits.device)
        return none.to(torch.float32), none
    return _Route.apply(logits if logits.stride(1) == 1 else logits.contiguous(), top_k, normalise)


# Types of the arguments in the 30B shape; what is not named here points to bf16.
ARGUMENT_TYPES = {
    **dict.fromkeys(("counts", "totals", "order", "tile_map", "arrived"), "*i32"),
    **dict.fromkeys(("weights", "scale", "partial", "weight_parts"), "*fp32"),
    **dict.fromkeys(("R", "T", "D", "F", "K", "M", "N", "blocks", "tiles", "down_tiles"), "i32"),
    **dict.fromkeys(("stride", "x_stride", "left_stride", "right_stride"), "i32"),
    "experts": "*i64",
}


def case_of(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    options: dict[str, int],
    types: dict[str, str] | None = None,
) -> CompileCase:
    """A kernel with the types above, or others; pointers and model dimensions are multiples of 16, counts of rows are not."""
    known = ARGUMENT_TYPES | (types or {})
    signature = {
        argument: "constexpr" if argument in constants else known.get(argument, "*bf16")
        for argument in kernel.arg_names
    }
    multiples = tuple(
        argument
        for argument, kind in signature.items()
        if kind.startswith("*") or argument in ("D", "F", "K", "M", "N") or argument.endswith("stride")
    )
    return CompileCase(
        name, kernel, signature, constants, options["num_warps"], options.get("num_stages", 3), multiples
    )


def compile_cases(capability: int) -> list[CompileCase]:
    """Every kernel as the 30B shape launches it in bf16, the tiled ones with many rows an expert and with few."""
    model, width, num_experts, top_k, kind = 2048, 768, 128, 8, torch.bfloat16
    bins = {"E": num_experts, "E_PADDED": padded(num_experts)}
    sorting = {**bins, "BLOCK": SORT_ROWS}
    routing = {**bins, "TOP_K": top_k, "NORMALISE": True, "BLOCK": ROUTE_TOKENS}
    combining = {"TOP_K": top_k, "COLUMNS": COMBINE_COLUMNS}
    four, eight = {"num_warps": 4}, {"num_warps": 8}
    constants: dict[str, Any]
    cases = [
        case_of("count", _count_kernel, sorting, eight),
        case_of("scan", _scan_kernel, {"BLOCK": SCAN_BLOCKS}, four),
        case_of("place", _place_kernel, sorting, eight),
        case_of("map_tiles", _map_tiles_kernel, {**bins, "ROWS": 128, "BLOCK": MAP_TILES}, four),
        case_of("combine", _combine_kernel, combining, {"num_warps": COMBINE_WARPS}),
        case_of("route", _route_kernel, {**routing, "TOP_K_PADDED": top_k}, four),
        case_of("route_backward", _route_backward_kernel, routing, four, {"gradient": "*fp32"}),
    ]
    plan = plan_for(capability, 2)
    overlapping = {"DEPENDENT": capability >= 90}
    choosing = {**bins, "TOP_K": top_k, "NORMALISE": True, **overlapping}
    chosen = {"experts": "*i32", "sums": "*fp32"}
    cases.append(case_of("choose", choose_kernel, choosing, {"num_warps": CHOOSE_WARPS}, chosen))
    decoding = {"TOP_K": top_k, "EVEN": True, "SPLITS": plan.decode_splits, **overlapping}
    chosen |= {**dict.fromkeys(("first", "low", "second"), "*fp32"), "factor_scale": "fp32"}
    down_tiles = padded(model // plan.decode_down.columns)
    ranks = {"RANK": 16, "RANKS": 16}
    for label, registers, gate_up_added, down_added in (
        ("", None, WITHOUT_GATE_UP, WITHOUT_DOWN),
        (
            " adapted",
            ADAPTED_REGISTERS,
            {**ranks, "PARTS": 1, "PART": 256},
            {**ranks, "PARTS": 12, "PARTS_PADDED": 16, "SPLITS": 0},
        ),
    ):
        tile = plan.decode_gate_up
        constants = {**decoding, "COLUMNS": tile.columns, "INNER": tile.inner, **gate_up_added}
        constants |= {"DOWN_TILES_PADDED": down_tiles, "STAGES": tile.stages}
        name, options = f"decode_gate_up{label}", {"num_warps": tile.warps}
        case = case_of(name, _decode_gate_up_kernel, constants, options, chosen)
        cases.append(replace(case, max_registers=registers))
        tile = plan.decode_down
        constants = {**decoding, "COLUMNS": tile.columns, "INNER": tile.inner, **down_added}
        constants = {key: value for key, value in constants.items() if key != "factor_scale"}
        constants["CHUNKS"] = width // tile.inner
        name, options = f"decode_down{label}", {"num_warps": tile.warps}
        case = case_of(name, _decode_down_kernel, constants, options, chosen)
        cases.append(replace(case, max_registers=registers))
    for label, crowded in (("crowded", True), ("few", False)):
        plan = plan_for(capability, 2, crowded)
        tile = plan.gate_up
        constants = tile_constants(plan, tile, num_experts, model, width, kind) | {"TOP_K": top_k}
        constants["TMA"] = reads_by_descriptor(plan, tile, model, width)
        block = f"tensordesc<bf16[{tile.inner}, {tile.columns}]>"
        types = {"gate_up": block} if constants["TMA"] else {}
        cases.append(case_of(f"gate_up {label}", _gate_up_kernel, constants, launch_options(tile), types))
        tile = plan.down
        for name, inner in (("down", width), ("back to x", 2 * width)):
            transposed = name != "down"
            constants = tile_constants(plan, tile, num_experts, inner, model, kind)
            constants["TMA"] = reads_by_descriptor(plan, tile, inner, model)
            constants |= {"SCALED": not transposed, "TRANSPOSED": transposed}
            types = {}
            if constants["TMA"]:
                shape = [tile.columns, tile.inner] if transposed else [tile.inner, tile.columns]
                types["rows_in"] = f"tensordesc<bf16[{plan.rows}, {tile.inner}]>"
                types["weight"] = f"tensordesc<bf16{shape}>"
            cases.append(case_of(f"{name} {label}", _rows_kernel, constants, launch_options(tile), types))
        tile = plan.backward
        constants = tile_constants(plan, tile, num_experts, model, width, kind)
        constants |= {"TOP_K": top_k, "STORE_HIDDEN": True}
        name = f"gate_up backward {label}"
        cases.append(case_of(name, _gate_up_backward_kernel, constants, launch_options(tile)))
        tile = plan.weight_gradient
        constants = {
            "E_PADDED": bins["E_PADDED"],
            "TOP_K": top_k,
            "EVEN": True,
            "PRECISION": precision_of(kind),
        }
        constants |= {"ROWS": plan.gradient_rows, "COLUMNS": tile.columns, "INNER": tile.inner}
        for gather_left in (True, False):
            gathering = {"GATHER_LEFT": gather_left, "GATHER_RIGHT": not gather_left}
            name = f"gradient of {'gate_up' if gather_left else 'down'} {label}"
            cases.append(case_of(name, _weight_gradient_kernel, constants | gathering, launch_options(tile)))
    return cases
