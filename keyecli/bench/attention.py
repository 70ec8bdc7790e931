"""Sparse attention of the 30B shape on this GPU, against PyTorch's dense attention and between its own methods."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keyecli.bench.measure import Measurement, captured, require_equal, time_device
from keyecli.kernels import attention, decode, reference, selection, unions
from keyecli.kernels.device import device_capability

HEADS, GROUPS, DIM, TOP_K = 32, 4, 128, 2048
INDEX_HEADS, INDEX_DIM = 16, 64
# Queries are timed a slice at a time: what a slice costs follows from how many keys stand before it.
SLICE_QUERIES = 4096
# The indexer's scores are made and looked through for so many queries at a time.
INDEX_QUERIES = 4096
# Where the slices of a layer's estimate have their middle: the midpoint rule, exact for dense attention.
MIDPOINTS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
# Caches that decoding goes through in turn, so that their selected rows are more than the second-level cache holds.
DECODE_LAYERS = 16
TIME_BUDGET_S = 0.05
# A whole layer of dense attention is repeated for so long, but at least twice.
LAYER_BUDGET_S = 0.5
LONGEST_GRADIENT = 32_768


def measure(lengths: Sequence[int]) -> Iterator[Measurement]:
    """Prefill slices, a layer's sum of them, gradients up to 32K, and decoding, for each length."""
    for length in lengths:
        yield from measure_prefill(length)
        yield from measure_decode(length)


def random_selection(first: int, queries: int, keys: int) -> Tensor:
    """Lists as an indexer gives them, int32 [1, queries, min(2048, keys)], of the queries at positions `first` and on.

    The score of a key is its lasting importance plus interest that turns slowly with the query plus noise of every pair,
    weighted so that 16 neighbouring queries select about 8K distinct keys of 128K.
    """
    waves = 64
    importance = torch.randn(keys, device="cuda")
    interest = torch.randn(waves, keys, device="cuda")
    turns = torch.rand(waves, device="cuda") * (2 * torch.pi / 200)
    phases = torch.rand(waves, device="cuda") * (2 * torch.pi)
    length = min(TOP_K, keys)
    lists = []
    for begin in range(first, first + queries, 256):
        positions = torch.arange(begin, min(begin + 256, first + queries), device="cuda")
        weights = torch.cos(positions[:, None] * turns + phases) * (2 / waves) ** 0.5
        scores = (
            importance + 0.7 * (weights @ interest) + 0.5 * torch.randn(len(positions), keys, device="cuda")
        )
        hidden = torch.arange(keys, device="cuda") > positions[:, None]
        ranked = scores.masked_fill_(hidden, float("-inf")).topk(length, dim=-1)
        chosen = torch.where(ranked.values.isneginf(), keys, ranked.indices).sort(dim=-1).values
        lists.append(chosen.masked_fill(chosen == keys, -1).to(torch.int32))
    return torch.cat(lists)[None]


def least_work(indices: Tensor) -> tuple[float, float]:
    """The fewest operations and bytes of the definition: two products a selected key and head; every selected row of K and V,
    queries, outputs and lists once."""
    queries = indices.shape[1]
    selected = float((indices >= 0).sum())
    distinct = len(torch.unique(indices[indices >= 0]))
    flops = 4 * selected * HEADS * DIM
    moved = 2 * 2 * distinct * GROUPS * DIM + 2 * 2 * queries * HEADS * DIM + 4 * queries * HEADS
    return flops, float(moved + indices.numel() * indices.element_size())


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, causal: bool = False
) -> Callable[[], Tensor]:
    """PyTorch's attention of every query over all the keys given, or, with as many queries as keys, over those up to its own:
    q [B, T, H, d], k and v [B, S, G, d].

    Keys and values are repeated for every head, before the time is taken, where the backend has no grouped form.
    """

    def attend(keys: Tensor, values: Tensor, grouped: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                is_causal=causal,
                enable_gqa=grouped,
            )

    try:
        attend(k, v, True)
    except RuntimeError:
        ratio = q.shape[2] // k.shape[2]
        keys, values = (x.repeat_interleave(ratio, dim=2) for x in (k, v))
        return lambda: attend(keys, values, False)
    return lambda: attend(k, v, True)


def seen_on_average(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
    """Dense attention of the last queries over as many keys as they see on average: the work of the causal form, which
    PyTorch has only for as many queries as keys."""
    keys = k.shape[1] - q.shape[1] // 2
    return dense_attention(q, k[:, :keys], v[:, :keys], backend)


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def measure_prefill(length: int) -> Iterator[Measurement]:
    """The last slice by every method and backend, then a whole layer."""
    queries = min(SLICE_QUERIES, length // 4)
    k, v = random_tensor(1, length, GROUPS, DIM), random_tensor(1, length, GROUPS, DIM)
    q = random_tensor(1, queries, HEADS, DIM)
    indices = random_selection(length - queries, queries, length)
    check_prefill(q, k, v, indices)
    yield from measure_slice(q, k, v, indices)
    if length <= LONGEST_GRADIENT:
        yield measure_gradient(q, k, v, indices)

    yield from measure_layer(q, k, v)


def measure_layer(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Measurement]:
    """What all queries of a prompt take in one layer, from slices: attention alone, and with the indexer's scores and the
    selection, which a dense layer does without. The dense layer is also one call over all."""
    length, queries = k.shape[1], q.shape[1]
    attention_s = attention_spread_s = index_s = index_spread_s = dense_s = flops = moved = index_flops = 0.0
    for midpoint in MIDPOINTS:
        end = int(midpoint * length) + queries // 2
        k_seen, v_seen = k[:, :end], v[:, :end]
        indices = random_selection(end - queries, queries, end)
        least = least_work(indices)
        run = partial(attention.sparse_attention, q, k_seen, v_seen, indices)
        seconds, spread = time_device(run, TIME_BUDGET_S)
        dense = seen_on_average(q, k_seen, v_seen, SDPBackend.CUDNN_ATTENTION)
        dense_s += time_device(dense, TIME_BUDGET_S)[0]
        attention_s, attention_spread_s = attention_s + seconds, attention_spread_s + spread
        flops, moved = flops + least[0], moved + least[1]
        seconds, spread = measure_index(int(midpoint * length) + INDEX_QUERIES // 2)
        index_s, index_spread_s = index_s + seconds, index_spread_s + spread
        index_flops += 2.0 * INDEX_QUERIES * midpoint * length * INDEX_HEADS * INDEX_DIM
    share = length / (len(MIDPOINTS) * queries)
    index_share = length / (len(MIDPOINTS) * INDEX_QUERIES)
    whole_s = whole_layer(length)
    baselines = {"cuDNN dense causal, same slices": share * dense_s}
    if whole_s is not None:
        baselines["cuDNN dense causal, whole layer"] = whole_s
    case = f"layer of {length} tokens, midpoint rule over {len(MIDPOINTS)} slices"
    for name, seconds in baselines.items():
        yield Measurement(
            "sparse attention, chosen method", case, share * attention_s, share * attention_spread_s,
            share * flops, share * moved, name, seconds,
        )  # fmt: skip
    for name, seconds in baselines.items():
        yield Measurement(
            "index, selection and attention", case, share * attention_s + index_share * index_s,
            share * attention_spread_s + index_share * index_spread_s,
            share * flops + index_share * index_flops, share * moved, name, seconds,
        )  # fmt: skip


def measure_index(keys: int) -> tuple[float, float]:
    """Seconds and spread of scores and selection for the last 1024 queries of so many keys."""
    queries = min(INDEX_QUERIES, keys)
    q, w = random_tensor(1, queries, INDEX_HEADS, INDEX_DIM), random_tensor(1, queries, INDEX_HEADS)
    k = random_tensor(1, keys, INDEX_DIM)
    return time_device(partial(selection.select_keys, q, w, k, TOP_K), TIME_BUDGET_S)


def whole_layer(length: int) -> float | None:
    """Median seconds of dense causal attention of every query of a prompt in one call; None where memory does not hold it."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    try:
        q = random_tensor(1, length, HEADS, DIM)
        k, v = random_tensor(1, length, GROUPS, DIM), random_tensor(1, length, GROUPS, DIM)
        attend = dense_attention(q, k, v, SDPBackend.CUDNN_ATTENTION, causal=True)
        attend()
        while len(times) < 2 or sum(times) < LAYER_BUDGET_S:
            first.record()
            attend()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
    except torch.OutOfMemoryError:
        return None
    return statistics.median(times)


def check_prefill(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> None:
    """Every method and the probabilities against the definition, at 64 queries of the slice."""
    sample = torch.randperm(q.shape[1], device="cuda")[:64]
    exact = reference.attend_indices(q[:, sample].float(), k, v, indices[:, sample])
    methods: tuple[attention.Method, ...] = ("gather", "union", "dense")
    for method in methods:
        out, lse = attention.sparse_attention(q, k, v, indices, method)
        require_equal(out[:, sample], exact[0], f"{method} output")
        require_equal(lse[:, sample], exact[1], f"{method} log-sum-exp")
    expected = reference.selected_probabilities(q[:, sample].float(), k, indices[:, sample], exact[1])
    require_equal(attention.selected_probabilities(q, k, indices, lse)[:, sample], expected, "probabilities")


def measure_slice(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Iterator[Measurement]:
    """Each method on the last queries, the lists that the union method builds first, and the probabilities."""
    length, queries = k.shape[1], q.shape[1]
    of_group = queries_of_group(q, k)

    def lists() -> list[Tensor]:
        return [chunk.unions().counts for chunk in unions.chunks(indices, length, of_group, "unions")]

    distinct = float(torch.cat(lists()).float().mean())
    case = f"last {queries} of {length}, {distinct:.0f} distinct keys for {of_group} queries"
    flops, moved = least_work(indices)
    backends = {"cuDNN dense": SDPBackend.CUDNN_ATTENTION, "Flash dense": SDPBackend.FLASH_ATTENTION}
    dense = {
        name: time_device(seen_on_average(q, k, v, backend), TIME_BUDGET_S)[0]
        for name, backend in backends.items()
    }
    methods: tuple[attention.Method, ...] = ("gather", "union", "dense")
    times = {
        method: time_device(partial(attention.sparse_attention, q, k, v, indices, method), TIME_BUDGET_S)
        for method in methods
    }
    for method in methods:
        for name, seconds in dense.items():
            yield Measurement(
                f"sparse attention, {method}", case, *times[method], flops, moved, name, seconds
            )
    yield Measurement(
        "sparse attention, union", case, *times["union"], flops, moved, "gather", times["gather"][0]
    )
    moved = 4.0 * indices.numel() + 8 * distinct * queries / of_group
    yield Measurement("lists of the union method", case, *time_device(lists, TIME_BUDGET_S), 0.0, moved)
    _, lse = attention.sparse_attention(q, k, v, indices)
    probabilities = time_device(lambda: attention.selected_probabilities(q, k, indices, lse), TIME_BUDGET_S)
    yield Measurement("selected probabilities", case, *probabilities, flops / 2, 8.0 * indices.numel())


def queries_of_group(q: Tensor, k: Tensor) -> int:
    """Queries of a group in the union method's forward pass."""
    cut = attention.tiles(device_capability(q.device), q.element_size())
    return cut.attend.queries_of(q.shape[2] // k.shape[2])


def measure_gradient(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Measurement:
    """Forward and backward of the last queries; the least work of the backward pass is five products for the forward's two."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    towards = torch.randn_like(q)
    attend = seen_on_average(q, k, v, SDPBackend.FLASH_ATTENTION)

    def sparse() -> None:
        out, _ = attention.sparse_attention(q, k, v, indices)
        torch.autograd.grad(out, (q, k, v), towards)

    def dense() -> None:
        torch.autograd.grad(attend(), (q, k, v), towards.transpose(1, 2))

    flops, moved = least_work(indices)
    return Measurement(
        "sparse attention, forward and backward", f"last {q.shape[1]} of {k.shape[1]}",
        *time_device(sparse, TIME_BUDGET_S), 3.5 * flops, 3 * moved,
        "Flash dense, forward and backward", time_device(dense, TIME_BUDGET_S)[0],
    )  # fmt: skip


def measure_decode(length: int) -> Iterator[Measurement]:
    """One token of one sequence, the mean over a graph of several layers."""
    caches = [
        (random_tensor(1, length, GROUPS, DIM), random_tensor(1, length, GROUPS, DIM))
        for _ in range(DECODE_LAYERS)
    ]
    q = random_tensor(1, 1, HEADS, DIM)
    lists = [
        torch.randperm(length, device="cuda")[:TOP_K].sort().values.to(torch.int32)[None, None]
        for _ in caches
    ]
    out, workspace = torch.empty_like(q), decode.decode_workspace(q, caches[0][0], lists[0])
    for (k, v), chosen in zip(caches[:2], lists, strict=False):
        expected, _ = reference.attend_indices(q.float(), k, v, chosen)
        require_equal(decode.decode_attention(q, k, v, chosen, out, workspace), expected, "decode")

    def sparse() -> None:
        for (k, v), chosen in zip(caches, lists, strict=True):
            decode.decode_attention(q, k, v, chosen, out, workspace)

    def dense() -> None:
        for k, v in caches:
            F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
            )

    seconds, spread = time_device(captured(sparse), TIME_BUDGET_S)
    dense_s, _ = time_device(captured(dense), TIME_BUDGET_S)
    flops, moved = least_work(lists[0])
    yield Measurement(
        "sparse decode attention", f"1 token at {length}, mean of {DECODE_LAYERS} layers",
        seconds / DECODE_LAYERS, spread / DECODE_LAYERS, flops, moved, "dense decode", dense_s / DECODE_LAYERS,
    )  # fmt: skip

    index_q, gates = random_tensor(1, 1, INDEX_HEADS, INDEX_DIM), random_tensor(1, 1, INDEX_HEADS)
    index_keys = [random_tensor(1, length, INDEX_DIM) for _ in caches]
    place = torch.tensor([length - 1], dtype=torch.int32, device="cuda")

    def step() -> None:
        for (k, v), index_k in zip(caches, index_keys, strict=True):
            chosen = selection.select_keys(index_q, gates, index_k, TOP_K, first_query=place)
            decode.decode_attention(q, k, v, chosen, out, workspace)

    step()
    chosen = selection.select_keys(index_q, gates, index_keys[-1], TOP_K)
    expected, _ = reference.attend_indices(q.float(), *caches[-1], chosen)
    require_equal(out, expected, "decode after selection")
    seconds, spread = time_device(captured(step), TIME_BUDGET_S)
    yield Measurement(
        "scores, selection and decode attention", f"1 token at {length}, mean of {DECODE_LAYERS} layers",
        seconds / DECODE_LAYERS, spread / DECODE_LAYERS, flops, moved + 2.0 * length * INDEX_DIM, "dense decode",
        dense_s / DECODE_LAYERS,
    )  # fmt: skip
