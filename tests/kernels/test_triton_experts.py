"""The Triton experts and router against their definitions: on a GPU, or at toy size under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keyecli.kernels import experts as kernels
from keyecli.kernels import reference
from keyecli.kernels.device import device_capability
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, HALF, poisoned

# How far the outputs may be from exact ones, relative to the largest: rounding of the activations, then of the outputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def problem(
    tokens: int,
    num_experts: int = 4,
    top_k: int = 2,
    model: int = 32,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """x, weights, experts, gate_up and down of one random layer."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    weights, experts = reference.route(normal(tokens, num_experts), top_k, True)
    gate_up = normal(num_experts, model, 2 * width) * model**-0.5
    down = normal(num_experts, width, model) * width**-0.5
    return normal(tokens, model).to(dtype), weights, experts, gate_up.to(dtype), down.to(dtype)


def exact(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition, one expert at a time in float64. Experts that nobody chose are not read."""
    x, weights = x.double(), weights.double()
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        token, slot = (experts == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].double()).chunk(2, dim=-1)
        routed = (F.silu(gate) * up) @ down[expert].double()
        out = out.index_add(0, token, routed * weights[token, slot, None])
    return out


def run_backward(
    function: Any, inputs: Inputs, gradient: Tensor, wanted: tuple[int, ...] = (0, 1, 3, 4)
) -> tuple[Tensor, list[Tensor | None]]:
    """The output and the gradients of x, weights, (experts), gate_up, down."""
    leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    out = function(*leaves)
    out.backward(gradient.to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


def check(inputs: Inputs, what: str = "experts") -> None:
    """Output and all gradients against float64, with every buffer full of NaN before."""
    dtype = inputs[0].dtype
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    gradient = torch.randn(inputs[0].shape, generator=generator, device=DEVICE).to(dtype)
    expected, expected_gradients = run_backward(exact, inputs, gradient)
    with poisoned():
        out, gradients = run_backward(kernels.moe_experts, inputs, gradient)
    assert out.dtype == dtype
    limits = {"relative": TOLERANCE[dtype], "absolute": 1e-6, "cosine": TOLERANCE[dtype] ** 2 / 2}
    assert_close(out, expected, **limits, what=what)
    for name, actual, wanted in zip(
        ("x", "weights", "experts", "gate_up", "down"), gradients, expected_gradients, strict=True
    ):
        assert (actual is None) == (wanted is None)
        if actual is not None and wanted is not None:
            assert_close(actual, wanted, **limits, what=f"{what}: gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_equals_the_definition(tokens: int, dtype: torch.dtype) -> None:
    check(problem(tokens, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "model", "width"),
    [(11, 1, 1, 16, 16), (11, 4, 2, 20, 12), (3, 2, 2, 35, 17), (9, 2, 2, 35, 17), (3, 5, 4, 8, 24)],
)
def test_shapes_that_no_tile_divides(
    tokens: int, num_experts: int, top_k: int, model: int, width: int
) -> None:
    check(problem(tokens, num_experts, top_k, model, width))


@pytest.mark.parametrize("rows", [15, 16, 17])
def test_every_token_to_the_same_expert(rows: int) -> None:
    x, weights, experts, gate_up, down = problem(rows, top_k=1)
    check((x, weights, torch.full_like(experts, 3), gate_up, down))


@pytest.mark.parametrize("tokens", [4, 20])
def test_experts_that_nobody_chose_are_not_read(tokens: int) -> None:
    x, weights, _, gate_up, down = problem(tokens)
    experts = torch.tensor([[3, 1]], device=DEVICE).expand(tokens, 2)
    for unused in (0, 2):
        gate_up[unused], down[unused] = float("nan"), float("inf")
    check((x, weights, experts, gate_up, down))


def test_an_expert_without_rows_gets_a_gradient_of_zeros() -> None:
    inputs = problem(12)
    experts = torch.tensor([[0, 3]], device=DEVICE).expand(12, 2)
    inputs = (*inputs[:2], experts, *inputs[3:])
    with poisoned():
        _, gradients = run_backward(kernels.moe_experts, inputs, torch.ones_like(inputs[0]))
    for gradient in (gradients[3], gradients[4]):
        assert gradient is not None
        assert not gradient[1:3].any()
        assert bool(gradient[0].any())


def test_a_token_full_of_nan_stays_alone() -> None:
    for tokens in (4, 20):
        x, *rest = problem(tokens)
        clean = kernels.moe_experts(x, *rest)
        x[2] = float("nan")
        out = kernels.moe_experts(x, *rest)
        others = torch.arange(tokens, device=DEVICE) != 2
        assert bool(out[2].isnan().all())
        assert_same(out[others], clean[others])


@pytest.mark.parametrize("tokens", [3, 10])
def test_strides_and_integer_types(tokens: int) -> None:
    x, weights, experts, gate_up, down = problem(tokens, 3)
    expected = kernels.moe_experts(x, weights, experts, gate_up, down)
    wide = torch.full((tokens, 2 * x.shape[1]), float("nan"), device=DEVICE)
    wide[:, : x.shape[1]] = x
    arguments = {
        "rows of a wider tensor": (wide[:, : x.shape[1]], weights, experts, gate_up, down),
        "columns first": (x.t().contiguous().t(), weights, experts, gate_up, down),
        "transposed weights": (x, weights, experts, gate_up.mT.contiguous().mT, down.mT.contiguous().mT),
        "transposed routing": (x, weights.t().contiguous().t(), experts.t().contiguous().t(), gate_up, down),
        "int32 experts": (x, weights, experts.to(torch.int32), gate_up, down),
    }
    for what, changed in arguments.items():
        assert_same(kernels.moe_experts(*changed), expected, what=what)
    _, gradients = run_backward(kernels.moe_experts, (x, weights, experts, gate_up, down), torch.ones_like(x))
    leaf = x.clone().requires_grad_()
    kernels.moe_experts(leaf, weights, experts, gate_up, down).sum().backward()
    assert_same(leaf.grad, gradients[0], what="an expanded gradient")


@pytest.mark.parametrize("wanted", [(0,), (1,), (3, 4)])
def test_only_the_wanted_gradients(wanted: tuple[int, ...]) -> None:
    inputs = problem(10, 2, 1)
    gradient = torch.randn_like(inputs[0])
    _, everything = run_backward(kernels.moe_experts, inputs, gradient)
    _, some = run_backward(kernels.moe_experts, inputs, gradient, wanted)
    for place, value in enumerate(some):
        assert (value is not None) == (place in wanted)
        if value is not None:
            assert_same(value, everything[place])


def test_parts_of_the_workspace_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(21, 3)
    whole = kernels.moe_experts(*inputs)
    monkeypatch.setattr(kernels, "PREFILL_TOKENS", 16)
    parts = kernels.moe_experts(*inputs)
    if CUDA:
        assert_same(parts, whole)
    else:
        # The interpreter multiplies with the CPU's BLAS, whose sums may hang on where in a tile a row stands.
        assert_close(parts, whole, relative=1e-6)


@pytest.mark.parametrize("tma", [False, True])
def test_descriptors_or_pointers_are_the_same(tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors exist from Hopper on; elsewhere the plan never asks for them."""
    sizes = {"tokens": 4000, "model": 512, "width": 384} if CUDA else {"tokens": 18, "num_experts": 2}
    inputs = problem(**sizes, dtype=HALF[0])
    capability = device_capability(inputs[0].device)
    original = kernels.plan_for
    tma = tma and capability in (0, 90)
    monkeypatch.setattr(kernels, "plan_for", lambda *a: replace(original(*a), tma=tma))
    check(inputs, f"tma {tma}")


def test_results_repeat_to_the_bit() -> None:
    for tokens in (8, 2000 if CUDA else 17):
        inputs = problem(
            tokens,
            dtype=HALF[0],
            **({"model": 512, "width": 384} if CUDA else {"num_experts": 2, "model": 16}),
        )
        gradient = torch.randn_like(inputs[0])
        first = run_backward(kernels.moe_experts, inputs, gradient)
        for _ in range(20 if CUDA else 1):
            again = run_backward(kernels.moe_experts, inputs, gradient)
            assert_same(again[0], first[0])
            for place in (0, 1, 3, 4):
                assert_same(again[1][place], first[1][place])


def test_equals_the_definition_of_the_package() -> None:
    """Where torch multiplies groups of this type: fp32 on the CPU, bf16 on a GPU."""
    inputs = problem(21, dtype=torch.bfloat16 if CUDA else torch.float32)
    limit = TOLERANCE[inputs[0].dtype]
    assert_close(
        kernels.moe_experts(*inputs), reference.moe_experts(*inputs), relative=limit, cosine=limit**2 / 2
    )


def test_what_does_not_fit_is_refused() -> None:
    x, weights, experts, gate_up, down = problem(3)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.moe_experts(x, weights, experts, gate_up, down[:, :, :-1])
    with pytest.raises(ValueError, match="do not fit"):
        kernels.moe_experts(x[:2], weights, experts, gate_up, down)
    with pytest.raises(ValueError, match="one type"):
        kernels.moe_experts(x.half(), weights, experts, gate_up, down)
    assert kernels.moe_experts(x[:0], weights[:0], experts[:0], gate_up, down).shape == (0, 32)


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "tile_rows"), [(1, 1, 1, 16), (300, 2, 5, 16), (64, 4, 128, 64)]
)
@pytest.mark.parametrize("crowd", [False, True])
def test_sorting(
    tokens: int, top_k: int, num_experts: int, tile_rows: int, crowd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SORT_ROWS", 32)
    monkeypatch.setattr(kernels, "SCAN_BLOCKS", 16)
    experts = torch.randint(num_experts, (tokens, top_k), device=DEVICE)
    if crowd:
        experts[:] = num_experts - 1
    with poisoned():
        rows = kernels.sort_rows(experts, num_experts, tile_rows)
    keys = experts.flatten()
    assert_same(rows.order.long(), keys.argsort(stable=True))
    counts = torch.bincount(keys, minlength=num_experts)
    assert_same(rows.totals[:-1].long(), counts)
    tiles = int(rows.totals[-1])
    assert tiles == int(((counts + tile_rows - 1) // tile_rows).sum()) <= rows.tiles
    end = 0
    for expert, first, last in rows.tile_map[:, :tiles].t().tolist():
        assert first == end
        assert last == int(counts[: expert + 1].sum())
        end = min(first + tile_rows, last)
        assert bool((keys[rows.order[first:end].long()] == expert).all())
    assert end == len(keys)


# Routing.


def check_route(logits: Tensor, top_k: int, normalise: bool) -> None:
    expected_logits = logits.detach().double().requires_grad_()
    probabilities = expected_logits.softmax(-1)
    _, expected_experts = reference.route(logits, top_k, normalise)
    expected = probabilities.gather(1, expected_experts)
    if normalise:
        expected = expected / expected.sum(-1, keepdim=True)
    leaf = logits.detach().clone().requires_grad_()
    with poisoned():
        weights, experts = kernels.route(leaf, top_k, normalise)
        gradient = torch.randn(weights.shape, device=DEVICE)
        weights.backward(gradient)
    assert weights.dtype == torch.float32
    assert not experts.requires_grad
    assert_same(experts, expected_experts, what="experts")
    assert_close(weights, expected, relative=2e-6, absolute=1e-7, what="weights")
    expected.backward(gradient.double())
    limit = TOLERANCE[logits.dtype]
    # One weight that is always 1 has no gradient but rounding, whose direction says nothing.
    cosine = 2.0 if normalise and top_k == 1 else limit**2
    assert_close(
        leaf.grad, expected_logits.grad, relative=limit, absolute=1e-7, cosine=cosine, what="gradient"
    )


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k"),
    [(1, 4, 2), (17, 128, 8), (33, 6, 6), (5, 20, 1), (16, 1, 1), (7, 9, 3)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_route_equals_the_definition(
    tokens: int, num_experts: int, top_k: int, normalise: bool, dtype: torch.dtype
) -> None:
    # Logits a quarter apart: no two probabilities are so near that rounding could decide their order, but many are equal.
    steps = torch.randint(-12, 12, (tokens, num_experts), device=DEVICE)
    check_route((steps / 4).to(dtype), top_k, normalise)


def test_route_gives_equal_logits_to_the_lower_expert() -> None:
    for num_experts in (6, 128):
        logits = torch.zeros(3, num_experts, device=DEVICE)
        logits[1, num_experts // 2 :] = 1
        logits[2, ::2] = -300.0
        _, experts = kernels.route(logits, 4, True)
        first = num_experts // 2
        expected = [[0, 1, 2, 3], [first, first + 1, first + 2, (first + 3) % num_experts], [1, 3, 5, 7]]
        if num_experts == 6:
            expected[1:] = [[3, 4, 5, 0], [1, 3, 5, 0]]
        assert experts.tolist() == expected


def test_route_of_extreme_logits() -> None:
    logits = torch.tensor(
        [[1e4, -1e4, 0, 3], [-1e4, -1e4, -1e4, -1e4], [float("-inf"), 2, float("-inf"), 1]], device=DEVICE
    )
    for normalise in (True, False):
        check_route(logits, 2, normalise)


def test_route_of_nan_keeps_its_experts_inside() -> None:
    logits = torch.randn(20, 9, device=DEVICE)
    clean = kernels.route(logits, 3, True)
    logits[4, 2], logits[5] = float("nan"), float("inf")
    weights, experts = kernels.route(logits, 3, True)
    for row in (4, 5):
        assert bool(weights[row].isnan().all())
        assert len(set(experts[row].tolist())) == 3
        assert 0 <= int(experts[row].min()) <= int(experts[row].max()) < 9
    others = torch.tensor([row not in (4, 5) for row in range(20)], device=DEVICE)
    assert_same(weights[others], clean[0][others])
    assert_same(experts[others], clean[1][others])


def test_route_reads_strided_logits_and_refuses_nonsense() -> None:
    logits = torch.randn(18, 24, device=DEVICE)
    for part in (logits[:, :12], logits[::2], logits.t()):
        weights, experts = kernels.route(part, 3, True)
        expected = kernels.route(part.contiguous(), 3, True)
        # On a GPU another stride may mean wider loads, and so another order of the softmax's sum.
        assert_close(weights, expected[0], relative=1e-6, absolute=0, cosine=1e-12)
        assert_same(experts, expected[1])
    with pytest.raises(ValueError, match="cannot be chosen"):
        kernels.route(logits, 25, True)
    assert kernels.route(logits[:0], 3, True)[1].shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("sizes", [(1, 4, 2, 32, 16), (3, 5, 3, 40, 24), (8, 16, 4, 32, 48)])
def test_decoding_is_the_definition(
    sizes: tuple[int, int, int, int, int], normalise: bool, dtype: torch.dtype
) -> None:
    """Tokens, experts, choices, widths: whole tiles and tails; ties between experts in every row."""
    tokens, num_experts, top_k, model, width = sizes
    x, _, _, gate_up, down = problem(tokens, num_experts, top_k, model, width, dtype)
    logits = torch.randn(tokens, num_experts, device=DEVICE)
    logits[:, -1] = logits[:, 0]
    # Experts that nobody chose are not read.
    unused = torch.ones(num_experts, dtype=torch.bool, device=DEVICE)
    weights, experts = reference.route(logits, top_k, normalise)
    unused[experts.flatten()] = False
    gate_up[unused], down[unused] = float("nan"), float("nan")
    with poisoned():
        actual = kernels.decode_experts(x, logits, top_k, normalise, gate_up, down)
    expected = exact(x, weights, experts, gate_up, down)
    assert actual.dtype == dtype
    assert_close(actual, expected, relative=TOLERANCE[dtype], cosine=TOLERANCE[dtype] ** 2)
    for row in range(tokens) if CUDA else {0, tokens - 1}:
        alone = kernels.decode_experts(
            x[row : row + 1], logits[row : row + 1], top_k, normalise, gate_up, down
        )
        assert_same(alone[0], actual[row], what=f"token {row} alone")


def test_decoding_of_extreme_logits() -> None:
    """Equal, infinite and NaN logits choose as the definition does, and never an expert that is not there."""
    x, _, _, gate_up, down = problem(4, 5, 3, 32, 16)
    logits = torch.zeros(4, 5, device=DEVICE)
    logits[1, 3] = 100.0
    logits[2] = float("-inf")
    logits[2, 4] = 0.0
    logits[3, 2] = float("nan")
    actual = kernels.decode_experts(x, logits, 3, True, gate_up, down)
    expected = reference.routed_experts(x[:3], logits[:3], 3, True, gate_up, down)
    assert_close(actual[:3], expected)
    assert bool(actual[3].isnan().all())


if CUDA:
    # Sizes and features that the interpreter has not.

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("tokens", [1, 7, 8, 9, 100, 1000, 5000])
    def test_wide_layers(tokens: int, dtype: torch.dtype) -> None:
        check(problem(tokens, 32, 8, 2048, 768, dtype))

    @pytest.mark.parametrize("tokens", [4, 3000])
    def test_wide_layers_of_odd_sizes(tokens: int) -> None:
        check(problem(tokens, 24, 3, 1000, 360, torch.bfloat16))

    def test_one_expert_takes_nearly_everything() -> None:
        x, weights, experts, gate_up, down = problem(3000, 64, 2, 512, 256, torch.bfloat16)
        experts[:2900] = torch.tensor([17, 18], device=DEVICE)
        check((x, weights, experts, gate_up, down))

    @pytest.mark.parametrize("tokens", [1, 4, 8])
    def test_decoding_in_a_graph(tokens: int) -> None:
        """Captured once, replayed with other inputs in the same buffers."""
        logits = torch.randn(tokens, 64, device=DEVICE)
        x, _, _, gate_up, down = problem(tokens, 64, 8, 1024, 512, torch.bfloat16)
        kernels.decode_experts(x, logits, 8, True, gate_up, down)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernels.decode_experts(x, logits, 8, True, gate_up, down)
        for seed in range(50):
            generator = torch.Generator(device=DEVICE).manual_seed(seed)
            x.normal_(generator=generator)
            logits.normal_(generator=generator)
            out.fill_(float("nan"))
            graph.replay()
            assert_same(out, kernels.decode_experts(x, logits, 8, True, gate_up, down))
