"""Workers on a Ray cluster of several processes: the same results as without one, whoever of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from keyecli.batch.identity import Work
from keyecli.batch.jobs import Job, read_jobs
from keyecli.batch.ray_workers import RayHost, Share, cluster, share_of
from keyecli.batch.run import Batch, BatchSettings
from keyecli.batch.workers import WorkerPool
from keyecli.cli import run
from keyecli.engine.loaded import open_model
from keyecli.errors import UsageError
from keyecli.session import load
from tests.batch.conftest import lasting, read_records

# One cluster for all. Ray is looked for and not imported: it reads the environment then, which a fixture sets.
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(find_spec("ray") is None, reason="there is no ray for this Python"),
]

PATIENCE_S = 120
OPTIONS: dict[str, Any] = {"max_tokens": 6, "think": False}
FLAGS = ("--max-tokens", "6", "--no-think")
CLUSTER = """
import os, sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""
# Each line takes a while to write, so that there is time to interrupt what is going on.
SLOW_DRIVER = """
import time
from keyecli.batch.ledger import Ledger
put = Ledger.put
Ledger.put = lambda self, place, record: (put(self, place, record), time.sleep(0.3))
from keyecli.cli import main
main()
"""


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of the module's own: Ray keeps there what lets processes into its clusters."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        yield folder


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """A cluster of two CPUs, whose processes are not this one's."""
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


@pytest.fixture
def jobs(short_clips: list[Path], write_jobs: Callable[..., Path]) -> Path:
    """Questions about three clips, standing apart, a search, and a job about a file that is not there."""
    asked = [
        {"id": f"{clip.stem}{number}", "task": "ask", "inputs": str(clip), "question": f"What is {number}?"}
        for number in range(4)
        for clip in short_clips
    ]
    gone = {"id": "gone", "task": "ask", "inputs": "gone.mp4", "question": "What?"}
    return write_jobs(
        [*asked, gone, {"id": "found", "task": "ground", "inputs": str(short_clips[0]), "query": "a bar"}]
    )


@pytest.fixture
def plain(jobs: Path, tiny_checkpoint: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """What becomes of the jobs without workers."""
    with _batch(jobs, tiny_checkpoint, tmp_path / "plain.jsonl") as batch:
        batch.run(lambda: load(tiny_checkpoint, device="cpu"), {})
    return [lasting(record) for record in read_records(tmp_path / "plain.jsonl")]


def _batch(jobs: Path, model: Path, output: Path) -> Batch:
    listed: list[Job] = read_jobs(jobs.read_bytes(), "jobs")
    return Batch(listed, open_model(str(model), device="cpu"), output, OPTIONS, BatchSettings())


def test_actors_and_their_processes_are_killed(
    address: str,
    jobs: Path,
    plain: list[dict[str, Any]],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    answer, killed = WorkerPool.answer, []
    gone: list[Any] = []

    def kill_two(pool: WorkerPool, groups: Iterator[Sequence[Work]]) -> Iterator[Any]:
        for found in answer(pool, groups):
            busy = [worker.link.actor for worker in pool._workers if worker.ready and worker.groups]
            # What was killed looks busy until the pool hears of it.
            busy = [actor for actor in busy if actor not in gone]
            if busy and len(killed) < 2:
                gone.append(busy[0])
                pid = busy[0].__ray_call__.remote(lambda outpost: outpost._process.process.pid)
                killed.append(ray.get(pid))
                ray.kill(busy[0]) if len(killed) == 1 else os.kill(killed[1], signal.SIGKILL)
            yield found

    monkeypatch.setattr(WorkerPool, "answer", kill_two)
    output = tmp_path / "ray.jsonl"
    with cluster(address), _batch(jobs, tiny_checkpoint, output) as batch:
        loading = {"model": str(tiny_checkpoint), "device": "cpu"}
        tally = batch.run(
            lambda: load(tiny_checkpoint), loading, find_host=lambda: RayHost(Share("cpu", 2, 1))
        )
    assert (tally.done, tally.failed, tally.waiting) == (13, 1, 0)
    assert len(killed) == 2
    assert [lasting(record) for record in read_records(output)] == plain


def test_a_killed_driver_is_started_again(
    address: str,
    jobs: Path,
    plain: list[dict[str, Any]],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "ray.jsonl"
    command = ["batch", str(jobs), "-o", str(output), "-m", str(tiny_checkpoint), *FLAGS]
    command += ["--ray", address, "--workers", "1"]
    process = _start(["-c", SLOW_DRIVER, *command], tmp_path)
    _wait_for_lines(process, output)
    process.kill()
    process.communicate()
    assert 0 < len(read_records(output)) < len(plain)

    monkeypatch.chdir(tmp_path)
    assert run([*command, "--json", "--manifest", "run.json"]) == 1
    out, err = capsys.readouterr()
    tally = json.loads(out)
    assert tally["done"] + tally["failed"] > 0
    assert tally["done"] + tally["done_before"] == 13
    assert tally["failed"] + tally["failed_before"] == 1
    assert all(line.startswith("keye: ") for line in err.splitlines())
    manifest = json.loads(Path("run.json").read_text())
    assert manifest["workers"] == [manifest["machine"]]
    assert [lasting(record) for record in read_records(output)] == plain


def test_a_machine_without_the_folder_of_the_jobs(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with cluster(address):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            host = RayHost(Share("cpu", 1, 1))
        folder.rmdir()
        actor = host.start({"load": {"device": "cpu"}})
        with pytest.raises(UsageError, match=f"{folder}, to which paths are relative, cannot be entered on "):
            list(host.listen([actor]))
        actor.end()


def test_a_cluster_of_its_own_is_interrupted(
    home: Path, jobs: Path, plain: list[dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ray.jsonl"
    command = ["batch", str(jobs), "-o", str(output), "-m", str(tiny_checkpoint), *FLAGS, "--ray"]
    process = _start(["-c", SLOW_DRIVER, *command], tmp_path, HOME=str(tmp_path))
    _wait_for_lines(process, output)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    assert process.communicate(timeout=PATIENCE_S) == ("", "keye: interrupted\n")
    assert process.returncode == 130
    records = [lasting(record) for record in read_records(output)]
    assert records == plain[: len(records)]
    assert 0 < len(records) < len(plain)
    until = time.monotonic() + PATIENCE_S
    while _living_in(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def fail(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify one.")

    monkeypatch.setattr(ray, "init", fail)
    sentence = "the Ray cluster auto cannot be joined: Could not find any running Ray instance; -v shows what Ray says"
    with pytest.raises(UsageError, match=f"^{sentence}$"), cluster("auto"):
        pass


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "share"),
    [
        ([{"CPU": 8.0}], None, None, Share("cpu", 4, 2)),
        ([{"CPU": 8.0}], "auto", 3, Share("cpu", 3, 2)),
        ([{"CPU": 8.0}], None, 8, Share("cpu", 8, 1)),
        ([{"CPU": 1.0}], None, None, Share("cpu", 1, 1)),
        ([{"CPU": 3.0}, {"CPU": 3.0}], None, None, Share("cpu", 2, 3)),
        ([{"CPU": 3.0}, {"CPU": 3.0}], None, 4, Share("cpu", 4, 1)),
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 4.0}], None, None, Share("cuda", 2, 0)),
        ([{"CPU": 16.0, "GPU": 2.0}, {"GPU": 1.0}], "cuda", 2, Share("cuda", 2, 0)),
        ([{"CPU": 16.0, "GPU": 2.0}], "cpu", None, Share("cpu", 8, 2)),
        ([{"CPU": 2.0}], "cuda", None, "--device cuda: the cluster has no GPU; leave the option out"),
        ([{"CPU": 2.0}], "cuda:1", None, "--device cuda:1 is for one worker: leave it out with --ray"),
        ([{"CPU": 2.0}], None, 3, "--workers 3 is a CPU core each, and the cluster has 2"),
        ([{"GPU": 2.0}], None, 3, "--workers 3 is one GPU each, and the cluster has 2"),
        ([{}], None, None, "--workers 1 is a CPU core each, and the cluster has 0"),
    ],
)
def test_what_workers_take(
    nodes: list[dict[str, float]], device: str | None, workers: int | None, share: Share | str
) -> None:
    if isinstance(share, Share):
        assert share_of(nodes, device, workers) == share
        return
    with pytest.raises(UsageError) as raised:
        share_of(nodes, device, workers)
    assert str(raised.value) == share


def _start(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A Python process in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_lines(process: subprocess.Popen[str], output: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def _living_in(home: Path) -> list[int]:
    """Processes with this HOME; where a system does not tell, none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is another user's
            continue
        if f"HOME={home}".encode() in variables:
            found.append(int(folder.name))
    return found
