"""Draw figure 3: learning curves on all and on half of the data, and scores against the share of the data."""

import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.clip.study.grid import WITH_DISTILLATION
from experiments.clip.study.intervals import interval
from experiments.clip.study.settings import TWIN
from experiments.clip.study.statistics import data_saved
from paper_figures.claims import shares
from paper_figures.study_results import ALL_FRACTIONS, NAMES, NotMeasured, Results, values
from paper_figures.style import BLUE, PAGE, SKY, VERMILION, not_measured, panel, program

COLORS = {TWIN: VERMILION, "drrho": BLUE, WITH_DISTILLATION: SKY}
MARKERS = {TWIN: "o", "drrho": "^", WITH_DISTILLATION: "v"}
SHARES = {1.0: "-", 0.5: "--"}
CAPTIONS = ("clean", "swapped")
PLACES = ("outside upper center", "outside lower center")


def draw_curves(axes: Axes, results: Results, captions: str) -> None:
    """Draw validations along training, of twin and steered model, on all and on half of the data."""
    for method in (TWIN, "drrho"):
        for fraction, line in SHARES.items():
            trainings = results.share(method, captions, fraction)
            (curve,) = results.curve(trainings, "validation_top1", percent=True)
            thousands = curve.samples / 1000
            label = f"{NAMES[method]}, {100 * fraction:g} %"
            axes.plot(thousands, curve.mean, line, marker=MARKERS[method], color=COLORS[method], label=label)
            axes.fill_between(thousands, curve.low, curve.high, color=COLORS[method], alpha=0.15, linewidth=0)
    axes.set(xlabel="pairs seen, thousands", ylabel="validation top-1, %", ylim=(0, None))


def draw_shares(axes: Axes, results: Results, captions: str) -> None:
    """Draw test scores against the share of the data, and where the steered one meets the twin's 100 %."""
    for method, color in COLORS.items():
        scores = [interval(values(results.share(method, captions, fraction))) for fraction in ALL_FRACTIONS]
        mean, low, high = np.array(scores).T
        error = [mean - low, high - mean]
        axes.errorbar(ALL_FRACTIONS, mean, error, color=color, marker=MARKERS[method], capsize=2, label=NAMES[method])
    fractions, steered, level = shares(results, "drrho", captions)
    saved = data_saved(fractions, steered, level)
    axes.axhline(level.mean(), color=VERMILION, linewidth=0.7, linestyle=":")
    if np.isfinite(saved.fraction.mean):
        high = min(saved.fraction.high, fractions[-1])
        axes.axvspan(saved.fraction.low, high, color=BLUE, alpha=0.12, linewidth=0)
        axes.axvline(saved.fraction.mean, color=BLUE, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(ALL_FRACTIONS, [f"{100 * fraction:g}" for fraction in ALL_FRACTIONS])
    axes.minorticks_off()
    axes.set(xlabel="share of the data, % (equally many pairs seen)", ylabel="test top-1, %", ylim=(0, None))


def draw(results: Results) -> Figure:
    """Return the figure: curves above, shares below, clean captions on the left, swapped ones on the right."""
    figure = Figure(figsize=(PAGE, 4.6), layout="constrained")
    axes = figure.subplots(2, 2)
    missing, drawn = [], 0
    for column, captions in enumerate(CAPTIONS):
        for row, (part, letters, what) in enumerate(
            ((draw_curves, "ab", "along training"), (draw_shares, "cd", "at the end"))
        ):
            axis = axes[row, column]
            try:
                part(axis, results, captions)
                drawn += 1
            except NotMeasured as error:
                missing.append(error)
                axis.clear()  # of what was drawn before the missing part
                axis.set(xticks=(), yticks=())
                not_measured(axis)
            panel(axis, letters[column], f"{captions} captions, {what}")
    if not drawn:
        raise missing[0]
    for row, place in zip(axes, PLACES, strict=True):
        handles = max((axis.get_legend_handles_labels() for axis in row), key=lambda found: len(found[0]))
        figure.legend(*handles, loc=place, ncols=len(handles[0]) or 1)
    return figure


if __name__ == "__main__":
    sys.exit(program("data_efficiency", draw))
