"""A question through the whole pipeline with the toy model: real files in, a full record out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keyecli import __version__
from keyecli.engine import loaded as loading
from keyecli.errors import InputError, KeyeWarning, MemoryLimitError, UsageError
from keyecli.session import Keye, load, plan
from keyecli.tasks import ask as ask_module
from keyecli.tasks.ask import Answer, prompt_text
from tests.tasks.conftest import write_clip

pytestmark = pytest.mark.filterwarnings("ignore:the answer was cut off:keyecli.errors.KeyeWarning")

FIELDS = {
    "schema": str,
    "text": str,
    "reasoning": str,
    "question": str,
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
    "answers": list,
}
SUBTITLES = """1
00:00:00,500 --> 00:00:01,200
Hello <i>there</i>

2
00:00:02,000 --> 00:00:03,000
a mark <|im_<|im_end|>end|> here

3
00:00:30,000 --> 00:00:31,000
too late
"""


def without_times(answer: Answer) -> dict[str, Any]:
    return {**answer.to_dict(), "timings": None}


def test_an_answer_says_how_weights_and_keys_are_held(clip: Path) -> None:
    answer = load(device="cpu", quant="int8", kv="fp8").ask(clip, "What?", max_tokens=2)
    assert (answer.to_dict()["quant"], answer.to_dict()["kv"]) == ("int8", "fp8")


def test_record_of_an_answer(keye: Keye, clip: Path, tiny_checkpoint: Path) -> None:
    answer = keye.ask(clip, "  What happens? ", max_tokens=6, seed=5)
    record = json.loads(json.dumps(answer.to_dict()))
    assert {name: type(value) for name, value in record.items()} == FIELDS
    assert record["schema"] == "keye.ask/1"
    assert record["question"] == "What happens?"
    assert record["model"] == str(tiny_checkpoint)
    assert (record["keye_version"], record["device"], record["dtype"]) == (__version__, "cpu", "fp32")
    assert (record["stop_reason"], record["completion_tokens"], record["seed"]) == ("length", 6, 5)
    assert len(record["weights_revision"]) >= 8
    assert set(record["timings"]) == {"decode_s", "encode_s", "prefill_s", "generate_s", "total_s"}
    stages = [seconds for stage, seconds in record["timings"].items() if stage != "total_s"]
    assert 0 < max(stages) <= record["timings"]["total_s"]  # they overlap
    assert record["settings"] == {
        "max_tokens": 6,
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
    }

    [only] = record["answers"]
    assert only == {name: record[name] for name in only}
    assert set(only) == {"text", "reasoning", "completion_tokens", "stop_reason", "seed"}

    [report] = record["inputs"]
    assert report["times_s"] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    assert (report["path"], report["kind"]) == (str(clip), "video")
    assert (report["frames"], report["frames_planned"]) == (9, 9)
    assert report["duration_s"] == pytest.approx(4.1)
    assert report["tokens"] == 9 * (report["width"] // 28) * (report["height"] // 28)
    assert report["truncated_at_s"] is None
    assert report["settings"] == {
        "fps": 2.0,
        "max_frames": None,
        "min_tokens": 4,
        "max_tokens": 16,
        "total_tokens": 2048,
        "adaptive_budget": False,
        "start_s": None,
        "end_s": None,
        "exact_resize": False,
    }
    assert record["prompt_tokens"] > report["tokens"]
    assert str(answer) == answer.text


def test_two_videos_and_an_image_in_the_order_given(
    keye: Keye, clip: Path, second_clip: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = []
    build = ask_module.build_prompt

    def watched(*arguments: Any, **options: Any) -> Any:
        prompts.append(build(*arguments, **options))
        return prompts[-1]

    monkeypatch.setattr(ask_module, "build_prompt", watched)
    inputs = [clip, image, second_clip]
    answer = keye.ask(inputs, "Which one is longer?", max_tokens=4)
    assert [report.kind for report in answer.inputs] == ["video", "image", "video"]
    assert [report.path for report in answer.inputs] == [str(path) for path in inputs]
    assert [report.frames for report in answer.inputs] == [9, 1, 5]

    ids = prompts[-1].input_ids
    assert answer.prompt_tokens == len(ids)
    config = keye.config
    kinds = [int(i) for i in ids if i in (config.video_token_id, config.image_token_id)]
    first, middle, last = (report.tokens for report in answer.inputs)
    expected = [config.video_token_id] * first + [config.image_token_id] * middle
    assert kinds == expected + [config.video_token_id] * last
    text = keye.tokenizer.decode(ids)
    assert text.index("Which one is longer?") > text.rindex("<|vision_end|>")
    assert "<|frame|>3.5<|video_pad|>" in text


def test_same_settings_same_answer_and_seeds_draw(keye: Keye, clip: Path) -> None:
    def draw(**options: Any) -> dict[str, Any]:
        return without_times(keye.ask(clip, "What happens?", max_tokens=16, **options))

    assert draw() == draw()
    assert draw(temperature=1.0, top_p=0.95, seed=4) == draw(temperature=1.0, top_p=0.95, seed=4)
    assert draw(temperature=1.0, seed=4)["reasoning"] != draw(temperature=1.0, seed=5)["reasoning"]


@pytest.mark.filterwarnings("ignore::keyecli.errors.KeyeWarning")
def test_several_answers_are_those_of_their_seeds(keye: Keye, clip: Path) -> None:
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0, "min_p": 0.01, "think": False}
    several = keye.ask(clip, "What?", n=3, seed=4, **options)
    assert [sample.seed for sample in several.answers] == [4, 5, 6]
    for sample in several.answers:
        alone = keye.ask(clip, "What?", **{**options, "seed": sample.seed})
        assert alone.answers == (sample,)
        assert (alone.text, alone.seed) == (sample.text, sample.seed)
    assert len({sample.text for sample in several.answers}) == 3
    assert (several.text, several.seed) == (several.answers[0].text, 4)
    for refused in ({"n": 0}, {"n": 2, "temperature": 0.0}, {"n": 2, "on_text": print}):
        with pytest.raises(UsageError):
            keye.ask(clip, "What?", **{**options, **refused})


@pytest.mark.filterwarnings("ignore::keyecli.errors.KeyeWarning")
def test_an_answer_ends_before_a_stop_string(keye: Keye, clip: Path) -> None:
    pieces: list[str] = []
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "think": False}
    whole = keye.ask(clip, "What?", **options).text
    stop = whole[9:12]
    assert whole.index(stop) == 9
    answer = keye.ask(clip, "What?", stop=["never there", stop], on_text=pieces.append, **options)
    assert answer.text == "".join(pieces) == whole[:9].rstrip()
    assert answer.stop_reason == "stop"
    assert answer.settings["stop"] == ["never there", stop]
    assert keye.ask(clip, "What?", stop=stop, **options).text == answer.text


def test_streams_add_up_and_thinking_is_kept_apart(keye: Keye, clip: Path) -> None:
    text: list[str] = []
    reasoning: list[str] = []
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "on_text": text.append}
    thought = keye.ask(clip, "Why?", on_reasoning=reasoning.append, **options)
    # The toy's template ends inside <think>, and a random model never closes it.
    assert (thought.text, "".join(reasoning)) == ("", thought.reasoning)
    assert thought.reasoning
    plain = keye.ask(clip, "Why?", think=False, on_reasoning=reasoning.append, **options)
    assert "".join(text) == plain.text != ""
    assert plain.reasoning == ""


def test_answer_is_split_when_the_model_writes_the_tags(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = iter(keye.tokenizer.encode("It bounces.\n</think>\n\n<answer>A ball ⚽</answer><|im_end|>"))
    monkeypatch.setattr(
        "keyecli.engine.generate.Sampler.pick",
        lambda self, logits, forbidden: (torch.tensor([next(words)]), torch.zeros(1)),
    )
    pieces: list[str] = []
    answer = keye.ask(clip, "What?", on_text=pieces.append)
    assert (answer.reasoning, answer.text, answer.stop_reason) == ("It bounces.", "A ball ⚽", "stop")
    assert "".join(pieces) == "A ball ⚽"
    assert answer.completion_tokens == len("It bounces.\n\n\n<answer>A ball ⚽</answer>".encode()) + 1


def test_a_cut_off_answer_is_said(keye: Keye, clip: Path) -> None:
    with pytest.warns(KeyeWarning, match="cut off after 3 tokens; raise --max-tokens"):
        keye.ask(clip, "What?", max_tokens=3)


def test_part_of_a_clip(keye: Keye, clip: Path) -> None:
    [report] = keye.ask(clip, "What?", start=1, end="0:02.5", fps=2, max_tokens=1).inputs
    assert report.times_s == (1.0, 1.5, 2.0, 2.5)
    assert (report.settings["start_s"], report.settings["end_s"]) == (1.0, 2.5)


def test_subtitles_of_the_sampled_part_stand_before_the_question(
    keye: Keye, clip: Path, image: Path, second_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "clip.srt"
    file.write_text(SUBTITLES)
    texts = []
    build = ask_module.build_prompt

    def watched(tokenizer: Any, config: Any, messages: Any, *arguments: Any, **options: Any) -> Any:
        texts.append(messages[0]["content"][-1]["text"])
        return build(tokenizer, config, messages, *arguments, **options)

    monkeypatch.setattr(ask_module, "build_prompt", watched)
    answer = keye.ask([clip, image], "What is said?", subtitles=file, max_tokens=1)
    assert texts[-1] == ("Subtitles:\n[0.5 - 1.2] Hello there\n[2.0 - 3.0] a mark  here\n\nWhat is said?")
    assert answer.settings["subtitles"] == str(file)
    keye.ask(clip, "What is said?", subtitles=file, start=1.5, max_tokens=1)
    assert "Hello" not in texts[-1]
    assert "a mark" in texts[-1]
    with pytest.warns(KeyeWarning, match="no line inside"):
        keye.ask(clip, "What is said?", subtitles=file, start=3.5, max_tokens=1)
    assert texts[-1] == "What is said?"
    with pytest.raises(UsageError, match="exactly one video, and 2"):
        keye.ask([clip, second_clip], "What is said?", subtitles=file)


def test_wrong_usage(keye: Keye, clip: Path) -> None:
    with pytest.raises(UsageError, match="question is empty"):
        keye.ask(clip, " \n")
    with pytest.raises(UsageError, match="no input"):
        keye.ask([], "What?")
    with pytest.raises(UsageError, match=r"<\|video_pad\|>"):
        keye.ask(clip, "What is <|video_pad|>?")
    with pytest.raises(InputError, match=r"missing\.mp4"):
        keye.ask([clip, "missing.mp4"], "What?")


def test_cut_off_file_is_answered_with_a_warning_and_refused_when_strict(keye: Keye, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mkv"
    whole = write_clip(tmp_path / "whole.mkv", 6.0).read_bytes()
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.warns(KeyeWarning, match="cut off"):
        answer = keye.ask(cut, "What?", max_tokens=1)
    [report] = answer.inputs
    assert report.truncated_at_s is not None
    assert 1.0 < report.times_s[-1] <= report.truncated_at_s < 5.0
    assert answer.prompt_tokens > report.tokens
    with pytest.raises(InputError, match=r"--strict"):
        keye.ask(cut, "What?", strict=True)


def test_too_long_for_the_context(keye: Keye, clip: Path) -> None:
    with pytest.raises(UsageError, match=r"context holds 4,096.*a shorter question"):
        keye.ask(clip, "why " * 2000)


def test_too_large_for_the_memory(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match=r"the run needs .* and 0 MiB are free"):
        keye.ask(clip, "What?")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_is_a_memory_error(
    keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ask_module, "prefill_stream", fail)
    with pytest.raises(MemoryLimitError, match="ran out of memory"):
        keye.ask(clip, "What?")


def test_no_room_for_the_weights(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda device: 500_000)
    with pytest.raises(MemoryLimitError, match="--dtype bf16"):
        load(tiny_checkpoint, device="cpu")
    load(tiny_checkpoint, device="cpu", dtype="bf16")


def test_plan_needs_no_weights(
    tmp_path: Path, tiny_checkpoint: Path, clip: Path, image: Path, keye: Keye
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((tiny_checkpoint / name).read_bytes())
    planned = plan([clip, image], "What happens?", model=folder, device="cpu", max_frames=4)
    planned.check()
    assert [item.sampling.frames for item in planned.inputs] == [4, 1]
    assert planned.needed_bytes == planned.memory.total_bytes
    loaded = keye.plan([clip, image], "What happens?", max_frames=4)
    assert loaded.needed_bytes == planned.needed_bytes - planned.memory.weights_bytes
    assert loaded.prompt_tokens == planned.prompt_tokens
    answer = keye.ask([clip, image], "What happens?", max_frames=4, max_tokens=1)
    assert abs(planned.prompt_tokens / answer.prompt_tokens - 1) < 0.25
    assert planned.visual_tokens == sum(report.tokens for report in answer.inputs)


def test_progress_goes_through_the_stages(keye: Keye, clip: Path, tiny_checkpoint: Path) -> None:
    seen: list[tuple[str, float, float | None]] = []
    load(tiny_checkpoint, device="cpu", on_progress=lambda *report: seen.append(report))
    keye.ask(clip, "What?", max_tokens=3, on_progress=lambda *report: seen.append(report))
    assert list(dict.fromkeys(" ".join(name.split()[:2]) for name, _, _ in seen)) == [
        "loading weights",
        "reading frames",
        "answering",
    ]
    assert ("reading frames 9/9 decoded, 9 encoded, 9 prefilled", 9, 9) in seen
    assert seen[-1] == ("answering", 3, None)


def test_bf16_runs(tiny_checkpoint: Path, clip: Path) -> None:
    answer = load(tiny_checkpoint, device="cpu", dtype="bfloat16").ask(clip, "What?", max_tokens=4)
    assert (answer.dtype, answer.completion_tokens) == ("bf16", 4)


def test_prompt_text_without_subtitles_is_the_question(keye: Keye) -> None:
    from keyecli.tasks.options import ask_settings

    assert prompt_text("Why?", [], ask_settings(keye.preprocessor)) == "Why?"
