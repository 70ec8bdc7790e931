"""Token-by-token decoding: greedy or nucleus sampling, the stop rule, text that never cuts a character."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from keyecli.engine.static import StaticDecoder, decoder_for
from keyecli.errors import UsageError
from keyecli.model.cache import KeyeCache
from keyecli.model.keye import KeyeVL2ForConditionalGeneration

StopReason = Literal["stop", "length"]

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
SHOWN_SPECIAL_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen and when to stop; UsageError for a value out of range.

    `temperature` 0 takes the most probable token. Above 0, one is drawn from the smallest set of tokens whose
    probabilities reach `top_p`, with a generator seeded by `seed`: the same seed draws the same tokens.
    """

    max_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature must be 0 or above, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be 0 or above and below 2^63, not {self.seed}")


@dataclass(frozen=True)
class Generation:
    """What was generated: `token_ids` without the stop token, their text, and why it ended.

    `log_probabilities`: natural logarithm of each token's probability under the model alone, at temperature 1,
    whatever a constraint left of the choice.
    """

    token_ids: tuple[int, ...]
    text: str
    stop_reason: StopReason
    log_probabilities: tuple[float, ...]


class Constraint(Protocol):
    """Decides, token by token, what an answer may be; one object for one answer."""

    def allowed(self) -> Sequence[int] | None:
        """The ids that may come next, ascending: none when the answer is complete, None for all but stop tokens."""

    def accept(self, token_id: int, log_probabilities: Tensor | None) -> None:
        """The token that was chosen.

        `log_probabilities`: those of the allowed ids, in their order, scaled so that they sum to one; None where
        any token was allowed.
        """


class Sampler:
    """Picks one token id from logits [vocab]; ties go to the lower id, and every device draws alike."""

    def __init__(self, settings: GenerationSettings, banned_ids: Collection[int] = ()) -> None:
        self.settings = settings
        self.banned_ids = sorted(banned_ids)
        self._generator = torch.Generator("cpu").manual_seed(settings.seed)

    def pick(self, logits: Tensor) -> int:
        if self.banned_ids:
            logits = logits.clone()
            logits[self.banned_ids] = float("-inf")
        return self.draw(logits)

    def draw(self, logits: Tensor) -> int:
        """The same for logits [any size] of which none is banned; returns an index."""
        if self.settings.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits.double() / self.settings.temperature).softmax(-1).cpu()
        ordered, ids = probabilities.sort(descending=True, stable=True)
        running = ordered.cumsum(-1)
        # The nucleus: the shortest run of most probable tokens that reaches top_p, never empty.
        size = min(int((running < self.settings.top_p).sum()) + 1, len(ids))
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * running[size - 1]
        return int(ids[min(int((running[:size] <= point).sum()), size - 1)])


class TextStream:
    """Token ids → text, emitted as soon as it is certain: a UTF-8 character cut between tokens waits.

    `hidden_ids` take part in no text (special tokens).
    """

    def __init__(self, tokenizer: Any, hidden_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset(hidden_ids)
        # Some tokenizers spell a token differently at a text's beginning, so the last ones stay as context.
        self._context: list[int] = []
        self._open: list[int] = []
        self._open_emitted = 0
        self.text = ""

    def add(self, token_id: int) -> str:
        """The text that this token makes certain, "" when none."""
        if token_id in self._hidden:
            return ""
        self._open.append(token_id)
        text = self._open_text()
        # Bytes that end inside a character decode to one replacement character, the only uncertain part.
        certain = text.removesuffix(REPLACEMENT)
        piece = self._emit(certain)
        if certain == text:
            self._context, self._open, self._open_emitted = self._open, [], 0
        return piece

    def finish(self) -> str:
        """What still waits at the end of the output; bytes that never became a character read as U+FFFD."""
        return self._emit(self._open_text()) if self._open else ""

    def _open_text(self) -> str:
        return self._decode(self._context + self._open)[len(self._decode(self._context)) :]

    def _emit(self, certain: str) -> str:
        piece = certain[self._open_emitted :]
        self._open_emitted += len(piece)
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stop_token_ids(config: Any, tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """Every id that ends an answer: the eos ids of the configurations and the tokenizer, and <|im_end|>."""
    found: set[int] = set()
    for source in (config, generation_config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update(value if isinstance(value, (list, tuple)) else [value])
    vocabulary = tokenizer.get_vocab()
    found.update(vocabulary[token] for token in STOP_TOKENS if token in vocabulary)
    return frozenset(found)


def hidden_token_ids(tokenizer: Any) -> frozenset[int]:
    """Special tokens that are no text; the tags around reasoning and answer are."""
    vocabulary = tokenizer.get_vocab()
    shown = {vocabulary[token] for token in SHOWN_SPECIAL_TOKENS if token in vocabulary}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special | set(tokenizer.all_special_ids)) - shown


def placeholder_ids(config: Any) -> frozenset[int]:
    """Ids that stand for visual embeddings and so can never be generated."""
    ids = (config.image_token_id, config.video_token_id, getattr(config, "fast_video_token_id", None))
    return frozenset(i for i in ids if i is not None and i < config.vocab_size)


@torch.inference_mode()
def generate(
    model: KeyeVL2ForConditionalGeneration,
    tokenizer: Any,
    cache: KeyeCache,
    hidden: Tensor,
    next_position: int,
    settings: GenerationSettings,
    *,
    stop_ids: Collection[int],
    constraint: Constraint | None = None,
    static: StaticDecoder | None = None,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continue a prefilled prompt until a stop token, a complete constraint or `settings.max_tokens` tokens.

    hidden: [1, 1, D], the last prompt token's state as `model.decode` gave it; `next_position`: the
    position, on all three axes, of the first generated token. `on_text` gets each piece of text, `on_token`
    the number of tokens so far. The cache needs room for `max_tokens - 1` more tokens: the last one is
    never fed back. `static`: the decoder of this cache, from a caller who answers again and again; without
    it one is made where that is possible.
    """
    banned = placeholder_ids(model.config)
    # Under a constraint the answer ends when it is complete, never by a stop token.
    sampler = Sampler(settings, banned if constraint is None else banned | frozenset(stop_ids))
    stream = TextStream(tokenizer, hidden_token_ids(tokenizer))
    device = hidden.device
    token_ids: list[int] = []
    log_probabilities: list[float] = []
    stop_reason: StopReason = "length"

    static = decoder_for(model, cache, static)
    logits = model.logits(hidden[0, -1])

    def say(piece: str) -> None:
        if piece and on_text:
            on_text(piece)

    while True:
        allowed = None if constraint is None else constraint.allowed()
        if allowed is not None and not len(allowed):
            stop_reason = "stop"
            break
        if len(token_ids) == settings.max_tokens:
            break
        if token_ids:
            position = next_position + len(token_ids) - 1
            if static is not None:
                logits = static.step([token_ids[-1]], position)[0]
            else:
                ids = torch.tensor([[token_ids[-1]]], device=device)
                positions = torch.full((3, 1, 1), position, device=device)
                logits = model.logits(model.decode(model.embed(ids, None), positions, cache)[0, -1])
        if allowed is None:
            token_id = sampler.pick(logits)
        else:
            token_id = allowed[sampler.draw(logits[list(allowed)])]
        if constraint is not None:
            shares = None if allowed is None else logits[list(allowed)].double().log_softmax(-1)
            constraint.accept(token_id, shares)
        elif token_id in stop_ids:
            stop_reason = "stop"
            break
        token_ids.append(token_id)
        log_probabilities.append(float(logits[token_id] - logits.logsumexp(-1)))
        say(stream.add(token_id))
        if on_token:
            on_token(len(token_ids))
    say(stream.finish())
    return Generation(tuple(token_ids), stream.text, stop_reason, tuple(log_probabilities))
