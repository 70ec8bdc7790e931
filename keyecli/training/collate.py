"""Supervised batches in which several questions about one clip share its tokens.

A row is [clip | question and answer 1 | question and answer 2 | …]: each question sees the clip and itself, so it is the
input that answering gives the model, and the clip is encoded once. B rows, T tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keyecli.kernels.reference import PADDING_SEGMENT, SHARED_SEGMENT
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import IGNORED_LABEL
from keyecli.model.prompt import VIDEO_PLACEHOLDER, Visual, layout

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Turn:
    """A question with its answer. `reasoning` None trains the answer without thinking, "" an empty thought."""

    question: str
    answer: str
    reasoning: str | None = None

    @property
    def thinks(self) -> bool:
        return self.reasoning is not None

    @property
    def response(self) -> str:
        """What the model must write: everything after the generation prompt, the end of the turn included."""
        thought = "" if self.reasoning is None else f"{self.reasoning}\n</think>\n\n"
        return f"{thought}{self.answer}{END_OF_TURN}"


@dataclass(frozen=True)
class EncodedTurn:
    """input_ids and targets, int64 [L]: targets[t] is the token that follows input_ids[t], −100 where none is supervised."""

    input_ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class EncodedClip:
    """The shared tokens of a clip with their positions, and its turns."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    next_position: int
    turns: tuple[EncodedTurn, ...]


@dataclass(frozen=True)
class Batch:
    """input_ids, targets, segments: int64 [B, T]; position_ids: int64 [3, B, T]; the first `shared_prefix` columns hold the
    clips (segment 0, padded with −1), the rest the turns (segments 1, 2, …). weights: float32 [B, T], 1/√(tokens of the
    turn's answer), so that a long summary does not drown out a one-word answer."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    shared_prefix: int


def encode_clip(tokenizer: Any, config: KeyeVL2Config, visual: Visual, turns: Sequence[Turn]) -> EncodedClip:
    """Lay out a clip once and its turns behind it. ValueError when the chat template puts text of the question first."""
    rendered = [_rendered(tokenizer, turn) for turn in turns]
    heads = {head for head, _ in rendered}
    if len(heads) != 1:
        raise ValueError("the chat template writes something before the video that depends on the question")
    prompt = layout(tokenizer, config, heads.pop() + VIDEO_PLACEHOLDER, [visual])
    encoded = []
    for turn, (_, tail) in zip(turns, rendered, strict=True):
        question = tokenizer.encode(tail, add_special_tokens=False)
        response = tokenizer.encode(turn.response, add_special_tokens=False)
        ids = np.asarray(question + response, dtype=np.int64)
        targets = np.full(len(ids), IGNORED_LABEL, dtype=np.int64)
        targets[len(question) - 1 : -1] = ids[len(question) :]
        encoded.append(EncodedTurn(ids[:-1], targets[:-1]))
    return EncodedClip(
        prompt.input_ids.numpy(), prompt.position_ids.numpy(), prompt.next_position, tuple(encoded)
    )


def _rendered(tokenizer: Any, turn: Turn) -> tuple[str, str]:
    """The templated prompt before and after the video."""
    content = [{"type": "video"}, {"type": "text", "text": turn.question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=turn.thinks,
    )
    head, _, tail = text.partition(VIDEO_PLACEHOLDER)
    return head, tail


def collate(clips: Sequence[EncodedClip], pad_token_id: int, multiple: int = 64) -> Batch:
    """Stack clips into one batch; prefix and row length are padded to a `multiple` of tokens."""
    prefix = _round_up(max(len(clip.input_ids) for clip in clips), multiple)
    rest = _round_up(max(sum(len(turn.input_ids) for turn in clip.turns) for clip in clips), multiple)
    shape = (len(clips), prefix + rest)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros((3, *shape), dtype=np.int64)
    segments = np.full(shape, PADDING_SEGMENT, dtype=np.int64)
    targets = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    for row, clip in enumerate(clips):
        length = len(clip.input_ids)
        input_ids[row, :length] = clip.input_ids
        position_ids[:, row, :length] = clip.position_ids
        segments[row, :length] = SHARED_SEGMENT
        begin = prefix
        for segment, turn in enumerate(clip.turns, start=1):
            end = begin + len(turn.input_ids)
            input_ids[row, begin:end] = turn.input_ids
            position_ids[:, row, begin:end] = np.arange(clip.next_position, clip.next_position + end - begin)
            segments[row, begin:end] = segment
            targets[row, begin:end] = turn.targets
            supervised = turn.targets != IGNORED_LABEL
            weights[row, begin:end] = supervised / np.sqrt(supervised.sum())
            begin = end
    return Batch(input_ids, position_ids, segments, targets, weights, prefix)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
