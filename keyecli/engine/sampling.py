"""Chooses the next token of several sequences at once, on their device and without ever waiting for it.

B sequences, V vocabulary. Probabilities become whole numbers, whose sums are the same in any order: a sequence's tokens
depend on its own logits and seed, not on the device or on what is decoded beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from keyecli.engine.generate import GenerationSettings

BEST_WEIGHT = 2**40
"""Of the likeliest token; one less likely by more than this factor is never drawn. 2^23 of them fit an int64 sum."""


class Sampler:
    """The choices of B sequences, each by its own settings; ties go to the lower id.

    A choice is defined by these steps, in this order. Banned ids are impossible. The repetition penalty divides the positive
    logits of ids that stood in the prompt or were chosen, and multiplies the negative ones. At temperature 0 the largest
    logit is taken. Else logits are divided by the temperature, and one is drawn in proportion to the probabilities among
    the `top_k` likeliest, of these the shortest run of likeliest ones whose share of all of these reaches `top_p`, of these
    the ones that are at least `min_p` times as likely as the likeliest.
    """

    def __init__(
        self,
        settings: Sequence[GenerationSettings],
        vocabulary: int,
        device: torch.device | str = "cpu",
        *,
        banned_ids: Collection[int] = (),
        prompts: Sequence[Tensor | None] | None = None,
        drawn: Sequence[int] | None = None,
    ) -> None:
        """`prompts`: the ids, int64 [any], that the penalty counts as said in the prompt; for each sequence, or None.
        `drawn`: the choices of each sequence that were made before; its seed goes on behind them."""
        self._step = 0
        self._banned = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self._banned[sorted(banned_ids)] = True
        self._uniforms: Tensor | None = None
        if any(s.temperature for s in settings):
            self._uniforms = _uniforms(settings, drawn or [0] * len(settings)).to(device)

        def each(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self._draws = each([s.temperature > 0 for s in settings], torch.bool)[:, 0]
        self._temperature = each([s.temperature or 1.0 for s in settings])
        self._top_k = each([min(s.top_k or vocabulary, vocabulary) for s in settings], torch.int64)
        self._top_p = each([s.top_p for s in settings])
        self._least_weight = each([s.min_p * BEST_WEIGHT for s in settings])
        self._penalty = each([s.repetition_penalty for s in settings], torch.float32)
        self._said: Tensor | None = None
        if any(s.repetition_penalty != 1 for s in settings):
            self._said = torch.zeros((len(settings), vocabulary), dtype=torch.bool, device=device)
            for said, prompt in zip(self._said, prompts or (), strict=False):
                if prompt is not None:
                    said[prompt.to(device)] = True

    @torch.inference_mode()
    def pick(self, logits: Tensor, forbidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next token of each sequence and how likely the model alone, at temperature 1, found it.

        logits: fp32 [B, V]; forbidden: bool [B, V], what may not come this time. Returns ids, int64 [B], and natural
        logarithms, fp32 [B]; the next call is about the tokens that follow these.
        """
        scores = logits
        if self._said is not None:
            penalised = torch.where(scores > 0, scores / self._penalty, scores * self._penalty)
            scores = torch.where(self._said, penalised, scores)
        impossible = self._banned if forbidden is None else forbidden | self._banned
        scores = torch.where(impossible, float("-inf"), scores)
        ids = scores.argmax(-1)
        if self._uniforms is not None:
            ids = torch.where(self._draws, self._draw(scores, self._uniforms[:, self._step, None]), ids)
        self._step += 1
        if self._said is not None:
            self._said.scatter_(1, ids[:, None], True)
        return ids, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def _draw(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """scores [B, V], uniform fp64 [B, 1] → ids [B]. Each filter leaves a beginning of the ids by falling score."""
        ordered, ids = (scores + 0.0).sort(
            dim=-1, descending=True, stable=True
        )  # + 0.0: sorting may tell −0 from 0
        best = ordered[:, :1]
        below = torch.where(
            ordered == best, 0.0, ordered.double() - best.double()
        )  # where ∞ − ∞ has no value
        weights = ((below / self._temperature).exp() * BEST_WEIGHT).long()
        running = weights.cumsum(-1)
        needed = (running.gather(1, self._top_k - 1) * self._top_p).ceil()
        nucleus = (running < needed).sum(-1, keepdim=True) + 1
        likely = (weights >= self._least_weight).sum(-1, keepdim=True)
        mass = running.gather(1, torch.minimum(torch.minimum(nucleus, likely), self._top_k) - 1)
        point = torch.minimum((uniform * mass).long(), mass - 1)
        return ids.gather(1, (running <= point).sum(-1, keepdim=True))[:, 0]


def _uniforms(settings: Sequence[GenerationSettings], drawn: Sequence[int]) -> Tensor:
    """One number from [0, 1) for each choice, from a generator of each sequence's own, fp64 [B, choices].

    A generator gives the same numbers however many are asked for, so that a sequence may go on where it was interrupted.
    """
    choices = max(s.max_tokens for s in settings)
    return torch.stack(
        [
            torch.rand(
                before + choices,
                dtype=torch.float64,
                generator=torch.Generator("cpu").manual_seed(s.seed),
            )[before:]
            for s, before in zip(settings, drawn, strict=True)
        ]
    )
