"""The Triton frame attention against its definition: on a GPU, or at toy size under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keyecli.kernels import reference
from keyecli.kernels import vision as kernels
from keyecli.model.rope import grid_tables, rotate_half_split
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, HALF, poisoned

# How far results may be from exact ones, relative to the largest: 16-bit probabilities, then 16-bit outputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Tables = tuple[Tensor, Tensor] | tuple[None, None]


def problem(
    frames: int, patches: int, heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v [N, P, heads, d]."""
    generator = torch.Generator(device=DEVICE).manual_seed(frames * patches + dim)
    q, k, v = torch.randn(3, frames, patches, heads, dim, generator=generator, device=DEVICE).to(dtype)
    return q, k, v


def tables_of(rows: int, columns: int, dim: int) -> tuple[Tensor, Tensor]:
    return grid_tables(rows, columns, dim, 10000.0, torch.device(DEVICE))


def exact(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Softmax attention in float64, a frame's scores written out."""
    q, k, v = q.double(), k.double(), v.double()
    if cos is not None and sin is not None:
        q, k = (
            rotate_half_split(q, cos.double(), sin.double()),
            rotate_half_split(k, cos.double(), sin.double()),
        )
    weights = (torch.einsum("nphd,nshd->nhps", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("nhps,nshd->nphd", weights, v)


def check(q: Tensor, k: Tensor, v: Tensor, tables: Tables = (None, None), limit: float | None = None) -> None:
    """Output and gradients against float64, with every buffer full of NaN before."""
    limit = limit or TOLERANCE[q.dtype]
    generator = torch.Generator(device=DEVICE).manual_seed(2)
    gradient = torch.randn(q.shape, generator=generator, device=DEVICE).to(q.dtype)
    results = []
    for function in (exact, kernels.frame_attention):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        with poisoned():
            out = function(*leaves, *tables)
            out.backward(gradient.to(out.dtype))
        results.append((out, *(leaf.grad for leaf in leaves)))
    assert results[1][0].dtype == q.dtype
    for name, expected, actual in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        # One key leaves q and k without influence: their gradients are rounding only, and so is their direction.
        cosine = 2.0 if q.shape[1] == 1 and name in ("dq", "dk") else limit**2
        assert_close(actual, expected, relative=limit, absolute=1e-5, cosine=cosine, what=name)
    with poisoned():
        assert_same(kernels.frame_attention(q, k, v, *tables), results[1][0], what="without gradients")


@pytest.mark.parametrize(
    ("dim", "blocks"), [(72, (64, 16)), (48, (32, 16)), (64, (64, 0)), (8, (16, 0)), (80, (64, 16))]
)
def test_a_head_is_two_blocks(dim: int, blocks: tuple[int, int]) -> None:
    assert kernels.head_blocks(dim) == blocks


def test_the_blocks_of_any_head_cover_it() -> None:
    for dim in range(1, kernels.MAX_HEAD_DIM + 1):
        main, rest = kernels.head_blocks(dim)
        assert main + rest >= dim
        assert main % 16 == 0
        assert rest % 16 == 0
        assert rest == 0 or main < dim


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patches", [1, 16, 18])
def test_equals_the_definition(patches: int, dtype: torch.dtype) -> None:
    check(*problem(1, patches, 2, 72, dtype))


@pytest.mark.parametrize("dim", [4, 36, 48, 64, 128])
def test_head_sizes(dim: int) -> None:
    check(*problem(2, 6, 1, dim), tables_of(2, 3, dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(dtype: torch.dtype) -> None:
    check(*problem(1, 12, 3, 72, dtype), tables_of(6, 2, 72))


def test_equals_the_definition_of_the_package() -> None:
    q, k, v = problem(2, 12, 2, 72)
    for tables in ((None, None), tables_of(3, 4, 72)):
        expected = reference.frame_attention(q, k, v, *tables)
        assert_close(kernels.frame_attention(q, k, v, *tables), expected, relative=1e-5)


def test_parts_of_one_projection_are_read_where_they_are() -> None:
    wide = torch.randn(2, 6, 3 * 2 * 72, device=DEVICE)
    parts = [part.view(2, 6, 2, 72) for part in wide.chunk(3, dim=-1)]
    for tables in ((None, None), tables_of(2, 3, 72)):
        expected = kernels.frame_attention(*(part.contiguous() for part in parts), *tables)
        assert_same(kernels.frame_attention(*parts, *tables), expected)
    assert kernels.packed(parts[1]).data_ptr() == parts[1].data_ptr()


def test_any_strides() -> None:
    q, k, v = problem(2, 6, 2, 40)
    expected = kernels.frame_attention(q, k, v)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_same(kernels.frame_attention(*heads_first), expected)
    columns_first = [x.mT.contiguous().mT for x in (q, k, v)]
    assert_same(kernels.frame_attention(*columns_first), expected)
    leaf = q.clone().requires_grad_()
    kernels.frame_attention(leaf, k, v).sum().backward()
    other = q.clone().requires_grad_()
    kernels.frame_attention(other, k, v).backward(torch.ones_like(q))
    assert_same(leaf.grad, other.grad, what="an expanded gradient")


def test_frames_and_heads_do_not_see_each_other() -> None:
    q, k, v = problem(3, 18, 2, 72)
    clean = kernels.frame_attention(q, k, v, *tables_of(3, 6, 72))
    for x in (q, k, v):
        x[1] = float("nan")
        x[2, :, 1] = float("inf")
    out = kernels.frame_attention(q, k, v, *tables_of(3, 6, 72))
    assert_same(out[0], clean[0])
    assert_same(out[2, :, 0], clean[2, :, 0])
    assert bool(out[1].isnan().all())


def test_sharp_and_flat_softmax() -> None:
    q, k, v = problem(1, 18, 1, 72)
    # Logits of hundreds: an fp32 product of two of them is off by 1e-5, and so is the exponent.
    check(q * 60, k, v, limit=1e-3)
    mean = kernels.frame_attention(q, torch.ones_like(k), v)
    assert_close(mean, v.mean(1, keepdim=True).expand_as(v), relative=1e-6)


def test_very_negative_logits_of_every_key() -> None:
    """Masked keys count 0 of the logits, far above the real ones here: they must not be seen."""
    q, k, v = problem(1, 18, 1, 72)
    ones = torch.ones_like(q)
    check(ones * -3 + q / 10, ones * 3 + k / 10, v, limit=1e-4)


def test_repeats_to_the_bit() -> None:
    q, k, v = problem(2, 300, 2, 72, HALF[0]) if CUDA else problem(1, 17, 1, 72, HALF[0])
    results = []
    for _ in range(20 if CUDA else 2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = kernels.frame_attention(*leaves)
        out.backward(v)
        results.append((out, *(leaf.grad for leaf in leaves)))
    for again in results[1:]:
        for actual, expected in zip(again, results[0], strict=True):
            assert_same(actual, expected)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = problem(1, 4, 1, 72)
    with pytest.raises(ValueError, match="one shape"):
        kernels.frame_attention(q, k[:, :2], v)
    with pytest.raises(ValueError, match="one type"):
        kernels.frame_attention(q, k.half(), v)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.frame_attention(q, k, v, *tables_of(2, 3, 72))
    with pytest.raises(ValueError, match="wider"):
        kernels.frame_attention(*problem(1, 2, 1, 130))
    assert kernels.frame_attention(q[:0], k[:0], v[:0]).shape == (0, 4, 1, 72)


if CUDA:
    # Sizes that the interpreter cannot reach.

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("rows", "columns"), [(16, 16), (26, 46), (32, 32), (2, 1000)])
    def test_frames_of_real_size(rows: int, columns: int, dtype: torch.dtype) -> None:
        check(*problem(3, rows * columns, 16, 72, dtype), tables_of(rows, columns, 72))

    @pytest.mark.parametrize("dim", [8, 32, 48, 64, 96, 112, 128])
    def test_every_head_size_at_real_length(dim: int) -> None:
        check(*problem(2, 300, 3, dim, torch.bfloat16), tables_of(20, 15, dim))
