"""A shared prefix: what is asked behind it is answered as if it were asked alone, in any order."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from keyecli.engine import stream
from keyecli.engine.generate import GenerationSettings, generate
from keyecli.engine.loaded import LoadedModel
from keyecli.engine.shared import SharedPrefix, question_tokens
from keyecli.engine.stream import Timings
from keyecli.errors import UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import Visual, build_prompt
from tests.engine.scenes import all_embeds, fake_decoder, planned

QUESTIONS = ["When?", "How often does the red circle move to the left?"]
SETTINGS = GenerationSettings(max_tokens=10)


@pytest.fixture(autouse=True)
def decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "decode_frames", fake_decoder())


def prefix_of(loaded: LoadedModel, plans: Any, **arguments: Any) -> SharedPrefix:
    room = question_tokens(loaded, plans, QUESTIONS)
    return SharedPrefix.prefill(
        loaded, plans, **{"question_room_tokens": room, "answer_tokens": 10, **arguments}
    )


def answered_alone(
    loaded: LoadedModel, plans: Any, question: str, visuals: Any = None, think: bool = True
) -> Any:
    """The question in a prompt of its own, in one forward pass, without streaming or truncation."""
    visuals = visuals or [stream.visual_of(plan) for plan in plans]
    content: list[Any] = [{"type": visual.kind} for visual in visuals] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    prompt = build_prompt(loaded.tokenizer, loaded.config, messages, visuals, think=think)
    cache = KeyeCache(loaded.config, len(prompt.input_ids) + 10)
    with torch.inference_mode():
        embeds = loaded.model.embed(prompt.input_ids[None], all_embeds(loaded, plans))
        hidden = loaded.model.decode(embeds, prompt.position_ids[:, None], cache)[:, -1:]
    return generate(
        loaded.model, loaded.tokenizer, cache, hidden, prompt.next_position, SETTINGS, stop_ids=()
    )


def test_answers_are_those_of_questions_asked_alone(loaded: LoadedModel) -> None:
    plans = [planned("a.mp4", 5), planned("b.png", 1, kind="image")]
    prefix = prefix_of(loaded, plans)
    for question in (*QUESTIONS, QUESTIONS[0]):
        alone = answered_alone(loaded, plans, question)
        answer = prefix.answer(question, SETTINGS)
        assert answer.token_ids == alone.token_ids
        assert answer.log_probabilities == pytest.approx(alone.log_probabilities, abs=1e-3)
        assert answer.stop_reason == "length"
    alone = answered_alone(loaded, plans, QUESTIONS[0], think=False)
    assert prefix.answer(QUESTIONS[0], SETTINGS, think=False).token_ids == alone.token_ids


def test_log_probabilities_are_the_model_s(loaded: LoadedModel) -> None:
    answer = prefix_of(loaded, [planned("a.mp4", 3)]).answer("When?", SETTINGS)
    assert len(answer.log_probabilities) == len(answer.token_ids) == 10
    # Greedy over 272 tokens: the best has more than an even share.
    assert all(-torch.tensor(272.0).log() < value < 0 for value in answer.log_probabilities)


def test_a_part_can_begin_at_nought(loaded: LoadedModel) -> None:
    """With an origin, the prompt counts from there; the times of the frames stay those of the file."""
    plan = planned("a.mp4", 5)
    shifted = [Visual("video", (2, 3), tuple(index / 2 - 1.5 for index in range(5)))]
    prefix = prefix_of(loaded, [plan], origins_s=[Fraction(3, 2)])
    assert prefix.times_s == (plan.sampling.times_s,)
    alone = answered_alone(loaded, [plan], "When?", shifted)
    assert prefix.answer("When?", SETTINGS).token_ids == alone.token_ids
    assert alone.token_ids != answered_alone(loaded, [plan], "When?").token_ids


def test_frames_are_found_again_in_the_prompt(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "decode_frames", fake_decoder(lost={Fraction(1)}))
    plans = [planned("a.mp4", 4), planned("b.png", 1, rows=1, kind="image")]
    prefix = prefix_of(loaded, plans)
    assert prefix.times_s == ((Fraction(0), Fraction(1, 2), Fraction(3, 2)), (Fraction(0),))
    sizes = [end - begin for begin, end in prefix.frame_tokens]
    assert sizes == [6, 6, 6, 3]
    ends = [0, *(end for _, end in prefix.frame_tokens)]
    assert all(begin > before for (begin, _), before in zip(prefix.frame_tokens, ends, strict=False))
    assert prefix.frame_tokens[-1][1] == prefix.length - 1  # only the end mark follows


def test_an_answer_can_be_begun(loaded: LoadedModel) -> None:
    prefix = prefix_of(loaded, [planned("a.mp4", 3)], question_room_tokens=200)
    begun = prefix.answer("When?", SETTINGS, think=False, prefill_text="At ")
    assert begun.text.startswith("At")
    assert len(begun.token_ids) == 10
    thought = prefix.answer("When?", SETTINGS, prefill_text="At ")
    assert thought.reasoning.startswith("At")
    assert thought.prompt_tokens < begun.prompt_tokens  # which has the closing of an empty thought


def test_pieces_add_up_to_the_answer(loaded: LoadedModel) -> None:
    pieces: list[str] = []
    prefix = prefix_of(loaded, [planned("a.mp4", 3)])
    answer = prefix.answer("When?", SETTINGS, think=False, on_text=pieces.append)
    assert "".join(pieces) == answer.text != ""


def test_room_is_kept(loaded: LoadedModel) -> None:
    plans = [planned("a.mp4", 3)]
    prefix = prefix_of(loaded, plans)
    room = question_tokens(loaded, plans, ["When?"])
    # A question that takes more than its share leaves less for the answer.
    longer = "When?" + "x" * (question_tokens(loaded, plans, QUESTIONS) - room + 4)
    assert len(prefix.answer(longer, SETTINGS).token_ids) < 10
    with pytest.raises(UsageError, match=r"the question takes \d+ tokens, more than there is room for"):
        prefix.answer("x" * 300, SETTINGS)
    with pytest.raises(UsageError, match="the model's context holds 4,096"):
        prefix_of(loaded, [planned("a.mp4", 700)])


def test_time_is_kept(loaded: LoadedModel) -> None:
    timings = Timings()
    prefix = prefix_of(loaded, [planned("a.mp4", 3)], timings=timings)
    assert set(timings.seconds) == {"decode_s", "encode_s", "prefill_s"}
    before = timings.seconds["prefill_s"]
    prefix.answer("When?", SETTINGS)
    assert timings.seconds["prefill_s"] > before
    assert timings.seconds["generate_s"] > 0
