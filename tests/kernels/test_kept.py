"""What attention found is kept between a layer's two passes, and the gradients are those without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from keyecli.kernels import attention as kernels
from keyecli.kernels import dispatch
from keyecli.kernels.kept import Keeper
from keyecli.model.attention import AttentionContext, SparseAttention
from keyecli.model.config import KeyeVL2Config
from tests.compare import assert_same
from tests.kernels.on_device import DEVICE

PLENTY = 2**30
TOKENS, SELECTED = 12, 8


@pytest.fixture(autouse=True)
def in_order() -> Iterator[None]:
    """Bits are compared."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Selections and forward passes of attention."""
    calls: list[str] = []
    select, attend = dispatch.select_keys, kernels._attend

    def selecting(*arguments: Any, **named: Any) -> Tensor:
        calls.append("select")
        return select(*arguments, **named)

    def attending(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append("attend")
        return attend(*arguments)

    monkeypatch.setattr(dispatch, "select_keys", selecting)
    monkeypatch.setattr(kernels, "_attend", attending)
    return calls


class Layers:
    """Attentions one on the other, each under a checkpoint of its own."""

    def __init__(
        self, config: KeyeVL2Config, room_bytes: int, *, teach: bool = False, layers: int = 2
    ) -> None:
        torch.manual_seed(0)
        self.modules = [SparseAttention(config, layer).to(DEVICE) for layer in range(layers)]
        for module in self.modules:
            module.backend = "triton"
        self.x = torch.randn(1, TOKENS, config.hidden_size, device=DEVICE, requires_grad=True)
        ones, zeros = (
            lambda dim: torch.ones(1, TOKENS, dim, device=DEVICE),
            lambda dim: torch.zeros(1, TOKENS, dim, device=DEVICE),
        )
        assert config.sa_config is not None
        index_dim = config.sa_config["indexer_head_dim"]
        self.context = AttentionContext(
            rope=(ones(config.head_dim), zeros(config.head_dim)),
            index_rope=(ones(index_dim), zeros(index_dim)),
            teach_indexer=teach,
        )
        self.keeper = Keeper()
        self.keeper.room_bytes = room_bytes

    def loss(self) -> Tensor:
        x, loss = self.x, torch.zeros((), device=DEVICE)
        for module in self.modules:
            x, divergence = checkpoint(
                module, x, self.context, use_reentrant=False, context_fn=self.keeper.contexts
            )
            loss = loss + x.square().mean() + (0.0 if divergence is None else divergence.sum())
        return loss

    def gradients(self) -> list[Tensor]:
        leaves = [self.x, *(p for module in self.modules for p in module.parameters())]
        found = torch.autograd.grad(self.loss(), leaves, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]


@pytest.fixture
def config(tiny_model: Any) -> KeyeVL2Config:
    return tiny_model.config


def found_bytes(config: KeyeVL2Config) -> int:
    """Of one layer: lists, output in fp32, denominators."""
    return TOKENS * (SELECTED * 4 + config.num_attention_heads * (config.head_dim + 1) * 4)


@pytest.mark.parametrize("teach", [False, True])
def test_each_is_computed_once_with_the_same_gradients(
    teach: bool, config: KeyeVL2Config, made: list[str]
) -> None:
    expected = Layers(config, 0, teach=teach).gradients()
    assert [made.count(kind) for kind in ("select", "attend")] == [4, 4]
    made.clear()
    layers = Layers(config, PLENTY, teach=teach)
    found = layers.gradients()
    assert [made.count(kind) for kind in ("select", "attend")] == [2, 2]
    assert layers.keeper.kept_bytes == 0
    assert len(found) == len(expected)
    for gradient, same in zip(found, expected, strict=True):
        assert_same(gradient, same)


def test_room_for_one_layer(config: KeyeVL2Config, made: list[str]) -> None:
    layers = Layers(config, found_bytes(config) + 1)
    loss = layers.loss()
    assert layers.keeper.kept_bytes == found_bytes(config)
    loss.backward()
    assert [made.count(kind) for kind in ("select", "attend")] == [3, 3]


def test_what_a_failed_pass_kept_goes_with_it(config: KeyeVL2Config) -> None:
    layers = Layers(config, PLENTY)
    loss = layers.loss()
    assert layers.keeper.kept_bytes == 2 * found_bytes(config)
    del loss
    assert layers.keeper.kept_bytes == 0


def test_nothing_is_kept_without_gradients(config: KeyeVL2Config) -> None:
    layers = Layers(config, PLENTY)
    with torch.no_grad():
        layers.loss()
    assert layers.keeper.kept_bytes == 0
