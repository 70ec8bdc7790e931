"""Tensor comparison for the tests: NaN and infinity positions first, then relative error, then cosine, worst place named."""

from __future__ import annotations

import torch
from torch import Tensor


def place_of(mask: Tensor) -> tuple[int, ...]:
    """The first place where a bool tensor holds, as an index tuple."""
    return tuple(int(i) for i in mask.nonzero()[0])


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    relative: float = 1e-4,
    absolute: float = 1e-5,
    cosine: float = 1e-6,
    what: str = "tensor",
) -> None:
    """Fail unless the two tensors agree, saying where they differ most.

    In this order: same shape; NaN, +inf and −inf in the same places; every finite |a − e| <= absolute + relative · max|e|
    (relative to the largest expected value, so that values near zero do not ask for what rounding cannot give);
    1 − cosine similarity <= `cosine`, which catches small systematic differences.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    for name, kind in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = kind(a) != kind(e)
        assert not differ.any(), (
            f"{what}: {name} in one of the two only, {int(differ.sum())} places, first {place_of(differ)}"
        )
    finite = torch.isfinite(e)
    if not finite.any():
        return
    a, e = a.where(finite, torch.zeros(())), e.where(finite, torch.zeros(()))
    error = (a - e).abs()
    allowed = absolute + relative * float(e.abs().max())
    if float(error.max()) > allowed:
        at = place_of(error == error.max())
        raise AssertionError(
            f"{what}: worst at {at}: {float(a[at]):.9g}, expected {float(e[at]):.9g}, differs by {float(error.max()):.3g}, "
            f"allowed {allowed:.3g}; {int((error > allowed).sum())} of {error.numel()} places are off"
        )
    if not e.any():
        return  # The angle to nothing says nothing; the errors above do.
    difference = 1 - 2 * float((a * e).sum()) / float((a * a).sum() + (e * e).sum())
    assert difference <= cosine, f"{what}: cosine difference {difference:.3g}, allowed {cosine:.3g}"


def assert_same(actual: Tensor, expected: Tensor, *, what: str = "tensor") -> None:
    """Fail unless two tensors have the same shape, type and bits of value, naming the first place that differs."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    differ = (actual != expected) & ~((actual != actual) & (expected != expected))
    if differ.any():
        at = place_of(differ)
        count = f"{int(differ.sum())} of {differ.numel()} places"
        raise AssertionError(
            f"{what}: {actual[at].item()} at {at}, expected {expected[at].item()}; {count} differ"
        )
