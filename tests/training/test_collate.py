"""A packed row of questions must be, question by question, the input that answering gives the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from keyecli.kernels.reference import PADDING_SEGMENT, SHARED_SEGMENT
from keyecli.model.keye import IGNORED_LABEL
from keyecli.model.prompt import Visual, build_prompt
from keyecli.training.collate import Batch, Turn, collate, encode_clip

SHORT = Visual("video", (1, 2), (0.0, 0.5))
LONG = Visual("video", (2, 2), (0.0, 0.5, 1.0, 10.5))
TURNS = (
    Turn("When?", "[[0.5, 1.0]]"),
    Turn("How many?", "2", reasoning="a: [[0.0, 1.0]]"),
    Turn("What?", "red", reasoning=""),
)


def prompt_of(tokenizer: Any, config: Any, visual: Visual, turn: Turn) -> Any:
    content = [{"type": "video"}, {"type": "text", "text": turn.question}]
    return build_prompt(
        tokenizer, config, [{"role": "user", "content": content}], [visual], think=turn.thinks
    )


@pytest.fixture
def batch(tiny_model: Any, tiny_tokenizer: Any) -> Batch:
    clips = [
        encode_clip(tiny_tokenizer, tiny_model.config, SHORT, TURNS),
        encode_clip(tiny_tokenizer, tiny_model.config, LONG, TURNS[:2]),
    ]
    return collate(clips, pad_token_id=0, multiple=16)


def test_a_turn_is_the_prompt_of_answering_and_its_response(tiny_model: Any, tiny_tokenizer: Any) -> None:
    clip = encode_clip(tiny_tokenizer, tiny_model.config, LONG, TURNS)
    for turn, encoded in zip(TURNS, clip.turns, strict=True):
        prompt = prompt_of(tiny_tokenizer, tiny_model.config, LONG, turn)
        response = tiny_tokenizer.encode(turn.response, add_special_tokens=False)
        whole = [*prompt.input_ids.tolist(), *response]
        assert [*clip.input_ids.tolist(), *encoded.input_ids.tolist()] == whole[:-1]
        supervised = encoded.targets[encoded.targets != IGNORED_LABEL]
        assert supervised.tolist() == response
        # The first supervised target stands where the prompt ends: reasoning that the template opens is prompt.
        first = int(np.flatnonzero(encoded.targets != IGNORED_LABEL)[0])
        assert len(clip.input_ids) + first + 1 == len(prompt.input_ids)
        positions = prompt.position_ids[:, : len(clip.input_ids)]
        assert np.array_equal(clip.position_ids, positions.numpy())


def test_the_response_ends_the_turn_and_closes_the_thought() -> None:
    assert TURNS[0].response == "[[0.5, 1.0]]<|im_end|>"
    assert TURNS[1].response == "a: [[0.0, 1.0]]\n</think>\n\n2<|im_end|>"
    assert TURNS[2].response == "\n</think>\n\nred<|im_end|>"


def test_the_batch_by_hand(batch: Batch) -> None:
    assert batch.shared_prefix % 16 == 0
    prefix = batch.segments[:, : batch.shared_prefix]
    assert set(prefix.flatten()) == {SHARED_SEGMENT, PADDING_SEGMENT}
    assert set(batch.segments[0, batch.shared_prefix :]) == {1, 2, 3, PADDING_SEGMENT}
    assert set(batch.segments[1, batch.shared_prefix :]) == {1, 2, PADDING_SEGMENT}
    # Every turn starts at the position behind its clip.
    for row in range(2):
        starts = [batch.position_ids[0, row][batch.segments[row] == segment][0] for segment in (1, 2)]
        assert starts[0] == starts[1]
    assert (batch.targets[batch.segments < 1] == IGNORED_LABEL).all()
    for row, segment in ((0, 1), (0, 2), (1, 2)):
        mine = batch.segments[row] == segment
        supervised = int((batch.targets[row][mine] != IGNORED_LABEL).sum())
        assert batch.weights[row][mine].sum() == pytest.approx(supervised**0.5)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_packed_answers_have_the_loss_of_single_ones(
    tiny_model: Any, tiny_tokenizer: Any, batch: Batch, mode: str
) -> None:
    config = tiny_model.config
    torch.manual_seed(0)
    visual = {visual: torch.randn(visual.tokens, config.hidden_size) for visual in (SHORT, LONG)}
    input_ids, targets = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets)
    segments = torch.from_numpy(batch.segments)
    tiny_model.model.mode = mode
    try:
        with torch.no_grad():
            embeds = tiny_model.embed(input_ids, torch.cat([visual[SHORT], visual[LONG]]))
            hidden, _ = tiny_model.model(
                embeds,
                torch.from_numpy(batch.position_ids),
                segments=segments,
                shared_prefix=batch.shared_prefix,
            )
            packed = F.cross_entropy(
                tiny_model.logits(hidden).transpose(1, 2),
                targets,
                ignore_index=IGNORED_LABEL,
                reduction="none",
            )
            for row, (kind, turns) in enumerate(((SHORT, TURNS), (LONG, TURNS[:2]))):
                for segment, turn in enumerate(turns, start=1):
                    prompt = prompt_of(tiny_tokenizer, config, kind, turn)
                    response = tiny_tokenizer.encode(turn.response, add_special_tokens=False)
                    ids = torch.tensor([[*prompt.input_ids.tolist(), *response]])
                    text = torch.arange(prompt.next_position, prompt.next_position + len(response))
                    positions = torch.cat((prompt.position_ids, text.expand(3, -1)), dim=1)[:, None]
                    alone = tiny_model.decode(tiny_model.embed(ids, visual[kind]), positions)
                    begin = len(prompt.input_ids)
                    expected = F.cross_entropy(
                        tiny_model.logits(alone)[0, begin - 1 : -1], ids[0, begin:], reduction="none"
                    )
                    mine = (segments[row] == segment) & (targets[row] != IGNORED_LABEL)
                    torch.testing.assert_close(packed[row][mine], expected, atol=1e-4, rtol=1e-4)
    finally:
        tiny_model.model.mode = "sparse"


def test_a_template_that_writes_the_question_first_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    class Reversed:
        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return f"{messages[0]['content'][1]['text']}<|vision_start|><|video_pad|><|vision_end|>"

        def encode(self, text: str, **options: Any) -> Any:
            return tiny_tokenizer.encode(text, **options)

    with pytest.raises(ValueError, match="before the video"):
        encode_clip(Reversed(), tiny_model.config, SHORT, TURNS)
