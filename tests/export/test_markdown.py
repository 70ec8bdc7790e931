"""The Markdown page, read back by a CommonMark parser: words stay words, structure is ours."""

from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from keyecli.export.markdown import ClipSummary, render_markdown
from keyecli.export.timeline import Segment
from keyecli.video.source import VideoInfo
from tests.export.test_report import HOSTILE, info, summary_of  # noqa: F401

HOSTILE_HERE = [
    *HOSTILE,
    "# heading",
    "1. one",
    "> quote",
    "--- rule",
    "[link](https://example.com)",
    "![image](https://example.com/x.png)",
    "*stars* and _lines_ and `code` and ~~no~~",
    "| a | b |",
    "<https://example.com>",
    "    indented",
    "- - -",
    "text\n===",
    "text\n-",
]


def parse(text: str) -> list[Token]:
    """All tokens, inline ones too, of CommonMark with tables and strikethrough."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [token for outer in tokens for token in (outer, *(outer.children or ()))]


def headings(text: str) -> list[tuple[str, str]]:
    tokens = MarkdownIt("commonmark").parse(text)
    return [
        (token.tag, "".join(child.content for child in tokens[place + 1].children or ()))
        for place, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def test_the_page(info: VideoInfo) -> None:  # noqa: F811
    chapters = [Segment(0.0, 2.0, "Rain", "0.0 - 1.5: drops\n1.0 - 2.0: a storm"), Segment(2.0, 4.0, "Sun")]
    events = [Segment(0.0, 1.5, "drops"), Segment(1.0, 2.0, "a storm", "It is loud.")]
    page = render_markdown([ClipSummary(info, "It rains.\n\n- first\n- second", chapters, events, "by x")])
    assert page == (
        "# my \\<b\\>clip.mp4\n\n"
        "It rains.\n\n"
        "- first\n- second\n\n"
        "## Chapters\n\n"
        "- **0:00:00.000 - 0:00:02.000** Rain  \n"
        "  0.0 - 1.5: drops  \n"
        "  1.0 - 2.0: a storm\n"
        "- **0:00:02.000 - 0:00:04.000** Sun\n\n"
        "## Events\n\n"
        "- **0:00:00.000 - 0:00:01.500** drops\n"
        "- **0:00:01.000 - 0:00:02.000** a storm  \n"
        "  It is loud.\n\n"
        "*0:00:04.000, 160x96. by x*\n"
    )


def test_several_clips(info: VideoInfo) -> None:  # noqa: F811
    page = render_markdown([summary_of(info), summary_of(info)])
    name = "my <b>clip.mp4"
    part = [("h2", name), ("h3", "Chapters"), ("h3", "Events")]
    assert headings(page) == [("h1", "2 videos"), *part, *part]
    assert headings(render_markdown([summary_of(info)], "Mine"))[:2] == [("h1", "Mine"), ("h2", name)]


def test_words_are_no_markup(info: VideoInfo) -> None:  # noqa: F811
    page = render_markdown([summary_of(info, HOSTILE_HERE, text="\n\n".join(HOSTILE_HERE))])
    tokens = parse(page)
    kinds = {token.type for token in tokens}
    assert not kinds & {
        "html_block", "html_inline", "link_open", "image", "code_inline", "code_block", "fence", "table_open",
        "blockquote_open", "hr", "s_open",
    }  # fmt: skip
    assert len(headings(page)) == 3
    # Bold are our times alone.
    bold = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "strong_open"]
    assert len(bold) == 2 * len(HOSTILE_HERE)
    assert all(re.fullmatch(r"\d:\d\d:\d\d\.\d{3} - \d:\d\d:\d\d\.\d{3}", times) for times in bold)


@pytest.mark.parametrize("title", [title for title in HOSTILE_HERE if title.strip()])
def test_titles_come_back(info: VideoInfo, title: str) -> None:  # noqa: F811
    page = render_markdown([ClipSummary(info, "", [Segment(0.0, 4.0, title)], [], "by x")])
    items = [token for token in MarkdownIt("commonmark").parse(page) if token.type == "inline"]
    said = "".join(child.content for child in items[2].children or ())
    from keyecli.export.text import one_line

    assert said == f"0:00:00.000 - 0:00:04.000 {one_line(title)}"
