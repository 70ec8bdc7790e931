"""Models of this family in the Hugging Face cache, one for each commit that is there, and taking them out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, scan_cache_dir

from keyecli.errors import ModelError
from keyecli.model.shards import CONFIG_FILE, read_json_object

MODEL_TYPE = "KeyeVL2"  # KeyeVL2Config's, whose module takes seconds to import


@dataclass(frozen=True)
class HubModel:
    """`bytes` on disk, of which other commits of the same model may share some; `used_at` in seconds since 1970."""

    name: str
    commit: str
    bytes: int
    used_at: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def hub_folder() -> Path:
    """Where the Hugging Face libraries keep what they fetch; it need not exist."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def cached_models() -> list[HubModel]:
    """The models of this family that are there, by name."""
    if not hub_folder().is_dir():
        return []
    found = []
    for repo in scan_cache_dir(hub_folder()).repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            try:
                kind = read_json_object(revision.snapshot_path / CONFIG_FILE).get("model_type")
            except ModelError:
                continue
            if kind == MODEL_TYPE:
                used_at = max(
                    (file.blob_last_accessed for file in revision.files), default=repo.last_accessed
                )
                found.append(HubModel(repo.repo_id, revision.commit_hash, revision.size_on_disk, used_at))
    return sorted(found, key=lambda model: (model.name, model.commit))


def remove_models(models: Sequence[HubModel]) -> None:
    """Take these commits out of the cache; files that other commits share stay. OSError when that is not allowed."""
    if not models:
        return
    found = scan_cache_dir(hub_folder())
    for repo in found.repos:
        commits = [model.commit for model in models if model.name == repo.repo_id]
        if commits and repo.repo_type == "model":
            # Other repositories may hold the same commits.
            replace(found, repos=frozenset([repo])).delete_revisions(*commits).execute()
