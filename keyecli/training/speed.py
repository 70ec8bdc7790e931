"""How long training will take, before it begins: operations of a sequence, and how many a second a device does."""

from __future__ import annotations

import time

import torch

from keyecli.model.config import KeyeVL2Config
from keyecli.training.network import Trained, trained

# Of the rate of one large matrix product: what the 30B model's prefill of 32,768 tokens reaches on an H200 (1.02 s, see
# benchmarks/records); training does the same operations three or four times.
REACHED_SHARE = 0.4
RATE_SIDE = {"cpu": 1024, "cuda": 8192}
RATE_LIMIT_S = 0.2


def sequence_flops(
    config: KeyeVL2Config,
    train: tuple[str, ...],
    tokens: int,
    *,
    learnt_tokens: int | None = None,
    patches: int = 0,
) -> float:
    """Floating-point operations of the forward and backward pass of one sequence, with layers recomputed.

    learnt_tokens: those whose logits are needed, None for all; patches: of frames that are encoded for it. A matrix takes 2 for
    each parameter and token in every pass over it: forward, recomputed, gradient of its input, and of itself where it learns.
    """
    what = trained(",".join(train))
    learns = what.main in ("full", "sparse")
    # Teaching the indexer alone, nothing goes back through the rest.
    passes = 2 if what.main == "indexer" else 4 if learns else 3
    layer = tokens * 2 * _active_parameters(config) * passes + _attention_flops(config, what, tokens)
    head = 0.0
    if what.answers:
        answers = tokens if learnt_tokens is None else learnt_tokens
        head = answers * 2 * config.vocab_size * config.hidden_size * passes
    vision = config.vision_config
    blocks = vision.num_hidden_layers * (
        4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    )
    seen = patches * 2 * blocks * (4 if "vision" in what.extras else 1)
    return config.num_hidden_layers * layer + head + seen


def estimate_seconds(
    config: KeyeVL2Config,
    train: tuple[str, ...],
    tokens: int,
    flops_per_s: float,
    *,
    learnt_tokens: int | None = None,
    patches: int = 0,
) -> float:
    """Seconds that one sequence of `tokens` tokens will take, at `REACHED_SHARE` of `device_rate`; see `sequence_flops`."""
    flops = sequence_flops(config, train, tokens, learnt_tokens=learnt_tokens, patches=patches)
    return flops / (REACHED_SHARE * flops_per_s)


def _active_parameters(config: KeyeVL2Config) -> int:
    """Of a layer's matrices, those that one token meets."""
    width = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    count = 2 * width * queries + 2 * width * keys
    if config.sa_config is not None:
        heads, dim = config.sa_config["indexer_num_heads"], config.sa_config["indexer_head_dim"]
        count += width * (heads * dim + heads + dim)
    if config.num_experts:
        return count + width * (
            config.num_experts + 3 * config.num_experts_per_tok * config.moe_intermediate_size
        )
    return count + 3 * width * config.intermediate_size


def _attention_flops(config: KeyeVL2Config, what: Trained, tokens: int) -> float:
    """Of one layer: attention over causal or selected keys, and the indexer's scores of all causal pairs."""
    causal = tokens * (tokens + 1) / 2
    sparse = config.sa_config
    selects = sparse is not None and what.main != "indexer" and tokens > sparse["topk"]
    pairs = causal
    if sparse is not None and selects:
        pairs = tokens * sparse["topk"] - sparse["topk"] * (sparse["topk"] - 1) / 2
    # Scores and weighted sum, forward and recomputed; five products backward.
    product = 2 * config.num_attention_heads * config.head_dim * pairs
    attention = product * (4 if what.main == "indexer" else 9)
    if sparse is None or not (selects or what.teaches_indexer):
        return attention
    scoring = 2 * sparse["indexer_num_heads"] * sparse["indexer_head_dim"]
    taught = scoring * pairs * 2 if what.teaches_indexer else 0.0
    return attention + 2 * scoring * causal + taught


def device_rate(device: str, dtype: str) -> float:
    """Floating-point operations a second of a large matrix product, measured in at most about 0.3 s."""
    kind = device.partition(":")[0]
    side = RATE_SIDE.get(kind, RATE_SIDE["cpu"])
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    x = torch.ones(side, side, dtype=types[dtype], device=device)

    def timed(times: int) -> float:
        begin_s = time.perf_counter()
        for _ in range(times):
            torch.mm(x, x)
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin_s

    # The first one also sets the library up.
    once_s = max(1e-6, min(timed(1), timed(1)))
    times = max(1, int(RATE_LIMIT_S / 2 / once_s))
    took_s = timed(times) if once_s < RATE_LIMIT_S / 2 else once_s * times
    return times * 2 * side**3 / took_s
