"""Scores: which tokens decide a span, and what becomes of their probabilities."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyecli.engine.grammar import ScoredToken
from keyecli.errors import ModelError
from keyecli.tasks.scores import (
    DEFAULT_CALIBRATION,
    Calibration,
    SpanCertainty,
    calibration_for,
    log_odds,
    sigmoid,
    span_certainties,
)

PLAIN = Calibration("by hand", bias=0.0, there=1.0, start=1.0, end=1.0, presence_bias=0.0, presence=1.0)


def tokens(*parts: tuple[str, float]) -> list[ScoredToken]:
    return [ScoredToken(text, math.log(probability)) for text, probability in parts]


def odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_which_tokens_decide_what() -> None:
    written = tokens(
        ("[[", 0.9), ("1", 0.5), ("2.", 0.8), ("0", 1.0), (",", 1.0), (" ", 1.0), ("15", 0.6), (".5", 0.9), ("],", 0.7),
        (" [", 0.9), ("20.0", 0.2), (", ", 0.8), ("21.0", 0.3), ("]]", 0.6),
    )  # fmt: skip
    first, second = span_certainties(written, log_odds_present=2.5)
    assert first.there == 2.5
    assert first.start == pytest.approx(odds(0.5 * 0.8))
    assert first.end == pytest.approx(odds(0.6 * 0.9))
    assert second.there == pytest.approx(odds(0.7 * 0.9))
    assert (second.start, second.end) == (pytest.approx(odds(0.2)), pytest.approx(odds(0.3)))


def test_a_token_across_a_number_s_edge_counts_for_the_number() -> None:
    written = tokens(("[[1.0, ", 0.5), ("2.0], [3", 0.25), (".0", 0.5), (", 4.0]]", 0.9))
    first, second = span_certainties(written, math.inf)
    assert first.there == 9.0
    assert (first.start, first.end) == (pytest.approx(odds(0.5)), pytest.approx(odds(0.25)))
    assert second.there == 9.0  # nothing but numbers' tokens lies between
    assert second.start == pytest.approx(odds(0.25 * 0.5))


def test_an_empty_list_has_no_spans() -> None:
    assert span_certainties(tokens(("[]", 0.9)), -3.0) == []


def test_certainty_is_bounded() -> None:
    assert log_odds(0.0) == 9.0
    assert log_odds(-1e-12) == 9.0
    assert log_odds(-100.0) == -9.0
    assert sigmoid(-800.0) == 0.0
    assert sigmoid(800.0) == 1.0


def test_a_score_grows_with_every_certainty() -> None:
    middle = SpanCertainty(1.0, 2.0, 3.0)
    assert PLAIN.score(middle) == pytest.approx(sigmoid(6.0))
    for better in (SpanCertainty(2.0, 2.0, 3.0), SpanCertainty(1.0, 3.0, 3.0), SpanCertainty(1.0, 2.0, 4.0)):
        assert DEFAULT_CALIBRATION.score(better) >= DEFAULT_CALIBRATION.score(middle)
    assert DEFAULT_CALIBRATION.presence_of(2.0) > DEFAULT_CALIBRATION.presence_of(1.0)
    assert PLAIN.presence_of(math.inf) == pytest.approx(sigmoid(9.0))


def model(folder: Path) -> Any:
    return SimpleNamespace(folder=folder)


def test_a_model_s_own_calibration_wins(tmp_path: Path) -> None:
    assert calibration_for(model(tmp_path)) is DEFAULT_CALIBRATION
    (tmp_path / "keye_calibration.json").write_text(json.dumps({"ground": asdict(PLAIN)}))
    assert calibration_for(model(tmp_path)) == PLAIN


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"ground": 1}',
        '{"ground": {"bias": 1}}',
        json.dumps({"ground": {**asdict(PLAIN), "end": "x"}}),
    ],
)
def test_a_calibration_that_cannot_be_used_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "keye_calibration.json").write_text(content)
    with pytest.raises(ModelError, match=r"keye_calibration\.json"):
        calibration_for(model(tmp_path))
