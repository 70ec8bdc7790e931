"""Where Triton's kernels are tested: on a GPU, or at toy size on the CPU under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter computes bf16 wrongly without a word.
HALF = [torch.bfloat16, torch.float16] if CUDA else [torch.float16]
DTYPES = [torch.float32, *HALF]


@contextmanager
def poisoned() -> Iterator[None]:
    """Every torch.empty inside holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert bool(torch.empty(8, device=DEVICE).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
