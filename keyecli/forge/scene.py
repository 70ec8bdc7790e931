"""Descriptions of synthetic clips, what is visible when and where, sampled from a seed; nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from keyecli.errors import UsageError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
EXTRA_SHAPES = ("heart",)  # drawn only where `SceneOptions.shapes` names them: nothing was trained on them
SPINNING_SHAPES = ("square", "triangle", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 35, 35),
    "green": (35, 200, 65),
    "blue": (45, 95, 245),
    "yellow": (245, 215, 40),
    "purple": (185, 55, 220),
    "white": (245, 245, 245),
}
TEXT_COLOURS = ("white", "yellow")
# fmt: off
WORDS = (
    "CAT", "DOG", "SUN", "MAP", "KEY", "BOX", "ICE", "JAM", "FOX", "OWL",
    "GATE", "LAMP", "FISH", "MOON", "TREE", "BIRD", "ROAD", "SHIP", "WOLF", "RAIN", "STOP", "OPEN", "EXIT",
    "HOUSE", "RIVER", "MUSIC", "BREAD", "CLOUD", "QUICK", "HAZEL", "ZEBRA", "PIANO",
)
# fmt: on
MOTIONS = ("left", "right", "up", "down", "spin")  # besides "still"
EXTRA_MOTIONS = ("grow",)  # as EXTRA_SHAPES
GROWTH = (0.5, 1.8)  # sizes at the beginning and the end of "grow", as shares of the object's own

STEP_S = 0.5  # every boundary of every event lies on this grid
MIN_SPAN_S = 1.5
MIN_GAP_S = 1.0
RATES = (12, 16, 20, 24, 30)
SIZES: tuple[tuple[int, int], ...] = (
    (320, 240),
    (320, 180),
    (240, 240),
    (240, 320),
    (180, 320),
    (640, 360),
    (480, 480),
)
_SIZE_WEIGHTS = (0.24, 0.22, 0.16, 0.12, 0.12, 0.08, 0.06)
MAX_SIDE = 1024  # pixels
MAX_TRACKS = 5
MAX_DISTRACTORS = 3
WAVES = 6  # cosine waves in a background texture
MAX_SHAKE = 0.02  # of the short side
_PLACEMENTS = 12  # candidate positions looked at together

# Turns after which a shape looks the same; a spin is a multiple of it, so that a shape at rest is upright.
_SYMMETRY_TURNS = {"square": 1 / 4, "triangle": 1 / 3, "star": 1 / 5, "cross": 1 / 4}

T = TypeVar("T")


class Draws:
    """Random choices from a PCG64 stream, drawn in blocks because single numpy draws are slow."""

    def __init__(self, seed: int | Sequence[int]) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._block: Iterator[float] = iter(())

    def random(self) -> float:
        """A float in [0, 1)."""
        for value in self._block:
            return value
        self._block = iter(self._generator.random(128).tolist())
        return next(self._block)

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self.random()

    def log_uniform(self, low: float, high: float) -> float:
        """A float in [low, high) whose logarithm is uniform; low > 0."""
        return low * (high / low) ** self.random()

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.random() < probability

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`, all equally likely."""
        return items[int(self.random() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of `items`; `weights` need not sum to one."""
        left = self.random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different places of `items`, in random order; all of them if there are fewer."""
        pool = list(items)
        count = min(count, len(pool))
        for place in range(count):
            other = self.integer(place, len(pool) - 1)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def points(self, count: int) -> np.ndarray:
        """float64 [count, 2] in [0, 1)."""
        return self._generator.random((count, 2))


@dataclass(frozen=True)
class SceneOptions:
    """What kind of clips to sample; durations in seconds, `size` is (width, height) in pixels, None draws one.

    shapes, motions: what is drawn, all equally likely but for "spin"; of SHAPES and EXTRA_SHAPES, MOTIONS and EXTRA_MOTIONS.
    UsageError: durations that are not multiples of 0.5 from 2 up, a size or rate that is odd or out of range, no shapes
    or motions, unknown ones or one twice.
    """

    min_duration_s: float = 2.0
    max_duration_s: float = 60.0
    size: tuple[int, int] | None = None
    rate: int | None = None
    shapes: tuple[str, ...] = SHAPES
    motions: tuple[str, ...] = MOTIONS

    def __post_init__(self) -> None:
        for duration_s in (self.min_duration_s, self.max_duration_s):
            if not math.isfinite(duration_s) or duration_s < 2.0 or duration_s % STEP_S:
                raise UsageError(
                    f"a clip cannot last {duration_s:g} s; give a multiple of {STEP_S} from 2 up"
                )
        if self.min_duration_s > self.max_duration_s:
            raise UsageError(
                f"the shortest duration ({self.min_duration_s:g} s) is above the longest "
                f"({self.max_duration_s:g} s); give a shorter one"
            )
        if self.size is not None and any(side % 2 or not 64 <= side <= MAX_SIDE for side in self.size):
            raise UsageError(
                f"a clip cannot be {self.size[0]}x{self.size[1]} pixels; give even sides from 64 to {MAX_SIDE}"
            )
        if self.rate is not None and (self.rate % 2 or not 4 <= self.rate <= 60):
            raise UsageError(
                f"a clip cannot have {self.rate} frames a second; give an even number from 4 to 60"
            )
        _check_names("shape", self.shapes, (*SHAPES, *EXTRA_SHAPES))
        _check_names("motion", self.motions, (*MOTIONS, *EXTRA_MOTIONS))


def _check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"there is no {kind} {unknown[0]!r}; known are {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"give at least one {kind} and each only once; known are {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class Appearance:
    """One visible span of a track, with what it does; in seconds, scene pixels, turns.

    The object stands at (x, y) until motion_start_s, then moves evenly by (dx, dy), turns by `turns` and changes its
    size from `growth[0]` to `growth[1]` times the track's own until motion_end_s, then rests. A still object has motion
    "still" and zero-length motion at start_s.
    """

    start_s: float
    end_s: float
    x: float
    y: float
    motion: str = "still"
    motion_start_s: float = 0.0
    motion_end_s: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    turns: float = 0.0
    growth: tuple[float, float] = (1.0, 1.0)

    @property
    def span(self) -> tuple[float, float]:
        return self.start_s, self.end_s

    @property
    def motion_fills_span(self) -> bool:
        """True when the object moves, spins or grows during all the time it is visible."""
        return self.motion != "still" and (self.motion_start_s, self.motion_end_s) == self.span


@dataclass(frozen=True, slots=True)
class Track:
    """A named object: a shape (`shape` is set) or a text (`text` is set), appearances in order of time.

    size_px is the diameter of a shape or the side of one glyph dot of a text.
    """

    name: str
    colour: str
    size_px: float
    appearances: tuple[Appearance, ...]
    shape: str = ""
    text: str = ""

    @property
    def spans(self) -> tuple[tuple[float, float], ...]:
        """The visible spans [start, end), seconds, ascending."""
        return tuple(appearance.span for appearance in self.appearances)

    def motion_spans(self, motion: str) -> tuple[tuple[float, float], ...]:
        """The spans of one kind of motion ("left", "right", "up", "down", "spin", "grow"), seconds, ascending."""
        return tuple((a.motion_start_s, a.motion_end_s) for a in self.appearances if a.motion == motion)

    @property
    def motions(self) -> tuple[str, ...]:
        """The different kinds of motion that occur, "still" left out, in order of time."""
        return tuple(dict.fromkeys(a.motion for a in self.appearances if a.motion != "still"))


@dataclass(frozen=True, slots=True)
class Distractor:
    """An unnamed dim grey ellipse ("blob") or bar ("bar"), unlike every named shape; in pixels and turns.

    It drifts from (x, y) by (dx, dy) over the clip.
    """

    shape: str
    grey: int
    radius_px: float
    angle: float
    x: float
    y: float
    dx: float
    dy: float


@dataclass(frozen=True, slots=True)
class Backdrop:
    """What lies behind the objects and what the camera adds.

    colour: mean RGB [3] (0-255). waves: [WAVES, 3], radians a pixel along x and y, and phase.
    wave_colours: [WAVES, 3], RGB amplitude of each wave.
    shake: [2 axes, 2 waves, 3], amplitude in pixels, radians a second, phase.
    noise_sigma: of 255, at the scene's own size. noise_offset: where the clip starts in the noise bank.
    """

    colour: np.ndarray
    waves: np.ndarray
    wave_colours: np.ndarray
    shake: np.ndarray
    noise_sigma: float
    noise_offset: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A clip's complete description, and so the exact truth about it.

    An object is visible at t iff start <= t < end for one of its spans; a span that reaches duration_s also
    holds t == duration_s, where the last frame stands. shapes, motions: what could have been drawn.
    """

    seed: int
    duration_s: float
    rate: int
    width: int
    height: int
    tracks: tuple[Track, ...]
    distractors: tuple[Distractor, ...]
    backdrop: Backdrop
    shapes: tuple[str, ...] = SHAPES
    motions: tuple[str, ...] = MOTIONS

    @property
    def frame_count(self) -> int:
        return round(self.duration_s * self.rate) + 1

    def frame_times(self) -> np.ndarray:
        """Times of all frames, float64 [frame_count], seconds: 0, 1/rate, ... duration_s."""
        return np.arange(self.frame_count) / self.rate

    def sampled_times(self, fps: float = 2.0) -> np.ndarray:
        """Times of the frames that sampling at `fps` picks, float64, seconds, first and last included.

        The rule of `keye ask`: 1 + floor(duration x min(fps, rate)) even targets, the nearest frame to each.
        """
        count = max(2, 1 + math.floor(self.duration_s * min(fps, self.rate) + 1e-9))
        targets = np.arange(count) * (self.duration_s / (count - 1))
        return np.floor(targets * self.rate + 0.5) / self.rate


def sample_scene(seed: int, options: SceneOptions | None = None) -> Scene:
    """Draw a scene; the same seed (>= 0) and options give the same scene."""
    options = options or SceneOptions()
    draws = Draws(seed)
    duration_s = _draw_duration(draws, options)
    rate = draws.choice(RATES)
    width, height = draws.weighted(SIZES, _SIZE_WEIGHTS)
    if options.size is not None:
        width, height = options.size
    shake_px = draws.uniform(0.2, 1.0) * MAX_SHAKE * min(width, height) if draws.chance(0.4) else 0.0
    backdrop = _draw_backdrop(draws, width, height, shake_px)
    blobs = draws.integer(0, MAX_DISTRACTORS)
    distractors = tuple(_draw_distractor(draws, width, height) for _ in range(blobs))
    tracks = _draw_tracks(draws, duration_s, width, height, options)
    # Rare: the second object, or the one shape beside a large word, found no place.
    while len(tracks) < 2 or not any(track.shape for track in tracks):
        tracks = _draw_tracks(draws, duration_s, width, height, options)
    return Scene(
        seed,
        duration_s,
        options.rate or rate,
        width,
        height,
        tracks,
        distractors,
        backdrop,
        options.shapes,
        options.motions,
    )


def clip_seed(seed: int, index: int) -> int:
    """The scene seed of clip `index` (below a million) of a data set made with `seed`."""
    return seed * 1_000_000 + index


def _draw_duration(draws: Draws, options: SceneOptions) -> float:
    drawn = draws.log_uniform(options.min_duration_s, options.max_duration_s + STEP_S)
    return min(math.floor(drawn / STEP_S) * STEP_S, options.max_duration_s)


def _draw_backdrop(draws: Draws, width: int, height: int, shake_px: float) -> Backdrop:
    light = draws.uniform(22, 78)
    colour = np.array([light + draws.uniform(-14, 14) for _ in range(3)])
    contrast = np.array([draws.uniform(2, 12)] * 3) + [draws.uniform(-5, 5) for _ in range(3)]
    waves, wave_colours = np.empty((WAVES, 3)), np.empty((WAVES, 3))
    for index in range(WAVES):
        fine = index >= WAVES - 2
        length = max(width, height) * (draws.uniform(0.1, 0.25) if fine else draws.uniform(0.35, 1.3))
        direction = draws.uniform(0, math.pi)
        rate = 2 * math.pi / length
        waves[index] = rate * math.cos(direction), rate * math.sin(direction), draws.uniform(0, 2 * math.pi)
        wave_colours[index] = contrast * (0.3 if fine else draws.uniform(0.4, 1.0))
    shake = np.zeros((2, 2, 3))
    if shake_px:
        for axis in range(2):
            for index, share in enumerate((0.65, 0.35)):
                shake[axis, index] = (
                    share * shake_px,
                    2 * math.pi * draws.uniform(0.15, 0.9),
                    draws.uniform(0, 2 * math.pi),
                )
    noise_sigma = draws.uniform(0.0, 6.0)
    return Backdrop(colour, waves, wave_colours, shake, noise_sigma, draws.integer(0, 2**20 - 1))


def _draw_distractor(draws: Draws, width: int, height: int) -> Distractor:
    shape = draws.choice(("blob", "bar"))
    radius = draws.uniform(0.03, 0.06) * min(width, height) * (1.8 if shape == "bar" else 1.0)
    x, y = draws.uniform(0, width), draws.uniform(0, height)
    dx, dy = 0.0, 0.0
    if draws.chance(0.5):
        dx, dy = draws.uniform(0, width) - x, draws.uniform(0, height) - y
    return Distractor(shape, draws.integer(70, 125), radius, draws.uniform(0, 0.5), x, y, dx, dy)


def _draw_tracks(
    draws: Draws, duration_s: float, width: int, height: int, options: SceneOptions
) -> tuple[Track, ...]:
    """Draw the named objects; one whose appearances find no free place is left out."""
    count = draws.weighted((2, 3, 4, 5), (0.25, 0.3, 0.25, 0.2))
    texts = [f"word {draws.choice(WORDS)}"] if draws.chance(0.35) else []
    if draws.chance(0.35):
        texts.append(f"number {draws.integer(0, 9)}")
    shapes = options.shapes
    kinds = draws.sample(range(len(COLOURS) * len(shapes)), max(count - len(texts), 1))
    floor = _Floor(duration_s, width, height)
    tracks = [_draw_text(draws, floor, name) for name in texts]
    colours = list(COLOURS)
    tracks += [
        _draw_shape(draws, floor, colours[kind // len(shapes)], shapes[kind % len(shapes)], options.motions)
        for kind in kinds
    ]
    return tuple(track for track in tracks if track is not None)


def _draw_text(draws: Draws, floor: _Floor, name: str) -> Track | None:
    text = name.split()[1]
    plate_columns, plate_rows = 6 * len(text) + 1, 9  # the glyphs and one dot of plate around them
    dot = draws.uniform(0.16, 0.24) * min(floor.width, floor.height) / 7
    dot = min(dot, 0.8 * floor.width / plate_columns)
    body = _Body(plate_columns * dot / 2, plate_rows * dot / 2, 0.0)
    plans = [_Plan(span) for span in _draw_spans(draws, floor.duration_s)]
    appearances = _place_all(draws, floor, body, plans)
    if appearances is None:
        return None
    return Track(name, draws.choice(TEXT_COLOURS), dot, appearances, text=text)


def _draw_shape(draws: Draws, floor: _Floor, colour: str, shape: str, motions: Sequence[str]) -> Track | None:
    diameter = draws.uniform(0.18, 0.32) * min(floor.width, floor.height)
    spans = _draw_spans(draws, floor.duration_s)
    possible = [motion for motion in motions if motion != "spin" or shape in SPINNING_SHAPES]
    if len(spans) == 1 and spans[0][1] - spans[0][0] >= 8 and draws.chance(0.3):
        plans = [_draw_sub_motion(draws, spans[0], possible)]
    else:
        plans = [_Plan(span, _draw_motion(draws, possible, 0.55), span) for span in spans]
    largest = GROWTH[1] if any(plan.motion == "grow" for plan in plans) else 1.0
    appearances = _place_all(draws, floor, _Body(0.0, 0.0, largest * diameter / 2), plans, shape)
    if appearances is None:
        return None
    return Track(f"{colour} {shape}", colour, diameter, appearances, shape=shape)


def _draw_motion(draws: Draws, possible: Sequence[str], still: float) -> str:
    """A motion, with probability `still` none; one that can spin does so in a third of the cases."""
    if draws.chance(still):
        return "still"
    others = [motion for motion in possible if motion != "spin"]
    if "spin" in possible and (not others or draws.chance(1 / 3)):
        return "spin"
    return draws.choice(others) if others else "still"


def _draw_sub_motion(draws: Draws, span: tuple[int, int], possible: Sequence[str]) -> _Plan:
    """A motion that fills only a part of the span, at rest before or after (or both)."""
    steps = span[1] - span[0]
    length = min(int(draws.log_uniform(3, max(4.0, 0.7 * steps + 1))), steps - 1)
    start = draws.integer(span[0], span[1] - length)
    return _Plan(span, _draw_motion(draws, possible, 0.0), (start, start + length))


def _draw_spans(draws: Draws, duration_s: float) -> list[tuple[int, int]]:
    """Visible spans of one track, in half-second steps, ascending, at least a second apart."""
    steps = round(duration_s / STEP_S)
    shortest = math.ceil(min(MIN_SPAN_S, duration_s / 2) / STEP_S)
    gap = round(MIN_GAP_S / STEP_S)
    if draws.chance(0.1):
        return [(0, steps)]
    count = draws.weighted((1, 2, 3), (0.65, 0.25, 0.10))
    while count > 1 and count * shortest + (count - 1) * gap + 1 > steps:
        count -= 1
    room = max(shortest, int(0.7 * steps))  # of all spans together
    longest = max(shortest, min(int((0.5 if count > 1 else 0.65) * steps), room - (count - 1) * shortest))
    lengths = []
    for left in range(count, 0, -1):
        limit = max(shortest, min(longest, room - (left - 1) * shortest))
        lengths.append(min(int(draws.log_uniform(shortest, limit + 1)), limit))
        room -= lengths[-1]
    slack = steps - sum(lengths) - (count - 1) * gap
    while slack < 0:  # short clips with several spans: shorten the longest
        lengths[lengths.index(max(lengths))] -= 1
        slack += 1
    lengths = draws.sample(lengths, count)
    if slack >= count - 1:  # a gap of 1.5 s is preferred where there is room for it
        gap += 1
        slack -= count - 1
    cuts = sorted(draws.integer(0, slack) for _ in range(count))
    if draws.chance(0.08):
        cuts[0] = 0
    if draws.chance(0.08):
        cuts[-1] = slack
    spans, position = [], 0
    for cut, length in zip(cuts, lengths, strict=True):
        spans.append((position + cut, position + cut + length))
        position += length + gap
    return spans


@dataclass(frozen=True, slots=True)
class _Plan:
    """An appearance before it has a place; times in half-second steps."""

    span: tuple[int, int]
    motion: str = "still"
    motion_span: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class _Body:
    """The room an object takes, pixels: a box of half sides (core_x, core_y), widened by `radius`."""

    core_x: float
    core_y: float
    radius: float


class _Floor:
    """Where the placed objects stand at every half second, to keep new ones away from them."""

    def __init__(self, duration_s: float, width: int, height: int) -> None:
        self.duration_s, self.width, self.height = duration_s, width, height
        steps = round(duration_s / STEP_S) + 1
        self._xy = np.zeros((2, MAX_TRACKS, steps))
        self._visible = np.zeros((MAX_TRACKS, steps), dtype=bool)
        self._bodies: list[_Body] = []

    def add(self, body: _Body, placed: Sequence[tuple[_Plan, np.ndarray]]) -> None:
        """Take room for one object; the paths are float64 [2, steps of the span + 1]."""
        row = len(self._bodies)
        self._bodies.append(body)
        for plan, path in placed:
            window = slice(plan.span[0], plan.span[1] + 1)
            self._xy[:, row, window] = path
            self._visible[row, window] = True

    def first_free(self, body: _Body, span: tuple[int, int], paths: np.ndarray) -> int | None:
        """Index of the first candidate path in [2, K, steps] that stays clear of all objects, or None."""
        window = slice(span[0], span[1] + 1)
        rows = [row for row in range(len(self._bodies)) if self._visible[row, window].any()]
        if not rows:
            return 0
        bodies = [self._bodies[row] for row in rows]
        reach_x = np.array([body.core_x + other.core_x for other in bodies])[:, None]
        reach_y = np.array([body.core_y + other.core_y for other in bodies])[:, None]
        apart = np.array([1.04 * (body.radius + other.radius) + 1.0 for other in bodies])[:, None]
        away = np.abs(paths[:, :, None] - self._xy[:, rows, window][:, None])  # [2, K, rows, steps]
        x = np.maximum(away[0] - reach_x, 0.0)
        y = np.maximum(away[1] - reach_y, 0.0)
        collides = ((x * x + y * y < apart * apart) & self._visible[rows, window]).any(axis=(1, 2))
        index = int(collides.argmin())
        return None if collides[index] else index


def _place_all(
    draws: Draws, floor: _Floor, body: _Body, plans: Sequence[_Plan], shape: str = ""
) -> tuple[Appearance, ...] | None:
    """Give every planned appearance a place, or None if one has none; a motion that fits nowhere becomes still."""
    placed, appearances = [], []
    for plan in plans:
        found = _place(draws, floor, body, plan, shape)
        if found is None and plan.motion != "still":
            plan = _Plan(plan.span)
            found = _place(draws, floor, body, plan, shape)
        if found is None:
            return None
        appearances.append(found[0])
        placed.append((plan, found[1]))
    floor.add(body, placed)
    return tuple(appearances)


def _place(
    draws: Draws, floor: _Floor, body: _Body, plan: _Plan, shape: str
) -> tuple[Appearance, np.ndarray] | None:
    size = np.array((floor.width, floor.height), dtype=np.float64)
    # Corners reach past the nominal radius, and a shaking camera must not push an object out of the picture.
    margin = np.array((body.core_x, body.core_y)) + 1.13 * body.radius + MAX_SHAKE * size.min() + 1.0
    margin = np.minimum(margin, size / 2)
    travel = np.zeros(2)
    if plan.motion in MOTIONS[:4]:
        axis = 0 if plan.motion in ("left", "right") else 1
        distance = min(draws.uniform(0.28, 0.65) * size[axis], size[axis] - 2 * margin[axis])
        travel[axis] = -distance if plan.motion in ("left", "up") else distance
    low = margin + np.maximum(-travel, 0)
    high = size - margin - np.maximum(travel, 0)
    starts = low + draws.points(_PLACEMENTS) * (high - low)  # [K, 2]
    steps = np.arange(plan.span[0], plan.span[1] + 1)
    first, last = plan.motion_span
    progress = np.clip((steps - first) / max(last - first, 1), 0.0, 1.0)
    paths = starts.T[:, :, None] + travel[:, None, None] * progress  # [2, K, steps]
    index = floor.first_free(body, plan.span, paths)
    if index is None:
        return None
    motion_span = plan.motion_span if plan.motion != "still" else (plan.span[0], plan.span[0])
    appearance = Appearance(
        start_s=plan.span[0] * STEP_S,
        end_s=plan.span[1] * STEP_S,
        x=float(starts[index, 0]),
        y=float(starts[index, 1]),
        motion=plan.motion,
        motion_start_s=motion_span[0] * STEP_S,
        motion_end_s=motion_span[1] * STEP_S,
        dx=float(travel[0]),
        dy=float(travel[1]),
        turns=_draw_turns(draws, shape, (last - first) * STEP_S) if plan.motion == "spin" else 0.0,
        growth=GROWTH if plan.motion == "grow" else (1.0, 1.0),
    )
    return appearance, paths[:, index]


def _draw_turns(draws: Draws, shape: str, length_s: float) -> float:
    """Whole symmetries of the shape, at 0.12-0.18 turns a second.

    Half a second must not carry a shape onto itself (a quarter turn of a square): sampled twice a second it
    would seem to stand still.
    """
    symmetry = _SYMMETRY_TURNS[shape]
    count = max(1, round(draws.uniform(0.12, 0.18) * length_s / symmetry))
    return count * symmetry * draws.choice((-1, 1))
