"""How many right answers had the wrong reasons, at the beginning of a run with the context reward and at its end:
`python examples/rl_nano/rejected.py RUN/rollouts.jsonl`.

A right answer whose reasoning the judge rejects is worth a tenth. Ends with 1 when their share did not fall.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def rejected_share(groups: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """The share of right answers that were rejected, and how many were right."""
    scores = [one["score"] for group in groups for one in group["rollouts"] if one["score"]]
    return (sum(score < 0.5 for score in scores) / len(scores) if scores else 0.0), len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rollouts", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="at each end of the run")
    wanted = parser.parse_args()
    groups = [json.loads(line) for line in wanted.rollouts.read_text(encoding="utf-8").splitlines()]
    last = max(group["step"] for group in groups)
    ends = (
        [group for group in groups if group["step"] <= wanted.steps],
        [group for group in groups if group["step"] > last - wanted.steps],
    )
    shares = [rejected_share(end) for end in ends]
    for name, (share, right) in zip(("first", "last"), shares, strict=True):
        print(f"{name} {wanted.steps} steps: {share:.3f} of {right} right answers had the wrong reasons")
    raise SystemExit(0 if shares[1][0] < shares[0][0] else 1)


if __name__ == "__main__":
    main()
