"""The Triton linear layer of a few rows against PyTorch's: on a GPU, or at toy size under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from keyecli.kernels import linear as kernels
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, poisoned

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Rows, inputs, outputs: whole tiles, and tails of both.
SHAPES = [(1, 64, 32), (3, 100, 37), (8, 16, 5)]
if CUDA:
    SHAPES += [(1, 2048, 6224), (8, 4096, 2048), (5, 8192, 131), (1, 2048, 151_936)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_that_of_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, outputs = shape
    x = torch.randn(rows, inner + 8, device=DEVICE).to(dtype)[:, :inner]
    weight = torch.randn(outputs, inner + 8, device=DEVICE).to(dtype)[:, :inner]
    with poisoned():
        actual = kernels.linear(x, weight)
        wide = kernels.linear(x, weight, torch.float32)
    expected = torch.nn.functional.linear(x.double(), weight.double())
    assert actual.dtype == dtype
    assert_close(actual, expected, relative=TOLERANCE[dtype], cosine=1e-5)
    assert_same(wide, actual.float())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_its_neighbours(shape: tuple[int, int, int]) -> None:
    _, inner, outputs = shape
    x = torch.randn(8, inner, device=DEVICE, dtype=DTYPES[-1])
    weight = torch.randn(outputs, inner, device=DEVICE, dtype=DTYPES[-1])
    together = kernels.linear(x, weight)
    for row in range(8):
        assert_same(kernels.linear(x[row : row + 1], weight)[0], together[row], what=f"row {row}")


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.linear(x, torch.zeros(4, 17, device=DEVICE))
    with pytest.raises(ValueError, match="do not fit"):
        kernels.linear(x, torch.zeros(4, 16, dtype=torch.float16, device=DEVICE))
    long = kernels.LONGEST_INNER + 1
    with pytest.raises(ValueError, match="do not fit"):
        kernels.linear(torch.zeros(1, long, device=DEVICE), torch.zeros(1, long, device=DEVICE))
