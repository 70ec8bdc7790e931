"""What a job is: its settings, the content of its files, and the key under which the same work is found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from keyecli.batch.jobs import OPTIONS, Job
from keyecli.engine.loaded import ModelFiles
from keyecli.errors import UsageError
from keyecli.tasks.ask import AskSettings
from keyecli.tasks.options import ask_settings
from keyecli.tasks.search import GroundSettings, ground_settings
from keyecli.tasks.summarize import SummarySettings, summary_settings

KEY_VERSION = 1  # another one makes every job a new one
# Of the generation, what there was not from the beginning: left as it was then, it changes no key.
LATER_OPTIONS: dict[str, Any] = {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "stop": []}

TaskSettings = AskSettings | GroundSettings | SummarySettings


@dataclass(frozen=True)
class FileIdentity:
    """A file by its content; sha256 is None for one that cannot be read. Size in bytes, time as the file system has it."""

    path: str
    size: int
    modified_ns: int
    sha256: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """A job that is to be done: `files` are its inputs, then its subtitles if it has any."""

    job: Job
    settings: TaskSettings
    files: tuple[FileIdentity, ...]
    key: str


class Fingerprints:
    """Contents of files as hashes. A file whose size and time are those of an earlier hash is not read again."""

    def __init__(self, known: Iterable[Mapping[str, Any]] = ()) -> None:
        """`known`: identities that were written down before, as `FileIdentity.to_dict()` gives them."""
        self._known: dict[str, FileIdentity] = {}
        for item in known:
            if item.get("sha256") is not None:
                identity = FileIdentity(item["path"], item["size"], item["modified_ns"], item["sha256"])
                self._known[identity.path] = identity

    def of(self, path: str) -> FileIdentity:
        """The identity of a file as it is now; one that is missing or cannot be read has no hash, and that is no error."""
        try:
            status = Path(path).stat()
            known = self._known.get(path)
            if known and (known.size, known.modified_ns) == (status.st_size, status.st_mtime_ns):
                return known
            if not Path(path).is_file():  # reading a pipe would take away what is in it
                return FileIdentity(path, status.st_size, status.st_mtime_ns, None)
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError):
            return FileIdentity(path, 0, 0, None)
        identity = FileIdentity(path, status.st_size, status.st_mtime_ns, digest)
        self._known[path] = identity
        return identity


def settings_of(job: Job, files: ModelFiles, defaults: Mapping[str, Any]) -> TaskSettings:
    """The settings of a job: its own options, over `defaults`, over the model's. UsageError that names the job's line."""
    options: dict[str, Any] = {
        **{name: value for name, value in defaults.items() if name in OPTIONS[job.task]},
        **job.options,
    }
    make: Any = {"ask": ask_settings, "ground": ground_settings, "summarize": summary_settings}[job.task]
    try:
        return make(files.preprocessor, **options)
    except UsageError as error:
        raise UsageError(f"{job.where}: {error}") from error


def ask_part(settings: TaskSettings) -> AskSettings:
    """What a task has in common with a question: sampling, generation, subtitles."""
    return settings if isinstance(settings, AskSettings) else settings.ask


def work_of(
    job: Job, settings: TaskSettings, fingerprints: Fingerprints, weights_revision: str, dtype: str
) -> Work:
    """The job with its files' contents and its key: a hash of these, the prompt, the settings, the weights and their type.

    Names of files are no part of the key: the same content under another name is the same work.
    """
    subtitles = ask_part(settings).subtitles
    paths = [*job.inputs, *([] if subtitles is None else [str(subtitles)])]
    files = tuple(fingerprints.of(path) for path in paths)
    said = {
        "version": KEY_VERSION,
        "task": job.task,
        # A file without content is told by its name, so that the job is a new one once the file is there.
        "files": [file.sha256 or f"unreadable {file.path}" for file in files],
        "prompt": job.prompt,
        "settings": _described(settings),
        "weights_revision": weights_revision,
        "dtype": dtype,
    }
    text = json.dumps(said, sort_keys=True, ensure_ascii=False)
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Work(job, settings, files, key)


def prefix_of(job: Job, settings: TaskSettings) -> tuple[Any, ...]:
    """Jobs for which this is equal see the same frames and can share their prefill; of other tasks each has its own."""
    if isinstance(settings, AskSettings):
        return (job.inputs, settings.sampling, settings.strict)
    return (job.number,)


def plain(value: Any) -> Any:
    """Settings as JSON has them: fractions as text, so that nothing is rounded, and 1.0 as 1, so that both are the same."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if isinstance(value, (Fraction, Path)) else value


def _described(settings: TaskSettings) -> dict[str, Any]:
    described: dict[str, Any] = plain(_without_paths(settings))
    generation = (described if isinstance(settings, AskSettings) else described["ask"])["generation"]
    for name, value in LATER_OPTIONS.items():
        if generation[name] == value:
            del generation[name]
    return described


def _without_paths(settings: TaskSettings) -> dict[str, Any]:
    if isinstance(settings, AskSettings):
        return asdict(replace(settings, subtitles=None))
    return asdict(replace(settings, ask=replace(settings.ask, subtitles=None)))
