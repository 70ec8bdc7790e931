"""The HTML page: everything inside the file, nothing of what a model or a file name says comes through as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from keyecli.export.markdown import ClipSummary
from keyecli.export.report import render_report
from keyecli.export.timeline import Segment
from keyecli.video.source import VideoInfo, probe
from tests.export.conftest import TITLES
from tests.video.conftest import write_clip

HOSTILE = [
    *TITLES,
    "<script>alert(1)</script>",
    "</title></style><script src=https://example.com/x.js></script>",
    '" onerror="alert(1)',
    "<img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:alert(1)",
    "]]><!-- --> &amp; &lt;",
]
VOID = {"meta", "img", "link", "br", "hr", "input"}


@dataclass
class Page(HTMLParser):
    """What a browser would read: tags with their attributes, the text of each element, whether all were closed."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def read(page: str) -> Page:
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    return parsed


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> VideoInfo:
    return probe(write_clip(tmp_path_factory.mktemp("clips") / "my <b>clip.mp4", 100))


def no_pictures(info: VideoInfo, times_s: Sequence[float], width: int) -> list[str]:
    return [f"data:image/jpeg;base64,{'A' * 8}" for _ in times_s]


def summary_of(
    info: VideoInfo, titles: list[str] | None = None, text: str = "It rains.\n\nThen the sun shines."
) -> ClipSummary:
    titles = titles or ["Rain", "Sun"]
    step = float(info.duration_s) / len(titles)
    chapters = [Segment(place * step, (place + 1) * step, title, title) for place, title in enumerate(titles)]
    events = [Segment(0.1, 3.5, title, title) for title in reversed(titles)]
    return ClipSummary(info, text, chapters, events, "Written by keye-nano")


def test_what_the_page_says(info: VideoInfo) -> None:
    asked: list[float] = []

    def pictures(info: VideoInfo, times_s: Sequence[float], width: int) -> list[str]:
        asked.extend(times_s)
        return no_pictures(info, times_s, width)

    page = read(render_report([summary_of(info)], thumbnails=pictures))
    assert page.text_of("title") == page.text_of("h1") == ["my <b>clip.mp4"]
    assert page.text_of("h2") == ["Chapters", "Events"]
    assert page.text_of("h3") == ["Rain", "Sun"]
    assert [text for text in page.text_of("p") if "–" in text] == [
        "0:00:00.000 – 0:00:02.000",
        "0:00:02.000 – 0:00:04.000",
    ]
    assert page.text_of("p")[1:3] == ["It rains.", "Then the sun shines."]
    assert page.text_of("td") == [
        "0:00:00.100 – 0:00:03.500",
        "Sun\nSun",
        "0:00:00.100 – 0:00:03.500",
        "Rain\nRain",
    ]
    assert asked == [1.0, 3.0]
    # The band above the chapters shows how long they are.
    assert [(bar["x"], bar["width"]) for bar in page.all("rect")] == [("0.0", "500.0"), ("500.0", "500.0")]


def test_nothing_outside_of_the_file(info: VideoInfo) -> None:
    page = render_report([summary_of(info, HOSTILE, text="\n\n".join(HOSTILE))] * 2, thumbnails=no_pictures)
    parsed = read(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
        "source",
        "b",
        "i",
    }
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert {"style", "srcset", "action", "data", "background"}.isdisjoint(attributes)
        for name in ("src", "href", "xlink:href"):
            if name in attributes:
                assert re.match(r"data:image/|#clip-\d", attributes[name] or ""), (tag, attributes)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policy = next(tag for tag in parsed.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_words_are_words(info: VideoInfo) -> None:
    parsed = read(render_report([summary_of(info, HOSTILE)], thumbnails=no_pictures))
    shown = parsed.text_of("h3")
    assert len(shown) == len(HOSTILE)
    assert "<script>alert(1)</script>" in shown
    assert "{{ 7 * 7 }} {% raw %}" in shown
    assert shown[TITLES.index("")] == f"Part {TITLES.index('') + 1}"
    assert not re.search("[\x00-\x08\x0b-\x1f]", "".join(shown))


def test_it_can_be_used_by_everyone(info: VideoInfo) -> None:
    page = render_report([summary_of(info), summary_of(info)], "Two clips", thumbnails=no_pictures)
    parsed = read(page)
    (root,) = parsed.all("html")
    assert root["lang"] == "en"
    assert len(parsed.all("main")) == len(parsed.all("h1")) == 1
    assert parsed.text_of("h1") == parsed.text_of("title") == ["Two clips"]
    headings = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in pairwise(headings))
    # Pictures repeat what the title says; every id is there once and every reference finds one.
    assert all(image["alt"] == "" for image in parsed.all("img"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in parsed.all("a")} == {"#clip-1", "#clip-2"}
    labels = {
        attributes["aria-labelledby"] for _, attributes in parsed.tags if "aria-labelledby" in attributes
    }
    assert labels <= set(ids)
    assert all(head["scope"] == "col" for head in parsed.all("th"))
    assert "prefers-color-scheme: dark" in page
    assert {"name": "color-scheme", "content": "light dark"} in parsed.all("meta")


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_letters_can_be_read_in_light_and_dark(info: VideoInfo) -> None:
    page = render_report([summary_of(info)], thumbnails=no_pictures)
    schemes = re.findall(r":root \{([^}]*)\}", page)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for name in ("ink", "faint", "accent"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, (name, colours)


def test_a_clip_without_chapters_or_words(info: VideoInfo) -> None:
    parsed = read(render_report([ClipSummary(info, "", [], [], "by x")], thumbnails=no_pictures))
    assert parsed.text_of("h2") == []
    assert not parsed.all("img")


def test_events_that_are_the_chapters_are_not_told_twice(info: VideoInfo) -> None:
    chapters = [Segment(0.0, 2.0, "Rain"), Segment(2.0, 4.0, "Sun")]
    page = read(render_report([ClipSummary(info, "", chapters, chapters, "by x")], thumbnails=no_pictures))
    assert page.text_of("h2") == ["Chapters"]


def test_pictures_of_the_clip_itself(info: VideoInfo) -> None:
    import base64
    import io

    from PIL import Image

    parsed = read(render_report([summary_of(info)]))
    for image in parsed.all("img"):
        head, _, data = (image["src"] or "").partition(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 96)


def test_the_template_is_in_the_package() -> None:
    """It must be installed with the code: a wheel holds every file of the folder."""
    import keyecli.export.report as report

    assert (Path(report.__file__).parent / "report.html.jinja").is_file()
