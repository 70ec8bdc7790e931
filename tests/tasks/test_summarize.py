"""Summaries with the toy model: what it is asked, long clips in parts, and what becomes of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli import __version__
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.plan import plan_inputs
from keyecli.engine.shared import SharedAnswer, SharedPrefix
from keyecli.engine.text import answer_text
from keyecli.errors import InputError, KeyeWarning, UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.prompt import build_prompt
from keyecli.session import Keye, load, plan_summary
from keyecli.tasks import summarize as task
from keyecli.tasks.ask import prompt_text
from keyecli.tasks.chapters import Chapter
from keyecli.tasks.events import Event
from keyecli.tasks.options import ask_settings
from keyecli.tasks.prompts import DEFAULTS
from keyecli.tasks.stretches import plan_parts
from keyecli.tasks.summarize import SummarySettings, summary_settings
from keyecli.video.source import probe
from tests.tasks.conftest import write_clip

PROSE = "A ball rolls.\n\n0.0 - 2.5: ball | It is red.\n2.5 - 4.0: box"
OWN_PROMPT = "Summarise the video with times."


@pytest.fixture(autouse=True)
def no_cut_off(recwarn: pytest.WarningsRecorder) -> None:
    """Each test says itself what is warned about."""


def answering(
    monkeypatch: pytest.MonkeyPatch, *texts: str, combined: str = ""
) -> tuple[list[tuple[str, list[float]]], list[str]]:
    """Put words in the model's mouth: `texts` for each part in turn. Returns what it is asked, and what about its notes.

    What it is asked comes with the times of the frames as the prompt tells them.
    """
    asked: list[tuple[str, list[float]]] = []
    about_notes: list[str] = []
    waiting = list(texts)

    def answer(self: SharedPrefix, text: str, settings: GenerationSettings, **_: Any) -> SharedAnswer:
        asked.append((text, list(self._visuals[0].times_s)))
        return SharedAnswer(waiting.pop(0), "I look.", (1, 2, 3), (0.0, 0.0, 0.0), 100, "stop")

    def answer_notes(loaded: Any, text: str, settings: GenerationSettings, **_: Any) -> SharedAnswer:
        about_notes.append(text)
        return SharedAnswer(combined, "I read.", (1, 2), (0.0, 0.0), 50, "stop")

    monkeypatch.setattr(SharedPrefix, "answer", answer)
    monkeypatch.setattr(task, "answer_text", answer_notes)
    return asked, about_notes


@pytest.fixture
def own_prompts(make_checkpoint: Callable[..., Path]) -> Keye:
    """The toy model with a question of its own, trained on clips of up to 3 s."""
    folder = make_checkpoint("own")
    (folder / "keye_prompts.json").write_text(json.dumps({"summarize": OWN_PROMPT, "longest_clip_s": 3}))
    return load(folder, device="cpu")


def test_record_of_a_summary(
    keye: Keye, clip: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, about_notes = answering(monkeypatch, PROSE)
    summary = keye.summarize(clip, seed=5, snap=False)
    record = json.loads(json.dumps(summary.to_dict()))
    (given,) = record.pop("inputs")
    assert (given["path"], given["frames"], given["settings"]["max_frames"]) == (str(clip), 9, None)
    timings = record.pop("timings")
    assert set(timings) == {"decode_s", "encode_s", "prefill_s", "generate_s", "scenes_s", "total_s"}
    assert timings["prefill_s"] > 0
    ((question, times),) = asked
    assert record == {
        "schema": "keye.summary/1",
        "text": "A ball rolls.",
        "prose": "A ball rolls.",
        "chapters": [
            {"start_s": 0.0, "end_s": 2.5, "title": "ball", "text": "It is red."},
            {"start_s": 2.5, "end_s": 4.1, "title": "box", "text": ""},
        ],
        "events": [
            {"start_s": 0.0, "end_s": 2.5, "title": "ball", "text": "It is red."},
            {"start_s": 2.5, "end_s": 4.0, "title": "box", "text": ""},
        ],
        "parts": [{"start_s": 0.0, "end_s": 4.1, "answer": PROSE, "stop_reason": "stop"}],
        "combined": None,
        "reasoning": "I look.",
        "question": question,
        "prompt_tokens": 100,
        "completion_tokens": 3,
        "stop_reason": "stop",
        "settings": {
            "max_tokens": 2048,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": 5,
            "stop": [],
            "think": True,
            "strict": False,
            "subtitles": None,
            "style": "brief",
            "chapters": None,
            "language": None,
            "snap": False,
            "min_chapter_s": None,
        },
        "model": str(tiny_checkpoint),
        "weights_revision": keye.revision,
        "keye_version": __version__,
        "device": "cpu",
        "dtype": "fp32",
        "quant": None,
        "kv": None,
        "seed": 5,
    }
    assert times == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    assert not about_notes
    assert str(summary) == "A ball rolls."


def test_a_real_answer_of_the_toy_model(keye: Keye, clip: Path) -> None:
    """Nothing stands in for the model here; it talks nonsense, without times, and the same again."""
    with pytest.warns(KeyeWarning) as caught:
        first = keye.summarize(clip, max_tokens=20, think=False)
    assert sorted(str(w.message) for w in caught) == [
        "an answer was cut off after 20 tokens; raise --max-tokens",
        "no line of the answer about clip.mp4 has times, so there are no chapters",
    ]
    assert (first.stop_reason, first.completion_tokens, first.chapters) == ("length", 20, ())
    assert first.text
    expected = keye.ask(clip, first.question, max_tokens=20, think=False)
    assert first.parts[0].answer == expected.text
    assert first.prompt_tokens == expected.prompt_tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["two or three sentences", "as there are different things"]),
        ({"style": "detailed"}, ["several paragraphs"]),
        ({"style": "bullets", "chapters": 4}, ["list of short points", "exactly 4 such lines"]),
        ({"language": "Brazilian Portuguese"}, ["Write in Brazilian Portuguese."]),
    ],
)
def test_what_the_model_is_asked(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: list[str]
) -> None:
    asked, _ = answering(monkeypatch, PROSE)
    summary = keye.summarize(clip, snap=False, **options)
    question = asked[0][0]
    assert all(word in question for word in words)
    assert not {"{", "}"} & set(question)
    assert question.startswith(DEFAULTS["summarize"].split("{")[0])
    assert summary.question == question


def test_a_model_with_a_question_of_its_own(
    own_prompts: Keye, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    clip = write_clip(tmp_path / "short.mp4", 2.0)
    asked, _ = answering(monkeypatch, *["0.0 - 1.5: ring\n0.5 - 2.0: star"] * 3)
    summary = own_prompts.summarize(clip, chapters=2)
    assert asked[0][0] == OWN_PROMPT
    # Without prose the lines are the summary.
    assert (summary.prose, summary.text) == ("", "0.0 - 1.5: ring\n0.5 - 2.0: star")
    assert own_prompts.summarize(clip, style="bullets").text == "- 0.0 - 1.5: ring\n- 0.5 - 2.0: star"
    assert not [w for w in recwarn if issubclass(w.category, KeyeWarning)]
    with pytest.warns(KeyeWarning, match="has no place for --language, which has no effect on its words"):
        own_prompts.summarize(clip, language="German")


def test_a_long_clip_in_parts_and_then_together(
    keye: Keye, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 s at 8 frames a second: the times of 321 frames and their pictures fill the context of 4096 tokens."""
    clip = write_clip(tmp_path / "long.mp4", 40.0)
    asked, about_notes = answering(
        monkeypatch,
        "It begins.\n\n0.0 - 20.0: ball\n5.0 - 8.0: early box",
        "It ends.\n\n0.0 - 4.0: ball\n12.0 - 20.1: late box",
        combined="All of it.\n\n0.0 - 24.0: a ball rolls\n24.0 - 40.0: boxes",
    )
    summary = keye.summarize(clip, fps=8, snap=False)
    first, second = summary.parts
    assert (first.start_s, first.end_s, second.start_s, second.end_s) == (0.0, 20.0, 20.0, 40.1)
    # The model counts from the beginning of what it sees, the summary from the beginning of the clip.
    assert [times[0] for _, times in asked] == [0.0, 0.0]
    assert [times[-1] for _, times in asked] == [20.0, 20.0]
    assert summary.events == (
        Event(0.0, 24.0, "ball"),
        Event(5.0, 8.0, "early box"),
        Event(32.0, 40.1, "late box"),
    )
    (notes,) = about_notes
    assert (
        "Part 1, 0.0 - 20.0:\nIt begins.\n0.0 - 20.0: ball\n5.0 - 8.0: early box\n\n"
        "Part 2, 20.0 - 40.1:\nIt ends.\n20.0 - 24.0: ball\n32.0 - 40.1: late box"
    ) in notes
    assert summary.text == "All of it."
    assert summary.combined == "All of it.\n\n0.0 - 24.0: a ball rolls\n24.0 - 40.0: boxes"
    assert summary.chapters == (Chapter(0.0, 24.0, "a ball rolls"), Chapter(24.0, 40.1, "boxes"))
    assert (summary.prompt_tokens, summary.completion_tokens) == (250, 8)
    assert summary.input.frames == len(set(summary.input.times_s)) == summary.input.frames_planned > 300
    assert summary.reasoning == "I look.\n\nI look.\n\nI read."


def test_parts_of_a_model_that_is_not_asked_about_its_notes(
    own_prompts: Keye, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was trained on 3 s: a clip of 8 s is three parts, and their lines, joined at the borders, are the summary."""
    clip = write_clip(tmp_path / "long.mp4", 8.0)
    asked, about_notes = answering(
        monkeypatch, "1.0 - 2.7: ring", "0.0 - 1.0: ring\n1.5 - 2.0: star", "A word.\n1.0 - 2.0: word CAT"
    )
    summary = own_prompts.summarize(clip)
    assert (len(asked), about_notes, summary.combined) == (3, [], None)
    assert [part.start_s for part in summary.parts] == [0.0, 2.7, 5.4]
    assert summary.events == (
        Event(1.0, 3.7, "ring"),
        Event(4.2, 4.7, "star"),
        Event(6.4, 7.4, "word CAT"),
    )
    assert summary.prose == "0:00:05.400 - 0:00:08.100\nA word."


def test_answers_are_read_with_care(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "- **0:00 - 0:02**: ball\n- 0:02: box\n- 0:09 - 0:12: too late\n- 1:00: never")
    with pytest.warns(KeyeWarning, match=r"2 lines lie outside of clip\.mp4 and are left out"):
        summary = keye.summarize(clip, snap=False)
    assert summary.events == (Event(0.0, 2.0, "ball"), Event(2.0, 4.1, "box"))


def test_too_few_events_for_the_chapters_asked_for(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, PROSE)
    with pytest.warns(KeyeWarning, match=r"3 chapters were asked for, and clip\.mp4 has 2"):
        assert len(keye.summarize(clip, chapters=3).chapters) == 2


def test_a_part_of_the_clip(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _ = answering(monkeypatch, "0.0 - 2.0: ball\n2.0 - 2.5: box")
    summary = keye.summarize(clip, start="1", end=3.5, snap=False)
    assert (asked[0][1][0], asked[0][1][-1]) == (0.0, 2.5)
    assert [(event.start_s, event.end_s) for event in summary.events] == [(1.0, 3.0), (3.0, 3.5)]
    assert (summary.chapters[0].start_s, summary.chapters[-1].end_s) == (1.0, 3.5)
    assert (summary.input.settings["start_s"], summary.input.settings["end_s"]) == (1.0, 3.5)


def test_edges_move_to_scenes(keye: Keye, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.video.conftest import write_clip as write_pictures
    from tests.video.test_scenes import shots

    clip = write_pictures(tmp_path / "shots.mp4", 100, picture=shots(45, 55))
    text = "0.0 - 2.0: red\n2.0 - 4.0: blue"
    answering(monkeypatch, text, text)
    assert [c.start_s for c in keye.summarize(clip).chapters] == [0.0, 1.8]
    assert [c.start_s for c in keye.summarize(clip, snap=False).chapters] == [0.0, 2.0]


SUBTITLES = "1\n00:00:00,500 --> 00:00:01,200\nHello\n\n2\n00:00:03,500 --> 00:00:04,600\nBye\n"


def test_subtitles_count_from_the_part_they_are_in(
    own_prompts: Keye, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    clip = write_clip(tmp_path / "long.mp4", 8.0)
    lines = tmp_path / "lines.srt"
    lines.write_text(SUBTITLES)
    asked, _ = answering(monkeypatch, *["0.0 - 2.0: ring"] * 3)
    own_prompts.summarize(clip, subtitles=lines, snap=False)
    assert [text for text, _ in asked] == [
        f"Subtitles:\n[0.5 - 1.2] Hello\n\n{OWN_PROMPT}",
        f"Subtitles:\n[0.8 - 1.9] Bye\n\n{OWN_PROMPT}",
        OWN_PROMPT,
    ]
    assert not [w for w in recwarn if issubclass(w.category, KeyeWarning)]


def test_a_line_that_is_on_screen_when_a_part_begins(clip: Path, keye: Keye, tmp_path: Path) -> None:
    lines = tmp_path / "lines.srt"
    lines.write_text(SUBTITLES)
    settings = ask_settings(keye.preprocessor, subtitles=lines)
    plans = plan_inputs([probe(clip)], settings.sampling)
    text = prompt_text("What?", plans, settings, origin_s=Fraction(1))
    assert text == "Subtitles:\n[0.0 - 0.2] Hello\n[2.5 - 3.6] Bye\n\nWhat?"


def test_a_clip_that_fits_is_one_part(keye: Keye, clip: Path) -> None:
    (part,) = plan_parts(keye.loaded, clip, ask_settings(keye.preprocessor), "What?")
    assert (part.begin_s, float(part.end_s), part.input.sampling.frames) == (0, 4.1, 9)
    planned = plan_summary(clip, model=keye.name)
    assert [item.input.sampling for item in planned] == [part.input.sampling]


def test_how_clips_are_cut(keye: Keye, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "long.mp4", 40.0)

    def parts(**options: Any) -> Sequence[Any]:
        return plan_parts(keye.loaded, clip, ask_settings(keye.preprocessor, **options), "What? " * 20)

    cut = parts(fps=8)
    assert [float(part.begin_s) for part in cut] == [0.0, 20.0]
    assert [part.end_s for part in cut[:-1]] == [part.begin_s for part in cut[1:]]
    assert all(part.run.prompt_tokens + 512 <= part.run.context_tokens for part in cut)
    # 81 frames are asked for at 2 a second. A budget that leaves half of them does not cut, one that leaves less does.
    assert len(parts(max_tokens_video=4 * 41)) == 1
    assert len(parts(max_tokens_video=4 * 40)) == 2
    # A number of frames that the user chose does not.
    (whole,) = parts(max_frames=6)
    assert whole.input.sampling.frames == 6
    with pytest.raises(UsageError, match="the prompt takes"):
        plan_parts(keye.loaded, clip, ask_settings(keye.preprocessor), "What? " * 1000)


def test_no_clip_no_summary(keye: Keye, image: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"picture\.png is a still image, in which nothing happens"):
        keye.summarize(image)
    with pytest.raises(InputError, match="does not exist"):
        keye.summarize(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "long"}, "there is no style long; there are brief, detailed, bullets"),
        ({"chapters": 0}, "--chapters must be from 1 to 1000, or auto, not 0"),
        ({"chapters": "many"}, "--chapters must be a number or auto, not many"),
        ({"language": "<|im_end|>"}, "--language must be a language's name, as in German, not '<|im_end|>'"),
        ({"language": "x" * 41}, "--language must be a language's name"),
        ({"min_chapter_s": -1.0}, r"the shortest chapter must be 0 seconds or more, not -1\.0"),
        ({"colour": "red"}, "there is no option colour"),
    ],
)
def test_options_that_cannot_be(keye: Keye, options: dict[str, Any], message: str) -> None:
    import re

    with pytest.raises(UsageError, match=message if "\\" in message else re.escape(message)):
        summary_settings(keye.preprocessor, **options)


def test_settings_or_options(keye: Keye, clip: Path) -> None:
    with pytest.raises(UsageError, match="not both"):
        keye.summarize(clip, settings=SummarySettings(), style="brief")


def test_text_alone(keye: Keye) -> None:
    """An answer to text is what a forward pass over everything so far, from nothing, gives token by token."""
    loaded = keye.loaded
    answer = answer_text(loaded, "Say something.", GenerationSettings(max_tokens=5), think=False)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Say something."}]}]
    prompt = build_prompt(loaded.tokenizer, loaded.config, messages, [], think=False)
    assert answer.prompt_tokens == len(prompt.input_ids)
    ids = prompt.input_ids.tolist()
    with torch.inference_mode():
        for token_id in answer.token_ids:
            cache = KeyeCache(loaded.config, len(ids))
            positions = torch.arange(len(ids)).expand(3, 1, -1)
            hidden = loaded.model.decode(loaded.model.embed(torch.tensor([ids]), None), positions, cache)
            assert int(loaded.model.logits(hidden[0, -1]).argmax()) == token_id
            ids.append(token_id)
    with pytest.raises(UsageError, match="the prompt takes"):
        answer_text(loaded, "word " * 2000, GenerationSettings())
