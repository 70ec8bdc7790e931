"""A model in memory: configuration, weights, tokenizer and preprocessor, on one device in one dtype."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from keyecli.engine.plan import (
    DTYPE_BYTES,
    OFFLOAD_HELPS,
    OFFLOADS,
    DevicePart,
    KVFormat,
    MemoryEstimate,
    Offload,
    cache_bytes_per_token,
    estimate_memory,
    gib,
    host_too_small,
)
from keyecli.errors import KeyeWarning, MemoryLimitError, UsageError
from keyecli.kernels.dispatch import Backend, has_triton, interprets
from keyecli.model.adapter import AdapterFile, adapter_revision, adapter_settings, load_adapter
from keyecli.model.cache import KeyeCache
from keyecli.model.checkpoint import (
    Preprocessor,
    load_config,
    load_model,
    load_preprocessor,
    load_tokenizer,
    resolve_model,
    weights_revision,
)
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.placement import WeightPlaces, one_device
from keyecli.model.quantize import quantization_in, quantization_of

if TYPE_CHECKING:
    from keyecli.engine.encoded import FrameCache
    from keyecli.video.decode import FrameChunk

OnProgress = Callable[[str, float, float | None], None]
"""Told what is being done, how much of it is done, and of how much (None: unknown)."""

FrameReader = Callable[..., Iterator["FrameChunk"]]

NANO_NAME = "keye-nano"
# Of the cache, what goes with each layer where layers are shared out among devices.
SPLIT_CACHE_TOKENS = 32_768
DTYPE_SPELLINGS = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "bf16": "bf16", "bfloat16": "bf16",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """Everything about a model but its weights: enough to plan a run. kv: type of the cache's keys and values, None: `dtype`."""

    name: str
    folder: Path
    config: KeyeVL2Config
    preprocessor: Preprocessor
    device: str
    dtype: str
    kernels: Backend
    kv: KVFormat | None = field(default=None, kw_only=True)
    offload: Offload | None = field(default=None, kw_only=True)
    adapter: Path | None = field(default=None, kw_only=True)
    parts: tuple[DevicePart, ...] = field(default=(), kw_only=True)

    @property
    def devices(self) -> str:
        """All of them, joined by commas."""
        return ",".join(part.device for part in self.parts) or self.device

    @property
    def quant(self) -> str | None:
        """int4, int8 or fp8 where the weights are quantised, by the folder or on the way."""
        quantization = quantization_in(self.config, self.folder)
        return None if quantization is None else quantization.method

    @property
    def is_nano(self) -> bool:
        """True for the embedded default model, which knows synthetic clips only."""
        return self.name == NANO_NAME


@dataclass(frozen=True)
class LoadedModel(ModelFiles):
    """The same with weights and tokenizer; `revision` names the weights, `dtype` is fp32, bf16 or fp16.

    read_frames: called in the place of `keyecli.video.decode.decode_frames`, with its arguments, by whoever has decoded
    some of them before; None decodes when frames are wanted. frame_cache: keeps what the vision tower makes of frames for
    later runs; None keeps nothing.
    """

    revision: str
    model: KeyeVL2ForConditionalGeneration
    tokenizer: Any
    generation_config: GenerationConfig | None
    read_frames: FrameReader | None = None
    frame_cache: FrameCache | None = None


def open_model(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    kernels: str | None = None,
    quant: str | None = None,
    kv: str | None = None,
    offload: str | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
) -> ModelFiles:
    """Find a model (a folder, a hub name in the local cache, None: embedded nano) and read its small files.

    Device: cuda where there is one, else cpu; dtype: bf16 on cuda, else fp32; kernels: triton on cuda, else reference; quant:
    as the folder is; kv: as dtype; offload: nothing. The configuration then says how the weights are quantised, by the folder
    or on the way. With an adapter the model is by default the one that it was trained on. ModelError, UsageError. A KeyeWarning
    says when there is a GPU and no Triton.
    """
    if adapter is not None:
        base = adapter_settings(adapter).get("base_model_name_or_path")
        model = base if model is None and base and base != NANO_NAME else model
    folder = resolve_model(None if model is None else str(model), revision)
    chosen, *others = choose_devices(device)
    config = quantized_config(folder, quant)
    files = ModelFiles(
        name=NANO_NAME if model is None else str(model),
        folder=folder,
        config=config,
        preprocessor=load_preprocessor(folder),
        device=chosen,
        dtype=choose_dtype(dtype, chosen),
        kernels=choose_kernels(kernels, chosen),
        kv=choose_kv(kv),
        offload=choose_offload(offload, chosen, config),
        adapter=None if adapter is None else Path(adapter).expanduser(),
    )
    return replace(files, parts=_split(files, (chosen, *others))) if others else files


def load_weights(files: ModelFiles, *, on_progress: OnProgress | None = None) -> LoadedModel:
    """Load what `files` describes. ModelError; MemoryLimitError when there is no room for the weights.

    A KeyeWarning says when the model's files leave open how pixels are normalised.
    """
    require_room(files)
    adapter = None if files.adapter is None else load_adapter(files.adapter)
    if adapter is not None:
        warn_of_another_base(adapter, files)

    def report(done: int, total: int) -> None:
        if on_progress:
            on_progress("loading weights", done, total)

    with memory_limits(files.device):
        model = load_model(
            files.folder,
            device=_places(files),
            dtype=torch_dtype(files.dtype),
            quantization=quantization_in(files.config, files.folder),
            adapter=adapter,
            on_progress=report,
        )
    model.set_kernel_backend(files.kernels)
    if files.preprocessor.assumed:
        assumed = " and ".join(files.preprocessor.assumed)
        message = f"the preprocessor of {files.name} gives no {assumed}: 0.5 is used for each channel"
        warnings.warn(message, KeyeWarning, stacklevel=2)
    return LoadedModel(
        **vars(files),
        revision=revision_of(files),
        model=model,
        tokenizer=load_tokenizer(files.folder),
        generation_config=_read_generation_config(files.folder),
    )


def warn_of_another_base(adapter: AdapterFile, files: ModelFiles) -> None:
    """A KeyeWarning when an adapter says that it was trained on other weights than those of `files`."""
    base = weights_revision(files.folder)
    if adapter.base_revision not in (None, base):
        message = (
            f"the adapter {adapter.folder} was trained on other weights ({adapter.base or 'unnamed'}, {adapter.base_revision}) "
            f"than those of {files.name} ({base}): its answers may be worse"
        )
        warnings.warn(message, KeyeWarning, stacklevel=3)


def revision_of(files: ModelFiles) -> str:
    """A short name of the weights, another one with an adapter; ModelError when either cannot be read."""
    base = weights_revision(files.folder)
    if files.adapter is None:
        return base
    return sha256(f"{base} {adapter_revision(files.adapter)}".encode()).hexdigest()[: len(base)]


def require_room(files: ModelFiles) -> None:
    """MemoryLimitError when the weights do not fit where they are to be."""
    host = free_memory_bytes("cpu")
    parts = files.parts or (DevicePart(files.device, files.config.num_hidden_layers, first=True, last=True),)
    needed = sum(_weights_memory(files, part, files.config, files.offload).host_bytes for part in parts)
    if needed and host is not None and needed > host:
        raise MemoryLimitError(host_too_small(needed, host))
    for part in parts:
        _require_room_on(files, part, host)


def _require_room_on(files: ModelFiles, part: DevicePart, host: int | None) -> None:
    """The same for one device; `host` is what is free in this machine's memory."""
    need = _weights_memory(files, part, files.config, files.offload).loaded_bytes
    free = free_memory_bytes(part.device)
    if free is None or need <= free:
        return
    ways = []
    if files.dtype == "fp32" and need // 2 <= free:
        ways.append("use --dtype bf16")
    smaller = copy(files.config)
    smaller.quantization_config = quantization_of("int4").to_dict()
    if not ways and _weights_memory(files, part, smaller, files.offload).loaded_bytes <= free:
        ways.append("use --quant int4")
    offloaded = _weights_memory(files, part, files.config, "experts")
    in_host = offloaded.host_bytes * files.config.num_hidden_layers // max(1, part.layers)
    if (
        part.device.startswith("cuda")
        and offloaded.loaded_bytes <= free
        and (host is None or in_host <= host)
    ):
        ways.append(OFFLOAD_HELPS)
    what = f"{part.layers} layers" if files.parts else "the weights"
    raise MemoryLimitError(
        f"{what} of {files.name} take {gib(need)} in {files.dtype} and {gib(free)} are free on {part.device}: "
        + ", or ".join([*ways, "use a larger device or a smaller model"])
    )


def _weights_memory(
    files: ModelFiles, part: DevicePart, config: KeyeVL2Config, offload: Offload | None
) -> MemoryEstimate:
    return estimate_memory(
        config, 0, 0, dtype=files.dtype, device=part.device, kernels=files.kernels, offload=offload, part=part
    )


def _split(files: ModelFiles, devices: Sequence[str]) -> tuple[DevicePart, ...]:
    """Which layers each of several devices holds; UsageError when the model is too small for so many."""
    from keyecli.engine.split import split_layers

    config = files.config
    tokens = min(config.max_position_embeddings, SPLIT_CACHE_TOKENS)
    cache = tokens * cache_bytes_per_token(config, DTYPE_BYTES[files.dtype], files.kv)
    parts = split_layers(
        config,
        devices,
        [free_memory_bytes(device) or 0 for device in devices],
        torch_dtype(files.dtype),
        quantization_in(config, files.folder),
        files.offload is not None,
        cache // config.num_hidden_layers,
    )
    if len(parts) < len(devices):
        raise UsageError(
            f"--device {','.join(devices)}: {files.name} has layers for {len(parts)} of them only; name fewer devices"
        )
    return parts


def _places(files: ModelFiles) -> WeightPlaces:
    if files.parts:
        from keyecli.engine.split import places_of

        return places_of(files.parts, files.offload is not None)
    return one_device(files.device, files.config.num_hidden_layers, files.offload is not None)


def quantized_config(folder: Path, quant: str | None) -> KeyeVL2Config:
    """The folder's configuration, which says how it is quantised, or will be as `quant` asks; UsageError when the two differ."""
    config = load_config(folder)
    stored = quantization_in(config, folder)
    if quant is None or quant == "none":
        return config
    wanted = quantization_of(quant)
    if stored is not None and stored.method != wanted.method:
        raise UsageError(
            f"--quant {quant} cannot be: {folder} is quantised already, {stored}; leave the option out, or quantise the original"
        )
    config.quantization_config = (stored or wanted).to_dict()
    return config


def choose_device(device: str | None) -> str:
    """The device to run on; UsageError for one that this machine does not have."""
    if device is None or device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device} is not a device; use cpu, cuda or cuda:N") from None
    if wanted.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is not supported; use cpu, cuda or cuda:N")
    present = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= present:
        have = f"{present or 'no'} CUDA device{'s' if present > 1 else ''}"
        raise UsageError(f"--device {device} does not exist: this machine has {have}; leave the option out")
    return str(wanted)


def choose_devices(device: str | None) -> tuple[str, ...]:
    """The devices to run on, as `choose_device`, or several GPUs: cuda:0,1 or cuda:0,cuda:1, inputs going to the first."""
    names = (device or "").split(",")
    if len(names) == 1:
        return (choose_device(device),)
    named = [f"cuda:{name}" if name.isdecimal() else name for name in names]
    if not all(re.fullmatch(r"cuda:\d+", name) for name in named) or names[0].isdecimal():
        raise UsageError(f"--device {device} is no list of GPUs; write it as cuda:0,1")
    chosen = tuple(choose_device(name) for name in named)
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--device {device} names a GPU twice; name each once")
    return chosen


def choose_dtype(dtype: str | None, device: str) -> str:
    """fp32, bf16 or fp16 in any common spelling; by default bf16 on cuda and fp32 elsewhere."""
    if dtype is None or dtype == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    spelling = DTYPE_SPELLINGS.get(dtype.lower().removeprefix("torch."))
    if spelling is None:
        raise UsageError(f"--dtype {dtype} is not known; use bf16, fp16 or fp32")
    return spelling


def choose_kernels(kernels: str | None, device: str) -> Backend:
    """What computes: triton on a GPU, unless the definitions are asked for; UsageError for Triton without a GPU or without
    Triton. Triton's interpreter, which needs no GPU, counts as one."""
    if kernels not in (None, "auto", "reference", "triton"):
        raise UsageError(f"--kernels {kernels} is not known; use reference or triton")
    on_gpu = device.startswith("cuda")
    if kernels == "reference" or (kernels != "triton" and not on_gpu):
        return "reference"
    if has_triton():
        if on_gpu or interprets():
            return "triton"
        raise UsageError(
            f"--kernels triton runs on an NVIDIA GPU, and the device is {device}: leave the option out"
        )
    if kernels == "triton":
        raise UsageError(
            "--kernels triton needs the package triton, which is not installed: pip install triton"
        )
    message = (
        "the package triton is not installed: the definitions in PyTorch compute, slowly and with more memory"
    )
    warnings.warn(message, KeyeWarning, stacklevel=2)
    return "reference"


def choose_kv(kv: str | None) -> KVFormat | None:
    """The type of the cache's keys and values, None for the model's own; UsageError for one that is not known."""
    if kv is None or kv == "auto":
        return None
    if kv == "fp8":
        return "fp8"
    raise UsageError(f"--kv {kv} is not known; use auto or fp8")


def choose_offload(offload: str | None, device: str, config: KeyeVL2Config) -> Offload | None:
    """What is kept in the host's memory; UsageError for what is not known, and where nothing is gained or can be moved."""
    if offload is None or offload == "none":
        return None
    if offload not in OFFLOADS:
        raise UsageError(f"--offload {offload} is not known; use {' or '.join(OFFLOADS)}")
    if not device.startswith("cuda"):
        raise UsageError(
            f"--offload experts keeps a GPU's experts in this machine's memory, and the device is {device}: leave the option out"
        )
    if not config.num_experts:
        raise UsageError("--offload experts is for models with routed experts: leave the option out")
    return "experts"


def run_arguments(files: ModelFiles) -> dict[str, Any]:
    """What `plan_run` is told about a model, the devices that it runs on and what is free there now."""
    return {
        "model": files.name,
        "device": files.device,
        "dtype": files.dtype,
        "kernels": files.kernels,
        "kv": files.kv,
        "free_bytes": free_memory_bytes(files.device),
        "offload": files.offload,
        "host_free_bytes": free_memory_bytes("cpu") if files.offload else None,
        "parts": [(part, free_memory_bytes(part.device)) for part in files.parts],
    }


def new_cache(files: ModelFiles, tokens: int, batch: int = 1) -> KeyeCache:
    """An empty cache of `batch` sequences, as the model is run."""
    kv_dtype = torch.float8_e4m3fn if files.kv == "fp8" else None
    device = _places(files).layers
    return KeyeCache(
        files.config, tokens, batch, dtype=torch_dtype(files.dtype), device=device, kv_dtype=kv_dtype
    )


def free_cache_bytes(files: ModelFiles) -> int | None:
    """How large a cache of all layers the devices can still take; None where it cannot be known."""
    free = free_memory_bytes(files.device)
    if not files.parts:
        return free
    layers = files.config.num_hidden_layers
    room = [(free_memory_bytes(part.device), part.layers) for part in files.parts if part.layers]
    return min((size * layers // own for size, own in room if size is not None), default=None)


def torch_dtype(dtype: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def free_memory_bytes(device: str) -> int | None:
    """Bytes the device can still give, with what torch holds unused; None where it cannot be known."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        known = [size for size in (_available_memory(), _control_group_room()) if size is not None]
        return min(known, default=None)
    return None


def _available_memory() -> int | None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def _control_group_room(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Room below a container's limit (version 2 groups); file cache counts as free, since it gives way."""
    files = (root / "memory.max", root / "memory.current", root / "memory.stat")
    if not all(os.access(file, os.R_OK) for file in files):
        return None
    limit, current, lines = (file.read_text().strip() for file in files)
    if limit == "max":
        return None
    statistics = dict(line.split() for line in lines.splitlines())
    cache = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return max(0, int(limit) - int(current) + cache)


@contextmanager
def memory_limits(device: str) -> Iterator[None]:
    """Running out of memory inside the block becomes a MemoryLimitError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryLimitError(_out_of_memory(device)) from error
    except RuntimeError as error:
        # The CPU allocator has no exception class of its own.
        if "can't allocate memory" not in str(error):
            raise
        raise MemoryLimitError(_out_of_memory(device)) from error


def _out_of_memory(device: str) -> str:
    return (
        f"{device} ran out of memory while running: sample less with --fps, --max-frames, --end or "
        "--max-tokens-video, use --dtype bf16, or free memory on the device"
    )


def _read_generation_config(folder: Path) -> GenerationConfig | None:
    """transformers' generation settings of the folder, None when it has none; only its stop ids are used."""
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)
