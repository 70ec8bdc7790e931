"""A cache whose keys and values are FP8: what attention reads is what is stored, however a sequence is cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from keyecli.kernels import reference
from keyecli.kernels.reference import Branches
from keyecli.model.attention import AttentionMode
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests.compare import assert_close, assert_same
from tests.model.test_decoding import TOKENS, model_of, sequence

FP8 = torch.float8_e4m3fn


def new_cache(model: KeyeVL2ForConditionalGeneration, tokens: int = TOKENS) -> KeyeCache:
    """Not a number everywhere: what has not been written must not be read."""
    cache = KeyeCache(model.config, tokens, dtype=model.lm_head.weight.dtype, kv_dtype=FP8)
    for buffer in (cache.k, cache.v, cache.index_k):
        if buffer is not None:
            buffer.fill_(float("nan"))
    return cache


def feed(
    model: KeyeVL2ForConditionalGeneration,
    cache: KeyeCache,
    embeds: Tensor,
    positions: Tensor,
    cuts: list[int],
) -> Tensor:
    """The sequence in pieces that end at `cuts`; the hidden states of all."""
    parts = []
    for begin, end in itertools.pairwise([cache.length, *cuts]):
        parts.append(model.decode(embeds[:, begin:end], positions[:, :, begin:end], cache))
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"sa_config": None}], ids=["sparse", "no-indexer"])
def test_however_a_sequence_is_cut_attention_sees_the_same(changes: dict[str, Any]) -> None:
    """In fp64, where sums in another order do not end on another side of the middle between two FP8 numbers."""
    model = model_of({"num_experts": None, **changes})
    embeds, positions = sequence(model)
    model, embeds = model.double(), embeds.double()
    whole = new_cache(model)
    expected = feed(model, whole, embeds, positions, [TOKENS])
    for chunk in (1, 3, 8, 17, 31):
        cache = new_cache(model)
        actual = feed(model, cache, embeds, positions, [*range(chunk, TOKENS, chunk), TOKENS])
        assert_close(actual, expected, relative=1e-12, absolute=1e-12, what=f"chunks of {chunk}")
        for name in ("k", "v"):
            held = [getattr(one, name).view(torch.uint8) for one in (cache, whole)]
            assert_same(*held, what=f"{name}, chunks of {chunk}")


@torch.no_grad()
def test_the_first_chunk_attends_to_what_it_has_stored() -> None:
    """A cache of the model's type, rounded to FP8 as it is written, gives the same: with all keys visible, and selected."""
    model = model_of()
    embeds, positions = sequence(model)
    expected = feed(model, new_cache(model), embeds, positions, [6, TOKENS])
    exact = model.decode(embeds, positions)
    rounded = KeyeCache(model.config, TOKENS)
    append = rounded.append

    def append_rounded(layer: int, k: Tensor, v: Tensor, index_k: Tensor | None) -> Any:
        return append(layer, reference.stored(k, FP8).float(), reference.stored(v, FP8).float(), index_k)

    rounded.append = append_rounded  # type: ignore[method-assign]
    assert_close(feed(model, rounded, embeds, positions, [6, TOKENS]), expected)
    assert float((expected - exact).abs().max()) > 1e-3


@torch.no_grad()
def test_all_attended_to_it_stays_near_the_exact_one() -> None:
    """Everything selected, for a choice of keys is not continuous in what later layers see."""
    model = model_of({"sa_config": {**model_of().config.sa_config, "topk": 64}})
    embeds, positions = sequence(model)
    actual = feed(model, new_cache(model), embeds, positions, [30, TOKENS])
    assert_close(actual, model.decode(embeds, positions), relative=0.1, cosine=2e-3)


@torch.no_grad()
def test_indexer_keys_stay_of_the_model_s_type() -> None:
    model = model_of()
    embeds, positions = sequence(model)
    cache, other = new_cache(model), KeyeCache(model.config, TOKENS)
    for one in (cache, other):
        feed(model, one, embeds, positions, [TOKENS])
    assert cache.k.dtype == cache.v.dtype == FP8
    assert cache.index_k is not None
    assert other.index_k is not None
    assert_same(cache.index_k[0], other.index_k[0], what="indexer keys of the first layer")
    assert_same(cache.k[0].float(), reference.stored(other.k[0], FP8).float(), what="keys of the first layer")


@torch.no_grad()
def test_branches_copies_and_forgetting_keep_the_bytes() -> None:
    model = model_of()
    embeds, positions = sequence(model)
    branches = Branches(shared=40, room=5, count=3)
    cache = new_cache(model, branches.rows)
    feed(model, cache, embeds, positions, [40, 43])
    for branch in (2, 1, 0):
        cache.copy_to_branch(branches, branch, 43)
    for buffer in (cache.k, cache.v):
        bytes_of = buffer.view(torch.uint8)
        for branch in (1, 2):
            moved = slice(40 + 5 * branch, 43 + 5 * branch)
            assert_same(bytes_of[:, :, moved], bytes_of[:, :, 40:43], what=f"branch {branch}")
    before = cache.k.view(torch.uint8)[:, :, :43].clone()
    cache.truncate(40)
    feed(model, cache, embeds, positions, [43])
    assert_same(cache.k.view(torch.uint8)[:, :, :43], before)


class Converted(TorchDispatchMode):
    """Remembers the most values that were converted from FP8 at once."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        stored = any(isinstance(x, Tensor) and x.dtype == FP8 for x in args)
        if stored and isinstance(result, Tensor) and result.dtype == torch.float32:
            self.values = max(self.values, result.numel())
        return result


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_no_whole_converted_copy_of_a_long_cache(mode: AttentionMode) -> None:
    model = model_of()
    model.model.mode = mode
    tokens = 300
    cache = new_cache(model, tokens + 1)
    embeds = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(0))
    places = torch.arange(tokens).expand(3, 1, tokens)
    feed(model, cache, embeds, places, [100, 200, 300])
    with Converted() as converted:
        model.decode(embeds[:, :1], places[:, :, :1] + tokens, cache)
    assert 0 < converted.values < cache.k[0].numel()
