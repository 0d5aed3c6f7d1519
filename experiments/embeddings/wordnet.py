"""Pairs of a definition and the words for it, from WordNet 3.0's nouns of artifacts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

ARTIFACTS = "06"  # the number of WordNet's lexicographer file
DEFAULT = Path("/usr/share/wordnet/data.noun")  # of Debian's package wordnet-base
SHARES = {"train": 70, "validation": 10, "test": 20}  # percent


class Pairs(NamedTuple):
    """Definitions and words, one of each for a synset."""

    definitions: list[str]
    words: list[str]


def read_pairs(path: Path = DEFAULT, kind: str = ARTIFACTS) -> dict[str, Pairs]:
    """Return the pairs of every split; a synset's split is a hash of its number.

    Raises
    ------
    FileNotFoundError
        If WordNet is not there, naming the package that has it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: apt-get install wordnet-base, or name its data.noun by --wordnet")
    splits = {name: Pairs([], []) for name in SHARES}
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the license
            continue
        fields, _, gloss = line.partition(" | ")
        number, own, _, count, *rest = fields.split()
        if own != kind:
            continue
        words = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
        split = splits[_split_of(number)]
        split.definitions.append(gloss.split("; ")[0].strip())
        split.words.append(", ".join(words))
    return splits


def _split_of(number: str) -> str:
    place = int.from_bytes(hashlib.sha256(number.encode()).digest()[:4], "little") % 100
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    raise AssertionError(f"shares must add up to 100, got {SHARES}")
