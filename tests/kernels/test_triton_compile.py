"""Every kernel compiles for the newest features and for the fewest, inside shared memory; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from keyecli.kernels.compile import MODULES, SHARED_LIMIT_BYTES

# The first case of each takes half a minute: `make kernels` compiles all, for sm_80, sm_86, sm_89 and sm_120 as well.
CAPABILITY = "90"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: where the interpreter is on, nothing can be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(900)
def test_every_kernel_compiles() -> None:
    done = python("-m", "keyecli.kernels.compile", CAPABILITY, "--first")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 4 * len(MODULES)
    assert all(line.startswith(f"sm_{CAPABILITY} ") for line in lines)


def test_sm_86_takes_the_kernels_of_sm_80() -> None:
    program = (
        "from importlib import import_module\n"
        f"for name in {MODULES}:\n"
        "    cases = import_module(f'keyecli.kernels.{name}').compile_cases\n"
        "    shown = [[(c.name, c.constants, c.num_warps) for c in cases(capability)] for capability in (80, 86)]\n"
        "    assert shown[0] == shown[1], f'{name} has kernels of its own for sm_86'"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr


def test_limits_are_known_for_all() -> None:
    assert set(SHARED_LIMIT_BYTES) == {80, 86, 89, 90, 120}
