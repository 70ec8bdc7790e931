"""Decoding from static buffers: its kernels against their definitions, its steps (on a GPU a graph) against `model.decode`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keyecli.engine.generate import GenerationSettings, generate
from keyecli.engine.static import StaticDecoder, suits
from keyecli.kernels import reference, step
from keyecli.kernels.reference import Branches, StepShape
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, poisoned
from tests.model.test_training import fresh
from tests.model.test_trunk import text

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = (StepShape(4, 2, 32, 2, 16, 1e-6, 1e-6), StepShape(8, 1, 16, 3, 64, 1e-5, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100])
def test_residual_and_norm(width: int, dtype: torch.dtype) -> None:
    x, delta = torch.randn(2, 3, width, device=DEVICE).to(dtype)
    weight = (1 + 0.2 * torch.randn(width, device=DEVICE)).to(dtype)
    for added in (None, delta):
        mine, theirs = x.clone(), x.clone()
        with poisoned():
            normed = step.add_norm(mine, added, weight, 1e-6)
        expected = reference.add_norm(theirs, added, weight, 1e-6)
        assert_same(mine, theirs, what="residual")
        assert_close(normed, expected, relative=TOLERANCE[dtype], cosine=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_text_tokens(dtype: torch.dtype) -> None:
    """The definition is the model's own tables for three equal positions."""
    decoder = fresh().model.to(DEVICE)
    positions = torch.tensor([0, 7, 262_143], device=DEVICE)
    actual = step.token_tables(positions, decoder.frequencies(positions.device), dtype)
    expected = reference.token_tables(positions, decoder.frequencies(positions.device), dtype)
    axes = positions[:, None].expand(3, -1, 1)
    own = (
        *decoder._tables(axes, decoder.config.head_dim, dtype),
        *(decoder._index_tables(axes, dtype) or ()),
    )
    for name, mine, defined, model in zip(
        ("cos", "sin", "index cos", "index sin"), actual, expected, own, strict=True
    ):
        assert_same(defined, model, what=name)
        assert_close(mine, defined, relative=TOLERANCE[dtype], cosine=1e-5, what=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_projections_find_their_places(shape: StepShape, dtype: torch.dtype) -> None:
    """Three tokens each, rows of a wider matrix, another place for each sequence; nothing else in the caches changes."""
    width = (
        (shape.heads + 2 * shape.groups) * shape.dim
        + shape.index_heads * (shape.index_dim + 1)
        + shape.index_dim
    )
    projected = torch.randn(2, 3, width + 5, device=DEVICE).to(dtype)[..., :width]
    angles, index_angles = (
        torch.randn(2, 3, shape.dim // 2, device=DEVICE),
        torch.randn(2, 3, shape.index_dim // 2, device=DEVICE),
    )
    tables = tuple(
        turn(x).repeat(1, 1, 2).to(dtype) for x in (angles, index_angles) for turn in (torch.cos, torch.sin)
    )
    dims = (shape.dim, shape.dim, shape.index_dim, shape.index_dim, shape.index_dim)
    norms = tuple((1 + 0.2 * torch.randn(dim, device=DEVICE)).to(dtype) for dim in dims)
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=DEVICE)
    caches = [
        tuple(
            torch.full((2, 6, *rest), float("nan"), dtype=dtype, device=DEVICE)
            for rest in ((shape.groups, shape.dim), (shape.groups, shape.dim), (shape.index_dim,))
        )
        for _ in range(2)
    ]
    with poisoned():
        mine = step.place_projections(projected, tables, lengths, norms, caches[0], shape)
    theirs = reference.place_projections(projected, tables, lengths, norms, caches[1], shape)
    for name, actual, expected in zip(
        ("q", "index q", "gates", "k", "v", "index k"),
        (*mine, *caches[0]),
        (*theirs, *caches[1]),
        strict=True,
    ):
        assert_close(actual, expected, relative=TOLERANCE[dtype], cosine=1e-5, what=name)


def prefilled(batch: int, tokens: int) -> tuple[KeyeVL2ForConditionalGeneration, KeyeCache]:
    model = fresh(num_hidden_layers=2 if CUDA else 1).to(DEVICE)
    cache = KeyeCache(model.config, tokens + 6, batch=batch, device=DEVICE)
    for buffer in (cache.k, cache.v, cache.index_k):
        assert buffer is not None
        buffer.fill_(float("nan"))
    positions = torch.arange(tokens, device=DEVICE).expand(3, batch, tokens)
    with torch.no_grad():
        model.decode(model.embed(text(batch, tokens).to(DEVICE)), positions, cache)
    model.set_kernel_backend("triton")
    return model, cache


def eager(model: KeyeVL2ForConditionalGeneration, cache: KeyeCache, ids: list[int], position: int) -> Tensor:
    embeds = model.embed(torch.tensor(ids, device=DEVICE)[:, None])
    positions = torch.full((3, len(ids), 1), position, device=DEVICE)
    with torch.no_grad():
        return model.logits(model.decode(embeds, positions, cache))[:, 0]


@pytest.mark.parametrize("tokens", [4, 12])
def test_steps_are_those_of_the_model(tokens: int) -> None:
    """Before and behind the length from which keys are selected (8), two sequences at once."""
    model, cache = prefilled(2, tokens)
    model.set_kernel_backend("reference")
    other = KeyeCache(model.config, tokens + 6, batch=2, device=DEVICE)
    other.k[:, :, :tokens], other.v[:, :, :tokens] = cache.k[:, :, :tokens], cache.v[:, :, :tokens]
    assert cache.index_k is not None
    assert other.index_k is not None
    other.index_k[:, :, :tokens] = cache.index_k[:, :, :tokens]
    other.advance(tokens)
    steps = [[5, 77], [200, 9], [1, 1]]
    expected = [eager(model, other, ids, tokens + n) for n, ids in enumerate(steps)]
    model.set_kernel_backend("triton")
    static = StaticDecoder(model, cache)
    static.begin([tokens, tokens], [tokens, tokens])
    for ids, logits in zip(steps, expected, strict=True):
        assert_close(static.step(torch.tensor(ids, device=DEVICE)), logits)
    assert cache.length == tokens + 3
    assert_close(cache.k[:, :, : tokens + 3], other.k[:, :, : tokens + 3])
    static.begin([cache.capacity, 0], [0, 0])
    with pytest.raises(ValueError, match="full"):
        static.step(torch.tensor([1, 1], device=DEVICE))
    with pytest.raises(ValueError, match="2 sequences"):
        static.begin([1], [1])


def test_branches_are_the_sequences_that_they_would_be_alone() -> None:
    """Three branches of different lengths behind 7 shared tokens give the bits of each alone in a cache of its own."""
    shared, room = 7, 6
    own = (2, 1, 3)
    model = fresh(num_hidden_layers=2 if CUDA else 1).to(DEVICE)
    model.set_kernel_backend("reference")
    branches = Branches(shared, room, len(own))
    cache = KeyeCache(model.config, branches.rows, device=DEVICE)
    for buffer in (cache.k, cache.v, cache.index_k):
        assert buffer is not None
        buffer.fill_(float("nan"))
    first = text(1, shared)
    rests = [
        text(1, shared + sum(own))[:, shared + sum(own[:b]) : shared + sum(own[: b + 1])] for b in range(3)
    ]

    def feed(into: KeyeCache, ids: Tensor) -> None:
        positions = torch.arange(into.length, into.length + ids.shape[1], device=DEVICE).expand(3, 1, -1)
        with torch.no_grad():
            model.decode(model.embed(ids.to(DEVICE)), positions, into)

    feed(cache, first)
    for b in reversed(range(len(own))):
        cache.truncate(shared)
        feed(cache, rests[b])
        cache.copy_to_branch(branches, b, cache.length)
    model.set_kernel_backend("triton")
    lengths = [shared + tokens for tokens in own]
    together = StaticDecoder(model, cache, branches)
    together.begin(lengths, lengths)
    steps = torch.tensor([[5, 9, 77], [200, 1, 3]], device=DEVICE)
    logits = [together.step(ids).clone() for ids in steps]
    for b, rest in enumerate(rests):
        model.set_kernel_backend("reference")
        single = KeyeCache(model.config, branches.length, device=DEVICE)
        feed(single, first)
        feed(single, rest)
        model.set_kernel_backend("triton")
        alone = StaticDecoder(model, single)
        alone.begin([lengths[b]], [lengths[b]])
        for ids, expected in zip(steps, logits, strict=True):
            assert_same(alone.step(ids[b : b + 1])[0], expected[b], what=f"branch {b}")
    # Nor does the size of the buffer matter, though one of them has fewer rows than are selected.
    model.set_kernel_backend("reference")
    roomy = KeyeCache(model.config, 4 * branches.rows, device=DEVICE)
    feed(roomy, first)
    feed(roomy, rests[0])
    model.set_kernel_backend("triton")
    alone = StaticDecoder(model, roomy)
    alone.begin(lengths[:1], lengths[:1])
    for ids, expected in zip(steps, logits, strict=True):
        assert_same(alone.step(ids[:1])[0], expected[0], what="in a larger buffer")
    with pytest.raises(ValueError, match="no room"):
        cache.copy_to_branch(branches, 1, shared + room + 1)


def test_joined_projections_are_the_parameters_and_follow_them() -> None:
    attention = fresh().model.layers[0].self_attn
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    joint = attention.joint_projection()
    assert attention.joint_projection() is joint
    for name, value in attention.state_dict().items():
        assert_same(value, before[name], what=name)
    with torch.no_grad():
        attention.k_proj.weight.add_(1)
    rows = slice(attention.heads * attention.dim, (attention.heads + attention.groups) * attention.dim)
    assert_same(joint[rows], attention.k_proj.weight)
    attention.q_proj.weight.data = attention.q_proj.weight.data.clone() * 2
    fresh_joint = attention.joint_projection()
    assert fresh_joint is not joint
    assert_same(fresh_joint[: rows.start], attention.q_proj.weight)


def test_who_is_refused() -> None:
    model, cache = prefilled(1, 4)
    assert suits(model, cache)
    model.set_kernel_backend("reference")
    assert not suits(model, cache)
    with pytest.raises(ValueError, match=r"model\.decode"):
        StaticDecoder(model, cache)
    model.set_kernel_backend("triton")
    model.model.mode = "dense"
    assert not suits(model, cache)
    model.model.mode = "sparse"
    attention = model.model.layers[0].self_attn
    attention.observer = lambda *arguments: None
    assert not suits(model, cache)
    attention.observer = None
    attention.k_proj = torch.nn.Sequential(attention.k_proj)  # as an adapter stands around it
    assert not suits(model, cache)


def test_generated_tokens_are_the_same(tiny_tokenizer: Any) -> None:
    """Greedy decoding by the kernels and by the definitions."""
    model = fresh(num_hidden_layers=2 if CUDA else 1).to(DEVICE)
    settings = GenerationSettings(max_tokens=3)
    answers = []
    for backend in ("reference", "triton"):
        model.set_kernel_backend(backend)
        cache = KeyeCache(model.config, 24, device=DEVICE)
        positions = torch.arange(12, device=DEVICE).expand(3, 1, 12)
        with torch.inference_mode():
            hidden = model.decode(model.embed(text(1, 12).to(DEVICE)), positions, cache)[:, -1:]
        answers.append(generate(model, tiny_tokenizer, cache, hidden, 12, settings, stop_ids=()).token_ids)
    # Again from the same place, with a decoder that has answered before.
    static = StaticDecoder(model, cache)
    for _ in range(2):
        cache.truncate(12)
        again = generate(model, tiny_tokenizer, cache, hidden, 12, settings, stop_ids=(), static=static)
        answers.append(again.token_ids)
    assert answers == [answers[0]] * 4
    assert len(answers[0]) == 3
