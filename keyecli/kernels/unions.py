"""Which keys each group of adjacent queries selects, from index lists.

A group is 8 or 16 queries. Its program marks each query's list in a row of bits, 32 keys a word, by atomic ORs: neighbours in
a list share the 32 bytes that an atomic moves, so it takes a quarter of what a word a key would. The rows then stand side by
side: what is set in any is a distinct key of the group, and the same bit of every row makes the key's word of 8 or 16 bits,
bit i for the group's query i. Programs keep their rows for one group after another, so the rows stay in the second-level
cache and are never written out. What comes of them:

unions        of every group the distinct keys, ascending, with their words: what gathering needs;
bitmap        of every group the words of all keys, the word of a key beside that of the next, and from it
tile lists    of every group the tiles of keys in which it selects something: what going through keys in order needs;
reader lists  of every tile of keys the groups that select something in it: what gradients of keys need.

Groups go in chunks, so that all this stays within `WORKSPACE_BYTES`. Counts stay on the device; lists have room for the most
that shapes allow.

B batch, T queries, S keys, K most keys a query selects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import device_processors

# Half for the rows of bits, half for what a chunk makes of them.
WORKSPACE_BYTES = 256 * 2**20
# The smallest height of a tile of the matrix units, and the most queries of a group.
GROUP = tl.constexpr(16)
# Bitmap rows are multiples of the largest tile, so that the last tile needs no mask.
LARGEST_TILE = 128
# What a loop may read behind the end of a union: the rest of its last tile and the tile that it fetches ahead.
UNION_PADDING = 2 * LARGEST_TILE
SCAN_FLAGS = 1024
FLAG_WORDS = 4096

Form = Literal["unions", "bitmap"]


@dataclass(frozen=True)
class Scan:
    """How the kernel of the rows is cut: entries of a list that it marks at once, words of 32 keys that it looks through at
    once, keys whose words of queries it puts together at once, warps, and its programs on one processor."""

    entries: int
    lines: int
    keys: int
    warps: int
    programs: int


# Few and wide programs: their rows (16 KiB a query at 128K keys) must stay in the second-level cache together.
LARGE_SCAN = Scan(entries=2048, lines=1024, keys=1024, warps=16, programs=2)


def scan_plan() -> Scan:
    """For GPUs, or for the interpreter."""
    if triton.knobs.runtime.interpret:
        return Scan(entries=64, lines=8, keys=512, warps=4, programs=2)
    return LARGE_SCAN


@dataclass(frozen=True)
class Lists:
    """For every row what a loop goes through, and where it finds the words.

    keys: int32, rows of either keys (unions), tiles of keys, or groups; counts: int32, how many of them each row has;
    words: beside the keys of a union (int32), else the bitmap (int8 or int16).
    """

    keys: Tensor
    words: Tensor
    counts: Tensor

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.words, self.counts


@dataclass(frozen=True)
class Chunk:
    """The groups `first_group` … of all sequences' groups, in order.

    indices: int32 [B, T, K], contiguous; keys: S; queries: of a group, 8 or 16.
    """

    indices: Tensor
    keys: int
    queries: int
    first_group: int
    groups: int

    @property
    def groups_per_sequence(self) -> int:
        return triton.cdiv(self.indices.shape[1], self.queries)

    def unions(self) -> Lists:
        """Every group's distinct keys, ascending, each with its word; behind them padding that repeats the last key without
        any query, so that tiles are read without masks and meet only rows that the group selects."""
        shape = (self.groups, union_capacity(self.indices, self.keys, self.queries))
        keys, words = (torch.empty(shape, dtype=torch.int32, device=self.indices.device) for _ in range(2))
        counts = torch.empty(self.groups, dtype=torch.int32, device=self.indices.device)
        self._scan("unions", keys, words, counts)
        return Lists(keys, words, counts)

    @cached_property
    def bitmap(self) -> Tensor:
        """Every group's words of all keys: int8 or int16 [groups, S rounded up]."""
        shape = (self.groups, bitmap_width(self.keys))
        bitmap = torch.empty(shape, dtype=word_type(self.queries), device=self.indices.device)
        self._scan("bitmap", bitmap, bitmap, bitmap)
        return bitmap

    def _scan(self, form: Form, keys: Tensor, words: Tensor, counts: Tensor) -> None:
        """Fill the keys, words and counts of the unions, or the words of the bitmap."""
        plan = scan_plan()
        lines = triton.cdiv(self.keys, 32)
        row_words = self.queries * lines
        most = max(1, WORKSPACE_BYTES // 2 // (4 * row_words))
        programs = min(self.groups, most, plan.programs * device_processors(self.indices.device))
        rows = torch.empty(programs * row_words, dtype=torch.int32, device=self.indices.device)
        _scan_kernel[(programs,)](
            self.indices, rows, keys, words, counts, self.indices.shape[1], self.indices.shape[2], self.groups,
            self.first_group, self.groups_per_sequence, lines, row_words, words.shape[1],
            QUERIES=self.queries, ENTRIES=plan.entries, LINES=plan.lines, KEYS=plan.keys, PADDING=UNION_PADDING,
            UNIONS=form == "unions", ASSEMBLY=not triton.knobs.runtime.interpret, num_warps=plan.warps,
        )  # fmt: skip

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
        counts = torch.empty(self.groups, dtype=torch.int32, device=flags.device)
        _tile_list_kernel[(self.groups, 1)](
            flags, lists, counts, self.groups, flags.shape[1], self.first_group, self.groups_per_sequence,
            BY_TILE=False, SCAN=SCAN_FLAGS,
        )  # fmt: skip
        return Lists(lists, self.bitmap, counts)

    def reader_lists(self, tile_keys: int) -> Lists:
        """For every tile of keys, the groups of this chunk that select something in it, ascending.

        A row holds one tile's groups of all sequences, each sequence's from the place of its first group on; counts:
        [tiles, B].
        """
        batch = self.indices.shape[0]
        flags = self.tile_flags(tile_keys)
        lists = torch.empty(flags.shape[::-1], dtype=torch.int32, device=flags.device)
        counts = torch.empty((flags.shape[1], batch), dtype=torch.int32, device=flags.device)
        _tile_list_kernel[(flags.shape[1], batch)](
            flags, lists, counts, self.groups, flags.shape[1], self.first_group, self.groups_per_sequence,
            BY_TILE=True, SCAN=SCAN_FLAGS,
        )  # fmt: skip
        return Lists(lists, self.bitmap, counts)


def word_type(queries: int) -> torch.dtype:
    """A bit for every query of a group."""
    return torch.int8 if queries == 8 else torch.int16


def bitmap_width(keys: int) -> int:
    return triton.cdiv(keys, LARGEST_TILE) * LARGEST_TILE


def union_capacity(indices: Tensor, keys: int, queries: int) -> int:
    """Entries of a union's row: the most keys that a group can select, and the padding; rows begin at multiples of 64 bytes."""
    return triton.cdiv(min(keys, queries * indices.shape[2]) + UNION_PADDING, 16) * 16


def chunks(indices: Tensor, keys: int, queries: int, form: Form) -> Iterator[Chunk]:
    """All groups of `queries` each, as many at a time as `WORKSPACE_BYTES` hold in that form. indices: int32 [B, T, K]."""
    if form == "unions":
        group_bytes = 8 * union_capacity(indices, keys, queries)
    else:
        group_bytes = bitmap_width(keys) * word_type(queries).itemsize
    groups = indices.shape[0] * triton.cdiv(indices.shape[1], queries)
    parts = triton.cdiv(groups, max(1, WORKSPACE_BYTES // 2 // group_bytes))
    size = triton.cdiv(groups, max(1, parts))
    for first in range(0, groups, max(1, size)):
        yield Chunk(indices, keys, queries, first, min(size, groups - first))


@triton.jit
def _bit_count(x, ASSEMBLY: tl.constexpr):
    """How many bits of each int32 [n] are set."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.sum((x[:, None] >> tl.arange(0, 32)[None, :]) & 1, 1)


@triton.jit
def _entries_of(lists, query, start, queries, length, ENTRIES: tl.constexpr):
    """A block of the entries of one of a group's lists; −1 behind the end of a list and behind the last list."""
    offsets = start + tl.arange(0, ENTRIES)
    inside = (offsets < length) & (query < queries)
    return tl.load(lists + query * length + offsets, mask=inside, other=-1)


@triton.jit
def _mark(lists, rows, queries, length, lines, row_words, ENTRIES: tl.constexpr):
    """Set the bits of a group's `queries` lists in its rows, whatever stood there; returns one more than the last key.

    An OR needs no order, so neither do the atomics.
    """
    chosen = _entries_of(lists, 0, 0, queries, length, ENTRIES)
    for begin in range(0, row_words, ENTRIES):
        place = begin + tl.arange(0, ENTRIES)
        tl.store(rows + place, tl.zeros([ENTRIES], tl.int32), mask=place < row_words)
    tl.debug_barrier()
    last = tl.full([ENTRIES], -1, tl.int32)
    query = 0
    start = 0
    for _ in range(queries * tl.cdiv(length, ENTRIES)):
        next_query = tl.where(start + ENTRIES < length, query, query + 1)
        start = tl.where(start + ENTRIES < length, start + ENTRIES, 0)
        # Asked for before the atomics, which no later load may overtake.
        following = _entries_of(lists, next_query, start, queries, length, ENTRIES)
        bits = tl.full([ENTRIES], 1, tl.int32) << (chosen & 31)
        tl.atomic_or(rows + query * lines + (chosen >> 5), bits, mask=chosen >= 0, sem="relaxed")
        last = tl.maximum(last, chosen)
        chosen = following
        query = next_query
    tl.debug_barrier()
    return tl.max(last, 0) + 1


@triton.jit
def _words_of(rows, keys, inside, lines, QUERIES: tl.constexpr):
    """The words of keys: of every row the key's bit. 0 for keys that are not `inside`.

    Past the first-level cache, as all rows are read: what atomics write stands in the second.
    """
    words = tl.zeros_like(keys)
    for query in tl.static_range(QUERIES):
        row = tl.load(rows + query * lines + (keys >> 5), mask=inside, other=0, cache_modifier=".cg")
        words |= ((row >> (keys & 31)) & 1) << query
    return words


@triton.jit
def _list_distinct(
    rows, union_keys, end, lines, QUERIES: tl.constexpr, LINES: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """List the keys below `end` whose bit is set in any row, ascending; returns their number."""
    count = 0
    for first in range(0, tl.cdiv(end, 32), LINES):
        line = first + tl.arange(0, LINES)
        left = tl.zeros([LINES], tl.int32)
        for query in tl.static_range(QUERIES):
            left |= tl.load(rows + query * lines + line, mask=line < lines, other=0, cache_modifier=".cg")
        number = _bit_count(left, ASSEMBLY)
        place = count + tl.cumsum(number, 0) - number
        count += tl.sum(number, 0)
        # The lowest bit of every line, then the next, as often as the fullest line has bits: mostly few.
        for _ in range(tl.max(number, 0)):
            below = _bit_count(~left & (left - 1), ASSEMBLY)
            tl.store(union_keys + place, line * 32 + below, mask=left != 0)
            left &= left - 1
            place += 1
    return count


# Sizes and strides unspecialised: were their alignment known, the compiler would give every thread four neighbours, to load
# them at once, and move what it has through shared memory before every atomic and every store of a list.
@triton.jit(
    do_not_specialize=[
        "tokens", "length", "groups", "first_group", "groups_per_sequence", "lines", "row_words", "word_stride"
    ]
)  # fmt: skip
def _scan_kernel(
    indices,
    rows,
    union_keys,
    words,
    counts,
    tokens,
    length,
    groups,
    first_group,
    groups_per_sequence,
    lines,
    row_words,
    word_stride,
    QUERIES: tl.constexpr,
    ENTRIES: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    PADDING: tl.constexpr,
    UNIONS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Mark the lists of one group after another; of each write the union with its words and padding, or the bitmap.

    rows: of every program row_words = QUERIES · lines words; word_stride: words of a group.
    """
    rows += tl.program_id(0).to(tl.int64) * row_words
    for local in range(tl.program_id(0), groups, tl.num_programs(0)):
        group = first_group + local
        first_token = group % groups_per_sequence * QUERIES
        lists = indices + ((group // groups_per_sequence).to(tl.int64) * tokens + first_token) * length
        queries = tl.minimum(tokens - first_token, QUERIES)
        end = _mark(lists, rows, queries, length, lines, row_words, ENTRIES)
        words_of_group = words + tl.cast(local, tl.int64) * word_stride
        if UNIONS:
            keys_of_group = union_keys + tl.cast(local, tl.int64) * word_stride
            count = _list_distinct(rows, keys_of_group, end, lines, QUERIES, LINES, ASSEMBLY)
            tl.store(counts + local, count)
            tl.debug_barrier()
            for first in range(0, count + PADDING, KEYS):
                place = first + tl.arange(0, KEYS)
                listed = place < count
                padding = (place >= count) & (place < count + PADDING)
                keys = tl.load(keys_of_group + place, mask=listed, other=0)
                found = _words_of(rows, keys, listed, lines, QUERIES)
                tl.store(words_of_group + place, found, mask=listed | padding)
                # The last key: one that the group selects, if it selects any.
                tl.store(keys_of_group + place, tl.zeros_like(keys) + tl.maximum(end - 1, 0), mask=padding)
        else:
            for first in range(0, word_stride, KEYS):
                keys = first + tl.arange(0, KEYS)
                found = _words_of(rows, keys, keys < end, lines, QUERIES)
                tl.store(words_of_group + keys, found.to(words.dtype.element_ty), mask=keys < word_stride)
        # The rows are read before the next group clears them.
        tl.debug_barrier()


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
    """Every kernel here, as groups of 8 and of 16 queries use it."""
    pointers = {
        **dict.fromkeys(("indices", "rows", "union_keys", "words", "counts", "lists"), "*i32"),
        "bitmap": "*i16",
        "flags": "*i8",
    }
    plan = LARGE_SCAN
    scan = {
        "ENTRIES": plan.entries,
        "LINES": plan.lines,
        "KEYS": plan.keys,
        "PADDING": UNION_PADDING,
        "ASSEMBLY": True,
    }
    launches: list[tuple[str, Any, dict[str, Any], dict[str, str], int]] = []
    for queries, words in ((8, "*i8"), (16, "*i16")):
        of_group = {**scan, "QUERIES": queries}
        launches += [
            (f"unions of {queries}", _scan_kernel, {**of_group, "UNIONS": True}, {}, plan.warps),
            (
                f"bitmap of {queries}",
                _scan_kernel,
                {**of_group, "UNIONS": False},
                {"words": words},
                plan.warps,
            ),
            (
                f"flag of {queries}",
                _flag_kernel,
                {"KEYS": 64, "ACROSS": FLAG_WORDS // 64},
                {"bitmap": words},
                4,
            ),
        ]
    launches += [
        ("tile list", _tile_list_kernel, {"BY_TILE": False, "SCAN": SCAN_FLAGS}, {}, 4),
        ("reader list", _tile_list_kernel, {"BY_TILE": True, "SCAN": SCAN_FLAGS}, {}, 4),
    ]
    cases = []
    for name, kernel, constants, other, warps in launches:
        types = {**pointers, **other, "row_stride": "i64", **dict.fromkeys(constants, "constexpr")}
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
        aligned = tuple(
            argument for argument, kind in signature.items() if kind.startswith("*") or kind == "i64"
        )
        cases.append(CompileCase(name, kernel, signature, constants, warps, divisible_by_16=aligned))
    return cases
