"""Settings and where they come from: a flag, else KEYE_* in the environment, else ./keye.toml, else the user's file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from keyecli.errors import UsageError

PROJECT_FILE = "keye.toml"
ENVIRONMENT_PREFIX = "KEYE_"
TOKEN_PIXELS = 28 * 28  # of a merged token

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
DTYPES = ("auto", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32")
KERNELS = ("auto", "reference", "triton")
KV_FORMATS = ("auto", "fp8")
QUANTISATIONS = ("none", "int4", "int8", "fp8")
OFFLOADS = ("none", "experts")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+(,(cuda:)?\d+)*)?")
_TEXTS = "tuple[str, ...]"
_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    _TEXTS: "text or a list of texts",
}


@dataclass(frozen=True)
class Settings:
    """Every setting a user can fix once; None leaves the choice to the model's own files or to the library."""

    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    offline: bool = True
    device: str | None = None
    dtype: str | None = None
    kernels: str | None = None
    quant: str | None = None
    kv: str | None = None
    offload: str | None = None
    cache: bool = True
    cache_size: float | None = None
    fps: float | None = None
    max_frames: int | None = None
    max_tokens_video: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    adaptive_budget: bool = False
    exact_resize: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    think: bool = True
    show_thinking: bool = False
    strict: bool = False
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    progress: bool = True
    debug: bool = False

    def __post_init__(self) -> None:
        """UsageError for a value out of range, wherever it came from."""
        for name in ("max_frames", "max_tokens_video", "min_pixels", "max_tokens"):
            self._require(name, lambda value: value >= 1, "at least 1")
        for name in ("temperature", "top_k", "seed"):
            self._require(name, lambda value: 0 <= value < 2**63, "0 or above")
        self._require(
            "max_pixels",
            lambda value: value >= TOKEN_PIXELS,
            f"at least {TOKEN_PIXELS}, the area of one token",
        )
        for name in ("fps", "cache_size"):
            self._require(name, lambda value: 0 < value < float("inf"), "above 0")
        self._require("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._require("min_p", lambda value: 0 <= value <= 1, "from 0 to 1")
        self._require("repetition_penalty", lambda value: 0 < value < float("inf"), "above 0")
        if self.stop is not None and not all(self.stop):
            raise UsageError("--stop must not be empty")
        self._require("dtype", lambda value: value.lower() in DTYPES, "auto, bf16, fp16 or fp32")
        self._require("kernels", KERNELS.__contains__, "auto, reference or triton")
        self._require("quant", QUANTISATIONS.__contains__, "none, int4, int8 or fp8")
        self._require("kv", KV_FORMATS.__contains__, "auto or fp8")
        self._require("offload", OFFLOADS.__contains__, "none or experts")
        self._require("device", _DEVICE.fullmatch, "auto, cpu, cuda, cuda:N or cuda:N,M")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise UsageError(f"--min-pixels {self.min_pixels} is above --max-pixels {self.max_pixels}")

    def _require(self, name: str, is_valid: Callable[[Any], object], rule: str) -> None:
        value = getattr(self, name)
        if value is not None and not is_valid(value):
            raise UsageError(f"--{name.replace('_', '-')} must be {rule}, not {value}")


# With postponed annotations a field's type is its source text: "int | None" → "int".
_KINDS = {field.name: str(field.type).removesuffix(" | None") for field in fields(Settings)}


def user_file() -> Path:
    """The user's own settings file, ~/.config/keye/config.toml on Linux; it need not exist."""
    from platformdirs import user_config_path

    return user_config_path("keye") / "config.toml"


def cache_folder() -> Path:
    """What may be made again: KEYE_CACHE_DIR, else ~/.cache/keye on Linux; it need not exist."""
    from platformdirs import user_cache_path

    named = os.environ.get("KEYE_CACHE_DIR", "").strip()
    return Path(named) if named else user_cache_path("keye")


def load_settings(
    command: str,
    flags: Mapping[str, Any],
    *,
    commands: tuple[str, ...] = (),
    config: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of one run of `command`.

    `flags` maps names of Settings to what was given on the command line (a value or its text), None for not given.
    `config` is read in the place of ./keye.toml. In a file, a key at the top counts for every command and one in `[ask]`
    for `keye ask`; `commands` are the tables that may stand there. UsageError: an unreadable file, an unknown key, a value
    of the wrong type.
    """
    environment = os.environ if environment is None else environment
    config = config or (Path(environment["KEYE_CONFIG"]) if environment.get("KEYE_CONFIG") else None)
    tables = {*commands, command}
    values: dict[str, Any] = {}
    if (user := user_file()).is_file():
        values |= _read_file(user, command, tables)
    project = config or Path(PROJECT_FILE)
    if config or project.is_file():
        values |= _read_file(project, command, tables)
    values |= _read_environment(environment)
    values |= _read_flags(flags)
    return Settings(**values)


def _read_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that were given; one that comes as text is read as the same text in the environment would be."""
    given = {name: value for name, value in flags.items() if value is not None}
    return {
        name: _from_text("--" + name.replace("_", "-"), value, _KINDS[name])
        if isinstance(value, str)
        else tuple(value)
        if isinstance(value, list)
        else value
        for name, value in given.items()
    }


def _read_file(path: Path, command: str, tables: set[str]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"the settings file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the settings file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the settings file {path} is not valid TOML: {error}") from error
    common = {key: value for key, value in content.items() if not isinstance(value, dict)}
    for name, table in content.items():
        if isinstance(table, dict) and name not in tables:
            known = ", ".join(f"[{known}]" for known in sorted(tables))
            raise UsageError(f"{path} has a table [{name}] that no command reads; known are {known}")
    values: dict[str, Any] = {}
    for table in (common, content.get(command, {})):
        values |= {_name(key, path): _from_toml(key, value, path) for key, value in table.items()}
    return values


def _name(key: str, path: Path) -> str:
    name = key.replace("-", "_")
    if name not in _KINDS:
        close = get_close_matches(name, _KINDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_KINDS)}"
        raise UsageError(f"{path} sets {key}, which is no setting; {hint}")
    return name


def _from_toml(key: str, value: Any, path: Path) -> Any:
    kind = _KINDS[_name(key, path)]
    if kind == "float" and type(value) is int:
        return float(value)
    if kind == _TEXTS and isinstance(value, (str, list)):
        texts = [value] if isinstance(value, str) else value
        if all(isinstance(text, str) for text in texts):
            return tuple(texts)
    if type(value).__name__ != kind:
        raise UsageError(f"{path} sets {key} to {value!r}, but {key} is {_WORDS[kind]}")
    return value


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for name, kind in _KINDS.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        text = environment.get(variable, "")
        if kind != _TEXTS:  # whose spaces and line ends count
            text = text.strip()
        if text:
            values[name] = _from_text(variable, text, kind)
    return values


def _from_text(variable: str, text: str, kind: str) -> Any:
    if kind == "bool":
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
    elif kind == "str":
        return text
    elif kind == _TEXTS:
        return (text,)
    else:
        with suppress(ValueError):
            return int(text) if kind == "int" else float(text)
    raise UsageError(f"{variable} is {text!r}, but it must be {_WORDS[kind]}")
