"""Several questions about the same frames: prefilled once, each answered as `keye ask` would answer it alone.

Where the device has room, answers are decoded together.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from keyecli.engine.loaded import LoadedModel
from keyecli.engine.plan import InputPlan, plan_inputs
from keyecli.engine.shared import Question, SharedAnswer, SharedPrefix, question_tokens, shared_plan
from keyecli.engine.stream import Timings
from keyecli.errors import KeyeError, KeyeWarning, MemoryLimitError, UsageError
from keyecli.tasks.ask import (
    STAGES,
    Answer,
    AskSettings,
    Sample,
    answer_of,
    checked_question,
    prompt_text,
    refuse_reserved_words,
)
from keyecli.video.decode import report_cut_off
from keyecli.video.source import VideoInfo


class SharedQuestions:
    """Questions whose settings agree in sampling and `strict`; the frames are read when the first one is asked."""

    def __init__(
        self,
        loaded: LoadedModel,
        infos: Sequence[VideoInfo],
        questions: Sequence[tuple[str, AskSettings]],
        *,
        together: bool = True,
    ) -> None:
        """`questions` are all that will be asked, in their order, so that there is room for each of them.

        `together`: with one of them, those that follow may be answered too, and kept until they are asked.
        """
        self._loaded = loaded
        self._together = together and len(questions) > 1
        self._kept: dict[tuple[str, AskSettings], SharedAnswer] = {}
        self._infos = list(infos)
        self._questions = [(question.strip(), settings) for question, settings in questions]
        self._plans: tuple[InputPlan, ...] = ()
        self._prefix: SharedPrefix | None = None
        self._said: list[str] = []  # what reading the frames warned of, which holds for every question

    @property
    def is_filled(self) -> bool:
        """True when the frames have been read and are kept for the next question."""
        return self._prefix is not None

    def answer(self, question: str, settings: AskSettings) -> Answer:
        """Answer one of the questions. Errors and warnings: see `keyecli.tasks.ask.ask`.

        `timings` are this question's own: only the first one has those of reading the frames, and of answers that were
        decoded together the first one has the time of all.
        """
        begin = time.perf_counter()
        timings = Timings(seconds=dict.fromkeys(STAGES, 0.0), device=self._loaded.device)
        question = checked_question(question)
        refuse_reserved_words(question, self._loaded.tokenizer)
        if settings.strict:
            for info in self._infos:
                report_cut_off(info, strict=True)
        self._plans = self._plans or plan_inputs(self._infos, settings.sampling)
        text = prompt_text(question, self._plans, settings, self._loaded.tokenizer)
        prefix, shared = self._prefix, True
        if prefix is None:
            prefix, shared = self._prefill(text, settings, timings)
        prefix.timings = timings
        if shared:
            self._prefix = prefix
        for message in self._said:
            warnings.warn(message, KeyeWarning, stacklevel=2)
        return self._answer(prefix, question, text, settings, timings, begin)

    def _answer(
        self,
        prefix: SharedPrefix,
        question: str,
        text: str,
        settings: AskSettings,
        timings: Timings,
        begin: float,
    ) -> Answer:
        loaded = self._loaded
        given = self._kept.pop((question, settings), None)
        if given is None:
            given = self._generate(prefix, question, text, settings)
        allowed = min(
            settings.generation.max_tokens, loaded.config.max_position_embeddings - given.prompt_tokens
        )
        return answer_of(
            loaded,
            question,
            settings,
            self._plans,
            prefix.times_s,
            samples=[
                Sample(
                    given.text,
                    given.reasoning,
                    len(given.token_ids),
                    given.stop_reason,
                    settings.generation.seed,
                )
            ],
            prompt_tokens=given.prompt_tokens,
            max_tokens=allowed,
            timings={**timings.seconds, "total_s": time.perf_counter() - begin},
        )

    def _generate(
        self, prefix: SharedPrefix, question: str, text: str, settings: AskSettings
    ) -> SharedAnswer:
        """The answer to this question; those to the ones that follow and are answered along with it are kept."""
        following = self._following(question, settings, prefix.together - 1)
        if following:
            asked = Question(text, settings.generation, settings.think)
            try:
                first, *others = prefix.answers([asked, *following.values()])
            except MemoryLimitError:
                self._together = False  # from now on one by one, which takes less
            else:
                self._kept.update(zip(following, others, strict=True))
                return first
        return prefix.answer(text, settings.generation, think=settings.think)

    def _following(
        self, question: str, settings: AskSettings, most: int
    ) -> dict[tuple[str, AskSettings], Question]:
        """Up to so many of the questions behind this one; none that has an error of its own, which is told in its turn."""
        found: dict[tuple[str, AskSettings], Question] = {}
        if not self._together or (question, settings) not in self._questions:
            return found
        for other in self._questions[self._questions.index((question, settings)) + 1 :]:
            if len(found) == most:
                break
            text = self._text(*other)
            if text is not None and other not in (*self._kept, (question, settings)):
                found[other] = Question(text, other[1].generation, other[1].think)
        return found

    def _text(self, question: str, settings: AskSettings) -> str | None:
        """What stands behind the frames for one of the questions; None when it cannot be asked."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KeyeWarning)
            try:
                refuse_reserved_words(checked_question(question), self._loaded.tokenizer)
                return prompt_text(question, self._plans, settings, self._loaded.tokenizer)
            except KeyeError:
                return None

    def _prefill(self, text: str, settings: AskSettings, timings: Timings) -> tuple[SharedPrefix, bool]:
        """The frames in the cache, and whether there is room behind them for every question or for this one only."""
        own = question_tokens(self._loaded, self._plans, [text]), settings.generation.max_tokens
        room, shared = own, False
        if len(self._questions) > 1:
            room, shared = self._room_for_all(own)
        with own_warnings() as said:
            prefix = SharedPrefix.prefill(
                self._loaded,
                self._plans,
                question_room_tokens=room[0],
                answer_tokens=room[1],
                think=settings.think,
                strict=settings.strict,
                exact_resize=settings.sampling.exact_resize,
                together=len(self._questions) if shared and self._together else 1,
                timings=timings,
            )
        self._said = said
        return prefix, shared

    def _room_for_all(self, own: tuple[int, int]) -> tuple[tuple[int, int], bool]:
        """(tokens of a question, tokens of an answer) that all questions fit in; this one's alone where that is too much."""
        texts = [text for item in self._questions if (text := self._text(*item)) is not None]
        answer_tokens = max(settings.generation.max_tokens for _, settings in self._questions)
        room = max(own[0], question_tokens(self._loaded, self._plans, texts)), answer_tokens
        planned = shared_plan(self._loaded, self._plans, question_room_tokens=room[0], answer_tokens=room[1])
        try:
            planned.check()
        except (UsageError, MemoryLimitError):
            return own, False
        return room, True


@contextmanager
def own_warnings() -> Iterator[list[str]]:
    """The KeyeWarnings of this thread inside the block; those of a thread that decodes ahead are said again in time."""
    said: list[str] = []
    thread = threading.get_ident()

    def note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if threading.get_ident() == thread and issubclass(category, KeyeWarning):
            said.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", KeyeWarning)
        warnings.showwarning = note
        yield said
