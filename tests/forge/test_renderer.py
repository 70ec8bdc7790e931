"""What is drawn is what the scene says: visible when, where, in which shape, colour, motion and letters."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from keyecli.forge import (
    Appearance,
    FrameStates,
    Scene,
    Track,
    concatenate_arrays,
    draw_frames,
    frame_state_arrays,
    frame_states,
    iterate_clips,
    noise_bank,
    render,
    sample_scene,
)
from keyecli.forge.font import CELLS, CHARACTERS
from keyecli.forge.renderer import Bank
from keyecli.forge.scene import COLOURS, EXTRA_SHAPES, SHAPES, SceneOptions
from tests.forge.scenes import (
    BLUE_SQUARE,
    GREEN_STAR,
    RED_CIRCLE,
    RED_HEART,
    WORD_GATE,
    hand_scene,
    heart_scene,
    is_visible,
    plain_backdrop,
    without,
)

CPU = torch.device("cpu")


def draw(scene: Scene, times: list[float], height: int = 0, width: int = 0) -> np.ndarray:
    return render(frame_states(scene, times), height or scene.height, width or scene.width).numpy()


def footprint(scene: Scene, track: Track, times: list[float]) -> np.ndarray:
    """bool [N, H, W]: the pixels that change clearly when the object is taken out of the scene."""
    change = draw(scene, times).astype(int) - draw(without(scene, track), times).astype(int)
    return np.abs(change).max(axis=-1) > 20


@pytest.mark.parametrize("seed", range(16))
def test_pixels_show_an_object_exactly_when_it_is_visible(seed: int) -> None:
    scene = sample_scene(seed, SceneOptions(max_duration_s=12.0))
    frame_s = 1 / scene.rate
    for track in scene.tracks:
        times = {0.0, scene.duration_s}
        for boundary in (time for span in track.spans for time in span):
            steps = (-0.5, -frame_s, -1e-6, 0.0, 1e-6, frame_s, 0.5)
            times |= {boundary + step for step in steps if 0 <= boundary + step <= scene.duration_s}
        ordered = sorted(times)
        area = footprint(scene, track, ordered).sum(axis=(1, 2))
        shown = [is_visible(track, time, scene.duration_s) for time in ordered]
        assert (area > 0).tolist() == shown, track.name
        # Never hidden for the most part by another object. Thin strokes fill a sixth of a text's box and more.
        smallest = (
            0.2 * track.size_px**2 if track.shape else 7 * 5 * len(track.text) * 0.15 * track.size_px**2
        )
        assert area[shown].min() > smallest, track.name


def test_times_and_order_of_frames_do_not_matter() -> None:
    scene = sample_scene(3)
    times = scene.sampled_times()
    together = draw(scene, times)
    assert (draw(scene, times[::-1])[::-1] == together).all()
    for index in (0, 1, len(times) - 1):
        assert (draw(scene, [times[index]])[0] == together[index]).all()
    assert (draw(scene, [scene.duration_s + 5, -1.0]) == together[[-1, 0]]).all()


def test_drawing_everything_equals_drawing_what_is_visible() -> None:
    scenes = [sample_scene(seed, SceneOptions(max_duration_s=6.0)) for seed in range(12)]
    states = FrameStates.from_arrays(
        concatenate_arrays([frame_state_arrays(scene, scene.sampled_times()) for scene in scenes])
    )
    for height, width in ((84, 112), (112, 112)):
        lean = render(states, height, width).int()
        full = draw_frames(states, noise_bank(CPU), height, width).int()
        assert (lean - full).abs().max() <= 1


def test_drawing_everything_looks_at_no_values() -> None:
    # What torch.compile needs. Fake tensors have shapes and no values: a branch on data raises.
    states = frame_states(hand_scene(), [0.0, 2.0, 4.0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = FrameStates(*(mode.from_tensor(getattr(states, field.name)) for field in fields(states)))
        drawn = draw_frames(fakes, Bank(*map(mode.from_tensor, noise_bank(CPU))), 56, 84)
    assert (drawn.shape, drawn.dtype) == ((3, 56, 84, 3), torch.uint8)


def test_concatenated_states_draw_each_clip() -> None:
    clips = [sample_scene(seed) for seed in (1, 2)]
    parts = [frame_state_arrays(scene, scene.sampled_times()[:5]) for scene in clips]
    joined = FrameStates.from_arrays(concatenate_arrays(parts))
    assert joined.frames == 10
    expected = torch.cat([render(FrameStates.from_arrays(part), 84, 112) for part in parts])
    assert torch.equal(render(joined, 84, 112), expected)
    assert torch.equal(render(joined[5:], 84, 112), expected[5:])


def polygon(corners: list[tuple[float, float]]) -> np.ndarray:
    return np.array(corners)


def reference_inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie in an upright shape of radius 1 (v points down), from corners and the nonzero rule."""
    if shape in ("circle", "ring"):
        distance = np.hypot(u, v)
        return distance <= 1 if shape == "circle" else (distance <= 1) & (distance >= 0.54)
    if shape == "square":
        corners = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    elif shape == "triangle":
        corners = [(1.12 * math.sin(a), -1.12 * math.cos(a)) for a in np.arange(3) * 2 * math.pi / 3]
    elif shape == "star":
        reach = 0.36 / math.cos(math.radians(72))
        corners = [(reach * math.sin(a), -reach * math.cos(a)) for a in np.arange(5) * 4 * math.pi / 5]
    elif shape == "heart":
        # From the point up to the right corner, around the right lobe to the notch, and the mirror image back.
        angles = np.radians(np.linspace(45, -135, 50))
        lobe = [(0.44 + 0.6223 * math.cos(a), -0.22 + 0.6223 * math.sin(a)) for a in angles]
        corners = [(0.0, 1.1), *lobe, *[(-x, y) for x, y in reversed(lobe)]]
    else:
        arm = [(0.33, -1), (0.33, -0.33), (1, -0.33)]
        corners = [(x, y) for x, y in arm]
        for _ in range(3):
            arm = [(-y, x) for x, y in arm]
            corners += arm
    winding = np.zeros(u.shape, dtype=int)
    points = polygon(corners)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        side = (bx - ax) * (v - ay) - (by - ay) * (u - ax)
        winding += ((ay <= v) & (by > v) & (side > 0)).astype(int)
        winding -= ((ay > v) & (by <= v) & (side < 0)).astype(int)
    return winding != 0


@pytest.mark.parametrize("turns", [0.0, 0.07])
@pytest.mark.parametrize("shape", [*SHAPES, *EXTRA_SHAPES])
@pytest.mark.parametrize(("height", "width"), [(120, 160), (84, 112), (84, 140)])
def test_shapes_match_a_supersampled_reference(shape: str, turns: float, height: int, width: int) -> None:
    if shape in ("circle", "ring"):
        turns = 0.0
    spin = Appearance(0.0, 2.0, 83.3, 58.7, "spin", 0.0, 2.0, turns=2 * turns)
    track = Track(f"white {shape}", "white", 44.0, (spin,), shape=shape)
    scene = replace(hand_scene(), tracks=(track,), backdrop=plain_backdrop(0.0))
    drawn = draw(scene, [1.0], height, width)[0, :, :, 0] / 245.0
    fine = 8
    x = (np.arange(width * fine) + 0.5) / (width * fine) * 160 - 83.3
    y = ((np.arange(height * fine) + 0.5) / (height * fine) * 120 - 58.7)[:, None]
    cosine, sine = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    inside = reference_inside(shape, (cosine * x + sine * y) / 22, (cosine * y - sine * x) / 22)
    expected = inside.reshape(height, fine, width, fine).mean(axis=(1, 3))
    assert np.abs(drawn - expected).sum() < 0.035 * expected.sum()
    assert np.abs(drawn - expected).max() < 0.55  # a sharp corner is a little blunt or sharp


def test_colours_are_exact_and_far_apart() -> None:
    for name, colour in COLOURS.items():
        track = Track(f"{name} circle", name, 40.0, (Appearance(0.0, 2.0, 80.0, 60.0),), shape="circle")
        scene = replace(hand_scene(), tracks=(track,))
        assert tuple(draw(scene, [0.0], 84, 112)[0, 42, 56]) == colour
    values = np.array(list(COLOURS.values()))
    away = np.abs(values[:, None] - values[None]).sum(axis=-1)
    assert away[~np.eye(len(values), dtype=bool)].min() > 120


def centres(scene: Scene, track: Track, times: list[float]) -> np.ndarray:
    shown = footprint(scene, track, times)
    return np.array([np.argwhere(frame).mean(axis=0)[::-1] + 0.5 for frame in shown])


def test_a_move_happens_in_its_span_and_only_there() -> None:
    times = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.5]
    x, y = centres(hand_scene(), BLUE_SQUARE, times).T
    assert y == pytest.approx([30.0] * len(times), abs=0.3)
    assert x == pytest.approx([60, 60, 60, 75, 90, 105, 120, 120, 120], abs=0.3)


def test_a_spin_turns_the_shape_and_ends_upright() -> None:
    scene = replace(hand_scene(), tracks=(GREEN_STAR,))
    star = replace(GREEN_STAR, appearances=(replace(GREEN_STAR.appearances[0], start_s=1.0, end_s=6.0),))
    frames = draw(replace(scene, tracks=(star,)), [1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]).astype(int)
    changes = np.abs(np.diff(frames, axis=0)).max(axis=(1, 2, 3))
    assert (changes > 100).tolist() == [False, False, True, True, True, True, False]
    assert (frames[-1] == frames[0]).all()


def test_what_grows_takes_more_and_more_room_and_stays_where_it_is() -> None:
    scene = heart_scene()
    area = footprint(scene, RED_HEART, [0.5, 1.0, 1.5, 2.0, 2.4375, 4.0, 5.0]).sum(axis=(1, 2))
    assert (np.diff(area[:5]) > 30).all()
    # Areas go with the square of 0.6 → 1.47 (just before the end), and of 1 when it does not grow.
    assert area[4] / area[0] == pytest.approx((1.472 / 0.6) ** 2, rel=0.1)
    assert area[5] / area[0] == pytest.approx((1 / 0.6) ** 2, rel=0.1)
    assert area[5] == area[6]
    places = frame_states(scene, [0.5, 1.5, 2.4]).shape_place[:, 3, :2]
    assert (places == torch.tensor([40.0, 80.0])).all()


def test_still_objects_stand_still() -> None:
    frames = draw(hand_scene(), [1.0, 1.0 + 1 / 12])
    circle = frames[:, 10:46, 10:46]
    assert (circle[0] == circle[1]).all()
    assert tuple(circle[0, 20, 20]) == COLOURS["red"]
    assert tuple(draw(hand_scene(), [4.5])[0, 90, 30]) == COLOURS["red"]
    assert tuple(draw(hand_scene(), [3.0])[0, 30, 30]) == (40, 40, 40)
    assert RED_CIRCLE.spans == ((1.0, 3.0), (4.5, 6.0))


def text_bitmap(text: str) -> np.ndarray:
    """The bitmap of `text`, float32 [7, 6 * len(text) - 1] of 0 (empty) or 1 (ink)."""
    return np.concatenate([CELLS[CHARACTERS.index(character)] for character in text], axis=1)[:, :-1]


def test_text_at_whole_dots_is_its_bitmap() -> None:
    picture = draw(hand_scene(), [3.0])[0, :, :, 0]
    # GATE: 23 dots of 3 pixels around x = 75, 7 around y = 70.
    left, top = 75 - 23 * 3 / 2, 70 - 7 * 3 / 2
    assert left % 1 == top % 1 == 0.5  # half pixels: compare only the middle of each dot
    rows = (top + 3 * np.arange(7) + 1.5).astype(int)
    columns = (left + 3 * np.arange(23) + 1.5).astype(int)
    ink = picture[np.ix_(rows, columns)] > 200
    assert (ink == (text_bitmap("GATE") == 1)).all()
    assert WORD_GATE.text == "GATE"
    outside = picture[int(top) - 2, int(left) : int(left) + 60]
    assert (outside < 20).all(), "a dark plate surrounds the text"


@pytest.mark.parametrize(("height", "width", "size"), [(84, 112, (320, 240)), (112, 112, (240, 240))])
def test_the_smallest_text_is_legible_at_the_models_size(
    height: int, width: int, size: tuple[int, int]
) -> None:
    bitmaps = {character: text_bitmap(character) for character in CHARACTERS}
    dot = 0.16 * min(size) / 7
    for character in CHARACTERS:
        place = Appearance(0.0, 2.0, 101.3, 97.9)
        track = Track(f"number {character}", "yellow", dot, (place,), text=character)
        scene = replace(
            hand_scene(), width=size[0], height=size[1], tracks=(track,), backdrop=plain_backdrop(110.0, 6.0)
        )
        picture = draw(scene, [0.0], height, width)[0, :, :, 0] / 245.0
        x = (place.x + (np.arange(5) - 2) * dot) * width / size[0] - 0.5
        y = (place.y + (np.arange(7) - 3) * dot) * height / size[1] - 0.5
        cells = interpolate(picture, y, x)
        errors = {other: np.abs(cells - bitmap).mean() for other, bitmap in bitmaps.items()}
        assert min(errors, key=errors.__getitem__) == character
        second = sorted(errors.values())[1]
        assert errors[character] < 0.75 * second


def interpolate(picture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear samples of a picture at the grid y × x."""
    row, column = np.floor(y).astype(int), np.floor(x).astype(int)
    down, along = (y - row)[:, None], (x - column)[None]
    corners = [picture[np.ix_(row + a, column + b)] for a in (0, 1) for b in (0, 1)]
    top = corners[0] * (1 - along) + corners[1] * along
    bottom = corners[2] * (1 - along) + corners[3] * along
    return top * (1 - down) + bottom * down


def test_noise_has_its_strength_at_every_size() -> None:
    scene = replace(hand_scene(), tracks=(), backdrop=plain_backdrop(100.0, noise_sigma=6.0))
    times = np.arange(12) / 12
    full = draw(scene, times).astype(float)
    assert full.std() == pytest.approx(6.0, rel=0.05)
    assert full.mean() == pytest.approx(100.0, abs=0.2)
    assert (full[..., 0] == full[..., 2]).all(), "grey noise"
    half = draw(scene, times, 60, 80).astype(float)
    assert half.std() == pytest.approx(3.0, rel=0.05)
    twice = draw(scene, times, 240, 320).astype(float)
    assert twice.std() == pytest.approx(6.0, rel=0.05)
    flat = (full[:, :, :, 0] - 100).reshape(12, -1)
    assert abs(np.corrcoef(flat)[~np.eye(12, dtype=bool)]).max() < 0.05, "every frame has its own noise"


def test_the_camera_moves_everything_together() -> None:
    backdrop = plain_backdrop()
    backdrop.waves[0] = 0.2, 0.1, 0.0
    backdrop.wave_colours[0] = 30.0
    still = replace(hand_scene(), backdrop=backdrop)
    shake = np.zeros((2, 2, 3))
    shake[0, 0] = 4.0, 0.0, math.pi / 2  # four pixels to the right, all the time
    shaken = replace(still, backdrop=replace(backdrop, shake=shake))
    before, after = draw(still, [2.0]), draw(shaken, [2.0])
    assert np.abs(before[:, :, :-4].astype(int) - after[:, :, 4:].astype(int)).max() <= 1


def test_a_frame_must_fit_the_noise_bank() -> None:
    with pytest.raises(ValueError, match="pixels a frame"):
        render(frame_states(hand_scene(), [0.0]), 2048, 1024)


def test_clips_for_training() -> None:
    clips = list(iterate_clips(4, SceneOptions(max_duration_s=4.0), count=3, height=84, width=112))
    assert len(clips) == 3
    for index, (frames, times, scene) in enumerate(clips):
        assert scene.seed == 4_000_000 + index
        assert frames.shape == (len(times), 84, 112, 3)
        assert frames.dtype == torch.uint8
        assert times.tolist() == scene.sampled_times(2.0).tolist()
        assert torch.equal(frames, render(frame_states(scene, times), 84, 112))
    frames, times, scene = next(iterate_clips(4, SceneOptions(max_duration_s=4.0), fps=None))
    assert frames.shape == (scene.frame_count, scene.height, scene.width, 3)
