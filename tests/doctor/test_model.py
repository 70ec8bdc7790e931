"""Checkpoints on trial: a good one, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli.doctor.finding import Finding, exit_code
from keyecli.doctor.model import check_model, hub_checksum, in_words
from keyecli.errors import UsageError
from keyecli.hub.pull import plan_pull, pull
from tests.hub.conftest import hub, hub_cache, toy_folder  # noqa: F401 - fixtures
from tests.hub.server import COMMIT, NAME, Hub
from tests.tiny import random_tensors, tiny_config, write_checkpoint, write_weights

SHARD = "model-00002-of-00003.safetensors"


def trial(folder: Path | str, **arguments: Any) -> dict[str, Finding]:
    findings = list(check_model(str(folder), **arguments))
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=3)


def test_a_good_checkpoint(checkpoint: Path) -> None:
    findings = trial(checkpoint)
    assert list(findings) == ["folder", "configuration", "preprocessor", "tokenizer", "weights", "hashes"]
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert exit_code(findings.values()) == 0
    weights = findings["weights"]
    count = len(random_tensors(tiny_config()))
    assert (weights.details["tensors"], weights.details["shards"]) == (count, 3)
    assert weights.details["dtypes"] == {"F32": count}
    assert findings["hashes"].details == {"files": 0, "bytes": 0, "read": False}


def test_the_embedded_model_is_whole() -> None:
    assert {finding.status for finding in check_model(None)} == {"ok"}


def missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncated_shard(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def header_cut_off(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:20])


def wrong_shape(folder: Path) -> None:
    tensors = random_tensors(tiny_config())
    name = "model.layers.0.self_attn.q_proj.weight"
    write_weights(folder, {**tensors, name: torch.zeros(3, 5)}, shards=3)


def wrong_type(folder: Path) -> None:
    tensors = random_tensors(tiny_config())
    name = "model.layers.0.self_attn.q_proj.weight"
    write_weights(folder, {**tensors, name: tensors[name].to(torch.int8)}, shards=3)


def foreign_tensor(folder: Path) -> None:
    write_weights(folder, {**random_tensors(tiny_config()), "lora.weight": torch.zeros(2)}, shards=3)


def pickle_in_its_place(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"\x80\x04K\x01.")


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def lfs_pointer(folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (missing_shard, f"names {SHARD}, which is missing"),
        (truncated_shard, f"{SHARD} is cut off"),
        (header_cut_off, f"{SHARD} is cut off or damaged"),
        (wrong_shape, "has shape [3, 5], but config.json asks for [128, 64]"),
        (wrong_type, "is stored as I8"),
        (foreign_tensor, "holds the unexpected tensor lora.weight"),
        (pickle_in_its_place, f"{SHARD} is cut off or damaged"),
        (only_pickles, "holds its weights only as pickle files (pytorch_model.bin)"),
        (lfs_pointer, "is a git-lfs pointer"),
        (no_index, "but no model.safetensors.index.json: complete the download"),
    ],
)
def test_broken_weights(checkpoint: Path, break_it: Callable[[Path], None], sentence: str) -> None:
    break_it(checkpoint)
    findings = trial(checkpoint)
    broken = findings.pop("weights")
    assert broken.status == "problem"
    assert sentence in broken.text
    assert broken.remedy == f"get the files of {checkpoint} again from where they come"
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert exit_code([broken]) == 4


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"model_type": "llama"}', "describes a model of type 'llama'"),
        ("{", "is not valid JSON"),
        (json.dumps(tiny_config(sa_config={"topk": 8})), "sa_config lacks indexer_head_dim"),
        (json.dumps(tiny_config(hidden_act="relu")), "gives hidden_act 'relu'"),
    ],
)
def test_broken_configurations(checkpoint: Path, content: str, sentence: str) -> None:
    (checkpoint / "config.json").write_text(content)
    findings = trial(checkpoint)
    assert list(findings) == ["folder", "configuration"]
    assert findings["configuration"].status == "problem"
    assert sentence in findings["configuration"].text


def test_a_model_without_indexer_is_right_and_slow(tmp_path: Path) -> None:
    config = tiny_config(sa_config=None)
    findings = trial(write_checkpoint(tmp_path / "dense", config, random_tensors(config)))
    assert findings["configuration"].status == "warning"
    assert "dense attention" in findings["configuration"].text
    assert findings["weights"].status == "ok"


def test_other_layers_than_configured(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=3)
    findings = trial(write_checkpoint(tmp_path / "model", config, random_tensors(tiny_config())))
    assert "lacks the tensor model.layers.2" in findings["weights"].text


def test_broken_small_files(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "preprocessor_config.json").write_text('{"fps": 0}')
    findings = trial(checkpoint)
    assert "has no tokenizer.json" in findings["tokenizer"].text
    assert "gives fps 0" in findings["preprocessor"].text
    assert findings["weights"].status == "ok"
    (checkpoint / "preprocessor_config.json").write_text("{}")
    assert "gives no image_mean and image_std" in trial(checkpoint)["preprocessor"].text


def test_special_tokens(checkpoint: Path, tmp_path: Path) -> None:
    small = tiny_config(vocab_size=262)
    findings = trial(write_checkpoint(tmp_path / "small", small, random_tensors(small)))
    assert "has the token 265, beyond the 262 embeddings" in findings["tokenizer"].text
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert "does not stop at <|im_end|>" in trial(checkpoint)["tokenizer"].text
    text = (checkpoint / "tokenizer.json").read_text()
    (checkpoint / "tokenizer.json").write_text(text.replace("<think>", "<muse>"))
    finding = trial(checkpoint)["tokenizer"]
    assert (finding.status, finding.text) == ("problem", "266 tokens for 272 embeddings; <think> unknown")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "video_token_id": 3}))
    assert "video_token_id is 3" in trial(checkpoint)["tokenizer"].text


def test_an_index_that_promises_another_size(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "metadata": {"total_size": 5}}))
    finding = trial(checkpoint)["weights"]
    assert finding.status == "warning"
    assert "promises 5 bytes" in finding.text


def test_code_and_pickles_are_named_and_left_alone(checkpoint: Path) -> None:
    (checkpoint / "modeling_keye.py").write_text("raise SystemExit")
    (checkpoint / "extra.bin").write_bytes(b"x")
    finding = trial(checkpoint)["folder"]
    assert finding.details["unused"] == ["extra.bin", "modeling_keye.py"]
    assert finding.status == "ok"


def test_a_model_that_is_not_there(tmp_path: Path, hub_cache: Path) -> None:  # noqa: F811
    findings = trial("someone/nothing")
    assert list(findings) == ["folder"]
    assert (
        findings["folder"].remedy
        == "`keye pull someone/nothing` fetches a model by its hub name; --model also takes a folder"
    )
    assert trial(tmp_path / "nowhere")["folder"].status == "problem"
    with pytest.raises(UsageError):
        list(check_model(str(tmp_path), "main"))


def test_hashes_of_a_pulled_model(hub: Hub, hub_cache: Path) -> None:  # noqa: F811
    folder = pull(plan_pull(NAME)).plan.folder
    assert hub_checksum(folder / SHARD) == ("sha256", hub.checksum(SHARD))
    assert hub_checksum(folder / "config.json") == ("git-sha1", hub.checksum("config.json"))
    total = sum(path.stat().st_size for path in folder.iterdir())
    unread = trial(NAME)["hashes"]
    assert (unread.status, unread.details) == ("ok", {"files": 9, "bytes": total, "read": False})
    seen: list[tuple[float, float]] = []
    read = trial(NAME, hashes=True, on_bytes=lambda done, size: seen.append((done, size)))["hashes"]
    assert (read.status, read.details["read"]) == ("ok", True)
    assert seen[-1] == (total, total)
    blob = (folder / SHARD).resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    findings = trial(NAME, hashes=True)
    assert (findings["hashes"].status, findings["hashes"].details["wrong"]) == ("problem", [SHARD])
    assert findings["hashes"].remedy == f"`keye pull {NAME} --verify` fetches what is missing or damaged"
    assert findings["weights"].status == "ok"
    pull(plan_pull(NAME), verify=True)
    assert trial(NAME, hashes=True)["hashes"].status == "ok"
    assert trial(NAME, revision=COMMIT)["folder"].status == "ok"


def test_a_copied_folder_carries_no_hashes(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert hub_checksum(tmp_path / "copy" / SHARD) is None


def test_numbers_in_words() -> None:
    assert (in_words(9_198_400), in_words(31_122_082_160)) == ("9.2 million", "31.1 billion")
