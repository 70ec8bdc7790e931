"""The lightning indexer: which keys each query will attend to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyecli.model.config import KeyeVL2Config
from keyecli.model.rope import rotate_half_split

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, worked out in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class KeyNorm(nn.LayerNorm):
    """Layer norm in fp32, whatever the input."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(x.dtype)


class LightningIndexer(nn.Module):
    """Indexer queries, gates and keys of the same normalised hidden states that feed q, k and v.

    The release also rotates queries and keys by a Hadamard matrix before it rounds them to FP8; an orthonormal rotation
    leaves every dot product as it is, so it has no place here.
    """

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        assert config.sa_config is not None
        self.heads: int = config.sa_config["indexer_num_heads"]
        self.dim: int = config.sa_config["indexer_head_dim"]
        # Query rows first, then one gate row a head.
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim + self.heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.q_norm = RMSNorm(self.dim, NORM_EPS)
        self.k_norm = KeyNorm(self.dim, eps=NORM_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, T, D]; cos, sin: [B, T, e] (the indexer's own tables) → q [B, T, J, e], gates [B, T, J], k [B, T, e]."""
        projected = self.q_proj(x)
        q = self.q_norm(projected[..., : self.heads * self.dim].unflatten(-1, (self.heads, self.dim)))
        gates = projected[..., self.heads * self.dim :]
        k = self.k_norm(self.k_proj(x)).unsqueeze(2)
        return rotate_half_split(q, cos, sin), gates, rotate_half_split(k, cos, sin).squeeze(2)
