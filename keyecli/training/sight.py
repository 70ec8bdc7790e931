"""What the visuals of a training row become: embeddings of the frozen tower, by the stream that answering uses, or patches for
one that learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from keyecli.engine.loaded import LoadedModel, torch_dtype
from keyecli.engine.plan import InputPlan
from keyecli.engine.stream import encode_visuals, group_frames, visual_of, with_times
from keyecli.model.prompt import Visual
from keyecli.training.network import Sight
from keyecli.video.decode import decode_frames
from keyecli.video.patches import frames_to_patches


@dataclass(frozen=True)
class Seen:
    """The visuals of a row as they came, and what the network sees of them."""

    visuals: tuple[Visual, ...]
    sight: Sight


def see(
    loaded: LoadedModel, plans: Sequence[InputPlan], *, learning: bool, exact_resize: bool = False
) -> Seen:
    """Look at the inputs of a row. `learning`: the tower or the projector does. InputError for what cannot be read."""
    if not learning:
        embeds, visuals = encode_visuals(loaded, plans, exact_resize=exact_resize)
        return Seen(visuals, Sight(embeds=embeds))
    patch = loaded.config.vision_config.patch_size
    patches: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    came: list[Visual] = []
    for plan in plans:
        times: list[Fraction] = []
        read = loaded.read_frames or decode_frames
        for chunk in read(
            plan.info, plan.sampling, exact_resize=exact_resize, chunk_frames=group_frames(loaded, plan)
        ):
            times += chunk.times_s
            pixels = torch.from_numpy(chunk.frames).to(loaded.device)
            patches.append(
                frames_to_patches(
                    pixels,
                    loaded.preprocessor.mean,
                    loaded.preprocessor.std,
                    patch,
                    torch_dtype(loaded.dtype),
                )
            )
            grids += [(pixels.shape[1] // patch, pixels.shape[2] // patch)] * len(pixels)
        came.append(with_times(visual_of(plan), times))
    return Seen(tuple(came), Sight(patches=torch.cat(patches) if patches else None, grids=tuple(grids)))


def together(parts: Sequence[Sight]) -> Sight:
    """What a pack sees: the visuals of its rows in their order."""
    patches = [part.patches for part in parts if part.patches is not None]
    embeds = [part.embeds for part in parts if part.embeds is not None]
    return Sight(
        embeds=torch.cat(embeds) if embeds else None,
        patches=torch.cat(patches) if patches else None,
        grids=tuple(grid for part in parts for grid in part.grids),
    )
