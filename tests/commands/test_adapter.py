"""`--adapter`: what the commands make of it, wherever it is set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import keyecli
from keyecli.model.lora import LoraExperts, LoraLinear
from keyecli.model.shards import weights_revision
from tests.adapters import write_adapter
from tests.commands.conftest import Keye
from tests.tiny import random_tensors, tiny_config, write_checkpoint

CONFIG = tiny_config(hidden_size=128, moe_intermediate_size=64, num_hidden_layers=1)
FEW = ("--max-tokens", "12", "--no-think", "-q")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be quantised. Shared: read it only."""
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", config=CONFIG)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter `first` of it, another `second`, and `nothing`, which changes nothing. Shared: read it only."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "first", base)
    write_adapter(folder / "second", base, seed=1)
    write_adapter(folder / "nothing", base, size=0)
    return folder


@pytest.fixture
def ask(keye: Keye, clip: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`ask(...)` → stdout of a short answer of the base."""
    monkeypatch.setenv("KEYE_MODEL", str(base))

    def call(*arguments: str) -> str:
        code, out, err = keye("ask", str(clip), "What happens?", *FEW, *arguments)
        assert (code, err) == (0, "")
        return out

    return call


@pytest.mark.parametrize("way", ["flag", "environment", "file"])
def test_an_answer_with_an_adapter(
    ask: Callable[..., str],
    way: str,
    base: Path,
    adapters: Path,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = ask()
    if way == "environment":
        monkeypatch.setenv("KEYE_ADAPTER", str(adapters / "first"))
    elif way == "file":
        Path("keye.toml").write_text(f"adapter = '{adapters / 'first'}'")
    out = ask(*(("--adapter", str(adapters / "first")) if way == "flag" else ()))
    assert out != plain
    keye = keyecli.load(base, adapter=adapters / "first")
    assert out == keye.ask(clip, "What happens?", max_tokens=12, think=False).text + "\n"


def test_the_base_is_the_default_model(keye: Keye, clip: Path, base: Path, adapters: Path) -> None:
    found = []
    for name in ("first", "second", "nothing"):
        code, out, _ = keye("ask", str(clip), "What?", *FEW, "--json", "--adapter", str(adapters / name))
        assert code == 0
        answer = json.loads(out)
        assert answer["model"] == str(base)
        found.append(answer["weights_revision"])
    assert len({*found, weights_revision(base)}) == 4


@pytest.mark.parametrize("quant", ["none", "int4", "int8"])
def test_beside_quantised_weights(ask: Callable[..., str], quant: str, base: Path, adapters: Path) -> None:
    plain = ask("--quant", quant)
    assert ask("--quant", quant, "--adapter", str(adapters / "nothing")) == plain
    assert ask("--quant", quant, "--adapter", str(adapters / "first")) != plain
    layer = keyecli.load(base, quant=quant, adapter=adapters / "first").loaded.model.model.layers[0]
    beside = quant != "none"
    assert isinstance(layer.self_attn.q_proj, LoraLinear) is beside
    assert isinstance(layer.mlp.experts, LoraExperts) is beside


@pytest.mark.parametrize("task", ["ground", "summarize"])
def test_other_tasks_have_it(keye: Keye, clip: Path, task: str, base: Path, adapters: Path) -> None:
    query = ("the circle",) if task == "ground" else ()
    code, out, err = keye(task, str(clip), *query, *FEW, "--json", "--adapter", str(adapters / "first"))
    assert code == 0, err
    assert (
        json.loads(out)["weights_revision"] == keyecli.load(base, adapter=adapters / "first").loaded.revision
    )


def test_another_base_is_told(keye: Keye, clip: Path, base: Path, adapters: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", config=CONFIG, tensors=random_tensors(CONFIG, seed=9))
    code, _, err = keye(
        "ask", str(clip), "What?", *FEW[:-1], "-m", str(other), "--adapter", str(adapters / "first")
    )
    assert code == 0
    assert err.startswith(
        f"keye: warning: the adapter {adapters / 'first'} was trained on other weights ({base}, {weights_revision(base)}) "
        f"than those of {other} ({weights_revision(other)}): its answers may be worse\n"
    )


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "{} is no adapter: it holds no adapter_config.json; name the folder that a training run wrote"),
        (_pickle, "{} holds no adapter_model.safetensors but a pickle file, which keyecli never opens: save it as safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 9), "header too large): copy or save it again"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_is_refused(
    keye: Keye, clip: Path, adapters: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    folder = Path(shutil.copytree(adapters / "first", tmp_path / "copy"))
    damage(folder)
    code, out, err = keye("ask", str(clip), "What?", "--adapter", str(folder))
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert sentence.format(folder) in err


def test_an_adapter_of_another_shape_is_refused(
    keye: Keye, clip: Path, base: Path, adapters: Path, tiny_checkpoint: Path
) -> None:
    code, out, err = keye(
        "ask", str(clip), "What?", "-m", str(tiny_checkpoint), "--adapter", str(adapters / "first")
    )
    assert (code, out) == (4, "")
    last = err.splitlines()[-1]
    assert last.startswith(
        f"keye: the adapter {adapters / 'first'}, trained on {base}, does not fit this base: model.layers.0."
    )
    assert last.endswith("; give the base that it was trained on")


def test_a_quantised_base_cannot_take_a_whole_matrix(
    keye: Keye, clip: Path, base: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    folder = write_adapter(tmp_path / "adapter", base, targets=["experts"], whole=[name])
    assert keye("ask", str(clip), "What?", *FEW, "--adapter", str(folder))[0] == 0
    code, _, err = keye("ask", str(clip), "What?", *FEW, "--adapter", str(folder), "--quant", "int4")
    assert (code, err) == (
        4, f"keye: the adapter holds the whole {name}, which is quantised here: use the unquantised base\n",
    )  # fmt: skip


def test_a_batch_answers_anew_with_another_adapter(
    keye: Keye, clip: Path, base: Path, adapters: Path
) -> None:
    job = {"id": "a", "task": "ask", "inputs": str(clip), "question": "What?"}
    Path("jobs.jsonl").write_text(json.dumps(job) + "\n")
    keys = []
    for name in ("first", "first", "second", "nothing"):
        adapter = str(adapters / name)
        assert keye("batch", "jobs.jsonl", "-o", "out.jsonl", *FEW, "--adapter", adapter)[0] == 0
        keys.append([json.loads(line)["key"] for line in Path("out.jsonl").read_text().splitlines()])
    assert [len(found) for found in keys] == [1, 1, 2, 3]
    assert len(set(keys[-1])) == 3


def test_a_manifest_has_the_adapter(
    keye: Keye, clip: Path, base: Path, adapters: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters / "first", tmp_path / "adapter"))
    job = {"id": "a", "task": "ask", "inputs": str(clip), "question": "What?"}
    Path("jobs.jsonl").write_text(json.dumps(job) + "\n")
    options = (*FEW, "--adapter", str(folder), "--manifest", "run.json")
    assert keye("batch", "jobs.jsonl", "-o", "out.jsonl", *options)[0] == 0
    manifest = json.loads(Path("run.json").read_text())
    assert manifest["adapter"] == str(folder)
    assert manifest["model"]["name"] == str(base)

    again = ("batch", "--from-manifest", "run.json", "-o")
    assert keye(*again, "again.jsonl")[:2] == (0, "1 job: 1 done, 0 failed, 0 not as in the manifest\n")
    lines = [json.loads(Path(name).read_text()) for name in ("out.jsonl", "again.jsonl")]
    assert lines[0]["key"] == lines[1]["key"]

    shutil.copyfile(adapters / "second" / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    code, out, err = keye(*again, "changed.jsonl")
    assert (code, out) == (1, "1 job: 1 done, 0 failed, 1 not as in the manifest\n")
    assert "keye: warning: the weights are not those of the manifest\n" in err
