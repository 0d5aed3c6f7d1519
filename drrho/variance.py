"""How much a reference model reduces the variance of the losses: mergeable moments, and a report with intervals.

For losses l and reference losses r of the same samples, the excess loss d = l - r has the variance
``V(d) = V(l) + V(r) - 2 Cov(l, r)``: below V(l) exactly when the correlation exceeds ``sd(r) / (2 sd(l))``. Variances
are unbiased, 1 / (n - 1).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from scipy import special
from torch import Tensor

from drrho.validation import as_losses

_CHUNK = 1 << 15  # samples, a multiple of 4 (see _poisson)
_NO_SPREAD = -1100  # the exponent of a channel whose values are all equal: below that of every float
_LARGEST = 2.0**1021  # differences of differences of such losses are still finite
_EPS = 2.0**-52

_State = TypeVar("_State", bound="_CentralSums")


@dataclass(frozen=True, eq=False)
class _CentralSums:
    """Sums over samples of all products, up to the fourth order that merging and the delta method need, of k channels.

    Deviations from the mean are counted in units of ``2**exponents``, so that fourth powers neither overflow nor
    vanish. ``gram`` is the Gram matrix of (1, the k deviations, their products over ``pairs``); moving the center maps
    this vector linearly, which makes a merge exact. ``means + remainders`` is the center to twice the precision, since
    rounding the mean of losses near 1e8 would cost a merge eight digits.
    """

    count: int
    means: np.ndarray  # [k], as remainders, exponents, minima, maxima
    remainders: np.ndarray
    exponents: np.ndarray
    gram: np.ndarray  # [1 + k + pairs, the same]
    minima: np.ndarray
    maxima: np.ndarray
    ties: np.ndarray  # [2, k]: how many samples attain the minimum and the maximum

    pairs: ClassVar[tuple[tuple[int, int], ...]]

    @classmethod
    def of(cls: type[_State], values: np.ndarray) -> _State:
        """Return the sums over one block of values ``[k, m]``."""
        origin = values[:, :1]
        shifted = values - origin
        exponents = _exponents(np.abs(shifted).max(1))
        units = np.ldexp(shifted, -exponents[:, None])
        center = units.mean(1, keepdims=True)
        units -= center
        correction = units.mean(1, keepdims=True)
        monomials = _monomials(units - correction, cls.pairs)
        means, remainders = _two_sum(origin[:, 0], np.ldexp((center + correction)[:, 0], exponents))
        low, high = values.min(1), values.max(1)
        ties = np.stack([(values == low[:, None]).sum(1), (values == high[:, None]).sum(1)])
        return cls(values.shape[1], means, remainders, exponents, monomials @ monomials.T, low, high, ties)

    @classmethod
    def empty(cls: type[_State]) -> _State:
        """Return the state of no samples, the identity of :func:`merge`."""
        k = 1 + max(max(pair) for pair in cls.pairs)
        size = 1 + k + len(cls.pairs)
        zeros, lowest = np.zeros(k), np.full(k, _NO_SPREAD)
        ties = np.zeros((2, k), dtype=int)
        return cls(0, zeros, zeros, lowest, np.zeros((size, size)), np.full(k, np.inf), np.full(k, -np.inf), ties)

    def seconds(self, exponents: np.ndarray) -> np.ndarray:
        """Return the sums of the products over ``pairs``, in units of the given exponents."""
        a, b = np.array(self.pairs).T
        finer = self.exponents - exponents
        return np.ldexp(self.gram[0, 1 + len(finer) :], finer[a] + finer[b])


class Moments(_CentralSums):
    """Moments of one row of losses: mean, central sums, extremes and how often they are attained.

    Make one with :func:`moments`, join two with :func:`merge`.
    """

    pairs = ((0, 0),)

    @property
    def mean(self) -> float:
        """The mean; NaN without samples."""
        return float(self.means[0]) if self.count else np.nan

    @property
    def m2(self) -> float:
        """``sum (x - mean)^2``, as m3 and m4 in the units of the losses, where it may overflow."""
        return self._central_sum(2)

    @property
    def m3(self) -> float:
        """``sum (x - mean)^3``."""
        return self._central_sum(3)

    @property
    def m4(self) -> float:
        """``sum (x - mean)^4``."""
        return self._central_sum(4)

    @property
    def minimum(self) -> float:
        """The smallest loss; inf without samples."""
        return float(self.minima[0])

    @property
    def maximum(self) -> float:
        """The largest loss; -inf without samples."""
        return float(self.maxima[0])

    @property
    def ties_at_minimum(self) -> int:
        """The number of samples that attain the minimum."""
        return int(self.ties[0, 0])

    @property
    def ties_at_maximum(self) -> int:
        """The number of samples that attain the maximum."""
        return int(self.ties[1, 0])

    @property
    def variance(self) -> float:
        """The unbiased variance, ``m2 / (n - 1)``; NaN for n < 2."""
        return self.m2 / (self.count - 1) if self.count > 1 else np.nan

    @property
    def population_variance(self) -> float:
        """``m2 / n``, the variance in the formulas of the chi-square risk; NaN without samples."""
        return self.m2 / self.count if self.count else np.nan

    @property
    def skewness(self) -> float:
        """``mean (x - mean)^3 / s^3`` with the population variance s^2; NaN when all losses are equal."""
        return self._standardized(3)

    @property
    def kurtosis(self) -> float:
        """``mean (x - mean)^4 / s^4`` with the population variance s^2, 3 for normal losses; NaN when all are equal."""
        return self._standardized(4)

    def _central_sum(self, order: int) -> float:
        with np.errstate(over="ignore"):
            return float(np.ldexp(self.gram[order // 2, order - order // 2], order * self.exponents[0]))

    def _standardized(self, order: int) -> float:
        if self.count == 0 or self.minimum == self.maximum:
            return np.nan
        sums = self.gram / self.count
        return float(sums[order // 2, order - order // 2] / sums[1, 1] ** (order / 2))


class PairedMoments(_CentralSums):
    """Joint moments of losses, reference losses and excess losses on the same samples.

    The excess is a channel of its own: where the reference is close, V(l) + V(r) - 2 Cov(l, r) cancels. Make one with
    :func:`paired_moments`, join two with :func:`merge`, or all ranks' with :func:`gather`.
    """

    pairs = ((0, 0), (1, 1), (2, 2), (0, 1))

    @property
    def losses(self) -> Moments:
        """Moments of the losses."""
        return self._channel(0)

    @property
    def reference(self) -> Moments:
        """Moments of the reference losses."""
        return self._channel(1)

    @property
    def excess(self) -> Moments:
        """Moments of losses minus reference losses."""
        return self._channel(2)

    @property
    def cross(self) -> float:
        """``sum (l - mean) (r - mean)``; over n - 1 it is the covariance."""
        return float(np.ldexp(self.gram[1, 2], self.exponents[0] + self.exponents[1]))

    def variance_reduction(self, confidence: float = 0.95) -> VarianceReduction:
        """Return the report of :func:`variance_reduction` with intervals by the delta method, from the moments alone.

        The covariance matrix of (l - mean)^2, (r - mean)^2, (d - mean)^2 and (l - mean)(r - mean) gives every
        standard error. It is known to 2^-52 of its own size, so that one below 1e-7 of the scale of its terms, as at
        a correlation within 1e-7 of one, is reported as 0.

        Raises
        ------
        ValueError
            If there are fewer than two samples, or ``confidence`` is not in (0, 1).
        """
        _check_confidence(confidence)
        _check_count(self.count)
        products, (v_l, v_r, v_d, c) = self.gram[4:, 4:] / self.count, self.gram[0, 4:] / self.count
        squared = np.outer(self.gram[0, 4:], self.gram[0, 4:]) / self.count**2
        with np.errstate(all="ignore"):
            correlation = c / np.sqrt(v_l * v_r)
            jacobian = np.array([
                [1, 0, 0, 0],
                [0, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 0, 1],
                [-correlation / (2 * v_l), -correlation / (2 * v_r), 0, 1 / np.sqrt(v_l * v_r)],
                [-v_d / v_l**2, 0, 1 / v_l, 0],
                [0, -c / v_r**2, 0, 1 / v_r],
            ])  # fmt: skip
            square = np.einsum("ka,ab,kb->k", jacobian, products - squared, jacobian)
            size = np.einsum("ka,ab,kb->k", abs(jacobian), abs(products) + abs(squared), abs(jacobian))
            errors = np.sqrt(np.where(square < 64 * _EPS * size, 0.0, square) / self.count)
            values = _statistics(self.seconds(self.exponents) / (self.count - 1))
            slopes = np.array([*1 / values[:3], 1.0, 1 / (1 - values[4] ** 2), 1 / values[5], 1.0])
            bounds = _symmetric(values, special.ndtri((1 + confidence) / 2) * errors * slopes)
        return _report(self, confidence, "delta", errors, bounds)

    def _channel(self, k: int) -> Moments:
        rows = [0, 1 + k, 4 + k]
        fields = (self.means, self.remainders, self.exponents, self.minima, self.maxima)
        mean, remainder, exponent, low, high = (field[k : k + 1] for field in fields)
        gram, ties = self.gram[np.ix_(rows, rows)], self.ties[:, k : k + 1]
        return Moments(self.count, mean, remainder, exponent, gram, low, high, ties)


def moments(losses: Any) -> Moments:
    """Return the moments of ``losses``, accumulated in float64 and in chunks.

    Parameters
    ----------
    losses : tensor, array or sequence of any shape
        Every entry is a sample. Where there are none, take ``Moments.empty()``.

    Raises
    ------
    ValueError
        If there is no entry, or one is NaN, infinite or above 2^1021.
    TypeError
        For integer tensors.
    """
    row = _row(losses, "losses")
    return reduce(merge, (Moments.of(_block(part)[None]) for part in row.split(_CHUNK)))


def paired_moments(losses: Any, reference_losses: Any) -> PairedMoments:
    """Return the joint moments of two models' losses on the same samples, in the same order.

    Parameters
    ----------
    losses, reference_losses : tensors, arrays or sequences of one shape
        Every entry is a sample. Where there are none, take ``PairedMoments.empty()``.

    Raises
    ------
    ValueError
        If the shapes differ, there is no entry, or one is NaN, infinite or above 2^1021.
    TypeError
        For integer tensors.
    """
    target, reference = _rows(losses, reference_losses)
    parts = zip(target.split(_CHUNK), reference.split(_CHUNK), strict=True)
    return reduce(merge, (PairedMoments.of(_channels(l_part, r_part)) for l_part, r_part in parts))


def merge(a: _State, b: _State) -> _State:
    """Return the moments of the samples of ``a`` and of ``b`` together, exact but for rounding.

    Associative and commutative up to rounding; the empty state is the identity, bit for bit. Sums are moved to the
    common mean by the binomial theorem: Chan, Golub & LeVeque 1983, and Pebay 2008 for higher and cross orders.

    Raises
    ------
    TypeError
        If one is paired and the other is not.
    """
    if type(a) is not type(b):
        raise TypeError(f"moments of one kind can be merged, got {type(a).__name__} and {type(b).__name__}")
    if a.count == 0 or b.count == 0:
        return a if b.count == 0 else b
    count = a.count + b.count
    delta = (b.means - a.means) + (b.remainders - a.remainders)
    exponents = np.maximum(np.maximum(a.exponents, b.exponents), _exponents(abs(delta)))
    means, remainders = _two_sum(a.means, a.remainders + delta * (b.count / count))
    units = np.ldexp(delta, -exponents)
    gram = _moved(a, -units * (b.count / count), exponents) + _moved(b, units * (a.count / count), exponents)
    minima, maxima = np.minimum(a.minima, b.minima), np.maximum(a.maxima, b.maxima)
    ties = sum(state.ties * np.stack([state.minima == minima, state.maxima == maxima]) for state in (a, b))
    return type(a)(count, means, remainders, exponents, gram, minima, maxima, np.asarray(ties))


def gather(state: _State, group: Any = None) -> _State:
    """Return the moments of the samples of all ranks of ``group`` (default: the world), merged in the order of ranks.

    Every rank of the group calls this with its own state, be it ``empty()``, and has the same bits.
    """
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, state, group=group)
    return reduce(merge, states)


class Estimate(NamedTuple):
    """An estimate, its confidence interval and its standard error; what is undefined is NaN and ``reason`` says why."""

    value: float
    low: float
    high: float
    standard_error: float
    reason: str = ""


class PitmanMorgan(NamedTuple):
    """Two-sided test of V(l - l_ref) = V(l), which is Cov(2 l - l_ref, l_ref) = 0 (Pitman 1939, Morgan 1939).

    ``statistic`` is the t statistic of that correlation, positive where the reference reduces the variance. The
    p-value is exact for normal losses; skewed or heavy-tailed ones call for the interval of the ratio.
    """

    statistic: float
    p_value: float
    degrees_of_freedom: int
    reason: str = ""


@dataclass(frozen=True)
class VarianceReduction:
    """What a reference does to the variance of the losses, from :func:`variance_reduction`; ``print`` it or plot it.

    ``losses``, ``reference`` and ``excess`` are the variances of l, l_ref and l - l_ref; ``ratio`` is the one of the
    excess over that of the losses; ``coefficient`` is c* = Cov(l, l_ref) / V(l_ref), at which V(l - c l_ref) is
    least. ``interval`` names the method of the intervals.
    """

    n: int
    confidence: float
    interval: str
    losses: Estimate
    reference: Estimate
    excess: Estimate
    covariance: Estimate
    correlation: Estimate
    ratio: Estimate
    coefficient: Estimate
    pitman_morgan: PitmanMorgan

    def __str__(self) -> str:
        named = {
            "variance of the losses": self.losses,
            "variance of the reference losses": self.reference,
            "variance of the excess losses": self.excess,
            "covariance of losses and reference": self.covariance,
            "correlation": self.correlation,
            "variance ratio, excess / losses": self.ratio,
            "best coefficient of the reference": self.coefficient,
        }
        title = f"Variance reduction by the reference: {self.n} samples, {100 * self.confidence:.4g}% intervals"
        lines = [
            f"{title} ({self.interval})",
            f"{'':34} {'estimate':>11} {'std. error':>11} {'low':>11} {'high':>11}",
        ]
        for name, (value, low, high, error, _) in named.items():
            lines.append(f"{name:34} {value:11.4g} {error:11.3g} {low:11.4g} {high:11.4g}")
        test = self.pitman_morgan
        lines.append(
            f"Pitman-Morgan test of equal variances of excess and losses: t = {test.statistic:.4g}, "
            f"{test.degrees_of_freedom} degrees of freedom, two-sided p = {test.p_value:.3g}"
        )
        value, low, high = (f"{x - 1:+.1%}" for x in self.ratio[:3])
        lines.append(f"With the reference the variance changes by {value}, interval {low} to {high}.")
        reasons = [(name, estimate.reason) for name, estimate in named.items()] + [("Pitman-Morgan test", test.reason)]
        return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in reasons if reason)])

    def plot(self, ax: Any = None) -> Any:
        """Draw the three variances with intervals, and the ratio as title, on ``ax`` or new axes; return the axes."""
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots()
        shown = (self.losses, self.reference, self.excess)
        values, low, high = np.array([estimate[:3] for estimate in shown]).T
        ax.errorbar(range(3), values, yerr=np.stack([values - low, high - values]), fmt="o", capsize=6)
        ax.set_xticks(range(3), ["losses", "reference", "excess"])
        ax.set_xlim(-0.5, 2.5)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("losses of the model, of the reference, and their difference")
        ax.set_ylabel(f"variance, {100 * self.confidence:.4g}% interval ({self.interval})")
        value, low, high = self.ratio[:3]
        ax.set_title(f"variance ratio {value:.3g} [{low:.3g}, {high:.3g}], n = {self.n}")
        return ax


#: Intervals are symmetric on these scales of the seven estimates, in the order of the fields of VarianceReduction.
_SCALES = (np.log, np.log, np.log, np.positive, np.arctanh, np.log, np.positive)
_INVERSES = (np.exp, np.exp, np.exp, np.positive, np.tanh, np.exp, np.positive)
#: By channel without spread: what to call it, and the estimates that have no interval. The losses are last, to prevail.
_FLAT = {2: ("excess losses", [2, 5]), 1: ("reference losses", [1, 4, 6]), 0: ("losses", [0, 4, 5])}


def variance_reduction(
    losses: Any,
    reference_losses: Any,
    *,
    confidence: float = 0.95,
    interval: str = "auto",
    replicates: int = 2000,
    seed: int = 0,
) -> VarianceReduction:
    """Return variances of l, l_ref and l - l_ref, their ratio, correlation and best coefficient, with intervals.

    Parameters
    ----------
    losses, reference_losses : tensors, arrays or sequences of one shape
        Losses of the two models on the same samples, in the same order; every entry is a sample, n >= 2 of them.
    confidence : float
        Level of the two-sided intervals, in (0, 1).
    interval : {"auto", "jackknife", "delta", "bootstrap"}
        The jackknife (Efron & Stein 1981, with Tukey's t quantile), the delta method, or the BCa bootstrap (Efron
        1987) with Poisson(1) weights. "auto" is the jackknife for n < 500 and the delta method from there on. The
        first two are symmetric in the logarithm of variances and ratio and in atanh of the correlation; all are
        asymptotic, and too short for small or heavy-tailed samples.
    replicates, seed : int
        Number of bootstrap replicates, and the key of their weights: the weight of a sample depends on seed, replicate
        and the sample's position alone.

    Raises
    ------
    ValueError
        If shapes differ, n < 2, a loss is NaN, infinite or above 2^1021, or an option is outside of its range.
    TypeError
        For integer tensors, and options of a wrong type.

    Examples
    --------
    >>> report = variance_reduction([1.0, 2.0, 4.0, 5.0], [1.0, 3.0, 4.0, 6.0])
    >>> round(report.excess.value, 4), round(report.ratio.value, 4), report.interval
    (0.3333, 0.1, 'jackknife')
    """
    _check_confidence(confidence)
    if interval not in ("auto", "jackknife", "delta", "bootstrap"):
        raise ValueError(f"interval must be 'auto', 'jackknife', 'delta' or 'bootstrap', got {interval!r}")
    replicates = _integer(replicates, "replicates", 2, 2**32, "it is the number of bootstrap samples")
    seed = _integer(seed, "seed", 0, 2**64, "it is the key of the bootstrap weights")
    target, reference = _rows(losses, reference_losses)
    _check_count(target.numel())
    state = paired_moments(target, reference)
    if interval == "auto":
        interval = "jackknife" if state.count < 500 else "delta"
    if interval == "delta":
        return state.variance_reduction(confidence)
    if state.count < 3:
        return _report(state, confidence, interval, np.full(7, np.nan), np.full((7, 2), np.nan))
    values = _channels(target, reference)
    deviations = (values - state.means[:, None]) - state.remainders[:, None]
    monomials = _monomials(np.ldexp(deviations, -state.exponents[:, None]), state.pairs)
    left_out = _left_out(state, values, monomials)
    if interval == "jackknife":
        return _jackknife(state, left_out, confidence)
    return _bootstrap(state, left_out, _replicated(monomials, replicates, seed), confidence)


def _left_out(state: PairedMoments, values: np.ndarray, monomials: np.ndarray) -> np.ndarray:
    """Return the seven statistics without one sample, for every sample: ``[7, n]``, in the units of the state.

    Closed form ``S - n / (n - 1) x_i y_i`` for the central sums. It cancels where one sample makes up a sum; that can
    only be the farthest of a channel, whose remainder is summed afresh.
    """
    n = state.count
    second = state.seconds(state.exponents)[:, None] - n / (n - 1) * monomials[4:]
    for i in set(abs(monomials[1:4]).argmax(1).tolist()):
        second[:, i] = PairedMoments.of(np.delete(values, i, axis=1)).seconds(state.exponents)
    return _statistics(second / (n - 2))


def _jackknife(state: PairedMoments, left_out: np.ndarray, confidence: float) -> VarianceReduction:
    """Report with ``se^2 = (n - 1) / n sum (estimate without i - their mean)^2``, on each interval's own scale."""
    n = state.count
    quantile = special.stdtrit(n - 1, (1 + confidence) / 2)
    with np.errstate(all="ignore"):
        errors = np.sqrt(n - 1) * left_out.std(1)
        scaled = np.array([scale(row).std() for scale, row in zip(_SCALES, left_out, strict=True)])
        bounds = _symmetric(_statistics(state.seconds(state.exponents) / (n - 1)), quantile * np.sqrt(n - 1) * scaled)
    return _report(state, confidence, "jackknife", errors, bounds)


def _bootstrap(
    state: PairedMoments, left_out: np.ndarray, replicated: np.ndarray, confidence: float
) -> VarianceReduction:
    """Report with the bias-corrected and accelerated percentiles of the replicates (Efron 1987, section 2)."""
    values = _statistics(state.seconds(state.exponents) / (state.count - 1))
    errors, bounds, notes = np.full(7, np.nan), np.full((7, 2), np.nan), [""] * 7
    ends = special.ndtri([(1 - confidence) / 2, (1 + confidence) / 2])
    for k, (value, row, others) in enumerate(zip(values, replicated, left_out, strict=True)):
        kept = row[np.isfinite(row)]
        if len(kept) < len(row):
            notes[k] = f"undefined in {len(row) - len(kept)} of {len(row)} bootstrap samples, which are left out"
        if len(kept) == 0:
            continue
        pull = others.mean() - others
        size = (pull**2).sum() ** 1.5
        acceleration = (pull**3).sum() / (6 * size) if np.isfinite(size) and size > 0 else 0.0
        below = ((kept < value).sum() + (kept == value).sum() / 2) / len(kept)
        bias = special.ndtri(np.clip(below, 0.5 / len(kept), 1 - 0.5 / len(kept)))
        levels = special.ndtr(bias + (bias + ends) / (1 - acceleration * (bias + ends)))
        bounds[k], errors[k] = np.quantile(kept, levels), kept.std()
    return _report(state, confidence, "bootstrap", errors, bounds, notes)


def _replicated(monomials: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Return the seven statistics of every bootstrap sample, ``[7, replicates]``."""
    sums = np.zeros((replicates, len(monomials)))
    for start in range(0, monomials.shape[1], _CHUNK):
        part = monomials[:, start : start + _CHUNK]
        for replicate in range(replicates):
            sums[replicate] += part @ _poisson(seed, replicate, start, part.shape[1])
    count, means, second = sums[:, 0], sums[:, 1:4].T, sums[:, 4:].T
    with np.errstate(all="ignore"):
        central = second - means[[0, 1, 2, 0]] * means[[0, 1, 2, 1]] / count
        central[:3][central[:3] < 64 * _EPS * second[:3]] = 0.0  # all samples that were drawn are equal
        return _statistics(central / (count - 1))


def _poisson(seed: int, replicate: int, start: int, size: int) -> np.ndarray:
    """Return the Poisson(1) weights of samples ``start`` to ``start + size`` in one replicate.

    A function of (seed, replicate, sample) alone: Philox gives the four numbers of any step of its counter directly.
    """
    key = np.array([seed, replicate], dtype=np.uint64)
    uniform = (np.random.Philox(counter=start // 4, key=key).random_raw(size) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(special.pdtr(np.arange(18), 1), uniform, side="right").astype(np.float64)


def _statistics(second: np.ndarray) -> np.ndarray:
    """Return variances, covariance, correlation, ratio, coefficient ``[7, ...]`` from V(l), V(r), V(d), C."""
    v_l, v_r, v_d = second[:3].clip(min=0)
    c = second[3]
    with np.errstate(all="ignore"):
        correlation = c / np.sqrt(v_l * v_r)
        correlation = np.where(abs(correlation) > 1 - 32 * _EPS, np.sign(correlation), correlation)
        return np.stack([v_l, v_r, v_d, c, correlation, np.where(v_l > 0, v_d / v_l, np.nan), c / v_r])


def _symmetric(values: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return the bounds ``[7, 2]`` of intervals of half-width ``reach`` on the scale of each estimate."""
    centers = np.array([scale(value) for scale, value in zip(_SCALES, values, strict=True)])
    ends = np.stack([centers - reach, centers + reach], axis=1)
    return np.stack([inverse(pair) for inverse, pair in zip(_INVERSES, ends, strict=True)])


def _report(
    state: PairedMoments,
    confidence: float,
    interval: str,
    errors: np.ndarray,
    bounds: np.ndarray,
    notes: Sequence[str] = ("",) * 7,
) -> VarianceReduction:
    """Return all estimates in the units of the losses; where a variance is zero, with what is left of them."""
    n, (e_l, e_r, e_d) = state.count, state.exponents
    values = _statistics(state.seconds(state.exponents) / (n - 1))
    test = _pitman_morgan(state, values)
    notes, known = list(notes), np.ones(7, dtype=bool)
    if n < 3:
        notes, known[:] = [f"an interval needs n >= 3, got {n}"] * 7, False
    if abs(values[4]) == 1:
        notes[4], known[4] = "the losses are a linear function of the reference losses", False
    flat = state.minima == state.maxima
    for k, (name, concerned) in _FLAT.items():
        for row in concerned if flat[k] else ():
            notes[row], known[row] = f"the {name} are all equal", False
    bounds, errors = np.where(known[:, None], bounds, np.nan), np.where(known, errors, np.nan)
    units = np.array([2 * e_l, 2 * e_r, 2 * e_d, e_l + e_r, 0, 2 * (e_d - e_l), e_l - e_r])
    with np.errstate(all="ignore"):
        values, low, high, errors = np.ldexp([values, *bounds.T, errors], units)
    if flat[1] and not flat[0]:
        values[5] = low[5] = high[5] = 1.0
        errors[5], notes[5] = 0.0, "the reference losses are all equal, so it is 1 in every sample"
    missing = "without some sample it is undefined or at the end of its range, so there is no interval"
    notes = [note or ("" if np.isfinite(ends).all() else missing) for note, *ends in zip(notes, low, high, strict=True)]
    columns = (column.tolist() for column in (values, low, high, errors))
    estimates = [Estimate(*fields) for fields in zip(*columns, notes, strict=True)]
    return VarianceReduction(n, float(confidence), interval, *estimates, pitman_morgan=test)


def _pitman_morgan(state: PairedMoments, values: np.ndarray) -> PitmanMorgan:
    """Return the test of Cov(2 l - r, r) = 0 from the statistics.

    ``t = (corr - kappa / 2) sqrt((n - 2) / (1 - corr^2))``, kappa = sd r / sd l, needs no variance of 2 l - r.
    """
    n, correlation = state.count, values[4]
    with np.errstate(all="ignore"):
        kappa = np.ldexp(np.sqrt(values[1] / values[0]), state.exponents[1] - state.exponents[0])
        t = float((correlation - kappa / 2) * np.sqrt(n - 2) / np.sqrt(1 - correlation**2))
    reason = "" if n > 2 else f"the test needs n >= 3, got {n}"
    if n > 2 and np.isnan(t):
        reason = "the losses or the reference losses are all equal, or l_ref = 2 l"
    return PitmanMorgan(t, 2 * float(special.stdtr(n - 2, -abs(t))) if n > 2 else np.nan, n - 2, reason)


def _moved(state: _CentralSums, shift: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Return the Gram matrix after adding ``shift`` to the deviations, all in units of the given exponents."""
    k = len(shift)
    units = np.ldexp(1.0, state.exponents - exponents)
    map_ = np.eye(len(state.gram))
    map_[1 : 1 + k, 0] = shift
    for row, (a, b) in enumerate(state.pairs, start=1 + k):  # (x + s)(y + t) = xy + t x + s y + st
        map_[row, 0] = shift[a] * shift[b]
        map_[row, 1 + a] += shift[b]
        map_[row, 1 + b] += shift[a]
    map_ *= _monomials(units[:, None], state.pairs)[:, 0]
    return map_ @ state.gram @ map_.T


def _monomials(deviations: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Return one, the deviations ``[k, m]`` and their products over ``pairs``: ``[1 + k + pairs, m]``."""
    a, b = np.array(pairs).T
    return np.concatenate([np.ones_like(deviations[:1]), deviations, deviations[a] * deviations[b]])


def _exponents(size: np.ndarray) -> np.ndarray:
    """Return e with ``size <= 2**e``, by entry."""
    return np.where(size > 0, np.frexp(size)[1], _NO_SPREAD)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded sum and its rounding error (Knuth 1969)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _row(losses: Any, name: str) -> Tensor:
    row = as_losses(losses, name).detach().flatten()
    largest = row.abs().max().item()
    if largest > _LARGEST:
        raise ValueError(f"{name} must be at most 2^1021 in size, got {largest}: their differences overflow")
    return row


def _rows(losses: Any, reference_losses: Any) -> tuple[Tensor, Tensor]:
    target, reference = as_losses(losses, "losses"), as_losses(reference_losses, "reference_losses")
    if target.shape != reference.shape:
        raise ValueError(
            f"reference_losses must have the shape of losses, {list(target.shape)}, got {list(reference.shape)}"
        )
    return _row(target, "losses"), _row(reference, "reference_losses")


def _block(part: Tensor) -> np.ndarray:
    return part.to("cpu", torch.float64).numpy()


def _channels(target: Tensor, reference: Tensor) -> np.ndarray:
    first, second = _block(target), _block(reference)
    return np.stack([first, second, first - second])


def _check_confidence(confidence: Any) -> None:
    if not isinstance(confidence, Real):
        raise TypeError(f"confidence must be a number in (0, 1), got {confidence!r}: 0.95 gives 95% intervals")
    if not 0 < float(confidence) < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}: 0.95 gives 95% intervals")


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"losses must have at least 2 samples, got {count}: one has no variance")


def _integer(value: Any, name: str, low: int, end: int, meaning: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}: {meaning}") from None
    if not low <= number < end:
        raise ValueError(f"{name} must be in [{low}, {end}), got {number}: {meaning}")
    return number
