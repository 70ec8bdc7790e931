"""How long the parts of a network take in a step of training: forward passes, what is computed again, and gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Moment = torch.cuda.Event | float


class PartTimer:
    """Seconds of each named part, exclusive of the parts inside it, between the marks that hooks set around its modules.

    A module's gradients are what the backward pass computes between its output and its input; where its input needs none, as in
    the first layer, the end of that is not seen, and the little that follows counts with it.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self._stack: list[str] = []
        self._marks: list[tuple[Moment, str]] = []

    def begin(self) -> None:
        """Forget all marks."""
        self._stack, self._marks = [], []

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since `begin`, up to the last mark; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (first, part), (last, _) in zip(self._marks, self._marks[1:], strict=False):
            if part:
                found[part] = found.get(part, 0.0) + _between_s(first, last)
        return found

    @contextmanager
    def watching(self, parts: Mapping[nn.Module, str]) -> Iterator[None]:
        """Set marks around these modules while the block runs."""
        handles = []
        for module, part in parts.items():
            handles.append(module.register_forward_pre_hook(self._entered(part)))
            # An exception ends a pass that is repeated for a backward pass as soon as it has what that needs.
            handles.append(module.register_forward_hook(self._left(part), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, part: str) -> None:
        self._stack.append(part)
        self._mark()

    def leave(self, part: str) -> None:
        if part in self._stack:
            # Whatever was entered inside and not left ends with it.
            place = len(self._stack) - 1 - self._stack[::-1].index(part)
            del self._stack[place:]
        self._mark()

    def _mark(self) -> None:
        moment: Moment
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((moment, self._stack[-1] if self._stack else ""))

    def _entered(self, part: str) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            self.enter(part)
            first, *others = arguments
            return (_seen(first, lambda: self.leave(part)), *others)

        return hook

    def _left(self, part: str) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            self.leave(part)
            if isinstance(output, tuple):
                return (_seen(output[0], lambda: self.enter(part)), *output[1:])
            return _seen(output, lambda: self.enter(part))

        return hook


def _between_s(first: Moment, last: Moment) -> float:
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float)
        assert isinstance(last, float)
        return last - first
    return first.elapsed_time(last) / 1e3


def _seen(tensor: Any, on_gradient: Callable[[], None]) -> Any:
    """The tensor, telling when its gradient arrives; anything else, and what needs none, as it is."""
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        return _Seen.apply(tensor, on_gradient)
    return tensor


class _Seen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, on_gradient: Callable[[], None]) -> Tensor:
        ctx.on_gradient = on_gradient
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.on_gradient()
        return gradient, None
