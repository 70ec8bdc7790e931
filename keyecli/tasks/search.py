"""Where a clip is searched: as a whole, or in windows that each fit the model, and what every look takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Unpack

from keyecli.engine.loaded import ModelFiles, run_arguments
from keyecli.engine.plan import RunPlan, plan_run
from keyecli.errors import InputError, UsageError
from keyecli.model.checkpoint import Preprocessor
from keyecli.tasks.ask import AskSettings, Input, open_inputs, prompt_text
from keyecli.tasks.lookup import plan_part
from keyecli.tasks.options import AskOptions, ask_settings
from keyecli.tasks.prompts import ground_question, own_prompts
from keyecli.tasks.search_request import MIN_WINDOW_S, check_search
from keyecli.tasks.stretches import without_warnings
from keyecli.tasks.windows import OVERLAP_SHARE, Window, plan_windows
from keyecli.video.source import VideoInfo

MAX_WINDOWS = 1000
_OWN_OPTIONS = ("constrained", "refine", "window", "top", "min_score", "merge_gap", "explain")
# A window is short enough when its frames come at this share of the wanted rate or more.
_RATE_SHARE = 0.95


@dataclass(frozen=True)
class GroundSettings:
    """Everything about a search but its clip and its queries; UsageError for a value that cannot be used.

    constrained: the answer can be nothing but a valid list. refine: look at boundaries again. window_s: search
    windows of this length, None as long as the model can see at once. top: at most so many spans a query, the best.
    min_score: leave out spans below it. merge_gap_s: spans at most this far apart are one. explain: record which
    frames the answer attended to.
    """

    ask: AskSettings = field(default_factory=AskSettings)
    constrained: bool = True
    refine: bool = False
    window_s: Fraction | None = None
    top: int | None = None
    min_score: float | None = None
    merge_gap_s: float = 0.0
    explain: bool = False

    def __post_init__(self) -> None:
        check_search(
            window_s=None if self.window_s is None else float(self.window_s),
            top=self.top,
            min_score=self.min_score,
            merge_gap_s=self.merge_gap_s,
            constrained=self.constrained,
        )


class GroundOptions(AskOptions, total=False):
    """The options of a search, those of a question included; one that is absent or None keeps its default.

    constrained, refine, top, min_score, explain: see GroundSettings; window, merge_gap: its `window_s` and
    `merge_gap_s`, in seconds.
    """

    constrained: bool | None
    refine: bool | None
    window: float | None
    top: int | None
    min_score: float | None
    merge_gap: float | None
    explain: bool | None


def ground_settings(preprocessor: Preprocessor, **options: Unpack[GroundOptions]) -> GroundSettings:
    """The settings of a search with `options`; UsageError for an unknown one or a value that cannot be used."""
    given: dict[str, Any] = dict(options)
    own = {name: given.pop(name, None) for name in _OWN_OPTIONS}
    window = own["window"]
    check_search(window_s=window)  # before it becomes a fraction, which cannot be infinite
    return GroundSettings(
        ask=ask_settings(preprocessor, **given),
        constrained=own["constrained"] is not False,
        refine=bool(own["refine"]),
        # Through the shortest decimal spelling: 0.1 means one tenth, not its binary neighbour.
        window_s=None if window is None else Fraction(str(window)),
        top=own["top"],
        min_score=own["min_score"],
        merge_gap_s=float(own["merge_gap"] or 0.0),
        explain=bool(own["explain"]),
    )


@dataclass(frozen=True)
class SearchPlan:
    """Where a clip is looked at, and what each look takes."""

    info: VideoInfo
    queries: tuple[str, ...]
    questions: tuple[str, ...]
    windows: tuple[Window, ...]
    runs: tuple[RunPlan, ...]

    def check(self) -> None:
        """UsageError when the context is too small for a look, MemoryLimitError when the device is."""
        for run in self.runs:
            run.check()


def plan_search(
    files: ModelFiles,
    item: Input,
    queries: Sequence[str],
    settings: GroundSettings,
    *,
    weights_loaded: bool = False,
) -> SearchPlan:
    """What `ground` with the same arguments will take; nothing is decoded.

    A clip is looked at as a whole when it fits the model's context and frame budget at the wanted rate, and is no longer
    than the clips that the model was trained on where its folder says so; else in the fewest windows for which that
    holds. InputError: a still image, a file that cannot be read. UsageError: no query, an empty one, one with a mark of
    the model's own.
    """
    (info,) = open_inputs(item, settings.ask)
    if info.kind == "image":
        raise InputError(
            f"{info.path} is a still image, in which nothing happens; ask about it with keye ask"
        )
    if not queries:
        raise UsageError('nothing to look for: give a query, as in `keye ground clip.mp4 "the red circle"`')
    questions = tuple(ground_question(query, files) for query in queries)
    # Where the sampled part begins and ends, and one warning for subtitles that are not in it.
    start_s, end_s = _searched_part(info, settings)
    longest = max(questions, key=len)
    whole = plan_part(info, settings.ask.sampling, start_s, end_s)
    prompt_text(longest, [whole], settings.ask)

    def run_of(window: Window) -> RunPlan:
        return _plan_window(files, info, longest, settings, window, weights_loaded)

    with without_warnings():
        if settings.window_s is not None:
            windows = plan_windows(start_s, end_s, settings.window_s)
            if len(windows) > MAX_WINDOWS:
                raise UsageError(f"--window makes {len(windows)} windows of this clip; make them longer")
        else:
            windows = _fewest_windows(files, settings, start_s, end_s, run_of)
        runs = tuple(run_of(window) for window in windows)
    return SearchPlan(info, tuple(queries), questions, tuple(windows), runs)


def _searched_part(info: VideoInfo, settings: GroundSettings) -> tuple[Fraction, Fraction]:
    sampling = settings.ask.sampling
    start_s = sampling.start_s or Fraction(0)
    end_s = info.duration_s if sampling.end_s is None else min(sampling.end_s, info.duration_s)
    # A part without any frame's own time shows the frame that is on screen.
    return start_s, max(end_s, start_s + Fraction(1, 10))


def _plan_window(
    files: ModelFiles,
    info: VideoInfo,
    question: str,
    settings: GroundSettings,
    window: Window,
    weights_loaded: bool,
) -> RunPlan:
    plan = plan_part(info, settings.ask.sampling, window.start_s, window.end_s)
    return plan_run(
        [plan],
        files.config,
        **run_arguments(files),
        max_tokens=settings.ask.generation.max_tokens,
        text=prompt_text(question, [plan], settings.ask, origin_s=window.start_s),
        weights_loaded=weights_loaded,
    )


def _fewest_windows(
    files: ModelFiles,
    settings: GroundSettings,
    start_s: Fraction,
    end_s: Fraction,
    run_of: Callable[[Window], RunPlan],
) -> list[Window]:
    own = own_prompts(files.folder)
    longest_s = own.longest_clip_s if own is not None else None
    whole = plan_windows(start_s, end_s, end_s - start_s)
    windows, count = whole, 1
    while count <= MAX_WINDOWS:
        window_s = windows[0].end_s - windows[0].start_s
        # A clip of a round length ends a little later, with its last frame's own time.
        if (longest_s is None or window_s < longest_s + 1) and _fits(run_of(windows[0]), settings):
            return windows
        count += 1
        # So long that `count` windows, of which each begins three quarters of a window after the last, cover it all.
        length_s = math.ceil((end_s - start_s) / (1 + (count - 1) * (1 - OVERLAP_SHARE)))
        if length_s < MIN_WINDOW_S:
            break
        windows = plan_windows(start_s, end_s, Fraction(length_s))
    return whole


def _fits(run: RunPlan, settings: GroundSettings) -> bool:
    """True when the prompt leaves room for the answer, and frames come at the wanted rate or as many as may be."""
    (item,) = run.inputs
    sampling, asked = item.sampling, settings.ask.sampling
    if (
        run.prompt_tokens + min(settings.ask.generation.max_tokens, run.context_tokens // 8)
        > run.context_tokens
    ):
        return False
    wanted = min(asked.fps, float(item.info.average_rate))
    limited = asked.max_frames is not None and sampling.frames >= asked.max_frames
    return limited or sampling.frames <= 2 or sampling.fps >= _RATE_SHARE * wanted
