"""Whether what was aimed at was reached: `python examples/rl_nano/aims.py FIGURES.json grounding:ground:+0.15`.

An aim is MODEL:COLUMN and how much better than nano the model has to be there (+0.15), how much worse it may be (-0.02), or
another model of which it has to come within 0.02 (student:ground:grounding). Ends with 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NEAR = 0.02


def missed(figures: dict[str, dict[str, float]], aim: str) -> str | None:
    """What is missing, None where the aim is reached."""
    model, column, against = aim.split(":")
    reached = figures[model][column]
    if against[0] in "+-":
        least = figures["nano"][column] + float(against)
    else:
        least = figures[against][column] - NEAR
    return (
        None if reached >= least else f"{model} has {reached:.3f} in {column}, and {least:.3f} was aimed at"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path)
    parser.add_argument("aims", nargs="+")
    wanted = parser.parse_args()
    figures = json.loads(wanted.figures.read_text(encoding="utf-8"))
    found = [sentence for aim in wanted.aims if (sentence := missed(figures, aim))]
    print("\n".join(found) or "all aims are reached")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
