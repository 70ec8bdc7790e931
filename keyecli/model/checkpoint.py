"""Checkpoints in and out, the official ones and our quantised ones: weights by name, strictly, from safetensors only.

Nothing here executes remote code or opens a pickle. Weights stream tensor by tensor from one shard at a time into a
model built on the meta device, so host memory stays near the model's own size plus a small buffer (see `streaming`).
E experts, F expert width, D hidden size, N layer number, K expert number.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from keyecli.errors import ModelError
from keyecli.model.adapter import Adapter, AdapterFile, adapted, fit_adapter, put_beside
from keyecli.model.companions import (
    Preprocessor,
    load_config,
    load_preprocessor,
    load_tokenizer,
    resolve_model,
)
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.offload import share_buffers
from keyecli.model.placement import WeightPlaces
from keyecli.model.quantize import (
    STORED_PARTS,
    Quantization,
    quantization_in,
    replace_modules,
)
from keyecli.model.shards import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    TensorEntry,
    first_of,
    one_line,
    read_entries,
    weights_revision,
)
from keyecli.model.streaming import SAFETENSORS_DTYPES, stream_weights

__all__ = [
    "WEIGHT_NAMES",
    "Handling",
    "Preprocessor",
    "config_values",
    "handling_of",
    "load_config",
    "load_model",
    "load_preprocessor",
    "load_tokenizer",
    "read_entries",
    "resolve_model",
    "save_model",
    "weights_revision",
]

DEFAULT_SHARD_BYTES = 5_000_000_000


class Handling(Enum):
    """What the loader does with a tensor of the official files."""

    COPY = "copied into the parameter of the same name"
    INDEXER = "copied; only a model with sa_config has it"
    TIED = "copied; absent when the configuration ties it to the embedding"
    EXPERT = "one expert's matrix [out, in], transposed into its place in the fused parameter [E, in, out]"
    QUANTISED = "copied; only a folder whose configuration says that it is quantised has it"
    SKIP = "known, unused"


# The whole vocabulary of official tensor names: N is a layer, K an expert, * anything, {a,b} either.
WEIGHT_NAMES: dict[str, Handling] = {
    "model.embed_tokens.weight": Handling.COPY,
    "model.norm.weight": Handling.COPY,
    "lm_head.weight": Handling.TIED,
    "model.layers.N.{input_layernorm,post_attention_layernorm}.weight": Handling.COPY,
    "model.layers.N.self_attn.{q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}.weight": Handling.COPY,
    "model.layers.N.self_attn.sa_indexer.{q_proj,k_proj,q_norm,k_norm}.weight": Handling.INDEXER,
    "model.layers.N.self_attn.sa_indexer.k_norm.bias": Handling.INDEXER,
    "model.layers.N.mlp.gate.weight": Handling.COPY,
    "model.layers.N.mlp.experts.{gate_up_proj,down_proj}": Handling.COPY,
    "model.layers.N.mlp.experts.K.{gate_proj,up_proj,down_proj}.weight": Handling.EXPERT,
    "model.layers.N.mlp.{gate_proj,up_proj,down_proj}.weight": Handling.COPY,
    "mlp_AR.{pre_norm,linear_1,linear_2}.{weight,bias}": Handling.COPY,
    "visual.vision_model.embeddings.patch_embedding.{weight,bias}": Handling.COPY,
    "visual.vision_model.embeddings.{position_embedding,packing_position_embedding}.weight": Handling.COPY,
    "visual.vision_model.encoder.layers.N.{layer_norm1,layer_norm2}.{weight,bias}": Handling.COPY,
    "visual.vision_model.encoder.layers.N.self_attn.{q_proj,k_proj,v_proj,out_proj}.{weight,bias}": Handling.COPY,
    "visual.vision_model.encoder.layers.N.mlp.{fc1,fc2}.{weight,bias}": Handling.COPY,
    "visual.vision_model.post_layernorm.{weight,bias}": Handling.COPY,
    "visual.vision_model.head.*": Handling.SKIP,
}

# Ours: a quantised matrix in the place of a weight, see `keyecli.kernels.quantized_weights`.
QUANTISED_NAMES: dict[str, Handling] = {
    "model.layers.N.self_attn.{q_proj,k_proj,v_proj,o_proj}.{codes,scale,zero}": Handling.QUANTISED,
    "model.layers.N.mlp.experts.{gate_up_proj,down_proj}.{codes,scale,zero}": Handling.QUANTISED,
    "model.layers.N.mlp.{gate_proj,up_proj,down_proj}.{codes,scale,zero}": Handling.QUANTISED,
}


@dataclass(frozen=True)
class Placement:
    """Where a tensor of the files goes: a whole parameter, or one expert's transposed block of a fused one.

    `shape` is what the file must hold. With an expert it fills `parameter[expert, :, first_column:][:, :shape[0]]`.
    """

    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_column: int = 0


@dataclass(frozen=True)
class LoadPlan:
    """Everything known about a folder before a weight is read.

    model: on the meta device, with quantised modules where there will be any. quantised: parameter of the files → module that it
    is quantised into; empty where the folder is quantised already. stored: how the folder itself is quantised. shapes: of the
    official parameters, before anything is quantised.
    """

    folder: Path
    model: KeyeVL2ForConditionalGeneration
    entries: Mapping[str, TensorEntry]
    placements: Mapping[str, Placement]
    quantization: Quantization | None
    stored: bool
    quantised: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def read_bytes(self) -> int:
        return sum(self.entries[name].bytes for name in self.placements)

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The types in which the files hold the parameters, but for quantised ones."""
        held = {placement.parameter: self.entries[name].dtype for name, placement in self.placements.items()}
        return {
            name: SAFETENSORS_DTYPES[dtype] for name, dtype in held.items() if dtype in SAFETENSORS_DTYPES
        }


def plan_load(folder: Path | str, quantization: Quantization | None = None) -> LoadPlan:
    """Compare a folder's headers with its configuration. ModelError: see `load_model`."""
    folder = Path(folder)
    config = load_config(folder)
    entries = read_entries(folder)
    stored = quantization_in(config, folder)
    if stored and quantization and stored != quantization:
        raise ModelError(
            f"{folder} is quantised already, {stored}, and cannot become {quantization}: quantise the original"
        )
    try:
        with torch.device("meta"):
            model = KeyeVL2ForConditionalGeneration(config)
            shapes = _parameter_shapes(model)
            wanted = stored or quantization
            modules = replace_modules(model, wanted) if wanted else []
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder / CONFIG_FILE} describes a model that cannot be built: {one_line(error)}"
        ) from error
    if wanted and not modules:
        raise ModelError(
            f"no matrix of {folder} has a width that is made of groups of {wanted.group}: use it unquantised"
        )
    quantised = {} if stored else {_weight_of(name, shapes): name for name in modules}
    placements = _plan_placements(
        folder, config, _parameter_shapes(model) if stored else shapes, entries, stored is not None
    )
    return LoadPlan(folder, model, entries, placements, wanted, stored is not None, quantised, shapes)


def _weight_of(module: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The parameter of the official files that a quantised module stands for."""
    return module if module in shapes else f"{module}.weight"


def load_model(
    folder: Path | str,
    *,
    device: torch.device | str | WeightPlaces = "cpu",
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    adapter: AdapterFile | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> KeyeVL2ForConditionalGeneration:
    """Build the model of `folder` on `device` in `dtype` (default: the configuration's, else the weights' own), in eval mode.

    `device` may say more: on which devices the layers are, and that the experts are in the host's memory. Reads
    `model.safetensors`, or the shards that `model.safetensors.index.json` names. `quantization` quantises on the way, to
    the same bits as `quantize_folder` would write, whatever the device and `dtype`. `adapter` goes into the weights, and beside
    those that are quantised. `on_progress(done, total)` is told the bytes read. ModelError names the first thing wrong: a damaged
    or missing shard, a tensor that is missing, unexpected, misshapen or of a wrong type, another quantisation; all of it is found
    before any weight is read.
    """
    plan = plan_load(folder, quantization)
    model, config = plan.model, plan.model.config
    if dtype is None:
        own = config.dtype
        dtype = own if isinstance(own, torch.dtype) else _most_common_dtype(_dense_entries(plan))
    added = None if adapter is None else fit_adapter(adapter, plan.shapes)
    if added is None:
        weights = stream_weights(plan, device, dtype, on_progress)
    else:
        weights = _in_dtype(merged_weights(plan, added, device, on_progress), device, dtype)
    for name, tensor in weights:
        _put(model, name, tensor)
    model.config.dtype = dtype
    if plan.quantization is not None:
        model.config.quantization_config = plan.quantization.to_dict()
    if config.tie_word_embeddings:
        _tie_head(model, plan.entries)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ModelError(
            f"nothing in {plan.folder} fills {first_of(left)}: this is not a checkpoint of this model"
        )
    if isinstance(device, WeightPlaces) and device.host_experts:
        share_buffers(model.model.layers)
    if added is not None:
        put_beside(model, added)
    return model.eval()


def merged_weights(
    plan: LoadPlan,
    adapter: Adapter,
    device: torch.device | str | WeightPlaces,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The streamed weights with an adapter in those that are not quantised, in the types of the files."""
    return adapted(stream_weights(plan, device, None, on_progress), adapter, plan.stored_dtypes())


def _in_dtype(
    weights: Iterable[tuple[str, Tensor]], device: torch.device | str | WeightPlaces, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Weights in `dtype`, where they are to be; the parts of quantised matrices keep their types."""
    for name, tensor in weights:
        if tensor.dtype is dtype or handling_of(name) is Handling.QUANTISED:
            yield name, tensor
            continue
        other = (
            device.empty(name, tensor.shape, dtype)
            if isinstance(device, WeightPlaces)
            else torch.empty_like(tensor, dtype=dtype)
        )
        yield name, other.copy_(tensor)


@cache
def _compiled_names(table: str = "official") -> tuple[tuple[re.Pattern[str], Handling], ...]:
    compiled = []
    for pattern, handling in (WEIGHT_NAMES if table == "official" else QUANTISED_NAMES).items():
        text = (
            re.escape(pattern)
            .replace(r"\{", "(?:")
            .replace(r"\}", ")")
            .replace(",", "|")
            .replace(r"\*", ".*")
        )
        compiled.append((re.compile(re.sub(r"\.[NK](?=\\\.)", r".(?:0|[1-9]\\d*)", text)), handling))
    return tuple(compiled)


def handling_of(name: str) -> Handling | None:
    """What `WEIGHT_NAMES` or `QUANTISED_NAMES` says about a tensor name; None when no row explains it."""
    rows = (*_compiled_names(), *_compiled_names("quantised"))
    return next((handling for pattern, handling in rows if pattern.fullmatch(name)), None)


def _parameter_shapes(model: KeyeVL2ForConditionalGeneration) -> dict[str, tuple[int, ...]]:
    """Every tensor that must come from the files; a tied output head does not."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _plan_placements(
    folder: Path,
    config: KeyeVL2Config,
    parameters: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, TensorEntry],
    stored: bool,
) -> dict[str, Placement]:
    """The place of every tensor of the files; ModelError for what is unexpected, missing, misshapen or of a wrong type.

    `stored`: the folder is quantised, and `parameters` are those of a quantised model.
    """
    handlings = {name: handling_of(name) for name in entries}
    unknown = [name for name, handling in handlings.items() if handling is None]
    if unknown:
        raise ModelError(
            f"{folder} holds the unexpected tensor {first_of(unknown)}: it is not a checkpoint of this model"
        )
    indexer = [name for name, handling in handlings.items() if handling is Handling.INDEXER]
    if indexer and config.sa_config is None:
        raise ModelError(
            f"{folder} holds indexer weights ({first_of(indexer)}) but its {CONFIG_FILE} has no sa_config: "
            "restore sa_config, or the sparse model would run dense"
        )

    foreign = [name for name, handling in handlings.items() if handling is Handling.QUANTISED]
    if foreign and not stored:
        raise ModelError(
            f"{folder} holds quantised weights ({first_of(foreign)}) but its {CONFIG_FILE} has no quantization_config: "
            "they do not belong together"
        )

    one_by_one = {_fused_name(name) for name, handling in handlings.items() if handling is Handling.EXPERT}
    placements: dict[str, Placement] = {}
    for parameter, shape in parameters.items():
        if parameter in one_by_one and not stored:
            placements.update(_expert_placements(parameter, shape))
        else:
            placements[parameter] = Placement(parameter, shape)

    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unexpected = [
        n
        for n, h in handlings.items()
        if n not in placements and n not in optional and h is not Handling.SKIP
    ]
    if unexpected:
        raise ModelError(
            f"{folder} holds the unexpected tensor {first_of(unexpected)}: its {CONFIG_FILE} describes a model without it"
        )
    missing = [name for name in placements if name not in entries]
    if missing:
        raise ModelError(f"{folder} lacks the tensor {first_of(missing)}: the checkpoint is not complete")
    for name, placement in placements.items():
        entry = entries[name]
        if entry.shape != placement.shape:
            raise ModelError(
                f"the tensor {name} in {entry.shard} has shape {list(entry.shape)}, but {CONFIG_FILE} asks for "
                f"{list(placement.shape)}: weights and configuration do not belong together"
            )
        types = list(SAFETENSORS_DTYPES)
        if handlings[name] is Handling.QUANTISED:
            types = [STORED_PARTS[name.rpartition(".")[2]]]
        if entry.dtype not in types:
            raise ModelError(
                f"the tensor {name} in {entry.shard} is stored as {entry.dtype}, but only {', '.join(types)} "
                f"{'are' if len(types) > 1 else 'is'} read: choose the unquantised checkpoint"
            )
    return placements


def _fused_name(name: str) -> str:
    """The fused parameter that holds one expert's matrix."""
    prefix, _, matrix = name.removesuffix(".weight").rsplit(".", 2)
    return f"{prefix}.{'down_proj' if matrix == 'down_proj' else 'gate_up_proj'}"


def _expert_placements(parameter: str, shape: tuple[int, ...]) -> dict[str, Placement]:
    """Sources of a fused parameter [E, in, out] when experts come one by one as [out, in]; gate comes before up."""
    prefix, matrix = parameter.rsplit(".", 1)
    experts, rows, columns = shape
    width, starts = columns, {"down_proj": 0}
    if matrix == "gate_up_proj":
        width, starts = columns // 2, {"gate_proj": 0, "up_proj": columns // 2}
    return {
        f"{prefix}.{expert}.{block}.weight": Placement(parameter, (width, rows), expert, start)
        for expert in range(experts)
        for block, start in starts.items()
    }


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the meta parameter or buffer of this name."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, leaf)
    fresh = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    setattr(owner, leaf, fresh)


def _dense_entries(plan: LoadPlan) -> Iterator[TensorEntry]:
    """The tensors of the files that are numbers as they stand."""
    return (plan.entries[name] for name in plan.placements if handling_of(name) is not Handling.QUANTISED)


def _tie_head(model: KeyeVL2ForConditionalGeneration, entries: Mapping[str, TensorEntry]) -> None:
    """Share the embedding with the output head; a copy of it in the files must be the same."""
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight = embedding
    entry = entries.get("lm_head.weight")
    if entry is None:
        return
    with safe_open(entry.shard, framework="pt", device="cpu") as file:
        stored = file.get_tensor("lm_head.weight")
    if stored.shape != embedding.shape or not torch.equal(stored.to(embedding), embedding.detach()):
        raise ModelError(
            f"{entry.shard} holds an lm_head.weight of its own, but {CONFIG_FILE} ties it to the embedding: "
            "set tie_word_embeddings to false"
        )


def _most_common_dtype(entries: Iterable[TensorEntry]) -> torch.dtype:
    totals: defaultdict[str, int] = defaultdict(int)
    for entry in entries:
        totals[entry.dtype] += entry.bytes
    return SAFETENSORS_DTYPES[max(totals, key=lambda dtype: totals[dtype])]


def save_model(
    model: KeyeVL2ForConditionalGeneration,
    folder: Path | str,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config.json` and the weights in the official layout (fused experts), bit for bit as they are.

    tensors: some by name that are saved in the place of the model's own, which may be shards; dtype: None for the model's, else
    weights are rounded to it.

    More than `max_shard_bytes` of weights become several shards with an index; a larger tensor gets a shard of its
    own. Files are written under temporary names and renamed, then shards of an earlier save are removed. ModelError
    for a parameter that the official layout does not have, such as an adapter's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(_parameter_shapes(model))
    foreign = [name for name in names if handling_of(name) is None]
    if foreign:
        raise ModelError(
            f"the official layout has no place for {first_of(foreign)}: merge the adapter into its base first"
        )
    state = {**model.state_dict(), **(tensors or {})}
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    shards = _split_shards({name: state[name].nbytes for name in names}, max_shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]

    temporary: dict[str, Path] = {}
    try:
        for file, shard in zip(files, shards, strict=True):
            temporary[file] = folder / f".{file}.{os.getpid()}.tmp"
            tensors = {name: state[name].detach().cpu().contiguous() for name in shard}
            save_file(tensors, temporary[file], metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            total = sum(state[name].nbytes for name in names)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            temporary[INDEX_FILE] = _write_json(folder, INDEX_FILE, index)
        temporary[CONFIG_FILE] = _write_json(folder, CONFIG_FILE, config_values(model, dtype))
        for file, path in temporary.items():
            path.replace(folder / file)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if stale.name not in temporary:
            stale.unlink(missing_ok=True)


def _split_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(folder: Path, name: str, values: dict[str, Any]) -> Path:
    path = folder / f".{name}.{os.getpid()}.tmp"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def config_values(model: KeyeVL2ForConditionalGeneration, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """`config.json` as the official file spells it: older rotary keys, no auto_map (what it names is not saved). dtype: of the
    weights, None: the model's."""
    config = model.config
    values = config.to_diff_dict()
    for key in ("auto_map", "_name_or_path", "rope_parameters"):
        values.pop(key, None)
    rope = {"mrope_section": list(config.mrope_section), "rope_type": "default", "type": "default"}
    vision = config.vision_config.to_diff_dict()
    vision.pop("transformers_version", None)
    values.update(
        architectures=[
            "KeyeVL2MoeForConditionalGeneration" if config.is_moe else "KeyeVL2ForConditionalGeneration"
        ],
        dtype=str(dtype or model.dtype).removeprefix("torch."),
        rope_theta=config.rope_theta,
        rope_scaling=rope,
        vision_config=vision,
    )
    return dict(sorted(values.items()))
