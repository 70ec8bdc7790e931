"""Token-by-token decoding of one or several sequences: the stop rules, and text that never cuts a character."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from keyecli.engine.eager import EagerDecoder
from keyecli.engine.sampling import Sampler
from keyecli.engine.static import StaticDecoder, decoder_for
from keyecli.engine.stops import StopStrings
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

    `temperature` 0 takes the most probable token. Above 0, one is drawn with a generator seeded by `seed`: the same seed
    draws the same tokens. See `Sampler` for what `top_k` (0: all), `top_p`, `min_p` and `repetition_penalty` leave of the
    choice. `stop`: the text, reasoning included, ends before the first of these strings; an answer under a constraint
    ends when it is complete.
    """

    max_tokens: int = 2048
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature must be 0 or above, not {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"--top-k must be 0 or above, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"--min-p must be from 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"--repetition-penalty must be above 0, not {self.repetition_penalty}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be 0 or above and below 2^63, not {self.seed}")
        if not all(self.stop):
            raise UsageError("--stop must not be empty")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        return {**asdict(self), "stop": list(self.stop)}


@dataclass(frozen=True)
class Generation:
    """What was generated: `token_ids` without the stop token, their text, and why it ended.

    The text ends before a stop string, whose own tokens are among `token_ids` all the same.
    `log_probabilities`: natural logarithm of each token's probability under the model alone, at temperature 1,
    whatever a constraint left of the choice. stop_token: the one that ended it, with its logarithm; None when nothing of the kind
    did.
    """

    token_ids: tuple[int, ...]
    text: str
    stop_reason: StopReason
    log_probabilities: tuple[float, ...]
    stop_token: tuple[int, float] | None = None


class Constraint(Protocol):
    """Decides, token by token, what an answer may be; one object for one answer."""

    def allowed(self) -> Sequence[int] | None:
        """The ids that may come next, ascending: none when the answer is complete, None for all but stop tokens."""

    def accept(self, token_id: int, log_probabilities: Tensor | None) -> None:
        """The token that was chosen.

        `log_probabilities`: those of the allowed ids, in their order, scaled so that they sum to one; None where
        any token was allowed.
        """


class Decoder(Protocol):
    """Adds tokens to B sequences, one each at a time."""

    def begin(self, lengths: Sequence[int], positions: Sequence[int]) -> None:
        """lengths: tokens of each sequence; positions: of its next token, on all three axes."""

    def step(self, token_ids: Tensor) -> Tensor:
        """int64 [B] on the device → logits of what follows, fp32 [B, vocabulary], which the next step overwrites."""


@dataclass(frozen=True)
class Begun:
    """A prefilled prompt to be continued.

    logits: fp32 [vocabulary], of its first new token; length: tokens that it has; position: of the first new token, on all
    three axes; prompt_ids: int64 [any], what the repetition penalty counts as said. `on_text` gets each piece of text,
    `on_token` the number of tokens so far.
    """

    logits: Tensor
    length: int
    position: int
    settings: GenerationSettings
    prompt_ids: Tensor | None = None
    constraint: Constraint | None = None
    on_text: Callable[[str], None] | None = None
    on_token: Callable[[int], None] | None = None
    drawn: int = 0


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
    prompt_ids: Tensor | None = None,
    constraint: Constraint | None = None,
    static: StaticDecoder | None = None,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
    drawn: int = 0,
) -> Generation:
    """Continue a prefilled prompt until it stops, a complete constraint or `settings.max_tokens` tokens.

    hidden: [1, 1, D], the last prompt token's state as `model.decode` gave it; the rest: see `Begun`. The cache needs room
    for `max_tokens - 1` more tokens: the last one is never fed back. Afterwards it holds the prompt and, but perhaps for
    the last of them, what was generated. `static`: the decoder of this cache, from a caller who answers again and again;
    without it one is made where that is possible.
    """
    length = cache.length
    begun = Begun(
        model.logits(hidden[0, -1]),
        length,
        next_position,
        settings,
        prompt_ids,
        constraint,
        on_text,
        on_token,
        drawn,
    )
    static = decoder_for(model, cache, static)
    decoder = EagerDecoder(model, cache) if static is None else static
    ahead = static is not None and hidden.is_cuda
    (generation,) = generate_together(
        model.config, tokenizer, decoder, [begun], stop_ids=stop_ids, ahead=ahead
    )
    cache.truncate(min(cache.length, length + len(generation.token_ids)))
    return generation


@torch.inference_mode()
def generate_together(
    config: Any,
    tokenizer: Any,
    decoder: Decoder,
    prompts: Sequence[Begun],
    *,
    stop_ids: Collection[int],
    ahead: bool = False,
) -> list[Generation]:
    """Continue several prompts at once, each as it would be continued alone.

    A sequence that has ended goes on unread until all have, so that each needs room for as many tokens as the longest of
    them may get, less one. `ahead`: start each step before the tokens that it feeds are read, so that the device never
    waits for the host; the first token, and each where a constraint has to see it, is read before all the same.
    """
    hidden_ids = hidden_token_ids(tokenizer)
    sequences = [_Sequence(begun, TextStream(tokenizer, hidden_ids), stop_ids) for begun in prompts]
    constrained = any(begun.constraint is not None for begun in prompts)
    logits = torch.stack([begun.logits for begun in prompts])
    settings = [begun.settings for begun in prompts]
    sampler = Sampler(
        settings,
        logits.shape[-1],
        logits.device,
        banned_ids=placeholder_ids(config),
        prompts=[begun.prompt_ids for begun in prompts],
        drawn=[begun.drawn for begun in prompts],
    )
    decoder.begin([begun.length for begun in prompts], [begun.position for begun in prompts])

    def choose(logits: Tensor) -> _Choice:
        forbidden = _forbidden(sequences, stop_ids, logits) if constrained else None
        return _Choice(logits, *sampler.pick(logits, forbidden))

    left = max(item.max_tokens for item in settings) - 1
    choice = None if all(sequence.has_ended for sequence in sequences) else choose(logits)
    # The first step may have to be captured before it runs: the first token is shown before that.
    reads_first = True
    while choice is not None:
        following = None if reads_first or not left else choose(decoder.step(choice.ids))
        choice.read(sequences)
        if all(sequence.has_ended for sequence in sequences):
            break
        if following is None:
            following = choose(decoder.step(choice.ids))
        choice = following
        left -= 1
        reads_first = constrained or not ahead
    return [sequence.generation() for sequence in sequences]


class _Choice:
    """Tokens that were chosen of logits [B, V], on their way to the host."""

    def __init__(self, logits: Tensor, ids: Tensor, log_probabilities: Tensor) -> None:
        self.ids = ids
        self._logits = logits
        self._read = [ids, log_probabilities]
        self._arrived: torch.cuda.Event | None = None
        if ids.is_cuda:
            self._read = [
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in (ids, log_probabilities)
            ]
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(ids.device))

    def read(self, sequences: Sequence[_Sequence]) -> None:
        """Give each sequence its token, as soon as it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids, log_probabilities = (x.tolist() for x in self._read)
        for row, sequence in enumerate(sequences):
            if not sequence.has_ended:
                sequence.take(ids[row], log_probabilities[row], self._logits[row])


class _Sequence:
    """What has been generated of one sequence, and whether it goes on."""

    def __init__(self, begun: Begun, stream: TextStream, stop_ids: Collection[int]) -> None:
        self._begun = begun
        self._stream = stream
        self._stop_ids = stop_ids
        self._stops = StopStrings(() if begun.constraint else begun.settings.stop)
        self._token_ids: list[int] = []
        self._log_probabilities: list[float] = []
        self._text = ""
        self._stop_reason: StopReason | None = None
        self._stop_token: tuple[int, float] | None = None
        self.allowed: Sequence[int] | None = None
        self._ask_constraint()

    @property
    def has_ended(self) -> bool:
        return self._stop_reason is not None

    @property
    def is_constrained(self) -> bool:
        return self._begun.constraint is not None

    def take(self, token_id: int, log_probability: float, logits: Tensor) -> None:
        """The next token; logits [V]: what it was chosen of."""
        constraint = self._begun.constraint
        if constraint is not None:
            allowed = self.allowed
            shares = None if allowed is None else logits[list(allowed)].double().log_softmax(-1)
            constraint.accept(token_id, shares)
        elif token_id in self._stop_ids:
            self._stop_token = token_id, log_probability
            self._end("stop")
            return
        self._token_ids.append(token_id)
        self._log_probabilities.append(log_probability)
        self._say(self._stops.add(self._stream.add(token_id)))
        if self._begun.on_token:
            self._begun.on_token(len(self._token_ids))
        self._ask_constraint()
        if self._stops.found:
            self._end("stop")
        elif not self.has_ended and len(self._token_ids) == self._begun.settings.max_tokens:
            self._end("length")

    def generation(self) -> Generation:
        """All of it, once it has ended."""
        assert self._stop_reason is not None
        return Generation(
            tuple(self._token_ids),
            self._text,
            self._stop_reason,
            tuple(self._log_probabilities),
            self._stop_token,
        )

    def _ask_constraint(self) -> None:
        if self._begun.constraint is not None:
            self.allowed = self._begun.constraint.allowed()
            if self.allowed is not None and not len(self.allowed):
                self._end("stop")

    def _end(self, reason: StopReason) -> None:
        self._stop_reason = reason
        self._say(self._stops.add(self._stream.finish()) + self._stops.finish())

    def _say(self, piece: str) -> None:
        self._text += piece
        if piece and self._begun.on_text:
            self._begun.on_text(piece)


def _forbidden(sequences: Sequence[_Sequence], stop_ids: Collection[int], logits: Tensor) -> Tensor:
    """What the constraints leave no place for, bool [B, V]; where one lets anything come, no stop token does."""
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    for row, sequence in zip(forbidden, sequences, strict=True):
        if sequence.is_constrained and not sequence.has_ended:
            if sequence.allowed is None:
                row[sorted(stop_ids)] = True
            else:
                row.fill_(True)
                row[list(sequence.allowed)] = False
    return forbidden
