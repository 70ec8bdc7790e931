"""Forge rows that keye-nano is weak at, clips seen at half a frame a second: `python examples/rl_nano/make_data.py OUT`.

nano learnt from two frames a second. At a quarter of that most events begin and end between two frames, and what it writes about
them is often wrong, though not everywhere. Each row says its own rate. Writes OUT/clips and OUT/data.jsonl.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from keyecli.forge import Draws, SceneOptions, clip_seed, pick_questions, sample_scene
from keyecli.forge.write import training_row, write_clip

OPTIONS = SceneOptions(8.0, 20.0, size=(112, 112), rate=4)
FPS = 0.5
GROUND, COUNT = ("ground",), ("count_appearances",)
TASKS = {"ground": GROUND, "count": COUNT, "both": GROUND + COUNT}


def rows_of(
    index: int, seed: int, questions: int, tasks: tuple[str, ...], clips: Path
) -> list[dict[str, Any]]:
    """Write a clip; its rows, in typed parts, which have room for the rate of each video."""
    scene = sample_scene(clip_seed(seed, index), OPTIONS)
    name = f"{index:06d}.mp4"
    write_clip(scene, clips / name)
    rows = []
    for place, question in enumerate(pick_questions(scene, Draws((scene.seed, 1)), questions, tasks)):
        row = training_row(scene, question, f"{index:06d}-{place}", f"clips/{name}")
        video = {"type": "video", "video": row.pop("videos")[0], "fps": FPS}
        row["messages"][0]["content"] = [video, {"type": "text", "text": question.question}]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--tasks", choices=tuple(TASKS), default="ground")
    parser.add_argument("--count", type=int, default=200, help="clips")
    parser.add_argument("--questions", type=int, default=2, help="about each clip")
    parser.add_argument("--seed", type=int, default=1, help="training and held-out rows must differ in it")
    wanted = parser.parse_args()
    clips = wanted.out / "clips"
    clips.mkdir(parents=True)
    numbers = range(wanted.count)
    with ProcessPoolExecutor(
        mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [
            pool.submit(rows_of, number, wanted.seed, wanted.questions, TASKS[wanted.tasks], clips)
            for number in numbers
        ]
        rows = [row for future in futures for row in future.result()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (wanted.out / "data.jsonl").write_text(text, encoding="utf-8")
    print(f"{wanted.out}: {len(rows)} rows about {wanted.count} clips")


if __name__ == "__main__":
    main()
