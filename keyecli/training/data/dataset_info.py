"""LLaMA-Factory's dataset_info.json: which file a data set is, and what its columns and roles are called there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyecli.errors import InputError, UsageError
from keyecli.training.data.records import read_json
from keyecli.training.data.shapes import Shape
from keyecli.training.data.turns import ROLES, Tags

INFO_FILE = "dataset_info.json"
_ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")

# Our column → the key of `columns` that says its name there.
_MAPPED: dict[str, dict[str, str]] = {
    "sharegpt": {"conversations": "messages"},
    "alpaca": {"instruction": "prompt", "input": "query", "output": "response", "history": "history"},
}
_OF_BOTH = ("system", "tools", "images", "videos", "audios")
_DEFAULTS = {"messages": "conversations", "prompt": "instruction", "query": "input", "response": "output"}
_ROLE_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "call"),
    "system_tag": ("system", "system"),
}


@dataclass(frozen=True)
class DatasetEntry:
    """One data set of a dataset_info.json. columns: our name → its name in the file."""

    name: str
    path: Path
    shape: Shape
    columns: Mapping[str, str]
    tags: Tags

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row under our names for its columns."""
        theirs = {name: ours for ours, name in self.columns.items()}
        # A column that has the name of another one of ours is not what that name says.
        return {
            theirs.get(name, name): value
            for name, value in row.items()
            if name in theirs or name not in self.columns
        }


def find_entry(path: Path, dataset: str | None) -> DatasetEntry | None:
    """The data set that is meant by a path: of a dataset_info.json the one called `dataset`, or its only one; of a data file the
    one that the dataset_info.json beside it says it is.

    None for a data file that nothing is said about. UsageError: a name that is not there, or is needed; InputError: a
    dataset_info.json that cannot be read, or a data set that is not a file.
    """
    if path.name == INFO_FILE:
        entries = _entries(path)
        if dataset is None and len(entries) > 1:
            raise UsageError(f"{path} describes {', '.join(entries)}: say which with --dataset")
        name = dataset if dataset is not None else next(iter(entries))
        return _entry(path, name, entries)
    info = path.parent / INFO_FILE
    if not info.is_file():
        if dataset is not None:
            raise UsageError(f"--dataset {dataset} goes with a {INFO_FILE}, and there is none beside {path}")
        return None
    value = read_json(info)
    if (
        isinstance(value, list) and dataset is None
    ):  # ms-swift's file of that name says nothing about columns of a file
        return None
    entries = _entries(info)
    if dataset is not None:
        return _entry(info, dataset, entries)
    own = [name for name, said in entries.items() if info.parent / str(said.get("file_name")) == path]
    if len(own) > 1:
        raise UsageError(f"{info} describes {path.name} as {' and '.join(own)}: say which with --dataset")
    return _entry(info, own[0], entries) if own else None


def _entries(info: Path) -> dict[str, dict[str, Any]]:
    value = read_json(info)
    if not isinstance(value, dict) or not value or not all(isinstance(said, dict) for said in value.values()):
        raise InputError(f"{info} describes no data sets: it must hold an object for each name")
    return value


def _entry(info: Path, name: str, entries: Mapping[str, Mapping[str, Any]]) -> DatasetEntry:
    if name not in entries:
        raise UsageError(f"{info} has no data set {name}; it describes {', '.join(entries)}")
    said = entries[name]
    if any(said.get(key) for key in _ELSEWHERE):
        raise InputError(f"{info}: {name} is not on this disk; download it and name its file")
    file = said.get("file_name")
    if not isinstance(file, str) or not file:
        raise InputError(f"{info}: {name} has no file_name")
    if said.get("ranking") or (said.get("columns") or {}).get("kto_tag"):
        raise InputError(f"{info}: {name} compares answers, and only answers that are right can be learnt")
    formatting = said.get("formatting", "alpaca")
    if formatting not in _MAPPED:
        raise InputError(
            f"{info}: {name} has the formatting {formatting!r}, and known are {', '.join(_MAPPED)}"
        )
    return DatasetEntry(
        name=name,
        path=info.parent / file,
        shape="conversations" if formatting == "sharegpt" else "instruction",
        columns=_columns(said.get("columns") or {}, formatting),
        tags=_tags(said.get("tags") or {}),
    )


def _columns(said: Mapping[str, str], formatting: str) -> dict[str, str]:
    columns = {ours: said.get(key) or _DEFAULTS.get(key, ours) for ours, key in _MAPPED[formatting].items()}
    return columns | {name: said[name] for name in _OF_BOTH if said.get(name)}


def _tags(said: Mapping[str, str]) -> Tags:
    """What the roles are called, their names elsewhere still being known."""
    own = {said.get(tag, default): role for tag, (default, role) in _ROLE_TAGS.items()}
    return Tags(
        role_keys=(said.get("role_tag", "from"),),
        content_keys=(said.get("content_tag", "value"),),
        roles={**ROLES, **own},
    )
