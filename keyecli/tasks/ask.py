"""`ask`: one question about videos and images, answered in a stream, with a record of what it rests on."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from keyecli import __version__
from keyecli.engine.generate import Generation, GenerationSettings, StopReason, generate, stop_token_ids
from keyecli.engine.loaded import LoadedModel, OnProgress, memory_limits, new_cache, run_arguments
from keyecli.engine.plan import InputPlan, plan_inputs, plan_run
from keyecli.engine.samples import draw_samples
from keyecli.engine.shared import sequences_together
from keyecli.engine.stream import Timings, cache_tokens, prefill_stream, visual_of
from keyecli.errors import KeyeWarning, UsageError
from keyecli.model.prompt import Prompt, Visual, build_prompt
from keyecli.tasks.ask_request import check_samples
from keyecli.tasks.parse import AnswerSplitter, Pieces, split_answer
from keyecli.video.decode import report_cut_off
from keyecli.video.sampling import SamplingSettings
from keyecli.video.source import VideoInfo, probe
from keyecli.video.subtitles import read_subtitles

OnText = Callable[[str], None]

Input = str | Path | VideoInfo
Inputs = Input | Sequence[Input]
"""One or several files; one that was already looked into, by `probe` or for a plan, may be given as what came of it."""

STAGES = ("decode_s", "encode_s", "prefill_s", "generate_s")


@dataclass(frozen=True)
class AskSettings:
    """Everything about a run but its inputs and its question."""

    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    think: bool = True
    strict: bool = False
    subtitles: Path | None = None


@dataclass(frozen=True)
class InputReport:
    """One input as the model saw it: `times_s` are the presentation times of its frames, in seconds.

    A damaged file gives fewer `frames` than `frames_planned`; `width` and `height` are those of a frame as the
    model saw it.
    """

    path: str
    kind: str
    duration_s: float
    frames: int
    frames_planned: int
    times_s: tuple[float, ...]
    width: int
    height: int
    tokens: int
    truncated_at_s: float | None
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "times_s": list(self.times_s)}


@dataclass(frozen=True)
class Sample:
    """One answer of perhaps several: `text` is the answer alone, `reasoning` what the model thought first.

    `stop_reason` is "stop" when the model, or a stop string, ended it and "length" when the room for the answer did.
    """

    text: str
    reasoning: str
    completion_tokens: int
    stop_reason: StopReason
    seed: int


@dataclass(frozen=True)
class Answer:
    """An answer and what it rests on: `text` is the answer alone, `reasoning` what the model thought first.

    `answers` are all that were drawn; `text`, `reasoning`, `completion_tokens`, `stop_reason` and `seed` are those of the
    first. `stop_reason` is "stop" when the model, or a stop string, ended it and "length" when the room for the answer did.
    `timings` are seconds: decode_s, encode_s, prefill_s, generate_s, and total_s, which includes opening
    the files.
    """

    text: str
    reasoning: str
    question: str
    inputs: tuple[InputReport, ...]
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
    answers: tuple[Sample, ...]

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain data, schema keye.ask/1."""
        return {
            "schema": "keye.ask/1",
            "text": self.text,
            "reasoning": self.reasoning,
            "question": self.question,
            "inputs": [report.to_dict() for report in self.inputs],
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
            "answers": [asdict(sample) for sample in self.answers],
        }


def ask(
    loaded: LoadedModel,
    inputs: Inputs,
    question: str,
    settings: AskSettings,
    *,
    n: int = 1,
    on_text: OnText | None = None,
    on_reasoning: OnText | None = None,
    on_progress: OnProgress | None = None,
) -> Answer:
    """Answer `question` about one or several videos and images, which the model sees in the order given.

    `n` answers are drawn, number i from 0 on as one alone would be with i added to the seed. `on_text` and `on_reasoning`
    receive the pieces of a single one as they come. UsageError: no input, no question, subtitles with several videos, a
    prompt longer than the context, several answers at temperature 0 or in pieces; InputError: an input that cannot be
    read; MemoryLimitError. Warns (KeyeWarning) about damaged inputs and about an answer that was cut off.
    """
    begin = time.perf_counter()
    check_samples(n, settings.generation.temperature)
    if n > 1 and (on_text or on_reasoning):
        raise UsageError("only a single answer comes in pieces: leave on_text and on_reasoning out")
    question = checked_question(question)
    refuse_reserved_words(question, loaded.tokenizer)
    infos = open_inputs(inputs, settings)
    plans = plan_inputs(infos, settings.sampling)
    text = prompt_text(question, plans, settings, loaded.tokenizer)
    content: list[dict[str, str]] = [{"type": plan.sampling.kind} for plan in plans]
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}]

    def lay_out(visuals: Sequence[Visual]) -> Prompt:
        return build_prompt(loaded.tokenizer, loaded.config, messages, visuals, think=settings.think)

    planned = plan_run(
        plans,
        loaded.config,
        **run_arguments(loaded),
        max_tokens=settings.generation.max_tokens,
        prompt_tokens=len(lay_out([visual_of(plan) for plan in plans]).input_ids),
        weights_loaded=True,
    )
    planned.check()

    timings = Timings(seconds=dict.fromkeys(STAGES, 0.0), device=loaded.device)
    seed = settings.generation.seed
    drawn = [replace(settings.generation, max_tokens=planned.max_tokens, seed=seed + i) for i in range(n)]
    together = sequences_together(loaded, planned, planned.max_tokens, n)
    with memory_limits(loaded.device):
        room = cache_tokens(plans, planned.total_tokens) + (together - 1) * planned.max_tokens
        cache = new_cache(loaded, room)
        prefilled = prefill_stream(
            loaded,
            plans,
            lay_out,
            cache,
            exact_resize=settings.sampling.exact_resize,
            strict=settings.strict,
            timings=timings,
            on_progress=on_progress,
        )
        prompt = prefilled.prompt
        stop_ids = stop_token_ids(loaded.config, loaded.tokenizer, loaded.generation_config)
        on_token = (lambda count: on_progress("answering", count, None)) if on_progress else None
        with timings.measure("generate_s"):
            if n == 1:
                splitter = AnswerSplitter(prompt.thinking_open)
                generation = generate(
                    loaded.model,
                    loaded.tokenizer,
                    cache,
                    prefilled.hidden,
                    prompt.next_position,
                    drawn[0],
                    stop_ids=stop_ids,
                    prompt_ids=prompt.input_ids,
                    on_text=lambda piece: _deliver(splitter.add(piece), on_text, on_reasoning),
                    on_token=on_token,
                )
                _deliver(splitter.finish(), on_text, on_reasoning)
                generations = [generation]
            else:
                generations = draw_samples(
                    loaded,
                    cache,
                    prefilled.hidden,
                    prompt.next_position,
                    drawn,
                    stop_ids=stop_ids,
                    prompt_ids=prompt.input_ids,
                    together=together,
                    on_token=on_token,
                )

    return answer_of(
        loaded,
        question,
        settings,
        plans,
        prefilled.times_s,
        samples=[
            _sample(generation, prompt.thinking_open, one.seed)
            for generation, one in zip(generations, drawn, strict=True)
        ],
        prompt_tokens=len(prompt.input_ids),
        max_tokens=planned.max_tokens,
        timings={**timings.seconds, "total_s": time.perf_counter() - begin},
    )


def _sample(generation: Generation, thinking_open: bool, seed: int) -> Sample:
    reasoning, text = split_answer(generation.text, thinking_open)
    return Sample(text, reasoning, len(generation.token_ids), generation.stop_reason, seed)


def answer_of(
    loaded: LoadedModel,
    question: str,
    settings: AskSettings,
    plans: Sequence[InputPlan],
    times_s: Sequence[tuple[Fraction, ...]],
    *,
    samples: Sequence[Sample],
    prompt_tokens: int,
    max_tokens: int,
    timings: dict[str, float],
) -> Answer:
    """What was generated, as an Answer; `times_s` are the frames that came for each input, `max_tokens` what there was room for.

    Warns (KeyeWarning) about answers that were cut off.
    """
    if any(sample.stop_reason == "length" for sample in samples):
        _warn_cut_off(max_tokens, settings.generation.max_tokens)
    first = samples[0]
    return Answer(
        text=first.text,
        reasoning=first.reasoning,
        question=question,
        inputs=tuple(
            report_input(plan, times, settings.sampling) for plan, times in zip(plans, times_s, strict=True)
        ),
        prompt_tokens=prompt_tokens,
        completion_tokens=first.completion_tokens,
        stop_reason=first.stop_reason,
        timings=timings,
        settings={
            **replace(settings.generation, max_tokens=max_tokens).to_dict(),
            "think": settings.think,
            "strict": settings.strict,
            "subtitles": None if settings.subtitles is None else str(settings.subtitles),
        },
        model=loaded.name,
        weights_revision=loaded.revision,
        keye_version=__version__,
        device=loaded.devices,
        dtype=loaded.dtype,
        quant=loaded.quant,
        kv=loaded.kv,
        seed=first.seed,
        answers=tuple(samples),
    )


def checked_question(question: str) -> str:
    """The question without space around it; UsageError when nothing is left."""
    question = question.strip()
    if not question:
        raise UsageError("the question is empty: say what you want to know about the video")
    return question


def open_inputs(inputs: Inputs, settings: AskSettings) -> list[VideoInfo]:
    """Look into every input. InputError: one that cannot be read, or with `strict` one that is cut off."""
    given = [inputs] if isinstance(inputs, (str, Path, VideoInfo)) else list(inputs)
    if not given:
        raise UsageError("no input: give at least one video or image")
    infos = [item if isinstance(item, VideoInfo) else probe(item) for item in given]
    if settings.strict:
        for info in infos:
            report_cut_off(info, strict=True)
    return infos


def prompt_text(
    question: str,
    plans: Sequence[InputPlan],
    settings: AskSettings,
    tokenizer: Any = None,
    *,
    origin_s: Fraction = Fraction(0),
) -> str:
    """What stands behind the visuals: the subtitles of the sampled span, if any, then the question.

    With a tokenizer, subtitles lose the words that it reserves. Their times count from `origin_s`, and a line that
    is on screen there begins at 0.0.
    """
    if settings.subtitles is None:
        return question
    videos = [plan for plan in plans if plan.sampling.kind == "video"]
    if len(videos) != 1:
        raise UsageError(f"--subtitles goes with exactly one video, and {len(videos)} were given")
    begin, end = videos[0].sampling.times_s[0], videos[0].sampling.times_s[-1]
    lines = [
        f"[{float(max(Fraction(0), cue.start_s - origin_s)):.1f} - {float(cue.end_s - origin_s):.1f}] "
        f"{' '.join(cue.text.split())}"
        for cue in read_subtitles(settings.subtitles)
        if cue.start_s <= end and cue.end_s >= begin and cue.text.strip()
    ]
    if not lines:
        warnings.warn(f"{settings.subtitles} has no line inside the sampled part", KeyeWarning, stacklevel=2)
        return question
    block = "\n".join(lines)
    if tokenizer is not None:
        block = without_reserved_words(block, tokenizer)
    return f"Subtitles:\n{block}\n\n{question}"


def reserved_words(tokenizer: Any) -> list[str]:
    """Spellings that the tokenizer would read as marks of its own instead of as text."""
    marks = {word for word in tokenizer.get_added_vocab() if re.fullmatch(r"<\|.*\|>", word)}
    return sorted(marks | set(tokenizer.all_special_tokens))


def without_reserved_words(text: str, tokenizer: Any) -> str:
    """`text` without these words, and without those that taking one out leaves behind."""
    words = reserved_words(tokenizer)
    while any(word in text for word in words):
        for word in words:
            text = text.replace(word, "")
    return text


def refuse_reserved_words(question: str, tokenizer: Any) -> None:
    """UsageError when the question holds a word that would break the prompt's layout."""
    for word in reserved_words(tokenizer):
        if word in question:
            raise UsageError(f"the question contains {word}, a mark of the model's own: leave it out")


def report_input(plan: InputPlan, times_s: Sequence[Fraction], settings: SamplingSettings) -> InputReport:
    """What was used of one input: the frames that came, and the settings as they took effect."""
    info, sampling, budget = plan.info, plan.sampling, settings.budget
    if sampling.kind == "image":
        used: dict[str, Any] = {"min_tokens": budget.image_min_tokens, "max_tokens": budget.image_max_tokens}
    else:
        used = {
            "fps": float(sampling.fps),
            "max_frames": settings.max_frames,
            "min_tokens": budget.min_tokens,
            "max_tokens": budget.max_tokens,
            "total_tokens": budget.total_tokens,
            "adaptive_budget": budget.adaptive,
            "start_s": None if settings.start_s is None else float(settings.start_s),
            "end_s": None if settings.end_s is None else float(settings.end_s),
        }
    return InputReport(
        path=str(info.path),
        kind=info.kind,
        duration_s=float(info.duration_s),
        frames=len(times_s),
        frames_planned=sampling.frames,
        times_s=tuple(float(time_s) for time_s in times_s),
        width=sampling.width,
        height=sampling.height,
        tokens=len(times_s) * sampling.tokens_per_frame,
        truncated_at_s=None if info.truncated_at_s is None else float(info.truncated_at_s),
        settings={**used, "exact_resize": settings.exact_resize},
    )


def _deliver(pieces: Pieces, on_text: OnText | None, on_reasoning: OnText | None) -> None:
    if pieces.reasoning and on_reasoning:
        on_reasoning(pieces.reasoning)
    if pieces.text and on_text:
        on_text(pieces.text)


def _warn_cut_off(allowed: int, asked: int) -> None:
    way = "raise --max-tokens" if allowed == asked else "the context is full: sample less to leave more room"
    warnings.warn(f"the answer was cut off after {allowed} tokens; {way}", KeyeWarning, stacklevel=4)
