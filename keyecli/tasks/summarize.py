"""`summarize`: what happens in a clip and when, as prose, timed events and chapters."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Unpack

from keyecli import __version__
from keyecli.engine.generate import StopReason
from keyecli.engine.loaded import LoadedModel, ModelFiles, OnProgress
from keyecli.engine.shared import SharedAnswer, SharedPrefix, question_tokens
from keyecli.engine.stream import Timings
from keyecli.engine.text import answer_text
from keyecli.errors import KeyeWarning, UsageError
from keyecli.model.checkpoint import Preprocessor
from keyecli.tasks.ask import (
    STAGES,
    AskSettings,
    Input,
    InputReport,
    OnText,
    prompt_text,
    refuse_reserved_words,
    report_input,
    without_reserved_words,
)
from keyecli.tasks.chapters import Chapter, chapters_of, joined_parts
from keyecli.tasks.events import Event, parse_summary, settle
from keyecli.tasks.options import AskOptions, ask_settings
from keyecli.tasks.prompts import (
    AUTO_CHAPTERS_SENTENCE,
    CHAPTERS_SENTENCE,
    LANGUAGE_SENTENCE,
    STYLE_SENTENCES,
    prompt_for,
)
from keyecli.tasks.stretches import PartPlan, plan_parts, without_warnings
from keyecli.tasks.summary_request import STYLES, Style, check_request
from keyecli.video.sampling import SamplingSettings
from keyecli.video.scenes import SceneSettings, detect_scenes
from keyecli.video.source import VideoInfo
from keyecli.video.timecode import format_time


@dataclass(frozen=True)
class SummarySettings:
    """Everything about a summary but its clip; UsageError for a value that cannot be used.

    style: None is "brief". chapters: how many, None as many as there is reason for. language: that the model shall
    write in, by its name; None leaves it to the model. snap: chapter edges move to scene edges within a second.
    min_chapter_s: no chapter is shorter; None: see `chapters_of`.
    """

    ask: AskSettings = field(default_factory=AskSettings)
    style: Style | None = None
    chapters: int | None = None
    language: str | None = None
    snap: bool = True
    min_chapter_s: float | None = None

    def __post_init__(self) -> None:
        check_request(
            style=self.style,
            chapters=self.chapters,
            language=self.language,
            min_chapter_s=self.min_chapter_s,
        )


class SummaryOptions(AskOptions, total=False):
    """The options of a summary, those of a question included; one that is absent or None keeps its default.

    style: brief, detailed or bullets; chapters: a number, or "auto"; language, snap, min_chapter_s: see SummarySettings.
    """

    style: Style | None
    chapters: int | Literal["auto"] | None
    language: str | None
    snap: bool | None
    min_chapter_s: float | None


def summary_settings(preprocessor: Preprocessor, **options: Unpack[SummaryOptions]) -> SummarySettings:
    """The settings of a summary with `options`; UsageError for an unknown one or a value that cannot be used."""
    given: dict[str, Any] = dict(options)
    own = {name: given.pop(name, None) for name in ("style", "chapters", "language", "snap", "min_chapter_s")}
    chapters = None if own["chapters"] == "auto" else own["chapters"]
    if chapters is not None and type(chapters) is not int:
        raise UsageError(f"--chapters must be a number or auto, not {chapters}")
    return SummarySettings(
        ask=ask_settings(preprocessor, **given),
        style=own["style"],
        chapters=chapters,
        language=own["language"],
        snap=own["snap"] is not False,
        min_chapter_s=own["min_chapter_s"],
    )


@dataclass(frozen=True)
class PartAnswer:
    """What the model said about a stretch of the clip; its times count from the stretch's beginning."""

    start_s: float
    end_s: float
    answer: str
    stop_reason: StopReason


@dataclass(frozen=True)
class Summary:
    """A summary and what it rests on; times are seconds from the clip's first frame.

    `prose` is what the model wrote beside timed lines, and `text` is that too, or the lines of `events` where there is
    none. `events` may overlap; `chapters` follow each
    other without gaps. `parts` are the model's own words, one answer a stretch that was looked at; `combined` is its
    answer about all of them, None where there was one stretch or the model is not asked for that.
    """

    text: str
    prose: str
    chapters: tuple[Chapter, ...]
    events: tuple[Event, ...]
    parts: tuple[PartAnswer, ...]
    combined: str | None
    reasoning: str
    question: str
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

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data, schema keye.summary/1."""
        return {
            "schema": "keye.summary/1",
            "text": self.text,
            "prose": self.prose,
            "chapters": [asdict(chapter) for chapter in self.chapters],
            "events": [asdict(event) for event in self.events],
            "parts": [asdict(part) for part in self.parts],
            "combined": self.combined,
            "reasoning": self.reasoning,
            "question": self.question,
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


def summarize(
    loaded: LoadedModel,
    item: Input,
    settings: SummarySettings,
    *,
    on_reasoning: OnText | None = None,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Summarise one video or animation.

    The model is asked once for a summary and timed lines (`keyecli.tasks.prompts`); a clip that does not fit at once
    (`plan_parts`) is looked at in stretches, and then the model is asked for a summary of what it wrote about them,
    unless its prompts have no question for that: then the lines of all stretches, joined where a border cut them, are
    the summary. The lines become chapters as `chapters_of` says.

    Errors: those of `plan_parts`, and MemoryLimitError. KeyeWarning: damage, an answer that was cut off, lines without
    times or outside of the clip, options that the model's own prompt has no place for.
    """
    begin = time.perf_counter()
    question = summary_question(loaded, settings)
    refuse_reserved_words(question, loaded.tokenizer)
    parts = plan_parts(loaded, item, settings.ask, question)
    info = parts[0].input.info
    timings = Timings(seconds=dict.fromkeys((*STAGES, "scenes_s"), 0.0), device=loaded.device)

    answers: list[SharedAnswer] = []
    reports: list[InputReport] = []
    for number, part in enumerate(parts, 1):
        where = "" if len(parts) == 1 else f"part {number} of {len(parts)}: "
        answer, report = _answer_part(
            loaded, part, question, settings.ask, timings, on_reasoning, _prefixed(on_progress, where)
        )
        answers.append(answer)
        reports.append(report)
    prose, events = _read_parts(parts, answers)
    chapter_events = events
    combined = None
    if len(parts) > 1 and (combining := _combining_question(loaded, settings, parts, answers)):
        if on_progress:
            on_progress("summarising the parts", 0, None)
        combined = answer_text(
            loaded,
            combining,
            settings.ask.generation,
            think=settings.ask.think,
            timings=timings,
            on_reasoning=on_reasoning,
        )
        answers.append(combined)
        parsed = parse_summary(combined.text)
        prose = parsed.text or prose
        chosen, _ = settle(parsed.lines, float(parts[0].begin_s), float(parts[-1].end_s))
        chapter_events = chosen or events

    chapters = _chapters(info, parts, chapter_events, settings, timings, on_progress)
    stop_reason: StopReason = "length" if any(a.stop_reason == "length" for a in answers) else "stop"
    if stop_reason == "length":
        message = (
            f"an answer was cut off after {max(len(a.token_ids) for a in answers)} tokens; raise --max-tokens"
        )
        warnings.warn(message, KeyeWarning, stacklevel=2)
    if not events:
        message = f"no line of the answer about {info.path.name} has times, so there are no chapters"
        warnings.warn(message, KeyeWarning, stacklevel=2)
    return Summary(
        prose=prose,
        text=prose or _as_lines(events, settings.style),
        chapters=tuple(chapters),
        events=tuple(events),
        parts=tuple(
            PartAnswer(float(part.begin_s), float(part.end_s), answer.text, answer.stop_reason)
            for part, answer in zip(parts, answers, strict=False)
        ),
        combined=None if combined is None else combined.text,
        reasoning="\n\n".join(answer.reasoning for answer in answers if answer.reasoning),
        question=question,
        input=_whole_report(reports, settings.ask.sampling),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(len(answer.token_ids) for answer in answers),
        stop_reason=stop_reason,
        timings={**timings.seconds, "total_s": time.perf_counter() - begin},
        settings={
            **settings.ask.generation.to_dict(),
            "think": settings.ask.think,
            "strict": settings.ask.strict,
            "subtitles": None if settings.ask.subtitles is None else str(settings.ask.subtitles),
            "style": settings.style or STYLES[0],
            "chapters": settings.chapters,
            "language": settings.language,
            "snap": settings.snap,
            "min_chapter_s": settings.min_chapter_s,
        },
        model=loaded.name,
        weights_revision=loaded.revision,
        keye_version=__version__,
        device=loaded.devices,
        dtype=loaded.dtype,
        quant=loaded.quant,
        kv=loaded.kv,
        seed=settings.ask.generation.seed,
        info=info,
    )


def summary_question(files: ModelFiles, settings: SummarySettings) -> str:
    """What the model is asked about a clip. KeyeWarning: an option that its own prompt has no place for."""
    template = prompt_for("summarize", files)
    asked = {"style": settings.style, "language": settings.language}
    for name, value in asked.items():
        # A list of lines is what such a model writes, whatever it is asked.
        if value not in (None, "bullets") and f"{{{name}}}" not in template:
            message = (
                f"the prompt of {files.name} has no place for --{name}, which has no effect on its words"
            )
            warnings.warn(message, KeyeWarning, stacklevel=2)
    return _filled(template, settings)


def _combining_question(
    loaded: LoadedModel,
    settings: SummarySettings,
    parts: Sequence[PartPlan],
    answers: Sequence[SharedAnswer],
) -> str | None:
    """The question about what was written about the parts; None where the model is not asked one."""
    template = prompt_for("combine", loaded)
    if template is None:
        return None
    blocks = []
    for number, (part, answer) in enumerate(zip(parts, answers, strict=True), 1):
        prose, events, _ = _read(part, answer)
        head = f"Part {number}, {float(part.begin_s):.1f} - {float(part.end_s):.1f}:"
        blocks.append("\n".join([head, *filter(None, [prose]), *(event.line for event in events)]))
    written = without_reserved_words("\n\n".join(blocks), loaded.tokenizer)
    return _filled(template, settings).replace("{parts}", written)


def _filled(template: str, settings: SummarySettings) -> str:
    language = (settings.language or "").strip()
    count = settings.chapters
    for place, words in (
        ("{style}", STYLE_SENTENCES[settings.style or STYLES[0]]),
        ("{chapters}", CHAPTERS_SENTENCE.format(count=count) if count else AUTO_CHAPTERS_SENTENCE),
        ("{language}", LANGUAGE_SENTENCE.format(language=language) if language else ""),
    ):
        template = template.replace(place, words)
    return re.sub(r"[ \t]+(?=\n|$)", "", template)


def _answer_part(
    loaded: LoadedModel,
    part: PartPlan,
    question: str,
    settings: AskSettings,
    timings: Timings,
    on_reasoning: OnText | None,
    on_progress: OnProgress | None,
) -> tuple[SharedAnswer, InputReport]:
    """Look at one stretch, whose beginning the model is told is 0.0, and ask about it."""
    plans = [part.input]
    with without_warnings():
        text = prompt_text(question, plans, settings, loaded.tokenizer, origin_s=part.begin_s)
    prefix = SharedPrefix.prefill(
        loaded,
        plans,
        question_room_tokens=question_tokens(loaded, plans, [text]),
        answer_tokens=settings.generation.max_tokens,
        think=settings.think,
        strict=settings.strict,
        exact_resize=settings.sampling.exact_resize,
        origins_s=[part.begin_s],
        timings=timings,
        on_progress=on_progress,
    )
    if on_progress:
        on_progress("summarising", 0, None)
    answer = prefix.answer(text, settings.generation, on_reasoning=on_reasoning)
    return answer, report_input(part.input, prefix.times_s[0], settings.sampling)


def _read(part: PartPlan, answer: SharedAnswer) -> tuple[str, list[Event], int]:
    """Prose and events of one answer, in times of the clip, and how many lines lay outside of its stretch."""
    begin_s, end_s = float(part.begin_s), float(part.end_s)
    parsed = parse_summary(answer.text)
    events, outside = settle(parsed.lines, 0.0, end_s - begin_s)
    shifted = [
        replace(
            event,
            start_s=round(event.start_s + begin_s, 3),
            end_s=min(round(event.end_s + begin_s, 3), end_s),
        )
        for event in events
    ]
    return parsed.text, shifted, outside


def _read_parts(parts: Sequence[PartPlan], answers: Sequence[SharedAnswer]) -> tuple[str, list[Event]]:
    """The prose of all parts, each under its times where there are several, and their events, joined at the borders."""
    read = [_read(part, answer) for part, answer in zip(parts, answers, strict=True)]
    outside = sum(count for _, _, count in read)
    if outside:
        lines = "line lies" if outside == 1 else "lines lie"
        message = f"{outside} {lines} outside of {parts[0].input.info.path.name} and {'is' if outside == 1 else 'are'} left out"
        warnings.warn(message, KeyeWarning, stacklevel=3)
    events = joined_parts([events for _, events, _ in read], [float(part.begin_s) for part in parts[1:]])
    if len(parts) == 1:
        return read[0][0], events
    prose = [
        f"{format_time(part.begin_s)} - {format_time(part.end_s)}\n{text}"
        for part, (text, _, _) in zip(parts, read, strict=True)
        if text
    ]
    return "\n\n".join(prose), events


def _chapters(
    info: VideoInfo,
    parts: Sequence[PartPlan],
    events: Sequence[Event],
    settings: SummarySettings,
    timings: Timings,
    on_progress: OnProgress | None,
) -> list[Chapter]:
    begin_s, end_s = float(parts[0].begin_s), float(parts[-1].end_s)
    cuts_s: list[float] = []
    if settings.snap and len(events) > 1 and settings.chapters != 1:
        # The clip has been decoded once: what is wrong with it has been said.
        with timings.measure("scenes_s"), without_warnings():
            sampling = settings.ask.sampling
            looked_at = SceneSettings(start_s=sampling.start_s, end_s=sampling.end_s)
            cuts_s = [scene.start_s for scene in detect_scenes(info, looked_at, on_progress=on_progress)[1:]]
    chapters = chapters_of(
        events,
        begin_s,
        end_s,
        count=settings.chapters,
        shortest_s=settings.min_chapter_s,
        scene_cuts_s=cuts_s,
    )
    if chapters and settings.chapters is not None and len(chapters) < settings.chapters:
        message = (
            f"{settings.chapters} chapters were asked for, and {info.path.name} has {len(chapters)}: "
            "no more events begin far enough from each other"
        )
        warnings.warn(message, KeyeWarning, stacklevel=3)
    return chapters


def _as_lines(events: Sequence[Event], style: Style | None) -> str:
    mark = "- " if style == "bullets" else ""
    return "\n".join(mark + event.line for event in events)


def _whole_report(reports: Sequence[InputReport], sampling: SamplingSettings) -> InputReport:
    """One report about all stretches; a frame that two of them share counts once."""
    times = sorted({time_s for report in reports for time_s in report.times_s})
    first = reports[0]
    return replace(
        first,
        frames=len(times),
        frames_planned=sum(report.frames_planned for report in reports) - (len(reports) - 1),
        times_s=tuple(times),
        tokens=sum(report.tokens for report in reports),
        settings={
            **first.settings,
            "max_frames": sampling.max_frames,
            "start_s": None if sampling.start_s is None else float(sampling.start_s),
            "end_s": None if sampling.end_s is None else float(sampling.end_s),
        },
    )


def _prefixed(on_progress: OnProgress | None, words: str) -> OnProgress | None:
    if on_progress is None or not words:
        return on_progress

    def report(description: str, done: float, total: float | None) -> None:
        on_progress(words + description, done, total)

    return report
