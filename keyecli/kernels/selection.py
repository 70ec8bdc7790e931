"""Exact top-k selection of keys in Triton: `select_keys`, defined by `reference.select_keys`.

B batch, T queries, S keys. Queries go in chunks: `indexer.score_into` writes a chunk's scores, then each row of them is read
once. A sample of the row gives a threshold that about half of the candidates' room should exceed (`_threshold`); one
pass marks what does, a bit a key (`_mark`); the marks become a list (`_expand`), and an exact search among the listed finds
the k best, ties to the lower key (`_finish`). Sampling decides only how many candidates there are. Should they be too
few or too many, which takes a sample that is off by a factor of two, the last kernel searches the row again as a whole:
slower, as exact, and nothing the host need know. So nothing here waits for the device, and a launch on static buffers can be
captured in a CUDA graph.

Reading the scores once bounds it: 4 bytes a key, where a radix sort reads them several times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.compile import CompileCase
from keyecli.kernels.indexer import (
    HIDDEN_BITS,
    device_capability,
    device_processors,
    first_position,
    padded_length,
    score_into,
    visible_pairs,
)

# Scores, marks and candidates of one chunk of queries together.
WORKSPACE_BYTES = 256 * 2**20
LARGEST_TOP_K = 8192
LARGEST_SAMPLE = 16384
# Scores as int32 that order like the floats. HIDDEN, the lowest, is no float but the mark of an unseen key.
HIDDEN = tl.constexpr(-(2**31))
MINUS_INFINITY = tl.constexpr(-(2**31) + 0x7FFFFF)
ALL_TIES = tl.constexpr(2**30)


@dataclass(frozen=True)
class SelectionPlan:
    """Sizes of a selection, all from the shapes.

    capacity: candidates that a row can hold, at least 4 · top_k. sample: scores looked at for the threshold, so many that
    about 64 of them should exceed it. splits: blocks that share a row. sample_apart: the threshold has a launch of its own;
    with few rows every split rather works it out again, which takes no longer and saves the launch. block: scores that a
    block marks at once. words: words of 32 marks that it expands at once. recount: scores that it reads at once when a row
    has to be searched again.
    """

    capacity: int
    sample: int
    splits: int
    sample_apart: bool
    block: int
    words: int
    recount: int
    finish_warps: int

    @property
    def finish_registers(self) -> int | None:
        """So few that two blocks of `_finish` share a processor, which costs a handful of spilled values; free where a thread
        has more than 16 candidates."""
        return 64 if self.capacity <= 512 * self.finish_warps else None

    @property
    def threshold_warps(self) -> int:
        """Warps that work a sample out, few enough scores each to stay in registers."""
        return 4 if self.sample <= 4096 else 16


def selection_plan(capability: int, rows: int, keys: int, top_k: int, processors: int) -> SelectionPlan:
    """Sizes by compute capability (0: the interpreter)."""
    interpreted = capability == 0
    capacity = max(16 if interpreted else 1024, triton.next_power_of_2(4 * top_k))
    block, words = (256, 16) if interpreted else (8192, 1024)
    sample = triton.next_power_of_2(triton.cdiv(128 * keys, capacity))
    sample = max(16 if interpreted else 512, min(LARGEST_SAMPLE, sample))
    # Blocks enough that the last of them leave no processor idle for long, but none for less than a block of keys.
    wanted = min(64, triton.cdiv(8 * processors, rows), triton.cdiv(keys, block))
    return SelectionPlan(
        capacity=capacity,
        sample=sample,
        splits=triton.next_power_of_2(wanted),
        sample_apart=rows > processors,
        block=block,
        words=words,
        recount=256 if interpreted else 2048,
        finish_warps=8 if capacity <= 4096 else 16,
    )


@triton.jit
def ordered(score):
    """fp32 → int32 in the same order, −0 equal to +0, `HIDDEN_BITS` below everything."""
    bits = score.to(tl.int32, bitcast=True)
    # The bits of −0 happen to be the lowest integer.
    bits = tl.where(bits == HIDDEN, 0, bits)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def as_score(threshold):
    """An ordered threshold as the float to compare scores with; HIDDEN becomes −∞, which every seen score reaches."""
    bits = tl.where(threshold < 0, threshold ^ 0x7FFFFFFF, threshold)
    return tl.where(threshold == HIDDEN, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def hidden_scores(shape: tl.constexpr):
    """What stands for scores that are not there."""
    return tl.full(shape, HIDDEN_BITS, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def count_of(mask):
    """How many are true."""
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def bits_set(word):
    """How many bits of an int32 are one."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    return (eights * 0x01010101) >> 24


@triton.jit
def kth_largest(values, k):
    """A threshold that at least k of `values` reach and fewer than k exceed (k from 1 to their number).

    One bit at a time from the top; ends early when exactly k reach it. The k-th largest itself, or a number between it and the
    next lower one.
    """
    count = count_of(values >= 0)
    threshold = tl.where(count >= k, 0, HIDDEN)
    bit = tl.where(count == k, 0, 1 << 30)
    while bit > 0:
        higher = threshold + bit
        count = count_of(values >= higher)
        threshold = tl.where(count >= k, higher, threshold)
        bit = tl.where(count == k, 0, bit >> 1)
    return threshold


@triton.jit
def rank_kept(above, tied, above_before, ties_before, most_ties):
    """Which of a block are kept, all `above` and the first `most_ties` of the row's `tied`, and their places in the row's list.

    One prefix sum counts both, 16 bits each. Returns keep, place and the two counts with this block's added.
    """
    flags = above.to(tl.int32) + (tied.to(tl.int32) << 16)
    inclusive = tl.cumsum(flags, 0)
    before = inclusive - flags
    tie_rank = ties_before + (before >> 16)
    keep = above | (tied & (tie_rank < most_ties))
    place = above_before + (before & 0xFFFF) + tl.minimum(tie_rank, most_ties)
    total = tl.sum(flags, 0)
    return keep, place, above_before + (total & 0xFFFF), ties_before + (total >> 16)


@triton.jit
def seen_length(row, T, S, positions, offset, ON_DEVICE: tl.constexpr):
    """How many keys stand at or before the query of a row (row = batch row · T + query)."""
    position = first_position(positions, offset, row // T, ON_DEVICE) + row % T
    return tl.maximum(tl.minimum(position + 1, S), 0)


@triton.jit
def row_scores(scores, row, T, score_batch, score_row):
    """Where a row's scores begin."""
    return scores + (row // T).to(tl.int64) * score_batch + (row % T).to(tl.int64) * score_row


@triton.jit
def stretch_of(split, length, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The part [begin, end) of a row that one split takes: whole blocks but for the row's end."""
    span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = tl.minimum(split * span, length)
    return begin, tl.minimum(begin + span, length)


@triton.jit
def sampled_threshold(scores, row, length, CAPACITY: tl.constexpr, SAMPLE: tl.constexpr):
    """An ordered score that about CAPACITY / 2 of the row's first `length` should exceed; HIDDEN where all that are seen may be
    kept. Looks at one pseudo-random position in each of SAMPLE equal stretches, the same in every run."""
    threshold = tl.full((), HIDDEN, tl.int32)
    if length > CAPACITY:
        stretch = tl.arange(0, SAMPLE)
        low = stretch.to(tl.int64) * length // SAMPLE
        width = ((stretch + 1).to(tl.int64) * length // SAMPLE - low).to(tl.int32)
        mixed = (stretch + row * 0x9E37).to(tl.uint32) * 0x2C1B3C6D
        mixed = (mixed ^ (mixed >> 15)) * 0x297A2D39
        draw = ((mixed ^ (mixed >> 15)) & 0x7FFF).to(tl.int32)
        place = low + ((draw * tl.minimum(width, 0xFFFF)) >> 15)
        values = ordered(tl.load(scores + tl.minimum(place, length - 1)))
        threshold = kth_largest(values, tl.cdiv(SAMPLE * (CAPACITY // 2), length))
        # Between HIDDEN and −∞ there is no score: all that are seen are above.
        threshold = tl.where(threshold < MINUS_INFINITY, HIDDEN, threshold)
    return threshold


@triton.jit(do_not_specialize=["T", "S", "offset"])
def _threshold(
    scores, thresholds, positions, T, S, offset, score_batch, score_row,
    CAPACITY: tl.constexpr, SAMPLE: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """The threshold of a row. Grid: B · T."""
    row = tl.program_id(0)
    length = seen_length(row, T, S, positions, offset, ON_DEVICE)
    scores = row_scores(scores, row, T, score_batch, score_row)
    tl.store(thresholds + row, sampled_threshold(scores, row, length, CAPACITY, SAMPLE))


@triton.jit
def marks_of(values, bound):
    """Scores [words, 32] → a word for each 32: the bits of those above the bound, and of those equal to it. Comparisons with
    the mark of a hidden key, a NaN, are false."""
    bit = (1 << tl.arange(0, 32))[None, :]
    return tl.sum(tl.where(values > bound, bit, 0), 1), tl.sum(tl.where(values == bound, bit, 0), 1)


@triton.jit(do_not_specialize=["T", "S", "offset", "plane"])
def _mark(
    scores, thresholds, marks, positions, T, S, offset, score_batch, score_row, plane,
    CAPACITY: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    SAMPLE_APART: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Mark the scores of a row above its threshold, and those equal to it: bit b of word n is key 32n + b. Grid: B · T, SPLITS.

    marks: [B · T, 2, plane].
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    length = seen_length(row, T, S, positions, offset, ON_DEVICE)
    scores = row_scores(scores, row, T, score_batch, score_row)
    marks += row.to(tl.int64) * 2 * plane
    if SAMPLE_APART:
        threshold = tl.load(thresholds + row)
    else:
        threshold = sampled_threshold(scores, row, length, CAPACITY, SAMPLE)
        if split == 0:
            tl.store(thresholds + row, threshold)
    bound = as_score(threshold)
    begin, end = stretch_of(split, length, SPLITS, BLOCK)
    line = tl.arange(0, BLOCK // 32)
    inside = line[:, None] * 32 + tl.arange(0, 32)[None, :]
    # Whole blocks without a mask, and starts that are plainly multiples, so that loads are 16 bytes wide; then what is left.
    first = begin // BLOCK
    last = end // BLOCK
    for block in tl.range(first, last):
        above, tied = marks_of(tl.load(scores + block * BLOCK + inside), bound)
        word = block * (BLOCK // 32) + line
        tl.store(marks + word, above)
        tl.store(marks + plane + word, tied)
    if (last * BLOCK < end) & (begin < end):
        inside += last * BLOCK
        values = tl.load(scores + inside, mask=inside < end, other=hidden_scores((BLOCK // 32, 32)))
        above, tied = marks_of(values, bound)
        word = last * (BLOCK // 32) + line
        tl.store(marks + word, above, mask=word * 32 < end)
        tl.store(marks + plane + word, tied, mask=word * 32 < end)


@triton.jit
def first_ties(tied, ties_before, most_ties):
    """Words of marks without those that come after the row's first `most_ties`."""
    tied = tl.where(ties_before < most_ties, tied, 0)
    if tl.max(ties_before + bits_set(tied), 0) > most_ties:
        # The limit falls inside a word, which happens once a row at most: count along the bits.
        room = most_ties - ties_before
        clipped = tl.zeros_like(tied)
        for b in tl.range(0, 32):
            mark = (tied >> b) & 1
            clipped |= tl.where(room > 0, mark << b, 0)
            room -= mark
        tied = clipped
    return tied


@triton.jit(do_not_specialize=["T", "S", "K", "offset", "plane"])
def _expand(
    thresholds, marks, candidates, kept_counts, positions, T, S, K, offset, plane,
    CAPACITY: tl.constexpr, WORDS: tl.constexpr, SPLITS: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """List the marked keys of a row in order: all above the threshold, and the first K equal to it. Grid: B · T, SPLITS.

    Each split counts the marks before its own, a few kilobytes, to know where its part of the list begins.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    words = tl.cdiv(seen_length(row, T, S, positions, offset, ON_DEVICE), 32)
    marks += row.to(tl.int64) * 2 * plane
    candidates += row.to(tl.int64) * CAPACITY
    most_ties = tl.where(tl.load(thresholds + row) == HIDDEN, ALL_TIES, K)
    begin, end = stretch_of(split, words, SPLITS, WORDS)
    line = tl.arange(0, WORDS)
    above_found = tl.zeros((WORDS,), tl.int32)
    ties_found = tl.zeros((WORDS,), tl.int32)
    for start in tl.range(0, begin, WORDS):
        word = start + line
        above_found += bits_set(tl.load(marks + word, mask=word < begin, other=0))
        ties_found += bits_set(tl.load(marks + plane + word, mask=word < begin, other=0))
    above = tl.sum(above_found, 0)
    ties = tl.sum(ties_found, 0)
    for start in tl.range(begin, end, WORDS):
        word = start + line
        above_words = tl.load(marks + word, mask=word < end, other=0)
        tied_words = tl.load(marks + plane + word, mask=word < end, other=0)
        above_counts = bits_set(above_words)
        tied_counts = bits_set(tied_words)
        above_before = above + tl.cumsum(above_counts, 0) - above_counts
        ties_before = ties + tl.cumsum(tied_counts, 0) - tied_counts
        kept = above_words | first_ties(tied_words, ties_before, most_ties)
        place = above_before + tl.minimum(ties_before, most_ties)
        for b in tl.range(0, 32):
            mark = (kept >> b) & 1
            tl.store(candidates + place, word * 32 + b, mask=(mark != 0) & (place < CAPACITY))
            place += mark
        above += tl.sum(above_counts, 0)
        ties += tl.sum(tied_counts, 0)
    if split == SPLITS - 1:
        tl.store(kept_counts + row, above + tl.minimum(ties, most_ties))


@triton.jit
def pad_list(out, listed, K, BLOCK: tl.constexpr):
    """−1 behind the listed keys."""
    for start in tl.range(listed, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(out + column, tl.full((BLOCK,), -1, tl.int32), mask=column < K)


@triton.jit
def load_block(scores, start, end, BLOCK: tl.constexpr):
    """A block of ordered scores from `start`, hidden behind `end`."""
    place = start + tl.arange(0, BLOCK)
    return ordered(tl.load(scores + place, mask=place < end, other=hidden_scores((BLOCK,))))


@triton.jit
def count_in_row(scores, length, threshold, BLOCK: tl.constexpr):
    """How many ordered scores of a row reach a threshold."""
    reached = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, length, BLOCK):
        reached += (load_block(scores, start, length, BLOCK) >= threshold).to(tl.int32)
    return tl.sum(reached, 0)


@triton.jit
def select_from_row(out, scores, length, K, BLOCK: tl.constexpr):
    """The selection of a row read over and over, one bit of the threshold a pass: for rows that their sample misjudged.
    Returns how many keys were written."""
    selected = tl.minimum(count_in_row(scores, length, HIDDEN + 1, BLOCK), K)
    count = count_in_row(scores, length, 0, BLOCK)
    threshold = tl.where(count >= selected, 0, HIDDEN)
    bit = tl.where(count == selected, 0, 1 << 30)
    while bit > 0:
        higher = threshold + bit
        count = count_in_row(scores, length, higher, BLOCK)
        threshold = tl.where(count >= selected, higher, threshold)
        bit = tl.where(count == selected, 0, bit >> 1)
    room = selected - count_in_row(scores, length, threshold + 1, BLOCK)
    above = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    for start in tl.range(0, length, BLOCK):
        values = load_block(scores, start, length, BLOCK)
        tied = (values == threshold) & (values != HIDDEN)
        keep, place, above, ties = rank_kept(values > threshold, tied, above, ties, room)
        tl.store(out + place, start + tl.arange(0, BLOCK), mask=keep)
    return selected


@triton.jit
def select_from_candidates(out, scores, candidates, kept, K, SLOTS: tl.constexpr):
    """The selection among the first `kept` candidates (at most SLOTS). Returns how many keys were written."""
    slot = tl.arange(0, SLOTS)
    keys = tl.load(candidates + slot, mask=slot < kept, other=0)
    values = ordered(tl.load(scores + keys, mask=slot < kept, other=hidden_scores((SLOTS,))))
    selected = tl.minimum(kept, K)
    best = kth_largest(values, selected)
    room = selected - count_of(values > best)
    zero = tl.full((), 0, tl.int32)
    tied = (values == best) & (slot < kept)
    keep, place, _, _ = rank_kept(values > best, tied, zero, zero, room)
    # Read again rather than held in registers over the search.
    tl.store(out + place, tl.load(candidates + slot, mask=keep, other=0), mask=keep)
    return selected


@triton.jit(do_not_specialize=["T", "S", "K", "offset"])
def _finish(
    scores, thresholds, candidates, kept_counts, positions, out, T, S, K, offset, score_batch, score_row,
    out_batch, out_row,
    CAPACITY: tl.constexpr, RECOUNT: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """The K best of a row's candidates as an ascending list, −1 behind them. Grid: B · T."""
    row = tl.program_id(0)
    length = seen_length(row, T, S, positions, offset, ON_DEVICE)
    scores = row_scores(scores, row, T, score_batch, score_row)
    candidates += row.to(tl.int64) * CAPACITY
    out += (row // T).to(tl.int64) * out_batch + (row % T).to(tl.int64) * out_row
    kept = tl.load(kept_counts + row)
    enough = (kept >= K) | (tl.load(thresholds + row) == HIDDEN)
    selected = tl.full((), 0, tl.int32)
    if enough & (kept <= CAPACITY // 2):
        selected = select_from_candidates(out, scores, candidates, kept, K, CAPACITY // 2)
    elif enough & (kept <= CAPACITY):
        selected = select_from_candidates(out, scores, candidates, kept, K, CAPACITY)
    else:
        selected = select_from_row(out, scores, length, K, RECOUNT)
    pad_list(out, selected, K, RECOUNT)


@triton.jit(do_not_specialize=["T", "S", "K", "offset", "segment_batch", "out_batch", "out_row"])
def _list_visible(
    segments, positions, out, T, S, K, offset, segment_batch, out_batch, out_row,
    BLOCK: tl.constexpr, SEGMENTED: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """Every visible key of a row, for when no row can have more than are selected: no scores needed. Grid: B · T."""
    row = tl.program_id(0)
    position = first_position(positions, offset, row // T, ON_DEVICE) + row % T
    segments += (row // T).to(tl.int64) * segment_batch
    out += (row // T).to(tl.int64) * out_batch + (row % T).to(tl.int64) * out_row
    listed = tl.full((), 0, tl.int32)
    own = tl.arange(0, 1)
    for start in tl.range(0, tl.minimum(position + 1, S), BLOCK):
        keys = start + tl.arange(0, BLOCK)
        visible = tl.reshape(visible_pairs(segments, own, keys, 1, position, S, SEGMENTED), (BLOCK,))
        flags = visible.to(tl.int32)
        place = listed + tl.cumsum(flags, 0) - flags
        tl.store(out + place, keys, mask=visible)
        listed += tl.sum(flags, 0)
    pad_list(out, listed, K, BLOCK)


def select_scored(
    scores: Tensor,
    top_k: int,
    positions: Tensor | None = None,
    offset: int = 0,
    out: Tensor | None = None,
    plan: SelectionPlan | None = None,
) -> Tensor:
    """The selection alone: fp32 scores [B, T, S], last dimension contiguous, no NaN → int32 [B, T, min(top_k, S)].

    Query t of batch row b stands at offset + t (+ positions[b], an int tensor [B]); keys behind it are not read. A key before
    it that it does not see has the bits `indexer.HIDDEN_BITS`. The lists are as in `select_keys`, written into `out` if given
    (its last dimension contiguous).
    """
    batch, queries, keys = scores.shape
    top_k = min(top_k, keys)
    if not 1 <= top_k <= LARGEST_TOP_K:
        raise ValueError(f"top_k is {top_k}; it can be 1 to {LARGEST_TOP_K}")
    device = scores.device
    rows = batch * queries
    if plan is None:
        plan = selection_plan(device_capability(device), rows, keys, top_k, device_processors(device))
    if out is None:
        out = torch.empty((batch, queries, top_k), dtype=torch.int32, device=device)
    plane = triton.cdiv(keys, 32)
    marks = torch.empty((rows, 2, plane), dtype=torch.int32, device=device)
    candidates = torch.empty((rows, plan.capacity), dtype=torch.int32, device=device)
    thresholds = torch.empty(rows, dtype=torch.int32, device=device)
    kept_counts = torch.empty(rows, dtype=torch.int32, device=device)
    place = thresholds if positions is None else positions
    strides = (scores.stride(0), scores.stride(1))
    sizes: dict[str, Any] = {"CAPACITY": plan.capacity, "ON_DEVICE": positions is not None}
    if plan.sample_apart:
        _threshold[(rows,)](
            scores, thresholds, place, queries, keys, offset, *strides, SAMPLE=plan.sample, **sizes,
            num_warps=plan.threshold_warps,
        )  # fmt: skip
    _mark[(rows, plan.splits)](
        scores, thresholds, marks, place, queries, keys, offset, *strides, plane, SAMPLE=plan.sample,
        BLOCK=plan.block, SPLITS=plan.splits, SAMPLE_APART=plan.sample_apart, **sizes, num_warps=8,
    )  # fmt: skip
    _expand[(rows, plan.splits)](
        thresholds, marks, candidates, kept_counts, place, queries, keys, top_k, offset, plane,
        WORDS=plan.words, SPLITS=plan.splits, **sizes, num_warps=4,
    )  # fmt: skip
    _finish[(rows,)](
        scores, thresholds, candidates, kept_counts, place, out, queries, keys, top_k, offset, *strides,
        *out.stride()[:2], RECOUNT=plan.recount, **sizes, num_warps=plan.finish_warps,
        maxnreg=plan.finish_registers,
    )  # fmt: skip
    return out


def queries_a_chunk(batch: int, queries: int, keys: int, top_k: int, capability: int) -> tuple[int, int]:
    """How many batch rows and queries go at once for all that they write to stay within `WORKSPACE_BYTES`; at least one."""
    padded = padded_length(keys)
    capacity = selection_plan(capability, 1, keys, top_k, 1).capacity
    rows = max(1, WORKSPACE_BYTES // (4 * padded + padded // 4 + 4 * capacity))
    if rows >= queries:
        return min(batch, rows // queries), queries
    # Whole tiles of queries, as long as there is one.
    return 1, rows - rows % 64 if rows >= 64 else rows


def select_keys(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    top_k: int,
    segments: Tensor | None = None,
    first_query: int | Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """The keys that every query attends to, defined by `reference.select_keys`; differs from it only by the order in which the
    scores are summed. Queries of up to `indexer.FEW_QUERIES` are summed in another order than more.

    q: [B, T, J, e]; w: [B, T, J]; k: [B, S, e] (bf16, fp16, fp32, or float8_e4m3fn with q_scale [B, T, J] and k_scale [B, S]).
    k may be the filled part of a longer buffer, or with `first_query` on the device (int [B], each batch row's own position)
    the whole buffer: nothing behind a query can reach its list. segments: int [B, S or more]. Returns int32
    [B, T, min(top_k, S)]: ascending, −1 behind the last. Takes no gradient. Scores of visible keys must not be NaN.
    """
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    positions = first_query if isinstance(first_query, Tensor) else None
    first = 0
    if not isinstance(first_query, Tensor):
        first = keys - queries if first_query is None else first_query
        if first < 0 or first + queries > keys:
            raise ValueError(f"queries {first} to {first + queries - 1} are not all among the {keys} keys")
    capability = device_capability(q.device)
    out = torch.empty((batch, queries, min(top_k, keys)), dtype=torch.int32, device=q.device)
    if keys <= top_k:
        _list_visible[(batch * queries,)](
            out if segments is None else segments, out if positions is None else positions, out,
            queries, keys, keys, first, 0 if segments is None else segments.stride(0), *out.stride()[:2],
            BLOCK=64 if capability == 0 else 1024, SEGMENTED=segments is not None,
            ON_DEVICE=positions is not None, num_warps=4,
        )  # fmt: skip
        return out
    batch_chunk, query_chunk = queries_a_chunk(batch, queries, keys, top_k, capability)
    scores = torch.empty(
        (batch_chunk, query_chunk, padded_length(keys)), dtype=torch.float32, device=q.device
    )
    for b in range(0, batch, batch_chunk):
        rows = slice(b, min(b + batch_chunk, batch))
        starts = None if positions is None else positions[rows]
        for begin in range(0, queries, query_chunk):
            part = slice(begin, min(begin + query_chunk, queries))
            lists = out[rows, part]
            chunk = scores[: lists.shape[0], : lists.shape[1]]
            score_into(
                chunk,
                q[rows, part],
                w[rows, part],
                k[rows],
                q_scale=None if q_scale is None else q_scale[rows, part],
                k_scale=None if k_scale is None else k_scale[rows],
                segments=None if segments is None else segments[rows],
                positions=starts,
                offset=first + begin,
            )
            select_scored(chunk[:, :, :keys], top_k, starts, first + begin, lists)
    return out


def compile_cases(capability: int) -> list[CompileCase]:
    """The kernels of this file as the 30B model launches them, for a chunk of prefill and for decoding, and as keye-nano does."""
    pointers = {"scores": "*fp32", "segments": "*i64"} | dict.fromkeys(
        ("thresholds", "marks", "candidates", "kept_counts", "positions", "out"), "*i32"
    )
    cases = []
    for name, rows, top_k in (("prefill", 448, 2048), ("decode", 1, 2048), ("nano", 1024, 256)):
        plan = selection_plan(capability, rows, 131072, top_k, 132)
        sizes = {
            "CAPACITY": plan.capacity, "SAMPLE": plan.sample,
            "BLOCK": plan.block, "SPLITS": plan.splits, "WORDS": plan.words, "RECOUNT": plan.recount,
            "SAMPLE_APART": plan.sample_apart, "ON_DEVICE": rows == 1, "SEGMENTED": True,
        }  # fmt: skip
        for kernel, warps in (
            (_threshold, plan.threshold_warps),
            (_mark, 8),
            (_expand, 4),
            (_finish, plan.finish_warps),
        ):
            cases.append(_case(f"{kernel.__name__.strip('_')}, {name}", kernel, pointers, sizes, warps))
    listing = {"BLOCK": 1024, "SEGMENTED": True, "ON_DEVICE": False}
    return [*cases, _case("list_visible", _list_visible, pointers, listing, 4)]


def _case(
    name: str, kernel: Any, pointers: dict[str, str], sizes: dict[str, Any], num_warps: int
) -> CompileCase:
    """A kernel with those of the sizes and pointers that it takes; everything else of it is an int32."""
    constants = {key: value for key, value in sizes.items() if key in kernel.arg_names}
    return CompileCase(
        name,
        kernel,
        {key: "constexpr" if key in constants else pointers.get(key, "i32") for key in kernel.arg_names},
        constants,
        num_warps=num_warps,
        divisible_by_16=tuple(
            key for key in kernel.arg_names if key in (*pointers, "score_batch", "score_row", "out_row")
        ),
    )
