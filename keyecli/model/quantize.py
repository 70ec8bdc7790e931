"""Quantised models: which matrices are quantised, the modules that compute with them, and how a folder says so.

What decides (the router, norms, the indexer, whose selection is discontinuous), what is looked up (embeddings) and what is
small beside the experts (vision tower, projector, output head) stays as it is. E experts, D width, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from keyecli.errors import ModelError, UsageError
from keyecli.kernels import dispatch
from keyecli.kernels.quantized_weights import CODE_BITS, METHODS, WORD_BITS, Method, QuantizedMatrix
from keyecli.model.config import KeyeVL2Config
from keyecli.model.moe import Experts

if TYPE_CHECKING:
    from keyecli.model.offload import HostExperts

GROUPS = (64, 128)
DEFAULT_GROUP = 64
FORMAT_VERSION = 1
QUANT_METHOD = "keyecli"

# Modules whose matrices are quantised: N is a layer. Those whose inputs no whole groups make up stay as they are.
QUANTISED_LINEARS = re.compile(r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)")
QUANTISED_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.experts")

# What a quantised matrix [..., N, K] is in the files, under its module's name, in groups of G inputs, P codes a word:
# name → type there and inputs for each of the last dimension; int4 and int8 have all, fp8 has no zero.
STORED_PARTS = {"codes": "I32", "scale": "BF16", "zero": "U8"}


@dataclass(frozen=True)
class Quantization:
    """A method and how many inputs share a scale; see `keyecli.kernels.quantized_weights`."""

    method: Method
    group: int = DEFAULT_GROUP

    def __str__(self) -> str:
        return f"{self.method} in groups of {self.group}"

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` as `config.json` holds it."""
        return {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "weights": self.method,
            "group_size": self.group,
        }


def quantization_of(method: str, group: int = DEFAULT_GROUP) -> Quantization:
    """What a user asked for; UsageError for a method or a group that there is not."""
    if method not in METHODS:
        raise UsageError(f"--quant {method} is not known; use {', '.join(METHODS[:-1])} or {METHODS[-1]}")
    if group not in GROUPS:
        raise UsageError(f"--group {group} is not possible; use {' or '.join(map(str, GROUPS))}")
    return Quantization(method, group)


def stored_quantization(values: object, where: object) -> Quantization | None:
    """How a folder is quantised, from `quantization_config` of its configuration `where`; None when that says nothing.

    ModelError for a form that is not ours.
    """
    if values is None:
        return None
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        other = values.get("quant_method") if isinstance(values, dict) else None
        raise ModelError(
            f"{where} says that the weights are quantised{f' with {other}' if other else ''}, which is not read: "
            "choose the unquantised checkpoint and give --quant"
        )
    version, method, group = (values.get(key) for key in ("version", "weights", "group_size"))
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{where} has quantised weights of version {version!r}, and {FORMAT_VERSION} is read: quantise it again"
        )
    if method not in METHODS or group not in GROUPS:
        raise ModelError(
            f"{where} has weights of kind {method!r} in groups of {group!r}; there are {', '.join(METHODS)} in groups of "
            f"{' and '.join(map(str, GROUPS))}: quantise it again"
        )
    return Quantization(method, group)


def quantization_in(config: KeyeVL2Config, folder: object) -> Quantization | None:
    """How a configuration of `folder` says that the weights are quantised; ModelError: see `stored_quantization`."""
    return stored_quantization(getattr(config, "quantization_config", None), f"{folder}/config.json")


class Quantized(nn.Module):
    """One quantised matrix [..., N, K] in buffers."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, quantization: Quantization, *shape: int) -> None:
        super().__init__()
        *leading, inputs = shape
        self.method: Method = quantization.method
        words = inputs * CODE_BITS[self.method] // WORD_BITS
        groups = inputs // quantization.group
        self.register_buffer("codes", torch.empty(*leading, words, dtype=torch.int32))
        self.register_buffer("scale", torch.empty(*leading, groups, dtype=torch.bfloat16))
        zero = None if self.method == "fp8" else torch.empty(*leading, groups, dtype=torch.uint8)
        self.register_buffer("zero", zero)

    @property
    def matrix(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.method, self.codes, self.scale, self.zero)


class QuantizedLinear(Quantized):
    """`nn.Linear` over a quantised matrix [N, K]."""

    def __init__(self, quantization: Quantization, outputs: int, inputs: int, bias: bool) -> None:
        super().__init__(quantization, outputs, inputs)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.backend: dispatch.Backend | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        product = dispatch.quantized_linear(x, self.matrix, backend=self.backend)
        return product if self.bias is None else product + self.bias


class QuantizedExperts(nn.Module):
    """All experts of a layer, each output's inputs side by side: gate_up_proj [E, 2F, D], gate first, and down_proj [E, D, F].

    host: see `Experts`.
    """

    def __init__(self, quantization: Quantization, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = Quantized(quantization, experts, 2 * inner, width)
        self.down_proj = Quantized(quantization, experts, width, inner)
        self.host: HostExperts | None = None

    def forward(
        self, x: Tensor, logits: Tensor, top_k: int, normalise: bool, backend: dispatch.Backend | None
    ) -> Tensor:
        """x [T, D] through the `top_k` experts that its router logits [T, E] choose → [T, D]."""
        gate_up, down = self.gate_up_proj.matrix, self.down_proj.matrix
        if self.host is not None and not dispatch.by_vectors(x, backend):
            tensors = self.host.on_device()
            gate_up = gate_up.of({name: tensors[f"gate_up_proj.{name}"] for name in gate_up.tensors})
            down = down.of({name: tensors[f"down_proj.{name}"] for name in down.tensors})
        return dispatch.quantized_experts(x, logits, top_k, normalise, gate_up, down, backend)


def replace_modules(model: nn.Module, quantization: Quantization) -> list[str]:
    """Put quantised modules in the place of those that are to be; returns the names of the matrices' modules.

    For a model on the meta device: nothing is filled in.
    """
    made = []
    for name, module in list(model.named_modules()):
        fresh: nn.Module | None = None
        if QUANTISED_LINEARS.fullmatch(name) and isinstance(module, nn.Linear):
            if module.in_features % quantization.group == 0:
                bias = module.bias is not None
                fresh = QuantizedLinear(quantization, module.out_features, module.in_features, bias)
                made.append(name)
        elif QUANTISED_EXPERTS.fullmatch(name) and isinstance(module, Experts):
            experts, inner, width = module.down_proj.shape
            if inner % quantization.group == 0 and width % quantization.group == 0:
                fresh = QuantizedExperts(quantization, experts, width, inner)
                made += [f"{name}.gate_up_proj", f"{name}.down_proj"]
        if fresh is not None:
            model.set_submodule(name, fresh)
    return made


def join_matrices(linears: Sequence[QuantizedLinear], made: QuantizedMatrix | None) -> QuantizedMatrix:
    """The matrices of several linear layers with the same inputs one below the other: `made` if that is what they are views of,
    else a new one, of which they are views from then on."""
    first = linears[0].matrix
    parts = {
        name: join_views(
            [linear.get_buffer(name) for linear in linears], None if made is None else made.tensors[name]
        )
        for name in first.tensors
    }
    return first.of(parts)


def join_views(parts: Sequence[Tensor], made: Tensor | None) -> Tensor:
    """Tensors one below the other: `made` if they are views of it in their order, else a new tensor, of which they become views,
    so that nothing is held twice."""
    place = 0 if made is None else made.data_ptr()
    for part in parts:
        if made is None or part.data_ptr() != place:
            break
        place += part.nbytes
    else:
        assert made is not None
        return made
    joint = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, joint.split([len(part) for part in parts]), strict=True):
        part.data = view
    return joint
