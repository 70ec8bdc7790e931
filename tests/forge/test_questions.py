"""Questions and answers, by hand for one scene and against brute force for many."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import pytest

from keyecli.forge import (
    TASKS,
    Draws,
    Question,
    Scene,
    SceneOptions,
    Track,
    pick_questions,
    questions,
    sample_scene,
)
from tests.forge.scenes import hand_scene, heart_scene, is_visible

BY_SEED = {seed: sample_scene(seed) for seed in range(200)}
EXTRA_BY_SEED = {
    seed: sample_scene(seed, SceneOptions(2.0, 20.0, shapes=("heart", "star"), motions=("grow", "spin")))
    for seed in range(100)
}


def asked(scene: Scene, rounds: int = 30) -> dict[str, dict[str, Question]]:
    """task → question text → question, over several draws."""
    found: dict[str, dict[str, Question]] = defaultdict(dict)
    for round_number in range(rounds):
        for question in questions(scene, Draws((scene.seed, round_number))):
            known = found[question.task].setdefault(question.question, question)
            if question.task != "count_objects":
                assert known == question, "a question has one answer"
    return found


HAND = asked(hand_scene(), rounds=1500)


@pytest.mark.parametrize(
    ("task", "text", "reasoning", "answer", "solution"),
    [
        (
            "ground",
            "When is the red circle visible?",
            "",
            "[[1.0, 3.0], [4.5, 6.0]]",
            [[1.0, 3.0], [4.5, 6.0]],
        ),
        ("ground", "Find every time the word GATE is on screen.", "", "[[3.0, 5.0]]", [[3.0, 5.0]]),
        ("ground", "When is the red square visible?", "", "[]", []),
        ("ground_motion", "When does the blue square move right?", "", "[[1.0, 3.0]]", [[1.0, 3.0]]),
        ("ground_motion", "Find every time the green star spins.", "", "[[2.5, 4.5]]", [[2.5, 4.5]]),
        ("ground_motion", "When does the blue square move left?", "", "[]", []),
        (
            "appear",
            "When does the red circle appear?",
            "red circle: [[1.0, 3.0], [4.5, 6.0]]",
            "The red circle appears at 1.0 and 4.5 seconds.",
            [[1.0, 3.0], [4.5, 6.0]],
        ),
        (
            "appear",
            "When does the word GATE appear?",
            "word GATE: [[3.0, 5.0]]",
            "The word GATE appears at 3.0 seconds.",
            [[3.0, 5.0]],
        ),
        (
            "count_appearances",
            "How many times does the red circle appear?",
            "red circle: [[1.0, 3.0], [4.5, 6.0]]",
            "2",
            None,
        ),
        (
            "count_objects",
            "How many different coloured shapes appear in the video?",
            "blue square, red circle, green star",
            "3",
            None,
        ),
        (
            "order",
            "Which appears first, the red circle or the blue square?",
            "red circle: 1.0, blue square: 0.0",
            "the blue square",
            None,
        ),
        (
            "order",
            "Which appears first, the red circle or the word GATE?",
            "red circle: 1.0, word GATE: 3.0",
            "the red circle",
            None,
        ),
        (
            "cooccurrence",
            "Are the red circle and the blue square ever visible at the same time?",
            "red circle: [[1.0, 3.0], [4.5, 6.0]], blue square: [[0.0, 5.0]]",
            "yes",
            None,
        ),
        ("colour", "What colour is the star?", "", "green", None),
        ("shape", "Which shape is red?", "", "circle", None),
        ("motion", "How does the blue square move?", "", "it moves right", None),
        ("motion", "How does the green star move?", "", "it spins", None),
        ("motion", "How does the red circle move?", "", "it stays still", None),
        ("read_word", "Which word is shown?", "", "GATE", None),
        (
            "summary",
            "Summarise the video with times.",
            "",
            "0.0 - 5.0: blue square\n"
            "1.0 - 3.0: red circle\n"
            "2.5 - 4.5: green star spins\n"
            "3.0 - 5.0: word GATE\n"
            "4.5 - 6.0: red circle",
            [[0.0, 5.0], [1.0, 3.0], [2.5, 4.5], [3.0, 5.0], [4.5, 6.0]],
        ),
    ],
)
def test_by_hand(task: str, text: str, reasoning: str, answer: str, solution: list | None) -> None:
    assert HAND[task][text] == Question(task, text, reasoning, answer, solution)


HEART = asked(heart_scene(), rounds=1500)


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("shape", "Which shape is red?", "heart"),
        ("colour", "What colour is the heart?", "red"),
        ("motion", "What does the red heart do?", "it grows"),
        ("ground", "Find every time the red heart is on screen.", "[[0.5, 2.5], [4.0, 5.5]]"),
        ("ground", "When is the green heart visible?", "[]"),
        ("ground_motion", "Find every time the red heart grows.", "[[0.5, 2.5]]"),
        ("ground_motion", "When does the red heart grow?", "[[0.5, 2.5]]"),
        ("ground_motion", "When does the green star grow?", "[]"),
        ("ground_motion", "Find every time the green star spins.", "[[2.5, 4.5]]"),
        ("appear", "When does the red heart appear?", "The red heart appears at 0.5 and 4.0 seconds."),
        (
            "summary",
            "Summarise the video with times.",
            "0.5 - 2.5: red heart grows\n2.5 - 4.5: green star spins\n4.0 - 5.5: red heart",
        ),
    ],
)
def test_a_heart_that_grows_by_hand(task: str, text: str, answer: str) -> None:
    assert HEART[task][text].answer == answer


def test_only_what_a_scene_could_show_is_asked_about() -> None:
    of_hearts = {text for task in ("ground", "ground_motion") for text in HEART[task]}
    assert not [text for text in of_hearts if re.search("circle|square|left|up|heart spin", text)]
    of_default = {text for task in ("ground", "ground_motion") for text in HAND[task]}
    assert not [text for text in of_default if re.search("heart|grow", text)]


def test_nothing_is_asked_that_is_not_clear() -> None:
    # Half a second together is neither yes nor no, and less than a second apart is no order.
    pairs = [text for text in HAND["cooccurrence"] if "red circle" in text and "green star" in text]
    assert not pairs
    assert not [text for text in HAND["order"] if "word GATE" in text and "green star" in text]
    assert not HAND["read_number"]
    for text, question in HAND["state_at"].items():
        time_s = float(text.split(" at ")[1].removesuffix(" seconds?"))
        if "red circle" in text:
            assert min(abs(time_s - change) for change in (1.0, 3.0, 4.5)) >= 0.6 - 1e-9
            assert question.answer == ("yes" if 1.6 <= time_s <= 2.4 or time_s >= 5.1 else "no")
            assert question.reasoning == "red circle: [[1.0, 3.0], [4.5, 6.0]]"


def sampled(track: Track, scene: Scene) -> list[bool]:
    """Visibility at every half second, from the definition."""
    return [is_visible(track, step / 2, scene.duration_s) for step in range(round(scene.duration_s * 2) + 1)]


def runs(states: list[bool], scene: Scene) -> list[list[float]]:
    """[[start, end]] of the runs of True; one that holds at the last frame ends with the clip."""
    found = []
    for step, shown in enumerate(states):
        if shown and (step == 0 or not states[step - 1]):
            found.append([step / 2, scene.duration_s])
        if not shown and step and states[step - 1]:
            found[-1][1] = step / 2
    return found


def expected(scene: Scene, question: Question) -> str:
    """The answer worked out again, from visibility sampled twice a second."""
    text, task = question.question, question.task
    named = [track for track in scene.tracks if re.search(rf"\bthe {track.name}\b", text)]
    spans = [runs(sampled(track, scene), scene) for track in named]
    shapes = [track for track in scene.tracks if track.shape]
    if task == "ground":
        return json.dumps(spans[0] if named else [])
    if task == "appear":
        starts = [f"{start:.1f}" for start, _ in spans[0]]
        listed = " and ".join(filter(None, [", ".join(starts[:-1]), starts[-1]]))
        return f"The {named[0].name} appears at {listed} seconds."
    if task == "count_appearances":
        return str(len(spans[0]))
    if task == "count_objects":
        return str(len(shapes))
    if task == "order":
        return f"the {min(named, key=lambda track: sampled(track, scene).index(True)).name}"
    if task == "cooccurrence":
        together = zip(sampled(named[0], scene), sampled(named[1], scene), strict=True)
        return "yes" if any(a and b for a, b in together) else "no"
    if task == "state_at":
        time_s = float(re.findall(r"at (\d+\.\d) seconds", text)[0])
        return "yes" if is_visible(named[0], time_s, scene.duration_s) else "no"
    if task in ("colour", "shape"):
        found = {
            getattr(track, task)
            for track in shapes
            if re.search(rf"\b{track.shape if task == 'colour' else track.colour}\b", text)
        }
        assert len(found) == 1
        return found.pop()
    if task == "ground_motion":
        motion = re.findall(r"(left|right|up|down|spin|grow)s?[?.]", text)[0]
        return json.dumps([list(span) for span in named[0].motion_spans(motion)])
    if task == "motion":
        words = {"spin": "spins", "grow": "grows"}
        words |= {"left": "moves left", "right": "moves right", "up": "moves up", "down": "moves down"}
        kinds = {a.motion for a in named[0].appearances} - {"still"}
        assert len(kinds) < 2
        return "it stays still" if not kinds else f"it {words[kinds.pop()]}"
    if task.startswith("read_"):
        kind = task.removeprefix("read_")
        return next(track.text for track in scene.tracks if track.name.startswith(kind))
    lines = sorted(
        (start, track.name, end)
        for track in scene.tracks
        for start, end in runs(sampled(track, scene), scene)
    )
    assert task == "summary"
    return "\n".join(f"{start:.1f} - {end:.1f}: {name}" for start, name, end in lines)


def test_answers_agree_with_brute_force_over_200_seeds() -> None:
    tasks: Counter[str] = Counter()
    for seed, scene in [*BY_SEED.items(), *EXTRA_BY_SEED.items()]:
        found = questions(scene, Draws((seed, 1)))
        assert len(found) >= 8
        for question in found:
            tasks[question.task] += 1
            answer = question.answer
            if question.task == "summary":  # motions are checked by hand and by ground_motion
                answer = re.sub(r" (moves \w+|spins|grows)$", "", answer, flags=re.MULTILINE)
            assert answer == expected(scene, question), (seed, question)
            if question.task in ("ground", "ground_motion"):
                assert json.loads(question.answer) == question.solution
            if question.task in ("count_objects", "order", "cooccurrence", "state_at", "appear"):
                assert question.reasoning
    assert set(tasks) == set(TASKS)


def test_absent_objects_are_rare_and_absent() -> None:
    found = [(scene, q) for seed, scene in BY_SEED.items() for q in questions(scene, Draws((seed, 2)))]
    ground = [(scene, q) for scene, q in found if q.task == "ground"]
    absent = [(scene, q) for scene, q in ground if q.answer == "[]"]
    assert 0.05 < len(absent) / len(ground) < 0.12
    for scene, question in absent:
        assert not any(f"the {track.name} " in question.question for track in scene.tracks)


def test_yes_and_no_are_about_as_frequent() -> None:
    for task in ("state_at", "cooccurrence"):
        counts = Counter(
            q.answer
            for seed, scene in BY_SEED.items()
            for q in questions(scene, Draws((seed, 3)))
            if q.task == task
        )
        assert 0.35 < counts["yes"] / counts.total() < 0.65


def test_the_same_draws_ask_the_same_questions() -> None:
    scene = BY_SEED[5]
    assert questions(scene, Draws(1)) == questions(scene, Draws(1))
    assert questions(scene, Draws(1)) != questions(scene, Draws(2))


def test_picked_questions_spread_over_tasks() -> None:
    scene = BY_SEED[7]
    picked = pick_questions(scene, Draws(0), 8)
    assert len(picked) == len({question.task for question in picked}) == 8
    only = pick_questions(scene, Draws(0), 50, tasks=("ground", "order"))
    assert {question.task for question in only} == {"ground", "order"}
    everything = questions(scene, Draws(0))
    assert len(pick_questions(scene, Draws(0), 1000)) == len(everything)
