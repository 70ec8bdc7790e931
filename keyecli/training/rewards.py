"""Rewards as the command line names them: NAME[:option=value,…], several of them weighed together into one score."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module, invalidate_caches
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from keyecli.errors import KeyeError, UsageError
from keyecli.training.attempts import Attempt, Reward
from keyecli.training.reward_reading import row_name
from keyecli.training.reward_rules import BUILTIN, format

JUDGED = ("caption", "context")
"""Rewards of `keyecli.training.judge`."""
OUTCOME = "auto"  # what tells the context reward which answers are right, if it is not said
PASSES = 0.5  # from this score on a gate is open
_EVERY = ("weight", "gate")
_KNOWN = f"known are {', '.join((*BUILTIN, *JUDGED))}, and module:function for your own"

OwnFunction = Callable[[str, dict[str, Any]], float]
"""A user's: everything that the model wrote, and the columns of the row → a score, which need not lie between 0 and 1."""


@dataclass(frozen=True)
class Scores:
    """total: the reward of an attempt, None where a part has none; parts: the score of each by its name, before any weight."""

    total: float | None
    parts: dict[str, float | None]


@dataclass(frozen=True)
class Part:
    """One of the rewards of a run."""

    name: str
    reward: Reward
    weight: float = 1.0
    gate: bool = False


@dataclass(frozen=True)
class Composite:
    """The weighted mean of all parts that are no gates, and 0 where a gate scores less than PASSES."""

    parts: tuple[Part, ...]

    def __call__(self, attempts: Sequence[Attempt]) -> list[Scores]:
        """Scores of attempts in their order. RowError for a row that holds nothing to compare answers with, KeyeError for what a
        user's function does wrong."""
        columns = [part.reward(attempts) for part in self.parts]
        return [self._weighed(values) for values in zip(*columns, strict=True)]

    def _weighed(self, values: Sequence[float | None]) -> Scores:
        scores = {part.name: value for part, value in zip(self.parts, values, strict=True)}
        points, weights, is_open = 0.0, 0.0, True
        for part, value in zip(self.parts, values, strict=True):
            if value is None:
                return Scores(None, scores)
            if part.gate:
                is_open = is_open and value >= PASSES
            else:
                points += part.weight * value
                weights += part.weight
        return Scores(points / weights if is_open else 0.0, scores)


@dataclass(frozen=True)
class Spec:
    """A reward as asked for. name: of a built-in reward, or "module:function"; options: those of its own."""

    text: str
    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    gate: bool = False


def compose(specs: Sequence[str], judge: Any = None) -> Composite:
    """What `--reward` asks for. judge: a `keyecli.training.judge.Judge`, for `caption` and `context`.

    A name that is neither in BUILTIN nor in JUDGED, with a function behind its colon, is a module in the current folder or an
    installed one, whose code is run. UsageError: what is not known, or does not go together.
    """
    parsed = [parse_spec(text) for text in specs]
    _check(parsed)
    times = Counter(spec.name for spec in parsed)
    names = [spec.name if times[spec.name] == 1 else spec.text for spec in parsed]
    return Composite(
        tuple(
            Part(name, _built(spec, judge), spec.weight, spec.gate)
            for name, spec in zip(names, parsed, strict=True)
        )
    )


def parse_spec(text: str) -> Spec:
    """Takes NAME[:option=value,…] apart, an option without a value being true; UsageError for what is not written so."""
    name, colon, behind = text.partition(":")
    items = behind.split(",") if colon else []
    if not name or not all(items):
        raise UsageError(f"--reward {text} must be written as NAME or NAME:option=value,option=value")
    if name not in BUILTIN and name not in JUDGED:
        # A user's options may stand behind a comma or, as those of the others, behind a colon.
        function, *items = (*items[0].split(":", 1), *items[1:]) if items else ("",)
        if not function or "=" in function or function in _EVERY:
            raise UsageError(f"there is no reward {name}; {_KNOWN}")
        name = f"{name}:{function}"
    options: dict[str, str] = {}
    for item in items:
        option, equals, value = item.partition("=")
        if option in options:
            raise UsageError(f"--reward {text} says {option} twice")
        options[option] = value if equals else "true"
    if "gate" in options and "weight" in options:
        raise UsageError(f"--reward {text} has a weight, and a gate has none")
    gate = _value(name, "gate", options.pop("gate", "false"), bool)
    weight = _weight(name, options.pop("weight", "1"))
    return Spec(text, name, options, weight, gate)


def _check(specs: Sequence[Spec]) -> None:
    if not specs:
        raise UsageError("there is nothing to learn from: give a --reward")
    for text, times in Counter(spec.text for spec in specs).items():
        if times > 1:
            raise UsageError(f"--reward {text} is given twice")
    weights = [spec.weight for spec in specs if not spec.gate]
    if not weights:
        raise UsageError(
            f"--reward {specs[0].text} only lets others through: give one that tells good answers from bad"
        )
    if not sum(weights):
        raise UsageError("every --reward has weight=0: give one a weight above 0")


def _built(spec: Spec, judge: Any) -> Reward:
    if spec.name in JUDGED:
        return _judged(spec, judge)
    return _by_rule(spec) if spec.name in BUILTIN else _own(spec)


def _by_rule(spec: Spec) -> Reward:
    rule = BUILTIN[spec.name]
    hints = get_type_hints(rule)
    known = [
        name
        for name, parameter in inspect.signature(rule).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    options = {}
    for option, value in spec.options.items():
        if option not in known:
            raise _no_option(spec.name, option, known)
        options[option] = _value(spec.name, option, value, hints[option])
    return lambda attempts: [rule(attempt, **options) for attempt in attempts]


def _judged(spec: Spec, judge: Any) -> Reward:
    if judge is None:
        raise UsageError(f"--reward {spec.name} needs --judge URL")
    from keyecli.training.judge import judge_reward

    options = dict(spec.options)
    outcome = _outcome(options.pop("outcome", OUTCOME)) if spec.name == "context" else None
    return judge_reward(spec.name, options, judge, outcome, format)


def _outcome(text: str) -> Reward:
    """What tells the context reward which answers are right: a rule, or a user's function."""
    spec = parse_spec(text)
    if spec.name in JUDGED or spec.gate or spec.weight != 1:
        raise UsageError(
            f"--reward context: outcome must be a rule such as iou, without weight or gate, not {text}"
        )
    return _built(spec, None)


def _own(spec: Spec) -> Reward:
    for option in spec.options:
        raise _no_option(spec.name, option, ())
    function = _imported(spec.name)
    return lambda attempts: [_own_score(spec.name, function, attempt) for attempt in attempts]


def _imported(name: str) -> OwnFunction:
    path, _, function = name.partition(":")
    try:
        with _current_folder_first():
            module = import_module(path)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise UsageError(
                f"there is neither a reward {path} nor a module {error.name}; {_KNOWN}"
            ) from error
        raise UsageError(f"--reward {name} cannot be imported: {_told(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UsageError(
            f"--reward {name}: there is no function {function} in {getattr(module, '__file__', None) or path}"
        )
    return found


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Only for a moment: files there with the name of an installed module must not take its place later on."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def _own_score(name: str, function: OwnFunction, attempt: Attempt) -> float:
    try:
        score = function(attempt.response, dict(attempt.row))
    except KeyeError:
        raise
    except Exception as error:
        raise KeyeError(f"--reward {name} fails for {row_name(attempt)}: {_told(error)}") from error
    if not isinstance(score, Real) or not abs(score) <= sys.float_info.max:
        raise KeyeError(f"--reward {name} gives {score!r} for {row_name(attempt)}: it must return a number")
    return float(score)


def _value(name: str, option: str, text: str, hint: Any) -> Any:
    """The value of an option as its annotation wants it; numbers are above 0."""
    kind = next(arm for arm in get_args(hint) if arm is not NoneType) if NoneType in get_args(hint) else hint
    found: Any
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        wanted, found = f"{', '.join(others)} or {last}", text if text in get_args(kind) else None
    elif kind is bool:
        wanted, found = "true or false", {"true": True, "false": False}.get(text)
    elif kind is int:
        wanted, found = "a whole number above 0", _positive(text, int)
    elif kind is float:
        wanted, found = "a number above 0", _positive(text, float)
    else:
        wanted, found = "a text", text or None
    if found is None:
        raise UsageError(f"--reward {name}: {option} must be {wanted}, not {text or 'nothing'}")
    return found


def _positive(text: str, kind: type[int] | type[float]) -> float | None:
    with suppress(ValueError):
        if 0.0 < (number := kind(text)) <= sys.float_info.max:
            return number
    return None


def _weight(name: str, text: str) -> float:
    with suppress(ValueError):
        if 0.0 <= (weight := float(text)) <= sys.float_info.max:
            return weight
    raise UsageError(f"--reward {name}: weight must be a number from 0 on, not {text or 'nothing'}")


def _no_option(name: str, option: str, known: Sequence[str]) -> UsageError:
    return UsageError(f"--reward {name} has no option {option}; known are {', '.join((*known, *_EVERY))}")


def _told(error: Exception) -> str:
    said = next(iter(str(error).splitlines()), "").rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
