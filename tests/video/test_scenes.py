"""Scenes: cuts at the frames where they are, at those frames' own times, whatever the file's rate and orientation."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyecli.errors import InputError, UsageError
from keyecli.video.scenes import Scene, SceneSettings, detect_scenes
from keyecli.video.source import probe
from tests.video.test_damage import cut

Clip = Callable[..., Path]
SHOTS = ((200, 30, 30), (30, 60, 200), (220, 220, 40), (20, 20, 20))


def shots(*lengths: int, size: tuple[int, int] = (160, 96)) -> Callable[[int], np.ndarray]:
    """`picture(number)` of a clip with a flat shot of each length, and a small square that moves in all of them."""
    starts = np.cumsum([0, *lengths])

    def picture(number: int) -> np.ndarray:
        shot = int(np.searchsorted(starts, number, side="right")) - 1
        image = np.full((size[1], size[0], 3), SHOTS[shot % len(SHOTS)], np.uint8)
        left = number * 3 % (size[0] - 16)
        image[8:24, left : left + 16] = 255
        return image

    return picture


def edges(scenes: list[Scene]) -> list[float]:
    assert [scene.end_s for scene in scenes[:-1]] == [scene.start_s for scene in scenes[1:]]
    assert [scene.end_frame for scene in scenes[:-1]] == [scene.start_frame for scene in scenes[1:]]
    return [scene.start_s for scene in scenes] + [scenes[-1].end_s]


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_cuts_at_their_frames(clip: Clip, detector: Any) -> None:
    path = clip(frames=75, picture=shots(20, 30, 25))
    scenes = detect_scenes(probe(path), SceneSettings(detector))
    assert scenes == [Scene(0.0, 0.8, 0, 20), Scene(0.8, 2.0, 20, 50), Scene(2.0, 3.0, 50, 75)]


@pytest.mark.parametrize("detector", ["content", "adaptive"])
def test_the_same_as_pyscenedetect_itself(clip: Clip, detector: Any) -> None:
    """Its own reader and its own loop find the same frames at a constant rate, also where cuts come too fast."""
    import scenedetect

    path = clip(frames=150, picture=shots(20, 30, 4, 3, 5, 40, 48), size=(320, 192))
    detectors: dict[str, Any] = {
        "content": scenedetect.ContentDetector(min_scene_len=15),
        "adaptive": scenedetect.AdaptiveDetector(min_scene_len=15),
    }
    theirs = [start.frame_num for start, _ in scenedetect.detect(str(path), detectors[detector])]
    ours = [scene.start_frame for scene in detect_scenes(probe(path), SceneSettings(detector))]
    assert ours == (theirs or [0])
    assert len(ours) > 2


def test_variable_rate(clip: Clip) -> None:
    """Frames 10 to 40 ms apart: a cut is told at its frame's own time, which no average rate gives."""
    gaps = [10, 40, 25, 15, 33] * 20
    pts = [sum(gaps[:index]) for index in range(100)]
    path = clip("clip.mkv", 100, pts=pts, time_base=Fraction(1, 1000), picture=shots(45, 30, 25))
    info = probe(path)
    assert info.average_rate not in (25, 30)
    scenes = detect_scenes(info)
    assert [scene.start_s for scene in scenes] == [0.0, pts[45] / 1000, pts[75] / 1000]
    assert scenes[-1].end_s == float(info.duration_s)


def test_min_scene_counts_seconds(clip: Clip) -> None:
    """20 frames are 0.2 s at the beginning of this clip and 2 s at its end."""
    pts = [*range(0, 400, 10), *range(400, 4400, 100)]
    path = clip("clip.mkv", 80, pts=pts, time_base=Fraction(1, 1000), picture=shots(20, 20, 20, 20))
    scenes = detect_scenes(probe(path), SceneSettings(min_scene_s=0.5))
    assert [scene.start_frame for scene in scenes] == [0, 60]
    scenes = detect_scenes(probe(path), SceneSettings(min_scene_s=0.1))
    assert [scene.start_frame for scene in scenes] == [0, 20, 40, 60]


@pytest.mark.parametrize("degrees", [90, 180])
def test_rotated(clip: Clip, degrees: int) -> None:
    picture = shots(20, 30, 25)

    def prepare(stream: Any) -> None:
        stream.set_display_rotation(-degrees)

    rotated = detect_scenes(probe(clip("turned.mp4", 75, picture=picture, prepare=prepare)))
    assert rotated == detect_scenes(probe(clip("plain.mp4", 75, picture=picture)))


def test_a_last_scene_that_is_too_short_joins_the_one_before(clip: Clip) -> None:
    path = clip(frames=60, picture=shots(30, 25, 5))
    assert edges(detect_scenes(probe(path))) == [0.0, 1.2, 2.4]
    assert edges(detect_scenes(probe(path), SceneSettings(min_scene_s=0.1))) == [0.0, 1.2, 2.2, 2.4]


def test_fast_motion_is_no_cut_for_the_adaptive_detector(clip: Clip) -> None:
    """Every frame is far from the one before: content flags what follows, adaptive only the larger jump."""
    generator = np.random.default_rng(0)

    def picture(number: int) -> np.ndarray:
        blocks = generator.integers(0, 200, (6, 10, 3), dtype=np.uint8)
        image = np.kron(blocks, np.ones((16, 16, 1), np.uint8))
        return image if number < 30 else np.full_like(image, 255) - image // 40

    path = clip(frames=60, picture=picture, options={"crf": "10"})
    info = probe(path)
    found = detect_scenes(info, SceneSettings("adaptive", min_scene_s=0.0))
    assert [scene.start_frame for scene in found] == [0, 30]
    assert len(detect_scenes(info, SceneSettings("content", min_scene_s=0.0))) > 20


def test_threshold(clip: Clip) -> None:
    """A step of 20 levels of brightness is a third of that in the mean of hue, saturation and brightness."""

    def picture(number: int) -> np.ndarray:
        return np.full((96, 160, 3), 100 if number < 25 else 120, np.uint8)

    info = probe(clip(picture=picture))
    assert len(detect_scenes(info)) == 1
    assert edges(detect_scenes(info, SceneSettings(threshold=5.0))) == [0.0, 1.0, 2.0]


def test_a_part(clip: Clip) -> None:
    info = probe(clip(frames=100, picture=shots(20, 30, 25, 25)))
    settings = SceneSettings(start_s=Fraction("1.0"), end_s=Fraction("2.8"))
    assert detect_scenes(info, settings) == [Scene(1.0, 2.0, 25, 50), Scene(2.0, 2.84, 50, 71)]


def test_one_frame_and_no_cuts(clip: Clip) -> None:
    info = probe(clip("one.mp4", 1))
    assert detect_scenes(info) == [Scene(0.0, float(info.duration_s), 0, 1)]
    assert edges(detect_scenes(probe(clip("calm.mp4", 50, picture=shots(50))))) == [0.0, 2.0]


def test_animations_and_images(tmp_path: Path) -> None:
    from PIL import Image

    pictures = [Image.fromarray(shots(10, 10)(number)) for number in range(20)]
    for name in ("moving.gif", "moving.webp"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100, loop=0)
        assert edges(detect_scenes(probe(tmp_path / name))) == [0.0, 1.0, 2.0]
    pictures[0].save(tmp_path / "still.png")
    with pytest.raises(InputError, match=r"still\.png is a still image, which has no scenes; name a video"):
        detect_scenes(probe(tmp_path / "still.png"))


def test_a_file_that_is_cut_off(clip: Clip) -> None:
    path = cut(clip("clip.mkv", 200, picture=shots(40, 60, 50, 50), options={"g": "10"}), 0.6)
    info = probe(path)
    assert info.truncated_at_s is not None
    with pytest.warns(match="is cut off"):
        scenes = detect_scenes(info)
    assert [scene.start_s for scene in scenes][:2] == [0.0, 1.6]
    assert scenes[-1].end_s == float(info.truncated_at_s)
    with pytest.raises(InputError, match="cut off"):
        detect_scenes(info, SceneSettings(strict=True))


def test_memory_does_not_grow_with_the_pictures(clip: Clip) -> None:
    def peak(frames: int) -> int:
        info = probe(clip(f"{frames}.mp4", frames, picture=shots(frames)))
        tracemalloc.start()
        detect_scenes(info)
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return reached

    peak(40)  # imports
    picture_bytes = 160 * 96 * 3
    assert peak(400) - peak(100) < 10 * picture_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detector": "magic"}, "there is no scene detector 'magic'; there are content, adaptive"),
        ({"threshold": 0.0}, "--threshold must be above 0 and at most 255, not 0"),
        ({"threshold": float("nan")}, "--threshold must be above 0 and at most 255, not nan"),
        ({"min_scene_s": -1.0}, r"--min-scene must be 0 seconds or more, not -1\.0"),
        ({"min_scene_s": float("inf")}, "--min-scene must be 0 seconds or more, not inf"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SceneSettings(**arguments)
