"""Keys and values of a cache in FP8 e4m3, as kernels read and write them; `reference.stored` is the definition.

From sm_89 on the card converts what it reads. Below, and in the interpreter, kernels are given the bytes and do it by
arithmetic, to the same values. Writing is arithmetic everywhere: it is a few values a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.device import device_capability
from keyecli.kernels.indexer import decode_e4m3

# From here on the hardware converts.
CONVERTING_CAPABILITY = 89


def element_type(capability: int) -> str:
    """Triton's name of what `readable` makes of FP8, for compile cases."""
    return "fp8e4nv" if capability >= CONVERTING_CAPABILITY else "u8"


def readable(rows: Tensor) -> Tensor:
    """Keys or values as a kernel that reads them is given them: FP8 as bytes where the card does not convert it."""
    if rows.dtype == torch.float8_e4m3fn and device_capability(rows.device) < CONVERTING_CAPABILITY:
        return rows.view(torch.uint8)
    return rows


def writable(rows: Tensor) -> Tensor:
    """Keys or values as a kernel that writes them is given them: FP8 as bytes."""
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows


@triton.jit
def as_read(rows, KIND: tl.constexpr):
    """What was loaded of `readable` keys or values, as KIND; every FP8 value is one of fp16, bf16 and fp32 too."""
    if rows.dtype == tl.uint8:
        values = decode_e4m3(rows)
        values = tl.where((rows & 0x7F) == 0x7F, float("nan"), values)
    else:
        values = rows
    return values.to(KIND)


@triton.jit
def as_written(values, kind: tl.constexpr):
    """Values to be stored in `writable` keys or values of this kind; for bytes the FP8 that `reference.stored` makes."""
    if kind == tl.uint8:
        wide = values.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        # Saturated as bits, whose order is that of the numbers; what is no number lies above infinity.
        size = bits & 0x7FFFFFFF
        nothing = size > 0x7F800000
        size = tl.minimum(size, 0x43E00000)  # 448
        # To three bits of mantissa, a tie to the even one; then the difference of the exponents' biases.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2⁻⁶ steps are 2⁻⁹, as those of fp32 above 2¹⁴ are: the addition rounds.
        shifted = size.to(tl.float32, bitcast=True) + 16384.0
        small = shifted.to(tl.uint32, bitcast=True) - 0x46800000
        byte = tl.where(size < 0x3C800000, small, normal)
        return (tl.where(nothing, 0x7F, byte) | sign).to(tl.uint8)
    else:
        return values.to(kind)
