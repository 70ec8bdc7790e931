"""A text ends before its first stop string, wherever its pieces are cut, and nothing of the string is ever let through."""

from __future__ import annotations

import random

import pytest

from keyecli.engine.stops import StopStrings


def ended(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the definition."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@pytest.mark.parametrize("seed", range(60))
def test_pieces_make_no_difference(seed: int) -> None:
    letters = random.Random(seed)
    text = "".join(letters.choices("ab\n", k=30))
    stops = ["".join(letters.choices("ab\n", k=letters.randint(2, 6))) for _ in range(letters.randint(0, 3))]
    expected, found = ended(text, stops)
    matcher, shown, rest = StopStrings(stops), "", text
    while rest:
        size = letters.randint(1, 5)
        shown += matcher.add(rest[:size])
        rest = rest[size:]
        assert expected.startswith(shown)
    assert (shown + matcher.finish(), matcher.found) == (expected, found)
    if found:
        assert matcher.add("more") == ""


def test_what_may_become_a_stop_string_waits_and_no_longer() -> None:
    matcher = StopStrings(["END", "\n\n"])
    assert [matcher.add(piece) for piece in ("a E", "N", "X\n", "b\n", "\nc")] == ["a ", "", "ENX", "\nb", ""]
    assert matcher.found
    assert matcher.finish() == ""
    matcher = StopStrings(["abcd", "bc"])
    assert matcher.add("xabcd") == "xa"
    matcher = StopStrings([])
    assert (matcher.add("anything"), matcher.finish(), matcher.found) == ("anything", "", False)
