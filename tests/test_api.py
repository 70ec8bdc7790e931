"""The public names: there on use, light until then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import keyecli
from keyecli.errors import KeyeWarning, ModelError, UsageError


def in_fresh_interpreter(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'av', 'numpy', 'rich', 'typer'}"
    assert in_fresh_interpreter(f"import sys, keyecli; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_register_makes_the_model_known_to_transformers(tiny_checkpoint: Path) -> None:
    code = (
        "import keyecli\n"
        "keyecli.register()\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText\n"
        f"config = AutoConfig.from_pretrained({str(tiny_checkpoint)!r})\n"
        "print(AutoModelForImageTextToText._model_mapping[type(config)].__name__)"
    )
    assert in_fresh_interpreter(code) == "KeyeVL2ForConditionalGeneration"


def test_public_names() -> None:
    from keyecli.session import Keye, load
    from keyecli.tasks.ask import Answer

    assert (keyecli.load, keyecli.Keye, keyecli.Answer) == (load, Keye, Answer)
    assert set(keyecli.__all__) <= set(dir(keyecli))
    assert keyecli.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = keyecli.lode  # type: ignore[attr-defined]


def test_load_and_describe(tiny_checkpoint: Path) -> None:
    keye = keyecli.load(tiny_checkpoint, device="cpu", dtype="float32")
    assert repr(keye) == f"<Keye {tiny_checkpoint} on cpu in fp32>"
    assert (keye.name, keye.is_nano, keye.device, keye.dtype) == (str(tiny_checkpoint), False, "cpu", "fp32")
    assert keye.model.config is not None
    assert keye.config.vocab_size == keye.model.config.vocab_size
    assert keye.tokenizer.eos_token == "<|im_end|>"
    assert keye.preprocessor.fps == 2.0
    assert len(keye.revision) >= 8


def test_load_says_when_pixels_are_normalised_by_guess(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint()
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.warns(KeyeWarning, match="gives no image_mean and image_std: 0.5 is used"):
        keyecli.load(folder)


def test_load_refuses_what_is_not_there(tiny_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="no/such"):
        keyecli.load("no/such/folder")
    with pytest.raises(UsageError, match="local files only"):
        keyecli.load(tiny_checkpoint, offline=False)


def test_settings_come_whole_or_one_by_one(tiny_checkpoint: Path) -> None:
    from keyecli.tasks.options import ask_settings

    keye = keyecli.load(tiny_checkpoint, device="cpu")
    settings = ask_settings(keye.preprocessor)
    with pytest.raises(UsageError, match="settings or single options"):
        keye.ask("clip.mp4", "What?", settings=settings, fps=1)
