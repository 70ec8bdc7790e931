"""Long clips in stretches: where a clip must be cut so that each stretch fits the model's context and frame budget."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from keyecli.engine.loaded import LoadedModel, ModelFiles, run_arguments
from keyecli.engine.plan import InputPlan, RunPlan, plan_inputs, plan_run
from keyecli.engine.shared import question_tokens, shared_plan
from keyecli.errors import InputError, KeyeWarning
from keyecli.tasks.ask import AskSettings, Input, open_inputs, prompt_text
from keyecli.tasks.prompts import own_prompts
from keyecli.video.sampling import SamplingSettings
from keyecli.video.source import FrameTimes, VideoInfo

MAX_PARTS = 1000
# A clip is cut when fewer frames than this share of those asked for would fit at once.
LEAST_FRAME_SHARE = Fraction(1, 2)
# The share of the context that must be left for an answer, unless the longest one allowed is shorter.
ANSWER_SHARE = Fraction(1, 8)


@dataclass(frozen=True)
class PartPlan:
    """A stretch of a clip that is looked at at once: [begin_s, end_s] in seconds, its frames, and what it takes.

    begin_s is the time of its first frame; end_s that of the next stretch's first frame, or the end of the clip.
    """

    begin_s: Fraction
    end_s: Fraction
    input: InputPlan
    run: RunPlan


def plan_parts(files: ModelFiles, item: Input, settings: AskSettings, question: str) -> list[PartPlan]:
    """The stretches in which a clip is looked at, ascending: one where it fits at once, else as few as will do.

    A stretch fits when its prompt leaves room for an answer in the model's context, when its frames, which the model's
    token budget may thin out, are at least half of those asked for, and when it is not longer than the clips that the
    model was trained on, where its files say how long those were. Stretches are equally long and share the frame at
    their border; each has the whole token budget, and `max_frames` is shared among them.

    InputError: a still image, a file that cannot be read. UsageError: subtitles that do not fit, and a prompt that is
    longer than the context however the clip is cut.
    """
    (info,) = open_inputs(item, settings)
    if info.kind == "image":
        raise InputError(
            f"{info.path} is a still image, in which nothing happens; ask about it with keye ask"
        )

    def planned(sampling: SamplingSettings) -> PartPlan:
        return _planned(files, info, replace(settings, sampling=sampling), question)

    own = own_prompts(files.folder)
    longest_s = None if own is None else own.longest_clip_s

    def fits(part: PartPlan) -> bool:
        return _fits(part, settings) and (longest_s is None or part.end_s - part.begin_s <= longest_s)

    whole = planned(settings.sampling)  # this one warns when no subtitle lies inside the clip
    if fits(whole):
        return [whole]
    first_s, last_s = whole.input.sampling.times_s[0], whole.input.sampling.times_s[-1]
    most = MAX_PARTS if _leaves_room(whole, settings) else 1
    with without_warnings():
        for count in range(2, most + 1):
            stretches = _stretches(info.frame_times, settings.sampling, first_s, last_s, count)
            if not stretches:
                break
            # All are equally long: the first one tells whether the others are worth looking at.
            if not fits(planned(stretches[0])):
                continue
            parts = [planned(sampling) for sampling in stretches]
            if all(fits(part) for part in parts):
                ends = [*(part.begin_s for part in parts[1:]), whole.end_s]
                return [replace(part, end_s=end_s) for part, end_s in zip(parts, ends, strict=True)]
    whole.run.check()
    return [whole]


@contextmanager
def without_warnings() -> Iterator[None]:
    """No KeyeWarning inside the block: what they would say has been said about the whole clip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KeyeWarning)
        yield


def _stretches(
    times: FrameTimes, sampling: SamplingSettings, first_s: Fraction, last_s: Fraction, count: int
) -> list[SamplingSettings]:
    """`count` stretches that begin at a frame each; none when there are too few frames."""
    targets = [first_s + (last_s - first_s) * place / count for place in range(count)]
    edges = [times[bisect_left(times, target)] for target in targets]
    if any(start_s >= end_s for start_s, end_s in pairwise([*edges, last_s])):
        return []
    frames = None if sampling.max_frames is None else max(2, sampling.max_frames // count)
    return [
        replace(sampling, start_s=start_s, end_s=end_s, max_frames=frames)
        for start_s, end_s in zip(edges, [*edges[1:], sampling.end_s], strict=True)
    ]


def _planned(files: ModelFiles, info: VideoInfo, settings: AskSettings, question: str) -> PartPlan:
    plans = plan_inputs([info], settings.sampling)
    text = prompt_text(question, plans, settings)
    if isinstance(files, LoadedModel):
        run = shared_plan(
            files,
            plans,
            question_room_tokens=question_tokens(files, plans, [text]),
            answer_tokens=settings.generation.max_tokens,
        )
    else:  # without its tokenizer the length of the text is an estimate
        run = plan_run(
            plans,
            files.config,
            **run_arguments(files),
            max_tokens=settings.generation.max_tokens,
            text=text,
        )
    asked_end_s = settings.sampling.end_s
    end_s = info.duration_s if asked_end_s is None else min(info.duration_s, asked_end_s)
    return PartPlan(plans[0].sampling.times_s[0], max(end_s, plans[0].sampling.times_s[-1]), plans[0], run)


def _leaves_room(part: PartPlan, settings: AskSettings) -> bool:
    """Whether the text alone, without pictures, leaves room for an answer: if not, cutting does not help."""
    text_tokens = part.run.prompt_tokens - part.input.sampling.tokens - part.input.layout_tokens
    return text_tokens + _answer_room(part, settings) < part.run.context_tokens


def _answer_room(part: PartPlan, settings: AskSettings) -> int:
    return min(settings.generation.max_tokens, int(part.run.context_tokens * ANSWER_SHARE))


def _fits(part: PartPlan, settings: AskSettings) -> bool:
    run, sampling, asked = part.run, part.input.sampling, settings.sampling
    if run.prompt_tokens + _answer_room(part, settings) > run.context_tokens:
        return False
    span_s = sampling.times_s[-1] - sampling.times_s[0]
    rate = min(Fraction(str(asked.fps)), part.input.info.average_rate)
    wanted = 1 + span_s * rate
    # A limit that the user gave is no reason to cut.
    return sampling.frames >= min(wanted * LEAST_FRAME_SHARE, asked.max_frames or wanted)
