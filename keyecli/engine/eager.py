"""One new token at a time by `model.decode`: on the CPU, with the definitions as kernels, and while attention is watched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration


class EagerDecoder:
    """Continues the sequences of a cache, one a row, that all hold the same number of tokens."""

    def __init__(self, model: KeyeVL2ForConditionalGeneration, cache: KeyeCache) -> None:
        self._model, self._cache = model, cache
        self._positions = torch.empty(0)

    def begin(self, lengths: Sequence[int], positions: Sequence[int]) -> None:
        """lengths: tokens of each sequence, ValueError when the cache holds others; positions: of its next token, on all axes."""
        if list(lengths) != [self._cache.length] * self._cache.batch:
            raise ValueError(f"the cache holds {self._cache.length} tokens a row, not {list(lengths)}")
        places = torch.tensor(list(positions), device=self._cache.device)
        self._positions = places.expand(3, -1)[..., None].clone()

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Add a token to each sequence, int64 [B]; returns the logits of what follows, fp32 [B, vocabulary]."""
        embeds = self._model.embed(token_ids[:, None])
        hidden = self._model.decode(embeds, self._positions, self._cache).to(token_ids.device)
        self._positions += 1
        return self._model.logits(hidden[:, 0])
