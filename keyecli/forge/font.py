"""The bitmap glyphs FrameForge writes on screen: A-Z and 0-9, five columns by seven rows."""

from __future__ import annotations

import numpy as np

GLYPH_ROWS = 7
GLYPH_COLUMNS = 5
CELL_COLUMNS = GLYPH_COLUMNS + 1  # a glyph and the empty column after it
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
BLANK = len(CHARACTERS)  # the code of an empty cell
MAX_TEXT_LENGTH = 5

# Read as a picture: seven groups a glyph, top row first, '#' is ink.
_GLYPHS = """
A .###. #...# #...# ##### #...# #...# #...#
B ####. #...# #...# ####. #...# #...# ####.
C .#### #.... #.... #.... #.... #.... .####
D ####. #...# #...# #...# #...# #...# ####.
E ##### #.... #.... ####. #.... #.... #####
F ##### #.... #.... ####. #.... #.... #....
G .#### #.... #.... #.### #...# #...# .###.
H #...# #...# #...# ##### #...# #...# #...#
I ##### ..#.. ..#.. ..#.. ..#.. ..#.. #####
J ..### ...#. ...#. ...#. ...#. #..#. .##..
K #...# #..#. #.#.. ##... #.#.. #..#. #...#
L #.... #.... #.... #.... #.... #.... #####
M #...# ##.## #.#.# #.#.# #...# #...# #...#
N #...# ##..# ##..# #.#.# #..## #..## #...#
O .###. #...# #...# #...# #...# #...# .###.
P ####. #...# #...# ####. #.... #.... #....
Q .###. #...# #...# #...# #.#.# #..#. .##.#
R ####. #...# #...# ####. #.#.. #..#. #...#
S .#### #.... #.... .###. ....# ....# ####.
T ##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..
U #...# #...# #...# #...# #...# #...# .###.
V #...# #...# #...# #...# .#.#. .#.#. ..#..
W #...# #...# #...# #.#.# #.#.# ##.## #...#
X #...# #...# .#.#. ..#.. .#.#. #...# #...#
Y #...# #...# .#.#. ..#.. ..#.. ..#.. ..#..
Z ##### ....# ...#. ..#.. .#... #.... #####
0 .###. #...# #..## #.#.# ##..# #...# .###.
1 ..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.
2 .###. #...# ....# ...#. ..#.. .#... #####
3 ####. ....# ....# .###. ....# ....# ####.
4 #..#. #..#. #..#. ##### ...#. ...#. ...#.
5 ##### #.... ####. ....# ....# #...# .###.
6 .###. #.... #.... ####. #...# #...# .###.
7 ##### ....# ...#. ..#.. ..#.. .#... .#...
8 .###. #...# #...# .###. #...# #...# .###.
9 .###. #...# #...# .#### ....# ....# .###.
"""


def _parse_cells() -> np.ndarray:
    cells = np.zeros((len(CHARACTERS) + 1, GLYPH_ROWS, CELL_COLUMNS), dtype=np.float32)
    for line in _GLYPHS.strip().splitlines():
        character, *rows = line.split()
        ink = [[mark == "#" for mark in row] for row in rows]
        cells[CHARACTERS.index(character), :, :GLYPH_COLUMNS] = ink
    return cells


CELLS = _parse_cells()
"""Glyph cells by code, float32 [37, 7, 6] of 0 or 1; the last column of a cell and the last cell are empty."""


def text_codes(text: str) -> list[int]:
    """Codes of `text`, padded with `BLANK` to `MAX_TEXT_LENGTH`; ValueError for a longer or another text."""
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"{text!r} is longer than {MAX_TEXT_LENGTH} characters")
    return [CHARACTERS.index(character) for character in text] + [BLANK] * (MAX_TEXT_LENGTH - len(text))
