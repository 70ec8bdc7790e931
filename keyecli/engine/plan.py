"""What a run will take, before anything is decoded or loaded: frames, tokens, share of the context, memory.

Nothing here needs torch: the numbers come from the configuration, the sampling plans and the device's free
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from keyecli.errors import MemoryLimitError, UsageError
from keyecli.video.sampling import TOKEN_SIDE_PX, SamplingPlan, SamplingSettings, plan_image, plan_video
from keyecli.video.source import VideoInfo

if TYPE_CHECKING:
    from keyecli.kernels.dispatch import Backend
    from keyecli.model.config import KeyeVL2Config

KVFormat = Literal["fp8"]

ENCODE_GROUP_PATCHES = 8192
# On a GPU larger: each expert of 128 then has enough rows to fill tall tiles.
PREFILL_CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}

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
    """Bytes of the weights, the cache for all tokens, and the larger workspace of encoding and prefill."""

    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes


@dataclass(frozen=True)
class RunPlan:
    """Everything known about a run before it starts.

    `kv` is the type of the cache's keys and values, None: `dtype`.
    `prompt_tokens` counts visual, layout and text tokens; `max_tokens` is the longest answer, already cut
    to what the context leaves. `free_bytes` is what the device has left (None: unknown); `weights_loaded`
    says that the weights are already among what it holds.
    """

    model: str
    device: str
    dtype: str
    inputs: tuple[InputPlan, ...]
    prompt_tokens: int
    max_tokens: int
    context_tokens: int
    memory: MemoryEstimate
    free_bytes: int | None
    weights_loaded: bool
    kv: KVFormat | None = None

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
        """What the run will still ask of the device."""
        loaded = self.memory.weights_bytes if self.weights_loaded else 0
        return self.memory.total_bytes - loaded

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
        }

    def _check_context(self) -> None:
        if self.prompt_tokens < self.context_tokens:
            return
        raise UsageError(
            f"the prompt takes {self.prompt_tokens:,} tokens and the model's context holds "
            f"{self.context_tokens:,}: " + self._way_out(int(self.context_tokens * 0.98) - 1)
        )

    def _check_memory(self) -> None:
        free, memory = self.free_bytes, self.memory
        if free is None or self.needed_bytes <= free:
            return
        weights = "" if self.weights_loaded else f"weights {gib(memory.weights_bytes)}, "
        need = (
            f"the run needs {gib(self.needed_bytes)} on {self.device} ({weights}"
            f"cache {gib(memory.cache_bytes)}, workspace {gib(memory.workspace_bytes)}) "
            f"and {gib(free)} are free: "
        )
        cache = 0 if self.kv else memory.cache_bytes
        halved = (cache + (0 if self.weights_loaded else memory.weights_bytes)) // 2
        if self.dtype == "fp32" and not self.weights_loaded and self.needed_bytes - halved <= free:
            what = "weights" if self.kv else "weights and cache"
            raise MemoryLimitError(need + f"use --dtype bf16, which halves {what}")
        fixed = self.needed_bytes - memory.cache_bytes
        per_token = memory.cache_bytes / self.total_tokens
        raise MemoryLimitError(need + self._way_out(int((free - fixed) / per_token) - self.max_tokens))

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
        return "no sampling setting makes it fit; use a smaller model, a shorter question or a larger device"


def plan_inputs(infos: Sequence[VideoInfo], settings: SamplingSettings) -> tuple[InputPlan, ...]:
    """How each input will be sampled; several videos share the total equally, images have their own."""
    videos = sum(info.kind != "image" for info in infos)

    def sample(info: VideoInfo) -> SamplingPlan:
        return plan_image(info, settings) if info.kind == "image" else plan_video(info, settings, videos)

    return tuple(InputPlan(info, sample(info)) for info in infos)


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
) -> RunPlan:
    """The plan of one question about `inputs`; `dtype` is one of fp32, bf16, fp16, `kv` as in `RunPlan`.

    `prompt_tokens` is the exact length once the prompt has been laid out; without it, it is estimated from
    the sampling plans and `text` (the question and anything else written into the prompt).
    """
    if prompt_tokens is None:
        text_tokens = TEMPLATE_TOKENS + -(-len(text.encode()) // BYTES_PER_TEXT_TOKEN)
        prompt_tokens = text_tokens + sum(item.sampling.tokens + item.layout_tokens for item in inputs)
    context = config.max_position_embeddings
    answer = max(1, min(max_tokens, context - prompt_tokens))
    frame_tokens = max((item.sampling.tokens_per_frame for item in inputs), default=0)
    memory = estimate_memory(
        config, prompt_tokens + answer, frame_tokens, dtype=dtype, device=device, kernels=kernels, kv=kv
    )
    return RunPlan(
        model=model,
        device=device,
        dtype=dtype,
        inputs=tuple(inputs),
        prompt_tokens=prompt_tokens,
        max_tokens=answer,
        context_tokens=context,
        memory=memory,
        free_bytes=free_bytes,
        weights_loaded=weights_loaded,
        kv=kv,
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
) -> MemoryEstimate:
    """What prompt and answer of together `tokens` tokens take, with frames of `frame_tokens` tokens at most (0: none)."""
    width = DTYPE_BYTES[dtype]
    return MemoryEstimate(
        weights_bytes=weights_bytes(config, width),
        cache_bytes=tokens * cache_bytes_per_token(config, width, kv),
        workspace_bytes=max(
            encode_workspace_bytes(config, frame_tokens * merge_area(config), width),
            prefill_workspace_bytes(config, tokens, width, device, kernels),
        ),
    )


def prefill_chunk_tokens(device: str) -> int:
    """How many tokens of a prompt go through the decoder at once."""
    return PREFILL_CHUNK_TOKENS[device.partition(":")[0]]


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
    config: KeyeVL2Config, tokens: int, dtype_bytes: int, device: str, kernels: Backend
) -> int:
    """One chunk of the prompt in the decoder: activations, selection, attention, one token's logits."""
    chunk = min(prefill_chunk_tokens(device), tokens)
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
        return activations + KERNEL_WORKSPACE_BYTES + logits
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
