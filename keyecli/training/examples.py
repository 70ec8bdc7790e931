"""A training row as the model's input: the tokens that answering would give it, and which of them are learnt.

The layout is that of `keyecli.model.prompt`, in which every answer follows the very prompt that generation would have seen:
the chat template's own, with earlier answers whole. T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from keyecli.engine.plan import InputPlan, plan_inputs
from keyecli.engine.thinking import split_answer
from keyecli.errors import KeyeError
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import IGNORED_LABEL
from keyecli.model.prompt import Prompt, Visual, layout, prompt_positions, token_ids
from keyecli.tasks.ask import reserved_words
from keyecli.tasks.options import budget_of
from keyecli.training.rows import Message, RowError, TrainingRow, VisualRef
from keyecli.video.sampling import SamplingSettings
from keyecli.video.source import VideoInfo, probe
from keyecli.video.timecode import parse_span

END_OF_TURN = "<|im_end|>\n"
THINK_OPEN = "<think>\n"
# Stands for an answer while the template is rendered; a user's text cannot hold it by accident.
_MARK = "\N{SYMBOL FOR RECORD SEPARATOR}answer\N{SYMBOL FOR RECORD SEPARATOR}"


@dataclass(frozen=True)
class Example:
    """input_ids and targets, int64 [T], position_ids, int64 [3, T]: targets[t] is the token that follows input_ids[t] where it is
    learnt, −100 elsewhere. visual_tokens: placeholders in input_ids."""

    source: str
    input_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray
    visual_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def learnt_tokens(self) -> int:
        return int((self.targets != IGNORED_LABEL).sum())


def plan_row(
    row: TrainingRow, settings: SamplingSettings, look_into: Callable[[Path], VideoInfo] | None = None
) -> tuple[InputPlan, ...]:
    """How the visuals of a row are sampled: as `keye ask` would with these settings, and with what the row says of each.

    look_into: `probe`, or what remembers files that it has been given before. InputError for a file that cannot be read.
    """
    infos = [(look_into or _looked_into)(visual.path) for visual in row.visuals]
    return plan_inputs(infos, [_own_settings(visual, settings) for visual in row.visuals])


def lay_out_row(
    tokenizer: Any, config: KeyeVL2Config, row: TrainingRow, visuals: Sequence[Visual]
) -> Example:
    """Tokens, positions and targets of a conversation.

    Of every learnt answer all that generation has to write is learnt: its thought and text behind the generation prompt
    (which opens `<think>`), `<|im_end|>` and the line end. RowError for a conversation without a learnt answer, for a
    text with marks of the model's own, and for visuals in an answer.
    """
    waiting = list(visuals)
    ids: list[int] = []
    learnt: list[bool] = []
    for text, supervised in segments(tokenizer, row):
        part = token_ids(tokenizer, config, text, waiting)
        ids += part
        learnt += [supervised] * len(part)
    if waiting:
        raise RowError(f"{row.source}: the chat template leaves out {len(waiting)} videos or images")
    input_ids = np.asarray(ids, dtype=np.int64)
    positions, _ = prompt_positions(config, input_ids, visuals)
    targets = np.where(np.asarray(learnt), input_ids, IGNORED_LABEL)[1:]
    # Nothing follows the last token.
    tokens = sum(visual.tokens for visual in visuals)
    return Example(row.source, input_ids[:-1], positions[:, :-1], targets, tokens)


def asked(row: TrainingRow, think: bool) -> tuple[TrainingRow, str | None]:
    """The row up to its last question, whose answer is still to be written with or without thinking, and the answer that the row
    gives, without its thought; None where it gives none. RowError for a row without a question."""
    last = max((place for place, message in enumerate(row.messages) if message.role == "user"), default=None)
    if last is None:
        raise RowError(f"{row.source}: the row has no question")
    open_answer = Message("assistant", (THINK_OPEN if think else "",))
    given = next((message.text for message in row.messages[last + 1 :] if message.role == "assistant"), None)
    answer = None if given is None else split_answer(given)[1]
    return replace(row, messages=(*row.messages[: last + 1], open_answer)), answer


def lay_out_prompt(
    tokenizer: Any, config: KeyeVL2Config, row: TrainingRow, visuals: Sequence[Visual]
) -> Prompt:
    """The input behind which a model writes the last answer of a row, as `asked` gives it. RowError as `lay_out_row`."""
    *before, _ = segments(tokenizer, row)
    try:
        return layout(tokenizer, config, "".join(text for text, _ in before), visuals)
    except ValueError as error:
        raise RowError(f"{row.source}: {error}") from error


def segments(tokenizer: Any, row: TrainingRow) -> Iterator[tuple[str, bool]]:
    """The templated conversation in pieces, and whether each is learnt; behind the last learnt answer nothing follows."""
    _check(tokenizer, row)
    last = max(place for place, message in enumerate(row.messages) if message.learnt)
    said: list[dict[str, Any]] = []
    for message in row.messages[: last + 1]:
        if message.role != "assistant":
            said.append({"role": message.role, "content": _content(message)})
            continue
        if not message.learnt:
            # It is read only, so it stands as the template shows answering what was said before.
            said.append({"role": "assistant", "content": message.text})
            continue
        thinks = message.text.startswith(THINK_OPEN)
        header = tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, enable_thinking=thinks
        )
        # What stands before an earlier answer has been said; a template may shorten that answer, so only its place counts.
        _, _, new = header.rpartition(_MARK + END_OF_TURN)
        yield new, False
        answer = message.text.removeprefix(THINK_OPEN) if header.endswith(THINK_OPEN) else message.text
        yield answer + END_OF_TURN, True
        said.append({"role": "assistant", "content": _MARK})


def _check(tokenizer: Any, row: TrainingRow) -> None:
    """RowError for what cannot be laid out."""
    if not any(message.learnt for message in row.messages):
        raise RowError(f"{row.source}: the row has no answer to learn")
    words = _reserved(tokenizer)
    for message in row.messages:
        if message.role == "assistant" and message.visuals:
            raise RowError(f"{row.source}: an answer holds a video or image; move it into the question")
        if found := next((word for word in words if word in message.text), None):
            raise RowError(
                f"{row.source}: the {message.role}'s text contains {found}, a mark of the model's own: take it out"
            )


@lru_cache(maxsize=4)
def _reserved(tokenizer: Any) -> tuple[str, ...]:
    return tuple(reserved_words(tokenizer))


def _content(message: Message) -> str | list[dict[str, str]]:
    if not message.visuals:
        return message.text
    return [
        {"type": part.kind} if isinstance(part, VisualRef) else {"type": "text", "text": part}
        for part in message.parts
    ]


def _own_settings(visual: VisualRef, settings: SamplingSettings) -> SamplingSettings:
    if not visual.sampling:
        return settings
    said = dict(visual.sampling)
    try:
        start_s, end_s = parse_span(said.get("start"), said.get("end"), said.get("duration"))
        return replace(
            settings,
            fps=said.get("fps", settings.fps),
            max_frames=said.get("max_frames", settings.max_frames),
            budget=budget_of(settings.budget, said),
            start_s=settings.start_s if start_s is None else start_s,
            end_s=settings.end_s if end_s is None else end_s,
        )
    except KeyeError as error:
        raise RowError(f"{visual.path.name} cannot be sampled as its row says: {error}") from error


def _looked_into(path: Path) -> VideoInfo:
    """`probe`, once for a file that many rows ask about and that has not changed since."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = 0
    return _probed(path, changed)


@lru_cache(maxsize=4096)
def _probed(path: Path, changed_ns: int) -> VideoInfo:
    return probe(path)
