"""AdamW for a bf16 network with fp32 master weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW over fp32 copies of parameters that the network itself holds in a lower precision.

    A bf16 weight cannot take a step smaller than 1/256 of itself, so the steps are added up in fp32. Weight decay applies
    to matrices only, never to norms, biases or embeddings of one dimension.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        clip_norm: float = 1.0,
    ) -> None:
        self.parameters: list[Tensor] = [parameter for parameter in parameters if parameter.requires_grad]
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        self.clip_norm = clip_norm
        matrices = [master for master in self.masters if master.dim() >= 2]
        vectors = [master for master in self.masters if master.dim() < 2]
        self.adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=lr,
            betas=betas,
            fused=self.masters[0].is_cuda,
        )

    def step(self, lr: float) -> Tensor:
        """One update at learning rate `lr` from the network's gradients, which are then dropped. Returns their norm."""
        gradients = []
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            if master.grad is not None:
                gradients.append(master.grad)
            parameter.grad = None
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(
            [m for m in self.masters if m.grad is not None], self.clip_norm, norm
        )
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return norm
