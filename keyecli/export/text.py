"""Text that every format can hold: no control characters, one line where a line is wanted, never empty titles."""

from __future__ import annotations

import re

from keyecli.export.timeline import Segment

# What XML 1.0 cannot hold at all; the other formats lose nothing by leaving it out too.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")


def writable(text: str) -> str:
    """`text` without control characters, its lines ended by a newline, broken characters as U+FFFD."""
    text = _LONE_SURROGATES.sub("\ufffd", _LINE_ENDS.sub("\n", text))
    return _UNWRITABLE.sub("", text)


def one_line(text: str) -> str:
    """`text` on a single line, its words one space apart."""
    return " ".join(writable(text).split())


def title_of(segment: Segment, number: int) -> str:
    """A segment's title on one line, or "Part N" for an empty one; the first has number 1."""
    return one_line(segment.title) or f"Part {number}"


def score_text(score: float) -> str:
    """A score as it is written everywhere, with three decimals."""
    return f"{score:.3f}"
