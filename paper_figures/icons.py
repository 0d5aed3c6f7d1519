"""Draw the study on icons: methods at one budget, budgets, and references of three qualities."""

from __future__ import annotations

import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.clip.study.icon_grid import MAIN, MORE, PASSES, REFERENCES
from experiments.clip.study.intervals import interval
from experiments.clip.study.options import RESULTS
from experiments.clip.study.settings import TWIN
from paper_figures.study_results import NAMES, STEERED, NotMeasured, Results, values
from paper_figures.style import BLUE, GRAY, GREEN, HERE, ORANGE, PAGE, VERMILION, not_measured, panel, program

TABLE = HERE.parent / RESULTS / "icons.csv"
COLORS = dict(zip(MAIN, (ORANGE, VERMILION, BLUE, GREEN), strict=True))
_NATURAL = {"captions": "natural"}


def draw_methods(axes: Axes, results: Results) -> None:
    """Draw every method's accuracy at the budget of the headline."""
    rows = []
    for study, methods in (("icon-headline", MAIN), ("icon-headline-more", MORE)):
        for method in methods:
            if found := results.find(study, method=method, **_NATURAL):
                rows.append((method, interval(values(found))))
    if not rows:
        raise NotMeasured("icon-headline", "three seeds of a method on icons")
    rows.sort(key=lambda row: row[1].mean)
    for place, (method, found) in enumerate(rows):
        color = BLUE if method in STEERED else GRAY
        axes.errorbar(
            found.mean, place, xerr=[[found.mean - found.low], [found.high - found.mean]], fmt="o", color=color
        )
    axes.set_yticks(range(len(rows)), [NAMES[method] for method, _ in rows])
    axes.set(xlabel="naming top-1 of test icons, %", ylim=(-0.6, len(rows) - 0.4))


def draw_budgets(axes: Axes, results: Results) -> None:
    """Draw the main methods' accuracy against the pairs seen."""
    drawn = False
    for method in MAIN:
        points = []
        for passes in PASSES:
            study = "icon-headline" if passes == PASSES[0] else "icon-budgets"
            found = results.find(study, method=method, setting=f"passes={passes}", **_NATURAL)
            if found:
                seen = float(next(iter(found.values()))["samples_trained"])
                points.append((seen, interval(values(found))))
        if len(points) > 1:
            drawn = True
            seen, means = [each for each, _ in points], [each.mean for _, each in points]
            errors = [[each.mean - each.low for _, each in points], [each.high - each.mean for _, each in points]]
            axes.errorbar(seen, means, errors, fmt="o-", color=COLORS[method], capsize=2, label=NAMES[method])
    if drawn:
        axes.set(xscale="log", xlabel="pairs seen", ylabel="naming top-1, %")
        axes.legend(loc="upper left")
    else:
        not_measured(axes)


def draw_references(axes: Axes, results: Results) -> None:
    """Draw the steered methods' accuracy against that of their reference, and the twin's as a line."""
    drawn = False
    for method in MAIN:
        points = []
        for reference in REFERENCES:
            study = "icon-headline" if reference == "icons-strong" else "icon-reference-quality"
            found = results.find(study, method=method, reference=reference, setting=f"passes={PASSES[0]}", **_NATURAL)
            if found:
                own = 100 * float(results.one("icon-references", setting=reference)["test_top1"])
                points.append((own, interval(values(found))))
        if method == TWIN:
            if found := results.find("icon-headline", method=TWIN, **_NATURAL):
                axes.axhline(values(found).mean(), color=COLORS[TWIN], linestyle=":", label=NAMES[TWIN])
        elif len(points) > 1:
            drawn = True
            means = np.array([each.mean for _, each in points])
            errors = [[each.mean - each.low for _, each in points], [each.high - each.mean for _, each in points]]
            axes.errorbar(
                [own for own, _ in points],
                means,
                errors,
                fmt="o-",
                color=COLORS[method],
                capsize=2,
                label=NAMES[method],
            )
    if drawn:
        axes.set(xlabel="the reference's own top-1, %", ylabel="the target's, %")
    else:
        not_measured(axes)


def draw(results: Results) -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(PAGE, 2.5), layout="constrained")
    axes = figure.subplots(1, 3)
    parts = ((draw_methods, "methods"), (draw_budgets, "budgets"), (draw_references, "references"))
    for letter, (part, title), one in zip("abc", parts, axes, strict=True):
        part(one, results)
        panel(one, letter, title)
    return figure


if __name__ == "__main__":
    sys.exit(program("icons", draw, TABLE))
