"""What may be asked of a summary, checked without anything heavy, so that a wrong flag is told at once."""

from __future__ import annotations

import math
import re
from typing import Literal, get_args

from keyecli.errors import UsageError

Style = Literal["brief", "detailed", "bullets"]
STYLES: tuple[str, ...] = get_args(Style)

MAX_CHAPTERS = 1000
_LANGUAGE = re.compile(r"[^\W\d_][\w '()-]{0,39}")


def check_request(
    *, style: str | None, chapters: int | None, language: str | None, min_chapter_s: float | None = None
) -> None:
    """UsageError for a style that does not exist, a number out of range, and what is no language's name."""
    if style is not None and style not in STYLES:
        raise UsageError(f"there is no style {style}; there are {', '.join(STYLES)}")
    if chapters is not None and not 1 <= chapters <= MAX_CHAPTERS:
        raise UsageError(f"--chapters must be from 1 to {MAX_CHAPTERS}, or auto, not {chapters}")
    if language is not None and not _LANGUAGE.fullmatch(language.strip()):
        raise UsageError(f"--language must be a language's name, as in German, not {language!r}")
    if min_chapter_s is not None and not 0 <= min_chapter_s < math.inf:
        raise UsageError(f"the shortest chapter must be 0 seconds or more, not {min_chapter_s}")
