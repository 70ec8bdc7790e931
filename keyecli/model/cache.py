"""Preallocated keys, values and indexer keys of every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from keyecli.kernels.reference import Branches
from keyecli.model.config import KeyeVL2Config


class KeyeCache:
    """Room for `capacity` tokens: per layer k and v [B, capacity, G, d] and one indexer key [B, capacity, e].

    `length` tokens are filled. A layer's `append` writes behind them; `advance`, called once after the last layer, makes
    them count.
    """

    def __init__(
        self,
        config: KeyeVL2Config,
        capacity: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        self.capacity = capacity
        self.length = 0
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.index_k: Tensor | None = None
        if config.sa_config is not None:
            self.index_k = torch.empty(
                (*shape[:3], config.sa_config["indexer_head_dim"]), dtype=dtype, device=device
            )

    def append(
        self, layer: int, k: Tensor, v: Tensor, index_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write T new tokens of one layer and return everything up to and including them.

        k, v: [B, T, G, d]; index_k: [B, T, e]. Returns views of length `length + T`. ValueError when there is no room.
        """
        all_k, all_v, all_index_k = self.room(layer, k.shape[1])
        all_k[:, self.length :] = k
        all_v[:, self.length :] = v
        if all_index_k is None or index_k is None:
            return all_k, all_v, None
        all_index_k[:, self.length :] = index_k
        return all_k, all_v, all_index_k

    def room(self, layer: int, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer up to and including `tokens` more, which somebody else writes; ValueError when there is no room."""
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens and {end} were asked for")
        index_k = None if self.index_k is None else self.index_k[layer, :, :end]
        return self.k[layer, :, :end], self.v[layer, :, :end], index_k

    def advance(self, tokens: int) -> None:
        """Count `tokens` appended tokens as filled."""
        self.length += tokens

    def copy_to_branch(self, branches: Branches, branch: int, length: int) -> None:
        """Give `branch` what branch 0 holds behind the shared tokens, up to its token `length`; ValueError without room for it."""
        if not (0 <= branch < branches.count and length - branches.shared <= branches.room):
            raise ValueError(f"branch {branch} of {branches} has no room for {length} tokens")
        if branches.rows > self.capacity or self.k.shape[1] != 1:
            raise ValueError(f"{branches} do not fit a cache of {self.capacity} tokens")
        own = slice(branches.shared, length)
        moved = slice(branches.shared + branch * branches.room, length + branch * branches.room)
        if branch:
            for rows in (self.k, self.v, self.index_k):
                if rows is not None:
                    rows[:, :, moved] = rows[:, :, own]

    def truncate(self, length: int) -> None:
        """Forget everything from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length
