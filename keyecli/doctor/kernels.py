"""Every kernel run on this machine's GPU at small size and compared with its definition.

B batch, T queries, S keys, H heads, G key/value heads, d head dim, J indexer heads, e indexer dim: those of the 30B model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from keyecli.doctor.finding import Finding
from keyecli.errors import KernelError
from keyecli.kernels import dispatch, reference
from keyecli.kernels.dispatch import Backend, has_triton
from keyecli.kernels.quantized_weights import METHODS, QuantizedMatrix, quantise
from keyecli.model.shards import one_line

Outputs = tuple[Tensor, ...]

HEADS, GROUPS, DIM = 32, 4, 128
INDEX_HEADS, INDEX_DIM, TOP_K = 16, 64, 128
WIDTH, EXPERT_WIDTH, EXPERTS, EXPERTS_PER_TOKEN = 2048, 768, 16, 8
VISION_HEADS, VISION_DIM, PATCHES = 16, 72, 64
KEYS, QUERIES, NEW_TOKENS = 512, 256, 4
RANK = 16  # of an adapter
GROUP = 64  # inputs that share a scale
EPS = 1e-6
# ‖kernel − definition‖ / ‖definition‖ that 16-bit rounding explains; selections and routes must be the same.
LARGEST_ERROR = 1e-2
WITHOUT = "--kernels reference does without kernels, slowly; update the NVIDIA driver, torch and triton"


@dataclass(frozen=True)
class Case:
    """One public operation: its name, a run on a backend, and whether the outputs must be equal to the last bit."""

    operation: str
    run: Callable[[Backend], Outputs]
    exact: bool = False


def check_kernels(on_progress: Callable[[str], None]) -> Iterator[Finding]:
    """One finding for an operation of each GPU; on a machine without one, that the definitions compute."""
    if not torch.cuda.is_available():
        text = "no GPU here: their definitions in PyTorch compute, right but slow"
        yield Finding("kernels", "kernels", "ok", text, details={"backend": "reference"})
        return
    if not has_triton():
        text = "the package triton is not installed: the definitions in PyTorch compute, slowly and with more memory"
        yield Finding("kernels", "kernels", "warning", text, "pip install triton", {"backend": "reference"})
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        with torch.cuda.device(device), torch.no_grad():
            for case in cases(device):
                on_progress(f"{case.operation} on {device}")
                yield check_case(case, device)


def check_case(case: Case, device: torch.device) -> Finding:
    """Compile and run one operation on the GPU and compare."""
    begin = time.perf_counter()
    try:
        actual = case.run("triton")
        torch.cuda.synchronize(device)
    except (KernelError, RuntimeError) as error:
        return Finding("kernels", case.operation, "problem", f"fails on {device}: {one_line(error)}", WITHOUT)
    seconds = time.perf_counter() - begin
    return compare(case, actual, case.run("reference"), device, seconds)


def compare(case: Case, actual: Outputs, expected: Outputs, device: torch.device, seconds: float) -> Finding:
    """The finding about outputs that should be the definition's."""
    details = {"device": str(device), "seconds": round(seconds, 3)}
    if case.exact:
        same = all(torch.equal(a.long(), e.long()) for a, e in zip(actual, expected, strict=True))
        if same:
            text = f"the same as the definition on {device}"
            return Finding("kernels", case.operation, "ok", text, details=details)
        text = f"differs from the definition on {device}"
        return Finding("kernels", case.operation, "problem", text, WITHOUT, details)
    error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    details["relative_error"] = error
    text = f"relative error {error:.1e} against the definition on {device}"
    if error <= LARGEST_ERROR:
        return Finding("kernels", case.operation, "ok", text, details=details)
    return Finding(
        "kernels", case.operation, "problem", f"{text}, allowed {LARGEST_ERROR:.0e}", WITHOUT, details
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; infinite when anything is not a number."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def cases(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """All public operations of `dispatch` in the 30B model's head sizes, a few hundred tokens, from a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).mul_(scale).to(dtype)

    def small(*shape: int) -> Tensor:
        # Small whole numbers: every sum is exact in any order, so that a selection has one right answer, ties included.
        return torch.randint(-2, 3, shape, device=device, generator=generator).to(dtype)

    index = (
        small(1, QUERIES, INDEX_HEADS, INDEX_DIM),
        small(1, QUERIES, INDEX_HEADS),
        small(1, KEYS, INDEX_DIM),
    )
    yield Case(
        "select_keys", lambda backend: (dispatch.select_keys(*index, TOP_K, backend=backend),), exact=True
    )

    q, k, v = randn(1, QUERIES, HEADS, DIM), randn(1, KEYS, GROUPS, DIM), randn(1, KEYS, GROUPS, DIM)
    indices = reference.select_keys(*index, TOP_K)
    yield Case("attend_indices", lambda backend: dispatch.attend_indices(q, k, v, indices, backend))
    lse = reference.attend_indices(q, k, v, indices)[1]
    yield Case(
        "selected_probabilities",
        lambda backend: (dispatch.selected_probabilities(q, k, indices, lse, backend),),
    )
    few, few_indices = q[:, -NEW_TOKENS:], indices[:, -NEW_TOKENS:].contiguous()
    yield Case("attended", lambda backend: (dispatch.attended(few, k, v, few_indices, backend),))

    k8, v8 = (reference.stored(rows, torch.float8_e4m3fn) for rows in (k, v))
    yield Case("attend_indices kv fp8", lambda backend: dispatch.attend_indices(q, k8, v8, indices, backend))
    yield Case("attended kv fp8", lambda backend: (dispatch.attended(few, k8, v8, few_indices, backend),))

    one, two, three = (randn(2, PATCHES, VISION_HEADS, VISION_DIM) for _ in range(3))
    yield Case(
        "frame_attention", lambda backend: (dispatch.frame_attention(one, two, three, backend=backend),)
    )

    # Distinct values, so that the order of the experts is one of a kind.
    order = torch.rand(QUERIES, EXPERTS, device=device, generator=generator).argsort(-1)
    logits = (order.float() / 4).to(dtype)
    yield Case(
        "route", lambda backend: (dispatch.route(logits, EXPERTS_PER_TOKEN, True, backend)[1],), exact=True
    )
    weights, experts = reference.route(logits, EXPERTS_PER_TOKEN, True)
    x = randn(QUERIES, WIDTH)
    gate_up = randn(EXPERTS, WIDTH, 2 * EXPERT_WIDTH, scale=WIDTH**-0.5)
    down = randn(EXPERTS, EXPERT_WIDTH, WIDTH, scale=EXPERT_WIDTH**-0.5)
    yield Case(
        "moe_experts",
        lambda backend: (dispatch.moe_experts(x, weights, experts, gate_up, down, backend),),
    )

    new = slice(0, NEW_TOKENS)
    yield Case(
        "routed_experts",
        lambda backend: (
            dispatch.routed_experts(
                x[new], logits[new], EXPERTS_PER_TOKEN, True, gate_up, down, backend=backend
            ),
        ),
    )
    square = randn(WIDTH, WIDTH, scale=WIDTH**-0.5)
    yield Case("linear", lambda backend: (dispatch.linear(x[new], square, backend=backend),))

    factors = [
        (randn(EXPERTS, inputs, RANK, scale=inputs**-0.5), randn(EXPERTS, RANK, outputs, scale=RANK**-0.5))
        for inputs, outputs in ((WIDTH, 2 * EXPERT_WIDTH), (EXPERT_WIDTH, WIDTH))
    ]
    yield Case(
        "lora_experts",
        lambda backend: (
            dispatch.lora_experts(
                x, logits, EXPERTS_PER_TOKEN, True, gate_up, down, factors[0], factors[1], 0.5, backend
            ),
        ),
    )

    yield Case(
        "lora_experts of new tokens",
        lambda backend: (
            dispatch.lora_experts(
                x[new],
                logits[new],
                EXPERTS_PER_TOKEN,
                True,
                gate_up,
                down,
                factors[0],
                factors[1],
                0.5,
                backend,
            ),
        ),
    )
    low_rank = reference.Added(
        first=randn(RANK, WIDTH, scale=WIDTH**-0.5), second=randn(WIDTH, RANK, scale=RANK**-0.5), scale=0.5, begin=0
    )  # fmt: skip
    yield Case(
        "add_low_rank",
        # The operation adds in place.
        lambda backend: (dispatch.add_low_rank(x[new].clone(), x[new], (low_rank,), backend),),
    )

    yield from _quantised_cases(x[new], logits[new], square, gate_up, down)

    residual, delta, norm = randn(NEW_TOKENS, WIDTH), randn(NEW_TOKENS, WIDTH), 1 + randn(WIDTH, scale=0.1)

    def add_norm(backend: Backend) -> Outputs:
        summed = residual.clone()  # the operation adds in place
        return dispatch.add_norm(summed, delta, norm, EPS, backend), summed

    yield Case("add_norm", add_norm)

    positions = torch.arange(NEW_TOKENS, device=device, dtype=torch.int32) * 1000 + 7
    frequencies = tuple(1e7 ** (-torch.arange(dim // 2, device=device) * 2 / dim) for dim in (DIM, INDEX_DIM))
    yield Case(
        "token_tables",
        lambda backend: dispatch.token_tables(positions, (frequencies[0], frequencies[1]), dtype, backend),
    )
    yield _projections_case(device, randn)


def _quantised_cases(
    x: Tensor, logits: Tensor, square: Tensor, gate_up: Tensor, down: Tensor
) -> Iterator[Case]:
    """New tokens through quantised matrices, by each method; experts [E, in, out] as in `moe_experts`."""
    for method in METHODS:
        matrix = quantise(square, method, GROUP)
        gate_up_matrix, down_matrix = (
            quantise(weight.transpose(1, 2).contiguous(), method, GROUP) for weight in (gate_up, down)
        )

        def linear(backend: Backend, matrix: QuantizedMatrix = matrix) -> Outputs:
            return (dispatch.quantized_linear(x, matrix, backend=backend),)

        def experts(
            backend: Backend, one: QuantizedMatrix = gate_up_matrix, two: QuantizedMatrix = down_matrix
        ) -> Outputs:
            return (dispatch.quantized_experts(x, logits, EXPERTS_PER_TOKEN, True, one, two, backend),)

        def read_back(backend: Backend, matrix: QuantizedMatrix = gate_up_matrix) -> Outputs:
            return (dispatch.read_back(matrix, x.dtype, backend),)

        yield Case(f"quantized_linear {method}", linear)
        yield Case(f"read_back {method}", read_back)
        yield Case(f"quantized_experts {method}", experts)


def _projections_case(device: torch.device, randn: Callable[..., Tensor]) -> Case:
    """`place_projections` of one new token of several sequences, into caches that are partly filled."""
    shape = reference.StepShape(HEADS, GROUPS, DIM, INDEX_HEADS, INDEX_DIM, EPS, EPS)
    width = (HEADS + 2 * GROUPS) * DIM + INDEX_HEADS * INDEX_DIM + INDEX_HEADS + INDEX_DIM
    projected = randn(NEW_TOKENS, 1, width)
    lengths = torch.arange(NEW_TOKENS, device=device, dtype=torch.int32) * 7 + 3

    def tables(dim: int) -> tuple[Tensor, Tensor]:
        frequencies = 1e4 ** (-torch.arange(dim // 2, device=device) / (dim // 2))
        angles = (lengths[:, None, None] * frequencies).repeat(1, 1, 2)
        return angles.cos().to(projected.dtype), angles.sin().to(projected.dtype)

    def weight(size: int) -> Tensor:
        return 1 + randn(size, scale=0.1)

    norms = weight(DIM), weight(DIM), weight(INDEX_DIM), weight(INDEX_DIM), weight(INDEX_DIM)

    def cache(*size: int) -> Tensor:
        return torch.zeros(NEW_TOKENS, KEYS, *size, device=device, dtype=projected.dtype)

    def run(backend: Backend) -> Outputs:
        caches = cache(GROUPS, DIM), cache(GROUPS, DIM), cache(INDEX_DIM)
        placed = dispatch.place_projections(
            projected, (*tables(DIM), *tables(INDEX_DIM)), lengths, norms, caches, shape, backend
        )
        return (*placed, *caches)

    return Case("place_projections", run)
