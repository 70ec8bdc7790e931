"""How much of what attention looks at the indexer would select: the gate of its training.

T tokens of a row, H query heads, G key/value heads, J indexer heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from keyecli.kernels import reference
from keyecli.model.attention import IndexerOutput
from keyecli.model.decoder import DecoderLayer, TextDecoder


class Recall:
    """Per layer the mean share of attention's weight, over all keys, that falls on the selected ones; of queries that select.

    answers: bool [T], which queries write an answer: few among all, and those that count.
    """

    def __init__(self, decoder: TextDecoder, answers: Tensor) -> None:
        layers = len(decoder.layers)
        self._answers = answers
        self._mass, self._best_mass, self._queries = [0.0] * layers, [0.0] * layers, [0] * layers
        self._answer_mass, self._answer_queries = [0.0] * layers, [0] * layers

    @property
    def layers(self) -> list[float | None]:
        """One share for each layer, None where no query had more keys than are selected."""
        return _shares(self._mass, self._queries)

    @property
    def best(self) -> list[float | None]:
        """The same if each query selected the keys of most weight: where attention looks everywhere, no indexer does better."""
        return _shares(self._best_mass, self._queries)

    @property
    def of_answers(self) -> list[float | None]:
        """The same of queries that write an answer."""
        return _shares(self._answer_mass, self._answer_queries)

    def see(self, layer: int, q: Tensor, k: Tensor, index: IndexerOutput, top_k: int, chunk: int) -> None:
        """Count what one layer attends with: q [1, T, H, d], k [1, T, G, d], and the indexer's output."""
        tokens = q.shape[1]
        for begin in range(top_k, tokens, chunk):
            end = min(begin + chunk, tokens)
            visible = reference.visible_keys(end - begin, end, q.device, first_query=begin)
            weights = reference.attention_probabilities(q[:, begin:end], k[:, :end], visible).mean(1)
            scores = reference.index_scores(index[0][:, begin:end], index[1][:, begin:end], index[2][:, :end])
            selected = reference.select_top_k(scores, visible, top_k)
            mass = (weights * selected).sum(-1)[0]
            self._mass[layer] += float(mass.sum())
            self._best_mass[layer] += float(weights.topk(top_k, dim=-1).values.sum())
            self._queries[layer] += end - begin
            answers = self._answers[begin:end]
            self._answer_mass[layer] += float(mass[answers].sum())
            self._answer_queries[layer] += int(answers.sum())


def _shares(masses: list[float], queries: list[int]) -> list[float | None]:
    return [mass / count if count else None for mass, count in zip(masses, queries, strict=True)]


@contextmanager
def watching(decoder: TextDecoder, answers: Tensor) -> Iterator[Recall]:
    """Count one row of T tokens that goes through the decoder in one piece, without a cache; the pass must be a sparse one."""
    recall = Recall(decoder, answers)
    attentions = [cast(DecoderLayer, layer).self_attn for layer in decoder.layers]

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> None:
        if index is not None and len(q) == 1:
            attention = attentions[layer]
            with torch.no_grad():
                recall.see(layer, q, k, index, attention.top_k, attention.query_chunk)

    for attention in attentions:
        attention.observer = observe
    try:
        yield recall
    finally:
        for attention in attentions:
            attention.observer = None
