"""One new token at a time from static buffers: a step is one CUDA graph, whatever the length of what came before.

B sequences, D width. The lengths stand on the device, every kernel's shape follows from the cache's room, and the host
starts a whole step with one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keyecli.kernels import dispatch
from keyecli.model.attention import SparseAttention
from keyecli.model.cache import KeyeCache
from keyecli.model.decoder import DecoderLayer
from keyecli.model.keye import KeyeVL2ForConditionalGeneration


class StaticDecoder:
    """Continues the sequences of a cache; make one for a cache whose prompt is prefilled.

    Computes what `model.decode` does for one token of each sequence, in kernels that take a layer's projections together, so
    its results may differ from those in the last bits. ValueError for a model or a way of running that `suits` refuses.
    """

    def __init__(self, model: KeyeVL2ForConditionalGeneration, cache: KeyeCache) -> None:
        if not suits(model, cache):
            raise ValueError("this model is not decoded from static buffers: use model.decode")
        self._model, self._cache = model, cache
        device, batch = cache.k.device, cache.k.shape[1]
        self._ids = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros((3, batch, 1), dtype=torch.int64, device=device)
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], position: int) -> Tensor:
        """Feed one token to each sequence, at `position` on all three axes; returns the logits that follow, fp32 [B, vocabulary].

        Adds them to the cache (ValueError when it is full). The result is overwritten by the next step.
        """
        if self._cache.length >= self._cache.capacity:
            raise ValueError(f"the cache holds {self._cache.capacity} tokens and is full")
        self._ids.copy_(torch.tensor(token_ids)[:, None])
        self._positions.fill_(position)
        self._lengths.fill_(self._cache.length)
        if self._ids.device.type != "cuda":
            self._logits = self._run()
        elif self._graph is None:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        self._cache.advance(1)
        assert self._logits is not None
        return self._logits

    def _capture(self) -> None:
        """The first run compiles and picks algorithms; what it writes into the cache the replay writes again."""
        stream = torch.cuda.Stream(self._ids.device)
        stream.wait_stream(torch.cuda.current_stream(self._ids.device))
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream(self._ids.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run()

    def _run(self) -> Tensor:
        """The step itself, on the buffers."""
        decoder = self._model.model
        x = decoder.embed_tokens(self._ids).squeeze(1)
        tables = decoder.rotary_tables(self._positions, x.dtype)
        delta: Tensor | None = None
        for number, layer in enumerate(decoder.layers):
            normed = dispatch.add_norm(
                x, delta, layer.input_layernorm.weight, layer.input_layernorm.eps, "triton"
            )
            delta = self._attend(layer.self_attn, number, normed, tables)
            norm = layer.post_attention_layernorm
            delta = self._feed_forward(layer, dispatch.add_norm(x, delta, norm.weight, norm.eps, "triton"))
        hidden = dispatch.add_norm(x, delta, decoder.norm.weight, decoder.norm.eps, "triton")
        return self._model.logits(hidden)

    def _attend(
        self,
        attention: SparseAttention,
        layer: int,
        normed: Tensor,
        tables: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:
        """normed [B, D] → what attention adds, [B, D]; writes the new token's keys and values."""
        cache = self._cache
        assert cache.index_k is not None
        q, index_q, gates = attention.place(normed[:, None], tables, self._lengths, cache)
        indices = dispatch.select_keys(
            index_q, gates, cache.index_k[layer], attention.top_k, None, self._lengths, backend="triton"
        )
        attended = dispatch.attended(q, cache.k[layer], cache.v[layer], indices, "triton")
        return attention.o_proj(attended.flatten(1))

    @staticmethod
    def _feed_forward(layer: DecoderLayer, normed: Tensor) -> Tensor:
        return layer.mlp(normed[:, None]).squeeze(1)


def decoder_for(
    model: KeyeVL2ForConditionalGeneration, cache: KeyeCache, made: StaticDecoder | None = None
) -> StaticDecoder | None:
    """The decoder `made` for this cache before, else a new one; None where `suits` refuses."""
    if not suits(model, cache):
        return None
    return made or StaticDecoder(model, cache)


def suits(model: KeyeVL2ForConditionalGeneration, cache: KeyeCache) -> bool:
    """Whether a `StaticDecoder` can be made: the kernels compute, keys are selected, nobody watches, a few sequences at most."""
    layers = [layer.self_attn for layer in model.model.layers]
    return (
        model.model.mode == "sparse"
        and cache.k.shape[1] <= dispatch.DECODE_TOKENS
        and all(attention.observer is None and attention.can_join() for attention in layers)
        and dispatch.backend_of(cache.k, layers[0].backend) == "triton"
    )
