"""A folder with two clips and a picture, and data files beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.video.conftest import write_clip

WriteRows = Callable[..., Path]


@pytest.fixture(scope="session")
def made_media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "a.mp4", 51)
    write_clip(folder / "b.mp4", 26)
    Image.fromarray(np.full((56, 84, 3), 90, np.uint8)).save(folder / "still.png")
    return folder


@pytest.fixture
def media(made_media: Path, tmp_path: Path) -> Path:
    """a.mp4 (frames at 0 to 2 s, 2.04 s long), b.mp4 (0 to 1 s), still.png, in a folder of the test's own."""
    return Path(shutil.copytree(made_media, tmp_path / "media"))


@pytest.fixture
def write(media: Path) -> WriteRows:
    """`write(row, …, name="data.jsonl")`: a file of these rows, a text as it is, beside the clips."""

    def make(*rows: Any, name: str = "data.jsonl") -> Path:
        path = media / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
        )
        return path

    return make


def question(reply: str = "A dog.", /, text: str = "<video>What?", **columns: Any) -> dict[str, Any]:
    """A row in the form of ms-swift."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "videos": ["a.mp4"], **columns}
