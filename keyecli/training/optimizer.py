"""AdamW for a network in low precision with fp32 master weights, whose whole state can be saved and taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keyecli.errors import UsageError

OPTIMIZERS = ("adamw", "adamw8bit", "paged-adamw8bit")


class MasterAdamW:
    """AdamW over fp32 copies of parameters that the network itself holds in a lower precision; fp32 parameters are their own.

    A bf16 weight cannot take a step smaller than 1/256 of itself, so the steps are added up in fp32. Weight decay applies
    to matrices only, never to norms, biases or embeddings of one dimension. kind: one of `OPTIMIZERS`; those of 8 bits are
    bitsandbytes' (UsageError where it is not installed) and keep their moments in 8 bits, paged: in host memory when need be.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        clip_norm: float = 1.0,
        kind: str = "adamw",
    ) -> None:
        self.parameters: list[Tensor] = [parameter for parameter in parameters if parameter.requires_grad]
        self.masters = [
            parameter.detach() if parameter.dtype == torch.float32 else parameter.detach().float().clone()
            for parameter in self.parameters
        ]
        self._copied = [
            (parameter, master)
            for parameter, master in zip(self.parameters, self.masters, strict=True)
            if parameter.dtype != torch.float32
        ]
        self.clip_norm = clip_norm
        matrices = [master for master in self.masters if master.dim() >= 2]
        vectors = [master for master in self.masters if master.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = _made(kind, [group for group in groups if group["params"]], lr, betas, self.masters)

    def step(self, lr: float) -> Tensor:
        """One update at learning rate `lr` from the network's gradients, which are then dropped. Returns their norm."""
        gradients = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            gradient = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
            master.grad = gradient
            if gradient is not None:
                gradients.append(gradient)
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(
            [m for m in self.masters if m.grad is not None], self.clip_norm, norm
        )
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for master in self.masters:
            master.grad = None
        if self._copied:
            parameters, masters = zip(*self._copied, strict=True)
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Master weights and moments by "place.name", in the order of the parameters."""
        found: dict[str, Tensor] = {}
        for place, master in enumerate(self.masters):
            found[f"{place}.master"] = master
            for name, value in self.adamw.state.get(master, {}).items():
                found[f"{place}.{name}"] = torch.as_tensor(value)
        return found

    def take(self, state: Mapping[str, Tensor], place_like: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Go on from what `state` gave. place_like(saved, master) puts a whole tensor where and how the master's are."""
        with torch.no_grad():
            for place, master in enumerate(self.masters):
                master.copy_(place_like(state[f"{place}.master"], master))
                begin = f"{place}."
                self.adamw.state[master] = {
                    name.removeprefix(begin): value.clone()
                    if value.shape != master.shape
                    else place_like(value, master)
                    for name, value in state.items()
                    if name.startswith(begin) and name != f"{begin}master"
                }
            for parameter, master in self._copied:
                parameter.copy_(master)


def _made(
    kind: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], masters: list[Tensor]
) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=masters[0].is_cuda)
    if not masters[0].is_cuda:
        raise UsageError(f"--optimizer {kind} needs an NVIDIA GPU: leave the option out")
    try:
        from bitsandbytes import optim
    except ImportError:
        raise UsageError(
            f"--optimizer {kind} needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
        ) from None
    wanted = optim.AdamW8bit if kind == "adamw8bit" else optim.PagedAdamW8bit
    return wanted(groups, lr=lr, betas=betas)
