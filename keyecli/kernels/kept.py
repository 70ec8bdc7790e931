"""What attention found in a layer's forward pass, kept for the moment in which a checkpoint computes the layer again.

Selection and attention are most of a layer's time at long contexts, while what comes of them is small: the lists of selected
keys, the output and its denominators, some 16 KiB a token in the 30B shape. Layers keep it while there is room; the others
compute it again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

Found = tuple[Tensor, ...]


class Box:
    """What one layer keeps until its second pass takes it."""

    def __init__(self) -> None:
        self.found: Found = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.found)


class Keeper:
    """Boxes of up to `room_bytes` together; those of a pass that failed leave with its graph."""

    def __init__(self) -> None:
        self.room_bytes = 0
        self._boxes: weakref.WeakSet[Box] = weakref.WeakSet()

    @property
    def kept_bytes(self) -> int:
        return sum(box.nbytes for box in self._boxes)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `context_fn` of `torch.utils.checkpoint.checkpoint`: around a layer's first pass, and around its second."""
        box = Box()
        self._boxes.add(box)
        return self._first(box), self._second(box)

    @contextmanager
    def _first(self, box: Box) -> Iterator[None]:
        _layer.keeper, _layer.box = self, box
        try:
            yield
        finally:
            _layer.keeper = _layer.box = None

    @contextmanager
    def _second(self, box: Box) -> Iterator[None]:
        _layer.found, box.found = box.found, ()
        try:
            yield
        finally:
            _layer.found = ()


class _Layer(threading.local):
    """What the layer that this thread computes may keep or take: backward passes have threads of their own."""

    keeper: Keeper | None = None
    box: Box | None = None
    found: Found = ()


_layer = _Layer()


def keep(*found: Tensor) -> None:
    """Put this into the layer's box, if it has one with room; without gradients."""
    keeper, box = _layer.keeper, _layer.box
    if keeper is None or box is None or not torch.is_grad_enabled():
        return
    if keeper.kept_bytes + sum(tensor.nbytes for tensor in found) <= keeper.room_bytes:
        box.found = tuple(tensor.detach() for tensor in found)


def taken() -> Found:
    """What the layer's first pass kept, in its second pass, once; else nothing."""
    found, _layer.found = _layer.found, ()
    return found
