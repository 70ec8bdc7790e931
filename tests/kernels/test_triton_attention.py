"""The Triton attention over index lists against its definition: on a GPU, or at toy size under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keyecli.kernels import attention as kernels
from keyecli.kernels import reference, unions
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, poisoned

METHODS: list[kernels.Method] = ["gather", "union", "dense"]
# Relative to the largest value: fp32 sums in another order; weights and outputs rounded to 11 and to 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
COSINE = {torch.float32: 1e-9, torch.float16: 1e-5, torch.bfloat16: 1e-4}


class Shape(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    dim: int
    length: int


# Ratios 1, 2, 4 and 8; counts of queries and keys on both sides of multiples of 16; one key; lists longer than the keys.
SMALL = [
    Shape(1, 1, 1, 2, 2, 16, 1),
    Shape(2, 17, 33, 8, 1, 32, 8),
    Shape(1, 33, 50, 4, 2, 16, 12),
    Shape(2, 16, 16, 4, 1, 64, 24),
]
LARGE = [
    Shape(1, 300, 5000, 32, 4, 128, 512),
    Shape(2, 257, 3001, 8, 4, 64, 300),
    Shape(1, 100, 70_000, 32, 4, 128, 2048),
]
SHAPES = SMALL + (LARGE[:1] if CUDA else [])
HALF_CASES = [(torch.float16, SMALL[0]), (torch.float16, SMALL[-1])]
if CUDA:
    HALF_CASES = [(torch.float16, LARGE[1]), *((torch.bfloat16, shape) for shape in LARGE)]
    HALF_CASES.append((torch.float16, Shape(2, 130, 2000, 16, 4, 64, 300)))


def index_lists(shape: Shape, generator: torch.Generator) -> Tensor:
    """Random causal lists: ascending, many of them short, the second query's of the first sequence empty."""
    batch, queries, keys, length = shape.batch, shape.queries, shape.keys, shape.length
    scores = torch.rand(batch, queries, keys, generator=generator, device=DEVICE)
    visible = reference.visible_keys(queries, keys, scores.device)
    ranked = scores.masked_fill(~visible, -1).topk(min(length, keys), dim=-1)
    room = torch.randint(0, 3 * length, (batch, queries, 1), generator=generator, device=DEVICE)
    if queries > 1:
        room[0, 1] = 0
    place = torch.arange(ranked.indices.shape[-1], device=DEVICE)
    kept = (ranked.values >= 0) & (place < room)
    chosen = torch.where(kept, ranked.indices, keys).sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == keys, -1)
    return F.pad(chosen, (0, length - chosen.shape[-1]), value=-1).to(torch.int32)


def never_selected(indices: Tensor, keys: int) -> Tensor:
    """bool [B, S]: keys in nobody's list."""
    batch = len(indices)
    counted = torch.zeros(batch, keys + 1, device=indices.device)
    rows = torch.where(indices < 0, keys, indices.long()).view(batch, -1)
    return counted.scatter_(1, rows, 1.0)[:, :keys] == 0


def problem(
    shape: Shape, dtype: torch.dtype, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Strided q, k, v, and lists. q is a transposed [B, H, T, d]; k and v are prefixes of a longer buffer, side by side;
    what nobody selects is NaN."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    options = {"generator": generator, "device": DEVICE}
    q = torch.randn(shape.batch, shape.heads, shape.queries, shape.dim, **options).transpose(1, 2) * scale
    cache = torch.randn(shape.batch, shape.keys + 5, 2, shape.groups, shape.dim, **options)
    indices = index_lists(shape, generator)
    cache[:, shape.keys :] = torch.nan
    cache[:, : shape.keys][never_selected(indices, shape.keys)] = torch.nan
    cache = cache.to(dtype)
    return q.to(dtype), cache[:, : shape.keys, 0], cache[:, : shape.keys, 1], indices


def check_output(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert_close(actual[0], expected[0], relative=TOLERANCE[dtype], cosine=COSINE[dtype], what="output")
    assert_close(actual[1], expected[1], relative=2e-5, cosine=1e-9, what="log-sum-exp")


def test_the_definition_is_attention_under_the_mask_of_its_lists() -> None:
    """Its output and gradients where PyTorch's own attention says what they are, and its logarithms by hand."""
    shape = Shape(2, 17, 33, 4, 2, 16, 8)
    generator = torch.Generator(DEVICE).manual_seed(7)
    options = {"generator": generator, "device": DEVICE, "dtype": torch.float64}
    q = torch.randn(2, 17, 4, 16, **options)
    k, v = torch.randn(2, 33, 2, 16, **options), torch.randn(2, 33, 2, 16, **options)
    indices = index_lists(shape, generator)
    indices[:, :, 0] = torch.where(indices[:, :, 0] < 0, 0, indices[:, :, 0])
    mask = torch.zeros(2, 17, 34, dtype=torch.bool, device=DEVICE)
    mask = mask.scatter(2, torch.where(indices < 0, 33, indices.long()), True)[:, :, :33]
    weights = (torch.randn(q.shape, **options), torch.zeros(q.shape[:3], device=DEVICE))
    nothing = torch.zeros(q.shape[:3], device=DEVICE)
    actual = gradients(lambda *x: reference.attend_indices(*x, indices), (q, k, v), weights)
    expected = gradients(lambda *x: (reference.masked_attention(*x, mask), nothing), (q, k, v), weights)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, relative=1e-12, absolute=1e-12)
    out, lse = reference.attend_indices(q, k, v, indices)
    assert_close(out, reference.masked_attention(q, k, v, mask), relative=1e-12, absolute=1e-12)
    logits = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(2, dim=2)) / 4
    by_hand = logits.masked_fill(~mask[:, :, None], float("-inf")).logsumexp(-1)
    assert_close(lse, by_hand, relative=1e-12, absolute=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_is_the_definition(shape: Shape, method: kernels.Method) -> None:
    q, k, v, indices = problem(shape, torch.float32)
    with poisoned():
        actual = kernels.sparse_attention(q, k, v, indices, method)
    expected = reference.attend_indices(q.double(), k.double(), v.double(), indices)
    check_output(actual, expected, torch.float32)
    if shape.queries > 1:
        assert bool((actual[0][0, 1] == 0).all())
        assert bool(torch.isneginf(actual[1][0, 1]).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "shape"), HALF_CASES)
def test_half_precision(dtype: torch.dtype, shape: Shape, method: kernels.Method) -> None:
    q, k, v, indices = problem(shape, dtype)
    with poisoned():
        actual = kernels.sparse_attention(q, k, v, indices, method)
    expected = reference.attend_indices(q.double(), k.double(), v.double(), indices)
    check_output(actual, expected, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_extreme_logits(method: kernels.Method) -> None:
    """Logits of some thousands, where one key takes everything, and keys that are all alike."""
    shape = Shape(1, 18, 40, 2, 1, 16, 9)
    q, k, v, indices = problem(shape, torch.float32, scale=1000.0)
    actual = kernels.sparse_attention(q, k, v, indices, method)
    check_output(actual, reference.attend_indices(q.double(), k.double(), v.double(), indices), torch.float32)
    alike = torch.ones_like(k)
    actual = kernels.sparse_attention(q, alike, v, indices, method)
    check_output(
        actual, reference.attend_indices(q.double(), alike.double(), v.double(), indices), torch.float32
    )


@pytest.mark.parametrize("method", METHODS)
def test_lists_of_everything_visible_give_causal_attention(method: kernels.Method) -> None:
    tokens = 200 if CUDA else 20
    generator = torch.Generator(DEVICE).manual_seed(3)
    q, k, v = (torch.randn(1, tokens, 2, 16, generator=generator, device=DEVICE) for _ in range(3))
    positions = torch.arange(tokens, device=DEVICE)
    indices = torch.where(positions[None] <= positions[:, None], positions[None], -1)[None].to(torch.int32)
    actual, _ = kernels.sparse_attention(q, k, v, indices, method)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), is_causal=True
    )
    assert_close(actual, expected.transpose(1, 2), relative=2e-5)


@pytest.mark.parametrize("method", ["union", "dense"])
def test_chunks_do_not_change_a_bit(method: kernels.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace of one or two groups, so that chunks end inside a sequence and go on in the next."""
    shape = Shape(3, 100, 900, 4, 2, 32, 40) if CUDA else Shape(2, 33, 18, 2, 1, 16, 3)
    q, k, v, indices = problem(shape, torch.float32)
    whole = kernels.sparse_attention(q, k, v, indices, method)
    form: unions.Form = "unions" if method == "union" else "bitmap"
    group_bytes = 8 * unions.union_capacity(indices, shape.keys, 16)
    if form == "bitmap":
        group_bytes = 2 * unions.bitmap_width(shape.keys)
    monkeypatch.setattr(unions, "WORKSPACE_BYTES", 2 * 2 * group_bytes)
    parts = [chunk.groups for chunk in unions.chunks(indices, shape.keys, 16, form)]
    assert max(parts) == 2
    assert sum(parts) == shape.batch * -(-shape.queries // 16)
    with poisoned():
        parted = kernels.sparse_attention(q, k, v, indices, method)
    for one, other in zip(whole, parted, strict=True):
        assert_same(other, one)


def words_of_groups(indices: Tensor, keys: int, queries: int) -> Tensor:
    """What the bitmap must hold, int64 [groups, S], a bit of a word a query; by hand."""
    batch, tokens, _ = indices.shape
    selected = torch.zeros(batch, tokens, keys + 1, dtype=torch.int64, device=DEVICE)
    selected.scatter_(2, torch.where(indices < 0, keys, indices).long(), 1)
    selected = F.pad(selected[:, :, :keys], (0, 0, 0, -tokens % queries))
    bits = 1 << torch.arange(queries, device=DEVICE)
    return (selected.view(-1, queries, keys) * bits[:, None]).sum(1)


def unsigned(words: Tensor, queries: int) -> Tensor:
    """Words as numbers of as many bits as there are queries, whatever their sign."""
    return words.long() & ((1 << queries) - 1)


# Lists in order, and in any order with gaps between; of odd lengths; without any key; the last key of a word alone; whole
# stretches of keys, more than a program looks through at once.
FEW, MANY = Shape(2, 17, 150, 1, 1, 16, 9), Shape(1, 2, 300, 1, 1, 16, 300)
LIST_CASES = [
    *((FEW, case) for case in ("in order", "any order", "nothing", "one key")),
    (MANY, "in order"),
    (SMALL[0], "in order"),
]
if CUDA:
    LIST_CASES += [
        (shape, case)
        for shape in (Shape(2, 530, 9001, 1, 1, 16, 1023), Shape(1, 4099, 131_072, 1, 1, 16, 2048))
        for case in ("in order", "any order", "one key")
    ]


def listed(shape: Shape, case: str) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(11)
    indices = index_lists(shape, generator)
    if case == "any order":
        return indices[:, :, torch.randperm(shape.length, generator=generator, device=DEVICE)].contiguous()
    if case == "nothing":
        return torch.full_like(indices, -1)
    if case == "one key":
        indices = torch.full_like(indices, -1)
        indices[:, ::3, -1] = shape.keys - 1
        return indices
    return indices


@pytest.mark.parametrize(("shape", "case"), LIST_CASES)
@pytest.mark.parametrize("queries", [8, 16])
def test_lists_are_what_the_groups_select(
    queries: int, shape: Shape, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unions, their words and padding; the bitmap; in one chunk and in several."""
    indices = listed(shape, case)
    words = words_of_groups(indices, shape.keys, queries)
    if case == "any order":
        room = 8 * unions.union_capacity(indices, shape.keys, queries) * max(1, len(words) // 2)
        monkeypatch.setattr(unions, "WORKSPACE_BYTES", 2 * room)
    first = 0
    for chunk in unions.chunks(indices, shape.keys, queries, "unions"):
        assert chunk.first_group == first
        first += chunk.groups
        with poisoned():
            check_lists(chunk, words[first - chunk.groups : first])
    assert first == len(words)


def check_lists(chunk: unions.Chunk, expected: Tensor) -> None:
    """A chunk's lists against the words [groups, S] of its groups."""
    keys = expected.shape[1]
    lists = chunk.unions()
    for group, (row, count) in enumerate(zip(expected, lists.counts.tolist(), strict=True)):
        distinct = row.nonzero()[:, 0]
        assert count == len(distinct)
        assert_same(lists.keys[group, :count].long(), distinct, what="keys of a union")
        assert_same(unsigned(lists.words[group, :count], chunk.queries), row[distinct], what="its words")
        last = int(distinct[-1]) if count else 0
        assert bool((lists.keys[group, count : count + unions.UNION_PADDING] == last).all())
        assert bool((lists.words[group, count : count + unions.UNION_PADDING] == 0).all())
    assert_same(unsigned(chunk.bitmap[:, :keys], chunk.queries), expected, what="bitmap")
    assert bool((chunk.bitmap[:, keys:] == 0).all())
    some = F.pad(expected, (0, -keys % unions.LARGEST_TILE)).view(len(expected), -1, 64)
    flags = (some != 0).any(-1)
    tiles = chunk.tile_lists(64)
    for group, row in enumerate(flags):
        assert_same(tiles.keys[group, : int(tiles.counts[group])].long(), row.nonzero()[:, 0], what="tiles")
    readers = chunk.reader_lists(64)
    for sequence in range(len(chunk.indices)):
        begin = sequence * chunk.groups_per_sequence - chunk.first_group
        low, high = max(begin, 0), max(0, min(begin + chunk.groups_per_sequence, chunk.groups))
        for tile, row in enumerate(flags.T):
            groups = low + row[low:high].nonzero()[:, 0]
            count = int(readers.counts[tile, sequence])
            assert count == len(groups)
            assert_same(readers.keys[tile, low : low + count].long(), groups, what="readers")


def test_a_workspace_is_shared_by_even_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine groups where seven find room go as five and four; and not even one group's room is asked for."""
    indices = torch.zeros(1, 72, 4, dtype=torch.int32, device=DEVICE)
    group_bytes = 8 * unions.union_capacity(indices, 100, 8)
    for workspace, expected in ((2 * 7 * group_bytes, [5, 4]), (2 * 9 * group_bytes, [9]), (1, [1] * 9)):
        monkeypatch.setattr(unions, "WORKSPACE_BYTES", workspace)
        assert [chunk.groups for chunk in unions.chunks(indices, 100, 8, "unions")] == expected


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("method", ["union", "dense"])
@pytest.mark.parametrize("shape", SMALL[1:2] + SHAPES[4:])
def test_groups_of_the_other_size(
    shape: Shape, method: kernels.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 queries where kernels have 16 and the other way round. The last group has a single query; the shape before has one
    head a key head, too few rows for groups of 8."""
    original = kernels.tiles

    def tiles(capability: int, element_bytes: int) -> kernels.Tiles:
        cut = original(capability, element_bytes)
        names = ("attend", "group_gradient", "key_gradient")
        others = {
            name: replace(tile, queries=24 - tile.queries)
            for name, tile in vars(cut).items()
            if name in names
        }
        return replace(cut, **others)

    monkeypatch.setattr(kernels, "tiles", tiles)
    for one in (shape, SMALL[0]):
        q, k, v, indices = problem(one, torch.float32)
        with poisoned():
            actual = kernels.sparse_attention(q, k, v, indices, method)
        expected = reference.attend_indices(q.double(), k.double(), v.double(), indices)
        check_output(actual, expected, torch.float32)
    check_gradients(shape, torch.float32, method)


def gradients(
    function: Any, inputs: tuple[Tensor, Tensor, Tensor], weights: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    finite = torch.isfinite(lse)
    loss = (out.double() * weights[0]).sum()
    loss = loss + (torch.where(finite, lse, 0).double() * weights[1]).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.fixture(params=[False, True], ids=["as they come", "in order"])
def repeatable(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both ways of adding up gradients of keys and values."""
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def check_gradients(shape: Shape, dtype: torch.dtype, method: kernels.Method, repeats: int = 0) -> None:
    q, k, v, indices = problem(shape, dtype, seed=1)
    generator = torch.Generator(DEVICE).manual_seed(2)
    weights = (
        torch.randn(q.shape, generator=generator, device=DEVICE, dtype=torch.float64),
        torch.randn(q.shape[:3], generator=generator, device=DEVICE, dtype=torch.float64),
    )
    with poisoned():
        actual, *others = (
            gradients(lambda *x: kernels.sparse_attention(*x, indices, method), (q, k, v), weights)
            for _ in range(1 + repeats)
        )
    for other in others:
        for one, same in zip(actual, other, strict=True):
            assert_same(same, one)
    expected = gradients(
        lambda *x: reference.attend_indices(*x, indices), (q.double(), k.double(), v.double()), weights
    )
    tolerance, cosine = TOLERANCE[dtype], COSINE[dtype]
    for name, one, other in zip("qkv", actual, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, relative=tolerance, cosine=cosine, what=f"gradient of {name}")
    unused = never_selected(indices, shape.keys)
    assert bool((actual[1][unused] == 0).all())
    assert bool((actual[2][unused] == 0).all())


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("method", ["union", "dense"])
@pytest.mark.parametrize("shape", SMALL[:3] + SHAPES[4:])
def test_gradients_are_those_of_the_definition(shape: Shape, method: kernels.Method) -> None:
    check_gradients(shape, torch.float32, method)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("method", ["union", "dense"] if CUDA else ["gather"])
@pytest.mark.parametrize(("dtype", "shape"), HALF_CASES)
def test_gradients_in_half_precision(dtype: torch.dtype, shape: Shape, method: kernels.Method) -> None:
    check_gradients(shape, dtype, method)


def test_gradients_add_up_over_chunks_and_repeat(repeatable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(3, 100, 900, 4, 2, 32, 40) if CUDA else Shape(2, 17, 20, 2, 1, 16, 5)
    monkeypatch.setattr(unions, "WORKSPACE_BYTES", 1)
    check_gradients(shape, torch.float32, "union", repeats=(9 if CUDA else 1) if repeatable else 0)


@pytest.mark.parametrize(("dtype", "shape"), [*((torch.float32, shape) for shape in SHAPES), *HALF_CASES])
def test_probabilities_of_the_selected_keys(dtype: torch.dtype, shape: Shape) -> None:
    q, k, _, indices = problem(shape, dtype)
    zeros = torch.zeros(k.shape, dtype=torch.float64, device=DEVICE)
    _, lse = reference.attend_indices(q.double(), k.double(), zeros, indices)
    with poisoned():
        actual = kernels.selected_probabilities(q, k, indices, lse.float())
    expected = reference.selected_probabilities(q.double(), k.double(), indices, lse)
    assert_close(actual, expected, relative=1e-4, cosine=1e-7, what="probabilities")
    assert bool((actual[indices < 0] == 0).all())
    present = (indices >= 0).any(-1).float()
    assert_close(actual.sum(-1), present, relative=1e-4, cosine=1e-7, what="sum of a query's probabilities")


def test_the_method_follows_from_shapes() -> None:
    assert kernels.choose_method(1, 1, 131_072, 2048) == "gather"
    assert kernels.choose_method(1, 8192, 131_072, 2048) == "union"
    assert kernels.choose_method(8, 64, 2560, 2048) == "union"
    assert kernels.choose_method(8, 64, 2048, 2048) == "dense"


def test_what_the_kernels_are_not_made_for_is_named() -> None:
    q, k, indices = (
        torch.zeros(1, 2, 6, 16),
        torch.zeros(1, 3, 2, 16),
        torch.zeros(1, 2, 3, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="6 query heads over 2 key heads"):
        kernels.sparse_attention(q, k, k, indices)
    with pytest.raises(ValueError, match="head dim 24"):
        kernels.sparse_attention(torch.zeros(1, 2, 4, 24), torch.zeros(1, 3, 2, 24), k, indices)
    with pytest.raises(ValueError, match="indices"):
        kernels.sparse_attention(q[:, :, :4], k, k, indices[:, :1])
    with pytest.raises(ValueError, match="types"):
        kernels.sparse_attention(q[:, :, :4], k, k.half(), indices)
    with pytest.raises(ValueError, match="values"):
        kernels.sparse_attention(q[:, :, :4], k, k[:, :2], indices)


def test_rows_beyond_the_reach_of_32_bits() -> None:
    """Keys whose places times their stride pass 2³¹ elements; without a GPU the same with strides that fit its memory."""
    keys, wide = (140_000, 128) if CUDA else (40, 4)
    cache = torch.zeros(1, keys, wide, 128, dtype=torch.float16, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(5)
    last = torch.arange(keys - 30, keys, device=DEVICE)
    cache[:, last] = torch.randn(1, 30, wide, 128, generator=generator, device=DEVICE).half()
    k, v = cache[:, :, :1], cache[:, :, 1:2]
    q = torch.randn(1, 2, 2, 128, generator=generator, device=DEVICE).half()
    indices = last[None, None, ::3].expand(1, 2, -1).to(torch.int32)
    local = torch.arange(30, device=DEVICE)[None, None, ::3].expand(1, 2, -1)
    expected = reference.attend_indices(q.double(), k[:, -30:].double(), v[:, -30:].double(), local)
    for method in METHODS:
        check_output(kernels.sparse_attention(q, k, v, indices, method), expected, torch.float16)
