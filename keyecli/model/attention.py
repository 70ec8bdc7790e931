"""Grouped-query attention over the keys that the lightning indexer selects.

B batch, T new tokens, S all tokens so far, H query heads, G key/value heads, d head dim, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keyecli.kernels import dispatch, kept, reference
from keyecli.kernels.quantized_weights import QuantizedMatrix
from keyecli.model.cache import KeyeCache
from keyecli.model.config import KeyeVL2Config
from keyecli.model.indexer import NORM_EPS, LightningIndexer, RMSNorm
from keyecli.model.lora import added_to, base_of
from keyecli.model.quantize import QuantizedLinear, join_matrices, join_views
from keyecli.model.rope import rotate_half_split

AttentionMode = Literal["sparse", "dense"]
# The indexer's queries [B, T, J, e], gates [B, T, J] and keys [B, S, e].
IndexerOutput = tuple[Tensor, Tensor, Tensor]
# Is shown what a layer attends with: its number, q [B, T, H, d], k and v [B, S, G, d] as the cache stores them, and the
# indexer's output, None where nothing is selected and so every visible key is attended to.
AttentionObserver = Callable[[int, Tensor, Tensor, Tensor, IndexerOutput | None], None]


@dataclass(frozen=True)
class AttentionContext:
    """What every layer of one pass shares.

    rope, index_rope: (cos, sin), [B, T, d] and [B, T, e]. segments: int [B, T] without a cache, see
    `reference.visible_keys`; the first `shared_prefix` tokens of every row are then its segment 0 and its padding.
    `mode` "dense" ignores the selection (warm-up of the indexer, and comparisons). `teach_indexer` also returns the
    divergence between attention and indexer. `lengths`, int [B] on the device, is how many tokens the cache holds: given where
    the kernels place new tokens themselves.
    """

    rope: tuple[Tensor, Tensor]
    index_rope: tuple[Tensor, Tensor] | None = None
    cache: KeyeCache | None = None
    segments: Tensor | None = None
    shared_prefix: int = 0
    mode: AttentionMode = "sparse"
    teach_indexer: bool = False
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> AttentionContext:
        """The same for layers on another device."""
        cos, sin = self.rope
        index_rope = self.index_rope
        return replace(
            self,
            rope=(cos.to(device), sin.to(device)),
            index_rope=None if index_rope is None else (index_rope[0].to(device), index_rope[1].to(device)),
            segments=None if self.segments is None else self.segments.to(device),
            lengths=None if self.lengths is None else self.lengths.to(device),
        )


class SparseAttention(nn.Module):
    """One layer's attention; without `sa_config` it is plain causal attention."""

    def __init__(self, config: KeyeVL2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.groups, self.dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.dim, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.observer: AttentionObserver | None = None
        self.backend: dispatch.Backend | None = None
        self._joint: Tensor | None = None
        self._heads: QuantizedMatrix | None = None
        sparse = config.sa_config or {"topk": 0, "q_chunk_size": 512}
        self.top_k: int = sparse["topk"]
        self.query_chunk: int = sparse["q_chunk_size"]
        self.sa_indexer = LightningIndexer(config) if config.sa_config is not None else None
        if self.sa_indexer is not None:
            self._shape = reference.StepShape(
                self.heads,
                self.groups,
                self.dim,
                self.sa_indexer.heads,
                self.sa_indexer.dim,
                config.rms_norm_eps,
                NORM_EPS,
            )

    def can_join(self) -> bool:
        """Whether `projected` is possible: an indexer, no biases, and around the projections nothing but low-rank adapters."""
        return self.sa_indexer is not None and all(
            type(linear) in (nn.Linear, QuantizedLinear) and linear.bias is None
            for linear in self._projections()
        )

    def joint_projection(self) -> Tensor:
        """The weights of q, k, v and the indexer's two projections one below the other, [W, D]; of the indexer's alone where q, k
        and v are quantised.

        Joined once: the parameters then are views of the result, so nothing is held twice. Whoever gives a parameter another
        storage gets a new one the next time.
        """
        dense = [linear.weight for linear in self._projections() if type(linear) is nn.Linear]
        # Outside inference mode: the parameters become views of it, and those of that mode could not be trained with.
        with torch.inference_mode(False), torch.no_grad():
            self._joint = join_views(dense, self._joint)
        return self._joint

    def projected(self, x: Tensor) -> Tensor:
        """x [B, T, D] → q, k, v and the indexer's two projections side by side, [B, T, W], by the kernels. Nothing is dropped out
        of an adapter's inputs."""
        joint, added = self.joint_projection(), self._additions()
        if isinstance(base_of(self.q_proj), QuantizedLinear):
            self._heads = join_matrices(self._projections()[:3], self._heads)
            product = dispatch.quantized_linear(x, self._heads, joint, "triton")
        # New tokens of several sequences, side by side, must not change each other's bits.
        elif x.shape[1] == 1 and len(x) <= dispatch.DECODE_TOKENS:
            return dispatch.linear(x[:, 0], joint, backend="triton", added=added)[:, None]
        else:
            product = F.linear(x, joint)
        return dispatch.add_low_rank(product, x, added, "triton")

    def place(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor, Tensor, Tensor],
        lengths: Tensor,
        cache: KeyeCache,
        branches: reference.Branches | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project T new tokens of each sequence together and write their keys and values into the cache, by the kernels.

        x: [B, T, D]; tables: cosines and sines of the heads [B, T, d] and of the indexer [B, T, e]; lengths: int [B] on the
        device, how many tokens each sequence holds; branches: where each keeps its own, with T = 1. Returns q [B, T, H, d], the
        indexer's queries [B, T, J, e] and gates [B, T, J].
        """
        indexer = self.sa_indexer
        assert indexer is not None
        k, v, index_k = cache.layer(self.layer)
        assert index_k is not None
        norms = (
            self.q_norm.weight, self.k_norm.weight, indexer.q_norm.weight, indexer.k_norm.weight, indexer.k_norm.bias
        )  # fmt: skip
        return dispatch.place_projections(
            self.projected(x), tables, lengths, norms,
            (k, v, index_k), self._shape, "triton", branches,
        )  # fmt: skip

    def _projections(self) -> tuple[Any, ...]:
        assert self.sa_indexer is not None
        heads = map(base_of, (self.q_proj, self.k_proj, self.v_proj))
        return *heads, self.sa_indexer.q_proj, self.sa_indexer.k_proj

    def _additions(self) -> list[reference.Added]:
        """What adapters add to `projected`."""
        begins = 0, self.heads * self.dim, (self.heads + self.groups) * self.dim
        projections = self.q_proj, self.k_proj, self.v_proj
        return [
            part
            for linear, begin in zip(projections, begins, strict=True)
            for part in added_to(linear, begin)
        ]

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, D], normalised → output [B, T, D] and, with `teach_indexer`, the divergence fp32 [B, T]."""
        prepare = self._placed if context.lengths is not None and self.can_join() else self._appended
        q, k, v, index = prepare(x, context)

        # While everything visible fits into the selection, sparse and dense are the same function.
        selects = context.mode == "sparse" and k.shape[1] > self.top_k
        if self.observer is not None:
            self.observer(self.layer, q, k, v, index if selects else None)
        if index is not None and (selects or context.teach_indexer):
            # Without a selection there are no lists: teaching from dense attention is left to the definition.
            by_lists = context.mode == "sparse" and dispatch.backend_of(q, self.backend) == "triton"
            attend = self._listed if by_lists else self._chunked
            attended, divergence = attend(q, k, v, index, context)
        else:
            attended, divergence = self._dense(q, k, v, context), None
        return self.o_proj(attended.flatten(2)), divergence

    def _appended(
        self, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor, Tensor, IndexerOutput | None]:
        """What x attends with, q, k, v and the indexer's output over all tokens so far, by the modules one after the other."""
        q, k, v = self.project(x, *context.rope)
        index: IndexerOutput | None = None
        # In a dense pass nobody reads the indexer, unless a cache keeps its keys for later or it is being taught.
        wanted = context.mode == "sparse" or context.cache is not None or context.teach_indexer
        if self.sa_indexer is not None and context.index_rope is not None and wanted:
            # Detached: the next-token loss never reaches the indexer, its own loss never reaches the rest.
            index = self.sa_indexer(x.detach(), *context.index_rope)
        if context.cache is not None:
            k, v, index_k = context.cache.append(self.layer, k, v, None if index is None else index[2])
            if index is not None and index_k is not None:
                index = (index[0], index[1], index_k)
        return q, k, v, index

    def _placed(
        self, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor, Tensor, IndexerOutput | None]:
        """The same by the kernels, with a cache and without gradients."""
        assert context.cache is not None
        assert context.index_rope is not None
        assert context.lengths is not None
        k, v, index_k = context.cache.room(self.layer, x.shape[1])
        assert index_k is not None
        tables = (*context.rope, *context.index_rope)
        q, index_q, gates = self.place(x, tables, context.lengths, context.cache)
        return q, k, v, (index_q, gates, index_k)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, T, D]; cos, sin: [B, T, d] → q [B, T, H, d], k and v [B, T, G, d], normalised and rotated."""
        batch, tokens, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, tokens, self.heads, self.dim))
        k = self.k_norm(self.k_proj(x).view(batch, tokens, self.groups, self.dim))
        v = self.v_proj(x).view(batch, tokens, self.groups, self.dim)
        return rotate_half_split(q, cos, sin), rotate_half_split(k, cos, sin), v

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Causal attention over everything visible. Rows of a shared prefix need no mask beyond causality: padding stands
        behind what it pads."""
        queries, keys = q.shape[1], k.shape[1]
        plain = queries if context.segments is None else context.shared_prefix
        # Of torch's attention kernels only the one that never writes T×T scores takes grouped heads, and it has no fp32 on CUDA.
        bounded = q.device.type == "cpu" or q.dtype in (torch.float16, torch.bfloat16)
        if plain and queries == keys and bounded:
            head = torch.nn.functional.scaled_dot_product_attention(
                q[:, :plain].transpose(1, 2),
                k[:, :plain].transpose(1, 2).to(q.dtype),
                v[:, :plain].transpose(1, 2).to(q.dtype),
                is_causal=True,
                enable_gqa=True,
            ).transpose(1, 2)
            if plain == queries:
                return head
            tail, _ = self._chunked(q, k, v, None, context, first=plain)
            return torch.cat((head, tail), dim=1)
        return self._chunked(q, k, v, None, context)[0]

    def _listed(
        self, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput, context: AttentionContext
    ) -> tuple[Tensor, Tensor | None]:
        """All queries over the lists of their selected keys, by the kernels: nothing T × S is held."""
        if not torch.is_grad_enabled():
            return dispatch.attended(q, k, v, self._selected(index, context), "triton"), None
        if found := kept.taken():
            indices = found[0]
            output, lse = dispatch.attend_indices(q, k, v, indices, "triton", found=(found[1], found[2]))
        else:
            indices = self._selected(index, context)
            output, lse = dispatch.attend_indices(q, k, v, indices, "triton")
            kept.keep(indices, output, lse)
        if not context.teach_indexer:
            return output, None
        teacher = dispatch.selected_probabilities(q.detach(), k.detach(), indices, lse.detach(), "triton")
        divergences = []
        for begin in range(0, q.shape[1], self.query_chunk):
            part = slice(begin, begin + self.query_chunk)
            # Recomputed in the backward pass: each query's own copies of its selected keys are far larger than their scores.
            divergence = checkpoint(
                self._listed_divergence,
                index[0][:, part], index[1][:, part], index[2], indices[:, part], teacher[:, part],
                use_reentrant=False,
            )  # fmt: skip
            divergences.append(divergence)
        return output, torch.cat(divergences, dim=1)

    def _selected(self, index: IndexerOutput, context: AttentionContext) -> Tensor:
        """The lists of selected keys, which have no gradients."""
        with torch.no_grad():
            return dispatch.select_keys(*index, self.top_k, context.segments, backend="triton")

    def _listed_divergence(self, q: Tensor, w: Tensor, k: Tensor, indices: Tensor, teacher: Tensor) -> Tensor:
        """The indexer's divergence over lists of keys."""
        scores = reference.selected_scores(q, w, k, indices)
        return reference.indexer_divergence(teacher, scores, indices >= 0, self.groups)

    def _chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: IndexerOutput | None,
        context: AttentionContext,
        first: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries from row `first` on, a chunk at a time against all keys before its end, so nothing T×T exists.

        Without `index` everything visible is attended to.
        """
        queries, keys = q.shape[1], k.shape[1]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        outputs, divergences = [], []
        for begin in range(first, queries, self.query_chunk):
            end = min(begin + self.query_chunk, queries)
            position = keys - queries + begin
            seen = keys - queries + end
            visible = reference.visible_keys(end - begin, seen, q.device, context.segments, position)
            part: IndexerOutput | None = None
            if index is not None:
                part = (index[0][:, begin:end], index[1][:, begin:end], index[2][:, :seen])
            arguments = (q[:, begin:end], k[:, :seen], v[:, :seen], part, visible, context)
            if recompute:
                output, divergence = checkpoint(self._chunk, *arguments, use_reentrant=False)
            else:
                output, divergence = self._chunk(*arguments)
            outputs.append(output)
            divergences.append(divergence)
        divergence = torch.cat(divergences, dim=1) if context.teach_indexer else None
        return torch.cat(outputs, dim=1), divergence

    def _chunk(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: IndexerOutput | None,
        visible: Tensor,
        context: AttentionContext,
    ) -> tuple[Tensor, Tensor | None]:
        """One chunk of queries: scores, selection, attention and, when asked, the indexer's divergence over it."""
        if index is None:
            return reference.masked_attention(q, k, v, visible), None
        scores = reference.index_scores(*index)
        mask = visible.expand_as(scores)
        if context.mode == "sparse":
            mask = reference.select_top_k(scores.detach(), visible, self.top_k)
        if not context.teach_indexer:
            return reference.sparse_attention(q, k, v, mask, self.top_k), None
        output = reference.masked_attention(q, k, v, mask)
        with torch.no_grad():
            teacher = reference.attention_probabilities(q, k, mask).mean(1)
        return output, reference.indexer_divergence(teacher, scores, mask, self.groups)
