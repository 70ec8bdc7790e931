"""Which keys each group of 16 adjacent queries selects, from index lists: a bitmap, and the lists that kernels go through.

In the bitmap a key has one word of 16 bits, bit i for the group's query i, set by atomic ORs. Its bits are those of a
[T, S] mask, but the word of a key stands beside that of the next key, as a tile over keys needs them. Three lists follow:

unions        of every group the distinct keys, ascending, with their words: what gathering needs;
tile lists    of every group the tiles of keys in which it selects something: what going through keys in order needs;
reader lists  of every tile of keys the groups that select something in it: what gradients of keys need.

Groups go in chunks, so that bitmap and lists stay within `WORKSPACE_BYTES`. Counts stay on the device; lists have room for
the most that shapes allow.

B batch, T queries, S keys, K most keys a query selects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.compile import CompileCase

WORKSPACE_BYTES = 256 * 2**20
# The queries of a group: the bits of a word, and the smallest height of a tile of the matrix units.
GROUP = tl.constexpr(16)
# Bitmap rows are multiples of the largest tile, so that the last tile needs no mask.
LARGEST_TILE = 128
# What a loop may read behind the end of a union: the rest of its last tile and the tile that it fetches ahead.
UNION_PADDING = 2 * LARGEST_TILE
# Words that one program looks through.
SCAN_WORDS = 2048
SCAN_FLAGS = 1024
FLAG_WORDS = 4096


@dataclass(frozen=True)
class Lists:
    """For every row what a loop goes through, and where it finds the words.

    keys: int32, rows of either keys (unions), tiles of keys, or groups; counts: int32, how many of them each row has;
    words: beside the keys of a union (int32), else the bitmap (int16).
    """

    keys: Tensor
    words: Tensor
    counts: Tensor

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.words, self.counts


@dataclass(frozen=True)
class Chunk:
    """What the groups `first_group` … of all sequences' groups, in order, select.

    bitmap: int16 [groups, S rounded up]; reach: int32 [groups], one more than the group's last key. A union has at most
    `capacity` keys.
    """

    bitmap: Tensor
    reach: Tensor
    first_group: int
    groups_per_sequence: int
    capacity: int

    @property
    def groups(self) -> int:
        return len(self.bitmap)

    def unions(self) -> Lists:
        """Every group's distinct keys, ascending, each with its word; behind them padding that repeats the last key without
        any query, so that tiles are read without masks and meet only rows that the group selects."""
        shape = (self.groups, self.capacity + UNION_PADDING)
        keys, words = (torch.empty(shape, dtype=torch.int32, device=self.bitmap.device) for _ in range(2))
        counts = torch.empty_like(self.reach)
        scan = 128 if triton.knobs.runtime.interpret else SCAN_WORDS
        stretches = triton.cdiv(self.bitmap.shape[1], scan)
        stretch_counts = torch.empty((self.groups, stretches), dtype=torch.int32, device=self.bitmap.device)
        grid = (self.groups, stretches)
        _count_kernel[grid](self.bitmap, self.reach, stretch_counts, self.bitmap.stride(0), SCAN=scan)
        _union_kernel[grid](
            self.bitmap, self.reach, stretch_counts, keys, words, counts, self.bitmap.stride(0), keys.stride(0),
            SCAN=scan, STRETCHES=triton.next_power_of_2(stretches), PADDING=UNION_PADDING,
        )  # fmt: skip
        return Lists(keys, words, counts)

    def tile_flags(self, tile_keys: int) -> Tensor:
        """Whether anyone in a group selects anything in a tile of keys: int8 [groups, tiles]."""
        count = self.bitmap.shape[1] // tile_keys
        flags = torch.empty((self.groups, count), dtype=torch.int8, device=self.bitmap.device)
        across = FLAG_WORDS // tile_keys
        _flag_kernel[(self.groups, triton.cdiv(count, across))](
            self.bitmap, flags, self.bitmap.stride(0), count, KEYS=tile_keys, ACROSS=across
        )
        return flags

    def tile_lists(self, tile_keys: int) -> Lists:
        """For every group the tiles of keys in which it selects something, ascending."""
        flags = self.tile_flags(tile_keys)
        lists = torch.empty(flags.shape, dtype=torch.int32, device=flags.device)
        counts = torch.empty_like(self.reach)
        _tile_list_kernel[(self.groups, 1)](
            flags, lists, counts, self.groups, flags.shape[1], self.first_group, self.groups_per_sequence,
            BY_TILE=False, SCAN=SCAN_FLAGS,
        )  # fmt: skip
        return Lists(lists, self.bitmap, counts)

    def reader_lists(self, tile_keys: int, batch: int) -> Lists:
        """For every tile of keys, the groups of this chunk that select something in it, ascending.

        A row holds one tile's groups of all sequences, each sequence's from the place of its first group on; counts:
        [tiles, B].
        """
        flags = self.tile_flags(tile_keys)
        lists = torch.empty(flags.shape[::-1], dtype=torch.int32, device=flags.device)
        counts = torch.empty((flags.shape[1], batch), dtype=torch.int32, device=flags.device)
        _tile_list_kernel[(flags.shape[1], batch)](
            flags, lists, counts, self.groups, flags.shape[1], self.first_group, self.groups_per_sequence,
            BY_TILE=True, SCAN=SCAN_FLAGS,
        )  # fmt: skip
        return Lists(lists, self.bitmap, counts)


def chunks(indices: Tensor, keys: int) -> Iterator[Chunk]:
    """The bitmaps of all groups, as many at a time as `WORKSPACE_BYTES` hold with their lists. indices: int32 [B, T, K]."""
    batch, queries, length = indices.shape
    group = GROUP.value
    per_sequence = triton.cdiv(queries, group)
    width = triton.cdiv(keys, LARGEST_TILE) * LARGEST_TILE
    capacity = min(keys, group * length)
    group_bytes = 2 * width + 8 * (capacity + UNION_PADDING)
    most = max(1, WORKSPACE_BYTES // group_bytes)
    block = min(triton.next_power_of_2(length), 2048)
    for first in range(0, batch * per_sequence, most):
        groups = min(most, batch * per_sequence - first)
        bitmap = torch.zeros((groups, width), dtype=torch.int16, device=indices.device)
        reach = torch.zeros(groups, dtype=torch.int32, device=indices.device)
        # Atomics have no 16-bit form: the words of two neighbouring keys are set as one of 32 bits.
        _mark_kernel[(groups * group, triton.cdiv(length, block))](
            indices,
            bitmap.view(torch.int32),
            reach,
            queries,
            length,
            first,
            per_sequence,
            width // 2,
            BLOCK=block,
        )
        yield Chunk(bitmap, reach, first, per_sequence, capacity)


@triton.jit(do_not_specialize=["tokens", "first_group", "groups_per_sequence"])
def _mark_kernel(
    indices, bitmap, reach, tokens, length, first_group, groups_per_sequence, row_stride, BLOCK: tl.constexpr
):
    """Set one query's bits: an OR needs no order, so neither do the atomics."""
    local = tl.program_id(0) // GROUP
    query = tl.program_id(0) % GROUP
    group = first_group + local
    batch = group // groups_per_sequence
    token = (group % groups_per_sequence) * GROUP + query
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = indices + (batch.to(tl.int64) * tokens + token) * length
    chosen = tl.load(row + offsets, mask=(offsets < length) & (token < tokens), other=-1)
    bits = tl.full([BLOCK], 1, tl.int32) << ((chosen & 1) * GROUP + query)
    words = bitmap + local.to(tl.int64) * row_stride + (chosen >> 1)
    tl.atomic_or(words, bits, mask=chosen >= 0, sem="relaxed")
    tl.atomic_max(reach + local, tl.max(chosen, 0) + 1, sem="relaxed")


@triton.jit
def _count_kernel(bitmap, reach, counts, row_stride, SCAN: tl.constexpr):
    """How many keys a group selects in one stretch of SCAN."""
    local = tl.program_id(0).to(tl.int64)
    keys = tl.program_id(1) * SCAN + tl.arange(0, SCAN)
    words = tl.load(bitmap + local * row_stride + keys, mask=keys < tl.load(reach + local), other=0)
    count = tl.sum((words != 0).to(tl.int32), 0)
    tl.store(counts + local * tl.num_programs(1) + tl.program_id(1), count)


@triton.jit
def _union_kernel(
    bitmap,
    reach,
    stretch_counts,
    union_keys,
    union_words,
    counts,
    row_stride,
    union_stride,
    SCAN: tl.constexpr,
    STRETCHES: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Compact one stretch of a group's bitmap to its place in the union; the last stretch's program adds the padding."""
    local = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    union_keys += local * union_stride
    union_words += local * union_stride
    end = tl.load(reach + local)
    stretches = tl.arange(0, STRETCHES)
    before = tl.load(
        stretch_counts + local * tl.num_programs(1) + stretches, mask=stretches < stretch, other=0
    )
    count = tl.sum(before, 0)
    keys = stretch * SCAN + tl.arange(0, SCAN)
    words = tl.load(bitmap + local * row_stride + keys, mask=keys < end, other=0).to(tl.int32)
    present = words != 0
    place = count + tl.cumsum(present.to(tl.int32), 0) - 1
    tl.store(union_keys + place, keys, mask=present)
    tl.store(union_words + place, words, mask=present)
    if stretch == tl.num_programs(1) - 1:
        count += tl.sum(present.to(tl.int32), 0)
        padding = count + tl.arange(0, PADDING)
        # The last key: one that the group selects, if it selects any.
        tl.store(union_keys + padding, tl.zeros([PADDING], tl.int32) + tl.maximum(end - 1, 0))
        tl.store(union_words + padding, tl.zeros([PADDING], tl.int32))
        tl.store(counts + local, count)


@triton.jit
def _flag_kernel(bitmap, flags, row_stride, tiles, KEYS: tl.constexpr, ACROSS: tl.constexpr):
    """Whether a tile of a group's words has any bit."""
    local = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    keys = tile[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    words = tl.load(bitmap + local * row_stride + keys, mask=(tile < tiles)[:, None], other=0)
    some = tl.max((words != 0).to(tl.int32), 1)
    tl.store(flags + local * tiles + tile, some.to(tl.int8), mask=tile < tiles)


@triton.jit(do_not_specialize=["groups", "tiles", "first_group", "groups_per_sequence"])
def _tile_list_kernel(
    flags,
    lists,
    counts,
    groups,
    tiles,
    first_group,
    groups_per_sequence,
    BY_TILE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The places of a row's flags (the tiles of a group) or, by tile, of a column's (one sequence's groups of a tile)."""
    row = tl.program_id(0).to(tl.int64)
    if BY_TILE:
        sequence = tl.program_id(1)
        low = tl.maximum(sequence * groups_per_sequence - first_group, 0)
        high = tl.minimum((sequence + 1) * groups_per_sequence - first_group, groups)
        flags += row
        stride = tiles
        lists += row * groups + low
        counts += row * tl.num_programs(1) + sequence
    else:
        low = 0
        high = tiles
        flags += row * tiles
        stride = 1
        lists += row * tiles
        counts += row
    count = 0
    for start in range(low, high, SCAN):
        place = start + tl.arange(0, SCAN)
        present = tl.load(flags + place.to(tl.int64) * stride, mask=place < high, other=0) != 0
        tl.store(lists + count + tl.cumsum(present.to(tl.int32), 0) - 1, place, mask=present)
        count += tl.sum(present.to(tl.int32), 0)
    tl.store(counts, count)


def compile_cases(capability: int) -> list[CompileCase]:
    """Every kernel here, for S up to 256K."""
    pointers = {
        **dict.fromkeys(
            ("indices", "reach", "counts", "stretch_counts", "union_keys", "union_words", "lists"), "*i32"
        ),
        "bitmap": "*i16",
        "flags": "*i8",
    }
    strides = ("row_stride", "union_stride")
    union = {"SCAN": SCAN_WORDS, "STRETCHES": 128, "PADDING": UNION_PADDING}
    launches: tuple[tuple[str, Any, dict[str, Any], dict[str, str]], ...] = (
        ("mark", _mark_kernel, {"BLOCK": 2048}, {"bitmap": "*i32"}),
        ("count", _count_kernel, {"SCAN": SCAN_WORDS}, {}),
        ("union", _union_kernel, union, {}),
        ("flag", _flag_kernel, {"KEYS": 64, "ACROSS": FLAG_WORDS // 64}, {}),
        ("tile list", _tile_list_kernel, {"BY_TILE": False, "SCAN": SCAN_FLAGS}, {}),
        ("reader list", _tile_list_kernel, {"BY_TILE": True, "SCAN": SCAN_FLAGS}, {}),
    )
    cases = []
    for name, kernel, constants, other in launches:
        types = {
            **pointers,
            **other,
            **dict.fromkeys(strides, "i64"),
            **dict.fromkeys(constants, "constexpr"),
        }
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
        aligned = tuple(
            argument for argument, kind in signature.items() if kind.startswith("*") or kind == "i64"
        )
        cases.append(CompileCase(name, kernel, signature, constants, divisible_by_16=aligned))
    return cases
