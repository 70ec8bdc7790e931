"""Questions about a scene with their exact answers: when, how often, in which order, which colour."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from keyecli.forge.scene import COLOURS, SPINNING_SHAPES, WORDS, Draws, Scene, Track

Spans = Sequence[tuple[float, float]]

_ABSENT_GROUND = 0.087  # extra questions a present object: 8% of all ground questions have no answer
_ABSENT_MOTION = 0.03  # extra questions an object and motion that does not occur
_STATE_MARGIN = 6  # tenths of a second between an asked time and the object's nearest change
_VERBS = {
    "left": "move left",
    "right": "move right",
    "up": "move up",
    "down": "move down",
    "spin": "spin",
    "grow": "grow",
}
_VERBS_3RD = {motion: " ".join((f"{verb.split()[0]}s", *verb.split()[1:])) for motion, verb in _VERBS.items()}


@dataclass(frozen=True)
class Question:
    """One question with its only right answer.

    reasoning: facts that lead to the answer, "" if it can be read off.
    solution: the spans in seconds that the answer is about ([[start, end], ...], [] when nothing of the kind
    happens), None for questions that are not about spans.
    """

    task: str
    question: str
    reasoning: str
    answer: str
    solution: list[list[float]] | None = None


def questions(scene: Scene, rng: Draws) -> list[Question]:
    """All kinds of questions that fit the scene, about 10 to 30, task by task; callers sample from them."""
    return [question for ask in _TASKS.values() for question in ask(scene, rng)]


def pick_questions(scene: Scene, rng: Draws, count: int, tasks: Sequence[str] = ()) -> list[Question]:
    """`count` of the questions (fewer if there are fewer), of as many different tasks as possible.

    `tasks` limits the choice to these tasks, () allows all.
    """
    left = [question for question in questions(scene, rng) if not tasks or question.task in tasks]
    left = rng.sample(left, len(left))
    picked: list[Question] = []
    while left and len(picked) < count:
        first_of_task = {question.task: question for question in reversed(left)}
        for task in rng.sample(list(first_of_task), count - len(picked)):
            picked.append(first_of_task[task])
            left.remove(first_of_task[task])
    return picked


def format_spans(spans: Spans) -> str:
    """`[[3.0, 7.5]]`: spans in seconds with one decimal."""
    return "[" + ", ".join(f"[{start:.1f}, {end:.1f}]" for start, end in spans) + "]"


def _solution(spans: Spans) -> list[list[float]]:
    return [[start, end] for start, end in spans]


def _times(values: Sequence[float]) -> str:
    """1.0 / 1.0 and 5.0 / 1.0, 5.0 and 9.0"""
    texts = [f"{value:.1f}" for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _shapes(scene: Scene) -> list[Track]:
    return [track for track in scene.tracks if track.shape]


def _ground(scene: Scene, rng: Draws) -> Iterable[Question]:
    for track in scene.tracks:
        yield _ground_question(track.name, track.spans, rng)
        if rng.chance(_ABSENT_GROUND):
            yield _ground_question(_absent_name(scene, rng), (), rng)


def _ground_question(name: str, spans: Spans, rng: Draws) -> Question:
    text = rng.choice(
        (
            f"When is the {name} visible?",
            f"Find every time the {name} is on screen.",
            f"At what times can the {name} be seen?",
        )
    )
    return Question("ground", text, "", format_spans(spans), _solution(spans))


def _absent_name(scene: Scene, rng: Draws) -> str:
    """A name the scene could have but has not; most share a colour or a shape with one that it has."""
    present = {track.name for track in scene.tracks}
    if rng.chance(0.25):
        texts = [f"word {word}" for word in WORDS], [f"number {digit}" for digit in range(10)]
        names = texts[0] if rng.chance(0.6) else texts[1]
        return rng.choice([name for name in names if name not in present])
    shapes = _shapes(scene)
    near = [f"{track.colour} {shape}" for track in shapes for shape in scene.shapes]
    near += [f"{colour} {track.shape}" for track in shapes for colour in COLOURS]
    return rng.choice([name for name in near if name not in present])


def _ground_motion(scene: Scene, rng: Draws) -> Iterable[Question]:
    for track in _shapes(scene):
        for motion in scene.motions:
            spans = track.motion_spans(motion)
            possible = motion != "spin" or track.shape in SPINNING_SHAPES
            if not spans and not (possible and rng.chance(_ABSENT_MOTION)):
                continue
            verb, verb_3rd = _VERBS[motion], _VERBS_3RD[motion]
            text = rng.choice(
                (f"When does the {track.name} {verb}?", f"Find every time the {track.name} {verb_3rd}.")
            )
            yield Question("ground_motion", text, "", format_spans(spans), _solution(spans))


def _appear(scene: Scene, rng: Draws) -> Iterable[Question]:
    for track in scene.tracks:
        name, spans = track.name, track.spans
        text = rng.choice(
            (
                f"When does the {name} appear?",
                f"At what time does the {name} appear?",
                f"When does the {name} come into view?",
            )
        )
        answer = f"The {name} appears at {_times([start for start, _ in spans])} seconds."
        yield Question("appear", text, f"{name}: {format_spans(spans)}", answer, _solution(spans))


def _count_appearances(scene: Scene, rng: Draws) -> Iterable[Question]:
    for track in scene.tracks:
        if len(track.spans) == 1 and not rng.chance(0.5):
            continue  # most objects appear once: asking about all of them would make "1" a good guess
        text = rng.choice(
            (f"How many times does the {track.name} appear?", f"How often does the {track.name} appear?")
        )
        yield Question("count_appearances", text, _seen(track), str(len(track.spans)))


def _count_objects(scene: Scene, rng: Draws) -> Iterable[Question]:
    shapes = sorted(_shapes(scene), key=lambda track: (track.spans[0][0], track.name))
    text = rng.choice(
        (
            "How many different coloured shapes appear in the video?",
            "How many coloured shapes are there in the video?",
            "Count the coloured shapes in the video.",
        )
    )
    yield Question("count_objects", text, ", ".join(track.name for track in shapes), str(len(shapes)))


def _seen(track: Track) -> str:
    return f"{track.name}: {format_spans(track.spans)}"


def _pairs(scene: Scene, rng: Draws) -> list[tuple[Track, Track]]:
    """All pairs of tracks in random order, each in random order."""
    pairs = rng.sample(list(combinations(scene.tracks, 2)), len(scene.tracks) ** 2)
    return [(b, a) if rng.chance(0.5) else (a, b) for a, b in pairs]


def _order(scene: Scene, rng: Draws) -> Iterable[Question]:
    pairs = [(a, b) for a, b in _pairs(scene, rng) if abs(a.spans[0][0] - b.spans[0][0]) >= 1.0]
    for first, second in pairs[:3]:
        start, other = first.spans[0][0], second.spans[0][0]
        text = rng.choice(
            (
                f"Which appears first, the {first.name} or the {second.name}?",
                f"What comes first, the {first.name} or the {second.name}?",
            )
        )
        reasoning = f"{first.name}: {start:.1f}, {second.name}: {other:.1f}"
        yield Question("order", text, reasoning, f"the {(first if start < other else second).name}")


def _cooccurrence(scene: Scene, rng: Draws) -> Iterable[Question]:
    room = {"yes": 1, "no": 2}  # most pairs do meet
    for first, second in _pairs(scene, rng):
        longest_s = max(min(a[1], b[1]) - max(a[0], b[0]) for a in first.spans for b in second.spans)
        answer = "no" if longest_s <= 0 else "yes"
        if 0 < longest_s < 1.0 or not room[answer]:
            continue
        room[answer] -= 1
        text = rng.choice(
            (
                f"Are the {first.name} and the {second.name} ever visible at the same time?",
                f"Is there a time when the {first.name} and the {second.name} are both on screen?",
            )
        )
        yield Question("cooccurrence", text, f"{_seen(first)}, {_seen(second)}", answer)


def _state_at(scene: Scene, rng: Draws) -> Iterable[Question]:
    for track in rng.sample(scene.tracks, 3):
        shown, hidden = _askable_times(track, scene.duration_s)
        answer = "yes" if rng.chance(0.5) else "no"
        if not (shown if answer == "yes" else hidden):
            answer = "no" if answer == "yes" else "yes"
        ranges = shown if answer == "yes" else hidden
        if not ranges:
            continue
        low, high = rng.weighted(ranges, [high - low + 1 for low, high in ranges])
        time_s = rng.integer(low, high) / 10
        text = rng.choice(
            (
                f"Is the {track.name} visible at {time_s:.1f} seconds?",
                f"Is the {track.name} on screen at {time_s:.1f} seconds?",
            )
        )
        yield Question("state_at", text, _seen(track), answer)


def _askable_times(track: Track, duration_s: float) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Ranges of times (tenths of a second, ends included) where the track is and is not visible, off changes."""
    end = round(duration_s * 10)
    shown, hidden = [], []
    position = 0
    for start_s, end_s in track.spans:
        hidden.append((position, round(start_s * 10)))
        shown.append((round(start_s * 10), round(end_s * 10)))
        position = round(end_s * 10)
    if position < end:
        hidden.append((position, end))

    def inner(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        moved = [
            (low + (_STATE_MARGIN if low > 0 else 0), high - (_STATE_MARGIN if high < end else 0))
            for low, high in ranges
            if low < high
        ]
        return [(low, high) for low, high in moved if low <= high]

    return inner(shown), inner(hidden)


def _colour(scene: Scene, rng: Draws) -> Iterable[Question]:
    shapes = _shapes(scene)
    for track in shapes:
        if sum(other.shape == track.shape for other in shapes) == 1:
            name = track.shape
            text = rng.choice((f"What colour is the {name}?", f"Which colour does the {name} have?"))
            yield Question("colour", text, "", track.colour)


def _shape(scene: Scene, rng: Draws) -> Iterable[Question]:
    shapes = _shapes(scene)
    for track in shapes:
        if sum(other.colour == track.colour for other in shapes) == 1:
            colour = track.colour
            text = rng.choice((f"Which shape is {colour}?", f"Which shape has the colour {colour}?"))
            yield Question("shape", text, "", track.shape)


def _motion(scene: Scene, rng: Draws) -> Iterable[Question]:
    for track in _shapes(scene):
        motions = track.motions
        if len(motions) > 1:
            continue
        text = rng.choice((f"How does the {track.name} move?", f"What does the {track.name} do?"))
        yield Question("motion", text, "", f"it {_VERBS_3RD[motions[0]]}" if motions else "it stays still")


def _read_word(scene: Scene, rng: Draws) -> Iterable[Question]:
    return _read(scene, rng, "word")


def _read_number(scene: Scene, rng: Draws) -> Iterable[Question]:
    return _read(scene, rng, "number")


def _read(scene: Scene, rng: Draws, kind: str) -> Iterable[Question]:
    for track in scene.tracks:
        if track.name.startswith(f"{kind} "):
            text = rng.choice((f"Which {kind} is shown?", f"What {kind} can be read in the video?"))
            yield Question(f"read_{kind}", text, "", track.text)


def _summary(scene: Scene, rng: Draws) -> Iterable[Question]:
    rows = sorted(
        (a.start_s, track.name, a.end_s, f" {_VERBS_3RD[a.motion]}" if a.motion_fills_span else "")
        for track in scene.tracks
        for a in track.appearances
    )
    text = rng.choice(("Summarise the video with times.", "Describe what happens in the video, with times."))
    answer = "\n".join(f"{start:.1f} - {end:.1f}: {name}{motion}" for start, name, end, motion in rows)
    yield Question("summary", text, "", answer, [[start, end] for start, _, end, _ in rows])


_TASKS: dict[str, Callable[[Scene, Draws], Iterable[Question]]] = {
    "ground": _ground,
    "ground_motion": _ground_motion,
    "appear": _appear,
    "count_appearances": _count_appearances,
    "count_objects": _count_objects,
    "order": _order,
    "cooccurrence": _cooccurrence,
    "state_at": _state_at,
    "colour": _colour,
    "shape": _shape,
    "motion": _motion,
    "read_word": _read_word,
    "read_number": _read_number,
    "summary": _summary,
}
TASKS = tuple(_TASKS)
"""The names of all tasks, in the order in which `questions` asks them."""
