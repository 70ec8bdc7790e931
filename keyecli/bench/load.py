"""How fast a checkpoint in the released shape comes from a disk, beside the disk's own rate, and the peak of memory meanwhile.

The checkpoint is written here, of random bf16 values and fewer layers, and removed afterwards. Before each reading its files
are dropped from the page cache. What stands below the disk (a host's cache, a controller's) is not this system's to empty, so
that the disk is measured before and after, and the better counts.
"""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keyecli.bench.end_to_end import watched_memory
from keyecli.bench.network import official_config
from keyecli.engine.loaded import memory_limits
from keyecli.engine.plan import gib
from keyecli.errors import MemoryLimitError, UsageError
from keyecli.kernels.quantized_weights import quantise
from keyecli.model.checkpoint import config_values, load_model
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.quantize import Quantization, quantization_of
from keyecli.model.shards import CONFIG_FILE, HEADER_LENGTH_BYTES, INDEX_FILE

DEFAULT_GIB = 16.0
SHARD_BYTES = 4 << 30
# Values of the checkpoint repeat after so many, beginning elsewhere in each tensor: no disk compresses that away.
POOL_VALUES = 64 << 20
# Steps between where tensors begin in the pool: a prime, so that no two of them have the same blocks.
POOL_STEP = 1_000_003
STD = 0.02

READ_BYTES = 8 << 20
# Of the checkpoint, for each way of reading it.
SAMPLE_BYTES = 4 << 30
# Ways to read a disk as fast as it goes: how many threads, and whether past the page cache.
WAYS = ((4, True), (16, True), (8, False))
LEAST_SHARE = 0.7
MOST_PEAK = 1.1


@dataclass(frozen=True)
class LoadMeasurement:
    """One load of `read_bytes` of weights into a model of `final_bytes`, held as `how` says, with `peak_bytes` on the way.

    disk_rates: bytes a second from the disk, by the way of reading it.
    """

    how: str
    device: str
    read_bytes: int
    seconds: float
    final_bytes: int
    peak_bytes: int
    disk_rates: Mapping[str, float]

    @property
    def disk_way(self) -> str:
        """The fastest."""
        return max(self.disk_rates, key=lambda way: self.disk_rates[way])

    @property
    def disk_bytes_per_s(self) -> float:
        return self.disk_rates[self.disk_way]

    @property
    def share(self) -> float:
        """Of the disk's rate."""
        return self.read_bytes / self.seconds / self.disk_bytes_per_s

    @property
    def peak_ratio(self) -> float:
        """The peak over the final size."""
        return self.peak_bytes / self.final_bytes

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data, schema keye.bench.load/1."""
        made = {
            "disk_bytes_per_s": self.disk_bytes_per_s,
            "share": self.share,
            "peak_ratio": self.peak_ratio,
        }
        return {"schema": "keye.bench.load/1", **asdict(self), **made}

    def line(self) -> str:
        """One row for a reader."""
        rate, disk = self.read_bytes / self.seconds / 1e9, self.disk_bytes_per_s / 1e9
        share = f"{self.share:.0%} of the disk's {disk:.2f}, {_verdict(self.share >= LEAST_SHARE)} {LEAST_SHARE:.0%} or more"
        peak = f"peak {self.peak_ratio:.3f} × the final {gib(self.final_bytes)}"
        return (
            f"{f'load, {self.how}':<28} {f'{gib(self.read_bytes)} to {self.device}':<34} {self.seconds:.2f} s, {rate:.2f} GB/s "
            f"({share}; disk read by {self.disk_way}), {peak} ({_verdict(self.peak_ratio <= MOST_PEAK)} at most {MOST_PEAK})"
        )


def _verdict(is_reached: bool) -> str:
    return "as aimed," if is_reached else "NOT"


def measure(
    size_gib: float = DEFAULT_GIB, quant: str | None = None, folder: Path | None = None
) -> Iterator[LoadMeasurement]:
    """Loads in bf16 and, if asked for, in `quant`, from a checkpoint of about `size_gib` written below `folder`.

    On CUDA where there is one. UsageError: a size too small or a folder that is none; MemoryLimitError: the disk is too full,
    or a memory too small. RuntimeError when loaded weights are wrong.
    """
    if not hasattr(os, "posix_fadvise"):
        raise UsageError(
            "keye bench load reads from the disk, and this system cannot empty its page cache: use Linux"
        )
    quantization = None if quant is None else quantization_of(quant)
    config = sized_config(size_gib)
    place = Path(tempfile.gettempdir()) if folder is None else folder.expanduser()
    if not place.is_dir():
        raise UsageError(f"--dir {place} is no folder: name one on the disk to measure")
    require_disk(place, sum(math.prod(shape) * 2 for shape in shapes_of(config).values()))
    try:
        with tempfile.TemporaryDirectory(prefix="keye-bench-", dir=place) as made:
            checkpoint = RandomCheckpoint.write(Path(made), config)
            yield from measure_checkpoint(
                checkpoint, [None, quantization] if quantization is not None else [None]
            )
    except PermissionError as error:
        raise UsageError(f"{place} cannot be written to: name another folder with --dir") from error


def sized_config(size_gib: float) -> KeyeVL2Config:
    """The released shape with as many layers as there are in so many GiB; UsageError when that is not one."""
    config = official_config()
    sizes = []
    for layers in (1, 2):
        config.num_hidden_layers = layers
        sizes.append(sum(math.prod(shape) * 2 for shape in shapes_of(config).values()))
    if not size_gib * 2**30 >= sizes[0]:
        raise UsageError(
            f"--gib {size_gib:g} is too small: the released shape with one layer takes {sizes[0] / 2**30:.1f} GiB"
        )
    layers = 1 + int((size_gib * 2**30 - sizes[0]) // (sizes[1] - sizes[0]))
    config.num_hidden_layers = min(layers, official_config().num_hidden_layers)
    return config


def shapes_of(config: KeyeVL2Config) -> dict[str, tuple[int, ...]]:
    """The tensors of the official files."""
    return {name: tuple(tensor.shape) for name, tensor in _meta_model(config).state_dict().items()}


def _meta_model(config: KeyeVL2Config) -> KeyeVL2ForConditionalGeneration:
    with torch.device("meta"):
        model: Any = KeyeVL2ForConditionalGeneration(config)
    return model.to(torch.bfloat16)


def require_disk(folder: Path, size: int) -> None:
    """MemoryLimitError when so many bytes do not fit on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise MemoryLimitError(
            f"the checkpoint takes {gib(size)} and {gib(free)} are free on the disk of {folder}: make room there, name "
            "another folder with --dir, or give --gib less"
        )


@dataclass(frozen=True)
class RandomCheckpoint:
    """A folder in the official layout whose values follow from `pool`, and the order of its tensors."""

    folder: Path
    pool: Tensor
    shapes: dict[str, tuple[int, ...]]
    files: tuple[Path, ...]

    @classmethod
    def write(cls, folder: Path, config: KeyeVL2Config, shard_bytes: int = SHARD_BYTES) -> RandomCheckpoint:
        """Write it to the disk, shards at once."""
        generator = torch.Generator().manual_seed(0)
        pool = (torch.randn(POOL_VALUES, generator=generator) * STD).bfloat16()
        shapes = shapes_of(config)
        shards: list[list[str]] = [[]]
        filled = 0
        for name, shape in shapes.items():
            size = math.prod(shape) * 2
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        files = tuple(
            folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        )
        made = cls(folder, pool, shapes, files)
        with ThreadPoolExecutor(4) as writers:
            list(writers.map(made._write_shard, files, shards))
        weight_map = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json.dumps(config_values(_meta_model(config))), encoding="utf-8")
        return made

    def tensor(self, name: str) -> Tensor:
        """What the file holds under this name."""
        parts = [self.pool[begin:end] for begin, end in self._ranges(name)]
        return torch.cat(parts).view(self.shapes[name])

    def _ranges(self, name: str) -> Iterator[tuple[int, int]]:
        """The stretches of the pool that are one tensor's values."""
        size = len(self.pool)
        left = math.prod(self.shapes[name])
        begin = list(self.shapes).index(name) * POOL_STEP % size
        while left:
            end = min(size, begin + left)
            yield begin, end
            left -= end - begin
            begin = 0

    def _write_shard(self, file: Path, names: Sequence[str]) -> None:
        header, end = {}, 0
        for name in names:
            begin, end = end, end + math.prod(self.shapes[name]) * 2
            header[name] = {"dtype": "BF16", "shape": self.shapes[name], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text = text.ljust(len(text) + -len(text) % HEADER_LENGTH_BYTES)
        values = self.pool.view(torch.uint8).numpy().data
        with file.open("wb", buffering=0) as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                for first, last in self._ranges(name):
                    left = values[2 * first : 2 * last]
                    while left:
                        left = left[out.write(left) :]
            os.fsync(out.fileno())


def measure_checkpoint(
    checkpoint: RandomCheckpoint, quantizations: Sequence[Quantization | None]
) -> Iterator[LoadMeasurement]:
    """Loads of one checkpoint, each checked, between two measurements of the disk."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)  # opens a GPU, which belongs to no load
    rates = {way: rate for way in WAYS if (rate := read_rate(checkpoint.files, *way)) is not None}
    loads = [load_once(checkpoint, quantization, device) for quantization in quantizations]
    best = max(rates, key=lambda way: rates[way])
    rates[best] = max(rates[best], read_rate(checkpoint.files, *best) or 0.0)
    named = {way_name(*way): rate for way, rate in rates.items()}
    read_bytes = sum(math.prod(shape) * 2 for shape in checkpoint.shapes.values())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the host's memory"
    for quantization, (seconds, final, peak) in zip(quantizations, loads, strict=True):
        how = "bf16" if quantization is None else str(quantization.method)
        yield LoadMeasurement(how, name, read_bytes, seconds, final, peak, named)


def way_name(threads: int, is_direct: bool) -> str:
    return f"{threads} threads {'past' if is_direct else 'through'} the page cache"


def load_once(
    checkpoint: RandomCheckpoint, quantization: Quantization | None, device: torch.device
) -> tuple[float, int, int]:
    """Seconds, final bytes and peak bytes of one load from the disk: on a GPU what tensors take there, else the process's growth.

    RuntimeError when a weight is not the file's.
    """
    drop_from_cache(checkpoint.files)
    gc.collect()
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    with watched_memory() as memory, memory_limits(str(device)):
        begin = time.perf_counter()
        model = load_model(checkpoint.folder, device=device, dtype=torch.bfloat16, quantization=quantization)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    at_first, _, most = memory
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else most - at_first
    state = model.state_dict()
    check(checkpoint, state, quantization)
    return seconds, sum(tensor.nbytes for tensor in state.values()), peak


def check(checkpoint: RandomCheckpoint, state: dict[str, Tensor], quantization: Quantization | None) -> None:
    """RuntimeError unless tensors of each kind are the file's, or what quantising the file's makes of them, bit for bit."""
    names = list(checkpoint.shapes)
    layer = max(int(name.split(".")[2]) for name in names if name.startswith("model.layers."))
    kinds = ("self_attn.q_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    for name in [names[0], names[-1], *(f"model.layers.{layer}.{kind}" for kind in kinds)]:
        expected = checkpoint.tensor(name)
        if name in state:
            pairs = [(state[name], expected)]
        else:
            assert quantization is not None
            matrices = expected.mT if expected.ndim == 3 else expected
            rows = [0, len(matrices) - 1]
            made = quantise(matrices[rows], quantization.method, quantization.group)
            module = name.removesuffix(".weight")
            pairs = [(state[f"{module}.{part}"][rows], tensor) for part, tensor in made.tensors.items()]
        if not all(torch.equal(actual.cpu(), wanted) for actual, wanted in pairs):
            raise RuntimeError(f"{name} was not loaded as the file holds it")


def drop_from_cache(files: Sequence[Path]) -> None:
    """Let the system forget what it has read of these files; what was written must be on the disk already."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(files: Sequence[Path], threads: int, is_direct: bool) -> float | None:
    """Bytes a second from the disk, at most `SAMPLE_BYTES` of these files; None where the file system knows no such reading."""
    pieces, left = [], SAMPLE_BYTES
    for file in files:
        whole = min(left, file.stat().st_size)
        pieces += [(file, offset) for offset in range(0, whole, READ_BYTES)]
        left -= whole
    own = threading.local()
    flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if is_direct else 0)

    def read(piece: tuple[Path, int]) -> int:
        if not hasattr(own, "memory"):
            own.memory = mmap.mmap(-1, READ_BYTES)  # begins at a page, as direct reading demands
        opened = os.open(piece[0], flags)
        try:
            return os.preadv(opened, [own.memory], piece[1])
        finally:
            os.close(opened)

    drop_from_cache(files)
    begin = time.perf_counter()
    try:
        with ThreadPoolExecutor(threads) as readers:
            done = sum(readers.map(read, pieces))
    except OSError:
        if is_direct:
            return None
        raise
    return done / (time.perf_counter() - begin)
