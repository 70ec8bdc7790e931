"""Measure `keye summarize` on held-out forged clips: `python examples/nano/summary_quality.py --clips 100`.

Forges clips from seeds that training never drew and prints how many of the true events the summaries name, and how many
chapter edges lie where something really begins or ends. Every number comes out of the same code as the command.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate import MATCHED_IOU, summary_lines

import keyecli
from keyecli.forge import SceneOptions
from keyecli.forge.write import write_dataset
from keyecli.tasks.chapters import Chapter
from keyecli.tasks.events import Event
from keyecli.tasks.spans import temporal_iou

EDGE_WITHIN_S = 0.5
AIMS = {"recall": 0.85, "edges": 0.90}


@dataclass(frozen=True)
class Counts:
    """Of one clip or many: true events and how many were named, events named, inner chapter edges and how many are right."""

    true: int = 0
    found: int = 0
    named: int = 0
    edges: int = 0
    right_edges: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def grade(truth: str, events: Sequence[Event], chapters: Sequence[Chapter]) -> Counts:
    """`truth` are the forge's own lines. An event is found when its words are the same and the times overlap by half."""
    expected = summary_lines(truth)
    left = list(events)
    found = 0
    for span, words in expected:
        for event in left:
            if event.title == words and temporal_iou([(event.start_s, event.end_s)], [span]) >= MATCHED_IOU:
                left.remove(event)
                found += 1
                break
    boundaries = [edge for span, _ in expected for edge in span]
    edges = [chapter.start_s for chapter in chapters[1:]]
    right = sum(min(abs(edge - true) for true in boundaries) <= EDGE_WITHIN_S for edge in edges)
    return Counts(len(expected), found, len(events), len(edges), right)


def measure(
    keye: keyecli.Keye, clips: int, seed: int, options: SceneOptions, **asked: Any
) -> tuple[Counts, int]:
    """Counts over all clips, and of how many clips an answer was cut off. `asked`: options of the summaries."""
    counts, cut_off = Counts(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, clips, seed, options, questions_per_clip=1, tasks=("summary",))
        for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            summary = keye.summarize(folder / row["videos"][0], **asked)
            counts += grade(row["answer"], summary.events, summary.chapters)
            cut_off += summary.stop_reason == "length"
    return counts, cut_off


def row_of(name: str, counts: Counts) -> str:
    def share(part: int, whole: int) -> str:
        return f"{part / whole:.3f} ({part} of {whole})" if whole else "none"

    return (
        f"| {name} | {share(counts.found, counts.true)} | {share(counts.found, counts.named)} "
        f"| {share(counts.right_edges, counts.edges)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="model folder; default: the embedded nano")
    parser.add_argument("--clips", type=int, default=100, help="clips of 2 to 60 seconds")
    parser.add_argument(
        "--long-clips", type=int, default=0, help="and as many of 90 to 180 seconds, seen in parts"
    )
    parser.add_argument("--seed", type=int, default=11, help="below 900, the first seed that training used")
    parser.add_argument("--chapters", type=int, default=None, help="how many; default: auto")
    parser.add_argument("--max-tokens", type=int, default=None, help="longest answer; default: 2048")
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    keye = keyecli.load(arguments.model, device=arguments.device, dtype="fp32")
    runs = [("2 to 60 s", arguments.clips, SceneOptions())]
    if arguments.long_clips:
        runs.append(
            ("90 to 180 s", arguments.long_clips, SceneOptions(min_duration_s=90, max_duration_s=180))
        )
    print(f"model {keye.name}, weights {keye.revision}, seed {arguments.seed}\n")
    print("| clips | recall of events | precision of events | chapter edges within 0.5 s |")
    print("| --- | --- | --- | --- |")
    notes = []
    for name, clips, options in runs:
        begin = time.perf_counter()
        asked = {"chapters": arguments.chapters, "max_tokens": arguments.max_tokens}
        counts, cut_off = measure(keye, clips, arguments.seed, options, **asked)
        print(row_of(name, counts), flush=True)
        notes.append(
            f"{name}: {clips} clips in {time.perf_counter() - begin:.0f} s, {cut_off} answers cut off"
        )
    print(f"\naims: recall {AIMS['recall']:.2f}, edges {AIMS['edges']:.2f}; " + "; ".join(notes))


if __name__ == "__main__":
    main()
