"""`ground`: when something is on screen or happens, as time spans with scores."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from textwrap import shorten
from typing import Any

from keyecli import __version__
from keyecli.engine.generate import StopReason
from keyecli.engine.loaded import LoadedModel, OnProgress
from keyecli.engine.stream import Timings
from keyecli.errors import KeyeWarning
from keyecli.export.timeline import Segment, Timeline
from keyecli.tasks.ask import (
    STAGES,
    Input,
    InputReport,
    OnText,
    refuse_reserved_words,
    report_input,
)
from keyecli.tasks.lookup import Look, Looker
from keyecli.tasks.refine import refine
from keyecli.tasks.scores import calibration_for
from keyecli.tasks.search import GroundSettings, SearchPlan, plan_search
from keyecli.tasks.windows import (
    ScoredSpan,
    Window,
    join_windows,
    merge_near,
    suppress_overlaps,
)
from keyecli.video.source import VideoInfo
from keyecli.video.timecode import Timebase, nearest_rate


@dataclass(frozen=True)
class Span:
    """A part of the clip, [start_s, end_s) in seconds from its first frame.

    score: the probability that it is right (see `keyecli.tasks.scores`), None where the answer was not constrained.
    """

    start_s: float
    end_s: float
    score: float | None = None


@dataclass(frozen=True)
class WindowAnswer:
    """What the model said about a window of the clip; the times in `answer` count from the window's beginning."""

    start_s: float
    end_s: float
    answer: str
    presence: float | None
    stop_reason: StopReason


@dataclass(frozen=True)
class FrameEvidence:
    """How much of what the answer's list read came from the frame at this time; the weights of a query sum to 1."""

    time_s: float
    weight: float


@dataclass(frozen=True)
class Grounding(Sequence[Span]):
    """When a query is there: a sequence of its spans, ascending, and what they rest on.

    presence: the probability that it is there at all, None where the answer was not constrained. `question` is what
    the model was asked. `windows` are the model's own words, one answer a window. `evidence` is empty unless asked
    for. `timings` are seconds, those of all queries of the run: decode_s, encode_s, prefill_s, generate_s of the first
    look, refine_s, and total_s.
    """

    query: str
    spans: tuple[Span, ...]
    presence: float | None
    question: str
    windows: tuple[WindowAnswer, ...]
    evidence: tuple[FrameEvidence, ...]
    reasoning: str
    input: InputReport
    prompt_tokens: int
    completion_tokens: int
    stop_reason: StopReason
    timings: dict[str, float]
    settings: dict[str, Any]
    model: str
    weights_revision: str
    keye_version: str
    device: str
    dtype: str
    quant: str | None
    kv: str | None
    seed: int
    info: VideoInfo = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)

    def __getitem__(self, index: Any) -> Any:
        return self.spans[index]

    @property
    def found(self) -> bool:
        """True when there is at least one span."""
        return bool(self.spans)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, schema keye.ground/1. Frames count from 0 and ends are exclusive."""
        return {
            "schema": "keye.ground/1",
            "query": self.query,
            "found": self.found,
            "presence": self.presence,
            "spans": _span_dicts(self.spans, self.info),
            "question": self.question,
            "windows": [asdict(window) for window in self.windows],
            "evidence": [asdict(frame) for frame in self.evidence],
            "reasoning": self.reasoning,
            "inputs": [self.input.to_dict()],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "stop_reason": self.stop_reason,
            "timings": dict(self.timings),
            "settings": dict(self.settings),
            "model": self.model,
            "weights_revision": self.weights_revision,
            "keye_version": self.keye_version,
            "device": self.device,
            "dtype": self.dtype,
            "quant": self.quant,
            "kv": self.kv,
            "seed": self.seed,
        }


def ground(
    loaded: LoadedModel,
    item: Input,
    queries: Sequence[str],
    settings: GroundSettings,
    *,
    on_reasoning: OnText | None = None,
    on_progress: OnProgress | None = None,
) -> list[Grounding]:
    """Find every query in one video or animation; they share one prefill. One result a query, in order.

    Errors are those of `plan_search` and of `RunPlan.check`. KeyeWarning: damage, and without the constraint an answer
    that was cut off or not understood.
    """
    begin = time.perf_counter()
    plan = plan_search(loaded, item, queries, settings, weights_loaded=True)
    for question in plan.questions:
        refuse_reserved_words(question, loaded.tokenizer)
    plan.check()
    looker = Looker(
        loaded=loaded,
        info=plan.info,
        settings=settings.ask,
        calibration=calibration_for(loaded),
        timings=Timings(seconds=dict.fromkeys(STAGES, 0.0), device=loaded.device),
        constrained=settings.constrained,
        explain=settings.explain,
        on_reasoning=on_reasoning,
    )
    looks = _look_everywhere(looker, plan, settings, on_progress)
    found = [
        join_windows(plan.windows, [look.findings[query].spans for look in looks])
        for query in range(len(plan.questions))
    ]
    found = [suppress_overlaps(merge_near(spans, settings.merge_gap_s)) for spans in found]
    timings = dict(looker.timings.seconds)
    refining = time.perf_counter()
    if settings.refine:
        found = _refined(looker, plan, looks, found, on_progress)
        found = [merge_near(spans, settings.merge_gap_s) for spans in found]
    finished = time.perf_counter()
    timings |= {"refine_s": finished - refining, "total_s": finished - begin}
    report = _whole_report(looks, settings)
    return [
        _grounding(loaded, settings, plan, looks, number, query, found[number], report, timings)
        for number, query in enumerate(plan.queries)
    ]


def _look_everywhere(
    looker: Looker, plan: SearchPlan, settings: GroundSettings, on_progress: OnProgress | None
) -> list[Look]:
    looks = []
    for number, window in enumerate(plan.windows, 1):
        where = "" if len(plan.windows) == 1 else f"window {number} of {len(plan.windows)}: "
        looks.append(
            looker.look(
                window.start_s,
                window.end_s,
                settings.ask.sampling,
                plan.questions,
                _prefixed(on_progress, where),
            )
        )
    _warn_of_answers(plan, looks)
    return looks


def _warn_of_answers(plan: SearchPlan, looks: Sequence[Look]) -> None:
    for number, query in enumerate(plan.queries):
        findings = [look.findings[number] for look in looks]
        odd = [finding.text for finding in findings if not finding.understood]
        if any(finding.stop_reason == "length" for finding in findings):
            message = f"the answer about {query!r} was cut off; raise --max-tokens"
            warnings.warn(message, KeyeWarning, stacklevel=4)
        elif odd:
            message = f"the answer about {query!r} names no times: {shorten(odd[0], 80)!r}"
            warnings.warn(message, KeyeWarning, stacklevel=4)


def _refined(
    looker: Looker,
    plan: SearchPlan,
    looks: Sequence[Look],
    found: Sequence[Sequence[ScoredSpan]],
    on_progress: OnProgress | None,
) -> list[list[ScoredSpan]]:
    """The spans with boundaries from a second look; it does not count into the stages of the first."""
    second = replace(looker, timings=Timings(device=looker.loaded.device), explain=False)
    rate = min(look.plan.sampling.fps for look in looks)
    if not rate:
        return [list(spans) for spans in found]
    return refine(
        second, plan.questions, found, plan.windows[0].start_s, plan.windows[-1].end_s, rate, on_progress
    )


def _grounding(
    loaded: LoadedModel,
    settings: GroundSettings,
    plan: SearchPlan,
    looks: Sequence[Look],
    number: int,
    query: str,
    found: Sequence[ScoredSpan],
    report: InputReport,
    timings: dict[str, float],
) -> Grounding:
    findings = [look.findings[number] for look in looks]
    presences = [finding.presence for finding in findings if finding.presence is not None]
    generation = settings.ask.generation
    return Grounding(
        query=query,
        spans=tuple(
            Span(span.start_s, span.end_s, span.score)
            for span in best_spans(found, settings.min_score, settings.top)
        ),
        presence=max(presences, default=None),
        question=plan.questions[number],
        windows=tuple(
            WindowAnswer(
                float(window.start_s),
                float(window.end_s),
                finding.text,
                finding.presence,
                finding.stop_reason,
            )
            for window, finding in zip(plan.windows, findings, strict=True)
        ),
        evidence=_evidence(plan.windows, looks, number),
        reasoning="\n\n".join(finding.reasoning for finding in findings if finding.reasoning),
        input=report,
        prompt_tokens=sum(finding.prompt_tokens for finding in findings),
        completion_tokens=sum(finding.completion_tokens for finding in findings),
        stop_reason="length" if any(f.stop_reason == "length" for f in findings) else "stop",
        timings=timings,
        settings={
            **generation.to_dict(),
            "think": settings.ask.think,
            "strict": settings.ask.strict,
            "subtitles": None if settings.ask.subtitles is None else str(settings.ask.subtitles),
            "constrained": settings.constrained,
            "refine": settings.refine,
            "window_s": None if settings.window_s is None else float(settings.window_s),
            "top": settings.top,
            "min_score": settings.min_score,
            "merge_gap_s": settings.merge_gap_s,
            "calibration": calibration_for(loaded).provenance if settings.constrained else None,
        },
        model=loaded.name,
        weights_revision=loaded.revision,
        keye_version=__version__,
        device=loaded.devices,
        dtype=loaded.dtype,
        quant=loaded.quant,
        kv=loaded.kv,
        seed=generation.seed,
        info=plan.info,
    )


def best_spans(spans: Sequence[ScoredSpan], min_score: float | None, top: int | None) -> list[ScoredSpan]:
    """Those with at least `min_score`, of these the `top` best, ascending by time."""
    good = [span for span in spans if min_score is None or (span.score or 0.0) >= min_score]
    best = sorted(good, key=lambda span: (-(span.score or 0.0), span.start_s))[:top]
    return sorted(best, key=lambda span: span.start_s)


def _evidence(windows: Sequence[Window], looks: Sequence[Look], number: int) -> tuple[FrameEvidence, ...]:
    """Weights over all windows; a frame that two of them saw counts where its window is believed."""
    evidence: list[FrameEvidence] = []
    for window, look in zip(windows, looks, strict=True):
        weights = look.findings[number].frame_weights
        for time_s, weight in zip(look.times_s, weights or (), strict=False):
            own = window.own_start_s <= time_s < window.own_end_s or window is windows[-1]
            if own and (not evidence or float(time_s) > evidence[-1].time_s):
                evidence.append(FrameEvidence(float(time_s), weight))
    total = sum(frame.weight for frame in evidence)
    return tuple(replace(frame, weight=frame.weight / total) for frame in evidence) if total else ()


def _whole_report(looks: Sequence[Look], settings: GroundSettings) -> InputReport:
    """One report about all windows; a frame that two of them saw counts once."""
    sampling = settings.ask.sampling
    reports = [report_input(look.plan, look.times_s, sampling) for look in looks]
    times = sorted({time_s for report in reports for time_s in report.times_s})
    planned = {time_s for look in looks for time_s in look.plan.sampling.times_s}
    return replace(
        reports[0],
        frames=len(times),
        frames_planned=len(planned),
        times_s=tuple(times),
        tokens=sum(report.tokens for report in reports),
    )


def timeline_of(results: Sequence[Grounding]) -> Timeline:
    """The spans of all queries about one clip, each under its query's name, for `keyecli.export`."""
    return Timeline.of(
        results[0].info,
        [
            Segment(span.start_s, span.end_s, result.query, score=span.score)
            for result in results
            for span in result.spans
        ],
    )


def _span_dicts(spans: Sequence[Span], info: VideoInfo) -> list[dict[str, Any]]:
    """Spans with frames and timecode, which is null where the frame rate varies or timecode cannot count it."""
    timeline = Timeline(
        info.path, float(info.duration_s), info.width, info.height, info.frame_times, segments=()
    )
    rate = timeline.rate
    timebase = None if rate is None or nearest_rate(rate, Fraction(0)) is None else Timebase.of(rate)
    rows = []
    for span in spans:
        first, end = timeline.frames_of(Segment(span.start_s, span.end_s, ""))
        rows.append(
            {
                "start_s": span.start_s,
                "end_s": span.end_s,
                "start_frame": first,
                "end_frame": end,
                "start_timecode": None if timebase is None else timebase.format(first),
                "end_timecode": None if timebase is None else timebase.format(end),
                "score": span.score,
            }
        )
    return rows


def _prefixed(on_progress: OnProgress | None, words: str) -> OnProgress | None:
    if on_progress is None or not words:
        return on_progress

    def report(description: str, done: float, total: float | None) -> None:
        on_progress(words + description, done, total)

    return report
