"""Where each weight of a model is kept: on one device or several, the routed experts perhaps in the host's memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keyecli.model.offload import pinned_tensor

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.experts\.")
_AFTER_LAYERS = ("model.norm.", "lm_head.")


@dataclass(frozen=True)
class WeightPlaces:
    """first: the device of the embedding, the vision tower and the projector; layers: of each layer; last: of the final norm and
    the output head. host_experts: the routed experts are in the host's memory."""

    first: torch.device
    layers: tuple[torch.device, ...]
    last: torch.device
    host_experts: bool = False

    def device_of(self, name: str) -> torch.device:
        """Where what this tensor of the model's state belongs to computes."""
        if found := _LAYER.match(name):
            return self.layers[int(found[1])]
        return self.last if name.startswith(_AFTER_LAYERS) else self.first

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor of this name where it is to be, not filled yet; MemoryLimitError when the host has no memory for it."""
        if self.host_experts and _EXPERTS.match(name):
            return pinned_tensor(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.device_of(name))


def one_device(device: torch.device | str, layers: int, host_experts: bool = False) -> WeightPlaces:
    """Everything on one device, but perhaps the experts."""
    device = torch.device(device)
    return WeightPlaces(device, (device,) * layers, device, host_experts)
