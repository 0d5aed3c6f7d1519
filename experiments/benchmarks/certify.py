"""Measure bounds on a mean: width beside that of Clopper & Pearson, and samples to certify beside those of a z-test.

``python experiments/benchmarks/certify.py`` takes about three minutes on one core and writes ``results/certify.md``.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from drrho.betting import capital_bound, confidence_sequence
from drrho.bounds import empirical_bernstein
from drrho.means import mean_bound
from experiments.benchmarks.measure import markdown, provenance

Array = NDArray[np.float64]
DELTA = 0.05
TEXT = """# Bounds on a mean

`{command}`, {date}. {machine}.

## Width

Average width of two-sided 95 % intervals of the mean of Bernoulli losses, as a multiple of that of Clopper & Pearson,
over {samples} samples (a tenth of them for `anytime`). `fixed` is `mean_interval`, for this number of samples;
`anytime` is the last interval of `confidence_sequence`, valid at all times at once; `bernstein` is two-sided
empirical Bernstein, `hoeffding` is Hoeffding's inequality. The missed shares are those of `fixed`, below and above.

{width}

## Samples to certify

The number of samples from which on at least half (nine in ten) of {samples} samples have an upper bound below zero at
delta = 0.05, as a multiple of the number at which a one-sided z-test with the known variance does; among multiples 1,
1.25, 1.5, .. up to 12. Losses are differences in [-1, 1].

`no test below` is a multiple below which no test can go that is valid for every law on [-1, 1], whatever it computes.
Let Q be the law, of mean m < 0, and e = -m / (1 - m): the law P = (1 - e) Q + e (point at 1) has mean zero, so that a
valid test rejects under P with probability at most delta. But P^n >= (1 - e)^n Q^n: a sample of P has none of the
points with that probability, and is then one of Q. So the test certifies under Q with probability at most
delta / (1 - e)^n, and half of the samples need n >= log(1 / (2 delta)) / -log(1 - e).

{certify}
"""


@dataclass(frozen=True)
class Width:
    """Widths as multiples of that of Clopper & Pearson."""

    n: str
    p: float
    fixed: float
    anytime: float
    bernstein: float
    hoeffding: float
    missed_below: str
    missed_above: str


def clopper_pearson(ones: Array, n: int) -> Array:
    """Return widths."""
    with np.errstate(invalid="ignore"):
        high = np.where(ones < n, special.betaincinv(ones + 1, n - ones, 1 - DELTA / 2), 1.0)
        low = np.where(ones > 0, special.betaincinv(ones, n - ones + 1, DELTA / 2), 0.0)
    return high - low


def width(n: int, p: float, samples: int) -> Width:
    """Return the row of n Bernoulli losses of mean p."""
    rng = np.random.default_rng(n)
    losses = (rng.random((samples, n)) < p).astype(float)
    exact = clopper_pearson(losses.sum(1), n)
    log_target = math.log(2 / DELTA)
    high, low = capital_bound(losses, log_target), 1 - capital_bound(1 - losses, log_target)
    some = losses[: samples // 10]
    sequences = [confidence_sequence(row, value_range=(0, 1), delta=DELTA) for row in some]
    bernstein = [empirical_bernstein(row, value_range=1, two_sided=True).value - row.mean() for row in losses]
    ends = [[min(2 * bound, 1.0) for bound in bernstein], min(2 * math.sqrt(log_target / (2 * n)), 1.0)]
    row = Width(
        n=f"{n:,}",
        p=p,
        fixed=float((high - low).mean() / exact.mean()),
        anytime=float(np.mean([each.high[-1] - each.low[-1] for each in sequences]) / exact[: len(some)].mean()),
        bernstein=float(np.mean(ends[0]) / exact.mean()),
        hoeffding=float(ends[1] / exact.mean()),
        missed_below=f"{(high < p).mean():.3f}",
        missed_above=f"{(low > p).mean():.3f}",
    )
    print(row, flush=True)
    return row


@dataclass(frozen=True)
class Certify:
    """Numbers of samples as multiples of those of a z-test."""

    losses: str
    z_test: str
    betting_half: str
    betting_nine_in_ten: str
    bernstein_half: str
    no_test_below: str


def outcomes(better: float, worse: float) -> Callable[[np.random.Generator, tuple[int, int]], Array]:
    """Return a source of differences of 0-1 losses."""
    return lambda rng, shape: rng.choice([-1.0, 0.0, 1.0], p=[better, 1 - better - worse, worse], size=shape)


SOURCES = {
    "better on 10 %, worse on 5 %": outcomes(0.10, 0.05),
    "better on 5 %, worse on 2 %": outcomes(0.05, 0.02),
    "better on 30 %, worse on 20 %": outcomes(0.3, 0.2),
    "better on 2 %": outcomes(0.02, 0.0),
    "normal, mean -.05, deviation .2": lambda rng, shape: rng.normal(-0.05, 0.2, shape).clip(-1, 1),
    "skewed: .6 beta(.5, 2) - .16": lambda rng, shape: 0.6 * rng.beta(0.5, 2, shape) - 0.16,
}


def least_samples(mean: float) -> float:
    """Return the samples that any valid test needs to certify half of the samples of differences of that mean."""
    rare = -mean / (1 - mean)
    return math.log(1 / (2 * DELTA)) / -math.log1p(-rare)


def certify(name: str, draw: Callable[[np.random.Generator, tuple[int, int]], Array], samples: int) -> Certify:
    """Return the row of one source of differences."""
    rng = np.random.default_rng(0)
    many = draw(rng, (1000, 1000))
    mean, sd = many.mean(), many.std()

    def needed(power: float, certified: Callable[[Array], NDArray[np.bool_]]) -> str:
        base = ((stats.norm.ppf(1 - DELTA) + stats.norm.ppf(power)) * sd / mean) ** 2
        for multiple in (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 12):
            if certified(draw(rng, (samples, math.ceil(multiple * base)))).mean() >= power:
                return f"{multiple:g}"
        return "more than 12"

    def betting(rows: Array) -> NDArray[np.bool_]:
        return capital_bound((rows + 1) / 2, -math.log(DELTA)) < 0.5

    def bernstein(rows: Array) -> NDArray[np.bool_]:
        bounds = [mean_bound(row, value_range=2, method="bernstein", delta=DELTA).value for row in rows]
        return np.array(bounds) < 0

    row = Certify(
        losses=name,
        z_test=f"{(stats.norm.ppf(1 - DELTA) * sd / mean) ** 2:,.0f}",
        betting_half=needed(0.5, betting),
        betting_nine_in_ten=needed(0.9, betting),
        bernstein_half=needed(0.5, bernstein),
        no_test_below=f"{least_samples(mean) / (stats.norm.ppf(1 - DELTA) * sd / mean) ** 2:.2g}",
    )
    print(row, flush=True)
    return row


def main() -> None:
    """Print and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200, help="samples of a cell")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "certify.md")
    options = parser.parse_args()
    where = provenance(shlex.join(["python", *sys.argv]))
    sizes = [(10, 0.3), (20, 0.5), (20, 0.05), (50, 0.1), (100, 0.02), (100, 0.5), (200, 0.1), (1000, 0.5),
             (1000, 0.02),
             (10_000, 0.3)]  # fmt: skip
    widths = markdown(width(n, p, options.samples) for n, p in sizes)
    sources = markdown(certify(name, draw, options.samples) for name, draw in SOURCES.items())
    options.output.write_text(TEXT.format(width=widths, certify=sources, samples=options.samples, **where))


if __name__ == "__main__":
    main()
