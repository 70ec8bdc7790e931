"""`keye quantize`, and `--quant` where models are loaded: exact output and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keyecli import session
from keyecli.errors import UsageError
from keyecli.model.quantize import QuantizedLinear
from tests.commands.conftest import Keye
from tests.tiny import tiny_config, write_checkpoint


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    config = tiny_config(hidden_size=128, moe_intermediate_size=64, num_hidden_layers=1)
    return write_checkpoint(tmp_path / "model", config=config)


def test_a_folder_is_written_and_used(keye: Keye, wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    code, stdout, stderr = keye("quantize", str(wide), str(out), "--quant", "int8", "--group", "64", "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["schema"] == "keye.quantize/1"
    assert (report["quant"], report["group"], report["matrices"]) == ("int8", 64, 6)
    assert report["folder"] == str(out)
    assert report["bytes"] < report["source_bytes"]
    model = session.load(out, device="cpu").loaded.model
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)


def test_the_line_that_is_printed(keye: Keye, wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = keye("quantize", str(wide), str(out))
    assert (code, stderr) == (0, "")
    assert stdout == f"{out}: int4 in groups of 64, 1 MiB in the place of 1 MiB\n"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "give a model and a folder to write"),
        (("{wide}", "{out}", "--group", "32"), 2, "--group 32 is not possible; use 64 or 128"),
        (("{wide}", "{out}", "--quant", "int3"), 2, "--quant must be none, int4, int8 or fp8, not int3"),
        (("{wide}", "{wide}"), 2, "is there already: choose another folder, or remove it"),
        (("{out}", "{out}"), 4, "there is no model folder"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], code: int, sentence: str, keye: Keye, wide: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answered, stdout, stderr = keye("quantize", *(text.format(wide=wide, out=out) for text in arguments))
    assert answered == code
    assert sentence in stderr
    assert stdout == ""
    assert not out.exists()


def test_quant_is_a_setting(
    wide: Path, clip: Path, tmp_path: Path, keye: Keye, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, small = (
        session.plan(clip, model=wide, device="cpu", quant=quant).memory.weights_bytes
        for quant in (None, "int4")
    )
    assert small < plain
    loaded = session.load(wide, device="cpu", quant="int4").loaded
    assert isinstance(loaded.model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    out = tmp_path / "out"
    monkeypatch.setenv("KEYE_QUANT", "fp8")
    assert keye("quantize", str(wide), str(out), "-q")[1].startswith(f"{out}: fp8 in groups of 64")
    with pytest.raises(UsageError, match="quantised already, fp8 in groups of 64; leave the option out"):
        session.load(out, device="cpu", quant="int4")
    assert session.load(out, device="cpu", quant="fp8").loaded.config.quantization_config["weights"] == "fp8"
