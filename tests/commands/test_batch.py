"""`keye batch` with a random toy model: what it writes, how it goes on, what it refuses, and how it fails."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyecli import session
from keyecli.tasks.ask import Answer
from tests.batch.conftest import lasting, read_records, replace_decoding
from tests.commands.conftest import Keye
from tests.commands.test_interrupt import PATIENCE_S

Jobs = list[dict[str, Any]]
Decode = Callable[..., Any]
FEW = ("--max-tokens", "6", "--no-think")


@pytest.fixture(autouse=True)
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEYE_MODEL", str(tiny_checkpoint))
    return tiny_checkpoint


@pytest.fixture
def run(keye: Keye, folder: Path) -> Callable[..., tuple[int, str, str]]:
    """`run(jobs, ...)` writes the jobs to jobs.jsonl and runs them into out.jsonl."""

    def call(jobs: Jobs, *arguments: str) -> tuple[int, str, str]:
        (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
        return keye("batch", "jobs.jsonl", "-o", "out.jsonl", *FEW, *arguments)

    return call


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each file, every time its frames are decoded."""
    seen: list[str] = []

    def watched(decode: Decode) -> Decode:
        def call(info: Any, *arguments: Any, **options: Any) -> Any:
            seen.append(info.path.stem)
            return decode(info, *arguments, **options)

        return call

    replace_decoding(monkeypatch, watched)
    return seen


def ask(clip: Path | str, question: str = "What?", **more: Any) -> dict[str, Any]:
    return {"task": "ask", "inputs": str(clip), "question": question, **more}


@pytest.fixture
def broken(folder: Path, clip: Path) -> Path:
    path = folder / "broken.mp4"
    path.write_bytes(clip.read_bytes()[:300])
    return path


def test_each_task_gives_what_its_command_gives(
    run: Callable[..., tuple[int, str, str]], keye: Keye, clip: Path
) -> None:
    jobs = [
        ask(clip, id="asked"),
        {"id": "found", "task": "ground", "video": str(clip), "queries": ["a bar", "a light"]},
        {"id": "told", "task": "summarize", "inputs": [str(clip)], "options": {"snap": False}},
    ]
    assert run(jobs) == (0, "3 jobs: 3 done, 0 failed\n", "")
    records = read_records(Path("out.jsonl"))
    assert [(record["id"], record["status"], record["task"]) for record in records] == [
        ("asked", "done", "ask"),
        ("found", "done", "ground"),
        ("told", "done", "summarize"),
    ]
    commands = (
        ["ask", str(clip), "What?"],
        ["ground", str(clip), "a bar", "a light"],
        ["summarize", str(clip), "--no-snap"],
    )
    for record, command in zip(records, commands, strict=True):
        _, out, _ = keye(*command, *FEW, "--json")
        alone = {**record, "results": [json.loads(line) for line in out.splitlines()]}
        assert lasting(alone)["results"] == lasting(record)["results"]


def test_a_second_run_has_nothing_to_do_and_loads_nothing(
    run: Callable[..., tuple[int, str, str]], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([ask(clip)])
    before = Path("out.jsonl").read_bytes()
    monkeypatch.delattr(session, "load")
    assert run([ask(clip)]) == (0, "1 job: 0 done, 0 failed, 1 done before\n", "")
    assert Path("out.jsonl").read_bytes() == before


def test_what_changed_runs_again_and_the_rest_does_not(
    run: Callable[..., tuple[int, str, str]], folder: Path, clips: Callable[..., Path]
) -> None:
    clip = folder / "own.mp4"
    clip.write_bytes(clips().read_bytes())
    run([ask(clip, id="a"), ask(clip, "Where?", id="b")])
    assert (
        run([ask(clip, id="a"), ask(clip, "Who?", id="b")])[1] == "2 jobs: 1 done, 0 failed, 1 done before\n"
    )
    assert run([ask(clip, id="a")], "--fps", "1")[1] == "1 job: 1 done, 0 failed\n"
    assert run([ask(clip, id="a", options={"fps": 1})])[1] == "1 job: 0 done, 0 failed, 1 done before\n"
    clip.write_bytes(clips("other.mp4", 26).read_bytes())
    assert run([ask(clip, id="a")])[1] == "1 job: 1 done, 0 failed\n"


def test_a_renamed_file_is_the_same_work(
    run: Callable[..., tuple[int, str, str]], folder: Path, clip: Path, prefills: list[str]
) -> None:
    copy = folder / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    code, out, _ = run([ask(clip, id="first"), ask(copy, id="second"), ask(clip, id="third")], "--json")
    summary = json.loads(out)
    assert (code, summary["schema"], summary["done"], summary["copied"]) == (0, "keye.batch_run/1", 3, 2)
    assert len(prefills) == 1
    first, second, third = read_records(Path("out.jsonl"))
    assert (second["copy_of"], third["copy_of"]) == ("first", "first")
    assert first["results"] == second["results"] == third["results"]


def test_questions_about_a_clip_share_its_prefill_and_keep_their_order(
    run: Callable[..., tuple[int, str, str]], clips: Callable[..., Path], prefills: list[str]
) -> None:
    a, b = clips("a.mp4", 26), clips("b.mp4", 38)
    jobs = [
        ask(clip, f"What is {number}?", id=f"{clip.stem}{number}") for number in range(3) for clip in (a, b)
    ]
    assert run(jobs)[0] == 0
    assert prefills == ["a", "b"]
    records = read_records(Path("out.jsonl"))
    assert [record["id"] for record in records] == [job["id"] for job in jobs]
    assert [record["shared_with"] for record in records] == [None, None, "a0", "b0", "a0", "b0"]
    assert not Path("out.jsonl.early").exists()
    Path("out.jsonl").unlink()
    assert run(jobs, "--unordered")[0] == 0
    assert [record["id"] for record in read_records(Path("out.jsonl"))] == [
        "a0",
        "a1",
        "a2",
        "b0",
        "b1",
        "b2",
    ]


def test_other_frames_are_another_prefill(
    run: Callable[..., tuple[int, str, str]], clip: Path, prefills: list[str]
) -> None:
    run([ask(clip), ask(clip, options={"max_frames": 2}), ask(clip, options={"temperature": 0.5})])
    assert len(prefills) == 2


def test_a_broken_file_fails_its_own_job_only(
    run: Callable[..., tuple[int, str, str]], clip: Path, broken: Path
) -> None:
    jobs = [
        ask(broken, id="bad"),
        ask("gone.mp4", id="gone"),
        ask(clip, "<|im_end|>", id="odd"),
        ask(clip, id="good"),
    ]
    code, out, err = run(jobs)
    assert (code, out) == (1, "4 jobs: 1 done, 3 failed\n")
    assert err.splitlines()[1] == "keye: warning: gone failed: gone.mp4 does not exist; check the path"
    records = read_records(Path("out.jsonl"))
    assert [(r["id"], r["status"]) for r in records] == [
        ("bad", "failed"), ("gone", "failed"), ("odd", "failed"), ("good", "done"),
    ]  # fmt: skip
    assert [record["error"] and record["error"]["code"] for record in records] == [3, 3, 2, None]
    assert records[1]["error"] == {
        "code": 3, "kind": "InputError", "message": "gone.mp4 does not exist; check the path",
    }  # fmt: skip
    assert records[0]["results"] == []
    assert run(jobs)[:2] == (1, "4 jobs: 0 done, 0 failed, 1 done before, 3 failed before\n")


def test_the_same_broken_content_under_two_names_fails_twice(
    run: Callable[..., tuple[int, str, str]], folder: Path, broken: Path, clip: Path
) -> None:
    other = folder / "other.mp4"
    other.write_bytes(broken.read_bytes())
    jobs = [ask(broken, id="bad"), ask(broken, id="same"), ask(other, id="other"), ask(clip, id="good")]
    assert run(jobs)[:2] == (1, "4 jobs: 1 done, 3 failed\n")
    told = [
        (r["copy_of"], Path((r["error"] or {"message": "."})["message"].split()[0]).name)
        for r in read_records(Path("out.jsonl"))
    ]
    assert told == [(None, "broken.mp4"), ("bad", "broken.mp4"), (None, "other.mp4"), (None, "")]


def test_damage_is_told_by_every_job_that_saw_it_and_by_no_other(
    run: Callable[..., tuple[int, str, str]], clips: Callable[..., Path], clip: Path, folder: Path
) -> None:
    cut = folder / "cut.mkv"
    whole = clips("whole.mkv", 51).read_bytes()
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    jobs = [ask(clip, id="a"), ask(cut, id="b"), ask(cut, "Who?", id="c"), ask(clip, "Who?", id="d")]
    assert run(jobs)[:2] == (0, "4 jobs: 4 done, 0 failed\n")
    told = [[text for text in r["warnings"] if "cut off: " in text] for r in read_records(Path("out.jsonl"))]
    assert [len(texts) for texts in told] == [0, 1, 1, 0]
    assert told[1] == told[2]


def test_a_fault_of_keye_fails_its_own_job_only(
    run: Callable[..., tuple[int, str, str]], clips: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(decode: Decode) -> Decode:
        def call(info: Any, *arguments: Any, **options: Any) -> Any:
            if info.path.stem == "a":
                raise ZeroDivisionError("by nothing")
            return decode(info, *arguments, **options)

        return call

    replace_decoding(monkeypatch, faulty)
    code, out, err = run([ask(clips("a.mp4", 26), id="a"), ask(clips("b.mp4", 38), id="b")], "--debug")
    assert (code, out) == (1, "2 jobs: 1 done, 1 failed\n")
    assert "Traceback" in err
    assert read_records(Path("out.jsonl"))[0]["error"] == {
        "code": 1, "kind": "ZeroDivisionError", "message": "ZeroDivisionError (by nothing)",
    }  # fmt: skip


def test_retry_failed(run: Callable[..., tuple[int, str, str]], folder: Path, clip: Path) -> None:
    late = folder / "late.mp4"
    late.write_bytes(b"")
    jobs = [ask(late, id="late", options={"strict": True}), ask(clip, id="b")]
    assert run(jobs)[0] == 1
    assert run(jobs, "--retry-failed")[1] == "2 jobs: 0 done, 1 failed, 1 done before\n"
    late.write_bytes(clip.read_bytes())
    assert run(jobs)[:2] == (0, "2 jobs: 1 done, 0 failed, 1 done before\n")
    assert [(r["id"], r["status"]) for r in read_records(Path("out.jsonl"))] == [
        ("late", "failed"), ("b", "done"), ("late", "failed"), ("late", "done"),
    ]  # fmt: skip


def test_fail_fast_and_limit(run: Callable[..., tuple[int, str, str]], clip: Path, broken: Path) -> None:
    jobs = [ask(clip, id="a"), ask(broken, id="b")]
    jobs += [ask(clip, id=id, options={"max_frames": frames}) for id, frames in (("c", 2), ("d", 3))]
    assert run(jobs, "--limit", "1")[:2] == (0, "4 jobs: 1 done, 0 failed, 3 left\n")
    assert run(jobs, "--fail-fast")[:2] == (1, "4 jobs: 0 done, 1 failed, 1 done before, 2 left\n")
    assert run(jobs, "--limit", "1")[:2] == (
        1,
        "4 jobs: 1 done, 0 failed, 1 done before, 1 failed before, 1 left\n",
    )
    assert run(jobs)[:2] == (1, "4 jobs: 1 done, 0 failed, 2 done before, 1 failed before\n")
    assert [record["id"] for record in read_records(Path("out.jsonl"))] == ["a", "b", "c", "d"]


def test_what_came_early_waits_for_the_next_run(
    run: Callable[..., tuple[int, str, str]], clip: Path, broken: Path, prefills: list[str]
) -> None:
    jobs = [ask(clip, id="a"), ask(broken, id="b"), ask(clip, "Where?", id="c")]
    code, out, err = run(jobs, "--fail-fast")
    assert (code, out) == (1, "3 jobs: 2 done, 1 failed\n")
    assert [record["id"] for record in read_records(Path("out.jsonl"))] == ["a", "b", "c"]
    assert err.count("\n") == 1

    Path("out.jsonl").unlink()
    jobs.insert(1, ask(broken, id="other", options={"strict": True}))
    jobs.insert(3, ask(clip, "Why?", id="late", options={"max_frames": 2}))
    code, out, err = run(jobs, "--fail-fast")
    assert out == "5 jobs: 2 done, 1 failed, 2 left\n"
    waits = "1 line waits in out.jsonl.early for jobs before them: the next run puts them in their place"
    assert err.splitlines()[-1] == f"keye: {waits}"
    prefills.clear()
    assert run(jobs)[1] == "5 jobs: 1 done, 1 failed, 2 done before, 1 failed before\n"
    assert len(prefills) == 1  # "late" alone
    assert [r["id"] for r in read_records(Path("out.jsonl"))] == ["a", "other", "b", "late", "c"]
    assert not Path("out.jsonl.early").exists()


def test_a_job_that_takes_too_long(
    run: Callable[..., tuple[int, str, str]], clips: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(decode: Decode) -> Decode:
        def call(info: Any, *arguments: Any, **options: Any) -> Any:
            if info.path.stem == "a":
                time.sleep(60)
            return decode(info, *arguments, **options)

        return call

    replace_decoding(monkeypatch, slow)
    jobs = [ask(clips("a.mp4", 26), id="a"), ask(clips("b.mp4", 38), id="b")]
    code, out, _ = run(jobs, "--timeout", "2")
    assert (code, out) == (1, "2 jobs: 1 done, 1 failed\n")
    assert read_records(Path("out.jsonl"))[0]["error"] == {
        "code": 1, "kind": "JobTimeout", "message": "the job took longer than the 2 s that --timeout allows",
    }  # fmt: skip


def test_an_archive_is_shared_by_outputs(
    run: Callable[..., tuple[int, str, str]], keye: Keye, clip: Path
) -> None:
    run([ask(clip, id="a")], "--archive", "all.txt")
    (Path("all.txt")).write_bytes(
        Path("all.txt").read_bytes() + b"0123abc"
    )  # a process was killed while writing
    jobs = [ask(clip, id="a"), ask(clip, "Who?", id="b")]
    Path("more.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    code, out, _ = keye("batch", "more.jsonl", "-o", "more.out.jsonl", "--archive", "all.txt", *FEW)
    assert (code, out) == (0, "2 jobs: 1 done, 0 failed, 1 in the archive\n")
    keys = [read_records(Path(name))[0]["key"] for name in ("out.jsonl", "more.out.jsonl")]
    assert Path("all.txt").read_text().split() == keys


def test_shards_are_all_the_jobs_once(
    run: Callable[..., tuple[int, str, str]], clips: Callable[..., Path]
) -> None:
    jobs = [ask(clips(f"{name}.mp4", 26), f"{n}?", id=f"{name}{n}") for name in "abc" for n in range(2)]
    seen = []
    for share in ("1/2", "2/2"):
        assert run(jobs, "--shard", share)[0] == 0
        seen.append([record["id"] for record in read_records(Path("out.jsonl"))])
        Path("out.jsonl").unlink()
    assert seen == [["a0", "a1", "c0", "c1"], ["b0", "b1"]]


def test_progress_for_machines(run: Callable[..., tuple[int, str, str]], clip: Path, broken: Path) -> None:
    _, _, err = run([ask(clip, id="a"), ask(broken, id="b")], "--progress", "json", "-q")
    lines = [json.loads(line) for line in err.splitlines()]
    assert [
        (line["schema"], line["id"], line["status"], line["done"], line["failed"], line["left"])
        for line in lines
    ] == [
        ("keye.progress/1", "a", "done", 1, 0, 1),
        ("keye.progress/1", "b", "failed", 1, 1, 0),
    ]


def test_warnings_are_kept(run: Callable[..., tuple[int, str, str]], clip: Path) -> None:
    _, _, err = run([ask(clip, id="a")], "-v")
    assert "keye: a: the answer was cut off after 6 tokens; raise --max-tokens" in err.splitlines()
    (record,) = read_records(Path("out.jsonl"))
    assert record["warnings"] == ["the answer was cut off after 6 tokens; raise --max-tokens"]


def test_jobs_from_stdin(keye: Keye, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(ask(clip)).encode() + b"\n\n")))
    assert keye("batch", "-", "-o", "out.jsonl", *FEW)[:2] == (0, "1 job: 1 done, 0 failed\n")


def test_a_manifest_is_repeated(
    run: Callable[..., tuple[int, str, str]],
    keye: Keye,
    clip: Path,
    broken: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [
        ask(clip, id="a"),
        {"id": "g", "task": "ground", "inputs": str(clip), "query": "a bar"},
        ask(broken, id="b"),
    ]
    code, _, err = run(jobs, "--manifest", "run.json", "--seed", "4")
    assert code == 1
    assert err.endswith("keye: wrote run.json\n")
    manifest = json.loads(Path("run.json").read_text())
    assert (manifest["schema"], manifest["dtype"], manifest["options"]["seed"]) == (
        "keye.manifest/1",
        "fp32",
        4,
    )
    assert [(entry["id"], entry["status"], entry["seed"]) for entry in manifest["jobs"]] == [
        ("a", "done", 4), ("g", "done", 4), ("b", "failed", None),
    ]  # fmt: skip
    assert (
        manifest["jobs"][0]["inputs"][0]["times_s"]
        == read_records(Path("out.jsonl"))[0]["results"][0]["inputs"][0]["times_s"]
    )

    again = ("batch", "--from-manifest", "run.json", "-o")
    assert keye(*again, "again.jsonl")[:2] == (1, "3 jobs: 2 done, 1 failed, 0 not as in the manifest\n")
    monkeypatch.setattr(Answer, "to_dict", _reworded(Answer.to_dict))
    code, out, err = keye(*again, "other.jsonl")
    assert (code, out) == (1, "3 jobs: 2 done, 1 failed, 1 not as in the manifest\n")
    assert err.endswith("keye: a: the answer is another one\n")


def _reworded(to_dict: Callable[[Answer], dict[str, Any]]) -> Callable[[Answer], dict[str, Any]]:
    return lambda answer: {**to_dict(answer), "text": "something else"}


def test_two_processes_do_not_share_an_output(run: Callable[..., tuple[int, str, str]], clip: Path) -> None:
    run([ask(clip)])
    with Path("out.jsonl").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run([ask(clip)]) == (
            2, "", "keye: another keye batch is writing out.jsonl: wait for it, or give another file with -o\n",
        )  # fmt: skip


def test_a_line_that_is_torn_anywhere_is_done_again(
    run: Callable[..., tuple[int, str, str]], clip: Path
) -> None:
    jobs = [ask(clip, id="a"), ask(clip, "Who?", id="b")]
    run(jobs)
    whole = Path("out.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, first + 17, (first + len(whole)) // 2, len(whole) - 1):
        Path("out.jsonl").write_bytes(whole[:end])
        code, out, err = run(jobs)
        assert (code, out) == (0, "2 jobs: 1 done, 0 failed, 1 done before\n")
        assert "a line that was not finished" in err
        assert [record["id"] for record in read_records(Path("out.jsonl"))] == ["a", "b"]


def test_a_full_disk_stops_the_run_and_loses_nothing(
    run: Callable[..., tuple[int, str, str]], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyecli.batch import ledger

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, data: Any) -> int:
            if os.fstat(descriptor).st_size:
                raise OSError(28, "No space left on device")
            return os.write(descriptor, data)

    jobs = [ask(clip, id="a"), ask(clip, "Who?", id="b")]
    monkeypatch.setattr(ledger, "os", Full())
    code, out, err = run(jobs)
    assert (code, out) == (1, "")
    sentence = "cannot write out.jsonl: No space left on device; what is done stands there, make room and start again"
    assert err == f"keye: {sentence}\n"
    monkeypatch.setattr(ledger, "os", os)
    assert run(jobs)[1] == "2 jobs: 1 done, 0 failed, 1 done before\n"


def test_interrupted(clips: Callable[..., Path], isolated: dict[str, str], folder: Path, model: Path) -> None:
    # Not the same frames, or those of the first would be there already.
    movies = {"a": clips("a.mp4", 26), "b": clips("b.mp4", 38)}
    Path("jobs.jsonl").write_text("".join(json.dumps(ask(clip, id=n)) + "\n" for n, clip in movies.items()))
    code = (
        "import time\nfrom tests.batch.conftest import DECODING\n"
        "def slow(decode):\n"
        "    def call(info, *arguments, **options):\n"
        "        if info.path.stem == 'b':\n            print('slow', flush=True)\n            time.sleep(60)\n"
        "        return decode(info, *arguments, **options)\n"
        "    return call\n"
        "for module in DECODING:\n    module.decode_frames = slow(module.decode_frames)\n"
        "from keyecli.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", code, "batch", "jobs.jsonl", "-o", "out.jsonl", "-m", str(model), *FEW]
    process = subprocess.Popen(
        command,
        env=isolated,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "slow\n"
    while not Path("out.jsonl").exists() or not Path("out.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (130, "", "keye: interrupted\n")
    assert [record["id"] for record in read_records(Path("out.jsonl"))] == ["a"]


@pytest.mark.parametrize("ray", [["--ray"], ["--ray", "auto"], ["--ray=auto"], ["--ray", "--workers", "2"]])
def test_ray_that_is_not_installed(
    run: Callable[..., tuple[int, str, str]], clip: Path, monkeypatch: pytest.MonkeyPatch, ray: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    sentence = "--ray needs the package ray: pip install 'keyecli[ray]'"
    assert run([ask(clip)], *ray) == (2, "", f"keye: {sentence}\n")
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either a file of jobs or --from-manifest, as in `keye batch jobs.jsonl -o out.jsonl`"),
        (
            ["jobs.jsonl"],
            "the output is the ledger too, so it is a file: name it with -o, as in `keye batch jobs.jsonl -o out.jsonl`",
        ),
        (["jobs.jsonl", "-o", "jobs.jsonl"], "jobs.jsonl holds the jobs: name another file for the output with -o"),
        (["none.jsonl", "-o", "o"], "the jobs in none.jsonl cannot be read: No such file or directory"),
        (["jobs.jsonl", "-o", "notes.txt"], "notes.txt was not written by keye batch: name another file"),
        (["jobs.jsonl", "-o", "lines.txt"], "line 1 of lines.txt was not written by keye batch: name another file"),
        (["jobs.jsonl", "-o", "o", "--archive", "notes.txt"],
         "notes.txt is no archive of keye batch: give another file with --archive"),
        (["jobs.jsonl", "-o", "o", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["jobs.jsonl", "-o", "o", "--timeout", "0"], "--timeout must be above 0 and at most 10000000 s, not 0"),
        (["jobs.jsonl", "-o", "o", "--workers", "0"], "--workers must be at least 1, not 0"),
        (["--ray", "jobs.jsonl", "-o", "o"],
         "--ray jobs.jsonl is neither auto nor host:port: name the cluster behind --ray, or write --ray last"),
        (["jobs.jsonl", "-o", "o", "--ray", "cluster"],
         "--ray cluster is neither auto nor host:port: name the cluster behind --ray, or write --ray last"),
        (["jobs.jsonl", "-o", "o", "--ray", "ray://here:10001"],
         "--ray ray://here:10001 is neither auto nor host:port: name the cluster behind --ray, or write --ray last"),
        (["jobs.jsonl", "-o", "o", "--shard", "3/2"], "--shard is '3/2', but it must be one share of all, as in 2/8"),
        (["jobs.jsonl", "-o", "o", "--progress", "loud"], "--progress must be bar, json or none, not loud"),
        (["--from-manifest", "jobs.jsonl", "-o", "o"], "jobs.jsonl is no manifest of keye batch"),
    ],
)  # fmt: skip
def test_wrong_usage(keye: Keye, arguments: list[str], sentence: str) -> None:
    Path("jobs.jsonl").write_text('{"task": "summarize", "inputs": "clip.mp4"}\n')
    Path("notes.txt").write_text("milk")
    Path("lines.txt").write_text("milk\neggs\n")
    assert keye("batch", *arguments) == (2, "", f"keye: {sentence}\n")
    assert Path("notes.txt").read_text() == "milk"
