"""Losses beside the next token's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def load_balance(router_logits: Tensor, valid: Tensor, top_k: int) -> Tensor:
    """E · Σ_e (share of the chosen slots that went to expert e) · (mean router probability of e): 1 when all are equal.

    router_logits: [T, E]; valid: bool [T], the tokens that count. Returns an fp32 scalar. Source: Switch Transformers.
    """
    probabilities = router_logits.float().softmax(-1)
    experts = router_logits.shape[-1]
    weight = valid.float().unsqueeze(-1)
    chosen = F.one_hot(router_logits.topk(top_k, dim=-1).indices, experts).sum(1).float()
    total = weight.sum().clamp(min=1)
    load = (chosen * weight).sum(0) / (total * top_k)
    return experts * (load.detach() * (probabilities * weight).sum(0) / total).sum()
