"""Shares of the jobs: together all of them, alike in footage, and the same when jobs are added."""

from __future__ import annotations

import random
from pathlib import Path

from keyecli.batch.jobs import Job, make_jobs
from keyecli.batch.shard import Shard, header_duration_s, share_of


def jobs_about(clips: int, questions: int = 2) -> list[Job]:
    return make_jobs(
        ("", {"task": "ask", "inputs": f"{clip}.mp4", "question": f"{number}?"})
        for number in range(questions)
        for clip in range(clips)
    )


def test_shares_are_balanced_and_complete() -> None:
    draw = random.Random(0)
    durations = {f"{clip}.mp4": draw.uniform(1, 600) for clip in range(200)}
    jobs = jobs_about(200)
    shares = [share_of(jobs, Shard(number, 5), durations.__getitem__) for number in range(1, 6)]
    assert sorted(job.number for share in shares for job in share) == list(range(len(jobs)))
    footage = [sum(durations[path] for path in {job.inputs[0] for job in share}) for share in shares]
    assert max(footage) - min(footage) <= max(durations.values())
    owners = [{job.inputs for job in share} for share in shares]
    assert sum(map(len, owners)) == 200  # all questions about a clip are in one share
    assert all(share == sorted(share, key=lambda job: job.number) for share in shares)


def test_jobs_added_at_the_end_move_nothing() -> None:
    few, more = jobs_about(20, 1), jobs_about(25, 1)
    for number in (1, 2, 3):
        before = share_of(few, Shard(number, 3), lambda path: float(len(path)))
        after = share_of(more, Shard(number, 3), lambda path: float(len(path)))
        assert after[: len(before)] == before


def test_durations_are_those_of_the_headers(short_clips: list[Path], tmp_path: Path) -> None:
    assert abs(header_duration_s(str(short_clips[1])) - 51 / 25) < 0.05
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"nothing")
    assert [header_duration_s(str(path)) for path in (damaged, tmp_path / "gone.mp4", tmp_path)] == [
        0.0,
        0.0,
        0.0,
    ]
