"""What the runs of the linear experiment say, with intervals over repetitions.

A repetition is one split of a table; splits of one table share samples, so that intervals are about the table at hand,
not about other tables like it.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.clip.study.intervals import Interval, crossing, interval

Array = NDArray[Any]
Measured = dict[str, dict[int, dict[str, dict[str, Array]]]]  # table, n, method, measure: one number a repetition

MEASURES = ("risk", "error", "variance", "excess_variance", "bound")


def load(path: Path) -> Measured:
    """Read the results, in the order of the repetitions."""
    cells: dict[tuple[str, int, str], list[list[float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            cell = cells.setdefault((row["table"], int(row["n"]), row["method"]), [])
            cell.append([float(row[measure]) for measure in MEASURES])
    measured: Measured = {}
    for (table, n, method), rows in cells.items():
        columns: dict[str, Array] = dict(zip(MEASURES, np.ascontiguousarray(np.array(rows).T), strict=True))
        measured.setdefault(table, {}).setdefault(n, {})[method] = columns
    return measured


def variance_ratio(cell: dict[str, Array]) -> Interval:
    """Return Var(l - l_ref) / Var(l) on test samples: geometric mean over repetitions, and its interval."""
    return Interval(*np.exp(interval(np.log(cell["excess_variance"] / cell["variance"]))))


def samples_to_match(sizes: dict[int, dict[str, dict[str, Array]]], method: str, draws: int = 2000) -> Interval | None:
    """Return the n at which a method's mean test loss meets the reference's, by interpolation in log n.

    The interval is that of a bootstrap over repetitions. None where the largest n does not suffice; where the smallest
    does already, that is the answer.
    """
    numbers = np.array(sorted(sizes))
    beyond = np.stack(
        [sizes[n][method]["risk"] - sizes[n]["reference"]["risk"] for n in numbers]
    )  # [sizes, repetitions]
    found = crossing(numbers, beyond.mean(1))
    if found is None:
        return None
    rng = np.random.default_rng(0)
    chosen = rng.integers(beyond.shape[1], size=(draws, beyond.shape[1]))
    crossings = [crossing(numbers, beyond[:, again].mean(1)) for again in chosen]
    low, high = np.quantile([np.inf if n is None else n for n in crossings], [0.025, 0.975], method="inverted_cdf")
    return Interval(found, float(low), float(high))


def risk_table(measured: Measured) -> str:
    """Return mean test losses as Markdown."""
    methods = list(next(iter(next(iter(measured.values())).values())))
    lines = ["| table | n | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for name, sizes in measured.items():
        for n, cells in sizes.items():
            best = min(cells[method]["risk"].mean() for method in methods if method != "reference")
            shown = []
            for method in methods:
                value = interval(cells[method]["risk"])
                text = f"{value.mean:.3f} ± {value.high - value.mean:.3f}"
                shown.append(f"**{text}**" if value.mean == best else text)
            lines.append(f"| {name} | {n} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def match_table(measured: Measured) -> str:
    """Return how many samples each method needs to match the reference, as Markdown."""
    methods = [name for name in next(iter(next(iter(measured.values())).values())) if name != "reference"]
    lines = ["| table | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for name, sizes in measured.items():
        shown = []
        for method in methods:
            found = samples_to_match(sizes, method)
            smallest, largest = min(sizes), max(sizes)
            if found is None:
                shown.append(f"> {largest}")
            elif found.mean == smallest:
                shown.append(f"<= {smallest}")
            else:
                high = f"> {largest}" if np.isinf(found.high) else f"{found.high:.0f}"
                shown.append(f"{found.mean:.0f} [{found.low:.0f}, {high}]")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def difference_table(measured: Measured, pairs: tuple[tuple[str, str], ...]) -> str:
    """Return paired differences of test losses between methods, as Markdown; negative: the first is better."""
    lines = ["| table | n | " + " | ".join(f"{a} - {b}" for a, b in pairs) + " |", "|---" * (len(pairs) + 2) + "|"]
    for name, sizes in measured.items():
        for n, cells in sizes.items():
            shown = [str(interval(cells[a]["risk"] - cells[b]["risk"])) for a, b in pairs]
            lines.append(f"| {name} | {n} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def bound_table(measured: Measured, method: str) -> str:
    """Return variance ratios, and bounds on error - reference error beside the errors themselves, as Markdown."""
    lines = [
        "| table | n | Var(l - l_ref) / Var(l) | error - reference error | its bound | certified better |",
        "|---|---|---|---|---|---|",
    ]
    for name, sizes in measured.items():
        for n, cells in sizes.items():
            cell, reference = cells[method], cells["reference"]
            gain, bound = interval(cell["error"] - reference["error"]), interval(cell["bound"])
            certified = f"{100 * (cell['bound'] < 0).mean():.0f} %"
            lines.append(f"| {name} | {n} | {variance_ratio(cell)} | {gain} | {bound} | {certified} |")
    return "\n".join(lines)
