"""Which icon may be in which split, so that no drawing and no name of the target's pairs is known to the reference."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from .package import IconSet

#: Share of the icons that each split asks for, in the order of those who get a drawing that two could have.
SHARES = {"test": 0.08, "validation": 0.04, "reference": 0.44, "train": 0.44}
#: Sets of different authors of which one draws on the other: of the pictures of their common names (at least six), more
#: than a quarter correlate by more than .97 at 24 x 24. Sets of one author are one family anyway.
FAMILIES = (
    ("ic", "material-symbols", "material-symbols-light", "mdi", "mdi-light", "memory"),
    ("feather", "keyline-icons", "lucide", "lucide-lab", "meteor-icons"),
    ("famicons", "ion"),
    ("reicon", "solar"),
    ("heroicons", "heroicons-outline", "heroicons-solid", "majesticons", "pixelarticons", "bitcoin-icons"),
    ("mi", "mono-icons", "tabler"),
    ("maki", "pinhead", "temaki"),
    ("boxicons", "bx", "bxs", "fluent", "fluent-color", "fluent-mdl2", "codicon", "ph", "sidekickicons"),
)
_FLAGS = ("cif", "circle-flags", "flag", "flagpack")


def kind_of(icons: IconSet) -> str:
    """Return what a set's icons are: emoji, brand, flag, or interface, which is all others."""
    if icons.category == "Emoji" or "emoji" in icons.prefix:
        return "emoji"
    if icons.category == "Logos" or icons.prefix.endswith(("brands", "-logos")):
        return "brand"
    return "flag" if icons.prefix in _FLAGS else "interface"


def family_of(icons: IconSet) -> str:
    """Return the name of the sets that share drawings with this one: those of one author and kind, or of `FAMILIES`."""
    for family in FAMILIES:
        if icons.prefix in family:
            return family[0]
    return icons.author or icons.prefix


def drawing_splits(sets: Iterable[IconSet]) -> dict[tuple[str, str], str]:
    """Return the split of each family of each kind, by the number of its icons alone.

    The largest family comes first; each goes to the split that is furthest below its share of the kind's icons.
    """
    sizes: dict[str, Counter[str]] = {}
    for icons in sets:
        sizes.setdefault(kind_of(icons), Counter())[family_of(icons)] += len(icons.icons)
    return {(kind, family): split for kind, families in sizes.items() for family, split in _dealt_out(families).items()}


def _dealt_out(sizes: Mapping[str, int]) -> dict[str, str]:
    lacking = {split: share * sum(sizes.values()) for split, share in SHARES.items()}
    found = {}
    for family in sorted(sizes, key=lambda family: (-sizes[family], family)):
        split = max(lacking, key=lambda name: lacking[name])
        lacking[split] -= sizes[family]
        found[family] = split
    return found


def split_of(kind: str, family: str, caption: str, by_drawing: Mapping[tuple[str, str], str]) -> str | None:
    """Return the split of an icon, or None where its drawing is of one pool of pairs and its name of the other.

    A logo or flag is the same drawing in every set: these are split by name alone. All others are split by the family
    of their set; half of the names belong to the target's pairs, half to the reference's, and test and validation ask
    for both.
    """
    place = _place(caption)
    if kind in ("brand", "flag"):
        for split, share in SHARES.items():
            if place < share:
                return split
            place -= share
    split = by_drawing[kind, family]
    name = "train" if place < 0.5 else "reference"
    return split if split in ("test", "validation", name) else None


def _place(caption: str) -> float:
    """Return a number from 0 to 1 that depends on the caption alone."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") / 2.0**64
