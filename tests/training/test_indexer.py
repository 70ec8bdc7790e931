"""New indexers: every number where the method says, the same for a seed, and nothing else touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keyecli.errors import UsageError
from keyecli.model.checkpoint import load_model
from keyecli.training.indexer import GATE_STD, reinitialise_indexer


def test_only_indexers_change_and_a_seed_gives_one_start(tiny_checkpoint: Path) -> None:
    before, model, again, other = (load_model(tiny_checkpoint) for _ in range(4))
    reinitialise_indexer(model, seed=3)
    reinitialise_indexer(again, seed=3)
    reinitialise_indexer(other, seed=4)
    for name, weight in model.state_dict().items():
        was = before.state_dict()[name]
        assert torch.equal(weight, again.state_dict()[name])
        if ".sa_indexer." not in name:
            assert torch.equal(weight, was), name
        elif name.endswith("proj.weight"):
            assert not (weight == was).any(), name
            assert not (weight == other.state_dict()[name]).any(), name
        else:
            assert (weight == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_rows_have_their_spread(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    range_ = model.config.initializer_range
    queries, keys, gates = [], [], []
    for seed in range(40):
        for layer in model.model.layers:
            layer.input_layernorm.weight.data.fill_(0.25).view(-1)[::2].neg_()
        reinitialise_indexer(model, seed)
        for layer in model.model.layers:
            indexer = layer.self_attn.sa_indexer
            rows = indexer.heads * indexer.dim
            queries.append(indexer.q_proj.weight[:rows].flatten().clone())
            gates.append(indexer.q_proj.weight[rows:].flatten().clone())
            keys.append(indexer.k_proj.weight.flatten().clone())
    for drawn, std in ((queries, range_), (keys, range_), (gates, GATE_STD / 0.25)):
        values = torch.cat(drawn)
        assert float(values.std()) == pytest.approx(std, rel=4 / len(values) ** 0.5)
        assert abs(float(values.mean())) < 5 * std / len(values) ** 0.5


def test_a_model_without_indexers_is_refused(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    model.config.sa_config = None
    with pytest.raises(UsageError, match="has no indexers"):
        reinitialise_indexer(model, 0)
