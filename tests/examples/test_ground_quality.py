"""The scripts that measure and calibrate grounding: their figures by hand, and a small run of each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import keyecli
from keyecli.forge import Draws, SceneOptions, sample_scene
from keyecli.tasks.ground import Span
from keyecli.tasks.scores import SpanCertainty

SHORT = SceneOptions(2.0, 3.0, size=(320, 240), rate=12)


@pytest.fixture(scope="module")
def keye() -> keyecli.Keye:
    return keyecli.load(device="cpu")


@pytest.mark.parametrize("seed", range(5))
def test_absent_queries_ask_for_what_is_not_there(seed: int) -> None:
    import ground_quality

    scene = sample_scene(seed)
    queries = ground_quality.absent_queries(scene, Draws(1), 4)
    assert len(queries) == 4
    for query in queries:
        assert query.spans == ()
        assert not any(track.name in query.text for track in scene.tracks)


def test_edge_errors_by_hand() -> None:
    import ground_quality

    errors = ground_quality.edge_errors_s
    assert errors([(1.0, 4.5)], [(1.5, 4.0)], 10.0) == pytest.approx([0.5, 0.5])
    # The clip's own ends are no boundaries, and what was missed has none.
    assert errors([(0.2, 4.0), (8.0, 9.9)], [(0.0, 4.5), (8.2, 10.0)], 10.0) == pytest.approx([0.5, 0.2])
    assert errors([(7.0, 9.0)], [(1.0, 4.0)], 10.0) == []
    assert errors([], [(1.0, 4.0)], 10.0) == []


def test_a_result_sorts_its_queries() -> None:
    import ground_quality

    result = ground_quality.Result()
    for truth, found in (
        (((1.0, 3.0),), [Span(1.0, 2.0)]),
        (((8.0, 10.0),), [Span(8.0, 10.083)]),
        (((1.0, 3.0), (5.0, 6.0)), [Span(1.0, 3.0)]),
        ((), []),
        ((), [Span(1.0, 2.0)]),
    ):
        result.add(ground_quality.Query("x", truth), found, 10.0)
    assert result.one == pytest.approx([0.5, 1.0])
    assert result.several == pytest.approx([2 / 3])
    assert result.absent == [1.0, 0.0]
    result.clips = 2
    assert ground_quality.row("a", result).startswith("| a | 0.750 (2) | 0.667 (1) | 0.500 (2) | 0.2")


def test_a_logistic_fit_finds_the_weights_that_made_the_data() -> None:
    import calibrate

    generator = np.random.default_rng(0)
    features = generator.normal(size=(20_000, 2))
    chance = 1 / (1 + np.exp(-(0.5 + 2 * features[:, 0] - features[:, 1])))
    weights = calibrate.fit_logistic(features, (generator.random(len(chance)) < chance).astype(float))
    assert weights == pytest.approx([0.5, 2.0, -1.0], abs=0.1)


def test_a_fit_prefers_what_is_right() -> None:
    import calibrate

    sure, unsure = SpanCertainty(6.0, 6.0, 6.0), SpanCertainty(-1.0, 0.0, 0.0)
    found = [
        *[calibrate.Sample(True, 6.0, ((sure, True),))] * 20,
        *[calibrate.Sample(False, -5.0, ())] * 20,
        *[calibrate.Sample(False, 0.5, ((unsure, False),))] * 10,
    ]
    fitted = calibrate.fit(found, "by hand")
    assert fitted.score(sure) > 0.9 > 0.2 > fitted.score(unsure)
    assert fitted.presence_of(6.0) > 0.9 > 0.1 > fitted.presence_of(-5.0)


def test_a_reliability_table_by_hand() -> None:
    import calibrate

    lines = calibrate.reliability("score", [0.95, 0.97, 1.0, 0.2], [True, False, True, False]).splitlines()
    assert lines[2:] == [
        "| 0 to 0.5 | 1 | 0.200 | 0.000 |",
        "| 0.95 to 0.99 | 2 | 0.960 | 0.500 |",
        "| 0.99 to 1 | 1 | 1.000 | 1.000 |",
        "",
        "expected calibration error 0.280, Brier score 0.246",
    ]


def test_a_small_run(keye: keyecli.Keye, tmp_path: Path) -> None:
    import calibrate
    import ground_quality

    clips = list(ground_quality.forge_clips(tmp_path, 1, 5, queries=2, absent=1, options=SHORT))
    (clip,) = clips
    assert [bool(query.spans) for query in clip.queries] == [True, True, False]
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [query.text for query in clip.queries[:2]] == [row["question"] for row in rows]
    result = ground_quality.measure(keye, clips, ground_quality.Condition("x"))
    assert (len(result.one) + len(result.several), len(result.absent), result.clips) == (2, 1, 1)
    # Asked through other calls, the answers are the same.
    found: Any = [keye.ground(clip.path, query.text) for query in clip.queries]
    asked = list(calibrate.samples(keye, clip, 2.0))
    assert [len(sample.spans) for sample in asked] == [len(grounding) for grounding in found]
    assert [sample.present for sample in asked] == [True, True, False]


def test_nano_s_questions_are_its_own(tmp_path: Path) -> None:
    """What the recipe writes for `keye ground` are questions that the forge asks."""
    import recipe

    from keyecli.tasks.prompts import ground_question, prompt_for

    recipe.write_json(tmp_path / "keye_prompts.json", recipe.PROMPTS)
    files: Any = SimpleNamespace(folder=tmp_path)
    asked = set(recipe.forged_text(range(300)))
    for query in (
        "the red circle",
        "a blue ring",
        "number 3",
        "red circle moves left",
        "the green star spins",
    ):
        question = ground_question(query, files)
        assert question in asked or any(
            question.split()[:4] == text.split()[:4] and question.split()[-1] == text.split()[-1]
            for text in asked
        ), question
    assert prompt_for("summarize", files) in asked
