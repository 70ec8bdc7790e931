"""Low-rank adapters: which matrices get one, the modules that compute with it, and how they come into a model.

An adapted matrix is W + scale · A · B with W frozen. N outputs, K inputs, r rank, E experts, D width, F expert width, T tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyecli.errors import UsageError
from keyecli.kernels import dispatch
from keyecli.kernels.quantized_weights import QuantizedMatrix
from keyecli.kernels.reference import Added, LowRank
from keyecli.model.moe import Experts
from keyecli.model.quantize import QuantizedExperts, QuantizedLinear

Target = Literal["attention", "experts", "dense_mlp", "head"]
TARGETS: tuple[Target, ...] = get_args(Target)

# Modules that each target means. The indexer's projections are none of them: another loss teaches its selection.
TARGET_MODULES: dict[Target, str] = {
    "attention": r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "experts": r"model\.layers\.\d+\.mlp\.experts",
    "dense_mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    # For answers in tokens that the base has never had to write, whose rows it holds down.
    "head": r"lm_head",
}


@dataclass(frozen=True)
class LoraSettings:
    """rank r; the addition is scaled by alpha / r, or by alpha / √r with `rslora`; `dropout` acts on the inputs of linear layers
    while training, never on those of experts."""

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[Target, ...] = ("attention", "experts")
    rslora: bool = False

    def __post_init__(self) -> None:
        """UsageError for a value out of range."""
        if self.rank < 1:
            raise UsageError(f"the rank of an adapter must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UsageError(f"alpha of an adapter must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout of an adapter must be from 0 to below 1, not {self.dropout}")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            named = unknown[0] if unknown else "nothing"
            raise UsageError(f"an adapter of {named} is not possible; use {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """A frozen linear layer and what is added to its weight: y = base(x) + scale · B (A x).

    lora_A [r, K], lora_B [N, r]: their type may be wider than that of x, in which they compute.
    """

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear,
        factors: tuple[Tensor, Tensor],
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = map(nn.Parameter, factors)
        self.scale, self.dropout = scale, dropout

    def added(self, begin: int = 0) -> Added:
        """What it adds to its base's outputs, which stand from `begin` on, where nothing is dropped out."""
        return Added(self.lora_A, self.lora_B, self.scale, begin)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N]."""
        inputs = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = F.linear(inputs, self.lora_A.to(x.dtype)) * self.scale
        return self.base_layer(x) + F.linear(low, self.lora_B.to(x.dtype))


def base_of(linear: nn.Module) -> nn.Module:
    """The layer itself, without what may stand around it."""
    return linear.base_layer if isinstance(linear, LoraLinear) else linear


def added_to(linear: nn.Module, begin: int = 0) -> list[Added]:
    """What an adapter adds to a linear layer whose outputs stand from `begin` on; nothing where there is none."""
    return [linear.added(begin)] if isinstance(linear, LoraLinear) else []


class LoraExperts(nn.Module):
    """The frozen experts of a layer and what is added to their matrices, computed on the routed tokens only.

    gate_up_A [E, D, r] and gate_up_B [E, r, 2F], down_A [E, F, r] and down_B [E, r, D]; either pair may be None. Types as in
    `LoraLinear`.
    """

    def __init__(
        self, base: Experts | QuantizedExperts, gate_up: LowRank | None, down: LowRank | None, scale: float
    ) -> None:
        super().__init__()
        self.base_layer = base
        for name, factors in (("gate_up", gate_up), ("down", down)):
            first, second = (None, None) if factors is None else map(nn.Parameter, factors)
            self.register_parameter(f"{name}_A", first)
            self.register_parameter(f"{name}_B", second)
        self.scale = scale

    def factors(self, name: Literal["gate_up", "down"]) -> LowRank | None:
        first, second = getattr(self, f"{name}_A"), getattr(self, f"{name}_B")
        return None if first is None else (first, second)

    def forward(
        self, x: Tensor, logits: Tensor, top_k: int, normalise: bool, backend: dispatch.Backend | None
    ) -> Tensor:
        """x [T, D] through the `top_k` experts that its router logits [T, E] choose → [T, D]."""
        gate_up, down = self._matrices(dispatch.by_vectors(x, backend))
        return dispatch.lora_experts(
            x, logits, top_k, normalise, gate_up, down, self.factors("gate_up"), self.factors("down"),
            self.scale, backend,
        )  # fmt: skip

    def _matrices(self, few: bool) -> tuple[Tensor, Tensor] | tuple[QuantizedMatrix, QuantizedMatrix]:
        """The base's, where the device that computes reads them: for few tokens in the host's memory if they are there."""
        base = self.base_layer
        tensors = None if base.host is None or few else base.host.on_device()
        if isinstance(base, Experts):
            if tensors is None:
                return base.gate_up_proj, base.down_proj
            return tensors["gate_up_proj"], tensors["down_proj"]
        gate_up, down = base.gate_up_proj.matrix, base.down_proj.matrix
        if tensors is None:
            return gate_up, down
        return (
            gate_up.of({name: tensors[f"gate_up_proj.{name}"] for name in gate_up.tensors}),
            down.of({name: tensors[f"down_proj.{name}"] for name in down.tensors}),
        )


def add_lora(model: nn.Module, settings: LoraSettings, dtype: torch.dtype | None = torch.float32) -> None:
    """Freeze a model and give it adapters that change nothing yet: A random, B zeros; they are all that is left to train.

    dtype: of the new parameters, None for the base's own. A is drawn as PEFT draws it, by torch's global generator. UsageError
    when a target is not in the model.
    """
    if any(isinstance(module, (LoraLinear, LoraExperts)) for module in model.modules()):
        raise ValueError("the model has adapters already")
    if "head" in settings.targets and model.get_input_embeddings().weight is model.lm_head.weight:  # type: ignore[operator, union-attr]
        raise UsageError("the model's head is its embedding, too: leave head out of what is adapted")
    absent = [target for target in settings.targets if not _has(model, target)]
    if absent:
        known = " and ".join(target for target in TARGETS if _has(model, target))
        raise UsageError(f"the model has no {absent[0].replace('_', ' ')} to adapt: choose {known}")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        target = next((target for target in TARGETS if re.fullmatch(TARGET_MODULES[target], name)), None)
        wanted = target in settings.targets
        if isinstance(module, (nn.Linear, QuantizedLinear)) and wanted:
            model.set_submodule(name, _adapted_linear(module, settings, dtype))
        # Quantised experts are differentiable only in this form, adapted or not.
        elif isinstance(module, QuantizedExperts) or (isinstance(module, Experts) and wanted):
            device = next(model.get_submodule(name.rpartition(".")[0] + ".gate").parameters()).device
            model.set_submodule(name, _adapted_experts(module, settings, dtype, device, wanted))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in the model, in its order."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if isinstance(module, (LoraLinear, LoraExperts))
        for leaf, parameter in module.named_parameters(recurse=False)
    }


def _has(model: nn.Module, target: Target) -> bool:
    return any(re.fullmatch(TARGET_MODULES[target], name) for name, _ in model.named_modules())


def _adapted_linear(
    base: nn.Linear | QuantizedLinear, settings: LoraSettings, dtype: torch.dtype | None
) -> LoraLinear:
    if isinstance(base, QuantizedLinear):
        outputs, inputs = base.matrix.shape
        device, own = base.codes.device, torch.float32
    else:
        (outputs, inputs), device, own = base.weight.shape, base.weight.device, base.weight.dtype
    first = _drawn((settings.rank, inputs), inputs, dtype or own, device)
    second = torch.zeros(outputs, settings.rank, dtype=dtype or own, device=device)
    return LoraLinear(base, (first, second), settings.scale, settings.dropout)


def _adapted_experts(
    base: Experts | QuantizedExperts,
    settings: LoraSettings,
    dtype: torch.dtype | None,
    device: torch.device,
    wanted: bool,
) -> LoraExperts:
    if not wanted:
        return LoraExperts(base, None, None, settings.scale)
    if isinstance(base, Experts):
        (experts, inner, width), own = base.down_proj.shape, base.down_proj.dtype
    else:
        (experts, width, inner), own = base.down_proj.matrix.shape, torch.float32

    def pair(inputs: int, outputs: int) -> LowRank:
        first = _drawn((experts, inputs, settings.rank), inputs, dtype or own, device)
        return first, torch.zeros(experts, settings.rank, outputs, dtype=dtype or own, device=device)

    return LoraExperts(base, pair(width, 2 * inner), pair(inner, width), settings.scale)


def _drawn(shape: tuple[int, ...], inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uniform in ±1/√inputs: what PEFT's kaiming_uniform with a = √5 comes to."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(shape, dtype=dtype, device=device).uniform_(-bound, bound)
