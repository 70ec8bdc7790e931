"""`keye merge`: a model that answers as the adapter does, with the weights that were computed with, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keyecli import session
from keyecli.model import new_folder
from keyecli.model.adapter import load_adapter
from keyecli.model.checkpoint import load_model
from keyecli.model.merged_folder import merge_folder
from keyecli.model.quantize import quantization_of
from keyecli.model.quantized_folder import quantize_folder
from tests.adapters import write_adapter
from tests.commands.conftest import Keye
from tests.compare import assert_same
from tests.tiny import random_tensors, split_experts, tiny_config, write_checkpoint

CONFIG = tiny_config(hidden_size=128, moe_intermediate_size=64, num_hidden_layers=1)
WHOLE = "mlp_AR.pre_norm.weight"
FEW = ("--max-tokens", "12", "--no-think", "-q")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be quantised. Shared: read it only."""
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", config=CONFIG)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of it, a whole parameter with it. Shared: read it only."""
    return write_adapter(tmp_path_factory.mktemp("adapter") / "first", base, whole=[WHOLE])


def test_the_merged_model_answers_as_the_adapter_does(
    keye: Keye, clip: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    assert keye("merge", str(adapter), str(out), "--device", "cpu") == (
        0, f"{out}: {base} with {adapter}, 1 MiB\n", "",
    )  # fmt: skip
    ask = ("ask", str(clip), "What happens?", *FEW)
    merged = keye(*ask, "-m", str(out))
    assert merged == keye(*ask, "--adapter", str(adapter))
    assert merged[0] == 0
    assert merged != keye(*ask, "-m", str(base))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")) == []


def test_the_report(keye: Keye, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    code, stdout, _ = keye("merge", str(adapter), str(out), "--json")
    assert code == 0
    assert json.loads(stdout) == {
        "schema": "keye.merge/1",
        "model": str(base),
        "adapter": str(adapter),
        "folder": str(out),
        "matrices": 6,
        "replaced": 1,
        "bytes": sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values()),
    }


@pytest.mark.parametrize(
    ("stored", "one_by_one"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_the_weights_are_those_that_are_computed_with(
    stored: torch.dtype, one_by_one: bool, tmp_path: Path
) -> None:
    tensors = random_tensors(CONFIG, dtype=stored)
    files = split_experts(tensors) if one_by_one else tensors
    base = write_checkpoint(tmp_path / "base", config=CONFIG, tensors=files, shards=3)
    file = load_adapter(write_adapter(tmp_path / "adapter", base, whole=[WHOLE]))
    written = merge_folder(base, file, tmp_path / "merged", shard_bytes=200_000)
    assert len(list(written.folder.glob("model-*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        merged = load_model(written.folder, dtype=dtype).state_dict()
        beside = load_model(base, dtype=dtype, adapter=file).state_dict()
        assert merged.keys() == beside.keys()
        for name, tensor in merged.items():
            assert_same(tensor, beside[name])

    held: dict[str, torch.Tensor] = {}
    for path in written.folder.glob("*.safetensors"):
        held |= load_file(path)
    assert held.keys() == {name for name in tensors if not name.startswith("visual.vision_model.head.")}
    for name, tensor in held.items():
        if "_proj" not in name or "indexer" in name or "visual" in name:
            continue
        assert tensor.dtype is stored
        layer, _, matrix = name.removesuffix(".weight").rpartition(".")
        parts = file.tensors
        if "experts" in layer:
            prefix = f"{layer}.base_layer" if matrix == "gate_up_proj" else layer
            first = parts[f"{prefix}.lora_A.weight"].double().view(CONFIG["num_experts"], 2, -1)
            second = parts[f"{prefix}.lora_B.weight"].double().view(-1, 2, CONFIG["num_experts"])
            change = 2 * torch.einsum("erk,nre->ekn", first, second)
        else:
            first, second = (parts[f"{layer}.{matrix}.lora_{factor}.weight"].double() for factor in "AB")
            change = 2 * second @ first
        assert_same(tensor, (tensors[name].double() + change).to(stored))
    assert_same(held[WHOLE], file.tensors[WHOLE].to(stored))
    assert_same(held["lm_head.weight"], tensors["lm_head.weight"])


def test_another_base_can_be_named(keye: Keye, base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", config=CONFIG, tensors=random_tensors(CONFIG, seed=9))
    code, stdout, stderr = keye("merge", str(adapter), str(tmp_path / "out"), "-m", str(other))
    assert code == 0
    assert stdout.startswith(f"{tmp_path / 'out'}: {other} with {adapter}")
    assert stderr.startswith(f"keye: warning: the adapter {adapter} was trained on other weights ({base}, ")
    kept, came = (
        load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (other, tmp_path / "out")
    )
    assert_same(kept, came)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "give an adapter and a folder to write, as in `keye merge runs/first models/mine`"),
        (("{adapter}",), 2, "give an adapter and a folder to write"),
        (("{adapter}", "{base}"), 2, "is there already: choose another folder, or remove it"),
        (("{base}", "{out}"), 4, "is no adapter: it holds no adapter_config.json"),
        (("{out}", "{out}"), 4, "is no adapter: it holds no adapter_config.json"),
        (("{adapter}", "{out}", "-m", "{out}"), 4, "there is no model folder"),
        (("{adapter}", "{out}", "-m", "{quantised}"), 4, "is quantised, int4 in groups of 64, and an adapter"),
        (("{adapter}", "{out}", "-m", "{narrow}"), 4, "does not fit this base"),
    ],
)  # fmt: skip
def test_refusals(
    arguments: tuple[str, ...],
    code: int,
    sentence: str,
    keye: Keye,
    base: Path,
    adapter: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    places = {"base": base, "adapter": adapter, "out": tmp_path / "out", "narrow": tiny_checkpoint}
    if "{quantised}" in arguments:
        places["quantised"] = quantize_folder(base, tmp_path / "int4", quantization_of("int4")).folder
    before = sorted(tmp_path.rglob("*"))
    answered, stdout, stderr = keye("merge", *(text.format(**places) for text in arguments))
    assert (answered, stdout) == (code, "")
    assert sentence in stderr.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_too_small(
    keye: Keye, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda _: free)
    code, stdout, stderr = keye("merge", str(adapter), str(tmp_path / "deep" / "out"))
    assert (code, stdout) == (5, "")
    assert stderr == (
        f"keye: the merged model takes 0.0 GiB and 0.0 are free on the disk of {tmp_path}: "
        "make room there, or choose another place\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(
    error: BaseException, keye: Keye, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save: Callable[..., None] = new_folder.save_file

    def broken(tensors: dict[str, torch.Tensor], path: Path, **keywords: object) -> None:
        save(tensors, path, **keywords)
        assert path.parent.parent == tmp_path
        raise error

    monkeypatch.setattr(new_folder, "save_file", broken)
    code, stdout, _ = keye("merge", str(adapter), str(tmp_path / "out"))
    assert (code, stdout) == (5 if isinstance(error, OSError) else 130, "")
    assert not list(tmp_path.iterdir())


def test_a_merged_model_can_be_quantised(base: Path, adapter: Path, tmp_path: Path, keye: Keye) -> None:
    assert keye("merge", str(adapter), str(tmp_path / "merged"), "-q")[0] == 0
    assert keye("quantize", str(tmp_path / "merged"), str(tmp_path / "int8"), "--quant", "int8", "-q")[0] == 0
    loaded = session.load(tmp_path / "int8", device="cpu").loaded
    assert loaded.quant == "int8"
    assert_same(loaded.model.get_parameter(WHOLE).detach(), load_adapter(adapter).tensors[WHOLE])
