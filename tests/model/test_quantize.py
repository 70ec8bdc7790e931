"""Quantised models: what is quantised, loading on the way, the saved folder, and the folders that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from keyecli.engine.plan import weights_bytes
from keyecli.errors import ExitCode, MemoryLimitError, ModelError, UsageError
from keyecli.kernels.quantized_weights import METHODS, Method, dequantise
from keyecli.model import new_folder
from keyecli.model.checkpoint import load_model, read_entries, save_model
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.quantize import (
    Quantization,
    QuantizedExperts,
    QuantizedLinear,
    quantization_of,
    replace_modules,
)
from keyecli.model.quantized_folder import quantize_folder
from tests.compare import assert_close, assert_same
from tests.official import OFFICIAL_CONFIG
from tests.tiny import random_tensors, split_experts, tiny_config, write_checkpoint

# Widths of whole groups, and one layer, so that it stays small.
WIDE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 1}
INT4 = Quantization("int4")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that can be quantised. Shared: read it only."""
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "checkpoint", config=tiny_config(**WIDE))


@pytest.fixture(scope="module")
def saved(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved in int4. Shared: read it only."""
    return quantize_folder(wide, tmp_path_factory.mktemp("saved") / "int4", INT4).folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = state_of(actual), state_of(expected)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert_same(ours[name], tensor, what=name)


def test_only_experts_and_large_linear_layers_are_quantised() -> None:
    """In the released shape: by name, and how many bytes that makes."""
    from keyecli.model.config import KeyeVL2Config

    config = KeyeVL2Config.from_dict(OFFICIAL_CONFIG)
    for method, group, expected in (("int4", 64, 18.8e9), ("int4", 128, 18.1e9), ("int8", 64, 33.7e9)):
        quantization = quantization_of(method, group)
        with torch.device("meta"):
            model = KeyeVL2ForConditionalGeneration(config).to(torch.bfloat16)
            names = replace_modules(model, quantization)
        assert len(names) == 48 * 6
        last = {".".join(name.split(".")[3:]) for name in names}
        experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
        assert last == experts | {f"self_attn.{part}_proj" for part in "qkvo"}
        size = sum(tensor.nbytes for tensor in state_of(model).values())
        config.quantization_config = quantization.to_dict()
        assert weights_bytes(config, 2) == size == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_loading_on_the_way_is_the_saved_folder_bit_for_bit(
    method: Method, wide: Path, tmp_path: Path
) -> None:
    quantization = Quantization(method)
    written = quantize_folder(wide, tmp_path / "out", quantization, shard_bytes=100_000)
    model = load_model(wide, quantization=quantization)
    assert_same_state(load_model(tmp_path / "out"), model)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert written.bytes == sum(entry.bytes for entry in read_entries(tmp_path / "out").values())
    assert written.bytes < written.source_bytes
    assert weights_bytes(model.config, 4) == written.bytes
    # bf16 weights in the place of fp32 change the rest of the model, not what is quantised.
    narrow = load_model(wide, quantization=quantization, dtype=torch.bfloat16)
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    for name, tensor in state_of(model).items():
        if name.rpartition(".")[2] in ("codes", "scale", "zero"):
            assert_same(state_of(narrow)[name], tensor)


@torch.no_grad()
def test_a_quantised_model_computes_with_what_it_reads_back(wide: Path) -> None:
    model, original = load_model(wide, quantization=INT4), load_model(wide)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            original.get_submodule(name).weight.copy_(dequantise(module.matrix))
        elif isinstance(module, QuantizedExperts):
            experts = original.get_submodule(name)
            experts.gate_up_proj.copy_(dequantise(module.gate_up_proj.matrix).mT)
            experts.down_proj.copy_(dequantise(module.down_proj.matrix).mT)
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    assert_close(model(input_ids=ids).logits, original(input_ids=ids).logits)


def test_experts_one_by_one_give_the_same(make_checkpoint: Callable[..., Path], wide: Path) -> None:
    config = tiny_config(**WIDE)
    folder = make_checkpoint(config=config, tensors=split_experts(random_tensors(config)), shards=3)
    assert_same_state(load_model(folder, quantization=INT4), load_model(wide, quantization=INT4))


def test_a_dense_sibling_is_quantised_too(make_checkpoint: Callable[..., Path]) -> None:
    config = tiny_config(**WIDE, num_experts=None, intermediate_size=192)
    folder = make_checkpoint(config=config, tensors=random_tensors(config))
    model = load_model(folder, quantization=INT4)
    names = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(names) == 7
    assert weights_bytes(model.config, 4) == sum(tensor.nbytes for tensor in state_of(model).values())


def test_what_no_whole_groups_make_up_stays(make_checkpoint: Callable[..., Path]) -> None:
    config = tiny_config(**{**WIDE, "moe_intermediate_size": 96})
    model = load_model(make_checkpoint(config=config, tensors=random_tensors(config)), quantization=INT4)
    assert not any(isinstance(module, QuantizedExperts) for module in model.modules())
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 4
    assert weights_bytes(model.config, 4) == sum(tensor.nbytes for tensor in state_of(model).values())


def test_the_folder_stands_alone(saved: Path, wide: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    assert values["quantization_config"] == {
        "quant_method": "keyecli",
        "version": 1,
        "weights": "int4",
        "group_size": 64,
    }
    assert "auto_map" not in values
    assert {path.name for path in wide.iterdir()} - {path.name for path in saved.iterdir()} <= {
        path.name for path in wide.glob("model*")
    }
    assert not [path for path in saved.parent.iterdir() if path.name.startswith(".")]


def test_a_loaded_model_saves_the_same_folder(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved)
    save_model(model, tmp_path / "again")
    assert_same_state(load_model(tmp_path / "again"), model)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: change_config(folder, group_size=128), "weights and configuration do not belong together"),
        (lambda folder: change_config(folder, weights="int8"), "weights and configuration do not belong together"),
        (lambda folder: change_config(folder, weights="fp8"), "holds the unexpected tensor"),
        (lambda folder: change_config(folder, weights="int3"), "weights of kind 'int3' in groups of 64"),
        (lambda folder: change_config(folder, group_size=[64]), "in groups of [64]"),
        (lambda folder: change_config(folder, version=2), "version 2, and 1 is read"),
        (lambda folder: change_config(folder, quant_method="gptq"), "quantised with gptq, which is not read"),
        (lambda folder: change_tensors(folder, lambda t: t.pop(f"{Q_PROJ}.scale")), f"lacks the tensor {Q_PROJ}.scale"),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(128, 128)})),
            f"holds the unexpected tensor {Q_PROJ}.weight",
        ),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({f"{Q_PROJ}.scale": t[f"{Q_PROJ}.scale"].float()})),
            "is stored as F32, but only BF16 is read",
        ),
    ],
)  # fmt: skip
def test_a_wrong_or_mixed_folder_is_refused(
    damage: Callable[[Path], None], sentence: str, copied: Path
) -> None:
    damage(copied)
    with pytest.raises(ModelError) as raised:
        load_model(copied)
    assert sentence in str(raised.value)
    assert raised.value.exit_code == ExitCode.MODEL


def test_quantised_weights_without_a_word_are_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no quantization_config"):
        load_model(copied)


def test_what_cannot_be_quantised_is_refused(
    saved: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="quantised already, int4 in groups of 64"):
        load_model(saved, quantization=Quantization("int8"))
    with pytest.raises(ModelError, match="quantised already"):
        quantize_folder(saved, tmp_path / "out", INT4)
    narrow = make_checkpoint("narrow", config=tiny_config(num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ModelError, match="made of groups of 128"):
        load_model(narrow, quantization=Quantization("int4", 128))
    config = tiny_config(**WIDE)
    tensors = random_tensors(config)
    tensors[f"{Q_PROJ}.weight"][3, 5] = float("nan")
    folder = make_checkpoint("broken", config=config, tensors=tensors)
    with pytest.raises(ModelError, match=rf"the tensor {Q_PROJ}.weight in .* cannot be quantised"):
        quantize_folder(folder, tmp_path / "out", INT4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "narrow"]
    with pytest.raises(UsageError, match="int4, int8 or fp8"):
        quantization_of("int5")
    with pytest.raises(UsageError, match="64 or 128"):
        quantization_of("int4", 32)


def test_a_full_disk_leaves_nothing(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(new_folder.shutil, "disk_usage", lambda _: free)
        with pytest.raises(MemoryLimitError, match="are free on the disk of"):
            quantize_folder(wide, tmp_path / "out", INT4)

    # As safetensors words it.
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    for error in (OSError(28, "No space left on device"), SafetensorError(text)):

        def full(*arguments: Any, error: Exception = error, **keywords: Any) -> None:
            raise error

        monkeypatch.setattr(new_folder, "save_file", full)
        with pytest.raises(MemoryLimitError, match="make room there"):
            quantize_folder(wide, tmp_path / "out", INT4)
        assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(wide: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(wide, tmp_path / "out", INT4, on_progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_kept(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        quantize_folder(wide, tmp_path / "out", INT4)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "note"]
