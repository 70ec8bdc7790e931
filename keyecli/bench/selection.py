"""Indexer scores, selection, both together, and one decoding step, in the shape of the 30B model (bf16, J 16, e 64, k 2048)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from keyecli.bench.measure import Measurement, captured, relative_error, time_device
from keyecli.kernels import indexer, reference, selection
from keyecli.kernels.device import device_capability

QUERIES = 1024
HEADS, DIM, TOP_K = 16, 64, 2048
CHECKED_QUERIES = 8
BUDGET_S = 0.1
BASELINE_BUDGET_S = 0.05


def measure(lengths: Sequence[int]) -> Iterator[Measurement]:
    """For each length: 1024 queries at its end against all its keys, then one query. A result is checked before it is timed."""
    for keys in lengths:
        yield from measure_length(keys, min(QUERIES, keys))


def measure_length(keys: int, queries: int) -> Iterator[Measurement]:
    """All measurements of one length."""
    generator = torch.Generator("cuda").manual_seed(keys)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    q, w, k = randn(1, queries, HEADS, DIM), randn(1, queries, HEADS), randn(1, keys, DIM)
    case = f"{queries} queries × {keys} keys"
    first = keys - queries
    pairs = float(queries) * keys
    flops = 2.0 * pairs * HEADS * DIM
    score_bytes = 4.0 * pairs

    out = torch.empty((1, queries, indexer.padded_length(keys)), device="cuda")
    scores = out[:, :, :keys]
    check_scores(q, w, k)
    seconds, spread = time_device(lambda: indexer.score_into(out, q, w, k, offset=first), BUDGET_S)
    bf16_seconds = seconds
    baseline, _ = time_device(lambda: torch_scores(q[:, :64], w[:, :64], k), BASELINE_BUDGET_S)
    yield Measurement(
        "index scores, bf16", case, seconds, spread, flops, score_bytes,
        "torch, a head at a time (64 queries, scaled)", baseline * queries / 64,
    )  # fmt: skip

    if device_capability(q.device) >= 89:
        (q8, q_scale), (k8, k_scale) = indexer.quantise_index(q), indexer.quantise_index(k)
        check_scores(q8, w, k8, q_scale, k_scale)
        seconds, spread = time_device(
            lambda: indexer.score_into(out, q8, w, k8, q_scale=q_scale, k_scale=k_scale, offset=first),
            BUDGET_S,
        )
        # FP8 units are twice as fast, so half as many operations count at the rate of bf16.
        yield Measurement(
            "index scores, FP8", case, seconds, spread, flops / 2, score_bytes, "index scores, bf16", bf16_seconds
        )  # fmt: skip

    # Random scores are all in sight of the last position; a query a batch row, so that every row is as long as the keys.
    indexer.score_into(out, q, w, k, masked=False)
    rows = scores.transpose(0, 1)
    check_selection(rows)
    seconds, spread = time_device(lambda: selection.select_scored(rows, TOP_K, offset=keys - 1), BUDGET_S)
    baseline, _ = time_device(lambda: scores.topk(TOP_K, dim=-1, sorted=False), BASELINE_BUDGET_S)
    yield Measurement(
        "selection", case, seconds, spread, 0.0, score_bytes + 4.0 * queries * TOP_K, "torch.topk", baseline
    )
    topk_seconds = baseline

    check_together(q, w, k)
    seconds, spread = time_device(lambda: selection.select_keys(q, w, k, TOP_K), BUDGET_S)
    yield Measurement(
        "scores and selection", f"{case}, {workspace_mib(q, w, k):.0f} MiB", seconds, spread, flops, 2.0 * score_bytes,
        "our scores, then torch.topk", bf16_seconds + topk_seconds,
    )  # fmt: skip
    yield from measure_decode(q[:, -1:], w[:, -1:], k)


def measure_decode(q: Tensor, w: Tensor, k: Tensor) -> Iterator[Measurement]:
    """One query, as a captured graph with its position on the device, against torch's scores and topk captured alike."""
    keys = k.shape[1]
    positions = torch.tensor([keys - 1], dtype=torch.int32, device="cuda")
    step = captured(lambda: selection.select_keys(q, w, k, TOP_K, first_query=positions))
    baseline_step = captured(lambda: torch_scores(q, w, k).topk(TOP_K, dim=-1, sorted=False))
    seconds, spread = time_device(step, BUDGET_S)
    baseline, _ = time_device(baseline_step, BASELINE_BUDGET_S)
    yield Measurement(
        "scores and selection, decoding", f"1 query × {keys} keys", seconds, spread, 2.0 * keys * HEADS * DIM,
        2.0 * keys * DIM, "torch, a head at a time, then torch.topk", baseline,
    )  # fmt: skip


def torch_scores(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """The scores as plain torch computes them fastest without a kernel: bf16 products, fp32 sums."""
    keys = k.transpose(1, 2)
    scores = torch.zeros(1, device=q.device)
    for head in range(q.shape[2]):
        scores = scores + torch.relu(q[:, :, head] @ keys) * w[:, :, head, None].float()
    return scores * DIM**-0.5


def workspace_mib(q: Tensor, w: Tensor, k: Tensor) -> float:
    """The memory that a selection takes beside its arguments and its lists."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lists = selection.select_keys(q, w, k, TOP_K)
    return (torch.cuda.max_memory_allocated() - before - lists.nbytes) / 2**20


def check_scores(
    q: Tensor, w: Tensor, k: Tensor, q_scale: Tensor | None = None, k_scale: Tensor | None = None
) -> None:
    """Raise unless the scores of the last queries are the definition's."""
    part = slice(-CHECKED_QUERIES, None)
    scales = (None, None) if q_scale is None else (q_scale[:, part], k_scale)
    actual = indexer.index_scores(q[:, part], w[:, part], k, *scales)
    error = relative_error(actual, reference.index_scores(q[:, part], w[:, part], k, *scales))
    if not error < (1e-5 if q_scale is None else 2e-3):
        raise ValueError(f"indexer scores are off by {error:.3g}")


def check_selection(rows: Tensor) -> None:
    """Raise unless the lists are the definition's for the very scores. rows: [queries, 1, S], everything in sight."""
    lists = selection.select_scored(rows, TOP_K, offset=rows.shape[2] - 1)[:CHECKED_QUERIES]
    visible = torch.ones((1, 1, 1), dtype=torch.bool, device=rows.device)
    selected = reference.select_top_k(rows[:CHECKED_QUERIES], visible, TOP_K)
    if not torch.equal(lists, reference.selected_indices(selected, TOP_K).int()):
        raise ValueError("selected keys are not the definition's")


def check_together(q: Tensor, w: Tensor, k: Tensor) -> None:
    """Raise unless the lists agree with the definition's but for keys whose scores the order of summation may swap."""
    part = slice(-CHECKED_QUERIES, None)
    actual = selection.select_keys(q, w, k, TOP_K)[:, part]
    expected = reference.select_keys(q[:, part], w[:, part], k, TOP_K)
    for mine, theirs in zip(actual[0].tolist(), expected[0].tolist(), strict=True):
        if len(set(mine) ^ set(theirs)) > 4:
            raise ValueError(
                f"{len(set(mine) - set(theirs))} selected keys of a query are not the definition's"
            )
