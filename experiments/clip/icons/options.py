"""Options of the icons: which, how large, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..cli.options import Data
from ..ranges import AtLeast, OnlyWith

_OF_ICONS = OnlyWith("--data icons", lambda options: options.kind == "icons")


@dataclass(frozen=True)
class Prepare:
    """Draw pairs of pictures and names and write them as webdataset shards."""

    kind: Annotated[Literal["glyphs", "icons"], tyro.conf.arg(name="data")] = "glyphs"
    """Characters of the shipped fonts with their Unicode names, or the icons of npm's @iconify/json with theirs."""
    data: Data = field(default_factory=Data)
    pixels: Annotated[int, AtLeast(8), _OF_ICONS] = 64
    """Width and height of the icons' pictures."""
    source: Annotated[Path | None, _OF_ICONS] = None
    """The archive that `npm pack @iconify/json` writes; by default npm fetches it."""
