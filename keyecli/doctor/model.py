"""A checkpoint on trial: small files, names, shapes and types by the headers, sizes, and the hashes where they are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keyecli.doctor.finding import Finding
from keyecli.engine.plan import parameter_count
from keyecli.errors import ModelError
from keyecli.hub.cache import checksum_of, size_text
from keyecli.hub.choose import CODE_SUFFIXES, UNSAFE_SUFFIXES
from keyecli.hub.listing import Algorithm
from keyecli.hub.whole import Weights, read_weights
from keyecli.model.companions import load_config, load_preprocessor, load_tokenizer, resolve_model
from keyecli.model.config import KeyeVL2Config
from keyecli.model.shards import INDEX_FILE, first_of, read_json_object

GENERATION_FILE = "generation_config.json"
REASONING_TOKENS = ("<think>", "</think>")
TURN_END = "<|im_end|>"

OnBytes = Callable[[float, float], None]
"""Told how many bytes of how many have been read."""


def check_model(
    name: str | None,
    revision: str | None = None,
    *,
    hashes: bool = False,
    on_bytes: OnBytes | None = None,
) -> Iterator[Finding]:
    """A finding for each part of a model, named as --model does (None: keye-nano); no weight is read but for `hashes`.

    What cannot be looked at because of an earlier problem is left out. UsageError for a revision of a folder.
    """
    try:
        folder = resolve_model(name, revision)
    except ModelError as error:
        remedy = f"`keye pull {name}` fetches a model by its hub name; --model also takes a folder"
        yield Finding("model", "folder", "problem", str(error), remedy)
        return
    remedy = remedy_of(name, folder)
    yield folder_finding(folder)
    try:
        config = load_config(folder)
    except ModelError as error:
        yield Finding("model", "configuration", "problem", str(error), remedy)
        return
    for part, look in (
        ("configuration", lambda: configuration_finding(config)),
        ("preprocessor", lambda: preprocessor_finding(folder, remedy)),
        ("tokenizer", lambda: tokenizer_finding(folder, config, remedy)),
        ("weights", lambda: weights_finding(read_weights(folder), folder, remedy)),
        ("hashes", lambda: hashes_finding(folder, hashes, on_bytes, remedy)),
    ):
        try:
            yield look()
        except ModelError as error:
            yield Finding("model", part, "problem", str(error), remedy)


def remedy_of(name: str | None, folder: Path) -> str:
    """What brings a model's files back."""
    if name is None:
        return "reinstall keyecli, whose own model this is"
    if folder.parent.name == "snapshots":
        return f"`keye pull {name} --verify` fetches what is missing or damaged"
    return f"get the files of {folder} again from where they come"


def folder_finding(folder: Path) -> Finding:
    """Where the model is, and what of it is never used."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    unused = [name for name in names if name.endswith((*CODE_SUFFIXES, *UNSAFE_SUFFIXES))]
    text = str(folder) + (f"; {first_of(unused)}: code or pickles, never run or opened" if unused else "")
    return Finding("model", "folder", "ok", text, details={"folder": str(folder), "unused": unused})


def configuration_finding(config: KeyeVL2Config) -> Finding:
    """The shape in words; a model without an indexer attends to everything."""
    parameters = parameter_count(config)
    experts = f"{config.num_experts} experts" if config.is_moe else "dense MLPs"
    text = (
        f"{in_words(parameters)} parameters, {config.num_hidden_layers} layers, {experts}, "
        f"{config.max_position_embeddings:,} tokens of context"
    )
    details = {
        "parameters": parameters,
        "layers": config.num_hidden_layers,
        "sparse": config.sa_config is not None,
    }
    if config.sa_config is None:
        remedy = "choose a checkpoint with sa_config for long videos; this one is right and slow on them"
        return Finding(
            "model", "configuration", "warning", f"{text}; dense attention, no sa_config", remedy, details
        )
    text += f", {config.sa_config['topk']:,} selected keys"
    return Finding("model", "configuration", "ok", text, details=details)


def in_words(parameters: int) -> str:
    """9.2 million, 31.1 billion."""
    size, unit = (parameters / 1e9, "billion") if parameters >= 1e9 else (parameters / 1e6, "million")
    return f"{size:.1f} {unit}"


def preprocessor_finding(folder: Path, remedy: str) -> Finding:
    preprocessor = load_preprocessor(folder)
    if preprocessor.assumed:
        missing = " and ".join(preprocessor.assumed)
        return Finding(
            "model", "preprocessor", "warning", f"gives no {missing}: 0.5 is used for each channel", remedy
        )
    text = f"{preprocessor.fps:g} frames a second, {preprocessor.budget.max_tokens} tokens a frame at most"
    return Finding("model", "preprocessor", "ok", text)


def tokenizer_finding(folder: Path, config: KeyeVL2Config, remedy: str) -> Finding:
    """Special tokens and their numbers: visual ones as the configuration says, all within the embedding, stops known."""
    tokenizer = load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    text = f"{len(vocabulary):,} tokens for {config.vocab_size:,} embeddings"
    details: dict[str, Any] = {"tokens": len(vocabulary), "embeddings": config.vocab_size}
    largest = max(vocabulary.values())
    if largest >= config.vocab_size:
        raise ModelError(
            f"the tokenizer of {folder} has the token {largest}, beyond the {config.vocab_size} embeddings"
        )
    missing = [token for token in (TURN_END, *REASONING_TOKENS) if token not in vocabulary]
    if missing:
        return Finding(
            "model", "tokenizer", "problem", f"{text}; {', '.join(missing)} unknown", remedy, details
        )
    stops = read_json_object(folder / GENERATION_FILE).get("eos_token_id", vocabulary[TURN_END])
    stops = stops if isinstance(stops, list) else [stops]
    details["stops"] = stops
    if vocabulary[TURN_END] not in stops:
        text += f"; {GENERATION_FILE} does not stop at {TURN_END}"
        return Finding("model", "tokenizer", "warning", text, remedy, details)
    return Finding("model", "tokenizer", "ok", f"{text}, special ids as configured", details=details)


def weights_finding(weights: Weights, folder: Path, remedy: str) -> Finding:
    """What `read_weights` found in order, and whether the index promises as much."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in weights.dtypes.items())
    text = (
        f"{weights.tensors:,} tensors in {len(weights.shards)} files, {size_text(weights.bytes)}, {kinds}: "
        "names, shapes and types as configured"
    )
    if weights.quantised is not None:
        text += f"; quantised, {weights.quantised}"
    details = {
        "tensors": weights.tensors,
        "shards": len(weights.shards),
        "bytes": weights.bytes,
        "dtypes": weights.dtypes,
        "quantised": weights.quantised,
    }
    promised = read_json_object(folder / INDEX_FILE).get("metadata", {}).get("total_size")
    if promised is not None and promised != weights.bytes:
        text += f"; {INDEX_FILE} promises {promised:,} bytes, there are {weights.bytes:,}"
        return Finding("model", "weights", "warning", text, remedy, details)
    return Finding("model", "weights", "ok", text, details=details)


def hashes_finding(folder: Path, read: bool, on_bytes: OnBytes | None, remedy: str) -> Finding:
    """Compare files with the checksums that the hub's cache names them by; other folders know none."""
    known = {path: checksum for path in sorted(folder.iterdir()) if (checksum := hub_checksum(path))}
    size = sum(path.stat().st_size for path in known)
    details: dict[str, Any] = {"files": len(known), "bytes": size, "read": read and bool(known)}
    if not known:
        text = "none known: only a model in the Hugging Face cache carries them"
        return Finding("model", "hashes", "ok", text, details=details)
    if not read:
        text = f"known for {len(known)} files, not compared: --hashes reads {size_text(size)}"
        return Finding("model", "hashes", "ok", text, details=details)
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if on_bytes is not None:
            on_bytes(done, size)

    wrong = [
        path.name
        for path, (algorithm, checksum) in known.items()
        if checksum_of(path, algorithm, count) != checksum
    ]
    if wrong:
        text = f"{first_of(wrong)} damaged: the content does not have the hash that the hub gave"
        return Finding("model", "hashes", "problem", text, remedy, {**details, "wrong": wrong})
    text = f"{len(known)} files, {size_text(size)}, as the hub gave them"
    return Finding("model", "hashes", "ok", text, details=details)


def hub_checksum(path: Path) -> tuple[Algorithm, str] | None:
    """The checksum by which the hub's cache names the blob behind a snapshot's file; None for any other file."""
    if not path.is_symlink():
        return None
    blob = path.readlink()
    if blob.parent.name != "blobs":
        return None
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return "sha256", blob.name
    return ("git-sha1", blob.name) if re.fullmatch(r"[0-9a-f]{40}", blob.name) else None
