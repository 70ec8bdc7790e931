"""What the kernels' launches ask of a device, answered once for each, and how precisely `tl.dot` multiplies a type."""

from __future__ import annotations

import functools

import torch
import triton


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def device_capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; 0 where Triton's interpreter runs the kernels."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def device_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on the CPU."""
    if device.type != "cuda":
        return 1
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


def precision_of(dtype: torch.dtype) -> str:
    """fp32 is multiplied exactly, never in the matrix units' shorter form; for 16-bit types the setting means nothing."""
    return "ieee" if dtype == torch.float32 else "tf32"
