"""The video benchmark: it measures only what gives the plain loop's pictures, and its records say what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyecli.bench import video
from keyecli.bench.video import CLIPS, available_clips, measure, measure_clip, write_clip
from keyecli.errors import InputError
from tests.video.conftest import write_clip as write_numbers


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("bench") / "h264.mp4", "h264", frames=60, size=(320, 192))


def test_a_clip_is_measured(clip: Path) -> None:
    steps: list[str] = []
    (found,) = measure([clip], rounds=2, on_step=steps.append)
    assert (found.clip, found.codec, found.source, found.source_frames) == (
        "h264.mp4",
        "h264",
        (320, 192),
        60,
    )
    assert found.frames == 5
    assert found.seconds > 0 < found.plain_s
    assert found.speedup == found.plain_s / found.seconds
    assert steps == ["comparing h264.mp4", "timing h264.mp4, round 1 of 2", "timing h264.mp4, round 2 of 2"]
    record = json.loads(json.dumps(found.to_dict()))
    assert record["schema"] == "keye.bench.video/1"
    assert record["speedup"] == found.speedup
    assert "h264 320x192, 5 of 60 frames" in found.line()
    assert f"{found.speedup:.2f}x the plain loop" in found.line()


def test_clips_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "FRAMES", 12)
    monkeypatch.setattr(video, "SIZE", (192, 128))
    found = list(measure(rounds=1))
    assert [record.clip for record in found] == [f"{name}.mp4" for name in available_clips()]
    assert {record.source for record in found} == {(192, 128)}
    assert {record.source_frames for record in found} == {12}
    assert set(available_clips()) <= set(CLIPS)


@pytest.mark.parametrize("arguments", [{"options": {"x264-params": "tff=1"}}, {"format": "h264"}])
def test_interlaced_and_untimed_files(tmp_path: Path, arguments: dict[str, Any]) -> None:
    path = write_numbers(tmp_path / "clip.ts", 50, **arguments)
    assert measure_clip(path, rounds=1).source_frames == 50


def test_other_pictures_are_not_timed(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = video._ours

    def one_level_off(*arguments: Any, **named: Any) -> Iterator[np.ndarray]:
        for picture in plain(*arguments, **named):
            picture[0, 0, 0] ^= 1
            yield picture

    monkeypatch.setattr(video, "_ours", one_level_off)
    with pytest.raises(RuntimeError, match="not those of decoding every frame"):
        measure_clip(clip, rounds=1)


def test_other_readers_are_measured_when_they_are_there(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_level_off(*arguments: Any) -> Iterator[np.ndarray]:
        for picture in video._ours(*arguments):
            yield picture ^ 1

    monkeypatch.setattr(video, "_OTHERS", {"json": one_level_off, "no_such_reader": one_level_off})
    others = measure_clip(clip, rounds=1).others
    assert list(others) == ["json"]
    assert others["json"]["seconds"] > 0
    assert others["json"]["mean_difference"] == 1


def test_an_image_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "still.png")
    with pytest.raises(InputError, match="is no video; name a clip"):
        measure_clip(tmp_path / "still.png")
