"""The configuration of Keye-VL-2.0 as its `config.json` spells it, registered with transformers."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

SA_CONFIG_KEYS = ("indexer_head_dim", "indexer_num_heads", "topk")
SA_CONFIG_DEFAULTS = {"indexer_num_kv_heads": 1, "q_chunk_size": 512, "kv_chunk_size": 512}


class KeyeVL2VisionConfig(PreTrainedConfig):
    """The vision tower (SigLIP-400M/14 at native resolution).

    `image_size // patch_size` is the side of the learned position grid; `packing_positions` is the number of rows of
    an embedding that official files carry and native resolution does not use.
    """

    model_type = "KeyeVL2_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1152,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        intermediate_size: int = 4304,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        patch_size: int = 14,
        image_size: int = 384,
        num_channels: int = 3,
        spatial_merge_size: int = 2,
        rope_theta: float = 10000.0,
        packing_positions: int = 32768,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.patch_size = patch_size
        self.image_size = image_size
        self.num_channels = num_channels
        self.spatial_merge_size = spatial_merge_size
        self.rope_theta = rope_theta
        self.packing_positions = packing_positions
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def position_grid(self) -> int:
        """Side of the learned position grid, in patches."""
        return self.image_size // self.patch_size


class KeyeVL2Config(PreTrainedConfig):
    """The whole model; the text fields stand at the top level, as in the official file.

    `num_experts` absent or 0 means a plain SwiGLU MLP in every layer. `sa_config` absent or null means dense
    attention in every layer; present, it must name `indexer_head_dim`, `indexer_num_heads` and `topk` (ValueError).
    The rotary base and sections are read from `rope_theta` + `rope_scaling` (older files) or `rope_parameters`.
    """

    model_type = "KeyeVL2"
    sub_configs = {"vision_config": KeyeVL2VisionConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    ignore_keys_at_rope_validation = {"mrope_section"}

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 4,
        head_dim: int = 128,
        num_experts: int | None = None,
        num_experts_per_tok: int = 8,
        moe_intermediate_size: int = 768,
        norm_topk_prob: bool = True,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 262144,
        attention_bias: bool = False,
        tie_word_embeddings: bool = False,
        image_token_id: int = 151655,
        video_token_id: int = 151656,
        fast_video_token_id: int | None = None,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        initializer_range: float = 0.02,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | KeyeVL2VisionConfig | None = None,
        sa_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.fast_video_token_id = fast_video_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        self.initializer_range = initializer_range

        rope = {**(rope_scaling or {}), **(rope_parameters or {})}
        self.rope_parameters = {
            "rope_type": "default",
            "rope_theta": float(rope.get("rope_theta") or rope_theta or 1e7),
            "mrope_section": list(rope.get("mrope_section") or _default_sections(head_dim)),
        }
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            raise ValueError(f"rope type '{rope_type}' is not one this model has; it must be 'default'")
        if 2 * sum(self.mrope_section) != head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must add up to half of head_dim {head_dim}")

        if isinstance(vision_config, KeyeVL2VisionConfig):
            self.vision_config = vision_config
        else:
            self.vision_config = KeyeVL2VisionConfig(**(vision_config or {}))
        self.sa_config = _checked_sa_config(sa_config)
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def rope_theta(self) -> float:
        return self.rope_parameters["rope_theta"]

    @property
    def mrope_section(self) -> list[int]:
        """How many of the `head_dim / 2` rotary frequencies use the (time, row, column) position."""
        return self.rope_parameters["mrope_section"]

    @property
    def is_moe(self) -> bool:
        return bool(self.num_experts)


def _default_sections(head_dim: int) -> list[int]:
    """The release's 16 : 24 : 24 split of 64 frequencies, scaled to `head_dim / 2`."""
    half = head_dim // 2
    time = half // 4
    row = (half - time) // 2
    return [time, row, half - time - row]


def _checked_sa_config(sa_config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The sparse attention settings with defaults; ValueError when one that matters is missing."""
    if sa_config is None:
        return None
    missing = [key for key in SA_CONFIG_KEYS if key not in sa_config]
    if missing:
        raise ValueError(f"sa_config lacks {', '.join(missing)}; a sparse model cannot run without it")
    checked = {**SA_CONFIG_DEFAULTS, **sa_config}
    if checked["indexer_num_kv_heads"] != 1:
        raise ValueError(
            "sa_config.indexer_num_kv_heads must be 1: one indexer key is shared by all indexer heads"
        )
    return checked


AutoConfig.register(KeyeVL2Config.model_type, KeyeVL2Config)
