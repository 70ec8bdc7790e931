"""Options over the checkpoint's defaults, and what is wrong with them said by their flags' names."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from keyecli.engine.generate import GenerationSettings
from keyecli.errors import UsageError
from keyecli.model.checkpoint import Preprocessor
from keyecli.tasks.options import AskOptions, ask_settings
from keyecli.video.sampling import FrameBudget

HALF = (0.5, 0.5, 0.5)
PREPROCESSOR = Preprocessor(HALF, HALF, FrameBudget(min_tokens=64, max_tokens=256), 4.0)


def test_defaults_come_from_the_checkpoint() -> None:
    settings = ask_settings(PREPROCESSOR)
    assert (settings.sampling.fps, settings.sampling.budget) == (4.0, PREPROCESSOR.budget)
    assert (settings.generation.max_tokens, settings.generation.temperature) == (2048, 0.0)
    assert (settings.think, settings.strict, settings.subtitles) == (True, False, None)


def test_none_means_not_given() -> None:
    nothing: Any = dict.fromkeys(AskOptions.__annotations__)
    assert ask_settings(PREPROCESSOR, **nothing) == ask_settings(PREPROCESSOR)


def test_options_reach_their_settings() -> None:
    settings = ask_settings(
        PREPROCESSOR,
        fps=1,
        max_frames=9,
        max_tokens_video=5000,
        adaptive_budget=True,
        exact_resize=True,
        strict=True,
        subtitles="a.srt",
        max_tokens=7,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        seed=3,
        stop=["END", "\n\n"],
        think=False,
    )
    sampling, generation = settings.sampling, settings.generation
    assert (sampling.fps, sampling.max_frames, sampling.exact_resize) == (1, 9, True)
    assert (sampling.budget.total_tokens, sampling.budget.adaptive) == (5000, True)
    assert (generation.max_tokens, generation.temperature, generation.top_p, generation.seed) == (
        7,
        0.5,
        0.9,
        3,
    )
    assert (generation.top_k, generation.min_p, generation.repetition_penalty) == (40, 0.05, 1.1)
    assert generation.stop == ("END", "\n\n")
    assert ask_settings(PREPROCESSOR, stop="END").generation == GenerationSettings(stop=("END",))
    assert (settings.think, settings.strict, settings.subtitles) == (False, True, Path("a.srt"))


@pytest.mark.parametrize(
    ("options", "start_s", "end_s"),
    [
        ({"start": "1:15"}, Fraction(75), None),
        ({"start": 0.1}, Fraction(1, 10), None),
        ({"end": Fraction(1, 3)}, None, Fraction(1, 3)),
        ({"duration": 5}, None, Fraction(5)),
        ({"start": "2.5", "duration": "0:05"}, Fraction(5, 2), Fraction(15, 2)),
        ({"start": 1, "end": 2}, Fraction(1), Fraction(2)),
    ],
)
def test_times_are_exact(options: Any, start_s: Fraction | None, end_s: Fraction | None) -> None:
    sampling = ask_settings(PREPROCESSOR, **options).sampling
    assert (sampling.start_s, sampling.end_s) == (start_s, end_s)


@pytest.mark.parametrize(
    ("options", "frame", "image"),
    [
        ({"max_pixels": 784 * 100 + 783}, (64, 100), (4, 100)),
        ({"max_pixels": 784 * 10}, (10, 10), (4, 10)),
        ({"min_pixels": 784 * 9 + 1}, (10, 256), (10, 20_480)),
        ({"min_pixels": 784 * 300}, (300, 300), (300, 20_480)),
        ({"min_pixels": 784, "max_pixels": 784}, (1, 1), (1, 1)),
    ],
)
def test_pixels_are_tokens(options: Any, frame: tuple[int, int], image: tuple[int, int]) -> None:
    budget = ask_settings(PREPROCESSOR, **options).sampling.budget
    assert (budget.min_tokens, budget.max_tokens) == frame
    assert (budget.image_min_tokens, budget.image_max_tokens) == image


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"end": 5, "duration": 5}, "--end and --duration"),
        ({"start": 5, "end": 5}, "0:00:05.000 to 0:00:05.000 is empty"),
        ({"duration": 0}, "is empty"),
        ({"start": -1}, "--start"),
        ({"end": float("nan")}, "--end"),
        ({"start": "soon"}, "soon"),
        ({"max_tokens_video": 0}, "--max-tokens-video"),
        ({"max_pixels": 700}, "--max-pixels must be at least 784"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "--min-pixels 9000 is above"),
        ({"fps": 0}, "(?i)frames a second"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"frames": 3}, "no option frames; known are fps"),
    ],
)
def test_wrong_options_are_usage_errors(options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ask_settings(PREPROCESSOR, **options)
