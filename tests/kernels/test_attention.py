"""Attention over selected keys: both code paths against each other, dense attention and plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keyecli.kernels import reference
from tests import naive
from tests.compare import assert_close

TOP_K = 6


def problem(
    ratio: int, queries: int = 13, keys: int = 29, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [2, T, 2·ratio, 8], k and v [2, S, 2, 8] and a causal selection with short rows at its beginning."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, queries, 2 * ratio, 8, generator=generator)
    k, v = torch.randn(2, keys, 2, 8, generator=generator), torch.randn(2, keys, 2, 8, generator=generator)
    scores = torch.randn(2, queries, keys, generator=generator)
    selected = reference.select_top_k(scores, reference.visible_keys(queries, keys, q.device), TOP_K)
    return q, k, v, selected


def loops(q: Tensor, k: Tensor, v: Tensor, selected: Tensor) -> Tensor:
    rows = []
    for b in range(len(q)):
        chosen = [set(row.nonzero().flatten().tolist()) for row in selected[b]]
        rows.append(naive.attention(q[b].double(), k[b].double(), v[b].double(), chosen))
    return torch.stack(rows)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("queries", [1, 13, 29])
def test_every_path_is_softmax_over_the_selected_keys_only(ratio: int, queries: int) -> None:
    q, k, v, selected = problem(ratio, queries)
    expected = loops(q, k, v, selected)
    assert_close(reference.masked_attention(q, k, v, selected), expected, what="mask")
    indices = reference.selected_indices(selected, TOP_K)
    assert_close(reference.gathered_attention(q, k, v, indices), expected, what="gather")
    assert_close(reference.sparse_attention(q, k, v, selected, TOP_K), expected, what="sparse")


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_the_crossover_changes_nothing(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, selected = problem(ratio)
    results = {}
    for crossover in (0, 10**9):
        monkeypatch.setattr(reference, "GATHER_CROSSOVER", crossover)
        results[crossover] = reference.sparse_attention(q, k, v, selected, TOP_K)
    assert_close(results[0], results[10**9], relative=1e-5, what="gather against mask")


def test_the_gather_workspace_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, selected = problem(2)
    indices = reference.selected_indices(selected, TOP_K)
    whole = reference.gathered_attention(q, k, v, indices)
    # Three queries of both rows of the batch: the last block is a short one.
    monkeypatch.setattr(reference, "GATHER_WORKSPACE_BYTES", 3 * 2 * TOP_K * 2 * 8 * 4 * 2)
    assert_close(reference.gathered_attention(q, k, v, indices), whole, relative=1e-6)


def test_order_of_indices_and_padding_do_not_matter() -> None:
    q, k, v, selected = problem(2)
    indices = reference.selected_indices(selected, TOP_K)
    shuffled = indices[..., torch.randperm(TOP_K, generator=torch.Generator().manual_seed(3))]
    assert (shuffled != indices).any()
    padded = torch.cat((torch.full_like(indices, -1), shuffled), dim=-1)
    assert_close(
        reference.gathered_attention(q, k, v, padded),
        reference.gathered_attention(q, k, v, indices),
        relative=1e-5,
    )


def test_unselected_keys_do_not_reach_the_gathered_result() -> None:
    q, k, v, selected = problem(2, queries=1)
    indices = reference.selected_indices(selected, TOP_K)
    clean = reference.gathered_attention(q, k, v, indices)
    unused = ~selected[:, 0]
    k[unused], v[unused] = float("nan"), float("nan")
    assert_close(reference.gathered_attention(q, k, v, indices), clean)


def test_selecting_everything_is_dense_attention() -> None:
    q, k, v, _ = problem(4, queries=29)
    visible = reference.visible_keys(29, 29, q.device).expand(2, -1, -1)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    indices = reference.selected_indices(visible, 29)
    assert_close(reference.masked_attention(q, k, v, visible), dense, what="mask")
    assert_close(reference.gathered_attention(q, k, v, indices), dense, what="gather")


def test_both_paths_give_the_same_gradients() -> None:
    q, k, v, selected = problem(2)
    indices = reference.selected_indices(selected, TOP_K)
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(9))
    gradients = []
    for path, choice in ((reference.masked_attention, selected), (reference.gathered_attention, indices)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        (path(*leaves, choice) * direction).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for name, masked, gathered in zip("qkv", *gradients, strict=True):
        assert_close(gathered, masked, what=f"gradient of {name}")


def test_probabilities_are_those_of_the_attention() -> None:
    q, k, v, selected = problem(4)
    probabilities = reference.attention_probabilities(q, k, selected)
    assert probabilities.shape == (2, 8, 13, 29)
    assert_close(probabilities.sum(-1), torch.ones(2, 8, 13))
    assert not probabilities[(~selected)[:, None].expand_as(probabilities)].any()
    values = v.repeat_interleave(4, dim=2)
    assert_close(
        torch.einsum("bhts,bshd->bthd", probabilities, values), reference.masked_attention(q, k, v, selected)
    )


def test_divergence_is_the_sum_over_groups_up_to_a_constant() -> None:
    """Σ_g KL(p_g ‖ softmax(I)) by its definition: the same gradient, and the same difference between two students."""
    q, k, _, selected = problem(2)
    probabilities = reference.attention_probabilities(q, k, selected)
    generator = torch.Generator().manual_seed(5)

    def by_definition(scores: Tensor) -> Tensor:
        total = torch.zeros(2, 13, dtype=torch.float64)
        for b in range(2):
            for t in range(13):
                keys = selected[b, t]
                student = scores[b, t][keys].double().log_softmax(-1)
                for group in range(2):
                    teacher = probabilities[b, 2 * group : 2 * group + 2, t][:, keys].double().mean(0)
                    total[b, t] = total[b, t] + (teacher * (teacher.log() - student)).sum()
        return total

    first, second = (torch.randn(2, 13, 29, generator=generator).requires_grad_() for _ in range(2))
    ours = [
        reference.indexer_divergence(probabilities.mean(1), scores, selected, 2) for scores in (first, second)
    ]
    theirs = [by_definition(scores) for scores in (first, second)]
    assert_close(ours[0] - ours[1], theirs[0] - theirs[1], what="difference of two students")
    gradients = [torch.autograd.grad(loss.sum(), first)[0] for loss in (ours[0], theirs[0])]
    assert_close(gradients[0], gradients[1], what="gradient")
    assert torch.isfinite(gradients[0]).all()


def test_divergence_of_the_teacher_itself_is_zero() -> None:
    q, k, _, selected = problem(2)
    probabilities = reference.attention_probabilities(q, k, selected)
    student = probabilities.mean(1).clamp(min=1e-38).log()
    divergence = reference.indexer_divergence(probabilities.mean(1), student, selected, 2)
    assert_close(divergence, torch.zeros(2, 13))
