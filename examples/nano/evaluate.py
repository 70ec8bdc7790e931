"""Measure keye-nano on held-out forged clips: `python examples/nano/evaluate.py --clips 100`.

Forges clips from seeds that training never drew, as H.264 files, and asks every question through the same decoding,
layout and generation as `keye ask`, those for times as `keye ground`; all questions about a clip share one prefill.
Prints the tables of the model's card.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keyecli
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.grammar import SpanConstraint, SpanRange
from keyecli.engine.plan import plan_inputs
from keyecli.engine.shared import SharedPrefix, question_tokens
from keyecli.forge import SceneOptions
from keyecli.forge.write import write_dataset
from keyecli.tasks.options import ask_settings
from keyecli.tasks.spans import parse_spans, temporal_iou
from keyecli.video.source import probe

GROUNDING = ("ground", "ground_motion")
ANSWER_TOKENS = 320
OLD_SEED = 7  # of the clips behind the card's tables

Scores = dict[str, list[float]]
"""By task."""

MATCHED_IOU = 0.5


@dataclass(frozen=True)
class Condition:
    """One way of asking: what differs from how nano was trained."""

    name: str
    fps: float = 2.0
    size: tuple[int, int] | None = None
    max_tokens: int | None = None  # merged tokens a frame
    think: bool = True
    mode: str = "sparse"
    constrained: bool = True  # grounding can be answered with nothing but a list of spans


CONDITIONS = (
    Condition("as trained"),
    Condition("selection switched to dense", mode="dense"),
    Condition("without thinking", think=False),
    Condition("1 frame a second", fps=1.0),
    Condition("2.5 frames a second", fps=2.5),
    Condition("4 frames a second", fps=4.0),
    Condition("clips of 800x600", size=(800, 600)),
    Condition("frames of up to 36 tokens", max_tokens=36),
    Condition("grounding unconstrained", constrained=False),
)


@dataclass(frozen=True)
class Graded:
    """One answer beside the truth. `score` is 1 or 0 for exact answers, the temporal IoU for spans, recall for summaries."""

    task: str
    truth: str
    given: str
    score: float
    spans: int | None = None  # how many the truth has, for grounding


def grade(row: dict[str, Any], given: str) -> Graded:
    task, truth = row["task"], row["answer"]
    if task in GROUNDING:
        predicted = parse_spans(given)
        spans = [(float(start), float(end)) for start, end in row["solution"]]
        score = 0.0 if predicted is None else temporal_iou(predicted, spans)
        return Graded(task, truth, given, score, len(spans))
    if task == "summary":
        return Graded(task, truth, given, summary_recall(truth, given))
    return Graded(task, truth, given, float(given == truth))


def summary_recall(truth: str, given: str) -> float:
    """Share of the true lines that an answer has: the same words, spans that overlap by at least half, each line once."""
    left = summary_lines(given)
    expected = summary_lines(truth)
    found = 0
    for span, words in expected:
        for candidate in left:
            if candidate[1] == words and temporal_iou([candidate[0]], [span]) >= MATCHED_IOU:
                left.remove(candidate)
                found += 1
                break
    return found / len(expected)


def summary_lines(text: str) -> list[tuple[tuple[float, float], str]]:
    """Lines `3.0 - 7.5: red circle`; others are left out."""
    lines = []
    for line in text.splitlines():
        times, _, words = line.partition(": ")
        try:
            start, end = (float(part) for part in times.split(" - "))
        except ValueError:
            continue
        lines.append(((start, end), words))
    return lines


def answers(
    keye: keyecli.Keye, clip: Path, rows: Sequence[dict[str, Any]], condition: Condition
) -> Iterator[str]:
    """Answers to the questions of `rows` about one clip, which is decoded and prefilled once."""
    loaded, info = keye.loaded, probe(clip)
    sampling = ask_settings(loaded.preprocessor, fps=condition.fps).sampling
    if condition.max_tokens:
        sampling = replace(sampling, budget=replace(sampling.budget, max_tokens=condition.max_tokens))
    plans = plan_inputs([info], sampling)
    questions = [row["question"] for row in rows]
    prefix = SharedPrefix.prefill(
        loaded,
        plans,
        question_room_tokens=question_tokens(loaded, plans, questions),
        answer_tokens=ANSWER_TOKENS,
        think=condition.think,
    )

    def spans_only(max_tokens: int, thinking_open: bool) -> SpanConstraint:
        return SpanConstraint(
            loaded.tokenizer,
            SpanRange.of_seconds(float(info.duration_s)),
            max_tokens=max_tokens,
            answer_tokens=max_tokens // 2,
            thinking_open=thinking_open,
            think=condition.think,
        )

    for row in rows:
        constrained = condition.constrained and row["task"] in GROUNDING
        answer = prefix.answer(
            row["question"],
            GenerationSettings(max_tokens=ANSWER_TOKENS),
            constraint=spans_only if constrained else None,
        )
        yield answer.text


@contextmanager
def attention_mode(keye: keyecli.Keye, mode: Any) -> Iterator[None]:
    keye.model.model.mode = mode
    try:
        yield
    finally:
        keye.model.model.mode = "sparse"


def measure(
    keye: keyecli.Keye,
    clips: int,
    seed: int,
    questions: int,
    condition: Condition,
    tasks: tuple[str, ...] = (),
) -> list[Graded]:
    """Forge `clips` clips with `questions` questions each, of these tasks only if any are named, and grade the answers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(
            folder, clips, seed, SceneOptions(size=condition.size), questions_per_clip=questions, tasks=tasks
        )
        return grade_all(keye, folder, condition)


def grade_all(keye: keyecli.Keye, folder: Path, condition: Condition) -> list[Graded]:
    rows_by_clip: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows_by_clip.setdefault(row["videos"][0], []).append(row)
    graded = []
    with attention_mode(keye, condition.mode):
        for video, rows in rows_by_clip.items():
            for row, given in zip(rows, answers(keye, folder / video, rows, condition), strict=True):
                graded.append(grade(row, given))
    return graded


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def summary_figures(graded: list[Graded]) -> dict[str, tuple[float, int]]:
    """The figures of the card with how many answers each rests on."""
    groups = {
        "exact match on questions": [g.score for g in graded if g.spans is None and g.task != "summary"],
        "mean IoU, one span": [g.score for g in graded if g.spans == 1],
        "mean IoU, several spans": [g.score for g in graded if g.spans is not None and g.spans > 1],
        "not there, said so": [g.score for g in graded if g.spans == 0],
        "recall of summary lines": [g.score for g in graded if g.task == "summary"],
    }
    return {name: (mean(scores), len(scores)) for name, scores in groups.items()}


def print_tables(results: dict[str, list[Graded]]) -> None:
    names = list(summary_figures(next(iter(results.values()))))
    print("| condition | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for condition, graded in results.items():
        figures = summary_figures(graded)
        print(
            f"| {condition} | "
            + " | ".join(f"{value:.3f} ({count})" for value, count in figures.values())
            + " |"
        )
    graded = results[CONDITIONS[0].name]
    print("\n| task | score | answers | most frequent mistakes (truth → given) |\n| --- | --- | --- | --- |")
    for task in sorted({g.task for g in graded}):
        of_task = [g for g in graded if g.task == task]
        mistakes: Counter[str] = Counter()
        if task not in (*GROUNDING, "summary", "appear"):
            mistakes.update(f"{g.truth} → {g.given[:24]}" for g in of_task if g.score < 1)
        shown = ", ".join(f"{pair} ×{count}" for pair, count in mistakes.most_common(4))
        print(f"| {task} | {mean([g.score for g in of_task]):.3f} | {len(of_task)} | {shown} |")


def old_table(keye: keyecli.Keye, clips: int) -> Scores:
    """Scores of nano's card by task: exact answers, temporal IoU, recall of summary lines; all tasks, then spans alone."""
    graded = measure(keye, clips, OLD_SEED, 10, CONDITIONS[0])
    graded += measure(keye, max(1, clips // 2), OLD_SEED + 1, 10, CONDITIONS[0], GROUNDING)
    scores: Scores = defaultdict(list)
    for item in graded:
        scores[item.task].append(item.score)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="model folder; default: the embedded nano")
    parser.add_argument(
        "--clips",
        type=int,
        default=100,
        help="held-out clips for the first condition, and as many of grounding alone; a half for the others",
    )
    parser.add_argument("--questions", type=int, default=10, help="questions a clip")
    parser.add_argument("--seed", type=int, default=7, help="below 900, the first seed that training used")
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, default=None, help="also write every graded answer here")
    parser.add_argument(
        "--only", type=int, default=len(CONDITIONS), help="how many of the conditions to measure"
    )
    arguments = parser.parse_args()
    keye = keyecli.load(arguments.model, device=arguments.device, dtype="fp32")
    results: dict[str, list[Graded]] = {}
    for condition in CONDITIONS[: arguments.only]:
        begin = time.perf_counter()
        clips = arguments.clips if condition is CONDITIONS[0] else max(1, arguments.clips // 2)
        graded = measure(keye, clips, arguments.seed, arguments.questions, condition)
        # Few questions ask for several spans or for what is not there: as many clips again ask for times alone.
        graded += measure(keye, clips, arguments.seed + 1, arguments.questions, condition, GROUNDING)
        results[condition.name] = graded
        print(f"{condition.name}: 2 × {clips} clips in {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"\nmodel {keye.name}, weights {keye.revision}, seed {arguments.seed}\n")
    print_tables(results)
    if arguments.json:
        rows = {name: [vars(g) for g in graded] for name, graded in results.items()}
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
