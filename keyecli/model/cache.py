"""Preallocated keys, values and indexer keys of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from keyecli.kernels import reference
from keyecli.kernels.reference import Branches
from keyecli.model.config import KeyeVL2Config


@dataclass(frozen=True)
class CachePart:
    """Neighbouring layers on one device: k and v [L, B, capacity, G, d], indexer keys [L, B, capacity, e]."""

    k: Tensor
    v: Tensor
    index_k: Tensor | None

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """All of them that there are."""
        return (self.k, self.v) if self.index_k is None else (self.k, self.v, self.index_k)


class KeyeCache:
    """Room for `capacity` tokens: per layer k and v [B, capacity, G, d] and one indexer key [B, capacity, e].

    Keys and values may be float8_e4m3fn (`kv_dtype`), half the room of bf16: `reference.stored` says what is lost. Indexer
    keys stay of type `dtype`, for which keys are selected is not continuous in them. What attends to new tokens reads them
    from here, as they are stored.

    `length` tokens are filled. A layer's `append` writes behind them; `advance`, called once after the last layer, makes
    them count.
    """

    def __init__(
        self,
        config: KeyeVL2Config,
        capacity: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | Sequence[torch.device] = "cpu",
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """device: of all layers, or of each of them; kv_dtype: of keys and values, `dtype` by default."""
        self.capacity = capacity
        self.batch = batch
        self.length = 0
        layers = config.num_hidden_layers
        devices = [torch.device(device)] * layers if isinstance(device, (str, torch.device)) else device
        row = (config.num_key_value_heads, config.head_dim)
        self.parts: list[CachePart] = []
        self._places: list[tuple[CachePart, int]] = []  # of each layer
        for place, group in groupby(devices):
            shape = (len(list(group)), batch, capacity)
            k, v = (torch.empty((*shape, *row), dtype=kv_dtype or dtype, device=place) for _ in "kv")
            index_k = None
            if config.sa_config is not None:
                width = config.sa_config["indexer_head_dim"]
                index_k = torch.empty((*shape, width), dtype=dtype, device=place)
            part = CachePart(k, v, index_k)
            self.parts.append(part)
            self._places += [(part, number) for number in range(shape[0])]

    @property
    def device(self) -> torch.device:
        """Of the first layer."""
        return self.parts[0].k.device

    @property
    def k(self) -> Tensor:
        """The keys of all layers, [L, B, capacity, G, d]; ValueError where they are on several devices, as for `v`, `index_k`."""
        return self._whole().k

    @property
    def v(self) -> Tensor:
        return self._whole().v

    @property
    def index_k(self) -> Tensor | None:
        return self._whole().index_k

    def _whole(self) -> CachePart:
        if len(self.parts) > 1:
            raise ValueError("the layers of this cache are on several devices: see `layer` and `parts`")
        return self.parts[0]

    def layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer's k and v [B, capacity, G, d] and indexer keys [B, capacity, e]."""
        part, number = self._places[layer]
        return part.k[number], part.v[number], None if part.index_k is None else part.index_k[number]

    def append(
        self, layer: int, k: Tensor, v: Tensor, index_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write T new tokens of one layer and return everything up to and including them.

        k, v: [B, T, G, d]; index_k: [B, T, e]. Returns views of length `length + T`. ValueError when there is no room.
        """
        all_k, all_v, all_index_k = self.room(layer, k.shape[1])
        all_k[:, self.length :] = reference.stored(k, all_k.dtype)
        all_v[:, self.length :] = reference.stored(v, all_v.dtype)
        if all_index_k is None or index_k is None:
            return all_k, all_v, None
        all_index_k[:, self.length :] = index_k
        return all_k, all_v, all_index_k

    def room(self, layer: int, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer up to and including `tokens` more, which somebody else writes; ValueError when there is no room."""
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens and {end} were asked for")
        k, v, index_k = self.layer(layer)
        return k[:, :end], v[:, :end], None if index_k is None else index_k[:, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` appended tokens as filled."""
        self.length += tokens

    def copy_to_branch(self, branches: Branches, branch: int, length: int) -> None:
        """Give `branch` what branch 0 holds behind the shared tokens, up to its token `length`; ValueError without room."""
        if not (0 <= branch < branches.count and length - branches.shared <= branches.room):
            raise ValueError(f"branch {branch} of {branches} has no room for {length} tokens")
        if branches.rows > self.capacity or self.batch != 1:
            raise ValueError(f"{branches} do not fit a cache of {self.capacity} tokens")
        own = slice(branches.shared, length)
        moved = slice(branches.shared + branch * branches.room, length + branch * branches.room)
        if branch:
            for part in self.parts:
                for rows in part.buffers:
                    rows[:, :, moved] = rows[:, :, own]

    def copy_from(self, other: KeyeCache, length: int) -> None:
        """Become the first `length` tokens of a cache of the same model and kind; ValueError without room for them."""
        if length > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens has no room for {length}")
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            for rows, source in zip(mine.buffers, theirs.buffers, strict=True):
                rows[:, :, :length] = source[:, :, :length]
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget everything from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length
