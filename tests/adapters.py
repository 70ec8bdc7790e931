"""Small adapters of a toy base, written as training writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from keyecli.model.adapter import save_adapter
from keyecli.model.checkpoint import load_model
from keyecli.model.lora import LoraSettings, Target, add_lora, lora_parameters
from keyecli.model.shards import weights_revision


def write_adapter(
    folder: Path,
    base: Path,
    *,
    size: float = 0.3,
    targets: Sequence[Target] = ("attention", "experts"),
    whole: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """An adapter of the model folder `base`, B random of about `size` (0: it changes nothing), and random parameters `whole`."""
    model = load_model(base)
    settings = LoraSettings(rank=2, alpha=4, targets=tuple(targets))
    generator = torch.Generator().manual_seed(seed)
    add_lora(model, settings)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * (size if name.endswith("_B") else 0.2))
    further = {name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in whole}
    save_adapter(
        model,
        folder,
        settings=settings,
        base=str(base),
        revision=weights_revision(base),
        modules_to_save=further,
    )
    return folder
