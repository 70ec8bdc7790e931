"""The indexer's scores in Gluon against their definition, on a Hopper GPU: Gluon has no interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keyecli.kernels import hopper_scores, indexer, reference
from keyecli.kernels.compile import SHARED_LIMIT_BYTES
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA

HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
HALF = [torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def integers(low: int, high: int, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Integers from low to high, both included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to("cuda", dtype)


def hopper_into(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    segments: Tensor | None = None,
    positions: Tensor | None = None,
    offset: int = 0,
    masked: bool = True,
) -> Tensor:
    """What the kernel writes into a buffer of NaN; fails where it would leave the scores to the other one."""
    shape = (*q.shape[:2], indexer.padded_length(k.shape[1]))
    out = torch.full(shape, float("nan"), device="cuda")
    assert hopper_scores.score_into(out, q, w, k, segments, positions, offset, masked)
    return out


def exact_inputs(
    batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: every sum is exact in any order, and the scores have one right answer to the last bit."""
    q = integers(-2, 2, batch, queries, heads, dim, seed=1, dtype=dtype)
    w = integers(-3, 4, batch, queries, heads, seed=2, dtype=dtype)
    return q, w, integers(-1, 1, batch, keys, dim, seed=3, dtype=dtype)


def expected_masked(out: Tensor, scores: Tensor, first: list[int], segments: Tensor | None) -> Tensor:
    """`out` as it should be: the score of a key that its query sees; the bits of a hidden one for any other up to the last of
    64 queries; behind that a hidden one or the NaN that was there."""
    queries, keys = scores.shape[1:]
    expected = out.view(torch.int32).clone()
    bits = scores.view(torch.int32)
    rows = torch.arange(queries, device="cuda")
    last = (rows // 64 * 64 + 63).clamp(max=queries - 1)
    for b, start in enumerate(first):
        own_segments = None if segments is None else segments[b : b + 1]
        visible = reference.visible_keys(queries, keys, scores.device, own_segments, start)[0]
        written = torch.arange(keys, device="cuda")[None] <= (last + start)[:, None]
        assert bool(out[b, :, :keys][~written].isnan().all())
        hidden = expected[b, :, :keys].masked_fill(written, indexer.HIDDEN_BITS.value)
        expected[b, :, :keys] = torch.where(visible, bits[b], hidden)
    return expected


# ---- the tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [2, 3, 4, 6, 8, 12, 16, 20, 32])
def test_tiles_fit(heads: int, dim: int) -> None:
    tiles = hopper_scores.hopper_tiles(heads, dim, 2)
    if tiles is None:
        assert heads * dim > 16 * 64
        return
    assert heads % tiles.step == 0
    assert 0 < tiles.behind < heads
    assert indexer.ROW_PADDING % tiles.keys == 0
    assert 2 * dim * (64 * heads + 4 * tiles.keys) + 256 * heads < SHARED_LIMIT_BYTES[90]


def test_tiles_of_the_models() -> None:
    assert hopper_scores.hopper_tiles(16, 64, 2) == hopper_scores.HopperTiles(keys=128, step=8, behind=12)
    assert hopper_scores.hopper_tiles(4, 32, 2) == hopper_scores.HopperTiles(keys=128, step=4, behind=2)


@pytest.mark.parametrize(
    ("heads", "dim", "element_bytes"),
    [(16, 64, 1), (16, 64, 4), (32, 64, 2), (1, 64, 2), (13, 64, 2), (2, 256, 2)],
)
def test_what_the_other_kernel_takes(heads: int, dim: int, element_bytes: int) -> None:
    assert hopper_scores.hopper_tiles(heads, dim, element_bytes) is None


# ---- the scores ------------------------------------------------------------------------------------------------------------

SHAPES = [
    # queries, keys, heads, dim
    (64, 128, 16, 64),
    (5, 1, 16, 64),
    (65, 129, 4, 32),
    (200, 1000, 16, 64),
    (100, 5000, 16, 64),
    (130, 300, 6, 48),
    (70, 257, 2, 16),
    (90, 700, 8, 128),
    (33, 385, 32, 32),
]


@hopper
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("queries", "keys", "heads", "dim"), SHAPES)
def test_scores_equal_the_definition(
    queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    q = randn(2, queries, heads, dim, seed=queries, dtype=dtype)
    w = randn(2, queries, heads, seed=keys, dtype=dtype)
    k = randn(2, keys, dim, seed=dim, dtype=dtype)
    out = hopper_into(q, w, k, masked=False)
    expected = reference.index_scores(q.double().cpu(), w.double().cpu(), k.double().cpu())
    # Matrix units add products exactly but cut the sum to fp32 rather than round it, a few times a head.
    assert_close(out[..., :keys], expected, relative=5e-6, absolute=1e-6, cosine=1e-9, what="scores")


@hopper
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("queries", "keys"), [(64, 256), (200, 3001), (1024, 9000)])
def test_sums_that_are_exact_stay_so(queries: int, keys: int, dtype: torch.dtype) -> None:
    q, w, k = exact_inputs(1, queries, keys, 16, 64, dtype)
    expected = reference.index_scores(q, w, k)
    assert_same(hopper_into(q, w, k, masked=False)[..., :keys], expected, what="scores")
    first = keys - queries
    out = hopper_into(q, w, k, offset=first)
    assert_same(out.view(torch.int32), expected_masked(out, expected, [first], None), what="masked scores")


@hopper
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_segments(dtype: torch.dtype) -> None:
    """A shared prefix, packed documents and padding, in rows of a wider tensor."""
    q, w, k = exact_inputs(2, 150, 900, 16, 64, torch.bfloat16)
    segments = (torch.arange(1000, device="cuda") // 130 % 4).repeat(2, 1).to(dtype)
    segments[1, ::7] = -1
    segments[:, 870:] = -1
    out = hopper_into(q, w, k, segments, offset=750)
    expected = expected_masked(out, reference.index_scores(q, w, k), [750, 750], segments)
    assert_same(out.view(torch.int32), expected, what="scores")


@hopper
def test_positions_on_the_device() -> None:
    """Each batch row at its own place in a buffer of keys that is longer than what is filled."""
    q, w, k = exact_inputs(3, 70, 1500, 16, 64, torch.bfloat16)
    starts = [0, 333, 1400]
    positions = torch.tensor(starts, dtype=torch.int32, device="cuda")
    out = hopper_into(q, w, k, positions=positions)
    expected = expected_masked(out, reference.index_scores(q, w, k), starts, None)
    assert_same(out.view(torch.int32), expected, what="scores")
    # Behind the last tile that a query could see nothing is written.
    assert bool(
        (out[0, :, 128 + 64 :].view(torch.int32) == torch.tensor(float("nan")).view(torch.int32)).all()
    )


@hopper
def test_strided_inputs() -> None:
    """A slice of a wider projection, heads before queries in memory, keys inside a packed cache."""
    wide = randn(2, 90, 16 * 64 + 80, seed=1, dtype=torch.bfloat16)
    q, w = wide[..., : 16 * 64].unflatten(-1, (16, 64)), wide[..., 16 * 64 : 16 * 64 + 16]
    k = randn(2, 400, 160, seed=2, dtype=torch.bfloat16)[:, 32:333, 16:80]
    expected = reference.index_scores(q, w, k)
    assert_close(hopper_into(q, w, k, masked=False)[..., :301], expected, relative=5e-6)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(
        hopper_into(turned, w.mT.contiguous().mT, k, masked=False)[..., :301], expected, relative=5e-6
    )
    wide_gates = hopper_into(q, w.float(), k, masked=False)[..., :301]
    assert_close(wide_gates, expected, relative=5e-6, what="gates in fp32")


@hopper
def test_rows_that_asynchronous_copies_cannot_reach() -> None:
    q = randn(1, 70, 16, 72, seed=1, dtype=torch.bfloat16)[..., :64]
    w = randn(1, 70, 16, seed=2, dtype=torch.bfloat16)
    k = randn(1, 300, 64, seed=3, dtype=torch.bfloat16)
    out = torch.full((1, 70, indexer.padded_length(300)), float("nan"), device="cuda")
    assert not hopper_scores.score_into(out, q, w, k, None, None, 0, False)
    assert bool(out.isnan().all())
    assert_close(indexer.index_scores(q, w, k), reference.index_scores(q, w, k), relative=5e-6)


@hopper
def test_both_kernels_sum_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, so that it does not matter for a selection which one ran, nor how often it runs."""
    q = randn(1, 500, 16, 64, seed=1, dtype=torch.bfloat16)
    w = randn(1, 500, 16, seed=2, dtype=torch.bfloat16)
    k = randn(1, 20000, 64, seed=3, dtype=torch.bfloat16)
    scores = hopper_into(q, w, k, masked=False).view(torch.int32)[..., :20000]
    for _ in range(20):
        assert_same(hopper_into(q, w, k, masked=False).view(torch.int32)[..., :20000], scores, what="again")
    monkeypatch.setattr(hopper_scores, "hopper_tiles", lambda *_: None)
    assert_same(indexer.index_scores(q, w, k).view(torch.int32), scores, what="the other kernel")
