"""How many right answers have the wrong reasons, before and after training with the context reward:
`python examples/rl_nano/rejected.py --data DATA.jsonl --judge URL --adapter counting=FOLDER`.

Of nano's likeliest answers to held-out rows and of each adapter's. A right answer whose reasoning the judge rejects is worth a
tenth. Ends with 1 when an adapter's share is not below nano's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from answering import NANO, answers, named

import keyecli
from keyecli.training.judge_client import Judge, JudgeSettings
from keyecli.training.rewards import compose

REWARD = "context:outcome=count,format=false"


def rejected_share(scores: Sequence[float | None]) -> tuple[float, int]:
    """The share of right answers that were rejected, and how many were right."""
    right = [score for score in scores if score]
    return (sum(score < 0.5 for score in right) / len(right) if right else 0.0), len(right)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judge", required=True, metavar="URL")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    wanted = parser.parse_args()
    score = compose([REWARD], Judge(JudgeSettings(wanted.judge, "forged")))
    shares = {}
    for name, folder in {NANO: None, **named(wanted.adapter)}.items():
        keye = keyecli.load(None, dtype="fp32", cache=False, adapter=folder)
        shares[name], right = rejected_share([one.total for one in score(answers(keye, wanted.data))])
        print(f"{name}: {shares[name]:.3f} of {right} right answers have the wrong reasons")
    raise SystemExit(0 if all(share < shares[NANO] for name, share in shares.items() if name != NANO) else 1)


if __name__ == "__main__":
    main()
