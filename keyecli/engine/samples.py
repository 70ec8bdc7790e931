"""Several continuations of one prompt, which is prefilled once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from keyecli.engine.generate import Begun, Generation, GenerationSettings, generate, generate_together
from keyecli.engine.loaded import LoadedModel
from keyecli.engine.static import decoder_for
from keyecli.kernels.reference import Branches
from keyecli.model.cache import KeyeCache


@torch.inference_mode()
def draw_samples(
    loaded: LoadedModel,
    cache: KeyeCache,
    hidden: Tensor,
    next_position: int,
    settings: Sequence[GenerationSettings],
    *,
    stop_ids: Collection[int],
    prompt_ids: Tensor,
    together: int,
    on_token: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue the prompt that the cache holds, once for each of `settings`, as `generate` would.

    hidden, next_position: as for `generate`. `together`: decode so many at a time, for which the cache needs room for the
    longest of them each. `on_token` gets the number of tokens so far, of all of them.
    """
    length, tokens = cache.length, 0
    room = max(one.max_tokens for one in settings)

    def count(_: int) -> None:
        nonlocal tokens
        tokens += 1
        if on_token:
            on_token(tokens)

    first = Begun(
        loaded.model.logits(hidden[0, -1]),
        length,
        next_position,
        settings[0],
        prompt_ids,
        on_token=count,
    )
    lone = decoder_for(loaded.model, cache)
    found: list[Generation] = []
    for begin in range(0, len(settings), together):
        part = settings[begin : begin + together]
        cache.truncate(length)
        branches = Branches(length, room, len(part))
        decoder = decoder_for(loaded.model, cache, None, branches) if len(part) > 1 else None
        if decoder is not None:
            found += generate_together(
                loaded.config,
                loaded.tokenizer,
                decoder,
                [replace(first, settings=one) for one in part],
                stop_ids=stop_ids,
                ahead=hidden.is_cuda,
            )
            continue
        for one in part:
            cache.truncate(length)
            generation = generate(
                loaded.model,
                loaded.tokenizer,
                cache,
                hidden,
                next_position,
                one,
                stop_ids=stop_ids,
                prompt_ids=prompt_ids,
                static=lone,
                on_token=count,
            )
            found.append(generation)
    return found
