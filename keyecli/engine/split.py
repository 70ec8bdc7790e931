"""Which layers of a model go on which of several GPUs: accelerate's planner, by what they take and what is free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
from torch import nn

from keyecli.engine.plan import DevicePart
from keyecli.model.config import KeyeVL2Config
from keyecli.model.decoder import DecoderLayer
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.moe import SparseMoE
from keyecli.model.placement import WeightPlaces
from keyecli.model.quantize import Quantization, replace_modules
from keyecli.model.vision import Projector, VisionTower

# What stays whole: a layer, and what stands before all of them.
WHOLE = [kind.__name__ for kind in (DecoderLayer, VisionTower, Projector)]
# By so much the share that every device gives is raised until all of the model has a place.
STEP = 1.05
# The least that counts as free, as a part of the most.
FULLEST = 64


def split_layers(
    config: KeyeVL2Config,
    devices: Sequence[str],
    free_bytes: Sequence[int],
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    offload: bool = False,
    cache_bytes: int = 0,
) -> tuple[DevicePart, ...]:
    """What each device holds, those without anything left out, in their order.

    Every device gives about the same share of what is free there, more than there is if the model needs more: whoever loads it
    compares. The embedding and the vision tower are on the first device, with a layer at least. `cache_bytes` go with each
    layer.
    """
    model = _outline(config, quantization, offload, cache_bytes)
    # A device that is full gets its little all the same: whoever loads refuses it by its name.
    free_bytes = [max(free, max(free_bytes) // FULLEST, 1) for free in free_bytes]
    share = compute_module_sizes(model, dtype)[""] / sum(free_bytes)
    while True:
        limits: Any = {place: int(free * share) for place, free in enumerate(free_bytes)}
        found = infer_auto_device_map(
            model, limits, no_split_module_classes=WHOLE, dtype=dtype, offload_buffers=True
        )
        parts = _parts(found, config, devices)
        if parts is not None:
            return parts
        share *= STEP


def _outline(
    config: KeyeVL2Config, quantization: Quantization | None, offload: bool, cache_bytes: int
) -> nn.Module:
    """The model without memory, and without experts that no GPU holds."""
    with torch.device("meta"):
        model = KeyeVL2ForConditionalGeneration(config)
        if quantization is not None:
            replace_modules(model, quantization)
    for layer in model.model.layers:
        layer.register_buffer("cache", torch.empty(cache_bytes, dtype=torch.uint8, device="meta"))
        if offload and isinstance(layer.mlp, SparseMoE):
            layer.mlp.experts = nn.Identity()  # type: ignore[assignment]
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _parts(
    found: dict[str, int | str], config: KeyeVL2Config, devices: Sequence[str]
) -> tuple[DevicePart, ...] | None:
    """accelerate's map by device; None where it is none for us: something is on no device, or not on the first as it should."""

    def place_of(name: str) -> int | str:
        while name and name not in found:
            name = name.rpartition(".")[0]
        return found[name]

    layers = [place_of(f"model.layers.{number}") for number in range(config.num_hidden_layers)]
    before = [place_of(name) for name in ("visual", "mlp_AR", "model.embed_tokens")]
    head = 0 if config.tie_word_embeddings else place_of("lm_head")
    if "disk" in found.values() or any(place != 0 for place in (*before, layers[0])):
        return None
    return tuple(
        DevicePart(device, layers.count(place), first=place == 0, last=place == head)
        for place, device in enumerate(devices)
        if place in (*layers, head)
    )


def places_of(parts: Sequence[DevicePart], host_experts: bool) -> WeightPlaces:
    """The same, tensor by tensor."""
    layers = [torch.device(part.device) for part in parts for _ in range(part.layers)]
    first, last = (
        next(torch.device(part.device) for part in parts if getattr(part, end)) for end in ("first", "last")
    )
    return WeightPlaces(first, tuple(layers), last, host_experts)
