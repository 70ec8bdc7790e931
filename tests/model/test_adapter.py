"""Adapters in files: PEFT reads ours and we read PEFT's, with the same logits; what does not fit is refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keyecli.errors import ModelError
from keyecli.model.adapter import (
    Adapter,
    adapted,
    fit_adapter,
    load_adapter,
    put_beside,
    save_adapter,
)
from keyecli.model.checkpoint import load_model
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.lora import LoraSettings, add_lora
from keyecli.model.quantize import Quantization
from tests.compare import assert_close, assert_same
from tests.model.test_lora import WIDE, fill, fresh
from tests.model.test_trunk import text
from tests.tiny import tiny_config, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SETTINGS = LoraSettings(rank=3, alpha=6)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(settings: LoraSettings = SETTINGS, **changes: Any) -> KeyeVL2ForConditionalGeneration:
    model = fresh(**changes)
    torch.manual_seed(0)
    add_lora(model, settings)
    fill(model)
    return model


def saved(
    folder: Path, settings: LoraSettings = SETTINGS, further: dict[str, Tensor] | None = None
) -> KeyeVL2ForConditionalGeneration:
    model = trained(settings)
    save_adapter(
        model, folder, settings=settings, base="toy", revision="0123456789ab", modules_to_save=further
    )
    return model


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def with_adapter(model: KeyeVL2ForConditionalGeneration, folder: Path) -> KeyeVL2ForConditionalGeneration:
    """The model with the folder's adapter in its weights."""
    adapter = fit_adapter(load_adapter(folder), shapes_of(model))
    with torch.no_grad():
        list(adapted(model.named_parameters(), adapter, dict.fromkeys(shapes_of(model), torch.float32)))
    return model


def logits(model: nn.Module, tokens: int = 20) -> Tensor:
    with torch.no_grad():
        return model(input_ids=text(1, tokens)).logits


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        LoraSettings(rank=3, alpha=6, rslora=True),
        LoraSettings(rank=4, dropout=0.1),
        LoraSettings(rank=2, targets=("attention",), dropout=0.1),
        LoraSettings(rank=2, targets=("experts",)),
    ],
)
def test_peft_computes_what_we_trained(settings: LoraSettings, tmp_path: Path) -> None:
    model = saved(tmp_path, settings).eval()
    loaded = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    assert_close(logits(loaded), logits(model), relative=1e-5)
    assert_close(logits(with_adapter(fresh(), tmp_path)), logits(model), relative=1e-5)


@pytest.mark.parametrize("moved", [False, True])
def test_we_compute_what_peft_trained(moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moved: as PEFT writes for a class that does not say which dimension of its experts is the input."""
    model = fresh(hidden_size=48)
    if moved:
        monkeypatch.delattr(type(model.model.layers[0].mlp.experts), "is_transposed")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], target_parameters=BOTH, modules_to_save=["mlp_AR"],
        alpha_pattern={"o_proj": 7}, rank_pattern={"self_attn.q_proj": 5},
    )  # fmt: skip
    other = peft.get_peft_model(model, config)
    randomise(other)
    other.save_pretrained(tmp_path)
    ours = with_adapter(fresh(hidden_size=48), tmp_path)
    assert_close(logits(ours), logits(other.eval()), relative=1e-5)
    assert_close(ours.mlp_AR.linear_1.weight, other.get_submodule("base_model.model.mlp_AR.linear_1").weight)
    factor = load_file(tmp_path / WEIGHTS)[
        "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    ]
    assert factor.shape == (4 * 3, 64 if moved else 48)


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_whole_parameters_go_along(tmp_path: Path) -> None:
    names = [f"mlp_AR.pre_norm.{leaf}" for leaf in ("weight", "bias")] + ["model.layers.1.mlp.gate.weight"]
    shapes = shapes_of(fresh())
    further = {name: torch.randn(shapes[name]) for name in names}
    saved(tmp_path, further=further)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert values["modules_to_save"] == ["mlp_AR.pre_norm", "model.layers.1.mlp.gate"]
    state = dict(with_adapter(fresh(), tmp_path).named_parameters())
    for name, tensor in further.items():
        assert_same(state[name], tensor)
    loaded = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    assert_close(logits(loaded), logits(with_adapter(fresh(), tmp_path)), relative=1e-5)


def test_parameters_can_be_given_whole(tmp_path: Path) -> None:
    from keyecli.model.lora import lora_parameters

    model = trained()
    tensors = {name: parameter.detach() * 2 for name, parameter in lora_parameters(model).items()}
    save_adapter(model, tmp_path, settings=SETTINGS, base="toy", revision="r", tensors=tensors)
    held = load_file(tmp_path / WEIGHTS)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert_same(held, tensors["model.layers.0.self_attn.q_proj.lora_A"])


def test_a_folder_says_what_it_was_trained_on(tmp_path: Path) -> None:
    saved(tmp_path)
    file = load_adapter(tmp_path)
    assert (file.base, file.base_revision) == ("toy", "0123456789ab")
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    first = file.revision
    assert load_adapter(tmp_path).revision == first
    change_tensors(tmp_path, lambda tensors: next(iter(tensors.values())).mul_(1.5))
    assert load_adapter(tmp_path).revision != first


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path) -> None:
    model = trained()
    contents = set()
    for number in range(8):
        folder = tmp_path / str(number)
        save_adapter(model, folder, settings=SETTINGS, base="base", revision="1234")
        contents.add((folder / WEIGHTS).read_bytes())
    assert len(contents) == 1
    assert load_adapter(tmp_path / "0").base_revision == "1234"


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NESTED = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_{}.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "is no adapter: it holds no adapter_config.json"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors: complete the copy"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 100), "cannot be read"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "a pickle file"),
        (lambda folder: change_config(folder, peft_type="IA3"), "an adapter of kind 'IA3'"),
        (lambda folder: change_config(folder, use_dora=True), "use_dora = true, which is no plain LoRA"),
        (lambda folder: change_config(folder, init_lora_weights="pissa_niter_4"), "changes the base"),
        (lambda folder: change_config(folder, r="three"), "r = 'three'"),
        (lambda folder: change_config(folder, r=5), "has rank 3 and adapter_config.json says 5"),
        (
            lambda folder: change_tensors(folder, lambda t: t.pop(FIRST)),
            "self_attn.q_proj.lora_A: copy or save it again",
        ),
        (
            lambda folder: change_tensors(folder, lambda t: [t.pop(NESTED.format(f)) for f in "AB"]),
            "lacks the factors of model.layers.1.mlp.experts.gate_up_proj",
        ),
        (lambda folder: change_tensors(folder, lambda t: t.update({"odd": torch.ones(1)})), "none of PEFT's"),
        (lambda folder: change_tensors(folder, dict.clear), "holds no tensor"),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({FIRST: torch.ones(3, 65)})),
            r"trained on toy, does not fit this base: .*meet a matrix \[128, 64\]",
        ),
        (
            lambda folder: change_tensors(
                folder, lambda t: t.update({NESTED.format("A"): torch.ones(12, 65)})
            ),
            "meet experts",
        ),
        (
            lambda folder: change_tensors(
                folder, lambda t: t.update({"base_model.model.visual.odd": torch.ones(3)})
            ),
            "visual.odd has no place in it",
        ),
        (
            lambda folder: change_tensors(
                folder, lambda t: t.update({"base_model.model.mlp_AR.pre_norm.bias": torch.ones(3)})
            ),
            r"mlp_AR.pre_norm.bias is \[3\] and \[128\] there",
        ),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused(
    damage: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=said):
        fit_adapter(load_adapter(tmp_path), shapes_of(fresh()))


def test_a_sum_is_rounded_to_the_type_of_the_files() -> None:
    weight, first, second = torch.ones(4, 6), torch.full((6, 1), 0.3), torch.full((1, 4), 1e-2)
    adapter = Adapter({"w": (first, second)}, {})
    [(_, changed)] = adapted([("w", weight.clone())], adapter, {"w": torch.bfloat16})
    assert_same(changed, torch.full((4, 6), 1.003).to(torch.bfloat16).float())
    [(_, exact)] = adapted([("w", weight.clone())], adapter, {"w": torch.float32})
    assert_close(exact, torch.full((4, 6), 1.003), relative=1e-7)


def test_a_quantised_base_has_the_adapter_beside_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "wide", config=tiny_config(**WIDE))
    model = load_model(folder, quantization=Quantization("int4"))
    torch.manual_seed(0)
    add_lora(model, SETTINGS)
    fill(model)
    save_adapter(model, tmp_path / "adapter", settings=SETTINGS, base="toy", revision="r")
    again = load_model(folder, quantization=Quantization("int4"))
    adapter = fit_adapter(load_adapter(tmp_path / "adapter"), shapes_of(load_model(folder)))
    assert set(put_beside(again, adapter)) == set(adapter.added)
    assert not any(parameter.requires_grad for name, parameter in again.named_parameters() if "lora" in name)
    assert_close(logits(again), logits(model), relative=1e-5)
