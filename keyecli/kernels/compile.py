"""Compile kernels for a GPU that is not there: `python -m keyecli.kernels.compile decode 80 90`.

Finds what only a compiler finds (types, layouts, shared memory, spilled registers) without a device of that kind.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULES = (
    "indexer",
    "hopper_scores",
    "selection",
    "unions",
    "attention",
    "decode",
    "experts",
    "vision",
    "step",
    "linear",
    "low_rank",
    "quantized",
    "quantized_experts",
    "lora_experts",
)
# The most shared memory that one block may ask for, in bytes, by compute capability.
SHARED_LIMIT_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}


@dataclass(frozen=True)
class CompileCase:
    """One kernel as it would be launched.

    kernel: a `@triton.jit` or `@gluon.jit` function. signature: argument name → Triton type ("*bf16", "*i32", "i32", "i64",
    "fp32", "constexpr"), every argument, in order. constants: the values of the constexpr arguments.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible_by_16: tuple[str, ...] = field(default=())
    max_registers: int | None = None


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: shared memory of a block in bytes, registers a thread, bytes a thread spills."""

    shared_bytes: int
    registers: int
    spilled_bytes: int


def compile_case(case: CompileCase, capability: int) -> Compiled:
    """Compile for sm_`capability`; raises what Triton or ptxas raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    else:
        from triton.compiler import ASTSource

    names = list(case.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(
        fn=case.kernel, signature=case.signature, constexprs=case.constants, attrs=attributes or None
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.max_registers},
    )
    registers, spilled = resource_usage(made.asm["cubin"])
    return Compiled(made.metadata.shared, registers, spilled)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and stack bytes (which spills use) from a compiled kernel, read with Triton's own cuobjdump."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump said nothing about registers: {text!r}")
    return int(found[1]), int(found[2])


def main(arguments: list[str]) -> int:
    """Compile the cases of the named modules for the given capabilities, all for all by default; 1 if any failed. `--first`: of
    cases that differ in sizes and types alone only the first."""
    capabilities = [int(text) for text in arguments if text.isdigit()] or list(SHARED_LIMIT_BYTES)
    modules = [text for text in arguments if not text.isdigit() and text != "--first"] or MODULES
    failed = 0
    for capability in capabilities:
        for module in modules:
            cases = importlib.import_module(f"keyecli.kernels.{module}").compile_cases(capability)
            for case in first_of_each(cases) if "--first" in arguments else cases:
                failed += not report_case(case, capability)
    return 1 if failed else 0


def first_of_each(cases: Sequence[CompileCase]) -> list[CompileCase]:
    """The first case of every kernel, with every choice of arguments that are left out."""
    found: dict[Any, CompileCase] = {}
    for case in cases:
        left_out = frozenset(name for name, value in case.constants.items() if value is None)
        found.setdefault((case.kernel, left_out), case)
    return list(found.values())


def report_case(case: CompileCase, capability: int) -> bool:
    """Print what the compiler made of one case; False when it failed or needs more shared memory than there is."""
    try:
        made = compile_case(case, capability)
    except Exception as error:
        print(f"sm_{capability} {case.name}: {type(error).__name__}: {error}", flush=True)
        return False
    fits = made.shared_bytes <= SHARED_LIMIT_BYTES[capability]
    print(
        f"sm_{capability} {case.name}: {made.shared_bytes} bytes shared{'' if fits else ' (TOO MUCH)'}, "
        f"{made.registers} registers, {made.spilled_bytes} bytes of stack",
        flush=True,
    )
    return fits


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
