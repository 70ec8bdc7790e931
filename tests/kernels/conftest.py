"""Triton's tests: only where Triton is (it is made for Linux), and its interpreter with the NumPy that is pinned."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

collect_ignore_glob = [] if find_spec("triton") else ["test_triton_*.py"]


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="package")
def runtime_loop_bounds() -> Iterator[None]:
    """Triton's interpreter turns a loop bound into an int in a way that NumPy 2.4 no longer allows; nothing else changes."""
    if not find_spec("triton"):
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    yield
    interpreter._patch_lang_tensor = original
