"""Options as users spell them → the settings of a run, on top of what the checkpoint's own files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from keyecli.engine.generate import GenerationSettings
from keyecli.engine.plan import MERGED_PIXELS
from keyecli.errors import UsageError
from keyecli.model.checkpoint import Preprocessor
from keyecli.tasks.ask import AskSettings
from keyecli.video.sampling import FrameBudget, SamplingSettings
from keyecli.video.timecode import Time, parse_span


class AskOptions(TypedDict, total=False):
    """The options of a question; one that is absent or None keeps the model's own default.

    fps: frames a second; max_frames: at most so many a video; max_tokens_video: visual tokens of all videos
    together; min_pixels, max_pixels: area of a frame or image (784 pixels are one token); adaptive_budget:
    fewer tokens for clips under 17 minutes; start, end, duration: the part of each video; exact_resize:
    resize as in training; strict: refuse damaged files; subtitles: a file for the model to read;
    max_tokens: longest answer; temperature: 0 takes the most probable token; top_k, top_p, min_p, seed: how
    tokens are drawn above 0; repetition_penalty: above 1, tokens that were there before are less likely; stop:
    a text before which the answer ends, or several; think: reason first.
    """

    fps: float | None
    max_frames: int | None
    max_tokens_video: int | None
    min_pixels: int | None
    max_pixels: int | None
    adaptive_budget: bool | None
    start: Time | None
    end: Time | None
    duration: Time | None
    exact_resize: bool | None
    strict: bool | None
    subtitles: str | Path | None
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    think: bool | None


def ask_settings(preprocessor: Preprocessor, **options: Unpack[AskOptions]) -> AskSettings:
    """The settings of a run with `options`; UsageError for an unknown one or a value that cannot be used."""
    unknown = sorted(set(options) - set(AskOptions.__annotations__))
    if unknown:
        known = ", ".join(AskOptions.__annotations__)
        raise UsageError(f"there is no option {unknown[0]}; known are {known}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    start_s, end_s = parse_span(given.get("start"), given.get("end"), given.get("duration"))
    # What is not given has its default there.
    chosen = {name: given[name] for name in GenerationSettings.__dataclass_fields__ if name in given}
    if "stop" in chosen:
        chosen["stop"] = (chosen["stop"],) if isinstance(chosen["stop"], str) else tuple(chosen["stop"])
    subtitles = given.get("subtitles")
    return AskSettings(
        sampling=SamplingSettings(
            fps=given.get("fps", preprocessor.fps),
            max_frames=_at_least_one("--max-frames", given.get("max_frames")),
            budget=budget_of(preprocessor.budget, given),
            start_s=start_s,
            end_s=end_s,
            exact_resize=given.get("exact_resize", False),
        ),
        generation=GenerationSettings(**chosen),
        think=given.get("think", True),
        strict=given.get("strict", False),
        subtitles=None if subtitles is None else Path(subtitles),
    )


def budget_of(budget: FrameBudget, given: Mapping[str, Any]) -> FrameBudget:
    """The checkpoint's budget with what was asked for; a bound that crosses the other one moves it along."""
    total = _at_least_one("--max-tokens-video", given.get("max_tokens_video"))
    least = _at_least_one("--min-pixels", given.get("min_pixels"))
    most = _at_least_one("--max-pixels", given.get("max_pixels"))
    if most is not None and most < MERGED_PIXELS:
        raise UsageError(f"--max-pixels must be at least {MERGED_PIXELS}, the area of one token, not {most}")
    if least is not None and most is not None and least > most:
        raise UsageError(f"--min-pixels {least} is above --max-pixels {most}")
    if total is not None:
        budget = replace(budget, total_tokens=total)
    if least is not None:
        low = -(-least // MERGED_PIXELS)
        budget = replace(
            budget,
            min_tokens=low,
            max_tokens=max(low, budget.max_tokens),
            image_min_tokens=low,
            image_max_tokens=max(low, budget.image_max_tokens),
        )
    if most is not None:
        high = most // MERGED_PIXELS
        budget = replace(
            budget,
            min_tokens=min(high, budget.min_tokens),
            max_tokens=high,
            image_min_tokens=min(high, budget.image_min_tokens),
            image_max_tokens=high,
        )
    if given.get("adaptive_budget") is not None:
        budget = replace(budget, adaptive=bool(given["adaptive_budget"]))
    return budget


def _at_least_one(flag: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(f"{flag} must be at least 1, not {value}")
    return value
