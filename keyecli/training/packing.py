"""Several examples in one sequence, each with attention, selection and positions of its own.

T tokens of a pack, P of its examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keyecli.model.keye import IGNORED_LABEL
from keyecli.training.examples import Example

SHORT_PACK_TOKENS = 512


@dataclass(frozen=True)
class Pack:
    """input_ids, targets, rows: int64 [1, T], position_ids: int64 [3, 1, T]. rows[0, t] is the example of token t; segments,
    int64 [1, T], are those of `reference.visible_keys`, None for an example that is alone."""

    sources: tuple[str, ...]
    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    rows: Tensor
    segments: Tensor | None

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def learnt_tokens(self) -> int:
        return int((self.targets != IGNORED_LABEL).sum())


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of `lengths` in bins of at most `capacity`: the longest first, each into the fullest bin that has room for it.

    Of equal lengths and bins the earlier one. ValueError for a length above the capacity.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        if length > capacity:
            raise ValueError(f"{length} tokens do not fit into a pack of {capacity}")
        fitting = [number for number, left in enumerate(room) if left >= length]
        if not fitting:
            bins.append([place])
            room.append(capacity - length)
            continue
        fullest = min(fitting, key=lambda number: room[number])
        bins[fullest].append(place)
        room[fullest] -= length
    return bins


def pack_tokens(lengths: Sequence[int], capacity: int, kernels: str) -> int:
    """The longest pack of rows of these lengths: `capacity` by the kernels. The definitions compute what a mask hides like all
    the rest, so with them no pack is longer than the longest row, or `SHORT_PACK_TOKENS`."""
    return capacity if kernels == "triton" else min(capacity, max(SHORT_PACK_TOKENS, *lengths))


def share_out(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Places of `costs` for each rank: the costliest first, each to the rank that has least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        rank = min(range(ranks), key=lambda rank: loads[rank])
        shares[rank].append(place)
        loads[rank] += costs[place]
    return shares


def pack(examples: Sequence[Example]) -> Pack:
    """Examples one behind the other; nothing is padded and nothing is cut."""
    lengths = torch.tensor([example.tokens for example in examples])
    rows = torch.arange(len(examples)).repeat_interleave(lengths)[None]

    def joined(name: str) -> Tensor:
        return torch.cat([torch.from_numpy(getattr(example, name)) for example in examples], dim=-1)

    return Pack(
        tuple(example.source for example in examples),
        joined("input_ids")[None],
        joined("position_ids")[:, None],
        joined("targets")[None],
        rows,
        rows + 1 if len(examples) > 1 else None,
    )
