"""Draw where steering pays: in the bilinear model, with its formulas, and in the study's trainings of CLIP.

Reads ``results/phase.csv`` and ``results/phase_towers.csv``, made by ``python experiments/linear/phase.py`` and
``python experiments/linear/towers.py``, and the study's table; writes ``phase_diagram`` (one column) and
``phase_errors`` (a page). With ``--tables`` it prints the tables of the experiment's page.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.clip.study.intervals import interval
from experiments.linear.bilinear import beats_selection_from, pays_from, predicted
from experiments.linear.phase import ETAS, MODELS, REFERENCE_SIZES, SIZES, Cell
from experiments.linear.phase_analysis import (
    NAMES,
    Errors,
    agreement_table,
    exponent_table,
    gain,
    load,
    load_towers,
    strength,
    tower_table,
    verdict,
    winners,
)
from paper_figures.phase_points import NOISE, Point, point_table, points, selection_table
from paper_figures.study_results import FOLDER, Results
from paper_figures.style import (
    BLUE,
    COLUMN,
    GRAY,
    GREEN,
    ORANGE,
    PAGE,
    PURPLE,
    SKY,
    VERMILION,
    command,
    not_measured,
    panel,
    save,
    styled,
)

LINEAR, TOWERS = FOLDER / "phase.csv", FOLDER / "phase_towers.csv"
SHOWN = 16  # signal directions of the model that is drawn
COLORS = {1: BLUE, 0: "white", -1: VERMILION}
CAPTIONS = {"clean": "o", "swapped": "D"}
VERDICTS = {1: "steering pays", 0: "not sure", -1: "steering costs"}
STYLES = {
    "reference": ("k", "", ":"),
    "twin": (VERMILION, "o", "-"),
    "published": (SKY, "^", "-"),
    "steered": (BLUE, "v", "-"),
    "selected": (ORANGE, "s", "-"),
    "learnable": (PURPLE, "D", "-"),
    "both": (GREEN, "P", "-"),
}


def _dot(axes: Axes, x: float, y: float, sign: int, marker: str, size: float) -> None:
    axes.scatter(x, y, s=size, c=COLORS[sign], marker=marker, edgecolors="k", linewidths=0.4, zorder=3)


def draw_model(axes: Axes, measured: Mapping[Cell, Errors]) -> None:
    """Draw each cell at its noise and the reference's information over the twin's, and the formulas' borders."""
    for cell, errors in measured.items():
        if cell.signal == SHOWN:
            shift = 0.012 * (np.log(cell.n / SIZES[0]) / np.log(3) - 1.5)  # cells of equal m / n would hide each other
            steering_wins = errors["steered"].mean() <= errors["selected"].mean()
            _dot(axes, 1 - cell.eta + shift, strength(errors), verdict(gain(errors)), "^" if steering_wins else "s", 17)
    eta = np.linspace(0.06, 1, 200)
    axes.plot(1 - eta, pays_from(eta), color="k")
    axes.plot(1 - eta[:-1], beats_selection_from(eta[:-1]), color="k", linestyle="--")
    axes.set(yscale="log", ylim=(6e-3, 2e3), xlim=(-0.05, 0.95), ylabel="reference / twin, information")


def draw_points(axes: Axes, found: list[Point]) -> None:
    """Draw what steering added to the accuracy in each of the study's cells against the reference's over the twin's."""
    axes.axhline(0, color=GRAY, linewidth=0.6)
    axes.axvline(1, color=GRAY, linewidth=0.6, linestyle=":")
    for point in found:
        mean, low, high = point.gain
        axes.plot([point.strength] * 2, [low, high], color=GRAY, linewidth=0.8, zorder=2)
        _dot(axes, point.strength, mean, verdict(point.gain), CAPTIONS[point.captions], 17)
    axes.set(xscale="log", xlabel="reference's accuracy / twin's", ylabel="steered - twin, points")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()


def draw_diagram(measured: Mapping[Cell, Errors], found: list[Point]) -> Figure:
    """Return the picture for a user: where to steer, by noise and by how good the reference is beside the twin."""
    figure = Figure(figsize=(COLUMN, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1.2, 1))
    draw_model(above, measured)
    draw_points(below, found)
    panel(above, "a", "bilinear model, c = 1, each cell")
    panel(below, "b", "CLIP on glyphs, each cell of the study")
    above.set_xlabel("share of mismatched pairs")
    style = {"linestyle": "", "markeredgecolor": "k", "markeredgewidth": 0.4, "markersize": 4.2}
    handles = [
        *(Line2D([], [], marker="o", color=COLORS[sign], label=label, **style) for sign, label in VERDICTS.items()),
        Line2D([], [], color="k", label="a: c = 1 pays above it"),
        Line2D([], [], color="k", linestyle="--", label="a: a filter is better below it"),
        Line2D([], [], marker="^", color=GRAY, label="a: best c beats selection", **style),
        Line2D([], [], marker="s", color=GRAY, label="a: selection beats best c", **style),
        *(
            Line2D(
                [], [], marker=marker, color=GRAY, label=f"b: {captions}, {100 * NOISE[captions]:.0f} % noise", **style
            )
            for captions, marker in CAPTIONS.items()
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, handletextpad=0.2, columnspacing=1.0)
    return figure


def _lines(axes: Axes, measured: Mapping[Cell, Errors], cells: list[Cell], numbers: np.ndarray) -> None:
    """Draw every method's mean errors with intervals against ``numbers``, and what is predicted, dashed."""
    lines = {cell: predicted(MODELS[SHOWN], cell.eta, cell.n, cell.m) for cell in cells}
    for method, (color, marker, line) in STYLES.items():
        found = np.array([interval(measured[cell][method]) for cell in cells])
        axes.plot(numbers, found[:, 0], color=color, marker=marker, linestyle=line, label=NAMES[method])
        axes.fill_between(numbers, found[:, 1], found[:, 2], color=color, alpha=0.2, linewidth=0)
        if method in ("twin", "steered"):
            theory = [float(getattr(lines[cell], method)) for cell in cells]
            axes.plot(numbers, theory, color=color, linestyle="--", linewidth=0.8)
    axes.set(yscale="log")
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    axes.minorticks_off()


def draw_towers(axes: Axes, measured: Mapping[tuple[int, float, int], Errors]) -> None:
    """Draw naming errors of linear towers of unit norm against noise, with the reference of middle strength."""
    axes.set(ylim=(0, 100), xlabel="mismatched share", ylabel="naming error, %")
    if not measured:
        return not_measured(axes)
    sizes = sorted({m for _, _, m in measured})
    m = sizes[len(sizes) // 2]
    etas = sorted({eta for _, eta, _ in measured}, reverse=True)
    for method in ("reference", "twin", "published", "selected", "both"):
        color, marker, line = STYLES[method]
        mean, low, high = 100 * np.array([interval(measured[0, eta, m][method]) for eta in etas]).T
        axes.plot(1 - np.array(etas), mean, color=color, marker=marker, linestyle=line)
        axes.fill_between(1 - np.array(etas), low, high, color=color, alpha=0.2, linewidth=0)


def draw_errors(measured: Mapping[Cell, Errors], towers: Mapping[tuple[int, float, int], Errors]) -> Figure:
    """Return errors against noise, n and m in the bilinear model, and against noise of linear towers."""
    figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
    noise, pairs, quality, trained = figure.subplots(1, 4)
    n, m, eta = SIZES[-2], REFERENCE_SIZES[1], 0.4
    _lines(noise, measured, [Cell(SHOWN, own, n, m) for own in ETAS], 1 - np.array(ETAS))
    _lines(pairs, measured, [Cell(SHOWN, eta, own, m) for own in SIZES], np.array(SIZES))
    _lines(quality, measured, [Cell(SHOWN, eta, n, own) for own in REFERENCE_SIZES], np.array(REFERENCE_SIZES))
    panel(noise, "a", f"n = {n}, m = {m}")
    panel(pairs, "b", f"noise {100 * (1 - eta):.0f} %, m = {m}")
    panel(quality, "c", f"noise {100 * (1 - eta):.0f} %, n = {n}")
    panel(trained, "d", "unit-norm towers")
    noise.set(xlabel="mismatched share", ylabel="error: sine of the angle to W*")
    for axes, label in ((pairs, "pairs n"), (quality, "the reference's pairs m")):
        axes.set(xscale="log", xlabel=label)
        axes.set_xticks([300, 1000, 3000, 10000], ["300", "1k", "3k", "10k"])
        axes.minorticks_off()
    draw_towers(trained, towers)
    figure.legend(*noise.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def tables(results: Results) -> str:
    """Return the tables of the experiment's page."""
    measured = load(LINEAR)
    return "\n\n".join(
        [
            agreement_table(measured),
            exponent_table(measured, SHOWN, (REFERENCE_SIZES[0], REFERENCE_SIZES[-1])),
            winners(measured),
            tower_table(load_towers(TOWERS)),
            selection_table(results.path),
            point_table(points(results.path)),
        ]
    )


def write(results: Results, folder: Path) -> list[Path]:
    """Write both figures."""
    measured, found = load(LINEAR), points(results.path)
    diagram = styled(lambda: draw_diagram(measured, found))
    errors = styled(lambda: draw_errors(measured, load_towers(TOWERS)))
    return save(diagram, folder, "phase_diagram") + save(errors, folder, "phase_errors")


if __name__ == "__main__":
    if "--tables" in sys.argv[1:]:
        print(tables(Results()))
    else:
        sys.exit(command("phase_diagram", write))
