"""What training needs of the network: gradients, checkpointing, loss, the indexer's own loss, packed documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keyecli.kernels import reference
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from tests.compare import assert_close
from tests.model.test_trunk import direct, text
from tests.tiny import TOKEN_IDS, random_tensors, tiny_config

# transformers renames these methods from 5.23 on; the older names work in every version that is supported.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

PAD = TOKEN_IDS["<|video_pad|>"]


def fresh(**changes: Any) -> KeyeVL2ForConditionalGeneration:
    config = tiny_config(**changes)
    return direct(config, random_tensors(config, seed=2))


def gradients(model: KeyeVL2ForConditionalGeneration, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def video_batch() -> dict[str, Any]:
    """Two rows of 30 tokens, each with two frames of 2 × 2 merged tokens."""
    ids = text(2, 30)
    ids[:, 3:7], ids[:, 10:14] = PAD, PAD
    patches = torch.randn(4 * 16, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :16] = -100
    return {"input_ids": ids, "pixel_values": patches, "grids": [(4, 4)] * 4, "labels": labels}


def test_the_loss_is_the_mean_cross_entropy_of_the_next_supervised_token() -> None:
    model, batch = fresh(), video_batch()
    labels = batch.pop("labels")
    logits = model(**batch).logits
    assert logits.dtype == torch.float32
    expected = []
    for row in range(2):
        for token in range(29):
            if labels[row, token + 1] != -100:
                expected.append(-logits[row, token].log_softmax(-1)[labels[row, token + 1]])
    assert len(expected) == 28
    loss = model(**batch, labels=labels).loss
    assert_close(loss, torch.stack(expected).mean(), relative=1e-5)


def test_a_batch_without_a_supervised_token_has_loss_zero() -> None:
    batch = video_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert fresh()(**batch).loss.item() == 0.0


def test_the_loss_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    labels = text(2, 9)
    labels[0, :3] = -100
    whole = model.next_token_loss(hidden, labels)
    monkeypatch.setattr("keyecli.model.keye.LOSS_CHUNK_TOKENS", 4)
    assert_close(model.next_token_loss(hidden, labels), whole, relative=1e-6)


@pytest.mark.parametrize("crossover", [0, 10**9], ids=["gather", "mask"])
@pytest.mark.parametrize("changes", [{}, {"num_experts": None, "sa_config": None}], ids=["moe", "dense"])
def test_gradient_checkpointing_gives_the_same_gradients(
    changes: dict[str, Any], crossover: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "GATHER_CROSSOVER", crossover)
    model = fresh(**changes).train()
    plain = gradients(model, model(**video_batch()).loss)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again = gradients(model, model(**video_batch()).loss)
    model.gradient_checkpointing_disable()
    for name, gradient in plain.items():
        assert (gradient is None) == (again[name] is None), name
        if gradient is not None:
            assert_close(again[name], gradient, relative=1e-5, what=name)


def test_gradient_checkpointing_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection runs once more in the backward pass, so activations were not kept."""
    calls: list[int] = []
    original = reference.select_top_k

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(reference, "select_top_k", counted)
    model = fresh().train()
    model(**video_batch()).loss.backward()
    once = len(calls)
    assert once > 0
    model.gradient_checkpointing_enable()
    calls.clear()
    model(**video_batch()).loss.backward()
    assert len(calls) >= 2 * once


def is_indexer(name: str) -> bool:
    return "sa_indexer" in name


def test_the_next_token_loss_never_reaches_the_indexer_and_reaches_all_else() -> None:
    model = fresh().train()
    found = gradients(model, model(**video_batch()).loss)
    unused = "visual.vision_model.embeddings.packing_position_embedding.weight"
    for name, gradient in found.items():
        norm = 0.0 if gradient is None else float(gradient.abs().sum())
        if is_indexer(name) or name == unused:
            assert norm == 0.0, name
        else:
            assert norm > 0.0, name


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_indexers_loss_reaches_the_indexer_and_nothing_else(mode: Any, checkpointing: bool) -> None:
    model = fresh().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = text(2, 30)
    embeds = model.embed(ids)
    model.model.mode = mode
    _, divergence = model.model(embeds, torch.arange(30).expand(3, 2, 30), teach_indexer=True)
    assert divergence is not None
    assert divergence.shape == (2, 30)
    assert bool((divergence >= -1e-5).all())
    found = gradients(model, divergence.sum())
    for name, gradient in found.items():
        norm = 0.0 if gradient is None else float(gradient.abs().sum())
        if is_indexer(name):
            assert norm > 0.0, name
        else:
            assert norm == 0.0, name


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_teaching_does_not_change_the_output(mode: Any) -> None:
    model = fresh()
    embeds, positions = model.embed(text(2, 30)), torch.arange(30).expand(3, 2, 30)
    model.model.mode = mode
    plain, nothing = model.model(embeds, positions)
    taught, _ = model.model(embeds, positions, teach_indexer=True)
    assert nothing is None
    assert_close(taught, plain)


@torch.no_grad()
def test_dense_mode_is_the_model_without_a_selection() -> None:
    model, wide = fresh(), fresh(sa_config={**tiny_config()["sa_config"], "topk": 64})
    embeds, positions = model.embed(text(2, 30)), torch.arange(30).expand(3, 2, 30)
    sparse = model.model(embeds, positions)[0]
    model.model.mode = "dense"
    dense = model.model(embeds, positions)[0]
    assert_close(dense, wide.model(embeds, positions)[0])
    assert float((dense - sparse).abs().max()) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_packed_documents_equal_the_documents_alone(mode: Any) -> None:
    """Segments 1, 2, 3 and padding between them; every document longer and shorter than the selection."""
    model = fresh()
    model.model.mode = mode
    documents = [text(1, count, seed=count) for count in (21, 5, 13)]
    ids, positions, segments = [], [], []
    for number, document in enumerate(documents, start=1):
        count = document.shape[1]
        ids += [document, torch.zeros(1, 2, dtype=torch.long)]
        positions += [torch.arange(count), torch.zeros(2, dtype=torch.long)]
        segments += [number] * count + [-1] * 2
    row_ids, row_positions = torch.cat(ids, dim=1), torch.cat(positions)
    packed, _ = model.model(
        model.embed(row_ids), row_positions.expand(3, 1, -1), segments=torch.tensor([segments])
    )
    for number, document in enumerate(documents, start=1):
        own = torch.tensor(segments) == number
        count = document.shape[1]
        alone, _ = model.model(model.embed(document), torch.arange(count).expand(3, 1, -1))
        assert_close(packed[:, own], alone, what=f"document {number}")


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("prefix", [4, 19], ids=["shorter than topk", "longer than topk"])
@pytest.mark.parametrize("declared", [False, True])
def test_answers_that_share_a_prefix_equal_each_one_alone(mode: Any, prefix: int, declared: bool) -> None:
    """Segment 0 and its padding, then several continuations; `shared_prefix` is a promise, not another meaning."""
    model = fresh()
    model.model.mode = mode
    shared, answers = text(1, prefix, seed=1), [text(1, count, seed=count) for count in (6, 11)]
    pad = torch.zeros(1, 3, dtype=torch.long)
    row = torch.cat([shared, pad, *answers], dim=1)
    segments = [0] * prefix + [-1] * 3 + [1] * 6 + [2] * 11
    positions = torch.cat([torch.arange(prefix + 3), *(prefix + torch.arange(count) for count in (6, 11))])
    packed, _ = model.model(
        model.embed(row),
        positions.expand(3, 1, -1),
        segments=torch.tensor([segments]),
        shared_prefix=prefix + 3 if declared else 0,
    )
    for number, answer in enumerate(answers, start=1):
        alone_ids = torch.cat((shared, answer), dim=1)
        count = alone_ids.shape[1]
        alone, _ = model.model(model.embed(alone_ids), torch.arange(count).expand(3, 1, -1))
        own = torch.tensor(segments) == number
        assert_close(packed[:, own], alone[:, prefix:], what=f"answer {number}")
        assert_close(packed[:, :prefix], alone[:, :prefix], what="prefix")
