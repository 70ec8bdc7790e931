"""What stands beside the weights: finding a model's folder, its configuration, tokenizer and preprocessor.

Nothing here executes remote code or reaches for the network.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from keyecli.errors import ModelError, UsageError
from keyecli.model.config import KeyeVL2Config
from keyecli.model.rope import scale_sections
from keyecli.model.shards import CONFIG_FILE, INDEX_FILE, one_line, read_json_object
from keyecli.video.sampling import TOKEN_SIDE_PX, FrameBudget

TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
NANO_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "nano"

# What goes along, unchanged, with weights that are saved anew. Never code, never weights.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")

PATCH_SIZE_PX, MERGE_SIZE = 14, 2
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
DEFAULT_FPS = 2.0

# What the network does in one way only: another value in config.json would be ignored, so it is refused.
FIXED_VALUES: dict[str, Any] = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []}
FIXED_VISION_VALUES: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_channels": 3,
    "patch_size": PATCH_SIZE_PX,
    "spatial_merge_size": MERGE_SIZE,
}

# Which token of the tokenizer each number in config.json must be.
VISUAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


@dataclass(frozen=True)
class Preprocessor:
    """How pixels become patches: per-channel mean and std of 0..1 values, token budgets, frames a second.

    `assumed` names those of `image_mean` and `image_std` that the file did not give.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    budget: FrameBudget
    fps: float
    assumed: tuple[str, ...] = ()


def resolve_model(name: str | None, revision: str | None = None) -> Path:
    """The folder of a model: None is the embedded keye-nano, else a folder, else a hub name in the local cache.

    Never touches the network. ModelError when there is no such folder or the hub model was not downloaded; UsageError
    for a revision of something that has none.
    """
    if revision is not None and (name is None or Path(name).expanduser().exists()):
        raise UsageError(
            "a revision can only be given together with a hub name such as Kwai-Keye/Keye-VL-2.0-30B-A3B"
        )
    if name is None:
        if not (NANO_FOLDER / CONFIG_FILE).is_file():
            raise ModelError(
                f"the embedded model is missing from {NANO_FOLDER}: reinstall keyecli or choose one with --model"
            )
        return NANO_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(
            f"{folder} is a file: give the folder that holds config.json and the safetensors weights"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ModelError(
            f"there is no model folder {name}: check the path, or give a hub name such as owner/name"
        )
    return _cached_snapshot(name, revision)


def _cached_snapshot(name: str, revision: str | None) -> Path:
    """Where the cache has the model. A folder without the files that we never use is whole, so only ours are asked for."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
    except HFValidationError as error:
        raise ModelError(f"{name} is neither a folder nor a valid hub name: check the spelling") from error
    if not isinstance(found, str):
        at = f" at revision {revision}" if revision else ""
        command = f"keye pull {name}" + (f" --revision {revision}" if revision else "")
        raise ModelError(
            f"{name}{at} is neither a folder nor in the local Hugging Face cache: fetch it with `{command}`"
        )
    return Path(found).parent


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what stands beside a model's weights, but for the configuration and the index: tokenizer, preprocessor, licence."""
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in COMPANIONS)
        if path.is_file() and wanted and path.name not in (CONFIG_FILE, INDEX_FILE):
            shutil.copyfile(path, folder / path.name)


def load_config(folder: Path | str) -> KeyeVL2Config:
    """Read `config.json`. ModelError when it is missing, damaged, of another model, or its values cannot be used."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ModelError(
            f"{folder} has no {CONFIG_FILE}: it is not a model folder, or its download is not complete"
        )
    values = read_json_object(path)
    model_type = values.get("model_type")
    if model_type != KeyeVL2Config.model_type:
        raise ModelError(
            f"{path} describes a model of type {model_type!r}, not {KeyeVL2Config.model_type!r}: "
            "choose a Keye-VL-2.0 checkpoint"
        )
    vision = values.get("vision_config")
    for part, fixed in (
        (values, FIXED_VALUES),
        (vision if isinstance(vision, dict) else {}, FIXED_VISION_VALUES),
    ):
        for key, value in fixed.items():
            if part.get(key, value) != value:
                raise ModelError(
                    f"{path} gives {key} {part[key]!r}, but this model family has {value!r}: choose another checkpoint"
                )
    try:
        config = KeyeVL2Config.from_dict(values)
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if config.sa_config is not None:
            scale_sections(config.mrope_section, config.head_dim, config.sa_config["indexer_head_dim"])
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be used: {one_line(error)}") from error
    return config


def load_tokenizer(folder: Path | str) -> Any:
    """The folder's tokenizer: a transformers fast tokenizer with its chat template.

    Read from `tokenizer.json` and `tokenizer_config.json`; the template stands in `chat_template.jinja`, or as
    `chat_template` in `tokenizer_config.json`. ModelError when a file is missing or damaged, or when the visual tokens
    have other numbers than `config.json` says.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if not (folder / TOKENIZER_FILE).is_file():
        raise ModelError(f"{folder} has no {TOKENIZER_FILE}: complete the download")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises plain Exception for a damaged file.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({one_line(error)}): download its files again"
        ) from error
    if not tokenizer.chat_template:
        raise ModelError(f"{folder} has no chat template: download its chat_template.jinja")

    config = read_json_object(folder / CONFIG_FILE)
    vocabulary = tokenizer.get_vocab()
    for key, token in VISUAL_TOKENS.items():
        if key in config and vocabulary.get(token) != config[key]:
            found = f"is {vocabulary[token]}" if token in vocabulary else "is unknown"
            raise ModelError(
                f"{token} {found} in the tokenizer of {folder}, but {CONFIG_FILE} says {key} is {config[key]}: "
                "they do not belong together"
            )
    return tokenizer


def load_preprocessor(folder: Path | str) -> Preprocessor:
    """Read `preprocessor_config.json`. Keys, all optional, each with the family's default when absent:

    - `image_mean`, `image_std`: three numbers each; SigLIP's 0.5.
    - `min_pixels`, `max_pixels`, or `size` with `shortest_edge`, `longest_edge` (transformers' newer spelling of the
      same areas): the area of an image in pixels.
    - `fps`: frames a second; 2.
    - `token_budget`: this project's own; an object with any of FrameBudget's fields (`min_tokens`, `max_tokens`,
      `total_tokens`, `adaptive`, `image_min_tokens`, `image_max_tokens`), in merged 28 × 28 tokens.
    - `patch_size`, `merge_size`: must be 14 and 2.

    ModelError for a damaged file or a value that cannot be used.
    """
    path = Path(folder) / PREPROCESSOR_FILE
    values = read_json_object(path)
    for key, needed in (("patch_size", PATCH_SIZE_PX), ("merge_size", MERGE_SIZE)):
        if values.get(key, needed) != needed:
            raise ModelError(
                f"{path} asks for {key} {values[key]}, but this model family has {needed}: choose another checkpoint"
            )
    fps = values.get("fps", DEFAULT_FPS)
    if not _is_positive(fps):
        raise ModelError(f"{path} gives fps {fps!r}: it must be a positive number")
    return Preprocessor(
        _three_numbers(path, values, "image_mean", SIGLIP_MEAN),
        _three_numbers(path, values, "image_std", SIGLIP_STD),
        _read_budget(path, values),
        float(fps),
        assumed=tuple(key for key in ("image_mean", "image_std") if values.get(key) is None),
    )


def _read_budget(path: Path, values: Mapping[str, Any]) -> FrameBudget:
    given = values.get("size")
    size: dict[str, Any] = given if isinstance(given, dict) else {}
    tokens: dict[str, Any] = {}
    for key, edge, field, to_tokens in (
        ("min_pixels", "shortest_edge", "image_min_tokens", math.ceil),
        ("max_pixels", "longest_edge", "image_max_tokens", math.floor),
    ):
        pixels = values.get(key, size.get(edge))
        if pixels is None:
            continue
        if not _is_positive(pixels):
            raise ModelError(f"{path} gives {key} {pixels!r}: it must be a positive number of pixels")
        tokens[field] = max(1, to_tokens(pixels / TOKEN_SIDE_PX**2))
    own = values.get("token_budget", {})
    known = [field.name for field in fields(FrameBudget)]
    if not isinstance(own, dict) or not set(own) <= set(known):
        raise ModelError(
            f"{path} has a token_budget that cannot be read: it must be an object with {', '.join(known)}"
        )
    for key, value in own.items():
        if isinstance(value, bool) is not (key == "adaptive") or not isinstance(value, int):
            raise ModelError(
                f"{path} gives {key} {value!r} in token_budget: it must be a whole number (adaptive: true or false)"
            )
    try:
        return FrameBudget(**{**tokens, **own})
    except UsageError as error:
        raise ModelError(f"{path} gives a token budget that cannot be used: {error}") from error


def _three_numbers(
    path: Path, values: Mapping[str, Any], key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    numbers = values.get(key)
    if numbers is None:
        return default
    valid = isinstance(numbers, list) and len(numbers) == 3 and all(_is_number(number) for number in numbers)
    if not valid or (key == "image_std" and not all(map(_is_positive, numbers))):
        raise ModelError(
            f"{path} gives {key} {numbers!r}: it must be three numbers, one for each of red, green and blue"
        )
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0
