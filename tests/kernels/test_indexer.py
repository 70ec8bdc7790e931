"""Indexer scores against the formula written out entry by entry."""

from __future__ import annotations

import pytest
import torch

from keyecli.kernels import reference
from tests import naive
from tests.compare import assert_close


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dim"), [(1, 1, 1, 4), (5, 9, 3, 8), (9, 9, 16, 4), (1, 33, 2, 64)]
)
def test_scores_equal_the_formula(queries: int, keys: int, heads: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    q = torch.randn(2, queries, heads, dim, generator=generator)
    w = torch.randn(2, queries, heads, generator=generator)
    k = torch.randn(2, keys, dim, generator=generator)
    scores = reference.index_scores(q, w, k)
    assert scores.dtype == torch.float32
    for b in range(2):
        assert_close(
            scores[b], naive.indexer_scores(q[b].double(), w[b].double(), k[b].double()), what=f"row {b}"
        )


def test_a_negative_gate_lowers_the_score_and_a_negative_product_does_not() -> None:
    q = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    k = torch.tensor([[[2.0, 0, 0, 0], [-2.0, 0, 0, 0]]])
    assert reference.index_scores(q, torch.tensor([[[-3.0]]]), k).tolist() == [[[-3.0, 0.0]]]
    assert reference.index_scores(q, torch.tensor([[[3.0]]]), k).tolist() == [[[3.0, 0.0]]]


def test_rotating_queries_and_keys_alike_leaves_the_scores() -> None:
    """Why the release's Hadamard rotation has no place in the bf16 and fp32 path."""
    generator = torch.Generator().manual_seed(0)
    q, w = torch.randn(1, 4, 2, 8, generator=generator), torch.randn(1, 4, 2, generator=generator)
    k = torch.randn(1, 6, 8, generator=generator)
    hadamard = torch.ones(1, 1)
    for _ in range(3):
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)), 0)
    hadamard = hadamard * 8**-0.5
    assert_close(reference.index_scores(q @ hadamard, w, k @ hadamard), reference.index_scores(q, w, k))


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    # 256 + 1 is not a bfloat16: a sum over heads in bfloat16 would lose the last head.
    q = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    w = torch.tensor([[[512.0, 2.0]]], dtype=torch.bfloat16)
    k = torch.tensor([[[1.0, 0, 0, 0]]], dtype=torch.bfloat16)
    assert reference.index_scores(q, w, k).tolist() == [[[257.0]]]
