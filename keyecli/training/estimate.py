"""What a training run will take of a device's memory, before anything is loaded, and what would fit where it does not.

T tokens of a pack, D width, F expert width, E experts, k of them a token, r rank of an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from keyecli.engine.plan import (
    DTYPE_BYTES,
    FP32_BYTES,
    KERNEL_WORKSPACE_BYTES,
    MASKED_KEYS_PER_SELECTED,
    SELECTION_BYTES_PER_PAIR,
    encode_workspace_bytes,
    gib,
    merge_area,
    weights_bytes,
)
from keyecli.errors import MemoryLimitError, UsageError
from keyecli.kernels.quantized_weights import Method
from keyecli.kernels.reference import GATHER_WORKSPACE_BYTES
from keyecli.model.config import KeyeVL2Config
from keyecli.model.decoder import DecoderLayer
from keyecli.model.keye import LOSS_CHUNK_TOKENS
from keyecli.model.quantize import Quantization
from keyecli.model.vision import GROUP_PATCHES, Projector, VisionTower
from keyecli.training.distributed import BUCKET_BYTES
from keyecli.training.network import Trained, is_trained, trained
from keyecli.training.speed import device_rate, estimate_seconds

__all__ = [
    "TrainingEstimate",
    "adapter_parameters",
    "device_rate",
    "estimate_seconds",
    "estimate_training",
    "parameter_groups",
]

DEFAULT_TARGETS = ("attention", "experts")
# Of AdamW's two moments: bytes a parameter. Those of 8 bits have a scale for every 256 values; paged ones may be in host memory.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "paged-adamw8bit": 0.0}
# An adapter learns in fp32 whatever the model's type.
ADAPTER_BYTES = 4
# Of a chunk's logits in the backward pass of cross-entropy: their logarithms, and the gradients of both its steps.
LOSS_COPIES = 3
# Adapters on experts work on so many tokens at a time, and keep everything of those for their backward pass.
EXPERT_BLOCK_TOKENS = 32768
# With FSDP the layer that computes is whole, and the next one on its way.
WHOLE_LAYERS = 2

LENGTH_STEP = 256
MOST_GPUS = 64
LOWEST_RANK = 4
QUANT_ADVICE: Method = "int4"
NOTHING_HELPS = (
    "none of --max-length, --train lora, --rank, --quant makes it fit; use a smaller model or a larger device"
)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of a name in the model (layer 0 stands for all), `count` altogether."""

    name: str
    count: int

    @property
    def sees(self) -> bool:
        """Whether it is of the tower or the projector, which stay whole on every device."""
        return self.name.startswith(("visual.", "mlp_AR."))


@dataclass(frozen=True)
class TrainingCase:
    """What is to be trained and how; the arguments of `estimate_training`."""

    config: KeyeVL2Config
    what: Trained
    dtype: str
    lora_rank: int
    lora_targets: tuple[str, ...]
    pack_tokens: int
    device: str
    world: int
    sharded: bool
    optimizer: str
    checkpointing: bool
    patches_per_row: int | None
    accumulates: bool
    answers: bool
    parameters: tuple[ParameterGroup, ...]

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def parts(self) -> int:
        """Over how many devices the decoder is shared out."""
        return self.world if self.sharded else 1

    @property
    def by_kernels(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def quantised(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def adapter_parameters(self) -> int:
        if self.what.main != "lora":
            return 0
        return adapter_parameters(self.config, self.lora_rank, self.lora_targets)

    def base_parameters(self, *, sees: bool) -> int:
        """Of the base, how many learn: of the tower and the projector, or of the rest."""
        return sum(
            group.count
            for group in self.parameters
            if group.sees is sees and is_trained(group.name, self.what)
        )


@dataclass(frozen=True)
class TrainingEstimate:
    """Bytes on each device, at the largest moment of a step.

    weights, masters (fp32 copies of what learns in a lower precision), gradients and optimizer (moments) stay; beside them either
    activations (what is kept of a pack for its backward pass) with the larger of a layer's recomputation, a chunk of the loss and
    the encoding of frames, or what the update copies, or what answering gathers of a model in shards.
    """

    weights_bytes: int
    masters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    layer_bytes: int
    loss_bytes: int
    vision_bytes: int
    update_bytes: int
    answering_bytes: int
    trained_parameters: int
    case: TrainingCase

    @property
    def learning_bytes(self) -> int:
        return self.masters_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def pass_bytes(self) -> int:
        """What comes and goes within a step."""
        passing = self.activations_bytes + max(self.layer_bytes, self.loss_bytes, self.vision_bytes)
        return max(passing, self.update_bytes, self.answering_bytes)

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.learning_bytes + self.pass_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data; bytes, of one device."""
        case = self.case
        return {
            "train": str(case.what),
            "device": case.device,
            "dtype": case.dtype,
            "world": case.world,
            "sharded": case.sharded,
            "pack_tokens": case.pack_tokens,
            "trained_parameters": self.trained_parameters,
            "weights_bytes": self.weights_bytes,
            "masters_bytes": self.masters_bytes,
            "gradients_bytes": self.gradients_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "activations_bytes": self.activations_bytes,
            "layer_bytes": self.layer_bytes,
            "loss_bytes": self.loss_bytes,
            "vision_bytes": self.vision_bytes,
            "update_bytes": self.update_bytes,
            "answering_bytes": self.answering_bytes,
            "total_bytes": self.total_bytes,
        }

    def describe(self) -> str:
        """The sum and its parts in one sentence, without its end."""
        each = f"each of {self.case.world} devices" if self.case.world > 1 else self.case.device
        return (
            f"training {self.case.what} needs {gib(self.total_bytes)} on {each} (weights {gib(self.weights_bytes)}, "
            f"{self.trained_parameters:,} parameters that learn {gib(self.learning_bytes)}, a step of "
            f"{self.case.pack_tokens:,} tokens {gib(self.pass_bytes)})"
        )

    def needed_bytes(self, weights_loaded: bool = False) -> int:
        """What the run will still ask of a device."""
        return self.total_bytes - (self.weights_bytes if weights_loaded else 0)

    def room_bytes(self, free_bytes: int | None) -> int:
        """What is left beside the run, once its weights are loaded, for attention's findings (`kernels.kept`), of which there is
        no more than `found_bytes`; none where memory is not the device's own."""
        if free_bytes is None or not self.case.by_kernels:
            return 0
        return max(0, min(self.found_bytes, free_bytes - self.needed_bytes(weights_loaded=True)))

    @property
    def found_bytes(self) -> int:
        """What attention finds in all layers: lists of selected keys, outputs, denominators."""
        config, tokens = self.case.config, self.case.pack_tokens
        if config.sa_config is None:
            return 0
        heads = config.num_attention_heads
        selected = min(config.sa_config["topk"], tokens) * 4
        outputs = heads * (config.head_dim * self.case.width + FP32_BYTES)
        return tokens * (selected + outputs) * config.num_hidden_layers

    def check(self, free_bytes: int | None, weights_loaded: bool = False) -> None:
        """MemoryLimitError when it does not fit, which says what would; `free_bytes` None: unknown."""
        if free_bytes is None or self.needed_bytes(weights_loaded) <= free_bytes:
            return
        # What other weights leave free is known only from what there was before these.
        room = free_bytes + (self.weights_bytes if weights_loaded else 0)
        raise MemoryLimitError(f"{self.describe()} and {gib(room)} are free: {_advice(self.case, room)}")


def estimate_training(
    config: KeyeVL2Config,
    *,
    train: tuple[str, ...],
    dtype: str,
    lora_rank: int = 16,
    lora_targets: tuple[str, ...] = DEFAULT_TARGETS,
    pack_tokens: int,
    device: str,
    world: int = 1,
    sharded: bool = False,
    optimizer: str = "adamw",
    checkpointing: bool = True,
    patches_per_row: int | None = None,
    accumulates: bool = False,
    answers: bool = False,
) -> TrainingEstimate:
    """What one device holds while it trains, with `config` saying whether the base is quantised.

    train: as `--train` lists it; dtype: fp32, bf16 or fp16; world: devices, each with a whole model or, `sharded`, a part of its
    decoder; patches_per_row: of a row's frames together, None: as many as a pack can hold; accumulates: a device computes
    several packs a step, for which FSDP keeps whole gradients; answers: between updates the model answers, for which its shards
    become whole. UsageError for what cannot be trained.
    """
    if optimizer not in OPTIMIZER_BYTES:
        raise UsageError(f"--optimizer {optimizer} is not known; use {', '.join(OPTIMIZER_BYTES)}")
    case = TrainingCase(
        config, trained(",".join(train)), dtype, lora_rank, tuple(lora_targets), pack_tokens, device, world, sharded,
        optimizer, checkpointing, patches_per_row, accumulates, answers, tuple(parameter_groups(config)),
    )  # fmt: skip
    return _estimated(case)


def parameter_groups(config: KeyeVL2Config) -> Iterator[ParameterGroup]:
    """All parameters of an unquantised model, from modules without memory."""
    with torch.device("meta"):
        modules = {
            "visual": (VisionTower(config.vision_config), 1),
            "mlp_AR": (Projector(config), 1),
            "model.layers.0": (DecoderLayer(config, 0), config.num_hidden_layers),
        }
    for prefix, (module, times) in modules.items():
        for name, parameter in module.named_parameters():
            yield ParameterGroup(f"{prefix}.{name}", times * parameter.numel())
    words = config.vocab_size * config.hidden_size
    yield ParameterGroup("model.embed_tokens.weight", words)
    yield ParameterGroup("model.norm.weight", config.hidden_size)
    if not config.tie_word_embeddings:
        yield ParameterGroup("lm_head.weight", words)


def adapter_parameters(config: KeyeVL2Config, rank: int, targets: Sequence[str] = DEFAULT_TARGETS) -> int:
    """Parameters of a LoRA adapter: r (inputs + outputs) for every adapted matrix of the decoder and its head."""
    width = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sides = 0
    if "attention" in targets:
        sides += 2 * (width + queries) + 2 * (width + keys)
    if config.num_experts and "experts" in targets:
        inner = config.moe_intermediate_size
        sides += config.num_experts * ((width + 2 * inner) + (inner + width))
    if not config.num_experts and "dense_mlp" in targets:
        sides += 3 * (width + config.intermediate_size)
    head = width + config.vocab_size if "head" in targets else 0
    return rank * (config.num_hidden_layers * sides + head)


def _estimated(case: TrainingCase) -> TrainingEstimate:
    seeing, rest = case.base_parameters(sees=True), case.base_parameters(sees=False)
    adapter = case.adapter_parameters
    base = seeing + rest // case.parts
    own = adapter // case.parts
    low = case.width < FP32_BYTES
    accumulated = seeing + rest if case.sharded and case.accumulates else base
    adapter_gradients = adapter if case.sharded and case.accumulates else own
    gathered = _gathered_bytes(case) if case.sharded else 0
    return TrainingEstimate(
        weights_bytes=_weights(case) + own * ADAPTER_BYTES,
        masters_bytes=base * FP32_BYTES if low else 0,
        gradients_bytes=accumulated * case.width + adapter_gradients * ADAPTER_BYTES,
        optimizer_bytes=round((base + own) * OPTIMIZER_BYTES[case.optimizer]),
        activations_bytes=_kept_bytes(case) + gathered,
        layer_bytes=_layer_bytes(case),
        loss_bytes=_loss_bytes(case),
        vision_bytes=_vision_bytes(case),
        update_bytes=_update_bytes(case, base),
        answering_bytes=_answering_bytes(case) if case.sharded and case.answers else 0,
        trained_parameters=seeing + rest + adapter,
        case=case,
    )


def _weights(case: TrainingCase) -> int:
    """Of the base. What is quantised is in buffers, which FSDP leaves whole."""
    seeing = sum(group.count for group in case.parameters if group.sees)
    divided = _divided_parameters(case)
    codes = weights_bytes(case.config, 1) - divided - seeing
    return codes + (seeing + divided // case.parts) * case.width


def _divided_parameters(case: TrainingCase) -> int:
    """Of the base, what shards are parts of: all that is neither quantised nor of the tower and the projector."""
    seeing = sum(group.count for group in case.parameters if group.sees)
    return weights_bytes(case.config, 2) - weights_bytes(case.config, 1) - seeing


def _answering_bytes(case: TrainingCase) -> int:
    """Of a model in shards that answers: all of them gathered beside this process's own, and a pass without gradients."""
    gathered = _divided_parameters(case) * case.width + case.adapter_parameters * ADAPTER_BYTES
    return gathered + max(_layer_bytes(case), _loss_bytes(case), _vision_bytes(case))


def _layer_parameters(case: TrainingCase) -> int:
    layers = sum(group.count for group in case.parameters if group.name.startswith("model.layers."))
    return layers // case.config.num_hidden_layers


def _gathered_bytes(case: TrainingCase) -> int:
    """Of a model in shards: the layers and the output head that are whole, and their gradients where they learn."""
    config, layers = case.config, case.config.num_hidden_layers
    parameters = _layer_parameters(case)
    if case.quantised:
        # The matrices that are left as they are: little beside the experts.
        one, two = weights_bytes(config, 1), weights_bytes(config, 2)
        parameters = max(0, parameters - (sum(g.count for g in case.parameters) - (two - one)) // layers)
    adapter = case.adapter_parameters // layers * ADAPTER_BYTES
    learns = 2 if case.what.main in ("full", "sparse") else 1
    words = config.vocab_size * config.hidden_size
    return learns * (WHOLE_LAYERS * parameters + words) * case.width + 2 * WHOLE_LAYERS * adapter


def _kept_bytes(case: TrainingCase) -> int:
    """Of a pack from its forward to its backward pass: each layer's input, or everything its backward pass needs; states before
    and after the final norm with their gradients; rotary tables; what the frames became, and how where that is learnt."""
    config, tokens = case.config, case.pack_tokens
    states = tokens * config.hidden_size * case.width
    tables = 2 * config.head_dim + (2 * config.sa_config["indexer_head_dim"] if config.sa_config else 0)
    layers = config.num_hidden_layers * states
    if not case.checkpointing:
        layers += config.num_hidden_layers * (_attention_saved_bytes(case) + _mlp_saved_bytes(case))
    return layers + 5 * states + tokens * tables * case.width + _patches_bytes(case)


def _layer_bytes(case: TrainingCase) -> int:
    """The largest moment of one layer's backward pass: what it keeps (unless all layers do already) and the larger workspace."""
    saved = _attention_saved_bytes(case) + _mlp_saved_bytes(case) if case.checkpointing else 0
    return saved + max(_attention_workspace_bytes(case), _mlp_workspace_bytes(case))


def _attention_saved_bytes(case: TrainingCase) -> int:
    """Normalised states before both halves, the state between them and the output; q, k, v as projected and as attended with, the
    output; the indexer's; the lists of selected keys."""
    config, tokens = case.config, case.pack_tokens
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    elements = 4 * config.hidden_size + 3 * queries + 3 * keys
    lists = 0
    if config.sa_config is not None:
        heads, dim = config.sa_config["indexer_num_heads"], config.sa_config["indexer_head_dim"]
        elements += 2 * (heads * dim + dim) + heads
        if case.by_kernels and case.what.main != "indexer":
            lists = min(config.sa_config["topk"], tokens) * (2 if case.what.teaches_indexer else 1)
    return tokens * (elements * case.width + lists * 4)


def _attention_workspace_bytes(case: TrainingCase) -> int:
    """Gradients of states, q, k, v (those of k and v in fp32), and one chunk of queries against their keys."""
    config, tokens = case.config, case.pack_tokens
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    gradients = tokens * ((2 * config.hidden_size + 2 * queries) * case.width + 2 * keys * FP32_BYTES)
    return gradients + _chunk_bytes(case)


def _chunk_bytes(case: TrainingCase) -> int:
    config, tokens = case.config, case.pack_tokens
    sparse = config.sa_config
    chunk = min(tokens, sparse["q_chunk_size"] if sparse else 512)
    # Under a mask, PyTorch's fused attention for the CPU keeps no scores.
    masked = (5 if case.device == "cpu" else config.num_attention_heads * 4 * case.width) * chunk
    if sparse is None:
        return masked * tokens
    heads, dim, selected = (
        sparse["indexer_num_heads"],
        sparse["indexer_head_dim"],
        min(sparse["topk"], tokens),
    )
    if case.what.main == "indexer":
        # The teacher: every head's logits and weights; the student: every head's similarities.
        pair = config.num_attention_heads * (case.width + 3 * FP32_BYTES) + heads * FP32_BYTES
        return chunk * tokens * (pair + SELECTION_BYTES_PER_PAIR)
    if case.by_kernels:
        # The student's copies of selected keys and its similarities, with their gradients.
        teaching = chunk * selected * (2 * dim + 3 * heads) * FP32_BYTES if case.what.teaches_indexer else 0
        return KERNEL_WORKSPACE_BYTES + teaching
    few = tokens <= MASKED_KEYS_PER_SELECTED * sparse["topk"]
    attention = masked * tokens if few else 4 * GATHER_WORKSPACE_BYTES
    student = heads * FP32_BYTES + config.num_attention_heads * 3 * FP32_BYTES
    taught = chunk * tokens * student if case.what.teaches_indexer else 0
    return max(chunk * tokens * SELECTION_BYTES_PER_PAIR + taught, attention)


def _mlp_saved_bytes(case: TrainingCase) -> int:
    """The kernels keep router logits and choices alone, and work the rest out again; the definition keeps its rows."""
    config, tokens = case.config, case.pack_tokens
    if not config.num_experts:
        return 4 * tokens * config.intermediate_size * case.width
    routing = tokens * (config.num_experts * (case.width + FP32_BYTES) + config.num_experts_per_tok * 12)
    if case.by_kernels or (case.quantised and case.what.main == "lora"):
        return routing
    return routing + _expert_rows_bytes(case, tokens)


def _expert_rows_bytes(case: TrainingCase, tokens: int) -> int:
    """Routed rows that a backward pass needs: inputs, gate and up, their product, outputs; an adapter's own beside them."""
    config = case.config
    width, inner = config.hidden_size, config.moe_intermediate_size
    elements = 2 * width + 5 * inner
    if case.what.main == "lora" and "experts" in case.lora_targets:
        elements += width + 2 * inner + 4 * case.lora_rank
    return tokens * config.num_experts_per_tok * elements * case.width


def _mlp_workspace_bytes(case: TrainingCase) -> int:
    config, tokens = case.config, case.pack_tokens
    width = config.hidden_size
    if not config.num_experts:
        return 4 * tokens * config.intermediate_size * case.width
    inner, matrices = (
        config.moe_intermediate_size,
        3 * config.num_experts * width * config.moe_intermediate_size,
    )
    adapted = case.what.main == "lora" and ("experts" in case.lora_targets or case.quantised)
    read_back = matrices * case.width if case.quantised else 0
    if case.quantised and not case.by_kernels:
        # Codes as integers and as fp32, twice, of gate and up.
        read_back += matrices * 2 // 3 * 3 * FP32_BYTES
    gradient = matrices * case.width if case.what.main in ("full", "sparse") else 0
    if not case.by_kernels:
        return 2 * _expert_rows_bytes(case, tokens) + read_back + gradient
    if adapted:
        return 2 * _expert_rows_bytes(case, min(tokens, EXPERT_BLOCK_TOKENS)) + read_back
    rows = tokens * config.num_experts_per_tok
    return rows * (3 * inner + width) * case.width + gradient


def _loss_bytes(case: TrainingCase) -> int:
    if not case.what.answers:
        return 0
    config = case.config
    logits = min(LOSS_CHUNK_TOKENS, case.pack_tokens) * config.vocab_size * LOSS_COPIES * FP32_BYTES
    head = config.vocab_size * config.hidden_size * case.width if case.what.main in ("full", "sparse") else 0
    return logits + head


def _vision_bytes(case: TrainingCase) -> int:
    """One group of frames in the tower; with gradients where it learns."""
    of_row = case.patches_per_row
    patches = min(_most_patches(case) if of_row is None else of_row, _most_patches(case), GROUP_PATCHES)
    each = encode_workspace_bytes(case.config, 1, case.width) // GROUP_PATCHES
    return patches * each * (2 if case.what.sees else 1)


def _most_patches(case: TrainingCase) -> int:
    """Of a pack that is all frames."""
    return case.pack_tokens * merge_area(case.config)


def _patches_bytes(case: TrainingCase) -> int:
    """What is kept of the patches of a pack where the projector or the tower learns: pixels; of the projector its input, what is
    normalised, the layer between and its activation; of the tower each layer's input, or everything."""
    if not case.what.sees or case.patches_per_row == 0:
        return 0
    vision = case.config.vision_config
    width = vision.hidden_size
    kept = vision.num_channels * vision.patch_size**2 + 5 * width
    if "vision" in case.what.extras:
        layer = 10 * width + 2 * vision.intermediate_size
        kept += vision.num_hidden_layers * (width if case.checkpointing else layer) + layer
    return _most_patches(case) * kept * case.width


def _update_bytes(case: TrainingCase, base: int) -> int:
    """Gradients of a lower precision become fp32 all at once; without shards they go over the network in buckets."""
    wider = base * (FP32_BYTES - case.width)
    return wider + (BUCKET_BYTES if case.world > 1 and not case.sharded else 0)


def _advice(case: TrainingCase, free_bytes: int) -> str:
    """Which flags make it fit, each tried; several together where none does alone; then more devices."""
    found = [text for text, changed in _ways(case, free_bytes) if _fits(changed, free_bytes)]
    if not found:
        found = _joint_way(case, free_bytes)
    found += _more_devices(case, free_bytes)
    return f"use {', or '.join(found)}" if found else NOTHING_HELPS


def _joint_way(case: TrainingCase, free_bytes: int) -> list[str]:
    """The fewest changes, of those that add up, which make it fit with a pack as long as then possible; empty when none do."""
    texts = []
    for text, changed in _together(case):
        texts.append(text)
        if _fits(changed, free_bytes):
            return [" ".join(texts)]
        if length := _longest(changed, free_bytes):
            return [" ".join([*texts, f"--max-length {length}"])]
    return []


def _fits(case: TrainingCase, free_bytes: int) -> bool:
    return _estimated(case).total_bytes <= free_bytes


def _ways(case: TrainingCase, free_bytes: int) -> Iterator[tuple[str, TrainingCase]]:
    """Single changes, the gentlest first."""
    if length := _longest(case, free_bytes):
        yield f"--max-length {length}", replace(case, pack_tokens=length)
    if case.what.main in ("full", "sparse"):
        yield _as_adapter(case)
    if case.what.main == "lora":
        rank = next((r for r in _lower_ranks(case) if _fits(replace(case, lora_rank=r), free_bytes)), None)
        if rank is not None:
            yield f"--rank {rank}", replace(case, lora_rank=rank)
        if not case.quantised:
            yield _as_quantised(case)
    if case.optimizer == "adamw":
        yield "--optimizer adamw8bit", replace(case, optimizer="adamw8bit")
    if not case.checkpointing:
        yield "gradient checkpointing", replace(case, checkpointing=True)


def _together(case: TrainingCase) -> Iterator[tuple[str, TrainingCase]]:
    """Changes on top of each other, the gentlest first."""
    changed = case
    if case.what.main in ("full", "sparse"):
        text, changed = _as_adapter(case)
        yield text, changed
    if changed.what.main != "lora":
        return
    if not changed.quantised:
        text, changed = _as_quantised(changed)
        yield text, changed
    if changed.lora_rank > LOWEST_RANK:
        yield f"--rank {LOWEST_RANK}", replace(changed, lora_rank=LOWEST_RANK)


def _more_devices(case: TrainingCase, free_bytes: int) -> list[str]:
    """How many GPUs like this one hold it in parts."""
    if not case.by_kernels:
        return []
    first = case.world + 1 if case.sharded else max(2, case.world)
    for world in range(first, MOST_GPUS + 1):
        if _fits(replace(case, world=world, sharded=True), free_bytes):
            return [f"{world} such GPUs with --shard"]
    return []


def _as_adapter(case: TrainingCase) -> tuple[str, TrainingCase]:
    what = Trained("lora", case.what.extras)
    return f"--train {what}", replace(case, what=what)


def _as_quantised(case: TrainingCase) -> tuple[str, TrainingCase]:
    config = copy.copy(case.config)
    config.quantization_config = Quantization(QUANT_ADVICE).to_dict()
    return f"--quant {QUANT_ADVICE}", replace(case, config=config)


def _lower_ranks(case: TrainingCase) -> Iterator[int]:
    rank = case.lora_rank // 2
    while rank >= LOWEST_RANK:
        yield rank
        rank //= 2


def _longest(case: TrainingCase, free_bytes: int) -> int:
    """The longest pack that fits, in steps of 256 tokens, below the one wanted; 0 when none does."""
    fits, too_long = 0, -(-case.pack_tokens // LENGTH_STEP)
    while fits + 1 < too_long:
        middle = (fits + too_long) // 2
        if _fits(replace(case, pack_tokens=middle * LENGTH_STEP), free_bytes):
            fits = middle
        else:
            too_long = middle
    return fits * LENGTH_STEP
