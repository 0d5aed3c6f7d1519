"""Measure linear models: time, Newton steps and certified gap, where the risk is smooth and where it has kinks.

``python experiments/benchmarks/linear_models.py`` prints a table and writes it as Markdown; about a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch

from drrho import KL, CappedKL, ChiSquare, CVaR, Divergence, TotalVariation
from drrho.convex import minimize_linear
from drrho.linear import DRRhoClassifier, DRRhoRegressor
from experiments.benchmarks.measure import markdown, provenance, within

RESULTS = Path(__file__).parent / "results" / "linear_models.md"
SIZES = [(1_000, 20), (10_000, 20), (100_000, 50)]
REACH = {10_000: 1.0, 100_000: 10.0}  # seconds
CONIC = 1_000  # samples up to which the conic solver is asked as well
L2 = 1e-3

LossName: TypeAlias = Literal["squared", "logistic", "hinge"]

#: Loss, divergence and radius.
PROBLEMS: list[tuple[LossName, Divergence, float | None]] = [
    ("logistic", ChiSquare(), 0.01),
    ("logistic", ChiSquare(), 3.0),
    ("logistic", CVaR(0.1), None),
    ("logistic", TotalVariation(), 0.1),
    ("logistic", CappedKL(0.1), 5.0),
    ("logistic", KL(), 20.0),
    ("hinge", ChiSquare(), 0.01),
    ("hinge", CVaR(0.1), None),
    ("squared", KL(), 0.1),
    ("squared", CVaR(0.1), None),
    ("squared", TotalVariation(), 0.1),
    ("squared", ChiSquare(), 1e6),
]


def data(n: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features ``[n, d]``, noisy labels -1 and 1, and targets with Student t noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    score = x @ rng.normal(size=d)
    return x, np.where(score + rng.normal(size=n) > 0, 1.0, -1.0), score + rng.standard_t(3, size=n)


def seconds(call: Callable[[], object]) -> float:
    """Return the processor's time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@dataclass(frozen=True)
class Row:
    """One fit; ``relative_gap`` in units of the risk or the spread of the losses, whichever is larger."""

    loss: str
    divergence: str
    radius: float | None
    n: int
    d: int
    seconds: float
    steps: int
    risk: float
    gap: float
    relative_gap: float
    reach: float | None
    met: str
    conic_seconds: float | str | None


def rows(sizes: list[tuple[int, int]]) -> Iterator[Row]:
    """Fit every problem at every size."""
    for n, d in sizes:
        x, labels, real = data(n, d)
        for loss, divergence, radius in PROBLEMS:
            y = real if loss == "squared" else labels
            settings = {"radius": radius, "l2": L2}
            model = (
                DRRhoRegressor(divergence, **settings)
                if loss == "squared"
                else DRRhoClassifier(divergence, loss=loss, **settings)
            )
            taken = seconds(lambda model=model, x=x, y=y: model.fit(x, y))
            scores = model.predict(x) if isinstance(model, DRRhoRegressor) else model.decision_function(x)
            losses = {
                "squared": lambda f, y: np.square(y - f),
                "logistic": lambda f, y: np.logaddexp(0, -y * f),
                "hinge": lambda f, y: np.maximum(0, 1 - y * f),
            }[loss](scores, y)
            size = max(abs(model.risk_), float(np.ptp(losses)))
            yield Row(
                loss,
                repr(divergence),
                radius,
                n,
                d,
                taken,
                model.n_iter_,
                model.risk_,
                model.duality_gap_,
                model.duality_gap_ / size,
                REACH.get(n),
                within(taken, REACH.get(n)),
                _conic_seconds(x, y, loss, divergence, radius) if n <= CONIC else None,
            )


def _conic_seconds(
    x: np.ndarray, y: np.ndarray, loss: LossName, divergence: Divergence, radius: float | None
) -> float | str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return seconds(
                lambda: minimize_linear(x, y, divergence, loss=loss, radius=radius, l2=L2, fit_intercept=True)
            )
        except RuntimeError:
            return "failed"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[n for n, _ in SIZES], help="of 1000, 10000, 100000")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Markdown file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = provenance(" ".join(["python experiments/benchmarks/linear_models.py", *sys.argv[1:]]))
    found = []
    for row in rows([size for size in SIZES if size[0] in options.samples]):
        print(row, flush=True)
        found.append(row)
    text = (
        f"# Linear models\n\n`{record['command']}`, {record['date']}. {record['machine']}; one thread, load at the "
        f"start {record['load']}; torch {record['versions']['torch']}, numpy with OMP_NUM_THREADS=1.\n\n"
        f"`DRRhoClassifier` and `DRRhoRegressor` with an intercept, l2 = {L2} and tol = 1e-8. Features are normal, "
        "labels signs of noisy scores, targets scores with Student t noise of 3 degrees. `seconds` are those of the "
        "processor, which other programs hardly change. `gap` is `duality_gap_`, a bound on the difference from the "
        "minimum; `relative gap` is in units of the losses (the larger of risk and spread). `steps` are Newton steps, "
        "`reach` is in seconds. `conic seconds`: the same problem as a conic program by CLARABEL "
        f"(`drrho.convex.minimize_linear`), up to {CONIC} samples.\n\n"
        f"{markdown(found)}\n"
    )
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
