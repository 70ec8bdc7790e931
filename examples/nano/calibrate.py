"""Fit the scores of `keye ground` on forged clips, and print how far they can be relied on.

    python examples/nano/calibrate.py --clips 60

Half of the clips, at two frames a second and at one, give the logistic maps of `keyecli.tasks.scores.Calibration`, printed
as they stand there; the other half, of another seed, the reliability table. With `--write` the maps go into a model's own
folder as keye_calibration.json, which is how another model gets scores of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from ground_quality import Clip, forge_clips

import keyecli
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.grammar import SpanConstraint, SpanRange
from keyecli.engine.shared import SharedPrefix, question_tokens
from keyecli.tasks.lookup import plan_part
from keyecli.tasks.options import ask_settings
from keyecli.tasks.scores import (
    CALIBRATION_FILE,
    Calibration,
    SpanCertainty,
    log_odds_within,
    span_certainties,
)
from keyecli.tasks.spans import parse_spans, temporal_iou
from keyecli.video.source import probe

RIGHT_IOU = 0.5
RATES = (2.0, 1.0)
ANSWER_TOKENS = 160
RIDGE = 0.1  # keeps weights small where a toy's answers are all right
BINS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Sample:
    """One answer: whether anything is there, the log odds it gave that, and its spans, each right or not."""

    present: bool
    log_odds_present: float
    spans: tuple[tuple[SpanCertainty, bool], ...]


def samples(keye: keyecli.Keye, clip: Clip, fps: float) -> Iterator[Sample]:
    """Every question about a clip, asked as `keye ground` asks it."""
    loaded, info = keye.loaded, probe(clip.path)
    plan = plan_part(info, ask_settings(keye.preprocessor, fps=fps).sampling, Fraction(0), info.duration_s)
    texts = [query.text for query in clip.queries]
    room = question_tokens(loaded, [plan], texts)
    prefix = SharedPrefix.prefill(loaded, [plan], question_room_tokens=room, answer_tokens=ANSWER_TOKENS)
    numbers = SpanRange.of_seconds(float(info.duration_s))
    for query in clip.queries:
        made: list[SpanConstraint] = []

        def constrain(
            max_tokens: int, thinking_open: bool, made: list[SpanConstraint] = made
        ) -> SpanConstraint:
            made.append(
                SpanConstraint(
                    keye.tokenizer,
                    numbers,
                    max_tokens=max_tokens,
                    answer_tokens=max_tokens // 2,
                    thinking_open=thinking_open,
                )
            )
            return made[0]

        prefix.answer(query.text, GenerationSettings(max_tokens=ANSWER_TOKENS), constraint=constrain)
        (constraint,) = made
        spans = parse_spans(constraint.text) or []
        certainties = span_certainties(constraint.tokens, constraint.log_odds_present)
        right = [any(temporal_iou([span], [true]) >= RIGHT_IOU for true in query.spans) for span in spans]
        yield Sample(
            bool(query.spans), constraint.log_odds_present, tuple(zip(certainties, right, strict=True))
        )


def fit_logistic(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights [1 + F] (the bias first) of a logistic regression on features [N, F], by Newton's method with a ridge."""
    x = np.concatenate([np.ones((len(features), 1)), features], axis=1)
    ridge = RIDGE * np.eye(x.shape[1])
    ridge[0, 0] = 0.0
    weights = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient = x.T @ (labels - p) - ridge @ weights
        step = np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + ridge, gradient)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def fit(found: Sequence[Sample], provenance: str) -> Calibration:
    spans = [span for sample in found for span in sample.spans]
    features = np.array([[c.there, c.start, c.end] for c, _ in spans])
    bias, there, start, end = fit_logistic(features, np.array([float(right) for _, right in spans]))
    odds = np.array([[log_odds_within(sample.log_odds_present)] for sample in found])
    presence_bias, presence = fit_logistic(odds, np.array([float(sample.present) for sample in found]))
    numbers = (bias, there, start, end, presence_bias, presence)
    return Calibration(provenance, *(round(float(number), 4) for number in numbers))


def reliability(title: str, predicted: Sequence[float], right: Sequence[bool]) -> str:
    """A table of bins: how sure, and how often right; below it the expected calibration error and the Brier score."""
    p, y = np.array(predicted), np.array(right, dtype=float)
    lines = [f"| {title} | how many | said, on average | was so |", "| --- | --- | --- | --- |"]
    error = 0.0
    for low, high in itertools.pairwise(BINS):
        inside = (p >= low) & ((p < high) | (high == BINS[-1]))
        if inside.any():
            error += abs(p[inside].sum() - y[inside].sum()) / len(p)
            figures = f"{inside.sum()} | {p[inside].mean():.3f} | {y[inside].mean():.3f}"
            lines.append(f"| {low:g} to {high:g} | {figures} |")
    lines.append(f"\nexpected calibration error {error:.3f}, Brier score {((p - y) ** 2).mean():.3f}")
    return "\n".join(lines)


def collect(keye: keyecli.Keye, folder: Path, clips: int, seed: int) -> list[Sample]:
    return [
        sample
        for clip in forge_clips(folder, clips, seed, queries=5, absent=3)
        for fps in RATES
        for sample in samples(keye, clip, fps)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="model folder; default: the embedded nano")
    parser.add_argument("--clips", type=int, default=60, help="for the fit, and as many for the table")
    parser.add_argument("--seed", type=int, default=21, help="of the fit; the next one is the table's")
    parser.add_argument("--device", default=None)
    parser.add_argument("--write", action="store_true", help="write the maps into the model's folder")
    arguments = parser.parse_args()
    keye = keyecli.load(arguments.model, device=arguments.device, dtype="fp32")
    with tempfile.TemporaryDirectory() as name:
        fitted_on = collect(keye, Path(name), arguments.clips, arguments.seed)
        held_out = collect(keye, Path(name), arguments.clips, arguments.seed + 1)
    spans = sum(len(sample.spans) for sample in fitted_on)
    provenance = (
        f"{Path(keye.name).name} {keye.revision} on {len(fitted_on)} questions ({spans} spans) about "
        f"{arguments.clips} forged clips of seed {arguments.seed}"
    )
    calibration = fit(fitted_on, provenance)
    print(calibration)
    pairs = [
        (calibration.score(certainty), right) for sample in held_out for certainty, right in sample.spans
    ]
    print("\n" + reliability("score of a span", *zip(*pairs, strict=True)))
    present = [calibration.presence_of(sample.log_odds_present) for sample in held_out]
    print("\n" + reliability("presence", present, [sample.present for sample in held_out]))
    if arguments.write:
        content = json.dumps({"ground": asdict(calibration)}, indent=2) + "\n"
        (keye.loaded.folder / CALIBRATION_FILE).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
