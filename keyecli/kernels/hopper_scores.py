"""The lightning indexer's scores on Hopper, in Gluon: matrix products that run while the ReLU and gates of others do.

Defined by `reference.index_scores`; `indexer.score_into` calls it. B batch, T queries, S keys, J indexer heads, e indexer dim.

A product of 64 queries × 128 keys × 64 dimensions holds a multiprocessor's matrix units for 256 cycles, its ReLU and gates the
other units for 128. A block is two warp groups that share the heads of 64 queries and take turns at tiles of keys. Each asks
for the product with the next head before it sums the last one, and the second group starts part of a tile behind the first,
so that one's products go on while the other stores its scores and begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from keyecli.kernels.compile import SHARED_LIMIT_BYTES, CompileCase
from keyecli.kernels.device import device_processors
from keyecli.kernels.indexer import (
    HIDDEN_BITS,
    first_position,
    keys_a_run,
    visible_pairs,
)

QUERIES = gl.constexpr(64)
GROUPS = gl.constexpr(2)
# Room for what Triton hands to the second warp group through shared memory, and for the barrier between the two.
HANDED_BYTES = 256

_first_position = gluon.jit(first_position.fn)
_visible_pairs = gluon.jit(visible_pairs.fn)
# Its name from Triton 3.7 on, and the one before.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@dataclass(frozen=True)
class HopperTiles:
    """How `_scores` is cut. keys: in a tile of one warp group. step: heads after which a warp group waits for its last product
    before it asks for another. behind: heads by which the second warp group starts later than the first, 0 to J − 1."""

    keys: int
    step: int
    behind: int


def hopper_tiles(heads: int, dim: int, element_bytes: int) -> HopperTiles | None:
    """Tiles by heads and padded dim; None where this kernel has none: for FP8 and fp32, where the heads of 64 queries do not
    fit into shared memory, and where their number has no divisor from 2 to 8."""
    if element_bytes != 2 or not 16 <= dim <= 128:
        return None
    # Heads that all stood in one step would have their addresses worked out ahead and pushed out of the registers.
    steps = [step for step in range(2, 9) if heads % step == 0 and (heads > step or heads <= 4)]
    for keys in (128, 64):
        # The heads, two tiles of keys for each warp group, the gates.
        elements = heads * QUERIES.value * dim + 2 * GROUPS.value * keys * dim
        if steps and 2 * elements + 4 * heads * QUERIES.value + HANDED_BYTES <= SHARED_LIMIT_BYTES[90]:
            # Half a tile apart, and not where the other one waits between two steps.
            behind = heads // 2 + (steps[-1] // 2 if heads > steps[-1] else 0)
            return HopperTiles(keys, steps[-1], behind)
    return None


@gluon.jit
def _copy_rows(shared, rows, row_stride, inside, ROWS: gl.constexpr, E: gl.constexpr, E_PADDED: gl.constexpr):
    """Ask for ROWS rows of which the first `inside` exist, zeros for the others. rows points at the first one."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E_PADDED, E_PADDED // 8], [4, 1], [1, 0])
    local = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, E_PADDED, layout=gl.SliceLayout(0, layout))
    mask = (local < inside)[:, None]
    if E < E_PADDED:
        mask = mask & (columns < E)[None, :]
    async_copy.async_copy_global_to_shared(
        shared, rows + (local[:, None] * row_stride + columns[None, :]), mask
    )
    # A copy that belongs to no group is waited for by nobody.
    async_copy.commit_group()


@gluon.jit
def _await_rows():
    """All that this warp group asked for is in shared memory, and its matrix units may read it."""
    async_copy.wait_group(0)
    fence_async_shared()
    _barrier()


@gluon.jit
def _in_place(stride):
    """A multiple of 16, hidden from the compiler, which would work out addresses ahead of the loop and have no registers left
    to keep them."""
    sixteenth = gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [stride // 16], dtype=gl.int32, is_pure=False, pack=1
    )
    return sixteenth * 16


@gluon.jit
def _add_head(total, product, gates):
    """total + gate · ReLU(product), as `indexer.add_head` and with its gates of half the size."""
    return total + gates[:, None] * (product + gl.abs(product))


@gluon.jit
def _score_tiles(
    heads, gates, keys, turn, k, segments, out,
    S, position, queries, begin, end, k_row, out_row, factor,
    SECOND: gl.constexpr, J: gl.constexpr, E: gl.constexpr, E_PADDED: gl.constexpr, TILE_K: gl.constexpr,
    STEP: gl.constexpr, BEHIND: gl.constexpr, MASKED: gl.constexpr, SEGMENTED: gl.constexpr,
):  # fmt: skip
    """One warp group: every second tile of keys from `begin` on. keys: its two places for a tile, in shared memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    zeros = gl.zeros([QUERIES, TILE_K], gl.float32, layout=layout)
    rows = gl.arange(0, QUERIES, layout=by_row)
    local = gl.arange(0, TILE_K, layout=gl.SliceLayout(0, layout))
    if begin < end:
        start = begin * TILE_K
        _copy_rows(keys.index(0), k + start.to(gl.int64) * k_row, k_row, S - start, TILE_K, E, E_PADDED)
        if SECOND and BEHIND > 0:
            mbarrier.wait(turn, 0)
        place = 0
        for tile in range(begin, end, GROUPS):
            start = tile * TILE_K
            tile_keys = keys.index(place).permute((1, 0))
            _await_rows()
            # All products of the tile before are done: the next keys take the place of its own.
            place = 1 - place
            following = start + GROUPS * TILE_K
            row_stride = _in_place(k_row)
            following_keys = k + following.to(gl.int64) * row_stride
            _copy_rows(keys.index(place), following_keys, row_stride, S - following, TILE_K, E, E_PADDED)
            _barrier()

            total = zeros
            for j in range(0, J, STEP):
                running = warpgroup_mma(heads.index(j), tile_keys, zeros, use_acc=False, is_async=True)
                for i in gl.static_range(STEP):
                    if not SECOND and BEHIND > 0 and i == BEHIND % STEP:
                        mbarrier.arrive(turn, count=1, pred=(tile == begin) & (j + i == BEHIND))
                    asked = running
                    if i < STEP - 1:
                        asked = warpgroup_mma(
                            heads.index(j + i + 1), tile_keys, zeros, use_acc=False, is_async=True
                        )
                        product = warpgroup_mma_wait(num_outstanding=1, deps=[running])
                    else:
                        # The compiler lets nothing run beside a product that goes on into the next turn of a loop.
                        product = warpgroup_mma_wait(num_outstanding=0, deps=[running])
                    total = _add_head(total, product, gates.index(j + i).load(by_row))
                    running = asked

            # Applied last, and the same number as in the definition, so that sums which are exact stay so.
            score = total * factor
            if MASKED and (SEGMENTED or start + TILE_K > gl.minimum(position + 1, S)):
                visible = _visible_pairs(segments, rows, start + local, queries, position, S, SEGMENTED)
                bits = gl.where(visible, score.to(gl.int32, bitcast=True), HIDDEN_BITS)
                score = bits.to(gl.float32, bitcast=True)
            first = out + rows * _in_place(out_row) + start
            gl.store(first[:, None] + local[None, :], score, mask=(rows < queries)[:, None])
        async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["T", "S", "offset", "run", "segment_batch"])
def _scores(
    q, w, k, segments, positions, out,
    T, S, offset, run, factor,
    q_batch, q_row, q_head, w_batch, w_row, w_head, k_batch, k_row, segment_batch, out_batch, out_row,
    J: gl.constexpr, E: gl.constexpr, E_PADDED: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr,
    BEHIND: gl.constexpr, MASKED: gl.constexpr, SEGMENTED: gl.constexpr, ON_DEVICE: gl.constexpr,
):  # fmt: skip
    """Scores of 64 queries against `run` tiles of keys. Grid: tiles of queries × runs, batch rows.

    With MASKED, tiles wholly behind the last query are left unwritten. Rows of q, k and out start at multiples of 16 elements.
    """
    query_tiles = gl.cdiv(T, QUERIES)
    row = (gl.program_id(0) % query_tiles) * QUERIES
    batch = gl.program_id(1).to(gl.int64)
    position = _first_position(positions, offset, batch, ON_DEVICE) + row
    queries = T - row
    first_row = row.to(gl.int64)
    q += batch * q_batch + first_row * q_row
    w += batch * w_batch + first_row * w_row
    k += batch * k_batch
    segments += batch * segment_batch
    out += batch * out_batch + first_row * out_row

    begin = (gl.program_id(0) // query_tiles) * run
    last = S
    if MASKED:
        last = gl.minimum(S, position + gl.minimum(queries, QUERIES))
    end = gl.minimum(begin + run, gl.cdiv(last, TILE_K))
    if begin >= end:
        return

    element: gl.constexpr = k.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([QUERIES, E_PADDED], element)
    heads = gl.allocate_shared_memory(element, [J, QUERIES, E_PADDED], swizzled)
    gates = gl.allocate_shared_memory(gl.float32, [J, QUERIES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    first_keys = gl.allocate_shared_memory(element, [2, TILE_K, E_PADDED], swizzled)
    second_keys = gl.allocate_shared_memory(element, [2, TILE_K, E_PADDED], swizzled)
    turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(turn, count=1)

    rows = gl.arange(0, QUERIES, layout=gl.BlockedLayout([1], [32], [4], [0]))
    held = ()
    for j in gl.static_range(J):
        _copy_rows(heads.index(j), q + j * q_head, q_row, queries, QUERIES, E, E_PADDED)
        gate = gl.load(w + j * w_head + rows * w_row, mask=rows < queries, other=0.0)
        # Half of it: x + |x| is twice the ReLU, and either is exact.
        held += (gate.to(gl.float32) * 0.5,)  # type: ignore[assignment]
    for j in gl.static_range(J):
        gates.index(j).store(held[j])
    _await_rows()
    gl.warp_specialize(
        [
            (
                _score_tiles,
                (
                    heads, gates, first_keys, turn, k, segments, out,
                    S, position, queries, begin, end, k_row, out_row, factor,
                    False, J, E, E_PADDED, TILE_K, STEP, BEHIND, MASKED, SEGMENTED,
                ),
            ),
            (
                _score_tiles,
                (
                    heads, gates, second_keys, turn, k, segments, out,
                    S, position, queries, begin + 1, end, k_row, out_row, factor,
                    True, J, E, E_PADDED, TILE_K, STEP, BEHIND, MASKED, SEGMENTED,
                ),
            ),
        ],
        [4],
        [240],
    )  # fmt: skip


def score_into(
    out: Tensor,
    q: Tensor,
    w: Tensor,
    k: Tensor,
    segments: Tensor | None,
    positions: Tensor | None,
    offset: int,
    masked: bool,
) -> bool:
    """`indexer.score_into` without scales, last dimensions contiguous. False, and nothing written, where this kernel has no
    tiles for the heads, or rows do not start at multiples of 16 elements, where asynchronous copies need them."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    padded = max(16, triton.next_power_of_2(dim))
    tiles = hopper_tiles(heads, padded, q.element_size())
    starts = (*q.stride()[:3], *k.stride()[:2], out.stride(1), q.data_ptr(), k.data_ptr())
    if tiles is None or any(start % 16 for start in starts):
        return False
    query_tiles, key_tiles = triton.cdiv(queries, QUERIES.value), triton.cdiv(keys, tiles.keys)
    run = keys_a_run(query_tiles, key_tiles, batch, device_processors(q.device))
    # An absent tensor's place is taken by one that is there; nothing reads it.
    _scores[(query_tiles * triton.cdiv(key_tiles, run), batch)](
        q, w, k, out if segments is None else segments, out if positions is None else positions, out,
        queries, keys, offset, run, dim**-0.5,
        *q.stride()[:3], *w.stride(), *k.stride()[:2], 0 if segments is None else segments.stride(0),
        *out.stride()[:2],
        J=heads, E=dim, E_PADDED=padded, TILE_K=tiles.keys, STEP=tiles.step, BEHIND=tiles.behind,
        MASKED=masked, SEGMENTED=segments is not None, ON_DEVICE=positions is not None, num_warps=4,
    )  # fmt: skip
    return True


def _case(
    element: str, *, heads: int = 16, dim: int = 64, masked: bool = True, segmented: bool = False
) -> CompileCase:
    """The kernel as `score_into` launches it; segmented, with positions on the device too."""
    padded = max(16, triton.next_power_of_2(dim))
    tiles = hopper_tiles(heads, padded, 2)
    if tiles is None:
        raise ValueError(f"no tiles for {heads} heads of {dim}")
    pointers = {
        "q": f"*{element}", "w": f"*{element}", "k": f"*{element}", "segments": "*i64", "positions": "*i32",
        "out": "*fp32",
    }  # fmt: skip
    constants: dict[str, Any] = {
        "J": heads, "E": dim, "E_PADDED": padded, "TILE_K": tiles.keys, "STEP": tiles.step, "BEHIND": tiles.behind,
        "MASKED": masked, "SEGMENTED": segmented, "ON_DEVICE": segmented,
    }  # fmt: skip
    signature = {}
    for name in _scores.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, "fp32" if name == "factor" else "i32")
    strides = ("q_batch", "q_row", "q_head", "k_batch", "k_row", "out_batch", "out_row")
    details = ", segments" if segmented else "" if masked else ", unmasked"
    return CompileCase(
        f"scores in Gluon, {element}, J {heads}, e {dim}{details}",
        _scores,
        signature,
        constants,
        num_warps=4,
        divisible_by_16=(*pointers, *strides),
    )


def compile_cases(capability: int) -> list[CompileCase]:
    """The kernel as the 30B model and keye-nano launch it, and at the edges of what it takes; nothing but for Hopper."""
    if capability != 90:
        return []
    return [
        _case("bf16"),
        _case("bf16", segmented=True),
        _case("bf16", masked=False),
        _case("fp16", heads=4, dim=32),
        _case("bf16", heads=8, dim=128),
        _case("bf16", heads=6, dim=48),
    ]
