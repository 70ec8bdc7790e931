"""Adapters in the model: they change nothing at first, compute what merged weights would, and leave alone what they must."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyecli.errors import UsageError
from keyecli.kernels import dispatch, reference
from keyecli.kernels.quantized_weights import dequantise
from keyecli.model.checkpoint import load_model
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.lora import LoraExperts, LoraLinear, LoraSettings, add_lora, lora_parameters
from keyecli.model.quantize import Quantization
from tests.compare import assert_close, assert_same
from tests.model.test_trunk import direct, text
from tests.tiny import random_tensors, tiny_config, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

EXPERTS, TOP_K, WIDTH, INNER, RANK, SCALE = 5, 2, 16, 8, 3, 0.75
WIDE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 1}


def fresh(**changes: Any) -> KeyeVL2ForConditionalGeneration:
    config = tiny_config(**changes)
    return direct(config, random_tensors(config, seed=2))


def adapted(settings: LoraSettings, seed: int = 0, **changes: Any) -> KeyeVL2ForConditionalGeneration:
    """A toy model with adapters that change something."""
    model = fresh(**changes)
    torch.manual_seed(seed)
    add_lora(model, settings)
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    """Random values in the place of every B's zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if name.endswith("_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def merge(model: nn.Module) -> nn.Module:
    """The same model with W + scale · A · B in the place of every adapted matrix."""
    merged = deepcopy(model)
    with torch.no_grad():
        for name, module in list(merged.named_modules()):
            if isinstance(module, LoraLinear):
                module.base_layer.weight += module.scale * module.lora_B @ module.lora_A
                merged.set_submodule(name, module.base_layer)
            elif isinstance(module, LoraExperts):
                module.base_layer.gate_up_proj += module.scale * module.gate_up_A @ module.gate_up_B
                module.base_layer.down_proj += module.scale * module.down_A @ module.down_B
                merged.set_submodule(name, module.base_layer)
    return merged


def loss_gradients(model: KeyeVL2ForConditionalGeneration, ids: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in lora_parameters(model).items()}


def test_a_new_adapter_changes_no_bit() -> None:
    model, ids = fresh(), text(2, 20)
    before = model(input_ids=ids).logits
    add_lora(model, LoraSettings(rank=3))
    assert_same(model(input_ids=ids).logits, before)


def test_only_the_adapters_train_and_the_indexer_has_none() -> None:
    model = fresh()
    add_lora(model, LoraSettings(rank=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(lora_parameters(model))
    layer = "model.layers.1."
    assert {name.removeprefix(layer) for name in trained if name.startswith(layer)} == {
        *(f"self_attn.{letter}_proj.lora_{factor}" for letter in "qkvo" for factor in "AB"),
        *(f"mlp.experts.{matrix}_{factor}" for matrix in ("gate_up", "down") for factor in "AB"),
    }
    assert lora_parameters(model)[f"{layer}mlp.experts.gate_up_A"].shape == (4, 64, 4)


def test_a_dense_sibling_is_adapted_too() -> None:
    settings = LoraSettings(rank=2, targets=("attention", "dense_mlp"))
    model = adapted(settings, num_experts=None)
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 2 * 7
    ids = text(1, 20)
    assert_close(model(input_ids=ids).logits, merge(model)(input_ids=ids).logits, relative=1e-5)


def test_a_head_is_adapted_where_it_is_not_the_embedding() -> None:
    settings = LoraSettings(rank=2, targets=("head",))
    model = adapted(settings)
    assert set(lora_parameters(model)) == {"lm_head.lora_A", "lm_head.lora_B"}
    ids = text(1, 20)
    logits = model(input_ids=ids).logits
    assert not torch.equal(logits, fresh()(input_ids=ids).logits)
    assert_close(logits, merge(model)(input_ids=ids).logits, relative=1e-5)
    with pytest.raises(UsageError, match="head is its embedding"):
        add_lora(fresh(tie_word_embeddings=True), settings)


def test_what_the_model_lacks_cannot_be_adapted() -> None:
    with pytest.raises(UsageError, match="no experts to adapt: choose attention and dense_mlp and head"):
        add_lora(fresh(num_experts=None), LoraSettings())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ()}, "of nothing"),
        ({"targets": ("router",)}, "of router"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LoraSettings(**values)


def test_the_scale_follows_the_rank() -> None:
    assert LoraSettings(rank=16, alpha=32).scale == 2
    assert LoraSettings(rank=16, alpha=32, rslora=True).scale == 8


def test_beside_the_weights_is_the_same_as_in_them() -> None:
    model, ids = adapted(LoraSettings(rank=3)), text(2, 20)
    merged = merge(model)
    changed = model(input_ids=ids).logits
    assert_close(changed, merged(input_ids=ids).logits, relative=1e-5)
    assert (changed - fresh()(input_ids=ids).logits).abs().max() > 0.1


def test_a_wide_master_computes_in_the_type_of_the_model() -> None:
    model = adapted(LoraSettings(rank=3)).to(torch.bfloat16)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.float()
    gradients = loss_gradients(model, text(1, 20))
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients.values())


def test_dropout_acts_in_training_only() -> None:
    model, ids = adapted(LoraSettings(rank=3, dropout=0.5, targets=("attention",))), text(1, 20)
    assert_same(model.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (model.train()(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() > 1e-3


def test_recomputed_layers_have_the_same_gradients() -> None:
    model, ids = adapted(LoraSettings(rank=3)), text(2, 30)
    model.train()
    kept = loss_gradients(model, ids)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    recomputed = loss_gradients(model, ids)
    for name, gradient in kept.items():
        assert gradient is not None
        recomputed_gradient = recomputed[name]
        assert recomputed_gradient is not None
        assert_close(recomputed_gradient, gradient, relative=1e-6, what=name)


Leaves = dict[str, Tensor]


def leaves(dtype: torch.dtype = torch.float32, seed: int = 0) -> Leaves:
    """One layer's tensors; nobody chooses the last expert."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    logits = normal(11, EXPERTS)
    logits[:, -1] = -100
    return {
        "x": normal(11, WIDTH),
        "logits": logits,
        "gate_up": normal(EXPERTS, WIDTH, 2 * INNER) * WIDTH**-0.5,
        "down": normal(EXPERTS, INNER, WIDTH) * INNER**-0.5,
        "gate_up_A": normal(EXPERTS, WIDTH, RANK) * WIDTH**-0.5,
        "gate_up_B": normal(EXPERTS, RANK, 2 * INNER) * 0.3,
        "down_A": normal(EXPERTS, INNER, RANK) * INNER**-0.5,
        "down_B": normal(EXPERTS, RANK, WIDTH) * 0.3,
    }


TRAINED = ("x", "logits", "gate_up_A", "gate_up_B", "down_A", "down_B")


def naive(given: Leaves) -> Tensor:
    """Every expert with its whole merged matrices, token by token."""
    weights, experts = given["logits"].softmax(-1).topk(TOP_K, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    gate_up = given["gate_up"] + SCALE * given["gate_up_A"] @ given["gate_up_B"]
    down = given["down"] + SCALE * given["down_A"] @ given["down_B"]
    rows = []
    for token, row in enumerate(given["x"]):
        total = torch.zeros_like(row)
        for slot in range(TOP_K):
            expert = experts[token, slot]
            gate, up = (row @ gate_up[expert]).chunk(2)
            total = total + weights[token, slot] * ((F.silu(gate) * up) @ down[expert])
        rows.append(total)
    return torch.stack(rows)


def grouped(given: Leaves) -> Tensor:
    return dispatch.lora_experts(
        given["x"], given["logits"], TOP_K, True, given["gate_up"], given["down"],
        (given["gate_up_A"], given["gate_up_B"]), (given["down_A"], given["down_B"]), SCALE, "reference",
    )  # fmt: skip


def backward(function: Any, given: Leaves, direction: Tensor) -> tuple[Tensor, Leaves]:
    own = {name: tensor.clone().requires_grad_(name in TRAINED) for name, tensor in given.items()}
    out = function(own)
    out.backward(direction.to(out.dtype))
    gradients = {name: own[name].grad for name in TRAINED}
    return out.detach(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


def test_grouped_experts_are_merged_experts_in_outputs_and_gradients() -> None:
    direction = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1))
    out, gradients = backward(grouped, leaves(), direction)
    expected, expected_gradients = backward(
        naive, {name: t.double() for name, t in leaves().items()}, direction
    )
    assert_close(out, expected, relative=1e-5)
    assert gradients.keys() == expected_gradients.keys() == set(TRAINED)
    for name in TRAINED:
        assert_close(gradients[name], expected_gradients[name], relative=1e-5, what=name)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_what_finite_differences_measure(name: str) -> None:
    direction = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1))
    given = leaves()
    _, gradients = backward(grouped, given, direction)
    way = torch.randn(given[name].shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2
    ends = [
        (grouped({**given, name: given[name] + sign * step * way}).double() * direction).sum()
        for sign in (1, -1)
    ]
    measured = (ends[0] - ends[1]) / (2 * step)
    assert float((gradients[name] * way).sum()) == pytest.approx(float(measured), rel=5e-3, abs=5e-3)


def test_an_expert_that_nobody_chose_gets_a_gradient_of_zero() -> None:
    _, gradients = backward(grouped, leaves(), torch.ones(11, WIDTH))
    for name in ("gate_up_A", "gate_up_B", "down_A", "down_B"):
        assert gradients[name][-1].count_nonzero() == 0
        assert gradients[name][:-1].flatten(1).count_nonzero(dim=1).min() > 0


def test_either_matrix_may_be_left_alone() -> None:
    given = leaves()
    weights, experts = reference.route(given["logits"], TOP_K, True)
    factors = (given["gate_up_A"], given["gate_up_B"])
    only = reference.lora_experts(
        given["x"], weights, experts, given["gate_up"], given["down"], factors, None, SCALE
    )
    assert_close(only, naive({**given, "down_B": torch.zeros_like(given["down_B"])}), relative=1e-5)
    plain = (given["x"], weights, experts, given["gate_up"], given["down"])
    assert_same(reference.lora_experts(*plain, None, None, SCALE), reference.moe_experts(*plain))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> KeyeVL2ForConditionalGeneration:
    """A toy model in int4 with adapters. Shared: do not change it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("wide") / "checkpoint", config=tiny_config(**WIDE))
    model = load_model(folder, quantization=Quantization("int4"))
    torch.manual_seed(0)
    add_lora(model, LoraSettings(rank=3))
    fill(model)
    return model


def read_back(model: nn.Module) -> nn.Module:
    """The same model with every quantised matrix as the weights that it stands for."""
    plain = fresh(**WIDE)
    add_lora(plain, LoraSettings(rank=3))
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if hasattr(module, "matrix"):
            for part in module.matrix.tensors:
                del state[f"{name}.{part}"]
            matrix = dequantise(module.matrix)
            state[
                name if name.endswith(("gate_up_proj", "experts.base_layer.down_proj")) else f"{name}.weight"
            ] = matrix.transpose(-1, -2) if matrix.dim() == 3 else matrix
    plain.load_state_dict(state)
    return plain


def test_a_quantised_base_has_the_gradients_of_what_it_reads_back(
    quantised: KeyeVL2ForConditionalGeneration,
) -> None:
    plain, ids = read_back(quantised), text(2, 20)
    assert isinstance(plain, KeyeVL2ForConditionalGeneration)
    expected = loss_gradients(plain, ids)
    gradients = loss_gradients(quantised, ids)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        wanted = expected[name]
        assert gradient is not None
        assert wanted is not None
        assert_close(gradient, wanted, relative=1e-4, what=name)


def saved_for_backward(model: KeyeVL2ForConditionalGeneration, ids: Tensor) -> Iterator[Tensor]:
    """What a training pass keeps until its backward pass."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    yield from kept


def test_a_quantised_base_keeps_no_matrix_for_the_backward_pass(
    quantised: KeyeVL2ForConditionalGeneration,
) -> None:
    matrices = {(4, 128, 256), (4, 256, 128), (4, 128, 128), (128, 128), (64, 128), (128, 64)}
    shapes = [tuple(tensor.shape) for tensor in saved_for_backward(quantised, text(1, 20))]
    assert len(shapes) > 20
    assert not matrices & set(shapes)
    assert matrices & {tuple(tensor.shape) for tensor in saved_for_backward(fresh(**WIDE), text(1, 20))}


def test_quantised_experts_that_are_not_adapted_pass_gradients_on(tmp_path: Path) -> None:
    config = tiny_config(**{**WIDE, "num_hidden_layers": 2})
    model = load_model(write_checkpoint(tmp_path / "wide", config=config), quantization=Quantization("int4"))
    add_lora(model, LoraSettings(rank=3, targets=("attention",)))
    fill(model)
    gradients = loss_gradients(model, text(1, 20))
    assert len(gradients) == 2 * 4 * 2
    assert all(gradient is not None and gradient.count_nonzero() > 0 for gradient in gradients.values())
