"""Draw the linear experiment's committed results: test loss against n, and what the reference does to the variance.

Reads ``results/linear.csv``, made by ``python experiments/linear/run.py``; writes ``linear_models.png`` and
``linear_variance.png``, and with ``--tables`` prints the tables of the experiment's page.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.linear.analysis import (
    Measured,
    bound_table,
    difference_table,
    interval,
    load,
    match_table,
    risk_table,
    variance_ratio,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "linear.csv"
STYLES = {
    "ERM": ("#666666", "o", "-"),
    "DRO chi-square": ("#CC79A7", "s", "-"),
    "fine-tuning": ("#E69F00", "D", "-"),
    "DRRho chi-square": ("#D55E00", "s", "-"),
    "DRRho KL": ("#0072B2", "^", "--"),
    "DRRho CVaR": ("#009E73", "v", "-"),
}
PAIRS = (
    ("DRRho chi-square", "ERM"),
    ("DRRho CVaR", "ERM"),
    ("DRRho chi-square", "DRO chi-square"),
    ("DRRho CVaR", "DRRho chi-square"),
    ("DRRho CVaR", "fine-tuning"),
    ("DRRho CVaR", "reference"),
)


def draw_risks(measured: Measured) -> Figure:
    """Return mean test losses against n with 95 % intervals, one panel a table."""
    figure = Figure(figsize=(12, 3.3), layout="constrained")
    axes = figure.subplots(1, len(measured))
    for axis, (name, sizes) in zip(axes, measured.items(), strict=True):
        numbers = list(sizes)
        reference = np.mean([sizes[n]["reference"]["risk"].mean() for n in numbers])
        axis.axhline(reference, color="k", linestyle=":", label="reference")
        for method, (color, marker, line) in STYLES.items():
            mean, low, high = np.array([interval(sizes[n][method]["risk"]) for n in numbers]).T
            axis.plot(numbers, mean, color=color, marker=marker, linestyle=line, markersize=4, label=method)
            axis.fill_between(numbers, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set_xscale("log")
        axis.set_xticks(numbers, [str(n) for n in numbers])
        axis.minorticks_off()
        axis.set(title=name, xlabel="training samples n")
    axes[0].set_ylabel("test loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def draw_variance(measured: Measured) -> Figure:
    """Return the ratio of variances against n, and bounds on the error beside the error."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ratios, bounds = figure.subplots(1, 2)
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for color, (name, sizes) in zip(colors, measured.items(), strict=True):
        numbers = list(sizes)
        for method, line in (("ERM", "--"), ("DRRho chi-square", "-")):
            mean, low, high = np.array([variance_ratio(sizes[n][method]) for n in numbers]).T
            label = name if line == "-" else None
            ratios.plot(numbers, mean, color=color, linestyle=line, marker="o", markersize=3, label=label)
            ratios.fill_between(numbers, low, high, color=color, alpha=0.2, linewidth=0)
        cells = [sizes[n]["DRRho chi-square"] for n in numbers]
        gain = [(cell["error"] - sizes[n]["reference"]["error"]).mean() for n, cell in zip(numbers, cells, strict=True)]
        bounds.plot(numbers, gain, color=color, marker="o", markersize=3)
        bounds.plot(numbers, [cell["bound"].mean() for cell in cells], color=color, marker="_", linestyle=":")
    ratios.axhline(1, color="k", linewidth=0.8)
    ratios.set(xscale="log", xlabel="training samples n", ylabel="Var(l - l_ref) / Var(l) on the test sample")
    ratios.legend(frameon=False, fontsize=8, title="DRRho (dashed: ERM)", title_fontsize=8)
    bounds.axhline(0, color="k", linewidth=0.8)
    bounds.set(xscale="log", xlabel="training samples n", ylabel="error of DRRho less the reference's")
    for axis in (ratios, bounds):
        axis.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
        axis.minorticks_off()
    bounds.set_title("mean (solid), 95 % bound from the test sample (dotted)", fontsize=9)
    return figure


def tables(measured: Measured) -> str:
    """Return the tables of the experiment's page."""
    return "\n\n".join(
        [
            risk_table(measured),
            match_table(measured),
            difference_table(measured, PAIRS),
            bound_table(measured, "DRRho chi-square"),
        ]
    )


if __name__ == "__main__":
    results = load(RESULTS)
    draw_risks(results).savefig(HERE / "linear_models.png", dpi=150)
    draw_variance(results).savefig(HERE / "linear_variance.png", dpi=150)
    if "--tables" in sys.argv[1:]:
        print(tables(results))
