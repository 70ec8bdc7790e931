"""Packs: which rows share one, and that they do not see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keyecli.engine.loaded import LoadedModel, load_weights, open_model
from keyecli.engine.stream import visual_of
from keyecli.tasks.options import ask_settings
from keyecli.training.examples import Example, lay_out_row, plan_row
from keyecli.training.network import Network, freeze, loss_of, row_losses, trained
from keyecli.training.packing import best_fit_decreasing, pack, pack_tokens, share_out
from keyecli.training.sight import see, together
from tests.compare import assert_close
from tests.training.rows import text_row, video_row

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def test_packs_are_short_where_what_is_masked_costs_as_much() -> None:
    assert pack_tokens([100, 2000, 300], 32768, "triton") == 32768
    assert pack_tokens([100, 2000, 300], 32768, "reference") == 2000
    assert pack_tokens([100, 300], 32768, "reference") == 512
    assert pack_tokens([100, 300], 400, "reference") == 400


def test_the_longest_first_each_where_least_is_left() -> None:
    assert best_fit_decreasing([3, 7, 5, 2, 4], 10) == [[1, 0], [2, 4], [3]]
    assert best_fit_decreasing([5, 5, 5], 10) == [[0, 1], [2]]
    assert best_fit_decreasing([], 10) == []
    with pytest.raises(ValueError, match="11 tokens"):
        best_fit_decreasing([11], 10)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(50, 120))
def test_every_row_is_in_one_pack_that_has_room(lengths: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(place for places in bins for place in places) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in places) <= capacity for places in bins)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_no_rank_has_more_than_the_mean_and_one_row(costs: list[int], ranks: int) -> None:
    shares = share_out(costs, ranks)
    assert sorted(place for share in shares for place in share) == list(range(len(costs)))
    loads = [sum(costs[place] for place in share) for share in shares]
    assert max(loads) <= sum(costs) / ranks + max(costs)


def test_many_rows_are_shared_out_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.randint(200, 2000, (64,), generator=generator).tolist()
    loads = [sum(costs[place] for place in share) for share in share_out(costs, 4)]
    assert max(loads) / (sum(loads) / 4) - 1 <= 0.05


@pytest.fixture
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_weights(open_model(tiny_checkpoint, device="cpu"))


def looked_at(loaded: LoadedModel) -> list[tuple[Example, Any]]:
    settings = ask_settings(loaded.preprocessor).sampling
    found = []
    for row in (video_row(0), text_row(1), video_row(2, fps=0.5), text_row(3)):
        plans = plan_row(row, settings)
        seen = see(loaded, plans, learning=False)
        assert seen.visuals == tuple(visual_of(plan) for plan in plans)
        found.append((lay_out_row(loaded.tokenizer, loaded.config, row, seen.visuals), seen.sight))
    return found


def computed(
    network: Network, parts: list[tuple[Example, Any]], supervised: int, tokens: int
) -> tuple[Tensor, list[float]]:
    batch = pack([example for example, _ in parts])
    sums = network(batch, together([sight for _, sight in parts]))
    loss = loss_of(sums, supervised, tokens, 1)
    loss.backward()
    return loss.detach(), row_losses(sums, len(parts)).tolist()


@pytest.mark.parametrize("what", ["full", "sparse", "indexer", "lora"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_pack_is_its_rows(what: str, recompute: bool, loaded: LoadedModel) -> None:
    from keyecli.model.lora import LoraSettings, add_lora

    freeze(loaded.model, trained(what))
    if what == "lora":
        torch.manual_seed(0)
        add_lora(loaded.model, LoraSettings(rank=4))
    network = Network(loaded.model, trained(what)).train()
    loaded.model.visual.eval()
    if recompute:
        network.checkpoint_activations()
    parts = looked_at(loaded)
    supervised = sum(example.learnt_tokens for example, _ in parts)
    tokens = sum(example.tokens for example, _ in parts)
    alone = [computed(network, [part], supervised, tokens) for part in parts]
    expected = {
        name: parameter.grad.clone()
        for name, parameter in network.learning().items()
        if parameter.grad is not None
    }
    assert expected
    network.zero_grad(set_to_none=True)
    loss, rows = computed(network, parts, supervised, tokens)
    assert_close(loss, torch.stack([one for one, _ in alone]).sum(), relative=1e-5)
    assert rows == pytest.approx([one[0] for _, one in alone], rel=1e-4)
    for name, gradient in expected.items():
        found = network.learning()[name].grad
        assert found is not None, name
        assert_close(found, gradient, relative=2e-4, what=name)
