"""The Triton decode attention against its definition: on a GPU, or at toy size under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keyecli.kernels import decode as kernels
from keyecli.kernels import reference
from keyecli.kernels.reference import Branches
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, poisoned

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
COSINE = {torch.float32: 1e-9, torch.float16: 1e-5, torch.bfloat16: 1e-4}
# Batch, new tokens, keys, heads, groups, dim, list length: one part and several, ratios 1, 2, 4 and 8, one key.
SHAPES = [
    (1, 1, 1, 2, 2, 16, 1),
    (1, 1, 200, 8, 1, 64, 150),
    (3, 2, 70, 4, 2, 16, 33),
    (2, 1, 9, 4, 1, 32, 16),
]
if CUDA:
    SHAPES += [
        (1, 1, 131_072, 32, 4, 128, 2048),
        (16, 3, 3000, 32, 4, 128, 2048),
        (100, 1, 500, 8, 4, 64, 256),
    ]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, strided k and v of a cache that is NaN where nobody selects, and lists of random lengths, the last one empty where
    there is more than one."""
    batch, tokens, keys, heads, groups, dim, length = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    options = {"generator": generator, "device": DEVICE}
    q = torch.randn(batch, tokens, heads, dim, **options).to(dtype)
    chosen = torch.rand(batch, tokens, keys, **options).topk(min(length, keys), dim=-1).indices
    counts = torch.randint(1, length + 1, (batch, tokens, 1), **options)
    counts[0, 0] = length
    if batch * tokens > 1:
        counts[-1, -1] = 0
    chosen = torch.where(torch.arange(chosen.shape[-1], device=DEVICE) < counts, chosen, keys).sort(-1).values
    selected = torch.zeros(batch, keys + 1, device=DEVICE).scatter_(1, chosen.flatten(1), 1.0)[:, :keys] > 0
    padding = torch.full((batch, tokens, length - chosen.shape[-1]), keys, device=DEVICE)
    indices = torch.cat((chosen, padding), dim=-1)
    indices = indices.masked_fill(indices == keys, -1).to(torch.int32)
    cache = torch.randn(batch, 2, keys + 3, groups, dim, **options).to(dtype)
    cache[:, :, keys:] = torch.nan
    cache[:, :, :keys].masked_fill_(~selected[:, None, :, None, None], torch.nan)
    return q, cache[:, 0, :keys], cache[:, 1, :keys], indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v, indices = problem(shape, dtype)
    with poisoned():
        actual = kernels.decode_attention(q, k, v, indices)
    expected, _ = reference.attend_indices(q.double(), k.double(), v.double(), indices)
    assert actual.dtype == dtype
    assert_close(actual, expected, relative=TOLERANCE[dtype], cosine=COSINE[dtype], what="output")
    if shape[0] * shape[1] > 1:
        assert bool((actual[-1, -1] == 0).all())


def test_memory_of_the_caller_gives_the_same_bits() -> None:
    q, k, v, indices = problem((1, 2, 70, 4, 2, 16, 33), torch.float32)
    out = torch.full(q.shape, torch.nan, device=DEVICE)
    workspace = kernels.decode_workspace(q, k, indices).fill_(torch.nan)
    returned = kernels.decode_attention(q, k, v, indices, out=out, workspace=workspace)
    assert returned is out
    assert_same(out, kernels.decode_attention(q, k, v, indices))
    with pytest.raises(ValueError, match="workspace"):
        kernels.decode_attention(q, k, v, indices, workspace=workspace[:-1])
    with pytest.raises(ValueError, match="out"):
        kernels.decode_attention(q, k, v, indices, out=out.transpose(1, 2))


@pytest.mark.parametrize(
    ("groups", "length"), [(4, 2048), (1, 1), (1, 100_000), (2, 1000), (64, 2048), (4, 65)]
)
def test_parts_cover_the_list_and_fit_the_combining_kernel(groups: int, length: int) -> None:
    parts, entries = kernels.parts_of(groups, length, 64)
    assert entries % 64 == 0
    assert (parts - 1) * entries < length <= parts * entries
    assert parts <= kernels.MOST_PARTS
    assert parts == 1 or parts * groups <= kernels.PROGRAMS


def test_branches_are_attended_to_where_their_rows_stand() -> None:
    branches = Branches(shared=40, room=9, count=3)
    q, _, _, indices = problem((3, 1, branches.length, 4, 2, 16, 33), torch.float32)
    k, v = torch.randn(2, 1, branches.rows + 2, 2, 16, device=DEVICE)
    actual = kernels.decode_attention(q, k, v, indices, branches=branches)
    expected = kernels.decode_attention(q, branches.unfolded(k), branches.unfolded(v), indices)
    assert_same(actual, expected)
    rows = [list(range(40)) + list(range(40 + 9 * b, 49 + 9 * b)) for b in range(3)]
    assert_same(branches.unfolded(k), torch.stack([k[0, row] for row in rows]))


if CUDA:

    def test_a_captured_step_follows_its_buffers() -> None:
        shape = (2, 1, 4096, 32, 4, 128, 2048)
        q, k, v, indices = problem(shape, torch.bfloat16)
        out, workspace = torch.empty_like(q), kernels.decode_workspace(q, k, indices)
        kernels.decode_attention(q, k, v, indices, out, workspace)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels.decode_attention(q, k, v, indices, out, workspace)
        for seed in (1, 2):
            for buffer, fresh in zip((q, k, v, indices), problem(shape, torch.bfloat16, seed), strict=True):
                buffer.copy_(fresh)
            out.fill_(torch.nan)
            graph.replay()
            expected, _ = reference.attend_indices(q.double(), k.double(), v.double(), indices)
            assert_close(out, expected, relative=3e-2, cosine=1e-4)
