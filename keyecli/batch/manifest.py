"""The manifest of a run: everything that is needed to repeat it, and comparing a repetition with it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from keyecli import __version__
from keyecli.batch.jobs import Job, make_jobs
from keyecli.batch.ledger import Ledger
from keyecli.engine.loaded import ModelFiles, revision_of
from keyecli.errors import KeyeError, UsageError
from keyecli.model.adapter import CONFIG_FILE, WEIGHTS_FILE
from keyecli.model.checkpoint import read_entries

SCHEMA = "keye.manifest/1"
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "av", "numpy", "pillow")
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
NUMBERS_WITHIN = 1e-3
"""Scores that differ less than this are the same; times and words must be equal."""

_COMPARED = {
    "keye.ask/1": ("text", "reasoning"),
    "keye.ground/1": ("query", "spans", "presence"),
    "keye.summary/1": ("text", "events", "chapters"),
}
_TOLERANT = ("score", "presence")


def write_manifest(
    path: Path,
    ledger: Ledger,
    jobs: Iterable[tuple[Job, str]],
    files: ModelFiles,
    *,
    revision: str | None,
    defaults: Mapping[str, Any],
    workers: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the manifest of the (job, key) pairs whose lines stand in the ledger, a line a job.

    revision: the hub's, if one was asked for. workers: the machines on which workers answered, each kind once. The
    weights are read whole for their hash. KeyeError when the disk does not take the file.
    """
    head = {
        "schema": SCHEMA,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "keye_version": __version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "machine": machine(),
        "workers": list(workers),
        "model": {
            "name": files.name,
            "revision": revision,
            "weights_revision": revision_of(files),
            "weights_sha256": weights_hash(files),
        },
        "device": files.devices,
        "dtype": files.dtype,
        "kernels": files.kernels,
        "quant": files.quant,
        "kv": files.kv,
        "adapter": None if files.adapter is None else str(files.adapter),
        "options": dict(defaults),
    }
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}") + ',\n "jobs": [')
            separator = "\n"
            for job, key in jobs:
                if (job.id, key) in ledger.entries:
                    entry = _entry(ledger.record_of(job.id, key))
                    file.write(separator + json.dumps(entry, ensure_ascii=False))
                    separator = ",\n"
            file.write("\n]}\n")
        part.replace(path)
    except OSError as error:
        raise KeyeError(
            f"cannot write {path}: {error.strerror}; give another file with --manifest"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _entry(record: Mapping[str, Any]) -> dict[str, Any]:
    results: Sequence[Mapping[str, Any]] = record["results"]
    return {
        "id": record["id"],
        "key": record["key"],
        "status": record["status"],
        "job": record["job"],
        "files": record["files"],
        "device": results[0]["device"] if results else None,
        "seed": results[0]["seed"] if results else None,
        "settings": results[0]["settings"] if results else None,
        "inputs": [
            {name: item[name] for name in ("path", "width", "height", "tokens", "times_s", "settings")}
            for item in (results[0]["inputs"] if results else ())
        ],
        "answers": [compared_part(result) for result in results],
        "error": record["error"],
    }


def compared_part(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a repetition must give again: words, times and scores, without timings."""
    return {"schema": result["schema"], **{name: result[name] for name in _COMPARED[result["schema"]]}}


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read. jobs: to be done again; entries: what they gave, by id."""

    model: Mapping[str, Any]
    dtype: str
    quant: str | None
    kv: str | None
    adapter: str | None
    options: Mapping[str, Any]
    jobs: list[Job]
    entries: Mapping[str, Mapping[str, Any]]


def read_manifest(path: Path) -> Manifest:
    """UsageError for a file that cannot be read or is no manifest."""
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError
        entries = {entry["id"]: entry for entry in content["jobs"]}
        jobs = make_jobs((f"job {id!r} of {path}", entry["job"]) for id, entry in entries.items())
        content["model"]["name"], content["model"]["weights_sha256"]
        return Manifest(
            content["model"],
            content["dtype"],
            content["quant"],
            content["kv"],
            content.get("adapter"),
            content["options"],
            jobs,
            entries,
        )
    except OSError as error:
        raise UsageError(f"the manifest {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} is no manifest of keye batch") from None


def differences(manifest: Manifest, records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(id, what is different) of each job that did not come out as the manifest has it, one thing a job."""
    seen = set()
    for record in records:
        before = manifest.entries[record["id"]]
        seen.add(record["id"])
        difference = _difference(before, record)
        if difference is not None:
            yield record["id"], difference
    for id in manifest.entries:
        if id not in seen:
            yield id, "it was not done again"


def _difference(before: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
    contents = [[file["sha256"] for file in entry["files"]] for entry in (before, record)]
    if contents[0] != contents[1]:
        return "its files have other contents"
    if before["status"] != record["status"]:
        return f"it was {before['status']} and is {record['status']} now"
    if record["status"] == "failed":
        return None if before["error"] == record["error"] else "it failed in another way"
    now = _entry(record)
    if [item["times_s"] for item in before["inputs"]] != [item["times_s"] for item in now["inputs"]]:
        return "other frames were looked at"
    return None if _is_same(before["answers"], now["answers"]) else "the answer is another one"


def _is_same(before: Any, now: Any, name: str = "") -> bool:
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(_is_same(before[key], now[key], key) for key in before)
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_is_same, before, now))
    if name in _TOLERANT and isinstance(before, (int, float)) and isinstance(now, (int, float)):
        return math.isclose(before, now, rel_tol=0, abs_tol=NUMBERS_WITHIN)
    return before == now


def weights_hash(files: ModelFiles) -> str:
    """SHA-256 over the names and contents of a model's weight files, in the order of their names, and of an adapter's files."""
    digest = hashlib.sha256()
    paths = sorted({entry.shard for entry in read_entries(files.folder).values()})
    if files.adapter is not None:
        paths += [files.adapter / name for name in ADAPTER_FILES]
    for path in paths:
        digest.update(f"{path.name}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def machine() -> dict[str, Any]:
    """What this machine is, without its name."""
    import torch

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
    }
