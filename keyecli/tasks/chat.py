"""`chat`: many questions about videos and images that the model looks at once."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from keyecli import __version__
from keyecli.engine.conversation import AnswerInterrupted, Conversation, Reply
from keyecli.engine.loaded import LoadedModel, OnProgress
from keyecli.engine.plan import plan_inputs
from keyecli.engine.stream import Timings
from keyecli.errors import KeyeWarning, UsageError
from keyecli.export.files import write_texts
from keyecli.tasks.ask import (
    AskSettings,
    InputReport,
    Inputs,
    OnText,
    checked_question,
    open_inputs,
    prompt_text,
    refuse_reserved_words,
    report_input,
    without_reserved_words,
)
from keyecli.tasks.transcript import SUFFIXES, SavedFile, Transcript, Turn, content_hash, require_utf8

STAGES = ("prefill_s", "generate_s")
SEEDS = 2**63


class Chat:
    """A conversation. Begin one with `Keye.chat`.

    The model has seen the inputs when this exists; `inputs` says what of them. An error leaves the conversation as it was.
    Ctrl-C while an answer comes is raised as KeyboardInterrupt, and what had come by then is kept as the last turn.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        conversation: Conversation,
        settings: AskSettings,
        inputs: tuple[InputReport, ...],
        turns: Sequence[Turn] = (),
    ) -> None:
        self.inputs = inputs
        self._loaded = loaded
        self._conversation = conversation
        self._settings = settings
        self._turns = tuple(replace(turn, inputs=inputs) for turn in turns)
        paths = [report.path for report in inputs]
        self._files = _Files(paths if settings.subtitles is None else [*paths, str(settings.subtitles)])

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was asked and answered, the first turn first."""
        return self._turns

    @property
    def messages(self) -> list[dict[str, str]]:
        """The same as chat messages: "role" is user or assistant, "content" is text."""
        roles = ("user", "assistant")
        return [
            {"role": role, "content": text}
            for turn in self._turns
            for role, text in zip(roles, (turn.question, turn.text), strict=True)
        ]

    @property
    def visual_tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(report.tokens for report in self.inputs)

    def ask(
        self,
        question: str,
        *,
        on_text: OnText | None = None,
        on_reasoning: OnText | None = None,
        on_progress: OnProgress | None = None,
    ) -> Turn:
        """Answer the next question.

        `on_text` and `on_reasoning` get the pieces as they come. UsageError: no question, a mark of the model's own in it, a
        conversation longer than the context; MemoryLimitError.
        """
        seed = self._settings.generation.seed
        return self._answer(self._turns, question, seed, on_text, on_reasoning, on_progress)

    def retry(
        self,
        *,
        on_text: OnText | None = None,
        on_reasoning: OnText | None = None,
        on_progress: OnProgress | None = None,
    ) -> Turn:
        """Answer the last question again, where answers are drawn with the seed after its last one. Errors as in `ask`."""
        last = self._turn(len(self._turns))
        drawn = self._settings.generation.temperature > 0
        seed = (last.seed + drawn) % SEEDS
        return self._answer(self._turns[:-1], last.question, seed, on_text, on_reasoning, on_progress)

    def edit(
        self,
        number: int,
        question: str,
        *,
        on_text: OnText | None = None,
        on_reasoning: OnText | None = None,
        on_progress: OnProgress | None = None,
    ) -> Turn:
        """Ask `question` in the place of turn `number`, counted from 1; the turns behind it are forgotten. Errors as in `ask`."""
        before = self._turns[: self._turn(number).number - 1]
        seed = self._settings.generation.seed
        return self._answer(before, question, seed, on_text, on_reasoning, on_progress)

    def undo(self) -> None:
        """Forget the last turn; UsageError when there is none."""
        self._turns = self._turns[: self._turn(len(self._turns)).number - 1]

    def clear(self) -> None:
        """Forget all turns, not the inputs."""
        self._turns = ()

    def transcript(self) -> Transcript:
        """The conversation as it can be saved; reads the inputs once for the hashes of their contents."""
        files = self._files.saved()
        inputs = len(self.inputs)
        subtitles = files[inputs] if files[inputs:] else None
        return Transcript(tuple(files[:inputs]), subtitles, self._settings.sampling, self._turns)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the conversation: JSON to go on from when `path` ends in .json, Markdown when it ends in .md.

        UsageError: another ending, a file that is there (without `overwrite`), a place that cannot be written to; KeyeError
        when the disk does not take it.
        """
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"the name {path.name} does not tell a format: end it in .md or .json")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists: give another name, or replace it with /save! (overwrite=True)")
        transcript = self.transcript()
        if path.suffix.lower() == ".json":
            require_utf8(file.path for file in transcript.files)
            text = json.dumps(transcript.to_dict(), ensure_ascii=False, indent=2) + "\n"
        else:
            text = transcript.markdown()
        write_texts([(path, text)], overwrite=True)

    def _turn(self, number: int) -> Turn:
        if not self._turns:
            raise UsageError("nothing was asked yet")
        if not 1 <= number <= len(self._turns):
            raise UsageError(f"there is no turn {number}: the last one is {len(self._turns)}")
        return self._turns[number - 1]

    def _answer(
        self,
        before: tuple[Turn, ...],
        question: str,
        seed: int,
        on_text: OnText | None,
        on_reasoning: OnText | None,
        on_progress: OnProgress | None,
    ) -> Turn:
        """Ask `question` behind the turns `before`, which with the new one become the conversation's once it is answered."""
        begin = time.perf_counter()
        question = checked_question(question)
        refuse_reserved_words(question, self._loaded.tokenizer)
        settings = replace(self._settings.generation, seed=seed)
        timings = Timings(seconds=dict.fromkeys(STAGES, 0.0), device=self._loaded.device)
        # An answer may spell one of the model's marks letter by letter, which is no mark until it is read again.
        said = [
            text
            for turn in before
            for text in (turn.question, without_reserved_words(turn.text, self._loaded.tokenizer))
        ]

        def keep(reply: Reply) -> Turn:
            seconds = {**timings.seconds, "total_s": time.perf_counter() - begin}
            turn = self._turn_of(len(before) + 1, question, reply, seed, seconds)
            self._turns = (*before, turn)
            return turn

        try:
            reply = self._conversation.answer(
                [*said, question],
                settings,
                think=self._settings.think,
                timings=timings,
                on_text=on_text,
                on_reasoning=on_reasoning,
                on_token=(lambda count: on_progress("answering", count, None)) if on_progress else None,
            )
        except AnswerInterrupted as stop:
            keep(stop.reply)
            raise
        return keep(reply)

    def _turn_of(
        self, number: int, question: str, reply: Reply, seed: int, timings: dict[str, float]
    ) -> Turn:
        settings, loaded = self._settings, self._loaded
        return Turn(
            number=number,
            question=question,
            text=reply.text,
            reasoning=reply.reasoning,
            inputs=self.inputs,
            prompt_tokens=reply.prompt_tokens,
            reused_tokens=reply.reused_tokens,
            completion_tokens=reply.completion_tokens,
            stop_reason=reply.stop_reason,
            timings=timings,
            settings={
                **replace(settings.generation, max_tokens=reply.max_tokens, seed=seed).to_dict(),
                "think": settings.think,
                "strict": settings.strict,
                "subtitles": None if settings.subtitles is None else str(settings.subtitles),
            },
            model=loaded.name,
            weights_revision=loaded.revision,
            keye_version=__version__,
            device=loaded.devices,
            dtype=loaded.dtype,
            seed=seed,
        )


def begin_chat(
    loaded: LoadedModel,
    inputs: Inputs,
    settings: AskSettings,
    *,
    turns: Sequence[Turn] = (),
    on_progress: OnProgress | None = None,
) -> Chat:
    """Look at one or several videos and images, in the order given, to talk about them; `turns` were had before.

    UsageError: no input, subtitles with several videos, more than the context holds; InputError: an input that cannot be
    read; MemoryLimitError. Warns (KeyeWarning) about damaged inputs, and about turns that another model answered.
    """
    for turn in turns:
        refuse_reserved_words(turn.question, loaded.tokenizer)
    others = {turn.model for turn in turns if turn.weights_revision != loaded.revision}
    if others:
        message = f"{loaded.name} continues what {' and '.join(sorted(others))} said, which has other weights"
        warnings.warn(message, KeyeWarning, stacklevel=2)
    plans = plan_inputs(open_inputs(inputs, settings), settings.sampling)
    preface = prompt_text("", plans, settings, loaded.tokenizer)
    conversation = Conversation.prefill(
        loaded,
        plans,
        answer_tokens=settings.generation.max_tokens,
        preface=without_reserved_words(preface, loaded.tokenizer),
        think=settings.think,
        strict=settings.strict,
        exact_resize=settings.sampling.exact_resize,
        on_progress=on_progress,
    )
    reports = tuple(
        report_input(plan, times, settings.sampling)
        for plan, times in zip(plans, conversation.times_s, strict=True)
    )
    return Chat(loaded, conversation, settings, reports, turns)


class _Files:
    """The files of a conversation as they were when it began."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._began = {path: _state(path) for path in paths}
        self._paths = paths
        self._hashes: dict[str, str] = {}

    def saved(self) -> list[SavedFile]:
        """The files with their contents' hashes, None for one that is no longer what it was."""
        return [SavedFile(path, self._hash(path)) for path in self._paths]

    def _hash(self, path: str) -> str | None:
        if path not in self._hashes:
            try:
                found = content_hash(path)
            except OSError:
                return None
            if _state(path) != self._began[path]:
                return None
            self._hashes[path] = found
        return self._hashes[path]


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
