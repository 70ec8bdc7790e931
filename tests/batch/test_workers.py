"""Several processes: the same results as one, and a process that is lost costs nothing."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from keyecli import __version__
from keyecli.batch.hosts import Ended
from keyecli.batch.identity import Work
from keyecli.batch.jobs import read_jobs
from keyecli.batch.processes import ProcessHost, WorkerProcess, devices_of
from keyecli.batch.run import Batch, BatchSettings
from keyecli.batch.workers import WorkerPool
from keyecli.engine.loaded import open_model
from keyecli.errors import UsageError
from keyecli.session import load
from tests.batch.conftest import lasting, read_records


def test_two_workers_of_which_one_is_killed(
    short_clips: list[Path],
    write_jobs: Callable[..., Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [
        {"id": f"{clip.stem}{number}", "task": "ask", "inputs": str(clip), "question": f"What is {number}?"}
        for number in range(2)
        for clip in short_clips
    ]
    source = write_jobs([*asked, {"id": "gone", "task": "ask", "inputs": "gone.mp4", "question": "What?"}])
    jobs = read_jobs(source.read_bytes(), "jobs")
    defaults = {"max_tokens": 6, "think": False}
    loading: Any = {"model": str(tiny_checkpoint), "device": "cpu"}
    files = open_model(**loading)
    answer, killed = WorkerPool.answer, []

    def kill_one(pool: WorkerPool, groups: Iterator[Sequence[Work]]) -> Iterator[Any]:
        for number, found in enumerate(answer(pool, groups)):
            if number == 0:
                killed.append(next(worker.link.process.pid for worker in pool._workers if worker.ready))
                os.kill(killed[0], signal.SIGKILL)
            yield found
        assert killed[0] not in [worker.link.process.pid for worker in pool._workers]

    monkeypatch.setattr(WorkerPool, "answer", kill_one)
    outputs = {}
    for workers in (1, 2):
        output = tmp_path / f"{workers}.jsonl"
        host = None if workers == 1 else lambda: ProcessHost(devices_of("cpu", 2))
        with Batch(jobs, files, output, defaults, BatchSettings()) as batch:
            tally = batch.run(lambda: load(**loading), loading, find_host=host)
        assert (tally.done, tally.failed, tally.waiting) == (6, 1, 0)
        outputs[workers] = [lasting(record) for record in read_records(output)]
    assert len(killed) == 1
    assert outputs[2] == outputs[1]
    assert [record["id"] for record in outputs[2]] == [job.id for job in jobs]


def test_a_worker_of_another_version_does_nothing() -> None:
    process = WorkerProcess({"keye_version": "0.0"}, os.environ)
    (said,) = process.hear()
    assert said["stopped"]["kind"] == "KeyeError"
    sentence = f"{platform.node()} has keye {__version__}, and 0.0 gives it work: install the same"
    assert said["stopped"]["message"] == sentence
    assert process.hear() == Ended("exit code 0")
    process.end()


def test_a_worker_needs_a_device_of_its_own() -> None:
    assert devices_of("cpu", 3) == ["cpu"] * 3
    with pytest.raises(UsageError, match="--device cuda:1 is for one worker: leave it out with --workers 2"):
        devices_of("cuda:1", 2)
