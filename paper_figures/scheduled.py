"""Draw what steering by a constant and by the scheduled coefficient gains over the twin, by budget and reference."""

from __future__ import annotations

import sys
from itertools import product
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.clip.study.grid import BUDGETS, EPOCHS, PAIRS_SEEN, SCHEDULED
from experiments.clip.study.intervals import Interval, interval
from experiments.clip.study.settings import TWIN
from paper_figures.study_results import NAMES, REFERENCES, NotMeasured, Results, paired
from paper_figures.style import BLUE, GRAY, PAGE, VERMILION, not_measured, panel, program

STUDY = "scheduled"
METHODS = {SCHEDULED: BLUE, "drrho": VERMILION}
#: What a target may lose by a reference: its twin's accuracy but for so many points.
TOLERANCE = -0.5


class Gain(NamedTuple):
    """The difference of a method from its twin, in points, over seeds, and what the twin has."""

    gain: Interval
    twin: float
    seeds: int


def gain(results: Results, method: str, reference: str, epochs: int) -> Gain:
    """Return what a method gains over the twin of the same seeds; raise `NotMeasured` if that is not there."""
    setting = f"epochs={epochs}"
    steered = results.need(STUDY, method=method, reference=reference, setting=setting)
    ours, twin = paired(steered, results.need(STUDY, method=TWIN, setting=setting))
    return Gain(interval(ours - twin), float(twin.mean()), len(ours))


def gains(results: Results) -> dict[tuple[str, str, int], Gain]:
    """Return all gains that are measured, by method, reference and budget."""
    found = {}
    for method, reference, epochs in product(METHODS, REFERENCES, BUDGETS):
        try:
            found[method, reference, epochs] = gain(results, method, reference, epochs)
        except NotMeasured:
            continue
    return found


def draw_reference(axes: Axes, found: dict[tuple[str, str, int], Gain], reference: str) -> None:
    """Draw the gains under one reference against the pairs seen."""
    axes.axhline(0, color="k", linewidth=0.6)
    axes.axhline(TOLERANCE, color=GRAY, linewidth=0.6, linestyle=":")
    drawn = False
    for shift, (method, color) in zip((0.97, 1.03), METHODS.items(), strict=True):
        own = {
            epochs: found[method, reference, epochs].gain for epochs in BUDGETS if (method, reference, epochs) in found
        }
        if own:
            drawn = True
            pairs = np.array(list(own)) * PAIRS_SEEN / EPOCHS * shift
            means = np.array([each.mean for each in own.values()])
            errors = [[each.mean - each.low for each in own.values()], [each.high - each.mean for each in own.values()]]
            axes.errorbar(pairs, means, errors, fmt="o-", color=color, capsize=2, label=NAMES[method])
    if not drawn:
        not_measured(axes)
    axes.set(xscale="log", xlabel="pairs seen")
    ticks = [epochs * PAIRS_SEEN // EPOCHS for epochs in BUDGETS]
    axes.set_xticks(ticks, [f"{tick / 1000:.0f}k" for tick in ticks])
    axes.minorticks_off()


def draw(results: Results) -> Figure:
    """Return the figure: a panel for each reference, from the weakest."""
    found = gains(results)
    if not any(method == SCHEDULED for method, _, _ in found):
        raise NotMeasured(STUDY, "the scheduled coefficient")
    figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
    axes = figure.subplots(1, len(REFERENCES), sharey=True)
    for letter, (reference, title), one in zip("abc", REFERENCES.items(), axes, strict=True):
        draw_reference(one, found, reference)
        panel(one, letter, f"reference: {title}")
    axes[0].set_ylabel("points above the twin, test pairs")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    sys.exit(program("scheduled", draw))
