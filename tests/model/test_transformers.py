"""Keye as an ordinary transformers model: Auto classes, from_pretrained, save_pretrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from keyecli.model.checkpoint import load_config, load_model
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests.compare import assert_same
from tests.model.test_checkpoint import assert_holds
from tests.model.test_trunk import text
from tests.tiny import random_tensors, tiny_config

Make = Callable[..., Path]


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 3])
def test_auto_model_loads_the_folder(make_checkpoint: Make, shards: int) -> None:
    folder = make_checkpoint(shards=shards)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    assert type(model) is KeyeVL2ForConditionalGeneration
    assert_holds(model, random_tensors(tiny_config()))
    ids = text(1, 30)
    assert_same(model(input_ids=ids).logits, load_model(folder)(input_ids=ids).logits)


def test_auto_config_reads_the_folder(tiny_checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    assert type(config) is KeyeVL2Config
    assert config.to_dict() == {
        **load_config(tiny_checkpoint).to_dict(),
        "_name_or_path": config._name_or_path,
    }


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": None}, {"sa_config": None}], ids=["moe", "dense-mlp", "no-indexer"]
)
def test_what_transformers_saves_we_load(
    make_checkpoint: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = tiny_config(**changes)
    tensors = random_tensors(config)
    model = load_model(make_checkpoint(config=config, tensors=tensors))
    model.save_pretrained(tmp_path / "saved")
    assert_holds(load_model(tmp_path / "saved"), tensors)


def test_a_tied_head_through_transformers(make_checkpoint: Make, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    del tensors["lm_head.weight"]
    folder = make_checkpoint(config=config, tensors=tensors)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert_same(again.lm_head.weight.detach(), tensors["model.embed_tokens.weight"])


def test_a_fresh_model_has_finite_weights_of_the_configured_scale() -> None:
    torch.manual_seed(0)
    model = KeyeVL2ForConditionalGeneration(KeyeVL2Config.from_dict(tiny_config()))
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        assert torch.isfinite(values).all(), name
        if "norm" in name:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert bool((values == expected).all()), name
        elif name.endswith("bias"):
            assert not values.any(), name
        else:
            assert 0.01 < float(values.std()) < 0.03, name
