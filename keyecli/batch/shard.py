"""A share of the jobs for each of several machines: the same on all of them, and about as much footage for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from keyecli.batch.jobs import Job
from keyecli.errors import InputError, UsageError


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `count` shares, counted from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "2/8" → the second of eight. UsageError for anything else."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard is {text!r}, but it must be one share of all, as in 2/8")
        return cls(int(match[1]), int(match[2]))


def share_of(
    jobs: Sequence[Job], shard: Shard, duration_s: Callable[[str], float] | None = None
) -> list[Job]:
    """The jobs of a share, in their order. Jobs about the same inputs stay together.

    Inputs are dealt out in the order in which they first appear, each to the share that has the least footage so far, so
    that jobs added at the end change nothing about the others. `duration_s` gives the seconds of a file, 0 for one that
    cannot be read; by default they are read from its header.
    """
    duration_s = header_duration_s if duration_s is None else duration_s
    loads = [0.0] * shard.count
    owners: dict[tuple[str, ...], int] = {}
    durations: dict[str, float] = {}
    for inputs in dict.fromkeys(job.inputs for job in jobs):
        for path in inputs:
            if path not in durations:
                durations[path] = duration_s(path)
        owner = min(range(shard.count), key=lambda place: (loads[place], place))
        # A file without duration is some work too.
        loads[owner] += max(sum(durations[path] for path in inputs), 1.0)
        owners[inputs] = owner
    return [job for job in jobs if owners[job.inputs] == shard.number - 1]


def header_duration_s(path: str) -> float:
    """Seconds of a file as its header says, 0.0 where it says nothing or cannot be read; frames are not looked at."""
    from keyecli.video.source import open_video

    if not Path(path).is_file():
        return 0.0
    try:
        container, _ = open_video(Path(path))
    except InputError:
        return 0.0
    with container:
        return max(0.0, float(container.duration or 0) / 1_000_000)
