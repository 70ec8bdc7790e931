"""The cache: any way of cutting a sequence gives what one pass over all of it gives."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from keyecli.kernels import reference
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.prompt import multimodal_positions
from tests.compare import assert_close, assert_same
from tests.model.test_trunk import direct, text
from tests.tiny import TOKEN_IDS, random_tensors, tiny_config

PAD = TOKEN_IDS["<|video_pad|>"]
GRIDS = [(2, 3), (2, 2), (2, 3)]
TOKENS = 47
VARIANTS = [{}, {"num_experts": None}, {"sa_config": None}]
NAMES = ["moe", "dense-mlp", "no-indexer"]


def model_of(changes: dict[str, Any] | None = None) -> KeyeVL2ForConditionalGeneration:
    config = tiny_config(**(changes or {}))
    return direct(config, random_tensors(config, seed=4))


def sequence(model: KeyeVL2ForConditionalGeneration) -> tuple[Tensor, Tensor]:
    """Embeddings [1, T, D] and positions [3, 1, T] of text with three frames in it."""
    ids: list[int] = []
    words = iter(text(1, 200)[0].tolist())
    for rows, columns in GRIDS:
        ids += [next(words) for _ in range(5)] + [PAD] * (rows * columns)
    ids += [next(words) for _ in range(TOKENS - len(ids))]
    positions, _ = multimodal_positions(np.array(ids), GRIDS, (PAD,))
    patches = torch.randn(
        4 * sum(r * c for r, c in GRIDS), 3, 14, 14, generator=torch.Generator().manual_seed(1)
    )
    visual = model.encode_frames(patches, [(2 * r, 2 * c) for r, c in GRIDS])
    return model.embed(torch.tensor([ids]), visual), torch.from_numpy(positions)[:, None]


def in_pieces(
    model: KeyeVL2ForConditionalGeneration, embeds: Tensor, positions: Tensor, cuts: list[int]
) -> Tensor:
    cache = KeyeCache(model.config, embeds.shape[1], embeds.shape[0])
    # What has not been written must not be read.
    for buffer in (cache.k, cache.v, cache.index_k):
        if buffer is not None:
            buffer.fill_(float("nan"))
    edges = [0, *cuts, embeds.shape[1]]
    parts = []
    for begin, end in itertools.pairwise(edges):
        assert cache.length == begin
        parts.append(model.decode(embeds[:, begin:end], positions[:, :, begin:end], cache))
    assert cache.length == embeds.shape[1]
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
@pytest.mark.parametrize("crossover", [0, 10**9], ids=["gather", "mask"])
def test_token_by_token_equals_one_pass(
    changes: dict[str, Any], crossover: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "GATHER_CROSSOVER", crossover)
    model = model_of(changes)
    embeds, positions = sequence(model)
    whole = model.decode(embeds, positions)
    assert_close(in_pieces(model, embeds, positions, list(range(1, TOKENS))), whole, what="hidden states")


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
@pytest.mark.parametrize("chunk", [2, 3, 7, 8, 9, 15, 16, 17, 31, 46, 47])
def test_chunked_prefill_equals_one_shot(changes: dict[str, Any], chunk: int) -> None:
    model = model_of(changes)
    embeds, positions = sequence(model)
    cuts = list(range(chunk, TOKENS, chunk))
    assert_close(
        in_pieces(model, embeds, positions, cuts), model.decode(embeds, positions), what=f"chunks of {chunk}"
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the most values that any operation's result held."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.numel() > self.values:
                self.values, self.operation = tensor.numel(), f"{func} {list(tensor.shape)}"
        return result


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("crossover", [0, 10**9], ids=["gather", "mask"])
@pytest.mark.parametrize("cached", [False, True])
def test_nothing_grows_with_the_square_of_the_length(
    mode: Any, crossover: int, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "GATHER_CROSSOVER", crossover)
    model = model_of()
    model.model.mode = mode
    largest = {}
    for tokens in (600, 1200):
        embeds = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(0))
        cache = KeyeCache(model.config, tokens) if cached else None
        with LargestTensor() as seen:
            model.decode(embeds, torch.arange(tokens).expand(3, 1, tokens), cache)
        assert seen.values < tokens * tokens, seen.operation
        largest[tokens] = seen.values
    assert largest[1200] <= 2 * largest[600], "twice the length, at most twice the largest tensor"


@torch.no_grad()
def test_bf16_stays_near_fp32() -> None:
    """Everything selected, for a choice of keys is not continuous in them."""
    changes = {"sa_config": {**tiny_config()["sa_config"], "topk": 64}}
    model = model_of(changes)
    embeds, positions = sequence(model)
    exact = model.decode(embeds, positions)
    model.to(torch.bfloat16)
    cache = KeyeCache(model.config, TOKENS, dtype=torch.bfloat16)
    parts = [
        model.decode(embeds[:, cut].bfloat16(), positions[:, :, cut], cache)
        for cut in (slice(0, 30), slice(30, TOKENS))
    ]
    rounded = torch.cat(parts, dim=1)
    assert rounded.dtype == torch.bfloat16
    assert_close(rounded, exact, relative=0.1, cosine=2e-3)
    assert model.logits(rounded).dtype == torch.float32


@torch.no_grad()
def test_uneven_chunks_then_single_tokens() -> None:
    model = model_of()
    embeds, positions = sequence(model)
    cuts = [1, 6, 7, 24, 40, 41, 42, 43, 44, 45, 46]
    assert_close(in_pieces(model, embeds, positions, cuts), model.decode(embeds, positions))


@torch.no_grad()
def test_a_batch_through_the_cache() -> None:
    model = model_of()
    embeds, positions = sequence(model)
    other = model.embed(text(1, TOKENS, seed=8))
    batch = torch.cat((embeds, other))
    both = torch.cat((positions, torch.arange(TOKENS).expand(3, 1, TOKENS)), dim=1)
    pieces = in_pieces(model, batch, both, [20, 33, 34])
    assert_close(pieces[:1], model.decode(embeds, positions))
    assert_close(pieces[1:], model.decode(other, both[:, 1:]))


@torch.no_grad()
def test_truncating_takes_back_what_followed() -> None:
    model = model_of()
    embeds, positions = sequence(model)
    wrong = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(2))
    cache = KeyeCache(model.config, 60)
    model.decode(embeds[:, :30], positions[:, :, :30], cache)
    model.decode(wrong, positions[:, :, 30:40], cache)
    cache.truncate(30)
    assert cache.length == 30
    rest = model.decode(embeds[:, 30:], positions[:, :, 30:], cache)
    assert_close(rest, model.decode(embeds, positions)[:, 30:])
    with pytest.raises(ValueError, match="48"):
        cache.truncate(48)


@torch.no_grad()
def test_a_full_cache_says_so() -> None:
    model = model_of()
    embeds, positions = sequence(model)
    cache = KeyeCache(model.config, 10)
    with pytest.raises(ValueError, match="10"):
        model.decode(embeds[:, :11], positions[:, :, :11], cache)


@torch.no_grad()
def test_the_frames_matter() -> None:
    """Without this the sequence above could be text only."""
    model = model_of()
    embeds, positions = sequence(model)
    before = model.decode(embeds, positions)
    embeds[:, 5] += 1
    after = model.decode(embeds, positions)
    assert_same(after[:, :5], before[:, :5])
    assert float((after[:, 5:] - before[:, 5:]).abs().max()) > 0.01


def test_embed_puts_visual_tokens_in_order_and_counts_them() -> None:
    model = model_of()
    ids = torch.tensor([[1, PAD, 2], [TOKEN_IDS["<|image_pad|>"], PAD, 3]])
    visual = torch.arange(3.0)[:, None].expand(3, 64)
    embeds = model.embed(ids, visual)
    for place, value in (((0, 1), 0.0), ((1, 0), 1.0), ((1, 1), 2.0)):
        assert_same(embeds[place].detach(), torch.full((64,), value), what=f"token {place}")
    table = model.model.embed_tokens.weight
    assert_same(embeds[0, 0].detach(), table[1].detach())
    for given in (None, visual[:2], torch.cat((visual, visual))):
        with pytest.raises(ValueError, match="3 visual placeholders"):
            model.embed(ids, given)
