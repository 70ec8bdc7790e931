"""Which model fits on this machine with which flags and how many tokens, by the numbers of `engine.plan`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keyecli.bench.network import official_config
from keyecli.doctor.finding import Finding
from keyecli.engine.loaded import NANO_NAME, choose_kernels, free_memory_bytes
from keyecli.engine.plan import MemoryEstimate, estimate_memory, gib
from keyecli.errors import ModelError
from keyecli.hub.listing import DEFAULT_MODEL
from keyecli.model.companions import load_config, resolve_model
from keyecli.model.config import KeyeVL2Config
from keyecli.model.quantize import quantization_of

LENGTHS = (32_768, 131_072, 262_144)


@dataclass(frozen=True)
class Mode:
    """A way of holding the model: the flags that ask for it, what they mean to `estimate_memory`, and how the weights are
    quantised on the way."""

    name: str
    flags: str
    plan: Mapping[str, Any]
    quant: str | None = None

    def suits(self, config: KeyeVL2Config, device: str) -> bool:
        """Whether a model can be held so: what is quantised already is not again, and host memory is beside a GPU's."""
        quantised = getattr(config, "quantization_config", None) is not None
        return not (self.quant and quantised) and ("offload" not in self.plan or device != "cpu")


MODES = (
    Mode("bf16", "--dtype bf16", {"dtype": "bf16"}),
    Mode("int8", "--quant int8", {"dtype": "bf16"}, "int8"),
    Mode("int4", "--quant int4", {"dtype": "bf16"}, "int4"),
    Mode("int4, kv fp8", "--quant int4 --kv fp8", {"dtype": "bf16", "kv": "fp8"}, "int4"),
    Mode(
        "int4, experts in host memory",
        "--quant int4 --kv fp8 --offload experts",
        {"dtype": "bf16", "kv": "fp8", "offload": "experts"},
        "int4",
    ),
)
PLAIN = Mode("fp32", "--dtype fp32", {"dtype": "fp32"})


@dataclass(frozen=True)
class Fit:
    """What a model in one mode needs for prompts of some length with their answers; `fits` None: free memory unknown."""

    model: str
    mode: str
    flags: str
    tokens: int
    memory: MemoryEstimate
    device: str
    free_bytes: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.free_bytes is None else self.memory.total_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "mode": self.mode,
            "flags": self.flags,
            "tokens": self.tokens,
            "device": self.device,
            "weights_bytes": self.memory.weights_bytes,
            "cache_bytes": self.memory.cache_bytes,
            "workspace_bytes": self.memory.workspace_bytes,
            "total_bytes": self.memory.total_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
        }


def official_fits(device: str) -> list[Fit]:
    """The released model: each mode at each length."""
    return fits_of(DEFAULT_MODEL, official_config(), device)


def model_fits(name: str | None, revision: str | None, device: str) -> list[Fit]:
    """Another model, named as --model does; nothing where its configuration cannot be read."""
    try:
        config = load_config(resolve_model(name, revision))
    except ModelError:
        return []
    return fits_of(name or NANO_NAME, config, device)


def fits_of(model: str, config: KeyeVL2Config, device: str) -> list[Fit]:
    """Each mode at each length that the context holds, or at the whole context where it is shorter."""
    free, context = free_memory_bytes(device), config.max_position_embeddings
    lengths = [tokens for tokens in LENGTHS if tokens <= context] or [context]
    modes = [mode for mode in MODES if mode.suits(config, device)]
    return [fit(model, config, mode, tokens, device, free) for mode in modes for tokens in lengths]


def fit(
    model: str, config: KeyeVL2Config, mode: Mode, tokens: int, device: str, free_bytes: int | None
) -> Fit:
    """What `tokens` tokens of prompt and answer take."""
    if mode.quant:
        config = copy.deepcopy(config)
        config.quantization_config = quantization_of(mode.quant).to_dict()
    memory = estimate_memory(
        config, tokens, 0, device=device, kernels=choose_kernels(None, device), **mode.plan
    )
    return Fit(model, mode.name, mode.flags, tokens, memory, device, free_bytes)


def check_room(fits: Sequence[Fit]) -> Iterator[Finding]:
    """keye-nano and the model of these rows: how far each goes here."""
    device = fits[0].device
    config = load_config(resolve_model(None))
    tokens = config.max_position_embeddings
    needed = fit(NANO_NAME, config, PLAIN, tokens, device, free_memory_bytes(device))
    text = f"{gib(needed.memory.total_bytes)} for its {tokens:,} tokens on {device}"
    if needed.fits is False:
        yield Finding("room", NANO_NAME, "problem", f"{text}: not free", "close other programs")
    else:
        yield Finding("room", NANO_NAME, "ok", text, details=needed.to_dict())
    yield judge(fits)


def judge(fits: Sequence[Fit]) -> Finding:
    """One sentence about a model's rows: the most tokens that fit, and in which mode, the plainest first."""
    model, device, free = fits[0].model, fits[0].device, fits[0].free_bytes
    if free is None:
        return Finding("room", model, "ok", f"how much is free on {device} is not known: see `keye plan`")
    fitting = [row for row in fits if row.fits]
    if not fitting:
        least = min(fits, key=lambda row: row.memory.total_bytes)
        text = (
            f"does not fit on {device}: {least.tokens:,} tokens with {least.flags} need "
            f"{gib(least.memory.total_bytes)}, {gib(free)} are free"
        )
        remedy = "run it on a GPU with that much memory free; keye-nano runs here"
        return Finding("room", model, "warning", text, remedy)
    longest = max(fitting, key=lambda row: row.tokens)
    text = (
        f"fits on {device} with {longest.flags}, up to {longest.tokens:,} tokens: "
        f"{gib(longest.memory.total_bytes)} of {gib(free)} free"
    )
    return Finding("room", model, "ok", text, details=longest.to_dict())
