"""Cuts parts of a clip out into files of their own, by copying at keyframes or exactly by encoding again."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from keyecli.errors import KeyeError, KeyeWarning, UsageError
from keyecli.video.reencode import EncodeJob, encode_part, plan_encode
from keyecli.video.remux import CopyJob, copy_part, plan_copy
from keyecli.video.source import VideoInfo, open_video
from keyecli.video.timecode import format_time

_NAME_CHARACTERS = 100  # of the clip's own name; most file systems allow 255 bytes for all of it
_UNSAFE = re.compile(r"[^\w.-]+")

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CutClip:
    """A file that was cut out, and what it really holds: seconds from the first frame of the clip it came from.

    A copy that begins with frames which an edit list hides from players has a `start_s` below 0.
    """

    path: Path
    start_s: float
    end_s: float


def cut(
    info: VideoInfo,
    spans: Sequence[tuple[float | Fraction, float | Fraction]],
    folder: str | Path,
    exact: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> list[CutClip]:
    """Write every span (start, end), in seconds, to ``folder/<name>_001_12.0-15.5.mp4`` and so on, in the order given.

    By default packets are copied as they are, which takes no time and loses nothing, into a file of the same kind. A copy
    begins at the keyframe at or before the start and ends behind the last frame of the span, so that it is longer than
    asked for. With `exact` the span is encoded again as H.264 and AAC in an mp4 file that begins and ends with it
    (see `remux.plan_copy` and `reencode.plan_encode` for how boundaries are chosen); subtitles are then left out, with a
    KeyeWarning. Either way the clip begins at 0, and its name says the span that was asked for.

    All spans and names are checked before anything is written, and a file appears under its name when it is complete.
    `on_progress` hears what is done, how many seconds, and of how many. UsageError: a span that is empty or behind the
    end, a still image, an animation or another kind of file without `exact`, a file that exists without `overwrite`.
    InputError: what cannot be read. KeyeError: what cannot be written.
    """
    folder = Path(folder)
    if info.kind == "image":
        raise UsageError(f"{info.path.name} is a still image, of which no part can be cut out")
    if not spans:
        return []
    wanted = [_checked(info, span) for span in spans]
    plan = plan_encode if exact else plan_copy
    jobs = [plan(info, *span) for span in wanted]
    paths = [folder / name for name in _names(info.path, wanted, _suffix(jobs[0]))]
    _check_targets(folder, paths, overwrite)
    if exact:
        _warn_of_subtitles(info)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    say = _Seconds(on_progress, sum((job.end_s - job.start_s for job in jobs), Fraction(0)))
    for job, path in zip(jobs, paths, strict=True):
        with _writing(path), _complete_or_absent(path) as unfinished:
            if isinstance(job, CopyJob):
                copy_part(job, unfinished, say.reached)
            else:
                encode_part(job, unfinished, say.reached)
        say.finished(job.end_s - job.start_s)
    return [
        CutClip(path, float(job.start_s), float(job.end_s)) for job, path in zip(jobs, paths, strict=True)
    ]


class _Seconds:
    """Tells the progress in whole seconds of all clips together."""

    def __init__(self, on_progress: OnProgress | None, total_s: Fraction) -> None:
        self._on_progress, self._total = on_progress, math.ceil(total_s)
        self._done_s = Fraction(0)
        self._told = -1

    def reached(self, time_s: Fraction) -> None:
        """The clip that is being written has come to this time of its own."""
        done = min(self._total, max(0, math.floor(self._done_s + time_s)))
        if self._on_progress is not None and done > self._told:
            self._told = done
            self._on_progress("cutting", done, self._total)

    def finished(self, length_s: Fraction) -> None:
        self._done_s += length_s
        self.reached(Fraction(0))


def _checked(info: VideoInfo, span: tuple[float | Fraction, float | Fraction]) -> tuple[Fraction, Fraction]:
    """The span as exact seconds inside the clip."""
    if not all(math.isfinite(value) for value in span):
        raise UsageError(f"a span of {info.path.name} goes from {span[0]} to {span[1]}, which are no times")
    # Through the shortest decimal spelling: 0.1 means one tenth, not its binary neighbour.
    start_s, end_s = (Fraction(str(value)) if isinstance(value, float) else Fraction(value) for value in span)
    if start_s < 0 or end_s <= start_s:
        raise UsageError(
            f"the span from {float(start_s):g} to {float(end_s):g} s of {info.path.name} is empty: "
            "it must begin at 0 or later and end after its beginning"
        )
    if start_s >= info.duration_s:
        raise UsageError(
            f"the span from {format_time(start_s)} on lies behind the end of {info.path.name}, "
            f"which lasts {format_time(info.duration_s)}"
        )
    return start_s, min(end_s, info.duration_s)


def _names(path: Path, spans: Sequence[tuple[Fraction, Fraction]], suffix: str) -> list[str]:
    """File names that sort in the order of the spans, with nothing in them that a shell or a file system minds."""
    stem = _UNSAFE.sub("_", path.stem).strip("._-") or "clip"
    stem = stem.encode()[:_NAME_CHARACTERS].decode(errors="ignore")
    digits = max(3, len(str(len(spans))))
    return [
        f"{stem}_{number:0{digits}}_{_seconds(start_s)}-{_seconds(end_s)}{suffix}"
        for number, (start_s, end_s) in enumerate(spans, 1)
    ]


def _seconds(time_s: Fraction) -> str:
    """12.0, 15.25: up to three decimals, at least one."""
    whole, _, decimals = f"{float(time_s):.3f}".partition(".")
    return f"{whole}.{decimals.rstrip('0') or '0'}"


def _suffix(job: CopyJob | EncodeJob) -> str:
    return job.suffix if isinstance(job, CopyJob) else ".mp4"


def _check_targets(folder: Path, paths: Sequence[Path], overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder to write the clips into")
    present = next((path for path in paths if path.exists()), None)
    if present is not None and not overwrite:
        raise UsageError(f"{present} exists; give another folder, or --overwrite to replace it")


def _warn_of_subtitles(info: VideoInfo) -> None:
    if info.reader != "ffmpeg":
        return
    container, _ = open_video(info.path)
    with container:
        if container.streams.subtitles:
            message = f"the subtitles of {info.path.name} are left out: only a cut without --exact keeps them"
            warnings.warn(message, KeyeWarning, stacklevel=3)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what FFmpeg or the system says when writing fails into a sentence."""
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        raise KeyeError(f"cannot write {path}: {reason}; give another folder") from error


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name at the end, or is removed when something fails."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
