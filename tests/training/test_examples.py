"""Rows as the model's input: the tokens that answering gives, and of them those that are learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyecli.engine.loaded import ModelFiles, open_model
from keyecli.engine.stream import visual_of
from keyecli.model.keye import IGNORED_LABEL
from keyecli.model.prompt import build_prompt
from keyecli.tasks.options import ask_settings
from keyecli.training.examples import Example, lay_out_row, plan_row
from keyecli.training.rows import Message, RowError, TrainingRow, VisualRef
from tests.training.rows import CLIP, text_row, video_row


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path) -> ModelFiles:
    return open_model(tiny_checkpoint, device="cpu")


def laid_out(row: TrainingRow, files: ModelFiles, tokenizer: Any) -> Example:
    plans = plan_row(row, ask_settings(files.preprocessor).sampling)
    return lay_out_row(tokenizer, files.config, row, [visual_of(plan) for plan in plans])


def learnt(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.targets[example.targets != IGNORED_LABEL])


def test_before_the_answer_stands_what_answering_gives(files: ModelFiles, tiny_tokenizer: Any) -> None:
    row = video_row()
    plans = plan_row(row, ask_settings(files.preprocessor).sampling)
    visuals = [visual_of(plan) for plan in plans]
    example = lay_out_row(tiny_tokenizer, files.config, row, visuals)
    content = [{"type": "video"}, {"type": "text", "text": "What about one?"}]
    prompt = build_prompt(tiny_tokenizer, files.config, [{"role": "user", "content": content}], visuals)
    begin = len(prompt.input_ids)
    assert np.array_equal(example.input_ids[:begin], prompt.input_ids.numpy())
    assert np.array_equal(example.position_ids[:, :begin], prompt.position_ids.numpy())
    assert (example.targets[: begin - 1] == IGNORED_LABEL).all()
    assert example.visual_tokens == prompt.visual_tokens > 0
    # The clip has 10 s: at the row's own rate of one frame a second there are fewer than at the model's two.
    assert (
        visuals[0].frames
        < plan_row(video_row(fps=2.0), ask_settings(files.preprocessor).sampling)[0].sampling.frames
    )


def test_the_thought_that_the_prompt_opens_is_prompt(files: ModelFiles, tiny_tokenizer: Any) -> None:
    example = laid_out(text_row(0), files, tiny_tokenizer)
    assert learnt(example, tiny_tokenizer) == "it is one\n</think>\n\none<|im_end|>\n"
    first = int(np.flatnonzero(example.targets != IGNORED_LABEL)[0])
    assert tiny_tokenizer.decode(example.input_ids[: first + 1]).endswith("<|im_start|>assistant\n<think>\n")


def test_every_target_follows_its_token(files: ModelFiles, tiny_tokenizer: Any) -> None:
    example = laid_out(video_row(), files, tiny_tokenizer)
    places = np.flatnonzero(example.targets[:-1] != IGNORED_LABEL)
    assert np.array_equal(example.targets[places], example.input_ids[places + 1])


def test_an_answer_without_a_thought_is_learnt_without_one(files: ModelFiles, tiny_tokenizer: Any) -> None:
    example = laid_out(text_row(0, answer="plain"), files, tiny_tokenizer)
    assert learnt(example, tiny_tokenizer) == "plain<|im_end|>\n"
    assert "<think>\n\n</think>\n\nplain" in tiny_tokenizer.decode(example.input_ids)


def test_of_several_answers_those_are_learnt_that_are_to_be(files: ModelFiles, tiny_tokenizer: Any) -> None:
    row = TrainingRow(
        "rows:1",
        (
            Message("system", ("Be short.",)),
            Message("user", ("A?",)),
            Message("assistant", ("<think>\na\n</think>\n\nfirst",)),
            Message("user", ("B?",)),
            Message("assistant", ("<think>\nb\n</think>\n\nsecond",), supervised=False),
            Message("user", ("C?",)),
            Message("assistant", ("<think>\nc\n</think>\n\nthird",)),
            Message("user", ("Unanswered?",)),
        ),
    )
    example = laid_out(row, files, tiny_tokenizer)
    assert (
        learnt(example, tiny_tokenizer) == "a\n</think>\n\nfirst<|im_end|>\nc\n</think>\n\nthird<|im_end|>\n"
    )
    text = tiny_tokenizer.decode(example.input_ids)
    assert "Unanswered" not in text
    # Earlier thoughts stay: what stood before an answer is the beginning of what stands before the next.
    assert text.index("a\n</think>") < text.index("B?") < text.index("second") < text.index("c\n</think>")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (TrainingRow("f:3", (Message("user", ("A?",)),)), "f:3: the row has no answer to learn"),
        (
            TrainingRow("f:3", (Message("user", ("A?",)), Message("assistant", ("a",), supervised=False))),
            "f:3: the row has no answer to learn",
        ),
        (
            TrainingRow("f:3", (Message("user", ("A <|im_end|>?",)), Message("assistant", ("a",)))),
            "f:3: the user's text contains <|im_end|>",
        ),
        (
            TrainingRow("f:3", (Message("user", ("A?",)), Message("assistant", (VisualRef("video", CLIP),)))),
            "f:3: an answer holds a video",
        ),
    ],
    ids=["no-answer", "not-learnt", "reserved", "visual-in-answer"],
)
def test_what_cannot_be_laid_out_is_named(
    row: TrainingRow, said: str, files: ModelFiles, tiny_tokenizer: Any
) -> None:
    with pytest.raises(RowError) as raised:
        laid_out(row, files, tiny_tokenizer)
    assert str(raised.value).startswith(said)
