"""Timed lines in the spellings that models use, and what stays prose."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyecli.tasks.events import MAX_TITLE, Event, TimedLine, parse_summary, read_time, settle

# Line → start, end, title, text.
SPELLINGS = {
    "3.0 - 7.5: red circle moves left": (3.0, 7.5, "red circle moves left", ""),
    "3.0-7.5 red circle": (3.0, 7.5, "red circle", ""),
    "3 - 7: x": (3.0, 7.0, "x", ""),
    "3.0s - 7.5s: title": (3.0, 7.5, "title", ""),
    "3.0 s – 7.5 s — title": (3.0, 7.5, "title", ""),
    "3 seconds - 7.5 seconds: title": (3.0, 7.5, "title", ""),
    "From 3.0 to 7.5 seconds: title": (3.0, 7.5, "title", ""),
    "from 0:03 until 0:07, title": (3.0, 7.0, "title", ""),
    "[00:03 - 00:07] title": (3.0, 7.0, "title", ""),
    "[0:03] - [0:07] title": (3.0, 7.0, "title", ""),
    "(0:03 - 0:07) title": (3.0, 7.0, "title", ""),
    "【00:03 - 00:07】标题": (3.0, 7.0, "标题", ""),
    "<3.0 seconds> - <7.5 seconds> title": (3.0, 7.5, "title", ""),
    "[3.0, 7.5] title": (3.0, 7.5, "title", ""),
    "[0:03, 0:07]: title": (3.0, 7.0, "title", ""),
    "1:02:03.250 - 1:02:05 title": (3723.25, 3725.0, "title", ""),
    "00:00:03,000 --> 00:00:07,500 title": (3.0, 7.5, "title", ""),
    "3,0 – 7,5: Titel": (3.0, 7.5, "Titel", ""),
    "3.0秒 - 7.5秒：标题": (3.0, 7.5, "标题", ""),
    "从3秒到7.5秒，红色圆圈": (3.0, 7.5, "红色圆圈", ""),
    "1分3秒至1分7秒：标题": (63.0, 67.0, "标题", ""),
    "1 min 3 s to 1 min 7 s - title": (63.0, 67.0, "title", ""),
    "- 0:03 - 0:07: title": (3.0, 7.0, "title", ""),
    "* 0:03–0:07 title": (3.0, 7.0, "title", ""),
    "1. 00:03-00:07 Title": (3.0, 7.0, "Title", ""),
    "2) 3.0 - 7.5: t": (3.0, 7.5, "t", ""),
    "### 0:03 - 0:07 Title": (3.0, 7.0, "Title", ""),
    "* **[00:03 - 00:07] Title**: text here": (3.0, 7.0, "Title", "text here"),
    "**0:03 - 0:07**: Title | text": (3.0, 7.0, "Title", "text"),
    "**3.0s – 7.5s: Title** – text": (3.0, 7.5, "Title", "text"),
    "0:03 - 0:07: **Title** — text": (3.0, 7.0, "Title", "text"),
    "`3.0 - 7.5`: title": (3.0, 7.5, "title", ""),
    "- Title (0:03 - 0:07)": (3.0, 7.0, "Title", ""),
    "- **Title** (0:03-0:07): more": (3.0, 7.0, "Title", "more"),
    "1. Title: 0:03 - 0:07.": (3.0, 7.0, "Title", ""),
    "| 0:03 - 0:07 | Title | text |": (3.0, 7.0, "Title", "text"),
    "| 0:03 | 0:07 | Title | text |": (3.0, 7.0, "Title", "text"),
    "| 1 | 0:03 | 0:07 | Title |": (3.0, 7.0, "Title", ""),
    "| 1 | 0:03-0:07 | Title |": (3.0, 7.0, "Title", ""),
    "0:03 title": (3.0, None, "title", ""),
    "[3.0] title": (3.0, None, "title", ""),
    "**0:03**: Title": (3.0, None, "Title", ""),
    "12 s: x": (12.0, None, "x", ""),
    "7.5 - 3.0: backward": (7.5, 3.0, "backward", ""),
}


@pytest.mark.parametrize("line", SPELLINGS)
def test_spellings(line: str) -> None:
    parsed = parse_summary(line)
    assert (parsed.text, parsed.lines) == ("", (TimedLine(*SPELLINGS[line]),))


@pytest.mark.parametrize(
    "line",
    [
        "3 red circles appear",
        "3-7x nothing",
        "The ball bounces at 0:03 and rests.",
        "A man walks in (0:03 - 0:07) and sits.",
        "10:00 AM is the time on the clock",
        "30 seconds later he falls",
        "In 1:30 minutes he runs 100 - 200 m",
        "2024-11-22 stands on the wall",
        "5 % of them",
    ],
)
def test_prose_stays_prose(line: str) -> None:
    parsed = parse_summary(line)
    assert (parsed.text, parsed.lines) == (line, ())


def test_prose_headings_and_lines() -> None:
    answer = """## Summary
The clip shows **two** cats.

They fight: one wins.

**Chapters:**
1. 0:00 - 0:05: Cats
   They sit.
   And wait.
2. 0:05 - 0:09: Fight

All in all, a fine day."""
    parsed = parse_summary(answer)
    assert parsed.text == "The clip shows two cats.\n\nThey fight: one wins.\n\nAll in all, a fine day."
    assert parsed.lines == (TimedLine(0, 5, "Cats", "They sit. And wait."), TimedLine(5, 9, "Fight"))


def test_a_labelled_summary_and_a_list_for_a_video_site() -> None:
    parsed = parse_summary("**Summary:** A man cooks.\n\n**Chapters:**\n- 0:00 Intro\n- 0:10 Cooking\n")
    assert parsed.text == "A man cooks."
    assert parsed.lines == (TimedLine(0, None, "Intro"), TimedLine(10, None, "Cooking"))


def test_bullets_stay_bullets() -> None:
    parsed = parse_summary("- a man\n- a dog\n\n0.0 - 2.0: both run")
    assert (parsed.text, len(parsed.lines)) == ("- a man\n- a dog", 1)


def test_subtitles_and_a_table() -> None:
    subtitles = (
        "1\n00:00:03,000 --> 00:00:07,500\nThe man walks\n\n2\n00:00:08,000 --> 00:00:09,500\nHe sits\n"
    )
    expected = (TimedLine(3, 7.5, "The man walks"), TimedLine(8, 9.5, "He sits"))
    assert parse_summary(subtitles).lines == expected
    table = "| # | Time | Title |\n|---|:-:|---|\n| 1 | 3 s - 7.5 s | The man walks |\n| 2 | 8 s - 9.5 s | He sits |"
    assert parse_summary(table) == parse_summary(
        "\n".join(f"{line.start_s} - {line.end_s}: {line.title}" for line in expected)
    )


@pytest.mark.parametrize(
    "value",
    [
        {
            "summary": "It rains.",
            "chapters": [{"start": 0, "end": 5.5, "title": "cat", "description": "sits"}],
        },
        {
            "text": "It rains.",
            "events": [{"start_time": "0:00", "end_time": "0:05.5", "event": "cat", "text": "sits"}],
        },
        {"overview": "It rains.", "timeline": [{"time": "0:00 - 0:05.5", "title": "cat", "details": "sits"}]},
        {"summary": "It rains.", "chapters": [{"timestamp": [0, 5.5], "title": "cat", "summary": "sits"}]},
        {"summary": "It rains.", "spans": [[0, 5.5, "cat", "sits"]]},
    ],
)
def test_json(value: dict[str, object]) -> None:
    for answer in (
        json.dumps(value),
        f"```json\n{json.dumps(value, indent=2)}\n```",
        f"# Answer\n{json.dumps(value)}\n",
    ):
        parsed = parse_summary(answer)
        assert (parsed.text, parsed.lines) == ("It rains.", (TimedLine(0, 5.5, "cat", "sits"),))


def test_json_without_times_or_titles_is_no_answer() -> None:
    assert parse_summary("[[0, 5.5]]").lines == ()
    assert parse_summary('{"a": 3}\n0:03 - 0:05 x').lines == (TimedLine(3, 5, "x"),)
    assert parse_summary('[{"start": -1, "end": 3, "title": "x"}]').lines == ()


def test_a_long_line_keeps_its_words() -> None:
    words = "very long words " * 10
    (line,) = parse_summary(f"0.0 - 2.0: {words}").lines
    assert len(line.title) <= MAX_TITLE
    assert line.title.endswith("long…")
    assert line.text == words.strip()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7.5", 7.5), ("7,5 s", 7.5), ("1:15", 75), ("1:02:03.250", 3723.25), ("1 min 30 s", 90), ("1分30秒", 90),
        ("2小时", 7200), ("90 sec", 90), ("soon", None), ("", None), ("1:2:3:4", None), ("-3", None),
    ],
)  # fmt: skip
def test_read_time(text: str, seconds: float | None) -> None:
    assert read_time(text) == seconds


def test_settle() -> None:
    lines = (
        TimedLine(12, None, "last"),
        TimedLine(7.5, 3.0, "backward"),
        TimedLine(5, 5, "a moment"),
        TimedLine(7.5, 3.0, "backward"),
        TimedLine(18, 25, "over the end"),
        TimedLine(20, 25, "outside"),
    )
    events, outside = settle(lines, 0, 20)
    assert outside == 1
    assert events == [
        Event(3.0, 7.5, "backward"),
        Event(5, 12, "a moment"),
        Event(12, 18, "last"),
        Event(18, 20, "over the end"),
    ]
    assert settle((TimedLine(0, 3, "before"), TimedLine(3, 9, "in")), 4, 8) == ([Event(4, 8, "in")], 1)
    assert settle((), 0, 8) == ([], 0)


WORDS = st.text(st.characters(categories=("Ll", "Lu"), include_characters=" "), min_size=1, max_size=40).map(
    str.strip
)
TENTHS = st.integers(0, 36_000).map(lambda tenths: tenths / 10)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TENTHS, TENTHS, WORDS.filter(bool)), max_size=6))
def test_own_lines_read_back(entries: list[tuple[float, float, str]]) -> None:
    events = [Event(min(a, b), max(a, b), " ".join(title.split())) for a, b, title in entries]
    lines = parse_summary("\n".join(event.line for event in events)).lines
    assert lines == tuple(TimedLine(event.start_s, event.end_s, event.title) for event in events)


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from('0123456789:.,-–[]()|*#\n {}"sam秒to从x'), max_size=80))
def test_no_answer_breaks_it(answer: str) -> None:
    events, _ = settle(parse_summary(answer).lines, 0, 100)
    assert all(0 <= event.start_s < event.end_s <= 100 and event.title for event in events)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", ["1:", "[", "3 s ", "**", "0:03 - ", "| ", "a - ", "(0:0"])
def test_long_nonsense_ends(piece: str) -> None:
    """A model that repeats itself must not hang the reader."""
    assert len(parse_summary(piece * 1000).lines) <= 1


@pytest.mark.timeout(10)
@pytest.mark.parametrize("run", [" " * 4000, "\t \t" * 1000, "-" * 4000, ":" * 4000, "–" * 4000])
def test_a_model_that_does_not_stop_is_read_all_the_same(run: str) -> None:
    """Patterns that may divide a run of one character in every way would take minutes."""
    found = parse_summary(f"A day at the sea.{run}\n\n- 0:03 - 0:07{run}A ball{run}rolls\n- 0:09{run}")
    assert found.lines[0].start_s == 3
    assert found.text.startswith("A day at the sea.")
