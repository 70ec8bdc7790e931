"""Adapters in files: PEFT's format, written, read and fitted to a base, and what becomes of the base's weights.

A folder holds `adapter_config.json` and `adapter_model.safetensors`: of a linear layer A [r, in] and B [out, r],
of E experts A [E · r, in], expert by expert, and B [out, r · E], rank by rank. E experts, r rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from keyecli.errors import ModelError
from keyecli.kernels.reference import LowRank
from keyecli.model.lora import TARGET_MODULES, LoraExperts, LoraLinear, LoraSettings, lora_parameters
from keyecli.model.quantize import QuantizedExperts, QuantizedLinear
from keyecli.model.shards import content_name, first_of, one_line, read_header, read_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Of the weights that an adapter was trained on, in the metadata of its tensors: PEFT's own field is for a commit of the hub.
REVISION_KEY = "base_weights_revision"
PREFIX = "base_model.model."
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")

# Settings of PEFT's that would make another function of the same tensors, and the values with which they do not.
PLAIN_SETTINGS: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# Ways to begin that change the base itself, so that the tensors fit no other.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(r"(?P<module>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<factor>[AB])\.weight")
# Experts whose product is worked out at once, so that no second copy of a layer's experts is held.
MERGED_EXPERTS = 8


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its folder holds it. base, base_revision: what it says that it was trained on; revision: a short name of its
    content; tensors: by their names in the model, as stored."""

    folder: Path
    base: str | None
    base_revision: str | None
    revision: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """What an adapter makes of a base: to each matrix of `added` comes A · B, fp32, scale included; a matrix of a linear layer is
    [out, in], so there it is its transpose. `replaced` are whole parameters."""

    added: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    settings: LoraSettings,
    base: str,
    revision: str,
    modules_to_save: Mapping[str, Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model's adapters as PEFT would; files are written under temporary names and renamed.

    base, revision: name and `weights_revision` of the weights they were trained on. modules_to_save: further trained parameters,
    whole, by their names in the model. tensors: the adapters' parameters whole, by the names of `lora_parameters`, where the
    model holds parts of them.
    """
    given = lora_parameters(model) if tensors is None else tensors
    named: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            named |= {f"{name}.lora_{factor}.weight": given[f"{name}.lora_{factor}"] for factor in "AB"}
        elif isinstance(module, LoraExperts):
            named |= _expert_tensors(name, module, given)
    named |= modules_to_save or {}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ready = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_file(ready, temporary[WEIGHTS_FILE], metadata={"format": "pt", REVISION_KEY: revision})
        _order_metadata(temporary[WEIGHTS_FILE])
        values = _config_of(
            settings, base, sorted({name.rpartition(".")[0] for name in modules_to_save or ()})
        )
        temporary[CONFIG_FILE].write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _order_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it in another one each time, and the same adapter
    should be the same bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(ordered.ljust(length))


def _expert_tensors(name: str, module: LoraExperts, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's experts as PEFT names them, which wraps one parameter after the other: the first is innermost."""
    tensors: dict[str, Tensor] = {}
    prefix = name
    for matrix in ("down", "gate_up"):
        if getattr(module, f"{matrix}_A") is None:
            continue
        first, second = given[f"{name}.{matrix}_A"], given[f"{name}.{matrix}_B"]
        tensors[f"{prefix}.lora_A.weight"] = first.transpose(1, 2).flatten(0, 1)
        tensors[f"{prefix}.lora_B.weight"] = second.permute(2, 1, 0).flatten(1)
        prefix += ".base_layer"
    return tensors


def _config_of(settings: LoraSettings, base: str, saved_modules: Sequence[str]) -> dict[str, Any]:
    """`adapter_config.json`. PEFT knows no dropout on experts and refuses it beside them; it acts in training only."""
    linear = [TARGET_MODULES[target] for target in settings.targets if target != "experts"]
    experts = "experts" in settings.targets
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0 if experts else settings.dropout,
        "use_rslora": settings.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": "|".join(f"(?:{pattern})" for pattern in linear) if linear else [],
        "target_parameters": [f"mlp.experts.{leaf}" for leaf in EXPERT_PARAMETERS] if experts else None,
        "modules_to_save": list(saved_modules) or None,
    }


def adapter_settings(folder: Path | str) -> dict[str, Any]:
    """`adapter_config.json` of an adapter that is whole, without its tensors. ModelError: see `load_adapter`."""
    folder = Path(folder).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(
            f"{folder} is no adapter: it holds no {CONFIG_FILE}; name the folder that a training run wrote"
        )
    values = read_json_object(folder / CONFIG_FILE)
    _require_plain(values, folder)
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        found = " but a pickle file, which keyecli never opens: save it as safetensors" if pickled else ""
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}{found or ': complete the copy'}")
    return values


def adapter_revision(folder: Path | str) -> str:
    """A short name of an adapter's content; ModelError where there is none."""
    folder = Path(folder).expanduser()
    adapter_settings(folder)
    read_header(folder / WEIGHTS_FILE)
    return content_name([folder / WEIGHTS_FILE, folder / CONFIG_FILE])


def load_adapter(folder: Path | str) -> AdapterFile:
    """Read an adapter's folder, ours or PEFT's own. ModelError for anything else, and for kinds that are no plain LoRA."""
    folder = Path(folder).expanduser()
    path, values = folder / WEIGHTS_FILE, adapter_settings(folder)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({one_line(error)}): copy or save it again") from error
    foreign = [name for name in tensors if not name.startswith(PREFIX)]
    if foreign or not tensors:
        what = f"the tensor {first_of(foreign)}, which is none of PEFT's" if foreign else "no tensor"
        raise ModelError(f"{path} holds {what}: it is no adapter of this model")
    base = values.get("base_model_name_or_path")
    return AdapterFile(
        folder,
        str(base) if base else None,
        metadata.get(REVISION_KEY),
        adapter_revision(folder),
        values,
        {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
    )


def _require_plain(values: Mapping[str, Any], folder: Path) -> None:
    """ModelError for a configuration of another kind of adapter, and for numbers that are none."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder} is an adapter of kind {kind!r}, and LORA is read: train one of that kind")
    for name, plain in PLAIN_SETTINGS.items():
        if name in values and values[name] not in plain:
            raise ModelError(
                f"{folder} has {name} = {json.dumps(values[name])}, which is no plain LoRA and is not read: "
                "merge it with PEFT and use the merged model"
            )
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGING_STARTS):
        raise ModelError(
            f"{folder} began with {start}, which changes the base: convert it to plain LoRA with PEFT"
        )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ModelError(f"{folder / CONFIG_FILE} has r = {rank!r} and lora_alpha = {alpha!r}: save it again")


def fit_adapter(file: AdapterFile, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """What an adapter makes of a base whose official parameters have these shapes.

    ModelError for a tensor that the base has no place for or that has another shape there, and for one that is missing.
    """
    pairs: dict[tuple[str, int], dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        match = _FACTOR.fullmatch(name)
        if match:
            place = match["module"], match["depth"].count("base_layer")
            pairs.setdefault(place, {})[match["factor"]] = tensor
            continue
        plain = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        if plain not in shapes:
            raise _misfit(file, f"the tensor {name} has no place in it")
        if tuple(tensor.shape) != shapes[plain]:
            raise _misfit(file, f"{name} is {list(tensor.shape)} and {list(shapes[plain])} there")
        replaced[plain] = tensor
    added: dict[str, LowRank] = {}
    for (module, depth), factors in pairs.items():
        missing = [factor for factor in "AB" if factor not in factors]
        if missing:
            raise _incomplete(file, f"{module}.lora_{missing[0]}")
        parameter, pair = _fit_pair(file, module, depth, factors["A"], factors["B"], shapes)
        if parameter in added:
            raise _misfit(file, f"it holds {parameter} twice")
        added[parameter] = pair
    absent = [name for name in shapes if name not in added and _is_target(name, file.settings)]
    if absent:
        raise _incomplete(file, f"the factors of {first_of(absent)}")
    return Adapter(added, replaced)


def _misfit(file: AdapterFile, reason: str) -> ModelError:
    trained = f", trained on {file.base}," if file.base else ""
    return ModelError(
        f"the adapter {file.folder}{trained} does not fit this base: {reason}; give the base that it was trained on"
    )


def _incomplete(file: AdapterFile, what: str) -> ModelError:
    return ModelError(f"the adapter {file.folder} lacks {what}: copy or save it again")


def _fit_pair(
    file: AdapterFile,
    module: str,
    depth: int,
    first: Tensor,
    second: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[str, LowRank]:
    """The parameter that two factors of the files belong to, and the two in its layout, scaled."""
    where = f"{module}{'.base_layer' * depth}.lora_A {list(first.shape)} with lora_B {list(second.shape)}"
    if first.dim() != 2 or second.dim() != 2 or first.shape[0] != second.shape[1]:
        raise _misfit(file, f"{where} are no pair")
    linear = shapes.get(f"{module}.weight", ())
    if len(linear) == 2:
        if (second.shape[0], first.shape[1]) != linear:
            raise _misfit(file, f"{where} meet a matrix {list(linear)}")
        scale = _scale_of(file, module, len(first))
        return f"{module}.weight", (first.float().t(), second.float().t() * scale)
    named = [f"{module}.{leaf}" for leaf in EXPERT_PARAMETERS if len(shapes.get(f"{module}.{leaf}", ())) == 3]
    if not named:
        raise _misfit(file, f"there is no {module} that can have an adapter")
    # PEFT takes the dimensions in the order of its own convention unless a model says otherwise.
    for swapped in (False, True):
        for parameter in named:
            experts, inputs, outputs = shapes[parameter]
            if swapped:
                inputs, outputs = outputs, inputs
            if (first.shape[1], second.shape[0]) == (inputs, outputs) and len(first) % experts == 0:
                scale = _scale_of(file, parameter, len(first) // experts)
                by_expert = first.float().unflatten(0, (experts, -1))
                columns = second.float().unflatten(1, (-1, experts)).permute(2, 0, 1) * scale
                if swapped:
                    return parameter, (columns, by_expert)
                return parameter, (by_expert.transpose(1, 2), columns.transpose(1, 2))
    raise _misfit(file, f"{where} meet experts {[list(shapes[name]) for name in named]}")


def _scale_of(file: AdapterFile, name: str, rank: int) -> float:
    """What the addition to a module or parameter is scaled by; ModelError when its rank is not the one that was set."""
    values = file.settings
    wanted = _by_pattern(values.get("rank_pattern"), name, values["r"])
    if rank != wanted:
        raise _misfit(file, f"{name} has rank {rank} and {CONFIG_FILE} says {wanted}")
    alpha = _by_pattern(values.get("alpha_pattern"), name, values["lora_alpha"])
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _by_pattern(patterns: object, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that names a module, or ends its name, as PEFT reads them."""
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                return value
    return otherwise


def _is_target(parameter: str, values: Mapping[str, Any]) -> bool:
    """Whether the configuration says that a parameter is adapted; False where it picks layers in ways of its own."""
    if values.get("exclude_modules") or values.get("layers_to_transform") is not None:
        return False
    module, _, leaf = parameter.rpartition(".")
    if leaf in EXPERT_PARAMETERS:
        return _is_named(parameter, values.get("target_parameters") or ())
    targets = values.get("target_modules") or ()
    if leaf != "weight" or targets == "all-linear":
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return _is_named(module, targets)


def _is_named(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def adapted(
    weights: Iterable[tuple[str, Tensor]], adapter: Adapter, stored_dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Streamed weights with an adapter in them, changed in place: each sum is computed in fp64, so that no device rounds another
    way, and rounded to the type that the files have. The tensors must be of that type, or of one that holds all its values."""
    for name, tensor in weights:
        if name in adapter.replaced:
            tensor.copy_(adapter.replaced[name].to(stored_dtypes[name]))
        if name in adapter.added:
            _add(tensor, adapter.added[name], stored_dtypes[name])
        yield name, tensor


def _add(weight: Tensor, factors: LowRank, stored: torch.dtype) -> None:
    first, second = (factor.to(weight.device, torch.float64) for factor in factors)
    if weight.dim() == 2:
        weight.copy_((weight.double() + (first @ second).t()).to(stored))
        return
    for begin in range(0, len(weight), MERGED_EXPERTS):
        part = slice(begin, begin + MERGED_EXPERTS)
        weight[part] = torch.baddbmm(weight[part].double(), first[part], second[part]).to(stored)


def put_beside(model: nn.Module, adapter: Adapter) -> list[str]:
    """Put what an adapter adds to quantised matrices beside them, in modules of their own; returns the parameters' names.

    ModelError when it replaces a quantised one whole.
    """
    known = {name for name, _ in model.named_parameters()}
    lost = [name for name in adapter.replaced if name not in known]
    if lost:
        raise ModelError(
            f"the adapter holds the whole {first_of(lost)}, which is quantised here: use the unquantised base"
        )
    made: list[str] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear) and f"{name}.weight" in adapter.added:
            pair = (factor.t() for factor in adapter.added[f"{name}.weight"])
            first, second = (factor.contiguous().to(module.codes.device) for factor in pair)
            model.set_submodule(name, _frozen(LoraLinear(module, (first, second), 1.0)))
            made.append(f"{name}.weight")
        elif isinstance(module, QuantizedExperts):
            named = {leaf: adapter.added.get(f"{name}.{leaf}") for leaf in EXPERT_PARAMETERS}
            if not any(named.values()):
                continue
            router = next(model.get_submodule(name.rpartition(".")[0] + ".gate").parameters())
            pairs = [
                None
                if pair is None
                else (pair[0].contiguous().to(router.device), pair[1].contiguous().to(router.device))
                for pair in named.values()
            ]
            model.set_submodule(name, _frozen(LoraExperts(module, pairs[0], pairs[1], 1.0)))
            made += [f"{name}.{leaf}" for leaf, pair in named.items() if pair is not None]
    return made


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()
