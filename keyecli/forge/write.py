"""Writing a data set: H.264 clips and a JSONL file of questions with answers, the same bytes for a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from keyecli.errors import KeyeError, UsageError
from keyecli.forge.questions import TASKS, Question, pick_questions
from keyecli.forge.renderer import frame_states, render
from keyecli.forge.scene import Draws, Scene, SceneOptions, clip_seed, sample_scene

DATA_FILE = "data.jsonl"
CLIPS_FOLDER = "clips"
MAX_CLIPS = 1_000_000  # of one seed, so that the clips of two seeds never meet
_CHUNK_FRAMES = 32
# One thread and fixed settings give the same file wherever the same libx264 runs; without B-frames every reader,
# even one that ignores edit lists, finds frame k at k / rate seconds.
_ENCODER = {"preset": "veryfast", "crf": "18", "bf": "0", "threads": "1"}


@dataclass(frozen=True)
class WrittenDataset:
    """What `write_dataset` wrote: the folder, clips, questions (rows), frames, and seconds of video."""

    folder: Path
    clips: int
    questions: int
    frames: int
    duration_s: float


def write_dataset(
    folder: Path,
    count: int,
    seed: int = 0,
    options: SceneOptions | None = None,
    *,
    questions_per_clip: int = 4,
    tasks: Sequence[str] = (),
    overwrite: bool = False,
    on_clip: Callable[[int], None] | None = None,
) -> WrittenDataset:
    """Write `count` clips to folder/clips/000000.mp4 ... and their questions to folder/data.jsonl.

    Every file appears under its name only when it is complete, data.jsonl last. `tasks` limits the questions,
    () allows all. `on_clip` hears how many clips are done. UsageError: a count, seed, number of questions or task
    that is not possible, files that are there already (without `overwrite`). KeyeError: the folder cannot be
    written to.
    """
    _check_request(count, seed, questions_per_clip, tasks)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder to write the clips into")
    data_path = folder / DATA_FILE
    clip_paths = [folder / CLIPS_FOLDER / f"{index:06d}.mp4" for index in range(count)]
    present = [path for path in (data_path, *clip_paths) if path.exists()]
    if present and not overwrite:
        raise UsageError(f"{present[0]} exists; give another folder, or --overwrite to replace it")
    rows, frames, duration_s = 0, 0, 0.0
    with _writing(folder):
        (folder / CLIPS_FOLDER).mkdir(parents=True, exist_ok=True)
        # The rows of a former run do not fit the clips that are replaced from here on.
        data_path.unlink(missing_ok=True)
        with _complete_or_absent(data_path) as unfinished, unfinished.open("w", encoding="utf-8") as data:
            for index, path in enumerate(clip_paths):
                scene = sample_scene(clip_seed(seed, index), options)
                with _complete_or_absent(path) as unfinished_clip:
                    write_clip(scene, unfinished_clip)
                draws = Draws((scene.seed, 1))
                picked = pick_questions(scene, draws, questions_per_clip, tasks)
                for place, question in enumerate(picked):
                    row = training_row(
                        scene, question, f"{index:06d}-{place}", path.relative_to(folder).as_posix()
                    )
                    data.write(json.dumps(row) + "\n")
                rows += len(picked)
                frames += scene.frame_count
                duration_s += scene.duration_s
                if on_clip is not None:
                    on_clip(index + 1)
    return WrittenDataset(folder, count, rows, frames, duration_s)


def write_clip(scene: Scene, path: Path) -> None:
    """Draw all frames of a scene at its own size and rate into an H.264 mp4 file (yuv420p)."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=scene.rate, options=_ENCODER)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        for index, picture in enumerate(_pictures(scene)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _pictures(scene: Scene) -> Iterator[np.ndarray]:
    times = scene.frame_times()
    for start in range(0, len(times), _CHUNK_FRAMES):
        states = frame_states(scene, times[start : start + _CHUNK_FRAMES])
        yield from render(states, scene.height, scene.width).numpy()


def training_row(scene: Scene, question: Question, name: str, clip: str) -> dict[str, Any]:
    reply = f"<think>\n{question.reasoning}\n</think>\n\n{question.answer}"
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": f"<video>{question.question}"},
            {"role": "assistant", "content": reply},
        ],
        "videos": [clip],
        "task": question.task,
        "question": question.question,
        "answer": question.answer,
        "reasoning": question.reasoning,
        "solution": question.solution,
        "duration_s": scene.duration_s,
        "seed": scene.seed,
    }


def _check_request(count: int, seed: int, questions_per_clip: int, tasks: Sequence[str]) -> None:
    if not 1 <= count <= MAX_CLIPS:
        raise UsageError(f"--count must be from 1 to {MAX_CLIPS}, not {count}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must be 0 or above, not {seed}")
    if questions_per_clip < 1:
        raise UsageError(f"--questions must be at least 1, not {questions_per_clip}")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"there is no task {unknown[0]}; known are {', '.join(TASKS)}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what the system says about a folder or disk into a sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise KeyeError(f"cannot write to {folder}: {reason}; give another folder") from error


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name at the end, or is removed when something fails."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
