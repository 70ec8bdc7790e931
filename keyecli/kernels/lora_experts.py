"""Routed experts with a low-rank addition on a GPU: `reference.lora_experts` in blocks of tokens, whose rows are made again in
the backward pass, so that memory does not grow with the length of a pack.

T tokens, E experts, F expert width, D model width, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from keyecli.kernels import reference
from keyecli.kernels.quantized_weights import QuantizedMatrix
from keyecli.kernels.reference import LowRank

# 8 rows a token: in the 30B shape what a block keeps for its backward pass is some 7 GiB in bf16.
BLOCK_TOKENS = 32768


def lora_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor | QuantizedMatrix,
    down: Tensor | QuantizedMatrix,
    gate_up_factors: LowRank | None,
    down_factors: LowRank | None,
    scale: float,
) -> Tensor:
    """`reference.lora_experts`; quantised matrices, as `quantized_weights.quantized_lora_experts` takes them, are read back for
    each block, and again in its backward pass."""

    def computed(x: Tensor, weights: Tensor, experts: Tensor, *factors: Tensor) -> Tensor:
        parts = list(factors)
        pairs = [
            None if given is None else (parts.pop(0), parts.pop(0))
            for given in (gate_up_factors, down_factors)
        ]
        dense = [_dense(matrix, x.dtype) for matrix in (gate_up, down)]
        return reference.lora_experts(x, weights, experts, dense[0], dense[1], pairs[0], pairs[1], scale)

    factors = (*(gate_up_factors or ()), *(down_factors or ()))
    blocks = list(
        zip(x.split(BLOCK_TOKENS), weights.split(BLOCK_TOKENS), experts.split(BLOCK_TOKENS), strict=True)
    )
    again = torch.is_grad_enabled() and (len(blocks) > 1 or isinstance(gate_up, QuantizedMatrix))
    outputs = [
        # Nothing here is random, so no state of random numbers has to be kept.
        checkpoint(computed, *block, *factors, use_reentrant=False, preserve_rng_state=False)
        if again
        else computed(*block, *factors)
        for block in blocks
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _dense(matrix: Tensor | QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """A base's matrix [E, in, out]; no gradient reaches it."""
    if isinstance(matrix, Tensor):
        return matrix
    from keyecli.kernels.quantized import read_back

    return read_back(matrix, dtype)
