"""Inputs of the engine tests without any file: planned frames, and a decoder that yields random pictures for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from keyecli.engine.loaded import LoadedModel
from keyecli.engine.plan import InputPlan
from keyecli.model.checkpoint import load_config, load_preprocessor
from keyecli.video.decode import FrameChunk
from keyecli.video.sampling import SamplingPlan


def loaded_from(folder: Path, model: Any, tokenizer: Any) -> LoadedModel:
    """The shared toy model as `load_weights` would return it."""
    return LoadedModel(
        name="tiny",
        folder=folder,
        config=load_config(folder),
        preprocessor=load_preprocessor(folder),
        device="cpu",
        dtype="fp32",
        kernels="reference",
        revision="0",
        model=model,
        tokenizer=tokenizer,
        generation_config=None,
    )


def planned(name: str, frames: int, rows: int = 2, columns: int = 3, kind: str = "video") -> InputPlan:
    """A plan of frames half a second apart, each rows × columns merged tokens."""
    times_s = tuple(Fraction(index, 2) for index in range(frames))
    info: Any = SimpleNamespace(
        path=Path(name), kind=kind, duration_s=Fraction(frames, 2), truncated_at_s=None, width=640, height=360
    )
    sampling = SamplingPlan(times_s, rows * 28, columns * 28, kind, 2.0)  # type: ignore[arg-type]
    return InputPlan(info, sampling)


def picture(name: str, time_s: Fraction, height: int, width: int) -> np.ndarray:
    """The random picture of a file at a time: always the same one."""
    seed = [*name.encode(), int(time_s * 1000)]
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def fake_decoder(
    lost: Collection[Fraction] = (), moved: Mapping[Fraction, Fraction] | None = None
) -> Callable[..., Iterator[FrameChunk]]:
    """Stands in for `decode_frames`: frames in `lost` never come, those in `moved` come with another time."""

    def decode_frames(
        info: Any, plan: SamplingPlan, *, chunk_frames: int = 16, **_: Any
    ) -> Iterator[FrameChunk]:
        there = [(moved or {}).get(time_s, time_s) for time_s in plan.times_s if time_s not in lost]
        for begin in range(0, len(there), chunk_frames):
            times_s = tuple(there[begin : begin + chunk_frames])
            frames = [picture(str(info.path), time_s, plan.height, plan.width) for time_s in times_s]
            yield FrameChunk(times_s, np.stack(frames))

    return decode_frames


def all_embeds(loaded: LoadedModel, inputs: Sequence[InputPlan]) -> torch.Tensor:
    """Every frame of `inputs` through the vision tower, one at a time."""
    from keyecli.video.patches import frames_to_patches

    parts = []
    for item in inputs:
        height, width = item.sampling.height, item.sampling.width
        for time_s in item.sampling.times_s:
            frame = picture(str(item.info.path), time_s, height, width)[None]
            patches = frames_to_patches(frame, loaded.preprocessor.mean, loaded.preprocessor.std)
            parts.append(loaded.model.encode_frames(patches, [(height // 14, width // 14)]))
    return torch.cat(parts)
