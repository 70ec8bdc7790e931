"""Small clips and jobs about them, and a ledger read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from keyecli.batch import frames
from keyecli.engine import stream
from tests.video.conftest import write_clip

DECODING: list[Any] = [stream, frames]
TIMES = ("started_at", "seconds", "shared_with")


@pytest.fixture(scope="session")
def short_clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three clips of one to two seconds."""
    folder = tmp_path_factory.mktemp("batch")
    return [write_clip(folder / f"{name}.mp4", frames) for name, frames in (("a", 26), ("b", 51), ("c", 38))]


@pytest.fixture
def write_jobs(tmp_path: Path) -> Callable[..., Path]:
    """Writes jobs into a file of the test's own: `write_jobs([{...}, ...])` → its path."""

    def write(jobs: Iterable[dict[str, Any]], name: str = "jobs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
        return path

    return write


def replace_decoding(monkeypatch: pytest.MonkeyPatch, make: Callable[[Any], Any]) -> None:
    """Wherever a batch decodes frames, `make(decode_frames)` does it instead."""
    for module in DECODING:
        monkeypatch.setattr(module, "decode_frames", make(module.decode_frames))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of an output."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def lasting(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run: times, and what shared a prefill with what."""
    kept = {name: value for name, value in record.items() if name not in TIMES}
    results = [
        {name: value for name, value in result.items() if name != "timings"} for result in kept["results"]
    ]
    return {**kept, "results": results}
