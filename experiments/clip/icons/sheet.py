"""A sheet of pictures with a few lines of text under each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont

_MARGIN, _LINE = 10, 14  # pixels
_TEXT, _FAINT = "#111111", "#777777"


class Cell(NamedTuple):
    """A picture and the lines under it, of which the first is dark and the others are faint."""

    image: Image.Image
    lines: Sequence[str]


def draw_sheet(rows: Sequence[tuple[str, Sequence[Cell]]], columns: int, side: int = 96, width: int = 0) -> Image.Image:
    """Return a sheet in RGB: each of ``rows`` is a heading and cells, which go on in the next line after ``columns``.

    Pictures are scaled to fit ``side`` pixels, small ones up; a text that is wider than its cell, by default 1.35 times
    as wide as a picture, ends in an ellipsis.
    """
    cell_width = width or round(1.35 * side)
    lines = max((len(cell.lines) for _, cells in rows for cell in cells), default=0)
    cell_height = side + lines * _LINE + _MARGIN
    heights = [2 * _LINE + math.ceil(len(cells) / columns) * cell_height for _, cells in rows]
    sheet = Image.new("RGB", (columns * cell_width + 2 * _MARGIN, sum(heights) + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for (heading, cells), height in zip(rows, heights, strict=True):
        draw.text((_MARGIN, top), _fitted(heading, sheet.width - 2 * _MARGIN, 13), _TEXT, _font(13))
        for number, cell in enumerate(cells):
            line, column = divmod(number, columns)
            place = _MARGIN + column * cell_width, top + round(1.6 * _LINE) + line * cell_height
            _draw_cell(sheet, draw, place, cell, side, cell_width)
        top += height
    return sheet


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], cell: Cell, side: int, width: int
) -> None:
    left, top = place
    scale = side / max(cell.image.size)
    size = max(1, round(cell.image.width * scale)), max(1, round(cell.image.height * scale))
    sheet.paste(cell.image.convert("RGB").resize(size, Image.Resampling.LANCZOS), (left, top))
    for number, text in enumerate(cell.lines):
        at = left, top + side + 2 + number * _LINE
        draw.text(at, _fitted(text, width - 6, 10), _FAINT if number else _TEXT, _font(10))


def _fitted(text: str, width: int, size: int) -> str:
    """Return a text that is at most ``width`` pixels wide, in one line."""
    text = " ".join(text.split())[:1000]
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
