"""A fresh start for the lightning indexers of a model whose selection is to be learnt from nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from keyecli.errors import UsageError
from keyecli.model.keye import KeyeVL2ForConditionalGeneration

GATE_STD = 0.00284
"""Of a gate row, for hidden states whose norm has weights of root mean square 1 (our choice; nothing is published)."""


@torch.no_grad()
def reinitialise_indexer(model: KeyeVL2ForConditionalGeneration, seed: int) -> None:
    """Give every layer's indexer new weights in place; nothing else changes, and a seed gives the same weights everywhere.

    Query and key rows are normal with the configuration's `initializer_range`, gate rows with `GATE_STD` over the root
    mean square of the input norm's weights, so that gates begin equally small behind any trained norm; the indexer's own
    norms are those of a new model. UsageError for a model without indexers.
    """
    if model.config.sa_config is None:
        raise UsageError(
            "the model attends to everything and has no indexers; give one whose config has sa_config"
        )
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        indexer = layer.self_attn.sa_indexer
        std = torch.full((len(indexer.q_proj.weight), 1), model.config.initializer_range)
        norm = layer.input_layernorm.weight.float()
        std[indexer.heads * indexer.dim :] = GATE_STD / float(norm.square().mean().sqrt())
        _fill(indexer.q_proj.weight, std, generator)
        _fill(indexer.k_proj.weight, torch.tensor(model.config.initializer_range), generator)
        for norm_weight in (indexer.q_norm.weight, indexer.k_norm.weight):
            norm_weight.fill_(1.0)
        indexer.k_norm.bias.zero_()


def _fill(weight: Tensor, std: Tensor, generator: torch.Generator) -> None:
    # Drawn in fp32 on the CPU: neither the device nor the type changes the numbers.
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
