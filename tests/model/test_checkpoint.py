"""The checkpoint loader: official folders load exactly, everything else is one sentence that names what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from keyecli.errors import ExitCode, ModelError, UsageError
from keyecli.model import checkpoint, companions
from keyecli.model.checkpoint import (
    WEIGHT_NAMES,
    Handling,
    handling_of,
    load_config,
    load_model,
    load_preprocessor,
    load_tokenizer,
    read_entries,
    resolve_model,
    save_model,
    weights_revision,
)
from keyecli.video.sampling import FrameBudget
from tests import naive
from tests.compare import assert_close, assert_same
from tests.model.test_trunk import axes, direct, text
from tests.official import OFFICIAL_CONFIG, tensor_shapes
from tests.tiny import TOKEN_IDS, random_tensors, split_experts, tiny_config, write_weights

Make = Callable[..., Path]
DENSE = tiny_config(num_experts=None)


def assert_holds(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(state[name], tensor, what=name)


def refusal(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """The sentence of the ModelError that a call must end in."""
    with pytest.raises(ModelError) as caught:
        call(*arguments, **keywords)
    sentence = str(caught.value)
    assert caught.value.exit_code is ExitCode.MODEL
    assert "\n" not in sentence, "one sentence"
    return sentence


# ---- what loads -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["fused", "one by one"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": None}, {"sa_config": None}], ids=["moe", "dense-mlp", "no-indexer"]
)
def test_official_names_load_and_give_the_logits_of_a_direct_construction(
    make_checkpoint: Make, shards: int, layout: str, changes: dict[str, Any]
) -> None:
    config = tiny_config(**changes)
    tensors = random_tensors(config)
    stored = tensors if layout == "fused" else split_experts(tensors)
    folder = make_checkpoint(config=config, tensors=stored, shards=shards)
    assert (folder / "model.safetensors.index.json").exists() == (shards > 1)
    model = load_model(folder)
    assert not model.training
    assert_holds(model, tensors)
    ids, positions = text(1, 20), axes(20)
    logits = model(input_ids=ids, position_ids=positions[:, None]).logits
    assert_same(logits, direct(config, tensors)(input_ids=ids, position_ids=positions[:, None]).logits)
    assert_close(logits[0], naive.decoder_logits(tensors, config, ids[0].tolist(), positions))


def test_both_expert_layouts_are_told_apart_by_name_where_shapes_say_nothing(make_checkpoint: Make) -> None:
    """Hidden size = expert width: [out, in] and [in, out] are the same shape."""
    config = tiny_config(hidden_size=32, moe_intermediate_size=32)
    tensors = random_tensors(config)
    fused = make_checkpoint("fused", config=config, tensors=tensors)
    single = make_checkpoint("single", config=config, tensors=split_experts(tensors))
    assert_holds(load_model(fused), tensors)
    assert_holds(load_model(single), tensors)


def test_a_model_without_a_key_of_the_older_family_skips_the_vision_head(make_checkpoint: Make) -> None:
    tensors = random_tensors(tiny_config())
    extra = {
        "visual.vision_model.head.probe": torch.ones(1, 1, 32),
        "visual.vision_model.head.mlp.fc1.bias": torch.ones(3),
    }
    assert_holds(load_model(make_checkpoint(tensors={**tensors, **extra})), tensors)


@pytest.mark.parametrize("copy", [False, True], ids=["absent", "a copy"])
def test_a_tied_head_shares_the_embedding(make_checkpoint: Make, copy: bool) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if not copy:
        del tensors["lm_head.weight"]
    model = load_model(make_checkpoint(config=config, tensors=tensors))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model.lm_head.weight.detach(), tensors["model.embed_tokens.weight"])


def test_dtype_is_the_configurations_unless_asked_for(make_checkpoint: Make) -> None:
    config = tiny_config(dtype="bfloat16")
    tensors = random_tensors(config, dtype=torch.bfloat16)
    folder = make_checkpoint(config=config, tensors=tensors)
    assert_holds(load_model(folder), tensors)
    wide = load_model(folder, dtype=torch.float32)
    assert_holds(wide, {name: t.float() for name, t in tensors.items()})
    assert wide.config.dtype is torch.float32
    older = {**tiny_config(dtype=None), "torch_dtype": "bfloat16"}
    assert load_model(make_checkpoint("older", config=older, tensors=tensors)).dtype is torch.bfloat16
    unsaid = make_checkpoint("unsaid", config=tiny_config(dtype=None), tensors=tensors)
    assert load_model(unsaid).dtype is torch.bfloat16


def test_progress_counts_every_byte_once(make_checkpoint: Make) -> None:
    tensors = random_tensors(tiny_config())
    calls: list[tuple[int, int]] = []
    load_model(
        make_checkpoint(tensors=split_experts(tensors), shards=2),
        on_progress=lambda *call: calls.append(call),
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_the_embedding_and_its_position_stay_trainable(tiny_model: torch.nn.Module) -> None:
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


LOAD_AND_TELL_THE_PEAK = """
import resource, sys
from keyecli.model.checkpoint import load_config, load_model

def peak_bytes():
    # On Linux a child starts with its parent's ru_maxrss, which would hide everything; VmHWM is its own.
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

load_config(sys.argv[1])
before = peak_bytes()
model = load_model(sys.argv[1])
print(peak_bytes() - before)
"""


def test_host_memory_stays_near_the_model_and_one_shard(make_checkpoint: Make) -> None:
    """In a fresh process, the peak grows by the model and at most about one shard, not by a second copy of the weights."""
    config = tiny_config(hidden_size=256, num_hidden_layers=4, num_experts=32, moe_intermediate_size=256)
    tensors = {name: torch.zeros(shape) for name, shape in tensor_shapes(config).items()}
    folder = make_checkpoint(config=config, tensors=tensors, shards=8)
    size = sum(tensor.nbytes for tensor in tensors.values())
    command = [sys.executable, "-c", LOAD_AND_TELL_THE_PEAK, str(folder)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    megabytes = f"{grown / 2**20:.0f} MiB for {size / 2**20:.0f} MiB of weights"
    assert 90 * 2**20 < size < grown, f"the measure itself is off: {megabytes}"
    assert grown < size * (1 + 1 / 8) + 40 * 2**20, megabytes


# ---- names as data --------------------------------------------------------------------------------------------------


def test_every_official_name_has_one_row_and_every_row_is_used() -> None:
    names = [*tensor_shapes(OFFICIAL_CONFIG), *tensor_shapes(DENSE), "visual.vision_model.head.probe"]
    names += split_experts(random_tensors(tiny_config()))
    for name in names:
        matching = [pattern for pattern, _ in checkpoint._compiled_names() if pattern.fullmatch(name)]
        assert len(matching) == 1, name
    for pattern, _ in checkpoint._compiled_names():
        assert any(pattern.fullmatch(name) for name in names), pattern.pattern
    assert len(checkpoint._compiled_names()) == len(WEIGHT_NAMES)


@pytest.mark.parametrize(
    ("name", "handling"),
    [
        ("model.layers.17.self_attn.sa_indexer.k_norm.bias", Handling.INDEXER),
        ("model.layers.0.mlp.experts.101.up_proj.weight", Handling.EXPERT),
        ("model.layers.0.mlp.experts.gate_up_proj", Handling.COPY),
        ("visual.vision_model.head.attention.in_proj_weight", Handling.SKIP),
        ("model.layers.00.input_layernorm.weight", None),
        ("model.layers.x.input_layernorm.weight", None),
        ("model.layers.0.self_attn.q_proj.bias", None),
        ("model.layersX0.input_layernorm.weight", None),
        ("prefix.model.norm.weight", None),
        ("model.norm.weight.suffix", None),
    ],
)
def test_handling_of(name: str, handling: Handling | None) -> None:
    assert handling_of(name) is handling


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(make_checkpoint: Make) -> None:
    tensors = random_tensors(tiny_config())
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    assert "lacks the tensor model.layers.1.self_attn.k_norm.weight:" in refusal(
        load_model, make_checkpoint(tensors=tensors)
    )


def test_a_missing_head_is_an_error_unless_tied(make_checkpoint: Make) -> None:
    tensors = random_tensors(tiny_config())
    del tensors["lm_head.weight"]
    assert "lm_head.weight" in refusal(load_model, make_checkpoint(tensors=tensors))


def test_a_head_of_its_own_in_a_tied_model_is_refused(make_checkpoint: Make) -> None:
    sentence = refusal(load_model, make_checkpoint(config=tiny_config(tie_word_embeddings=True)))
    assert "lm_head.weight" in sentence
    assert "tie_word_embeddings" in sentence


def test_one_missing_expert_matrix_is_named(make_checkpoint: Make) -> None:
    tensors = split_experts(random_tensors(tiny_config()))
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in refusal(
        load_model, make_checkpoint(tensors=tensors)
    )


def test_an_expert_too_many_is_named(make_checkpoint: Make) -> None:
    tensors = split_experts(random_tensors(tiny_config()))
    tensors["model.layers.0.mlp.experts.4.up_proj.weight"] = torch.zeros(32, 64)
    assert "model.layers.0.mlp.experts.4.up_proj.weight" in refusal(
        load_model, make_checkpoint(tensors=tensors)
    )


def test_both_expert_layouts_at_once_are_refused(make_checkpoint: Make) -> None:
    tensors = random_tensors(tiny_config())
    sentence = refusal(load_model, make_checkpoint(tensors={**split_experts(tensors), **tensors}))
    assert "unexpected tensor model.layers.0.mlp.experts." in sentence


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "base_model.model.norm.weight",
        "visual.vision_model.headless.weight",
    ],
)
def test_an_unexpected_tensor_is_named(make_checkpoint: Make, name: str) -> None:
    tensors = {**random_tensors(tiny_config()), name: torch.zeros(3)}
    assert f"unexpected tensor {name}:" in refusal(load_model, make_checkpoint(tensors=tensors))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", [65]),
        ("model.layers.0.mlp.experts.gate_up_proj", [4, 64, 63]),
        ("mlp_AR.linear_2.weight", [128, 64]),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(make_checkpoint: Make, name: str, shape: list[int]) -> None:
    tensors = random_tensors(tiny_config())
    right = list(tensors[name].shape)
    tensors[name] = torch.zeros(shape)
    sentence = refusal(load_model, make_checkpoint(tensors=tensors))
    assert name in sentence
    assert str(shape) in sentence
    assert str(right) in sentence


def test_a_fused_tensor_the_other_way_round_is_a_wrong_shape(make_checkpoint: Make) -> None:
    tensors = random_tensors(tiny_config(moe_intermediate_size=48))
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    folder = make_checkpoint(config=tiny_config(moe_intermediate_size=48), tensors=tensors)
    assert f"the tensor {name} in" in refusal(load_model, folder)


def test_quantised_weights_are_refused(make_checkpoint: Make) -> None:
    tensors = random_tensors(tiny_config())
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    sentence = refusal(load_model, make_checkpoint(tensors=tensors))
    assert "model.norm.weight" in sentence
    assert "F8_E4M3" in sentence


def test_indexer_weights_without_sa_config_are_refused(make_checkpoint: Make) -> None:
    config = tiny_config()
    config["sa_confg"] = config.pop("sa_config")
    sentence = refusal(load_model, make_checkpoint(config=config, tensors=random_tensors(tiny_config())))
    assert "sa_indexer" in sentence
    assert "has no sa_config" in sentence


def test_sa_config_without_indexer_weights_is_refused(make_checkpoint: Make) -> None:
    tensors = random_tensors(tiny_config(sa_config=None))
    assert "lacks the tensor model.layers.0.self_attn.sa_indexer" in refusal(
        load_model, make_checkpoint(tensors=tensors)
    )


@pytest.mark.parametrize("key", ["topk", "indexer_head_dim", "indexer_num_heads"])
def test_sa_config_with_a_missing_or_misspelt_key_is_refused(make_checkpoint: Make, key: str) -> None:
    config = tiny_config()
    config["sa_config"][key + "_"] = config["sa_config"].pop(key)
    sentence = refusal(load_model, make_checkpoint(config=config, tensors=random_tensors(tiny_config())))
    assert "sa_config" in sentence
    assert key in sentence


def test_an_empty_sa_config_is_not_no_sa_config(make_checkpoint: Make) -> None:
    folder = make_checkpoint(config={**tiny_config(), "sa_config": {}}, tensors=random_tensors(tiny_config()))
    assert "sa_config" in refusal(load_model, folder)


@pytest.mark.parametrize("kept", [0, 5, 40, -5000, -1])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_shard_is_named(make_checkpoint: Make, kept: int, shards: int) -> None:
    folder = make_checkpoint(shards=shards)
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:kept])
    sentence = refusal(load_model, folder)
    assert shard.name in sentence
    assert "cut off" in sentence
    assert "download it again" in sentence


def test_a_shard_that_is_too_long_is_named(make_checkpoint: Make) -> None:
    shard = make_checkpoint() / "model.safetensors"
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert "1 bytes more than its header promises" in refusal(load_model, shard.parent)


@pytest.mark.parametrize(
    "header", [b"{}}", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe", b'{"a": null}']
)
def test_a_damaged_header_is_named(make_checkpoint: Make, header: bytes) -> None:
    shard = make_checkpoint() / "model.safetensors"
    shard.write_bytes(struct.pack("<Q", len(header)) + header)
    sentence = refusal(load_model, shard.parent)
    assert "model.safetensors is damaged" in sentence


def test_a_header_whose_offsets_overlap_is_refused_by_the_reader(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    shard = folder / "model.safetensors"
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = header["mlp_AR.linear_2.bias"]["data_offsets"]
    text_ = json.dumps(header).encode().ljust(length)
    shard.write_bytes(struct.pack("<Q", len(text_)) + text_ + raw[8 + length :])
    assert "model.safetensors" in refusal(load_model, folder)


def test_a_git_lfs_pointer_is_named_as_such(make_checkpoint: Make) -> None:
    shard = make_checkpoint() / "model.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 62240000000\n")
    assert "git lfs pull" in refusal(load_model, shard.parent)


def test_an_index_that_names_a_missing_file(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "names model-00002-of-00003.safetensors, which is missing" in refusal(load_model, folder)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_lists_a_tensor_its_shard_lacks(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    edit_index(
        folder, lambda weights: weights.update({"model.extra.weight": "model-00001-of-00002.safetensors"})
    )
    sentence = refusal(load_model, folder)
    assert "model.extra.weight" in sentence
    assert "which lacks it" in sentence


def test_a_shard_with_a_tensor_that_the_index_does_not_list(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    edit_index(folder, lambda weights: weights.pop("model.norm.weight"))
    sentence = refusal(load_model, folder)
    assert "model.norm.weight" in sentence
    assert "does not list it" in sentence


def test_an_index_that_places_a_tensor_in_another_shard(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)

    def swap(weights: dict[str, str]) -> None:
        others = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
        (weights["model.norm.weight"],) = others - {weights["model.norm.weight"]}

    edit_index(folder, swap)
    sentence = refusal(load_model, folder)
    assert "model.norm.weight" in sentence
    assert "places it in" in sentence


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin"])
def test_an_index_may_only_name_safetensors_of_its_folder(make_checkpoint: Make, file: str) -> None:
    folder = make_checkpoint(shards=2)
    (folder.parent / "model.safetensors").write_bytes(b"")
    edit_index(folder, lambda weights: weights.update({"model.norm.weight": file}))
    assert f"'{file}'" in refusal(load_model, folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(make_checkpoint: Make, index: str) -> None:
    folder = make_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(load_model, folder)


def test_shards_without_their_index(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    sentence = refusal(load_model, folder)
    assert "model-00001-of-00002.safetensors (and 1 more)" in sentence
    assert "no model.safetensors.index.json" in sentence


def test_a_single_file_beside_a_foreign_index(make_checkpoint: Make) -> None:
    folder = make_checkpoint(shards=2)
    write_weights(folder, random_tensors(tiny_config()))
    assert "both model.safetensors and model.safetensors.index.json" in refusal(load_model, folder)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_never_opened(
    make_checkpoint: Make, tmp_path: Path, name: str
) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    sentence = refusal(load_model, folder)
    assert name in sentence
    assert "safetensors" in sentence
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("with_code", [True, False])
def test_a_folder_of_remote_code_only_is_refused_and_never_run(
    make_checkpoint: Make, tmp_path: Path, with_code: bool
) -> None:
    folder = make_checkpoint(config={**tiny_config(), "auto_map": OFFICIAL_CONFIG["auto_map"]})
    (folder / "model.safetensors").unlink()
    if with_code:
        code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
        (folder / "modeling_keye_vl_2.py").write_text(code)
    sentence = refusal(load_model, folder)
    assert "remote code" in sentence
    assert "never runs" in sentence
    assert not (tmp_path / "ran").exists()


def test_remote_code_beside_weights_is_ignored(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint(config={**tiny_config(), "auto_map": OFFICIAL_CONFIG["auto_map"]})
    for module in ("modeling_keye_vl_2", "configuration_keye_vl_2"):
        (folder / f"{module}.py").write_text(
            f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
        )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["modeling_keye_vl_2.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    load_model(folder)
    load_tokenizer(folder)
    load_preprocessor(folder)
    assert not (tmp_path / "ran").exists()


def test_no_weights_at_all(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(load_model, folder)


# ---- configuration --------------------------------------------------------------------------------------------------


def test_a_missing_configuration(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(load_model, folder)
    assert "has no config.json" in refusal(load_config, tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"'])
def test_a_damaged_configuration(make_checkpoint: Make, content: str) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(load_config, folder)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "KeyeVL1_5", "keyevl2", None])
def test_a_model_of_another_type(make_checkpoint: Make, model_type: str | None) -> None:
    sentence = refusal(
        load_config, make_checkpoint(config=tiny_config(model_type=model_type), tensors={"a": torch.zeros(1)})
    )
    assert repr(model_type) in sentence
    assert "'KeyeVL2'" in sentence


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "wide"}, "config.json"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"sa_config": {**tiny_config()["sa_config"], "indexer_head_dim": 8}}, "mrope_section"),
        ({"head_dim": 30}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "yarn", "mrope_section": [4, 6, 6]}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"vision_config": {**tiny_config()["vision_config"], "patch_size": 16}}, "patch_size"),
    ],
)
def test_values_that_cannot_be_used(make_checkpoint: Make, changes: dict[str, Any], named: str) -> None:
    folder = make_checkpoint(config=tiny_config(**changes), tensors={"a": torch.zeros(1)})
    assert named in refusal(load_model, folder)


def test_the_official_configuration_loads(make_checkpoint: Make) -> None:
    config = load_config(make_checkpoint(config=OFFICIAL_CONFIG, tensors={"a": torch.zeros(1)}))
    assert config.num_experts == 128
    assert config.dtype is torch.bfloat16 or config.dtype == "bfloat16"


# ---- finding the folder ---------------------------------------------------------------------------------------------


def test_resolve_a_folder(tiny_checkpoint: Path) -> None:
    assert resolve_model(str(tiny_checkpoint)) == tiny_checkpoint


def test_resolve_nothing_is_the_embedded_model(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(companions.__file__).parents[1] / "assets" / "nano" == companions.NANO_FOLDER
    monkeypatch.setattr(companions, "NANO_FOLDER", tiny_checkpoint)
    assert resolve_model(None) == tiny_checkpoint
    monkeypatch.setattr(companions, "NANO_FOLDER", tmp_path)
    assert "reinstall" in refusal(resolve_model, None)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c", "owner/na me", "../owner"]
)
def test_a_path_that_is_not_there(name: str) -> None:
    assert f"there is no model folder {name}" in refusal(resolve_model, name)


def test_a_file_is_not_a_folder(tiny_checkpoint: Path) -> None:
    assert "is a file" in refusal(resolve_model, str(tiny_checkpoint / "model.safetensors"))


def fill_cache(cache: Path, name: str, commit: str, source: Path) -> Path:
    """What a download leaves in the Hugging Face cache."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    shutil.copytree(source, snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return snapshot


def test_a_hub_name_is_looked_up_in_the_local_cache_only(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    sentence = refusal(resolve_model, "Kwai-Keye/Keye-VL-2.0-30B-A3B")
    assert "`keye pull Kwai-Keye/Keye-VL-2.0-30B-A3B`" in sentence
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = fill_cache(tmp_path, "owner/tiny", commit, tiny_checkpoint)
    assert resolve_model("owner/tiny") == snapshot
    assert resolve_model("owner/tiny", revision=commit) == snapshot
    assert weights_revision(resolve_model("owner/tiny")) == commit[:12]
    assert "--revision v2" in refusal(resolve_model, "owner/tiny", revision="v2")


def test_a_revision_needs_a_hub_name(tiny_checkpoint: Path) -> None:
    for name in (None, str(tiny_checkpoint)):
        with pytest.raises(UsageError, match="hub name"):
            resolve_model(name, revision="main")


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [10**9, 200_000])
@pytest.mark.parametrize("changes", [{}, {"num_experts": None, "sa_config": None}])
def test_a_round_trip_is_bit_exact(
    make_checkpoint: Make, tmp_path: Path, dtype: torch.dtype, limit: int, changes: dict[str, Any]
) -> None:
    config = tiny_config(**changes)
    tensors = random_tensors(config, dtype=dtype)
    tensors["model.norm.weight"][:4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40], dtype=dtype)
    model = load_model(make_checkpoint(config=config, tensors=tensors), dtype=dtype)
    out = tmp_path / "out"
    save_model(model, out, max_shard_bytes=limit)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    if limit == 10**9:
        assert shards == ["model.safetensors"]
    else:
        count = len(shards)
        assert count > 1
        assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"]) == set(tensors)
    again = load_model(out)
    assert_holds(again, tensors)
    negative_zero = again.model.norm.weight.detach()[2]
    assert torch.signbit(negative_zero)
    for name, entry in read_entries(out).items():
        assert entry.shape == tuple(tensors[name].shape)
        with safe_open(entry.shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_shards_stay_below_the_limit_unless_a_tensor_is_larger(tiny_model: Any, tmp_path: Path) -> None:
    limit = 60_000
    save_model(tiny_model, tmp_path, max_shard_bytes=limit)
    by_shard: dict[Path, list[int]] = {}
    for entry in read_entries(tmp_path).values():
        by_shard.setdefault(entry.shard, []).append(entry.bytes)
    assert any(size > limit for sizes in by_shard.values() for size in sizes)
    for sizes in by_shard.values():
        assert sum(sizes) <= limit or len(sizes) == 1


def test_the_saved_configuration_is_the_official_spelling(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model.config.auto_map = {"AutoModel": "somewhere.Else"}
    save_model(tiny_model, tmp_path)
    del tiny_model.config.auto_map
    values = json.loads((tmp_path / "config.json").read_text())
    expected = tiny_config()
    assert "auto_map" not in values
    for key, value in expected.items():
        if key != "vision_config":
            assert values[key] == value, key
    for key, value in expected["vision_config"].items():
        assert values["vision_config"][key] == value, key
    assert load_config(tmp_path).to_dict() == {
        **tiny_model.config.to_dict(),
        "_name_or_path": load_config(tmp_path).to_dict().get("_name_or_path", ""),
    }


def test_a_save_leaves_nothing_of_an_earlier_one_and_no_temporary_file(
    tiny_model: Any, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("kept")
    save_model(tiny_model, tmp_path, max_shard_bytes=60_000)
    save_model(tiny_model, tmp_path, max_shard_bytes=300_000)
    load_model(tmp_path)
    save_model(tiny_model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    load_model(tmp_path)
    save_model(tiny_model, tmp_path, max_shard_bytes=300_000)
    assert not (tmp_path / "model.safetensors").exists()
    load_model(tmp_path)


def test_a_save_that_fails_leaves_the_earlier_one_whole(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint, "_write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(tiny_model, tmp_path, max_shard_bytes=60_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_tied_head_is_not_written_twice(make_checkpoint: Make, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    del tensors["lm_head.weight"]
    model = load_model(make_checkpoint(config=config, tensors=tensors))
    save_model(model, tmp_path / "out")
    assert set(read_entries(tmp_path / "out")) == set(tensors)
    assert load_model(tmp_path / "out").lm_head.weight is not None


def test_a_model_with_an_adapter_is_not_saved_as_official(make_checkpoint: Make, tmp_path: Path) -> None:
    model = load_model(make_checkpoint())
    model.model.layers[0].lora = torch.nn.Linear(2, 2)
    assert "model.layers.0.lora.weight (and 1 more)" in refusal(save_model, model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


# ---- revision -------------------------------------------------------------------------------------------------------


def test_the_revision_is_stable_short_and_tells_weights_apart(make_checkpoint: Make, tmp_path: Path) -> None:
    first = make_checkpoint("first")
    revision = weights_revision(first)
    assert len(revision) == 12
    assert int(revision, 16) >= 0
    shutil.copytree(first, tmp_path / "copy")
    assert weights_revision(tmp_path / "copy") == revision
    (tmp_path / "copy" / "README.md").write_text("not weights")
    assert weights_revision(tmp_path / "copy") == revision
    other = make_checkpoint("other", tensors=random_tensors(tiny_config(), seed=1))
    assert weights_revision(other) != revision
    half = {name: tensor.to(torch.bfloat16) for name, tensor in random_tensors(tiny_config()).items()}
    assert weights_revision(make_checkpoint("half", tensors=half)) != revision


def test_the_revision_sees_one_changed_bit_of_a_small_file(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    before = weights_revision(folder)
    shard = folder / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert weights_revision(folder) != before


def test_the_revision_of_no_weights_is_an_error(tmp_path: Path) -> None:
    assert "no weights" in refusal(weights_revision, tmp_path)


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def test_the_tokenizer_loads_with_its_template(tiny_tokenizer: Any) -> None:
    sentence = "<|im_start|>Zoë 寿司<think>\n</think><|im_end|>"
    ids = tiny_tokenizer.encode(sentence)
    assert ids[0] == TOKEN_IDS["<|im_start|>"]
    assert ids[-1] == TOKEN_IDS["<|im_end|>"] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(ids) == sentence
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == "Zoë 寿司<think>\n</think>"
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]}]
    for thinking, opening in ((True, "<think>\n"), (False, "<think>\n\n</think>\n\n")):
        prompt = tiny_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        video = "<|vision_start|><|video_pad|><|vision_end|>"
        assert prompt == f"<|im_start|>user\n{video}Why?<|im_end|>\n<|im_start|>assistant\n{opening}"


def test_a_template_inside_the_tokenizers_settings_is_read(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (folder / "chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink()
    assert "assistant" in load_tokenizer(folder).chat_template


@pytest.mark.parametrize(
    ("file", "named"), [("tokenizer.json", "tokenizer.json"), ("chat_template.jinja", "chat template")]
)
def test_a_missing_tokenizer_file(make_checkpoint: Make, file: str, named: str) -> None:
    folder = make_checkpoint()
    (folder / file).unlink()
    assert named in refusal(load_tokenizer, folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0"}'])
def test_a_damaged_tokenizer(make_checkpoint: Make, content: str) -> None:
    folder = make_checkpoint()
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer" in refusal(load_tokenizer, folder)


def test_a_tokenizer_of_another_model(make_checkpoint: Make) -> None:
    folder = make_checkpoint(config=tiny_config(video_token_id=7), tensors={"a": torch.zeros(1)})
    sentence = refusal(load_tokenizer, folder)
    assert "<|video_pad|> is 262" in sentence
    assert "video_token_id is 7" in sentence


# ---- preprocessor ---------------------------------------------------------------------------------------------------


def write_preprocessor(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


NORMS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def test_the_familys_released_spelling_is_read(tmp_path: Path) -> None:
    released = {**NORMS, "min_pixels": 102400, "max_pixels": 1003520, "patch_size": 14, "merge_size": 2}
    read = load_preprocessor(write_preprocessor(tmp_path, {**released, "auto_map": {"AutoProcessor": "x.Y"}}))
    assert read.mean == (0.1, 0.2, 0.3)
    assert read.std == (0.4, 0.5, 0.6)
    assert read.budget == FrameBudget(image_min_tokens=131, image_max_tokens=1280)
    assert read.fps == 2.0


def test_the_newer_spelling_and_our_own_keys_are_read(tmp_path: Path) -> None:
    own = {"min_tokens": 4, "max_tokens": 9, "total_tokens": 500, "adaptive": True, "image_max_tokens": 77}
    size = {"shortest_edge": 28 * 28 * 6, "longest_edge": 28 * 28 * 60}
    read = load_preprocessor(
        write_preprocessor(tmp_path, {**NORMS, "size": size, "fps": 4, "token_budget": own})
    )
    assert read.budget == FrameBudget(**{**own, "image_min_tokens": 6})
    assert read.fps == 4.0


def test_without_mean_and_std_half_is_assumed(tmp_path: Path) -> None:
    assert load_preprocessor(write_preprocessor(tmp_path, NORMS)).assumed == ()
    read = load_preprocessor(write_preprocessor(tmp_path, {"image_mean": [0, 0, 0]}))
    assert (read.mean, read.std, read.assumed) == ((0, 0, 0), (0.5, 0.5, 0.5), ("image_std",))
    (tmp_path / "preprocessor_config.json").unlink()
    read = load_preprocessor(tmp_path)
    assert (read.mean, read.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert read.assumed == ("image_mean", "image_std")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_std": "half"}, "image_std"),
        ({"patch_size": 16}, "patch_size 16"),
        ({"merge_size": 1}, "merge_size 1"),
        ({"min_pixels": -1}, "min_pixels"),
        ({"min_pixels": 784 * 9, "max_pixels": 784}, "budget"),
        ({"fps": 0}, "fps"),
        ({"token_budget": {"most": 3}}, "token_budget"),
        ({"token_budget": [3]}, "token_budget"),
        ({"token_budget": {"min_tokens": 9, "max_tokens": 3}}, "budget"),
        ({"token_budget": {"max_tokens": "many"}}, "max_tokens"),
        ({"token_budget": {"adaptive": 1}}, "adaptive"),
    ],
)
def test_a_preprocessor_that_cannot_be_used(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    sentence = refusal(load_preprocessor, write_preprocessor(tmp_path, {**NORMS, **values}))
    assert named in sentence
    assert "preprocessor_config.json" in sentence
