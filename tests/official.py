"""What the official files of Keye-VL-2.0-30B-A3B hold: configuration values and the table of tensors, written out by hand."""

from __future__ import annotations

import math
from typing import Any

OFFICIAL_PARAMETERS = 31_122_082_160

OFFICIAL_CONFIG: dict[str, Any] = {
    "architectures": ["KeyeVL2MoeForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "configuration_keye_vl_2.KeyeVL2Config",
        "AutoModel": "modeling_keye_vl_2.KeyeVL2MoeForConditionalGeneration",
    },
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "fast_video_token_id": 151678,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "image_token_id": 151655,
    "intermediate_size": 6144,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "KeyeVL2",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 10000000,
    "sa_config": {
        "indexer_head_dim": 64,
        "indexer_num_heads": 16,
        "indexer_num_kv_heads": 1,
        "kv_chunk_size": 512,
        "q_chunk_size": 512,
        "topk": 2048,
    },
    "tie_word_embeddings": False,
    "transformers_version": "4.57.3",
    "use_cache": True,
    "video_token_id": 151656,
    "vision_config": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "layer_norm_eps": 1e-06,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vocab_size": 151936,
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with this `config.json`: name → shape, experts fused as [expert, in, out]."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes.update(
            {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(config).items()}
        )

    vision = config["vision_config"]
    wide, inner = vision["hidden_size"], vision["intermediate_size"]
    patch, merged = vision["patch_size"], vision["hidden_size"] * 4
    root = "visual.vision_model"
    shapes[f"{root}.embeddings.patch_embedding.weight"] = (wide, 3, patch, patch)
    shapes[f"{root}.embeddings.patch_embedding.bias"] = (wide,)
    shapes[f"{root}.embeddings.position_embedding.weight"] = ((vision["image_size"] // patch) ** 2, wide)
    shapes[f"{root}.embeddings.packing_position_embedding.weight"] = (
        vision.get("packing_positions", 32768),
        wide,
    )
    for layer in range(vision["num_hidden_layers"]):
        block = f"{root}.encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (wide,)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{block}.self_attn.{projection}.weight"] = (wide, wide)
            shapes[f"{block}.self_attn.{projection}.bias"] = (wide,)
        shapes[f"{block}.mlp.fc1.weight"], shapes[f"{block}.mlp.fc1.bias"] = (inner, wide), (inner,)
        shapes[f"{block}.mlp.fc2.weight"], shapes[f"{block}.mlp.fc2.bias"] = (wide, inner), (wide,)
    shapes[f"{root}.post_layernorm.weight"] = shapes[f"{root}.post_layernorm.bias"] = (wide,)

    shapes["mlp_AR.pre_norm.weight"] = shapes["mlp_AR.pre_norm.bias"] = (merged,)
    shapes["mlp_AR.linear_1.weight"], shapes["mlp_AR.linear_1.bias"] = (merged, merged), (merged,)
    shapes["mlp_AR.linear_2.weight"], shapes["mlp_AR.linear_2.bias"] = (width, merged), (width,)
    return shapes


def _layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, dim = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (heads * dim, width),
        "self_attn.k_proj.weight": (groups * dim, width),
        "self_attn.v_proj.weight": (groups * dim, width),
        "self_attn.o_proj.weight": (width, heads * dim),
        "self_attn.q_norm.weight": (dim,),
        "self_attn.k_norm.weight": (dim,),
    }
    sparse = config.get("sa_config")
    if sparse:
        index_heads, index_dim = sparse["indexer_num_heads"], sparse["indexer_head_dim"]
        shapes["self_attn.sa_indexer.q_proj.weight"] = (index_heads * index_dim + index_heads, width)
        shapes["self_attn.sa_indexer.k_proj.weight"] = (index_dim, width)
        shapes["self_attn.sa_indexer.q_norm.weight"] = (index_dim,)
        shapes["self_attn.sa_indexer.k_norm.weight"] = (index_dim,)
        shapes["self_attn.sa_indexer.k_norm.bias"] = (index_dim,)
    experts = config.get("num_experts")
    if experts:
        inner = config["moe_intermediate_size"]
        shapes["mlp.gate.weight"] = (experts, width)
        shapes["mlp.experts.gate_up_proj"] = (experts, width, 2 * inner)
        shapes["mlp.experts.down_proj"] = (experts, inner, width)
    else:
        inner = config["intermediate_size"]
        shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (inner, width)
        shapes["mlp.down_proj.weight"] = (width, inner)
    return shapes


def count_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    """Values in all tensors together."""
    return sum(math.prod(shape) for shape in shapes.values())
