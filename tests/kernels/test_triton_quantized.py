"""The Triton kernels over quantised matrices against their definitions: on a GPU, or at toy size under the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from keyecli.engine.static import StaticDecoder
from keyecli.kernels import dispatch, quantized, quantized_experts
from keyecli.kernels import quantized_weights as weights
from keyecli.model.cache import KeyeCache
from keyecli.model.checkpoint import load_model
from keyecli.model.quantize import Quantization
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, HALF, poisoned
from tests.kernels.test_quantized_weights import difficult
from tests.tiny import tiny_config, write_checkpoint

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Every method in fp32, int4 in all types.
KINDS = [
    (dtype, method)
    for dtype in DTYPES
    for method in weights.METHODS
    if dtype == DTYPES[0] or method == "int4"
]
# Rows, outputs, inputs, group: whole tiles, tails of both.
SHAPES = [(1, 8, 128, 64), (3, 21, 192, 64), (2, 5, 256, 128)]
if CUDA:
    SHAPES += [(1, 5120, 2048, 64), (8, 2048, 4096, 64), (5, 131, 8192, 128)]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize(("dtype", "method"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_definition(
    shape: tuple[int, int, int, int], method: weights.Method, dtype: torch.dtype
) -> None:
    rows, outputs, inputs, group = shape
    matrix = weights.quantise(normal(outputs, inputs), method, group)
    x = normal(rows, inputs + 8).to(dtype)[:, :inputs]
    dense = normal(7, inputs).to(dtype)
    exact = weights.dequantise(matrix).double()
    with poisoned():
        plain = quantized.quantized_linear(x, matrix)
        joined = quantized.quantized_linear(x, matrix, dense)
        read = quantized.read_back(matrix, dtype)
        joint = quantized.read_back(matrix, dtype, dense)
    limits = {"relative": TOLERANCE[dtype], "cosine": 1e-5}
    assert plain.dtype == dtype
    assert_close(plain, x.double() @ exact.T, **limits)
    assert_close(joined, x.double() @ torch.cat((exact, dense.double())).T, **limits)
    assert_same(joined[:, :outputs], plain)
    assert_same(read.mT, weights.dequantise(matrix, dtype))
    assert_same(joint.mT, torch.cat((weights.dequantise(matrix, dtype), dense)))


@pytest.mark.parametrize("method", weights.METHODS)
def test_difficult_rows(method: weights.Method) -> None:
    """Zeros, outliers, tiny and huge values: none of them disturbs another row."""
    rows = difficult().to(DEVICE)
    rows[12] *= 2.0**-20  # Its sum would be larger than fp32 goes.
    matrix = weights.quantise(rows, method, 64)
    x = normal(2, rows.shape[1])
    actual, exact = quantized.quantized_linear(x, matrix), x.double() @ weights.dequantise(matrix).double().T
    size = (x.double().abs() @ weights.dequantise(matrix).double().abs().T).clamp(min=1e-37)
    assert bool(((actual.double() - exact).abs() <= 1e-5 * size).all())
    assert_same(quantized.read_back(matrix, torch.float32).mT, weights.dequantise(matrix))
    assert not actual[:, 0].any()


@pytest.mark.parametrize("method", weights.METHODS)
def test_a_row_does_not_depend_on_its_neighbours(method: weights.Method) -> None:
    matrix = weights.quantise(normal(12, 256), method, 64)
    x = normal(8, 256).to(HALF[0])
    together = quantized.quantized_linear(x, matrix)
    for row in (0, 3, 7):
        assert_same(quantized.quantized_linear(x[row : row + 1], matrix)[0], together[row])


def layer(
    method: weights.Method, tokens: int, dtype: torch.dtype, num_experts: int = 3, model: int = 128
) -> tuple[Tensor, Tensor, weights.QuantizedMatrix, weights.QuantizedMatrix]:
    gate_up = weights.quantise(normal(num_experts, 2 * 64, model) / model**0.5, method, 64)
    down = weights.quantise(normal(num_experts, model, 64) / 8, method, 64)
    return normal(tokens, model).to(dtype), normal(tokens, num_experts), gate_up, down


@pytest.mark.parametrize(("dtype", "method"), KINDS)
def test_experts_are_the_definition(method: weights.Method, dtype: torch.dtype) -> None:
    # Many tokens differ between methods only in what reads back, which is tested above.
    for tokens, few in ((2, True), (9, False)) if CUDA or method == "int4" else ((1, True),):
        x, logits, gate_up, down = layer(method, tokens, dtype, num_experts=2)
        exact = weights.quantized_experts(x.double(), logits, 2, True, gate_up, down)
        with poisoned():
            actual = quantized_experts.quantized_experts(x, logits, 2, True, gate_up, down, few)
        limit = 2 * TOLERANCE[dtype]
        assert_close(actual, exact, relative=limit, cosine=limit, what=f"{tokens} tokens")


def test_odd_numbers_of_slots_and_experts_that_nobody_chose() -> None:
    x, logits, gate_up, down = layer("int4", 1, torch.float32, num_experts=5, model=192)
    logits[:, 1] = -100
    assert gate_up.zero is not None
    gate_up.scale[1], down.scale[1] = float("nan"), float("nan")
    exact = weights.quantized_experts(x.double(), logits, 3, False, gate_up, down)
    actual = quantized_experts.quantized_experts(x, logits, 3, False, gate_up, down, True)
    assert_close(actual, exact, relative=1e-5)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, logits, gate_up, down = layer("int4", 3, HALF[0], model=64)
    together = quantized_experts.quantized_experts(x, logits, 2, True, gate_up, down, True)
    alone = quantized_experts.quantized_experts(x[2:3], logits[2:3], 2, True, gate_up, down, True)
    assert_same(alone[0], together[2])


def test_what_does_not_fit_is_refused() -> None:
    x, logits, gate_up, down = layer("int4", 2, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        quantized_experts.quantized_experts(x, logits, 2, True, down, gate_up, True)
    with pytest.raises(ValueError, match="do not fit"):
        quantized.quantized_linear(x[:, :64], gate_up[0])
    with pytest.raises(ValueError, match="do not fit"):
        quantized.quantized_linear(x, gate_up[0], x.half())
    with pytest.raises(ValueError, match="no gradients"):
        quantized_experts.quantized_experts(x.requires_grad_(), logits, 2, True, gate_up, down, False)
    x = x.detach()
    empty = quantized_experts.quantized_experts(x[:0], logits[:0], 2, True, gate_up, down, True)
    assert empty.shape == (0, 128)


@torch.no_grad()
def test_every_choice_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, logits, gate_up, down = layer("int4", 2, torch.float32)
    monkeypatch.setattr(dispatch, "DECODE_TOKENS", 2)
    linear = [dispatch.quantized_linear(x[None], gate_up[0], None, b) for b in ("reference", "triton")]
    assert linear[0].shape == (1, 2, 128)
    assert_close(linear[1], linear[0])
    many = dispatch.quantized_linear(torch.cat((x, x)), gate_up[0], None, "triton")
    assert_close(many[:2], linear[0][0])
    arguments = (x, logits, 2, True, gate_up, down)
    mixed = [dispatch.quantized_experts(*arguments, b) for b in ("reference", "triton")]
    assert_close(mixed[1], mixed[0], relative=1e-5)


@torch.no_grad()
def test_a_quantised_model_computes_by_the_kernels(tmp_path: Path) -> None:
    """Prefill and one step from static buffers, against the same weights and the definitions."""
    config = tiny_config(hidden_size=64, moe_intermediate_size=64, num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "model", config=config)
    model = load_model(folder, quantization=Quantization("int4"), device=DEVICE)
    ids = torch.randint(0, 250, (1, 11), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits = {}
    for backend in ("reference", "triton"):
        model.set_kernel_backend(backend)
        cache = KeyeCache(model.config, 16, batch=1, device=DEVICE)
        positions = torch.arange(11, device=DEVICE).expand(3, 1, 11)
        first = model.decode(model.embed(ids[:, :10]), positions[:, :, :10], cache)
        if backend == "triton":
            decoder = StaticDecoder(model, cache)
            decoder.begin([10], [10])
            last = decoder.step(ids[:, 10])
        else:
            last = model.logits(model.decode(model.embed(ids[:, 10:]), positions[:, :, 10:], cache)[:, 0])
        logits[backend] = model.logits(first[0]), last
    for kernel, definition in zip(logits["triton"], logits["reference"], strict=True):
        assert_close(kernel, definition)
