"""What is kept on the disk: models in the Hugging Face cache, whole or half-fetched, and keye's own cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import scan_cache_dir

from keyecli.doctor.finding import Finding
from keyecli.hub.cache import PARTIAL_SUFFIX, size_text
from keyecli.hub.models import cached_models, hub_folder
from keyecli.settings import cache_folder


def check_caches() -> Iterator[Finding]:
    """Sizes of both caches, one finding for each model of this family and for each fetch that was not finished."""
    yield _hub_finding(hub_folder())
    for model in cached_models():
        text = f"{size_text(model.bytes)} at commit {model.commit}"
        yield Finding("caches", model.name, "ok", text, details=model.to_dict())
    yield from _half_fetched(hub_folder())
    own = cache_folder()
    size = sum(path.stat().st_size for path in own.rglob("*") if path.is_file()) if own.is_dir() else 0
    details = {"folder": str(own), "bytes": size}
    yield Finding("caches", "keye", "ok", f"{size_text(size)} in {own}", details=details)


def _hub_finding(folder: Path) -> Finding:
    if not folder.is_dir():
        text = f"{folder} does not exist: no model has been fetched yet"
        return Finding("caches", "Hugging Face", "ok", text, details={"folder": str(folder), "bytes": 0})
    found = scan_cache_dir(folder)
    details = {"folder": str(folder), "bytes": found.size_on_disk, "repositories": len(found.repos)}
    text = f"{size_text(found.size_on_disk)} in {folder}, {len(found.repos)} repositories"
    if found.warnings:
        text += f"; {len(found.warnings)} that cannot be read"
        remedy = "`hf cache verify` and `hf cache rm` look after repositories that are not whole"
        return Finding("caches", "Hugging Face", "warning", text, remedy, details)
    return Finding("caches", "Hugging Face", "ok", text, details=details)


def _half_fetched(folder: Path) -> Iterator[Finding]:
    """Files whose fetching broke off, a finding for each repository."""
    for repo in sorted(folder.glob("models--*--*")):
        parts = [path.stat().st_size for path in (repo / "blobs").glob("*" + PARTIAL_SUFFIX)]
        if parts:
            name = repo.name.removeprefix("models--").replace("--", "/")
            text = f"fetching broke off: {size_text(sum(parts))} in {len(parts)} unfinished files"
            remedy = f"`keye pull {name}` goes on from there"
            yield Finding("caches", name, "warning", text, remedy, {"bytes": sum(parts), "files": len(parts)})
