"""Jobs about the same frames, answered by a loaded model, together where it can; each one's failure is its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from keyecli.batch.frames import FramesAhead
from keyecli.batch.identity import TaskSettings
from keyecli.batch.jobs import Job
from keyecli.batch.limits import time_limit
from keyecli.batch.questions import SharedQuestions, own_warnings
from keyecli.engine.loaded import ModelFiles
from keyecli.engine.plan import plan_inputs
from keyecli.errors import ExitCode, KeyeError
from keyecli.session import Keye
from keyecli.tasks.ask import AskSettings
from keyecli.tasks.search import GroundSettings
from keyecli.video.source import VideoInfo, probe

Assignment = tuple[Job, TaskSettings]


@dataclass(frozen=True)
class Outcome:
    """What became of a job: `results` of its task as plain data, or `error` as `error_of` gives it.

    started_at: UTC, as ISO 8601 has it. seconds: from the job's beginning to its end, without opening its files.
    shared_with: the id of the job that read the frames which this one uses too.
    """

    started_at: str
    seconds: float
    results: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    shared_with: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class OpenedGroup:
    """Jobs that see the same frames, and their files, or why these cannot be opened."""

    jobs: tuple[Assignment, ...]
    infos: tuple[VideoInfo, ...] = ()
    error: KeyeError | None = None


def open_group(
    jobs: Sequence[Assignment], files: ModelFiles | None = None, frames: FramesAhead | None = None
) -> OpenedGroup:
    """Look into the files of the jobs, which all name the same ones; with `frames`, begin to decode for questions."""
    try:
        group = OpenedGroup(tuple(jobs), tuple(probe(path) for path in jobs[0][0].inputs))
    except KeyeError as error:
        return OpenedGroup(tuple(jobs), error=error)
    settings = jobs[0][1]
    # Where a search or a summary looks is known only when the model is.
    if files is not None and frames is not None and isinstance(settings, AskSettings):
        with suppress(KeyeError):  # it is told when the job's turn comes
            plans = plan_inputs(group.infos, settings.sampling)
            frames.begin(files, plans, exact_resize=settings.sampling.exact_resize, strict=settings.strict)
    return group


def reading_ahead(keye: Keye, frames: FramesAhead) -> Keye:
    """The same model, which takes frames that have been decoded already."""
    return Keye(frames.serve(keye.loaded))


def answer_group(
    keye: Keye,
    group: OpenedGroup,
    *,
    timeout_s: float | None = None,
    on_fault: Callable[[BaseException], None] | None = None,
) -> Iterator[tuple[Job, Outcome]]:
    """The outcome of each job as it is there. `on_fault` gets errors that are keye's own fault, before they are reported.

    KeyeError when a GPU cannot be used any more; the outcome of the job at which that happened has come before.
    """
    asked = [(job.prompt[0], settings) for job, settings in group.jobs if isinstance(settings, AskSettings)]
    # Whoever has a limit of its own must be stopped alone.
    shared = SharedQuestions(keye.loaded, group.infos, asked, together=timeout_s is None)
    reader: str | None = None
    for job, settings in group.jobs:
        started_at, begin = datetime.now(UTC).isoformat(timespec="milliseconds"), time.perf_counter()
        results: list[dict[str, Any]] = []
        error: BaseException | None = None
        with own_warnings() as said:
            try:
                with time_limit(timeout_s):
                    if group.error is not None:
                        raise group.error
                    results = _results(keye, shared, group, job, settings)
            except Exception as failure:  # whatever it is, the other jobs can be done
                error = failure
        if error is not None and not isinstance(error, KeyeError) and on_fault is not None:
            on_fault(error)
        is_question = isinstance(settings, AskSettings) and error is None
        yield (
            job,
            Outcome(
                started_at,
                time.perf_counter() - begin,
                results,
                said,
                None if error is None else error_of(error),
                reader if is_question else None,
            ),
        )
        if error is not None and _has_lost_the_gpu(error):
            raise KeyeError(
                f"the GPU {keye.device} cannot be used any more since {job.id}: start again to go on behind it"
            ) from error
        if is_question and reader is None and shared.is_filled:
            reader = job.id


def error_of(error: BaseException) -> dict[str, Any]:
    """code: the exit code that a command of its own would have had; kind: the name of its class; message: one sentence."""
    if isinstance(error, KeyeError):
        return {"code": int(error.exit_code), "kind": type(error).__name__, "message": str(error)}
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    said = f" ({' '.join(str(error).split())})" if str(error) else ""
    return {
        "code": int(ExitCode.MEMORY if out_of_memory else ExitCode.FAILURE),
        "kind": type(error).__name__,
        "message": f"{type(error).__name__}{said}",
    }


def _results(
    keye: Keye, shared: SharedQuestions, group: OpenedGroup, job: Job, settings: TaskSettings
) -> list[dict[str, Any]]:
    if isinstance(settings, AskSettings):
        return [shared.answer(job.prompt[0], settings).to_dict()]
    (info,) = group.infos
    if isinstance(settings, GroundSettings):
        return [found.to_dict() for found in keye.ground(info, list(job.prompt), settings=settings)]
    return [keye.summarize(info, settings=settings).to_dict()]


def _has_lost_the_gpu(error: BaseException) -> bool:
    """After an error inside a kernel every later call fails too."""
    return type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )
