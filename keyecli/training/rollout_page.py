"""A run of reinforcement learning as one HTML file: its figures over the steps, and what the model tried, with its scores."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keyecli import __version__
from keyecli.errors import InputError
from keyecli.export.files import write_texts
from keyecli.export.text import one_line, score_text, writable
from keyecli.training.metrics import read_metrics
from keyecli.training.plot import Point, smoothed, ticks

if TYPE_CHECKING:
    from jinja2 import Template

SCHEMA = "keye.rl.rollouts/1"

# Of a picture, in its own units; the page stretches it.
WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 386, 8, 182
COLOURS = 6  # that the page's style has; lines behind them begin again
MOST_POINTS = 400  # of one line, more than its picture could show apart
GIST_CHARACTERS = 200  # of a question, where only its beginning is shown
_TEMPLATE = "rollouts.html.jinja"
_TAGS = re.compile("</?(?:think|answer)>")


@dataclass(frozen=True)
class Curve:
    """One picture. fields: name of a line → figure of a step. smooth: noise hides how it goes. share: from 0 to 1, in percent.
    seldom: measured at some steps alone, so that each is a dot."""

    heading: str
    meaning: str
    fields: Mapping[str, str]
    smooth: bool = True
    share: bool = False
    seldom: bool = False


REWARD = Curve("Reward", "mean score of the answers; dots are held-out rows", {"training": "reward"})
FAMILIES = Curve("Reward by family", "by kind of row; dots are held-out rows", {})
PARTS = {"generating": "generate_s", "scoring": "reward_s", "training": "train_s"}
CURVES = (
    Curve("Spread of rewards", "standard deviation within a group", {"spread": "reward_std"}),
    Curve("Length", "mean tokens of an answer", {"tokens": "length"}),
    Curve("Cut off", "share of answers that reached the limit", {"cut off": "truncated"}, share=True),
    Curve("Entropy", "mean −log p of the drawn tokens", {"entropy": "entropy"}),
    Curve("Clip share", "answers (GRPO: tokens) without gradient", {"clipped": "clipped"}, share=True),
    Curve("Dropped groups", "tries all as good, or without scores", {"dropped": "dropped"}),
    Curve("Divergence", "from the weights at the start", {"divergence": "divergence"}, seldom=True),
    Curve("Mismatch", "of log p, between engine and trainer", {"mismatch": "mismatch"}),
    Curve("Agreement", "keys that engine and trainer select", {"same": "agreement"}, share=True, seldom=True),
    Curve("Gradients", "their norm", {"norm": "norm"}),
    Curve("Learning rate", "of each step", {"rate": "lr"}, smooth=False),
    Curve("Time", "seconds of each part of a step", PARTS),
    Curve("Speed", "answers a second of generating", {"answers": "rollouts_per_s"}),
)


@dataclass(frozen=True)
class Line:
    """One figure over the steps, as a line or as dots. smooth: the line is smoothed; thin: a thin one has all figures besides."""

    name: str
    colour: int
    points: Sequence[Point]
    smooth: bool = False
    dots: bool = False
    thin: bool = False

    @property
    def drawn(self) -> Sequence[Point]:
        return smoothed(self.points) if self.smooth else self.points


@dataclass(frozen=True)
class Frame:
    """The part of a picture that lines are drawn in, over a range of steps and one of values."""

    steps: tuple[float, float]
    values: tuple[float, float]

    def x(self, step: float) -> float:
        first, last = self.steps
        return round(LEFT + (RIGHT - LEFT) * (step - first) / (last - first), 1)

    def y(self, value: float) -> float:
        low, high = self.values
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    def path(self, points: Sequence[Point]) -> str:
        """The points of an SVG polyline."""
        return " ".join(f"{self.x(step)},{self.y(value)}" for step, value in _thinned(points))


def write_page(metrics: Path, rollouts: Path, page: Path, title: str, most: int = 60) -> None:
    """Write a page that opens offline, without scripts, in light and dark, in the place of one that is there: curves of what
    `read_metrics` reads, a series without figures left out, and the newest `most` groups of answers, the last step first.

    The same files give the same page; what is not its own is escaped. InputError for a file that cannot be read or is of another
    kind, UsageError and KeyeError as `write_texts`.
    """
    rows = read_metrics(metrics)
    groups, all_groups = read_rollouts(rollouts, most)
    html = _template().render(
        title=one_line(title),
        generator=f"keye {__version__}",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        facts=_facts(rows),
        pictures=pictures(rows),
        groups=groups,
        all_groups=all_groups,
    )
    write_texts([(page, html)], overwrite=True)


def read_rollouts(path: Path, most: int) -> tuple[list[dict[str, Any]], int]:
    """The newest `most` groups as the page shows them, the last step first, and how many the file has; a last line that was never
    finished is passed over. InputError for a file that cannot be read, or a line of another kind among the newest."""
    newest: deque[tuple[int, bytes]] = deque(maxlen=most)
    count = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                # A machine that crashes can leave zeros where a line was to be.
                if line.endswith(b"\n") and line.strip(b"\0\n"):
                    newest.append((number, line))
                    count += 1
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a rollouts.jsonl") from error
    groups = [_parsed(line, path, number) for number, line in newest]
    return sorted(groups, key=lambda group: group["step"], reverse=True), count


def pictures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the page draws, in the order of the page; all over the same steps, so that they can be compared."""
    rows = [row for row in rows if row.get("kind") in ("step", "eval")]
    steps = [float(row["step"]) for row in rows] or [0.0]
    span = (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 1, steps[0] + 1)
    held_out = Line("held-out", 1, _points(rows, "eval", "reward"), dots=True, thin=True)
    found = [(REWARD, [*_lines(rows, REWARD), held_out]), (FAMILIES, _family_lines(rows))]
    found += [(curve, _lines(rows, curve)) for curve in CURVES]
    drawn = [(curve, [line for line in lines if line.points]) for curve, lines in found]
    return [_picture(curve, lines, span) for curve, lines in drawn if lines]


def _lines(rows: Sequence[Mapping[str, Any]], curve: Curve) -> list[Line]:
    return [
        Line(
            name,
            colour,
            _points(rows, "step", field),
            smooth=curve.smooth and not curve.seldom,
            dots=curve.seldom,
            thin=curve.smooth or curve.seldom,
        )
        for colour, (name, field) in enumerate(curve.fields.items())
    ]


def _family_lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Of each family a line and dots; none is thin, for many would hide each other."""
    lines = []
    for place, family in enumerate(sorted({name for row in rows for name in _families(row)})):
        name, colour = _family(family), place % COLOURS
        rewards = [{**row, "reward": _families(row).get(family)} for row in rows]
        lines.append(Line(name, colour, _points(rewards, "step", "reward"), smooth=True))
        lines.append(Line(f"{name}, held-out", colour, _points(rewards, "eval", "reward"), dots=True))
    return lines


def _families(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row.get("families") or {}


def _family(name: str) -> str:
    return one_line(name) or "no family"


def _points(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> list[Point]:
    """(step, figure) of the rows of a kind that have the figure, in the order of steps."""
    return sorted(
        (float(row["step"]), float(row[name]))
        for row in rows
        if row.get("kind") == kind and isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    )


def _picture(curve: Curve, lines: Sequence[Line], span: tuple[float, float]) -> dict[str, Any]:
    frame = Frame(span, _range([value for line in lines for _, value in line.points], share=curve.share))
    legend = [_legend(curve, line) for line in lines]
    return {
        "heading": curve.heading,
        "meaning": curve.meaning,
        "label": "; ".join(entry["text"] for entry in legend),
        "values": [(frame.y(value), _number(value, curve)) for value in ticks(*frame.values, 5)],
        "steps": [(frame.x(step), f"{step:.0f}") for step in ticks(*span, 7) if step == round(step)],
        "lines": [_drawn(curve, line, frame) for line in lines],
        "legend": legend,
    }


def _drawn(curve: Curve, line: Line, frame: Frame) -> dict[str, Any]:
    # A line of one point would not be seen.
    dots = line.points if line.dots or len(line.points) == 1 else []
    return {
        "colour": line.colour,
        "thin": frame.path(line.points) if line.thin else "",
        "strong": "" if line.dots else frame.path(line.drawn),
        "dots": [
            (frame.x(step), frame.y(value), f"step {step:.0f}: {_number(value, curve)}")
            for step, value in _thinned(dots)
        ],
    }


def _legend(curve: Curve, line: Line) -> dict[str, Any]:
    step, value = line.drawn[-1]
    text = f"{line.name}: {_number(value, curve)} at step {step:.0f}"
    return {"colour": line.colour, "dots": line.dots, "text": text}


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """The lowest and the highest of as many neighbours as it takes, so no spike is lost; of equals the first and the last."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    parts = (points[begin : begin + size] for begin in range(0, len(points), size))
    ends = ((min(part, key=_value), max(reversed(part), key=_value)) for part in parts)
    return [point for pair in ends for point in sorted(set(pair))]


def _value(point: Point) -> float:
    return point[1]


def _range(values: Sequence[float], *, share: bool) -> tuple[float, float]:
    """What a picture shows: from 0 where the values come near it, with some room; of shares nothing above all."""
    low, high = min(values), max(values)
    if 0 <= low < 0.5 * high:
        low = 0.0
    room = 0.06 * (high - low) if high - low > 1e-6 * abs(high) else 0.1 * abs(high) or 1.0
    bottom = low if low == 0 else low - room
    return bottom, min(high + room, 1.0) if share and high <= 1 else high + room


def _number(value: float, curve: Curve) -> str:
    return f"{100 * value:.4g}%" if curve.share else f"{value:.4g}"


def _facts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(name, value) of what holds for the whole run."""
    facts = []
    rewards, held_out = (_points(rows, kind, "reward") for kind in ("step", "eval"))
    if rewards:
        facts.append(("steps", f"{len(rewards):,}"))
        first, last = rewards[0][1], smoothed(rewards)[-1][1]
        facts.append(("reward", f"{score_text(first)} at first, {score_text(last)} at last (smoothed)"))
    if held_out:
        told = [f"{score_text(value)} at step {step:.0f}" for step, value in (held_out[0], held_out[-1])]
        facts.append(("held-out reward", ", ".join(dict.fromkeys(told))))
    return facts


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if record["schema"] != SCHEMA:
            raise ValueError(record["schema"])
        return _group(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"line {number} of {path} is none of {SCHEMA}; give a rollouts.jsonl") from error


def _group(record: Mapping[str, Any]) -> dict[str, Any]:
    """One prompt and its tries, the best first."""
    tries = sorted(record["rollouts"], key=_rank)
    return {
        "step": int(record["step"]),
        "family": _family(record["family"]),
        "source": one_line(record["source"]),
        "gist": one_line(record["question"])[:GIST_CHARACTERS],
        "question": _words(record["question"]),
        "truth": _words(record["truth"]),
        "videos": [one_line(video) for video in record["videos"]],
        "mean": _score(record["mean"]),
        "kept": bool(record["kept"]),
        "tries": [_try(one) for one in tries],
    }


def _rank(one: Mapping[str, Any]) -> float:
    return math.inf if one["score"] is None else -one["score"]


def _try(one: Mapping[str, Any]) -> dict[str, Any]:
    reasoning, answer = _words(one["reasoning"]), one["answer"]
    text = _words(one["text"])
    answered = None if answer is None else _words(answer)
    advantage = one["advantage"]
    facts = [] if advantage is None else [f"advantage {advantage:+.2f}"]
    facts += [f"{one_line(name)} {_score(value)['text']}" for name, value in one["parts"].items()]
    facts += [f"{one['tokens']:,} tokens", _drawn_by([version for version, _ in one["versions"]])]
    return {
        "score": _score(one["score"]),
        "facts": [fact for fact in facts if fact],
        "cut": one["ended"] == "length",
        "reasoning": reasoning if answered is not None else "",
        "answer": answered,
        "text": text if answered is None or _says_more(text, reasoning, answered) else "",
    }


def _says_more(text: str, reasoning: str, answer: str) -> bool:
    """Whether the model wrote anything that is neither its reasoning nor its answer."""
    rest = text.replace(reasoning, "", 1).replace(answer, "", 1)
    return bool(_TAGS.sub("", rest).strip())


def _drawn_by(versions: Sequence[int]) -> str:
    """Which weights drew an answer; several, when steps were made while it was being written."""
    names = [str(version) for version in dict.fromkeys(versions)]
    return f"weights {' and '.join(names)}" if names else ""


def _score(score: float | None) -> dict[str, Any]:
    """A score for a reader, and its colour: how far from bad to good in percent, None where there is no score."""
    if score is None:
        return {"text": "no score", "percent": None}
    return {"text": score_text(score), "percent": round(100 * min(max(score, 0.0), 1.0))}


def _words(text: str) -> str:
    return writable(text).strip()


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string((files("keyecli.training") / _TEMPLATE).read_text(encoding="utf-8"))
