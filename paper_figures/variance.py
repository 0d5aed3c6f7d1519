"""Draw Var(l) and Var(l - l_ref) over the negatives along training, image and text sides, for each reference."""

import sys

from matplotlib.figure import Figure

from paper_figures.claims import variance_ratio
from paper_figures.study_results import REFERENCES, NotMeasured, Results
from paper_figures.style import BLUE, PAGE, VERMILION, not_measured, panel, program

CAPTIONS = "clean"
LINES = {"losses": ("Var(l)", VERMILION, "o"), "excess": ("Var(l - l_ref)", BLUE, "^")}


def draw(results: Results) -> Figure:
    """Return the figure: a column for each reference, a row for each side."""
    figure = Figure(figsize=(PAGE, 3.8), layout="constrained")
    axes = figure.subplots(2, len(REFERENCES), sharex=True, sharey=True)
    letters, missing = iter("abcdef"), []
    for row, side in enumerate(("image", "text")):
        for column, (reference, title) in enumerate(REFERENCES.items()):
            axis = axes[row, column]
            panel(axis, next(letters), f"{side} side, {title}")
            try:
                trainings = results.steered(reference, CAPTIONS)
            except NotMeasured as error:
                missing.append(error)
                not_measured(axis)
                continue
            for name, (label, color, marker) in LINES.items():
                (curve,) = results.curve(trainings, f"variance_of_{name}/{side}")
                thousands = curve.samples / 1000
                axis.plot(thousands, curve.mean, color=color, marker=marker, label=label)
                axis.fill_between(thousands, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
            mean, low, high = variance_ratio(trainings, side)
            axis.text(0.97, 0.05, f"ratio {mean:.2f} [{low:.2f}, {high:.2f}]", transform=axis.transAxes, ha="right")
    if len(missing) == axes.size:
        raise missing[0]
    for axis in axes[-1]:
        axis.set_xlabel("pairs seen, thousands")
    axes[0, 0].set_ylim(0, None)
    figure.supylabel("variance over negatives (cosine similarity squared)", fontsize=7.5)
    drawn = next(axis for axis in axes.flat if axis.lines)
    figure.legend(*drawn.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


if __name__ == "__main__":
    sys.exit(program("variance", draw))
