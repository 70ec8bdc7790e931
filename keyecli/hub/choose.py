"""Which files of a repository are fetched: weights in safetensors, their index, tokenizer and configuration; never code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from keyecli.errors import ModelError
from keyecli.hub.listing import Listing, RemoteFile
from keyecli.model.shards import CONFIG_FILE, PICKLE_SUFFIXES, first_of

WEIGHT_SUFFIX = ".safetensors"
DATA_SUFFIXES = (WEIGHT_SUFFIX, ".json", ".jinja")
DATA_NAMES = ("merges.txt", "vocab.txt")
CODE_SUFFIXES = (".py", ".pyc", ".so", ".sh", ".ipynb")
UNSAFE_SUFFIXES = (*PICKLE_SUFFIXES, ".joblib", ".npy", ".npz", ".h5")

Reason = Literal["code", "pickle", "other"]


@dataclass(frozen=True)
class LeftOut:
    """A file of the repository that is not fetched: remote code, a pickle, or nothing that a model is made of."""

    path: str
    bytes: int
    reason: Reason


def choose(listing: Listing) -> tuple[tuple[RemoteFile, ...], tuple[LeftOut, ...]]:
    """The files to fetch, the small ones first, and those left out; only the top folder holds a model's own.

    ModelError when there is no configuration or no safetensors file.
    """
    wanted = sorted((file for file in listing.files if _is_data(file.path)), key=lambda file: file.bytes)
    chosen = {file.path for file in wanted}
    left = tuple(
        LeftOut(file.path, file.bytes, _reason(file.path))
        for file in listing.files
        if file.path not in chosen
    )
    if CONFIG_FILE not in chosen:
        raise ModelError(f"{listing.name} has no {CONFIG_FILE}: it is not a model that keye can use")
    if not any(file.path.endswith(WEIGHT_SUFFIX) for file in wanted):
        pickles = named(left, "pickle")
        if pickles:
            raise ModelError(
                f"{listing.name} has its weights only as pickle files ({first_of(pickles)}), which keye never opens: "
                "choose a model with safetensors files"
            )
        raise ModelError(f"{listing.name} has no safetensors files: it is not a model that keye can use")
    return tuple(wanted), left


def named(left: Iterable[LeftOut], reason: Reason) -> list[str]:
    """The paths left out for one reason."""
    return [file.path for file in left if file.reason == reason]


def _is_data(path: str) -> bool:
    name = PurePosixPath(path).name
    if name != path or name.startswith("."):
        return False
    return name.endswith(DATA_SUFFIXES) or name in DATA_NAMES


def _reason(path: str) -> Reason:
    if path.endswith(CODE_SUFFIXES):
        return "code"
    return "pickle" if path.endswith(UNSAFE_SUFFIXES) else "other"
