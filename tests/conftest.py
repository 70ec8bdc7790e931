"""Fixtures that several rooms share: a random toy checkpoint in the official layout and what is loaded from it."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Toy tensors gain nothing from a second thread, and threads that wait for each other lose much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what runs in the background; the commands that the tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: without a GPU, its interpreter runs them.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder of a random toy model. Shared by the whole session: read it, never write into it."""
    from tests.tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of a test's own: `make_checkpoint(config=..., tensors=..., shards=...)` → its folder."""
    from tests.tiny import write_checkpoint

    def make(name: str = "checkpoint", **arguments: Any) -> Path:
        return write_checkpoint(tmp_path / name, **arguments)

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> Any:
    """The toy model on the CPU in fp32, in eval mode. Shared: do not change its weights."""
    from keyecli.model.checkpoint import load_model

    return load_model(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint: Path) -> Any:
    """The toy tokenizer: one token a byte, and the special tokens."""
    from keyecli.model.checkpoint import load_tokenizer

    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where `own_cache` puts its folders; whatever runs before a test keeps its cache here too."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYE_CACHE_DIR", str(folder / "first"))
        yield folder


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def own_cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of one test, which is empty, and not the user's."""
    folder = caches / str(next(_numbers))
    monkeypatch.setenv("KEYE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not reach the hub, nor see the user's settings."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("KEYE_MODEL", "KEYE_DEVICE", "KEYE_DTYPE"):
        monkeypatch.delenv(name, raising=False)
