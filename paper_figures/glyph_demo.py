"""Draw the demo's committed result: naming accuracy along training, and at the end beside the reference.

Reads ``results/glyph_demo.json``, the ``results.json`` of one ``make demo``; writes ``glyph_demo.png``.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from experiments.clip.glyphs.report import COLORS, DemoResult, draw_accuracy, rows

HERE = Path(__file__).parent
MEASURES = ("naming top-1", "naming top-5", "script (balanced)", "base letter (balanced)", "image to text R@1")


def draw() -> Figure:
    """Return the figure: learning curves on the left, test scores on the right."""
    result = DemoResult(**json.loads((HERE / "results" / "glyph_demo.json").read_text()))
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 3))
    draw_accuracy(curves, result)
    names = ("unsteered", "steered", "reference")
    for position, name in enumerate(names):
        shown = rows(result.scores[name])
        places = [number + 0.26 * (position - 1) for number in range(len(MEASURES))]
        heights = [100 * shown[measure] for measure in MEASURES]
        drawn = bars.bar(places, heights, width=0.24, color=COLORS[name], label=name)
        bars.bar_label(drawn, fmt="%.0f", fontsize=7)
    bars.set_xticks(
        range(len(MEASURES)), [measure.replace(" (", "\n(").replace("text R", "text\nR") for measure in MEASURES]
    )
    bars.tick_params(axis="x", labelsize=8)
    bars.set(ylabel="held-out test pairs, %", ylim=(0, 105))
    bars.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "glyph_demo.png", dpi=150)
