"""`keye batch`: many jobs with one model, into an output that is its own ledger."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.ask import NANO_NOTICE
from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import (
    ANSWER,
    FRAMES,
    MODEL,
    OUTPUT,
    ask_options,
    load_arguments,
    with_settings,
)
from keyecli.console import console
from keyecli.errors import ExitCode, UsageError
from keyecli.settings import Settings

if TYPE_CHECKING:
    from keyecli.batch.hosts import Host
    from keyecli.batch.jobs import Job
    from keyecli.batch.ledger import Ledger
    from keyecli.batch.manifest import Manifest
    from keyecli.batch.run import Batch, Tally
    from keyecli.engine.loaded import ModelFiles
    from keyecli.session import Keye

EXAMPLE = "keye batch jobs.jsonl -o out.jsonl"
PROGRESS_KINDS = ("bar", "json", "none")
LONGEST_TIMEOUT_S = 10_000_000
RAY_ADDRESS = re.compile(r"auto|local|[^\s/:]+:\d+|\[[0-9a-fA-F:]+\]:\d+")


def _option(panel: str, *names: str, metavar: str | None = None, help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)


def _without(group: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != name}


@with_settings(MODEL, FRAMES, _without(ANSWER, "show_thinking"), _without(OUTPUT, "progress"))
def batch(
    jobs: Annotated[
        str | None,
        typer.Argument(metavar="JOBS", help="A file with a JSON object a line for each job; - reads stdin."),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            "Output", "--output", "-o", metavar="FILE", help="A line a job goes here; it is the ledger too."
        ),
    ] = None,
    retry_failed: Annotated[
        bool, _option("Jobs", "--retry-failed", help="Do again what failed in an earlier run.")
    ] = False,
    fail_fast: Annotated[bool, _option("Jobs", "--fail-fast", help="Stop at the first failure.")] = False,
    limit: Annotated[
        int | None, _option("Jobs", "--limit", metavar="N", help="Begin at most N jobs this time.")
    ] = None,
    timeout: Annotated[
        float | None, _option("Jobs", "--timeout", metavar="S", help="A job that takes longer has failed.")
    ] = None,
    archive: Annotated[
        Path | None,
        _option(
            "Jobs",
            "--archive",
            metavar="FILE",
            help="Leave out what this file lists, and add what is done; several outputs may share it.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        _option("Jobs", "--shard", metavar="I/N", help="Only the I-th of N shares, balanced by duration."),
    ] = None,
    workers: Annotated[
        int | None,
        _option("Jobs", "--workers", metavar="N", help="So many processes, one a GPU. Default: 1."),
    ] = None,
    ray: Annotated[
        str | None,
        _option(
            "Jobs",
            "--ray",
            metavar="[ADDRESS]",
            help="Workers on a Ray cluster: auto, host:port, or one started here. Default: all its GPUs.",
        ),
    ] = None,
    unordered: Annotated[
        bool, _option("Output", "--unordered", help="Write lines as they come, not in the jobs' order.")
    ] = False,
    manifest: Annotated[
        Path | None,
        _option("Output", "--manifest", metavar="FILE", help="Write down all that is needed to repeat this."),
    ] = None,
    from_manifest: Annotated[
        Path | None,
        _option(
            "Jobs", "--from-manifest", metavar="FILE", help="Do the jobs of a manifest again and compare."
        ),
    ] = None,
    progress: Annotated[
        str | None,
        _option("Output", "--progress", metavar="KIND", help="bar, json (a line a job on stderr) or none."),
    ] = None,
    no_progress: Annotated[bool, _option("Output", "--no-progress", help="As --progress none.")] = False,
    *,
    settings: Settings,
) -> None:
    """Do many jobs with one model: questions, searches, summaries.

    A job is a line such as {"task": "ask", "inputs": "clip.mp4", "question": "What happens?"}; the tasks are ask, ground
    ("query" or "queries") and summarize, and "options" holds options by their Python names, over those given here. Each
    job's result or failure is one line of the output, on the disk before the next begins: started again, however it was
    stopped, the same command goes on where it was.
    """
    _set_progress(settings, progress, no_progress)
    address = None if ray is None else _ray_address(ray)
    if (jobs is None) == (from_manifest is None):
        raise UsageError(f"give either a file of jobs or --from-manifest, as in `{EXAMPLE}`")
    if output is None or str(output) == "-":
        raise UsageError(f"the output is the ledger too, so it is a file: name it with -o, as in `{EXAMPLE}`")
    _check_numbers(limit, timeout, workers)
    from keyecli.batch.shard import Shard

    share = None if shard is None else Shard.parse(shard)
    listed = [] if jobs is None else _read_jobs(jobs, output)

    with leaving_at_once():
        from keyecli.batch.manifest import read_manifest
        from keyecli.batch.run import Batch, BatchSettings

    load = load_arguments(settings)
    defaults = ask_options(settings, start=None, end=None, duration=None, subtitles=None)
    repeated = None
    if from_manifest is not None:
        repeated = read_manifest(from_manifest)
        listed, defaults = repeated.jobs, dict(repeated.options)
        load = _model_of(repeated, load)
    chosen = BatchSettings(
        retry_failed=retry_failed,
        fail_fast=fail_fast,
        limit=limit,
        timeout_s=timeout,
        ordered=not unordered,
        shard=share,
        debug=settings.debug,
    )
    with ExitStack() as opened:
        crew = opened.enter_context(_crew(address, workers, load, verbose=settings.verbose))
        run = opened.enter_context(Batch(listed, crew.files, output, defaults, chosen, archive=archive))
        if run.ledger.cut_bytes:
            console.notice(
                f"{output} ended in a line that was not finished, which is cut off: its job is done again"
            )
        tally, machines = _run(run, crew, as_json=progress == "json")
        if tally.waiting:
            lines = "1 line waits" if tally.waiting == 1 else f"{tally.waiting} lines wait"
            console.notice(
                f"{lines} in {output}.early for jobs before them: the next run puts them in their place"
            )
        keys = run.keys()
        if manifest is not None:
            from keyecli.batch.manifest import write_manifest

            write_manifest(
                manifest,
                run.ledger,
                keys,
                crew.files,
                revision=settings.revision,
                defaults=run.defaults,
                workers=machines,
            )
            console.notice(f"wrote {manifest}")
        different = 0 if repeated is None else _compare(repeated, run.ledger, keys, crew.files)
    _print(tally, different, repeated is not None, as_json=settings.json)
    if tally.failed or tally.failed_before or different:
        raise typer.Exit(ExitCode.FAILURE)


@dataclass(frozen=True)
class _Crew:
    """Who answers: with `find_host` workers of that host, else this process. load: what either loads; files: the same."""

    files: ModelFiles
    load: Mapping[str, Any]
    find_host: Callable[[], Host[Any]] | None


@contextmanager
def _crew(
    address: str | None, workers: int | None, load: Mapping[str, Any], *, verbose: bool
) -> Iterator[_Crew]:
    """For the time of a run; `address` is a Ray cluster's."""
    if address is None:
        from keyecli.batch.processes import ProcessHost, devices_of
        from keyecli.engine.loaded import open_model

        files = open_model(**_of_files(load))
        count = workers or 1
        yield _Crew(
            files, load, None if count == 1 else lambda: ProcessHost(devices_of(load["device"], count))
        )
        return
    from keyecli.batch.ray_workers import RayHost, cluster, open_model_for, share_of_cluster

    with cluster(address, verbose=verbose):
        share = share_of_cluster(load["device"], workers)
        files = open_model_for(share, _of_files(load))
        console.detail(
            f"workers on the Ray cluster: {share.workers}, each with "
            + ("a GPU" if share.device == "cuda" else f"CPU cores: {share.cpus}")
        )
        # Every machine computes as the keys of the jobs say.
        alike = {**load, "dtype": files.dtype, "kernels": files.kernels}
        yield _Crew(files, alike, lambda: RayHost(share))


def _of_files(load: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `keyecli.load` takes, what is about the model's files."""
    from keyecli.engine.loaded import open_model

    return {name: load[name] for name in signature(open_model).parameters if name in load}


def _run(run: Batch, crew: _Crew, *, as_json: bool) -> tuple[Tally, list[Mapping[str, Any]]]:
    """Do the jobs, showing how far they are; also the machines of the workers, each kind once."""
    begin = time.perf_counter()
    nano_said = False

    def say_nano(is_nano: bool) -> None:
        nonlocal nano_said
        if is_nano and not nano_said:
            console.notice(NANO_NOTICE)
        nano_said = nano_said or is_nano

    machines: list[Mapping[str, Any]] = []

    def on_ready(told: Mapping[str, Any]) -> None:
        say_nano(told["is_nano"])
        if told["machine"] not in machines:
            machines.append(told["machine"])

    with console.progress() as on_progress:

        def load_model() -> Keye:
            from keyecli import session

            keye = session.load(**crew.load, on_progress=on_progress)
            say_nano(keye.is_nano)
            return keye

        def on_record(record: Mapping[str, Any], tally: Tally) -> None:
            _tell(record)
            if as_json:
                _print_progress(record, tally, time.perf_counter() - begin)
            failed = f", {tally.failed} failed" if tally.failed else ""
            on_progress(f"{tally.settled} of {tally.total} jobs{failed}", tally.settled, tally.total)

        on_progress("starting", 0, run.tally.total)
        tally = run.run(
            load_model,
            crew.load,
            find_host=crew.find_host,
            on_record=on_record,
            on_ready=on_ready,
        )
    console.detail(f"{tally.done + tally.failed} jobs in {time.perf_counter() - begin:.1f} s")
    return tally, machines


def _tell(record: Mapping[str, Any]) -> None:
    for text in record["warnings"]:
        console.detail(f"{record['id']}: {text}")
    if record["error"] is None:
        console.detail(f"{record['id']}: done in {record['seconds']:.2f} s")
    else:
        console.warning(f"{record['id']} failed: {record['error']['message']}")


def _print_progress(record: Mapping[str, Any], tally: Tally, elapsed_s: float) -> None:
    made = tally.done + tally.failed
    line = {
        "schema": "keye.progress/1",
        "id": record["id"],
        "status": record["status"],
        "seconds": record["seconds"],
        **tally.to_dict(),
        "elapsed_s": round(elapsed_s, 3),
        "remaining_s": round(elapsed_s / made * tally.left, 3),
    }
    sys.stderr.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stderr.flush()


def _set_progress(settings: Settings, kind: str | None, no_progress: bool) -> None:
    if kind is not None and kind not in PROGRESS_KINDS:
        raise UsageError(
            f"--progress must be {', '.join(PROGRESS_KINDS[:-1])} or {PROGRESS_KINDS[-1]}, not {kind}"
        )
    if no_progress or kind in ("json", "none"):
        console.configure(
            quiet=settings.quiet, verbose=settings.verbose, progress=False, debug=settings.debug
        )


def _ray_address(given: str) -> str:
    """Where the cluster is; "" is `--ray` alone. UsageError for what cannot be an address."""
    if given and not RAY_ADDRESS.fullmatch(given):
        raise UsageError(
            f"--ray {given} is neither auto nor host:port: name the cluster behind --ray, or write --ray last"
        )
    return given or "local"


def _check_numbers(limit: int | None, timeout: float | None, workers: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}")
    if timeout is not None and not 0 < timeout <= LONGEST_TIMEOUT_S:
        raise UsageError(f"--timeout must be above 0 and at most {LONGEST_TIMEOUT_S} s, not {timeout:g}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")


def _read_jobs(source: str, output: Path) -> list[Job]:
    from keyecli.batch.jobs import read_jobs

    if source == "-":
        if sys.stdin.isatty():
            console.notice("type one job a line, then Ctrl-D")
        return read_jobs(sys.stdin.buffer.read(), "stdin")
    path = Path(source)
    try:
        if path.exists() and output.exists() and path.samefile(output):
            raise UsageError(f"{source} holds the jobs: name another file for the output with -o")
        return read_jobs(path.read_bytes(), source)
    except OSError as error:
        raise UsageError(f"the jobs in {source} cannot be read: {error.strerror}") from error


def _model_of(manifest: Manifest, load: Mapping[str, Any]) -> dict[str, Any]:
    """What to load: what is given now, else what the manifest names."""
    from keyecli.engine.loaded import NANO_NAME

    name = manifest.model["name"]
    model = load["model"] or (None if name == NANO_NAME else name)
    as_then = {name: load[name] or getattr(manifest, name) for name in ("dtype", "quant", "kv", "adapter")}
    return {**load, **as_then, "model": model}


def _compare(manifest: Manifest, ledger: Ledger, keys: list[tuple[Job, str]], files: ModelFiles) -> int:
    """Say what came out otherwise than the manifest has it; how many jobs did."""
    from keyecli.batch.manifest import differences, weights_hash

    if weights_hash(files) != manifest.model["weights_sha256"]:
        console.warning("the weights are not those of the manifest")
    records = (ledger.record_of(job.id, key) for job, key in keys if (job.id, key) in ledger.entries)
    different = 0
    for id, what in differences(manifest, records):
        console.notice(f"{id}: {what}")
        different += 1
    return different


def _print(tally: Tally, different: int, compared: bool, *, as_json: bool) -> None:
    if as_json:
        compared_count = {"different": different} if compared else {}
        line = {"schema": "keye.batch_run/1", **tally.to_dict(), **compared_count}
        console.result(json.dumps(line))
        return
    parts = [f"{tally.done} done", f"{tally.failed} failed"]
    for count, words in (
        (tally.done_before, "done before"),
        (tally.failed_before, "failed before"),
        (tally.archived, "in the archive"),
        (tally.left, "left"),
    ):
        if count:
            parts.append(f"{count} {words}")
    if compared:
        parts.append(f"{different} not as in the manifest")
    console.result(f"{tally.total} {'job' if tally.total == 1 else 'jobs'}: {', '.join(parts)}")
