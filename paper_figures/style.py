"""What all figures share: sizes of a paper's columns, colors, files that are the same each time, the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures.study_results import RESULTS, NotMeasured, Results

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # older matplotlib has no such name

HERE = Path(__file__).parent
COLUMN, PAGE = 3.4, 7.0  # inches

# Okabe & Ito's colors, told apart with any color vision.
BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILION, PURPLE, GRAY = "#E69F00", "#D55E00", "#CC79A7", "#777777"

_FONTS: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
}


def styled(draw: Callable[[], Figure]) -> Figure:
    """Return a figure that is drawn with the shared fonts and lines."""
    with matplotlib.rc_context(_FONTS):
        return draw()


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and PDF, without what differs between two times or programs."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.png", folder / f"{name}.pdf"]
    with matplotlib.rc_context(_FONTS):
        figure.savefig(written[0], dpi=200, metadata={"Software": None})
        figure.savefig(written[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return written


def panel(axes: Axes, letter: str, title: str) -> None:
    """Name a panel, on the left above it."""
    axes.set_title(f"({letter}) {title}", loc="left")


def not_measured(axes: Axes, what: str = "not measured yet") -> None:
    """Say in an empty panel that its results are not there."""
    axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color=GRAY)


def program(name: str, draw: Callable[[Results], Figure], table: Path = RESULTS) -> int:
    """Run a script that draws one figure of a study; return its exit status."""

    def write(results: Results, folder: Path) -> list[Path]:
        return save(styled(lambda: draw(results)), folder, name)

    return command(name, write, table)


def command(name: str, write: Callable[[Results, Path], list[Path]], table: Path = RESULTS) -> int:
    """Run a script that writes files from a study's results; return its exit status.

    It is 3 where nothing of it is measured yet, and nothing is written.
    """
    parser = argparse.ArgumentParser(prog=f"paper_figures/{name}.py")
    parser.add_argument("--results", type=Path, default=table, help="the study's table, its curves beside it")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    options = parser.parse_args()
    try:
        written = write(Results(options.results), options.out)
    except NotMeasured as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 3
    print(*written, sep="\n")
    return 0
