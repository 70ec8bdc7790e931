"""Constrained decoding: after free reasoning, an answer that can be nothing but a valid list of time spans.

The list is `[]` or `[[3.0, 7.5], [9.0, 12.5]]`: numbers with as many decimals as the times in the prompt, inside the
searched part, each start before its end, spans ascending and apart. That numbers ascend is beyond a context-free
grammar, so a small automaton over characters decides exactly: a text is alive when something can still follow it that
makes it a valid list, and a token is allowed when the text stays alive and there is room left to close the list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torch import Tensor

from keyecli.engine.thinking import THINK_CLOSE, THINK_OPEN
from keyecli.errors import ModelError, UsageError

LIST_CHARACTERS = frozenset("[]., 0123456789")
# How byte-level BPE writes a space inside a token; the list's other characters stand for themselves.
BYTE_LEVEL_SPACE = "Ġ"
# Between the reasoning and the answer, as chat templates write it.
AFTER_THINKING = "\n\n"

_NUMBER_PLACES = ("start", "end")

Place = Literal["begin", "opened", "start", "comma", "end", "closed", "next", "gap", "done"]


@dataclass(frozen=True)
class SpanRange:
    """What the numbers of a list may be: `low` to `high` in units of the last decimal, both included."""

    low: int
    high: int
    decimals: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"no span fits between {self.low} and {self.high}")

    @classmethod
    def of_seconds(cls, duration_s: float, decimals: int = 1) -> SpanRange:
        """From 0 to the last time with so many decimals that is not behind the end, and never empty."""
        units = math.floor(round(duration_s * 10**decimals, 6))
        return cls(0, max(1, units), decimals)

    def spelled(self, units: int) -> str:
        """125 with one decimal is "12.5"."""
        if not self.decimals:
            return str(units)
        whole, rest = divmod(units, 10**self.decimals)
        return f"{whole}.{rest:0{self.decimals}d}"

    def smallest(self, written: str, low: int, high: int) -> int | None:
        """The smallest number from `low` to `high` whose spelling begins with `written`; None when there is none."""
        scale = 10**self.decimals
        whole, point, rest = written.partition(".")
        if point:
            # So many decimals are written; the others follow.
            unit = 10 ** (self.decimals - len(rest))
            first = int(whole) * scale + int(rest or "0") * unit
            return _within(first, first + unit - 1, low, high)
        if not whole:
            return _within(0, high, low, high)
        more = 0
        while True:
            begin = int(whole) * 10**more * scale
            if begin > high or (more and whole == "0"):
                return None
            found = _within(begin, begin + 10**more * scale - 1, low, high)
            if found is not None:
                return found
            more += 1


def _within(first: int, last: int, low: int, high: int) -> int | None:
    value = max(first, low)
    return value if value <= min(last, high) else None


class ListState(NamedTuple):
    """A list written so far: where it stands, the number being written, and the last number that is complete."""

    place: Place = "begin"
    written: str = ""
    last: int = -1


# Where a sign leads; inside numbers it depends on their values.
_SIGNS: dict[tuple[Place, str], Place] = {
    ("begin", "["): "opened",
    ("opened", "]"): "done",
    ("opened", "["): "start",
    ("comma", " "): "end",
    ("closed", "]"): "done",
    ("closed", ","): "next",
    ("next", " "): "gap",
    ("gap", "["): "start",
}


class SpanAutomaton:
    """The language of valid lists over `numbers`, one character at a time."""

    def __init__(self, numbers: SpanRange) -> None:
        self.numbers = numbers
        # From a comma on: " [", two of the longest numbers with ", " between them, "]]".
        self.longest_closing = 2 * len(numbers.spelled(numbers.high)) + 6

    def step(self, state: ListState, character: str) -> ListState | None:
        """The state after one more character; None when nothing could make the list valid any more."""
        if state.place in _NUMBER_PLACES:
            return self._number_step(state, character)
        new = _SIGNS.get((state.place, character))
        # A second span needs room for a start behind the last end, and an end behind that.
        if new is None or (new == "next" and state.last + 2 > self.numbers.high):
            return None
        return ListState(new, "", state.last)

    def run(self, state: ListState, text: str) -> ListState | None:
        """The state after all of `text`; None when one of its characters is not possible."""
        for character in text:
            following = self.step(state, character)
            if following is None:
                return None
            state = following
        return state

    def closing_length(self, state: ListState) -> int:
        """Characters of the shortest text that makes the list complete."""
        place = state.place
        if place == "begin":
            return 2
        if place == "opened":
            return 1
        if place == "done":
            return 0
        if place == "closed":
            return 1
        if place == "end":
            number = self._smallest(state)
            return len(self.numbers.spelled(number)) - len(state.written) + 2
        if place == "comma":
            return 1 + self.closing_length(ListState("end", "", state.last))
        if place == "start":
            number = self._smallest(state)
            rest = len(self.numbers.spelled(number)) - len(state.written)
            return rest + 1 + self.closing_length(ListState("comma", "", number))
        if place == "gap":
            return 1 + self.closing_length(ListState("start", "", state.last))
        return 1 + self.closing_length(ListState("gap", "", state.last))

    def _bounds(self, state: ListState) -> tuple[int, int]:
        low = max(self.numbers.low, state.last + 1)
        return low, self.numbers.high - (state.place == "start")

    def _smallest(self, state: ListState) -> int:
        number = self.numbers.smallest(state.written, *self._bounds(state))
        assert number is not None, "a state that was reached can be completed"
        return number

    def _number_step(self, state: ListState, character: str) -> ListState | None:
        if character in (",", "]"):
            return self._number_ends(state, character)
        written = state.written + character
        if not self._is_number_begin(written):
            return None
        alive = self.numbers.smallest(written, *self._bounds(state)) is not None
        return ListState(state.place, written, state.last) if alive else None

    def _number_ends(self, state: ListState, character: str) -> ListState | None:
        whole, _, rest = state.written.partition(".")
        if not whole or len(rest) != self.numbers.decimals:
            return None
        value = int(whole + rest)
        low, high = self._bounds(state)
        if not low <= value <= high:  # without decimals, a longer number may still have been possible
            return None
        if (state.place, character) == ("start", ","):
            return ListState("comma", "", value)
        if (state.place, character) == ("end", "]"):
            return ListState("closed", "", value)
        return None

    def _is_number_begin(self, written: str) -> bool:
        """So many decimals at most, one point, and no leading zero."""
        whole, _, rest = written.partition(".")
        if not whole or len(rest) > self.numbers.decimals or not (whole + rest).isdigit():
            return False
        return (whole == "0" or whole[0] != "0") and (bool(self.numbers.decimals) or "." not in written)


@dataclass
class _Node:
    """A place in the tree of the vocabulary's spellings: the ids that end here and what may follow."""

    ids: list[int] = field(default_factory=list)
    following: dict[str, _Node] = field(default_factory=dict)


class ListVocabulary:
    """The few tokens of a byte-level vocabulary that a list of spans can be made of, as a tree of their characters.

    Made once for a tokenizer; afterwards a step looks at these alone, whatever the size of the vocabulary. `think_open`
    and `think_close` are the ids of the tags around reasoning, None where a tag is no token of its own. ModelError
    when one of the list's characters has no token of its own, so that no answer could be spelled.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = set(tokenizer.added_tokens_decoder)
        vocabulary = tokenizer.get_vocab()
        self.think_open: int | None = vocabulary.get(THINK_OPEN)
        self.think_close: int | None = vocabulary.get(THINK_CLOSE)
        self.spellings: dict[int, str] = {}
        allowed = (LIST_CHARACTERS - {" "}) | {BYTE_LEVEL_SPACE}
        for token, index in vocabulary.items():
            if index not in added and token and allowed.issuperset(token):
                self.spellings[index] = token.replace(BYTE_LEVEL_SPACE, " ")
        missing = LIST_CHARACTERS - set(self.spellings.values())
        if missing:
            signs = " ".join(repr(sign) for sign in sorted(missing))
            raise ModelError(
                f"the tokenizer has no token for {signs}, so that answers cannot be constrained: use --unconstrained"
            )
        self._root = _Node()
        for index, spelling in self.spellings.items():
            node = self._root
            for character in spelling:
                node = node.following.setdefault(character, _Node())
            node.ids.append(index)

    def continuations(
        self, automaton: SpanAutomaton, state: ListState, room_tokens: int
    ) -> Iterator[tuple[int, ListState]]:
        """Each token that may come next when so many tokens are left, with the state that it leads to.

        A character is at most a token, so a list that can be closed in n characters can be closed in n tokens.
        """
        plenty = automaton.longest_closing < room_tokens
        waiting: list[tuple[_Node, ListState]] = [(self._root, state)]
        while waiting:
            node, reached = waiting.pop()
            if node.ids and (plenty or automaton.closing_length(reached) < room_tokens):
                yield from ((index, reached) for index in node.ids)
            for character, following in node.following.items():
                stepped = automaton.step(reached, character)
                if stepped is not None:
                    waiting.append((following, stepped))


@lru_cache(maxsize=4)
def list_vocabulary(tokenizer: Any) -> ListVocabulary:
    """The list tokens of a tokenizer, kept for the tokenizers in use."""
    return ListVocabulary(tokenizer)


@dataclass(frozen=True)
class ScoredToken:
    """A token of the list: its text, and how likely it was among the tokens that were allowed (natural logarithm)."""

    text: str
    log_probability: float


class SpanConstraint:
    """Free reasoning, then a list of spans; closes both before `max_tokens` tokens.

    `thinking_open` says that the answer begins inside `<think>`; with `think` the model reasons, and opens `<think>`
    first where the prompt did not. Reasoning goes on until the model closes it, or until `answer_tokens` tokens are
    left. `log_odds_present` says, once the list is complete, how much likelier the model found a list with a span than
    an empty one. ModelError as for ListVocabulary; UsageError when `max_tokens` cannot hold the shortest answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        numbers: SpanRange,
        *,
        max_tokens: int,
        answer_tokens: int,
        thinking_open: bool,
        think: bool = True,
    ) -> None:
        self._automaton = SpanAutomaton(numbers)
        self._vocabulary = list_vocabulary(tokenizer)
        self._left = max_tokens
        can_open = self._vocabulary.think_open is not None
        can_close = self._vocabulary.think_close is not None
        self._closing = _encoded(tokenizer, "\n" + THINK_CLOSE + AFTER_THINKING)
        self._after = _encoded(tokenizer, AFTER_THINKING)
        # Where the end of reasoning is no token of its own it cannot be told in time: there is none.
        self._reasoning = think and can_close and (thinking_open or can_open)
        self._forced: list[int] = []
        if self._reasoning and not thinking_open:
            self._forced = _encoded(tokenizer, THINK_OPEN + "\n")
        elif thinking_open and not self._reasoning:
            self._forced = list(self._closing)
        shortest = self._automaton.closing_length(ListState())
        self._kept = max(answer_tokens, len(self._closing) + shortest)
        least = len(self._forced) + shortest + (len(self._closing) if self._reasoning else 0)
        if max_tokens < least:
            raise UsageError(f"an answer takes at least {least} tokens, not {max_tokens}: raise --max-tokens")
        self._state = ListState()
        self._states: dict[int, ListState] = {}
        self._allowed: list[int] = []
        self._presence = _Presence()
        self.tokens: list[ScoredToken] = []

    @property
    def text(self) -> str:
        """The list so far."""
        return "".join(token.text for token in self.tokens)

    @property
    def is_complete(self) -> bool:
        return self._state.place == "done"

    @property
    def log_odds_present(self) -> float:
        """Logarithm of P(at least one span) / P(none); infinite when the other was impossible."""
        return self._presence.log_odds

    def allowed(self) -> Sequence[int] | None:
        if not self._forced and self._reasoning and self._left <= self._kept:
            self._reasoning = False
            self._forced = list(self._closing)
        if self._forced:
            return self._forced[:1]
        if self._reasoning:
            return None
        if self.is_complete:
            return []
        self._states = dict(self._vocabulary.continuations(self._automaton, self._state, self._left))
        self._allowed = sorted(self._states)
        return self._allowed

    def accept(self, token_id: int, log_probabilities: Tensor | None) -> None:
        self._left -= 1
        if self._forced:
            self._forced.pop(0)
        elif self._reasoning:
            if token_id == self._vocabulary.think_close:
                self._reasoning = False
                self._forced = list(self._after)
        else:
            assert log_probabilities is not None
            self._accept_list_token(token_id, log_probabilities.tolist())

    def _accept_list_token(self, token_id: int, log_shares: list[float]) -> None:
        chosen = self._allowed.index(token_id)
        if self._state.place in ("begin", "opened"):
            self._presence.add([self._states[index].place for index in self._allowed], log_shares, chosen)
        self._state = self._states[token_id]
        self.tokens.append(ScoredToken(self._vocabulary.spellings[token_id], log_shares[chosen]))


class _Presence:
    """Adds up how likely lists with and without a span were, over the tokens that decide it."""

    def __init__(self) -> None:
        self._present = 0.0
        self._absent = 0.0
        self._reached = 1.0

    def add(self, places: Sequence[Place], log_shares: Sequence[float], chosen: int) -> None:
        """One step: where each allowed token would lead, its log probability, and which one was taken."""
        for place, log_share in zip(places, log_shares, strict=True):
            share = self._reached * math.exp(log_share)
            if place == "done":
                self._absent += share
            elif place != "opened":
                self._present += share
        self._reached *= math.exp(log_shares[chosen])

    @property
    def log_odds(self) -> float:
        if not self._absent:
            return math.inf
        return math.log(self._present / self._absent) if self._present else -math.inf


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
