"""Attention over index lists in Triton: every query reads its own selected keys, forward and backward.

`reference.attend_indices` and `reference.selected_probabilities` are the definitions. Three methods compute the same:

gather  a program a (query, key/value head): the query's heads on one small tile, its own keys gathered.
union   a program a (group of adjacent queries, key/value head): its queries · ratio rows on one tile over the union of their
        selections. Adjacent queries share most keys (of 128K keys 8 of them select ~6K distinct ones where 8 gathers read
        16K, and 16 select ~8K), and the tile is high enough for the matrix units.
dense   the same tile over all keys in order, without tiles of keys in which the group selects nothing.

The last two know from a word a key, with a bit a query, which queries of the group select it; see `unions`. A group of 16
reads fewer keys a query, a group of 8 does less arithmetic for pairs that nobody selected.

B batch, T queries, S keys, H query heads, G key/value heads, ratio H / G, d head dim, K most keys a query selects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from keyecli.kernels import unions
from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import device_capability, precision_of
from keyecli.kernels.fp8 import as_multiplied, as_read, element_type, readable
from keyecli.kernels.unions import GROUP, chunks

Method = Literal["gather", "union", "dense"]

# Up to this many keys for each one that a query selects, the union of a group holds so much of all keys that gathering it
# costs more than going through them in order.
DENSE_CROSSOVER = 1
HOPPER_ROWS = 64
# Below this many queries (of all sequences) the union method has fewer programs than the chip has processors.
UNION_QUERIES = 256

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: keys of a tile, warps of a program, stages of its software pipeline, the most query heads of a
    tile and the queries of a group, 8 or 16 (its rows are the product), and the most registers a thread may have (None: the
    compiler's choice)."""

    keys: int
    warps: int
    stages: int
    heads: int = 8
    queries: int = 16
    registers: int | None = None

    def heads_of(self, ratio: int) -> int:
        """Query heads of a tile where a key head has `ratio` of them."""
        return min(self.heads, ratio)

    def queries_of(self, ratio: int) -> int:
        """Queries of a group there: 16 where 8 would not make the 64 rows that Hopper's matrix units take at once."""
        return self.queries if self.queries * self.heads_of(ratio) >= HOPPER_ROWS else GROUP.value


@dataclass(frozen=True)
class Tiles:
    """The tiles of every kernel here on one kind of device; key_gradient serves those that are added up in order."""

    attend: Tile
    group_gradient: Tile
    key_gradient: Tile
    gather: Tile
    probabilities: Tile


def tiles(capability: int, element_bytes: int) -> Tiles:
    """By compute capability (0: the interpreter) and bytes of an element, for head dims up to 128.

    sm_90 has 227 KiB of shared memory for all programs of a processor: in the forward pass two of 64 rows share it, and one
    multiplies while the other takes its exponentials. Elsewhere what fits into the 99 KiB of sm_86, sm_89 and sm_120 serves
    sm_80 as well. fp32 has no matrix units and is there to be right: few rows, or its operands overflow registers and shared
    memory.
    """
    if capability == 0:
        small = Tile(16, 4, 1)
        return Tiles(small, small, Tile(16, 4, 1, heads=4), small, small)
    if element_bytes == 4:
        low = Tile(16, 8, 1, heads=2)
        return Tiles(low, low, low, Tile(32, 4, 1), Tile(32, 4, 1))
    if capability == 90:
        return Tiles(
            attend=Tile(64, 4, 3, queries=8),
            group_gradient=Tile(64, 8, 3),
            key_gradient=Tile(128, 8, 2, heads=4),
            gather=Tile(128, 4, 2),
            probabilities=Tile(64, 4, 3),
        )
    return Tiles(
        attend=Tile(64, 8, 2),
        group_gradient=Tile(32, 8, 2),
        key_gradient=Tile(64, 8, 2, heads=4),
        gather=Tile(64, 4, 2),
        probabilities=Tile(64, 4, 2),
    )


def choose_method(batch: int, queries: int, keys: int, length: int) -> Method:
    """By shapes only, so that the same call always takes the same way: "gather" for few queries, else "dense" up to
    `DENSE_CROSSOVER` keys for each selected one, else "union". `length` is K."""
    if batch * queries < UNION_QUERIES:
        return "gather"
    return "dense" if keys <= DENSE_CROSSOVER * length else "union"


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    method: Method | None = None,
    found: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention of every query over its own keys; `reference.attend_indices` is the definition.

    q: [B, T, H, d]; k, v: [B, S, G, d], any strides (prefixes of longer buffers are read in place), H = G · 1, 2, 4 or 8, d 16,
    32, 64 or 128, one of bf16, fp16 and fp32; k and v also FP8. indices: int [B, T, K], distinct keys of every query, −1 for
    none. Returns the output [B, T, H, d] in q's type and the natural logarithm of the softmax denominators, fp32 [B, T, H]; 0
    and −inf for a query without keys. Gradients reach q, k and v through both, under `torch.use_deterministic_algorithms` the
    same bits every time; with FP8 there are none, ValueError where one is wanted. found: both results where they are known, so
    that only gradients remain to be computed.
    """
    check(q, k, v, indices)
    if k.dtype != q.dtype and q.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "attention over FP8 keys and values has no gradients: keep them in the queries' type"
        )
    if method is None:
        method = choose_method(q.shape[0], q.shape[1], k.shape[1], indices.shape[-1])
    out, lse = SparseAttention.apply(q, k, v, indices, method, found)
    return out, lse


def check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> None:
    """ValueError for what no kernel here is made for."""
    heads, dim = q.shape[2:]
    groups = k.shape[2]
    if heads % groups or heads // groups not in (1, 2, 4, 8):
        raise ValueError(f"{heads} query heads over {groups} key heads: the ratio must be 1, 2, 4 or 8")
    if dim not in (16, 32, 64, 128):
        raise ValueError(f"head dim {dim}: must be 16, 32, 64 or 128")
    if indices.shape[:2] != q.shape[:2]:
        raise ValueError(f"indices of {list(indices.shape[:2])} queries for {list(q.shape[:2])}")
    if v.shape != k.shape:
        raise ValueError(f"values {list(v.shape)} for keys {list(k.shape)}")
    if k.dtype != v.dtype or k.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(f"queries, keys and values of types {q.dtype}, {k.dtype} and {v.dtype}")


def rows_of(x: Tensor) -> Tensor:
    """The tensor itself where its rows are contiguous, as all kernels need, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class SparseAttention(torch.autograd.Function):
    """`sparse_attention` with its gradients; whatever the method, the backward pass works on groups of queries."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        method: Method,
        found: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = rows_of(q), rows_of(k), rows_of(v)
        indices = indices.to(torch.int32).contiguous()
        out, lse = found or _attend(q, k, v, indices, method)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, indices, out, lse)
        ctx.dense = method == "dense"
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, out_gradient: Tensor | None, lse_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, indices, out, lse = ctx.saved_tensors
        if out_gradient is None:
            out_gradient = torch.zeros_like(out)
        gradients = attention_gradients(q, k, v, indices, out, lse, out_gradient, lse_gradient, ctx.dense)
        return (*gradients, None, None, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if method == "gather":
        attend_gathered(q, k, v, indices, out, lse)
    else:
        attend_grouped(q, k, v, indices, out, lse, method == "dense")
    return out, lse


def attend_gathered(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse` by the gather method."""
    batch, queries, heads, dim = q.shape
    groups = k.shape[2]
    tile = tiles(device_capability(q.device), q.element_size()).gather
    _gather_kernel[(batch * queries * groups,)](
        q, readable(k), readable(v), indices, out, lse, queries, indices.shape[-1], groups,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], dim**-0.5 * LOG2_E.value,
        RATIO=heads // groups, DIM=dim, KEYS=tile.keys, PRECISION=precision_of(q.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def attend_grouped(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dense: bool
) -> None:
    """Fill `out` and `lse` by the dense or the union method."""
    heads, dim = q.shape[2:]
    keys, groups = k.shape[1:3]
    ratio, capability = heads // groups, device_capability(q.device)
    cut, scale = tiles(capability, q.element_size()), dim**-0.5 * LOG2_E.value
    tile = cut.attend
    heads_of_tile, queries_of_group = tile.heads_of(ratio), tile.queries_of(ratio)
    for chunk in chunks(indices, keys, queries_of_group, "bitmap" if dense else "unions"):
        entries = chunk.tile_lists(tile.keys) if dense else chunk.unions()
        _attend_kernel[(heads // heads_of_tile * chunk.groups,)](
            q, readable(k), readable(v), out, lse, *entries.pointers(), chunk.first_group, chunk.groups_per_sequence,
            q.shape[1], heads, entries.keys.stride(0), entries.words.stride(0), *q.stride()[:3],
            k.stride(0), k.stride(2), v.stride(0), v.stride(2), scale,
            K_KEY=k.stride(1), V_KEY=v.stride(1), RATIO=ratio, HEADS=heads_of_tile, QUERIES=queries_of_group,
            DIM=dim, KEYS=tile.keys, DENSE=dense, PRECISION=precision_of(q.dtype), ASSEMBLY=capability > 0,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip


def attention_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    out_gradient: Tensor,
    lse_gradient: Tensor | None,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of keys and values are sums over queries, taken in fp32: as the groups of queries come,
    which is fast, or, where `torch.use_deterministic_algorithms` asks for it, in the order of the queries, by a kernel that
    goes through all groups for each tile of keys."""
    queries, heads, dim = q.shape[1:]
    keys, groups = k.shape[1:3]
    ratio, capability = heads // groups, device_capability(q.device)
    cut, repeatable = tiles(capability, q.element_size()), torch.are_deterministic_algorithms_enabled()
    out_gradient = out_gradient.contiguous()
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(lse.numel(), GROUP.value),)](
        out, out_gradient, lse if lse_gradient is None else lse_gradient.contiguous(), delta, lse.numel(),
        DIM=dim, HAS_LSE=lse_gradient is not None,
    )  # fmt: skip
    q_gradient = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_gradient = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    v_gradient = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    given = (q, k, v, out_gradient, lse, delta)
    strides = (*q.stride()[:3], k.stride(0), k.stride(2), v.stride(0), v.stride(2))
    scales = (dim**-0.5 * LOG2_E.value, dim**-0.5)
    shape = {
        "K_KEY": k.stride(1), "V_KEY": v.stride(1), "RATIO": ratio, "DIM": dim, "PRECISION": precision_of(q.dtype),
        "ASSEMBLY": capability > 0,
    }  # fmt: skip

    tile = cut.group_gradient
    heads_of_tile, queries_of_group = tile.heads_of(ratio), tile.queries_of(ratio)
    for chunk in chunks(indices, keys, queries_of_group, "bitmap" if dense else "unions"):
        entries = chunk.tile_lists(tile.keys) if dense else chunk.unions()
        _group_gradient_kernel[(heads // heads_of_tile * chunk.groups,)](
            *given, q_gradient, k_gradient, v_gradient, *entries.pointers(), chunk.first_group,
            chunk.groups_per_sequence, queries, heads, keys,
            entries.keys.stride(0), entries.words.stride(0), *strides, *scales,
            **shape, HEADS=heads_of_tile, QUERIES=queries_of_group, KEYS=tile.keys, DENSE=dense,
            KEY_GRADIENTS=not repeatable,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip
    if repeatable:
        tile = cut.key_gradient
        heads_of_tile, queries_of_group = tile.heads_of(ratio), tile.queries_of(ratio)
        for chunk in chunks(indices, keys, queries_of_group, "bitmap"):
            readers = chunk.reader_lists(tile.keys)
            _key_gradient_kernel[(triton.cdiv(keys, tile.keys) * groups * q.shape[0],)](
                *given, k_gradient, v_gradient, *readers.pointers(), chunk.first_group, chunk.groups_per_sequence,
                queries, heads, keys, readers.keys.stride(0), readers.words.stride(0), *strides, *scales,
                **shape, HEADS=heads_of_tile, QUERIES=queries_of_group, KEYS=tile.keys,
                num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
            )  # fmt: skip
    return q_gradient, k_gradient.to(k.dtype), v_gradient.to(v.dtype)


@torch.no_grad()
def selected_probabilities(q: Tensor, k: Tensor, indices: Tensor, lse: Tensor) -> Tensor:
    """Softmax weights on each selected key, the mean over all heads: what the indexer learns from, hence without gradients.

    q: [B, T, H, d]; k: [B, S, G, d]; indices: int [B, T, K], −1 for none; lse: fp32 [B, T, H], as `sparse_attention` returns
    it. Returns fp32 [B, T, K], 0 at −1. `reference.selected_probabilities` is the definition.
    """
    check(q, k, k, indices)
    q, k, indices, lse = rows_of(q), rows_of(k), indices.to(torch.int32).contiguous(), lse.contiguous()
    batch, queries, heads, dim = q.shape
    groups, length = k.shape[2], indices.shape[-1]
    tile = tiles(device_capability(q.device), q.element_size()).probabilities
    probabilities = torch.empty(indices.shape, dtype=torch.float32, device=q.device)
    _probabilities_kernel[(batch * queries, triton.cdiv(length, tile.keys))](
        q, readable(k), indices, lse, probabilities, queries, length, groups, *q.stride()[:3], *k.stride()[:3],
        dim**-0.5 * LOG2_E.value, RATIO=heads // groups, DIM=dim, KEYS=tile.keys, PRECISION=precision_of(q.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return probabilities


@triton.jit
def attend_list(
    queries,
    k,
    v,
    indices,
    begin,
    end,
    k_key,
    v_key,
    shared,
    offset,
    scale,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of one query's heads over the entries begin … end − 1 of its list.

    queries: tile [rows, DIM]; k, v: pointers to the key/value head, also FP8, whose keys from `shared` on stand `offset` rows
    further. Returns the weighted sum of values [rows, DIM] without its denominator, the largest scaled logit (base 2) and the
    denominator [rows]; 0, −inf and 0 where there was no key.
    """
    dims = tl.arange(0, DIM)
    offsets = tl.arange(0, KEYS)
    queries, _, tile_scale = as_multiplied(queries, scale, k.dtype.element_ty)
    maximum = tl.full([queries.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([queries.shape[0]], tl.float32)
    sums = tl.zeros([queries.shape[0], DIM], tl.float32)
    chosen = tl.load(indices + begin + offsets, mask=begin + offsets < end, other=-1)
    for start in range(begin, end, KEYS):
        # One step ahead, so that the rows can be asked for as soon as the step begins.
        ahead = start + KEYS + offsets
        following = tl.load(indices + ahead, mask=ahead < end, other=-1)
        present = chosen >= 0
        rows = (chosen + tl.where(chosen < shared, 0, offset)).to(tl.int64)[:, None]
        keys = tl.load(k + rows * k_key + dims[None, :], mask=present[:, None], other=0.0)
        # Asked for together: one tile is often all that a program has, and then nothing else hides the way from memory.
        values = tl.load(v + rows * v_key + dims[None, :], mask=present[:, None], other=0.0)
        keys = as_read(keys, queries.dtype)
        values = as_read(values, queries.dtype)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * tile_scale
        logits = tl.where(present[None, :], logits, float("-inf"))
        largest = tl.maximum(maximum, tl.max(logits, 1))
        # While a row has met no key its largest logit is −inf, and −inf − −inf is not a number.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(values.dtype), values, sums, input_precision=PRECISION)
        maximum = largest
        chosen = following
    return sums, maximum, total


@triton.jit(do_not_specialize=["tokens"])
def _gather_kernel(
    q,
    k,
    v,
    indices,
    out,
    lse,
    tokens,
    length,
    key_heads,
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
):
    """One query and key/value head; the `RATIO` heads stand on a tile of 16 rows, the least that the matrix units take."""
    key_head = tl.program_id(0) % key_heads
    row = (tl.program_id(0) // key_heads).to(tl.int64)
    batch = row // tokens
    token = row % tokens
    dims = tl.arange(0, DIM)
    heads = tl.arange(0, GROUP)
    inside = heads < RATIO
    head = (key_head * RATIO + heads).to(tl.int64)
    q_rows = q + batch * q_batch + token * q_token + head * q_head
    queries = tl.load(q_rows[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
    sums, maximum, total = attend_list(
        queries,
        k + batch * k_batch + key_head.to(tl.int64) * k_head,
        v + batch * v_batch + key_head.to(tl.int64) * v_head,
        indices + row * length,
        0,
        length,
        k_key,
        v_key,
        0,
        0,
        scale,
        KEYS,
        DIM,
        PRECISION,
    )
    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    place = row * (key_heads * RATIO) + head
    tl.store(out + place[:, None] * DIM + dims[None, :], sums.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + place, (maximum + tl.log2(tl.where(empty, 1.0, total))) * LN_2, mask=inside)


@triton.jit
def _only_selected(logits, words, bits, ASSEMBLY: tl.constexpr):
    """Logits [rows, keys] where the key's word has the row's bit, one of the lowest 16, else −inf.

    The bit among those of −inf makes a NaN, and the smaller of a number and a NaN is the number. In assembly because LLVM
    packs the comparisons of 32 and more elements into words and unpacks them again, which takes a fifth of all instructions
    of the forward loop; so it is one logical instruction and one minimum, neither of which waits for a predicate.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 t, $2, $3; or.b32 t, t, 0xFF800000; min.f32 $0, $1, t; }",
            "=f,f,r,r",
            [logits, words, bits],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.where((words & bits) != 0, logits, float("-inf"))


@triton.jit
def _tile_words(lists, bitmap, step, count, KEYS: tl.constexpr):
    """The keys of a group's tile number `step` and their words; beyond the last tile those of the first tile of all."""
    tile = tl.load(lists + step, mask=step < count, other=0)
    keys = tile * KEYS + tl.arange(0, KEYS)
    return keys, tl.load(bitmap + keys).to(tl.int32)


@triton.jit(do_not_specialize=["first_group", "groups_per_sequence", "tokens"])
def _attend_kernel(
    q,
    k,
    v,
    out,
    lse,
    entries,
    words_of_entries,
    counts,
    first_group,
    groups_per_sequence,
    tokens,
    heads,
    entry_stride,
    word_stride,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    scale,
    K_KEY: tl.constexpr,
    V_KEY: tl.constexpr,
    RATIO: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """QUERIES adjacent queries × HEADS heads over the tiles of their bitmap (DENSE) or over their union.

    The key/value heads of a group run side by side, since the rows of a key lie side by side in memory; the stride from key
    to key is a constant, so that a row's address takes one instruction. The loop fetches the next tile's key indices a step
    ahead by hand: only then does the compiler pipeline the loads of the rows behind them to the depth that `num_stages` asks
    for.
    """
    ROWS: tl.constexpr = QUERIES * HEADS
    parts = heads // HEADS
    first_head = (tl.program_id(0) % parts) * HEADS
    key_head = (first_head // RATIO).to(tl.int64)
    local = (tl.program_id(0) // parts).to(tl.int64)
    batch = (first_group + local) // groups_per_sequence
    first_token = (first_group + local) % groups_per_sequence * QUERIES
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    offsets = tl.arange(0, KEYS)
    bits = tl.full([ROWS], 1, tl.int32) << (rows // HEADS)
    inside = rows // HEADS < tokens - first_token
    q += batch * q_batch + first_token * q_token + first_head.to(tl.int64) * q_head
    q_rows = (rows // HEADS).to(tl.int64) * q_token + (rows % HEADS).to(tl.int64) * q_head
    queries = tl.load(q + q_rows[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    entries += local * entry_stride
    words_of_entries += local * word_stride
    count = tl.load(counts + local)

    queries, row_scale, tile_scale = as_multiplied(queries, scale, k.dtype.element_ty)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM], tl.float32)
    if DENSE:
        steps = count
        keys, words = _tile_words(entries, words_of_entries, 0, count, KEYS)
    else:
        steps = tl.cdiv(count, KEYS)
        keys = tl.load(entries + offsets)
    for step in range(steps):
        if DENSE:
            next_keys, next_words = _tile_words(entries, words_of_entries, step + 1, count, KEYS)
            # Rows that nobody here selects may hold anything, and 0 · NaN is NaN: they are not read.
            selected = (words != 0)[:, None]
            key_rows = tl.load(
                k + keys.to(tl.int64)[:, None] * K_KEY + dims[None, :], mask=selected, other=0.0
            )
        else:
            next_keys = tl.load(entries + (step + 1) * KEYS + offsets)
            words = tl.load(words_of_entries + step * KEYS + offsets)
            key_rows = tl.load(k + keys.to(tl.int64)[:, None] * K_KEY + dims[None, :])
        key_rows = as_read(key_rows, queries.dtype)
        logits = tl.dot(queries, tl.trans(key_rows), input_precision=PRECISION)
        logits = _only_selected(logits, words[None, :], bits[:, None], ASSEMBLY)
        largest = tl.maximum(maximum, tl.max(logits, 1))
        base = tl.where(largest == float("-inf"), 0.0, largest * row_scale)
        weights = tl.exp2(logits * tile_scale - base[:, None])
        shrink = tl.exp2(maximum * row_scale - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        if DENSE:
            value_rows = tl.load(
                v + keys.to(tl.int64)[:, None] * V_KEY + dims[None, :], mask=selected, other=0.0
            )
        else:
            value_rows = tl.load(v + keys.to(tl.int64)[:, None] * V_KEY + dims[None, :])
        value_rows = as_read(value_rows, queries.dtype)
        sums = tl.dot(weights.to(value_rows.dtype), value_rows, sums, input_precision=PRECISION)
        maximum = largest
        keys = next_keys
        if DENSE:
            words = next_words

    total = tl.where(total == 0.0, 1.0, total)
    sums = sums / total[:, None]
    # Where the tile begins in what is contiguous over tokens and heads, and where its rows stand from there.
    begin = (batch * tokens + first_token) * heads + first_head
    place = rows // HEADS * heads + rows % HEADS
    out += begin * DIM
    tl.store(out + place[:, None] * DIM + dims[None, :], sums.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + begin + place, (maximum * row_scale + tl.log2(total)) * LN_2, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _delta_kernel(out, out_gradient, lse_gradient, delta, rows, DIM: tl.constexpr, HAS_LSE: tl.constexpr):
    """What the softmax's gradient subtracts from every logit of a row: Σ out · out_gradient − lse_gradient."""
    row = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    place = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    inside = row < rows
    products = tl.load(out + place, mask=inside[:, None], other=0.0).to(tl.float32)
    products *= tl.load(out_gradient + place, mask=inside[:, None], other=0.0).to(tl.float32)
    result = tl.sum(products, 1)
    if HAS_LSE:
        result -= tl.load(lse_gradient + row, mask=inside, other=0.0)
    tl.store(delta + row, result, mask=inside)


@triton.jit(do_not_specialize=["first_group", "groups_per_sequence", "tokens", "keys_of_all"])
def _group_gradient_kernel(
    q,
    k,
    v,
    out_gradient,
    lse,
    delta,
    q_gradient,
    k_gradient,
    v_gradient,
    entries,
    words_of_entries,
    counts,
    first_group,
    groups_per_sequence,
    tokens,
    heads,
    keys_of_all,
    entry_stride,
    word_stride,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    scale,
    plain_scale,
    K_KEY: tl.constexpr,
    V_KEY: tl.constexpr,
    RATIO: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    DENSE: tl.constexpr,
    KEY_GRADIENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Gradients of the queries of a group, over the same tiles as the forward pass; with KEY_GRADIENTS also what the group adds
    to those of its keys and values, by atomics, since other groups add to the same at any time."""
    ROWS: tl.constexpr = QUERIES * HEADS
    parts = heads // HEADS
    first_head = (tl.program_id(0) % parts) * HEADS
    key_head = (first_head // RATIO).to(tl.int64)
    local = (tl.program_id(0) // parts).to(tl.int64)
    batch = (first_group + local) // groups_per_sequence
    first_token = (first_group + local) % groups_per_sequence * QUERIES
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    offsets = tl.arange(0, KEYS)
    bits = tl.full([ROWS], 1, tl.int32) << (rows // HEADS)
    inside = rows // HEADS < tokens - first_token
    q += batch * q_batch + first_token * q_token + first_head.to(tl.int64) * q_head
    q_rows = (rows // HEADS).to(tl.int64) * q_token + (rows % HEADS).to(tl.int64) * q_head
    queries = tl.load(q + q_rows[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
    # Where the tile begins in what is contiguous over tokens and heads, and where its rows stand from there.
    begin = (batch * tokens + first_token) * heads + first_head
    place = rows // HEADS * heads + rows % HEADS
    out_gradient += begin * DIM
    gradients = tl.load(out_gradient + place[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
    row_lse = tl.load(lse + begin + place, mask=inside, other=0.0)
    # A row without keys has −inf here and in all its logits, whose difference would not be a number.
    base = tl.where(row_lse == float("-inf"), 0.0, row_lse) * LOG2_E
    row_delta = tl.load(delta + begin + place, mask=inside, other=0.0)
    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    entries += local * entry_stride
    words_of_entries += local * word_stride
    count = tl.load(counts + local)

    result = tl.zeros([ROWS, DIM], tl.float32)
    if DENSE:
        steps = count
        keys, words = _tile_words(entries, words_of_entries, 0, count, KEYS)
    else:
        steps = tl.cdiv(count, KEYS)
        keys = tl.load(entries + offsets)
    for step in range(steps):
        key_places = keys.to(tl.int64)[:, None]
        if DENSE:
            next_keys, next_words = _tile_words(entries, words_of_entries, step + 1, count, KEYS)
            selected = (words != 0)[:, None]
            key_rows = tl.load(k + key_places * K_KEY + dims[None, :], mask=selected, other=0.0)
            value_rows = tl.load(v + key_places * V_KEY + dims[None, :], mask=selected, other=0.0)
        else:
            next_keys = tl.load(entries + (step + 1) * KEYS + offsets)
            words = tl.load(words_of_entries + step * KEYS + offsets)
            key_rows = tl.load(k + key_places * K_KEY + dims[None, :])
            value_rows = tl.load(v + key_places * V_KEY + dims[None, :])
        logits = tl.dot(queries, tl.trans(key_rows), input_precision=PRECISION)
        logits = _only_selected(logits, words[None, :], bits[:, None], ASSEMBLY)
        weights = tl.exp2(logits * scale - base[:, None])
        towards = tl.dot(gradients, tl.trans(value_rows), input_precision=PRECISION)
        logit_gradients = (weights * (towards - row_delta[:, None])).to(key_rows.dtype)
        result = tl.dot(logit_gradients, key_rows, result, input_precision=PRECISION)
        if KEY_GRADIENTS:
            sums = ((batch * keys_of_all + key_places) * (heads // RATIO) + key_head) * DIM + dims[None, :]
            chosen = (words != 0)[:, None]
            v_part = tl.dot(tl.trans(weights.to(gradients.dtype)), gradients, input_precision=PRECISION)
            tl.atomic_add(v_gradient + sums, v_part, mask=chosen, sem="relaxed")
            k_part = tl.dot(tl.trans(logit_gradients), queries, input_precision=PRECISION) * plain_scale
            tl.atomic_add(k_gradient + sums, k_part, mask=chosen, sem="relaxed")
        keys = next_keys
        if DENSE:
            words = next_words

    q_gradient += begin * DIM
    tl.store(
        q_gradient + place[:, None] * DIM + dims[None, :],
        (result * plain_scale).to(q_gradient.dtype.element_ty),
        mask=inside[:, None],
    )


@triton.jit(do_not_specialize=["first_group", "groups_per_sequence", "tokens", "keys_of_all"])
def _key_gradient_kernel(
    q,
    k,
    v,
    out_gradient,
    lse,
    delta,
    k_gradient,
    v_gradient,
    readers,
    bitmap,
    counts,
    first_group,
    groups_per_sequence,
    tokens,
    heads,
    keys_of_all,
    reader_stride,
    word_stride,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    scale,
    plain_scale,
    K_KEY: tl.constexpr,
    V_KEY: tl.constexpr,
    RATIO: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Add to the gradients of a tile of keys and values what the groups that select any of them contribute, in order.

    Everything is transposed, keys down and rows of queries across, so that both sums build up where they are. Programs of the
    early keys, which most groups may read, come first.
    """
    ROWS: tl.constexpr = QUERIES * HEADS
    PARTS: tl.constexpr = RATIO // HEADS
    key_heads = heads // RATIO
    batch_count = tl.num_programs(0) // (key_heads * tl.cdiv(keys_of_all, KEYS))
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    sequence = (tl.program_id(0) // key_heads) % batch_count
    tile = (tl.program_id(0) // key_heads // batch_count).to(tl.int64)
    batch = sequence.to(tl.int64)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    keys = tile * KEYS + tl.arange(0, KEYS)
    existing = (keys < keys_of_all)[:, None]
    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    key_rows = tl.load(k + keys[:, None] * K_KEY + dims[None, :], mask=existing, other=0.0)
    value_rows = tl.load(v + keys[:, None] * V_KEY + dims[None, :], mask=existing, other=0.0)
    bits = tl.full([ROWS], 1, tl.int32) << (rows // HEADS)
    q += batch * q_batch + key_head * RATIO * q_head
    q_rows = (rows // HEADS).to(tl.int64) * q_token + (rows % HEADS).to(tl.int64) * q_head
    place = rows // HEADS * heads + rows % HEADS
    bitmap += tile * KEYS
    readers += tile * reader_stride + tl.maximum(sequence * groups_per_sequence - first_group, 0)
    steps = tl.load(counts + tile * batch_count + batch) * PARTS

    k_sums = tl.zeros([KEYS, DIM], tl.float32)
    v_sums = tl.zeros([KEYS, DIM], tl.float32)
    local = tl.load(readers, mask=steps > 0, other=0).to(tl.int64)
    for step in range(steps):
        next_local = tl.load(readers + (step + 1) // PARTS, mask=step + 1 < steps, other=0).to(tl.int64)
        words = tl.load(bitmap + local * word_stride + tl.arange(0, KEYS)).to(tl.int32)
        first_token = (first_group + local - batch * groups_per_sequence) * QUERIES
        part = tl.cast(step % PARTS * HEADS, tl.int64)
        inside = rows // HEADS < tokens - first_token
        q_of_step = q + first_token * q_token + part * q_head
        queries = tl.load(q_of_step + q_rows[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        begin = (batch * tokens + first_token) * heads + key_head * RATIO + part
        row_lse = tl.load(lse + begin + place, mask=inside, other=0.0)
        base = tl.where(row_lse == float("-inf"), 0.0, row_lse) * LOG2_E
        logits = tl.dot(key_rows, tl.trans(queries), input_precision=PRECISION)
        logits = _only_selected(logits, words[:, None], bits[None, :], ASSEMBLY)
        weights = tl.exp2(logits * scale - base[None, :])
        gradients_of_step = out_gradient + begin * DIM
        gradients = tl.load(
            gradients_of_step + place[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0
        )
        row_delta = tl.load(delta + begin + place, mask=inside, other=0.0)
        v_sums = tl.dot(weights.to(gradients.dtype), gradients, v_sums, input_precision=PRECISION)
        towards = tl.dot(value_rows, tl.trans(gradients), input_precision=PRECISION)
        # Values that nobody selects may hold anything, and 0 · NaN is NaN.
        logit_gradients = tl.where(weights == 0.0, 0.0, weights * (towards - row_delta[None, :]))
        k_sums = tl.dot(logit_gradients.to(queries.dtype), queries, k_sums, input_precision=PRECISION)
        local = next_local

    if steps > 0:
        place_of_keys = ((batch * keys_of_all + keys) * key_heads + key_head)[:, None] * DIM + dims[None, :]
        # One after the other: each takes as many registers as its sum.
        k_before = tl.load(k_gradient + place_of_keys, mask=existing, other=0.0)
        tl.store(k_gradient + place_of_keys, k_before + k_sums * plain_scale, mask=existing)
        v_before = tl.load(v_gradient + place_of_keys, mask=existing, other=0.0)
        tl.store(v_gradient + place_of_keys, v_before + v_sums, mask=existing)


@triton.jit(do_not_specialize=["tokens"])
def _probabilities_kernel(
    q,
    k,
    indices,
    lse,
    probabilities,
    tokens,
    length,
    key_heads,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_key,
    k_head,
    scale,
    RATIO: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query and a stretch of its list, over all heads."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    token = row % tokens
    dims = tl.arange(0, DIM)
    heads = tl.arange(0, GROUP)
    inside = heads < RATIO
    offsets = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    chosen = tl.load(indices + row * length + offsets, mask=offsets < length, other=-1)
    present = chosen >= 0
    k_rows = k + batch * k_batch + chosen.to(tl.int64) * k_key
    result = tl.zeros([KEYS], tl.float32)
    for key_head in range(key_heads):
        head = key_head * RATIO + heads
        q_rows = q + batch * q_batch + token * q_token + head.to(tl.int64) * q_head
        queries = tl.load(q_rows[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        keys = tl.load(k_rows[:, None] + dims[None, :], mask=present[:, None], other=0.0)
        keys = as_read(keys, queries.dtype)
        row_lse = tl.load(lse + row * (key_heads * RATIO) + head, mask=inside, other=0.0) * LOG2_E
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        weights = tl.exp2(logits - row_lse[:, None])
        result += tl.sum(tl.where(inside[:, None] & present[None, :], weights, 0.0), 0)
        k_rows += k_head
    result = result / (key_heads * RATIO)
    tl.store(probabilities + row * length + offsets, result, mask=offsets < length)


def compile_cases(capability: int) -> list[CompileCase]:
    """The kernels as models with 8 query heads a key head launch them: bf16 and fp32 with head dim 128, the forward pass with
    64 too; and those that make the lists."""
    cases = unions.compile_cases(capability)
    for kind, element_bytes, dim in (("bf16", 2, 128), ("fp32", 4, 128), ("bf16", 2, 64)):
        cut = tiles(capability, element_bytes)
        shape = {"RATIO": 8, "DIM": dim, "PRECISION": "ieee" if kind == "fp32" else "tf32"}
        grouped = {**shape, "ASSEMBLY": True}
        launches = [("attend union", _attend_kernel, cut.attend, {**grouped, "DENSE": False})]
        if dim == 128:
            launches += [
                (
                    "group gradient union",
                    _group_gradient_kernel,
                    cut.group_gradient,
                    {**grouped, "DENSE": False, "KEY_GRADIENTS": True},
                ),
                (
                    "query gradient union",
                    _group_gradient_kernel,
                    cut.group_gradient,
                    {**grouped, "DENSE": False, "KEY_GRADIENTS": False},
                ),
                ("key gradient", _key_gradient_kernel, cut.key_gradient, grouped),
                ("gather", _gather_kernel, cut.gather, shape),
                ("probabilities", _probabilities_kernel, cut.probabilities, shape),
            ]
        if (kind, dim) == ("bf16", 128):
            dense = {**grouped, "DENSE": True}
            launches += [
                ("attend dense", _attend_kernel, cut.attend, dense),
                (
                    "group gradient dense",
                    _group_gradient_kernel,
                    cut.group_gradient,
                    {**dense, "KEY_GRADIENTS": True},
                ),
                (
                    "query gradient dense",
                    _group_gradient_kernel,
                    cut.group_gradient,
                    {**dense, "KEY_GRADIENTS": False},
                ),
                ("delta", _delta_kernel, Tile(0, 4, 3), {"DIM": dim, "HAS_LSE": True}),
            ]
        cases += [
            _case(f"{name}, {kind} {dim}", kernel, kind, kind, tile, way)
            for name, kernel, tile, way in launches
        ]
        forward = (_attend_kernel, _gather_kernel, _probabilities_kernel)
        if dim == 128:
            cases += [
                _case(f"{name}, {kind} {dim} over fp8", kernel, kind, element_type(capability), tile, way)
                for name, kernel, tile, way in launches
                if kernel in forward
            ]
    return cases


# What the arguments of the kernels point to, None for the type of q; other arguments are whole numbers.
_POINTERS = {
    **dict.fromkeys(("q", "out", "out_gradient", "q_gradient")),
    **dict.fromkeys(("lse", "lse_gradient", "delta", "k_gradient", "v_gradient", "probabilities"), "*fp32"),
    **dict.fromkeys(("indices", "entries", "words_of_entries", "counts", "readers"), "*i32"),
}
_STRIDES = ("_batch", "_token", "_head", "_key", "_stride")


def _case(
    name: str, kernel: Any, kind: str, key_kind: str, tile: Tile, constants: dict[str, Any]
) -> CompileCase:
    """A launch with 64-bit strides that are multiples of 16, as those of every cache are. key_kind: type of k and v."""
    of_tile = {"KEYS": tile.keys, "HEADS": tile.heads, "QUERIES": tile.queries, "K_KEY": 512, "V_KEY": 512}
    constants = {**{name: value for name, value in of_tile.items() if name in kernel.arg_names}, **constants}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "bitmap" or (argument == "words_of_entries" and constants["DENSE"]):
            signature[argument] = f"*i{tile.queries}"
        elif argument in ("k", "v"):
            signature[argument] = f"*{key_kind}"
        elif argument in _POINTERS:
            signature[argument] = _POINTERS[argument] or f"*{kind}"
        elif argument.endswith("scale"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i64" if argument.endswith(_STRIDES) else "i32"
    aligned = tuple(
        argument
        for argument, kind_of in signature.items()
        if kind_of.startswith("*") or argument.endswith(_STRIDES)
    )
    return CompileCase(name, kernel, signature, constants, tile.warps, tile.stages, aligned)
