"""What the kernels' launches ask of a device, answered once for each, and how precisely `tl.dot` multiplies a type.

A kernel launched with `dependent_launch` may begin while the one before it still runs. It calls `let_next_begin` at once, so
that the same holds for the one behind it, asks for what no earlier kernel writes (weights), and then calls `wait_for_previous`
before it reads or writes anything else: all work of all kernels before it is then done and seen. Every program must call it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that need not wait for the one before it to end: from sm_90 on; elsewhere it waits."""
    able = device_capability(device) >= 90
    return {"DEPENDENT": able, "launch_pdl": able}


@triton.jit
def let_next_begin(DEPENDENT: tl.constexpr):
    """The next kernel may be started as soon as every program of this one is."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """What earlier kernels write is there from here on, and what they read may be written."""
    if DEPENDENT:
        gdc_wait()


def device_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 on the CPU."""
    if device.type != "cuda":
        return 1
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


def precision_of(dtype: torch.dtype) -> str:
    """fp32 is multiplied exactly, never in the matrix units' shorter form; for 16-bit types the setting means nothing."""
    return "ieee" if dtype == torch.float32 else "tf32"


def same_sums(dtype: torch.dtype) -> dict[str, bool]:
    """Arguments of a launch whose sums must not depend on how many rows it has: of a · b + c · d the compiler may fuse either
    product with the addition, and chooses anew for each shape. Products of 16-bit numbers are exact, so that it is all one."""
    return {} if dtype.itemsize == 2 else {"enable_fp_fusion": False}
