"""The network written out a second time: plain loops in float64 from official tensors, slow and free of keyecli code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rotate(vector: Tensor, position: Tensor | list[float], theta: float, sections: list[int]) -> Tensor:
    """Turn the pairs (i, i + d/2) of one vector [d]; pair i by its axis' position times theta^(−2i/d)."""
    half = vector.shape[-1] // 2
    axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    assert len(axes) == half
    turned = vector.clone()
    for i, axis in enumerate(axes):
        angle = float(position[axis]) * theta ** (-2 * i / (2 * half))
        a, b = vector[i], vector[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def indexer_scores(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """I[t, s] = e^(−1/2) · Σ_j w[t, j] · max(0, q[t, j] · k[s]), entry by entry: q [T, J, e], w [T, J], k [S, e] → [T, S]."""
    queries, heads, dim = q.shape
    scores = torch.zeros(queries, len(k), dtype=torch.float64)
    for t in range(queries):
        for s in range(len(k)):
            total = 0.0
            for j in range(heads):
                total += float(w[t, j]) * max(0.0, float(q[t, j] @ k[s]))
            scores[t, s] = total * dim**-0.5
    return scores


def select(scores: list[float], allowed: list[bool], top_k: int) -> set[int]:
    """The best `top_k` allowed keys of one query, the lower index first among equals."""
    candidates = [s for s in range(len(scores)) if allowed[s]]
    return set(sorted(candidates, key=lambda s: (-scores[s], s))[:top_k])


def attention(q: Tensor, k: Tensor, v: Tensor, chosen: list[set[int]]) -> Tensor:
    """q [T, H, d]; k, v [S, G, d]; chosen: the keys of each query. Head h reads group h // (H / G). → [T, H, d]"""
    queries, heads, dim = q.shape
    ratio = heads // k.shape[1]
    out = torch.zeros(queries, heads, dim, dtype=torch.float64)
    for t in range(queries):
        keys = sorted(chosen[t])
        for h in range(heads):
            group = h // ratio
            logits = torch.stack([q[t, h] @ k[s, group] for s in keys]) * dim**-0.5
            weights = (logits - logits.max()).exp()
            weights = weights / weights.sum()
            for weight, s in zip(weights, keys, strict=True):
                out[t, h] += weight * v[s, group]
    return out


def experts(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, top_k: int, normalise: bool) -> Tensor:
    """x [T, D]; gate [E, D]; gate_up [E, D, 2F] with gate columns first; down [E, F, D] → [T, D]."""
    inner = down.shape[1]
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        logits = gate @ row
        probabilities = (logits - logits.max()).exp()
        probabilities = probabilities / probabilities.sum()
        best = sorted(range(len(gate)), key=lambda e: -float(probabilities[e]))[:top_k]
        scale = float(probabilities[best].sum()) if normalise else 1.0
        for e in best:
            both = row @ gate_up[e]
            g, u = both[:inner], both[inner:]
            out[t] += probabilities[e] / scale * ((g * torch.sigmoid(g) * u) @ down[e])
    return out


def index_parts(
    weights: Weights, config: dict[str, Any], layer: int, x: Tensor, positions: Tensor
) -> tuple[Tensor, ...]:
    """Indexer queries [T, J, e], gates [T, J] and keys [T, e] of the normalised input x [T, D]; positions [3, T]."""
    sparse, root = config["sa_config"], f"model.layers.{layer}.self_attn.sa_indexer."
    heads, dim = sparse["indexer_num_heads"], sparse["indexer_head_dim"]
    theta, sections = config["rope_theta"], config["rope_scaling"]["mrope_section"]
    sections = [section * dim // config["head_dim"] for section in sections]
    projected = x @ weights[root + "q_proj.weight"].t()
    q = rms_norm(projected[:, : heads * dim].reshape(-1, heads, dim), weights[root + "q_norm.weight"], 1e-6)
    k = layer_norm(
        x @ weights[root + "k_proj.weight"].t(),
        weights[root + "k_norm.weight"],
        weights[root + "k_norm.bias"],
        1e-6,
    )
    q = torch.stack(
        [
            torch.stack([rotate(head, positions[:, t], theta, sections) for head in q[t]])
            for t in range(len(x))
        ]
    )
    k = torch.stack([rotate(k[t], positions[:, t], theta, sections) for t in range(len(x))])
    return q, projected[:, heads * dim :], k


def decoder_logits(tensors: Weights, config: dict[str, Any], ids: list[int], positions: Tensor) -> Tensor:
    """Next-token logits [T, vocabulary] of one sequence of text; positions [3, T]. Dense without sa_config."""
    weights = {name: tensor.double() for name, tensor in tensors.items() if not name.startswith("visual.")}
    heads, groups, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    theta, sections = config["rope_theta"], config["rope_scaling"]["mrope_section"]
    eps, tokens = config["rms_norm_eps"], len(ids)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        root = f"model.layers.{layer}."
        normed = rms_norm(x, weights[root + "input_layernorm.weight"], eps)

        def project(name: str, count: int, x: Tensor = normed, root: str = root) -> Tensor:
            return (x @ weights[f"{root}self_attn.{name}.weight"].t()).reshape(tokens, count, dim)

        q = rms_norm(project("q_proj", heads), weights[root + "self_attn.q_norm.weight"], eps)
        k = rms_norm(project("k_proj", groups), weights[root + "self_attn.k_norm.weight"], eps)
        v = project("v_proj", groups)
        for t in range(tokens):
            for h in range(heads):
                q[t, h] = rotate(q[t, h], positions[:, t], theta, sections)
            for g in range(groups):
                k[t, g] = rotate(k[t, g], positions[:, t], theta, sections)

        if config.get("sa_config"):
            scores = indexer_scores(*index_parts(weights, config, layer, normed, positions)).tolist()
            top_k = config["sa_config"]["topk"]
            chosen = [select(scores[t], [s <= t for s in range(tokens)], top_k) for t in range(tokens)]
        else:
            chosen = [set(range(t + 1)) for t in range(tokens)]
        attended = attention(q, k, v, chosen).reshape(tokens, heads * dim)
        x = x + attended @ weights[root + "self_attn.o_proj.weight"].t()

        normed = rms_norm(x, weights[root + "post_attention_layernorm.weight"], eps)
        if config.get("num_experts"):
            x = x + experts(
                normed,
                weights[root + "mlp.gate.weight"],
                weights[root + "mlp.experts.gate_up_proj"],
                weights[root + "mlp.experts.down_proj"],
                config["num_experts_per_tok"],
                config["norm_topk_prob"],
            )
        else:
            gate = normed @ weights[root + "mlp.gate_proj.weight"].t()
            up = normed @ weights[root + "mlp.up_proj.weight"].t()
            x = x + (gate * torch.sigmoid(gate) * up) @ weights[root + "mlp.down_proj.weight"].t()
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].t()
