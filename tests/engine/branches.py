"""Several sequences behind one shared prefix, decoded by the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from keyecli.kernels.reference import Branches
from keyecli.model.cache import KeyeCache


class BranchByBranch:
    """The definition of decoding branches: each one's tokens laid one behind the other, and decoded by the model alone."""

    def __init__(self, model: Any, cache: KeyeCache, branches: Branches) -> None:
        self._model, self._cache, self._branches = model, cache, branches
        self._lengths: list[int] = []
        self._positions: list[int] = []

    def begin(self, lengths: Sequence[int], positions: Sequence[int]) -> None:
        self._lengths, self._positions = list(lengths), list(positions)

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        logits = []
        for branch, token_id in enumerate(token_ids.tolist()):
            length, room = self._lengths[branch], self._branches.room
            assert length < self._branches.length
            alone = KeyeCache(self._model.config, self._branches.length)
            pairs = [
                (own, kept)
                for own, kept in zip(
                    (alone.k, alone.v, alone.index_k),
                    (self._cache.k, self._cache.v, self._cache.index_k),
                    strict=True,
                )
                if own is not None and kept is not None
            ]
            for own, kept in pairs:
                for layer in range(len(own)):
                    own[layer, 0] = self._branches.unfolded(kept[layer])[branch]
            alone.advance(length)
            positions = torch.full((3, 1, 1), self._positions[branch])
            hidden = self._model.decode(self._model.embed(torch.tensor([[token_id]])), positions, alone)
            for own, kept in pairs:
                kept[:, 0, length + branch * room] = own[:, 0, length]
            logits.append(self._model.logits(hidden[0, 0]))
            self._lengths[branch] += 1
            self._positions[branch] += 1
        return torch.stack(logits)
