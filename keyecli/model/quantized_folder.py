"""Writing a quantised model: a folder of its own that loads without the original, streamed shard by shard."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from keyecli.errors import MemoryLimitError, ModelError, UsageError
from keyecli.model.checkpoint import LoadPlan, plan_load
from keyecli.model.companions import copy_companions
from keyecli.model.quantize import Quantization, Quantized
from keyecli.model.shards import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json_object
from keyecli.model.streaming import SAFETENSORS_DTYPES, stream_weights

# Host memory holds one shard, and the tensor that is being quantised.
SHARD_BYTES = 2_000_000_000
# Beside the weights: companions, headers.
SPARE_BYTES = 100_000_000
GIB = 2**30


@dataclass(frozen=True)
class QuantizedFolder:
    """What was written: the weights' bytes, how many matrices are quantised, and the bytes of the original's weights."""

    folder: Path
    quantization: Quantization
    matrices: int
    bytes: int
    source_bytes: int


def quantize_folder(
    source: Path | str,
    out: Path | str,
    quantization: Quantization,
    *,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> QuantizedFolder:
    """Quantise the model folder `source` into the new folder `out`; what is not quantised keeps its type and its bits.

    Written beside `out` under a temporary name and renamed when whole, else removed. `on_progress(done, total)` is told the
    bytes read. ModelError: see `load_model`, and a source that is quantised already; UsageError: `out` is there already, or
    its place cannot be written to; MemoryLimitError: the disk is too small.
    """
    source, out = Path(source), Path(out).expanduser()
    plan = plan_load(source, quantization)
    if plan.stored:
        raise ModelError(f"{source} is quantised already, {plan.quantization}: quantise the original")
    total = sum(output_bytes(plan).values())
    _require_place(out, total)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        tensors = stream_weights(plan, torch.device(device), None, on_progress)
        _write_shards(temporary, tensors, shard_bytes, total)
        _write_companions(source, temporary, quantization)
        temporary.replace(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise MemoryLimitError(_too_small(out, total)) from error
        raise UsageError(
            f"{out} cannot be written ({error.strerror or error}): choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return QuantizedFolder(out, quantization, len(plan.quantised), total, plan.read_bytes)


def output_bytes(plan: LoadPlan) -> dict[str, int]:
    """Bytes of every tensor of the quantised model by its name, before anything is read."""
    sizes: dict[str, int] = {}
    for name, placement in plan.placements.items():
        if placement.parameter in plan.quantised:
            module_name = plan.quantised[placement.parameter]
            module = plan.model.get_submodule(module_name)
            assert isinstance(module, Quantized)
            sizes |= {
                f"{module_name}.{part}": tensor.nbytes for part, tensor in module.matrix.tensors.items()
            }
        else:
            like = plan.model.get_parameter(placement.parameter)
            sizes[placement.parameter] = like.numel() * SAFETENSORS_DTYPES[plan.entries[name].dtype].itemsize
    return sizes


def _require_place(out: Path, total: int) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is there already: choose another folder, or remove it")
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    if shutil.disk_usage(existing).free < total + SPARE_BYTES:
        raise MemoryLimitError(_too_small(out, total))


def _too_small(out: Path, total: int) -> str:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"the quantised model takes {total / GIB:.1f} GiB and {free / GIB:.1f} are free on the disk of {existing}: "
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


def _write_companions(source: Path, folder: Path, quantization: Quantization) -> None:
    """The configuration, which then says how the weights are quantised and names no code, and what goes along."""
    copy_companions(source, folder)
    values = read_json_object(source / CONFIG_FILE)
    values.pop("auto_map", None)
    values["quantization_config"] = quantization.to_dict()
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
