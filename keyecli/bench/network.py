"""Prefill and decoding of the whole 30B-A3B decoder with random weights, so that nobody needs a download to measure them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keyecli.bench.measure import Measurement
from keyecli.engine.generate import GenerationSettings
from keyecli.engine.loaded import choose_kv
from keyecli.engine.plan import prefill_chunk_tokens
from keyecli.engine.sampling import Sampler
from keyecli.engine.static import StaticDecoder
from keyecli.kernels import dispatch
from keyecli.kernels.quantized_weights import CODE_BITS
from keyecli.kernels.reference import Branches
from keyecli.model.cache import KeyeCache
from keyecli.model.config import KeyeVL2Config
from keyecli.model.keye import KeyeVL2ForConditionalGeneration
from keyecli.model.lora import LoraSettings, add_lora, lora_parameters
from keyecli.model.quantize import Quantized, quantization_in, quantization_of, replace_modules

# Neighbouring tokens of a video are alike, and so select much the same keys; independent ones would not. Each token is
# this share of the one before it, the rest is new: 16 neighbours then select some 8K distinct keys of 128K.
LIKENESS = 0.99
DECODE_STEPS = 24
# Sequences that are decoded side by side, as branches, with an adapter.
ADAPTED_BRANCHES = (1, 8)
LONG_TOKENS = 65_536
# Beyond, a pass of the dense models takes minutes; ours is compared with our own dense path alone.
TRANSFORMERS_TOKENS = 131_072
TRANSFORMERS = "transformers' Qwen3-30B-A3B"


def official_config(quant: str | None = None) -> KeyeVL2Config:
    """The released shape, which is the configuration's own default but for its experts and its indexer; UsageError for a
    quantisation that there is not."""
    config = KeyeVL2Config(
        num_experts=128, sa_config={"indexer_head_dim": 64, "indexer_num_heads": 16, "topk": 2048}
    )
    if quant is not None:
        config.quantization_config = quantization_of(quant).to_dict()
    return config


def random_network(config: KeyeVL2Config) -> KeyeVL2ForConditionalGeneration:
    """The decoder with random bf16 weights on the GPU, quantised where the configuration says so; the vision tower stays
    without memory."""
    with torch.device("meta"):
        model: Any = KeyeVL2ForConditionalGeneration(config)
        model = model.to(torch.bfloat16)
        quantization = quantization_in(config, "bench")
        if quantization is not None:
            replace_modules(model, quantization)
    torch.manual_seed(0)
    for part in (model.model, model.lm_head):
        part.to_empty(device="cuda")
        part.apply(model._init_weights)
    for module in model.modules():
        if isinstance(module, Quantized):
            randomise(module, config.initializer_range)
    with torch.no_grad():
        # As large as what the layers add, or each would multiply the rounding of the one before.
        model.model.embed_tokens.weight.normal_()
    return model.eval()


def randomise(matrix: Quantized, std: float) -> None:
    """Codes of which each is as likely, scaled to weights of about this deviation."""
    limit = torch.iinfo(matrix.codes.dtype).max
    torch.randint(-limit, limit, matrix.codes.shape, out=matrix.codes)
    codes = 1 << CODE_BITS[matrix.method]
    if matrix.zero is not None:
        matrix.zero.fill_(codes // 2)
        matrix.scale.fill_(std * 12**0.5 / codes)
    else:
        # A random byte of FP8 may be NaN, so the lowest bit of each exponent is cleared.
        matrix.codes.bitwise_and_(-0x08080809)
        matrix.scale.fill_(std / 64)


def random_tokens(tokens: int, width: int, like: Tensor | None = None) -> Tensor:
    """Embeddings [1, T, D] of which each is like the one before it; `like` [D] stands before the first."""
    fresh = torch.randn(tokens, width, device="cuda")
    if like is not None:
        fresh[0] = LIKENESS * like + (1 - LIKENESS**2) ** 0.5 * fresh[0]
    # The recurrence x_t = a x_{t-1} + b n_t a block at a time: powers of a stay within range.
    blocks, last = [], fresh[:1]
    for part in fresh[1:].split(256):
        steps = torch.arange(1, len(part) + 1, device="cuda")
        decay = LIKENESS ** (steps[:, None] - steps[None, :]).clamp(min=0)
        mixed = decay.tril() @ (part * (1 - LIKENESS**2) ** 0.5)
        blocks.append(mixed + LIKENESS ** steps[:, None] * last)
        last = blocks[-1][-1:]
    return torch.cat([fresh[:1], *blocks]).bfloat16()[None]


def floor_flops(config: KeyeVL2Config, tokens: int) -> float:
    """The least arithmetic of a prefill: projections, experts, index scores of the causal half, attention of selected keys."""
    assert config.sa_config is not None
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    index = config.sa_config["indexer_num_heads"] * config.sa_config["indexer_head_dim"]
    projections = width * (2 * heads + 2 * groups + index) + width * config.sa_config["indexer_head_dim"]
    experts = config.num_experts_per_tok * 3 * width * config.moe_intermediate_size
    selected = min(config.sa_config["topk"], tokens)
    pairs = 0.5 * tokens * tokens * index + 2 * tokens * selected * heads
    return config.num_hidden_layers * 2.0 * (tokens * (projections + experts) + pairs)


def timed(run: Callable[[], object], repeats: int, *, is_warm: bool = False) -> tuple[float, float]:
    """Median and range, in seconds by the host's clock, of `repeats` runs, after a first one where nothing has run yet."""
    times = []
    if not is_warm:
        run()
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), max(times) - min(times)


def prefill(model: KeyeVL2ForConditionalGeneration, embeds: Tensor, chunk: int) -> Tensor:
    """The last token's hidden state after a prefill in chunks into a new cache."""
    tokens = embeds.shape[1]
    cache = KeyeCache(official_config(), tokens, dtype=torch.bfloat16, device="cuda")
    hidden = embeds
    for begin in range(0, tokens, chunk):
        part = embeds[:, begin : begin + chunk]
        positions = torch.arange(begin, begin + part.shape[1], device="cuda").expand(3, 1, -1)
        hidden = model.decode(part, positions, cache)[:, -1:]
    return hidden


def dense_prefill(model: KeyeVL2ForConditionalGeneration, embeds: Tensor, share: int = 1) -> Tensor:
    """The same weights with dense causal attention, all tokens at once, by the fastest kernel that PyTorch has for it; with
    `share` n only the first n-th of the layers."""
    cache = KeyeCache(official_config(), embeds.shape[1], dtype=torch.bfloat16, device="cuda")
    positions = torch.arange(embeds.shape[1], device="cuda").expand(3, 1, -1)
    layers = model.model.layers
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    model.model.mode = "dense"
    try:
        model.model.layers = layers[: len(layers) // share]
        with sdpa_kernel(order, set_priority=True):
            return model.decode(embeds, positions, cache)[:, -1:]
    finally:
        model.model.mode, model.model.layers = "sparse", layers


@torch.inference_mode()
def measure_prefill(lengths: Sequence[int]) -> Iterator[Measurement]:
    """For each length our prefill against our dense path; then against what transformers takes for the dense model."""
    config = official_config()
    ours = list(prefill_figures(random_network(config), lengths, prefill_chunk_tokens("cuda")))
    yield from ours
    if min(lengths) > TRANSFORMERS_TOKENS:
        return
    # One of the two networks at a time: together they would leave no room for a long prompt.
    gc.collect()
    torch.cuda.empty_cache()
    other = transformers_network(config)
    for tokens, figure in zip(lengths, ours, strict=True):
        if tokens > TRANSFORMERS_TOKENS:
            continue
        run = partial(other, inputs_embeds=random_tokens(tokens, config.hidden_size), logits_to_keep=1)
        baseline_s, _ = timed(run, 1)
        yield replace(figure, baseline=TRANSFORMERS, baseline_s=baseline_s)


def prefill_figures(
    model: KeyeVL2ForConditionalGeneration, lengths: Sequence[int], chunk: int
) -> Iterator[Measurement]:
    """Our prefill of each length, beside our dense path; RuntimeError when its result is not finite."""
    config = official_config()
    for tokens in lengths:
        embeds = random_tokens(tokens, config.hidden_size)
        torch.cuda.reset_peak_memory_stats()
        if not bool(prefill(model, embeds, chunk).isfinite().all()):
            raise RuntimeError("the prefill's result is not finite")
        peak = torch.cuda.max_memory_allocated() / 2**30
        seconds, spread = timed(
            partial(prefill, model, embeds, chunk), 2 if tokens > LONG_TOKENS else 4, is_warm=True
        )
        # All layers take the same time, and of the longest prompts all of them would take minutes.
        share = 4 if tokens > TRANSFORMERS_TOKENS else 1
        dense_s, _ = timed(partial(dense_prefill, model, embeds, share), 1)
        dense_s *= share
        distinct = distinct_keys(model, embeds)
        case = f"{tokens} tokens, {chunk} a chunk, 16 select {distinct:.0f}, peak {peak:.1f} GiB"
        flops = floor_flops(config, tokens)
        dense = "our dense path" if share == 1 else f"our dense path, {share} times a part of its layers"
        yield Measurement("prefill", case, seconds, spread, flops, 0.0, dense, dense_s)


def distinct_keys(model: KeyeVL2ForConditionalGeneration, embeds: Tensor) -> float:
    """How many keys the last 16 tokens select together in the first layer: what the speed of attention hangs on."""
    layer = model.model.layers[0]
    positions = torch.arange(embeds.shape[1], device="cuda").expand(3, 1, -1)
    tables = model.model._index_tables(positions, embeds.dtype)
    assert tables is not None
    assert layer.self_attn.sa_indexer is not None
    q, gates, k = layer.self_attn.sa_indexer(layer.input_layernorm(embeds), *tables)
    lists = dispatch.select_keys(q[:, -16:], gates[:, -16:], k, layer.self_attn.top_k)
    return float(len(torch.unique(lists[lists >= 0])))


def transformers_network(config: KeyeVL2Config) -> Any:
    """Qwen3-30B-A3B of transformers with random bf16 weights: the same decoder without an indexer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "max_position_embeddings",
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{name: getattr(config, name) for name in names}))
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        # Made by its constructor, not read from a file.
        rotary = model.model.rotary_emb
        rotary.inv_freq.copy_(
            10_000.0 ** -(torch.arange(0, config.head_dim, 2, device="cuda") / config.head_dim)
        )
    return model.eval()


@torch.inference_mode()
def measure_decode(
    lengths: Sequence[int], quant: str | None = None, kv: str | None = None
) -> Iterator[Measurement]:
    """Tokens one after the other, chosen on the device, batch 1, behind caches of these lengths; the baseline is one token of
    the same network without its graph."""
    config = official_config(quant)
    model = random_network(config)
    weights = active_bytes(model)
    name = "decoding" + (f", {quant}" if quant else "") + (f", kv {kv}" if kv else "")
    for tokens in lengths:
        cache = filled_cache(config, tokens + 2 * DECODE_STEPS + 8, fp8_kv=choose_kv(kv) == "fp8")
        cache.advance(tokens)
        check_step(model, cache)
        static = StaticDecoder(model, cache)
        seconds, spread = timed(partial(steps, static, cache, tokens), 5)
        eager_s, _ = timed(partial(step_eagerly, model, cache, tokens), 3)
        # Every index key is read, and the selected keys and values.
        width = cache.k.element_size()
        moved = weights + config.num_hidden_layers * (
            2.0 * tokens * 64 + 2.0 * min(tokens, 2048) * 512 * width
        )
        yield Measurement(
            name, f"1 token behind {tokens}: {DECODE_STEPS / seconds:.0f} a second", seconds / DECODE_STEPS,
            spread / DECODE_STEPS, 0.0, moved, "without a graph", eager_s,
        )  # fmt: skip
        del static, cache


def filled_cache(config: KeyeVL2Config, room: int, *, fp8_kv: bool = False) -> KeyeCache:
    kv_dtype = torch.float8_e4m3fn if fp8_kv else None
    cache = KeyeCache(config, room, dtype=torch.bfloat16, device="cuda", kv_dtype=kv_dtype)
    assert cache.index_k is not None
    for buffer in (cache.k, cache.v, cache.index_k):
        for layer in buffer:
            layer.copy_(torch.randn(layer.shape, dtype=torch.bfloat16, device="cuda"))
    return cache


@torch.no_grad()
def measure_adapted_decode(
    lengths: Sequence[int], rank: int, quant: str | None = None, kv: str | None = None
) -> Iterator[Measurement]:
    """The same for one sequence and for several branches of one, with an adapter of this rank in place on attention and experts;
    the baseline is the same network before it had one."""
    settings, config = LoraSettings(rank=rank), official_config(quant)
    model = random_network(config)
    cases = [(tokens, count) for tokens in lengths for count in ADAPTED_BRANCHES]
    before = [timed_branches(model, tokens, count, kv)[0] for tokens, count in cases]
    add_random_lora(model, settings)
    cache = filled_cache(config, lengths[0] + 1, fp8_kv=choose_kv(kv) == "fp8")
    cache.advance(lengths[0])
    check_step(model, cache)
    name = f"decoding, rank {rank}" + (f", {quant}" if quant else "") + (f", kv {kv}" if kv else "")
    for (tokens, count), baseline_s in zip(cases, before, strict=True):
        seconds, spread = timed_branches(model, tokens, count, kv)
        rates = [count * DECODE_STEPS / time_s for time_s in (seconds, baseline_s)]
        yield Measurement(
            name, f"{count} side by side behind {tokens}: {rates[0]:.0f} a second, {rates[1]:.0f} without",
            seconds / DECODE_STEPS, spread / DECODE_STEPS, 0.0, 0.0, "without adapters", baseline_s / DECODE_STEPS,
        )  # fmt: skip


def add_random_lora(model: KeyeVL2ForConditionalGeneration, settings: LoraSettings) -> None:
    """An adapter in fp32 that changes something."""
    add_lora(model, settings)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("_B"):
            parameter.normal_(0, 0.01)


def timed_branches(
    model: KeyeVL2ForConditionalGeneration, tokens: int, count: int, kv: str | None
) -> tuple[float, float]:
    """Median and range, in seconds, of DECODE_STEPS steps of `count` branches behind this many tokens."""
    branches = Branches(tokens, 2 * DECODE_STEPS + 8, count)
    cache = filled_cache(official_config(), branches.rows, fp8_kv=choose_kv(kv) == "fp8")
    cache.advance(tokens)
    static = StaticDecoder(model, cache, branches if count > 1 else None)
    return timed(partial(steps, static, cache, tokens, count), 5)


def steps(static: StaticDecoder, cache: KeyeCache, length: int, count: int = 1) -> None:
    """DECODE_STEPS tokens of each sequence behind the first `length`, each the likeliest after the one before it."""
    cache.truncate(length)
    static.begin([length] * count, [length] * count)
    token = torch.ones(count, dtype=torch.int64, device="cuda")
    settings = [GenerationSettings(max_tokens=DECODE_STEPS)] * count
    sampler = Sampler(settings, official_config().vocab_size, "cuda")
    for _ in range(DECODE_STEPS):
        token, _ = sampler.pick(static.step(token))


def step_eagerly(model: KeyeVL2ForConditionalGeneration, cache: KeyeCache, length: int) -> Tensor:
    """The logits behind one token at place `length`, by `model.decode`."""
    cache.truncate(length)
    ids = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    positions = torch.full((3, 1, 1), length, device="cuda")
    return model.logits(model.decode(model.embed(ids), positions, cache))[0, 0]


def check_step(model: KeyeVL2ForConditionalGeneration, cache: KeyeCache) -> None:
    """RuntimeError unless a step from the graph gives the logits of `model.decode`, but for rounding through 48 layers, which
    also turns choices between experts and keys that are nearly equal."""
    length = cache.length
    expected = step_eagerly(model, cache, length)
    cache.truncate(length)
    static = StaticDecoder(model, cache)
    static.begin([length], [length])
    actual = static.step(torch.ones(1, dtype=torch.int64, device="cuda"))[0]
    likeness = float(torch.nn.functional.cosine_similarity(actual.double(), expected.double(), dim=0))
    if not likeness > 0.9:
        raise RuntimeError(f"a step's logits have cosine {likeness:.4f} with those of the model")


def active_bytes(model: KeyeVL2ForConditionalGeneration) -> float:
    """What one token reads of the weights: everything of a layer but the experts it is not routed to, and the language head."""
    total = float(held_bytes(model.lm_head))
    for layer in model.model.layers:
        experts = held_bytes(layer.mlp.experts)
        total += held_bytes(layer) - experts * (1 - layer.mlp.top_k / layer.mlp.gate.out_features)
    return total


def held_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
