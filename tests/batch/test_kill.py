"""Killed at random moments and started again, a batch ends as if nobody had disturbed it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.batch.conftest import lasting, read_records

ROOT = Path(__file__).resolve().parents[2]
KILLS = 50


def test_fifty_kills_lose_nothing_and_repeat_nothing(
    short_clips: list[Path], write_jobs: Callable[..., Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(short_clips[0].read_bytes()[:300])
    asked = [
        # Questions about a clip stand apart, so that some are answered before their turn.
        {
            "id": f"{clip.stem}{number}",
            "task": "ask",
            "inputs": str(clip),
            "question": f"What is number {number}?",
        }
        for number in range(5)
        for clip in (*short_clips, broken)
        if clip != broken or number == 3
    ]
    twice = {"task": "ask", "inputs": str(short_clips[0]), "question": "What is number 3?"}
    found = [{"task": "ground", "inputs": str(clip), "query": "a bar"} for clip in short_clips[:2]]
    jobs = write_jobs([*asked, *found, twice])
    out = tmp_path / "out.jsonl"

    command = [
        sys.executable,
        "-m",
        "tests.batch.killing",
        str(jobs),
        str(out),
        str(tiny_checkpoint),
        str(KILLS),
        "0",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, killed, last_code = done.stdout.split()
    # The others came when there was nothing left to do.
    assert int(killed) > KILLS * 0.5
    assert last_code == "1"

    whole = read_records(tmp_path / "out.jsonl.whole")
    interrupted = read_records(out)
    assert [record["id"] for record in interrupted] == [record["id"] for record in whole]
    assert [record["status"] for record in whole].count("failed") == 1
    assert [lasting(record) for record in interrupted] == [lasting(record) for record in whole]
    assert not (tmp_path / "out.jsonl.early").exists()
