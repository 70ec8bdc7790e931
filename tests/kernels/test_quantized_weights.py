"""How matrices are quantised: the stored form by plain arithmetic, bounds of the error, and rows made to break it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keyecli.kernels import quantized_weights as weights
from keyecli.kernels import reference
from tests.compare import assert_close, assert_same

INTEGERS = ("int4", "int8")
TOP = {"int4": 15, "int8": 255}


def by_hand(matrix: weights.QuantizedMatrix) -> Tensor:
    """What a matrix [N, K] stands for, one value at a time, as the documentation says it."""
    bits = weights.CODE_BITS[matrix.method]
    per_word = 32 // bits
    outputs, inputs = matrix.shape
    group = matrix.group
    words_a_group = group // per_word
    values = torch.empty(outputs, inputs)
    for n in range(outputs):
        for k in range(inputs):
            place, word = divmod(k % group, words_a_group)
            stored = int(matrix.codes[n, k // group * words_a_group + word]) % 2**32
            code = stored >> bits * place & 2**bits - 1
            scale = float(matrix.scale[n, k // group])
            if matrix.zero is None:
                sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
                size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
                values[n, k] = (-size if sign else size) * scale
            else:
                values[n, k] = (code - int(matrix.zero[n, k // group])) * scale
    return values


def difficult(inputs: int = 128) -> Tensor:
    """Rows that are hard to quantise, [rows, inputs]."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(inputs, generator=generator)
    outlier = normal.clone()
    outlier[5] = 1e4
    rows = [
        torch.zeros(inputs), torch.full((inputs,), 3.7), torch.full((inputs,), -1e-3), normal, outlier, normal * 1e30,
        normal * 1e-30, normal * 1e-41, normal.abs(), -normal.abs(), normal + 100, torch.linspace(-1, 1, inputs),
        torch.full((inputs,), 2.0**126), torch.arange(inputs) % 2 * 2.0 - 1,
    ]  # fmt: skip
    return torch.stack(rows)


@pytest.mark.parametrize("method", weights.METHODS)
@pytest.mark.parametrize("group", [64, 128])
def test_the_stored_form_is_what_the_documentation_says(method: weights.Method, group: int) -> None:
    matrix = weights.quantise(torch.randn(3, 128, generator=torch.Generator().manual_seed(1)), method, group)
    assert matrix.shape == (3, 128)
    assert matrix.group == group
    assert matrix.codes.dtype == torch.int32
    assert matrix.codes.shape == (3, 128 * weights.CODE_BITS[method] // 32)
    assert_same(weights.dequantise(matrix), by_hand(matrix))


@pytest.mark.parametrize("method", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_are_off_by_half_a_step(method: weights.Method, dtype: torch.dtype) -> None:
    rows = difficult().to(dtype)
    matrix = weights.quantise(rows, method, 64)
    error = (weights.dequantise(matrix).double() - rows.double()).abs().unflatten(-1, (2, 64))
    assert bool((error <= 0.5001 * matrix.scale.double()[..., None]).all())
    values = rows.float().unflatten(-1, (2, 64))
    span = values.amax(-1).clamp(min=0) - values.amin(-1).clamp(max=0)
    smallest = span.clamp(min=weights.SMALLEST_SCALE * TOP[method])
    assert bool((matrix.scale.float() <= smallest / TOP[method] * (1 + 2**-7)).all())


def test_fp8_is_off_by_a_sixteenth() -> None:
    rows = difficult()
    matrix = weights.quantise(rows, "fp8", 64)
    error = (weights.dequantise(matrix).double() - rows.double()).abs()
    steps = matrix.scale.double().repeat_interleave(64, -1)
    assert bool((error <= torch.maximum(rows.double().abs() / 16 * 1.0001, steps * 2.0**-10)).all())


@pytest.mark.parametrize("method", weights.METHODS)
def test_what_can_be_represented_comes_back_exactly(method: weights.Method) -> None:
    generator = torch.Generator().manual_seed(2)
    scale = torch.tensor([0.5, 0.0390625, 3e-5]).bfloat16().float()[:, None]
    if method == "fp8":
        codes = torch.randint(0, 127, (3, 64), generator=generator).to(torch.uint8)
        codes[:, 7] = 126
        values = codes.view(torch.float8_e4m3fn).float() * scale
    else:
        codes = torch.randint(0, TOP[method] + 1, (3, 64), generator=generator)
        codes[:, 3], codes[:, 60] = 0, TOP[method]
        values = (codes - torch.tensor([[0], [5], [TOP[method]]])) * scale
    again = weights.dequantise(weights.quantise(values, method, 64))
    assert_same(again, values)
    assert_same(weights.dequantise(weights.quantise(torch.zeros(2, 64), method, 64)), torch.zeros(2, 64))


@pytest.mark.parametrize("method", weights.METHODS)
def test_outputs_and_layouts_do_not_matter(method: weights.Method) -> None:
    """One expert alone, or a transposed view, gives the bits of the whole."""
    values = torch.randn(3, 4, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = weights.quantise(values, method, 64)
    turned = weights.quantise(values.mT.contiguous().mT, method, 64)
    for name, part in whole.tensors.items():
        assert_same(turned.tensors[name], part)
        assert_same(weights.quantise(values[1], method, 64).tensors[name], part[1])
        assert_same(whole[2].tensors[name], part[2])
        assert part.is_contiguous()


def test_what_cannot_be_quantised_is_refused() -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 2.0**127):
        rows = torch.zeros(2, 64)
        rows[1, 9] = value
        with pytest.raises(ValueError, match="infinite"):
            weights.quantise(rows, "int4", 64)
    with pytest.raises(ValueError, match="groups of 64"):
        weights.quantise(torch.zeros(2, 96), "int4", 64)


@pytest.mark.parametrize("method", weights.METHODS)
def test_linear_and_experts_are_those_of_the_matrices_read_back(method: weights.Method) -> None:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, dense, logits = normal(5, 128), normal(3, 128), normal(5, 4)
    matrix = weights.quantise(normal(6, 128), method, 64)
    read = weights.dequantise(matrix)
    assert_close(weights.quantized_linear(x, matrix, dense), F.linear(x, torch.cat((read, dense))))
    gate_up = weights.quantise(normal(4, 128, 128) / 8, method, 64)
    down = weights.quantise(normal(4, 128, 64) / 8, method, 64)
    expected = reference.routed_experts(
        x,
        logits,
        2,
        True,
        weights.dequantise(gate_up).mT.contiguous(),
        weights.dequantise(down).mT.contiguous(),
    )
    assert_close(weights.quantized_experts(x, logits, 2, True, gate_up, down), expected)
