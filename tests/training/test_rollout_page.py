"""The page of a run: its curves are where the figures say, its texts are never markup, and nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from keyecli.errors import InputError
from keyecli.export.text import one_line
from keyecli.training.metrics import SCHEMA as METRICS_SCHEMA
from keyecli.training.plot import smoothed
from keyecli.training.rollout_page import (
    BOTTOM,
    COLOURS,
    CURVES,
    FAMILIES,
    LEFT,
    MOST_POINTS,
    REWARD,
    RIGHT,
    SCHEMA,
    TOP,
    pictures,
    read_rollouts,
    write_page,
)
from tests.export.test_report import HOSTILE, Page, read

Row = dict[str, Any]


def step(number: int, **figures: Any) -> Row:
    return {"schema": METRICS_SCHEMA, "kind": "step", "step": number, **figures}


def evaluated(number: int, reward: float, **families: float) -> Row:
    return {
        "schema": METRICS_SCHEMA,
        "kind": "eval",
        "step": number,
        "reward": reward,
        "families": families,
    }


def whole_step(number: int) -> Row:
    """A step with every figure."""
    fields = [field for curve in (REWARD, *CURVES) for field in curve.fields.values()]
    return step(number, **dict.fromkeys(fields, number / 10), families={"ground": 0.2, "count": 0.9})


def attempt(score: float | None, answer: str | None = "from 1 to 3 s", **changes: Any) -> Row:
    return {
        "text": f"<think>I look.</think>\n<answer>{answer}</answer>",
        "reasoning": "I look.",
        "answer": answer,
        "score": score,
        "parts": {"iou": score},
        "advantage": None if score is None else score - 0.5,
        "tokens": 25,
        "ended": "stop",
        "versions": [[3, 25]],
        **changes,
    }


def group(number: int, *rollouts: Row, **changes: Any) -> Row:
    return {
        "schema": SCHEMA,
        "step": number,
        "source": f"data.jsonl:{number}",
        "family": "ground",
        "question": f"When does it rain, {number}?",
        "truth": "[[1.0, 3.0]]",
        "videos": ["clips/0001.mp4"],
        "mean": 0.5,
        "kept": True,
        "rollouts": list(rollouts) or [attempt(0.7)],
        **changes,
    }


def lines_of(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def made(folder: Path, metrics: list[Row], rollouts: list[Row], title: str = "a run", **how: Any) -> str:
    (folder / "metrics.jsonl").write_text(lines_of(metrics))
    (folder / "rollouts.jsonl").write_text(lines_of(rollouts))
    return rewritten(folder, title, **how)


def rewritten(folder: Path, title: str = "a run", **how: Any) -> str:
    """The page of the files that lie there."""
    write_page(folder / "metrics.jsonl", folder / "rollouts.jsonl", folder / "page.html", title, **how)
    return (folder / "page.html").read_text(encoding="utf-8")


def words(page: Page) -> list[str]:
    return [text for _, text in page.texts]


def scores(page: Page) -> list[str]:
    """Colours of tries in the order of the page, without those of groups."""
    tags = page.tags[[tag for tag, _ in page.tags].index("ol") :]
    return [attributes.get("style") or "none" for _, attributes in tags if attributes.get("class") == "score"]


def points(polyline: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in polyline.split())]


def test_what_the_page_says_of_the_run(tmp_path: Path) -> None:
    metrics = [evaluated(0, 0.25), *map(whole_step, range(1, 8)), evaluated(7, 0.625, ground=0.5)]
    page = read(made(tmp_path, metrics, [], "keye-nano,\n gspo"))
    assert page.text_of("h1") == ["keye-nano, gspo"]
    assert page.text_of("title")[0] == "keye-nano, gspo"
    assert page.text_of("h3") == [curve.heading for curve in (REWARD, FAMILIES, *CURVES)]
    cells = dict(zip(page.text_of("th"), page.text_of("td"), strict=True))
    assert cells["steps"] == "7"
    assert cells["held-out reward"] == "0.250 at step 0, 0.625 at step 7"
    legend = page.text_of("li")
    assert "held-out: 0.625 at step 7" in legend
    assert "ground, held-out: 0.5 at step 7" in legend
    assert "count: 0.9 at step 7" in legend
    assert "same: 70% at step 7" in legend
    assert [attributes["role"] for attributes in page.all("svg")] == ["img"] * len(page.text_of("h3"))
    assert "step 7: 0.625" in page.text_of("title")


def test_what_the_page_says_of_a_group(tmp_path: Path) -> None:
    tries = [
        attempt(0.25, reasoning="It was dark.", text="<think>It was dark.</think>from 1 to 3 s"),
        attempt(
            None, None, text="I never st", reasoning="I never st", ended="length", versions=[[2, 20], [3, 5]]
        ),
        attempt(1.0, "from 2 to 4 s", tokens=1234, parts={"iou": 0.5, "judge": None}),
        attempt(0.5, ""),
    ]
    page = read(made(tmp_path, [], [group(3, *tries)]))
    assert scores(page) == ["--good: 100%", "--good: 50%", "--good: 25%", "none"]
    told = words(page)
    for said in (
        "step 3",
        "When does it rain, 3?",
        "[[1.0, 3.0]]",
        "clips/0001.mp4",
        "data.jsonl:3",
        "advantage +0.50",
        "iou 0.500",
        "judge no score",
        "1,234 tokens",
        "weights 2 and 3",
        "cut off at the limit",
        "no answer",
        "an empty answer",
    ):
        assert said in told
    assert told.index("from 2 to 4 s") < told.index("from 1 to 3 s") < told.index("I never st")
    assert "dropped: it taught nothing" not in told
    # Reasoning is folded, but for that of the try without an answer, where all that was written is.
    assert page.text_of("summary") == ["reasoning"] * 3 + ["all that it wrote"]
    assert ["open" in attributes for attributes in page.all("details")] == [True] + [False] * 4


def test_what_stands_beside_the_answer_can_be_unfolded(tmp_path: Path) -> None:
    beside = "<think>I look.</think>Trust me.<answer>from 1 to 3 s</answer>"
    page = read(made(tmp_path, [], [group(1, attempt(1.0), attempt(0.0, text=beside))]))
    assert page.text_of("summary") == ["reasoning", "reasoning", "all that it wrote"]
    assert beside in words(page)


def test_dropped_groups_are_marked(tmp_path: Path) -> None:
    page = read(made(tmp_path, [], [group(1), group(2, kept=False, mean=None), group(3)]))
    told = words(page)
    assert told.count("dropped: it taught nothing") == 1
    assert told.index("step 2") < told.index("dropped: it taught nothing") < told.index("step 1")
    assert "no score" in told


def test_the_newest_groups_come_first_and_no_more_than_asked_for(tmp_path: Path) -> None:
    rollouts = [group(number) for number in range(1, 11)]
    page = read(made(tmp_path, [], rollouts, most=3))
    assert [text for text in page.text_of("span") if text.startswith("step")] == [
        "step 10",
        "step 9",
        "step 8",
    ]
    assert any(text.startswith("The newest 3 of 10 groups") for text in page.text_of("p"))
    assert len(read(made(tmp_path, [], rollouts)).all("ol")) == 10
    # Those of one step stay in their order.
    made(tmp_path, [], [group(1), group(2, source="a"), group(2, source="b"), group(3)])
    assert [one["source"] for one in read_rollouts(tmp_path / "rollouts.jsonl", 3)[0]] == [
        "data.jsonl:3",
        "a",
        "b",
    ]
    assert len(read(made(tmp_path, [], rollouts * 7)).all("ol")) == 60


@pytest.mark.parametrize("hostile", [text for text in HOSTILE if text.strip()])
def test_texts_are_never_markup(tmp_path: Path, hostile: str) -> None:
    def page(text: str) -> str:
        one = attempt(0.5, text, text=f"{text} beside {text}", reasoning=text, parts={text: 0.5})
        said = dict.fromkeys(("source", "family", "question", "truth"), text)
        families = {"families": {text: 0.5}, "reward": 0.5}
        metrics = [step(1, **families), {**evaluated(1, 0.5), **families}]
        return made(
            tmp_path, metrics, [group(1, one, attempt(None, None, text=text), videos=[text], **said)], text
        )

    def shape(text: str) -> list[tuple[str, list[str]]]:
        return [(tag, list(attributes)) for tag, attributes in read(page(text)).tags]

    assert shape(hostile) == shape("harmless")
    (shown, *_) = read(page(hostile)).text_of("dd")
    assert one_line(shown) == one_line(hostile)


def test_nothing_is_loaded_or_run(tmp_path: Path) -> None:
    html = made(tmp_path, [whole_step(1), evaluated(1, 0.5)], [group(1, attempt(1.0), attempt(None, None))])
    page = read(html)
    names = {name for _, attributes in page.tags for name in attributes}
    assert not {"src", "href", "srcset", "xlink:href", "action", "data"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not {"script", "link", "img", "iframe", "object", "use", "a"} & {tag for tag, _ in page.tags}
    (style,) = re.findall("<style>(.*?)</style>", html, re.DOTALL)
    assert not re.search(r"url\(|@import|//", style)
    assert "prefers-color-scheme: dark" in style
    policy = [attributes["content"] for attributes in page.all("meta") if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert html.startswith("<!DOCTYPE html>\n")


def test_characters_that_no_file_can_hold(tmp_path: Path) -> None:
    page = read(made(tmp_path, [], [group(1, attempt(1.0, "a\ud800b\x00c\r\nd"))]))
    assert "a\ufffdbc\nd" in words(page)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = read(made(tmp_path, [], []))
    assert "There are no figures yet." in page.text_of("p")
    assert "There are no groups to show." in page.text_of("p")
    assert page.all("svg") == page.all("details") == page.all("table") == []
    assert len(read(made(tmp_path, [], [group(1)], most=0)).all("details")) == 0


def test_a_series_without_figures_is_left_out() -> None:
    rows = [step(number, reward=0.5, divergence=None, entropy=math.nan, families={}) for number in (1, 2)]
    assert [picture["heading"] for picture in pictures(rows)] == ["Reward"]
    assert [entry["text"] for entry in pictures(rows)[0]["legend"]] == ["training: 0.5 at step 2"]
    only_held_out = pictures([evaluated(4, 0.5)])
    assert [entry["text"] for entry in only_held_out[0]["legend"]] == ["held-out: 0.5 at step 4"]
    times = pictures([step(1, train_s=3), step(2, train_s=4, generate_s=None)])
    assert [(picture["heading"], len(picture["lines"])) for picture in times] == [("Time", 1)]
    assert pictures([{"kind": "sample", "step": 1, "reward": 1.0}]) == []


def test_lines_stand_where_the_figures_say() -> None:
    values = [0.0, 0.8, 0.4, 1.0, 0.2]
    rows = [step(10 * number, reward=value) for number, value in enumerate(values)]
    training, held_out = pictures([*rows, evaluated(20, 0.5)])[0]["lines"]
    drawn = points(training["thin"])
    assert [x for x, _ in drawn] == pytest.approx(
        [LEFT + (RIGHT - LEFT) * part / 4 for part in range(5)], abs=0.06
    )
    assert drawn[0][1] == BOTTOM
    assert min(y for _, y in drawn) > TOP
    top = drawn[3][1]
    assert [y for _, y in drawn] == pytest.approx(
        [BOTTOM + (top - BOTTOM) * value for value in values], abs=0.11
    )
    line = smoothed([(10.0 * number, value) for number, value in enumerate(values)])
    assert [y for _, y in points(training["strong"])] == pytest.approx(
        [BOTTOM + (top - BOTTOM) * value for _, value in line], abs=0.11
    )
    ((x, y, text),) = held_out["dots"]
    assert (x, y) == pytest.approx(((LEFT + RIGHT) / 2, (BOTTOM + top) / 2), abs=0.11)
    assert text == "step 20: 0.5"
    assert held_out["strong"] == ""


def test_pictures_share_their_steps() -> None:
    rows = [step(1, reward=0.1), step(50, reward=0.2), step(50, entropy=1.0), evaluated(100, 0.3)]
    reward, entropy = pictures(rows)
    assert reward["steps"] == entropy["steps"]
    assert entropy["lines"][0]["dots"][0][0] == pytest.approx((LEFT + RIGHT) / 2, abs=2)


def test_long_lines_are_thinned_and_keep_their_spikes() -> None:
    values = [1.0] * 5000
    values[3217] = 40.0
    (picture,) = pictures([step(number, norm=value) for number, value in enumerate(values)])
    drawn = points(picture["lines"][0]["thin"])
    assert len(drawn) <= MOST_POINTS
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    spike = min(drawn, key=lambda point: point[1])
    assert spike[0] == pytest.approx(LEFT + (RIGHT - LEFT) * 3217 / 4999, abs=0.1)
    assert (drawn[0][0], drawn[-1][0]) == pytest.approx((LEFT, RIGHT), abs=1)


@pytest.mark.parametrize(
    "values",
    [[0.0], [0.0, 0.0], [1.0, 1.0], [-3.0, 2.0], [0.98, 1.0], [5e-9, 4e-9], [1e300, 0.0], [0.5, 0.5 + 1e-16]],
)
@pytest.mark.parametrize("field", ["norm", "agreement"])
def test_any_range_has_labels_inside_its_picture(values: list[float], field: str) -> None:
    (picture,) = pictures([step(number, **{field: value}) for number, value in enumerate(values)])
    assert len(picture["values"]) >= 2
    places = [y for y, _ in picture["values"]] + [y for _, y in points(picture["lines"][0]["thin"])]
    assert all(TOP <= y <= BOTTOM for y in places)
    if field == "agreement" and max(values) <= 1:
        assert all(float(label.rstrip("%")) <= 100 for _, label in picture["values"])


def test_more_families_than_colours() -> None:
    rewards = {f"family {number}": number / 10 for number in range(COLOURS + 2)}
    rewards[""] = 0.5
    (picture,) = pictures([step(number, families=rewards) for number in (1, 2)])
    assert picture["heading"] == "Reward by family"
    assert len(picture["lines"]) == COLOURS + 3
    assert {line["colour"] for line in picture["lines"]} == set(range(COLOURS))
    assert picture["legend"][0]["text"] == "no family: 0.5 at step 2"


def test_a_line_that_was_never_finished_is_passed_over(tmp_path: Path) -> None:
    made(tmp_path, [step(1, reward=0.5)], [group(1), group(2)])
    whole = rewritten(tmp_path)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"\0\0\0\n" + lines_of([group(9)])[:-1].encode())
    assert rewritten(tmp_path) == whole


def test_the_page_is_replaced_and_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    first = made(tmp_path, [step(1, reward=0.5)], [group(1)])
    assert rewritten(tmp_path) == first
    assert made(tmp_path, [step(1, reward=0.5)], [group(2)]) != first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "page.html",
        "rollouts.jsonl",
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"milk\n",
        b"[]\n",
        b'"keye"\n',
        b'{"schema": "keye.rl.rollouts/2"}\n',
        b'{"schema": "\xff"}\n',
        lines_of([{"schema": SCHEMA}]).encode(),
        lines_of([group(2, question=None)]).encode(),
        lines_of([group(2, {**attempt(0.5), "score": "high"})]).encode(),
        lines_of([group(2, rollouts=[{}])]).encode(),
        lines_of([group(2, step="last")]).encode(),
    ],
)
def test_lines_of_another_kind(tmp_path: Path, line: bytes) -> None:
    page = made(tmp_path, [], [group(1)])
    with (tmp_path / "rollouts.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(
        InputError, match=r"^line 2 of .*rollouts\.jsonl is none of keye\.rl\.rollouts/1; give a"
    ):
        rewritten(tmp_path)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    made(tmp_path, [], [])
    for place in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match=r"^cannot read .*; give a rollouts\.jsonl$"):
            read_rollouts(place, 60)
        with pytest.raises(InputError, match=r"^cannot read .*; give a metrics\.jsonl$"):
            write_page(place, tmp_path / "rollouts.jsonl", tmp_path / "page.html", "a run")
