"""The example scripts import their neighbours, as they do when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

NANO = Path(__file__).resolve().parents[2] / "examples" / "nano"


@pytest.fixture(autouse=True)
def nano_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(NANO))
    for name in ("recipe", "sight", "train", "evaluate"):
        sys.modules.pop(name, None)
