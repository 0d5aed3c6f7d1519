"""Draw naming accuracy by method on the three kinds of training captions, with intervals over seeds."""

import sys
from collections.abc import Sequence
from contextlib import suppress

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.clip.study.grid import CAPTIONS, SELECTING
from experiments.clip.study.intervals import interval
from paper_figures.study_results import NAMES, OURS, UNSTEERED, NotMeasured, Results, values
from paper_figures.style import BLUE, GRAY, GREEN, ORANGE, PAGE, SKY, VERMILION, panel, program

KINDS = {
    "without reference": (VERMILION, "o", UNSTEERED),
    "selection by the reference": (ORANGE, "s", ("jest", "jest-top-k", "rho-top-k")),
    "distillation": (GREEN, "D", ("distillation",)),
    "steered, as published": (BLUE, "^", ("drrho", "drrho-distillation")),
    "steered, variants": (
        SKY,
        "v",
        tuple(method for method in OURS if method != "drrho-distillation"),
    ),
}
TITLES = {
    "clean": "clean captions",
    "vague": "vague: half of the words",
    "swapped": "swapped: 40 % exchanged",
}


def _draw_scored(axis: Axes, results: Results, captions: str, order: Sequence[str]) -> None:
    """Draw selections that score as many pairs as the others train on, open, in the lines of their methods."""
    for method in SELECTING:
        with suppress(NotMeasured):
            mean, low, high = interval(values(results.scored(method, captions)))
            error = [[mean - low], [high - mean]]
            label = "the same, as many pairs scored" if captions == CAPTIONS[0] and method == SELECTING[0] else None
            color, marker = next((color, marker) for color, marker, methods in KINDS.values() if method in methods)
            style = {"color": color, "marker": marker, "markerfacecolor": "white", "linestyle": ""}
            axis.errorbar(mean, order.index(method), xerr=error, capsize=2, label=label, **style)


def draw(results: Results) -> Figure:
    """Return the figure: a panel for each kind of captions, a line for each method."""
    figure = Figure(figsize=(PAGE, 3.6), layout="constrained")
    axes = figure.subplots(1, len(CAPTIONS), sharey=True)
    order = [(kind, method) for kind, (_, _, methods) in KINDS.items() for method in methods]
    drawn, missing = set(), None
    for letter, captions, axis in zip("abc", CAPTIONS, axes, strict=True):
        for place, (kind, method) in enumerate(order):
            color, marker, _ = KINDS[kind]
            try:
                mean, low, high = interval(values(results.method(method, captions)))
            except NotMeasured as error:
                missing = missing or error
                axis.text(
                    0.04,
                    place,
                    "not measured yet",
                    transform=axis.get_yaxis_transform(),
                    color=GRAY,
                    va="center",
                    size=6,
                )
                continue
            label = None if kind in drawn or letter != "a" else kind
            drawn.add(kind)
            error = [[mean - low], [high - mean]]
            axis.errorbar(mean, place, xerr=error, color=color, marker=marker, capsize=2, linestyle="", label=label)
        _draw_scored(axis, results, captions, [method for _, method in order])
        panel(axis, letter, TITLES[captions])
        axis.set_xlim(0, None)
        axis.grid(axis="x", linewidth=0.3, color="#DDDDDD")
        axis.set_axisbelow(True)
    if not drawn and missing:
        raise missing
    axes[0].set_yticks(range(len(order)), [NAMES[method] for _, method in order])
    axes[0].set_ylim(len(order) - 0.5, -0.5)
    figure.supxlabel("test pairs named right, top-1, % (mean and 95 % interval over seeds)", fontsize=7.5)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


if __name__ == "__main__":
    sys.exit(program("captions", draw))
