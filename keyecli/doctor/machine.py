"""Python, platform, torch, the NVIDIA driver, GPUs, Triton, memory and disk."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from keyecli import __version__
from keyecli.doctor.finding import Finding
from keyecli.engine.loaded import free_memory_bytes
from keyecli.engine.plan import GIB, gib
from keyecli.kernels.dispatch import has_triton, interprets

DRIVER_FILE = Path("/proc/driver/nvidia/version")
DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
QUERY_TIMEOUT_S = 10
SMALLEST_CAPABILITY = (8, 0)
LITTLE_MEMORY_BYTES = 2 * GIB
LITTLE_DISK_BYTES = 2 * GIB
LIBRARIES = ("transformers", "safetensors", "huggingface_hub", "numpy")


def check_machine(cache_folder: Path) -> Iterator[Finding]:
    """What everything else stands on; `cache_folder` is where models are kept."""
    yield Finding("machine", "keyecli", "ok", f"{__version__}, {_library_versions()}")
    text = f"{platform.python_version()} at {sys.executable}"
    yield Finding("machine", "Python", "ok", text, details={"version": platform.python_version()})
    yield check_platform(platform.system())
    driver = driver_version()
    yield check_torch(driver)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield check_gpu(index)
    elif driver is None:
        text = "none: models run on the CPU, right but slowly; keye-nano needs no more"
        yield Finding("machine", "GPU", "ok", text, details={"gpus": 0})
    if triton := check_triton():
        yield triton
    yield check_memory(free_memory_bytes("cpu"))
    yield check_disk(cache_folder)


def _library_versions() -> str:
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} without a version")
    return ", ".join(found)


def check_platform(system: str) -> Finding:
    text = f"{platform.platform()}, {os.cpu_count()} CPU cores, {platform.machine()}"
    details = {"system": system, "cpus": os.cpu_count()}
    if system in ("Linux", "Darwin"):
        return Finding("machine", "platform", "ok", text, details=details)
    remedy = "use Linux or macOS; on Windows, WSL"
    return Finding("machine", "platform", "warning", f"{text}: keye is not tested there", remedy, details)


def driver_version() -> str | None:
    """The NVIDIA driver's version; None where there is none."""
    if DRIVER_FILE.is_file():
        found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", DRIVER_FILE.read_text())
        if found is not None:
            return found[1]
    if shutil.which(DRIVER_QUERY[0]) is None:
        return None
    try:
        asked = subprocess.run(
            DRIVER_QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = asked.stdout.split()
    return lines[0] if asked.returncode == 0 and lines else None


def check_torch(driver: str | None) -> Finding:
    """Whether torch and the driver go together."""
    cuda = torch.version.cuda
    text = f"{torch.__version__}, " + (f"built for CUDA {cuda}" if cuda else "built without CUDA")
    if driver is not None:
        text += f"; NVIDIA driver {driver}"
    details = {"version": str(torch.__version__), "cuda": cuda, "driver": driver}
    if driver is None or torch.cuda.is_available():
        return Finding("machine", "torch", "ok", text, details=details)
    if cuda is None:
        remedy = "install torch for CUDA, as https://pytorch.org/get-started says"
        return Finding("machine", "torch", "problem", f"{text}: the GPU stays unused", remedy, details)
    remedy = "update the NVIDIA driver, or install torch for an older CUDA; in a container, give it the GPUs"
    return Finding("machine", "torch", "problem", f"{text}: torch cannot use the GPU", remedy, details)


def check_gpu(index: int) -> Finding:
    """Name, memory and compute capability of one GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    text = f"{name}, compute capability {major}.{minor}, {gib(free)} of {gib(total)} free"
    details = {
        "name": name, "capability": f"{major}.{minor}", "free_bytes": free, "total_bytes": total,
    }  # fmt: skip
    if (major, minor) >= SMALLEST_CAPABILITY:
        return Finding("machine", f"GPU {index}", "ok", text, details=details)
    remedy = "use --kernels reference on this card, or a card from compute capability 8.0 on (Ampere)"
    return Finding("machine", f"GPU {index}", "warning", f"{text}: too old for the kernels", remedy, details)


def check_triton() -> Finding | None:
    """Triton, where a GPU needs it or it is there; None where nothing misses it."""
    if has_triton():
        if interprets():
            text = (
                f"{version('triton')}, switched to its interpreter by TRITON_INTERPRET: kernels would crawl"
            )
            return Finding("machine", "Triton", "warning", text, "unset TRITON_INTERPRET")
        return Finding("machine", "Triton", "ok", version("triton"), details={"version": version("triton")})
    if not torch.cuda.is_available():
        return None
    text = "not installed: the definitions in PyTorch compute, slowly and with more memory"
    return Finding("machine", "Triton", "warning", text, "pip install triton")


def check_memory(free: int | None) -> Finding:
    """Host memory; `free` None: unknown."""
    if free is None:
        return Finding("machine", "memory", "ok", "how much is free is not known on this platform")
    text, details = f"{gib(free)} free", {"free_bytes": free}
    if free >= LITTLE_MEMORY_BYTES:
        return Finding("machine", "memory", "ok", text, details=details)
    remedy = "close other programs: decoding a video and keye-nano together take about 1 GiB"
    return Finding("machine", "memory", "warning", text, remedy, details)


def check_disk(cache_folder: Path) -> Finding:
    """Room on the disk that holds the Hugging Face cache, or will."""
    folder = cache_folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text, details = f"{gib(free)} free for {cache_folder}", {"free_bytes": free, "folder": str(cache_folder)}
    if free >= LITTLE_DISK_BYTES:
        return Finding("machine", "disk", "ok", text, details=details)
    remedy = "make room (`hf cache prune`, `keye cache`), or set HF_HOME to a folder on a larger disk"
    return Finding("machine", "disk", "warning", text, remedy, details)
