"""Finds where one shot ends and the next begins: PySceneDetect's detectors on our own frames at their own times."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np

from keyecli.errors import InputError, UsageError
from keyecli.video.decode import decode_frames
from keyecli.video.sampling import SamplingPlan, SamplingSettings, plan_video
from keyecli.video.source import VideoInfo

if TYPE_CHECKING:
    from scenedetect import SceneDetector

DetectorName = Literal["content", "adaptive"]
THRESHOLDS: dict[str, float] = {"content": 27.0, "adaptive": 3.0}
"""Detector → its default threshold, PySceneDetect's own."""

MIN_SCENE_S = 0.6
_LONG_SIDE_PX = 256  # the size PySceneDetect shrinks to, for which its thresholds are meant
_CHUNK_FRAMES = 32


@dataclass(frozen=True)
class Scene:
    """A shot: [start_s, end_s) in seconds from the clip's first frame, frames [start_frame, end_frame)."""

    start_s: float
    end_s: float
    start_frame: int
    end_frame: int


@dataclass(frozen=True)
class SceneSettings:
    """How shots are told apart; UsageError for a value out of range.

    detector: "content" compares each frame with the one before and cuts where the mean difference of hue, saturation and
    brightness (0 to 255) reaches `threshold`; "adaptive" divides that difference by its neighbours' mean (of two frames
    before and two behind) and cuts where the ratio reaches `threshold`, which lets fast camera motion pass. threshold:
    None takes the detector's default. min_scene_s: no scene is shorter.
    """

    detector: DetectorName = "content"
    threshold: float | None = None
    min_scene_s: float = MIN_SCENE_S
    start_s: Fraction | None = None
    end_s: Fraction | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.detector not in THRESHOLDS:
            raise UsageError(
                f"there is no scene detector {self.detector!r}; there are {', '.join(THRESHOLDS)}"
            )
        if self.threshold is not None and not 0 < self.threshold <= 255:
            raise UsageError(f"--threshold must be above 0 and at most 255, not {self.threshold:g}")
        if not (math.isfinite(self.min_scene_s) and self.min_scene_s >= 0):
            raise UsageError(f"--min-scene must be 0 seconds or more, not {self.min_scene_s}")

    @property
    def used_threshold(self) -> float:
        return THRESHOLDS[self.detector] if self.threshold is None else self.threshold


def refuse_still(info: VideoInfo) -> None:
    """InputError for a still image."""
    if info.kind == "image":
        raise InputError(f"{info.path} is a still image, which has no scenes; name a video")


def detect_scenes(
    info: VideoInfo,
    settings: SceneSettings | None = None,
    *,
    on_progress: Callable[[str, float, float | None], None] | None = None,
) -> list[Scene]:
    """The scenes of a video or an animation, ascending, without gaps, from the first frame asked for to the end.

    Every frame is decoded once, at most 256 pixels wide and high, and forgotten when the next one has been looked at:
    memory does not grow with the pictures. A boundary is the presentation time of the first frame of the new scene.
    Where cuts are closer than `min_scene_s`, PySceneDetect merges them; a last scene shorter than that joins the one
    before. A clip without cuts is one scene. InputError: a still image, a clip of which nothing decodes; UsageError: a
    part that begins past the end. Damage is handled as in `decode_frames`: pictures that are missing are not compared.
    """
    settings = settings or SceneSettings()
    refuse_still(info)
    times = info.frame_times
    # A plan begins and ends with the first and the last frame of the part.
    part = plan_video(info, SamplingSettings(start_s=settings.start_s, end_s=settings.end_s)).times_s
    first, last = bisect_left(times, part[0]), bisect_left(times, part[-1])
    cuts = _cuts(info, settings, first, last, on_progress)
    begin_s = times[first]
    end_s = info.duration_s if last == len(times) - 1 else times[last + 1]
    while cuts and end_s - cuts[-1] < settings.min_scene_s:
        cuts.pop()
    edges = [begin_s, *cuts, max(end_s, begin_s)]
    frames = [*(bisect_left(times, edge_s) for edge_s in edges[:-1]), last + 1]
    return [
        Scene(float(edges[i]), float(edges[i + 1]), frames[i], frames[i + 1]) for i in range(len(edges) - 1)
    ]


def _cuts(
    info: VideoInfo,
    settings: SceneSettings,
    first: int,
    last: int,
    on_progress: Callable[[str, float, float | None], None] | None,
) -> list[Fraction]:
    """Times of the first frames of all scenes but the first one, ascending."""
    from scenedetect.common import FrameTimecode, Timecode

    times = info.frame_times
    height, width = _small(info.height, info.width)
    plan = SamplingPlan(times[first : last + 1], height, width, "video", float(info.average_rate))
    # Times count, and no decision looks at this rate; a single frame has none.
    rate = info.average_rate or Fraction(25)
    detector = _detector(settings)
    found: list[FrameTimecode] = []
    done = 0
    for chunk in decode_frames(info, plan, strict=settings.strict, chunk_frames=_CHUNK_FRAMES):
        for time_s, picture in zip(chunk.times_s, chunk.frames, strict=True):
            tick = Timecode(int(time_s / times.time_base), times.time_base)
            found += detector.process_frame(
                FrameTimecode(tick, rate), np.ascontiguousarray(picture[..., ::-1])
            )
        done += len(chunk.times_s)
        if on_progress:
            on_progress("looking for scenes", done, plan.frames)
    return [cut.pts * cut.time_base for cut in found]


def _detector(settings: SceneSettings) -> SceneDetector:
    from scenedetect.detectors import AdaptiveDetector, ContentDetector

    # A length as a float is seconds, compared with presentation times; as an int it would be frames.
    length_s = float(settings.min_scene_s)
    if settings.detector == "adaptive":
        return AdaptiveDetector(settings.used_threshold, length_s)
    return ContentDetector(settings.used_threshold, length_s)


def _small(height: int, width: int) -> tuple[int, int]:
    """Display size shrunk to 256 pixels at its longer side; a smaller picture stays."""
    shrink = max(1.0, max(height, width) / _LONG_SIDE_PX)
    return max(1, round(height / shrink)), max(1, round(width / shrink))
