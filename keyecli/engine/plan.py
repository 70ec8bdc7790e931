"""What a run will take, before anything is decoded or loaded: frames, tokens, share of the context, memory.

Nothing here needs torch: the numbers come from the configuration, the sampling plans and the device's free
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from keyecli.errors import MemoryLimitError, UsageError
from keyecli.video.sampling import TOKEN_SIDE_PX, SamplingPlan, SamplingSettings, plan_image, plan_video
from keyecli.video.source import VideoInfo

if TYPE_CHECKING:
    from keyecli.kernels.dispatch import Backend
    from keyecli.model.config import KeyeVL2Config

KVFormat = Literal["fp8"]
Offload = Literal["experts"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)

ENCODE_GROUP_PATCHES = 8192
# On a GPU larger: each expert of 128 then has enough rows to fill tall tiles.
PREFILL_CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}
# Experts in the host's memory are copied to the GPU once for each chunk: longer ones hide more of that.
OFFLOADED_CHUNK_TOKENS = 32768
EXPERT_BUFFERS = 2

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
KV_BYTES: dict[KVFormat, int] = {"fp8": 1}
FP32_BYTES = 4
# Of quantised weights: bits of a code, bytes of a group's scale and zero.
CODE_BITS = {"int4": 4, "int8": 8, "fp8": 8}
GROUP_BYTES = {"int4": 3, "int8": 3, "fp8": 2}
MERGED_PIXELS = TOKEN_SIDE_PX**2
# The chat template's own tokens around one question, and a question's bytes a token in ordinary tokenizers.
TEMPLATE_TOKENS = 32
BYTES_PER_TEXT_TOKEN = 3
# What the selection holds for each (query, key) pair of a chunk: fp32 scores while a head is added and while
# they are masked, an int64 running count or key index, and a few masks.
SELECTION_BYTES_PER_PAIR = 26
DENSE_QUERY_CHUNK = 512
# Up to this many keys for each selected one, attention computes all keys under a mask: scores, masked, weights.
MASKED_KEYS_PER_SELECTED = 8
MASKED_COPIES = 3
# The larger of what the Triton kernels allow themselves: scores of a selection, or bitmaps and lists of the attention.
KERNEL_WORKSPACE_BYTES = 2**30
NOTHING_HELPS = "no sampling setting makes it fit; use a smaller model, a shorter question or a larger device"
FP8_HELPS = "use --kv fp8, which keeps keys and values in 8 bits"
OFFLOAD_HELPS = "use --offload experts, which keeps the experts in this machine's memory"
GIB = 2**30


@dataclass(frozen=True)
class InputPlan:
    """One input and how it will be sampled."""

    info: VideoInfo
    sampling: SamplingPlan

    @property
    def layout_tokens(self) -> int:
        """Tokens around the visual ones: begin, end, before each video frame a mark and its time's digits."""
        if self.sampling.kind == "image":
            return 2
        return 2 + sum(1 + len(f"{float(time):.1f}") for time in self.sampling.times_s)

    def to_dict(self) -> dict[str, Any]:
        sampling = self.sampling
        return {
            "path": str(self.info.path),
            "kind": self.info.kind,
            "duration_s": float(self.info.duration_s),
            "source_width": self.info.width,
            "source_height": self.info.height,
            "frames": sampling.frames,
            "fps": float(sampling.fps),
            "start_s": float(sampling.times_s[0]),
            "end_s": float(sampling.times_s[-1]),
            "width": sampling.width,
            "height": sampling.height,
            "tokens_per_frame": sampling.tokens_per_frame,
            "tokens": sampling.tokens,
            "truncated_at_s": None if self.info.truncated_at_s is None else float(self.info.truncated_at_s),
        }


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the weights, the cache for all tokens, and the larger workspace of encoding and prefill.

    Of experts in the host's memory: `host_bytes` there, and `buffer_bytes` on the device for those of two layers.
    """

    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    buffer_bytes: int = 0
    host_bytes: int = 0

    @property
    def loaded_bytes(self) -> int:
        """What the device holds once the model is loaded."""
        return self.weights_bytes + self.buffer_bytes

    @property
    def total_bytes(self) -> int:
        """On the device."""
        return self.loaded_bytes + self.cache_bytes + self.workspace_bytes

    def __add__(self, other: MemoryEstimate) -> MemoryEstimate:
        return MemoryEstimate(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class DevicePart:
    """What a device holds of a model: so many of its layers, and what stands before the `first` of them or behind the `last`."""

    device: str
    layers: int
    first: bool
    last: bool


@dataclass(frozen=True)
class DeviceShare:
    """What one device will hold. `free_bytes` is what it has left (None: unknown), `movable_bytes` what --offload experts would
    take from it, `shrinkable_bytes` what --kv fp8 would."""

    device: str
    memory: MemoryEstimate
    free_bytes: int | None
    movable_bytes: int = 0
    shrinkable_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "weights_bytes": self.memory.weights_bytes,
            "cache_bytes": self.memory.cache_bytes,
            "workspace_bytes": self.memory.workspace_bytes,
            "buffer_bytes": self.memory.buffer_bytes,
            "total_bytes": self.memory.total_bytes,
            "free_bytes": self.free_bytes,
        }


@dataclass(frozen=True)
class RunPlan:
    """Everything known about a run before it starts.

    `kv` is the type of the cache's keys and values, None: `dtype`.
    `prompt_tokens` counts visual, layout and text tokens; `max_tokens` is the longest answer, already cut
    to what the context leaves. `shares`: what each device will hold; `weights_loaded` says that the weights are already
    among what it holds. `host_free_bytes` is what the host has left for experts (None: unknown).
    """

    model: str
    dtype: str
    inputs: tuple[InputPlan, ...]
    prompt_tokens: int
    max_tokens: int
    context_tokens: int
    shares: tuple[DeviceShare, ...]
    weights_loaded: bool
    kv: KVFormat | None = None
    offload: Offload | None = None
    host_free_bytes: int | None = None

    @property
    def device(self) -> str:
        """Of several all, joined by commas."""
        return ",".join(share.device for share in self.shares)

    @property
    def memory(self) -> MemoryEstimate:
        """Of all devices together."""
        first, *others = (share.memory for share in self.shares)
        return sum(others, first)

    @property
    def free_bytes(self) -> int | None:
        """Of all devices together; None where one is unknown."""
        free = [share.free_bytes for share in self.shares if share.free_bytes is not None]
        return sum(free) if len(free) == len(self.shares) else None

    @property
    def visual_tokens(self) -> int:
        return sum(item.sampling.tokens for item in self.inputs)

    @property
    def frames(self) -> int:
        return sum(item.sampling.frames for item in self.inputs)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.max_tokens

    @property
    def context_share(self) -> float:
        """Prompt tokens as a fraction of the model's context."""
        return self.prompt_tokens / self.context_tokens

    @property
    def needed_bytes(self) -> int:
        """What the run will still ask of all devices together."""
        return sum(self.needed_on(share) for share in self.shares)

    def needed_on(self, share: DeviceShare) -> int:
        """What the run will still ask of one device."""
        return share.memory.total_bytes - (share.memory.loaded_bytes if self.weights_loaded else 0)

    def check(self) -> None:
        """UsageError when the context is too small for the prompt, MemoryLimitError when the device is."""
        self._check_context()
        self._check_memory()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, schema keye.plan/1; memory in bytes."""
        return {
            "schema": "keye.plan/1",
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "kv": self.kv or self.dtype,
            "inputs": [item.to_dict() for item in self.inputs],
            "frames": self.frames,
            "visual_tokens": self.visual_tokens,
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.max_tokens,
            "context_tokens": self.context_tokens,
            "context_share": self.context_share,
            "weights_bytes": self.memory.weights_bytes,
            "cache_bytes": self.memory.cache_bytes,
            "workspace_bytes": self.memory.workspace_bytes,
            "total_bytes": self.memory.total_bytes,
            "free_bytes": self.free_bytes,
            "offload": self.offload,
            "buffer_bytes": self.memory.buffer_bytes,
            "host_bytes": self.memory.host_bytes,
            "devices": [share.to_dict() for share in self.shares],
        }

    def _check_context(self) -> None:
        if self.prompt_tokens < self.context_tokens:
            return
        raise UsageError(
            f"the prompt takes {self.prompt_tokens:,} tokens and the model's context holds "
            f"{self.context_tokens:,}: " + self._way_out(int(self.context_tokens * 0.98) - 1)
        )

    def _check_memory(self) -> None:
        host = self.memory.host_bytes
        if not self.weights_loaded and self.host_free_bytes is not None and host > self.host_free_bytes:
            raise MemoryLimitError(host_too_small(host, self.host_free_bytes))
        for share in self.shares:
            self._check_share(share)

    def _check_share(self, share: DeviceShare) -> None:
        free, memory, needed = share.free_bytes, share.memory, self.needed_on(share)
        if free is None or needed <= free:
            return
        weights = "" if self.weights_loaded else f"weights {gib(memory.loaded_bytes)}, "
        need = (
            f"the run needs {gib(needed)} on {share.device} ({weights}"
            f"cache {gib(memory.cache_bytes)}, workspace {gib(memory.workspace_bytes)}) "
            f"and {gib(free)} are free: "
        )
        cache = 0 if self.kv else memory.cache_bytes
        halved = (cache + (0 if self.weights_loaded else memory.loaded_bytes)) // 2
        if self.dtype == "fp32" and not self.weights_loaded and needed - halved <= free:
            what = "weights" if self.kv else "weights and cache"
            raise MemoryLimitError(need + f"use --dtype bf16, which halves {what}")
        fixed = needed - memory.cache_bytes
        per_token = memory.cache_bytes / self.total_tokens
        way = self._way_out(int((free - fixed) / per_token) - self.max_tokens)
        others = [
            (share.shrinkable_bytes, FP8_HELPS),
            (share.movable_bytes, OFFLOAD_HELPS),
        ]
        ways = [] if way == NOTHING_HELPS else [way]
        ways += [other for saved, other in others if needed - free <= saved]
        raise MemoryLimitError(need + (", or ".join(ways) or NOTHING_HELPS))

    def _way_out(self, prompt_room: int) -> str:
        """Which flags bring the prompt down to `prompt_room` tokens, or that none does."""
        videos = [item for item in self.inputs if item.sampling.kind == "video"]
        images = self.visual_tokens - sum(item.sampling.tokens for item in videos)
        if videos:
            video_tokens = self.visual_tokens - images
            layout = sum(item.layout_tokens for item in videos)
            rest = self.prompt_tokens - video_tokens - layout
            room = int((prompt_room - rest) * video_tokens / (video_tokens + layout)) // 100 * 100
            if room >= 100:
                return f"take less of it with --fps, --max-frames, --end or --max-tokens-video {room}"
        elif images:
            rest = self.prompt_tokens - images
            room = (prompt_room - rest) // sum(item.sampling.kind == "image" for item in self.inputs)
            if room >= 4:
                return (
                    f"make the images smaller with --max-pixels {room * MERGED_PIXELS} or give fewer of them"
                )
        return NOTHING_HELPS


def plan_inputs(
    infos: Sequence[VideoInfo], settings: SamplingSettings | Sequence[SamplingSettings]
) -> tuple[InputPlan, ...]:
    """How each input will be sampled, with settings for all or for each; several videos share the total equally, images have
    their own."""
    videos = sum(info.kind != "image" for info in infos)
    each = [settings] * len(infos) if isinstance(settings, SamplingSettings) else settings

    def sample(info: VideoInfo, own: SamplingSettings) -> SamplingPlan:
        return plan_image(info, own) if info.kind == "image" else plan_video(info, own, videos)

    return tuple(InputPlan(info, sample(info, own)) for info, own in zip(infos, each, strict=True))


def plan_run(
    inputs: Sequence[InputPlan],
    config: KeyeVL2Config,
    *,
    model: str,
    device: str,
    dtype: str,
    kernels: Backend,
    kv: KVFormat | None = None,
    max_tokens: int,
    text: str = "",
    prompt_tokens: int | None = None,
    free_bytes: int | None = None,
    weights_loaded: bool = False,
    offload: Offload | None = None,
    host_free_bytes: int | None = None,
    parts: Sequence[tuple[DevicePart, int | None]] = (),
) -> RunPlan:
    """The plan of one question about `inputs`; `dtype` is one of fp32, bf16, fp16, `kv` as in `RunPlan`.

    `parts`: in the place of `device` and `free_bytes`, those of several devices.

    `prompt_tokens` is the exact length once the prompt has been laid out; without it, it is estimated from
    the sampling plans and `text` (the question and anything else written into the prompt).
    """
    if prompt_tokens is None:
        text_tokens = TEMPLATE_TOKENS + -(-len(text.encode()) // BYTES_PER_TEXT_TOKEN)
        prompt_tokens = text_tokens + sum(item.sampling.tokens + item.layout_tokens for item in inputs)
    context = config.max_position_embeddings
    answer = max(1, min(max_tokens, context - prompt_tokens))
    frame_tokens = max((item.sampling.tokens_per_frame for item in inputs), default=0)
    whole = DevicePart(device, config.num_hidden_layers, first=True, last=True)
    shares = []
    for part, free in parts or [(whole, free_bytes)]:
        estimate = partial(
            estimate_memory,
            config,
            prompt_tokens + answer,
            frame_tokens,
            dtype=dtype,
            device=part.device,
            kernels=kernels,
            part=part,
        )
        memory, shrunk = estimate(kv=kv, offload=offload), estimate(kv="fp8", offload=offload)
        offloaded = estimate(kv=kv, offload="experts" if device.startswith("cuda") else None)
        saved = (max(0, memory.total_bytes - other.total_bytes) for other in (offloaded, shrunk))
        shares.append(DeviceShare(part.device, memory, free, *saved))
    return RunPlan(
        model=model,
        dtype=dtype,
        inputs=tuple(inputs),
        prompt_tokens=prompt_tokens,
        max_tokens=answer,
        context_tokens=context,
        shares=tuple(shares),
        weights_loaded=weights_loaded,
        kv=kv,
        offload=offload,
        host_free_bytes=host_free_bytes,
    )


def merge_area(config: KeyeVL2Config) -> int:
    """Patches that become one token."""
    return config.vision_config.spatial_merge_size**2


def estimate_memory(
    config: KeyeVL2Config,
    tokens: int,
    frame_tokens: int,
    *,
    dtype: str,
    device: str,
    kernels: Backend,
    kv: KVFormat | None = None,
    offload: Offload | None = None,
    part: DevicePart | None = None,
) -> MemoryEstimate:
    """What prompt and answer of together `tokens` tokens take, with frames of `frame_tokens` tokens at most (0: none).

    `part`: on a device that holds only a part of the model.
    """
    width, layers = DTYPE_BYTES[dtype], config.num_hidden_layers
    part = part or DevicePart(device, layers, first=True, last=True)
    cache_bytes = tokens * cache_bytes_per_token(config, width, kv)
    encoding = encode_workspace_bytes(config, frame_tokens * merge_area(config), width) if part.first else 0
    experts = layer_expert_bytes(config, width) if offload else 0
    return MemoryEstimate(
        weights_bytes=part_weights_bytes(config, width, part) - part.layers * experts,
        cache_bytes=cache_bytes * part.layers // layers,
        workspace_bytes=max(
            encoding, prefill_workspace_bytes(config, tokens, width, device, kernels, offload)
        ),
        buffer_bytes=min(EXPERT_BUFFERS, part.layers) * experts,
        host_bytes=part.layers * experts,
    )


def prefill_chunk_tokens(device: str, offload: Offload | None = None) -> int:
    """How many tokens of a prompt go through the decoder at once."""
    return OFFLOADED_CHUNK_TOKENS if offload else PREFILL_CHUNK_TOKENS[device.partition(":")[0]]


def frames_per_group(patches_per_frame: int) -> int:
    """How many frames go through the vision tower together."""
    return max(1, ENCODE_GROUP_PATCHES // patches_per_frame)


def cache_bytes_per_token(config: KeyeVL2Config, dtype_bytes: int, kv: KVFormat | None = None) -> int:
    """Keys, values and indexer key of one token over all layers; the indexer key is of the model's type whatever `kv` is."""
    kv_bytes = dtype_bytes if kv is None else KV_BYTES[kv]
    size = 2 * config.num_key_value_heads * config.head_dim * kv_bytes
    if config.sa_config is not None:
        size += config.sa_config["indexer_head_dim"] * dtype_bytes
    return config.num_hidden_layers * size


def encode_workspace_bytes(config: KeyeVL2Config, patches_per_frame: int, dtype_bytes: int) -> int:
    """The vision tower at its widest, over one group of frames (at least one frame)."""
    vision = config.vision_config
    group = frames_per_group(max(1, patches_per_frame)) * patches_per_frame
    pixels = vision.num_channels * vision.patch_size**2
    # Input patches in fp32; the residual, its norm and q, k, v; or the MLP before and after its activation.
    widest = 5 * vision.hidden_size + max(2 * vision.hidden_size, 2 * vision.intermediate_size)
    return group * (pixels * FP32_BYTES + widest * dtype_bytes)


def prefill_workspace_bytes(
    config: KeyeVL2Config,
    tokens: int,
    dtype_bytes: int,
    device: str,
    kernels: Backend,
    offload: Offload | None = None,
) -> int:
    """One chunk of the prompt in the decoder: activations, selection, attention, one token's logits."""
    chunk = min(prefill_chunk_tokens(device, offload), tokens)
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    if config.num_experts:
        # The definition copies rows in and out and holds gate, up and their product; the kernels write two buffers.
        copies = 1 if kernels == "triton" else 4
        routed = config.num_experts_per_tok * copies * (config.hidden_size + config.moe_intermediate_size)
    else:
        routed = 4 * config.intermediate_size
    activations = chunk * (4 * config.hidden_size + heads + routed) * dtype_bytes
    logits = config.vocab_size * FP32_BYTES
    if kernels == "triton" and config.sa_config is not None:
        # A layer's quantised experts are read back when its attention is over, gate and up first.
        quantised = getattr(config, "quantization_config", None) is not None
        experts = (config.num_experts or 0) * 2 * config.moe_intermediate_size * config.hidden_size
        read_back = experts * dtype_bytes if quantised else 0
        return activations + max(KERNEL_WORKSPACE_BYTES, read_back) + logits
    if config.sa_config is None:
        queries, masked_keys, selection = min(DENSE_QUERY_CHUNK, chunk), tokens, 0
    else:
        queries = min(config.sa_config["q_chunk_size"], chunk)
        masked_keys = min(tokens, MASKED_KEYS_PER_SELECTED * config.sa_config["topk"])
        selection = queries * tokens * SELECTION_BYTES_PER_PAIR
    # Under a mask, PyTorch's fused attention for the CPU keeps no scores; on a GPU grouped heads have no fused one.
    per_pair = FP32_BYTES if device == "cpu" else config.num_attention_heads * MASKED_COPIES * dtype_bytes
    attention = queries * masked_keys * (per_pair + 1)
    return activations + max(selection, attention) + logits


def weights_bytes(config: KeyeVL2Config, dtype_bytes: int) -> int:
    """All weights, those that the configuration says are quantised in the form of `keyecli.kernels.quantized_weights`."""
    count = parameter_count(config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return count * dtype_bytes
    method, group = quantization["weights"], quantization["group_size"]
    quantised = config.num_hidden_layers * _quantised_parameters(config, group)
    scales = quantised // group * GROUP_BYTES[method]
    return (count - quantised) * dtype_bytes + quantised * CODE_BITS[method] // 8 + scales


def part_weights_bytes(config: KeyeVL2Config, dtype_bytes: int, part: DevicePart) -> int:
    """The weights on a device that holds a part of the model; a head that is the embedding is where that is."""
    width, vocab = config.hidden_size, config.vocab_size
    before = (vocab * width + _vision_parameters(config)) * dtype_bytes
    behind = (width + (0 if config.tie_word_embeddings else vocab * width)) * dtype_bytes
    a_layer = (weights_bytes(config, dtype_bytes) - before - behind) // config.num_hidden_layers
    return part.layers * a_layer + part.first * before + part.last * behind


def layer_expert_bytes(config: KeyeVL2Config, dtype_bytes: int) -> int:
    """The routed experts of one layer, 0 where there are none."""
    if not config.num_experts:
        return 0
    width, inner = config.hidden_size, config.moe_intermediate_size
    count = 3 * config.num_experts * width * inner
    quantization = getattr(config, "quantization_config", None)
    if quantization is None or width % quantization["group_size"] or inner % quantization["group_size"]:
        return count * dtype_bytes
    scales = count // quantization["group_size"] * GROUP_BYTES[quantization["weights"]]
    return count * CODE_BITS[quantization["weights"]] // 8 + scales


def host_too_small(needed: int, free: int) -> str:
    """Why experts cannot be kept in the host's memory, and what to do."""
    return (
        f"--offload experts keeps {gib(needed)} of experts in this machine's memory and {gib(free)} are free: use --quant int4, "
        "free memory, or use a smaller model"
    )


def _quantised_parameters(config: KeyeVL2Config, group: int) -> int:
    """Of a layer, see `keyecli.model.quantize`: matrices whose inputs are made of whole groups."""
    width = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    count = width * (queries + 2 * keys) * (width % group == 0) + queries * width * (queries % group == 0)
    if config.num_experts:
        inner = config.moe_intermediate_size
        return count + 3 * config.num_experts * width * inner * (width % group == inner % group == 0)
    inner = config.intermediate_size
    return count + 2 * width * inner * (width % group == 0) + width * inner * (inner % group == 0)


def parameter_count(config: KeyeVL2Config) -> int:
    """Parameters of the whole model, vision tower and projector included."""
    width, vocab = config.hidden_size, config.vocab_size
    outer = vocab * width * (1 if config.tie_word_embeddings else 2) + width
    return outer + config.num_hidden_layers * _layer_parameters(config) + _vision_parameters(config)


def _layer_parameters(config: KeyeVL2Config) -> int:
    width, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    attention = 2 * width * queries + 2 * width * keys + 2 * dim
    if config.attention_bias:
        attention += queries + 2 * keys + width
    if config.sa_config is not None:
        index_dim, index_heads = config.sa_config["indexer_head_dim"], config.sa_config["indexer_num_heads"]
        attention += (index_heads * index_dim + index_heads + index_dim) * width + 3 * index_dim
    if config.num_experts:
        mlp = config.num_experts * width * (1 + 3 * config.moe_intermediate_size)
    else:
        mlp = 3 * width * config.intermediate_size
    return 2 * width + attention + mlp


def _vision_parameters(config: KeyeVL2Config) -> int:
    vision = config.vision_config
    width, inner = vision.hidden_size, vision.intermediate_size
    patch = width * (vision.num_channels * vision.patch_size**2 + 1)
    positions = ((vision.image_size // vision.patch_size) ** 2 + vision.packing_positions) * width
    layer = 4 * width + 4 * (width * width + width) + 2 * width * inner + inner + width
    merged = width * merge_area(config)
    projector = 2 * merged + merged * merged + merged + merged * config.hidden_size + config.hidden_size
    return patch + positions + vision.num_hidden_layers * layer + 2 * width + projector


def gib(size: int) -> str:
    """Bytes for a reader: "23.1 GiB", and MiB below one GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
