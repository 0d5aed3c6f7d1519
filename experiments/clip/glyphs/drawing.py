"""The embedded data set: the named characters of matplotlib's DejaVu and STIX fonts, drawn and captioned.

The caption of a character is its lower-cased Unicode name. The exact counts depend on the Unicode version of
the running Python (``unicodedata.unidata_version``); with 14.0.0 there are 52,572 pairs and 7,144 captions.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, get_args

import matplotlib
from fontTools.ttLib import TTFont
from PIL import Image, ImageChops, ImageDraw, ImageFont

from ..cli.options import Captions
from ..errors import UserError
from ..io.workers import spread
from .dataset import GlyphPair

SPLITS = ("train", "reference", "validation", "test")
VAGUE_KEEP = 0.5
SWAPPED_SHARE = 0.4
SWAPPED_SEED = 0

_FONT_FILES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
)
_SPLIT_BOUNDS = (0.45, 0.90, 0.95, 1.0)
# Combining marks (M) have no form of their own without a base; separators (Z) and controls (C) print nothing.
_UNDRAWN_CATEGORIES = ("M", "Z", "C")
# In units of the canvas: DejaVu's ascent and descent (1.16 em) then leave a margin above and below.
_EM = 0.75
_BASELINE = 0.76
_MARGIN = 1 / 32


class Glyph(NamedTuple):
    """One drawn character: black ink on white, mode ``L``."""

    face: str
    code_point: int
    caption: str
    image: Image.Image


def faces() -> tuple[str, ...]:
    """Return the names of the faces in the order of drawing."""
    return tuple(name.lower() for name in _FONT_FILES)


def draw_glyphs(size: int = 32, chosen: Sequence[str] | None = None) -> Iterator[Glyph]:
    """Draw every named character that leaves ink, face by face and by ascending code point.

    All characters of a face share one font size and one baseline, so that a capital stays larger than its
    small letter and a dot above stays above; only a character whose ink would not fit is drawn smaller.

    Parameters
    ----------
    size
        Side of the square images in pixels.
    chosen
        The faces to draw; all by default.

    Yields
    ------
    Glyph
        The drawn character.

    Raises
    ------
    UserError
        If matplotlib's folder lacks one of the fonts.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for file_name, face in zip(_FONT_FILES, faces(), strict=True):
        if chosen is not None and face not in chosen:
            continue
        path = folder / f"{file_name}.ttf"
        if not path.is_file():
            raise UserError(f"the font {path} is missing: reinstall matplotlib, which ships it")
        with TTFont(path, lazy=True) as font:
            characters = font.getBestCmap()
        if characters is None:
            raise UserError(f"the font {path} maps no characters: reinstall matplotlib, which ships it")
        for code_point in sorted(characters):
            character = chr(code_point)
            name = unicodedata.name(character, "")
            if not name or unicodedata.category(character).startswith(_UNDRAWN_CATEGORIES):
                continue
            image = _draw(path, character, size)
            if image is not None:
                yield Glyph(face, code_point, name.lower(), image)


def _face(size: int, face: str) -> list[Glyph]:
    return list(draw_glyphs(size, (face,)))


@lru_cache(maxsize=256)
def _font(path: Path, em: float) -> ImageFont.FreeTypeFont:
    # The Raqm engine, Pillow's default where it is installed, fails on some of these characters.
    return ImageFont.truetype(str(path), em, layout_engine=ImageFont.Layout.BASIC)


def _draw(path: Path, character: str, size: int) -> Image.Image | None:
    limit = size - 2 * max(1, round(_MARGIN * size))
    margin = (size - limit) // 2
    em = _EM * size
    while True:
        # The widest characters take two ems, the furthest overhang half an em: this sheet clips none of them.
        sheet = Image.new("L", (4 * size, 4 * size))
        baseline = 2 * size
        ImageDraw.Draw(sheet).text((size, baseline), character, fill=255, font=_font(path, em), anchor="ls")
        box = sheet.getbbox()
        if box is None:
            return None
        left, top, right, bottom = box
        excess = max(right - left, bottom - top) / limit
        if excess <= 1:
            break
        em = min(em / excess, em - 0.5)
    x = (left + right - size) // 2
    y = min(max(baseline - round(_BASELINE * size), bottom + margin - size), top - margin)
    return ImageChops.invert(sheet.crop((x, y, x + size, y + size)))


def _unit(text: str) -> float:
    """Map a text to [0, 1), uniformly and the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def split_of(face: str, code_point: int) -> str:
    """Return the split of a character in a face, from a hash of the two.

    "train" (45 %) is what the target model trains on, "reference" (45 %) what the reference model trains on.
    The two pools are disjoint, so that the reference model is independent of the target's sample, as the
    theory asks; "validation" and "test" (5 % each) are disjoint from both.
    """
    position = _unit(f"{face}:{code_point}")
    return next(name for name, bound in zip(SPLITS, _SPLIT_BOUNDS, strict=True) if position < bound)


def vague(caption: str, keep: float, key: str) -> str:
    """Drop words of a caption at random.

    Parameters
    ----------
    caption
        Words separated by spaces.
    keep
        Probability with which each word is kept. At least one word always is.
    key
        Source of the randomness: equal keys drop the same positions.

    Returns
    -------
    str
        The words kept, in their order.
    """
    draws = [(_unit(f"vague:{key}:{position}"), word) for position, word in enumerate(caption.split())]
    kept = [word for draw, word in draws if draw < keep] or [min(draws)[1]]
    return " ".join(kept)


def swapped(captions: Sequence[str], share: float, seed: int) -> list[str]:
    """Exchange a share of the captions among each other.

    Parameters
    ----------
    captions
        The captions, by position.
    share
        ``round(share * len(captions))`` positions are chosen; their captions move one place along a random
        cycle, so that no chosen position keeps its own (unless just one is chosen, or two are equal).
    seed
        Source of the randomness.

    Returns
    -------
    list of str
        The captions after the exchange.
    """
    order = sorted(range(len(captions)), key=lambda position: _unit(f"swapped:{seed}:{position}"))
    chosen = order[: round(share * len(captions))]
    result = list(captions)
    for giver, taker in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        result[taker] = captions[giver]
    return result


def glyph_splits(
    captions: Captions = "clean", size: int = 32, chosen: Sequence[str] | None = None
) -> dict[str, list[GlyphPair]]:
    """Draw the data set and lay it out in splits, each in a fixed random order.

    Parameters
    ----------
    captions
        What the "train" split says of its images: "clean" (the names), "vague" (each word kept with
        probability ``VAGUE_KEEP``) or "swapped" (a share ``SWAPPED_SHARE`` of the captions exchanged among
        the images). The captions of the other splits are always clean.
    size
        Side of the square images in pixels.
    chosen
        The faces to draw; all by default.

    Returns
    -------
    dict
        The pairs of each split; ``meta["name"]`` holds the true caption.
    """
    if captions not in get_args(Captions):
        raise ValueError(f"captions is {captions!r}: choose one of {', '.join(get_args(Captions))}")
    splits: dict[str, list[GlyphPair]] = {name: [] for name in SPLITS}
    some = [face for face in faces() if chosen is None or face in chosen]
    for face, code_point, name, image in chain.from_iterable(spread(partial(_face, size), some)):
        meta = {"face": face, "code_point": code_point, "name": name}
        pair = GlyphPair(f"{face}-{code_point:05x}", image, name, meta)
        splits[split_of(face, code_point)].append(pair)
    for pairs in splits.values():
        pairs.sort(key=lambda pair: _unit(f"order:{pair.key}"))
    names = [pair.caption for pair in splits["train"]]
    if captions == "vague":
        names = [vague(pair.caption, VAGUE_KEEP, pair.key) for pair in splits["train"]]
    elif captions == "swapped":
        names = swapped(names, SWAPPED_SHARE, SWAPPED_SEED)
    splits["train"] = [pair._replace(caption=name) for pair, name in zip(splits["train"], names, strict=True)]
    return splits
