"""The vision tower at native resolution and the projector into the decoder's width.

Frames are independent: attention never leaves a frame, so frames go through in groups and the result does not change.
P patches, N frames, h × w patches a frame, C tower width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from keyecli.kernels import dispatch
from keyecli.model.config import KeyeVL2Config, KeyeVL2VisionConfig
from keyecli.model.rope import grid_tables

GROUP_PATCHES = 8192


class PatchEmbeddings(nn.Module):
    """Patches to vectors, plus the learned position grid interpolated to the frame's size."""

    def __init__(self, config: KeyeVL2VisionConfig) -> None:
        super().__init__()
        self.grid = config.position_grid
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.grid**2, config.hidden_size)
        # Official files carry this table; native resolution does not read it.
        self.packing_position_embedding = nn.Embedding(config.packing_positions, config.hidden_size)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """patches: [N, rows * columns, 3, 14, 14] → [N, rows * columns, C]."""
        # One patch is one kernel window, so the convolution is a matrix product.
        weight = self.patch_embedding.weight
        embedded = F.linear(patches.flatten(2).to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        return embedded + self.positions(rows, columns).to(embedded.dtype)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The learned grid at rows × columns: bilinear, align_corners=False, no antialias. [rows * columns, C] fp32."""
        table = self.position_embedding.weight.float().view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(table, size=(rows, columns), mode="bilinear", align_corners=False)
        return resized.flatten(2).squeeze(0).t()


class VisionAttention(nn.Module):
    """Full attention inside each frame with two-axis rotary on queries and keys."""

    def __init__(self, config: KeyeVL2VisionConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.backend: dispatch.Backend | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [N, P, C]; cos, sin: fp32 [P, head_dim] → [N, P, C]."""
        shape = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = (project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        # The tables stay fp32, as the tower was trained: the angles of a large frame do not survive bf16.
        attended = dispatch.frame_attention(q, k, v, cos, sin, self.backend)
        return self.out_proj(attended.flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, config: KeyeVL2VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(GradientCheckpointingLayer):
    """One pre-norm block."""

    def __init__(self, config: KeyeVL2VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), cos, sin)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    def __init__(self, config: KeyeVL2VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """Patches of equally sized frames → features, one vector a patch."""

    def __init__(self, config: KeyeVL2VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """patches: [N, rows * columns, 3, 14, 14] in row-major order → [N, rows * columns, C]."""
        x = self.embeddings(patches, rows, columns)
        cos, sin = grid_tables(rows, columns, self.config.head_dim, self.config.rope_theta, x.device)
        for layer in self.encoder.layers:
            x = layer(x, cos, sin)
        return self.post_layernorm(x)


class VisionTower(nn.Module):
    """The `visual` branch of the official files."""

    def __init__(self, config: KeyeVL2VisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        return self.vision_model(patches, rows, columns)


class Projector(nn.Module):
    """2×2 neighbouring patches → one decoder token."""

    def __init__(self, config: KeyeVL2Config) -> None:
        super().__init__()
        self.merge = config.vision_config.spatial_merge_size
        width = config.vision_config.hidden_size * self.merge**2
        self.pre_norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, config.hidden_size)

    def forward(self, features: Tensor, rows: int, columns: int) -> Tensor:
        """features: [N, rows * columns, C] → [N, rows * columns / 4, D], merged tokens in row-major order."""
        n, _, width = features.shape
        m = self.merge
        blocks = features.view(n, rows // m, m, columns // m, m, width).permute(0, 1, 3, 2, 4, 5)
        merged = self.pre_norm(blocks.reshape(n, -1, m * m * width))
        return self.linear_2(F.gelu(self.linear_1(merged)))


def frame_groups(
    grids: Sequence[tuple[int, int]], limit_patches: int = GROUP_PATCHES
) -> Iterator[tuple[int, int, int]]:
    """Cut a sequence of frames into groups of equal grids and at most `limit_patches` patches (at least one frame).

    Yields (frames, rows, columns); ValueError for a grid with an odd side.
    """
    start = 0
    while start < len(grids):
        rows, columns = grids[start]
        if rows % 2 or columns % 2:
            raise ValueError(
                f"a frame of {rows}×{columns} patches cannot be merged 2×2: both sides must be even"
            )
        most = max(1, limit_patches // (rows * columns))
        end = start
        while end < len(grids) and end - start < most and grids[end] == grids[start]:
            end += 1
        yield end - start, rows, columns
        start = end


def encode_frames(
    tower: VisionTower,
    projector: Projector,
    patches: Tensor,
    grids: Sequence[tuple[int, int]],
    limit_patches: int,
) -> Tensor:
    """patches: [P, 3, 14, 14], one frame after another; grids: (rows, columns) of each → [P / 4, D]."""
    outputs, position = [], 0
    for frames, rows, columns in frame_groups(grids, limit_patches):
        count = frames * rows * columns
        group = patches[position : position + count].view(frames, rows * columns, *patches.shape[1:])
        outputs.append(projector(tower(group, rows, columns), rows, columns).flatten(0, 1))
        position += count
    if position != len(patches):
        raise ValueError(f"the grids cover {position} patches, but {len(patches)} were given")
    return torch.cat(outputs)
