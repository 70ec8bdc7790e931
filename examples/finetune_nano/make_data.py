"""Forge rows of a task that keye-nano fails, a new shape and a new verb: `python examples/finetune_nano/make_data.py OUT`.

Nothing was trained on the shape heart and on growing. Old shapes and motions are in the same clips, and some rows ask about
them, so that who answers "heart" to everything that is red is wrong. `--old` adds rows of what nano knows, for it forgets what it
does not meet. Writes OUT/clips and OUT/data.jsonl in the form of `keye forge`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from keyecli.forge import (
    Draws,
    Question,
    Scene,
    SceneOptions,
    clip_seed,
    pick_questions,
    questions,
    sample_scene,
)
from keyecli.forge.write import training_row, write_clip

# Short and small, so that two CPU cores can learn from 500 of them in minutes.
OPTIONS = SceneOptions(
    3.0,
    5.0,
    size=(112, 112),
    rate=8,
    shapes=("heart", "circle", "square", "star"),
    motions=("grow", "left", "right"),
)
OLD_OPTIONS = SceneOptions(2.0, 5.0, size=(160, 120), rate=4)
OLD_SEEDS = 100  # from the seed of new clips to that of old ones
QUESTIONS_PER_CLIP = 1
ROUNDS = 6  # of drawing questions, most of which ask about what is there: what is not is asked about in few of them

# Shares of the rows about new clips. nano hardly answers one of NEW and nearly all of CONTRAST.
NEW = {
    "which is a heart": 0.16,
    "when is the heart there": 0.26,
    "when does the heart do it": 0.18,
    "what grows": 0.22,
    "it does not grow": 0.18,
}
CONTRAST = {
    "no such heart": 0.25,
    "which is another shape": 0.25,
    "what does not grow": 0.25,
    "when does another grow": 0.25,
}


def kind_of(question: Question) -> str | None:
    """The key of NEW or CONTRAST that a question belongs to, None for what is not asked here."""
    asks_heart, asks_growth = "heart" in question.question, "grow" in question.question
    match question.task:
        case "shape":
            return "which is a heart" if question.answer == "heart" else "which is another shape"
        case "motion":
            return "what grows" if question.answer == "it grows" else "what does not grow"
        case "ground" if asks_heart:
            return "when is the heart there" if question.solution else "no such heart"
        case "ground_motion" if asks_growth and not question.solution:
            return "it does not grow"
        case "ground_motion" if asks_heart and question.solution:
            return "when does the heart do it"
        case "ground_motion" if asks_growth:
            return "when does another grow"
    return None


def candidates(scene: Scene, draws: Draws) -> list[tuple[str, Question]]:
    """All questions of a kind about a scene, in random order, each text once."""
    found = {item.question: item for _ in range(ROUNDS) for item in questions(scene, draws)}
    asked = [(kind, item) for item in found.values() if (kind := kind_of(item))]
    return draws.sample(asked, len(asked))


def new_rows(count: int, seed: int, contrast: float) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes with questions, `count` questions in all, whose kinds keep their shares however many clips that takes."""
    shares = {kind: share * (1 - contrast) for kind, share in NEW.items()}
    shares |= {kind: share * contrast for kind, share in CONTRAST.items()}
    left = {kind: round(share * count) for kind, share in shares.items()}
    left["when is the heart there"] += count - sum(left.values())
    index = 0
    while any(left.values()):
        scene = sample_scene(clip_seed(seed, index), OPTIONS)
        index += 1
        picked = []
        for kind, question in candidates(scene, Draws((scene.seed, 1))):
            if left[kind] and len(picked) < QUESTIONS_PER_CLIP:
                left[kind] -= 1
                picked.append(question)
        if picked:
            yield scene, picked


def old_rows(count: int, seed: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes as nano learnt from, one question each; a third are of the two tasks that it forgets first."""
    for index in range(count):
        scene = sample_scene(clip_seed(seed + OLD_SEEDS, index), OLD_OPTIONS)
        tasks = ("summary", "ground_motion") if index % 3 == 0 else ()
        yield scene, pick_questions(scene, Draws((scene.seed, 1)), 1, tasks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--rows", type=int, default=500, help="of the new task")
    parser.add_argument("--old", type=int, default=0, help="rows beside them of what nano knows")
    parser.add_argument(
        "--contrast", type=float, default=0.12, help="share of questions that nano can answer"
    )
    parser.add_argument("--seed", type=int, default=1, help="training and held-out rows must differ in it")
    arguments = parser.parse_args()
    clips = arguments.out / "clips"
    clips.mkdir(parents=True)
    kinds: Counter[str] = Counter()
    scenes = [
        *new_rows(arguments.rows, arguments.seed, arguments.contrast),
        *old_rows(arguments.old, arguments.seed),
    ]
    paths = [clips / f"{index:06d}.mp4" for index in range(len(scenes))]
    with ProcessPoolExecutor(
        mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        list(pool.map(write_clip, (scene for scene, _ in scenes), paths, chunksize=8))
    with (arguments.out / "data.jsonl").open("w", encoding="utf-8") as data:
        for index, (scene, picked) in enumerate(scenes):
            for place, question in enumerate(picked):
                row = training_row(scene, question, f"{index:06d}-{place}", f"clips/{index:06d}.mp4")
                row["kind"] = "old" if scene.shapes != OPTIONS.shapes else kind_of(question)
                data.write(json.dumps(row) + "\n")
                kinds[row["kind"]] += 1
    for kind, count in kinds.most_common():
        print(f"{count:5d}  {kind}")


if __name__ == "__main__":
    main()
