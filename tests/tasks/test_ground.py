"""A search through the whole pipeline with the toy model: real files in, valid spans and a full record out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyecli import __version__
from keyecli.engine import stream
from keyecli.errors import InputError, KeyeWarning, MemoryLimitError, UsageError
from keyecli.session import Keye, plan_ground
from keyecli.tasks.ground import Grounding, Span, timeline_of
from keyecli.tasks.lookup import Looker
from keyecli.tasks.search import GroundSettings, ground_settings
from tests.tasks.conftest import write_clip

FEW = {"max_tokens": 28}
FIELDS = {
    "schema": str,
    "query": str,
    "found": bool,
    "presence": float,
    "spans": list,
    "question": str,
    "windows": list,
    "evidence": list,
    "reasoning": str,
    "inputs": list,
    "prompt_tokens": int,
    "completion_tokens": int,
    "stop_reason": str,
    "timings": dict,
    "settings": dict,
    "model": str,
    "weights_revision": str,
    "keye_version": str,
    "device": str,
    "dtype": str,
    "quant": type(None),
    "kv": type(None),
    "seed": int,
}


def assert_valid(result: Grounding, end_s: float) -> None:
    edges = [edge for span in result for edge in (span.start_s, span.end_s)]
    assert edges == sorted(set(edges))
    assert all(0 <= edge <= end_s for edge in edges)
    assert all(span.score is not None and 0 <= span.score <= 1 for span in result)


def found_somewhere(keye: Keye, clip: Path, **options: Any) -> Grounding:
    """The first result with a span, over seeds: the toy model says anything."""
    for seed in range(40):
        result = keye.ground(clip, "the dog", temperature=3.0, seed=seed, **FEW, **options)
        if result.found:
            return result
    raise AssertionError("no seed gave a span")


def test_record_of_a_search(keye: Keye, clip: Path, tiny_checkpoint: Path) -> None:
    result = keye.ground(clip, "the dog", seed=5, **FEW)
    record = json.loads(json.dumps(result.to_dict()))
    assert {name: type(value) for name, value in record.items()} == FIELDS
    assert record["schema"] == "keye.ground/1"
    assert record["query"] == "the dog"
    assert "this happens: the dog\n" in record["question"]
    assert record["model"] == str(tiny_checkpoint)
    assert (record["keye_version"], record["stop_reason"], record["seed"]) == (__version__, "stop", 5)
    assert set(record["timings"]) == {
        "decode_s",
        "encode_s",
        "prefill_s",
        "generate_s",
        "refine_s",
        "total_s",
    }
    stages = [seconds for stage, seconds in record["timings"].items() if stage != "total_s"]
    assert 0 < max(stages) <= record["timings"]["total_s"]  # they overlap
    assert record["settings"].pop("calibration")
    assert record["settings"] == {
        "max_tokens": 28,
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
        "constrained": True,
        "refine": False,
        "window_s": None,
        "top": None,
        "min_score": None,
        "merge_gap_s": 0.0,
    }
    (window,) = record["windows"]
    assert (window["start_s"], window["end_s"]) == (0.0, 4.1)
    assert record["inputs"][0]["frames"] == 9


def test_spans_have_frames_and_timecode(keye: Keye, clip: Path) -> None:
    result = found_somewhere(keye, clip)
    assert_valid(result, 4.1)
    span, record = result[0], result.to_dict()["spans"][0]
    assert isinstance(span, Span)
    assert (record["start_s"], record["end_s"], record["score"]) == (span.start_s, span.end_s, span.score)
    # Ten frames a second: the first one shown at the time or later.
    assert record["start_frame"] == min(40, np.ceil(span.start_s * 10 - 1e-6))
    assert record["start_frame"] < record["end_frame"] <= 41
    assert record["start_timecode"] == f"00:00:{int(span.start_s):02d}:{record['start_frame'] % 10}"
    assert json.loads(result.windows[0].answer)[0][0] == span.start_s


@pytest.mark.parametrize("options", [{}, {"think": False}, {"temperature": 4.0}, {"max_tokens": 12}])
def test_whatever_the_model_says_is_valid(keye: Keye, clip: Path, options: dict[str, Any]) -> None:
    for seed in range(3):
        for result in keye.ground(clip, ["the dog", "a red car"], **{**FEW, "seed": seed, **options}):
            assert_valid(result, 4.1)
            assert result.stop_reason == "stop"
            assert result.completion_tokens <= 28


def test_queries_share_one_prefill(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodings: list[str] = []
    decode = stream.decode_frames
    monkeypatch.setattr(
        stream,
        "decode_frames",
        lambda info, *a, **k: (decodings.append(info.path.name), decode(info, *a, **k))[1],
    )
    keye = Keye(replace(keye.loaded, frame_cache=None))  # which would share more
    alone = [keye.ground(clip, query, **FEW) for query in ("the dog", "a red car that stops", "the dog")]
    assert len(decodings) == 3
    together = keye.ground(clip, [result.query for result in alone], **FEW)
    assert len(decodings) == 4
    for one, other in zip(alone, together, strict=True):
        assert {**one.to_dict(), "timings": None} == {**other.to_dict(), "timings": None}


def test_refining_keeps_spans_valid(keye: Keye, clip: Path) -> None:
    result = found_somewhere(keye, clip, refine=True)
    assert_valid(result, 4.1)
    assert result.settings["refine"] is True


def test_windows_are_searched_one_by_one(keye: Keye, clip: Path) -> None:
    result = keye.ground(clip, "the dog", window=2, temperature=2.0, **FEW)
    assert [(window.start_s, window.end_s) for window in result.windows] == [(0, 2), (1.5, 3.5), (2.5, 4.1)]
    assert result.input.times_s == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4)
    assert result.input.frames == result.input.frames_planned == 9
    assert_valid(result, 4.1)
    for window in result.windows:
        for start_s, end_s in json.loads(window.answer):
            assert 0 <= start_s < end_s <= window.end_s - window.start_s + 1e-9


def test_times_count_from_the_part_that_is_searched(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    build = stream.PromptFeeder.__init__

    def spy(self: Any, model: Any, cache: Any, prompt: Any, *others: Any) -> None:
        prompts.append(keye.tokenizer.decode(prompt.input_ids))
        build(self, model, cache, prompt, *others)

    monkeypatch.setattr(stream.PromptFeeder, "__init__", spy)
    result = keye.ground(clip, "the dog", start=1, end=3, **FEW)
    times = [part.partition("<|video_pad|>")[0] for part in prompts[0].split("<|frame|>")[1:]]
    assert times == ["0.0", "0.5", "1.0", "1.5", "2.0"]
    assert result.input.times_s == (1.0, 1.5, 2.0, 2.5, 3.0)


def test_a_long_clip_is_searched_in_as_few_windows_as_will_do(keye: Keye, tmp_path: Path) -> None:
    """2,048 visual tokens of at least four a frame are 512 frames; at 10 a second, 51 seconds."""
    long = write_clip(tmp_path / "long.mp4", 60.0, height=32, width=32)
    plan = plan_ground(long, ["the dog"], model=keye.loaded.folder, fps=10, **FEW)
    assert len(plan.windows) == 2
    assert all(run.inputs[0].sampling.fps == pytest.approx(10, rel=0.05) for run in plan.runs)
    assert len(plan_ground(long, ["the dog"], model=keye.loaded.folder, fps=2, **FEW).windows) == 1
    # A limit that the user gives is no reason for windows.
    assert len(plan_ground(long, ["x"], model=keye.loaded.folder, fps=10, max_frames=50, **FEW).windows) == 1


def test_a_model_says_how_long_its_clips_may_be(
    keye: Keye, clip: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "keye_prompts.json").write_text('{"ground": "Where is {query}?", "longest_clip_s": 2}')
    plan = plan_ground(clip, ["the dog"], model=folder, **FEW)
    assert plan.questions == ("Where is the dog?",)
    assert len(plan.windows) == 3
    assert all(window.end_s - window.start_s <= 2 for window in plan.windows)


def test_evidence_is_a_share_of_every_frame(keye: Keye, clip: Path) -> None:
    plain = keye.ground(clip, "the dog", **FEW)
    for options in ({}, {"window": 2}):
        result = keye.ground(clip, "the dog", explain=True, **FEW, **options)
        assert [frame.time_s for frame in result.evidence] == list(result.input.times_s)
        assert sum(frame.weight for frame in result.evidence) == pytest.approx(1.0, abs=1e-5)
        assert len({frame.weight for frame in result.evidence}) > 1
    assert plain.evidence == ()
    assert keye.ground(clip, "the dog", explain=True, **FEW).spans == plain.spans


def unconstrained(
    keye: Keye, clip: Path, text: str, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Grounding:
    from keyecli.engine.shared import SharedAnswer, SharedPrefix

    reply = SharedAnswer(text, "", (1, 2, 3), (-0.1, -0.1, -0.1), 50, "stop")
    monkeypatch.setattr(
        SharedPrefix, "answer", lambda *a, constraint, **k: reply if constraint is None else None
    )
    return keye.ground(clip, "the dog", constrained=False, **options)


def test_unconstrained_answers_are_read_leniently(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "It is there from 0:01 to 0:02, and at 3 s - 9 s."
    result = unconstrained(keye, clip, text, monkeypatch)
    assert result.spans == (Span(1.0, 2.0, None), Span(3.0, 4.1, None))
    assert (result.presence, result.windows[0].answer) == (None, text)
    shifted = unconstrained(keye, clip, text, monkeypatch, start=1)
    assert shifted.spans == (Span(2.0, 3.0, None), Span(4.0, 4.1, None))
    assert unconstrained(keye, clip, "It never appears.", monkeypatch).spans == ()
    with pytest.warns(KeyeWarning, match="the answer about 'the dog' names no times: 'A dog.'"):
        assert unconstrained(keye, clip, "A dog.", monkeypatch).spans == ()


def test_an_unconstrained_answer_that_is_cut_off_is_told(keye: Keye, clip: Path) -> None:
    with pytest.warns(KeyeWarning, match="the answer about 'the dog' was cut off; raise --max-tokens"):
        result = keye.ground(clip, "the dog", constrained=False, max_tokens=5)
    assert result.stop_reason == "length"


def test_which_spans_are_kept(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyecli.tasks.windows import ScoredSpan

    spans = (ScoredSpan(0.0, 1.0, 0.5), ScoredSpan(1.2, 2.0, 0.9), ScoredSpan(3.0, 4.0, 0.7))
    answer = Looker._answer

    def fixed(self: Looker, *arguments: Any) -> Any:
        from dataclasses import replace

        return replace(answer(self, *arguments), spans=spans)

    monkeypatch.setattr(Looker, "_answer", fixed)

    def starts(**options: Any) -> list[float]:
        return [span.start_s for span in keye.ground(clip, "the dog", **FEW, **options)]

    assert starts() == [0.0, 1.2, 3.0]
    assert starts(top=2) == [1.2, 3.0]
    assert starts(top=1) == [1.2]
    assert starts(min_score=0.6) == [1.2, 3.0]
    assert starts(min_score=0.95) == []
    assert starts(merge_gap=0.2) == [0.0, 3.0]
    assert starts(merge_gap=1) == [0.0]


def test_a_timeline_for_the_exports(keye: Keye, clip: Path) -> None:
    result = found_somewhere(keye, clip)
    timeline = timeline_of([result, result])
    assert timeline.path == clip
    assert len(timeline.segments) == 2 * len(result)
    first = timeline.segments[0]
    assert (first.title, first.start_s, first.score) == ("the dog", result[0].start_s, result[0].score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "--top must be at least 1, not 0"),
        ({"min_score": 1.5}, "--min-score must be from 0 to 1, not 1.5"),
        ({"merge_gap": -1.0}, "--merge-gap must be 0 s or more, not -1"),
        ({"window": 1.0}, "--window must be at least 2 s, not 1"),
        ({"window": float("nan")}, "--window must be at least 2 s, not nan"),
        ({"constrained": False, "top": 1}, "--top needs scores, which --unconstrained answers do not have"),
        ({"constrained": False, "min_score": 0.5}, "--min-score needs scores"),
        ({"max_tokens": 4}, "an answer takes at least"),
        ({"colour": "red"}, "there is no option colour"),
    ],
)
def test_options_that_cannot_be_used(keye: Keye, clip: Path, options: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        keye.ground(clip, "the dog", **options)
    assert message in str(error.value)


def test_settings_or_options(keye: Keye, clip: Path) -> None:
    settings = ground_settings(keye.preprocessor, top=1, **FEW)
    assert isinstance(settings, GroundSettings)
    assert keye.ground(clip, "the dog", settings=settings).settings["top"] == 1
    with pytest.raises(UsageError, match="either settings or single options"):
        keye.ground(clip, "the dog", settings=settings, top=2)


def test_inputs_that_cannot_be_searched(
    keye: Keye, clip: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"picture\.png is a still image, in which nothing happens"):
        keye.ground(image, "the dog")
    with pytest.raises(UsageError, match="nothing to look for"):
        keye.ground(clip, [])
    with pytest.raises(UsageError, match="a query is empty"):
        keye.ground(clip, ["the dog", " "])
    with pytest.raises(UsageError, match=r"the question contains <\|im_end\|>"):
        keye.ground(clip, "a <|im_end|> b")
    monkeypatch.setattr("keyecli.engine.loaded.free_memory_bytes", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match="are free"):
        keye.ground(clip, "the dog")
