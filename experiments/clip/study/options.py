"""Options of the command ``study`` and what may be combined; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..cli.options import DataName
from ..errors import UserError
from ..ranges import OnlyWith, PositiveOrInfinite

RESULTS = Path("experiments/clip/study/results")
Grid = Literal["glyphs", "icons", "icons-large"]
TABLES: dict[Grid, str] = {"glyphs": "study.csv", "icons": "icons.csv", "icons-large": "icons_large.csv"}


@dataclass(frozen=True)
class Study:
    """Run grids of trainings, one line of results for each; more processes, started alike, share the work."""

    results: Path | None = None
    """Table with a line for each finished training; beside it, NAME_curves.csv has one for each validation, and
    NAME_tuned.json the settings that tuning found best. By default study.csv, icons.csv or, with --large,
    icons_large.csv in study/results."""
    out: Path = Path("outputs/study")
    """Folder of references, of trainings under way and of what is claimed by a process."""
    cache: Path = Path("cache")
    """Folder of shards and reference features; it can be moved."""
    only: tuple[str, ...] = ()
    """Studies to run, of those in study/grid.py or study/icon_grid.py; all of the data set by default."""
    dry_run: bool = False
    """Say what is left and how long it takes."""
    check: bool = False
    """Run one finished training again and compare."""
    seed: Annotated[int, OnlyWith("--check", lambda study: study.check)] = 0
    """Seed by which --check chooses it."""
    seconds: Annotated[
        float | None,
        PositiveOrInfinite,
        OnlyWith(
            "running trainings: leave out --dry-run and --check", lambda study: not (study.dry_run or study.check)
        ),
    ] = None
    """Stop after so many, keeping the state of the training under way."""
    kind: Annotated[DataName, tyro.conf.arg(name="data")] = "glyphs"
    """The pairs: characters of the shipped fonts, or icons, as in `prepare`."""

    large: Annotated[bool, OnlyWith("--data icons", lambda study: study.kind == "icons")] = False
    """The grid that is meant for a GPU: a larger model of pictures of 64 x 64, up to 10 million pairs seen."""

    @property
    def grid(self) -> Grid:
        """The grid that the options name."""
        return "icons-large" if self.large else self.kind

    @property
    def table(self) -> Path:
        """The table of results."""
        return RESULTS / TABLES[self.grid] if self.results is None else self.results

    def check_together(self) -> None:
        """Refuse options that contradict each other."""
        if self.dry_run and self.check:
            raise UserError("--dry-run and --check are two things: give one of them")
