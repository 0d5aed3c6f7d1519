"""Linear towers of unit-norm features, trained by `drrho.contrastive.contrastive_risk`: where theory is not exact.

``python experiments/linear/towers.py`` trains targets on noisy pairs without and with a reference, on all pairs and on
those that the reference ranks highest, and writes a line of naming errors for each cell and seed to
``paper_figures/results/phase_towers.csv``. `experiments.linear.phase` measures the same of closed forms.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

from drrho.contrastive import contrastive_risk  # noqa: E402
from experiments.linear.bilinear import Array, Model, mixed  # noqa: E402
from experiments.linear.run import progress  # noqa: E402

RESULTS = ROOT / "paper_figures" / "results" / "phase_towers.csv"
MODEL = Model(16, 32)
PAIRS, TEST_PAIRS = 400, 500
TEMPERATURE = 0.1
ETAS = (1.0, 0.7, 0.4)
REFERENCE_SIZES = (100, 200, 600)
HALF = 0.5
METHODS = ("reference", "twin", "published", "half", "selected", "both")
FIELDS = ("names", "eta", "m", "seed", *METHODS)

Features = tuple[Tensor, Tensor]


class Named(NamedTuple):
    """Both views of n pairs, ``[n, d]``, and the name of each x."""

    x: Tensor
    y: Tensor
    name: Tensor

    def chosen(self, places: Tensor) -> Named:
        """Return these pairs."""
        return Named(self.x[places], self.y[places], self.name[places])


class Towers(NamedTuple):
    """Linear maps ``[d, k]`` of both views; features have unit norm."""

    x: Tensor
    y: Tensor

    def features(self, pairs: Named) -> Features:
        """Return unit-norm features ``[n, k]`` of both views."""
        return normalize(pairs.x @ self.x, dim=1), normalize(pairs.y @ self.y, dim=1)

    def naming_error(self, test: Named) -> float:
        """Return the share of x whose most similar y is of another name."""
        x, y = self.features(test)
        return float((test.name[(x @ y.T).argmax(1)] != test.name).double().mean())


def draw(rng: np.random.Generator, n: int, eta: float, codebook: Array | None) -> Named:
    """Return n pairs; with a codebook ``[names, k]``, their signal is one of its rows, and else each has its own."""
    k, theta = MODEL.signal, MODEL.correlation
    name = np.arange(n) if codebook is None else rng.integers(len(codebook), size=n)
    latent = rng.standard_normal((n, k)) if codebook is None else codebook[name]
    x, y, independent = rng.standard_normal((3, n, MODEL.dimension))
    other = rng.permutation(n)  # whose signal a mismatched y has
    for view, signal in ((x, latent), (y, latent), (independent, latent[other])):
        view[:, :k] = np.sqrt(theta) * signal + np.sqrt(1 - theta) * view[:, :k]
    pairs = mixed((x, y, independent, rng.random(n)), n, eta)
    return Named(torch.from_numpy(pairs.x), torch.from_numpy(pairs.y), torch.from_numpy(name))


def train(pairs: Named, reference: Features | None = None, coefficient: float = 1.0, seed: int = 0) -> Towers:
    """Minimize the KL contrastive risk of the whole sample by L-BFGS, from seeded random towers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, MODEL.dimension, MODEL.signal)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64) / MODEL.dimension**0.5
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        features = Towers(*weights).features(pairs)
        steered = {} if reference is None else {"reference": reference, "coefficient": coefficient}
        value = contrastive_risk(*features, TEMPERATURE, **steered).value
        value.backward()
        return value

    optimizer.step(closure)
    return Towers(*weights.detach())


def errors(names: int, eta: float, seed: int) -> list[dict[str, Any]]:
    """Train everything of one seed; return a row for each reference."""
    rng = np.random.default_rng([seed, names])
    codebook = rng.standard_normal((names, MODEL.signal)) if names else None
    pairs, test = draw(rng, PAIRS, eta, codebook), draw(rng, TEST_PAIRS, 1.0, codebook)
    others = draw(rng, max(REFERENCE_SIZES), 1.0, codebook)
    twin = train(pairs).naming_error(test)
    rows: list[dict[str, Any]] = []
    for m in REFERENCE_SIZES:
        towers = train(others.chosen(torch.arange(m)))
        reference = towers.features(pairs)
        kept = (reference[0] * reference[1]).sum(1).argsort(descending=True)[: round(eta * PAIRS)]
        of_kept = reference[0][kept], reference[1][kept]
        found = (
            towers.naming_error(test),
            twin,
            train(pairs, reference).naming_error(test),
            train(pairs, reference, HALF).naming_error(test),
            train(pairs.chosen(kept)).naming_error(test),
            train(pairs.chosen(kept), of_kept, HALF).naming_error(test),
        )
        rows.append(
            {"names": names, "eta": eta, "m": m, "seed": seed}
            | {method: f"{error:.5g}" for method, error in zip(METHODS, found, strict=True)}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="data sets of each cell (default: 3)")
    parser.add_argument(
        "--names",
        type=int,
        default=0,
        help=f"how many names {PAIRS} pairs share, which makes false negatives (default: 0, every pair has its own)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"CSV file (default: {RESULTS.name})")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds must be >= 2, got {options.seeds}: intervals are over seeds")
    if options.names < 0:
        parser.error(f"--names must be >= 0, got {options.names}")
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_suffix(".partial")
    cells = list(product((options.names,), ETAS, range(options.seeds)))
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for rows in progress((errors(*cell) for cell in cells), len(cells), "cells"):
            writer.writerows(rows)
    partial.replace(options.output)
    print(f"Written to {options.output}; python paper_figures/phase_diagram.py draws it.")


if __name__ == "__main__":
    main()
