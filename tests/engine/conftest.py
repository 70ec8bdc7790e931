"""The toy model as the engine sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keyecli.engine.loaded import LoadedModel
from tests.engine.scenes import loaded_from


@pytest.fixture(scope="session")
def loaded(tiny_checkpoint: Path, tiny_model: Any, tiny_tokenizer: Any) -> LoadedModel:
    return loaded_from(tiny_checkpoint, tiny_model, tiny_tokenizer)
