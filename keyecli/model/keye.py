"""Keye-VL-2.0 as an ordinary transformers model: vision tower, projector, sparse decoder, language head.

The names in the module tree are the names in the official files. B batch, T tokens, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from keyecli.kernels.dispatch import Backend
from keyecli.model.attention import SparseAttention
from keyecli.model.cache import KeyeCache
from keyecli.model.config import KeyeVL2Config
from keyecli.model.decoder import TextDecoder
from keyecli.model.indexer import RMSNorm
from keyecli.model.moe import Experts, SparseMoE
from keyecli.model.prompt import multimodal_positions
from keyecli.model.quantize import QuantizedLinear
from keyecli.model.vision import (
    GROUP_PATCHES,
    PatchEmbeddings,
    Projector,
    VisionAttention,
    VisionTower,
    encode_frames,
)

LOSS_CHUNK_TOKENS = 2048
IGNORED_LABEL = -100


class KeyeVL2ForConditionalGeneration(PreTrainedModel):
    """The whole network. `decode`, `encode_frames`, `embed` and `logits` are its parts; `forward` is the transformers way in."""

    config_class = KeyeVL2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "VisionLayer"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__(config)
        self.visual = VisionTower(config.vision_config)
        self.mlp_AR = Projector(config)
        self.model = TextDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, (RMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, PatchEmbeddings):
            nn.init.normal_(module.position_embedding.weight, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_kernel_backend(self, backend: Backend | None) -> None:
        """Compute with the definitions ("reference"), with the Triton kernels ("triton"), or by the device (None)."""
        for module in self.modules():
            if isinstance(module, (SparseAttention, SparseMoE, VisionAttention, QuantizedLinear)):
                module.backend = backend

    def encode_frames(
        self, patches: Tensor, grids: Sequence[tuple[int, int]], limit_patches: int = GROUP_PATCHES
    ) -> Tensor:
        """Normalised patches [P, 3, 14, 14] of frames one after another → visual tokens [P / 4, D].

        grids: patch (rows, columns) of each frame. At most `limit_patches` patches go through at once; the result does not
        depend on it. ValueError when grids and patches do not match.
        """
        return encode_frames(self.visual, self.mlp_AR, patches, grids, limit_patches)

    def embed(self, input_ids: Tensor, visual_embeds: Tensor | None = None) -> Tensor:
        """input_ids [B, T] → [B, T, D], with the placeholders replaced, in order, by visual_embeds [V, D].

        ValueError when the number of placeholders is not V.
        """
        embeds = self.model.embed_tokens(input_ids)
        is_visual = (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)
        given = 0 if visual_embeds is None else len(visual_embeds)
        # A count on the device would stall the queue; the shape error below catches the mismatch there.
        if input_ids.device.type == "cpu" and int(is_visual.sum()) != given:
            raise ValueError(f"{int(is_visual.sum())} visual placeholders and {given} visual tokens")
        if visual_embeds is None:
            return embeds
        return embeds.masked_scatter(is_visual.unsqueeze(-1), visual_embeds.to(embeds.dtype))

    def decode(self, inputs_embeds: Tensor, position_ids: Tensor, cache: KeyeCache | None = None) -> Tensor:
        """inputs_embeds [B, T, D], position_ids [3, B, T] → hidden states after the final norm [B, T, D].

        With a cache the T tokens follow those it holds and are added to it.
        """
        return self.model(inputs_embeds, position_ids, cache)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] → next-token logits [..., vocabulary], fp32, on their device wherever the output head is."""
        head = next(self.lm_head.parameters()).device
        return self.lm_head(hidden.to(head)).float().to(hidden.device)

    def next_token_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of cross-entropies of labels [..., T] (−100: none), each predicted from the hidden state [..., T, D] in its place.

        Shifting is the caller's. Works in chunks, so that T × vocabulary logits never exist. Returns an fp32 scalar.
        """
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, target in zip(rows.split(LOSS_CHUNK_TOKENS), targets.split(LOSS_CHUNK_TOKENS), strict=True):
            total = total + F.cross_entropy(
                self.logits(part), target, ignore_index=IGNORED_LABEL, reduction="sum"
            )
        return total

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] (or inputs_embeds [B, T, D]) → logits [B, T, vocabulary]; with labels [B, T] the mean loss instead.

        pixel_values: normalised patches [P, 3, 14, 14] of all frames of the batch; grids: patch (rows, columns) of each.
        position_ids: [3, B, T] or [B, T]; worked out from input_ids and grids when absent. Padding goes on the right: causal
        attention then needs no mask (ValueError for padding on the left).
        """
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError("padding must stand on the right of each row")
        merge = self.config.vision_config.spatial_merge_size
        merged_grids = [(rows // merge, columns // merge) for rows, columns in grids or ()]
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids or inputs_embeds is needed")
            visual = None if pixel_values is None else self.encode_frames(pixel_values, grids or ())
            inputs_embeds = self.embed(input_ids, visual)
        if position_ids is None:
            position_ids = self._positions(input_ids, inputs_embeds, past_key_values, merged_grids)
        elif position_ids.dim() == 2:
            position_ids = position_ids.expand(3, *position_ids.shape)
        hidden = self.decode(inputs_embeds, position_ids, past_key_values)
        if labels is None:
            # KeyeCache also holds the indexer's keys, so it is no transformers Cache; the field carries it all the same.
            return CausalLMOutputWithPast(logits=self.logits(hidden), past_key_values=past_key_values)  # type: ignore[arg-type]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        supervised = (targets != IGNORED_LABEL).sum().clamp(min=1)
        return CausalLMOutputWithPast(loss=self.next_token_loss(hidden, targets) / supervised)

    def _positions(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        cache: KeyeCache | None,
        merged_grids: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Positions of a batch whose caller gave none, int64 [3, B, T]."""
        batch, tokens, _ = inputs_embeds.shape
        if not merged_grids or input_ids is None:
            start = 0 if cache is None else cache.length
            return torch.arange(start, start + tokens, device=inputs_embeds.device).expand(3, batch, tokens)
        if cache is not None and cache.length:
            raise ValueError("position_ids are needed to continue a cache that holds visual tokens")
        placeholders = (self.config.image_token_id, self.config.video_token_id)
        rows, used = [], 0
        for row in input_ids.cpu().numpy():
            left = int(np.isin(row, placeholders).sum())
            first = used
            while left > 0 and used < len(merged_grids):
                left -= merged_grids[used][0] * merged_grids[used][1]
                used += 1
            rows.append(
                torch.from_numpy(multimodal_positions(row, merged_grids[first:used], placeholders)[0])
            )
        return torch.stack(rows, dim=1).to(inputs_embeds.device)


AutoModelForImageTextToText.register(KeyeVL2Config, KeyeVL2ForConditionalGeneration)
