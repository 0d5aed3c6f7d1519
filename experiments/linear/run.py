"""Learn linear models from n samples beside a reference trained on m > n others, on real tables.

``python experiments/linear/run.py`` tunes every method, repeats every split, and writes one line for each table, n,
method and repetition to ``paper_figures/results/linear.csv`` and the chosen settings beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file

import numpy as np  # noqa: E402
import torch  # noqa: E402

from drrho.bounds import empirical_bernstein  # noqa: E402
from experiments.linear.analysis import load, risk_table  # noqa: E402
from experiments.linear.methods import METHODS, errors_of, fit_reference, losses_of, scores_of  # noqa: E402
from experiments.linear.tables import TABLES, split  # noqa: E402

RESULTS = ROOT / "paper_figures" / "results" / "linear.csv"
TUNING_SEEDS = range(1_000_000, 1_000_006)  # never those of a repetition
REFERENCE_PRICES = tuple(np.geomspace(1e-4, 1.0, 9))
DELTA = 0.05
FIELDS = (
    "table",
    "n",
    "repetition",
    "method",
    "risk",  # mean test loss
    "error",  # mean test loss in [0, 1]: 0-1, or squared and clipped
    "variance",  # of the test loss
    "excess_variance",  # of the test loss minus the reference's
    "bound",  # on error minus the reference's error, from the test sample at confidence 0.95
)
#: Listed among the methods, as one that needs no sample.
REFERENCE = "reference"

Row = dict[str, Any]


def classes_of(name: str) -> int:
    """Return the number of classes; 0 for real targets."""
    return len(np.unique(TABLES[name].load()[1])) if TABLES[name].classes else 0


def reference_price(name: str) -> float:
    """Return the reference's best price of squared coefficients on the tuning seeds' test samples."""
    classes, total = classes_of(name), np.zeros(len(REFERENCE_PRICES))
    for seed in TUNING_SEEDS:
        parts = split(name, seed, TABLES[name].sizes[0])
        for place, price in enumerate(REFERENCE_PRICES):
            scores = scores_of(fit_reference(*parts.reference, classes, price), classes)
            total[place] += losses_of(scores(parts.test[0]), parts.test[1], classes).mean()
    return float(REFERENCE_PRICES[total.argmin()])


def tuned(task: tuple[str, int, str, float]) -> dict[str, float]:
    """Return a method's setting of least mean test loss over the tuning seeds."""
    name, n, method, price = task
    classes, chosen = classes_of(name), METHODS[method]
    total = np.zeros(len(chosen.grid))
    for seed in TUNING_SEEDS:
        parts = split(name, seed, n)
        reference = fit_reference(*parts.reference, classes, price)
        for place, setting in enumerate(chosen.grid):
            scores = chosen.fit(setting, *parts.target, classes, reference)
            total[place] += losses_of(scores(parts.test[0]), parts.test[1], classes).mean()
    return chosen.grid[int(total.argmin())]


def repetition(task: tuple[str, int, int, float, dict[str, dict[str, float]]]) -> list[Row]:
    """Fit all methods on one split and measure them on its test sample."""
    name, n, seed, price, settings = task
    classes, parts = classes_of(name), split(name, seed, n)
    reference = fit_reference(*parts.reference, classes, price)
    x, y = parts.test
    of_reference = scores_of(reference, classes)(x)
    reference_losses, reference_errors = losses_of(of_reference, y, classes), errors_of(of_reference, y, classes)
    scores = {REFERENCE: of_reference}
    for method, setting in settings.items():
        scores[method] = METHODS[method].fit(setting, *parts.target, classes, reference)(x)
    rows = []
    for method, of_method in scores.items():
        losses, errors = losses_of(of_method, y, classes), errors_of(of_method, y, classes)
        bound = empirical_bernstein(errors - reference_errors, value_range=(-1.0, 1.0), delta=DELTA)
        numbers = losses.mean(), errors.mean(), losses.var(ddof=1), (losses - reference_losses).var(ddof=1), bound.value
        rows.append(dict(zip(FIELDS, (name, n, seed, method, *(f"{number:.6g}" for number in numbers)), strict=True)))
    return rows


def progress(results: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Yield the results, and say twenty times how many are there and how long the others take."""
    start = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        if done % max(1, total // 20) == 0 or done == total:
            spent = time.monotonic() - start
            print(f"{what}: {done} of {total}, {spent:.0f} s, {spent / done * (total - done):.0f} s left", flush=True)


def _start() -> None:
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, repeat, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200, help="splits of each table (default: 200)")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), help="default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"CSV file (default: {RESULTS.name})")
    options = parser.parse_args(arguments)
    for value, option in ((options.repetitions, "--repetitions"), (options.processes, "--processes")):
        if value < 1:
            parser.error(f"{option} must be >= 1, got {value}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cells = [(name, n) for name in options.tables for n in TABLES[name].sizes]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(options.processes, _start) as pool:
        prices = dict(zip(options.tables, pool.map(reference_price, options.tables), strict=True))
        wanted = [(name, n, method, prices[name]) for name, n in cells for method in METHODS]
        found = list(progress(pool.imap(tuned, wanted), len(wanted), "tuning"))
        settings: dict[tuple[str, int], dict[str, dict[str, float]]] = {cell: {} for cell in cells}
        for (name, n, method, _), setting in zip(wanted, found, strict=True):
            settings[name, n][method] = setting
        tasks = [
            (name, n, seed, prices[name], settings[name, n]) for name, n in cells for seed in range(options.repetitions)
        ]
        partial = options.output.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            for rows in progress(pool.imap(repetition, tasks, chunksize=4), len(tasks), "repetitions"):
                writer.writerows(rows)
        partial.replace(options.output)
    record = {
        "command": shlex.join(["python", "experiments/linear/run.py", *(arguments or sys.argv[1:])]),
        "repetitions": options.repetitions,
        "tuning_seeds": [TUNING_SEEDS.start, TUNING_SEEDS.stop],
        "reference_l2": prices,
        "settings": {f"{name}, n = {n}": chosen for (name, n), chosen in settings.items()},
    }
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(risk_table(load(options.output)))
    print(f"Written to {options.output}; python paper_figures/linear_models.py draws it.")


if __name__ == "__main__":
    main()
