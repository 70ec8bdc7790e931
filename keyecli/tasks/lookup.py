"""One look at a part of a clip: its frames prefilled once, every question asked, the answers read as spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from keyecli.engine.generate import Constraint, StopReason
from keyecli.engine.grammar import SpanConstraint, SpanRange
from keyecli.engine.loaded import LoadedModel, OnProgress
from keyecli.engine.plan import InputPlan, plan_inputs
from keyecli.engine.shared import OnText, SharedAnswer, SharedPrefix, question_tokens
from keyecli.engine.stream import Timings
from keyecli.tasks.ask import AskSettings, prompt_text
from keyecli.tasks.scores import Calibration, span_certainties
from keyecli.tasks.spans import find_spans, parse_spans
from keyecli.tasks.stretches import without_warnings
from keyecli.tasks.windows import ScoredSpan
from keyecli.video.sampling import SamplingSettings
from keyecli.video.source import VideoInfo

DECIMALS = 1
"""Of the numbers in an answer, as in the times that the prompt gives before each frame."""
PRECISION_S = 10.0**-DECIMALS

# Of the longest answer, so much is kept for the list itself.
LIST_TOKENS = 256


@dataclass(frozen=True)
class Finding:
    """What one look found for one question, in seconds of the clip.

    presence: the probability that there is anything to find, None where the answer was not constrained.
    understood: False when the answer named neither spans nor that there are none. list_tokens: how many tokens at the
    answer's end are the list; without a constraint, all of them. frame_weights: the share of what
    the answer's list read that came from each frame of the look, None where it was not recorded.
    """

    spans: tuple[ScoredSpan, ...]
    text: str
    reasoning: str
    presence: float | None
    understood: bool
    prompt_tokens: int
    completion_tokens: int
    list_tokens: int
    stop_reason: StopReason
    frame_weights: tuple[float, ...] | None


@dataclass(frozen=True)
class Look:
    """A part of the clip, the frames that came of it, and a finding for each question."""

    plan: InputPlan
    times_s: tuple[Fraction, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Looker:
    """Everything that the looks of one run share."""

    loaded: LoadedModel
    info: VideoInfo
    settings: AskSettings
    calibration: Calibration
    timings: Timings
    constrained: bool = True
    explain: bool = False
    on_reasoning: OnText | None = None

    def look(
        self,
        start_s: Fraction,
        end_s: Fraction,
        sampling: SamplingSettings,
        questions: Sequence[str],
        on_progress: OnProgress | None = None,
    ) -> Look:
        """Look at the frames from `start_s` to `end_s`; the model is told that the part begins at 0.0.

        Errors and warnings are those of `SharedPrefix.prefill`.
        """
        plan = plan_part(self.info, sampling, start_s, end_s)
        with without_warnings():
            texts = [
                prompt_text(question, [plan], self.settings, self.loaded.tokenizer, origin_s=start_s)
                for question in questions
            ]
        prefix = SharedPrefix.prefill(
            self.loaded,
            [plan],
            question_room_tokens=question_tokens(self.loaded, [plan], texts),
            answer_tokens=self.settings.generation.max_tokens,
            think=self.settings.think,
            strict=self.settings.strict,
            exact_resize=sampling.exact_resize,
            origins_s=[start_s],
            timings=self.timings,
            on_progress=on_progress,
        )
        findings = []
        for number, text in enumerate(texts):
            if on_progress:
                on_progress("searching", number, len(texts))
            findings.append(self._find(prefix, text, start_s, end_s))
        return Look(plan, prefix.times_s[0], tuple(findings))

    def _find(self, prefix: SharedPrefix, text: str, start_s: Fraction, end_s: Fraction) -> Finding:
        if not self.explain:
            return self._answer(prefix, text, start_s, end_s)
        from keyecli.engine.evidence import record_attention

        with record_attention(self.loaded.model) as record:
            finding = self._answer(prefix, text, start_s, end_s)
        steps = range(finding.completion_tokens - finding.list_tokens, finding.completion_tokens)
        weights = record.frame_weights(prefix.frame_tokens, steps)
        return replace(finding, frame_weights=tuple(weights.tolist()))

    def _answer(self, prefix: SharedPrefix, text: str, start_s: Fraction, end_s: Fraction) -> Finding:
        made: list[SpanConstraint] = []
        numbers = SpanRange.of_seconds(float(end_s - start_s), DECIMALS)

        def constrain(max_tokens: int, thinking_open: bool) -> Constraint:
            made.append(
                SpanConstraint(
                    self.loaded.tokenizer,
                    numbers,
                    max_tokens=max_tokens,
                    answer_tokens=min(LIST_TOKENS, max_tokens // 2),
                    thinking_open=thinking_open,
                    think=self.settings.think,
                )
            )
            return made[-1]

        answer = prefix.answer(
            text,
            self.settings.generation,
            constraint=constrain if self.constrained else None,
            on_reasoning=self.on_reasoning,
        )
        if made:
            return self._constrained_finding(answer, made[-1], start_s, end_s)
        return self._lenient_finding(answer, start_s, end_s)

    def _constrained_finding(
        self, answer: SharedAnswer, constraint: SpanConstraint, start_s: Fraction, end_s: Fraction
    ) -> Finding:
        pairs = parse_spans(constraint.text)
        assert pairs is not None, "a constrained answer is a valid list"
        certainties = span_certainties(constraint.tokens, constraint.log_odds_present)
        spans = [
            replace(
                _in_clip(pair, start_s, end_s),
                score=self.calibration.score(certainty),
                certainty=(certainty.start, certainty.end),
            )
            for pair, certainty in zip(pairs, certainties, strict=True)
        ]
        return replace(
            self._finding(answer, spans, constraint.text),
            presence=self.calibration.presence_of(constraint.log_odds_present),
            list_tokens=len(constraint.tokens),
        )

    def _lenient_finding(self, answer: SharedAnswer, start_s: Fraction, end_s: Fraction) -> Finding:
        pairs = find_spans(answer.text)
        length_s = float(end_s - start_s)
        spans = [_in_clip(pair, start_s, end_s) for pair in pairs or () if pair[0] < length_s]
        return replace(self._finding(answer, spans, answer.text), understood=pairs is not None)

    def _finding(self, answer: SharedAnswer, spans: Sequence[ScoredSpan], text: str) -> Finding:
        return Finding(
            spans=tuple(spans),
            text=text,
            reasoning=answer.reasoning,
            presence=None,
            understood=True,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=len(answer.token_ids),
            list_tokens=len(answer.token_ids),
            stop_reason=answer.stop_reason,
            frame_weights=None,
        )


def plan_part(info: VideoInfo, sampling: SamplingSettings, start_s: Fraction, end_s: Fraction) -> InputPlan:
    """How the part of a clip from `start_s` to `end_s` is sampled."""
    (plan,) = plan_inputs([info], replace(sampling, start_s=start_s, end_s=end_s))
    return plan


def _in_clip(pair: tuple[float, float], start_s: Fraction, end_s: Fraction) -> ScoredSpan:
    """A span that counts from `start_s`, in seconds of the clip, not beyond `end_s`."""
    begin, end = (round(float(start_s) + edge, 3) for edge in pair)
    return ScoredSpan(begin, min(end, float(end_s)))
