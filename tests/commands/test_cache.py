"""`keye cache`: what it shows is there, what it clears is gone, and it takes nothing that it was not asked to."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.conftest import Keye

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
FEW = ("--max-tokens", "4", "--no-think", "-q")


@pytest.fixture(autouse=True)
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache of the test's own, which is not there yet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    return folder / "hub"


@pytest.fixture
def models(hub: Path) -> Path:
    """One model of this family at two commits, and a model and a data set of other kinds."""
    for repo, commit, kind in (
        ("models--Kwai--Keye", COMMIT, "KeyeVL2"),
        ("models--Kwai--Keye", OTHER_COMMIT, "KeyeVL2"),
        ("models--other--bert", COMMIT, "bert"),
        ("datasets--other--clips", COMMIT, "KeyeVL2"),
    ):
        snapshot = hub / repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (hub / repo / "blobs").mkdir(exist_ok=True)
        for name, content in (
            ("config.json", json.dumps({"model_type": kind})),
            ("w.safetensors", "w" * 500),
        ):
            blob = hub / repo / "blobs" / f"{name}-{commit}"
            blob.write_text(content)
            (snapshot / name).symlink_to(blob)
        (hub / repo / "refs").mkdir(exist_ok=True)
        (hub / repo / "refs" / "main").write_text(commit)
    return hub


@pytest.fixture
def asked(keye: Keye, clips: Callable[..., Path], tiny_checkpoint: Path) -> list[str]:
    """Two clips that were asked about, the second one later; the arguments of the questions' model."""
    model = ["-m", str(tiny_checkpoint), "--device", "cpu"]
    for name, frames in (("a.mp4", 26), ("b.mp4", 38)):
        assert keye("ask", str(clips(name, frames)), "What?", *model, *FEW)[0] == 0
        time.sleep(0.02)
    return model


def shown(keye: Keye, *arguments: str) -> dict[str, object]:
    code, out, err = keye("cache", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_models_are_those_of_this_family() -> None:
    from keyecli.hub.models import MODEL_TYPE
    from keyecli.model.config import KeyeVL2Config

    assert KeyeVL2Config.model_type == MODEL_TYPE


def test_nothing_there(keye: Keye, own_cache: Path, hub: Path) -> None:
    code, out, err = keye("cache")
    assert (code, err) == (0, "")
    assert out == (
        f"encoded frames: 0 clips, 0 bytes of 10.0 GiB, in {own_cache / 'frames'}\n"
        f"models: 0 of Keye-VL-2.0, 0 bytes, in {hub}\n"
    )
    assert keye("cache", "clear") == (0, "", "keye: nothing to remove\n")
    assert keye("cache", "clear", "--models", "--encoded") == (0, "", "keye: nothing to remove\n")
    assert not own_cache.exists()


def test_where_it_is(keye: Keye, own_cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keye("cache", "path") == (0, f"{own_cache}\n", "")
    assert json.loads(keye("cache", "path", "--json")[1]) == {"path": str(own_cache)}
    monkeypatch.delenv("KEYE_CACHE_DIR")
    assert keye("cache", "path") == (0, f"{folder / '.cache' / 'keye'}\n", "")


def test_what_is_shown(keye: Keye, asked: list[str], own_cache: Path, models: Path) -> None:
    said = shown(keye)
    assert {name: said[name] for name in ("schema", "folder", "limit_bytes", "models_folder")} == {
        "schema": "keye.cache/1",
        "folder": str(own_cache / "frames"),
        "limit_bytes": 10 * 2**30,
        "models_folder": str(models),
    }
    entries = said["entries"]
    assert isinstance(entries, list)
    assert [(entry["clip"], entry["frames"]) for entry in entries] == [("b.mp4", 3), ("a.mp4", 3)]
    assert said["bytes"] == sum(entry["bytes"] for entry in entries) > 0
    for entry in entries:
        assert entry["model"] == asked[1]
        assert abs(entry["used_at"] - time.time()) < 600
        assert Path(entry["folder"]).is_dir()
    found = said["models"]
    assert isinstance(found, list)
    assert [(model["name"], model["commit"]) for model in found] == [
        ("Kwai/Keye", COMMIT),
        ("Kwai/Keye", OTHER_COMMIT),
    ]
    assert said["models_bytes"] == sum(model["bytes"] for model in found) > 1000

    code, out, err = keye("cache")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.match(r"encoded frames: 2 clips, [\d.]+ KiB of 10\.0 GiB, in ", lines[0])
    assert lines[1].split() == ["clip", "frames", "tokens", "size", "last", "used", "model"]
    assert [line.split()[:2] for line in lines[2:4]] == [["b.mp4", "3"], ["a.mp4", "3"]]
    assert re.match(r"models: 2 of Keye-VL-2\.0, 1\.0 KiB, in ", lines[4])
    assert [line.split()[:2] for line in lines[6:]] == [
        ["Kwai/Keye", COMMIT[:12]],
        ["Kwai/Keye", OTHER_COMMIT[:12]],
    ]


def test_used_means_not_decoded(
    keye: Keye, asked: list[str], clips: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyecli.engine import stream

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(stream, "decode_frames", fail)
    code, out, err = keye("ask", str(clips("a.mp4", 26)), "Who?", *asked, *FEW, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["timings"]["cache_s"] > 0
    entries = shown(keye)["entries"]
    assert isinstance(entries, list)
    assert [entry["clip"] for entry in entries] == ["a.mp4", "b.mp4"]


def test_without_the_cache(
    keye: Keye, clips: Callable[..., Path], tiny_checkpoint: Path, own_cache: Path
) -> None:
    question = ("ask", str(clips("a.mp4", 26)), "What?", "-m", str(tiny_checkpoint), *FEW)
    assert keye(*question, "--no-cache")[0] == 0
    assert not own_cache.exists()
    assert keye(*question, "--cache-size", "0.000001")[0] == 0
    assert not list(own_cache.glob("frames/*"))
    code, _, err = keye(*question, "--cache-size", "0")
    assert (code, err) == (2, "keye: --cache-size must be above 0, not 0.0\n")
    Path("keye.toml").write_text("cache = false\n")
    assert keye(*question)[0] == 0
    assert not list(own_cache.glob("frames/*"))


def test_clearing_encoded_frames(keye: Keye, asked: list[str], own_cache: Path, models: Path) -> None:
    entries = shown(keye)["entries"]
    assert isinstance(entries, list)
    os.utime(entries[0]["folder"], (time.time() - 3 * 86400,) * 2)
    code, out, err = keye("cache", "clear", "--older-than", "2")
    assert (code, out) == (0, "")
    assert re.fullmatch(r"keye: removed the encoded frames of 1 clip: [\d.]+ KiB\n", err)
    left = shown(keye)["entries"]
    assert isinstance(left, list)
    assert [entry["clip"] for entry in left] == ["a.mp4"]
    removed = shown(keye, "clear", "--encoded")
    assert removed["schema"] == "keye.cache.clear/1"
    assert removed["entries"] == left
    assert removed["models"] == []
    assert removed["freed_bytes"] == left[0]["bytes"]
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []
    assert len(shown(keye)["models"]) == 2  # type: ignore[arg-type]


def test_clearing_models_is_agreed_to(
    keye: Keye, asked: list[str], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(models.rglob("*"))
    code, out, err = keye("cache", "clear", "--models")
    assert (code, out) == (2, "")
    assert err.startswith(
        "keye: removing models (Kwai/Keye at aaaaaaaaaaaa, Kwai/Keye at bbbbbbbbbbbb, 1.0 KiB)"
    )
    assert err.endswith("is for good: add --yes to agree\n")
    assert sorted(models.rglob("*")) == before
    assert keye("cache", "clear", "--models", "--older-than", "1") == (0, "", "keye: nothing to remove\n")

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question, err: print(question) or False)
    code, out, err = keye("cache", "clear", "--models")
    assert (code, out) == (2, "Remove 2 models, 1.0 KiB?\n")
    assert err.endswith("keye: nothing was removed\n")
    assert sorted(models.rglob("*")) == before

    code, out, err = keye("cache", "clear", "--models", "--yes")
    assert (code, out, err) == (0, "", "keye: removed 2 models: 1.0 KiB\n")
    assert not (models / "models--Kwai--Keye").exists()
    assert (models / "models--other--bert" / "snapshots" / COMMIT / "config.json").exists()
    assert (models / "datasets--other--clips").exists()
    assert len(shown(keye)["entries"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["burn"], "keye cache can show, path and clear, not burn"),
        (["--models"], "--encoded, --models, --older-than and --yes go with `keye cache clear`"),
        (["path", "--yes"], "--encoded, --models, --older-than and --yes go with `keye cache clear`"),
        (["clear", "--older-than", "-1"], "--older-than must be 0 days or more, not -1"),
    ],
)
def test_wrong_usage(keye: Keye, arguments: list[str], sentence: str) -> None:
    assert keye("cache", *arguments) == (2, "", f"keye: {sentence}\n")


def test_a_damaged_entry_is_shown_and_cleared(keye: Keye, asked: list[str]) -> None:
    entries = shown(keye)["entries"]
    assert isinstance(entries, list)
    Path(entries[1]["folder"], "entry.json").write_text("{")
    assert "(damaged)" in keye("cache")[1]
    keye("cache", "clear")
    assert shown(keye)["entries"] == []
