"""A hub on 127.0.0.1 with a toy model, and a Hugging Face cache of the test's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import Hub, Server


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint in three shards beside what no pull may take. Shared: do not write into it."""
    from tests.tiny import write_checkpoint

    folder = write_checkpoint(tmp_path_factory.mktemp("hub") / "toy", shards=3)
    (folder / "modeling_keye.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    (folder / "README.md").write_text("# toy")
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    from huggingface_hub import constants

    cache = tmp_path / "hf" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return cache


@pytest.fixture
def hub(toy_folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves the toy; nothing waits between attempts."""
    from huggingface_hub import constants

    from keyecli.hub import transfer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "WAITS_S", (0.0, 0.0, 0.0))
    # huggingface_hub's own waiting between attempts at a listing.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with Server(Hub.of(toy_folder)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
