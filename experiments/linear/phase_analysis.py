"""What the runs of `experiments.linear.phase` and `experiments.linear.towers` say, with intervals over seeds.

Of one seed, cells share their data as far as they can, so a bootstrap draws seeds, the same for all cells.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.clip.study.intervals import Interval, interval
from experiments.linear.bilinear import Model, pays_from, predicted
from experiments.linear.phase import FIELDS, METHODS, MODELS, Cell
from experiments.linear.towers import METHODS as TOWER_METHODS

Array = NDArray[np.float64]
Errors = dict[str, Array]  # method: an error a seed

DRAWS = 2000
#: What a user reads of the methods of the linear model.
NAMES = {
    "reference": "the reference itself",
    "twin": "no reference",
    "published": "steered, c = 1",
    "steered": "steered, best c",
    "selected": "selected by its score",
    "learnable": "selected by learnability",
    "both": "both",
}
#: Exponents of n and of eta that arXiv 2512.14230 proves; of a filter those where eta is large, and where it is small.
PUBLISHED = {"twin": (-0.5, -1.0), "selected": (-0.5, -0.5)}
SMALL_ETA = {"selected": (-0.5, 0.0)}


def load(path: Path) -> dict[Cell, Errors]:
    """Return the errors of each cell of the bilinear model."""
    return {Cell(*map(_number, key)): found for key, found in _load(path, FIELDS[:4], METHODS).items()}


def load_towers(path: Path) -> dict[tuple[int, float, int], Errors]:
    """Return the naming errors of towers by names, eta and the reference's pairs; nothing without the file."""
    if not path.is_file():
        return {}
    found = _load(path, ("names", "eta", "m"), TOWER_METHODS)
    return {(int(names), float(eta), int(m)): errors for (names, eta, m), errors in found.items()}


def _number(text: str) -> Any:
    return float(text) if "." in text else int(text)


def _load(path: Path, keys: Sequence[str], methods: Sequence[str]) -> dict[tuple[str, ...], Errors]:
    rows: dict[tuple[str, ...], list[list[float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(tuple(row[key] for key in keys), []).append([float(row[method]) for method in methods])
    return {key: dict(zip(methods, np.array(found).T, strict=True)) for key, found in rows.items()}


def strength(errors: Errors) -> float:
    """Return the reference's information over the twin's, ``(tan twin / tan reference)^2``, of mean errors."""
    sines = np.array([errors["twin"].mean(), errors["reference"].mean()])
    tangents = sines / np.sqrt(np.maximum(1 - sines**2, 1e-12))
    return float((tangents[0] / tangents[1]) ** 2)


def gain(errors: Errors, method: str = "published", twin: str = "twin") -> Interval:
    """Return ``log2`` of the twin's error over the method's: the mean over seeds and its interval."""
    return interval(np.log2(errors[twin] / errors[method]))


def verdict(of: Interval) -> int:
    """Return 1 where a gain is above 0 with its interval, -1 where it is below, and 0 where that is not sure."""
    return int(of.low > 0) - int(of.high < 0)


class Exponents(NamedTuple):
    """Exponents of n and of eta in the error, those of the predicted errors on the same cells, and how many cells."""

    n: Interval
    eta: Interval
    predicted: tuple[float, float] | None
    cells: int


def early(model: Model, cell: Cell) -> bool:
    """Return whether the twin is predicted to be within 30 degrees: where leading orders can be expected to lead."""
    return bool(predicted(model, cell.eta, cell.n, cell.m).twin < 0.5)


def noisy(model: Model, cell: Cell) -> bool:
    """Return whether the twin is predicted to be beyond 30 degrees, of pairs that are mismatched by 60 % or more."""
    return cell.eta <= 0.4 and not early(model, cell)


def exponents(
    measured: Mapping[Cell, Errors],
    method: str,
    signal: int,
    m: int,
    where: Callable[[Model, Cell], bool] = early,
) -> Exponents:
    """Fit ``log error = a + b log n + e log eta`` by least squares to mean errors; intervals are a bootstrap's."""
    model = MODELS[signal]
    cells = [cell for cell in measured if cell.signal == signal and cell.m == m and where(model, cell)]
    design = np.array([[1.0, np.log(cell.n), np.log(cell.eta)] for cell in cells])
    if len(cells) < 4 or np.linalg.matrix_rank(design) < 3:
        raise ValueError(f"where={where.__name__} leaves {len(cells)} cells of m={m}, too few to fit both exponents")
    errors = np.array([measured[cell][method] for cell in cells])  # [cells, seeds]
    solve = np.linalg.pinv(design)
    chosen = np.random.default_rng(0).integers(errors.shape[1], size=(DRAWS, errors.shape[1]))
    draws = np.log(errors[:, chosen].mean(2)).T @ solve.T  # [draws, 3]
    found = solve @ np.log(errors.mean(1))
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    n, eta = (Interval(float(found[i]), float(low[i]), float(high[i])) for i in (1, 2))
    theory = None
    if hasattr(predicted(model, 1, 1, 1), method):
        lines = [getattr(predicted(model, cell.eta, cell.n, cell.m), method) for cell in cells]
        slopes = solve @ np.log(lines)
        theory = float(slopes[1]), float(slopes[2])
    return Exponents(n, eta, theory, len(cells))


def exponent_table(measured: Mapping[Cell, Errors], signal: int, sizes: Sequence[int]) -> str:
    """Return exponents of n and eta beside the predicted and the published ones, as Markdown."""
    lines = [
        "| pairs | reference's pairs | method | of n | predicted | 2512.14230 | of eta | predicted | 2512.14230 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for title, where, published in (
        ("twin within 30 degrees", early, PUBLISHED),
        ("twin beyond 30 degrees, eta <= 0.4", noisy, SMALL_ETA),
    ):
        for m in sizes:
            for method in METHODS[1:]:
                if method == "twin" and m != sizes[0]:
                    continue
                found = exponents(measured, method, signal, m, where)
                theory = ["-", "-"] if found.predicted is None else [f"{value:.2f}" for value in found.predicted]
                proven = [f"{value:g}" for value in published[method]] if method in published else ["-", "-"]
                if published is PUBLISHED and method == "selected":
                    proven = [f"<= {value}" for value in proven]
                size = "-" if method == "twin" else f"{m:,}"
                cells = [f"{title}, {found.cells} cells", size, NAMES[method]]
                cells += [_short(found.n), theory[0], proven[0], _short(found.eta), theory[1], proven[1]]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: Interval) -> str:
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def agreement_table(measured: Mapping[Cell, Errors]) -> str:
    """Return how well the formulas hold: errors over predicted ones, and signs of the gain of steering, as Markdown."""
    lines = [
        "| signal directions | error over predicted, median (range): twin | reference | steered, c = 1 "
        "| steered, best c | sign of the gain of c = 1: formula right, of cells where it is sure |",
        "|---|---|---|---|---|---|",
    ]
    for signal, model in MODELS.items():
        cells = {cell: errors for cell, errors in measured.items() if cell.signal == signal}
        shown = []
        for method in ("twin", "reference", "published", "steered"):
            ratios = np.array(
                [
                    errors[method].mean() / getattr(predicted(model, cell.eta, cell.n, cell.m), method)
                    for cell, errors in cells.items()
                ]
            )
            shown.append(f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")
        right, sure = signs(cells)
        lines.append(f"| {signal} | {' | '.join(shown)} | {right} of {sure} |")
    return "\n".join(lines)


def signs(measured: Mapping[Cell, Errors]) -> tuple[int, int]:
    """Return in how many cells the formula has the sign of the gain of c = 1, of those in which it is sure."""
    right = sure = 0
    for cell, errors in measured.items():
        if found := verdict(gain(errors)):
            sure += 1
            right += found == (1 if strength(errors) > pays_from(cell.eta) else -1)
    return right, sure


def winners(measured: Mapping[Cell, Errors], methods: Sequence[str] = ("twin", "steered", "selected", "both")) -> str:
    """Return in which share of the cells each method has the least mean error, by noise share, as Markdown."""
    etas = sorted({cell.eta for cell in measured}, reverse=True)
    lines = ["| least mean error | " + " | ".join(f"noise {100 * (1 - eta):.0f} %" for eta in etas) + " |"]
    lines.append("|---" * (len(etas) + 1) + "|")
    best = {cell: min(methods, key=lambda method: found[method].mean()) for cell, found in measured.items()}
    for method in methods:
        shares = [[best[cell] == method for cell in measured if cell.eta == eta] for eta in etas]
        lines.append(f"| {NAMES[method]} | " + " | ".join(f"{sum(s)} of {len(s)}" for s in shares) + " |")
    return "\n".join(lines)


def tower_table(measured: Mapping[tuple[int, float, int], Errors]) -> str:
    """Return naming errors of linear towers, and the gain of steering over the twin, as Markdown."""
    columns = ("reference", "twin", "half", "published", "selected", "both")
    names = {**NAMES, "half": "steered, c = 0.5", "selected": "selected", "both": "both, c = 0.5"}
    lines = [
        "| names | noise | m | " + " | ".join(names[column] for column in columns) + " | steered less twin, c = 1 |"
    ]
    lines.append("|---" * (len(columns) + 4) + "|")
    for (own, eta, m), errors in measured.items():
        means = [f"{100 * errors[column].mean():.1f}" for column in columns]
        value = interval(100 * (errors["published"] - errors["twin"]))
        difference = f"{value.mean:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"
        lines.append(f"| {own or 'all differ'} | {100 * (1 - eta):.0f} % | {m} | {' | '.join(means)} | {difference} |")
    return "\n".join(lines)
