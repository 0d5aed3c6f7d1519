"""Draw figure 2: error against operations of training, with power laws by both rules; the published ones beside it."""

import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.clip.study.grid import WITH_DISTILLATION
from experiments.clip.study.settings import TWIN
from experiments.clip.study.statistics import PowerLaw, Rule
from paper_figures.study_results import NAMES, NotMeasured, Results, published
from paper_figures.style import BLUE, ORANGE, PAGE, SKY, VERMILION, panel, program

METHODS = {"openclip": VERMILION, TWIN: ORANGE, "drrho": BLUE, WITH_DISTILLATION: SKY}
LINES: dict[Rule, str] = {"best-of-bins": "-", "all": ":"}
MARKERS = {"glyph-micro": "v", "glyph-tiny": "o", "glyph-small": "s"}


def fits(results: Results) -> dict[str, dict[Rule, PowerLaw]]:
    """Return the power laws of each method that has been measured, by both rules."""
    compute, errors, _ = results.scaling(measured(results))
    return {name: {rule: results.power_law(compute[name], errors[name], rule) for rule in LINES} for name in compute}


def measured(results: Results) -> list[str]:
    """Return the methods that have levels beside OpenCLIP's."""
    found = ["openclip"]
    for name in METHODS:
        try:
            if name != "openclip":
                results.scaling(("openclip", name))
                found.append(name)
        except NotMeasured:
            continue
    return found


def draw_ours(axes: Axes, results: Results) -> None:
    """Draw every configuration's mean error, and both lines of each method with the band of the first."""
    compute, errors, levels = results.scaling(measured(results))
    for name, rules in fits(results).items():
        for (model, _), operations, error in zip(levels, compute[name], errors[name].mean(1), strict=True):
            axes.plot(operations, error, MARKERS[model], color=METHODS[name], markersize=3, alpha=0.7)
        grid = np.geomspace(compute[name].min(), compute[name].max(), 50)
        for rule, law in rules.items():
            line, low, high = law.at(grid)
            exponent = law.exponent
            label = f"{NAMES[name]}: {exponent.mean:.3f} [{exponent.low:.3f}, {exponent.high:.3f}]"
            axes.plot(grid, line, LINES[rule], color=METHODS[name], label=label)
            if rule == "best-of-bins":
                axes.fill_between(grid, low, high, color=METHODS[name], alpha=0.18, linewidth=0)
    for model in dict.fromkeys(model for model, _ in levels):
        axes.plot([], [], MARKERS[model], color="k", markersize=3, label=f"target {model}")
    axes.set(xlabel="operations of training, GFLOP", ylabel="error of naming, test pairs (fraction)")


def draw_published(axes: Axes) -> None:
    """Draw the published lines over the range of the published runs."""
    law = published()["scaling_law"]
    sizes, samples = law["gflops_per_sample"].values(), law["samples_seen"]
    grid = np.geomspace(min(sizes) * min(samples), max(sizes) * max(samples), 50)
    for name, key in (("openclip", "openclip"), ("drrho", "drrho_clip")):
        b, a = law[key]["coefficient"], law[key]["exponent"]
        axes.plot(grid, b * grid**a, color=METHODS[name], label=f"{NAMES[name]}: {b} $C^{{{a}}}$")
    axes.set(xlabel="C, GFLOP per sample x samples seen", ylabel="ImageNet top-1 error (fraction)")
    axes.legend(fontsize=6.5, title="no intervals published", title_fontsize=6.5, loc="upper right")


def draw(results: Results) -> Figure:
    """Return the figure: ours on the left, the published fits on the right."""
    figure = Figure(figsize=(PAGE, 3.5), layout="constrained")
    ours, theirs = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_ours(ours, results)
    draw_published(theirs)
    for axes, letter, title in ((ours, "a", "ours"), (theirs, "b", "published")):
        panel(axes, letter, title)
        axes.set(xscale="log", yscale="log")
        low, high = axes.get_ylim()
        ticks = [tick for tick in MaxNLocator(7).tick_values(low, high) if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    figure.legend(
        *ours.get_legend_handles_labels(),
        title="(a) exponent with 95 % interval, from the best of five bins (solid, band) and from all points (dotted)",
        loc="outside lower left",
        ncols=3,
        fontsize=6,
        title_fontsize=6.5,
    )
    return figure


if __name__ == "__main__":
    sys.exit(program("scaling", draw))
