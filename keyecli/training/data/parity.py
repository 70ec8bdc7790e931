"""Proof that a training row gives the model what answering gives it: the same frames, tokens and positions, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keyecli.engine.loaded import ModelFiles
from keyecli.engine.plan import InputPlan, plan_inputs
from keyecli.engine.stream import visual_of
from keyecli.model.keye import IGNORED_LABEL
from keyecli.model.prompt import build_prompt
from keyecli.tasks.options import ask_settings
from keyecli.training.examples import THINK_OPEN, Example
from keyecli.training.rows import TrainingRow, VisualRef


def parity_fault(
    row: TrainingRow,
    example: Example,
    plans: Sequence[InputPlan],
    files: ModelFiles,
    tokenizer: Any,
    options: dict[str, Any],
) -> str | None:
    """What differs between a laid-out row and the prompt of `keye ask` at its first learnt answer; None: nothing.

    plans: of the row's visuals, as training samples them; options: the sampling options that both are given, as
    `AskOptions`. The prompt is made here anew from the conversation, with nothing of the layout of training.
    """
    infos = [plan.info for plan in plans]
    asked: list[InputPlan] = []
    for number, (visual, plan) in enumerate(zip(row.visuals, plans, strict=True)):
        own = ask_settings(files.preprocessor, **{**options, **visual.sampling}).sampling
        asked.append(plan_inputs(infos, own)[number])
        if asked[-1].sampling != plan.sampling:
            return f"{visual.path.name} gives training {_frames(plan)} and answering {_frames(asked[-1])}"

    first = next(place for place, message in enumerate(row.messages) if message.learnt)
    before = row.messages[:first]
    messages = [
        {"role": message.role, "content": _content(message.parts) if message.visuals else message.text}
        for message in before
    ]
    seen = sum(len(message.visuals) for message in before)
    prompt = build_prompt(
        tokenizer,
        files.config,
        messages,
        [visual_of(plan) for plan in asked[:seen]],
        think=row.messages[first].text.startswith(THINK_OPEN),
    )
    # The first target is the token behind the prompt.
    length = int(np.flatnonzero(example.targets != IGNORED_LABEL)[0]) + 1
    return first_difference(
        (example.input_ids[:length], example.position_ids[:, :length]),
        (prompt.input_ids.numpy(), prompt.position_ids.numpy()),
        tokenizer,
    )


def first_difference(
    training: tuple[np.ndarray, np.ndarray], answering: tuple[np.ndarray, np.ndarray], tokenizer: Any
) -> str | None:
    """Where two prompts, (ids [T], positions [3, T]), part; None where they are equal."""
    (ids, positions), (other_ids, other_positions) = training, answering
    shorter = min(len(ids), len(other_ids))
    different = np.flatnonzero(ids[:shorter] != other_ids[:shorter])
    if len(different):
        at = int(different[0])
        one, other = tokenizer.convert_ids_to_tokens([int(ids[at]), int(other_ids[at])])
        return f"token {at} is {one!r} in training and {other!r} in answering"
    if len(ids) != len(other_ids):
        return f"the prompt has {len(ids)} tokens in training and {len(other_ids)} in answering"
    moved = np.flatnonzero((positions != other_positions).any(axis=0))
    if len(moved):
        at = int(moved[0])
        one, other = (tuple(int(axis) for axis in table[:, at]) for table in (positions, other_positions))
        return f"token {at} is at position {one} in training and {other} in answering"
    return None


def _content(parts: Sequence[str | VisualRef]) -> list[dict[str, str]]:
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind} for part in parts
    ]


def _frames(plan: InputPlan) -> str:
    sampling = plan.sampling
    begin, end = float(sampling.times_s[0]), float(sampling.times_s[-1])
    return f"{sampling.frames} frames of {sampling.width}x{sampling.height} from {begin:g} to {end:g} s"
