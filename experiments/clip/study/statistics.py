"""What the results of a study say, with 95 % intervals over seeds.

Trainings of one seed start from equal weights and see equal orders of the pairs, so methods are compared seed by seed.
A bootstrap draws seeds, the same for both sides of a comparison and for all configurations. All functions take plain
arrays: `study.results.study_rows` reads the rows that they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from .intervals import Interval, crossing, interval

REPLICATES = 2000
BINS = 5
_ENDS = (0.025, 0.975)

Array = NDArray[np.float64]
Rule = Literal["best-of-bins", "all"]


class PairedDifference(NamedTuple):
    """The mean of ``a - b`` over seeds: Student's t interval, BCa bootstrap interval, and their number."""

    mean: float
    t: Interval
    bootstrap: Interval
    n: int


class DataSaved(NamedTuple):
    """The fraction of the data at which the steered model is as good as the unsteered one with all of it.

    Attributes
    ----------
    fraction : Interval
        Percentiles of a bootstrap over seeds. Where the curves do not say where they meet, an end is a bound:
        the smallest fraction stands for that or less, infinity for more than the largest.
    note : str
        Empty where they meet; else on which side, of the mean curves: ``"at most"``: the smallest fraction does
        already; ``"more than all"``: the largest does not.
    at_most, more_than_all : float
        Share of the bootstrap's draws of either kind.
    """

    fraction: Interval
    note: Literal["", "at most", "more than all"]
    at_most: float
    more_than_all: float


class PowerLaw(NamedTuple):
    """``error = coefficient * compute ** exponent``, with percentile intervals of a bootstrap over seeds.

    ``draws`` ``[replicates, 2]`` are the bootstrap's logarithms of coefficients, and exponents; ``points`` ``[m, 2]``
    the compute and error that the line was fitted to.
    """

    exponent: Interval
    coefficient: Interval
    draws: Array
    points: Array

    def at(self, compute: ArrayLike) -> Array:
        """Return the line's error at each compute, and the ends of its 95 % band: ``[3, k]``."""
        logarithm = np.log(np.asarray(compute, float))
        line = self.coefficient.mean * np.exp(self.exponent.mean * logarithm)
        band = np.exp(self.draws[:, :1] + self.draws[:, 1:] * logarithm)
        return np.stack([line, *np.quantile(band, _ENDS, axis=0)])


class ExponentComparison(NamedTuple):
    """Difference of two exponents, a - b, and the share of paired bootstrap draws in which it is negative."""

    difference: Interval
    probability_less: float


def paired_difference(a: ArrayLike, b: ArrayLike, *, replicates: int = REPLICATES, seed: int = 0) -> PairedDifference:
    """Return the mean difference of two methods' scores, seed by seed.

    The bootstrap is bias-corrected and accelerated (BCa; Efron 1987); where all differences are equal, it is a point.
    """
    first, second = _paired(a, b)
    difference = first - second
    t = interval(difference)
    if np.ptp(difference) == 0:
        low, high = t.mean, t.mean
    else:
        # Before scipy 1.15, rng was called random_state: both take it.
        options: dict[str, Any] = {"n_resamples": replicates, "method": "BCa", "random_state": seed}
        found = stats.bootstrap((difference,), np.mean, **options)
        low, high = found.confidence_interval
    return PairedDifference(t.mean, t, Interval(t.mean, float(low), float(high)), len(difference))


def paired_ratio(a: ArrayLike, b: ArrayLike) -> Interval:
    """Return ``mean(a) / mean(b)`` with Fieller's interval (1954): the ratios r for which mean(a - r b) may be 0.

    These are the ratios that Student's t test at 5 % does not reject. Where it does not reject mean(b) = 0 either, no
    finite interval holds the ratio, and the ends are infinite.
    """
    a, b = _paired(a, b)
    n, quantile = len(a), stats.t.ppf(_ENDS[1], len(a) - 1)
    (aa, ab), (_, bb) = np.cov(a, b) * quantile**2 / n
    square, cross, constant = b.mean() ** 2 - bb, a.mean() * b.mean() - ab, a.mean() ** 2 - aa
    ratio = float(a.mean() / b.mean()) if b.mean() else np.nan
    if square <= 0:
        return Interval(ratio, -np.inf, np.inf)
    half = np.sqrt(max(cross**2 - square * constant, 0.0))
    return Interval(ratio, float((cross - half) / square), float((cross + half) / square))


def data_saved(
    fractions: ArrayLike, steered: ArrayLike, unsteered: ArrayLike, *, replicates: int = REPLICATES, seed: int = 0
) -> DataSaved:
    """Return the fraction at which the steered model's mean score meets the unsteered one's with all data.

    The steered curve is interpolated linearly in the logarithm of the fraction; where it meets the level more than
    once, the smallest counts.

    Parameters
    ----------
    fractions : array ``[k]``
        Ascending shares of the data.
    steered : array ``[k, seeds]``
        Scores at each, the higher the better.
    unsteered : array ``[seeds]``
        Scores with all data, of the same seeds.
    """
    shares, scores, level = (np.asarray(values, float) for values in (fractions, steered, unsteered))
    if shares.ndim != 1 or (np.diff(shares) <= 0).any() or not (shares > 0).all():
        raise ValueError(f"fractions must be positive and ascending, got {shares.tolist()}")
    if scores.shape != (len(shares), len(level)):
        raise ValueError(f"steered must be [fractions, seeds] = {(len(shares), len(level))}, got {scores.shape}")
    _finite(steered=scores, unsteered=level)

    def meeting(chosen: NDArray[np.int64]) -> float:
        found = crossing(shares, level[chosen].mean() - scores[:, chosen].mean(1))
        return np.inf if found is None else found

    value = meeting(np.arange(len(level)))
    draws = np.array([meeting(chosen) for chosen in _resampled(len(level), replicates, seed)])
    low, high = np.quantile(draws, _ENDS, method="inverted_cdf")
    note = "at most" if value == shares[0] else "more than all" if np.isinf(value) else ""
    below, beyond = float((draws == shares[0]).mean()), float(np.isinf(draws).mean())
    return DataSaved(Interval(value, float(low), float(high)), note, below, beyond)


def power_law_fit(
    compute: ArrayLike, error: ArrayLike, rule: Rule = "best-of-bins", *, replicates: int = REPLICATES, seed: int = 0
) -> PowerLaw:
    """Fit ``E = b C^a`` by least squares of logarithms, to errors that are means over seeds.

    "best-of-bins": compute is cut into five bins of equal length in its logarithm, of which each that has points gives
    the one of lowest error (Cherti et al., 2023, arXiv:2212.07143, of LAION); "all": every configuration is a point.

    Parameters
    ----------
    compute : array ``[k]``
        Operations of each configuration.
    error : array ``[k, seeds]``
        Errors, in (0, 1], with the same seeds in every row.

    Raises
    ------
    ValueError
        If a number is not positive, or fewer than two points of different compute are left.
    """
    compute, error, chosen = _configurations(compute, error, rule)
    points = chosen(compute, error.mean(1))
    intercept, exponent = _line(points)
    draws = np.array([
        _line(chosen(compute, error[:, seeds].mean(1))) for seeds in _resampled(error.shape[1], replicates, seed)
    ])  # fmt: skip
    (low_b, low_a), (high_b, high_a) = np.quantile(draws, _ENDS, axis=0)
    return PowerLaw(
        Interval(exponent, float(low_a), float(high_a)),
        Interval(float(np.exp(intercept)), float(np.exp(low_b)), float(np.exp(high_b))),
        draws,
        points,
    )


def compare_exponents(a: PowerLaw, b: PowerLaw) -> ExponentComparison:
    """Compare two fits whose bootstraps drew the same seeds: those of equally many, with equal ``seed``."""
    if len(a.draws) != len(b.draws):
        raise ValueError(f"both fits must have as many draws, got {len(a.draws)} and {len(b.draws)}")
    difference = a.draws[:, 1] - b.draws[:, 1]
    low, high = np.quantile(difference, _ENDS)
    mean = a.exponent.mean - b.exponent.mean
    return ExponentComparison(Interval(mean, float(low), float(high)), float((difference < 0).mean()))


def _configurations(compute: ArrayLike, error: ArrayLike, rule: Rule) -> tuple[Array, Array, Callable[..., Array]]:
    compute, error = np.asarray(compute, float), np.asarray(error, float)
    if error.ndim != 2 or compute.shape != error.shape[:1]:
        raise ValueError(f"error must be [configurations, seeds] for compute {compute.shape}, got {error.shape}")
    for name, values in (("compute", compute), ("error", error)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name} must be positive, as its logarithm is fitted, got {values.min()}")
    if rule not in ("best-of-bins", "all"):
        raise ValueError(f"rule must be 'best-of-bins' or 'all', got {rule!r}")
    chosen = _best_of_bins if rule == "best-of-bins" else _all
    if len(np.unique(chosen(compute, error.mean(1))[:, 0])) < 2:
        raise ValueError(f"compute must differ among the points that are fitted, got {np.unique(compute).tolist()}")
    return compute, error, chosen


def _all(compute: Array, error: Array) -> Array:
    return np.stack([compute, error], axis=1)


def _best_of_bins(compute: Array, error: Array) -> Array:
    edges = np.geomspace(compute.min(), compute.max(), BINS + 1)
    place = np.searchsorted(edges[1:-1], compute, side="right")
    best = [np.flatnonzero(place == k)[error[place == k].argmin()] for k in np.unique(place)]
    return _all(compute[best], error[best])


def _line(points: Array) -> tuple[float, float]:
    """Return intercept and slope of the least squares line of logarithms."""
    x, y = np.log(points).T
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(y.mean() - slope * x.mean()), float(slope)


def _resampled(seeds: int, replicates: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(seeds, size=(replicates, seeds))


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"a and b must be scores of the same seeds, at least 2, got shapes {a.shape} and {b.shape}")
    _finite(a=a, b=b)
    return a, b


def _finite(**arrays: Array) -> None:
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}")
