"""What became of a batch, from its output alone: counts, failures by kind, durations, throughput; also as one HTML file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from keyecli.batch.jobs import TASKS
from keyecli.batch.ledger import parse_record
from keyecli.errors import UsageError
from keyecli.export.text import one_line

if TYPE_CHECKING:
    from jinja2 import Template

BARS = 24  # of the drawing of durations
LEAST_STAGE_S = 0.001  # what took less is left out
_TEMPLATE = "report.html.jinja"
_MODEL_STAGES = ("encode_s", "prefill_s", "generate_s", "refine_s")
_STAGES = ("decode_s", "cache_s", *_MODEL_STAGES, "scenes_s")


@dataclass(frozen=True)
class TaskFigures:
    """The jobs of one task. Seconds are those of a job that was done itself, None where there is none."""

    task: str
    done: int
    failed: int
    mean_s: float | None
    median_s: float | None
    p90_s: float | None
    longest_s: float | None


@dataclass(frozen=True)
class FailedJob:
    """A job that failed: the exit code that it would have had, the kind of its error and its sentence."""

    id: str
    task: str
    code: int
    kind: str
    message: str


@dataclass(frozen=True)
class BatchReport:
    """Everything that is told about one or several outputs.

    copied: done because another job had asked for the same. warned: jobs with warnings. begun_at, ended_at: of the first
    and the last job, None when there is none. busy_s: seconds in which at least one job was being done. footage_s: seconds of
    video that were read for them. stages_s: seconds in each stage, over all jobs. idle_share: of the time of the jobs that were
    done, in which the model had nothing to do, for frames were still to come; None without such jobs. tokens: that the model
    wrote. made_by:
    model, weights, device and version, each combination once. seconds: of each job that was done itself, ascending.
    """

    outputs: tuple[str, ...]
    tasks: tuple[TaskFigures, ...]
    copied: int
    warned: int
    begun_at: str | None
    ended_at: str | None
    busy_s: float
    footage_s: float
    stages_s: dict[str, float]
    idle_share: float | None
    tokens: int
    failures: tuple[FailedJob, ...]
    made_by: tuple[str, ...]
    seconds: tuple[float, ...]

    @property
    def done(self) -> int:
        return sum(task.done for task in self.tasks)

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def jobs(self) -> int:
        return self.done + self.failed

    @property
    def jobs_an_hour(self) -> float | None:
        """Jobs that were done themselves or failed, for each hour in which any was."""
        return (self.jobs - self.copied) / self.busy_s * 3600 if self.busy_s else None

    @property
    def kinds(self) -> list[tuple[str, int, str]]:
        """(kind of error, how often, the sentence of the first), the most frequent first."""
        counts = Counter(failure.kind for failure in self.failures)
        first = {failure.kind: failure.message for failure in reversed(self.failures)}
        return [(kind, count, first[kind]) for kind, count in counts.most_common()]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, schema keye.batch_report/1."""
        return {
            "schema": "keye.batch_report/1",
            "outputs": list(self.outputs),
            "jobs": self.jobs,
            "done": self.done,
            "failed": self.failed,
            "copied": self.copied,
            "warned": self.warned,
            "tasks": [asdict(task) for task in self.tasks],
            "failures_by_kind": {kind: count for kind, count, _ in self.kinds},
            "failures": [asdict(failure) for failure in self.failures],
            "begun_at": self.begun_at,
            "ended_at": self.ended_at,
            "busy_s": self.busy_s,
            "jobs_an_hour": self.jobs_an_hour,
            "footage_s": self.footage_s,
            "stages_s": dict(self.stages_s),
            "idle_share": self.idle_share,
            "tokens": self.tokens,
            "made_by": list(self.made_by),
        }


def read_report(paths: Sequence[Path]) -> BatchReport:
    """The report about outputs of keye batch, the last line of each job counting. UsageError: a file that is none.

    An output that is being written may be read: a line that is not finished is left out.
    """
    jobs: dict[tuple[Path, str], _JobFigures] = {}
    for path in paths:
        for record in _records(path):
            jobs[(path, record["id"])] = _JobFigures.of(record)
    figures = list(jobs.values())
    worked = [job for job in figures if not job.copied]
    stages = {stage: sum(job.stages_s.get(stage, 0.0) for job in worked) for stage in _STAGES}
    begun = [job.begun_at for job in worked]
    return BatchReport(
        outputs=tuple(str(path) for path in paths),
        tasks=tuple(
            _task_figures(task, [job for job in figures if job.task == task])
            for task in TASKS
            if any(job.task == task for job in figures)
        ),
        copied=len(figures) - len(worked),
        warned=sum(job.warned for job in figures),
        begun_at=min(begun).isoformat(timespec="milliseconds") if begun else None,
        ended_at=datetime.fromtimestamp(
            max(job.begun_at.timestamp() + job.seconds for job in worked), begun[0].tzinfo
        ).isoformat(timespec="milliseconds")
        if begun
        else None,
        busy_s=_busy_s(worked),
        footage_s=sum(job.footage_s for job in worked),
        stages_s={stage: seconds for stage, seconds in stages.items() if seconds >= LEAST_STAGE_S},
        idle_share=_idle_share(worked),
        tokens=sum(job.tokens for job in worked),
        failures=tuple(job.failure for job in figures if job.failure is not None),
        made_by=tuple(dict.fromkeys(job.made_by for job in figures if job.made_by)),
        seconds=tuple(sorted(job.seconds for job in worked if job.failure is None)),
    )


@dataclass(frozen=True)
class _JobFigures:
    task: str
    begun_at: datetime
    seconds: float
    copied: bool
    warned: bool
    footage_s: float
    stages_s: dict[str, float]
    tokens: int
    made_by: str
    failure: FailedJob | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> _JobFigures:
        results = record["results"]
        error = record["error"]
        # The queries of one search share their timings and their frames.
        first = results[0] if results else None
        return cls(
            task=record["task"],
            begun_at=datetime.fromisoformat(record["started_at"]),
            seconds=record["seconds"],
            copied=record["copy_of"] is not None,
            warned=bool(record["warnings"]),
            footage_s=0.0
            if first is None or record["shared_with"]
            else sum(item["duration_s"] for item in first["inputs"]),
            stages_s={} if first is None else {name: first["timings"].get(name, 0.0) for name in _STAGES},
            tokens=sum(result["completion_tokens"] for result in results),
            made_by=""
            if first is None
            else f"{first['model']} ({first['weights_revision']}) on {first['device']} in {first['dtype']}, "
            f"keye {first['keye_version']}",
            failure=None
            if error is None
            else FailedJob(record["id"], record["task"], error["code"], error["kind"], error["message"]),
        )


def _idle_share(jobs: Sequence[_JobFigures]) -> float | None:
    done = [job for job in jobs if job.failure is None]
    seconds = sum(job.seconds for job in done)
    if not seconds:
        return None
    return max(0.0, 1 - sum(job.stages_s[stage] for job in done for stage in _MODEL_STAGES) / seconds)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield parse_record(line, path, number)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _task_figures(task: str, jobs: Sequence[_JobFigures]) -> TaskFigures:
    seconds = sorted(job.seconds for job in jobs if job.failure is None and not job.copied)
    failed = sum(job.failure is not None for job in jobs)
    return TaskFigures(
        task=task,
        done=len(jobs) - failed,
        failed=failed,
        mean_s=fmean(seconds) if seconds else None,
        median_s=median(seconds) if seconds else None,
        p90_s=seconds[math.ceil(0.9 * len(seconds)) - 1] if seconds else None,
        longest_s=seconds[-1] if seconds else None,
    )


def _busy_s(jobs: Sequence[_JobFigures]) -> float:
    """Length of the union of the jobs' times, so that several at once and pauses between runs count rightly."""
    busy_s, reached = 0.0, -math.inf
    for job in sorted(jobs, key=lambda job: job.begun_at):
        begin = job.begun_at.timestamp()
        end = begin + job.seconds
        busy_s += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy_s


def render_html(report: BatchReport, title: str | None = None, *, generator: str = "keye") -> str:
    """The report as one page that opens offline, without scripts, in light and dark; what is not its own is escaped."""
    heading = one_line(title or ", ".join(Path(output).name for output in report.outputs))
    return _template().render(
        title=heading,
        generator=one_line(generator),
        report=report,
        facts=facts(report),
        made_by=[one_line(text) for text in report.made_by],
        kinds=[(kind, count, one_line(message)) for kind, count, message in report.kinds],
        failures=[
            (one_line(failure.id), failure.task, failure.kind, one_line(failure.message))
            for failure in report.failures
        ],
        bars=_bars(report.seconds),
        longest=duration(report.seconds[-1]) if report.seconds else "",
        rows=[task_row(task) for task in report.tasks],
    )


def facts(report: BatchReport) -> list[tuple[str, str]]:
    """(name, value) of what holds for the whole batch, for a reader."""
    rows = [("jobs", f"{report.jobs:,}"), ("done", f"{report.done:,}"), ("failed", f"{report.failed:,}")]
    if report.copied:
        rows.append(("copied from the same job", f"{report.copied:,}"))
    if report.warned:
        rows.append(("with warnings", f"{report.warned:,}"))
    if report.begun_at is not None and report.ended_at is not None:
        rows += [("begun", report.begun_at), ("ended", report.ended_at), ("busy", duration(report.busy_s))]
    if report.jobs_an_hour is not None:
        rows.append(("jobs an hour", f"{report.jobs_an_hour:,.0f}"))
        rows.append(("footage a second", f"{report.footage_s / report.busy_s:.1f} s"))
        rows.append(("tokens a second", f"{report.tokens / report.busy_s:.1f}"))
    if report.idle_share is not None:
        rows.append(("model idle", f"{report.idle_share:.0%}"))
    for stage, seconds in report.stages_s.items():
        rows.append((stage.removesuffix("_s"), duration(seconds)))
    return rows


def task_row(task: TaskFigures) -> list[str]:
    """One line of the table of tasks."""
    seconds = (task.mean_s, task.median_s, task.p90_s, task.longest_s)
    return [
        task.task,
        f"{task.done:,}",
        f"{task.failed:,}",
        *("" if value is None else duration(value) for value in seconds),
    ]


def duration(seconds: float) -> str:
    """0.42 s, 12.5 s, 3:05, 1:02:03."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bars(seconds: Sequence[float]) -> list[int]:
    """Heights in percent: how many jobs took how long, in equal steps from 0 to the longest."""
    if not seconds or not seconds[-1]:
        return []
    counts = Counter(min(BARS - 1, int(value / seconds[-1] * BARS)) for value in seconds)
    most = max(counts.values())
    return [math.ceil(100 * counts[place] / most) for place in range(BARS)]


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string((files("keyecli.batch") / _TEMPLATE).read_text(encoding="utf-8"))
