"""Before and after, as a table: `python examples/finetune_nano/compare.py BEFORE.json AFTER.json`.

The files are those of `evaluate.py --json`. Ends with 1 when the held-out rows, or the old table, are not where they should be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

Scores = dict[str, list[float]]


def mean(scores: Scores) -> float:
    values = [value for of_kind in scores.values() for value in of_kind]
    return sum(values) / len(values)


def print_table(before: dict[str, Scores], after: dict[str, Scores]) -> None:
    print("| | before | after |\n| --- | --- | --- |")
    for part, title in (("new", "**held-out rows**"), ("old", "**nano's old table**")):
        if part not in before:
            continue
        print(f"| {title} | **{mean(before[part]):.3f}** | **{mean(after[part]):.3f}** |")
        for name in sorted(before[part]):
            figures = (f"{mean({name: scores[part][name]}):.3f}" for scores in (before, after))
            print(f"| {name} ({len(before[part][name])}) | {' | '.join(figures)} |")


def shortcomings(before: dict[str, Scores], after: dict[str, Scores], least: float, loss: float) -> list[str]:
    """One sentence for each aim that was missed."""
    missed = []
    if "new" in after and mean(after["new"]) < least:
        missed.append(f"held-out rows reach {mean(after['new']):.3f}, not {least}")
    if "old" in after and mean(before["old"]) - mean(after["old"]) > loss:
        missed.append(f"the old table lost {mean(before['old']) - mean(after['old']):.3f}, more than {loss}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=0.9, help="share of held-out rows")
    parser.add_argument("--loss", type=float, default=0.02, help="what the old table may lose")
    arguments = parser.parse_args()
    before, after = (json.loads(path.read_text("utf-8")) for path in (arguments.before, arguments.after))
    print_table(before, after)
    for sentence in (missed := shortcomings(before, after, arguments.least, arguments.loss)):
        print(sentence)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
