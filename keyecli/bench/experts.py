"""Speed of routing and of the experts in the 30B shape, against the torch pipeline that defines them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keyecli.bench.measure import Measurement, captured, require_equal, time_device
from keyecli.kernels import experts as kernels
from keyecli.kernels import reference

MODEL, WIDTH, EXPERTS, TOP_K = 2048, 768, 128, 8
LENGTHS = (4096, 16384, 32768, 131072)
DECODE_TOKENS = (1, 4)
# Decoding goes through this many layers of different weights, so that none of them waits in the cache.
DECODE_LAYERS = 4
# The longest pass whose backward pass is timed too: definition and kernels together keep a few rows · D each.
BACKWARD_TOKENS = 32768
# A gradient goes through more 16-bit rounding than the result, on both sides.
GRADIENT_LIMIT = 2e-2


@dataclass(frozen=True)
class Layer:
    """One layer's random weights and the routing of some tokens."""

    x: Tensor
    logits: Tensor
    weights: Tensor
    experts: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.weights, self.experts, self.gate_up, self.down


def random_layer(tokens: int) -> Layer:
    """Activations of size one, weights that keep it, and routing as even as random logits make it."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(scale)

    logits = normal(tokens, EXPERTS)
    weights, experts = reference.route(logits, TOP_K, True)
    gate_up = normal(EXPERTS, MODEL, 2 * WIDTH, scale=MODEL**-0.5)
    down = normal(EXPERTS, WIDTH, MODEL, scale=WIDTH**-0.5)
    return Layer(normal(tokens, MODEL), logits, weights, experts.contiguous(), gate_up, down)


def topk_route(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write in torch without a rule for ties: faster than the definition, whose sort is stable."""
    weights, experts = logits.float().softmax(-1).topk(TOP_K, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


def compare(
    operation: str,
    tokens: int,
    run: Callable[[], object],
    baseline: str,
    run_baseline: Callable[[], object],
    flops: float,
    traffic: float,
    parts: int = 1,
) -> Measurement:
    """Both timed in turn; each run does the operation `parts` times."""
    seconds, spread = time_device(run, 0.15)
    baseline_s, _ = time_device(run_baseline, 0.1)
    case = f"{tokens} tokens"
    return Measurement(
        operation, case, seconds / parts, spread / parts, flops, traffic, baseline, baseline_s / parts
    )


def work(tokens: int, distinct: int) -> tuple[float, float]:
    """Least arithmetic, and least traffic in bytes: the weights of the chosen experts, x and the result."""
    flops = 2.0 * tokens * TOP_K * 3 * MODEL * WIDTH
    return flops, 2.0 * (distinct * 3 * MODEL * WIDTH + 2 * tokens * MODEL)


def measure_route(layer: Layer) -> Measurement:
    tokens = len(layer.x)
    weights, experts = kernels.route(layer.logits, TOP_K, True)
    if not torch.equal(experts, layer.experts):
        # Neighbours in probability may change places where two exponentials differ in their last bit.
        chosen = layer.logits.float().softmax(-1).gather(1, experts)
        require_equal(chosen / chosen.sum(-1, keepdim=True), layer.weights, "route: experts")
    require_equal(weights, layer.weights, "route: weights")
    traffic = tokens * (2.0 * EXPERTS + TOP_K * (4 + 8))
    return compare(
        "route",
        tokens,
        lambda: kernels.route(layer.logits, TOP_K, True),
        "torch softmax and topk",
        lambda: topk_route(layer.logits),
        0.0,
        traffic,
    )


def measure_prefill(layer: Layer) -> Measurement:
    tokens = len(layer.x)
    actual = kernels.moe_experts(*layer.arguments)
    require_equal(actual, reference.moe_experts(*layer.arguments), "experts")
    return compare(
        "experts",
        tokens,
        lambda: kernels.moe_experts(*layer.arguments),
        "torch grouped_mm",
        lambda: reference.moe_experts(*layer.arguments),
        *work(tokens, min(EXPERTS, tokens * TOP_K)),
    )


def measure_backward(layer: Layer) -> Measurement:
    """Forward and backward together, gradients of everything."""
    tokens = len(layer.x)
    leaves = [t.requires_grad_(t.is_floating_point()) for t in layer.arguments]
    gradient = torch.randn_like(layer.x)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return list(torch.autograd.grad(out, wanted, gradient))

    names = ("x", "weights", "gate_up", "down")
    for name, actual, expected in zip(
        names, run(kernels.moe_experts), run(reference.moe_experts), strict=True
    ):
        require_equal(actual, expected, f"gradient of {name}", GRADIENT_LIMIT)
    flops, traffic = work(tokens, EXPERTS)
    measurement = compare(
        "experts, forward and backward",
        tokens,
        lambda: run(kernels.moe_experts),
        "torch grouped_mm",
        lambda: run(reference.moe_experts),
        3 * flops,
        3 * traffic,
    )
    for leaf in leaves:
        leaf.requires_grad_(False)
    return measurement


def step(layer: Layer) -> Tensor:
    """What a decoding step does, its choice of experts included."""
    return kernels.decode_experts(layer.x, layer.logits, TOP_K, True, layer.gate_up, layer.down)


def measure_decode(tokens: int) -> Measurement:
    """A few layers in one CUDA graph, divided by their number; the definition cannot be captured and runs eagerly."""
    layers = [random_layer(tokens) for _ in range(DECODE_LAYERS)]
    for layer in layers:
        require_equal(step(layer), reference.moe_experts(*layer.arguments), f"experts, {tokens} tokens")

    def run() -> None:
        for layer in layers:
            step(layer)

    distinct = sum(len(layer.experts.unique()) for layer in layers) / DECODE_LAYERS

    def run_baseline() -> None:
        for layer in layers:
            reference.moe_experts(*layer.arguments)

    flops, traffic = work(tokens, 1)
    traffic += 2.0 * (distinct - 1) * 3 * MODEL * WIDTH
    return compare(
        "experts, decoding",
        tokens,
        captured(run),
        "torch grouped_mm",
        run_baseline,
        flops,
        traffic,
        DECODE_LAYERS,
    )


def measure(lengths: Sequence[int] = LENGTHS) -> Iterator[Measurement]:
    """Decoding steps first, then each number of tokens; RuntimeError when a result is wrong."""
    torch.manual_seed(0)
    for tokens in DECODE_TOKENS:
        yield measure_decode(tokens)
    for tokens in lengths:
        layer = random_layer(tokens)
        yield measure_route(layer)
        yield measure_prefill(layer)
        if tokens <= BACKWARD_TOKENS:
            yield measure_backward(layer)
