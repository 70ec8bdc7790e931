"""Small real files for the task tests, and the toy model behind the Python API."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from keyecli.session import Keye, load

RATE = 10


def write_clip(path: Path, seconds: float, *, height: int = 96, width: int = 128, seed: int = 0) -> Path:
    """An H.264 clip of random blocks at 10 frames a second whose last frame stands at exactly `seconds`."""
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, RATE)
        for _ in range(int(seconds * RATE) + 1):
            blocks = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            picture = np.kron(blocks, np.ones((16, 16, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds: nine frames at the default rate."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 4.0)


@pytest.fixture(scope="session")
def second_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "second.mp4", 2.0, height=160, width=96, seed=1)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("clips") / "picture.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 140, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def keye(tiny_checkpoint: Path) -> Keye:
    return load(tiny_checkpoint, device="cpu")
