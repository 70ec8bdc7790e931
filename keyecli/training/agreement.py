"""Whether the engine, which drew an answer token by token, selected the keys that the trainer selects for it in one pass.

Where they differ the policy that learns is another than the one that answered. T tokens of prompt and answer, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from keyecli.engine.loaded import LoadedModel, new_cache
from keyecli.engine.plan import prefill_chunk_tokens
from keyecli.kernels import dispatch
from keyecli.model.attention import IndexerOutput
from keyecli.model.decoder import DecoderLayer
from keyecli.model.prompt import Prompt
from keyecli.training.network import Network, moved
from keyecli.training.rollouts import Rollout, group_pack
from keyecli.training.sight import Seen

Lists = dict[int, list[Tensor]]
"""Of each layer: selected keys int [queries, k], one tensor a pass."""


@torch.no_grad()
def selection_agreement(
    loaded: LoadedModel, network: Network, prompt: Prompt, seen: Seen, rollout: Rollout
) -> float | None:
    """The share of keys that both selected, of the queries that wrote the answer, over all layers; None where none selects."""
    pack = moved(group_pack(prompt, "", [rollout]), loaded.device)
    queries = len(rollout.token_ids)
    with _watching(loaded, queries, pack.segments) as trainers:
        network(pack, seen.sight)
    with _watching(loaded, queries, None) as engines:
        _answered(loaded, prompt, seen, rollout)
    both, all_keys = 0, 0
    for layer, lists in engines.items():
        # Queries that see few keys select nothing; both leave out the same ones.
        engine = [frozenset(row.tolist()) for part in lists for row in part][-queries:]
        trainer = [frozenset(row.tolist()) for row in trainers[layer][0][-len(engine) :]]
        both += sum(len(a & b - {-1}) for a, b in zip(engine, trainer, strict=True))
        all_keys += sum(len(a - {-1}) for a in engine)
    return both / all_keys if all_keys else None


def _answered(loaded: LoadedModel, prompt: Prompt, seen: Seen, rollout: Rollout) -> None:
    """Give the decoder the prompt in chunks, but for its last token, then that and the answer one token at a time."""
    model, device = loaded.model, loaded.device
    cache = new_cache(loaded, len(prompt.input_ids) + len(rollout.token_ids))
    ids = torch.cat([prompt.input_ids, torch.tensor(rollout.token_ids[:-1], dtype=torch.int64)]).to(device)
    following = prompt.next_position + torch.arange(len(rollout.token_ids) - 1)
    positions = torch.cat([prompt.position_ids, following.expand(3, -1)], dim=1).to(device)
    head = len(prompt.input_ids) - 1
    embeds = torch.cat(
        [model.embed(ids[None, :head], seen.sight.embeds), model.embed(ids[None, head:])], dim=1
    )
    chunk = prefill_chunk_tokens(device, loaded.offload)
    begins = [*range(0, head, chunk), *range(head, len(ids))]
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        model.decode(embeds[:, begin:end], positions[:, None, begin:end], cache)


@contextmanager
def _watching(loaded: LoadedModel, queries: int, segments: Tensor | None) -> Iterator[Lists]:
    """Keep what every layer selects, of passes of one sequence, for the last `queries` of each."""
    attentions = [cast(DecoderLayer, layer).self_attn for layer in loaded.model.model.layers]
    found: Lists = {}

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> None:
        if index is not None:
            attention = attentions[layer]
            q_index, gates = (tensor[:, -queries:] for tensor in index[:2])
            lists = dispatch.select_keys(
                q_index, gates, index[2], attention.top_k, segments, backend=attention.backend
            )
            found.setdefault(layer, []).append(lists[0])

    for attention in attentions:
        attention.observer = observe
    try:
        yield found
    finally:
        for attention in attentions:
            attention.observer = None
