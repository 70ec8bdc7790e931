"""`keye cache`: what keye keeps on the disk to be quicker, and the models in the Hugging Face cache; both can be cleared."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keyecli.commands.interrupt import leaving_at_once
from keyecli.commands.options import OUTPUT, with_settings
from keyecli.console import console
from keyecli.errors import KeyeError, UsageError
from keyecli.settings import Settings, cache_folder

if TYPE_CHECKING:
    from keyecli.engine.framestore import Entry, FrameStore
    from keyecli.hub.models import HubModel

ACTIONS = ("show", "path", "clear")
DAY_S = 24 * 3600.0


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar)


@with_settings(OUTPUT)
def cache(
    action: Annotated[
        str, typer.Argument(metavar="[ACTION]", help="show (the default), path, or clear.")
    ] = "show",
    encoded: Annotated[
        bool, _option("--encoded", help="Clear encoded frames; what `keye cache clear` does by itself.")
    ] = False,
    models: Annotated[
        bool, _option("--models", help="Clear Keye-VL-2.0 models out of the Hugging Face cache.")
    ] = False,
    older_than: Annotated[
        float | None, _option("--older-than", metavar="DAYS", help="Only what was not used for so long.")
    ] = None,
    yes: Annotated[bool, _option("--yes", "-y", help="Do not ask before models are removed.")] = False,
    *,
    settings: Settings,
) -> None:
    """Show or clear what is kept on the disk: encoded frames of clips, and models.

    Encoded frames spare a second question about a clip the decoding; they may be cleared at any time, and the least
    recently used go by themselves. Models are removed only with --models, and others than Keye-VL-2.0 never.
    """
    if action not in ACTIONS:
        raise UsageError(f"keye cache can {', '.join(ACTIONS[:-1])} and {ACTIONS[-1]}, not {action}")
    if action != "clear" and (encoded or models or yes or older_than is not None):
        raise UsageError("--encoded, --models, --older-than and --yes go with `keye cache clear`")
    if older_than is not None and not 0 <= older_than < float("inf"):
        raise UsageError(f"--older-than must be 0 days or more, not {older_than:g}")
    if action == "path":
        console.result(json.dumps({"path": str(cache_folder())}) if settings.json else str(cache_folder()))
        return

    with leaving_at_once():
        from keyecli.engine.framestore import DEFAULT_BYTES, FrameStore
        from keyecli.hub.models import cached_models

    limit = DEFAULT_BYTES if settings.cache_size is None else int(settings.cache_size * 2**30)
    store = FrameStore(limit)
    before_s = float("inf") if older_than is None else time.time() - older_than * DAY_S
    if action == "show":
        _show(store, cached_models(), as_json=settings.json)
        return
    entries = (
        [entry for entry in store.entries() if entry.used_at <= before_s] if encoded or not models else []
    )
    chosen = [model for model in cached_models() if model.used_at <= before_s] if models else []
    if chosen and not yes:
        _confirm(chosen)
    _clear(store, entries, chosen, everything=older_than is None, as_json=settings.json)


def _show(store: FrameStore, models: Sequence[HubModel], *, as_json: bool) -> None:
    from keyecli.hub.models import hub_folder

    entries = store.entries()
    used, models_bytes = sum(entry.bytes for entry in entries), sum(model.bytes for model in models)
    if as_json:
        said = {
            "schema": "keye.cache/1",
            "folder": str(store.folder),
            "bytes": used,
            "limit_bytes": store.limit_bytes,
            "entries": [entry.to_dict() for entry in entries],
            "models_folder": str(hub_folder()),
            "models_bytes": models_bytes,
            "models": [model.to_dict() for model in models],
        }
        console.result(json.dumps(said, ensure_ascii=False))
        return
    limit = _size(store.limit_bytes)
    console.result(f"encoded frames: {_count(entries, 'clip')}, {_size(used)} of {limit}, in {store.folder}")
    if entries:
        _table(
            ("clip", "frames", "tokens", "size", "last used", "model"),
            [
                (
                    entry.clip or "(damaged)",
                    f"{entry.frames:,}",
                    f"{entry.tokens:,}",
                    _size(entry.bytes),
                    _day(entry.used_at),
                    entry.model,
                )
                for entry in entries
            ],
        )
    console.result(f"models: {len(models)} of Keye-VL-2.0, {_size(models_bytes)}, in {hub_folder()}")
    if models:
        _table(
            ("model", "commit", "size", "last used"),
            [(model.name, model.commit[:12], _size(model.bytes), _day(model.used_at)) for model in models],
        )


def _clear(
    store: FrameStore,
    entries: Sequence[Entry],
    models: Sequence[HubModel],
    *,
    everything: bool,
    as_json: bool,
) -> None:
    from keyecli.hub.models import remove_models

    try:
        for entry in entries:
            store.remove(entry.folder)
        if entries and everything:
            store.forget_files()
        remove_models(models)
    except OSError as error:
        raise KeyeError(f"the cache cannot be cleared: {error.strerror} ({error.filename})") from error
    freed = sum(entry.bytes for entry in entries) + sum(model.bytes for model in models)
    if as_json:
        said = {
            "schema": "keye.cache.clear/1",
            "entries": [entry.to_dict() for entry in entries],
            "models": [model.to_dict() for model in models],
            "freed_bytes": freed,
        }
        console.result(json.dumps(said, ensure_ascii=False))
        return
    what = [f"the encoded frames of {_count(entries, 'clip')}"] if entries else []
    what += [_count(models, "model")] if models else []
    if what:
        console.notice(f"removed {' and '.join(what)}: {_size(freed)}")
    else:
        console.notice("nothing to remove")


def _confirm(models: Sequence[HubModel]) -> None:
    """UsageError unless the user agrees to lose these."""
    size = _size(sum(model.bytes for model in models))
    names = ", ".join(f"{model.name} at {model.commit[:12]}" for model in models)
    if not sys.stdin.isatty():
        raise UsageError(f"removing models ({names}, {size}) is for good: add --yes to agree")
    console.notice(f"to be removed: {names}")
    if not typer.confirm(f"Remove {_count(models, 'model')}, {size}?", err=True):
        raise UsageError("nothing was removed")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from keyecli.export.text import one_line

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("frames", "tokens", "size") else "left")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console.table(table)


def _count(items: Sequence[object], name: str) -> str:
    return f"1 {name}" if len(items) == 1 else f"{len(items)} {name}s"


def _size(count: int) -> str:
    from keyecli.hub.cache import size_text

    return size_text(count)


def _day(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))
