"""The memory plan beside what a run really takes, in the released shape with random weights, so that nobody needs a download."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keyecli.bench.end_to_end import random_model
from keyecli.engine.loaded import LoadedModel, memory_limits, new_cache, torch_dtype
from keyecli.engine.plan import estimate_memory, frames_per_group, gib, merge_area, prefill_chunk_tokens
from keyecli.engine.static import decoder_for
from keyecli.model.quantize import quantization_in

# As frames of the longest clips are: small, many to a group of the vision tower.
FRAME_GRID = (16, 16)
ANSWER_TOKENS = 16
ALLOWED_ERROR = 0.05


@dataclass(frozen=True)
class MemoryMeasurement:
    """A prompt of `tokens` tokens, all of them frames, in a model held as `how` says.

    Bytes: as planned, at the peak, and as held from the device.
    """

    how: str
    tokens: int
    planned_bytes: int
    peak_bytes: int
    held_bytes: int

    @property
    def error(self) -> float:
        """How far the plan is above the peak, as a share of the peak; below zero when it is too small."""
        return self.planned_bytes / self.peak_bytes - 1

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, schema keye.bench.memory/1."""
        return {
            "schema": "keye.bench.memory/1",
            "how": self.how,
            "tokens": self.tokens,
            "planned_bytes": self.planned_bytes,
            "peak_bytes": self.peak_bytes,
            "held_bytes": self.held_bytes,
            "error": self.error,
        }

    def line(self) -> str:
        """One row for a reader."""
        verdict = "within" if abs(self.error) <= ALLOWED_ERROR else "NOT within"
        return (
            f"{f'memory, {self.how}':<28} {f'{self.tokens} tokens':<34} peak {gib(self.peak_bytes)}, "
            f"planned {gib(self.planned_bytes)} ({self.error:+.1%}, {verdict} {ALLOWED_ERROR:.0%}), "
            f"held from the device {gib(self.held_bytes)}"
        )


def measure(
    lengths: Sequence[int], quant: str | None = None, kv: str | None = None
) -> Iterator[MemoryMeasurement]:
    """A run for each number of tokens; MemoryLimitError when one does not fit."""
    loaded = random_model(quant, kv)
    for tokens in lengths:
        yield measure_run(loaded, tokens)


@torch.inference_mode()
def measure_run(loaded: LoadedModel, tokens: int) -> MemoryMeasurement:
    """Frames through the vision tower and the decoder until there are `tokens` tokens with the answer, then the answer."""
    config, model = loaded.config, loaded.model
    frame_patches = FRAME_GRID[0] * FRAME_GRID[1]
    frame_tokens = frame_patches // merge_area(config)
    group = frames_per_group(frame_patches)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with memory_limits(loaded.device):
        dtype = torch_dtype(loaded.dtype)
        cache = new_cache(loaded, tokens)
        prompt = tokens - ANSWER_TOKENS
        waiting = torch.empty(0, config.hidden_size, dtype=dtype, device=loaded.device)
        while cache.length < prompt:
            chunk = min(prefill_chunk_tokens(loaded.device), prompt - cache.length)
            while len(waiting) < chunk:
                pixels = torch.randn(group * frame_patches, 3, 14, 14, dtype=dtype, device=loaded.device)
                waiting = torch.cat([waiting, model.encode_frames(pixels, [FRAME_GRID] * group)])
            places = torch.arange(cache.length, cache.length + chunk, device=loaded.device)
            model.decode(waiting[None, :chunk], places.expand(3, 1, -1), cache)
            waiting = waiting[chunk:].clone()
        assert len(waiting) < group * frame_tokens
        static = decoder_for(model, cache)
        assert static is not None
        static.begin([prompt], [prompt])
        token = torch.zeros(1, dtype=torch.int64, device=loaded.device)
        for _ in range(ANSWER_TOKENS):
            static.step(token)
        torch.cuda.synchronize()
    planned = estimate_memory(
        config,
        tokens,
        frame_tokens,
        dtype=loaded.dtype,
        device=loaded.device,
        kernels=loaded.kernels,
        kv=loaded.kv,
    )
    return MemoryMeasurement(
        _how(loaded),
        tokens,
        planned.total_bytes,
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
    )


def _how(loaded: LoadedModel) -> str:
    quantization = quantization_in(loaded.config, loaded.name)
    weights = loaded.dtype if quantization is None else quantization.method
    return weights if loaded.kv is None else f"{weights}, kv {loaded.kv}"
