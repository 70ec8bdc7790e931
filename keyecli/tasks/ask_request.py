"""What may be asked of a question, checked without anything heavy, so that a wrong flag is told at once."""

from __future__ import annotations

from keyecli.errors import UsageError


def check_samples(samples: int, temperature: float | None) -> None:
    """UsageError for a number of answers out of range, or of which all would be the same."""
    if samples < 1:
        raise UsageError(f"--samples must be at least 1, not {samples}")
    if samples > 1 and not temperature:
        raise UsageError(
            f"--samples {samples} needs --temperature above 0: at 0 all the answers would be the same"
        )
