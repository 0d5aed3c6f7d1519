"""Measure how often 95 % intervals of the variance ratio hold it, over families of losses and methods.

``python experiments/benchmarks/coverage.py`` takes about ten minutes on one core and writes ``results/coverage.md``.
The ratio is V(l - r) / V(l). All samples of a cell are computed at once; the first of them are given to
`drrho.variance.variance_reduction` too, which must return the same intervals.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from drrho.variance import _CARRIERS, _STUDENTIZED, _poisson, variance_reduction
from experiments.benchmarks.measure import markdown, provenance

Array = NDArray[np.float64]
SIZES = (50, 100, 200, 500, 1000, 5000, 20_000)
METHODS = ("delta", "jackknife", "empirical likelihood", "BCa", "bootstrap-t", "symmetric bootstrap-t")
HARD = 0.02  # the share of hard samples of the last family
PARTS = 2_000_000  # losses at a time

TEXT = """# Coverage of 95 % intervals of the variance ratio

`{command}`, {date}. {machine}.

Shares of {samples} samples of n pairs whose interval holds V(l - r) / V(l); +- {error:.3f} for a coverage of .95. The
bootstraps have {replicates} replicates. `before` is the jackknife below n = 500 and the delta method from there on.
`auto` is what `variance_reduction` returns, the jackknife's standard error with the symmetric quantile of the
studentized bootstrap for 10 <= n < 10,000 and the jackknife otherwise: `auto` is its coverage where it gives an
interval, `refused` the share of samples for which it says "too few hard samples to tell", and `wrong` the share of
all samples for which it gives an interval that misses. `high to low` is the median of the upper end divided by the
lower end.

{table}

## What limits the last family

2 % of its samples are hard and carry the variance. A sample of n has none of them with probability .98^n: .364 at n =
50, .133 at n = 100, .018 at n = 200. Given that, it is a sample of the easy law, whose ratio is another. A method
that covers the ratio of the easy law with probability 1 - a, and whose interval holds both ratios with probability b
under that law, misses the ratio of this family with probability at least .98^n (1 - a - b) (Bahadur & Savage 1956):
short and right about the easy law means wrong here. From n = 150 = 3 / .02 on the limit is below 5 %. The printed
report names the share of samples that its n can miss.

The t distribution with 3 degrees of freedom has no fourth moment: the variance of a sample variance is infinite, so
that no interval here is exact in the limit. What is measured is the evidence for it.
"""


class Family(NamedTuple):
    """Draws losses and reference losses of a shape; the ratio of the variances of excess and losses."""

    name: str
    draw: Callable[[np.random.Generator, tuple[int, int]], tuple[Array, Array]]
    ratio: float


def cross_entropy(margin: Array) -> Array:
    """Return the loss of a softmax classifier of two classes whose logit of the true class is ahead by ``margin``."""
    return np.logaddexp(0, -margin)


def added(noise: Callable[[np.random.Generator, tuple[int, int]], Array]) -> Callable[..., tuple[Array, Array]]:
    """Return a family with ``l = r + 0.6 e``, r and e of one law, whose ratio is .36 / 1.36."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Array, Array]:
        reference = noise(rng, shape)
        return reference + 0.6 * noise(rng, shape), reference

    return draw


def classifier(level: float) -> Callable[..., tuple[Array, Array]]:
    """Return the losses of two classifiers with margins ``level`` and ``level - 1``, deviation 3, correlation .8."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Array, Array]:
        shared = rng.normal(size=shape)
        own = 0.8 * shared + 0.6 * rng.normal(size=shape)
        return cross_entropy(level + 3 * own), cross_entropy(level - 1 + 3 * shared)

    return draw


def classifier_ratio(level: float) -> float:
    """Return the ratio of `classifier`, by the trapezoidal rule, which is exact to rounding for such integrands."""
    nodes = np.linspace(-10, 10, 1201)
    weights = np.exp(-(nodes**2) / 2)
    weights /= weights.sum()
    reference = cross_entropy(level - 1 + 3 * nodes)[:, None]
    losses = cross_entropy(level + 3 * (0.8 * nodes[:, None] + 0.6 * nodes))
    return ratio_of(weights[:, None] * weights, losses, reference)


def ratio_of(weights: Array, losses: Array, reference: Array) -> float:
    """Return V(l - r) / V(l) under weights."""
    first, second = (
        (weights * values**2).sum() - (weights * values).sum() ** 2 for values in (losses - reference, losses)
    )
    return float(first / second)


def few_hard(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Return losses of classifiers that have the margin 6 +- 1 on most samples and -3 +- 2 on the hard ones."""
    hard = rng.random(shape) < HARD
    shared = np.where(hard, -3 + 2 * rng.normal(size=shape), 6 + rng.normal(size=shape))
    return (
        cross_entropy(shared + 0.8 * rng.normal(size=shape)),
        cross_entropy(shared - 0.5 + 0.8 * rng.normal(size=shape)),
    )


def few_hard_ratio() -> float:
    """Return the ratio of `few_hard`: given the shared margin, both losses are independent."""
    nodes = np.linspace(-8, 8, 801)
    weights = np.exp(-(nodes**2) / 2)
    weights /= weights.sum()
    sums = np.zeros(5)
    for share, mean, sd in ((HARD, -3, 2), (1 - HARD, 6, 1)):
        margins = (mean + sd * nodes)[:, None] + 0.8 * nodes
        losses, reference = cross_entropy(margins), cross_entropy(margins - 0.5)
        first, first2, second, second2 = (values @ weights for values in (losses, losses**2, reference, reference**2))
        sums += share * (np.array([first, first2, second, second2, first * second]) @ weights)
    first, first2, second, second2, both = sums
    return float((first2 + second2 - 2 * both - (first - second) ** 2) / (first2 - first**2))


def lognormal(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Return lognormal numbers."""
    return np.exp(rng.normal(size=shape))


FAMILIES = (
    Family("Gaussian", added(lambda rng, shape: rng.normal(size=shape)), 0.36 / 1.36),
    Family("exponential", added(lambda rng, shape: rng.exponential(size=shape)), 0.36 / 1.36),
    Family("lognormal", added(lognormal), 0.36 / 1.36),
    Family("t with 3 degrees", added(lambda rng, shape: rng.standard_t(3, size=shape)), 0.36 / 1.36),
    Family("classifier, 84 % right", classifier(3), classifier_ratio(3)),
    Family("classifier, 98 % right", classifier(6), classifier_ratio(6)),
    Family("2 % hard samples", few_hard, few_hard_ratio()),
)


class Answers(NamedTuple):
    """Whether the interval of each method holds the ratio, sample by sample, and which samples ours refuses."""

    hits: dict[str, NDArray[np.bool_]]
    refused: NDArray[np.bool_]
    width: Array


def answers(losses: Array, reference: Array, ratio: float, weights: Array) -> Answers:
    """Return what every method says of samples ``[samples, n]``; ``weights`` are those of the bootstrap, [b, n]."""
    n = losses.shape[1]
    x, y = (values - values.mean(1, keepdims=True) for values in (losses, losses - reference))
    x, y = x / x.std(1, keepdims=True), y / y.std(1, keepdims=True)
    center = np.log((losses - reference).var(1) / losses.var(1))
    error = abs(center - np.log(ratio))
    delta = (y * y - x * x).std(1) / np.sqrt(n)
    left_out = np.log((n - n / (n - 1) * y * y) / (n - n / (n - 1) * x * x))
    jackknife = np.sqrt(n - 1) * left_out.std(1)
    hits = {
        "delta": error <= special.ndtri(0.975) * delta,
        "jackknife": error <= special.stdtrit(n - 1, 0.975) * jackknife,
        "empirical likelihood": likelihood_ratio(x, y, np.exp(np.log(ratio) - center)) <= special.chdtri(1, 0.05),
    }
    quantile = np.full(len(x), special.stdtrit(n - 1, 0.975))
    if n in _STUDENTIZED:
        moves, errors = replicated(x, y, weights)
        with np.errstate(all="ignore"):
            t = np.where(errors > 0, moves / errors, np.inf)
        low, high = np.quantile(t, [0.025, 0.975], axis=1)
        quantile = np.quantile(abs(t), 0.95, axis=1, method="higher")
        signed = (center - np.log(ratio)) / delta
        hits["bootstrap-t"] = (low <= signed) & (signed <= high)
        hits["symmetric bootstrap-t"] = error <= quantile * delta
        hits["BCa"] = bca(moves, left_out, error * np.sign(np.log(ratio) - center))
    hits["studentized"] = error <= quantile * jackknife
    carriers = np.minimum(*((values**2).sum(1) ** 2 / (values**4).sum(1) for values in (x, y)))
    return Answers(hits, (carriers < _CARRIERS) & (n in _STUDENTIZED), quantile * jackknife)


def replicated(x: Array, y: Array, weights: Array) -> tuple[Array, Array]:
    """Return moves of the logarithm of the ratio over bootstrap samples, and their errors by the delta method."""
    counts = weights.sum(1)

    def mean(values: Array) -> Array:
        return values @ weights.T / counts

    a, b, aa, bb, ab = mean(x), mean(y), mean(x * x), mean(y * y), mean(x * y)
    aab, abb = mean(x * x * y), mean(x * y * y)
    v_a, v_b = aa - a * a, bb - b * b
    fourth_a = mean(x**4) - 4 * a * mean(x**3) + 6 * a * a * aa - 3 * a**4
    fourth_b = mean(y**4) - 4 * b * mean(y**3) + 6 * b * b * bb - 3 * b**4
    both = mean(x * x * y * y) - 2 * a * abb - 2 * b * aab + a * a * bb + b * b * aa + 4 * a * b * ab - 3 * (a * b) ** 2
    with np.errstate(all="ignore"):
        square = fourth_b / v_b**2 + fourth_a / v_a**2 - 2 * both / (v_a * v_b)
        return np.log(v_b / v_a), np.sqrt(np.maximum(square, 0) / counts)


def bca(moves: Array, left_out: Array, move: Array) -> NDArray[np.bool_]:
    """Return whether the bias-corrected and accelerated percentiles of the moves hold ``move`` (Efron 1987)."""
    pull = left_out.mean(1, keepdims=True) - left_out
    acceleration = ((pull**3).sum(1) / (6 * (pull**2).sum(1) ** 1.5))[:, None]
    bias = special.ndtri(np.clip((moves < 0).mean(1), 1 / moves.shape[1], 1 - 1 / moves.shape[1]))[:, None]
    ends = bias + special.ndtri([0.025, 0.975])
    levels = special.ndtr(bias + ends / (1 - acceleration * ends))
    below = (moves < move[:, None]).mean(1)
    return (levels[:, 0] <= below) & (below <= levels[:, 1])


def likelihood_ratio(x: Array, y: Array, ratio: Array) -> Array:
    """Return -2 log of the empirical likelihood ratio of ``mean(y^2 - ratio x^2) = 0`` (Owen 1988), by bisection."""
    z = y * y - ratio[:, None] * x * x
    low, high = -1 / z.max(1), -1 / z.min(1)
    for _ in range(60):
        middle = (low + high) / 2
        above = (z / (1 + middle[:, None] * z)).sum(1) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    with np.errstate(all="ignore"):
        return np.where(z.min(1) < 0, 2 * np.log1p(low[:, None] * z).sum(1), np.inf)


def cell(family: Family, n: int, samples: int, replicates: int) -> Answers:
    """Return the answers for all samples of a family and a size, the first of which are given to the library too."""
    rng = np.random.default_rng(n)
    drawn = range(replicates if n in _STUDENTIZED else 0)
    weights = np.array([_poisson(0, replicate, 0, n) for replicate in drawn])
    parts = []
    for start in range(0, samples, max(PARTS // n, 1)):
        losses, reference = family.draw(rng, (min(max(PARTS // n, 1), samples - start), n))
        parts.append(answers(losses, reference, family.ratio, weights))
        if start == 0:
            for row in range(3):
                ours = variance_reduction(losses[row], reference[row], replicates=replicates).ratio
                assert bool(ours.reason) == parts[0].refused[row], (family.name, n, ours)
                if not ours.reason:
                    assert abs(np.log(ours.high / ours.low) / 2 / parts[0].width[row] - 1) < 1e-6, (family.name, n)
    hits = {name: np.concatenate([part.hits[name] for part in parts]) for name in parts[0].hits}
    return Answers(hits, *(np.concatenate(column) for column in list(zip(*parts, strict=True))[1:]))


@dataclass(frozen=True)
class Row:
    """Shares of samples: whose interval holds the ratio, by method; of "auto" those with and without an interval."""

    losses: str
    n: str
    methods: dict[str, str]
    before: str
    auto: str
    refused: str
    wrong: str
    high_to_low: float


def row_of(family: Family, n: int, samples: int, replicates: int) -> Row:
    """Return the row of the table for a family and a size."""
    found = cell(family, n, samples, replicates)
    given, hits = ~found.refused, found.hits["studentized"]
    shown = {name: f"{found.hits[name].mean():.3f}" if name in found.hits else "" for name in METHODS}
    row = Row(
        losses=family.name,
        n=f"{n:,}",
        methods=shown,
        before=shown["jackknife" if n < 500 else "delta"],
        auto=f"{hits[given].mean():.3f}",
        refused=f"{found.refused.mean():.3f}",
        wrong=f"{(given & ~hits).mean():.3f}",
        high_to_low=float(np.exp(2 * np.median(found.width[given]))),
    )
    print(row, flush=True)
    return row


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4000, help="samples of a cell")
    parser.add_argument("--replicates", type=int, default=999, help="bootstrap samples")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "coverage.md")
    options = parser.parse_args()
    where = provenance(shlex.join(["python", *sys.argv]))
    cells = [(family, n) for family in FAMILIES for n in options.sizes]
    table = markdown(row_of(*each, options.samples, options.replicates) for each in cells)
    error = 1.96 * np.sqrt(0.95 * 0.05 / options.samples)
    numbers = TEXT.format(samples=options.samples, replicates=options.replicates, error=error, table=table, **where)
    options.output.write_text(numbers)


if __name__ == "__main__":
    main()
