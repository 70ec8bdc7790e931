"""The feed-forward half of a layer: routed experts, or a plain SwiGLU in the dense sibling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyecli.kernels import dispatch
from keyecli.model.config import KeyeVL2Config

if TYPE_CHECKING:
    from keyecli.model.offload import HostExperts


class Experts(nn.Module):
    """All experts of a layer in two tensors, [expert, in, out] as in the official files.

    host: set where they are in the host's memory and the layer computes elsewhere. is_transposed: how PEFT asks which of the
    last two dimensions is the input.
    """

    is_transposed = True

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        assert config.num_experts
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, width, config.hidden_size))
        self.host: HostExperts | None = None

    def forward(
        self, x: Tensor, logits: Tensor, top_k: int, normalise: bool, backend: dispatch.Backend | None
    ) -> Tensor:
        """x [T, D] through the `top_k` experts that its router logits [T, E] choose → [T, D]."""
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if self.host is not None and not dispatch.by_vectors(x, backend):
            tensors = self.host.on_device()
            gate_up, down = tensors["gate_up_proj"], tensors["down_proj"]
        return dispatch.routed_experts(x, logits, top_k, normalise, gate_up, down, backend)


class SparseMoE(nn.Module):
    """Each token goes to its `num_experts_per_tok` best experts."""

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        assert config.num_experts
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.backend: dispatch.Backend | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, D] → [B, T, D]."""
        rows = x.flatten(0, 1)
        return self.routed(rows, self.gate(rows)).view_as(x)

    def routed(self, x: Tensor, logits: Tensor) -> Tensor:
        """x [T, D] through the experts that its router logits [T, E] choose → [T, D]."""
        return self.experts(x, logits, self.top_k, self.normalise, self.backend)


class DenseMLP(nn.Module):
    """SwiGLU, used when the configuration names no experts."""

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def feed_forward(config: KeyeVL2Config) -> SparseMoE | DenseMLP:
    """The feed-forward that the configuration asks for."""
    return SparseMoE(config) if config.is_moe else DenseMLP(config)
