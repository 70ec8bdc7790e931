"""Keys and values of a cache in FP8 e4m3, as kernels read and write them; `reference.stored` is the definition.

From sm_89 on the card converts what it reads. Below, kernels are given the bytes, as int8, and do it by arithmetic, to the
same values; in the interpreter as uint8, and in words that it understands. Writing is arithmetic everywhere: it is a few
values a token.
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
    return "fp8e4nv" if capability >= CONVERTING_CAPABILITY else "i8"


def readable(rows: Tensor) -> Tensor:
    """Keys or values as a kernel that reads them is given them: FP8 as bytes where the card does not convert it."""
    capability = device_capability(rows.device)
    if rows.dtype != torch.float8_e4m3fn or capability >= CONVERTING_CAPABILITY:
        return rows
    return rows.view(torch.int8 if capability else torch.uint8)


def writable(rows: Tensor) -> Tensor:
    """Keys or values as a kernel that writes them is given them: FP8 as bytes."""
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows


# Four values, $2, as two pairs of fp16, $0 and $1: by the hardware, and by moving the bits of e4m3 into those of fp16, times
# the difference of the exponents' biases, 2⁸. There 0x7F would be 480 and becomes 0x7FFF, no number.
_CONVERT = tl.constexpr(
    "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)
_DECODE = tl.constexpr("""{
    .reg .b32 a, b, c, d, s, t;
    prmt.b32 a, $2, 0, 0x1404;              prmt.b32 b, $2, 0, 0x3424;
    and.b32 c, a, 0x7F007F00;               and.b32 d, b, 0x7F007F00;
    shr.u32 s, c, 1;                        shr.u32 t, d, 1;
    lop3.b32 s, s, a, 0x80008000, 0xF8;     lop3.b32 t, t, b, 0x80008000, 0xF8;
    add.u32 c, c, 0x01000100;               add.u32 d, d, 0x01000100;
    and.b32 c, c, 0x80008000;               and.b32 d, d, 0x80008000;
    shr.u32 a, c, 15;                       shr.u32 b, d, 15;
    sub.u32 c, c, a;                        sub.u32 d, d, b;
    mov.b32 a, 0x5C005C00;
    mul.rn.f16x2 s, s, a;                   mul.rn.f16x2 t, t, a;
    or.b32 $0, s, c;                        or.b32 $1, t, d;
}""")


@triton.jit
def as_read(rows, KIND: tl.constexpr):
    """What was loaded of `readable` keys or values, as KIND; every FP8 value is one of fp16, bf16 and fp32 too.

    In assembly, and not as pure, because the compiler puts off what it may until the values lie as the matrix units want
    them, and on the way there single bytes would be moved one by one.
    """
    if rows.dtype == tl.uint8:
        values = decode_e4m3(rows)
        values = tl.where((rows & 0x7F) == 0x7F, float("nan"), values)
    elif rows.dtype.primitive_bitwidth == 8:
        values = tl.inline_asm_elementwise(
            _DECODE if rows.dtype == tl.int8 else _CONVERT,
            "=r,=r,r",
            [rows],
            dtype=tl.float16,
            is_pure=False,
            pack=4,
        )
    else:
        values = rows
    return values.to(KIND)


@triton.jit
def as_multiplied(queries, scale, kind: tl.constexpr):
    """Queries [rows, DIM] as they are multiplied with keys of this kind, and the factors of the logits: of a row and of a tile.

    With FP8, queries of 16 bits go as fp16: the hardware makes fp16 of FP8 in one step and bf16 in several, and those took
    longer than all the rest of a tile. First each row is brought to a largest value from 2¹⁴ to 2¹⁵ by a power of two, which
    its factor takes back, so that a query keeps every bit that is within 2²⁸ of its largest value.
    """
    if kind.primitive_bitwidth == 8 and queries.dtype.primitive_bitwidth == 16:
        wide = queries.to(tl.float32)
        exponent = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) >> 23
        # Powers that both factors have: of no number, of infinity and of next to nothing too.
        exponent = tl.minimum(tl.maximum(exponent, 15), 254)
        power = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        row_scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True) * scale
        queries = (wide * power[:, None]).to(tl.float16)
        tile_scale = row_scale[:, None]
    else:
        row_scale = scale
        tile_scale = scale
    return queries, row_scale, tile_scale


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
