"""Quantised linear layers in Triton: `quantized_linear` of a few rows, and `read_back` for many, defined in `quantized_weights`.

N outputs, K inputs; a group is G inputs with one scale, P codes stand in a word, W = G / P words are a group. With few rows
reading the words bounds the time: each program holds a few outputs' words of all groups, asked for before x is there, and
turns them into numbers in registers. A row's result is the same whatever stands beside it.

A GPU converts few integers to floats at a time, so codes become floats by their bits. Where they are multiplied, a word with
all bits but a code's cleared is read as a float as it stands: a denormal number, code · 2^(place − 149), which is multiplied
exactly and as fast as any; x is scaled up so that no product is too small. `zero` then takes off zero · Σ x of each word.
Where they are read back, the code is set into the mantissa of 2²³ and what is too much subtracted, which is exact as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import dependent_launch, device_capability, let_next_begin, wait_for_previous
from keyecli.kernels.quantized_weights import CODE_BITS, QuantizedMatrix

# A program holds whole rows of the words.
LONGEST_INNER = 8192
# Outputs of a program that are not quantised: fewer, since each takes four times the registers of an int4 one.
DENSE_OUTPUTS = 2
# Outputs and groups that a program reads back.
READ_OUTPUTS, READ_GROUPS = 64, 2


@dataclass(frozen=True)
class Tile:
    """Outputs of a program, and its warps."""

    outputs: int
    warps: int


def tile_of(capability: int, words: int, rows: int) -> Tile:
    """By compute capability (0: the interpreter), the words of an output, a power of two, and the rows of x.

    Four words a thread, all of an output's words side by side: x then has the layout of the words without being moved.
    """
    if capability == 0:
        return Tile(4, 1)
    return Tile(8 if rows <= 2 else 4, min(8, max(1, words // 128)))


@triton.constexpr_function
def code_shift(slot: int, bits: int) -> int:
    """By how much a word is shifted down for the code at place `slot`: not at all where it fits below 2²³ where it is."""
    fitting = 23 // bits
    return 0 if slot < fitting else 32 - fitting * bits


@triton.constexpr_function
def code_place(slot: int, bits: int) -> int:
    """The lowest bit of the code at place `slot` of a shifted word."""
    return slot * bits - code_shift(slot, bits)


@triton.jit
def float8_bits(words, SLOT: tl.constexpr):
    """An fp8 code as the bits of 2⁻¹²⁰ times its value: sign, exponent and mantissa where fp32 has them."""
    byte = words >> (SLOT * 8)
    return ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)


@triton.jit
def code_values(words, zero, SLOT: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """fp32: the codes at place SLOT of the words, less `zero`; fp8 codes (FLOAT) as they are."""
    if FLOAT:
        return float8_bits(words, SLOT).to(tl.float32, bitcast=True) * (2.0**120)
    PLACE: tl.constexpr = code_place(SLOT, BITS)
    MASK: tl.constexpr = (2**BITS - 1) << PLACE
    bits = ((words >> code_shift(SLOT, BITS)) & MASK) | 0x4B000000
    return (bits.to(tl.float32, bitcast=True) - 8388608.0) * (2.0**-PLACE) - zero


@triton.jit
def code_products(total, words, vector, SLOT: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """total + vector · the codes at place SLOT, times 2⁻⁶⁹; fp8 codes times 2⁻⁴⁰. See the top of this file."""
    if FLOAT:
        return total + float8_bits(words, SLOT).to(tl.float32, bitcast=True) * (vector * (2.0**80))
    PLACE: tl.constexpr = code_place(SLOT, BITS)
    MASK: tl.constexpr = (2**BITS - 1) << PLACE
    codes = ((words >> code_shift(SLOT, BITS)) & MASK).to(tl.float32, bitcast=True)
    return total + codes * (vector * (2.0 ** (80 - PLACE)))


@triton.jit
def scaled_products(total, vectors, scale, zero, FLOAT: tl.constexpr):
    """Of `code_products` over all places, and the sum of their vectors, what the stored values come to."""
    if FLOAT:
        return total * (2.0**40) * scale
    return (total * (2.0**69) - vectors * zero) * scale


@triton.jit
def _dense_outputs(
    x, dense, out, outputs, M, K, x_row, out_row,
    ROWS: tl.constexpr, K_PADDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A few outputs of weights that are not quantised, as in `linear`."""
    inner = tl.arange(0, K_PADDED)
    present = (outputs < M)[:, None] & (inner < K)[None, :]
    weights = tl.load(dense + outputs[:, None] * K + inner[None, :], mask=present, other=0.0)
    wait_for_previous(DEPENDENT)
    for row in tl.static_range(ROWS):
        vector = tl.load(x + row * x_row + inner, mask=inner < K, other=0.0)
        sums = tl.sum(weights.to(tl.float32) * vector.to(tl.float32)[None, :], 1)
        tl.store(out + row * out_row + outputs, sums.to(out.dtype.element_ty), mask=outputs < M)


@triton.jit
def _linear_kernel(
    x, codes, scale, zero, dense, out, N, M, x_row, out_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr, EVEN: tl.constexpr, DENSE_OUTPUTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A few outputs of every row; the words, read once, are on their way before x is there. Programs behind the last of N
    outputs do those of `dense` [M, K]."""
    let_next_begin(DEPENDENT)
    program = tl.program_id(0)
    if DENSE_OUTPUTS:
        tiles = tl.cdiv(N, OUTPUTS)
        if program >= tiles:
            rest = (program - tiles).to(tl.int64) * DENSE_OUTPUTS + tl.arange(0, DENSE_OUTPUTS)
            _dense_outputs(
                x, dense, out + N, rest, M, GROUPS * WORDS * (32 // BITS), x_row, out_row,
                ROWS, GROUPS_PADDED * WORDS * (32 // BITS), DEPENDENT,
            )  # fmt: skip
            return
    outputs = program.to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    # Groups come first, so that neighbouring threads hold neighbouring groups of one output, not the same of several.
    groups = tl.arange(0, GROUPS_PADDED)[:, None, None]
    places = tl.arange(0, WORDS)[None, None, :]
    word_pointers = codes + outputs[None, :, None] * (GROUPS * WORDS) + groups * WORDS + places
    group_pointers = outputs[None, :, None] * GROUPS + groups
    inside = groups < GROUPS
    if EVEN:
        words = tl.load(word_pointers, eviction_policy="evict_first")
        scales = tl.load(scale + group_pointers).to(tl.float32)
        zeros = scales if FLOAT else tl.load(zero + group_pointers).to(tl.float32)
    else:
        present = (outputs < N)[None, :, None] & inside
        words = tl.load(word_pointers, mask=present, other=0, eviction_policy="evict_first")
        scales = tl.load(scale + group_pointers, mask=present, other=0.0).to(tl.float32)
        zeros = scales if FLOAT else tl.load(zero + group_pointers, mask=present, other=0).to(tl.float32)
    wait_for_previous(DEPENDENT)
    inner = groups * (WORDS * (32 // BITS)) + places
    for row in tl.static_range(ROWS):
        total = tl.zeros([GROUPS_PADDED, OUTPUTS, WORDS], tl.float32)
        vectors = tl.zeros([GROUPS_PADDED, 1, WORDS], tl.float32)
        for slot in tl.static_range(32 // BITS):
            vector = tl.load(x + row * x_row + inner + slot * WORDS, mask=inside, other=0.0).to(tl.float32)
            vectors += vector
            total = code_products(total, words, vector, slot, BITS, FLOAT)
        total = scaled_products(total, vectors, scales, zeros, FLOAT)
        sums = tl.sum(tl.sum(total, 2), 0)
        tl.store(out + row * out_row + outputs, sums.to(out.dtype.element_ty), mask=outputs < N)


@triton.jit
def _read_back_kernel(
    codes, scale, zero, out, N, out_row,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, TILE_GROUPS: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """out[matrix, k, n] = (code − zero) · scale for a tile of outputs and groups of one matrix: neighbouring outputs are
    neighbours, and so every store is of whole lines."""
    matrix = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    groups = tl.program_id(1) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)[:, None, None]
    places = tl.arange(0, WORDS)[None, None, :]
    rows = (matrix * N + columns)[None, :, None] * GROUPS + groups
    present = (columns < N)[None, :, None] & (groups < GROUPS)
    words = tl.load(codes + rows * WORDS + places, mask=present, other=0)
    scales = tl.load(scale + rows, mask=present, other=0.0).to(tl.float32)
    zeros = scales if FLOAT else tl.load(zero + rows, mask=present, other=0).to(tl.float32)
    inner = groups * (WORDS * (32 // BITS)) + tl.arange(0, WORDS)[None, :, None]
    pointers = out + (matrix * (GROUPS * WORDS * (32 // BITS)) + inner) * out_row + columns[None, None, :]
    stored = (columns < N)[None, None, :] & (groups < GROUPS)
    for slot in tl.static_range(32 // BITS):
        values = (code_values(words, zeros, slot, BITS, FLOAT) * scales).to(out.dtype.element_ty)
        tl.store(pointers + slot * WORDS * out_row, tl.permute(values, (0, 2, 1)), mask=stored)


def format_constants(matrix: QuantizedMatrix) -> dict[str, Any]:
    """What every kernel over quantised matrices is compiled for."""
    groups = matrix.scale.shape[-1]
    return {
        "GROUPS": groups,
        "WORDS": matrix.codes.shape[-1] // groups,
        "BITS": CODE_BITS[matrix.method],
        "FLOAT": matrix.zero is None,
    }


def parts_of(matrix: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero as a kernel takes them, contiguous; without zeros something that it does not read."""
    codes, scale = matrix.codes.contiguous(), matrix.scale.contiguous()
    return codes, scale, scale if matrix.zero is None else matrix.zero.contiguous()


def quantized_linear(x: Tensor, matrix: QuantizedMatrix, dense: Tensor | None = None) -> Tensor:
    """x [B, K] · the matrix [N, K]ᵀ → [B, N]; `dense` [M, K], of x's type, are further outputs, not quantised: then [B, N + M].

    Made for few rows: one program reads its words once for all of them. ValueError for shapes that do not fit together and
    more than `LONGEST_INNER` inputs.
    """
    (rows, inner), outputs = x.shape, len(matrix.codes)
    further = 0 if dense is None else len(dense)
    if matrix.shape != (outputs, inner) or inner > LONGEST_INNER:
        raise ValueError(f"x {list(x.shape)} and a quantised matrix {list(matrix.shape)} do not fit")
    if dense is not None and (dense.shape != (further, inner) or dense.dtype != x.dtype):
        raise ValueError(
            f"x {x.dtype} {list(x.shape)} and weights {dense.dtype} {list(dense.shape)} do not fit"
        )
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, outputs + further, dtype=x.dtype, device=x.device)
    constants = format_constants(matrix)
    padded = triton.next_power_of_2(constants["GROUPS"])
    tile = tile_of(device_capability(x.device), padded * constants["WORDS"], rows)
    even = padded == constants["GROUPS"] and outputs % tile.outputs == 0
    programs = triton.cdiv(outputs, tile.outputs) + triton.cdiv(further, DENSE_OUTPUTS)
    with torch.cuda.device_of(x):
        _linear_kernel[(programs,)](
            x, *parts_of(matrix), x if dense is None else dense.contiguous(), out, outputs, further,
            x.stride(0), out.stride(0),
            ROWS=rows, OUTPUTS=tile.outputs, GROUPS_PADDED=padded, EVEN=even,
            DENSE_OUTPUTS=0 if dense is None else DENSE_OUTPUTS, **constants,
            num_warps=tile.warps, **dependent_launch(x.device),
        )  # fmt: skip
    return out


def read_back(matrix: QuantizedMatrix, dtype: torch.dtype, dense: Tensor | None = None) -> Tensor:
    """The transposed matrix, [..., K, N] in `dtype`; `dense` [M, K] are further outputs of one matrix: then [K, N + M].

    Defined by `quantized_weights.dequantise`.
    """
    *leading, outputs, inner = matrix.shape
    further = 0 if dense is None else len(dense)
    out = torch.empty(*leading, inner, outputs + further, dtype=dtype, device=matrix.codes.device)
    if dense is not None:
        out[:, outputs:] = dense.t()
    constants = format_constants(matrix)
    grid = (
        triton.cdiv(outputs, READ_OUTPUTS),
        triton.cdiv(constants["GROUPS"], READ_GROUPS),
        math.prod(leading),
    )
    with torch.cuda.device_of(out):
        _read_back_kernel[grid](
            *parts_of(matrix), out, outputs, outputs + further,
            OUTPUTS=READ_OUTPUTS, TILE_GROUPS=READ_GROUPS, **constants,
        )  # fmt: skip
    return out


def signature_of(
    kernel: Any, constants: dict[str, Any], others: dict[str, str] | None = None
) -> dict[str, str]:
    """Types of the arguments in the 30B shape; what is not named here is a bf16 tensor."""
    known = {
        "codes": "*i32",
        "zero": "*u8",
        "N": "i32",
        "M": "i32",
        "x_row": "i32",
        "out_row": "i32",
        **(others or {}),
    }
    return {name: "constexpr" if name in constants else known.get(name, "*bf16") for name in kernel.arg_names}


def format_case(method: str, inner: int, group: int = 64) -> dict[str, Any]:
    """`format_constants` of a matrix of `inner` inputs."""
    bits = CODE_BITS[method]
    return {"GROUPS": inner // group, "WORDS": group * bits // 32, "BITS": bits, "FLOAT": method == "fp8"}


def compile_cases(capability: int) -> list[CompileCase]:
    """Projections of the 30B model for one sequence and for eight, every method, and reading back."""
    cases = []
    for method, rows, inner in (("int4", 1, 2048), ("int4", 8, 4096), ("int8", 1, 2048), ("fp8", 1, 2048)):
        dense = method == "int4" and rows == 1
        constants: dict[str, Any] = format_case(method, inner)
        tile = tile_of(capability, inner * constants["BITS"] // 32, rows)
        constants |= {
            "ROWS": rows, "OUTPUTS": tile.outputs, "GROUPS_PADDED": constants["GROUPS"], "EVEN": True,
            "DENSE_OUTPUTS": DENSE_OUTPUTS if dense else 0, "DEPENDENT": capability >= 90,
        }  # fmt: skip
        signature = signature_of(_linear_kernel, constants)
        aligned = tuple(name for name, kind in signature.items() if kind != "constexpr")
        name = f"{method} linear, {rows} rows of {inner}"
        cases.append(CompileCase(name, _linear_kernel, signature, constants, tile.warps, 2, aligned))
    for method in ("int4", "int8", "fp8"):
        constants = {**format_case(method, 2048), "OUTPUTS": READ_OUTPUTS, "TILE_GROUPS": READ_GROUPS}
        signature = signature_of(_read_back_kernel, constants)
        aligned = tuple(name for name, kind in signature.items() if kind != "constexpr")
        cases.append(
            CompileCase(f"{method} read back", _read_back_kernel, signature, constants, 4, 2, aligned)
        )
    return cases
