"""One new token at a time from static buffers: a step is one CUDA graph, whatever the length of what came before.

B sequences, D width. Lengths and positions stand on the device and are counted there, every kernel's shape follows from the
cache's room, and the host starts a whole step with one call that waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from keyecli.kernels import dispatch
from keyecli.kernels.reference import Branches
from keyecli.model.attention import SparseAttention
from keyecli.model.cache import KeyeCache
from keyecli.model.decoder import DecoderLayer
from keyecli.model.indexer import RMSNorm
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.lora import added_to, base_of
from keyecli.model.moe import SparseMoE


class StaticDecoder:
    """Continues the sequences of a cache, or the branches of its only one, whose prompts are prefilled.

    Computes what `model.decode` does for one token of each sequence, in kernels that take a layer's projections together, so
    its results may differ from those in the last bits; they do not depend on how many sequences there are. Adapters in place are
    read at each step, so it follows what is written into their parameters. ValueError for a model or a way of running that
    `suits` refuses.
    """

    def __init__(
        self,
        model: KeyeVL2ForConditionalGeneration,
        cache: KeyeCache,
        branches: Branches | None = None,
    ) -> None:
        if not suits(model, cache, branches):
            raise ValueError("this model is not decoded from static buffers: use model.decode")
        self._cache, self._branches = cache, branches
        self._batch = cache.batch if branches is None else branches.count
        self._room = cache.capacity if branches is None else branches.length
        places = stages_of(model)
        self._stages = [
            _Stage(model, cache, branches, self._batch, *place, last=place is places[-1]) for place in places
        ]
        self._longest = 0
        self._logits: Tensor | None = None

    def begin(self, lengths: Sequence[int], positions: Sequence[int]) -> None:
        """Say where each sequence stands: how many tokens the cache holds of it, and its next token's position on all axes."""
        if len(lengths) != self._batch or len(positions) != self._batch:
            raise ValueError(f"{self._batch} sequences are decoded, not {len(lengths)}")
        for stage in self._stages:
            stage.counts.copy_(torch.tensor([lengths, positions]))
        self._longest = max(lengths)

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Feed one token to each sequence, int64 [B] on the device; returns the logits that follow, fp32 [B, vocabulary].

        Adds them to the sequences (ValueError when there is no room for one more); without branches the cache's own length
        counts them too. Never waits for the device. The result is overwritten by the next step.
        """
        if self._longest >= self._room:
            raise ValueError(f"the cache holds {self._room} tokens and is full")
        self._longest += 1
        state: tuple[Tensor, ...] = (token_ids,)
        for stage in self._stages:
            state = stage.step(state)
        if self._branches is None:
            self._cache.advance(1)
        (logits,) = state
        if len(self._stages) == 1:
            return logits
        if self._logits is None:
            self._logits = torch.empty_like(logits, device=token_ids.device)
        return self._logits.copy_(logits, non_blocking=True)


def stages_of(model: KeyeVL2ForConditionalGeneration) -> list[tuple[torch.device, range]]:
    """Which devices a token goes through, and the layers on each; the output head may be behind the last of them."""
    devices = [layer.input_layernorm.weight.device for layer in model.model.layers]
    stages, begin = [], 0
    for device, group in groupby(devices):
        end = begin + len(list(group))
        stages.append((device, range(begin, end)))
        begin = end
    head = model.model.norm.weight.device
    return stages if head == stages[-1][0] else [*stages, (head, range(begin, begin))]


class _Stage:
    """A step on one device: neighbouring layers, before the first of them the embedding, behind the last one the output head.

    What comes in is the tokens, or the stream x and what the last layer adds to it, each [B, D]; what goes out likewise, or the
    logits.
    """

    def __init__(
        self,
        model: KeyeVL2ForConditionalGeneration,
        cache: KeyeCache,
        branches: Branches | None,
        batch: int,
        device: torch.device,
        layers: range,
        *,
        last: bool,
    ) -> None:
        self._model, self._cache, self._branches = model, cache, branches
        self._device, self._layers, self._last = device, layers, last
        # Lengths and positions, counted together.
        self.counts = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self._lengths, self._positions = self.counts
        self._frequencies = model.model.frequencies(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, ...] | None = None
        self._made: tuple[Tensor, ...] = ()

    def step(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Take in what may come from another device, and compute; the result is overwritten by the next step."""
        if self._given is None:
            self._given = tuple(torch.empty_like(tensor, device=self._device) for tensor in given)
        for mine, theirs in zip(self._given, given, strict=True):
            mine.copy_(theirs, non_blocking=True)
        if self._device.type != "cuda":
            return self._run(self._given)
        if self._graph is None:
            self._capture(self._given)
        assert self._graph is not None
        self._graph.replay()
        return self._made

    def _capture(self, given: tuple[Tensor, ...]) -> None:
        """The first run compiles and picks algorithms; what it writes the replay writes again, so only its counts are undone."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(given)
                self.counts -= 1
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Its own stream would be that of the first device on which anything was ever captured.
            with torch.cuda.graph(self._graph, stream=stream):
                self._made = self._run(given)

    def _run(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The step itself, on the buffers."""
        decoder = self._model.model
        x: Tensor
        delta: Tensor | None
        if len(given) == 1:
            x, delta = decoder.embed_tokens(given[0]), None
        else:
            # The stream is added to in place, and what came in has to last for another run.
            x, delta = given[0].clone(), given[1]
        tables = dispatch.token_tables(self._positions, self._frequencies, x.dtype, "triton")
        for number in self._layers:
            layer: Any = decoder.layers[number]
            normed = _normed(x, delta, layer.input_layernorm)
            delta = self._attend(layer.self_attn, number, normed, tables)
            delta = _feed_forward(layer, _normed(x, delta, layer.post_attention_layernorm))
        self.counts += 1
        assert delta is not None
        if not self._last:
            return x, delta
        return (_linear(self._model.lm_head, _normed(x, delta, decoder.norm), torch.float32),)

    def _attend(
        self,
        attention: SparseAttention,
        layer: int,
        normed: Tensor,
        tables: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:
        """normed [B, D] → what attention adds, [B, D]; writes the new token's keys and values."""
        cache, branches = self._cache, self._branches
        k, v, index_k = cache.layer(layer)
        assert index_k is not None
        q, index_q, gates = attention.place(normed[:, None], tables, self._lengths, cache, branches)
        indices = dispatch.select_keys(
            index_q, gates, index_k, attention.top_k, None, self._lengths, "triton", branches, stepping=True
        )  # fmt: skip
        attended = dispatch.attended(q, k, v, indices, "triton", branches)
        return _linear(attention.o_proj, attended.flatten(1))


def _normed(x: Tensor, delta: Tensor | None, norm: RMSNorm) -> Tensor:
    return dispatch.add_norm(x, delta, norm.weight, norm.eps, "triton")


def _feed_forward(layer: DecoderLayer, normed: Tensor) -> Tensor:
    """normed [B, D] → what the layer's second half adds, [B, D]."""
    if isinstance(layer.mlp, SparseMoE):
        return layer.mlp.routed(normed, _linear(layer.mlp.gate, normed))
    return layer.mlp(normed)


def _linear(linear: nn.Module, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [B, K] → [B, N], with what an adapter adds; what is no plain linear layer (quantised weights) has a way of its own."""
    base, added = base_of(linear), added_to(linear)
    if type(base) is nn.Linear and base.bias is None:
        return dispatch.linear(x, base.weight, out_dtype, "triton", added)
    product = dispatch.add_low_rank(base(x), x, added, "triton")
    return product if out_dtype is None else product.to(out_dtype)


def decoder_for(
    model: KeyeVL2ForConditionalGeneration,
    cache: KeyeCache,
    made: StaticDecoder | None = None,
    branches: Branches | None = None,
) -> StaticDecoder | None:
    """The decoder `made` for this cache and these branches before, else a new one; None where `suits` refuses."""
    if not suits(model, cache, branches):
        return None
    return made or StaticDecoder(model, cache, branches)


def suits(model: KeyeVL2ForConditionalGeneration, cache: KeyeCache, branches: Branches | None = None) -> bool:
    """Whether a `StaticDecoder` can be made: the kernels compute, keys are selected, nobody watches, a few sequences at most."""
    layers = [layer.self_attn for layer in model.model.layers]
    sequences = cache.batch if branches is None else branches.count
    return (
        model.model.mode == "sparse"
        and sequences <= dispatch.DECODE_TOKENS
        and all(attention.observer is None and attention.can_join() for attention in layers)
        and dispatch.backend_of(cache.parts[0].k, layers[0].backend) == "triton"
    )
