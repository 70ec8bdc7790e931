"""Routed experts in the host's memory, for a GPU that is too small for them.

A few new tokens read the experts that they choose from where they are: the memory is pinned, and a GPU reads it by its address.
Many tokens choose them all, so that each layer's are copied to one of two buffers while the layer before computes.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keyecli.errors import MemoryLimitError
from keyecli.model.moe import SparseMoE

GIB = 2**30
# Of cudaHostRegister: pinned for every GPU, and in the address space of each.
PORTABLE, MAPPED = 1, 2


class _Pages(mmap.mmap):
    """Memory of its own size exactly (torch's pinned memory comes in powers of two), pinned until nobody holds it."""

    pinned_at: int | None = None

    def __del__(self) -> None:
        if self.pinned_at is not None and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self.pinned_at)


def pinned_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An unfilled tensor in the host's memory that every GPU reads by its address; MemoryLimitError when there is none."""
    size = torch.Size(shape).numel() * dtype.itemsize
    try:
        pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryLimitError(_refused(size)) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages pins small ones, only slower
            pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
    cudart = torch.cuda.cudart()
    if cudart.cudaHostRegister(tensor.data_ptr(), size, PORTABLE | MAPPED) != cudart.cudaError.success:
        raise MemoryLimitError(_refused(size))
    pages.pinned_at = tensor.data_ptr()
    return tensor


def _refused(size: int) -> str:
    return (
        f"the system gives no further {size / GIB:.1f} GiB of pinned memory for the experts: free memory on this machine, use "
        "--quant int4, or leave out --offload"
    )


class ExpertBuffers:
    """Layers of experts in the host's memory that take turns in two buffers on a device.

    All layers have tensors of the same names and shapes. The host waits for nothing: copies and computation wait for each
    other on the device.
    """

    def __init__(self, layers: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._buffers = [
            {name: torch.empty_like(tensor, device=device) for name, tensor in layers[0].items()}
            for _ in range(min(2, len(layers)))
        ]
        self._holds: list[int | None] = [None] * len(self._buffers)
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for buffer in self._buffers for tensor in buffer.values())

    def tensors(self, layer: int) -> Mapping[str, Tensor]:
        """One layer's experts on the device, until those of the layer after the next are asked for; the next one's follow."""
        self._request(layer)
        place = layer % len(self._buffers)
        copied = self._copied[place]
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        if layer + 1 < len(self._layers):
            self._request(layer + 1)
        return self._buffers[place]

    def _request(self, layer: int) -> None:
        """Begin to copy a layer, unless it is there or on its way."""
        place = layer % len(self._buffers)
        if self._holds[place] == layer:
            return
        self._holds[place] = layer
        if self._stream is None:
            self._copy(layer)
            return
        # What computed with the buffer before has been given to the device by now.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy(layer)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        self._copied[place] = copied

    def _copy(self, layer: int) -> None:
        buffer = self._buffers[layer % len(self._buffers)]
        for name, tensor in self._layers[layer].items():
            buffer[name].copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class HostExperts:
    """One layer's place among the layers that share buffers."""

    buffers: ExpertBuffers
    number: int

    def on_device(self) -> Mapping[str, Tensor]:
        """See `ExpertBuffers.tensors`."""
        return self.buffers.tensors(self.number)


def share_buffers(layers: Sequence[nn.Module]) -> list[ExpertBuffers]:
    """Give the layers of a decoder whose experts are in the host's memory two buffers, on each device where there are any.

    A layer's device is that of its router.
    """
    by_device: dict[torch.device, list[SparseMoE]] = {}
    for layer in layers:
        if isinstance(layer.mlp, SparseMoE):
            by_device.setdefault(layer.mlp.gate.weight.device, []).append(layer.mlp)
    made = []
    for device, group in by_device.items():
        held = [_tensors_of(mixture.experts) for mixture in group]
        made.append(buffers := ExpertBuffers(held, device))
        for number, mixture in enumerate(group):
            mixture.experts.host = HostExperts(buffers, number)
    return made


def _tensors_of(experts: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in [*experts.named_parameters(), *experts.named_buffers()]}
