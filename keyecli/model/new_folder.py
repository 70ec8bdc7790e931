"""A model folder written anew beside its source: room looked for first, weights in shards as they come, put in place whole."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from keyecli.errors import MemoryLimitError, UsageError
from keyecli.model.companions import copy_companions
from keyecli.model.shards import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, one_line, read_json_object

# Host memory holds one shard, and the tensor that is being made.
SHARD_BYTES = 2_000_000_000
# Beside the weights: companions, headers.
SPARE_BYTES = 100_000_000
GIB = 2**30


def write_folder(
    source: Path,
    out: Path,
    tensors: Iterable[tuple[str, Tensor]],
    total: int,
    *,
    what: str,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors`, `total` bytes of them, into the new folder `out`, with what stands beside the weights of `source`.

    what: how a sentence names it, such as "the merged model"; config: values of `config.json` that are others than the source's.
    Written beside `out` under a temporary name and renamed when whole, else removed; `tensors` are not begun before there is
    room. UsageError: `out` is there already, or its place cannot be written to; MemoryLimitError: the disk is too small.
    """
    _require_place(out, total, what)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        _write_shards(temporary, tensors, shard_bytes, total)
        _write_companions(source, temporary, config or {})
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise MemoryLimitError(_too_small(out, total, what)) from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise UsageError(f"{out} cannot be written ({reason}): choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether the disk is; safetensors has the number of the system's error in its text alone."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return re.search(rf"\(os error {errno.ENOSPC}\)", str(error)) is not None


def _require_place(out: Path, total: int, what: str) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already: choose another folder, or remove it")
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    if shutil.disk_usage(existing).free < total + SPARE_BYTES:
        raise MemoryLimitError(_too_small(out, total, what))


def _too_small(out: Path, total: int, what: str) -> str:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"{what} takes {total / GIB:.1f} GiB and {free / GIB:.1f} are free on the disk of {existing}: "
        "make room there, or choose another place"
    )


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int, total: int) -> None:
    """Tensors in the order they come, in shards of at most `shard_bytes` (a larger tensor has its own), and their index."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    filled = 0

    def write() -> None:
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and filled + tensor.nbytes > shard_bytes:
            write()
            filled = 0
        held[name] = tensor.cpu().contiguous()
        filled += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "0.safetensors").replace(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").replace(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_companions(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """The configuration, which names no code, and what goes along."""
    copy_companions(source, folder)
    values = read_json_object(source / CONFIG_FILE)
    values.pop("auto_map", None)
    text = json.dumps({**values, **config}, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
