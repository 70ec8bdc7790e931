"""The measurement of summaries, by hand: what counts as a found event and a right edge, and that the script runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from keyecli.tasks.chapters import Chapter
from keyecli.tasks.events import Event

TRUTH = "0.0 - 4.0: red circle\n2.0 - 6.0: word CAT\n8.0 - 10.0: red circle"


@pytest.fixture(autouse=True)
def fresh_script() -> None:
    sys.modules.pop("summary_quality", None)


def test_grading_by_hand() -> None:
    from summary_quality import Counts, grade

    right = [Event(0.0, 4.0, "red circle"), Event(2.0, 6.0, "word CAT"), Event(8.0, 10.0, "red circle")]
    chapters = [Chapter(0.0, 2.0, "a"), Chapter(2.0, 8.4, "b"), Chapter(8.4, 10.0, "c")]
    assert grade(TRUTH, right, chapters) == Counts(true=3, found=3, named=3, edges=2, right_edges=2)
    # Other words, half of the time and no more, the same line twice.
    wrong = [Event(0.0, 4.0, "red ring"), Event(4.1, 6.0, "word CAT"), Event(8.0, 10.0, "red circle")]
    assert grade(TRUTH, [*wrong, wrong[-1]], []) == Counts(true=3, found=1, named=4)
    # An edge half a second from where something ends is right, one a little further is not; the first is no edge.
    assert grade(TRUTH, [], [Chapter(0.0, 6.5, "a"), Chapter(6.5, 9.0, "b")]).right_edges == 1
    assert grade(TRUTH, [], [Chapter(0.0, 6.6, "a"), Chapter(6.6, 9.0, "b")]).right_edges == 0
    assert Counts(1, 1, 1, 0, 0) + Counts(2, 1, 3, 1, 1) == Counts(3, 2, 4, 1, 1)


@pytest.mark.filterwarnings("ignore::keyecli.errors.KeyeWarning")
def test_the_table(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model that knows nothing: no event is found, and the table says so."""
    import summary_quality

    arguments = ["--model", str(tiny_checkpoint), "--clips", "1", "--max-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["summary_quality.py", *arguments])
    summary_quality.main()
    said = capsys.readouterr().out
    assert "| 2 to 60 s | 0.000 (0 of " in said
    assert "1 answers cut off" in said
