"""Where steering pays in a bilinear contrastive model: error against noise share, n and the reference's quality.

``python experiments/linear/phase.py`` tunes every method in every cell of the grid, on seeds that are not measured, and
writes a line of errors for each cell and seed to ``paper_figures/results/phase.csv``, the chosen settings beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file

import numpy as np  # noqa: E402

from experiments.linear.bilinear import Array, Model, Pairs, estimate, learnable, mixed, scores, selected  # noqa: E402
from experiments.linear.run import progress  # noqa: E402

RESULTS = ROOT / "paper_figures" / "results" / "phase.csv"
#: By the number of signal directions: a reference tells 16 of them from noise in nearly every pair, 4 in most.
MODELS = {model.signal: model for model in (Model(16, 32), Model(4, 26))}
ETAS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
SIZES = (400, 1200, 3600, 10800)
REFERENCE_SIZES = (200, 600, 1800, 5400)
COEFFICIENTS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 4.0, 12.0)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
TUNING_SEEDS = range(1_000_000, 1_000_008)  # never those that are measured
METHODS = ("reference", "twin", "published", "steered", "selected", "learnable", "both")
FIELDS = ("signal", "eta", "n", "m", "seed", *METHODS)


class Cell(NamedTuple):
    """A point of the grid: the model's signal directions, share of matched pairs, pairs, and the reference's pairs."""

    signal: int
    eta: float
    n: int
    m: int


class Setting(NamedTuple):
    """What is tuned: the coefficient of steering, alone and on selected pairs, and the shares of both selections."""

    steered: float
    selected: float
    learnable: float
    both: float


def sample(cell: Cell, seed: int) -> tuple[Pairs, Array]:
    """Return a cell's pairs, and the reference: the estimate from m other pairs that are all matched.

    Of one seed, cells of equal n have the same pairs before a share is mismatched, and those of equal m one reference.
    """
    model = MODELS[cell.signal]
    pairs = mixed(model.draw(np.random.default_rng([seed, cell.signal, 0]), cell.n), cell.n, cell.eta)
    others = mixed(model.draw(np.random.default_rng([seed, cell.signal, 1]), cell.m), cell.m, 1.0)
    return pairs, model.truncated(estimate(others))


def tuned(cell: Cell) -> Setting:
    """Return the settings of least mean error over the tuning seeds; that of both is a coefficient for `selected`."""
    model, coefficients = MODELS[cell.signal], np.array(COEFFICIENTS)[:, None, None]
    steered, chosen, learned = np.zeros(len(COEFFICIENTS)), np.zeros(len(SHARES)), np.zeros(len(SHARES))
    both = np.zeros((len(SHARES), len(COEFFICIENTS)))
    for seed in TUNING_SEEDS:
        pairs, reference = sample(cell, seed)
        kept = selected(pairs, scores(pairs, reference), SHARES)  # the last is the twin
        steered += model.error(model.truncated(coefficients * reference + kept[-1]))
        chosen += model.error(model.truncated(kept))
        learned += model.error(model.truncated(learnable(model, pairs, reference, SHARES)))
        both += model.error(model.truncated(coefficients * reference + kept[:, None]))
    share = int(chosen.argmin())
    return Setting(
        COEFFICIENTS[int(steered.argmin())],
        SHARES[share],
        SHARES[int(learned.argmin())],
        COEFFICIENTS[int(both[share].argmin())],
    )


def errors(cell: Cell, seed: int, setting: Setting) -> Array:
    """Return the error of each of `METHODS`."""
    model, (pairs, reference) = MODELS[cell.signal], sample(cell, seed)
    twin = estimate(pairs)
    (kept,) = selected(pairs, scores(pairs, reference), (setting.selected,))
    (learned,) = learnable(model, pairs, reference, (setting.learnable,))
    matrices = (
        reference,
        twin,
        reference + twin,
        setting.steered * reference + twin,
        kept,
        learned,
        setting.both * reference + kept,
    )
    return model.error(model.truncated(np.stack(matrices)))


def measured(task: tuple[Cell, int]) -> tuple[Setting, list[dict[str, Any]]]:
    """Return a cell's settings and a row for each seed."""
    cell, seeds = task
    setting = tuned(cell)
    rows = []
    for seed in range(seeds):
        found = {method: f"{error:.5g}" for method, error in zip(METHODS, errors(cell, seed, setting), strict=True)}
        rows.append({**cell._asdict(), "seed": seed, **found})
    return setting, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=64, help="data sets of each cell (default: 64)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"CSV file (default: {RESULTS.name})")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds must be >= 2, got {options.seeds}: intervals are over seeds")
    if options.processes < 1:
        parser.error(f"--processes must be >= 1, got {options.processes}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    cells = [Cell(*cell) for cell in product(MODELS, ETAS, SIZES, REFERENCE_SIZES)]
    settings, partial = {}, options.output.with_suffix(".partial")
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        tasks = [(cell, options.seeds) for cell in cells]
        for cell, (setting, rows) in zip(cells, progress(pool.imap(measured, tasks), len(tasks), "cells"), strict=True):
            writer.writerows(rows)
            settings[", ".join(f"{name}={value:g}" for name, value in cell._asdict().items())] = setting._asdict()
    partial.replace(options.output)
    record = {
        "command": shlex.join(["python", "experiments/linear/phase.py", *(arguments or sys.argv[1:])]),
        "tuning_seeds": [TUNING_SEEDS.start, TUNING_SEEDS.stop],
        "models": {signal: model.__dict__ for signal, model in MODELS.items()},
        "settings": settings,
    }
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written to {options.output}; python paper_figures/phase_diagram.py draws it.")


if __name__ == "__main__":
    main()
