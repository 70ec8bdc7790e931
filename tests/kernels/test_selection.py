"""Which keys a query sees and selects: against brute force, with ties, infinities and short rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keyecli.kernels import reference
from tests import naive
from tests.compare import assert_same


def brute_force(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """Row by row with Python's sort."""
    visible = visible.expand_as(scores)
    selected = torch.zeros_like(visible)
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            for s in naive.select(scores[b, t].tolist(), visible[b, t].tolist(), top_k):
                selected[b, t, s] = True
    return selected


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (7, 40), (40, 40), (33, 65)])
@pytest.mark.parametrize("top_k", [1, 3, 8, 39, 64])
def test_equals_brute_force_on_distinct_scores(queries: int, keys: int, top_k: int) -> None:
    scores = torch.randn(2, queries, keys, generator=torch.Generator().manual_seed(keys))
    visible = causal(queries, keys)
    selected = reference.select_top_k(scores, visible, top_k)
    assert_same(selected, brute_force(scores, visible, top_k))
    assert_same(selected.sum(-1), visible.sum(-1).clamp(max=top_k).expand(2, -1), what="keys a row")


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("-inf"), 1e-30]), min_size=12, max_size=12
        ),
        min_size=1,
        max_size=5,
    ),
    hidden=st.lists(st.booleans(), min_size=12, max_size=12),
    top_k=st.integers(1, 13),
)
def test_ties_go_to_the_lower_index(rows: list[list[float]], hidden: list[bool], top_k: int) -> None:
    scores = torch.tensor([rows])
    visible = ~torch.tensor(hidden)
    assert_same(
        reference.select_top_k(scores, visible, top_k),
        brute_force(scores, visible, top_k),
        what=f"top {top_k} of {rows}",
    )


def test_equal_scores_select_the_first_keys() -> None:
    selected = reference.select_top_k(torch.zeros(1, 30, 30), causal(30, 30), 4)
    for t in range(30):
        assert selected[0, t].nonzero().flatten().tolist() == list(range(min(4, t + 1)))


def test_minus_infinity_is_a_score_like_any_other_while_the_key_is_visible() -> None:
    scores = torch.full((1, 1, 6), float("-inf"))
    scores[0, 0, 4] = 1.0
    visible = torch.tensor([[[False, True, True, True, True, False]]])
    assert reference.select_top_k(scores, visible, 3)[0, 0].nonzero().flatten().tolist() == [1, 2, 4]


def test_invisible_keys_are_never_selected_however_high() -> None:
    scores = torch.tensor([[[9.0, 9.0, 1.0, 0.0, 9.0]]])
    visible = torch.tensor([[[False, False, True, True, False]]])
    for top_k in (1, 2, 3, 4):
        chosen = reference.select_top_k(scores, visible, top_k)[0, 0].nonzero().flatten().tolist()
        assert chosen == [2, 3][:top_k]


def test_rows_with_fewer_keys_than_asked_for_select_them_all() -> None:
    scores = torch.randn(1, 20, 20, generator=torch.Generator().manual_seed(0))
    selected = reference.select_top_k(scores, causal(20, 20), 12)
    assert_same(selected[0, :12], causal(20, 20)[0, :12])
    assert selected[0, 12:].sum(-1).tolist() == [12] * 8


def test_selection_does_not_depend_on_how_queries_are_cut() -> None:
    # Few distinct values, so that almost every threshold is tied.
    scores = torch.randint(0, 4, (1, 50, 50), generator=torch.Generator().manual_seed(1)).float()
    whole = reference.select_top_k(scores, causal(50, 50), 9)
    for begin in range(0, 50, 7):
        end = min(begin + 7, 50)
        part = reference.select_top_k(scores[:, begin:end, :end], causal(end - begin, end), 9)
        assert_same(part, whole[:, begin:end, :end], what=f"rows {begin}..{end - 1}")


def test_indices_are_ascending_and_padded_with_minus_one() -> None:
    selected = torch.tensor([[[True, False, True, True], [False, False, False, True], [False] * 4]])
    indices = reference.selected_indices(selected, 3)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [[[0, 2, 3], [3, -1, -1], [-1, -1, -1]]]
    assert reference.selected_indices(selected, 9).shape == (1, 3, 4)


def test_visible_keys_without_segments_is_causal() -> None:
    assert_same(reference.visible_keys(3, 5, torch.device("cpu")), causal(3, 5))
    assert_same(reference.visible_keys(2, 5, torch.device("cpu"), first_query=1), causal(5, 5)[:, 1:3])


def test_segments_rule() -> None:
    """Own segment or the shared 0, never padding, always oneself, never the future."""
    segments = torch.tensor([[0, 0, -1, 1, 1, 2, 2, -1], [1, 1, 1, 2, 3, 3, 3, 3]])
    visible = reference.visible_keys(8, 8, torch.device("cpu"), segments)
    for b, row in enumerate(segments.tolist()):
        for t in range(8):
            for s in range(8):
                expected = s == t or (s < t and row[s] != -1 and row[s] in (row[t], 0))
                assert bool(visible[b, t, s]) == expected, (b, t, s)
    part = reference.visible_keys(3, 7, torch.device("cpu"), segments, first_query=4)
    assert_same(part, visible[:, 4:7, :7])
