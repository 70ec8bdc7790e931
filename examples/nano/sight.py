"""Teaching the vision tower what stands where, from the scene's own description.

The next-token loss alone teaches a small tower colours and times, but hardly shapes and letters: one answer in thousands of
visual tokens says which shape it was. Here every visual token is told: the token that an object's centre falls into must say
which object it is and where in the cell the centre lies, the others that they hold none. The head is thrown away afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keyecli.forge import FrameStates
from keyecli.forge.font import CHARACTERS, MAX_TEXT_LENGTH
from keyecli.forge.scene import COLOURS, MAX_DISTRACTORS, SHAPES, WORDS
from keyecli.forge.states import HIDDEN

CELL_PX = 28
NAMES = [
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"word {word}" for word in WORDS),
    *(f"number {digit}" for digit in range(10)),
]
NOTHING = len(NAMES)
EMPTY_WEIGHT = 0.05  # most cells are empty
PLACE_WEIGHT = 2.0


class SightHead(nn.Module):
    """Visual token → object classes (the last one: nothing) and the centre's place inside the cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, NOTHING + 1)
        self.place = nn.Linear(width, 2)

    def forward(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """[V, D] → fp32 logits [V, classes] and places [V, 2], in cells from the cell's middle."""
        normed = self.norm(visual)
        return self.classes(normed).float(), self.place(normed).float()


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
    texts = len(COLOURS) * len(SHAPES) + torch.where(digit >= 0, len(WORDS) + digit, word)
    texts = torch.where(length > 0, texts, -1)
    centres = torch.cat((states.shape_place[:, MAX_DISTRACTORS:, :2], states.text_place[..., :2]), dim=1)
    return torch.cat((shapes, texts), dim=1), centres


def _spelling(word: str, base: int) -> int:
    codes = [CHARACTERS.index(letter) for letter in word]
    codes += [len(CHARACTERS)] * (MAX_TEXT_LENGTH - len(codes))
    return sum(code * base**place for place, code in enumerate(codes))


def targets(states: FrameStates, height: int, width: int) -> tuple[Tensor, Tensor]:
    """What each cell must say: classes int64 [N, cells] and places [N, cells, 2], for frames of height × width pixels."""
    rows, columns = height // CELL_PX, width // CELL_PX
    classes, centres = object_classes(states)
    cells = centres / states.size[:, None] * torch.tensor([columns, rows], device=centres.device)
    limit = torch.tensor([columns - 1, rows - 1], device=centres.device)
    corner = torch.minimum(cells.floor().clamp(min=0), limit)
    index = (corner[..., 1] * columns + corner[..., 0]).long()
    wanted = torch.full((states.frames, rows * columns + 1), NOTHING, device=centres.device)
    places = torch.zeros((states.frames, rows * columns + 1, 2), device=centres.device)
    # What is not visible is written to a cell behind the last, which is cut off.
    index = torch.where(classes < 0, rows * columns, index)
    wanted.scatter_(1, index, classes.clamp(min=0))
    places.scatter_(1, index[..., None].expand(-1, -1, 2), cells - corner - 0.5)
    return wanted[:, :-1], places[:, :-1]


def sight_loss(
    head: SightHead, visual: Tensor, states: FrameStates, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Loss of visual tokens [V, D] of all frames in order, and the share of objects that are named rightly."""
    wanted, places = targets(states, height, width)
    wanted, places = wanted.flatten(), places.flatten(0, 1)
    logits, placed = head(visual)
    occupied = wanted != NOTHING
    weights = torch.where(occupied, 1.0, EMPTY_WEIGHT)
    named = (F.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
    far = (
        F.smooth_l1_loss(placed, places, reduction="none", beta=0.1).sum(-1) * occupied
    ).sum() / occupied.sum().clamp(min=1)
    right = ((logits.argmax(-1) == wanted) & occupied).sum() / occupied.sum().clamp(min=1)
    return named + PLACE_WEIGHT * far, right.detach()
