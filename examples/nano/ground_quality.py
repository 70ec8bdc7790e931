"""How well keye-nano finds events on held-out forged clips: `python examples/nano/ground_quality.py --clips 40`.

Forges clips from seeds that training never drew, asks for spans through the same calls as `keye ground`, with and without
`--refine`, and prints one table: mean IoU where there is one span and where there are several, how often "not there" is
said where it is true, the mean distance of boundaries from the truth, and what a clip costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keyecli
from keyecli.forge import Draws, SceneOptions, sample_scene
from keyecli.forge.scene import COLOURS, SHAPES, Scene, clip_seed
from keyecli.forge.write import write_dataset
from keyecli.tasks.ground import Grounding
from keyecli.tasks.spans import Pair, temporal_iou

TASKS = ("ground", "ground_motion")
HELD_OUT_SEED = 11
EDGE_IOU = 0.5  # the boundaries of a span are compared with those of a true span that it overlaps so much


@dataclass(frozen=True)
class Query:
    """A question about a clip and the spans that are its right answer, in seconds."""

    text: str
    spans: tuple[Pair, ...]


@dataclass(frozen=True)
class Clip:
    """A forged clip with questions about it."""

    path: Path
    scene: Scene
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Condition:
    """One way of searching."""

    name: str
    fps: float = 2.0
    refine: bool = False
    window: float | None = None
    constrained: bool = True


CONDITIONS = (
    Condition("2 frames a second"),
    Condition("2 frames a second, --refine", refine=True),
    Condition("1 frame a second", fps=1.0),
    Condition("1 frame a second, --refine", fps=1.0, refine=True),
    Condition("2 frames a second, windows of 10 s", window=10.0),
    Condition("2 frames a second, --unconstrained", constrained=False),
)


def forge_clips(
    folder: Path, count: int, seed: int, queries: int, absent: int, options: SceneOptions | None = None
) -> Iterator[Clip]:
    """Clips with up to `queries` questions about what is there and `absent` ones about what is not."""
    options = options or SceneOptions()
    write_dataset(folder, count, seed, options, questions_per_clip=queries, tasks=TASKS, overwrite=True)
    rows: dict[str, list[Query]] = {}
    for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        spans = tuple((float(start), float(end)) for start, end in row["solution"])
        rows.setdefault(row["videos"][0], []).append(Query(row["question"], spans))
    for index in range(count):
        scene = sample_scene(clip_seed(seed, index), options)
        name = f"clips/{index:06d}.mp4"
        missing = absent_queries(scene, Draws((seed, index, 2)), absent)
        yield Clip(folder / name, scene, (*rows.get(name, ()), *missing))


def absent_queries(scene: Scene, draws: Draws, count: int) -> list[Query]:
    """Questions about shapes that the scene does not have; like the forge's own, most share a colour or a shape with one."""
    present = {track.name for track in scene.tracks}
    shapes = [track for track in scene.tracks if track.shape]
    near = [f"{track.colour} {shape}" for track in shapes for shape in SHAPES]
    near += [f"{colour} {track.shape}" for track in shapes for colour in COLOURS]
    names = draws.sample([name for name in dict.fromkeys(near) if name not in present], count)
    return [Query(f"When is the {name} visible?", ()) for name in names]


@dataclass
class Result:
    """What a condition gave: scores by the number of true spans, distances of boundaries, seconds."""

    one: list[float] = field(default_factory=list)
    several: list[float] = field(default_factory=list)
    absent: list[float] = field(default_factory=list)
    edge_errors_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    clips: int = 0

    def add(self, query: Query, found: Grounding, duration_s: float) -> None:
        predicted = [(span.start_s, span.end_s) for span in found]
        if not query.spans:
            self.absent.append(float(not predicted))
            return
        # The last frame stands at the clip's end, where its own time is not part of the truth.
        predicted = [(start, min(end, duration_s)) for start, end in predicted if start < duration_s]
        (self.one if len(query.spans) == 1 else self.several).append(temporal_iou(predicted, query.spans))
        self.edge_errors_s += edge_errors_s(predicted, query.spans, duration_s)


def edge_errors_s(predicted: Sequence[Pair], truth: Sequence[Pair], duration_s: float) -> list[float]:
    """Distances of predicted boundaries from the true ones inside the clip, for spans that were found."""
    errors = []
    for true in truth:
        best = max(predicted, key=lambda span: temporal_iou([span], [true]), default=None)
        if best is None or temporal_iou([best], [true]) < EDGE_IOU:
            continue
        errors += [
            abs(given - expected)
            for given, expected in zip(best, true, strict=True)
            if 0 < expected < duration_s
        ]
    return errors


def measure(keye: keyecli.Keye, clips: Sequence[Clip], condition: Condition) -> Result:
    result = Result(clips=len(clips))
    begin = time.perf_counter()
    for clip in clips:
        found = keye.ground(
            clip.path,
            [query.text for query in clip.queries],
            fps=condition.fps,
            refine=condition.refine,
            window=condition.window,
            constrained=condition.constrained,
        )
        for query, grounding in zip(clip.queries, found, strict=True):
            result.add(query, grounding, clip.scene.duration_s)
    result.seconds = time.perf_counter() - begin
    return result


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def row(name: str, result: Result) -> str:
    figures = (result.one, result.several, result.absent)
    cells = [f"{mean(values):.3f} ({len(values)})" for values in figures]
    cells.append(f"{mean(result.edge_errors_s):.3f} s ({len(result.edge_errors_s)})")
    exact = [float(error < 0.05) for error in result.edge_errors_s]
    cells += [f"{mean(exact):.3f}", f"{result.seconds / result.clips:.1f} s"]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="model folder; default: the embedded nano")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--queries", type=int, default=6, help="questions a clip about what is there")
    parser.add_argument("--absent", type=int, default=2, help="questions a clip about what is not there")
    parser.add_argument(
        "--seed", type=int, default=HELD_OUT_SEED, help="below 900, the first seed that training used"
    )
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the conditions to measure, from 0")
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    keye = keyecli.load(arguments.model, device=arguments.device, dtype="fp32")
    chosen = range(len(CONDITIONS)) if arguments.only is None else arguments.only
    with tempfile.TemporaryDirectory() as name:
        clips = list(
            forge_clips(Path(name), arguments.clips, arguments.seed, arguments.queries, arguments.absent)
        )
        print(f"model {keye.name}, weights {keye.revision}, seed {arguments.seed}, {len(clips)} clips\n")
        print(
            "| searched with | mean IoU, one span | several spans | not there, said so | boundary error | "
            "boundaries exact | a clip takes |"
        )
        print("| --- |" + " --- |" * 6)
        for index in chosen:
            print(row(CONDITIONS[index].name, measure(keye, clips, CONDITIONS[index])), flush=True)


if __name__ == "__main__":
    main()
