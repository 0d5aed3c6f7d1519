"""Options of the icons: which, how large, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..cli.options import Data
from ..errors import UserError
from ..ranges import AtLeast, OnlyWith, refuse_if_given


def _icons() -> Data:
    return Data(kind="icons")


def _check_icons(data: Data) -> None:
    if data.kind != "icons":
        raise UserError(f"--data must be icons, got {data.kind}")


@dataclass(frozen=True)
class Prepare:
    """Draw pairs of pictures and names and write them as webdataset shards."""

    data: Data = field(default_factory=Data)
    source: Annotated[Path | None, OnlyWith("--data icons", lambda options: options.data.kind == "icons")] = None
    """The archive that `npm pack @iconify/json` writes, or one of --pack; by default npm fetches it."""
    pack: Annotated[Path | None, OnlyWith("--data icons", lambda options: options.data.kind == "icons")] = None
    """Draw nothing: write to this file, of 40 MB, all that is needed of the archive to draw the pairs elsewhere."""

    def check_together(self) -> None:
        """Refuse what a packed archive does not depend on."""
        if self.pack is not None:
            for name in ("pixels", "size", "swapped"):
                refuse_if_given(self.data, name, "drawing: leave out --pack")


@dataclass(frozen=True)
class IconTasks:
    """Write the held-out icons as zero-shot tasks in CLIP_benchmark's layout, with emoji and stamps where they are."""

    data: Data = field(default_factory=_icons)
    split: Literal["validation", "test"] = "test"
    """Which of the held-out icons."""
    emoji: Path | None = None
    """The archive that `npm pack emojibase-data` writes: CLDR's names of emoji in 28 languages."""
    stamps: Path | None = None
    """Folder of Tux Paint's stamps; by default where Debian's tuxpaint-stamps-default puts them, if it is installed."""
    languages: tuple[str, ...] = ("en",)
    """Languages of the names of emoji and stamps, a task for each."""
    out: Path = Path("icon-tasks")
    """Folder of the tasks."""

    def check_together(self) -> None:
        """Refuse other pairs than icons."""
        _check_icons(self.data)


@dataclass(frozen=True)
class Search:
    """Show the pictures that a model finds for a description, or for a picture: a sheet with names and scores."""

    query: Annotated[str, tyro.conf.Positional] = ""
    """What to look for, in words."""
    image: Path | None = None
    """A picture to look for others like it, instead of words."""
    data: Data = field(default_factory=_icons)
    catalog: Path | None = None
    """Folder made by `run.py catalog`: look there instead. The features are kept in --cache."""
    model: Path = Path("icons")
    """Folder of the model, in open_clip's local-dir layout, or, with --weights, a registered one; icons is the one that
    ships with them."""
    weights: Path | None = None
    """File of the model's weights."""
    top: Annotated[int, AtLeast(1)] = 24
    """How many pictures."""
    out: Path = Path("outputs/search.png")
    """File of the sheet."""

    def check_together(self) -> None:
        """Refuse no question, and two."""
        if self.image is None and not self.query.strip():
            raise UserError('the query is empty: say what to look for, like "cloud with rain", or give --image FILE')
        if self.image is not None and self.query:
            raise UserError("--image takes the place of the query: give one of them")
        _check_icons(self.data)
        if self.catalog is not None:
            refuse_if_given(self.data, "pixels", "--data icons, without --catalog")
