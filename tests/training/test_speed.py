"""Operations counted by torch while a toy model trains, and a rate that is a rate."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.training.network import freeze, trained
from keyecli.training.speed import REACHED_SHARE, device_rate, estimate_seconds, sequence_flops
from tests.tiny import TINY_CONFIG


def counted(config: KeyeVL2Config, train: str, tokens: int) -> int:
    """Of matrix products and attention of one step, with every layer recomputed."""
    torch.manual_seed(0)
    model = KeyeVL2ForConditionalGeneration(config).train()
    freeze(model, trained(train))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(10, 200, (1, tokens))
    embeds = model.embed(ids).detach().requires_grad_()
    # The counter does not know the CPU's own attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model.decode(embeds, torch.arange(tokens).expand(3, 1, tokens))
        model.logits(hidden).square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("train", ["full", "projector"])
def test_operations_are_those_that_torch_counts(train: str) -> None:
    tokens = 64
    # Without experts and selection: of those the definition computes more than the kernels do.
    config = KeyeVL2Config(**(TINY_CONFIG | {"num_experts": None, "sa_config": None}))
    expected = sequence_flops(config, (train,), tokens)
    # Nothing after a layer's last input is recomputed, nor is the head here.
    expected -= 2 * tokens * config.hidden_size * config.vocab_size
    expected -= config.num_hidden_layers * 2 * tokens * config.hidden_size * config.intermediate_size
    # This attention computes all pairs, and has the scores still when it goes back.
    product = 2 * config.num_attention_heads * config.head_dim
    expected += config.num_hidden_layers * product * (8 * tokens**2 - 9 * tokens * (tokens + 1) / 2)
    assert counted(config, train, tokens) == expected


def test_the_parts_add_up() -> None:
    config = KeyeVL2Config(**TINY_CONFIG)
    whole = sequence_flops(config, ("full",), 1000)
    head = 2 * 4 * config.vocab_size * config.hidden_size
    assert whole - sequence_flops(config, ("full",), 1000, learnt_tokens=400) == 600 * head
    assert sequence_flops(config, ("lora",), 1000) < whole
    assert sequence_flops(config, ("sparse",), 1000) > whole
    frames = sequence_flops(config, ("lora",), 1000, patches=4000) - sequence_flops(config, ("lora",), 1000)
    learnt = sequence_flops(config, ("lora", "vision"), 1000, patches=4000)
    assert learnt - sequence_flops(config, ("lora",), 1000) == 4 * frames
    # Selected keys grow with the length, all pairs with its square.
    dense = KeyeVL2Config(**(TINY_CONFIG | {"sa_config": None}))
    assert sequence_flops(dense, ("lora",), 4000) > 4.5 * sequence_flops(dense, ("lora",), 1000)
    assert estimate_seconds(config, ("full",), 1000, 1e9) == pytest.approx(whole / 1e9 / REACHED_SHARE)


def test_a_rate_is_that_of_a_product() -> None:
    # No machine that runs this does fewer or more.
    assert 1e7 < device_rate("cpu", "fp32") < 1e15
