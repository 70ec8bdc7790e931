"""Sampled scenes keep the promises that questions and answers rest on."""

from __future__ import annotations

import hashlib
import math
import pickle
from itertools import combinations, pairwise

import numpy as np
import pytest

from keyecli.errors import UsageError
from keyecli.forge import SceneOptions, clip_seed, frame_state_arrays, sample_scene
from keyecli.forge.scene import (
    COLOURS,
    EXTRA_MOTIONS,
    EXTRA_SHAPES,
    GROWTH,
    MAX_SHAKE,
    MOTIONS,
    RATES,
    SHAPES,
    SIZES,
    SPINNING_SHAPES,
    WORDS,
)
from tests.forge.scenes import is_visible

SCENES = [sample_scene(seed) for seed in range(300)]
EXTRA_OPTIONS = SceneOptions(
    2.0, 20.0, shapes=(*EXTRA_SHAPES, "star", "ring"), motions=(*EXTRA_MOTIONS, "up", "spin")
)
EXTRA_SCENES = [sample_scene(seed, EXTRA_OPTIONS) for seed in range(150)]


def test_a_seed_gives_one_scene() -> None:
    assert repr(sample_scene(7)) == repr(sample_scene(7))
    assert repr(sample_scene(7)) != repr(sample_scene(8))
    assert clip_seed(3, 5) == 3_000_005


def test_options_are_kept() -> None:
    options = SceneOptions(4.0, 5.0, size=(128, 96), rate=10)
    for seed in range(40):
        scene = sample_scene(seed, options)
        assert scene.duration_s in (4.0, 4.5, 5.0)
        assert (scene.width, scene.height, scene.rate) == (128, 96, 10)
    assert {sample_scene(seed, SceneOptions(2.0, 2.0)).duration_s for seed in range(20)} == {2.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"min_duration_s": 1.5}, "cannot last 1.5 s"),
        ({"max_duration_s": 10.3}, "multiple of 0.5"),
        ({"max_duration_s": math.nan}, "cannot last nan"),
        ({"max_duration_s": math.inf}, "cannot last inf"),
        ({"min_duration_s": 20.0, "max_duration_s": 10.0}, "above the longest"),
        ({"size": (321, 240)}, "321x240"),
        ({"size": (32, 32)}, "64 to 1024"),
        ({"rate": 15}, "15 frames a second"),
        ({"rate": 0}, "even number"),
        ({"shapes": ("heart", "rhombus")}, "there is no shape 'rhombus'; known are circle, .*, ring, heart"),
        ({"motions": ("shrink",)}, "there is no motion 'shrink'; known are left, .*, spin, grow"),
        ({"shapes": ()}, "at least one shape"),
        ({"motions": ("left", "grow", "left")}, "each only once"),
    ],
)
def test_impossible_options_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SceneOptions(**arguments)


def test_what_is_drawn_without_options_stays() -> None:
    # nano's training, and every published seed, rest on it: more shapes and motions must not move a single draw.
    told = repr([(t.name, t.spans, t.motions) for scene in SCENES for t in scene.tracks])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "fd0163c398483792"
    assert not {t.shape for scene in SCENES for t in scene.tracks} & set(EXTRA_SHAPES)
    assert not {m for scene in SCENES for t in scene.tracks for m in t.motions} & set(EXTRA_MOTIONS)
    assert sample_scene(5, SceneOptions(shapes=SHAPES, motions=MOTIONS)).tracks == sample_scene(5).tracks


def test_chosen_shapes_and_motions_are_drawn_and_no_others() -> None:
    tracks = [track for scene in EXTRA_SCENES for track in scene.tracks if track.shape]
    assert {track.shape for track in tracks} == {"heart", "star", "ring"}
    assert {motion for track in tracks for motion in track.motions} == {"grow", "up", "spin"}
    assert {track.shape for track in tracks if "spin" in track.motions} == {"star"}
    only_spin = [sample_scene(seed, SceneOptions(shapes=("heart",), motions=("spin",))) for seed in range(20)]
    assert not any(track.motions for scene in only_spin for track in scene.tracks)


def test_what_grows_does_so_in_its_span_inside_the_frame_and_apart_from_others() -> None:
    grown = 0
    for scene in EXTRA_SCENES:
        times = np.arange(0, scene.duration_s + 0.25, 0.5)
        places = frame_state_arrays(scene, times).shape_place[:, 3:]
        shapes = [track for track in scene.tracks if track.shape]
        for slot, track in enumerate(shapes):
            for appearance in track.appearances:
                grows = appearance.motion == "grow"
                assert appearance.growth == (GROWTH if grows else (1.0, 1.0))
                shown = (times >= appearance.start_s) & (times < appearance.end_s)
                radii = places[shown, slot, 2] / (track.size_px / 2)
                if not grows:
                    assert radii == pytest.approx(1.0)
                    continue
                grown += 1
                first, last = appearance.motion_start_s, appearance.motion_end_s
                expected = np.interp(times[shown], [first, last], GROWTH)
                assert radii == pytest.approx(expected, rel=1e-5)
                x, y, radius = places[shown, slot, :3].T
                assert (np.minimum(x, y) - radius > -1.0).all()
                assert (x + radius < scene.width + 1.0).all()
                assert (y + radius < scene.height + 1.0).all()
        for first_slot, second_slot in combinations(range(len(shapes)), 2):
            pair = shapes[first_slot], shapes[second_slot]
            both = np.array(
                [all(is_visible(track, time, scene.duration_s) for track in pair) for time in times]
            )
            a, b = places[both, first_slot], places[both, second_slot]
            assert (np.hypot(*(a - b)[:, :2].T) >= a[:, 2] + b[:, 2]).all()
    assert grown > 50


def test_frames_stand_on_the_clock() -> None:
    for scene in SCENES[:50]:
        times = scene.frame_times()
        assert len(times) == scene.duration_s * scene.rate + 1
        assert times[0] == 0.0
        assert times[-1] == scene.duration_s
        # Every boundary is a frame's time, exactly: 0.5 s is a whole number of frames at every rate.
        assert set(np.arange(0, scene.duration_s + 0.5, 0.5)) <= set(times)
        sampled = scene.sampled_times(2.0)
        assert sampled.tolist() == np.arange(0, scene.duration_s + 0.25, 0.5).tolist()
        assert scene.sampled_times(1000.0).tolist() == times.tolist()


def test_scenes_are_made_of_what_the_card_says() -> None:
    for scene in SCENES:
        assert 2.0 <= scene.duration_s <= 60.0
        assert scene.duration_s % 0.5 == 0
        assert (scene.width, scene.height) in SIZES
        assert scene.rate in RATES
        names = [track.name for track in scene.tracks]
        assert 2 <= len(set(names)) == len(names) <= 5
        assert sum(name.startswith("word ") for name in names) <= 1
        assert sum(name.startswith("number ") for name in names) <= 1
        assert any(track.shape for track in scene.tracks)
        for track in scene.tracks:
            if track.shape:
                assert track.name == f"{track.colour} {track.shape}"
                assert track.shape in SHAPES
                assert track.colour in COLOURS
                assert 0.18 <= track.size_px / min(scene.width, scene.height) <= 0.32
            else:
                assert track.text in (*WORDS, *"0123456789")
                cap_height = 7 * track.size_px
                assert cap_height <= 0.24 * min(scene.width, scene.height) + 1e-9
                assert (6 * len(track.text) + 1) * track.size_px <= 0.8 * scene.width + 1e-9


def test_spans_and_motions_lie_on_the_grid() -> None:
    for scene in SCENES:
        for track in scene.tracks:
            shortest = min(1.5, scene.duration_s / 2)
            for appearance in track.appearances:
                start, end = appearance.span
                assert start % 0.5 == 0 == end % 0.5
                assert 0 <= start < end <= scene.duration_s
                assert end - start >= shortest
                if appearance.motion != "still":
                    assert track.shape
                    assert start <= appearance.motion_start_s < appearance.motion_end_s <= end
                    assert appearance.motion_start_s % 0.5 == 0 == appearance.motion_end_s % 0.5
                if appearance.motion == "spin":
                    assert track.shape in SPINNING_SHAPES
                    assert appearance.turns != 0
                else:
                    assert appearance.turns == 0
            for before, after in pairwise(track.spans):
                assert after[0] - before[1] >= 1.0


def test_moves_are_long_enough_and_in_their_direction() -> None:
    directions = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    seen = set()
    for scene in SCENES:
        for track in scene.tracks:
            for appearance in track.appearances:
                x, y = directions.get(appearance.motion, (0, 0))
                assert np.sign((appearance.dx, appearance.dy)).tolist() == [x, y]
                if x or y:
                    seen.add(appearance.motion)
                    assert abs(appearance.dx) / scene.width + abs(appearance.dy) / scene.height >= 0.25
    assert seen == set(directions)


def test_a_spin_shows_at_two_frames_a_second() -> None:
    symmetry = {"square": 1 / 4, "triangle": 1 / 3, "star": 1 / 5, "cross": 1 / 4}
    for scene in SCENES:
        for track in scene.tracks:
            for appearance in track.appearances:
                if appearance.motion != "spin":
                    continue
                length_s = appearance.motion_end_s - appearance.motion_start_s
                step = abs(appearance.turns) / length_s * 0.5 / symmetry[track.shape]
                assert 0.1 < step < 0.7, "half a second must not turn a shape (nearly) onto itself"
                ends = appearance.turns / symmetry[track.shape]
                assert ends == pytest.approx(round(ends)), "a spin ends upright"


def test_objects_stay_inside_and_apart() -> None:
    for scene in SCENES:
        times = np.arange(0, scene.duration_s + 0.25, 0.5)
        arrays = frame_state_arrays(scene, times)
        shapes = [track for track in scene.tracks if track.shape]
        places = arrays.shape_place[:, 3:]
        margin = 1.0  # of rounding
        for slot, track in enumerate(shapes):
            shown = np.array([is_visible(track, time, scene.duration_s) for time in times])
            assert ((arrays.shape_kind[:, 3 + slot] >= 0) == shown).all()
            x, y, radius = places[shown, slot, 0], places[shown, slot, 1], track.size_px / 2
            assert (x - radius > -margin).all()
            assert (x + radius < scene.width + margin).all()
            assert (y - radius > -margin).all()
            assert (y + radius < scene.height + margin).all()
        for first, second in combinations(range(len(shapes)), 2):
            both = (arrays.shape_kind[:, 3 + first] >= 0) & (arrays.shape_kind[:, 3 + second] >= 0)
            away = np.hypot(*(places[both, first, :2] - places[both, second, :2]).T)
            assert (away >= (shapes[first].size_px + shapes[second].size_px) / 2).all()


def test_a_shaking_camera_shakes_a_little() -> None:
    shaking = [scene for scene in SCENES if scene.backdrop.shake.any()]
    assert 0.3 < len(shaking) / len(SCENES) < 0.5
    for scene in SCENES:
        assert (
            scene.backdrop.shake[:, :, 0].sum(axis=1) <= MAX_SHAKE * min(scene.width, scene.height) + 1e-9
        ).all()


def test_states_are_small_enough_to_send() -> None:
    arrays = frame_state_arrays(SCENES[0], SCENES[0].sampled_times())
    assert len(pickle.dumps(arrays)) < 600 * arrays.frames + 4000
