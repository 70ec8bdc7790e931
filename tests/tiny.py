"""A random toy checkpoint in the official layout, written without keyecli: configuration, weights, tokenizer, template."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.official import tensor_shapes

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|frame|>",
)
# As in the released tokenizer, these two are plain added tokens: decoding keeps them even when it skips special ones.
PLAIN_TOKENS = ("<think>", "</think>")
TOKEN_IDS = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS + PLAIN_TOKENS)}

# Sections 4 : 6 : 6 of head dim 32 scale to 2 : 3 : 3 of indexer dim 16. The query chunk is short so that tests cross it.
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["KeyeVL2MoeForConditionalGeneration"],
    "attention_bias": False,
    "dtype": "float32",
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "model_type": "KeyeVL2",
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
    "rope_theta": 10000.0,
    "sa_config": {
        "indexer_head_dim": 16,
        "indexer_num_heads": 2,
        "indexer_num_kv_heads": 1,
        "kv_chunk_size": 16,
        "q_chunk_size": 16,
        "topk": 8,
    },
    "tie_word_embeddings": False,
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_config": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "image_size": 98,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-06,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "packing_positions": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
    "vocab_size": 272,
}

TINY_PREPROCESSOR: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 14,
    "temporal_patch_size": 1,
    "fps": 2.0,
    "token_budget": {"min_tokens": 4, "max_tokens": 16, "total_tokens": 2048, "image_max_tokens": 64},
}

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""


def tiny_config(**changes: Any) -> dict[str, Any]:
    """TINY_CONFIG with top-level values changed; a value of None removes its key."""
    config = {**deepcopy(TINY_CONFIG), **changes}
    return {key: value for key, value in config.items() if value is not None}


def random_tensors(
    config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A random tensor for every name of the official table, at scales that keep activations near one.

    Norm weights lie around one and biases around zero without being either, so that a forgotten one shows.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight") or ("norm" in name and name.endswith("weight")):
            value = 1 + 0.2 * value
        elif name.endswith("bias"):
            value = 0.1 * value
        elif "embed" not in name:
            # Experts are [expert, in, out]; everything else is [out, in...].
            fan_in = shape[1] if ".experts." in name else math.prod(shape[1:])
            value = value * (1.5 / math.sqrt(fan_in))
        tensors[name] = value.to(dtype)
    return tensors


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with experts one by one as Qwen3-MoE files have them: `experts.K.gate_proj.weight` [out, in]."""
    split = {}
    for name, tensor in tensors.items():
        prefix, _, matrix = name.rpartition(".")
        if matrix == "gate_up_proj":
            for expert, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=-1), strict=True)):
                split[f"{prefix}.{expert}.gate_proj.weight"] = gate.t().contiguous()
                split[f"{prefix}.{expert}.up_proj.weight"] = up.t().contiguous()
        elif matrix == "down_proj" and prefix.endswith("experts"):
            for expert, down in enumerate(tensor):
                split[f"{prefix}.{expert}.down_proj.weight"] = down.t().contiguous()
        else:
            split[name] = tensor
    return split


def write_weights(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """`model.safetensors`, or `shards` shard files with an index, names dealt out in turn."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: one token a byte, then the added tokens from 256 on."""
    # Byte-level BPE writes every byte as a printable character; single characters are tokens 0..255 in sorted order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_checkpoint(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    shards: int = 1,
) -> Path:
    """A whole checkpoint folder: configuration, weights, tokenizer, chat template and preprocessor. Returns `folder`."""
    config = tiny_config() if config is None else config
    tensors = random_tensors(config) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_weights(folder, tensors, shards)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(TINY_PREPROCESSOR))
    return folder
