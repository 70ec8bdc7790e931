"""Whether a folder is a whole model of ours, told from its small files and the headers of its weights alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from keyecli.model.checkpoint import load_preprocessor, load_tokenizer, plan_load


@dataclass(frozen=True)
class Weights:
    """What the headers of a folder's weights say: tensors, files, bytes of all tensors, safetensors type → tensors of it.

    quantised: how, in words; None for weights as they were released.
    """

    tensors: int
    shards: tuple[Path, ...]
    bytes: int
    dtypes: dict[str, int]
    quantised: str | None


def require_whole(folder: Path) -> None:
    """ModelError names the first thing that keeps a folder from being a model; no weight is read."""
    read_weights(folder)
    load_preprocessor(folder)
    load_tokenizer(folder)


def read_weights(folder: Path) -> Weights:
    """Compare the names, shapes and types of all tensors with the configuration; ModelError names the first that is wrong."""
    plan = plan_load(folder)
    entries = plan.entries.values()
    return Weights(
        tensors=len(entries),
        shards=tuple(sorted({entry.shard for entry in entries})),
        bytes=sum(entry.bytes for entry in entries),
        dtypes=dict(Counter(entry.dtype for entry in entries).most_common()),
        quantised=None if plan.quantization is None else str(plan.quantization),
    )
