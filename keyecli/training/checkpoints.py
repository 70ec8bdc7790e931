"""Checkpoints of a training run: OUT/checkpoints/step-00000123, whole or not there at all, enough to go on bit for bit.

weights.safetensors holds master weights and optimiser state, state.json the position in the data, the step and its figures, and
random states. A checkpoint does not depend on how many processes wrote it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keyecli.errors import InputError, KeyeError, MemoryLimitError, UsageError
from keyecli.training.distributed import Processes, whole

FOLDER = "checkpoints"
STATE_FILE = "state.json"
VERSION = 1
SHARD_BYTES = 4 * 2**30
SPARE_BYTES = 2**24
_NAME = re.compile(r"step-(\d{8})")


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints of a run, the oldest first."""
    folder = out / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file())


def save(
    out: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    processes: Processes,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the last `keep`; every process has to ask, the first one writes.

    MemoryLimitError when the disk is full, and KeyeError when it cannot be written to: what was saved before stays.
    """
    path = out / FOLDER / f"step-{step:08d}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(out):
        if processes.first:
            temporary.mkdir(parents=True)
        try:
            names = _write_tensors(temporary, tensors, processes)
            if processes.first:
                content = {"version": VERSION, "step": step, "tensors": names, **state}
                _write_synced(temporary / STATE_FILE, json.dumps(content, indent=1).encode())
                if path.exists():
                    shutil.rmtree(path)
                temporary.rename(path)
                for old in checkpoints(out)[:-keep]:
                    shutil.rmtree(old, ignore_errors=True)
        finally:
            if processes.first:
                shutil.rmtree(temporary, ignore_errors=True)
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and state of a checkpoint. InputError for one that is damaged or of another version."""
    try:
        state = json.loads((path / STATE_FILE).read_bytes())
        if state.get("version") != VERSION:
            raise InputError(f"{path} is a checkpoint of another version of keye: begin anew")
        tensors: dict[str, Tensor] = {}
        for file, names in state["tensors"].items():
            with safe_open(path / file, framework="pt") as reader:
                tensors |= {name: reader.get_tensor(name) for name in names}
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise InputError(
            f"the checkpoint {path} cannot be read ({error}): remove it, and --resume goes on from the one before"
        ) from error
    return tensors, state


def latest(out: Path) -> Path:
    """The last whole checkpoint; UsageError where there is none."""
    found = checkpoints(out)
    if not found:
        raise UsageError(f"{out} has no checkpoint to resume from: leave out --resume")
    return found[-1]


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, list[str]]:
    """Shards, one after the other so that one is in memory; returns which tensors stand in each file."""
    names: dict[str, list[str]] = {}
    held: dict[str, Tensor] = {}

    def write() -> None:
        file = f"weights-{len(names) + 1:05d}.safetensors"
        if processes.first:
            needed = sum(tensor.nbytes for tensor in held.values()) + SPARE_BYTES
            if shutil.disk_usage(folder).free < needed:
                raise OSError(28, "no space left")
            save_file(held, folder / file)
            with (folder / file).open("rb") as written:
                os.fsync(written.fileno())
        names[file] = list(held)
        held.clear()

    for name, tensor in tensors.items():
        if held and sum(part.nbytes for part in held.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        held[name] = whole(tensor).detach().cpu().contiguous()
    if held:
        write()
    return names


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns what the system says about a disk into a sentence that names the last checkpoint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = checkpoints(out)
        last = (
            f"{found[-1]} is whole, and --resume goes on from it" if found else "no checkpoint had been saved"
        )
        full = getattr(error, "errno", None) == 28 or "No space left" in str(error)
        if full:
            raise MemoryLimitError(
                f"no space is left on the disk of {out} for a checkpoint; {last}: make room there"
            ) from error
        reason = getattr(error, "strerror", None) or str(error)
        raise KeyeError(f"a checkpoint cannot be written to {out}: {reason}; {last}") from error


def random_state(device: str) -> dict[str, Any]:
    """State of torch's generators, as text."""
    state = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, str], device: str) -> None:
    """Go on from `random_state`."""

    def read(text: str) -> Tensor:
        return torch.frombuffer(bytearray(bytes.fromhex(text)), dtype=torch.uint8)

    torch.set_rng_state(read(state["cpu"]))
    if "cuda" in state and device.startswith("cuda"):
        torch.cuda.set_rng_state(read(state["cuda"]), device)
