"""Records what an answer's tokens attended to, as a share for each frame: a view that costs nothing unless it is asked for.

H heads, G key/value heads, d head dim, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from keyecli.kernels import dispatch, reference
from keyecli.model.attention import IndexerOutput, SparseAttention
from keyecli.model.keye import KeyeVL2ForConditionalGeneration

_KEY_BLOCK = 4096  # keys whose values are weighed at once, so that dense attention needs no [S, H, d]


class AttentionRecord:
    """What every pass of the decoder attended to while it was recorded; see `record_attention`.

    A pass predicts one token: of a pass over several tokens (a question) only the last row counts, which predicts the
    first token of the answer. So step i belongs to the answer's token i, and a stop token has a step of its own.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._steps: list[Tensor] = []
        self._running = torch.empty(0)

    @property
    def steps(self) -> int:
        """How many passes were recorded."""
        return len(self._steps)

    def frame_weights(
        self, frame_tokens: Sequence[tuple[int, int]], steps: Sequence[int] | None = None
    ) -> Tensor:
        """How much of what the answer read in the frames came from each of them: fp32 [frames], sums to 1.

        frame_tokens: (begin, end) of each frame's visual tokens among all tokens; steps: which of the answer's tokens to
        look at, all when None. All zeros when no frame's token was attended to. ValueError for a range that the chosen
        steps did not all see, IndexError for a step that was not recorded.
        """
        chosen = self._steps if steps is None else [self._steps[step] for step in steps]
        last = max((end for _, end in frame_tokens), default=0)
        if any(len(step) < last for step in chosen):
            raise ValueError(f"not every step saw token {last - 1}")
        summed = torch.zeros(last)
        for step in chosen:
            summed += step[:last]
        weights = torch.tensor([float(summed[begin:end].sum()) for begin, end in frame_tokens])
        total = weights.sum()
        return weights / total if total > 0 else weights

    def add(self, layer: int, contributions: Tensor) -> None:
        """One layer's contributions fp32 [S] to the pass that is under way; layers come in order."""
        before = self._running.to(contributions.device)  # layers may be on several
        self._running = contributions if layer == 0 else before + contributions
        if layer == self._layers - 1:
            self._steps.append(self._running.cpu())


@contextmanager
def record_attention(model: KeyeVL2ForConditionalGeneration) -> Iterator[AttentionRecord]:
    """Within the block, every pass of the model's decoder is recorded; the model computes exactly what it would otherwise.

    A key's contribution to a pass is Σ over layers and heads of α · ‖W_O v‖: the attention weight (0 for keys that the
    indexer did not select) times the length of what that key then adds to the residual stream (Kobayashi et al. 2020,
    "Attention is not only a weight"). The length matters because heads with nothing to read park their attention on
    tokens whose value is next to nothing, and because it weighs layers and heads by what they do. Costs one selection and
    one small product more a layer and pass, and 4 bytes a pass and key on the CPU. ValueError when the model is being
    recorded already, and from the model for a batch.
    """
    modules = [layer.self_attn for layer in model.model.layers]
    if any(module.observer is not None for module in modules):
        raise ValueError("this model's attention is being recorded already")
    record = AttentionRecord(len(modules))
    for module in modules:
        module.observer = _LayerObserver(record, module)
    try:
        yield record
    finally:
        for module in modules:
            module.observer = None


class _LayerObserver:
    """Works out one layer's contributions from what it attends with."""

    def __init__(self, record: AttentionRecord, module: SparseAttention) -> None:
        self._record = record
        self._module = module

    @torch.no_grad()
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> None:
        """q [1, T, H, d]; k, v [1, S, G, d]; index as in `AttentionObserver`."""
        if len(q) != 1:
            raise ValueError("attention is recorded for one sequence at a time, not for a batch")
        chosen = self._chosen(k.shape[1], index)
        every = torch.ones(1, 1, len(chosen), dtype=torch.bool, device=k.device)
        weights = reference.attention_probabilities(q[:, -1:], k[:, chosen], every)[0, :, 0]
        contributions = torch.zeros(k.shape[1], dtype=torch.float32, device=k.device)
        blocks = zip(chosen.split(_KEY_BLOCK), weights.split(_KEY_BLOCK, dim=-1), strict=True)
        for places, weight in blocks:
            contributions[places] = (weight * self._lengths(v[0, places])).sum(0)
        self._record.add(layer, contributions)

    def _chosen(self, keys: int, index: IndexerOutput | None) -> Tensor:
        """The keys that the last query attends to, ascending; it sees all there are."""
        if index is None:
            return torch.arange(keys, device=self._output_gram.device)
        q, gates, index_k = index
        top_k, backend = self._module.top_k, self._module.backend
        # More keys than are selected, and the last query sees them all: its list is full.
        return dispatch.select_keys(q[:, -1:], gates[:, -1:], index_k, top_k, backend=backend)[0, 0].long()

    def _lengths(self, v: Tensor) -> Tensor:
        """‖W_O v‖ for values [keys, G, d]: fp32 [H, keys], as the square root of v · (W_O W_Oᵀ) v."""
        values = v.float().repeat_interleave(self._module.heads // self._module.groups, dim=1).transpose(0, 1)
        return ((values @ self._output_gram) * values).sum(-1).clamp(min=0).sqrt()

    @cached_property
    def _output_gram(self) -> Tensor:
        """W_O W_Oᵀ of every head, fp32 [H, d, d]; the matrix is read by projecting unit vectors, adapters included."""
        module = self._module
        like = module.q_norm.weight
        units = torch.eye(module.heads * module.dim, dtype=like.dtype, device=like.device)
        heads = module.o_proj(units).float().unflatten(0, (module.heads, module.dim))
        return heads @ heads.transpose(1, 2)
