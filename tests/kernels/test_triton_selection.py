"""The Triton indexer and selection against their definitions: on a GPU, or at toy size under Triton's interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels import indexer, reference, selection
from keyecli.kernels.device import device_capability, device_processors
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, poisoned

REPEATS = 100 if CUDA else 2
# Infinite scores are searched too, and NumPy, which Triton's interpreter computes with, says so.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    """Integers from low to high, both included, as fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).float().to(DEVICE)


# ---- the selection alone ---------------------------------------------------------------------------------------------------


def expected_lists(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    return reference.selected_indices(reference.select_top_k(scores, visible, top_k), top_k).int()


def laid_out(scores: Tensor, visible: Tensor) -> Tensor:
    """Scores as the kernels find them: unseen keys marked where the query could come to them, NaN in all of the row's rest."""
    keys = scores.shape[-1]
    bits = scores.clone().view(torch.int32).masked_fill(~visible, indexer.HIDDEN_BITS.value)
    buffer = torch.full((*scores.shape[:-1], indexer.padded_length(keys)), float("nan"), device=scores.device)
    buffer[..., :keys] = bits.view(torch.float32)
    return buffer[..., :keys]


def patterns(keys: int, seed: int) -> dict[str, Tensor]:
    """Rows of scores that are hard in different ways."""
    noise = randn(keys, seed=seed)
    falling = torch.arange(keys, 0, -1, device=DEVICE).float()
    burst = noise.clone()
    burst[keys // 3 : keys // 3 + keys // 5] += 10.0
    spikes = torch.zeros(keys, device=DEVICE)
    spikes[keys - 3 :] = 1.0
    mixed = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3e38, -3e38], device=DEVICE)
    infinite = noise.clone()
    infinite[::7] = float("inf")
    infinite[1::3] = float("-inf")
    return {
        "random": noise,
        "all equal": torch.zeros(keys, device=DEVICE),
        "half zeros": torch.relu(noise),
        "mostly zeros": torch.relu(noise - 1.8),
        "few values": integers(-1, 1, keys, seed=seed),
        "signed zeros and extremes": mixed[integers(0, 7, keys, seed=seed).long()],
        "falling": falling,
        "rising": -falling,
        "one burst": burst,
        "spikes at the end": spikes,
        "all -inf": torch.full((keys,), float("-inf"), device=DEVICE),
        "infinities": infinite,
        "neighbours in the last bit": torch.nextafter(
            torch.ones(keys, device=DEVICE), torch.full((keys,), 2.0, device=DEVICE)
        ).where(noise > 0, torch.ones(keys, device=DEVICE)),
    }


def check_rows(scores: Tensor, visible: Tensor, top_k: int, what: str, **arguments: Any) -> None:
    """scores: [rows, S], one query a batch row at the last position."""
    with poisoned():
        lists = selection.select_scored(
            laid_out(scores, visible)[:, None], top_k, offset=scores.shape[1] - 1, **arguments
        )
    assert_same(lists, expected_lists(scores[:, None], visible[:, None], top_k), what=what)


@pytest.mark.parametrize(("keys", "top_k"), [(200, 12), *([(20_000, 2048), (140_001, 2048)] if CUDA else [])])
def test_lists_equal_the_definition_on_hard_rows(keys: int, top_k: int) -> None:
    rows = patterns(keys, seed=keys)
    scores = torch.stack(list(rows.values()))
    check_rows(scores, torch.ones_like(scores, dtype=torch.bool), top_k, f"rows of {list(rows)}")


@pytest.mark.parametrize("seen", [0.02, 0.3])
def test_unseen_keys_are_never_listed(seen: float) -> None:
    keys, top_k = (30_001, 512) if CUDA else (389, 12)
    rows = patterns(keys, seed=1)
    scores = torch.stack([rows[name] for name in ("random", "half zeros", "all equal", "infinities")])
    visible = torch.rand(scores.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) < seen
    visible[:, -1] = True
    check_rows(scores, visible, top_k, f"{seen} of the keys in sight")


@pytest.mark.parametrize("keys", [1, 11, 12, 13, *((4096, 4097) if CUDA else (64, 65))])
def test_lengths_around_the_selection_and_the_capacity(keys: int) -> None:
    scores = torch.stack((randn(keys, seed=keys), torch.zeros(keys, device=DEVICE)))
    plan = selection.selection_plan(90 if CUDA else 0, 2, keys, 12, 1)
    assert plan.capacity in (64, 4096)
    check_rows(scores, torch.ones_like(scores, dtype=torch.bool), 12, f"{keys} keys")


def plan_of(rows: int, keys: int, top_k: int, **changes: Any) -> selection.SelectionPlan:
    """A plan with the smallest sizes, but for `changes`."""
    plan = selection.selection_plan(90 if CUDA else 0, rows, keys, top_k, 1)
    smallest = {"capacity": 512, "sample": 128} if CUDA else {"capacity": 64, "sample": 4}
    return dataclasses.replace(plan, **(smallest | changes))


@pytest.mark.parametrize("top_k", [1, 30])
@pytest.mark.parametrize(("splits", "early"), [(1, False), (4, True)])
def test_any_plan_gives_the_same_lists(top_k: int, splits: int, early: bool) -> None:
    """Rows whole or shared, by more splits than there are blocks, and samples so small that rows are misjudged either way and
    searched again."""
    keys = 10_000 if CUDA else 600
    rows = patterns(keys, seed=3)
    scores = torch.stack([rows[name] for name in ("half zeros", "one burst", "few values")])
    plan = plan_of(len(scores), keys, top_k, splits=splits, early=early)
    check_rows(scores, torch.ones_like(scores, dtype=torch.bool), top_k, f"{plan}", plan=plan)


def clusters(keys: int, top_k: int) -> dict[str, Tensor]:
    """Rows whose winners stand together, and rows tied where it hurts."""
    noise = randn(keys, seed=11).clamp(-3, 3)
    first, last, inner = noise.clone(), noise.clone(), noise.clone()
    first[: 2 * top_k] += 10
    last[-2 * top_k :] += 10
    inner[keys // 2 : keys // 2 + 2 * top_k] += 10
    # Most keys tied, fewer above than are selected: the last of the tied that are may stand in any block.
    tied = torch.where(noise > 1.7, noise, torch.where(noise > -1, torch.ones_like(noise), noise - 5))
    late = tied.clone()
    late[: keys - 4 * top_k] = late[: keys - 4 * top_k].clamp(max=1.0)
    late[(late == 1) & (torch.arange(keys, device=DEVICE) < keys // 2)] = -1.0
    late[top_k // 2 : keys // 2 : keys // top_k] = 1.0
    return {"first": first, "last": last, "inner": inner, "tied": tied, "tied late": late}


@pytest.mark.parametrize("splits", [1, 2])
def test_winners_and_ties_anywhere_in_the_row(splits: int) -> None:
    keys, top_k = (70_000, 512) if CUDA else (520, 12)
    rows = clusters(keys, top_k)
    scores = torch.stack(list(rows.values()))
    visible = torch.ones_like(scores, dtype=torch.bool)
    plan = plan_of(
        len(scores), keys, top_k, splits=splits, **({"capacity": 2048} if CUDA else {"sample": 16})
    )
    if splits == 1:
        visible[:, 1:-1:2] = False
    check_rows(scores, visible, top_k, f"rows of {list(rows)}", plan=plan)


@pytest.mark.parametrize("splits", [1, 4])
def test_candidates_are_the_keys_that_reach_the_threshold(splits: int) -> None:
    """What `_collect` leaves behind: in order, each with its score, whole lines; of very many ties the first of the row."""
    keys, top_k = (30_000, 256) if CUDA else (620, 10)
    rows = patterns(keys, seed=5) | clusters(keys, top_k)
    names = ["infinities", "all equal", "tied late"]
    scores = torch.stack([rows[name] for name in names])
    plan = plan_of(len(names), keys, top_k, splits=splits, **({"capacity": 4096} if CUDA else {"sample": 32}))
    assert keys > plan.capacity
    thresholds = torch.full((len(names),), 7, dtype=torch.int32, device=DEVICE)
    counts = torch.full((len(names), splits), -7, dtype=torch.int32, device=DEVICE)
    candidates = torch.full((len(names), splits, 2, plan.capacity), -7, dtype=torch.int32, device=DEVICE)
    selection._collect[(len(names) * splits,)](
        scores, thresholds, counts, candidates, counts, 1, keys, top_k, keys - 1, scores.stride(0), 0,
        CAPACITY=plan.capacity, SAMPLE=plan.sample, BLOCK=plan.block, SPLITS=splits, EARLY=False, ON_DEVICE=False,
        ASSEMBLY=CUDA, DEPENDENT=False, num_warps=plan.collect_warps,
    )  # fmt: skip
    span = triton.cdiv(triton.cdiv(keys, plan.block), splits) * plan.block
    for r, name in enumerate(names):
        bits = thresholds[r]
        bound = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
        reaching = scores[r] >= bound
        ties = scores[r] == bound
        clipped = (scores[r] > bound) | (ties & (ties.cumsum(0) <= top_k))
        found = counts[r].tolist()
        assert sum(found) in (int(reaching.sum()), int(clipped.sum())), name
        if name != "infinities":
            assert sum(found) == int(clipped.sum()) < int(reaching.sum()), name
        kept = reaching if sum(found) == int(reaching.sum()) else clipped
        for s in range(splits):
            expected = kept[s * span : (s + 1) * span].nonzero().flatten() + s * span
            assert found[s] == len(expected), (name, s)
            listed = candidates[r, s, :, : found[s]]
            assert_same(listed[0], expected[: plan.capacity].int(), what=f"keys of {name}")
            assert_same(
                listed[1].view(torch.float32), scores[r, expected[: plan.capacity]], what=f"scores of {name}"
            )
            padding = candidates[r, s, 1, found[s] : -(-found[s] // 32) * 32]
            assert bool((padding == indexer.HIDDEN_BITS.value).all()), name


@pytest.mark.parametrize("name", ["random", "few values", "tied where it ends"])
def test_a_misjudged_row_is_searched_again(name: str) -> None:
    """A capacity that leaves no room for error: nearly every row must take the second way."""
    keys, top_k = (9000, 480) if CUDA else (300, 60)
    rows = patterns(keys, seed=4)
    ranks = rows["random"].argsort().argsort()
    # Above the tied are enough for the sample to see nothing else, but fewer than are selected.
    level = torch.where(ranks >= keys - top_k * 7 // 4, 3.0, rows["random"].clamp(max=2.0))
    rows["tied where it ends"] = torch.where(ranks >= keys - top_k * 3 // 4, rows["random"] + 5, level)
    scores = rows[name].expand(2, -1).clone()
    scores[1] = scores[1].flip(0)
    plan = plan_of(2, keys, top_k, splits=1)
    check_rows(scores, torch.ones_like(scores, dtype=torch.bool), top_k, name, plan=plan)


def test_consecutive_queries_and_positions_on_the_device() -> None:
    """Causal rows from one position on, the same for all or each batch row its own; keys behind a query hold NaN. Some rows
    have no more keys than candidates have room for, others do, in one launch."""
    keys, queries, top_k = (9000, 130, 256) if CUDA else (130, 3, 6)
    scores = torch.relu(randn(2, queries, keys, seed=5))
    capacity = selection.selection_plan(90 if CUDA else 0, queries, keys, top_k, 1).capacity
    for offset in (0, capacity - 2):
        visible = reference.visible_keys(queries, keys, scores.device, first_query=offset).expand_as(scores)
        held = laid_out(scores, visible.clone())
        held[~visible] = float("nan")
        lists = selection.select_scored(held, top_k, offset=offset)
        assert_same(lists, expected_lists(scores, visible, top_k), what=f"from position {offset}")
    positions = torch.tensor([3, keys - queries], device=DEVICE)
    lists = selection.select_scored(scores, top_k, positions)
    for b, first in enumerate(positions.tolist()):
        visible = reference.visible_keys(queries, keys, scores.device, first_query=first)
        assert_same(lists[b], expected_lists(scores[b : b + 1], visible, top_k)[0], what=f"row {b}")


def test_lists_go_where_they_are_told_and_nowhere_else() -> None:
    """Rows of a wider buffer, its other columns untouched, some rows shorter than their lists."""
    keys, top_k = (5000, 100) if CUDA else (130, 9)
    scores = randn(1, 3, keys, seed=8)
    for offset in (2, keys - 3):
        buffer = torch.full((1, 3, top_k + 7), 12345, dtype=torch.int32, device=DEVICE)
        out = selection.select_scored(scores, top_k, offset=offset, out=buffer[..., 3 : 3 + top_k])
        visible = reference.visible_keys(3, keys, scores.device, first_query=offset)
        assert_same(out, expected_lists(scores, visible, top_k), what=f"from position {offset}")
        assert bool((buffer[..., :3] == 12345).all())
        assert bool((buffer[..., 3 + top_k :] == 12345).all())


@triton.jit
def _search(values, result, least, most, N: tl.constexpr):
    held = selection.ordered(tl.load(values + tl.arange(0, N)))
    threshold, reached = selection.threshold_of(
        held, tl.sum((held != selection.HIDDEN).to(tl.int32), 0), least, most
    )
    tl.store(result, threshold)
    tl.store(result + 1, reached)


@pytest.mark.parametrize(
    "name", ["random", "few values", "signed zeros and extremes", "infinities", "geometric", "hidden"]
)
def test_the_search_ends_where_it_should(name: str) -> None:
    """Exactly as many as asked for, or a threshold that ties hold back; as many as allowed, where a range is."""
    count = 4096 if CUDA else 64
    rows = patterns(count, seed=9)
    rows["geometric"] = torch.exp2(torch.linspace(-120, 120, count, device=DEVICE)) * (-1) ** torch.arange(
        count, device=DEVICE
    )
    rows["hidden"] = rows["random"].masked_fill(rows["few values"] == 0, float("nan"))
    values = rows[name]
    bits = values.view(torch.int32).masked_fill(values.isnan(), indexer.HIDDEN_BITS.value)
    seen = int((~values.isnan()).sum())
    for least, most in ((1, 1), (count // 3, count // 3), (count // 4, count // 3), (seen, seen)):
        result = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        _search[(1,)](bits, result, least, most, N=count)
        threshold, reached = result[:1], int(result[1])
        bound = torch.where(threshold < 0, threshold ^ 0x7FFFFFFF, threshold).view(torch.float32)
        assert reached == int((values >= bound).sum()) >= least
        assert reached <= most or int((values > bound).sum()) < least


def test_chunks_are_equal_and_fit() -> None:
    for keys, top_k in ((4096, 2048), (131_072, 2048), (131_072, 8192), (262_144, 256), (2**20, 2048)):
        for batch, queries in ((1, 1), (1, 1000), (1, 1024), (1, 9000), (3, 500), (40, 1)):
            rows, part = selection.queries_a_chunk(batch, queries, keys, top_k, 90, 132)
            plan = selection.selection_plan(90, rows * part, keys, top_k, 132)
            candidates = plan.candidate_bytes(rows * part) if keys > plan.capacity else 0
            assert 4 * keys * rows * part + candidates <= selection.WORKSPACE_BYTES <= 2**30
            assert (rows == batch and part == queries) or (part == queries or (rows == 1 and part % 64 == 0))
            parts = -(-queries // part)
            assert part - queries / parts < 64, "the last part is much smaller than the others"
    assert selection.queries_a_chunk(1, 1024, 131_072, 2048, 90, 132) == (1, 1024)


def test_repeats_are_identical() -> None:
    keys, top_k = (50_000, 2048) if CUDA else (270, 12)
    scores = torch.relu(randn(1 if not CUDA else 300, 1, keys, seed=6))
    first = selection.select_scored(scores, top_k, offset=keys - 1)
    for repeat in range(REPEATS - 1):
        again = selection.select_scored(scores, top_k, offset=keys - 1)
        assert_same(again, first, what=f"repeat {repeat}")


def test_what_cannot_be_selected_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k"):
        selection.select_scored(torch.zeros(1, 1, 20_000, device=DEVICE), 9000)
    q, k = torch.zeros(1, 4, 2, 16, device=DEVICE), torch.zeros(1, 3, 16, device=DEVICE)
    with pytest.raises(ValueError, match="queries -1 to 2"):
        selection.select_keys(q, q[..., 0], k, 1)


# ---- scores ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "heads", "dim"),
    [
        (dtype, *shape)
        for dtype in DTYPES
        for shape in [(1, 70, 5, 8), (3, 129, 4, 64), (37, 130, 4, 32), (17, 65, 5, 16)]
    ]
    + [
        (torch.bfloat16, *shape)
        for shape in [(300, 5000, 16, 64), (64, 4096, 64, 64), (2, 9000, 16, 64)]
        if CUDA
    ],
)
def test_scores_equal_the_definition(
    dtype: torch.dtype, queries: int, keys: int, heads: int, dim: int
) -> None:
    q = randn(2, queries, heads, dim, seed=queries, dtype=dtype)
    w = randn(2, queries, heads, seed=keys, dtype=dtype)
    k = randn(2, keys, dim, seed=dim, dtype=dtype)
    with poisoned():
        scores = indexer.index_scores(q, w, k)
    expected = reference.index_scores(q.double().cpu(), w.double().cpu(), k.double().cpu())
    # Matrix units add products exactly but cut the sum to fp32 rather than round it, a few times a head.
    assert_close(scores, expected, relative=5e-6, absolute=1e-6, cosine=1e-9, what="scores")


def test_scores_of_strided_inputs() -> None:
    """A slice of a wider projection, keys inside a packed cache, and dimensions that are not last in memory."""
    wide = randn(1, 20, 4 * 16 + 4, seed=1)
    q, w = wide[..., :64].unflatten(-1, (4, 16)), wide[..., 64:]
    k = randn(1, 50, 40, seed=2)[..., 8:24]
    expected = reference.index_scores(q, w, k)
    assert_close(indexer.index_scores(q, w, k), expected, relative=5e-6)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(indexer.index_scores(turned, w, k.mT.contiguous().mT), expected, relative=5e-6)
    assert_close(
        indexer.index_scores(q[:, :2], w[:, :2], k), expected[:, :2], relative=5e-6, what="few queries"
    )


# ---- FP8 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 32, 64])
def test_quantised_rows_equal_the_definition(dim: int, dtype: torch.dtype) -> None:
    x = randn(2, 33, dim, seed=dim).to(dtype)
    x[0, 0] = 0
    x[0, 1] = 0
    x[0, 1, 3] = 448 * dim**0.5
    x[0, 2] *= 1e-4
    with poisoned():
        values, scale = indexer.quantise_index(x)
    expected_values, expected_scale = reference.quantise_index(x)
    assert values.dtype == torch.float8_e4m3fn
    assert_same(scale, expected_scale, what="scales")
    # Sums in another order may tip a value from one FP8 number to its neighbour, which is at most 1/8 of it away.
    actual, expected = values.float(), expected_values.float()
    assert int((actual != expected).sum()) <= actual.numel() // 200
    assert bool(((actual - expected).abs() <= expected.abs() / 8 + 2**-9).all())


def test_every_fp8_number_is_reached_and_ties_go_to_even() -> None:
    """Entries placed on and halfway between FP8 numbers: rows whose rotation is exact, a single entry each."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(DEVICE)
    between = (numbers[1:] + numbers[:-1]) / 2
    wanted = torch.cat((numbers, -numbers, between, -between))
    # 448 in every row keeps its scale at 1. Rotating twice gives the row back, so the rotated row is rotated once before.
    rows = torch.zeros(len(wanted), 16, device=DEVICE)
    rows[:, 0], rows[:, 1] = 448.0, wanted
    turned = (rows @ reference.hadamard_matrix(16, rows.device)) / 4
    values, scale = indexer.quantise_index(turned)
    assert scale.unique().tolist() == [1.0]
    assert_same(values.float()[:, 1], wanted.to(torch.float8_e4m3fn).float(), what="FP8 numbers")


@pytest.mark.parametrize("queries", [2, 19])
def test_fp8_scores_equal_the_definition(queries: int) -> None:
    keys, heads, dim = (700, 16, 64) if CUDA else (130, 4, 32)
    q = reference.quantise_index(randn(2, queries, heads, dim, seed=1))
    k = reference.quantise_index(randn(2, keys, dim, seed=2) * 5)
    w = randn(2, queries, heads, seed=3)
    with poisoned():
        scores = indexer.index_scores(q[0], w, k[0], q[1], k[1])
    expected = reference.index_scores(q[0], w, k[0], q[1], k[1])
    # FP8 units add products with some 14 bits; decoded products are added in fp32.
    native = CUDA and device_capability(scores.device) >= 89
    assert_close(scores, expected, relative=2e-3 if native else 5e-6, cosine=1e-5)


# ---- scores and selection together -----------------------------------------------------------------------------------------


def exact_inputs(
    batch: int, queries: int, keys: int, heads: int, dim: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: every sum is exact in any order, many scores are equal, many are 0."""
    q = integers(-2, 2, batch, queries, heads, dim, seed=seed).to(dtype)
    w = integers(-3, 4, batch, queries, heads, seed=seed + 1).to(dtype)
    return q, w, integers(-1, 1, batch, keys, dim, seed=seed + 2).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "top_k", "dim"),
    [(torch.float16, 1, 300, 8, 16), (torch.float16, 5, 110, 20, 32)]
    + [
        (dtype, *shape)
        for dtype, shape in [
            (torch.float32, (5, 150, 20, 32)),
            (torch.bfloat16, (200, 3000, 256, 64)),
            (torch.bfloat16, (4, 9000, 2048, 64)),
        ]
        if CUDA
    ],
)
def test_lists_equal_the_definition_where_sums_are_exact(
    dtype: torch.dtype, queries: int, keys: int, top_k: int, dim: int
) -> None:
    q, w, k = exact_inputs(2, queries, keys, 4, dim, seed=keys, dtype=dtype)
    with poisoned():
        lists = selection.select_keys(q, w, k, top_k)
    assert_same(lists, reference.select_keys(q, w, k, top_k), what=f"{dtype}")


@pytest.mark.parametrize("queries", [2, 5])
def test_segments(queries: int) -> None:
    """Packed documents and padding: own segment, the shared one, oneself."""
    keys, top_k = (900, 64) if CUDA else (96, 10)
    generator = torch.Generator().manual_seed(3)
    segments = torch.randint(-1, 4, (2, keys + 5), generator=generator).sort(1).values.roll(7, 1).to(DEVICE)
    q, w, k = exact_inputs(2, queries, keys, 4, 32, seed=1, dtype=torch.float16)
    for first in (keys - queries, 11) if CUDA else (40,):
        lists = selection.select_keys(q, w, k, top_k, segments, first)
        assert_same(
            lists, reference.select_keys(q, w, k, top_k, segments, first), what=f"queries from {first}"
        )


@pytest.mark.parametrize("queries", [1, 5])
def test_slots_behind_the_keys_are_never_read(queries: int) -> None:
    """A prefix of a buffer whose rest holds NaN; the whole buffer with positions on the device; hidden keys that hold NaN."""
    keys, top_k = 75 if queries == 1 else 60, 9
    q, w, k = exact_inputs(2, queries, keys, 4, 16, seed=2, dtype=torch.float16)
    buffer = torch.full((2, 130, 16), float("nan"), dtype=k.dtype, device=DEVICE)
    buffer[:, :keys] = k
    expected = reference.select_keys(q, w, k, top_k)
    assert_same(selection.select_keys(q[1:], w[1:], buffer[1:, :keys], top_k), expected[1:], what="prefix")

    positions = torch.tensor([keys - queries, 20], device=DEVICE, dtype=torch.int32)
    buffer[1, 20 + queries :] = float("nan")
    lists = selection.select_keys(q, w, buffer, top_k, first_query=positions)
    assert_same(lists[:1], expected[:1], what="row 0")
    seen = 20 + queries
    assert_same(lists[1:], reference.select_keys(q[1:], w[1:], k[1:, :seen], top_k), what="row 1")

    segments = torch.ones(1, keys, dtype=torch.int64, device=DEVICE)
    segments[:, 5:30] = -1
    clean = reference.select_keys(q[:1], w[:1], k[:1], top_k, segments)
    k[:, 5:30] = float("nan")
    assert_same(selection.select_keys(q[:1], w[:1], k[:1], top_k, segments), clean, what="hidden keys")


@pytest.mark.parametrize("keys", [1, 70])
def test_all_visible_keys_when_there_are_too_few(keys: int) -> None:
    queries = min(keys, 5)
    q, w, k = exact_inputs(2, queries, keys, 2, 16, seed=keys, dtype=torch.float16)
    segments = torch.randint(-1, 3, (2, keys), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for given in (None, segments):
        with poisoned():
            lists = selection.select_keys(q, w, k, 128, given)
        assert_same(lists, reference.select_keys(q, w, k, 128, given), what=f"segments {given is not None}")


def test_chunks_do_not_change_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    q, w, k = exact_inputs(1, 9, 90, 2, 16, seed=7, dtype=torch.float16)
    whole = reference.select_keys(q, w, k, 20)
    monkeypatch.setattr(reference, "SELECTION_WORKSPACE_BYTES", 64 * 90 * 3)
    assert_same(reference.select_keys(q, w, k, 20), whole, what="definition in chunks of 3")
    # Room for five rows: a chunk of five queries and one of four, which another kernel scores.
    capability, processors = device_capability(q.device), device_processors(q.device)
    monkeypatch.setattr(selection, "WORKSPACE_BYTES", 5 * 4 * 256)
    assert selection.queries_a_chunk(1, 9, 90, 20, capability, processors) == (1, 5)
    assert_same(selection.select_keys(q, w, k, 20), whole, what="chunks of 5")


def test_fp8_lists_equal_the_definition_where_sums_are_exact() -> None:
    q, w, k = exact_inputs(1, 5, 140, 4, 32, seed=8, dtype=torch.float32)
    scales = [
        torch.tensor([0.5, 1.0, 4.0], device=DEVICE)[integers(0, 2, *x.shape[:-1], seed=9).long()]
        for x in (q, k)
    ]
    q, k = q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn)
    for queries in (1, 5):
        arguments = (q[:, -queries:], w[:, -queries:], k, 11, None, None, scales[0][:, -queries:], scales[1])
        assert_same(
            selection.select_keys(*arguments), reference.select_keys(*arguments), what=f"{queries} queries"
        )


if CUDA:

    def test_a_captured_graph_follows_positions_on_the_device() -> None:
        """One decoding step captured once, replayed while the cache fills."""
        keys, top_k = 6000, 512
        q, w, k = exact_inputs(2, 1, keys, 16, 64, seed=10, dtype=torch.bfloat16)
        positions = torch.tensor([4000, 700], device=DEVICE, dtype=torch.int32)
        selection.select_keys(q, w, k, top_k, first_query=positions)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lists = selection.select_keys(q, w, k, top_k, first_query=positions)
        for step in (0, 1, 900):
            positions += step
            graph.replay()
            expected = reference.select_keys(q, w, k, top_k, first_query=positions)
            assert_same(lists, expected, what=f"positions {positions.tolist()}")

    def test_selection_at_full_length_is_that_of_its_own_scores() -> None:
        """128K keys, 700 queries, the 30B model's shape in bf16: lists against torch on the very scores, and the workspace."""
        queries, keys, top_k = 700, 131_072 + 5, 2048
        q, w = randn(1, queries, 16, 64, seed=1, dtype=torch.bfloat16), randn(1, queries, 16, seed=2)
        k = randn(1, keys, 64, seed=3, dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        lists = selection.select_keys(q, w.bfloat16(), k, top_k)
        used = torch.cuda.max_memory_allocated() - before - lists.nbytes
        assert used <= selection.WORKSPACE_BYTES
        for begin in range(0, queries, 100):
            end = begin + 100
            scores = indexer.index_scores(q[:, begin:end], w[:, begin:end].bfloat16(), k)
            visible = reference.visible_keys(100, keys, scores.device, first_query=keys - queries + begin)
            assert_same(lists[:, begin:end], expected_lists(scores, visible, top_k), what=f"from {begin}")
