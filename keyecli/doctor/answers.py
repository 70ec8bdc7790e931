"""A known-answer test: forged clips whose words, colours, shapes and events are known exactly, asked of the real weights."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyecli.doctor.finding import Finding
from keyecli.forge.questions import format_spans, pick_questions
from keyecli.forge.scene import COLOURS, SHAPES, WORDS, Draws, Scene, SceneOptions, clip_seed, sample_scene
from keyecli.forge.write import write_clip
from keyecli.tasks.options import AskOptions
from keyecli.tasks.spans import temporal_iou

if TYPE_CHECKING:
    from keyecli.session import Keye

Topic = Literal["words", "colours", "shapes", "events"]

CLIPS = 6
SEED = 900_000  # no clip of it was seen in training
OPTIONS = SceneOptions(min_duration_s=4.0, max_duration_s=6.0, size=(320, 240), rate=12)
TASKS: dict[str, Topic] = {"read_word": "words", "colour": "colours", "shape": "shapes"}
CHOICES: dict[Topic, Sequence[str]] = {"words": WORDS, "colours": tuple(COLOURS), "shapes": SHAPES}
# The mean score below which the weights, or what computes with them, cannot be right. Words, colours and shapes that fill a
# part of the picture are what any such model reads; edges of events depend on the rate of its frames.
THRESHOLDS: dict[Topic, float] = {"words": 0.75, "colours": 0.75, "shapes": 0.75, "events": 0.5}
# Likeliest tokens, and no reasoning: what is asked can be seen, and every model has the same short way to say it.
HOW = AskOptions(temperature=0.0, think=False, max_tokens=256)

OnProgress = Callable[[str, float, float | None], None]


@dataclass(frozen=True)
class Known:
    """A question about a clip and its answer; for events `question` is the query and `spans` the truth in seconds."""

    clip: int
    topic: Topic
    question: str
    truth: str
    spans: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Graded:
    """A known question and what the model said; `score` is 1 or 0, for events the temporal IoU."""

    known: Known
    given: str
    score: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "clip": self.known.clip,
            "topic": self.known.topic,
            "question": self.known.question,
            "truth": self.known.truth,
            "given": self.given,
            "score": self.score,
        }


def known_answers(
    keye: Keye, *, clips: int = CLIPS, on_progress: OnProgress | None = None
) -> Iterator[Graded]:
    """Forge the clips, ask everything, grade; answers come one by one. Errors: those of `Keye.ask`."""
    scenes = list(known_scenes(clips))
    questions = [known for clip, scene in enumerate(scenes) for known in known_questions(clip, scene)]
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"{clip}.mp4" for clip in range(clips)]
        for scene, path in zip(scenes, paths, strict=True):
            write_clip(scene, path)
        for number, known in enumerate(questions):
            if on_progress is not None:
                on_progress("asking", number, len(questions))
            yield ask(keye, paths[known.clip], known)


def ask(keye: Keye, clip: Path, known: Known) -> Graded:
    """Put one question as `keye ask` or `keye ground` would, without chance."""
    if known.topic == "events":
        found = keye.ground(clip, known.question, **HOW)
        spans = [(span.start_s, span.end_s) for span in found]
        return Graded(known, format_spans(spans), temporal_iou(spans, list(known.spans)))
    answer = keye.ask(clip, known.question, **HOW)
    given = answer.text.strip()
    right = first_named(given, CHOICES[known.topic]) == known.truth.lower()
    return Graded(known, given, float(right))


def first_named(text: str, choices: Sequence[str]) -> str | None:
    """Which of the choices a text names first, as a word of its own, in small letters; None when it names none."""
    found = re.search(r"\b(?:" + "|".join(map(re.escape, choices)) + r")\b", text, re.IGNORECASE)
    return None if found is None else found[0].lower()


def known_scenes(clips: int) -> Iterator[Scene]:
    """Scenes with a word to read and at least one shape."""
    index = 0
    while clips:
        scene = sample_scene(clip_seed(SEED, index), OPTIONS)
        index += 1
        names = [track.name for track in scene.tracks]
        if any(name.startswith("word ") for name in names) and any(track.shape for track in scene.tracks):
            clips -= 1
            yield scene


def known_questions(clip: int, scene: Scene) -> Iterator[Known]:
    """One question of each topic that the scene has, and one event."""
    for task, topic in TASKS.items():
        for question in pick_questions(scene, Draws((scene.seed, 1)), 1, [task]):
            yield Known(clip, topic, question.question, question.answer)
    # What is there from beginning to end is no event.
    track = min(scene.tracks, key=lambda track: sum(end - start for start, end in track.spans))
    spans = tuple(track.spans)
    yield Known(clip, "events", f"the {track.name}", format_spans(spans), spans)


def judge(graded: Sequence[Graded], model: str) -> Iterator[Finding]:
    """One finding a topic: its mean score against its threshold."""
    for topic, threshold in THRESHOLDS.items():
        scores = [item.score for item in graded if item.known.topic == topic]
        mean = sum(scores) / len(scores)
        text = f"{model}: {mean:.2f} of 1 over {len(scores)} questions, at least {threshold:.2f} expected"
        details = {"score": mean, "questions": len(scores), "threshold": threshold}
        if mean >= threshold:
            yield Finding("answers", topic, "ok", text, details=details)
        else:
            remedy = (
                "compare the weights with --hashes, then try --kernels reference; if that answers well, it is the "
                "kernels on this card"
            )
            yield Finding("answers", topic, "problem", text, remedy, details)
