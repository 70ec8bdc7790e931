"""Jobs an hour of `keye batch` on forged clips, beside a shell loop of `keye ask`; and what the ledger and many jobs cost."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KEYE = str(Path(sys.executable).with_name("keye"))


def forge(folder: Path, clips: int) -> list[dict[str, Any]]:
    """Jobs about forged clips of 3 to 12 seconds: every question of each that has a short answer."""
    from keyecli.forge import SceneOptions, write_dataset

    write_dataset(folder, clips, 7, SceneOptions(3.0, 12.0))
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    return [
        {
            "id": row["id"],
            "task": "ask",
            "inputs": str(folder / row["videos"][0]),
            "question": row["question"],
        }
        for row in rows
        if row["task"] != "summary"
    ]


def run_batch(jobs: list[dict[str, Any]], folder: Path, name: str) -> tuple[float, list[dict[str, Any]]]:
    """Wall seconds of the whole command, start included, and what it wrote."""
    path, out = folder / f"{name}.jobs.jsonl", folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    begin = time.perf_counter()
    subprocess.run([KEYE, "batch", str(path), "-o", str(out), "-q"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin, [json.loads(line) for line in out.read_text().splitlines()]


def run_loop(jobs: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """Wall seconds and the answers of a command for each job."""
    begin, answers = time.perf_counter(), []
    for job in jobs:
        command = [KEYE, "ask", job["inputs"], job["question"], "-q", "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        answers.append(json.loads(done.stdout)["text"])
    return time.perf_counter() - begin, answers


def measure_ledger(records: list[dict[str, Any]], folder: Path) -> float:
    """Seconds that writing these records took, each synced."""
    from keyecli.batch.ledger import Ledger

    ledger = Ledger(folder / "ledger.jsonl")
    begin = time.perf_counter()
    for place, record in enumerate(records):
        ledger.put(place, {name: value for name, value in record.items() if name != "schema"})
    elapsed_s = time.perf_counter() - begin
    ledger.close()
    return elapsed_s


def peak_mib(jobs: list[dict[str, Any]], folder: Path, count: int) -> float:
    """Peak memory of a batch of `count` jobs about one clip after the other, in a process of its own."""
    many = [
        {
            **jobs[number % len(jobs)],
            "id": str(number),
            "options": {"seed": number, "max_tokens": 4, "think": False},
        }
        for number in range(count)
    ]
    path = folder / f"many{count}.jsonl"
    path.write_text("".join(json.dumps(job) + "\n" for job in many))
    command = [KEYE, "batch", str(path), "-o", str(folder / f"many{count}.out.jsonl"), "-q"]
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    return int(done.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument(
        "--loop", type=int, default=10, help="jobs of the loop, from which all are worked out"
    )
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[], help="numbers of jobs to measure memory over"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = forge(folder / "clips", arguments.clips)
        step = max(1, len(jobs) // arguments.loop)
        sample = jobs[::step][: arguments.loop]
        batch_s, records = run_batch(jobs, folder, "all")
        first_of_each = list({job["inputs"]: job for job in jobs}.values())
        single_s, _ = run_batch(first_of_each, folder, "single")
        loop_s, answers = run_loop(sample)
        by_id = {record["id"]: record for record in records}
        same = sum(
            by_id[job["id"]]["results"][0]["text"] == answer
            for job, answer in zip(sample, answers, strict=True)
        )
        rates = [
            3600 * len(jobs) / batch_s,
            3600 * len(first_of_each) / single_s,
            3600 * len(sample) / loop_s,
        ]
        print(f"{arguments.clips} clips, {len(jobs)} questions")
        print(
            f"keye batch, all questions     {batch_s:8.1f} s {rates[0]:8.0f} jobs an hour  {rates[0] / rates[2]:5.1f}x"
        )
        print(
            f"keye batch, one of each clip  {single_s:8.1f} s {rates[1]:8.0f} jobs an hour  {rates[1] / rates[2]:5.1f}x"
        )
        print(f"keye ask, {len(sample)} of them{'':9} {loop_s:8.1f} s {rates[2]:8.0f} jobs an hour")
        print(f"answers of both alike: {same} of {len(sample)}")
        ledger_s, work_s = measure_ledger(records, folder), sum(record["seconds"] for record in records)
        print(f"ledger: {1000 * ledger_s / len(records):.2f} ms a job, {ledger_s / work_s:.2%} of the work")
        for count in arguments.memory:
            print(f"peak memory over {count} jobs: {peak_mib(jobs, folder, count):.0f} MiB")


if __name__ == "__main__":
    main()
