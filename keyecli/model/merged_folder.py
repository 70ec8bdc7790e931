"""Writing a merged model: an adapter's base with the adapter in its weights, a folder of its own, streamed shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from keyecli.errors import ModelError
from keyecli.model.adapter import AdapterFile, fit_adapter
from keyecli.model.checkpoint import merged_weights, plan_load
from keyecli.model.new_folder import SHARD_BYTES, write_folder
from keyecli.model.quantized_folder import output_bytes


@dataclass(frozen=True)
class MergedFolder:
    """What was written: the weights' bytes, how many matrices were added to, and how many tensors replaced whole."""

    folder: Path
    added: int
    replaced: int
    bytes: int


def merge_folder(
    base: Path | str,
    adapter: AdapterFile,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergedFolder:
    """Write the model folder `base` with an adapter in its weights into the new folder `out`, in the official layout.

    Its weights are those that `load_model` computes with when it is given both; what the adapter leaves alone keeps its bits.
    `on_progress(done, total)` is told the bytes read. ModelError: see `load_model`, a base that is quantised, an adapter that
    does not fit; UsageError, MemoryLimitError: see `write_folder`.
    """
    base, out = Path(base), Path(out).expanduser()
    plan = plan_load(base)
    if plan.stored:
        raise ModelError(
            f"{base} is quantised, {plan.quantization}, and an adapter goes into whole weights: merge it into the original, "
            "then quantise that"
        )
    fitted = fit_adapter(adapter, plan.shapes)
    total = sum(output_bytes(plan).values())
    write_folder(
        base,
        out,
        merged_weights(plan, fitted, torch.device(device), on_progress),
        total,
        what="the merged model",
        shard_bytes=shard_bytes,
    )
    return MergedFolder(out, len(fitted.added), len(fitted.replaced), total)
