"""Writing a quantised model: a folder of its own that loads without the original, streamed shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from keyecli.errors import ModelError
from keyecli.model.checkpoint import LoadPlan, plan_load
from keyecli.model.new_folder import SHARD_BYTES, write_folder
from keyecli.model.quantize import Quantization, Quantized
from keyecli.model.streaming import SAFETENSORS_DTYPES, stream_weights


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

    `on_progress(done, total)` is told the bytes read. ModelError: see `load_model`, and a source that is quantised already;
    UsageError, MemoryLimitError: see `write_folder`.
    """
    source, out = Path(source), Path(out).expanduser()
    plan = plan_load(source, quantization)
    if plan.stored:
        raise ModelError(f"{source} is quantised already, {plan.quantization}: quantise the original")
    total = sum(output_bytes(plan).values())
    write_folder(
        source,
        out,
        stream_weights(plan, torch.device(device), None, on_progress),
        total,
        what="the quantised model",
        config={"quantization_config": quantization.to_dict()},
        shard_bytes=shard_bytes,
    )
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
