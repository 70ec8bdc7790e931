"""The lightning indexer's scores in Triton, bf16, fp16, fp32 or FP8, and the FP8 form of its queries and keys.

Defined by `reference.index_scores` and `reference.quantise_index`. B batch, T queries, S keys, J indexer heads, e indexer
dim. Nothing here has a backward pass: training scores its few selected keys through the definition.

What bounds the scores: 2·J·e matrix operations and 2·J ordinary ones for every (query, key), so half of the time of the
matrix units passes on the ordinary ones unless the two overlap.
"""

from __future__ import annotations

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
    device_processors,
    let_next_begin,
    wait_for_previous,
)
from keyecli.kernels.reference import Branches

# Scores are stored in whole tiles, so a row of the output is padded to a multiple of this, and so of every tile of keys.
ROW_PADDING = 256
# Up to here every query goes alone with its heads as the narrow side of the product: a tile of 64 queries would be idle.
FEW_QUERIES = 4
# Stored for a key that its query does not see: all ones, a NaN that arithmetic never makes, below −∞ in the order of bits.
HIDDEN_BITS = tl.constexpr(-1)


@dataclass(frozen=True)
class ScoreTiles:
    """How `_scores` is cut for one kind of GPU. resident: all heads of a tile of queries stay in shared memory while keys
    stream past; otherwise a tile of keys stays while heads stream past."""

    queries: int
    keys: int
    warps: int
    stages: int
    resident: bool
    blocks_per_processor: int


def score_tiles(capability: int, element_bytes: int, heads: int, dim: int) -> ScoreTiles:
    """Tiles by compute capability (0: the interpreter)."""
    if capability == 0:
        return ScoreTiles(16, 64, 4, 1, resident=heads <= 4, blocks_per_processor=1)
    if element_bytes == 4:
        # No matrix unit multiplies fp32 exactly; this is for tests and small models.
        return ScoreTiles(32, 64, 4, 2, resident=False, blocks_per_processor=2)
    if capability == 90 and heads <= 16 and 64 * heads * dim * element_bytes <= 128 * 1024:
        return ScoreTiles(64, 128, 8, 1, resident=True, blocks_per_processor=1)
    if capability == 90:
        return ScoreTiles(64, 128, 4, 3, resident=False, blocks_per_processor=2)
    return ScoreTiles(64, 128, 8, 3, resident=False, blocks_per_processor=2)


@triton.jit
def decode_e4m3(byte):
    """FP8 e4m3 held in uint8 → fp16, exactly: the bits moved into place and the difference of the exponents' biases made
    good. The quantiser writes no NaN, so none is looked for."""
    wide = byte.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def first_position(positions, offset, batch, ON_DEVICE: tl.constexpr):
    """Position of the first query of a launch: `offset`, counted from the batch row's own start when that is on the device."""
    position = offset
    if ON_DEVICE:
        position = tl.load(positions + batch).to(tl.int32) + offset
    return position


@triton.jit
def visible_pairs(segments, rows, keys, queries, position, S, SEGMENTED: tl.constexpr):
    """`reference.visible_keys` for query positions `position + rows` (rows < queries are real) and key positions `keys`.

    segments points at the batch row. Returns int1 [rows, keys].
    """
    own = position + rows
    visible = keys[None, :] <= own[:, None]
    if SEGMENTED:
        real = (rows < queries) & (own >= 0) & (own < S)
        own_segment = tl.load(segments + own, mask=real, other=-1).to(tl.int32)
        key_segment = tl.load(segments + keys, mask=keys < S, other=-1).to(tl.int32)
        same = (key_segment[None, :] == own_segment[:, None]) & (key_segment[None, :] != -1)
        allowed = same | (key_segment[None, :] == 0)
        visible = (visible & allowed) | (keys[None, :] == own[:, None])
    return visible & (keys < S)[None, :]


@triton.jit
def store_scores(
    out, total, rows, local, start, queries, position, S, out_row, segments, key_scale, factor,
    MASKED: tl.constexpr, SEGMENTED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Scale, mask and store a tile: out points at the tile's first row, local are columns from `start` on."""
    keys = start + local
    # Applied last, and the same number as in the definition, so that sums which are exact stay so.
    if SCALED:
        scale = tl.load(key_scale + keys, mask=keys < S, other=0.0)
        total = total * scale[None, :]
    score = total * factor
    if MASKED:
        visible = visible_pairs(segments, rows, keys, queries, position, S, SEGMENTED)
        bits = tl.where(visible, score.to(tl.int32, bitcast=True), HIDDEN_BITS)
        score = bits.to(tl.float32, bitcast=True)
    # Rows of the output are padded to whole tiles: without a mask on the columns the stores are 16 bytes wide.
    tl.store(out + start + (rows[:, None] * out_row + local[None, :]), score, mask=(rows < queries)[:, None])


@triton.jit
def load_head(q, offsets, inside, DECODE: tl.constexpr):
    """One head of a tile of queries."""
    head = tl.load(q + offsets, mask=inside, other=0.0)
    if DECODE:
        head = decode_e4m3(head)
    return head


@triton.jit
def load_gates(w, w_offsets, q_scale, scale_offsets, inside, SCALED: tl.constexpr):
    """Half the gates of one head, times the scales of its queries: x + |x| is twice the ReLU, and either is exact."""
    gates = tl.load(w + w_offsets, mask=inside, other=0.0).to(tl.float32) * 0.5
    if SCALED:
        gates = gates * tl.load(q_scale + scale_offsets, mask=inside, other=0.0)
    return gates


@triton.jit
def load_keys(
    k, offsets, local, start, k_row, S, E: tl.constexpr, E_PADDED: tl.constexpr, DECODE: tl.constexpr
):
    """A tile of keys from position `start` on, zeros behind the last."""
    inside = (local < S - start)[:, None]
    if E < E_PADDED:
        inside = inside & (tl.arange(0, E_PADDED) < E)[None, :]
    keys = tl.load(k + start.to(tl.int64) * k_row + offsets, mask=inside, other=0.0)
    if DECODE:
        keys = decode_e4m3(keys)
    return keys


@triton.jit
def add_head(total, head, keys, gates, PINNED: tl.constexpr):
    """total + gate · ReLU(head · keysᵀ), the ReLU as x + |x|: one addition with a free sign change, where a maximum costs
    two slots. A product of infinite size, which no norm lets through, becomes NaN instead of 0 or ∞."""
    product = tl.dot(head, tl.trans(keys), input_precision="ieee")
    total += gates[:, None] * (product + tl.abs(product))
    if PINNED:
        # The compiler would put off all these sums to the end of the unrolled heads and hold every product in registers.
        # A volatile move that costs nothing keeps each sum in its place.
        total = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=False, pack=1
        )
    return total


@triton.jit(do_not_specialize=["T", "S", "offset", "run", "segment_batch"])
def _scores(
    q, w, k, q_scale, k_scale, segments, positions, out,
    T, S, offset, run, factor,
    q_batch, q_row, q_head, w_batch, w_row, w_head, q_scale_batch, q_scale_row, q_scale_head,
    k_batch, k_row, k_scale_batch, segment_batch, out_batch, out_row,
    J: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
    RESIDENT: tl.constexpr, PINNED: tl.constexpr, DECODE: tl.constexpr,
    MASKED: tl.constexpr, SEGMENTED: tl.constexpr, SCALED: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of queries against `run` tiles of keys. Grid: tiles of queries × runs, batch rows.

    With MASKED, tiles wholly behind the last query are left unwritten.
    """
    query_tiles = tl.cdiv(T, TILE_Q)
    row = (tl.program_id(0) % query_tiles) * TILE_Q
    batch = tl.program_id(1).to(tl.int64)
    position = first_position(positions, offset, batch, ON_DEVICE) + row
    queries = T - row
    first_row = row.to(tl.int64)
    q += batch * q_batch + first_row * q_row
    w += batch * w_batch + first_row * w_row
    q_scale += batch * q_scale_batch + first_row * q_scale_row
    k += batch * k_batch
    k_scale += batch * k_scale_batch
    segments += batch * segment_batch
    out += batch * out_batch + first_row * out_row

    rows = tl.arange(0, TILE_Q)
    columns = tl.arange(0, E_PADDED)
    local = tl.arange(0, TILE_K)
    inside = rows < queries
    q_inside = inside[:, None]
    if E < E_PADDED:
        q_inside = q_inside & (columns < E)[None, :]
    q_offsets = rows[:, None] * q_row + columns[None, :]
    k_offsets = local[:, None] * k_row + columns[None, :]

    begin = (tl.program_id(0) // query_tiles) * run
    last = S
    if MASKED:
        last = tl.minimum(S, position + tl.minimum(queries, TILE_Q))
    end = tl.minimum(begin + run, tl.cdiv(last, TILE_K))

    if begin >= end:
        return

    if RESIDENT:
        heads = ()
        gates = ()
        for j in tl.static_range(J):
            heads += (load_head(q + j * q_head, q_offsets, q_inside, DECODE),)  # type: ignore[assignment]
            if not SCALED:
                held = load_gates(w + j * w_head, rows * w_row, q_scale, rows, inside, SCALED)
                gates += (held,)  # type: ignore[assignment]
        keys = load_keys(k, k_offsets, local, begin * TILE_K, k_row, S, E, E_PADDED, DECODE)
        for tile in tl.range(begin, end, num_stages=1):
            start = tile * TILE_K
            total = tl.zeros((TILE_Q, TILE_K), tl.float32)
            for j in tl.static_range(J):
                if SCALED:
                    # Kept in registers over the loop, these would leave the FP8 products too few to run together.
                    gate = load_gates(
                        w + j * w_head,
                        rows * w_row,
                        q_scale + j * q_scale_head,
                        rows * q_scale_row,
                        inside,
                        SCALED,
                    )
                else:
                    gate = gates[j]
                total = add_head(total, heads[j], keys, gate, PINNED)
            # Asked for here, the next keys arrive while this tile is stored; one tile earlier there is no room for them.
            keys = load_keys(k, k_offsets, local, start + TILE_K, k_row, S, E, E_PADDED, DECODE)
            # Rearranging the whole tile for wide stores would take more registers and shared memory than there are: two
            # halves, cut so that each warp group keeps its own columns.
            quarters = tl.permute(tl.reshape(total, (TILE_Q, 2, 2, TILE_K // 4)), (0, 1, 3, 2))
            even, odd = tl.split(quarters)
            half = tl.arange(0, TILE_K // 2)
            half = (half // (TILE_K // 4)) * (TILE_K // 2) + half % (TILE_K // 4)
            store_scores(
                out, tl.reshape(even, (TILE_Q, TILE_K // 2)), rows, half, start, queries, position, S, out_row,
                segments, k_scale, factor, MASKED, SEGMENTED, SCALED,
            )  # fmt: skip
            store_scores(
                out, tl.reshape(odd, (TILE_Q, TILE_K // 2)), rows, half + TILE_K // 4, start, queries, position, S,
                out_row, segments, k_scale, factor, MASKED, SEGMENTED, SCALED,
            )  # fmt: skip
    else:
        for tile in tl.range(begin, end, num_stages=1):
            start = tile * TILE_K
            keys = load_keys(k, k_offsets, local, start, k_row, S, E, E_PADDED, DECODE)
            total = tl.zeros((TILE_Q, TILE_K), tl.float32)
            for j in tl.range(0, J, num_stages=STAGES):
                head = load_head(q + j * q_head, q_offsets, q_inside, DECODE)
                gate = load_gates(
                    w + j * w_head,
                    rows * w_row,
                    q_scale + j * q_scale_head,
                    rows * q_scale_row,
                    inside,
                    SCALED,
                )
                total = add_head(total, head, keys, gate, False)
            store_scores(
                out, total, rows, local, start, queries, position, S, out_row, segments, k_scale, factor, MASKED,
                SEGMENTED, SCALED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S", "offset", "shared", "room", "segment_batch"])
def _scores_few(
    q, w, k, q_scale, k_scale, segments, positions, out,
    T, S, offset, shared, room, factor,
    q_batch, q_row, q_head, w_batch, w_row, w_head, q_scale_batch, q_scale_row, q_scale_head,
    k_batch, k_row, k_scale_batch, segment_batch, out_batch, out_row,
    J: tl.constexpr, J_PADDED: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, TILE_K: tl.constexpr,
    DECODE: tl.constexpr,
    MASKED: tl.constexpr, SEGMENTED: tl.constexpr, SCALED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SETTLED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Scores of a single query, its heads side by side, against one tile of keys: bound by reading the keys. Keys from
    `shared` on stand `room` rows further for each batch row. SETTLED: the keys before the first query and the positions are
    there already, so that the keys are on their way while the queries are still made.

    Grid: tiles of keys, queries, batch rows.
    """
    let_next_begin(DEPENDENT)
    if not SETTLED:
        wait_for_previous(DEPENDENT)
    row = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    position = first_position(positions, offset, batch, ON_DEVICE) + row
    start = tl.program_id(0) * TILE_K
    if MASKED and start > position:
        if SETTLED:
            wait_for_previous(DEPENDENT)
        return
    q += batch * q_batch + row.to(tl.int64) * q_row
    w += batch * w_batch + row.to(tl.int64) * w_row
    q_scale += batch * q_scale_batch + row.to(tl.int64) * q_scale_row
    k += batch * k_batch
    k_scale += batch * k_scale_batch
    segments += batch * segment_batch
    out += batch * out_batch + row.to(tl.int64) * out_row

    heads = tl.arange(0, J_PADDED)
    columns = tl.arange(0, E_PADDED)
    local = tl.arange(0, TILE_K)
    real = heads < J
    inside = real[:, None] & (columns < E)[None, :]
    further = tl.where(start + local < shared, 0, tl.program_id(2) * room)
    k_offsets = (local + further)[:, None].to(tl.int64) * k_row + columns[None, :]
    keys = load_keys(k, k_offsets, local, start, k_row, S, E, E_PADDED, DECODE)
    if SETTLED:
        wait_for_previous(DEPENDENT)
        if start + TILE_K > position - row:
            keys = load_keys(k, k_offsets, local, start, k_row, S, E, E_PADDED, DECODE)
    queries = load_head(q, heads[:, None] * q_head + columns[None, :], inside, DECODE)
    gates = load_gates(w, heads * w_head, q_scale, heads * q_scale_head, real, SCALED)
    product = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    score = tl.sum((product + tl.abs(product)) * gates[None, :], 1)
    if SCALED:
        score = score * tl.load(k_scale + start + local, mask=local < S - start, other=0.0)
    score = score * factor
    if MASKED:
        own = tl.arange(0, 1)
        visible = visible_pairs(segments, own, start + local, 1, position, S, SEGMENTED)
        visible = tl.reshape(visible, (TILE_K,))
        score = tl.where(visible, score.to(tl.int32, bitcast=True), HIDDEN_BITS).to(tl.float32, bitcast=True)
    tl.store(out + start + local, score)


@triton.jit
def encode_e4m3(x):
    """fp32 within ±448 → the byte of the nearest FP8 e4m3, halves to even, on any GPU."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.abs(x)
    size_bits = size.to(tl.int32, bitcast=True)
    # Exponent bias 127 → 7 and 23 → 3 bits of mantissa; a carry out of the mantissa raises the exponent, as it should.
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^−6 the codes are multiples of 2^−9, which is the spacing of fp32 from 2^14 = 0x46800000 on.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(size < 0.015625, small, normal), 0x7E)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["N"])
def _quantise(
    x, values, scales, N, x_row, factor,
    E: tl.constexpr, E_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of rows: rotated by one small matrix product with entries ±1, scaled by a power of two, encoded."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, E_PADDED)
    inside = (rows < N)[:, None] & (columns < E)[None, :]
    entries = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
    parity = columns[:, None] & columns[None, :]
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    rotated = tl.dot(entries, (1 - 2 * parity).to(entries.dtype), input_precision="ieee") * factor
    rotated = tl.where(inside, rotated, 0.0)

    ratio = tl.max(tl.abs(rotated), 1) * (1 / 448.0)
    ratio_bits = ratio.to(tl.int32, bitcast=True)
    exponent = (ratio_bits >> 23) + ((ratio_bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.where(ratio > 0, tl.minimum(tl.maximum(exponent, 27), 253), 127)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    codes = encode_e4m3(tl.minimum(tl.maximum(rotated * inverse[:, None], -448.0), 448.0))
    tl.store(values + rows[:, None] * E + columns[None, :], codes, mask=inside)
    tl.store(scales + rows, (exponent << 23).to(tl.float32, bitcast=True), mask=rows < N)


def quantise_index(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated FP8 rows and their scales, defined by `reference.quantise_index`: x [..., e], e a power of two up to 256 →
    float8_e4m3fn [..., e] and fp32 [...]. Rows are summed in another order than there, so a value halfway between two FP8
    numbers may fall to the other one."""
    dim = x.shape[-1]
    if dim < 1 or dim > 256 or dim & (dim - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two up to 256, not {dim}")
    flat = x.reshape(-1, dim)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    values = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    tile = 64
    _quantise[(triton.cdiv(len(flat), tile),)](
        flat, values, scales, len(flat), flat.stride(0), dim**-0.5,
        E=dim, E_PADDED=max(16, triton.next_power_of_2(dim)), ROWS=tile, num_warps=4,
    )  # fmt: skip
    return values.view(torch.float8_e4m3fn), scales


def keys_a_run(query_tiles: int, key_tiles: int, batch: int, processors: int) -> int:
    """How many tiles of keys one block takes: as many as keep all processors busy to the end, with one to four blocks each.

    Loading the heads costs about two tiles, so few long runs are better than many short ones.
    """
    best, best_cost = key_tiles, float("inf")
    for waves in range(1, 5):
        runs = max(1, processors * waves // (query_tiles * batch))
        run = triton.cdiv(key_tiles, runs)
        blocks = triton.cdiv(key_tiles, run) * query_tiles * batch
        cost = triton.cdiv(blocks, processors) * (run + 2)
        if cost < best_cost:
            best, best_cost = run, cost
    return best


def score_into(
    out: Tensor,
    q: Tensor,
    w: Tensor,
    k: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    segments: Tensor | None = None,
    positions: Tensor | None = None,
    offset: int = 0,
    masked: bool = True,
    branches: Branches | None = None,
    settled: bool = False,
) -> None:
    """Write scores into `out`, fp32 [B, T, at least S rounded up to ROW_PADDING], last dimension contiguous.

    The first query stands at `offset`, plus positions[b] (int [B], on the device) where given. With `masked` a key in sight
    of its query by neither position nor segment gets the bits of `HIDDEN_BITS`, and what lies a whole tile or more behind
    the query is left as it was. Without, every score is written. With `branches`, for up to `FEW_QUERIES` queries, k is
    [1, rows, e] and every batch row one of them; settled: the
    keys before the first query and the positions were written before the kernel before this one began.
    """
    batch, queries, heads, dim = q.shape
    keys = k.shape[1] if branches is None else branches.length
    if branches is not None and (queries > FEW_QUERIES or k_scale is not None):
        raise ValueError(f"branches are scored for {FEW_QUERIES} queries at most, and not in FP8")
    device = q.device
    capability = device_capability(device)
    fp8 = q.dtype == torch.float8_e4m3fn
    if (q_scale is None) != (k_scale is None) or fp8 != (q_scale is not None):
        raise ValueError("FP8 queries and keys come with the scales of both, others with none")
    if q.dtype != k.dtype:
        raise ValueError(f"indexer queries are {q.dtype}, keys {k.dtype}")
    # Rows of keys and queries are read whole; any other stride is followed where it is.
    q = q if q.stride(3) == 1 else q.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()
    decode = fp8 and capability < 89
    if decode:
        q, k = q.view(torch.uint8), k.view(torch.uint8)
    scaled = q_scale is not None
    q_strides = (0, 0, 0) if q_scale is None else q_scale.stride()
    if k_scale is not None and k_scale.stride(1) != 1:
        k_scale = k_scale.contiguous()
    if segments is not None and segments.stride(1) != 1:
        segments = segments.contiguous()
    flags: dict[str, Any] = {
        "J": heads,
        "E": dim,
        "E_PADDED": max(32 if fp8 else 16, triton.next_power_of_2(dim)),
        "DECODE": decode,
        "MASKED": masked,
        "SEGMENTED": segments is not None,
        "SCALED": scaled,
        "ON_DEVICE": positions is not None,
    }
    # An absent tensor's place is taken by one that is there; nothing reads it.
    tensors = (
        q,
        w,
        k,
        w if q_scale is None else q_scale,
        out if k_scale is None else k_scale,
        out if segments is None else segments,
        out if positions is None else positions,
        out,
    )
    strides = (
        *q.stride()[:3],
        *w.stride(),
        *q_strides,
        0 if branches else k.stride(0),
        k.stride(1),
        0 if k_scale is None else k_scale.stride(0),
        0 if segments is None else segments.stride(0),
        *out.stride()[:2],
    )
    factor = dim**-0.5
    if queries <= FEW_QUERIES:
        tile = 64 if capability == 0 else 128
        grid = (triton.cdiv(keys, tile), queries, batch)
        _scores_few[grid](
            *tensors, queries, keys, offset, *((keys, 0) if branches is None else (branches.shared, branches.room)),
            factor, *strides,
            J_PADDED=max(16, triton.next_power_of_2(heads)), TILE_K=tile, SETTLED=settled, **flags, num_warps=8,
            **dependent_launch(device),
        )  # fmt: skip
        return
    if capability == 90:
        # Gluon is Triton's experiment: it is loaded only where it runs.
        from keyecli.kernels import hopper_scores

        if hopper_scores.score_into(out, q, w, k, segments, positions, offset, masked):
            return
    tiles = score_tiles(capability, q.element_size(), heads, flags["E_PADDED"])
    query_tiles, key_tiles = triton.cdiv(queries, tiles.queries), triton.cdiv(keys, tiles.keys)
    processors = device_processors(device) * tiles.blocks_per_processor
    run = keys_a_run(query_tiles, key_tiles, batch, processors)
    _scores[(query_tiles * triton.cdiv(key_tiles, run), batch)](
        *tensors, queries, keys, offset, run, factor, *strides,
        TILE_Q=tiles.queries, TILE_K=tiles.keys, STAGES=tiles.stages, RESIDENT=tiles.resident,
        PINNED=capability != 0, **flags, num_warps=tiles.warps,
    )  # fmt: skip


def padded_length(keys: int) -> int:
    """The row length that `score_into` wants for this many keys."""
    return triton.cdiv(keys, ROW_PADDING) * ROW_PADDING


def index_scores(
    q: Tensor, w: Tensor, k: Tensor, q_scale: Tensor | None = None, k_scale: Tensor | None = None
) -> Tensor:
    """Scores of all keys, unmasked, fp32 [B, T, S]: `reference.index_scores`. The last dimension is contiguous, the rows are
    padded. FP8 (float8_e4m3fn with scales) multiplies on the FP8 units from sm_89 on, whose sums keep some 14 bits; on older
    cards it is decoded to fp16 first and its sums are fp32."""
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    out = torch.empty((batch, queries, padded_length(keys)), dtype=torch.float32, device=q.device)
    score_into(out, q, w, k, q_scale=q_scale, k_scale=k_scale, masked=False)
    return out[:, :, :keys]


def _score_case(
    capability: int,
    element: str,
    *,
    few: bool = False,
    heads: int = 16,
    dim: int = 64,
    segmented: bool = False,
) -> CompileCase:
    """One of the two kernels as `score_into` would launch it, masked."""
    element_bytes = {"fp8e4nv": 1, "u8": 1, "bf16": 2, "fp16": 2, "fp32": 4}[element]
    scaled = element_bytes == 1
    tiles = score_tiles(capability, element_bytes, heads, dim)
    kernel = _scores_few if few else _scores
    gate = "bf16" if scaled else element
    pointers = {
        "q": f"*{element}", "w": f"*{gate}", "k": f"*{element}", "q_scale": "*fp32", "k_scale": "*fp32",
        "segments": "*i64", "positions": "*i32", "out": "*fp32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        "J": heads, "E": dim, "E_PADDED": dim, "DECODE": element == "u8", "MASKED": True, "SEGMENTED": segmented,
        "SCALED": scaled, "ON_DEVICE": few,
    }  # fmt: skip
    if few:
        constants |= {"J_PADDED": 16, "TILE_K": 128, "SETTLED": True, "DEPENDENT": capability >= 90}
    else:
        constants |= {
            "TILE_Q": tiles.queries, "TILE_K": tiles.keys, "STAGES": tiles.stages, "RESIDENT": tiles.resident,
            "PINNED": True,
        }  # fmt: skip
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, "fp32" if name == "factor" else "i32")
    strides = ("q_batch", "q_row", "q_head", "k_batch", "k_row", "out_batch", "out_row")
    return CompileCase(
        f"scores{' of few queries' if few else ''}, {element}, J {heads}, e {dim}{', segments' if segmented else ''}",
        kernel,
        signature,
        constants,
        num_warps=8 if few else tiles.warps,
        num_stages=2,
        divisible_by_16=(*pointers, *strides),
    )


def compile_cases(capability: int) -> list[CompileCase]:
    """The kernels of this file as the 30B model and keye-nano launch them."""
    fp8 = "fp8e4nv" if capability >= 89 else "u8"
    quantise = CompileCase(
        "quantise",
        _quantise,
        {"x": "*bf16", "values": "*u8", "scales": "*fp32", "N": "i32", "x_row": "i32", "factor": "fp32"}
        | dict.fromkeys(("E", "E_PADDED", "ROWS"), "constexpr"),
        {"E": 64, "E_PADDED": 64, "ROWS": 64},
        num_warps=4,
        divisible_by_16=("x", "values", "scales", "x_row"),
    )
    return [
        _score_case(capability, "bf16"),
        _score_case(capability, "bf16", segmented=True),
        _score_case(capability, "fp16", heads=4, dim=32),
        _score_case(capability, "fp32", heads=4, dim=32),
        _score_case(capability, fp8),
        _score_case(capability, "bf16", few=True),
        _score_case(capability, "bf16", few=True, segmented=True),
        _score_case(capability, fp8, few=True),
        _score_case(capability, "fp32", few=True, heads=4, dim=32),
        quantise,
    ]
