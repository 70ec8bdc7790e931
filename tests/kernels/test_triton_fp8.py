"""Keys and values in FP8: what is stored, and that kernels and definitions write and read the same, also of odd values."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.engine.eager import EagerDecoder
from keyecli.engine.static import StaticDecoder
from keyecli.kernels import attention, decode, fp8, reference, step
from keyecli.kernels.reference import Branches, StepShape
from keyecli.model.cache import KeyeCache
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, HALF, poisoned
from tests.kernels.test_triton_attention import METHODS, Shape, check_output, index_lists, never_selected
from tests.model.test_training import fresh
from tests.model.test_trunk import text

FP8 = torch.float8_e4m3fn
SHAPES = [Shape(2, 17, 33, 8, 1, 32, 8), Shape(1, 18, 50, 4, 2, 16, 12)]
if CUDA:
    SHAPES += [Shape(1, 300, 5000, 32, 4, 128, 512)]


def finite_values() -> Tensor:
    """Every finite FP8 number once, ascending, fp32 [253]."""
    bytes_of = torch.arange(127, dtype=torch.uint8)
    positive = bytes_of.view(FP8).float()
    return torch.cat((-positive.flip(0)[:-1], positive))


def odd_values() -> Tensor:
    """fp32: everything representable, what lies halfway and just beside it, what saturates, what is next to nothing."""
    values = finite_values()
    halfway = (values[1:] + values[:-1]) / 2
    up, down = (torch.nextafter(halfway, torch.tensor(sign * torch.inf)) for sign in (1.0, -1.0))
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(2000, generator=generator)
    large = torch.tensor([448.1, 464.0, 480.0, 1e9, 3e38, torch.inf])
    tiny = torch.tensor([2.0**-10, 1.0001 * 2**-10, 2.0**-11, 1e-30, 1e-42, 0.0])
    return torch.cat((values, halfway, up, down, some, some * 0.01, some * 300, large, -large, tiny, -tiny))


def same_bytes(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless both hold the same bytes, or are no numbers in the same places."""
    assert actual.dtype == expected.dtype == FP8
    actual, expected = actual.cpu(), expected.cpu()
    nothing = expected.float().isnan()
    assert_same(actual.float().isnan(), nothing, what=f"{what}, NaN")
    bytes_of = (x.view(torch.uint8).masked_fill(nothing, 0) for x in (actual, expected))
    assert_same(*bytes_of, what=what)


def test_stored_is_the_nearest_number_and_the_even_one_of_two() -> None:
    """By looking through all numbers."""
    values, x = finite_values(), odd_values()
    distance = (x.clamp(-448, 448).double()[:, None] - values.double()).abs()
    least = distance.min(-1, keepdim=True).values
    even = torch.arange(253).sub(126).abs() % 2 == 0
    nearest = torch.where(distance == least, torch.where(even, 2, 1), 0).argmax(-1)
    stored = reference.stored(x, FP8)
    assert_same(stored.float(), values[nearest])
    assert_same(reference.stored(x.double(), FP8).float(), values[nearest])
    assert bool(reference.stored(torch.tensor([torch.nan, -torch.nan]), FP8).float().isnan().all())
    assert reference.stored(x, torch.bfloat16).dtype == torch.bfloat16


def test_no_gradient_is_lost_unseen() -> None:
    x = torch.ones(1, 3, 2, 16, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients"):
        reference.stored(x, FP8)
    with torch.no_grad():
        k = reference.stored(x, FP8)
    indices = torch.zeros(1, 3, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="no gradients"):
        attention.sparse_attention(x, k, k, indices)


@triton.jit
def _write(x, y, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < n, other=0.0)
    tl.store(y + place, fp8.as_written(values, y.dtype.element_ty), mask=place < n)


@triton.jit
def _read(x, y, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < n, other=0.0)
    tl.store(y + place, fp8.as_read(values, y.dtype.element_ty), mask=place < n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_write_what_is_stored(dtype: torch.dtype) -> None:
    """All numbers of 16 bits, and what lies between those of 8."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = every.view(dtype) if dtype.itemsize == 2 else torch.cat((odd_values(), torch.tensor([torch.nan])))
    y = torch.empty(x.shape, dtype=FP8, device=DEVICE)
    _write[(triton.cdiv(len(x), 4096),)](x.to(DEVICE), fp8.writable(y), len(x), BLOCK=4096)
    same_bytes(y, reference.stored(x, FP8), "stored")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [torch.uint8, torch.int8, FP8] if CUDA else [torch.uint8])
def test_kernels_read_what_it_stands_for(dtype: torch.dtype, given: torch.dtype) -> None:
    """By arithmetic, as the interpreter and as older cards do it, and by the hardware."""
    x = torch.arange(256, dtype=torch.uint8).view(FP8)
    source = x.to(DEVICE).view(given)
    y = torch.empty(256, dtype=dtype, device=DEVICE)
    _read[(1,)](source, y, 256, BLOCK=256)
    assert_same(y.cpu(), x.to(dtype))


def problem(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v in FP8, prefixes of a longer buffer, and lists. There are denormals and values that saturate among them, a key
    of zeros, and NaN where nobody selects."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    options = {"generator": generator, "device": DEVICE}
    q = torch.randn(shape.batch, shape.heads, shape.queries, shape.dim, **options).transpose(1, 2)
    held = torch.randn(shape.batch, shape.keys + 5, 2, shape.groups, shape.dim, **options)
    held[:, ::3] *= 2e-3
    held[:, 1::5, 1] *= 1000
    held[:, 2] = 0
    indices = index_lists(shape, generator)
    held[:, shape.keys :] = torch.nan
    held[:, : shape.keys][never_selected(indices, shape.keys)] = torch.nan
    held = reference.stored(held, FP8)
    return q.to(dtype), held[:, : shape.keys, 0], held[:, : shape.keys, 1], indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_is_the_definition(shape: Shape, method: attention.Method, dtype: torch.dtype) -> None:
    q, k, v, indices = problem(shape, dtype)
    with poisoned():
        actual = attention.sparse_attention(q, k, v, indices, method)
    expected = reference.attend_indices(q.double(), k.double(), v.double(), indices)
    check_output(actual, expected, dtype)
    assert bool((actual[0][0, 1] == 0).all())
    # The definition itself converts; 0 where a list is empty, and where nobody selects nothing is read.
    own = reference.attend_indices(q, k, v, indices)
    wide = reference.attend_indices(q, k.to(dtype), v.to(dtype), indices)
    for one, other in zip(own, wide, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_queries_of_any_size(method: attention.Method) -> None:
    """Sixteen bits wide they are brought to one size to be multiplied: next to nothing, large, nothing at all, mixed."""
    dtype = HALF[0]
    q, k, v, indices = problem(SHAPES[0], dtype)
    sizes = torch.logspace(-7, 2, q.shape[1], device=DEVICE)
    q = (q.float() * sizes[:, None, None]).to(dtype)
    q[:, 3] = 0
    q[:, 4, :, ::2] *= 1e-3
    actual = attention.sparse_attention(q, k, v, indices, method)
    expected = reference.attend_indices(q.double(), k.double(), v.double(), indices)
    check_output(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_new_tokens_and_probabilities(shape: Shape, dtype: torch.dtype) -> None:
    q, k, v, indices = problem(shape, dtype)
    with poisoned():
        actual = decode.decode_attention(q[:, :3], k, v, indices[:, :3])
    expected, lse = reference.attend_indices(q.double(), k.double(), v.double(), indices)
    relative = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert_close(actual, expected[:, :3], relative=relative, cosine=1e-4, what="new tokens")
    with poisoned():
        mine = attention.selected_probabilities(q, k, indices, lse.float())
    theirs = reference.selected_probabilities(q, k, indices, lse)
    assert_close(mine, theirs, relative=1e-4, cosine=1e-7, what="probabilities")


def test_branches_are_attended_to_where_their_rows_stand() -> None:
    branches = Branches(shared=20, room=5, count=3)
    generator = torch.Generator(DEVICE).manual_seed(2)
    q = torch.randn(3, 1, 4, 16, generator=generator, device=DEVICE)
    held = torch.randn(2, 1, branches.rows, 2, 16, generator=generator, device=DEVICE)
    k, v = reference.stored(held, FP8)
    indices = torch.arange(1, 25, 2, device=DEVICE).expand(3, 1, -1).to(torch.int32)
    actual = decode.decode_attention(q, k, v, indices, branches=branches)
    expected = decode.decode_attention(q, branches.unfolded(k), branches.unfolded(v), indices)
    assert_same(actual, expected)


@pytest.mark.parametrize("crossover", [0, 10**9], ids=["gather", "mask"])
def test_definitions_under_a_mask_convert(crossover: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GATHER_CROSSOVER", crossover)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 5, 8, 16, generator=generator)
    k, v = reference.stored(torch.randn(2, 2, 40, 4, 16, generator=generator), FP8)
    mask = reference.select_top_k(
        torch.randn(2, 5, 40, generator=generator), reference.visible_keys(5, 40, q.device), 7
    )
    assert_close(
        reference.sparse_attention(q, k, v, mask, 7),
        reference.sparse_attention(q, k.float(), v.float(), mask, 7),
        relative=1e-6,
    )
    assert_same(
        reference.attention_probabilities(q, k, mask),
        reference.attention_probabilities(q, k.float(), mask),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branches", [None, Branches(shared=2, room=4, count=2)], ids=["batch", "branches"])
def test_a_cache_in_fp8_gets_what_another_gets_rounded(dtype: torch.dtype, branches: Branches | None) -> None:
    """By the kernel and by the definition: the keys and values that a wider cache holds, rounded once more."""
    shape = StepShape(4, 2, 32, 2, 16, 1e-6, 1e-6)
    tokens = 3 if branches is None else 1
    generator = torch.Generator(DEVICE).manual_seed(4)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE)

    projected = random(2, tokens, 8 * 32 + 2 * 17 + 16)
    projected[..., 6 * 32 : 8 * 32] *= torch.tensor([300.0, 0.003], device=DEVICE).repeat(32)
    projected[0, 0, 6 * 32] = torch.nan
    tables = tuple(
        turn(angles).repeat(1, 1, 2).to(dtype)
        for angles in (random(2, tokens, 16), random(2, tokens, 8))
        for turn in (torch.cos, torch.sin)
    )
    norms = tuple((1 + 0.2 * random(dim)).to(dtype) for dim in (32, 32, 16, 16, 16))
    lengths = torch.tensor([3, 2], dtype=torch.int32, device=DEVICE)
    rows = (1, branches.rows) if branches else (2, 6)
    for place in (step.place_projections, reference.place_projections):
        held = {}
        for kind in (FP8, dtype):
            caches = tuple(
                torch.zeros(*rows, *rest, device=DEVICE).to(kind if len(rest) == 2 else dtype)
                for rest in ((2, 32), (2, 32), (16,))
            )
            place(projected.to(dtype), tables, lengths, norms, caches, shape, branches)
            held[kind] = caches
        for name, narrow, wide in zip(("k", "v"), held[FP8], held[dtype], strict=False):
            same_bytes(narrow, reference.stored(wide, FP8), f"{name} by {place.__module__}")
        assert bool(held[FP8][1].float().isnan().any())
        assert_same(held[FP8][2], held[dtype][2], what="index k")


@torch.no_grad()
def test_prefill_and_steps_are_those_of_the_definitions() -> None:
    """Selecting from the ninth key on: a prompt through the kernels, then single tokens from static buffers."""
    model = fresh(num_hidden_layers=2 if CUDA else 1).to(DEVICE)
    logits: dict[str, list[Tensor]] = {}
    for backend in ("reference", "triton"):
        model.set_kernel_backend(backend)
        cache = KeyeCache(model.config, 16, device=DEVICE, kv_dtype=FP8)
        for buffer in (cache.k, cache.v):
            buffer.fill_(float("nan"))
        positions = torch.arange(12, device=DEVICE).expand(3, 1, 12)
        hidden = model.decode(model.embed(text(1, 12).to(DEVICE)), positions, cache)
        steps = [model.logits(hidden)[0]]
        decoder = StaticDecoder(model, cache) if backend == "triton" else EagerDecoder(model, cache)
        decoder.begin([12], [12])
        steps += [decoder.step(torch.tensor([token], device=DEVICE)).clone() for token in (5, 200, 1)]
        logits[backend] = steps
    for number, (actual, expected) in enumerate(zip(logits["triton"], logits["reference"], strict=True)):
        assert_close(actual, expected, what=f"logits after {number} steps")
