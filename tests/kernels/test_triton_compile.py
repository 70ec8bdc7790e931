"""Every kernel compiles for every kind of GPU that keye is made for, inside its shared memory; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from keyecli.kernels.compile import SHARED_LIMIT_BYTES

MODULES = ("indexer", "selection", "unions", "attention", "decode", "experts", "vision")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_everywhere(module: str) -> None:
    # A process of its own: where the interpreter is on, nothing can be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    capabilities = [str(capability) for capability in SHARED_LIMIT_BYTES]
    command = [sys.executable, "-m", "keyecli.kernels.compile", f"keyecli.kernels.{module}", *capabilities]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for capability in capabilities:
        assert any(line.startswith(f"sm_{capability} ") for line in lines)
