"""Every costly operation in plain PyTorch: the definition, the CPU path and the oracle of the tests.

B batch, T queries, S keys, H query heads, G key/value heads, d head dim, J indexer heads, e indexer dim,
K most keys a query selects, N frames, P patches a frame, R routed rows, E experts, F expert width, D model width.
Queries are always the last T of the S positions: query row t stands at position S − T + t.

Keys and values that attention reads may be FP8 (float8_e4m3fn, see `stored`): converting them to the queries' type, which is
exact, is the definition. No gradient reaches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Above this many keys for each one selected, gathering the selected keys beats computing all of them under a mask.
GATHER_CROSSOVER = 8
GATHER_WORKSPACE_BYTES = 256 * 2**20
SELECTION_WORKSPACE_BYTES = 256 * 2**20
FP8_LARGEST = 448.0
# Columns that make up 16 bytes in every type that grouped products take.
GROUPED_ALIGNMENT = 8

# A and B of a low-rank addition A · B to a matrix [in, out], or to one for each expert: […, in, r] and […, r, out].
LowRank = tuple[Tensor, Tensor]


class Added(NamedTuple):
    """What an adapter adds to the outputs of a linear layer from `begin` on: scale · B · (A x).

    first: A [r, K]; second: B [n, r], of any floating type.
    """

    first: Tensor
    second: Tensor
    scale: float
    begin: int = 0


PADDING_SEGMENT = -1
SHARED_SEGMENT = 0


def visible_keys(
    queries: int,
    keys: int,
    device: torch.device,
    segments: Tensor | None = None,
    first_query: int | None = None,
) -> Tensor:
    """Which keys each query may see, before any selection.

    Causal always. With segments [B, S] (int) a key is visible when it is in the query's own segment or in segment 0, the
    prefix that all share; so packed documents are segments 1, 2, … and several answers to one video are segments after a
    shared 0. Segment −1 is padding: seen by nobody. Every query sees itself, so no row is empty.
    Returns bool [1 or B, queries, keys]; `first_query` is the position of the first query (default: keys − queries).
    """
    first = keys - queries if first_query is None else first_query
    query_positions = torch.arange(first, first + queries, device=device)[:, None]
    key_positions = torch.arange(keys, device=device)[None, :]
    visible = (key_positions <= query_positions)[None]
    if segments is None:
        return visible
    query_segments = segments[:, first : first + queries, None]
    key_segments = segments[:, None, :keys]
    allowed = (key_segments == query_segments) | (key_segments == SHARED_SEGMENT)
    allowed = allowed & (key_segments != PADDING_SEGMENT)
    return (visible & allowed) | (key_positions == query_positions)[None]


def hadamard_matrix(dim: int, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix, unscaled: entry (i, j) is −1 to the number of ones in i & j. fp32 [dim, dim]."""
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"a Hadamard matrix needs a power of two, not {dim}")
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of type `dtype` holds them: float8_e4m3fn rounded to the nearest, ties to even, else converted.

    FP8 has three bits of mantissa (a relative error of at most 1/16), saturates at ±448, infinities too, and keeps NaN; there
    are no scales. Below 2⁻⁶ its steps are all 2⁻⁹, and what is below 2⁻¹⁰ becomes 0. Keys are normalised, to a root mean square
    of about their norm's weights, and lose little; values are what they are: small ones beside large ones lose most, and a
    head whose values are all below a thousandth is lost. No gradients pass: ValueError where one is wanted.
    """
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("an FP8 cache has no gradients: keep keys and values in the model's type")
    return x.float().clamp(-FP8_LARGEST, FP8_LARGEST).to(dtype)


def quantise_index(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indexer queries or keys [..., e] as the release stores them: rotated by the orthonormal Hadamard matrix, then FP8.

    The rotation leaves every dot product as it is and spreads outliers over the row. Returns float8_e4m3fn [..., e] and
    fp32 scales [...], for each row the smallest power of two that brings it within ±448 (1 for a row of zeros); a value
    times its row's scale is the rotated entry. A power of two, so that scaling never rounds.
    """
    dim = x.shape[-1]
    rotated = (x.float() @ hadamard_matrix(dim, x.device)) * dim**-0.5
    ratio = rotated.abs().amax(-1) * (1 / FP8_LARGEST)
    mantissa, exponent = torch.frexp(ratio)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-100)
    # Written as bits: a power function need not be exact on every device.
    power = ((exponent + 127) << 23).view(torch.float32)
    scale = torch.where(ratio > 0, power, 1.0)
    values = (rotated / scale[..., None]).clamp(-FP8_LARGEST, FP8_LARGEST)
    return values.to(torch.float8_e4m3fn), scale


def index_scores(
    q: Tensor, w: Tensor, k: Tensor, q_scale: Tensor | None = None, k_scale: Tensor | None = None
) -> Tensor:
    """The lightning indexer: I[t, s] = e^(−1/2) · Σ_j w[t, j] · max(0, q[t, j] · k[s]).

    q: [B, T, J, e]; w: [B, T, J], any sign; k: [B, S, e], shared by the heads. FP8 rows of `quantise_index` come with
    their scales, q_scale [B, T, J] and k_scale [B, S]. Returns fp32 [B, T, S], all keys, unmasked.
    Products are those of the stored values and all sums fp32, so that another order of summation is all that a kernel may
    change. One head at a time, so the workspace is a few times the result.
    """
    keys = k.float() if k_scale is None else k.float() * k_scale[..., None]
    keys = keys.transpose(1, 2)
    gates = w.float() if q_scale is None else w.float() * q_scale
    scores = torch.zeros(1, dtype=torch.float32, device=q.device)
    for head in range(q.shape[2]):
        similarity = torch.relu(q[:, :, head].float() @ keys)
        scores = scores + similarity * gates[:, :, head, None]
    return scores * q.shape[-1] ** -0.5


def selected_scores(q: Tensor, w: Tensor, k: Tensor, indices: Tensor) -> Tensor:
    """`index_scores` of the keys on each query's list alone, differentiable: q [B, T, J, e], w [B, T, J], k [B, S, e],
    indices int [B, T, K] → fp32 [B, T, K], of no meaning at −1. Each query has a copy of its K keys."""
    rows = torch.arange(len(k), device=k.device)[:, None, None]
    keys = k[rows, indices.clamp(min=0).long()].float()
    similarity = torch.relu(torch.einsum("btje,btke->btjk", q.float(), keys))
    return torch.einsum("btjk,btj->btk", similarity, w.float()) * q.shape[-1] ** -0.5


def select_top_k(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """The `top_k` highest visible keys of every query; of equal scores the lower index first, always.

    scores: fp32 [B, T, S]; visible: bool, broadcastable to it. A query with at most `top_k` visible keys selects them all.
    Returns bool [B, T, S].
    """
    visible = visible.expand_as(scores)
    if scores.shape[-1] <= top_k:
        return visible
    masked = scores.masked_fill(~visible, float("-inf"))
    threshold = masked.topk(top_k, dim=-1).values[..., -1:]
    above = masked > threshold
    tied = (masked == threshold) & visible
    room = top_k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def selected_indices(selected: Tensor, top_k: int) -> Tensor:
    """A selection mask [B, T, S] as ascending key indices, int64 [B, T, min(top_k, S)], −1 where a query has fewer."""
    keys = selected.shape[-1]
    positions = torch.arange(keys, device=selected.device).expand_as(selected)
    ranked = (
        torch.where(selected, positions, keys)
        .topk(min(top_k, keys), dim=-1, largest=False, sorted=True)
        .values
    )
    return ranked.masked_fill(ranked == keys, -1)


def select_keys(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    top_k: int,
    segments: Tensor | None = None,
    first_query: int | Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """The keys that every query attends to: the `top_k` best of `index_scores` among `visible_keys`, ties to the lower index.

    q, w, k and the scales as in `index_scores`; k may be the filled part of a longer buffer. segments: int [B, S] as in
    `visible_keys`. first_query: the position of the first query, S − T by default; an int tensor [B] gives every batch row
    its own (static buffers, rows of unequal length). Returns int32 [B, T, min(top_k, S)]: ascending, −1 behind the last.
    Queries go in chunks whose scores and masks stay within `SELECTION_WORKSPACE_BYTES`.
    """
    if isinstance(first_query, Tensor):
        rows = [
            select_keys(
                q[b : b + 1],
                w[b : b + 1],
                k[b : b + 1],
                top_k,
                None if segments is None else segments[b : b + 1],
                int(first_query[b]),
                None if q_scale is None else q_scale[b : b + 1],
                None if k_scale is None else k_scale[b : b + 1],
            )
            for b in range(len(q))
        ]
        return torch.cat(rows)
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    first = keys - queries if first_query is None else first_query
    chunk = max(1, SELECTION_WORKSPACE_BYTES // (64 * batch * keys))
    lists = []
    for begin in range(0, queries, chunk):
        end = min(begin + chunk, queries)
        part = None if q_scale is None else q_scale[:, begin:end]
        scores = index_scores(q[:, begin:end], w[:, begin:end], k, part, k_scale)
        visible = visible_keys(end - begin, keys, q.device, segments, first + begin)
        selected = select_top_k(scores, visible, top_k)
        lists.append(selected_indices(selected, top_k).to(torch.int32))
    return torch.cat(lists, dim=1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention over the keys that `mask` names, all keys computed.

    q: [B, T, H, d]; k, v: [B, S, G, d]; mask: bool [B or 1, T, S], no empty row. Returns [B, T, H, d].
    """
    if k.dtype == torch.float8_e4m3fn:
        # A head at a time, so that no converted copy of a whole cache exists.
        ratio = q.shape[2] // k.shape[2]
        heads = [
            masked_attention(part, k[:, :, g : g + 1].to(q.dtype), v[:, :, g : g + 1].to(q.dtype), mask)
            for g, part in enumerate(q.split(ratio, dim=2))
        ]
        return torch.cat(heads, dim=2)
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.unsqueeze(1), enable_gqa=True
    )
    return attended.transpose(1, 2)


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    """Grouped-query attention that reads only the selected keys.

    q: [B, T, H, d]; k, v: [B, S, G, d]; indices: int64 [B, T, K], −1 for no key (a query must have at least one).
    Returns [B, T, H, d]. Queries go in blocks so that the gathered keys stay within `GATHER_WORKSPACE_BYTES`.
    """
    batch, queries, heads, dim = q.shape
    groups = k.shape[2]
    row_bytes = 2 * indices.shape[-1] * groups * dim * q.element_size() * batch
    block = max(1, GATHER_WORKSPACE_BYTES // row_bytes)
    rows = torch.arange(batch, device=q.device)[:, None, None]
    outputs = []
    for begin in range(0, queries, block):
        chosen = indices[:, begin : begin + block]
        keys = k[rows, chosen.clamp(min=0)].to(q.dtype)
        values = v[rows, chosen.clamp(min=0)].to(q.dtype)
        grouped = q[:, begin : begin + block].unflatten(2, (groups, heads // groups))
        logits = torch.einsum("btgrd,btkgd->btgrk", grouped, keys).float() * dim**-0.5
        logits = logits.masked_fill((chosen < 0)[:, :, None, None], float("-inf"))
        weights = logits.softmax(-1).to(values.dtype)
        outputs.append(torch.einsum("btgrk,btkgd->btgrd", weights, values).flatten(2, 3))
    return torch.cat(outputs, dim=1)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, top_k: int) -> Tensor:
    """Attention of every query over its own selected keys, one selection for all heads.

    q: [B, T, H, d]; k, v: [B, S, G, d]; selected: bool [B, T, S] with at most `top_k` keys a row. Returns [B, T, H, d].
    The same function on both sides of the crossover: computed under the mask while S is small, gathered when it is not.
    """
    if k.shape[1] <= GATHER_CROSSOVER * top_k:
        return masked_attention(q, k, v, selected)
    return gathered_attention(q, k, v, selected_indices(selected, top_k))


def attend_indices(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped-query attention of every query over the keys that its list names.

    q: [B, T, H, d]; k, v: [B, S, G, d]; indices: int [B, T, K], distinct keys of every query, −1 (anywhere) for none.
    Returns the output [B, T, H, d] in q's type and the logarithm of each softmax denominator, at least fp32, [B, T, H]; 0 and
    −inf for a query without keys. Computed in fp32 at least, the gathered rows within `GATHER_WORKSPACE_BYTES`.
    """
    batch, queries, heads, dim = q.shape
    groups = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    row_bytes = 2 * indices.shape[-1] * groups * dim * wide.itemsize * batch
    block = max(1, GATHER_WORKSPACE_BYTES // row_bytes)
    rows = torch.arange(batch, device=q.device)[:, None, None]
    outputs, lses = [], []
    for begin in range(0, queries, block):
        chosen = indices[:, begin : begin + block].long()
        absent = chosen < 0
        # Zeros in place of absent rows: whatever stands in the row that is read there must not reach a gradient.
        keys = k[rows, chosen.clamp(min=0)].to(wide).masked_fill(absent[..., None, None], 0)
        values = v[rows, chosen.clamp(min=0)].to(wide).masked_fill(absent[..., None, None], 0)
        grouped = q[:, begin : begin + block].to(wide).unflatten(2, (groups, heads // groups))
        logits = torch.einsum("btgrd,btkgd->btgrk", grouped, keys) * dim**-0.5
        logits = logits.masked_fill(absent[:, :, None, None], float("-inf"))
        empty = absent.all(-1)[:, :, None, None]
        largest = logits.detach().amax(-1).masked_fill(empty, 0)
        weights = (logits - largest[..., None]).exp()
        total = weights.sum(-1).masked_fill(empty, 1)
        attended = torch.einsum("btgrk,btkgd->btgrd", weights / total[..., None], values)
        outputs.append(attended.flatten(2, 3).to(q.dtype))
        lses.append((total.log() + largest).masked_fill(empty, float("-inf")).flatten(2, 3))
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def selected_probabilities(q: Tensor, k: Tensor, indices: Tensor, lse: Tensor) -> Tensor:
    """The mean over all heads of the softmax weights on each selected key: what the indexer learns from.

    q: [B, T, H, d]; k: [B, S, G, d]; indices: int [B, T, K], −1 for none; lse: [B, T, H], from `attend_indices`.
    Returns [B, T, K], at least fp32, without gradients; 0 at −1. A query's weights add up to one, or to 0 without keys.
    """
    batch, queries, heads, dim = q.shape
    groups = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    block = max(1, GATHER_WORKSPACE_BYTES // (2 * indices.shape[-1] * groups * dim * wide.itemsize * batch))
    rows = torch.arange(batch, device=q.device)[:, None, None]
    outputs = []
    with torch.no_grad():
        for begin in range(0, queries, block):
            chosen = indices[:, begin : begin + block].long()
            keys = k[rows, chosen.clamp(min=0)].to(wide)
            grouped = q[:, begin : begin + block].to(wide).unflatten(2, (groups, heads // groups))
            logits = torch.einsum("btgrd,btkgd->btgrk", grouped, keys).flatten(2, 3) * dim**-0.5
            weights = (logits - lse[:, begin : begin + block, :, None]).exp().mean(2)
            outputs.append(weights.masked_fill(chosen < 0, 0))
    return torch.cat(outputs, dim=1)


def attention_probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Softmax weights of every head over the keys of `mask`: q [B, T, H, d], k [B, S, G, d] → fp32 [B, H, T, S]."""
    heads, dim = q.shape[2:]
    groups = k.shape[2]
    k = k.to(q.dtype)
    grouped = q.transpose(1, 2).unflatten(1, (groups, heads // groups))
    logits = (grouped @ k.transpose(1, 2).unsqueeze(2).transpose(-1, -2)).flatten(1, 2).float() * dim**-0.5
    return logits.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(-1)


def indexer_divergence(teacher: Tensor, scores: Tensor, mask: Tensor, groups: int) -> Tensor:
    """Σ_g KL(p_g ‖ softmax(scores)) of every query, up to the constant that the indexer cannot change.

    teacher: fp32 [B, T, N], the attention weights on the keys of `mask`, the mean over all heads p̄ (detached here); scores:
    fp32 [B, T, N]; mask: bool [B, T, N]. N: all keys, or the places of each query's list. It equals G · KL(p̄ ‖ q) plus a
    constant, so that is what is computed; its gradient towards the scores is G · (q − p̄). Returns fp32 [B, T].
    """
    teacher = teacher.detach()
    log_student = scores.masked_fill(~mask, float("-inf")).log_softmax(-1)
    # Where the mask forbids a key the teacher is 0 and the student's logarithm −inf: their product must be 0, not NaN.
    log_student = log_student.masked_fill(~mask, 0.0)
    return groups * (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1)


def frame_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """Full attention inside each of N frames: q, k, v [N, P, heads, d] → [N, P, heads, d].

    With cos and sin, fp32 [P, d] whose rows have two equal halves, q and k are first rotated: pairs (i, i + d/2), in fp32.
    """
    if cos is not None and sin is not None:
        cosine, sine = cos[:, None], sin[:, None]

        def rotated(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, dim=-1)
            turned = torch.cat((-second, first), dim=-1)
            return (x.float() * cosine + turned * sine).to(x.dtype)

        q, k = rotated(q), rotated(k)
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attended.transpose(1, 2)


@dataclass(frozen=True)
class Branches:
    """`count` sequences that share their first `shared` tokens, in buffers of batch 1 and without a copy of what they share.

    Token s of branch b stands in row s where s < shared and in row s + b · room behind: each branch has `room` rows of its
    own. Branch 0 alone is an ordinary sequence.
    """

    shared: int
    room: int
    count: int

    @property
    def rows(self) -> int:
        """Rows of a buffer that holds them all."""
        return self.shared + self.count * self.room

    @property
    def length(self) -> int:
        """The most tokens that a branch can have."""
        return self.shared + self.room

    def unfolded(self, buffer: Tensor) -> Tensor:
        """buffer [1, rows or more, …] → the branches one by one, [count, length, …], a copy."""
        token = torch.arange(self.length, device=buffer.device)
        branch = torch.arange(self.count, device=buffer.device)[:, None]
        return buffer[0, torch.where(token < self.shared, token, token + branch * self.room)]


@dataclass(frozen=True)
class StepShape:
    """Heads and norms of a decoder layer whose projections are one matrix; names as at the top of this file."""

    heads: int
    groups: int
    dim: int
    index_heads: int
    index_dim: int
    eps: float
    index_eps: float


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x [B, D] becomes x + delta [B, D], rounded to its type; returns its root-mean-square norm times `weight`, [B, D]."""
    if delta is not None:
        x += delta
    return F.rms_norm(x, weight.shape, weight, eps)


def token_tables(
    positions: Tensor, frequencies: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotary tables of one text token of B sequences, whose position is the same on all axes: int [B].

    frequencies: fp32 [d/2] of the heads and [e/2] of the indexer. Returns cosines and sines [B, 1, d] of the heads and [B, 1, e]
    of the indexer, worked out in fp32.
    """
    tables = []
    for part in frequencies:
        angles = (positions.float()[:, None] * part).repeat(1, 2)[:, None]
        tables += [angles.cos().to(dtype), angles.sin().to(dtype)]
    return tables[0], tables[1], tables[2], tables[3]


def place_projections(
    projected: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: Tensor,
    norms: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    caches: tuple[Tensor, Tensor, Tensor],
    shape: StepShape,
    branches: Branches | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """T new tokens of B sequences after their joint projection: norms, rotary, and the caches written.

    projected: [B, T, (H + 2G) · d + J · e + J + e], q, k, v, the indexer's queries, its gates, its key. tables: cos and sin
    [B, T, d] of the heads, cos and sin [B, T, e] of the indexer, the first half of a row equal to its second. lengths: int [B],
    where each sequence's first new token belongs. norms: weights of q and k [d], of the indexer's queries [e], weight and bias
    of its key [e]. caches: k and v [B, S, G, d], also FP8, which get what `stored` makes of keys and values, and indexer keys
    [B, S, e]; with `branches` those of batch 1. Returns q [B, T, H, d], indexer queries [B, T, J, e] and gates [B, T, J].
    """
    heads, groups, dim = shape.heads, shape.groups, shape.dim
    index_heads, index_dim = shape.index_heads, shape.index_dim
    widths = [heads * dim, groups * dim, groups * dim, index_heads * index_dim, index_heads, index_dim]
    q, k, v, iq, gates, ik = projected.split(widths, dim=-1)
    cos, sin, index_cos, index_sin = (table[:, :, None] for table in tables)
    q_weight, k_weight, iq_weight, ik_weight, ik_bias = norms

    def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), dim=-1) * sine

    q = F.rms_norm(q.unflatten(-1, (heads, dim)), (dim,), q_weight, shape.eps)
    k = F.rms_norm(k.unflatten(-1, (groups, dim)), (dim,), k_weight, shape.eps)
    iq = F.rms_norm(iq.unflatten(-1, (index_heads, index_dim)), (index_dim,), iq_weight, shape.index_eps)
    normed = F.layer_norm(ik.float(), (index_dim,), ik_weight.float(), ik_bias.float(), shape.index_eps)
    rows = torch.arange(len(projected), device=projected.device)[:, None]
    places = lengths.long()[:, None] + torch.arange(projected.shape[1], device=projected.device)
    if branches is not None:
        places = torch.where(places < branches.shared, places, places + rows * branches.room)
        rows = torch.zeros_like(rows)
    k_cache, v_cache, ik_cache = caches
    k_cache[rows, places] = stored(rotated(k, cos, sin), k_cache.dtype)
    v_cache[rows, places] = stored(v.unflatten(-1, (groups, dim)), v_cache.dtype)
    ik_cache[rows, places] = rotated(normed.to(ik.dtype)[:, :, None], index_cos, index_sin)[:, :, 0]
    return rotated(q, cos, sin), rotated(iq, index_cos, index_sin), gates


def route(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] → fp32 weights [T, top_k] and experts [T, top_k]: softmax over all experts in fp32, then the
    largest, of equal ones the lower expert; with `normalise` the chosen weights are scaled to add up to one."""
    ranked = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = ranked.values[:, :top_k], ranked.indices[:, :top_k]
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def routed_experts(
    x: Tensor, logits: Tensor, top_k: int, normalise: bool, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`moe_experts` of x [T, D] for what `route` makes of its router logits [T, E]; returns [T, D]."""
    return moe_experts(x, *route(logits, top_k, normalise), gate_up, down)


def moe_experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Σ over a token's experts of weight · down(silu(gate) · up).

    x: [T, D]; weights: fp32 [T, k]; experts: int64 [T, k]; gate_up: [E, D, 2F], columns 0..F−1 gate, F..2F−1 up;
    down: [E, F, D]. Returns [T, D]. Rows are sorted by expert and multiplied group by group; the sum over a token's
    experts is taken in a fixed order, so the result is repeatable.
    """
    order, ends = by_expert(experts, gate_up.shape[0])
    rows = x[order // experts.shape[1]]
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
    return _combined(F.grouped_mm(F.silu(gate) * up, down, offs=ends), order, weights)


def lora_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_factors: LowRank | None,
    down_factors: LowRank | None,
    scale: float,
) -> Tensor:
    """`moe_experts` whose matrices are W + scale · A · B, without that sum: the factors meet the routed rows only.

    gate_up_factors: A [E, D, r] and B [E, r, 2F]; down_factors: A [E, F, r] and B [E, r, D], of any floating type; None leaves a
    matrix as it is. Differentiable in x, weights and the factors; the factors of an expert without rows get zeros.
    """
    order, ends = by_expert(experts, gate_up.shape[0])
    rows = x[order // experts.shape[1]]
    gate, up = adapted_rows(rows, gate_up, gate_up_factors, scale, ends).chunk(2, dim=-1)
    return _combined(adapted_rows(F.silu(gate) * up, down, down_factors, scale, ends), order, weights)


def add_low_rank(out: Tensor, x: Tensor, added: Sequence[Added]) -> Tensor:
    """out [..., N], what a linear layer makes of x [..., K], becomes what it makes with these additions; returns it. No
    gradients."""
    for part in added:
        low = F.linear(x, part.first.to(x.dtype)) * part.scale
        out[..., part.begin : part.begin + len(part.second)] += F.linear(low, part.second.to(x.dtype))
    return out


def by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices [T, k] → their places sorted by expert, int64 [T · k], and where each expert's end, int32 [E]."""
    placed, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(num_experts, dtype=placed.dtype, device=placed.device)
    return order, torch.searchsorted(placed, numbers, right=True, out_int32=True)


def adapted_rows(rows: Tensor, weight: Tensor, factors: LowRank | None, scale: float, ends: Tensor) -> Tensor:
    """Sorted rows [R, K] times their experts' weight [E, K, N] + scale · A [E, K, r] · B [E, r, N] → [R, N]."""
    product = F.grouped_mm(rows, weight, offs=ends)
    if factors is None:
        return product
    # Grouped products want rows of whole 16 bytes, so a rank is made up to one with zeros.
    missing = -factors[0].shape[2] % GROUPED_ALIGNMENT
    first = F.pad(factors[0].to(rows.dtype), (0, missing))
    second = F.pad(factors[1].to(rows.dtype), (0, 0, 0, missing))
    return product + F.grouped_mm(F.grouped_mm(rows, first, offs=ends) * scale, second, offs=ends)


def _combined(routed: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Rows [T · k, D] in the places of `order` → each token's sum by its weights fp32 [T, k], in its slots' order: [T, D]."""
    per_token = routed[inverse(order)].unflatten(0, weights.shape)
    return (per_token * weights.to(routed.dtype).unsqueeze(-1)).sum(1)


def inverse(order: Tensor) -> Tensor:
    """Of places int64 [n], each once: where each number stands."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
