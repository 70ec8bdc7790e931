"""Several continuations of one prompt, which is prefilled once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keyecli.engine.eager import EagerDecoder
from keyecli.engine.generate import Begun, Generation, GenerationSettings, generate, generate_together
from keyecli.engine.loaded import LoadedModel, new_cache
from keyecli.engine.static import StaticDecoder, decoder_for
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
    begun: Sequence[Sequence[int]] | None = None,
    copies: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue the prompt that the cache holds, once for each of `settings`, as `generate` would.

    hidden, next_position: as for `generate`. `together`: decode so many at a time, for which the cache needs room for the
    longest of them each. `begun`: the tokens that each has already, drawn by the same settings before; they are put behind the
    prompt again, and what is returned follows them. `copies`: where sequences cannot share the prompt's part of the cache, decode
    them side by side in copies of it all the same, which may change the last bits. `on_token` gets the number of tokens so far,
    of all of them.
    """
    tokens = 0

    def count(_: int) -> None:
        nonlocal tokens
        tokens += 1
        if on_token:
            on_token(tokens)

    given = [()] * len(settings) if begun is None else begun
    drafts = [_Draft(tuple(ids), one) for ids, one in zip(given, settings, strict=True)]
    prompt = _Prompt(loaded, cache, hidden, cache.length, next_position, prompt_ids, stop_ids, count)
    lone = decoder_for(loaded.model, cache)
    room = branch_room(given, settings)
    found: list[Generation] = []
    for first in range(0, len(drafts), together):
        part = drafts[first : first + together]
        branches = Branches(prompt.length, room, len(part))
        decoder = decoder_for(loaded.model, cache, None, branches) if len(part) > 1 else None
        if decoder is not None:
            found += prompt.in_branches(part, decoder, branches)
        elif copies and len(part) > 1 and not any(draft.ids for draft in part):
            found += prompt.in_copies(part)
        else:
            found += [prompt.alone(draft, lone) for draft in part]
    return found


def branch_room(begun: Sequence[Sequence[int]], settings: Sequence[GenerationSettings]) -> int:
    """Rows that each of several sequences needs behind the prompt: those that have ended go on unread beside the others."""
    return max(map(len, begun)) + max(one.max_tokens for one in settings)


@dataclass(frozen=True)
class _Draft:
    """What there is of one continuation, and how it goes on."""

    ids: tuple[int, ...]
    settings: GenerationSettings


@dataclass(frozen=True)
class _Prompt:
    """A prompt of `length` tokens that the cache holds, to be continued again and again."""

    loaded: LoadedModel
    cache: KeyeCache
    hidden: Tensor
    length: int
    next_position: int
    ids: Tensor
    stop_ids: Collection[int]
    count: Callable[[int], None]

    def in_branches(
        self, part: Sequence[_Draft], decoder: StaticDecoder, branches: Branches
    ) -> list[Generation]:
        """Side by side behind the prompt, which they share."""
        begun: list[Begun] = []
        # Each where the first one has its place, from which it then moves away.
        for number, draft in reversed(list(enumerate(part))):
            begun.insert(0, self._begun(draft, self._put_back(draft)))
            if draft.ids:
                self.cache.copy_to_branch(branches, number, self.cache.length)
        self.cache.truncate(self.length)
        return self._together(decoder, begun)

    def in_copies(self, part: Sequence[_Draft]) -> list[Generation]:
        """Side by side, each with the prompt of its own."""
        rows = self.length + max(draft.settings.max_tokens for draft in part)
        copies = new_cache(self.loaded, rows, batch=len(part))
        copies.copy_from(self.cache, self.length)
        decoder = EagerDecoder(self.loaded.model, copies)
        return self._together(decoder, [self._begun(draft, self.hidden) for draft in part])

    def alone(self, draft: _Draft, decoder: StaticDecoder | None) -> Generation:
        """One by itself."""
        hidden = self._put_back(draft)
        return generate(
            self.loaded.model,
            self.loaded.tokenizer,
            self.cache,
            hidden,
            self.next_position + len(draft.ids),
            draft.settings,
            stop_ids=self.stop_ids,
            prompt_ids=self._said(draft),
            static=decoder,
            on_token=self.count,
            drawn=len(draft.ids),
        )

    def _together(self, decoder: StaticDecoder | EagerDecoder, begun: Sequence[Begun]) -> list[Generation]:
        loaded = self.loaded
        ahead = isinstance(decoder, StaticDecoder) and self.hidden.is_cuda
        return generate_together(
            loaded.config, loaded.tokenizer, decoder, begun, stop_ids=self.stop_ids, ahead=ahead
        )

    def _put_back(self, draft: _Draft) -> Tensor:
        """Have the cache hold the prompt and what there is of a continuation; returns the last token's state, [1, 1, D]."""
        self.cache.truncate(self.length)
        if not draft.ids:
            return self.hidden
        model, device = self.loaded.model, self.hidden.device
        ids = torch.tensor(draft.ids, device=device)[None]
        positions = self.next_position + torch.arange(len(draft.ids), device=device)
        return model.decode(model.embed(ids), positions.expand(3, 1, -1), self.cache)[:, -1:].to(device)

    def _begun(self, draft: _Draft, hidden: Tensor) -> Begun:
        drawn = len(draft.ids)
        return Begun(
            self.loaded.model.logits(hidden[0, -1]),
            self.length + drawn,
            self.next_position + drawn,
            draft.settings,
            self._said(draft),
            on_token=self.count,
            drawn=drawn,
        )

    def _said(self, draft: _Draft) -> Tensor:
        """What the repetition penalty counts as said."""
        drawn = torch.tensor(draft.ids, dtype=self.ids.dtype, device=self.ids.device)
        return torch.cat([self.ids, drawn]) if draft.ids else self.ids
