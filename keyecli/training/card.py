"""The card of what a training run made: a README.md that says what it is, what it learnt from, how well, and how to use it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keyecli.engine.plan import gib
from keyecli.export.files import write_texts
from keyecli.export.markdown import escaped
from keyecli.export.text import one_line
from keyecli.video.timecode import format_time

CARD_NAME, PLOT_NAME, ADAPTER_CONFIG_NAME = "README.md", "loss.png", "adapter_config.json"
LONGEST_CELL_CHARACTERS = 400
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)

WHAT_LEARNT = {
    "lora": "a LoRA adapter",
    "full": "all weights of the decoder",
    "projector": "the projector between vision tower and decoder",
    "indexer": "the indexer of the sparse attention, by dense attention",
    "sparse": "the decoder and its indexer, under sparse attention",
}


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _count(value: float) -> str:
    return f"{value:,.0f}"


# Results by name: what a reader calls them, and how the number is written. Others are shown as they are.
RESULTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", _count),
    "loss_first": ("training loss, first step", "{:.4f}".format),
    "loss_last": ("training loss, last step", "{:.4f}".format),
    "held_out_loss_before": ("held-out loss before", "{:.4f}".format),
    "held_out_loss_after": ("held-out loss after", "{:.4f}".format),
    "held_out_exact_before": ("held-out rows exactly right before", _percent),
    "held_out_exact_after": ("held-out rows exactly right after", _percent),
    "reward_first": ("mean reward, first step", "{:.4f}".format),
    "reward_last": ("mean reward, last step", "{:.4f}".format),
    "divergence_first": ("divergence from the teachers, first step", "{:.4f}".format),
    "divergence_last": ("divergence from the teachers, last step", "{:.4f}".format),
    "held_out_reward_before": ("held-out reward before", "{:.4f}".format),
    "held_out_reward_after": ("held-out reward after", "{:.4f}".format),
    "held_out_rows": ("held-out rows", _count),
    "tries": ("answers tried", _count),
    "tokens": ("tokens", _count),
    "learnt_tokens": ("tokens learnt", _count),
    "seconds": ("time", format_time),
    "tokens_per_s": ("tokens a second", _count),
    "peak_bytes": ("most memory of a device", lambda size: gib(int(size))),
}


def write_card(
    folder: Path,
    *,
    title: str,
    base: str,
    base_revision: str,
    train: str,
    data: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    machine: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    method: str = "",
) -> Path:
    """Write README.md into the folder of an adapter or a model, in the place of one that is there, and return its path.

    train: as `--train` says it. data: files by `path`, `sha256`, `rows` and, where known, `skipped`. results: names of `RESULTS`,
    and others. samples: rows by their columns (source, question, expected, answer). method: how it learnt, where that is not by
    given answers. Texts of the data never become markup. KeyeError when the disk does not take it.
    """
    main, *extras = [name.strip() for name in train.split(",")]
    adapter = main == "lora" or (folder / ADAPTER_CONFIG_NAME).is_file()
    blocks = [
        _front_matter(base, adapter, main),
        f"# {_text(title)}",
        _introduction(base, base_revision, main, extras, method),
        "## Use",
        _usage(folder, adapter),
        "## Trained on",
        _data_table(data),
        *(["## Results", *_results(folder, results)] if results else []),
        *(["## Samples of held-out rows", _rows_table(samples)] if samples else []),
        *(["## Settings", _pairs_table("setting", settings)] if settings else []),
        *(["## Machine", _pairs_table("", machine)] if machine else []),
        "*Written by keye.*",
    ]
    path = folder / CARD_NAME
    write_texts([(path, "\n\n".join(blocks) + "\n")], overwrite=True)
    return path


def _front_matter(base: str, adapter: bool, main: str) -> str:
    """What the hub and PEFT read. A JSON text is a YAML text too, so nothing in it can end the value."""
    lines = ["---"]
    # The hub takes only a name of its own here; the text below names any base.
    if _HUB_NAME.fullmatch(base) and ".." not in base:
        lines += [f"base_model: {json.dumps(base)}"]
        lines += [f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    lines += [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: video-text-to-text"]
    tags = ["keye-vl", "keyecli", "video", *(["lora", "base_model:adapter"] if adapter else [])]
    known = main in WHAT_LEARNT and main not in tags
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in (*tags, *([main] if known else []))), "---"])


def _introduction(base: str, revision: str, main: str, extras: Sequence[str], method: str) -> str:
    what = WHAT_LEARNT.get(main, _text(main))
    also = f", with {' and '.join(map(_text, extras))}" if extras else ""
    how = f", by {_text(method)}" if method else ""
    return f"What was trained: {what}{also}{how}. Base: {_text(base)}, weights {_text(revision)}."


def _usage(folder: Path, adapter: bool) -> str:
    name = shlex.quote(one_line(folder.name) or ".")
    option = f"--adapter {name}" if adapter else f"-m {name}"
    lines = [f'keye ask clip.mp4 "What happens?" {option}']
    if adapter:
        lines.append(f"keye merge {name} merged/")
    return "\n".join(["```", *lines, "```"])


def _data_table(data: Sequence[Mapping[str, Any]]) -> str:
    """A line a file; its name only, since the rest of its path is of the machine that trained."""
    if not data:
        return "Nothing is known of the data."
    rows = [
        (
            Path(str(item["path"])).name,
            item.get("rows", ""),
            item.get("skipped", 0),
            item.get("sha256", ""),
        )
        for item in data
    ]
    return _table(("file", "rows used", "rows left out", "SHA-256"), rows)


def _results(folder: Path, results: Mapping[str, Any]) -> list[str]:
    ordered = {name: results[name] for name in (*RESULTS, *results) if name in results}
    rows = []
    for name, value in ordered.items():
        label, write = RESULTS.get(name, (name, None))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        rows.append((label, write(value) if write is not None and number else value))
    shown = [_table(("", "value"), rows)]
    if (folder / PLOT_NAME).is_file():
        shown.append(f"![Training and held-out loss over the steps]({PLOT_NAME})")
    return shown


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return _table(columns, [tuple(row.get(name, "") for name in columns) for row in rows])


def _pairs_table(heading: str, pairs: Mapping[str, Any]) -> str:
    return _table((heading, "value"), list(pairs.items()))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [" | ".join(map(_text, row)) for row in (columns, *rows)]
    lines.insert(1, " | ".join(["---"] * len(columns)))
    return "\n".join(f"| {line} |" for line in lines)


def _text(value: Any) -> str:
    """A value on one line whose characters all read as themselves, in a table too."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(part) for part in value)
    line = one_line(value if isinstance(value, str) else str(value))
    if len(line) > LONGEST_CELL_CHARACTERS:
        line = line[:LONGEST_CELL_CHARACTERS].rstrip() + " ..."
    # At its end it would close a heading.
    return escaped(line).replace("#", r"\#")
