"""Quantised experts in Triton: `quantized_experts`, defined by its namesake in `quantized_weights`.

Letters and routing as in `experts`, groups and words as in `quantized`. gate_up is [E, 2F, D], rows 0..F−1 gate, F..2F−1 up,
and down [E, D, F]: every output's words lie side by side.

Prefill: a layer's matrices are read back, one of the two at a time, and multiplied by the kernels of `experts`. Read back inside
their tiles they would be read back once for every tile of rows, by threads that the matrix units then wait for.

Decode (a few new tokens): two kernels that only stream words. The second takes all of a token's experts in one program, and so
adds them up without waiting for others. With low-rank additions a kernel of `low_rank` stands between the two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyecli.kernels.compile import CompileCase
from keyecli.kernels.device import dependent_launch, let_next_begin, wait_for_previous
from keyecli.kernels.experts import (
    CHOOSE_WARPS,
    PREFILL_TOKENS,
    activate_rows,
    choose_kernel,
    combine_rows,
    multiply_rows,
    padded,
    plan_of,
    route,
    sort_rows,
)
from keyecli.kernels.low_rank import (
    WITHOUT_DOWN,
    WITHOUT_GATE_UP,
    RoutedFactors,
    routed_inner,
    routed_low,
)
from keyecli.kernels.quantized import (
    code_products,
    format_case,
    format_constants,
    parts_of,
    read_back,
    scaled_products,
    signature_of,
)
from keyecli.kernels.quantized_weights import QuantizedMatrix
from keyecli.kernels.reference import LowRank

# What a program of the decode kernels holds: outputs of gate and as many of up; outputs of down, of all experts of a token, by
# the bits of a code.
GATE_OUTPUTS = 8
DOWN_OUTPUTS = {4: 8, 8: 4}
DOWN_WARPS = 8
# Programs that share an expert's product with A.
INNER_PROGRAMS = 4


@triton.jit
def _decode_gate_up_kernel(
    x, codes, scale, zero, experts, hidden, x_stride, F, first, low,
    TOP_K: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr, EVEN: tl.constexpr, ACTIVATED: tl.constexpr,
    PARTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PART: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """hidden[source] = silu(x · gate) · (x · up), rounded to x's type, for one source and a few columns.

    Not ACTIVATED: gate and up as they are, [source, 2F]. Programs behind the last columns do the products with A, where there
    is one.
    """
    wait_for_previous(DEPENDENT)
    # Not before, so that the next kernel finds the experts chosen without waiting.
    let_next_begin(DEPENDENT)
    source = tl.program_id(1)
    expert = tl.load(experts + source).to(tl.int64)
    if first is not None:
        blocks = tl.cdiv(F, OUTPUTS)
        if tl.program_id(0) >= blocks:
            own = x + (source // TOP_K).to(tl.int64) * x_stride
            width = GROUPS * WORDS * (32 // BITS)
            part = tl.program_id(0) - blocks
            routed_inner(own, first, low, source, expert, part, width, PARTS, RANK, RANKS, PART)
            return
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    groups = tl.arange(0, GROUPS_PADDED)[:, None, None]
    places = tl.arange(0, WORDS)[None, None, :]
    gate_rows = (expert * 2 * F + columns)[None, :, None] * GROUPS + groups
    up_rows = gate_rows + F * GROUPS
    inside = groups < GROUPS
    if EVEN:
        gate_words = tl.load(codes + gate_rows * WORDS + places, eviction_policy="evict_first")
        up_words = tl.load(codes + up_rows * WORDS + places, eviction_policy="evict_first")
        gate_scales = tl.load(scale + gate_rows).to(tl.float32)
        up_scales = tl.load(scale + up_rows).to(tl.float32)
        gate_zeros = gate_scales if FLOAT else tl.load(zero + gate_rows).to(tl.float32)
        up_zeros = up_scales if FLOAT else tl.load(zero + up_rows).to(tl.float32)
    else:
        present = (columns < F)[None, :, None] & inside
        gate_words = tl.load(codes + gate_rows * WORDS + places, mask=present, other=0)
        up_words = tl.load(codes + up_rows * WORDS + places, mask=present, other=0)
        gate_scales = tl.load(scale + gate_rows, mask=present, other=0.0).to(tl.float32)
        up_scales = tl.load(scale + up_rows, mask=present, other=0.0).to(tl.float32)
        gate_zeros = gate_scales if FLOAT else tl.load(zero + gate_rows, mask=present, other=0).to(tl.float32)
        up_zeros = up_scales if FLOAT else tl.load(zero + up_rows, mask=present, other=0).to(tl.float32)
    pointers = x + (source // TOP_K).to(tl.int64) * x_stride + groups * (WORDS * (32 // BITS)) + places
    gate = tl.zeros([GROUPS_PADDED, OUTPUTS, WORDS], tl.float32)
    up = tl.zeros([GROUPS_PADDED, OUTPUTS, WORDS], tl.float32)
    vectors = tl.zeros([GROUPS_PADDED, 1, WORDS], tl.float32)
    for slot in tl.static_range(32 // BITS):
        vector = tl.load(pointers + slot * WORDS, mask=inside, other=0.0).to(tl.float32)
        vectors += vector
        gate = code_products(gate, gate_words, vector, slot, BITS, FLOAT)
        up = code_products(up, up_words, vector, slot, BITS, FLOAT)
    gate = scaled_products(gate, vectors, gate_scales, gate_zeros, FLOAT)
    up = scaled_products(up, vectors, up_scales, up_zeros, FLOAT)
    gate_sum = tl.sum(tl.sum(gate, 2), 0)
    up_sum = tl.sum(tl.sum(up, 2), 0)
    if ACTIVATED:
        activated = gate_sum / (1 + tl.exp(-gate_sum)) * up_sum
        # Rounded, as the definition's activations are, and stored wide: the next kernel then has them four to a thread.
        activated = activated.to(x.dtype.element_ty).to(tl.float32)
        tl.store(hidden + source * F + columns, activated, mask=columns < F)
    else:
        tl.store(hidden + source * 2 * F + columns, gate_sum, mask=columns < F)
        tl.store(hidden + source * 2 * F + F + columns, up_sum, mask=columns < F)


@triton.jit
def _decode_down_kernel(
    hidden, codes, scale, zero, experts, weights, out, D, low, second, factor_scale,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, FLOAT: tl.constexpr,
    PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[token] = Σ over slots of weight · (hidden · down, and with `second` what B makes of `low`), for one token and a few
    columns.

    The experts were chosen before the kernel that this one follows, which lets it begin only then: a program's words, all of
    them, are on their way while gate and up are still worked out.
    """
    let_next_begin(DEPENDENT)
    token = tl.program_id(1)
    slots = tl.arange(0, SLOTS)
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    groups = tl.arange(0, GROUPS_PADDED)[:, None, None, None]
    places = tl.arange(0, WORDS)[None, None, None, :]
    expert = tl.load(experts + token * TOP_K + slots, mask=slots < TOP_K, other=0).to(tl.int64)
    weight = tl.load(weights + token * TOP_K + slots, mask=slots < TOP_K, other=0.0)
    rows = (expert[:, None] * D + columns[None, :])[None, :, :, None] * GROUPS + groups
    inside = (slots < TOP_K)[None, :, None, None] & (groups < GROUPS)
    present = inside & (columns < D)[None, None, :, None]
    words = tl.load(codes + rows * WORDS + places, mask=present, other=0, eviction_policy="evict_first")
    scales = tl.load(scale + rows, mask=present, other=0.0).to(tl.float32)
    zeros = scales if FLOAT else tl.load(zero + rows, mask=present, other=0).to(tl.float32)
    kind: tl.constexpr = out.dtype.element_ty
    if second is not None:
        ranks = tl.arange(0, RANKS)
        own = second + ((expert[:, None] * RANK + ranks[None, :]) * D)[:, :, None] + columns[None, None, :]
        known = (slots < TOP_K)[:, None, None] & (ranks < RANK)[None, :, None] & (columns < D)[None, None, :]
        factors = tl.load(own, mask=known, other=0.0).to(kind).to(tl.float32)
    wait_for_previous(DEPENDENT)
    width = GROUPS * WORDS * (32 // BITS)
    sources = (token * TOP_K + slots)[None, :, None, None]
    pointers = hidden + sources * width + groups * (WORDS * (32 // BITS)) + places
    total = tl.zeros([GROUPS_PADDED, SLOTS, OUTPUTS, WORDS], tl.float32)
    vectors = tl.zeros([GROUPS_PADDED, SLOTS, 1, WORDS], tl.float32)
    for slot in tl.static_range(32 // BITS):
        vector = tl.load(pointers + slot * WORDS, mask=inside, other=0.0)
        vectors += vector
        total = code_products(total, words, vector, slot, BITS, FLOAT)
    total = scaled_products(total, vectors, scales, zeros, FLOAT)
    routed = tl.sum(tl.sum(total, 3), 0)
    if second is not None:
        chosen = token * TOP_K + slots
        vectors = routed_low(low, chosen, slots < TOP_K, factor_scale, kind, PARTS, PARTS_PADDED, RANKS)
        routed += tl.sum(vectors[:, :, None] * factors, 1)
    mixed = tl.sum(routed * weight[:, None], 0)
    tl.store(out + token * D + columns, mixed.to(kind), mask=columns < D)


def prefill_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: QuantizedMatrix, down: QuantizedMatrix
) -> Tensor:
    """x [T, D] through chosen experts: `experts.moe_experts` with quantised matrices, without gradients.

    The workspace is that of `moe_experts` and one of the two matrices of all experts in x's type.
    """
    num_experts, top_k = gate_up.shape[0], experts.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for begin in range(0, len(x), PREFILL_TOKENS):
        part = slice(begin, begin + PREFILL_TOKENS)
        plan = plan_of(x, experts[part].numel(), num_experts)
        rows = sort_rows(experts[part], num_experts, plan.rows)
        hidden = activate_rows(x[part], read_back(gate_up, x.dtype), rows, top_k, plan)
        routed = multiply_rows(hidden, read_back(down, x.dtype), rows, weights[part], False, plan)
        combine_rows(routed, out[part])
    return out


def decode_experts(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    normalise: bool,
    gate_up: QuantizedMatrix,
    down: QuantizedMatrix,
    gate_up_factors: LowRank | None = None,
    down_factors: LowRank | None = None,
    scale: float = 1.0,
) -> Tensor:
    """A few tokens x [T, D] through the experts that their router logits [T, E] choose: three kernels of fixed shape, with
    factors four."""
    (tokens, model), (num_experts, double, _) = x.shape, gate_up.shape
    width, device = double // 2, x.device
    out = torch.empty(x.shape, dtype=x.dtype, device=device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=device)
    adapted: RoutedFactors | None = None
    if gate_up_factors is not None or down_factors is not None:
        adapted = RoutedFactors(
            x, tokens * top_k, gate_up_factors, down_factors, scale, width, INNER_PROGRAMS
        )
    made = width if adapted is None else double
    hidden = torch.empty(1, tokens * top_k, made, dtype=torch.float32, device=device)
    dependent = dependent_launch(device)
    choose_kernel[(tokens,)](
        logits, weights, experts, logits.stride(0),
        E=num_experts, E_PADDED=padded(num_experts), TOP_K=top_k, NORMALISE=normalise, num_warps=CHOOSE_WARPS, **dependent,
    )  # fmt: skip
    form = format_constants(gate_up)
    groups = triton.next_power_of_2(form["GROUPS"])
    even = groups == form["GROUPS"] and width % GATE_OUTPUTS == 0
    blocks = triton.cdiv(width, GATE_OUTPUTS) + (0 if adapted is None else adapted.parts)
    _decode_gate_up_kernel[(blocks, tokens * top_k)](
        x, *parts_of(gate_up), experts, hidden, x.stride(0), width,
        TOP_K=top_k, OUTPUTS=GATE_OUTPUTS, GROUPS_PADDED=groups, EVEN=even, ACTIVATED=adapted is None, **form,
        **(WITHOUT_GATE_UP if adapted is None else adapted.gate_up_arguments()),
        num_warps=_gate_warps(groups * form["WORDS"]), **dependent,
    )  # fmt: skip
    if adapted is not None:
        hidden = adapted.activate(x, hidden, experts)
    form = format_constants(down)
    down_outputs = DOWN_OUTPUTS[form["BITS"]]
    _decode_down_kernel[(triton.cdiv(model, down_outputs), tokens)](
        hidden, *parts_of(down), experts, weights, out, model,
        TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k), OUTPUTS=down_outputs,
        GROUPS_PADDED=triton.next_power_of_2(form["GROUPS"]), **form,
        **(WITHOUT_DOWN if adapted is None else adapted.down_arguments()), num_warps=DOWN_WARPS, **dependent,
    )  # fmt: skip
    return out


def _gate_warps(words: int) -> int:
    """Four words a thread, all of an output's side by side."""
    return min(8, max(1, words // 128))


def quantized_experts(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    normalise: bool,
    gate_up: QuantizedMatrix,
    down: QuantizedMatrix,
    few: bool,
    gate_up_factors: LowRank | None = None,
    down_factors: LowRank | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x [T, D] through the experts that router logits [T, E] choose → [T, D]; see `quantized_weights.quantized_experts`.

    `few`: by matrix-vector products, and then a token's result is the same whatever stands beside it; only then with factors,
    as `quantized_weights.quantized_lora_experts` takes them. ValueError when shapes do not fit together, and where a gradient
    would be wanted.
    """
    (tokens, model), (num_experts, double, inner) = x.shape, gate_up.shape
    if (
        inner != model
        or down.shape != (num_experts, model, double // 2)
        or logits.shape != (tokens, num_experts)
    ):
        shapes = ", ".join(str(list(part.shape)) for part in (x, logits, gate_up, down))
        raise ValueError(f"x, logits, gate_up and down do not fit together: {shapes}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("the kernels of quantised experts have no gradients: use the definition")
    x = x if x.stride(1) == 1 else x.contiguous()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if tokens == 0:
        return torch.zeros_like(x)
    with torch.cuda.device_of(x):
        if few:
            added = (gate_up_factors, down_factors, scale)
            return decode_experts(x, logits, top_k, normalise, gate_up, down, *added)
        return prefill_experts(x, *route(logits, top_k, normalise), gate_up, down)


def compile_cases(capability: int) -> list[CompileCase]:
    """The decode kernels in the 30B shape."""
    model, width, top_k = 2048, 768, 8
    others = dict.fromkeys(("F", "D", "x_stride"), "i32")
    others |= dict.fromkeys(("weights", "hidden", "first", "low", "second"), "*fp32")
    others |= {"experts": "*i32", "factor_scale": "fp32"}
    cases = []

    def add(name: str, kernel: Any, constants: dict[str, Any], warps: int) -> None:
        signature = signature_of(kernel, constants, others)
        aligned = tuple(name for name, kind in signature.items() if kind not in ("constexpr", "fp32"))
        cases.append(CompileCase(name, kernel, signature, constants, warps, 2, aligned))

    dependent = {"DEPENDENT": capability >= 90, "TOP_K": top_k}
    without_down = {name: value for name, value in WITHOUT_DOWN.items() if name != "factor_scale"}
    ranks = {"RANK": 16, "RANKS": 16}
    for method, label, gate_up_added, down_added in (
        ("int4", "", WITHOUT_GATE_UP, without_down),
        ("int8", "", WITHOUT_GATE_UP, without_down),
        ("fp8", "", WITHOUT_GATE_UP, without_down),
        (
            "int4",
            " adapted",
            {**ranks, "PARTS": INNER_PROGRAMS, "PART": 256},
            {**ranks, "PARTS": 12, "PARTS_PADDED": 16},
        ),
        (
            "fp8",
            " adapted",
            {**ranks, "PARTS": INNER_PROGRAMS, "PART": 256},
            {**ranks, "PARTS": 12, "PARTS_PADDED": 16},
        ),
    ):
        form = format_case(method, model)
        gate = {**form, **dependent, "OUTPUTS": GATE_OUTPUTS, "GROUPS_PADDED": form["GROUPS"], "EVEN": True}
        gate |= {"ACTIVATED": not label, **gate_up_added}
        add(
            f"{method} decode gate_up{label}",
            _decode_gate_up_kernel,
            gate,
            _gate_warps(form["GROUPS"] * form["WORDS"]),
        )
        form = format_case(method, width)
        groups = triton.next_power_of_2(form["GROUPS"])
        down = {
            **form,
            **dependent,
            "OUTPUTS": DOWN_OUTPUTS[form["BITS"]],
            "SLOTS": top_k,
            "GROUPS_PADDED": groups,
            **down_added,
        }
        add(f"{method} decode down{label}", _decode_down_kernel, down, DOWN_WARPS)
    return cases
