"""Teaching the network what stands where and what it does, from the scene's own description.

The next-token loss alone teaches a small tower colours and times, but hardly shapes and letters: one answer in thousands of
visual tokens says which shape it was. Here every visual token is told: the token that an object's centre falls into must say
which object it is, where it stands and how it is turned, the others that they hold none. In the same way the decoder's states
half-way up must say how the object has moved since the frame before. The heads are thrown away afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyecli.forge import FrameStates, Scene
from keyecli.forge.font import CHARACTERS, MAX_TEXT_LENGTH
from keyecli.forge.scene import COLOURS, MAX_DISTRACTORS, MAX_TRACKS, MOTIONS, SHAPES, WORDS
from keyecli.forge.states import HIDDEN, TEXT_SLOTS

CELL_PX = 28
SHAPE_NAMES = len(COLOURS) * len(SHAPES)
NAMES = [
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"word {word}" for word in WORDS),
    *(f"number {digit}" for digit in range(10)),
]
NOTHING = len(NAMES)
EMPTY_WEIGHT = 0.05  # most cells are empty
GEOMETRY = 6  # numbers that say where an object stands and how it is turned
GEOMETRY_WEIGHT = 8.0
MOVING_WEIGHT = 2.0  # most objects stand still
DOINGS = ("still", *MOTIONS)
# Turning a shape by 1/n looks the same; 0: it cannot be seen to turn.
SYMMETRY = tuple({"square": 4, "triangle": 3, "star": 5, "cross": 4}.get(shape, 0) for shape in SHAPES)


class Heads(nn.Module):
    """What is read off visual tokens (width D of the decoder), and off the decoder's states at their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, NOTHING + 1)
        self.geometry = nn.Linear(width, GEOMETRY)
        self.motion = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(DOINGS)))

    def forward(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """[V, D] → fp32 logits [V, classes] and geometry [V, GEOMETRY]."""
        normed = self.norm(visual)
        return self.classes(normed).float(), self.geometry(normed).float()


@dataclass(frozen=True)
class Targets:
    """What the cells of N frames must say, row by row: [V = N · cells].

    classes: int64 [V]. geometry: fp32 [V, GEOMETRY]: the centre in cells from the cell's middle, the centre in cells from
    the frame's corner, cosine and sine of the turn (times the shape's symmetry). has_turn: bool [V]. motions: int64 [V],
    index into DOINGS, −1 unknown.
    """

    classes: Tensor
    geometry: Tensor
    has_turn: Tensor
    motions: Tensor


def motions_of(scene: Scene, times_s: Sequence[float]) -> np.ndarray:
    """What each named shape did since the sampled frame before: int64 [N, MAX_TRACKS], −1 where one cannot know."""
    doings = np.full((len(times_s), MAX_TRACKS), -1, dtype=np.int64)
    shapes = [track for track in scene.tracks if track.shape]
    for slot, track in enumerate(shapes):
        for appearance in track.appearances:
            for frame in range(1, len(times_s)):
                before, now = times_s[frame - 1], times_s[frame]
                if before < appearance.start_s or not (now < appearance.end_s or now == scene.duration_s):
                    continue
                overlap = min(now, appearance.motion_end_s) - max(before, appearance.motion_start_s)
                moved = appearance.motion != "still" and overlap > 0
                doings[frame, slot] = DOINGS.index(appearance.motion if moved else "still")
    return doings


def object_classes(states: FrameStates) -> tuple[Tensor, Tensor]:
    """Classes int64 [N, objects] (−1: not visible) and centres in scene pixels [N, objects, 2] of the named objects."""
    kind = states.shape_kind[:, MAX_DISTRACTORS:]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=kind.device)
    colour = (states.shape_colour[:, MAX_DISTRACTORS:, None] - palette).abs().sum(-1).argmin(-1)
    shapes = torch.where(kind == HIDDEN, -1, colour * len(SHAPES) + kind)
    first = states.text_code[..., 0]
    length = states.text_place[..., 3]
    digit = first - CHARACTERS.index("0")
    # Words are told apart by their letters as one number.
    base = len(CHARACTERS) + 1
    powers = base ** torch.arange(MAX_TEXT_LENGTH, device=kind.device)
    spelled = (states.text_code * powers).sum(-1)
    lexicon = torch.tensor([_spelling(word, base) for word in WORDS], device=kind.device)
    word = (spelled[..., None] == lexicon).int().argmax(-1)
    texts = SHAPE_NAMES + torch.where(digit >= 0, len(WORDS) + digit, word)
    texts = torch.where(length > 0, texts, -1)
    centres = torch.cat((states.shape_place[:, MAX_DISTRACTORS:, :2], states.text_place[..., :2]), dim=1)
    return torch.cat((shapes, texts), dim=1), centres


def _spelling(word: str, base: int) -> int:
    codes = [CHARACTERS.index(letter) for letter in word]
    codes += [len(CHARACTERS)] * (MAX_TEXT_LENGTH - len(codes))
    return sum(code * base**place for place, code in enumerate(codes))


def targets(states: FrameStates, motions: Tensor, height: int, width: int) -> Targets:
    """For frames of height × width pixels; motions as `motions_of` gives them, [N, MAX_TRACKS]."""
    rows, columns = height // CELL_PX, width // CELL_PX
    classes, centres = object_classes(states)
    objects = classes.shape[1]
    cells = centres / states.size[:, None] * torch.tensor([columns, rows], device=centres.device)
    limit = torch.tensor([columns - 1, rows - 1], device=centres.device)
    corner = torch.minimum(cells.floor().clamp(min=0), limit)
    index = (corner[..., 1] * columns + corner[..., 0]).long()
    # What is not visible is written to a cell behind the last, which is cut off.
    index = torch.where(classes < 0, rows * columns, index)
    owner = torch.full((states.frames, rows * columns + 1), -1, device=index.device)
    owner.scatter_(1, index, torch.arange(objects, device=index.device).expand_as(index))
    owner = owner[:, :-1]

    kinds = states.shape_kind[:, MAX_DISTRACTORS:].clamp(min=0)
    symmetry = torch.tensor(SYMMETRY, device=index.device)[kinds.long()]
    turn = 2 * math.pi * symmetry * states.shape_place[:, MAX_DISTRACTORS:, 3]
    geometry = torch.cat((cells - corner - 0.5, cells, F.pad(_circle(turn), (0, 0, 0, TEXT_SLOTS))), dim=-1)
    turns = F.pad(symmetry > 0, (0, TEXT_SLOTS))
    doings = F.pad(motions, (0, TEXT_SLOTS), value=-1)

    held = owner.clamp(min=0)
    occupied = owner >= 0
    return Targets(
        classes=torch.where(occupied, classes.gather(1, held), NOTHING).flatten(),
        geometry=geometry.gather(1, held[..., None].expand(-1, -1, GEOMETRY)).flatten(0, 1),
        has_turn=(occupied & turns.gather(1, held)).flatten(),
        motions=torch.where(occupied, doings.gather(1, held), -1).flatten(),
    )


def _circle(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def sight_loss(heads: Heads, visual: Tensor, wanted: Targets) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of visual tokens [V, D] of all frames in order, and the shares of shapes and texts that are named rightly."""
    logits, geometry = heads(visual)
    occupied = wanted.classes != NOTHING
    weights = torch.where(occupied, 1.0, EMPTY_WEIGHT)
    named = (F.cross_entropy(logits, wanted.classes, reduction="none") * weights).sum() / weights.sum()
    counted = torch.stack((occupied,) * 4 + (wanted.has_turn,) * 2, dim=-1)
    far = F.smooth_l1_loss(geometry, wanted.geometry, reduction="none", beta=0.1)
    far = (far * counted).sum() / counted.sum().clamp(min=1)
    right = logits.argmax(-1) == wanted.classes
    shapes = wanted.classes < SHAPE_NAMES
    figures = {
        name: (right & kind).sum() / kind.sum().clamp(min=1)
        for name, kind in (("shapes", shapes), ("texts", occupied & ~shapes))
    }
    return named + GEOMETRY_WEIGHT * far, figures


def motion_loss(heads: Heads, hidden: Tensor, wanted: Targets) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the decoder's states [V, D] at the visual tokens, and the share of moving objects whose motion is right."""
    logits = heads.motion(hidden).float()
    weights = torch.full((len(DOINGS),), MOVING_WEIGHT, device=hidden.device)
    weights[0] = 1.0
    loss = F.cross_entropy(logits, wanted.motions, weights, ignore_index=-1)
    moving = wanted.motions > 0
    right = (logits.argmax(-1) == wanted.motions) & moving
    return loss.nan_to_num(), {"moving": right.sum() / moving.sum().clamp(min=1)}
