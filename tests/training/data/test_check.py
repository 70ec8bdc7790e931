"""What a check finds in rows, tokens counted a second time, and the proof that training sees what answering does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyecli.engine.loaded import open_model
from keyecli.engine.plan import plan_inputs
from keyecli.engine.stream import visual_of
from keyecli.errors import UsageError
from keyecli.model.prompt import build_prompt
from keyecli.tasks.options import ask_settings
from keyecli.training.data import check as checking
from keyecli.training.data import open_data
from keyecli.training.data.check import Checker, RowCheck, Summary, TextFix, histogram
from keyecli.training.data.parity import first_difference
from keyecli.video.source import probe
from tests.training.data.conftest import WriteRows, question


def checked(path: Path, model: Path, **arguments: Any) -> list[RowCheck]:
    files = open_model(model, device="cpu", kernels="reference")
    return list(Checker(open_data(path), files, **arguments).rows())


def kinds(checks: list[RowCheck]) -> list[list[str]]:
    return [[finding.kind for finding in check.findings] for check in checks]


def messages(checks: list[RowCheck]) -> list[str]:
    return [finding.message for check in checks for finding in check.findings]


def test_good_rows_and_their_tokens(
    write: WriteRows, media: Path, tiny_checkpoint: Path, tiny_tokenizer: Any
) -> None:
    """A row has the tokens of the prompt that answering gives, and those of its answer."""
    path = write(
        question(), question("A <b>cat</b>.", text="Hm?"), question("<think>\nI see.\n</think>\n\nA dog.")
    )
    files = open_model(tiny_checkpoint, device="cpu", kernels="reference")
    checks = checked(path, tiny_checkpoint, options={"fps": 5.0}, parity=True)
    assert kinds(checks) == [[], [], []]
    plans = plan_inputs([probe(media / "a.mp4")], ask_settings(files.preprocessor, fps=5.0).sampling)
    answers = ("A dog.", "A <b>cat</b>.", "I see.\n</think>\n\nA dog.")
    for check, text, answer, think in zip(
        checks, ("What?", "Hm?", "What?"), answers, (False, False, True), strict=True
    ):
        content = [{"type": "video"}, {"type": "text", "text": text}]
        prompt = build_prompt(
            tiny_tokenizer,
            files.config,
            [{"role": "user", "content": content}],
            [visual_of(plans[0])],
            think=think,
        )
        # One token a byte, <|im_end|> and the line end; marks of thought are one token each.
        written = len(answer) - (len("</think>") - 1 if "</think>" in answer else 0) + 2
        # Nothing is learnt behind the last token, which is no input.
        assert (check.tokens, check.learnt_tokens) == (len(prompt.input_ids) + written - 1, written)
        assert check.visual_tokens == prompt.visual_tokens == plans[0].sampling.tokens


def test_clips(write: WriteRows, media: Path, tiny_checkpoint: Path) -> None:
    (media / "broken.mp4").write_bytes((media / "a.mp4").read_bytes()[:200])
    (media / "empty.mp4").touch()
    rows = [question(videos=[name]) for name in ("none.mp4", "broken.mp4", "empty.mp4", "still.png", "a.mp4")]
    checks = checked(write(*rows), tiny_checkpoint)
    assert kinds(checks) == [["clip"]] * 4 + [[]]
    for message, words in zip(
        messages(checks),
        ("does not exist", "cut off", "is empty", "is an image, and the row has it as a video"),
        strict=True,
    ):
        assert words in message
    assert [check.tokens is None for check in checks] == [True] * 4 + [False]


def test_each_clip_is_looked_into_once(
    write: WriteRows, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def counting(path: Path) -> Any:
        looked.append(path.name)
        return probe(path)

    monkeypatch.setattr(checking, "probe", counting)
    monkeypatch.setattr(checking, "WINDOW_ROWS", 2)
    names = ["a.mp4", "none.mp4", "a.mp4", "b.mp4", "none.mp4", "b.mp4", "a.mp4"]
    rows = [question(str(number), videos=[name]) for number, name in enumerate(names)]
    checks = checked(write(*rows), tiny_checkpoint)
    assert kinds(checks) == [[], ["clip"], [], [], ["clip"], [], []]
    assert sorted(looked) == ["a.mp4", "b.mp4", "none.mp4"]


def test_placeholders_and_rows(write: WriteRows, tiny_checkpoint: Path) -> None:
    path = write(
        question(text="<video><video>"),
        "{",
        question(),
        {"a": 1},
        question("<|im_end|>"),
        question(text="<video>"),
    )
    checks = checked(path, tiny_checkpoint)
    assert kinds(checks) == [["placeholders"], ["row"], [], ["row"], ["layout"], []]
    assert messages(checks)[0] == "the messages have 2 <video> placeholders, and the row names 1 video"
    assert [check.line for check in checks] == [1, 2, 3, 4, 5, 6]


def test_a_row_without_an_answer(write: WriteRows, tiny_checkpoint: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<video>What?"}], "videos": ["a.mp4"]}
    checks = checked(write(row), tiny_checkpoint)
    assert messages(checks) == ["the row has no answer to learn"]


def test_spans(write: WriteRows, tiny_checkpoint: Path) -> None:
    """a.mp4 is 2.04 s long; a part of it may not be left by spans either."""
    part = {"type": "video", "video": "a.mp4", "video_start": 0.5, "video_end": 1.0}
    seen = {
        "messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "When?"}]},
            {"role": "assistant", "content": "[[1.5, 1.8]]"},
        ]
    }
    answers = (
        "[[0.0, 2.0]]",
        "[[1.5, 0.5]]",
        "[[1.0, 9.0]]",
        "[[9.0, 1.0]]",
        "[[1.0, 1.0]]",
        "The score is 9-3.",
    )
    both = question("[[1.0, 9.0]]", text="<video><video>When?", videos=["a.mp4", "b.mp4"])
    think = question("<think>\n[[9.0, 3.0]]\n</think>\n\n[[0.5, 1.0]]")
    checks = checked(write(*map(question, answers), seen, both, think), tiny_checkpoint)
    assert kinds(checks) == [[], ["span"], ["span"], ["span"], ["span"], [], ["span"], [], []]
    fixes = [finding.fix for check in checks for finding in check.findings]
    assert fixes == [TextFix("[[1.5, 0.5]]", "[[0.5, 1.5]]"), None, None, None, None]
    assert (
        messages(checks)[-1] == "the span 1.5 - 1.8 s is outside of the clip, which is seen from 0.5 to 1.0 s"
    )


def test_duplicates(write: WriteRows, media: Path, tiny_checkpoint: Path) -> None:
    """The same path in another spelling is the same file; another answer, file or sampling is another row."""
    path = write(
        question(id=1),
        question("A cat.", id=2),
        question(id=3, videos=[str(media / "a.mp4")]),
        question(id=4, videos=["b.mp4"]),
        question(id=5, videos=[{"video": "a.mp4", "fps": 1}]),
        question(id=1),
    )
    checks = checked(path, tiny_checkpoint)
    assert kinds(checks) == [[], [], ["duplicate"], [], [], ["duplicate"]]
    assert messages(checks) == [f"the row says the same as {path}:1"] * 2


def test_length(write: WriteRows, tiny_checkpoint: Path) -> None:
    path = write(question(), question("x" * 100))
    tokens = [check.tokens for check in checked(path, tiny_checkpoint)]
    assert tokens[0] is not None
    assert kinds(checked(path, tiny_checkpoint, max_length=tokens[0])) == [[], ["length"]]
    assert kinds(checked(path, tiny_checkpoint, max_length=tokens[0] - 1)) == [["length"], ["length"]]
    path = write(question("x" * 5000))
    assert "the model's context holds 4,096" in messages(checked(path, tiny_checkpoint))[0]


def test_sampling_that_cannot_be(write: WriteRows, tiny_checkpoint: Path) -> None:
    rows = [
        question(videos=[{"video": "a.mp4", **keys}])
        for keys in ({"video_start": 5}, {"video_start": 1, "video_end": 0.5}, {"max_pixels": 10})
    ]
    checks = checked(write(*rows), tiny_checkpoint)
    assert kinds(checks) == [["sampling"]] * 3


def test_parity_of_conversations(write: WriteRows, tiny_checkpoint: Path) -> None:
    """Frames of several videos with sampling of their own, parts in any order, earlier answers that are not learnt."""
    video = {"type": "video", "video": "a.mp4", "fps": 5, "total_pixels": 78400}
    parts = [
        {"type": "text", "text": "First "},
        video,
        {"type": "image", "image": "still.png"},
        {"type": "video", "video": "b.mp4", "nframes": 3},
        {"type": "text", "text": " then?"},
    ]
    several = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "One.", "loss": False},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    turns = question()["messages"] + [
        {"role": "user", "content": "<video>And?"},
        {"role": "assistant", "content": "No."},
    ]
    later = {"messages": turns, "videos": ["a.mp4", "b.mp4"]}
    checks = checked(write(several, later), tiny_checkpoint, parity=True, options={"max_frames": 6})
    assert messages(checks) == []


def test_parity_finds_what_differs(
    write: WriteRows, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(question())
    real = checking.lay_out_row

    def without_the_question_mark(tokenizer: Any, config: Any, row: Any, visuals: Any) -> Any:
        message = type(row.messages[0])("user", (row.messages[0].parts[0], "What."))
        return real(tokenizer, config, type(row)(row.source, (message, *row.messages[1:])), visuals)

    with monkeypatch.context() as patch:
        patch.setattr(checking, "lay_out_row", without_the_question_mark)
        (message,) = messages(checked(path, tiny_checkpoint, parity=True))
    assert message.endswith("is '.' in training and '?' in answering")

    def coarser(row: Any, settings: Any, look_into: Any) -> Any:
        return plan_inputs(
            [look_into(row.visuals[0].path)], ask_settings(files.preprocessor, fps=1.0).sampling
        )

    files = open_model(tiny_checkpoint, device="cpu", kernels="reference")
    monkeypatch.setattr(checking, "plan_row", coarser)
    (message,) = messages(checked(path, tiny_checkpoint, parity=True))
    assert message.startswith("a.mp4 gives training 3 frames of ")
    assert " and answering 5 frames of " in message


def test_first_difference(tiny_tokenizer: Any) -> None:
    ids, positions = np.arange(65, 70), np.tile(np.arange(5), (3, 1))

    def compared(other_ids: np.ndarray, other_positions: np.ndarray) -> str | None:
        return first_difference((ids, positions), (other_ids, other_positions), tiny_tokenizer)

    assert compared(ids, positions) is None
    changed = ids.copy()
    changed[[2, 4]] = 90
    assert (compared(changed, positions) or "").startswith("token 2 is ")
    assert compared(ids[:4], positions[:, :4]) == "the prompt has 5 tokens in training and 4 in answering"
    moved = positions.copy()
    moved[1, 3:] += 1
    assert compared(ids, moved) == "token 3 is at position (3, 3, 3) in training and (3, 4, 3) in answering"


def test_an_option_that_cannot_be(write: WriteRows, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="max-pixels"):
        checked(write(question()), tiny_checkpoint, options={"max_pixels": 1})


@pytest.mark.parametrize("spread", [0, 3, 40, 5000, 200_000])
def test_histogram(spread: int) -> None:
    draws = random.Random(spread)
    counts = [1000 + draws.randint(0, spread) for _ in range(200)]
    bars = histogram(counts)
    assert len(bars) <= 10
    assert sum(rows for *_, rows in bars) == len(counts)
    for low, high, rows in bars:
        assert rows == sum(low <= count < high for count in counts)
    assert [low for low, *_ in bars[1:]] == [high for _, high, _ in bars[:-1]]
    assert bars[0][0] <= min(counts)
    assert max(counts) < bars[-1][1]
    assert str(bars[0][1] - bars[0][0]).rstrip("0") in ("1", "2", "5")


def test_summary(write: WriteRows, tiny_checkpoint: Path) -> None:
    summary = Summary()
    checks = checked(write(question(), question(), "{"), tiny_checkpoint)
    for check in checks:
        summary.add(check)
    assert (summary.rows, summary.wrong_rows, dict(summary.kinds)) == (3, 2, {"duplicate": 1, "row": 1})
    assert summary.tokens == [checks[0].tokens, checks[1].tokens]
    assert json.dumps(summary.visual_tokens) == json.dumps(2 * (checks[0].visual_tokens or 0))
