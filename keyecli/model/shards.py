"""The safetensors files of a checkpoint folder, read no further than their headers, and a name for their content."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyecli.errors import ModelError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_HEADER_BYTES = 100_000_000
HEADER_LENGTH_BYTES = 8

REVISION_CHARACTERS = 12
REVISION_SAMPLES = 256
REVISION_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a shard's header describes it; `offset` is that of its first byte in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int


def read_entries(folder: Path | str) -> dict[str, TensorEntry]:
    """Every tensor in the folder's shards, from their headers alone.

    ModelError when there are no safetensors weights, a shard is missing or damaged, or index and shards disagree.
    """
    folder = Path(folder)
    index_path, single_path = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index_path.is_file():
        if not single_path.is_file():
            raise ModelError(_explain_no_weights(folder))
        return read_header(single_path)

    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(f"{index_path} has no weight_map: download it again")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{index_path} names the file '{shard}', which is not a safetensors file of this folder"
            )
        if not (folder / shard).is_file():
            raise ModelError(f"{index_path} names {shard}, which is missing: complete the download")
    if single_path.is_file() and SINGLE_FILE not in shards:
        raise ModelError(
            f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}: remove the one that is out of date"
        )

    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                said = f"places it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise ModelError(
                    f"{shard} holds the tensor {name}, but {index_path} {said}: they do not belong together"
                )
            entries[name] = entry
    absent = [name for name in weight_map if name not in entries]
    if absent:
        shard = weight_map[absent[0]]
        raise ModelError(
            f"{index_path} places {first_of(absent)} in {shard}, which lacks it: they do not belong together"
        )
    return entries


def _explain_no_weights(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    code = [name for name in names if name.endswith(".py")]
    if shards:
        return f"{folder} holds {first_of(shards)} but no {INDEX_FILE}: complete the download"
    if pickles:
        return (
            f"{folder} holds its weights only as pickle files ({first_of(pickles)}), which keyecli never opens: "
            "get or convert them to safetensors"
        )
    if code or "auto_map" in read_json_object(folder / CONFIG_FILE):
        what = first_of(code) if code else "an auto_map"
        return f"{folder} holds remote code ({what}), which keyecli never runs, and no weights: download the .safetensors files"
    return f"{folder} holds no weights: download its .safetensors files"


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; ModelError when its length and its header disagree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER_LENGTH_BYTES)
        if start.startswith(b"version "):
            raise ModelError(
                f"{path} is a git-lfs pointer, not the weights themselves: run `git lfs pull` in its folder"
            )
        length = struct.unpack("<Q", start)[0] if len(start) == HEADER_LENGTH_BYTES else MAX_HEADER_BYTES
        if len(start) < HEADER_LENGTH_BYTES or HEADER_LENGTH_BYTES + length > size:
            raise ModelError(
                f"{path} is cut off or damaged ({size} bytes, its header is not complete): download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise ModelError(f"{path} is damaged (a header of {length} bytes): download it again")
        raw = file.read(length)
    entries = {}
    end = 0
    start_of_data = HEADER_LENGTH_BYTES + length
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for name, value in header.items():
            first, last = value["data_offsets"]
            entries[name] = TensorEntry(
                path,
                str(value["dtype"]),
                tuple(map(int, value["shape"])),
                last - first,
                start_of_data + first,
            )
            end = max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged (its header cannot be read): download it again") from error
    promised = start_of_data + end
    if size < promised:
        raise ModelError(f"{path} is cut off ({size} of {promised} bytes): download it again")
    if size > promised:
        raise ModelError(
            f"{path} is damaged ({size - promised} bytes more than its header promises): download it again"
        )
    return entries


def weights_revision(folder: Path | str) -> str:
    """A short stable name for the weights: the hub commit of a cached snapshot, else a content hash.

    The hash covers every shard's name, size, header and evenly spaced samples of its data (the whole of a small
    file), so it costs milliseconds and still tells two trainings of one model apart.
    """
    folder = Path(folder).resolve()
    if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return folder.name[:REVISION_CHARACTERS]
    return content_name(sorted({entry.shard for entry in read_entries(folder).values()}))


def content_name(files: Sequence[Path]) -> str:
    """A short stable name for what some files hold; of a safetensors file, its header and samples of its data."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read())
                continue
            header_end = HEADER_LENGTH_BYTES + struct.unpack("<Q", file.read(HEADER_LENGTH_BYTES))[0]
            file.seek(0)
            digest.update(file.read(header_end))
            step = max(REVISION_SAMPLE_BYTES, math.ceil((size - header_end) / REVISION_SAMPLES))
            for offset in range(header_end, size, step):
                file.seek(offset)
                digest.update(file.read(REVISION_SAMPLE_BYTES))
    return digest.hexdigest()[:REVISION_CHARACTERS]


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no file; ModelError when it holds anything else."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({one_line(error)}): check its permissions") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({one_line(error)}): download it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} does not hold a JSON object: download it again")
    return values


def first_of(names: Sequence[str]) -> str:
    """The first of several names and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def one_line(error: Exception) -> str:
    """A library's message fit to stand inside a sentence."""
    return " ".join(str(error).split()).rstrip(".")
