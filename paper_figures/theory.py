"""Draw the theory on losses of two classifiers: risk against rho, weights, the variance sandwich, bounds against n.

Reads ``results/theory.csv``: losses (nats) and errors of a target and of its reference, both softmax regressions on
scikit-learn's digits, the target fitted to 200, the reference to 750 others, on the 797 that neither has seen.
``python paper_figures/theory.py --losses`` makes it again.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from drrho import KL, ChiSquare, CVaR, constrained_risk, drrho_risk
from drrho.bounds import rho_scales, variance_sandwich
from drrho.efficiency import crossover_samples, duchi_namkoong_oracle, excess_over_best
from paper_figures.style import BLUE, GRAY, GREEN, HERE, ORANGE, PAGE, PURPLE, VERMILION, panel, save, styled

LOSSES = HERE / "results" / "theory.csv"
FIELDS = ("loss", "reference_loss", "error", "reference_error")
COLORS = {"KL": BLUE, "chi-square": VERMILION, "CVaR": GREEN}
RADIUS, TAIL = 0.3, 0.25  # of the weights that are drawn
CLASS = {"delta": 0.05, "models": 50}

Losses = dict[str, NDArray[Any]]


def load(path: Path = LOSSES) -> Losses:
    """Return the columns of the file."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in FIELDS}


def write_losses(path: Path) -> None:
    """Fit both classifiers and write their losses and errors on held-out digits."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    for_target, others = train_test_split(np.arange(len(digits)), train_size=200, stratify=digits, random_state=0)
    for_reference, held_out = train_test_split(others, train_size=800, stratify=digits[others], random_state=0)
    columns = []
    for rows in (for_target, for_reference[:750]):
        model = LogisticRegression(C=1.0, max_iter=2000).fit(pixels[rows] / 16, digits[rows])
        scores = model.predict_log_proba(pixels[held_out] / 16)
        columns.append((-scores[np.arange(len(held_out)), digits[held_out]], scores.argmax(1) != digits[held_out]))
    (loss, error), (reference_loss, reference_error) = columns
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for a, b, c, d in zip(loss, reference_loss, error, reference_error, strict=True):
            writer.writerow([f"{a:.8g}", f"{b:.8g}", int(c), int(d)])


def draw_risk(axes: Axes, losses: Losses) -> None:
    """Draw the DRRho risk against rho, between mean and maximum of the excess losses."""
    excess = losses["loss"] - losses["reference_loss"]
    n = len(excess)
    scales = rho_scales(excess, models=CLASS["models"], delta=CLASS["delta"])
    rhos = np.geomspace(1e-1, 2 * scales.rho_max, 60)
    for name, divergence in (("KL", KL()), ("chi-square", ChiSquare())):
        risks = [drrho_risk(losses["loss"], losses["reference_loss"], divergence, rho=rho).value.item() for rho in rhos]
        axes.plot(rhos, risks, color=COLORS[name], label=name)
    mean, top = excess.mean(), excess.max()
    axes.plot(rhos, mean + excess.std() * np.sqrt(2 * rhos / n), "k:", linewidth=0.9, label="mean + sd sqrt(2 rho / n)")
    for level, name in ((mean, "mean"), (top, "maximum")):
        axes.axhline(level, color=GRAY, linewidth=0.6)
        axes.annotate(name, (1.0, level), xycoords=("axes fraction", "data"), color=GRAY, ha="right", va="bottom")
    axes.axvline(scales.rho_pos, color=PURPLE, linewidth=0.8, linestyle="--")
    axes.annotate(" rho_pos", (scales.rho_pos, 0.85 * top), color=PURPLE)
    axes.set(xscale="log", xlabel="rho", ylabel="DRRho risk, nats", ylim=(mean - 0.2, top + 0.4))
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.62), frameon=True, framealpha=1, edgecolor="white")


def draw_weights(axes: Axes, losses: Losses) -> None:
    """Draw worst-case weights against the excess loss."""
    excess = losses["loss"] - losses["reference_loss"]
    order = excess.argsort()
    solved = {
        f"KL, radius {RADIUS:g}": constrained_risk(excess, KL(), RADIUS),
        f"chi-square, radius {RADIUS:g}": constrained_risk(excess, ChiSquare(), RADIUS),
        f"CVaR, worst {100 * TAIL:g} %": constrained_risk(excess, CVaR(TAIL)),
    }
    for name, risk in solved.items():
        weights = len(excess) * risk.weights.numpy()[order]
        axes.plot(excess[order], weights, ".", color=COLORS[name.split(",")[0]], markersize=2.5, label=name)
    axes.axhline(1, color=GRAY, linewidth=0.6)
    axes.set(xlabel="excess loss of a sample, nats", ylabel="weight x n")
    axes.legend(markerscale=2)


def draw_sandwich(axes: Axes, losses: Losses) -> None:
    """Draw the premium of the chi-square risk and its bounds, over sd sqrt(2 rho / n)."""
    excess = losses["loss"] - losses["reference_loss"]
    rhos = np.geomspace(1e-1, rho_scales(excess).rho_max, 60)
    found = [variance_sandwich(excess, rho=rho) for rho in rhos]
    scale = np.array([each.upper_duchi_namkoong for each in found])
    for name, color, line, label, place in (
        ("premium", VERMILION, "-", "premium F - mean", (0.38, 0.83)),
        ("upper", BLUE, "--", "min(T s, u)", (0.83, 0.95)),
        ("chord", GREEN, "-.", "chord", (0.55, 0.44)),
        ("lower", BLUE, ":", "min(T s, s²/d)", (0.6, 0.21)),
        ("lower_duchi_namkoong", GRAY, ":", "T s - 2 M rho / n,\nDuchi & Namkoong", (0.02, 0.84)),
    ):
        axes.plot(rhos, np.array([getattr(each, name) for each in found]) / scale, line, color=color, label=label)
        axes.annotate(label, place, xycoords="axes fraction", color=color, fontsize=6, va="center")
    axes.set(xscale="log", xlabel="rho", ylabel="over T s = sd sqrt(2 rho / n)", ylim=(-0.03, 1.08))


def bounds(losses: Losses, sizes: NDArray[Any]) -> dict[str, list[float]]:
    """Return bounds on the excess risk of a minimizer, of the error rate, by sample size."""
    sd, excess_sd = losses["error"].std(), (losses["error"] - losses["reference_error"]).std()
    given: dict[str, Any] = {"loss_range": 1.0, "estimated": True, **CLASS}
    return {
        "without reference": [
            float(excess_over_best(n=int(n), standard_deviation=sd, reference=False, **given)) for n in sizes
        ],
        "with reference": [
            float(excess_over_best(n=int(n), standard_deviation=excess_sd, reference=True, **given)) for n in sizes
        ],
    }


def draw_bounds(axes: Axes, losses: Losses) -> None:
    """Draw the bounds with and without reference, and where they cross."""
    sd, excess_sd = losses["error"].std(), (losses["error"] - losses["reference_error"]).std()
    sizes = np.unique(np.geomspace(100, 1e7, 40).astype(int))
    found = bounds(losses, sizes)
    for (name, row), (color, line) in zip(found.items(), ((ORANGE, "--"), (BLUE, "-")), strict=True):
        axes.plot(sizes, row, line, color=color, label=name)
    theirs = []
    for n in sizes:
        try:
            theirs.append(
                float(duchi_namkoong_oracle(n=int(n), value_range=2.0, standard_deviation=excess_sd, **CLASS))
            )
        except ValueError:
            theirs.append(np.nan)  # their theorem asks for more samples
    axes.plot(sizes, theirs, ":", color=GRAY, label="with reference, constants of\nDuchi & Namkoong")
    crossing = crossover_samples(loss_range=1.0, standard_deviation=sd, excess_standard_deviation=excess_sd, **CLASS)
    if np.isfinite(crossing.samples):
        (level,) = bounds(losses, np.array([crossing.samples]))["with reference"]
        axes.plot(crossing.samples, level, "o", color="k", label=f"cross at n = {crossing.samples:,}")
    axes.set(xscale="log", yscale="log", xlabel="n, samples", ylabel="bound on R - R*, error rate")
    axes.legend(fontsize=6)


def draw(losses: Losses) -> Figure:
    """Return the figure of four panels."""
    figure = Figure(figsize=(PAGE, 4.8), layout="constrained")
    parts = (
        (draw_risk, "risk against rho"),
        (draw_weights, "who gets the weight"),
        (draw_sandwich, "variance sandwich"),
        (draw_bounds, "bounds against n, 50 models, 95 %"),
    )
    for letter, axes, (part, title) in zip("abcd", figure.subplots(2, 2).flat, parts, strict=True):
        part(axes, losses)
        panel(axes, letter, title)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--losses", action="store_true", help="make the losses again first")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    options = parser.parse_args()
    if options.losses:
        write_losses(LOSSES)
    print(*save(styled(lambda: draw(load())), options.out, "theory"), sep="\n")
