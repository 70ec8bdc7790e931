"""What learns in each kind of training, and from which loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keyecli.engine.loaded import LoadedModel, load_weights, open_model
from keyecli.errors import UsageError
from keyecli.training.examples import lay_out_row
from keyecli.training.network import Network, Sight, entropies, freeze, loss_of, trained
from keyecli.training.packing import Pack, pack
from tests.compare import assert_close, assert_same
from tests.training.rows import text_row


@pytest.fixture
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_weights(open_model(tiny_checkpoint, device="cpu"))


def batch_of(loaded: LoadedModel, rows: int = 3) -> Pack:
    return pack([lay_out_row(loaded.tokenizer, loaded.config, text_row(n), ()) for n in range(rows)])


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (
            "full",
            ("q_proj", "experts", "embed_tokens", "lm_head"),
            ("sa_indexer", "mlp.gate", "visual", "mlp_AR"),
        ),
        (
            "full,router,vision",
            ("mlp.gate", "visual"),
            ("sa_indexer", "mlp_AR", "packing_position_embedding"),
        ),
        ("projector", ("mlp_AR",), ("visual", "q_proj", "experts", "lm_head")),
        ("indexer", ("sa_indexer",), ("self_attn.q_proj", "mlp_AR", "experts", "mlp.gate")),
        ("sparse", ("sa_indexer", "self_attn.q_proj", "experts"), ("mlp.gate", "visual", "mlp_AR")),
        ("sparse,projector", ("sa_indexer", "mlp_AR"), ("mlp.gate", "visual")),
    ],
)
def test_what_is_named_learns(
    text: str, inside: tuple[str, ...], outside: tuple[str, ...], loaded: LoadedModel
) -> None:
    freeze(loaded.model, trained(text))
    learning = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    for part in inside:
        assert any(part in name for name in learning), part
    for part in outside:
        assert not any(part in name for name in learning), part


@pytest.mark.parametrize(
    "text", ["", "everything", "full,sparse", "router", "vision", "indexer,projector", "lora,full"]
)
def test_what_cannot_be_asked_for(text: str) -> None:
    with pytest.raises(UsageError):
        trained(text)


def test_each_loss_reaches_its_own_parameters(loaded: LoadedModel) -> None:
    """With both losses: the answers' gradient of the indexer is exactly zero, and the indexer's of everything else."""
    freeze(loaded.model, trained("sparse"))
    network = Network(loaded.model, trained("sparse")).train()
    sums = network(batch_of(loaded), Sight())
    assert sums.divergence is not None
    learning = network.learning()
    for loss, own in ((sums.entropies.sum(), False), (sums.divergence, True)):
        found = torch.autograd.grad(loss, list(learning.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(learning, found, strict=True):
            if ("sa_indexer" in name) is own:
                assert gradient is not None, name
                assert gradient.any(), name
            else:
                assert gradient is None or not gradient.any(), name


def test_warm_up_attends_to_everything(loaded: LoadedModel) -> None:
    """The teacher is dense attention: what the network computes does not depend on the indexer."""
    freeze(loaded.model, trained("indexer"))
    network = Network(loaded.model, trained("indexer")).train()
    batch = batch_of(loaded, 6)
    seen = []
    loaded.model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    first = network(batch, Sight())
    with torch.no_grad():
        for name, parameter in network.learning().items():
            if name.endswith("q_proj.weight"):
                parameter.mul_(-1)
    second = network(batch, Sight())
    assert first.divergence is not None
    assert second.divergence is not None
    assert not torch.equal(first.divergence, second.divergence)
    assert_same(seen[0], seen[1])
    assert len(first.entropies) == 0


def test_the_loss_is_shared_by_all_supervised_tokens(loaded: LoadedModel) -> None:
    freeze(loaded.model, trained("full"))
    network = Network(loaded.model, trained("full"))
    batch = batch_of(loaded)
    sums = network(batch, Sight())
    assert len(sums.entropies) == batch.learnt_tokens
    logits = loaded.model(batch.input_ids[:, batch.rows[0] == 0]).logits[0]
    targets = batch.targets[0, batch.rows[0] == 0]
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    assert_close(sums.entropies[sums.rows == 0].sum(), expected, relative=1e-5)
    assert_close(loss_of(sums, 1000.0, 1.0, 1), sums.entropies.sum() / 1000, relative=1e-6)


def test_entropies_do_not_depend_on_their_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 8, generator=generator, requires_grad=True)
    head = torch.randn(20, 8, generator=generator)
    targets = torch.randint(20, (9,), generator=generator)
    whole = entropies(lambda part: part @ head.t(), states, targets)
    (expected,) = torch.autograd.grad(whole.sum(), states)
    monkeypatch.setattr("keyecli.training.network.LOSS_CHUNK_TOKENS", 4)
    parts = entropies(lambda part: part @ head.t(), states, targets)
    assert_close(parts, whole, relative=1e-6)
    assert_close(torch.autograd.grad(parts.sum(), states)[0], expected, relative=1e-6)


def test_the_load_of_the_fullest_expert(loaded: LoadedModel) -> None:
    freeze(loaded.model, trained("full"))
    network = Network(loaded.model, trained("full"))
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.mlp.gate.weight.zero_()
        network(batch_of(loaded), Sight())
    # Of equal logits the first two of four experts are chosen always: twice an even load.
    assert network.fullest_expert() == pytest.approx(2.0)
