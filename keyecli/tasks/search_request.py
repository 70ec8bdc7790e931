"""What may be asked of a search, checked without anything heavy, so that a wrong flag is told at once."""

from __future__ import annotations

import math

from keyecli.errors import UsageError

MIN_WINDOW_S = 2


def check_search(
    *,
    window_s: float | None = None,
    top: int | None = None,
    min_score: float | None = None,
    merge_gap_s: float | None = None,
    constrained: bool = True,
) -> None:
    """UsageError for a number out of range, and for options that need scores where answers have none."""
    if window_s is not None and not MIN_WINDOW_S <= window_s < math.inf:
        raise UsageError(f"--window must be at least {MIN_WINDOW_S} s, not {float(window_s):g}")
    if top is not None and top < 1:
        raise UsageError(f"--top must be at least 1, not {top}")
    if min_score is not None and not 0 <= min_score <= 1:
        raise UsageError(f"--min-score must be from 0 to 1, not {min_score:g}")
    if merge_gap_s is not None and not 0 <= merge_gap_s < math.inf:
        raise UsageError(f"--merge-gap must be 0 s or more, not {merge_gap_s:g}")
    if not constrained and (top is not None or min_score is not None):
        flag = "--top" if top is not None else "--min-score"
        raise UsageError(f"{flag} needs scores, which --unconstrained answers do not have: use one of them")
