"""Measure every compiled kernel against a sort of the same losses, float32 against float64, and entmax beside them.

``python experiments/benchmarks/kernels.py`` prints the tables and writes them as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from drrho import (
    KL,
    CappedKL,
    ChiSquare,
    CressieRead,
    CVaR,
    Divergence,
    TotalVariation,
    constrained_risk,
    penalized_risk,
)
from experiments.benchmarks.measure import explain, markdown, median_seconds, provenance, within
from experiments.benchmarks.problems import SEED, losses

RESULTS = Path(__file__).parent / "results" / "kernels.json"
REACH = 0.5
FLOAT32_REACH = 0.7
ROWS = (4096, 256)
RADII = (1e-2, 0.5)
STRENGTH = 1.0
DIVERGENCES = (
    KL(),
    ChiSquare(),
    *(CressieRead(order) for order in (1.5, 0.5, 3.0, -1.0, 1.2)),
    TotalVariation(),
    CappedKL(0.1),
)
BALLS = (KL(), ChiSquare(), CressieRead(1.5), CressieRead(0.5), TotalVariation(), CappedKL(0.1))


@dataclass(frozen=True)
class Row:
    """One call against an operation on the same losses: value, weights, dual variables and gap, no gradient."""

    problem: str
    parameter: str
    shape: str
    base_weights: str
    time_ms: float | None = None
    yardstick_ms: float | None = None
    ratio: float | None = None
    reach: float | None = None
    met: str = ""
    note: str = ""


def _row(key: tuple[str, str, str, str], calls: list[Callable[[], Any]], reach: float, repeats: int) -> Row:
    try:
        time, yardstick = median_seconds(calls, repeats)
    except Exception as failure:  # the other rows are still worth having
        return Row(*key, note=explain(failure))
    ratio = time / yardstick
    return Row(*key, 1e3 * time, 1e3 * yardstick, ratio, reach, within(ratio, reach))


def _risks(divergence: Divergence) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    name = str(divergence).replace("order=", "").replace("alpha=", "").replace("()", "")
    if not divergence.has_radius:
        yield name, "", lambda z, base: constrained_risk(z, divergence, base_weights=base)
        return
    for radius in RADII:
        yield (
            f"{name} ball",
            f"radius {radius:g}",
            lambda z, base, radius=radius: constrained_risk(z, divergence, radius, base_weights=base),
        )
    yield (
        f"{name} penalty",
        f"strength {STRENGTH:g}",
        lambda z, base: penalized_risk(z, divergence, STRENGTH, base_weights=base),
    )


def against_sort(shape: tuple[int, ...], repeats: int) -> list[Row]:
    """Race every risk on exponential losses against `torch.sort`, without and with base weights."""
    z = losses("exponential", int(torch.Size(shape).numel())).reshape(shape)
    base = torch.empty_like(z).exponential_(generator=torch.Generator().manual_seed(SEED + 1))
    base /= base.sum(-1, keepdim=True)
    return [
        _row(
            (name, parameter, " x ".join(map(str, shape)), "yes" if weights is not None else "no"),
            [lambda solve=solve, weights=weights: solve(z, weights), lambda: torch.sort(z)],
            REACH,
            repeats,
        )
        for weights in (None, base)
        for divergence in (*DIVERGENCES, CVaR(0.1))
        for name, parameter, solve in _risks(divergence)
    ]


def narrow(n: int, repeats: int) -> list[Row]:
    """Race balls on float32 losses against the same in float64."""
    wide, single = losses("exponential", n), losses("exponential", n, torch.float32)
    return [
        _row(
            (name, parameter, str(n), "no"),
            [lambda solve=solve: solve(single, None), lambda solve=solve: solve(wide, None)],
            FLOAT32_REACH,
            repeats,
        )
        for divergence in BALLS
        for name, parameter, solve in _risks(divergence)
        if "radius" in parameter
    ]


def beside_entmax(repeats: int) -> list[Row]:
    """Race the penalty whose weights entmax15 gives against it."""
    from entmax import entmax15  # pyright: ignore[reportMissingImports]

    def race(shape: tuple[int, ...]) -> Row:
        z = losses("exponential", int(torch.Size(shape).numel())).reshape(shape)
        strength = shape[-1] ** -0.5
        error = (penalized_risk(z, CressieRead(1.5), strength).weights - entmax15(z, -1)).abs().max()
        calls: list[Callable[[], Any]] = [
            lambda: penalized_risk(z, CressieRead(1.5), strength),
            lambda: entmax15(z, -1),
        ]
        key = ("CressieRead(1.5) penalty", f"strength {strength:g}", " x ".join(map(str, shape)), "no")
        row = _row(key, calls, REACH, repeats if z.numel() > 1000 else 50 * repeats)
        return replace(row, note=row.note or f"weights differ by {float(error):.1e}")

    return [race(shape) for shape in ((100,), (10_000,), ROWS)]


def tables(n: int, repeats: int) -> Iterator[tuple[str, list[Row]]]:
    """Yield titles and rows, each as soon as it is measured."""
    yield "One row against torch.sort", against_sort((n,), repeats)
    yield "Many rows against torch.sort", against_sort(ROWS, repeats)
    yield "float32 against float64", narrow(n, repeats)
    if find_spec("entmax"):
        yield "Beside entmax15", beside_entmax(repeats)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1_000_000, help="losses of the long row")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    command = shlex.join(["python", "experiments/benchmarks/kernels.py", *sys.argv[1:]])
    origin = provenance(command)
    text = [
        "# The compiled kernels",
        "",
        f"`{command}`, {origin['date']}, {origin['machine']}, {origin['threads']} thread(s), load {origin['load']}, "
        f"torch {origin['versions']['torch']}. Exponential losses, float64 unless said; medians of "
        f"{options.repeats} calls that take turns with the yardstick's, which is what the title says.",
    ]
    measured: dict[str, Any] = {"provenance": origin}
    for title, rows in tables(options.n, options.repeats):
        section = f"\n## {title}\n\n{markdown(rows)}"
        print(section, flush=True)
        text.append(section)
        measured[title] = [asdict(row) for row in rows]
    options.output.write_text(json.dumps(measured, indent=1) + "\n")
    options.output.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
