"""New tokens of a model with adapters: the kernels against their definitions, steps from static buffers against the model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keyecli.engine.generate import GenerationSettings, generate
from keyecli.engine.static import StaticDecoder, suits
from keyecli.kernels import dispatch, experts, linear, low_rank, quantized_experts, reference
from keyecli.kernels import quantized_weights as weights
from keyecli.kernels.reference import Added, Branches, LowRank
from keyecli.model.cache import KeyeCache
from keyecli.model.checkpoint import load_model
from keyecli.model.lora import LoraSettings, add_lora, lora_parameters
from keyecli.model.quantize import Quantization, QuantizedLinear
from tests.compare import assert_close, assert_same
from tests.kernels.on_device import CUDA, DEVICE, DTYPES, HALF, poisoned
from tests.kernels.test_triton_experts import exact, problem
from tests.kernels.test_triton_static import eager, prefilled
from tests.model.test_lora import fill
from tests.model.test_training import fresh
from tests.model.test_trunk import text
from tests.tiny import tiny_config, write_checkpoint

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALE = 1.5
# Rows, inputs, and where each addition begins, how many outputs it has and of which rank, with those between and behind.
LINEAR = [
    (1, 64, ((0, 32, 16),), 32),
    (3, 100, ((0, 21, 3), (21, 8, 1)), 37),
    (4, 16, ((2, 7, 1), (9, 5, 3), (20, 4, 4)), 29),
]
# Tokens, experts, choices, widths, and the ranks of both additions, 0 for none: whole tiles and tails.
EXPERTS = [
    (1, 4, 2, 32, 16, 16, 16),
    (2, 5, 3, 20, 24, 3, 1),
    (2, 3, 2, 35, 17, 0, 3),
    (2, 3, 1, 20, 12, 1, 0),
]
if CUDA:
    LINEAR += [
        (2, 64, ((0, 64, 3), (64, 32, 3), (96, 32, 3)), 160),
        (1, 2048, ((0, 4096, 16), (4096, 512, 16), (4608, 512, 16)), 6224),
        (8, 4096, ((0, 2048, 16),), 2048),
        (5, 2048, ((0, 151_936, 64),), 151_936),
    ]
    EXPERTS += [
        (1, 128, 8, 2048, 768, 16, 16),
        (8, 128, 8, 2048, 768, 16, 16),
        (5, 24, 3, 1000, 360, 128, 33),
    ]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def additions(inputs: int, parts: Sequence[tuple[int, int, int]]) -> list[Added]:
    return [
        Added(normal(rank, inputs) / inputs**0.5, normal(count, rank), SCALE + begin, begin)
        for begin, count, rank in parts
    ]


def added_weight(weight: Tensor, added: Sequence[Added], dtype: torch.dtype) -> Tensor:
    """The weight in float64 with additions of factors that are rounded."""
    total = weight.double()
    for part in added:
        first, second = part.first.to(dtype).double(), part.second.to(dtype).double()
        total[part.begin : part.begin + len(second)] += part.scale * second @ first
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR)
def test_linear_layers(shape: tuple[int, int, Any, int], dtype: torch.dtype) -> None:
    rows, inputs, parts, outputs = shape
    x, weight = (
        normal(rows, inputs + 8).to(dtype)[:, :inputs],
        (normal(outputs, inputs) / inputs**0.5).to(dtype),
    )
    added = additions(inputs, parts)
    with poisoned():
        joined = linear.linear(x, weight, added=added)
        wide = linear.linear(x, weight, torch.float32, added)
        behind = low_rank.add_low_rank(linear.linear(x, weight), x, added)
    defined = reference.add_low_rank(F.linear(x, weight), x, added)
    expected = x.double() @ added_weight(weight, added, dtype).T
    limits = {"relative": TOLERANCE[dtype], "cosine": TOLERANCE[dtype] ** 2}
    assert joined.dtype == dtype
    for name, actual in (("joined", joined), ("behind", behind), ("definition", defined)):
        assert_close(actual, expected, **limits, what=name)
    assert_same(wide, joined.float())
    for row in {0, rows - 1}:
        alone = x[row : row + 1]
        assert_same(linear.linear(alone, weight, added=added)[0], joined[row], what=f"row {row} alone")
        product = low_rank.add_low_rank(linear.linear(alone, weight), alone, added)
        assert_same(product[0], behind[row], what=f"row {row} alone, behind")


def test_outputs_that_nothing_is_added_to_keep_their_bits() -> None:
    """Not even NaN in the factors of others reaches them."""
    x, weight = normal(2, 32), normal(20, 32)
    added = additions(32, ((4, 3, 2), (7, 5, 2)))
    added[1].second.fill_(float("nan"))
    plain, joined = linear.linear(x, weight), linear.linear(x, weight, added=added)
    assert_same(joined[:, :4], plain[:, :4])
    assert_same(joined[:, 12:], plain[:, 12:])
    assert bool(joined[:, 4:7].isfinite().all())
    assert bool(joined[:, 7:12].isnan().all())


def test_additions_that_do_not_fit_are_refused() -> None:
    x, weight = normal(1, 16), normal(8, 16)
    with pytest.raises(ValueError, match="3 at most"):
        linear.linear(x, weight, added=additions(16, ((0, 2, 1),) * 4))
    with pytest.raises(ValueError, match="do not fit"):
        linear.linear(x, weight, added=additions(15, ((0, 2, 1),)))


def factors(num_experts: int, inputs: int, outputs: int, rank: int) -> LowRank | None:
    if not rank:
        return None
    return normal(num_experts, inputs, rank) / inputs**0.5, normal(num_experts, rank, outputs) * 0.5


def merged(matrix: Tensor, pair: LowRank | None, dtype: torch.dtype) -> Tensor:
    if pair is None:
        return matrix.double()
    first, second = (factor.to(dtype).double() for factor in pair)
    return matrix.double() + SCALE * first @ second


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", EXPERTS)
def test_experts(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Tokens that share experts, experts that nobody chose and that hold NaN, and the definition of the package."""
    tokens, num_experts, top_k, model, width, rank, next_rank = sizes
    x, _, _, gate_up, down = problem(tokens, num_experts, top_k, model, width, dtype)
    pairs = factors(num_experts, model, 2 * width, rank), factors(num_experts, width, model, next_rank)
    logits = normal(tokens, num_experts)
    logits[-1] = logits[0]
    chosen = reference.route(logits, top_k, True)
    used = torch.zeros(num_experts, dtype=torch.bool, device=DEVICE)
    used[chosen[1].flatten()] = True
    for tensor in (gate_up, down, *(pairs[0] or ()), *(pairs[1] or ())):
        tensor[~used] = float("nan")
    with poisoned():
        actual = experts.decode_experts(x, logits, top_k, True, gate_up, down, *pairs, SCALE)
    matrices = merged(gate_up, pairs[0], dtype), merged(down, pairs[1], dtype)
    assert actual.dtype == dtype
    limit = TOLERANCE[dtype]
    assert_close(actual, exact(x, *chosen, *matrices), relative=limit, cosine=limit**2)
    for row in {0, tokens - 1}:
        one = slice(row, row + 1)
        alone = experts.decode_experts(x[one], logits[one], top_k, True, gate_up, down, *pairs, SCALE)
        assert_same(alone[0], actual[row], what=f"token {row} alone")


@pytest.mark.parametrize("method", weights.METHODS if CUDA else ["int4"])
@pytest.mark.parametrize("ranks", [(3, 16), (0, 1), (1, 0)] if CUDA else [(3, 2)])
def test_quantised_experts(ranks: tuple[int, int], method: weights.Method) -> None:
    dtype, num_experts, model, width = HALF[0], 3, 64, 64
    gate_up = weights.quantise(normal(num_experts, 2 * width, model) / model**0.5, method, 64)
    down = weights.quantise(normal(num_experts, model, width) / width**0.5, method, 64)
    pairs = factors(num_experts, model, 2 * width, ranks[0]), factors(num_experts, width, model, ranks[1])
    x, logits = normal(2, model).to(dtype), normal(2, num_experts)
    with poisoned():
        actual = quantized_experts.quantized_experts(x, logits, 2, True, gate_up, down, True, *pairs, SCALE)
    dense = [weights.dequantise(matrix).mT for matrix in (gate_up, down)]
    matrices = [merged(matrix, pair, dtype) for matrix, pair in zip(dense, pairs, strict=True)]
    expected = exact(x, *reference.route(logits, 2, True), matrices[0], matrices[1])
    assert_close(actual, expected, relative=TOLERANCE[dtype], cosine=TOLERANCE[dtype] ** 2)
    alone = quantized_experts.quantized_experts(
        x[1:], logits[1:], 2, True, gate_up, down, True, *pairs, SCALE
    )
    assert_same(alone[0], actual[1])


@torch.no_grad()
def test_few_tokens_take_this_path_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _, gate_up, down = problem(2)
    pairs = factors(4, 32, 32, 2), factors(4, 16, 32, 2)
    logits = normal(2, 4)
    arguments = (x, logits, 2, True, gate_up, down, *pairs, SCALE)
    expected = dispatch.lora_experts(*arguments, "reference")
    assert_close(dispatch.lora_experts(*arguments, "triton"), expected, relative=1e-5)
    taken = experts.decode_experts(*arguments)
    assert_same(dispatch.lora_experts(*arguments, "triton"), taken)
    with torch.enable_grad():
        learnt = x.clone().requires_grad_()
        dispatch.lora_experts(learnt, *arguments[1:], "triton").sum().backward()
        assert learnt.grad is not None
    out = normal(2, 3, 8)
    added = additions(32, ((0, 8, 2),))
    wide = torch.stack((x, x, x), dim=1)
    expected = reference.add_low_rank(out.clone(), wide, added)
    for most in (2, 8):
        monkeypatch.setattr(dispatch, "DECODE_TOKENS", most)
        assert_close(dispatch.add_low_rank(out.clone(), wide, added, "triton"), expected, relative=1e-5)


def put_adapters(model: Any, **settings: Any) -> None:
    torch.manual_seed(1)
    add_lora(model, LoraSettings(rank=3, **settings))
    fill(model)
    model.eval()


def test_steps_are_those_of_the_model_and_follow_its_weights() -> None:
    """Two sequences, with everything adapted; between steps an optimiser's work in place."""
    tokens = 12
    model, cache = prefilled(2, tokens)
    put_adapters(model, targets=("attention", "experts", "head"))
    other = deepcopy(cache)
    assert suits(model, cache)
    static = StaticDecoder(model, cache)
    static.begin([tokens, tokens], [tokens, tokens])
    for step, ids in enumerate(([5, 77], [200, 9])):
        model.set_kernel_backend("reference")
        expected = eager(model, other, ids, tokens + step)
        model.set_kernel_backend("triton")
        actual = static.step(torch.tensor(ids, device=DEVICE))
        assert_close(actual, expected)
        with torch.no_grad():
            for parameter in lora_parameters(model).values():
                parameter.mul_(-1.5)
    assert_close(cache.k[:, :, : tokens + 2], other.k[:, :, : tokens + 2])
    # What decoding has made of the base's weights, training can compute with.
    model.set_kernel_backend("reference")
    learnt = text(1, 6).to(DEVICE)
    model(input_ids=learnt, labels=learnt).loss.backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(model).values())


@torch.no_grad()
def test_a_branch_has_the_bits_that_it_has_alone() -> None:
    shared, lengths, room = 7, [8, 10], 4
    model: Any = fresh(num_hidden_layers=1)
    model.to(DEVICE)
    put_adapters(model)
    model.set_kernel_backend("reference")

    def feed(into: KeyeCache, ids: Tensor) -> None:
        positions = torch.arange(into.length, into.length + ids.shape[1], device=DEVICE).expand(3, 1, -1)
        model.decode(model.embed(ids.to(DEVICE)), positions, into)

    branches = Branches(shared, room, len(lengths))
    cache = KeyeCache(model.config, branches.rows, device=DEVICE)
    feed(cache, text(1, shared))
    singles: list[KeyeCache] = []
    # What stands before the step is the same to the bit: on a GPU a library's products may depend on where their operands lie.
    for b in reversed(range(len(lengths))):
        cache.truncate(shared)
        feed(cache, text(1, shared + 20)[:, 20 - b : 20 - b + lengths[b] - shared])
        singles.insert(0, KeyeCache(model.config, branches.length, device=DEVICE))
        singles[0].copy_from(cache, cache.length)
        cache.copy_to_branch(branches, b, cache.length)
    model.set_kernel_backend("triton")
    together = StaticDecoder(model, cache, branches)
    together.begin(lengths, lengths)
    ids = torch.tensor([5, 77], device=DEVICE)
    logits = together.step(ids).clone()
    for b, single in enumerate(singles):
        alone = StaticDecoder(model, single)
        alone.begin([lengths[b]], [lengths[b]])
        assert_same(alone.step(ids[b : b + 1])[0], logits[b], what=f"branch {b}")


def test_generated_tokens_are_the_same(tiny_tokenizer: Any) -> None:
    """Greedy, prefill and decoding by the kernels and by the definitions."""
    model: Any = fresh(num_hidden_layers=1)
    model.to(DEVICE)
    put_adapters(model, dropout=0.5)
    answers = []
    for backend in ("reference", "triton"):
        model.set_kernel_backend(backend)
        cache = KeyeCache(model.config, 16, device=DEVICE)
        positions = torch.arange(10, device=DEVICE).expand(3, 1, 10)
        with torch.inference_mode():
            hidden = model.decode(model.embed(text(1, 10).to(DEVICE)), positions, cache)[:, -1:]
        settings = GenerationSettings(max_tokens=2)
        answers.append(generate(model, tiny_tokenizer, cache, hidden, 10, settings, stop_ids=()).token_ids)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2


@torch.no_grad()
def test_quantised_projections(tmp_path: Path) -> None:
    """Of a token, and of more than are new at a time: each as the modules one after the other."""
    config = tiny_config(hidden_size=64, num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "model", config=config)
    model: Any = load_model(folder, quantization=Quantization("int4"), device=DEVICE)
    put_adapters(model)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj.base_layer, QuantizedLinear)
    x = normal(1, dispatch.DECODE_TOKENS + 1, 64)
    modules = attention.q_proj, attention.k_proj, attention.v_proj
    model.set_kernel_backend("reference")
    expected = torch.cat([module(x) for module in modules], dim=-1)
    model.set_kernel_backend("triton")
    for tokens in (1, x.shape[1]):
        assert attention.can_join()
        projected = attention.projected(x[:, :tokens])[..., : expected.shape[-1]]
        assert_close(projected, expected[:, :tokens], relative=1e-5)
