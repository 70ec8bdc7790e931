"""Adapters of keye-nano side by side: `python examples/rl_nano/evaluate.py --data ground=DATA.jsonl --adapter grounding=FOLDER`.

Prints the mean score of the likeliest answers to each data file (temporal IoU, exact counts), by nano itself and by each adapter,
and with `--old` nano's old table on fewer clips. `--json` adds the figures to a file, or makes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

from answering import NANO, answers, named

import keyecli
from keyecli.training.rewards import compose

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))
from evaluate import old_table


def score_of(keye: keyecli.Keye, data: Path) -> float:
    """The mean reward, by each row's task."""
    scores = [one.total for one in compose(["auto"])(answers(keye, data))]
    return fmean(score for score in scores if score is not None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--old", action="store_true", help="also what nano knew before")
    parser.add_argument("--clips", type=int, default=16, help="for it; and half as many of times alone")
    parser.add_argument("--json", type=Path, default=None, help="keep the figures here")
    wanted = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    if wanted.json and wanted.json.is_file():
        figures = json.loads(wanted.json.read_text(encoding="utf-8"))
    adapters = named(wanted.adapter)
    for name in [NANO, *adapters]:
        own = figures.setdefault(name, {})
        missing = {column: path for column, path in named(wanted.data).items() if column not in own}
        if not missing and ("old table" in own or not wanted.old):
            continue
        keye = keyecli.load(None, dtype="fp32", cache=False, adapter=adapters.get(name))
        own |= {column: score_of(keye, path) for column, path in missing.items()}
        if wanted.old and "old table" not in own:
            old = old_table(keye, wanted.clips).values()
            own["old table"] = fmean(score for scores in old for score in scores)
    columns = list(figures[NANO])
    print(f"| | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, own in figures.items():
        print(f"| {name} | {' | '.join(f'{own[c]:.3f}' if c in own else '–' for c in columns)} |")
    if wanted.json:
        wanted.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
