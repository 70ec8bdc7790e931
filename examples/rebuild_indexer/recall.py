"""How much attention falls on what each layer's indexer selects: `python examples/rebuild_indexer/recall.py METRICS.jsonl …`.

The files are `metrics.jsonl` of runs of `keye finetune --train indexer` or `sparse` with `--eval-data`; their held-out rows
before and after each run become a table, as shares of what the best selection of as many keys would hold, since no indexer finds
more where a layer looks everywhere; then the last run's recall of queries that write answers, of all, and the best possible.
Ends with 1 where it leaves a layer below `--least`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAMES = ("answer_recall", "indexer_recall", "best_recall")


def recalls(metrics: Path) -> list[list[list[float]]]:
    """Before the run and after it, by `NAMES`: a figure for every layer."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    measured = [[row[name] for name in NAMES] for row in rows if row["kind"] == "eval"]
    return [measured[0], measured[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path, nargs="+")
    parser.add_argument(
        "--least", type=float, default=0.95, help="share of each layer's best possible recall"
    )
    arguments = parser.parse_args()
    runs = [recalls(path) for path in arguments.metrics]
    stages = [runs[0][0], *(after for _, after in runs)]
    titles = ["before", *(path.parent.name for path in arguments.metrics), "answers", "all", "best possible"]
    print(f"| layer | {' | '.join(titles)} |\n| --- |{' --- |' * len(titles)}")
    low = []
    for layer in range(len(stages[0][0])):
        shares = [own[layer] / best[layer] for _, own, best in stages]
        last = [of_all[layer] for of_all in stages[-1]]
        print(f"| {layer} | {' | '.join(f'{value:.3f}' for value in shares + last)} |")
        if shares[-1] < arguments.least:
            low.append(layer)
    if low:
        print(f"layers below {arguments.least}: {', '.join(map(str, low))}")
    raise SystemExit(1 if low else 0)


if __name__ == "__main__":
    main()
