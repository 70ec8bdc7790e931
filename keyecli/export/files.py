"""Where exports go: which file holds which clip in which format, and writing all of them or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from keyecli.errors import KeyeError, UsageError
from keyecli.export.formats import FORMATS, check, render
from keyecli.export.options import ExportOptions
from keyecli.export.timeline import Timeline

RenderOwn = Callable[[str, Sequence[int]], str]
"""Format name and indices of clips → the text of one file, for the formats that a task writes itself."""


@dataclass(frozen=True)
class Target:
    """One file to write: `clips` are indices of the timelines that it holds."""

    path: Path
    format: str
    clips: tuple[int, ...]


@dataclass(frozen=True)
class OutputRequest:
    """What `-f`, `-o` and the rest ask for.

    formats: names, in order. output: None for stdout, a folder (one that exists, or a path that ends in "/"), or a
    file. own: the formats that the task writes itself, name → suffix, such as {"json": ".json"}.
    """

    formats: tuple[str, ...] = ()
    output: str | None = None
    overwrite: bool = False
    options: ExportOptions = field(default_factory=ExportOptions)
    own: Mapping[str, str] = field(default_factory=dict)

    @property
    def wanted(self) -> bool:
        """True when anything is asked for, False when the command should print what it prints by default."""
        return bool(self.formats) or self.output is not None

    def check(self, timelines: Sequence[Timeline]) -> None:
        """All that can go wrong before the work is done; the timelines need no segments yet.

        UsageError: a format that does not exist, does not fit the place or the clip's rate; a place that cannot be
        written to or is taken.
        """
        self.check_names()
        if not self.wanted:
            return
        if self.output is None:
            targets = [Target(Path(), self._only_format(), tuple(range(len(timelines))))]
        else:
            targets = self.targets(timelines)
            check_writable([target.path for target in targets], overwrite=self.overwrite)
        for target in targets:
            if target.format not in self.own:
                chosen = [timelines[clip] for clip in target.clips]
                _check_room(target.format, len(chosen))
                check(chosen, target.format, self.options)

    def check_names(self) -> None:
        """What is wrong with the formats whatever the clips are. UsageError: one that does not exist, two on stdout."""
        if self.wanted and self.output is None:
            self._only_format()
        else:
            self._known_formats()

    def text(self, timelines: Sequence[Timeline], render_own: RenderOwn | None = None) -> str:
        """What goes to stdout: all clips in the one format. UsageError as in `render`."""
        clips = range(len(timelines))
        return self._render(Target(Path(), self._only_format(), tuple(clips)), timelines, render_own)

    def write(self, timelines: Sequence[Timeline], render_own: RenderOwn | None = None) -> list[Path]:
        """Write the files and return their paths; everything is rendered before the first one is written.

        UsageError as in `check` and `render`; KeyeError when the disk does not take them.
        """
        texts = [
            (target.path, self._render(target, timelines, render_own)) for target in self.targets(timelines)
        ]
        return write_texts(texts, overwrite=self.overwrite)

    def targets(self, timelines: Sequence[Timeline]) -> list[Target]:
        """The files that hold these clips. UsageError for formats and a place that do not fit each other."""
        formats = self._known_formats()
        assert self.output is not None
        path = Path(self.output)
        if path.is_dir() or self.output.endswith(("/", os.sep)):
            targets = self._in_folder(path, formats, timelines)
        else:
            chosen = self._of_file(path, formats)
            targets = [Target(path, chosen, tuple(range(len(timelines))))]
        for target in targets:
            if any(_same_file(target.path, timeline.path) for timeline in timelines):
                raise UsageError(f"{target.path} is the clip itself; give another file with -o")
        return targets

    def _render(self, target: Target, timelines: Sequence[Timeline], render_own: RenderOwn | None) -> str:
        if target.format in self.own:
            assert render_own is not None, "formats of a task's own come with a function that writes them"
            return render_own(target.format, target.clips)
        return render([timelines[clip] for clip in target.clips], target.format, self.options)

    def _suffixes(self) -> dict[str, str]:
        return {**self.own, **{name: format.suffix for name, format in FORMATS.items()}}

    def _known_formats(self) -> tuple[str, ...]:
        """The formats once each. UsageError, with all there are, for another name."""
        suffixes = self._suffixes()
        for name in self.formats:
            if name not in suffixes:
                raise UsageError(f"there is no format {name!r}; there are {', '.join(suffixes)}")
        return tuple(dict.fromkeys(self.formats))

    def _only_format(self) -> str:
        formats = self._known_formats()
        if len(formats) != 1:
            raise UsageError(
                f"{' and '.join(formats)} cannot share stdout: give a folder for their files with -o"
            )
        return formats[0]

    def _in_folder(self, folder: Path, formats: Sequence[str], timelines: Sequence[Timeline]) -> list[Target]:
        if not formats:
            raise UsageError(f"say what to write into {folder} with -f, as in -f srt -f edl")
        suffixes = self._suffixes()
        names = _unlike([timeline.name for timeline in timelines])
        return [
            Target(folder / f"{name}{suffixes[format]}", format, (clip,))
            for clip, name in enumerate(names)
            for format in formats
        ]

    def _of_file(self, path: Path, formats: Sequence[str]) -> str:
        if len(formats) > 1:
            raise UsageError(
                f"{path} would hold {' and '.join(formats)}: give a folder, as in -o {path.with_suffix('')}/"
            )
        if formats:
            return formats[0]
        suffixes = self._suffixes()
        ending = path.suffix.lower()
        matching = [name for name, suffix in suffixes.items() if Path(f"_{suffix}").suffix == ending]
        if len(matching) != 1:
            raise UsageError(
                f"the name {path.name} does not tell its format: say it with -f, one of {', '.join(suffixes)}"
            )
        return matching[0]


def write_outputs(
    timelines: Sequence[Timeline],
    formats: Sequence[str],
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write timelines into a folder, a file for each clip and format, or into one file; returns the paths.

    `output` is a folder when it exists as one or ends in "/". A file's format is told by `formats` or its suffix.
    Everything is rendered before anything is written. UsageError: a format that does not exist or does not fit, a place
    that cannot be written to, a file that is there (without `overwrite`). KeyeError: the disk does not take them.
    """
    request = OutputRequest(tuple(formats), str(output), overwrite, options or ExportOptions())
    request.check(timelines)
    return request.write(timelines)


def write_texts(texts: Sequence[tuple[Path, str]], *, overwrite: bool = False) -> list[Path]:
    """Write all files, UTF-8, or none: each appears under its name when all of them are complete.

    UsageError as in `check_writable`; KeyeError when the disk does not take them.
    """
    paths = [path for path, _ in texts]
    check_writable(paths, overwrite=overwrite)
    unfinished = [path.with_name(f".{path.name}.part") for path in paths]
    current = Path()
    try:
        for part, (current, text) in zip(unfinished, texts, strict=True):
            current.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(text.encode("utf-8"))
        for part, current in zip(unfinished, paths, strict=True):
            part.replace(current)
    except OSError as error:
        reason = error.strerror or str(error)
        raise KeyeError(f"cannot write {current}: {reason}; give another place") from error
    finally:
        for part in unfinished:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    return paths


def check_writable(paths: Iterable[Path], *, overwrite: bool = False) -> None:
    """UsageError for a file that is there (without `overwrite`), that is no ordinary file, or has no writable folder."""
    for path in paths:
        if path.exists():
            if not path.is_file():
                raise UsageError(f"{path} is not an ordinary file; give another one")
            if not overwrite:
                raise UsageError(f"{path} exists; give another place with -o, or --overwrite to replace it")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write {path}: {folder} is not a folder that can be written to")


def _check_room(format: str, clips: int) -> None:
    if clips != 1 and not FORMATS[format].several:
        raise UsageError(
            f"{format} holds the parts of one clip, and there are {clips}: give a folder with -o, as in -o out/"
        )


def _unlike(names: Sequence[str]) -> list[str]:
    """The names, those that came before numbered from 2 on; capitals make no difference, since some disks see none."""
    taken: set[str] = set()
    unlike = []
    for name in names:
        chosen, count = name, 1
        while chosen.casefold() in taken:
            count += 1
            chosen = f"{name}-{count}"
        taken.add(chosen.casefold())
        unlike.append(chosen)
    return unlike


def _same_file(path: Path, clip: Path) -> bool:
    try:
        return path.samefile(clip)
    except OSError:  # one of them is not there
        return path.absolute() == clip.absolute()
