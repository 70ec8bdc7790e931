"""The text decoder: embeddings, pre-norm layers of sparse attention and experts, final norm."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from keyecli.kernels import dispatch
from keyecli.model.attention import AttentionContext, AttentionMode, SparseAttention
from keyecli.model.cache import KeyeCache
from keyecli.model.config import KeyeVL2Config
from keyecli.model.indexer import RMSNorm
from keyecli.model.moe import feed_forward
from keyecli.model.rope import inverse_frequencies, mrope_tables, scale_sections


class DecoderLayer(GradientCheckpointingLayer):
    """One pre-norm residual block."""

    def __init__(self, config: KeyeVL2Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SparseAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward(config)

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, D] → [B, T, D], and the indexer's divergence [B, T] when the context asks for it."""
        attended, divergence = self.self_attn(self.input_layernorm(x), context)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), divergence


class TextDecoder(nn.Module):
    """The `model` branch of the official files."""

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        self.config = config
        # "dense" ignores the indexer's selection: for teaching the indexer, and to measure what selection costs.
        self.mode: AttentionMode = "sparse"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cache: KeyeCache | None = None,
        *,
        segments: Tensor | None = None,
        shared_prefix: int = 0,
        teach_indexer: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states after the final norm, and the layers' mean indexer divergence when asked.

        inputs_embeds: [B, T, D]; position_ids: int [3, B, T]; segments: int [B, T], only without a cache. Appends T tokens
        to the cache. Returns [B, T, D] and fp32 [B, T] or None. Where layers are on several devices, the states move at the
        borders, and what returns is on the device of the final norm.
        """
        if cache is not None and segments is not None:
            raise ValueError("segments are for passes without a cache")
        context = AttentionContext(
            rope=self._tables(position_ids, self.config.head_dim, inputs_embeds.dtype),
            index_rope=self._index_tables(position_ids, inputs_embeds.dtype),
            cache=cache,
            segments=segments,
            shared_prefix=shared_prefix,
            mode=self.mode,
            teach_indexer=teach_indexer,
            lengths=self._placed_lengths(inputs_embeds, cache, teach_indexer),
        )
        x, divergences = inputs_embeds, []
        for layer in self.layers:
            device = cast(DecoderLayer, layer).input_layernorm.weight.device
            if x.device != device:
                x, context = x.to(device), context.to(device)
            x, divergence = layer(x, context)
            divergences.append(divergence)
        if cache is not None:
            cache.advance(inputs_embeds.shape[1])
        mean_divergence = torch.stack(divergences).mean(0) if teach_indexer else None
        return self.norm(x.to(self.norm.weight.device)), mean_divergence

    def _placed_lengths(self, x: Tensor, cache: KeyeCache | None, teach_indexer: bool) -> Tensor | None:
        """`AttentionContext.lengths` where the kernels may place new tokens: with a cache, without anything to differentiate."""
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)
        backend = dispatch.backend_of(x, first.self_attn.backend)
        if (
            cache is None
            or self.config.sa_config is None
            or teach_indexer
            or torch.is_grad_enabled()
            or backend != "triton"
        ):
            return None
        return torch.full((len(x),), cache.length, dtype=torch.int32, device=x.device)

    def frequencies(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary frequencies of the heads and of the indexer, fp32 [d/2] and [e/2]; only for a model with an indexer."""
        assert self.config.sa_config is not None
        theta, index_dim = self.config.rope_theta, self.config.sa_config["indexer_head_dim"]
        return (
            inverse_frequencies(self.config.head_dim, theta, device),
            inverse_frequencies(index_dim, theta, device),
        )

    def _tables(self, position_ids: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sections = scale_sections(self.config.mrope_section, self.config.head_dim, dim)
        return mrope_tables(position_ids, dim, self.config.rope_theta, sections, dtype)

    def _index_tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The indexer's own rotary over all its dimensions, same base: slicing the text tables would be wrong."""
        if self.config.sa_config is None:
            return None
        return self._tables(position_ids, self.config.sa_config["indexer_head_dim"], dtype)
