"""Measure a fine-tuned keye-nano: `python examples/finetune_nano/evaluate.py DATA.jsonl --adapter FOLDER --old`.

Prints the share of held-out rows that are answered exactly, kind by kind; with `--old` also what nano's card measures, on fewer
clips: a model that learns something new should keep what it knew. `--json` writes the figures for `compare.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keyecli

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))
from evaluate import CONDITIONS, Scores, answers, mean, old_table

AS_TRAINED = CONDITIONS[0]


def exact_answers(keye: keyecli.Keye, data: Path) -> Scores:
    """1.0 for each row of `data` that is answered word by word, else 0.0; by kind (a row's task where it has none)."""
    by_clip: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_clip[row["videos"][0]].append(row)
    scores: Scores = defaultdict(list)
    for clip, rows in by_clip.items():
        given = answers(keye, data.parent / clip, rows, AS_TRAINED)
        for row, answer in zip(rows, given, strict=True):
            scores[row.get("kind", row["task"])].append(float(answer == row["answer"]))
    return scores


def print_scores(title: str, scores: Scores) -> None:
    everything = together(scores.values())
    print(f"{title}: {mean(everything):.3f} of {len(everything)} answers")
    for name in sorted(scores):
        print(f"  {mean(scores[name]):.3f} ({len(scores[name])})  {name}")


def together(lists: Iterable[list[float]]) -> list[float]:
    return [score for scores in lists for score in scores]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?", help="held-out rows")
    parser.add_argument("-m", "--model", default=None, help="model folder; default: the embedded nano")
    parser.add_argument("--adapter", type=Path, default=None, help="what keye finetune wrote")
    parser.add_argument("--old", action="store_true", help="also what nano knew before")
    parser.add_argument(
        "--clips", type=int, default=24, help="for it; and half as many that ask for times alone"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    arguments = parser.parse_args()
    adapter = {} if arguments.adapter is None else {"adapter": arguments.adapter}
    # Frames are not kept: each clip is looked at once.
    keye = keyecli.load(arguments.model, dtype="fp32", cache=False, **adapter)
    figures: dict[str, Scores] = {}
    if arguments.data is not None:
        figures["new"] = exact_answers(keye, arguments.data)
        print_scores("held-out rows", figures["new"])
    if arguments.old:
        figures["old"] = old_table(keye, arguments.clips)
        print_scores("nano's old table", figures["old"])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
