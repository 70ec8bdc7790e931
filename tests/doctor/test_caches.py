"""What the doctor says about the caches."""

from __future__ import annotations

from pathlib import Path

from keyecli.doctor.caches import check_caches
from tests.hub.conftest import hub_cache  # noqa: F401 - a fixture

COMMIT = "c" * 40


def put(cache: Path, name: str, kind: str) -> Path:
    folder = cache / ("models--" + name.replace("/", "--"))
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (snapshot / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    return folder


def test_an_empty_machine(hub_cache: Path, own_cache: Path) -> None:  # noqa: F811
    findings = list(check_caches())
    assert [(finding.name, finding.status) for finding in findings] == [
        ("Hugging Face", "ok"),
        ("keye", "ok"),
    ]
    assert findings[0].text == f"{hub_cache} does not exist: no model has been fetched yet"
    assert findings[1].text == f"0 bytes in {own_cache}"


def test_models_whole_broken_off_and_of_others(hub_cache: Path, own_cache: Path) -> None:  # noqa: F811
    put(hub_cache, "someone/keye", "KeyeVL2")
    put(hub_cache, "someone/llama", "llama")
    half = put(hub_cache, "someone/half", "KeyeVL2")
    (half / "blobs" / ("a" * 64 + ".incomplete")).write_bytes(b"x" * 2048)
    (half / "snapshots" / COMMIT / "config.json").write_text("{not json")
    (hub_cache / "models--someone--torn").mkdir()
    own_cache.mkdir(parents=True)
    (own_cache / "frames").write_bytes(b"x" * 5000)
    findings = {finding.name: finding for finding in check_caches()}
    assert list(findings) == ["Hugging Face", "someone/keye", "someone/half", "keye"]
    hub = findings["Hugging Face"]
    assert (hub.status, hub.details["repositories"]) == ("warning", 3)
    assert "1 that cannot be read" in hub.text
    assert findings["someone/keye"].details["commit"] == COMMIT
    broken = findings["someone/half"]
    assert broken.text == "fetching broke off: 2.0 KiB in 1 unfinished files"
    assert broken.remedy == "`keye pull someone/half` goes on from there"
    assert findings["keye"].text == f"4.9 KiB in {own_cache}"
