"""Quantised matrices: how they are stored, how they are made and read back, and what is computed with them, in plain PyTorch.

N outputs, K inputs of a matrix [N, K]; G inputs share a scale (a group); leading dimensions, such as the expert, are free.
A stored value is (code − zero) · scale. The scale is bf16, rounded up, so that both ends of a group are within its codes;
`zero` is itself a code, so that 0 is stored exactly.

| method | code | zero | bits a weight in groups of 64 |
| --- | --- | --- | --- |
| int4 | 0 to 15 | uint8 | 4.375 |
| int8 | 0 to 255 | uint8 | 8.375 |
| fp8 | float8 e4m3 | none | 8.25 |

Codes stand in int32 words, P = 32 / bits to a word, lowest bits first, and never two groups in one: code p of word j of a
group is that of the group's input p · G/P + j. So the codes at one place of neighbouring words belong to neighbouring inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from keyecli.kernels import reference

Method = Literal["int4", "int8", "fp8"]
METHODS: tuple[Method, ...] = get_args(Method)

CODE_BITS: dict[str, int] = {"int4": 4, "int8": 8, "fp8": 8}
WORD_BITS = 32
FP8_LARGEST = reference.FP8_LARGEST
# The smallest normal bf16: groups of smaller values become zeros, which is within half of such a step.
SMALLEST_SCALE = 2.0**-126
# Above, the distance of a group's ends could overflow.
LARGEST_VALUE = 2.0**126


@dataclass(frozen=True)
class QuantizedMatrix:
    """codes: int32 [..., N, K / P]; scale: bf16 [..., N, K / G]; zero: uint8 like scale, None for fp8."""

    method: Method
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def per_word(self) -> int:
        """P, codes in a word."""
        return WORD_BITS // CODE_BITS[self.method]

    @property
    def inputs(self) -> int:
        """K."""
        return self.codes.shape[-1] * self.per_word

    @property
    def group(self) -> int:
        """G."""
        return self.inputs // self.scale.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for, [..., N, K]."""
        return (*self.codes.shape[:-1], self.inputs)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, in the order in which they are saved."""
        parts = {"codes": self.codes, "scale": self.scale, "zero": self.zero}
        return {name: part for name, part in parts.items() if part is not None}

    def of(self, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        """Another of the same kind, of tensors as in `tensors`."""
        return QuantizedMatrix(self.method, tensors["codes"], tensors["scale"], tensors.get("zero"))

    def __getitem__(self, index: int | slice) -> QuantizedMatrix:
        """A part along the first dimension: one expert, or some rows."""
        zero = None if self.zero is None else self.zero[index]
        return QuantizedMatrix(self.method, self.codes[index], self.scale[index], zero)


def quantise(matrix: Tensor, method: Method, group: int) -> QuantizedMatrix:
    """matrix [..., N, K] of any floating type, quantised in groups of `group` inputs; the same bits on every device.

    A value is off by at most half a scale (int4, int8), or 1/16 of itself or 2⁻¹⁰ scales (fp8). ValueError when K is no
    multiple of the group, or the group none of P, and for values that are not finite or above `LARGEST_VALUE`.
    """
    inputs, per_word = matrix.shape[-1], WORD_BITS // CODE_BITS[method]
    if inputs % group or group % per_word:
        raise ValueError(f"{inputs} inputs cannot be quantised in groups of {group}")
    values = matrix.detach().float().contiguous().unflatten(-1, (inputs // group, group))
    low, high = values.amin(-1), values.amax(-1)
    largest = torch.maximum(-low, high)
    if not bool((largest <= LARGEST_VALUE).all()):
        raise ValueError("it holds a value that is infinite, not a number, or larger than 2^126")
    zero = None
    if method == "fp8":
        scale = _rounded_up(_divided(largest, FP8_LARGEST))
        codes = (values / scale.float()[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        top = 2 ** CODE_BITS[method] - 1
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _rounded_up(_divided(high - low, top))
        place = (-low / scale.float()).round()
        steps = (values / scale.float()[..., None]).round() + place[..., None]
        codes = steps.clamp(0, top).to(torch.uint8)
        zero = place.to(torch.uint8)
    return QuantizedMatrix(method, _packed(codes, CODE_BITS[method]), scale, zero)


def dequantise(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [..., N, K] that the codes stand for, computed in fp32 and rounded once to `dtype`."""
    codes = _unpacked(matrix.codes, matrix.scale.shape[-1], CODE_BITS[matrix.method])
    if matrix.zero is None:
        values = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        values = (codes - matrix.zero[..., None].to(torch.int32)).float()
    return (values * matrix.scale.float()[..., None]).flatten(-2).to(dtype)


def _divided(x: Tensor, number: float) -> Tensor:
    """By a tensor, not a number: on a GPU PyTorch multiplies by a number's inverse, which rounds otherwise."""
    return x / torch.full_like(x, number)


def _rounded_up(scale: Tensor) -> Tensor:
    """fp32 ≥ 0 → the next bf16 that is not smaller, at least `SMALLEST_SCALE`."""
    bits = scale.clamp(min=SMALLEST_SCALE).view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., groups, G] → int32 words [..., groups · G / P]."""
    per_word = WORD_BITS // bits
    places = codes.unflatten(-1, (per_word, -1)).to(torch.int32)
    words = places.select(-2, 0).clone()
    for place in range(1, per_word):
        words |= places.select(-2, place) << bits * place
    return words.flatten(-2)


def _unpacked(words: Tensor, groups: int, bits: int) -> Tensor:
    """int32 words [..., groups · G / P] → codes, int32 [..., groups, G]."""
    by_group = words.unflatten(-1, (groups, -1))
    shifts = range(0, WORD_BITS, bits)
    return torch.cat([(by_group >> shift) & (2**bits - 1) for shift in shifts], dim=-1)


def quantized_linear(x: Tensor, matrix: QuantizedMatrix, dense: Tensor | None = None) -> Tensor:
    """x [..., K] · the matrix [N, K]ᵀ → [..., N]; `dense` [M, K] are further outputs, not quantised: then [..., N + M]."""
    weight = dequantise(matrix, x.dtype)
    return F.linear(x, weight if dense is None else torch.cat((weight, dense)))


def quantized_experts(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    normalise: bool,
    gate_up: QuantizedMatrix,
    down: QuantizedMatrix,
) -> Tensor:
    """`reference.routed_experts` with gate_up [E, 2F, D], rows 0..F−1 gate, F..2F−1 up, and down [E, D, F]; returns [T, D].

    One expert's matrices are read back at a time. The sum over a token's experts is taken in the order of its slots.
    """
    weights, experts = reference.route(logits, top_k, normalise)
    routed = x.new_zeros(*experts.shape, x.shape[1])
    for expert in experts.unique().tolist():
        token, slot = (experts == expert).nonzero(as_tuple=True)
        gate, up = quantized_linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        routed[token, slot] = quantized_linear(F.silu(gate) * up, down[expert])
    return (routed * weights.to(x.dtype).unsqueeze(-1)).sum(1)


class _FrozenProduct(torch.autograd.Function):
    """Keeps the codes, not the matrix that they stand for: the backward pass reads it back again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: QuantizedMatrix,
        read_back: Callable[[QuantizedMatrix, torch.dtype], Tensor],
    ) -> Tensor:
        ctx.matrix, ctx.read_back = matrix, read_back
        return x @ read_back(matrix, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.read_back(ctx.matrix, gradient.dtype).t(), None, None


def frozen_product(
    x: Tensor, matrix: QuantizedMatrix, read_back: Callable[[QuantizedMatrix, torch.dtype], Tensor]
) -> Tensor:
    """x [..., K] · the matrix [N, K]ᵀ → [..., N], differentiable once in x. read_back: the matrix in a type → [K, N]."""
    return _FrozenProduct.apply(x, matrix, read_back)


def quantized_lora_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: QuantizedMatrix,
    down: QuantizedMatrix,
    gate_up_factors: reference.LowRank | None,
    down_factors: reference.LowRank | None,
    scale: float,
) -> Tensor:
    """`reference.lora_experts` with gate_up [E, 2F, D] and down [E, D, F].

    All experts of a layer are read back at once, and again in the backward pass: between the two nothing of them is kept.
    """

    def computed(x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        parts = list(factors)
        pairs = [
            None if given is None else (parts.pop(0), parts.pop(0))
            for given in (gate_up_factors, down_factors)
        ]
        dense = [dequantise(matrix, x.dtype).transpose(-1, -2) for matrix in (gate_up, down)]
        return reference.lora_experts(x, weights, experts, dense[0], dense[1], pairs[0], pairs[1], scale)

    tensors = (x, weights, *(gate_up_factors or ()), *(down_factors or ()))
    if not torch.is_grad_enabled():
        return computed(*tensors)
    # Nothing here is random, so no state of random numbers has to be kept.
    return checkpoint(computed, *tensors, use_reentrant=False, preserve_rng_state=False)
