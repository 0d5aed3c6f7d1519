"""What an icon shows, in words: its name without the words of its style."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

#: Words that may say how a drawing is drawn. Each is a word of content too (a traffic light, a chart line), so it is
#: taken for one of style only where a set uses it systematically, see `styles`.
STYLES = frozenset(
    "alt baseline bold broken color colored dark duo duotone fill filled flat light line linear medium mono monochrome "
    "o outline outlined outlines regular remix rounded round sharp skin small solid stroke thin thick tone twotone 1x1 "
    "4x3 10 12 16 20 24 28 32 40 48 16px 20px 24px 32px".split()
)
_SHARE = 0.04  # of a set's icons have the word at that end
_PARTNERS = 0.6  # of these icons have a partner: a name that differs in nothing but words of style


class Style(NamedTuple):
    """The words of style that a set puts before and after what an icon shows."""

    before: frozenset[str]
    after: frozenset[str]


def words(name: str) -> list[str]:
    """Return the words of an icon's name, which are joined by hyphens."""
    return [word for word in re.split(r"[-_\s]+", name.lower().replace("two-tone", "twotone")) if word]


def style_of(names: Sequence[str]) -> Style:
    """Return the words of style that a set of names uses systematically.

    A word of `STYLES` counts if at least 4 % of the names have it at an end (beside other such words), and if 60 % of
    these names have a partner in the set that differs in nothing but words of style.
    """
    split = [words(name) for name in names]
    stems = [_stem(name, Style(STYLES, STYLES)) for name in split]
    alike = Counter(tuple(name[start:end]) for name, (start, end) in zip(split, stems, strict=True))
    counts = Counter[str](), Counter[str]()
    partners = Counter[str](), Counter[str]()
    for name, (start, end) in zip(split, stems, strict=True):
        for place, part in enumerate((name[:start], name[end:])):
            counts[place].update(set(part))
            partners[place].update(set(part) if alike[tuple(name[start:end])] > 1 else ())
    enough = max(2.0, _SHARE * len(split))
    return Style(
        *(
            frozenset(word for word, n in found.items() if n >= enough and partnered[word] >= _PARTNERS * n)
            for found, partnered in zip(counts, partners, strict=True)
        )
    )


def caption(name: str, style: Style) -> str:
    """Return what an icon shows: its words without those of style at the ends; empty if no letter remains."""
    split = words(name)
    start, end = _stem(split, style)
    kept = " ".join(split[start:end])
    return kept if re.search(r"[^\W\d_]", kept) else ""


def _stem(name: list[str], style: Style) -> tuple[int, int]:
    """Return where the words of content begin and end; at least one word is kept."""
    start, end = 0, len(name)
    while end > 1 and name[end - 1] in style.after:
        end -= 1
    while start < end - 1 and name[start] in style.before:
        start += 1
    return start, end
