"""Which code computes an operation: `reference`, the definitions in PyTorch, or `triton`, the kernels beside this file.

Every function here has the signature of its namesake in `reference` and a `backend`; None leaves the choice to the device.
Letters as in `reference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from keyecli.errors import KernelError
from keyecli.kernels import quantized_weights, reference
from keyecli.kernels.quantized_weights import QuantizedMatrix

Backend = Literal["reference", "triton"]

# Up to here new tokens go through the kernels that read each weight once and split every list over the whole chip: most
# chosen experts are then chosen once (8 tokens make 64 choices among 128), so hardly a weight is read twice.
DECODE_TOKENS = 8


def backend_of(x: Tensor, backend: Backend | None) -> Backend:
    """The backend asked for, else "triton" for tensors on an NVIDIA GPU where Triton is installed, else "reference"."""
    if backend is not None:
        return backend
    return "triton" if x.is_cuda and has_triton() else "reference"


def has_triton() -> bool:
    """Whether Triton is installed; it is made for Linux."""
    return find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton's kernels run under its interpreter, without a GPU."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def select_keys(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    top_k: int,
    segments: Tensor | None = None,
    first_query: int | Tensor | None = None,
    backend: Backend | None = None,
    branches: reference.Branches | None = None,
    stepping: bool = False,
) -> Tensor:
    """`reference.select_keys`; with `branches`, k [1, rows, e] holds their keys, one branch for each of the B rows. stepping:
    as `selection.select_keys` says, one decoding step of many by the kernels."""
    if backend_of(q, backend) == "reference":
        k = k if branches is None else branches.unfolded(k)
        return reference.select_keys(q, w, k, top_k, segments, first_query)
    with _naming("the selection of keys", q.device):
        from keyecli.kernels import selection

        return selection.select_keys(
            q, w, k, top_k, segments, first_query, branches=branches, stepping=stepping
        )


def attend_indices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    backend: Backend | None = None,
    found: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attend_indices`: differentiable, with the logarithms of the denominators. found: both results, where they are
    known from before and the kernels need but their gradients."""
    if backend_of(q, backend) == "reference":
        return reference.attend_indices(q, k, v, indices)
    with _naming("sparse attention", q.device):
        from keyecli.kernels import attention

        return attention.sparse_attention(q, k, v, indices, found=found)


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    backend: Backend | None = None,
    branches: reference.Branches | None = None,
) -> Tensor:
    """The output of `attend_indices` alone, where no gradient is wanted; a few new tokens are attended to in parts.

    With `branches`, k and v [1, rows, G, d] hold their keys and values, one branch for each of the B rows.
    """
    few = q.shape[0] * q.shape[1] <= DECODE_TOKENS
    if backend_of(q, backend) == "reference" or torch.is_grad_enabled() or not few:
        if branches is not None:
            k, v = branches.unfolded(k), branches.unfolded(v)
        return attend_indices(q, k, v, indices, backend)[0]
    with _naming("sparse attention of new tokens", q.device):
        from keyecli.kernels import decode

        return decode.decode_attention(q, k, v, indices, branches=branches)


def selected_probabilities(
    q: Tensor, k: Tensor, indices: Tensor, lse: Tensor, backend: Backend | None = None
) -> Tensor:
    """`reference.selected_probabilities`."""
    if backend_of(q, backend) == "reference":
        return reference.selected_probabilities(q, k, indices, lse)
    with _naming("the weights of selected keys", q.device):
        from keyecli.kernels import attention

        return attention.selected_probabilities(q, k, indices, lse)


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`reference.frame_attention`."""
    if backend_of(q, backend) == "reference":
        return reference.frame_attention(q, k, v, cos, sin)
    with _naming("attention inside frames", q.device):
        from keyecli.kernels import vision

        return vision.frame_attention(q, k, v, cos, sin)


def route(
    logits: Tensor, top_k: int, normalise: bool, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.route`."""
    if backend_of(logits, backend) == "reference":
        return reference.route(logits, top_k, normalise)
    with _naming("routing", logits.device):
        from keyecli.kernels import experts

        return experts.route(logits, top_k, normalise)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """`reference.moe_experts`."""
    if backend_of(x, backend) == "reference":
        return reference.moe_experts(x, weights, experts, gate_up, down)
    with _naming("the experts", x.device):
        from keyecli.kernels import experts as kernels

        return kernels.moe_experts(x, weights, experts, gate_up, down)


def by_vectors(x: Tensor, backend: Backend | None = None) -> bool:
    """Whether x [T, D] goes through its experts by matrix-vector products: they read a weight once, on the device or in pinned
    memory of the host."""
    few = len(x) <= DECODE_TOKENS and not torch.is_grad_enabled()
    return few and backend_of(x, backend) == "triton"


def routed_experts(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    normalise: bool,
    gate_up: Tensor,
    down: Tensor,
    backend: Backend | None = None,
) -> Tensor:
    """`reference.routed_experts`; a few tokens, where no gradient is wanted, by matrix-vector products."""
    if not by_vectors(x, backend):
        return moe_experts(x, *route(logits, top_k, normalise, backend), gate_up, down, backend)
    with _naming("the experts of new tokens", x.device):
        from keyecli.kernels import experts as kernels

        return kernels.decode_experts(x, logits, top_k, normalise, gate_up, down)


def linear(
    x: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
    added: Sequence[reference.Added] = (),
) -> Tensor:
    """x [B, K] · weight [N, K]ᵀ → [B, N], with `added` as in `reference.add_low_rank`, for a few rows whose results do not depend
    on each other, stored as `out_dtype`."""
    if backend_of(x, backend) == "reference":
        product = reference.add_low_rank(torch.nn.functional.linear(x, weight), x, added)
        return product if out_dtype is None else product.to(out_dtype)
    with _naming("a linear layer", x.device):
        from keyecli.kernels import linear as kernels

        return kernels.linear(x, weight, out_dtype, added)


def add_low_rank(
    out: Tensor, x: Tensor, added: Sequence[reference.Added], backend: Backend | None = None
) -> Tensor:
    """`reference.add_low_rank`; results of a few rows do not depend on each other."""
    rows = x.reshape(-1, x.shape[-1])
    if not added or len(rows) > DECODE_TOKENS or backend_of(x, backend) == "reference":
        return reference.add_low_rank(out, x, added)
    with _naming("an adapter's addition", x.device):
        from keyecli.kernels import low_rank

        low_rank.add_low_rank(out.view(len(rows), -1), rows, added)
        return out


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, backend: Backend | None = None
) -> Tensor:
    """`reference.add_norm`."""
    if backend_of(x, backend) == "reference":
        return reference.add_norm(x, delta, weight, eps)
    with _naming("residual and norm", x.device):
        from keyecli.kernels import step

        return step.add_norm(x, delta, weight, eps)


def token_tables(
    positions: Tensor,
    frequencies: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.token_tables`."""
    if backend_of(positions, backend) == "reference":
        return reference.token_tables(positions, frequencies, dtype)
    with _naming("rotary tables", positions.device):
        from keyecli.kernels import step

        return step.token_tables(positions, frequencies, dtype)


def place_projections(
    projected: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: Tensor,
    norms: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    caches: tuple[Tensor, Tensor, Tensor],
    shape: reference.StepShape,
    backend: Backend | None = None,
    branches: reference.Branches | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.place_projections`."""
    arguments = (projected, tables, lengths, norms, caches, shape, branches)
    if backend_of(projected, backend) == "reference":
        return reference.place_projections(*arguments)
    with _naming("a new token's projections", projected.device):
        from keyecli.kernels import step

        return step.place_projections(*arguments)


def quantized_linear(
    x: Tensor,
    matrix: QuantizedMatrix,
    dense: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`quantized_weights.quantized_linear`; results of a few rows, where no gradient is wanted, do not depend on each other.
    Without `dense` differentiable in x."""
    if dense is None and x.requires_grad and torch.is_grad_enabled():
        return quantized_weights.frozen_product(x, matrix, partial(read_back, backend=backend))
    if backend_of(x, backend) == "reference":
        return quantized_weights.quantized_linear(x, matrix, dense)
    with _naming("a quantised linear layer", x.device):
        from keyecli.kernels import quantized

        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= DECODE_TOKENS and not torch.is_grad_enabled():
            return quantized.quantized_linear(rows, matrix, dense).view(*x.shape[:-1], -1)
        return x @ quantized.read_back(matrix, x.dtype, dense)


def read_back(matrix: QuantizedMatrix, dtype: torch.dtype, backend: Backend | None = None) -> Tensor:
    """The matrix [..., N, K] that codes stand for, transposed: [..., K, N] in `dtype`."""
    if backend_of(matrix.codes, backend) == "reference":
        return quantized_weights.dequantise(matrix, dtype).transpose(-1, -2)
    with _naming("reading quantised weights back", matrix.codes.device):
        from keyecli.kernels import quantized

        return quantized.read_back(matrix, dtype)


def quantized_experts(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    normalise: bool,
    gate_up: QuantizedMatrix,
    down: QuantizedMatrix,
    backend: Backend | None = None,
) -> Tensor:
    """`quantized_weights.quantized_experts`; a few tokens, where no gradient is wanted, by matrix-vector products."""
    if backend_of(x, backend) == "reference":
        return quantized_weights.quantized_experts(x, logits, top_k, normalise, gate_up, down)
    with _naming("the quantised experts", x.device):
        from keyecli.kernels import quantized_experts as kernels

        return kernels.quantized_experts(x, logits, top_k, normalise, gate_up, down, by_vectors(x, backend))


def lora_experts(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    normalise: bool,
    gate_up: Tensor | QuantizedMatrix,
    down: Tensor | QuantizedMatrix,
    gate_up_factors: reference.LowRank | None,
    down_factors: reference.LowRank | None,
    scale: float,
    backend: Backend | None = None,
) -> Tensor:
    """`reference.lora_experts` of x [T, D] for what `route` makes of its router logits [T, E]; no gradient reaches the matrices.
    Both may be quantised, as `quantized_weights.quantized_lora_experts` takes them. A few tokens, where no gradient is wanted, by
    matrix-vector products."""
    added = (gate_up_factors, down_factors, scale)
    if by_vectors(x, backend):
        with _naming("experts of new tokens with an adapter", x.device):
            return _adapted_vectors(x, logits, top_k, normalise, gate_up, down, *added)
    weights, experts = route(logits, top_k, normalise, backend)
    if isinstance(gate_up, QuantizedMatrix):
        assert isinstance(down, QuantizedMatrix)
        if backend_of(x, backend) == "reference":
            return quantized_weights.quantized_lora_experts(x, weights, experts, gate_up, down, *added)
    else:
        assert isinstance(down, Tensor)
        if backend_of(x, backend) == "reference":
            return reference.lora_experts(x, weights, experts, gate_up, down, *added)
    with _naming("experts with an adapter", x.device):
        from keyecli.kernels import lora_experts as kernels

        return kernels.lora_experts(x, weights, experts, gate_up, down, *added)


def _adapted_vectors(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    normalise: bool,
    gate_up: Tensor | QuantizedMatrix,
    down: Tensor | QuantizedMatrix,
    gate_up_factors: reference.LowRank | None,
    down_factors: reference.LowRank | None,
    scale: float,
) -> Tensor:
    """`lora_experts` of a few tokens by the kernels."""
    from keyecli.kernels import experts, quantized_experts

    added = (gate_up_factors, down_factors, scale)
    if isinstance(gate_up, QuantizedMatrix):
        assert isinstance(down, QuantizedMatrix)
        return quantized_experts.quantized_experts(x, logits, top_k, normalise, gate_up, down, True, *added)
    assert isinstance(down, Tensor)
    return experts.decode_experts(x, logits, top_k, normalise, gate_up, down, *added)


@contextmanager
def _naming(operation: str, device: torch.device) -> Iterator[None]:
    """Launches on this device, whichever is the current one. A kernel that does not compile, or does not fit the card, becomes a
    `KernelError` that names both."""
    from triton.errors import TritonError

    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except TritonError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise KernelError(
            f"the Triton kernel for {operation} does not compile for {_card(device)}: {lines[-1].strip()}; "
            "--kernels reference does without"
        ) from error


def _card(device: torch.device) -> str:
    if device.type != "cuda":
        return "Triton's interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
