"""The official configuration on the meta device: exactly the published tensors, not one parameter more or less."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests.official import OFFICIAL_CONFIG, OFFICIAL_PARAMETERS, count_parameters, tensor_shapes
from tests.tiny import tiny_config


def meta_model(values: dict[str, Any]) -> KeyeVL2ForConditionalGeneration:
    with torch.device("meta"):
        return KeyeVL2ForConditionalGeneration(KeyeVL2Config.from_dict(deepcopy(values)))


def test_the_table_adds_up_to_the_published_number() -> None:
    assert count_parameters(tensor_shapes(OFFICIAL_CONFIG)) == OFFICIAL_PARAMETERS


def test_the_official_model_has_exactly_the_published_parameters() -> None:
    model = meta_model(OFFICIAL_CONFIG)
    assert sum(parameter.numel() for parameter in model.parameters()) == OFFICIAL_PARAMETERS
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == tensor_shapes(
        OFFICIAL_CONFIG
    )


def test_every_tensor_of_the_model_is_a_parameter() -> None:
    """Tables such as rotary angles are worked out, so loading on the meta device has nothing to restore."""
    assert list(meta_model(OFFICIAL_CONFIG).named_buffers()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": None},
        {"num_experts": 0},
        {"sa_config": None},
        {"num_experts": None, "sa_config": None},
    ],
)
def test_the_siblings_have_the_tensors_of_their_table(changes: dict[str, Any]) -> None:
    values = tiny_config(**changes)
    model = meta_model(values)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == tensor_shapes(values)


def test_both_spellings_of_the_rotary_base_are_read() -> None:
    old = KeyeVL2Config.from_dict(deepcopy(OFFICIAL_CONFIG))
    values = {
        key: value for key, value in OFFICIAL_CONFIG.items() if key not in ("rope_theta", "rope_scaling")
    }
    values["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000000,
        "mrope_section": [16, 24, 24],
    }
    new = KeyeVL2Config.from_dict(values)
    for config in (old, new):
        assert config.rope_theta == 1e7
        assert list(config.mrope_section) == [16, 24, 24]
    other = {**deepcopy(OFFICIAL_CONFIG), "rope_theta": 500000.0}
    assert KeyeVL2Config.from_dict(other).rope_theta == 500000.0


def test_the_official_values_arrive() -> None:
    config = KeyeVL2Config.from_dict(deepcopy(OFFICIAL_CONFIG))
    for key in (
        "num_experts_per_tok",
        "norm_topk_prob",
        "rms_norm_eps",
        "head_dim",
        "max_position_embeddings",
    ):
        assert getattr(config, key) == OFFICIAL_CONFIG[key], key
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(config, key) == OFFICIAL_CONFIG[key], key
    for key, value in OFFICIAL_CONFIG["vision_config"].items():
        assert getattr(config.vision_config, key) == value, key
    assert config.sa_config == OFFICIAL_CONFIG["sa_config"]
