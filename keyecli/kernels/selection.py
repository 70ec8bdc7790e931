"""Exact top-k selection of keys in Triton: `select_keys`, defined by `reference.select_keys`.

B batch, T queries, S keys. Queries go in chunks: `indexer.score_into` writes a chunk's scores, then each row of them is read
once. A sample of the row gives a threshold that about half of the candidates' room should exceed; one pass lists what does,
keys and scores (`_collect`); an exact search among the listed finds the k best, ties to the lower key (`_finish`). A row with
no more keys than candidates have room is searched as it is. Sampling decides only how many candidates there are. Should they
be too few or too many, which takes a sample that is off by a factor of two, the last kernel searches the row again as a whole:
slower, as exact, and nothing the host need know. So nothing here waits for the device, and a launch on static buffers can be
captured in a CUDA graph.

Reading the scores once bounds it: 4 bytes a key, where a radix sort reads them several times.
"""

from __future__ import annotations

import math
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
from keyecli.kernels.indexer import (
    HIDDEN_BITS,
    first_position,
    padded_length,
    score_into,
    visible_pairs,
)
from keyecli.kernels.reference import Branches

# Scores and candidates of one chunk of queries together: enough for 1024 queries of 131072 keys.
WORKSPACE_BYTES = 640 * 2**20
LARGEST_TOP_K = 8192
LARGEST_SAMPLE = 2048
MOST_SPLITS = 64
# Keys of a line, the bits of a word. Candidates are listed in whole lines.
LINE = tl.constexpr(32)
# Adjacent keys that a place of a sample reads: 16 bytes, half of what memory gives out at the least.
RUN = tl.constexpr(4)
# Scores as int32 that order like the floats. HIDDEN, the lowest, is no float but the mark of an unseen key.
HIDDEN = tl.constexpr(-(2**31))
LARGEST = tl.constexpr(2**31 - 1)


@dataclass(frozen=True)
class SelectionPlan:
    """Sizes of a selection, all from the shapes.

    capacity: candidates that a row can hold, at least 4 · top_k. sample: places of a row looked at for the threshold, RUN keys
    each, so many that about 128 of the keys should exceed it. splits: programs that share a row; each works the sample out
    again, which takes no longer and saves a launch. block: scores that a program goes through at once, collect_warps: its
    warps. early: so few programs that each has a processor to itself; it asks for its first scores before it has a threshold,
    and may use as many registers as it likes. registers: the most that a thread
    may use where programs share a processor, a few spilled values included. recount: scores read at once when a row has to be
    searched again.
    """

    capacity: int
    sample: int
    splits: int
    block: int
    collect_warps: int
    early: bool
    registers: int
    recount: int

    @property
    def collect_registers(self) -> int | None:
        return None if self.early else self.registers

    def slots(self, keys: int) -> int:
        """What `_finish` goes through: the candidates, or a row of so few keys that it needs none."""
        return min(self.capacity, max(512, triton.next_power_of_2(keys)))

    def finish_warps(self, keys: int) -> int:
        # A thread holds 32 scores: with more threads, what they tell each other takes longer than it saves.
        return max(4, self.slots(keys) // 1024)

    @property
    def finish_registers(self) -> int | None:
        return None if self.early else self.registers

    def candidate_bytes(self, rows: int) -> int:
        """Room for the candidates of so many rows, a key and a score each; any split may hold all of a row's."""
        return rows * self.splits * 2 * 4 * self.capacity


def selection_plan(capability: int, rows: int, keys: int, top_k: int, processors: int) -> SelectionPlan:
    """Sizes by compute capability (0: the interpreter)."""
    interpreted = capability == 0
    capacity = max(2 * LINE.value if interpreted else 4096, triton.next_power_of_2(4 * top_k))
    # The nearest power of two, so that one key more than a round number does not double it.
    sample = 1 << round(math.log2(max(1.0, 64 * keys / capacity)))
    sample = max(128, min(LARGEST_SAMPLE, sample)) if not interpreted else min(64, sample)
    # A thread holds 32 scores, of the sample or of a block.
    warps = 4 if sample <= 1024 else 8
    block = 8 * LINE.value if interpreted else 1024 * warps
    # A processor runs 32 warps at a time: all rows at once where they suffice, and no split without a block of keys.
    wanted = max(1, min(MOST_SPLITS, 32 * processors // (warps * rows), triton.cdiv(keys, block)))
    splits = 1 << (wanted.bit_length() - 1)
    early = rows * splits <= processors
    if early:
        # A search among fewer costs a little certainty and saves a tenth of a row's time.
        sample = min(sample, LARGEST_SAMPLE // 2)
    return SelectionPlan(
        capacity=capacity,
        sample=sample,
        splits=splits,
        block=block,
        # Alone on a processor, a program is faster the less each of its threads does, down to the code that it has to load.
        collect_warps=2 * warps if early else warps,
        early=early,
        registers=64,
        recount=256 if interpreted else 2048,
    )


@triton.jit
def ordered(bits):
    """The bits of fp32 → int32 in the order of the numbers, −0 equal to +0, `HIDDEN_BITS` below everything."""
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
    return tl.sum(mask.to(tl.int32))


@triton.jit
def bits_set(word):
    """How many bits of an int32 are one. The compiler knows this form and makes one instruction of it."""
    word = word.to(tl.uint32)
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    return ((eights * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def bits_of_line():
    """The bit of each of a line's keys, as a row."""
    return (1 << tl.arange(0, LINE))[None, :]


@triton.jit
def words_of(flags):
    """Flags [lines, LINE] → a word for each line."""
    return tl.sum(tl.where(flags, bits_of_line(), 0), 1)


@triton.jit
def words_reaching(values, bound, ASSEMBLY: tl.constexpr):
    """Scores [lines, LINE] → a word for each line: the bits of those that reach the bound. The mark of a hidden key, a NaN,
    does not.

    In assembly because LLVM packs the comparisons of a thread into words of its own and unpacks them again, which costs as
    much as all the rest of this.
    """
    if ASSEMBLY:
        marks = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ge.f32 p, $1, $2; selp.b32 $0, $3, 0, p; }",
            "=r,f,f,r",
            [values, bound, bits_of_line()],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        return tl.sum(marks, 1)
    else:
        return words_of(values >= bound)


@triton.jit
def next_pivots(low, high, reach_low, reach_high, goal, slow):
    """Two thresholds, the lower first, strictly between `low` and `high`, which `reach_low` and `reach_high` values reach: to
    either side of where `goal` would if the values were evenly spread; a goal far in the tail, if they thinned out evenly.
    `slow`, after a step that did not halve their number: half as far from `low`, and the middle of the numbers that there are,
    which ends every search in time."""
    low_score = as_score(low)
    span = as_score(high) - low_score
    fraction = (reach_low - goal).to(tl.float32) / (reach_low - reach_high).to(tl.float32)
    margin = 0.0625
    if reach_low > 8 * goal:
        reached = reach_low.to(tl.float32)
        last = tl.maximum(reach_high.to(tl.float32), 0.5)
        fraction = tl.log2(reached / goal.to(tl.float32)) / tl.log2(reached / last)
        margin = 0.125
    near = low_score + span * tl.where(slow, fraction * 0.5, fraction - margin)
    far = low_score + span * (fraction + margin)
    middle = (low & high) + ((low ^ high) >> 1)
    first = ordered(near.to(tl.int32, bitcast=True))
    second = tl.where(slow, middle, ordered(far.to(tl.int32, bitcast=True)))
    # Infinite scores make this a NaN, large as an integer: the limits hold for it too.
    first = tl.minimum(tl.maximum(first, low + 1), high - 1)
    second = tl.minimum(tl.maximum(second, low + 1), high - 1)
    return tl.minimum(first, second), tl.maximum(first, second)


@triton.jit
def narrowed(low, high, reach_low, reach_high, first, second, reach_first, reach_second, least):
    """The part between two neighbours of low ≤ first ≤ second ≤ high in which `least` is crossed, in the order of the
    arguments."""
    above = reach_second >= least
    between = reach_first >= least
    return (
        tl.where(above, second, tl.where(between, first, low)),
        tl.where(above, high, tl.where(between, second, first)),
        tl.where(above, reach_second, tl.where(between, reach_first, reach_low)),
        tl.where(above, reach_high, tl.where(between, reach_second, reach_first)),
    )


@triton.jit
def threshold_of(values, seen, least, most):
    """A threshold that `least` to `most` of ordered `values` reach, or where ties do not allow that, the largest that at least
    `least` reach. `seen` of the values are not hidden; least ≤ seen. Returns it and how many reach it.

    Interpolates between the scores themselves, two thresholds a round whose counts share one reduction (so there are fewer
    than 2¹⁶ values): some seven rounds for thousands of scores of any ordinary spread.
    """
    low = tl.min(tl.where(values == HIDDEN, LARGEST, values))
    high = tl.max(values) + 1
    reach_low = seen
    reach_high = seen * 0
    goal = (least + most) // 2
    slow = seen < 0
    while (reach_low > most) & (low + 1 < high):
        first, second = next_pivots(low, high, reach_low, reach_high, goal, slow)
        both = tl.sum(tl.where(values >= first, tl.where(values >= second, 0x10001, 1), 0))
        window = reach_low - reach_high
        low, high, reach_low, reach_high = narrowed(
            low, high, reach_low, reach_high, first, second, both & 0xFFFF, (both >> 16) & 0xFFFF, least
        )
        remain = reach_low - reach_high
        if remain == window:
            # A gap, or many equal scores: the highest below `high` itself.
            top = tl.max(tl.where(values < high, values, HIDDEN))
            reach_top = count_of(values >= top)
            enough = reach_top >= least
            low = tl.where(enough, top, low)
            reach_low = tl.where(enough, reach_top, reach_low)
            reach_high = tl.where(enough, reach_high, reach_top)
            high = tl.where(enough, top + 1, top)
        slow = (remain * 2 > window) & (slow == 0)
    return low, reach_low


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
def row_candidates(candidates, row, split, CAPACITY: tl.constexpr, SPLITS: tl.constexpr):
    """Where a split's candidates begin: CAPACITY keys, then the bits of as many scores."""
    return candidates + (row.to(tl.int64) * SPLITS + split) * (2 * CAPACITY)


@triton.jit
def load_lines(scores, whole, LINES: tl.constexpr):
    """The first LINES lines of scores, those from `whole` on undefined: masks of whole lines leave loads 16 bytes wide, and
    most blocks need none."""
    line = tl.arange(0, LINES)
    places = scores + (line[:, None] * LINE + tl.arange(0, LINE)[None, :])
    if whole >= LINES:
        values = tl.load(places)
    else:
        values = tl.load(places, mask=(line < whole)[:, None])
    return values


@triton.jit
def load_rest(scores, length):
    """The scores behind a row's whole lines, one line, hidden behind the row."""
    place = length // LINE * LINE + tl.arange(0, LINE)[None, :]
    return tl.load(scores + place, mask=place < length, other=hidden_scores((1, LINE)))


@triton.jit
def sampled_threshold(scores, row, length, CAPACITY: tl.constexpr, SAMPLE: tl.constexpr):
    """An ordered score that about CAPACITY / 2 of the row's `length` > CAPACITY should exceed; HIDDEN where all that are seen
    may be kept. Looks at RUN keys from one pseudo-random place on in each of SAMPLE equal stretches, the same in every run.
    Returns also whether the threshold is crowded: so many are equal to it that no other would do better."""
    stretch = tl.arange(0, SAMPLE)
    places = length // RUN
    share = places // SAMPLE
    longer = places % SAMPLE
    low = stretch * share + stretch * longer // SAMPLE
    width = (stretch + 1) * share + (stretch + 1) * longer // SAMPLE - low
    mixed = (stretch + row * 0x9E37).to(tl.uint32) * 0x2C1B3C6D
    mixed = (mixed ^ (mixed >> 15)) * 0x297A2D39
    draw = ((mixed ^ (mixed >> 15)) & 0x7FFF).to(tl.int32)
    place = tl.minimum(low + ((draw * tl.minimum(width, 0xFFFF)) >> 15), places - 1)
    values = tl.load(scores + (place[:, None] * RUN + tl.arange(0, RUN)[None, :]))
    values = ordered(values.to(tl.int32, bitcast=True))
    goal = tl.cdiv(RUN * SAMPLE * (CAPACITY // 2), length)
    slack = goal // 16
    seen = count_of(values != HIDDEN)
    threshold = tl.full((), HIDDEN, tl.int32)
    reached = seen * 0
    if seen >= goal:
        threshold, reached = threshold_of(values, seen, goal - slack, goal + slack)
    return threshold, reached > goal + slack


@triton.jit
def ties_before(scores, bound, first, K, BLOCK: tl.constexpr):
    """How many scores of the row's first blocks equal the bound; counts no further than K of them."""
    ties = tl.full((), 0, tl.int32)
    block = first * 0
    while (block < first) & (ties < K):
        ties += count_of(load_lines(scores + block * BLOCK, BLOCK // LINE, BLOCK // LINE) == bound)
        block += 1
    return ties


@triton.jit
def first_ties(tied, before, most_ties):
    """Words of ties without those that come after the row's first `most_ties`."""
    tied = tl.where(before < most_ties, tied, 0)
    if tl.max(before + bits_set(tied), 0) > most_ties:
        # The limit falls inside a word, which happens once a row at most: count along the bits.
        room = most_ties - before
        clipped = tl.zeros_like(tied)
        for b in tl.range(0, 32):
            mark = (tied >> b) & 1
            clipped |= tl.where(room > 0, mark << b, 0)
            room -= mark
        tied = clipped
    return tied


@triton.jit
def block_words(words, rest, left):
    """The words of a block's lines, of which the row has `left` whole ones and behind them the word of its rest.

    The words stand with eight threads each, where their lines were loaded. Gathering them hands out one a thread, which the
    compiler would rather do again and again for everything made of them.
    """
    line = tl.arange(0, words.shape[0])
    return tl.where(line < left, tl.gather(words, line, 0), tl.where(line == left, rest, 0))


@triton.jit
def list_kept(candidates, scores, kept, start, found, CAPACITY: tl.constexpr):
    """Add the kept keys of a block from key `start` on to a list of `found`, as far as there is room. Returns the new number.

    As many rounds as the fullest word has bits. The scores have just been read and come from the first-level cache.
    """
    counts = bits_set(kept)
    place = found + tl.cumsum(counts, 0) - counts
    slots = candidates + place
    listed = tl.minimum(counts, CAPACITY - place)
    # The bits up to the lowest one are one more than stand below it.
    keys = start - 1 + tl.arange(0, kept.shape[0]) * LINE
    for bit in tl.range(0, tl.max(counts, 0)):
        key = keys + bits_set(kept ^ (kept - 1))
        mask = bit < listed
        score = tl.load(scores + key, mask=mask)
        tl.store(slots, key, mask=mask)
        tl.store(slots + CAPACITY, score.to(tl.int32, bitcast=True), mask=mask)
        kept &= kept - 1
        slots += 1
    return found + tl.sum(counts, 0)


@triton.jit(do_not_specialize=["T", "S", "K", "offset"])
def _collect(
    scores, thresholds, counts, candidates, positions, T, S, K, offset, score_batch, score_row,
    CAPACITY: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
    ON_DEVICE: tl.constexpr, ASSEMBLY: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """List the keys of a row that reach its threshold, in order, with their scores; where the threshold is crowded only the
    first K of those equal to it. Grid: B · T · SPLITS, a split taking whole blocks.

    candidates: [B · T, SPLITS, 2, CAPACITY], each list filled up to a whole line with hidden scores. counts: [B · T, SPLITS].
    """
    let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    length = seen_length(row, T, S, positions, offset, ON_DEVICE)
    if length <= CAPACITY:
        return
    scores = row_scores(scores, row, T, score_batch, score_row)
    candidates = row_candidates(candidates, row, split, CAPACITY, SPLITS)
    LINES: tl.constexpr = BLOCK // LINE
    whole = length // LINE
    blocks = tl.cdiv(length, BLOCK)
    span = tl.cdiv(blocks, SPLITS)
    first = tl.minimum(split * span, blocks)
    last = tl.minimum(first + span, blocks)
    if EARLY:
        values = load_lines(scores + first * BLOCK, whole - first * LINES, LINES)
    threshold, crowded = sampled_threshold(scores, row, length, CAPACITY, SAMPLE)
    bound = as_score(threshold)
    if split == 0:
        tl.store(thresholds + row, threshold)
    if not EARLY:
        values = load_lines(scores + first * BLOCK, whole - first * LINES, LINES)
    rest = load_rest(scores, length)
    rest_reaching = words_of(rest >= bound)
    rest_tied = words_of(rest == bound)
    found = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    if crowded & (first < last):
        ties = ties_before(scores, bound, first, K, BLOCK)
    left = whole - first * LINES
    for block in tl.range(first, last):
        kept = block_words(words_reaching(values, bound, ASSEMBLY), rest_reaching, left)
        if crowded:
            tied = block_words(words_of(values == bound), rest_tied, left)
            numbers = bits_set(tied)
            before = ties + tl.cumsum(numbers, 0) - numbers
            kept = (kept ^ tied) | first_ties(tied, before, K)
            ties += tl.sum(numbers, 0)
        # Asked for here, the next block arrives while this one is listed.
        values = load_lines(scores + (block + 1) * BLOCK, left - LINES, LINES)
        found = list_kept(candidates, scores, kept, block * BLOCK, found, CAPACITY)
        left -= LINES
    place = found + tl.arange(0, LINE)
    unused = tl.full((LINE,), HIDDEN_BITS, tl.int32)
    tl.store(
        candidates + CAPACITY + place, unused, mask=place < tl.minimum(tl.cdiv(found, LINE) * LINE, CAPACITY)
    )
    tl.store(counts + tl.program_id(0), found)


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
    values = tl.load(scores + place, mask=place < end, other=hidden_scores((BLOCK,)))
    return ordered(values.to(tl.int32, bitcast=True))


@triton.jit
def count_in_row(scores, length, first, second, BLOCK: tl.constexpr):
    """How many ordered scores of a row reach each of two thresholds."""
    reach_first = tl.zeros((BLOCK,), tl.int32)
    reach_second = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, length, BLOCK):
        values = load_block(scores, start, length, BLOCK)
        reach_first += (values >= first).to(tl.int32)
        reach_second += (values >= second).to(tl.int32)
    return tl.sum(reach_first, 0), tl.sum(reach_second, 0)


@triton.jit
def select_from_row(out, scores, length, K, BLOCK: tl.constexpr):
    """The selection of a row read over and over, a round of the search a pass: for rows that their sample misjudged. Returns
    how many keys were written."""
    lowest = tl.full((BLOCK,), LARGEST, tl.int32)
    highest = tl.full((BLOCK,), HIDDEN, tl.int32)
    for start in tl.range(0, length, BLOCK):
        values = load_block(scores, start, length, BLOCK)
        lowest = tl.minimum(lowest, tl.where(values == HIDDEN, LARGEST, values))
        highest = tl.maximum(highest, values)
    low = tl.min(lowest, 0)
    high = tl.max(highest, 0) + 1
    reach_low, reach_high = count_in_row(scores, length, low, high, BLOCK)
    selected = tl.minimum(reach_low, K)
    slow = selected < 0
    while (reach_low > selected) & (low + 1 < high):
        first, second = next_pivots(low, high, reach_low, reach_high, selected, slow)
        reach_first, reach_second = count_in_row(scores, length, first, second, BLOCK)
        window = reach_low - reach_high
        low, high, reach_low, reach_high = narrowed(
            low, high, reach_low, reach_high, first, second, reach_first, reach_second, selected
        )
        slow = ((reach_low - reach_high) * 2 > window) & (slow == 0)
    exceeding, _ = count_in_row(scores, length, low + 1, low + 1, BLOCK)
    above = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    for start in tl.range(0, length, BLOCK):
        values = load_block(scores, start, length, BLOCK)
        tied = (values == low) & (values != HIDDEN)
        keep, place, above, ties = rank_kept(values > low, tied, above, ties, selected - exceeding)
        tl.store(out + place, start + tl.arange(0, BLOCK), mask=keep)
    return selected


@triton.jit
def candidate_lines(before, LINES: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr):
    """Where each of a row's lines of candidates stands, in lines from the first split's. before: [SPLITS], the number of lines
    in earlier splits."""
    line = tl.arange(0, LINES)
    places = line
    if SPLITS > 1:
        # Of the splits that begin at or before a line, the last one moves it furthest.
        shift = tl.arange(0, SPLITS) * (2 * CAPACITY // LINE) - before
        places += tl.max(tl.where(before[None, :] <= line[:, None], shift[None, :], 0), 1)
    return places


@triton.jit
def scatter(places, values, mask, ASSEMBLY: tl.constexpr):
    """Store where the mask says.

    In assembly because the compiler would first pass places and values through shared memory, to an order of threads that
    suits a store of which it knows nothing; here neighbours store to neighbouring places as they are.
    """
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [places.to(tl.int64), values, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(places, values, mask=mask)


@triton.jit
def select_from_slots(
    out, scores, candidates, before, length, lines, direct, K,
    LINES: tl.constexpr, CAPACITY: tl.constexpr, SPLITS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The selection among a row's `lines` lines, at most LINES, of scores (`direct`) or candidates. Returns how many keys were
    written."""
    line = tl.arange(0, LINES)
    columns = tl.arange(0, LINE)[None, :]
    places = candidate_lines(before, LINES, CAPACITY, SPLITS)[:, None] * LINE + columns
    if direct:
        whole = length // LINE
        bits = load_lines(scores, whole, LINES).to(tl.int32, bitcast=True)
        rest = load_rest(scores, length).to(tl.int32, bitcast=True)
        bits = tl.where((line < whole)[:, None], bits, tl.where((line == whole)[:, None], rest, HIDDEN_BITS))
    else:
        bits = tl.load(candidates + CAPACITY + places, mask=(line < lines)[:, None], other=HIDDEN_BITS)
    values = ordered(bits)
    seen = count_of(values != HIDDEN)
    selected = tl.minimum(seen, K)
    best, reached = threshold_of(values, seen, selected, selected)
    words = words_of(values >= best)
    if reached > selected:
        above = words_of(values > best)
        tied = words ^ above
        numbers = bits_set(tied)
        words = above | first_ties(
            tied, tl.cumsum(numbers, 0) - numbers, selected - tl.sum(bits_set(above), 0)
        )
    kept = (words[:, None] & bits_of_line()) != 0
    keys = line[:, None] * LINE + columns
    if direct == 0:
        keys = tl.load(candidates + places, mask=(line < lines)[:, None], other=0)
    numbers = bits_set(words)
    rank = (tl.cumsum(numbers, 0) - numbers)[:, None] + bits_set(words[:, None] & (bits_of_line() - 1))
    scatter(out + rank, keys, kept, ASSEMBLY)
    return selected


@triton.jit(do_not_specialize=["T", "S", "K", "offset"])
def _finish(
    scores, thresholds, counts, candidates, positions, out, T, S, K, offset, score_batch, score_row,
    out_batch, out_row,
    CAPACITY: tl.constexpr, SPLITS: tl.constexpr, COLLECTED: tl.constexpr, RECOUNT: tl.constexpr,
    ON_DEVICE: tl.constexpr, ASSEMBLY: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The K best of a row's candidates as an ascending list, −1 behind them; of its scores where they are no more than
    CAPACITY, as without COLLECTED they always are. Grid: B · T."""
    let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0)
    length = seen_length(row, T, S, positions, offset, ON_DEVICE)
    scores = row_scores(scores, row, T, score_batch, score_row)
    out += (row // T).to(tl.int64) * out_batch + (row % T).to(tl.int64) * out_row
    lines = tl.cdiv(length, LINE)
    before = tl.zeros((SPLITS,), tl.int32)
    direct = True
    certain = True
    if COLLECTED:
        candidates = row_candidates(candidates, row, 0, CAPACITY, SPLITS)
        direct = length <= CAPACITY
        # Of a row that was not collected this is whatever stood there, and not used.
        numbers = tl.load(counts + row * SPLITS + tl.arange(0, SPLITS))
        held = tl.cdiv(numbers, LINE)
        before = tl.cumsum(held, 0) - held
        lines = tl.where(direct, lines, tl.sum(held, 0))
        certain = direct | (tl.sum(numbers, 0) >= K) | (tl.load(thresholds + row) == HIDDEN)
    selected = tl.full((), 0, tl.int32)
    if certain & (lines <= CAPACITY // LINE // 2):
        selected = select_from_slots(
            out, scores, candidates, before, length, lines, direct, K, CAPACITY // LINE // 2, CAPACITY, SPLITS, ASSEMBLY
        )  # fmt: skip
    elif certain & (lines <= CAPACITY // LINE):
        selected = select_from_slots(
            out, scores, candidates, before, length, lines, direct, K, CAPACITY // LINE, CAPACITY, SPLITS, ASSEMBLY
        )  # fmt: skip
    elif COLLECTED:
        selected = select_from_row(out, scores, length, K, RECOUNT)
    pad_list(out, selected, K, RECOUNT)


@triton.jit(do_not_specialize=["T", "S", "K", "offset", "segment_batch", "out_batch", "out_row"])
def _list_visible(
    segments, positions, out, T, S, K, offset, segment_batch, out_batch, out_row,
    BLOCK: tl.constexpr, SEGMENTED: tl.constexpr, ON_DEVICE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Every visible key of a row, for when no row can have more than are selected: no scores needed. Grid: B · T."""
    let_next_begin(DEPENDENT)
    wait_for_previous(DEPENDENT)
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
    capability = device_capability(device)
    rows = batch * queries
    if plan is None:
        plan = selection_plan(capability, rows, keys, top_k, device_processors(device))
    if out is None:
        out = torch.empty((batch, queries, top_k), dtype=torch.int32, device=device)
    collected = keys > plan.capacity
    thresholds = counts = candidates = out
    place = out if positions is None else positions
    strides = (scores.stride(0), scores.stride(1))
    if collected:
        candidates = torch.empty(plan.candidate_bytes(rows) // 4, dtype=torch.int32, device=device)
        thresholds = torch.empty(rows, dtype=torch.int32, device=device)
        counts = torch.empty(rows * plan.splits, dtype=torch.int32, device=device)
        _collect[(rows * plan.splits,)](
            scores, thresholds, counts, candidates, place, queries, keys, top_k, offset, *strides,
            CAPACITY=plan.capacity, SAMPLE=plan.sample, BLOCK=plan.block, SPLITS=plan.splits, EARLY=plan.early,
            ON_DEVICE=positions is not None, ASSEMBLY=capability > 0, num_warps=plan.collect_warps,
            maxnreg=plan.collect_registers, **dependent_launch(device),
        )  # fmt: skip
    _finish[(rows,)](
        scores, thresholds, counts, candidates, place, out, queries, keys, top_k, offset, *strides, *out.stride()[:2],
        CAPACITY=plan.slots(keys), SPLITS=plan.splits if collected else 1, COLLECTED=collected, RECOUNT=plan.recount,
        ON_DEVICE=positions is not None, ASSEMBLY=capability > 0, num_warps=plan.finish_warps(keys),
        maxnreg=plan.finish_registers, **dependent_launch(device),
    )  # fmt: skip
    return out


def queries_a_chunk(
    batch: int, queries: int, keys: int, top_k: int, capability: int, processors: int
) -> tuple[int, int]:
    """How many batch rows and queries go at once for all that they write to stay within `WORKSPACE_BYTES`: as few parts as can
    be, of equal size, whole tiles of queries as long as there is one; at least one query."""

    def fits(rows: int) -> bool:
        plan = selection_plan(capability, rows, keys, top_k, processors)
        candidates = plan.candidate_bytes(rows) if keys > plan.capacity else 0
        return 4 * padded_length(keys) * rows + candidates <= WORKSPACE_BYTES

    for parts in range(1, batch + 1):
        if fits(triton.cdiv(batch, parts) * queries):
            return triton.cdiv(batch, parts), queries
    # What the scores alone need is where to begin.
    for parts in range(1 + 4 * padded_length(keys) * queries // WORKSPACE_BYTES, queries):
        part = triton.cdiv(queries, parts)
        if part > 64:
            part = triton.cdiv(part, 64) * 64
        if fits(part):
            return 1, part
    return 1, 1


def select_keys(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    top_k: int,
    segments: Tensor | None = None,
    first_query: int | Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    branches: Branches | None = None,
    stepping: bool = False,
) -> Tensor:
    """The keys that every query attends to, defined by `reference.select_keys`; differs from it only by the order in which the
    scores are summed. Queries of up to `indexer.FEW_QUERIES` are summed in another order than more.

    q: [B, T, J, e]; w: [B, T, J]; k: [B, S, e] (bf16, fp16, fp32, or float8_e4m3fn with q_scale [B, T, J] and k_scale [B, S]).
    k may be the filled part of a longer buffer, or with `first_query` on the device (int [B], each batch row's own position)
    the whole buffer: nothing behind a query can reach its list. With `branches` k is [1, rows, e] and every batch row of a few
    queries is one of them, its keys counted as its tokens are. stepping: one decoding step of many; all keys before the first
    query have stood there for longer than the kernel before this one runs, so that a few queries may read them at once, and a
    list has top_k places however small the buffer is, so that nothing that follows depends on the buffer. segments: int
    [B, S or more]. Returns int32 [B, T, min(top_k, S)]: ascending, −1 behind the last. Takes no gradient. Scores of visible
    keys must not be NaN.
    """
    batch, queries = q.shape[:2]
    keys = k.shape[1] if branches is None else branches.length
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    positions = first_query if isinstance(first_query, Tensor) else None
    first = 0
    if not isinstance(first_query, Tensor):
        first = keys - queries if first_query is None else first_query
        if first < 0 or first + queries > keys:
            raise ValueError(f"queries {first} to {first + queries - 1} are not all among the {keys} keys")
    capability = device_capability(q.device)
    width = top_k if stepping else min(top_k, keys)
    out = torch.empty((batch, queries, width), dtype=torch.int32, device=q.device)
    if keys <= top_k:
        _list_visible[(batch * queries,)](
            out if segments is None else segments, out if positions is None else positions, out,
            queries, keys, width, first, 0 if segments is None else segments.stride(0), *out.stride()[:2],
            BLOCK=64 if capability == 0 else 1024, SEGMENTED=segments is not None,
            ON_DEVICE=positions is not None, num_warps=4, **dependent_launch(q.device),
        )  # fmt: skip
        return out
    processors = device_processors(q.device)
    batch_chunk, query_chunk = queries_a_chunk(batch, queries, keys, top_k, capability, processors)
    if branches is not None:
        # A branch is known by its number in a launch, and the scores of a few queries fit at once.
        batch_chunk = batch
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
                k if branches else k[rows],
                q_scale=None if q_scale is None else q_scale[rows, part],
                k_scale=None if k_scale is None else k_scale[rows],
                segments=None if segments is None else segments[rows],
                positions=starts,
                offset=first + begin,
                branches=branches,
                settled=stepping,
            )
            select_scored(chunk[:, :, :keys], top_k, starts, first + begin, lists)
    return out


def compile_cases(capability: int) -> list[CompileCase]:
    """The kernels of this file as the 30B model launches them, for a chunk of prefill near its end and near its beginning and
    for decoding, and as keye-nano does."""
    pointers = {"scores": "*fp32", "segments": "*i64"} | dict.fromkeys(
        ("thresholds", "counts", "candidates", "positions", "out"), "*i32"
    )
    cases = []
    for name, rows, keys, top_k in (
        ("prefill", 1024, 131072, 2048),
        ("decode", 1, 131072, 2048),
        ("nano", 1024, 131072, 256),
        ("few keys", 1024, 4096, 2048),
    ):
        plan = selection_plan(capability, rows, keys, top_k, 132)
        collected = keys > plan.capacity
        sizes = {
            "CAPACITY": plan.slots(keys), "SAMPLE": plan.sample, "BLOCK": plan.block, "SPLITS": plan.splits if collected else 1,
            "EARLY": plan.early, "RECOUNT": plan.recount, "COLLECTED": collected, "ON_DEVICE": rows == 1, "ASSEMBLY": True,
            "DEPENDENT": capability >= 90,
        }  # fmt: skip
        if collected:
            cases.append(_case(f"collect, {name}", _collect, pointers, sizes, plan.collect_warps))
        cases.append(_case(f"finish, {name}", _finish, pointers, sizes, plan.finish_warps(keys)))
    listing = {"BLOCK": 1024, "SEGMENTED": True, "ON_DEVICE": False, "DEPENDENT": capability >= 90}
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
