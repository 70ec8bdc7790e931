"""keye-nano: what is embedded, what it answers, and that its recipe still makes such a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from keyecli.forge import Appearance, FrameStates, Scene, Track, frame_state_arrays, sample_scene
from keyecli.model.checkpoint import load_config, load_model, load_preprocessor, load_tokenizer, resolve_model
from keyecli.model.prompt import Visual, layout
from keyecli.video.sampling import SamplingSettings, plan_video
from keyecli.video.source import probe

ROOT = Path(__file__).resolve().parents[2]
CLIP = ROOT / "examples" / "clips" / "red-circle.mp4"
SCRIPTS = ROOT / "examples" / "nano"
NANO = resolve_model(None)


def test_the_embedded_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 20 * 2**20


def test_a_ten_second_clip_is_truly_sparse() -> None:
    config, preprocessor = load_config(NANO), load_preprocessor(NANO)
    plan = plan_video(probe(CLIP), SamplingSettings(end_s=None, budget=preprocessor.budget))
    assert config.sa_config is not None
    assert plan.tokens > config.sa_config["topk"]


def test_the_demo_gives_the_right_answer() -> None:
    command = [sys.executable, "-m", "keyecli", "ask", str(CLIP), "When does the red circle appear?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "The red circle appears at 3.0 seconds.\n")
    assert "FrameForge" in done.stderr


def test_its_tokenizer_is_the_recipe_s() -> None:
    import recipe

    tokenizer = recipe.train_tokenizer(recipe.forged_text(recipe.TOKENIZER_SEEDS))
    assert tokenizer.to_str() == Tokenizer.from_file(str(NANO / "tokenizer.json")).to_str()


def test_no_text_is_unknown_to_it() -> None:
    tokenizer = load_tokenizer(NANO)
    text = "Wo ist der rote Kreis? 红色 🔴 12.5"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def scene_with(*tracks: Track) -> Scene:
    backdrop = sample_scene(1).backdrop
    return Scene(0, 4.0, 12, 320, 240, tracks, (), backdrop)


def test_sight_targets_by_hand() -> None:
    """A 5 × 4 grid of cells over 320 × 240 pixels: 64 × 60 pixels a cell."""
    import sight

    motion = {"motion": "left", "motion_start_s": 0.0, "motion_end_s": 1.0, "dx": -64.0}
    star = Track("red star", "red", 60.0, (Appearance(0.0, 2.0, x=128.0, y=75.0, **motion),), shape="star")
    word = Track("word CAT", "white", 4.0, (Appearance(0.0, 4.0, x=310.0, y=230.0),), text="CAT")
    digit = Track("number 7", "yellow", 4.0, (Appearance(1.0, 4.0, x=10.0, y=10.0),), text="7")
    scene, times = scene_with(star, word, digit), [0.0, 0.5, 3.0]
    states = FrameStates.from_arrays(frame_state_arrays(scene, times))
    motions = torch.from_numpy(sight.motions_of(scene, times))
    assert motions[:, 0].tolist() == [-1, sight.DOINGS.index("left"), -1]
    wanted = sight.targets(states, motions, 112, 140)
    names = [*sight.NAMES, "nothing"]
    frames = wanted.classes.view(3, 20)
    assert [names[int(index)] for index in frames[1]].count("nothing") == 18
    assert names[int(frames[1, 1 * 5 + 1])] == "red star"
    assert names[int(frames[1, 3 * 5 + 4])] == "word CAT"
    # In the middle of the second cell of a row, a quarter above the middle of the second row; upright.
    expected = torch.tensor([0.0, -0.25, 1.5, 1.25, 1.0, 0.0])
    torch.testing.assert_close(wanted.geometry.view(3, 20, 6)[1, 6], expected)
    assert wanted.has_turn.view(3, 20)[1].nonzero().flatten().tolist() == [6]
    assert wanted.motions.view(3, 20)[1].tolist() == [-1] * 6 + [sight.DOINGS.index("left")] + [-1] * 13
    # Later the star is gone and the digit has come.
    assert names[int(frames[2, 6])] == "nothing"
    assert names[int(frames[2, 0])] == "number 7"


def test_motion_is_known_only_of_what_was_there_before() -> None:
    import sight

    turning = Appearance(1.0, 4.0, 99.0, 99.0, "spin", 2.0, 3.0, turns=0.25)
    still = Appearance(0.0, 4.0, 30.0, 30.0)
    scene = scene_with(
        Track("red star", "red", 60.0, (turning,), shape="star"),
        Track("blue ring", "blue", 60.0, (still,), shape="ring"),
    )
    doings = sight.motions_of(scene, [0.0, 1.0, 2.0, 2.5, 3.0, 4.0])
    spin = sight.DOINGS.index("spin")
    assert doings[:, 0].tolist() == [-1, -1, 0, spin, spin, 0]
    assert doings[:, 1].tolist() == [-1, 0, 0, 0, 0, 0]


def test_losses_of_right_heads_are_small_and_their_figures_say_so() -> None:
    import sight

    scene = sample_scene(3)
    times = scene.sampled_times(2.0)
    states = FrameStates.from_arrays(frame_state_arrays(scene, times))
    wanted = sight.targets(states, torch.from_numpy(sight.motions_of(scene, times)), 112, 140)
    heads = sight.Heads(8)
    heads.forward = lambda visual: (  # type: ignore[method-assign]
        100 * torch.nn.functional.one_hot(wanted.classes, sight.NOTHING + 1).float(),
        wanted.geometry,
    )
    loss, figures = sight.sight_loss(heads, torch.zeros(len(wanted.classes), 8), wanted)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    assert float(figures["shapes"]) == 1.0
    heads.motion = torch.nn.Identity()
    said = 100 * torch.nn.functional.one_hot(wanted.motions.clamp(min=0), len(sight.DOINGS)).float()
    loss, figures = sight.motion_loss(heads, said, wanted)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    assert float(figures["moving"]) == float((wanted.motions > 0).any())
    loss, figures = sight.motion_loss(heads, said.roll(1, dims=1), wanted)
    assert float(loss) > 50
    assert float(figures["moving"]) == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_sight_names_what_the_scene_names(seed: int) -> None:
    import sight

    scene = sample_scene(seed)
    for time_s in (0.0, scene.duration_s / 2, scene.duration_s):
        states = FrameStates.from_arrays(frame_state_arrays(scene, [time_s]))
        unknown = torch.from_numpy(sight.motions_of(scene, [time_s]))
        wanted = sight.targets(states, unknown, 112, 140).classes
        named = {sight.NAMES[int(index)] for index in wanted if int(index) != sight.NOTHING}
        ends = scene.duration_s
        visible = {
            track.name
            for track in scene.tracks
            if any(start <= time_s and (time_s < end or end == ends) for start, end in track.spans)
        }
        # Two objects may share a cell, which then names one of them.
        assert named <= visible
        assert len(named) >= len(visible) - 1


def test_summary_recall_by_hand() -> None:
    import evaluate

    truth = "0.0 - 4.0: red circle\n2.0 - 6.0: word CAT"
    assert evaluate.summary_recall(truth, truth) == 1.0
    assert evaluate.summary_recall(truth, "0.0 - 3.0: red circle\n2.0 - 6.0: word DOG") == 0.5
    assert evaluate.summary_recall(truth, "3.0 - 4.0: red circle") == 0.0
    assert evaluate.summary_recall(truth, "nothing happens") == 0.0
    # One line is not counted twice.
    assert (
        evaluate.summary_recall("0.0 - 4.0: red circle\n0.0 - 4.0: red circle", "0.0 - 4.0: red circle")
        == 0.5
    )


def test_grading_by_hand() -> None:
    import evaluate

    row = {"task": "ground", "answer": "[[0.0, 4.0]]", "solution": [[0.0, 4.0]]}
    assert evaluate.grade(row, "[[2.0, 4.0]]").score == pytest.approx(0.5)
    assert evaluate.grade(row, "at two seconds").score == 0.0
    assert evaluate.grade({"task": "ground", "answer": "[]", "solution": []}, "[]").score == 1.0
    assert evaluate.grade({"task": "colour", "answer": "red", "solution": None}, "red").score == 1.0
    assert evaluate.grade({"task": "colour", "answer": "red", "solution": None}, "red.").score == 0.0


def test_the_recipe_trains_through_every_phase(tmp_path: Path) -> None:
    options = (
        "--device cpu --dtype float32 --workers 0 --report-every 1 --exact-every 100 --save-every 100 "
        "--steps 8 --tokens 900 --grow-from 1000 --sight-share 0.25 --dense-share 0.25 --indexer-share 0.25"
    )
    command = [sys.executable, str(SCRIPTS / "train.py"), str(tmp_path / "nano"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    phases = [line.split()[1] for line in done.stdout.splitlines() if line.split()[0].isdigit()]
    assert phases == ["sight"] * 2 + ["dense"] * 2 + ["warm-up"] * 2 + ["sparse"] * 2
    model = load_model(tmp_path / "nano")
    assert model.config.to_dict()["sa_config"] == load_config(NANO).to_dict()["sa_config"]
    tokenizer = load_tokenizer(tmp_path / "nano")
    prompt = layout(
        tokenizer,
        model.config,
        "<|vision_start|><|video_pad|><|vision_end|>",
        [Visual("video", (2, 2), (0.0, 0.5))],
    )
    assert np.count_nonzero(prompt.input_ids.numpy() == model.config.video_token_id) == 8
