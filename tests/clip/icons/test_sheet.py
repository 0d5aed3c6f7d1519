"""Sheets of pictures: where each is, and that no text runs into its neighbor."""

import numpy as np
from PIL import Image

from experiments.clip.icons.sheet import Cell, draw_sheet

RED = (255, 0, 0)


def test_pictures_stand_in_lines_and_keep_their_proportions():
    cells = [Cell(Image.new("RGB", size, RED), ("name", "more")) for size in ((8, 8), (8, 4), (200, 200))]
    sheet = draw_sheet([("first", cells), ("second", cells[:1])], columns=2, side=40)
    pixels = np.asarray(sheet)
    red = (pixels == RED).all(axis=2)
    assert sheet.width == 2 * 54 + 20
    assert red.sum() == 40 * 40 * 3 + 40 * 20
    assert red[:, 10:50].any(axis=1).sum() == 3 * 40
    assert red[:, 64:104].any(axis=1).sum() == 20


def test_a_long_text_ends_in_its_cell():
    cell = Cell(Image.new("RGB", (8, 8), RED), ("a very long name that goes on and on and on\nand on",))
    empty = Cell(Image.new("RGB", (8, 8), RED), ("",))
    pixels = np.asarray(draw_sheet([("", [cell, empty])], columns=2, side=40)).astype(int)
    under = pixels[10 + 22 + 40 + 1 :]
    assert (under[:, 10:64].min(axis=2) < 200).any()
    assert (under[:, 64:].min(axis=2) >= 200).all()
