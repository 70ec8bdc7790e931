"""Reasoning and answer are told apart in every spelling, however the output is cut into pieces."""

from __future__ import annotations

import pytest

from keyecli.tasks.parse import AnswerSplitter, split_answer

# (prompt ended inside <think>, output, reasoning, text)
SPELLINGS = [
    (False, "A ball bounces.", "", "A ball bounces."),
    (False, "<think>look</think>A ball.", "look", "A ball."),
    (False, "<think>\nlook\n</think>\n\nA ball.\n", "look", "A ball."),
    (True, "look\n</think>\n\nA ball.", "look", "A ball."),
    (True, "\n\n</think>\n\nA ball.", "", "A ball."),
    (True, "<think>look</think>A ball.", "look", "A ball."),
    (False, "<think></think><answer>A ball.</answer>", "", "A ball."),
    (False, "<think>look</think>\n<answer>\nA ball.\n</answer>\n", "look", "A ball."),
    (True, "look</think><answer>A ball.", "look", "A ball."),
    (False, "<Think>look</THINK><Answer>A ball.</ANSWER>", "look", "A ball."),
    (False, "Said: <answer>5</answer>.", "", "Said: 5."),
    (False, "</think>A ball.", "", "A ball."),
    (False, "<think>one</think>A <think>two</think>ball.", "one\ntwo", "A ball."),
    (True, "never closed", "never closed", ""),
    (True, "look <answer>5</answer>", "look", "5"),
    (True, "use <answer> tags: <answer>5</answer>\n", "use <answer> tags:", "5"),
    (True, "put it in <answer> tags</think>5", "put it in <answer> tags", "5"),
    (False, "a < b and <b>bold</b> <thin", "", "a < b and <b>bold</b> <thin"),
    (False, "[[1.0, 2.5]]\n\n[[3.0, 4.0]]", "", "[[1.0, 2.5]]\n\n[[3.0, 4.0]]"),
    (False, "", "", ""),
]


@pytest.mark.parametrize(("thinking_open", "output", "reasoning", "text"), SPELLINGS)
def test_split_at_once(thinking_open: bool, output: str, reasoning: str, text: str) -> None:
    assert split_answer(output, thinking_open) == (reasoning, text)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("thinking_open", "output", "reasoning", "text"), SPELLINGS)
def test_split_in_pieces(thinking_open: bool, output: str, reasoning: str, text: str, size: int) -> None:
    splitter = AnswerSplitter(thinking_open)
    steps = [splitter.add(output[i : i + size]) for i in range(0, len(output), size)]
    steps.append(splitter.finish())
    assert (splitter.reasoning, splitter.text) == (reasoning, text)
    assert "".join(step.text for step in steps) == text
    if not (thinking_open and "</think>" not in output and "<answer>" in output):
        assert "".join(step.reasoning for step in steps) == reasoning


def test_text_is_streamed_before_the_end() -> None:
    splitter = AnswerSplitter()
    assert splitter.add("A ball ").text == "A ball"
    assert splitter.add("bounces").text == " bounces"
    assert splitter.add(" <ans").text == ""
    assert splitter.add("wer>now").text == " now"
