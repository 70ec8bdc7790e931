"""Learning from a teacher on tokens that the student sampled itself (multi-teacher on-policy distillation): the loss, what each
token weighs in it, and the check that both networks saw the same.

S positions of a response, V vocabulary, K candidates a position, D width of a network's states; π_θ the student's
distribution, π_T the teacher's, y the sampled token, Ω the candidates that count, π̄ a distribution renormalised on Ω,
Δ = log π_T − log π_θ, A the mean of Δ under π̄_θ. Sources: P published for Keye-VL-2.0, R our choice where nothing is published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from keyecli.engine.thinking import TAGS, THINK_CLOSE, THINK_OPEN
from keyecli.model.keye import LOSS_CHUNK_TOKENS

Mode = Literal["overlap", "student", "teacher-on-student"]
MODES: tuple[Mode, ...] = ("overlap", "student", "teacher-on-student")

# Logits of two networks stand side by side, so a chunk has half the positions of one for a single network.
DISTILL_CHUNK_TOKENS = LOSS_CHUNK_TOKENS // 2

FORMAT_WEIGHT, OTHER_WEIGHT, SUBSTANCE_WEIGHT = 0.3, 1.0, 1.3

LONGEST_PERIOD_TOKENS, FEWEST_COPIES, REPETITION_PENALTY = 64, 4, -0.5


@dataclass(frozen=True)
class Estimator:
    """How the student is pulled to the teacher.

    mode: "overlap", Ω = TopK(π_T) ∩ TopK(π_θ) (P); "student", Ω = TopK(π_θ); "teacher-on-student", no candidates but the
    sampled token: A is Δ(y), and the loss −A log π_θ(y) has in expectation the gradient of the full reverse KL. literal: that
    loss with the A of Ω, as published; its expected gradient is zero, for A does not depend on y. k: K, the whole vocabulary
    at most. log_prob_floor: log-probabilities in Δ are no lower; advantage_limit: nor is |A| larger (∓infinity: no limits).
    """

    mode: Mode = "overlap"
    literal: bool = False
    k: int = 64
    log_prob_floor: float = -10.0
    advantage_limit: float = 5.0


@dataclass(frozen=True)
class Sampled:
    """What the student wrote: ids int64 [S]; weights fp32 [S], see `token_weights`; penalties fp32 [S], see
    `repetition_penalty`."""

    ids: Tensor
    weights: Tensor
    penalties: Tensor

    def part(self, begin: int, end: int) -> Sampled:
        return Sampled(self.ids[begin:end], self.weights[begin:end], self.penalties[begin:end])


@dataclass(frozen=True)
class Side:
    """A network's last hidden states [S, D], each before its sampled token, and what makes fp32 logits [S, V] of some of them."""

    states: Tensor
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Metrics:
    """Of each position, [S]: advantage, A after its limit and before weights and penalties (0 where Ω is empty); support,
    |Ω|; overlap, the share of the student's top K that is in the teacher's; divergence, KL(π̄_θ ‖ π̄_T) on Ω in nats.
    Teacher-on-student has no Ω: support and divergence are those of TopK(π_θ) there."""

    advantage: Tensor
    support: Tensor
    overlap: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class Pull:
    """A position's loss in constants: −Σ coefficient · log π_θ(id), ids int64 [S, K + 1] (the student's top K, then the
    sampled token), coefficients fp32 [S, K + 1]."""

    ids: Tensor
    coefficients: Tensor
    metrics: Metrics


@torch.no_grad()
def pull(student_logits: Tensor, teacher_logits: Tensor, sampled: Sampled, how: Estimator) -> Pull:
    """How strongly the teacher pulls at each candidate, from logits [S, V] of both.

    A candidate's coefficient is π̄_θ (Δ − A), so that the loss has the gradient of KL(π̄_θ ‖ π̄_T) (R: the published form
    teaches nothing, see `Estimator.literal`). Where its limit holds A back by e = A − limited A, the coefficients add up to e
    and not to 0: −e log π_θ(Ω) comes on top, which takes the student's mass of Ω towards the teacher's as the full reverse KL
    does. Weights multiply the teacher's pull; a penalty is added to the advantage of the sampled token, the loss −penalty ·
    log π_θ(y), and is not weighed (R), for a repeated template token is no better than another. ValueError for logits of
    different shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher have logits {list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    k = min(how.k, student_logits.shape[-1])
    top = student_logits.topk(k).indices
    shared = _top_mask(teacher_logits, k).gather(-1, top)
    inside = shared if how.mode == "overlap" else torch.ones_like(shared)
    ids = torch.cat([top, sampled.ids.unsqueeze(-1)], -1)
    student, teacher = log_probs(student_logits, ids), log_probs(teacher_logits, ids)
    delta = teacher.clamp(min=how.log_prob_floor) - student.clamp(min=how.log_prob_floor)

    student_inside, teacher_inside = (_renormalised(each[:, :-1], inside) for each in (student, teacher))
    chances = student_inside.exp() * inside
    on_sampled = how.mode == "teacher-on-student"
    advantage = delta[:, -1] if on_sampled else (chances * delta[:, :-1]).sum(-1)
    advantage = advantage.clamp(-how.advantage_limit, how.advantage_limit)

    coefficients = torch.zeros_like(delta)
    if on_sampled or how.literal:
        coefficients[:, -1] = advantage
    else:
        coefficients[:, :-1] = chances * (delta[:, :-1] - advantage.unsqueeze(-1))
    coefficients *= sampled.weights.unsqueeze(-1)
    coefficients[:, -1] += sampled.penalties
    metrics = Metrics(
        advantage=advantage,
        support=inside.sum(-1),
        overlap=shared.float().mean(-1),
        divergence=(chances * (student_inside - teacher_inside)).sum(-1),
    )
    return Pull(ids, coefficients, metrics)


def pulled_losses(student_logits: Tensor, ids: Tensor, coefficients: Tensor) -> Tensor:
    """Losses fp32 [S] of a `Pull`, with a gradient for the student's logits [S, V]."""
    return -(coefficients * log_probs(student_logits, ids)).sum(-1)


def overlap_losses(
    student_logits: Tensor, teacher_logits: Tensor, sampled: Sampled, how: Estimator
) -> tuple[Tensor, Metrics]:
    """Losses fp32 [S] of logits [S, V]: the definition, for lengths whose logits fit. ValueError as `pull`."""
    found = pull(student_logits, teacher_logits, sampled, how)
    return pulled_losses(student_logits, found.ids, found.coefficients), found.metrics


def distill_losses(
    student: Side,
    teacher: Side,
    sampled: Sampled,
    how: Estimator,
    chunk_tokens: int = DISTILL_CHUNK_TOKENS,
) -> tuple[Tensor, Metrics]:
    """`overlap_losses` of hidden states, in chunks whose logits are made again in the backward pass, so that S × vocabulary
    logits never exist. Only the student gets a gradient, and only its logits are made again.

    ValueError for different numbers of positions, or as `pull`.
    """
    positions = len(sampled.ids)
    if not len(student.states) == len(teacher.states) == positions:
        raise ValueError(
            f"{len(student.states)} states of the student and {len(teacher.states)} of the teacher for {positions} tokens"
        )

    def losses_of(states: Tensor, ids: Tensor, coefficients: Tensor) -> Tensor:
        return pulled_losses(student.logits(states), ids, coefficients)

    losses, metrics = [], []
    for begin in range(0, max(1, positions), chunk_tokens):  # one empty chunk where nothing was sampled
        end = begin + chunk_tokens
        states = student.states[begin:end]
        with torch.no_grad():
            found = pull(
                student.logits(states),
                teacher.logits(teacher.states[begin:end]),
                sampled.part(begin, end),
                how,
            )
        losses.append(checkpoint(losses_of, states, found.ids, found.coefficients, use_reentrant=False))
        metrics.append(vars(found.metrics))
    together = {name: torch.cat([each[name] for each in metrics]) for name in metrics[0]}
    return torch.cat(losses), Metrics(**together)


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log π fp32 [S, C] of ids int64 [S, C] under logits [S, V]; no second tensor of that size is kept for the gradient."""
    logits = logits.float()
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


def _top_mask(logits: Tensor, k: int) -> Tensor:
    top = logits.topk(k).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, top, True)


def _renormalised(log_probs: Tensor, inside: Tensor) -> Tensor:
    """log π̄ [S, K] on the candidates inside; finite everywhere, so that a row without any can be multiplied away."""
    return log_probs.masked_fill(~inside, torch.finfo(log_probs.dtype).min).log_softmax(-1)


# Space goes with what it stands around, no more of it than templates write: an endless run would be searched from each place.
_SPACE = r"\s{0,4}"
_MARK = re.compile(
    rf"{_SPACE}({'|'.join(map(re.escape, TAGS))}|<\|[^|<>\s]*\|>|```(?:json)?){_SPACE}", re.IGNORECASE
)
_NUMBER = re.compile(r"(?:(?<![\w.])-)?\d+(?:[.:]\d+)*")
_JSON = re.compile(
    rf"""(?P<open>{_SPACE}[\[{{])|(?P<close>{_SPACE}[\]}}])|(?P<sign>[,:\s])"""
    r"""|(?P<key>"[^"\n]*"\s*:)|(?P<string>"[^"\n]*")|(?P<word>\b(?!(?:true|false|null)\b)[^\W\d_]{2,})"""
)


def token_weights(tokenizer: Any, ids: Sequence[int], opened: bool = False) -> Tensor:
    """What each token of one response weighs, fp32 [S], mean 1 (P that there are categories, R what they are and weigh).

    0.3: format and template, that is tags, marks such as the end of the turn, fences, and JSON's brackets, commas, colons,
    quotes and keys; 1.3: reasoning, and numbers, times and coordinates of the answer; 1: all else. A token counts as the
    weightiest of its characters. ids are taken as they were sampled, never as their text would be encoded. opened: the prompt
    ended inside `<think>`.
    """
    spelled = {token: tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in set(ids)}
    pieces = [spelled[token] for token in ids]
    characters = _character_weights("".join(pieces), opened)
    ends = accumulate(map(len, pieces))
    weights = torch.tensor(
        [
            max(characters[end - len(piece) : end], default=OTHER_WEIGHT)
            for end, piece in zip(ends, pieces, strict=True)
        ]
    )
    return weights / weights.mean() if len(weights) else weights


def _character_weights(text: str, opened: bool) -> list[float]:
    weights = [OTHER_WEIGHT] * len(text)
    begin, thinking = 0, opened
    for mark in _MARK.finditer(text):
        tag = mark[1].lower()
        # Reasoning may speak about tags and write JSON; they only mean something outside of it.
        if thinking and tag != THINK_CLOSE and not tag.startswith("<|"):
            continue
        _weigh(weights, text, begin, mark.start(), thinking)
        _paint(weights, mark.start(), mark.end(), FORMAT_WEIGHT)
        begin = mark.end()
        thinking = tag == THINK_OPEN or (thinking and tag != THINK_CLOSE)
    _weigh(weights, text, begin, len(text), thinking)
    return weights


def _weigh(weights: list[float], text: str, begin: int, end: int, thinking: bool) -> None:
    """Set the weights of a stretch between two marks."""
    if thinking:
        _paint(weights, begin, end, SUBSTANCE_WEIGHT)
        return
    for number in _NUMBER.finditer(text, begin, end):
        _paint(weights, number.start(), number.end(), SUBSTANCE_WEIGHT)
    depth = 0
    for found in _JSON.finditer(text, begin, end):
        kind = found.lastgroup
        if kind == "word":
            # A bracket before it was never JSON's; the commas of all that follows would count as such.
            depth = 0
        elif kind == "open":
            depth += 1
        if kind == "string" and depth:
            for quote in (found.start(), found.end() - 1):
                weights[quote] = FORMAT_WEIGHT
        elif kind in ("open", "close") or (depth and kind in ("sign", "key")):
            _paint(weights, found.start(), found.end(), FORMAT_WEIGHT)
        if kind == "close":
            depth = max(0, depth - 1)


def _paint(weights: list[float], begin: int, end: int, weight: float) -> None:
    weights[begin:end] = [weight] * (end - begin)


def repetition_penalty(ids: Tensor) -> Tensor:
    """What is added to the advantage of each token of one response, ids int64 [S] → fp32 [S]: −0.5 from the second copy on
    where a period of at most 64 tokens stands at least 4 times in a row, up to where the repetition breaks, inside a copy
    too; else 0 (R). O(64 · S)."""
    length = len(ids)
    places = torch.arange(length, device=ids.device)
    repeated = torch.zeros(length, dtype=torch.bool, device=ids.device)
    for period in range(1, min(LONGEST_PERIOD_TOKENS, length // FEWEST_COPIES) + 1):
        differs = torch.ones(length, dtype=torch.bool, device=ids.device)
        differs[period:] = ids[period:] != ids[:-period]
        before = places.where(differs, -1).cummax(0).values
        behind = places.where(differs, length).flip(0).cummin(0).values.flip(0)
        # A run of tokens like those a period earlier is all copies but the first.
        repeated |= ~differs & (behind - before - 1 >= (FEWEST_COPIES - 1) * period)
    return repeated.float() * REPETITION_PENALTY


@dataclass(frozen=True)
class Aligned:
    """What student and teacher must have in common.

    response_ids: the tokens that the student sampled; visual_tokens: how many placeholders each video or image takes;
    frame_times_s: of every frame in order; response_positions: of the response's tokens, in which the three axes agree.
    They are compared as given: where the teacher's own template has another length, count them from the response's first.
    """

    response_ids: Sequence[int]
    visual_tokens: Sequence[int]
    frame_times_s: Sequence[float]
    response_positions: Sequence[int]


_ALIGNED = {
    "response_ids": "response token",
    "visual_tokens": "visual token count",
    "frame_times_s": "frame time",
    "response_positions": "response position",
}


def check_same(student: Aligned, teacher: Aligned) -> None:
    """ValueError, naming the first difference, unless the teacher judges exactly what the student saw and wrote."""
    for name, words in _ALIGNED.items():
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if len(ours) != len(theirs):
            raise ValueError(f"student and teacher differ: {len(ours)} and {len(theirs)} {words}s")
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one != other:
                raise ValueError(f"student and teacher differ: {words} {place} is {one} and {other}")
