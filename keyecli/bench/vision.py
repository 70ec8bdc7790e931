"""Speed of attention inside frames with the released tower's heads, against torch's attention kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keyecli.bench.measure import Measurement, require_equal, time_device
from keyecli.kernels import reference
from keyecli.kernels import vision as kernels
from keyecli.model.rope import grid_tables

HEADS, DIM = 16, 72
LENGTHS = (32768,)
# Frames of 16 × 16 and 32 × 32 patches: the smallest and the largest that a video gives.
SIDES = (16, 32)
BACKENDS = {"Flash SDPA": SDPBackend.FLASH_ATTENTION, "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION}
# The backward pass is timed up to here.
BACKWARD_PATCHES = 32768
# A gradient goes through more 16-bit rounding than the result, on both sides.
GRADIENT_LIMIT = 2e-2
Runs = dict[str, Callable[[], object]]


def fastest(runs: Runs) -> tuple[str, float]:
    """The name and the median seconds of the fastest; a backend that does not take this shape is left out."""
    seconds: dict[str, float] = {}
    for name, run in runs.items():
        try:
            seconds[name] = time_device(run, 0.05)[0]
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
    best = min(seconds, key=lambda name: seconds[name])
    return best, seconds[best]


def on_backend(backend: SDPBackend, run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with sdpa_kernel(backend):
            return run()

    return inside


def measure_frames(frames: int, side: int) -> Iterator[Measurement]:
    patches = side * side
    q, k, v = torch.randn(3, frames, patches, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    tables = grid_tables(side, side, DIM, 10000.0, q.device)
    case = f"{frames} frames of {patches} patches"
    forward_flops = 4.0 * frames * HEADS * patches**2 * DIM
    one = 2.0 * q.numel()
    for operation, arguments, traffic in (
        ("frame attention", (q, k, v), 4 * one),
        ("frame attention with rotary", (q, k, v, *tables), 4 * one),
    ):
        few = (*(x[:8].float() for x in (q, k, v)), *arguments[3:])
        require_equal(kernels.frame_attention(*arguments)[:8], reference.frame_attention(*few), operation)
        definition = partial(reference.frame_attention, *arguments)
        baseline, baseline_s = fastest({n: on_backend(b, definition) for n, b in BACKENDS.items()})
        if len(arguments) > 3:
            baseline += " and eager rotary"
        seconds, spread = time_device(partial(kernels.frame_attention, *arguments), 0.1)
        yield Measurement(operation, case, seconds, spread, forward_flops, traffic, baseline, baseline_s)
    if frames * patches <= BACKWARD_PATCHES:
        yield measure_backward(q, k, v, case, forward_flops, one)


def measure_backward(q: Tensor, k: Tensor, v: Tensor, case: str, flops: float, one: float) -> Measurement:
    """Forward and backward together. Least arithmetic: 2 products forward, 5 backward; least traffic: 11 tensors."""
    gradient = torch.randn_like(q)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, gradient)

    for name, actual, expected in zip(
        ("dq", "dk", "dv"), run(kernels.frame_attention), run(reference.frame_attention), strict=True
    ):
        require_equal(actual, expected, name, GRADIENT_LIMIT)
    runs: Runs = {n: on_backend(b, lambda: run(reference.frame_attention)) for n, b in BACKENDS.items()}
    baseline, baseline_s = fastest(runs)
    seconds, spread = time_device(lambda: run(kernels.frame_attention), 0.1)
    name = "frame attention, forward and backward"
    return Measurement(name, case, seconds, spread, 3.5 * flops, 11 * one, baseline, baseline_s)


def measure(lengths: Sequence[int] = LENGTHS) -> Iterator[Measurement]:
    """For each number of patches in all, small and large frames; RuntimeError when a result is wrong."""
    torch.manual_seed(0)
    for length in lengths:
        for side in SIDES:
            yield from measure_frames(max(1, length // side**2), side)
