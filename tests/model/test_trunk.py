"""The text trunk against transformers' Qwen3 with the same weights, and against the network written out in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from keyecli.kernels import reference
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests import naive
from tests.compare import assert_close
from tests.tiny import random_tensors, tiny_config

TOKENS = 45


def direct(config: dict[str, Any], tensors: dict[str, Tensor]) -> KeyeVL2ForConditionalGeneration:
    model = KeyeVL2ForConditionalGeneration(KeyeVL2Config.from_dict(config))
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def text(batch: int = 2, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    # Below 256 no token is a visual placeholder.
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def qwen(config: dict[str, Any], tensors: dict[str, Tensor]) -> torch.nn.Module:
    """transformers' model of the same trunk. Its experts are stored [expert, out, in]."""
    shared = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "max_position_embeddings": config["max_position_embeddings"],
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if config.get("num_experts"):
        keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shared, **{key: config[key] for key in keys}, mlp_only_layers=[])
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shared))
    state = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in tensors.items()
        if not name.startswith(("visual.", "mlp_AR.")) and "sa_indexer" not in name
    }
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("experts", [4, None], ids=["moe", "dense-mlp"])
@pytest.mark.parametrize(
    "top_k", [TOKENS, TOKENS + 20, None], ids=["topk=length", "topk>length", "no-indexer"]
)
@pytest.mark.parametrize("theta", [10000.0, 1e7])
def test_equals_qwen3_while_everything_is_selected(
    experts: int | None, top_k: int | None, theta: float
) -> None:
    sparse = None if top_k is None else {**tiny_config()["sa_config"], "topk": top_k}
    config = tiny_config(num_experts=experts, sa_config=sparse, rope_theta=theta)
    tensors = random_tensors(config)
    ids = text()
    ours = direct(config, tensors)(input_ids=ids).logits
    theirs = qwen(config, tensors)(input_ids=ids).logits
    assert_close(ours, theirs, relative=1e-4, absolute=0, what="logits")


@torch.no_grad()
def test_unnormalised_routing_equals_qwen3_moe() -> None:
    config = tiny_config(norm_topk_prob=False, sa_config=None)
    tensors = random_tensors(config)
    ours = direct(config, tensors)(input_ids=text()).logits
    assert_close(ours, qwen(config, tensors)(input_ids=text()).logits, relative=1e-4, absolute=0)


@torch.no_grad()
def test_a_small_selection_is_no_longer_qwen3() -> None:
    """Without this the equalities above would hold for a model that never selects."""
    config = tiny_config()
    tensors = random_tensors(config)
    ours, theirs = (
        direct(config, tensors)(input_ids=text()).logits,
        qwen(config, tensors)(input_ids=text()).logits,
    )
    top_k = config["sa_config"]["topk"]
    assert_close(ours[:, :top_k], theirs[:, :top_k], what="rows that see no more than topk keys")
    assert float((ours[:, top_k:] - theirs[:, top_k:]).abs().max()) > 0.1


def axes(tokens: int, seed: int = 3) -> Tensor:
    """Three different positions a token, [3, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.arange(tokens) + torch.randint(0, 9, (3, tokens), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": None}, {"sa_config": None}], ids=["moe", "dense-mlp", "no-indexer"]
)
@pytest.mark.parametrize("crossover", [0, 10**9], ids=["gather", "mask"])
def test_equals_the_network_written_out_in_loops(
    changes: dict[str, Any], crossover: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indexer, selection and sparse attention included: the definition of the specification, in float64."""
    monkeypatch.setattr(reference, "GATHER_CROSSOVER", crossover)
    config = tiny_config(**changes)
    tensors = random_tensors(config, seed=1)
    ids, positions = text(1, 27), axes(27)
    ours = direct(config, tensors)(input_ids=ids, position_ids=positions[:, None]).logits
    assert_close(ours[0], naive.decoder_logits(tensors, config, ids[0].tolist(), positions), what="logits")


@torch.no_grad()
def test_rows_of_a_batch_do_not_meet() -> None:
    config = tiny_config()
    model = direct(config, random_tensors(config))
    ids = text(3)
    together = model(input_ids=ids).logits
    for row in range(3):
        assert_close(together[row : row + 1], model(input_ids=ids[row : row + 1]).logits, what=f"row {row}")


@torch.no_grad()
def test_the_query_chunk_changes_nothing() -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    whole = direct({**config, "sa_config": {**config["sa_config"], "q_chunk_size": 512}}, tensors)(
        input_ids=text()
    ).logits
    for chunk in (1, 7, 16, TOKENS):
        sparse = {**config["sa_config"], "q_chunk_size": chunk}
        assert_close(
            direct({**config, "sa_config": sparse}, tensors)(input_ids=text()).logits,
            whole,
            what=f"chunk {chunk}",
        )


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it() -> None:
    config = tiny_config()
    model = direct(config, random_tensors(config))
    ids = text(1)
    padded = torch.cat((ids, torch.zeros(1, 6, dtype=torch.long)), dim=1)
    mask = torch.ones_like(padded)
    mask[:, TOKENS:] = 0
    assert_close(model(input_ids=padded, attention_mask=mask).logits[:, :TOKENS], model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="right"):
        model(input_ids=padded, attention_mask=mask.flip(1))
