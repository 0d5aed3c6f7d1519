"""How much a reference model reduces the variance of the losses: a report with confidence intervals.

For losses l and reference losses r of the same samples, the excess loss d = l - r has the variance
``V(d) = V(l) + V(r) - 2 Cov(l, r)``, which is below V(l) exactly when the correlation exceeds ``sd(r) / (2 sd(l))``.
Variances are unbiased, with 1 / (n - 1).

What an interval of a variance can do is limited. If a share p of the samples is hard, a sample has none of them with
probability (1 - p)^n, and then no method can know of them: an interval that is right for the easy samples alone misses
the variance of all of them. Its coverage is therefore at most ``1 - (1 - p)^n (1 - a)``, where a is the probability
that it misses the variance of the easy samples, whatever the method (Bahadur & Savage 1956). So n >= 3 / p is needed,
the printed report names the p of its n, and an interval is refused where one sample carries the variance.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy as np
from scipy import special

from drrho.moments import CHUNK, PairedMoments, as_channels, as_pair, monomials_of, paired_moments, translation
from drrho.validation import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Estimate", "PitmanMorgan", "VarianceReduction", "stream_variance_reduction", "variance_reduction"]

_EPS = 2.0**-52
_POISSON = special.pdtr(np.arange(18), 1)
#: "auto" is "studentized" for these n: fewer have too many samples of one value, and for more the jackknife is as good.
_STUDENTIZED = range(10, 10_000)
#: Fewest samples that must carry a variance: sum(x^2)^2 / sum(x^4) of the deviations x from the mean.
_CARRIERS = 1.5


class Estimate(NamedTuple):
    """An estimate, its confidence interval and its standard error; ``reason`` says why numbers are NaN (undefined).

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.variance import variance_reduction
    >>> generator = np.random.default_rng(0)
    >>> reference = generator.exponential(size=500)
    >>> ratio = variance_reduction(reference + 0.5 * generator.normal(size=500), reference).ratio
    >>> ratio.low < ratio.value < ratio.high < 1
    True
    """

    value: float
    low: float
    high: float
    standard_error: float
    reason: str = ""


class PitmanMorgan(NamedTuple):
    """Two-sided test of V(l - l_ref) = V(l), which means Cov(2 l - l_ref, l_ref) = 0 (Pitman 1939, Morgan 1939).

    ``statistic`` is the t statistic of that correlation, positive where the reference reduces the variance. The
    p-value is exact for normal losses; for skewed or heavy-tailed losses use the interval of the ratio instead.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.variance import variance_reduction
    >>> generator = np.random.default_rng(0)
    >>> reference = generator.exponential(size=500)
    >>> test = variance_reduction(reference + 0.5 * generator.normal(size=500), reference).pitman_morgan
    >>> test.p_value < 1e-6, test.degrees_of_freedom
    (True, 498)
    """

    statistic: float
    p_value: float
    degrees_of_freedom: int
    reason: str = ""


@dataclass(frozen=True)
class VarianceReduction:
    """The report of :func:`variance_reduction`, to be printed or plotted.

    ``losses``, ``reference`` and ``excess`` are the variances of l, l_ref and l - l_ref; ``ratio`` is the variance of
    the excess divided by that of the losses; ``coefficient`` is c* = Cov(l, l_ref) / V(l_ref), which minimizes
    V(l - c l_ref). ``interval`` names the method of the intervals.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.variance import variance_reduction
    >>> generator = np.random.default_rng(0)
    >>> reference = generator.exponential(size=500)
    >>> report = variance_reduction(reference + 0.5 * generator.normal(size=500), reference)
    >>> round(report.ratio.value, 2), round(report.correlation.value, 2), round(report.coefficient.value, 2)
    (0.16, 0.92, 1.02)
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
        within = f"interval {low} to {high}" if np.isfinite(self.ratio.low) else "without an interval"
        lines.append(f"With the reference the variance changes by {value}, {within}.")
        unseen = -np.expm1(np.log1p(-self.confidence) / self.n)
        lines.append(f"Samples of a kind that is rarer than {unseen:.2g} of all may be missing here altogether.")
        reasons = [(name, estimate.reason) for name, estimate in named.items()] + [("Pitman-Morgan test", test.reason)]
        return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in reasons if reason)])

    def plot(self, ax: Axes | None = None) -> Axes:
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
#: By channel without spread: its name and the estimates that then have no interval. Later channels take precedence.
_FLAT = {2: ("excess losses", [2, 5]), 1: ("reference losses", [1, 4, 6]), 0: ("losses", [0, 4, 5])}


def variance_reduction(
    losses: ArrayLike,
    reference_losses: ArrayLike,
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
    interval : {"auto", "studentized", "jackknife", "delta", "bootstrap"}
        "studentized" has the half-width ``q se`` on the scale of the jackknife, with the jackknife's standard error and
        q the quantile of ``abs(t)`` over bootstrap samples, studentized by the delta method (Hall 1988). It is refused
        ("too few hard samples to tell") where one sample carries most of a variance. The others are the jackknife
        (Efron & Stein 1981, with Tukey's t quantile), the delta method, and the BCa bootstrap (Efron 1987), all three
        too short for skewed losses. Bootstraps have Poisson(1) weights; all but BCa are symmetric in the logarithm of
        variances and ratio and in atanh of the correlation. "auto" is "studentized" for 10 <= n < 10,000 and the
        jackknife otherwise. The coverage of the ratio's 95% intervals, over five families of losses and n >= 50, is
        .945 to .975 for "auto" (``experiments/benchmarks/results/coverage.md``).
    replicates, seed : int
        Number of bootstrap replicates, and the key of their weights: the weight of a sample depends on seed, replicate
        and the sample's position only.

    Raises
    ------
    ValueError
        If shapes differ, n < 2, a loss is NaN, infinite or above 2^1021, or an option is out of range.
    TypeError
        For integer tensors, and options of a wrong type.

    Examples
    --------
    >>> report = variance_reduction([1.0, 2.0, 4.0, 5.0], [1.0, 3.0, 4.0, 6.0])
    >>> round(report.excess.value, 4), round(report.ratio.value, 4), report.interval
    (0.3333, 0.1, 'jackknife')
    """
    _check_confidence(confidence)
    if interval not in ("auto", "studentized", "jackknife", "delta", "bootstrap"):
        methods = "'auto', 'studentized', 'jackknife', 'delta' or 'bootstrap'"
        raise ValueError(f"interval must be {methods}, got {interval!r}")
    replicates = _integer(replicates, "replicates", 2, 2**32, "it is the number of bootstrap samples")
    seed = _integer(seed, "seed", 0, 2**64, "it is the key of the bootstrap weights")
    target, reference = as_pair(losses, reference_losses)
    _check_count(target.numel())
    state = paired_moments(target, reference)
    if interval == "auto":
        interval = "studentized" if state.count in _STUDENTIZED else "jackknife"
    if interval == "delta":
        return stream_variance_reduction(state, confidence)
    if state.count < 3:
        return _report(state, confidence, interval, np.full(7, np.nan), np.full((7, 2), np.nan))
    values = as_channels(target, reference)
    deviations = (values - state.means[:, None]) - state.remainders[:, None]
    monomials = monomials_of(np.ldexp(deviations, -state.exponents[:, None]), state.pairs)
    left_out = _left_out(state, values, monomials)
    if interval == "jackknife":
        quantile = special.stdtrit(state.count - 1, (1 + confidence) / 2)
        return _jackknife(state, left_out, confidence, interval, np.full(7, quantile))
    if interval == "studentized":
        quantiles = _studentized_quantiles(state, _resampled_grams(monomials, replicates, seed), confidence)
        return _jackknife(state, left_out, confidence, interval, quantiles)
    return _bootstrap(state, left_out, _replicated(monomials, replicates, seed), confidence)


def stream_variance_reduction(state: PairedMoments, confidence: float = 0.95) -> VarianceReduction:
    """Return the report of :func:`variance_reduction` with intervals by the delta method, from the moments alone.

    The covariance matrix of (l - mean)^2, (r - mean)^2, (d - mean)^2 and (l - mean)(r - mean) gives every
    standard error. The matrix is accurate to 2^-52 relative to its entries, so a standard error below 1e-7 of the size
    of its terms, as for a correlation within 1e-7 of one, is reported as 0.

    Moments up to the fourth order allow no more than this method: leaving out or resampling needs the losses. Its
    95% intervals of the ratio are too short for skewed losses; measured coverage is .75 to .93 at n = 50, .90 to .95 at
    n = 1000. Where one sample carries most of a variance there is no interval.

    Raises
    ------
    ValueError
        If there are fewer than two samples, or ``confidence`` is not in (0, 1).

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.moments import merge, paired_moments
    >>> from drrho.variance import stream_variance_reduction
    >>> losses, reference = np.random.default_rng(0).exponential(size=(2, 1000))
    >>> state = merge(*(paired_moments(losses[part], reference[part]) for part in (slice(0, 400), slice(400, 1000))))
    >>> round(stream_variance_reduction(state).ratio.value, 2)  # an independent reference adds its own variance
    2.17
    """
    _check_confidence(confidence)
    _check_count(state.count)
    values = _statistics(state.seconds(state.exponents) / (state.count - 1))
    with np.errstate(all="ignore"):
        errors = _delta_errors(state.gram, state.count)
        bounds = _symmetric(values, special.ndtri((1 + confidence) / 2) * errors * _slopes(values))
    return _report(state, confidence, "delta", errors, bounds, _too_few(state))


def _delta_errors(gram: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """Return the standard errors of the seven statistics, ``[7, ...]``, from Gram matrices ``[..., 8, 8]``."""
    count = np.asarray(count)[..., None, None]
    products = gram[..., 4:, 4:] / count
    squared = gram[..., 0, 4:, None] * gram[..., 0, None, 4:] / count**2
    v_l, v_r, v_d, c = np.moveaxis(gram[..., 0, 4:] / count[..., 0], -1, 0)
    correlation = c / np.sqrt(v_l * v_r)
    jacobian = np.zeros((*v_l.shape, 7, 4))
    jacobian[..., :4, :] = np.eye(4)
    jacobian[..., 4, 0], jacobian[..., 4, 1] = -correlation / (2 * v_l), -correlation / (2 * v_r)
    jacobian[..., 4, 3] = 1 / np.sqrt(v_l * v_r)
    jacobian[..., 5, 0], jacobian[..., 5, 2] = -v_d / v_l**2, 1 / v_l
    jacobian[..., 6, 1], jacobian[..., 6, 3] = -c / v_r**2, 1 / v_r
    square = np.einsum("...ka,...ab,...kb->...k", jacobian, products - squared, jacobian)
    size = np.einsum("...ka,...ab,...kb->...k", abs(jacobian), abs(products) + abs(squared), abs(jacobian))
    errors = np.sqrt(np.where(square < 64 * _EPS * size, 0.0, square) / count[..., 0])
    return np.moveaxis(errors, -1, 0)


def _slopes(values: np.ndarray) -> np.ndarray:
    """Return the derivatives of the scales of the seven statistics ``[7, ...]``."""
    one = np.ones_like(values[0])
    return np.stack([*1 / values[:3], one, 1 / (1 - values[4] ** 2), 1 / values[5], one])


def _too_few(state: PairedMoments) -> list[str]:
    """Return, for each of the seven statistics, why the samples are too few to tell, or nothing."""
    notes = [""] * 7
    for k, (name, concerned) in _FLAT.items():
        fourth, second = state.gram[4 + k, 4 + k], state.gram[0, 4 + k]
        if fourth > 0 and second**2 < _CARRIERS * fourth:
            for row in concerned:
                notes[row] = f"too few hard samples to tell: one sample carries most of the variance of the {name}"
    return notes


def _left_out(state: PairedMoments, values: np.ndarray, monomials: np.ndarray) -> np.ndarray:
    """Return the seven statistics without one sample, for every sample: ``[7, n]``, in the units of the state.

    The central sums have the closed form ``S - n / (n - 1) x_i y_i``. It cancels where one sample makes up a sum, which
    can only be the farthest sample of a channel; the sums without that sample are computed again.
    """
    n = state.count
    second = state.seconds(state.exponents)[:, None] - n / (n - 1) * monomials[4:]
    for i in set(abs(monomials[1:4]).argmax(1).tolist()):
        second[:, i] = PairedMoments.of(np.delete(values, i, axis=1)).seconds(state.exponents)
    return _statistics(second / (n - 2))


def _jackknife(
    state: PairedMoments, left_out: np.ndarray, confidence: float, interval: str, quantiles: np.ndarray
) -> VarianceReduction:
    """Report with ``se^2 = (n - 1) / n sum (estimate without i - their mean)^2``, on the scale of each interval."""
    n = state.count
    notes = _too_few(state) if interval == "studentized" else [""] * 7
    unknown = "the interval is undefined in too many bootstrap samples: there are too few different samples"
    notes = [note or ("" if np.isfinite(q) else unknown) for note, q in zip(notes, quantiles, strict=True)]
    with np.errstate(all="ignore"):
        errors = np.sqrt(n - 1) * left_out.std(1)
        scaled = np.array([scale(row).std() for scale, row in zip(_SCALES, left_out, strict=True)])
        bounds = _symmetric(_statistics(state.seconds(state.exponents) / (n - 1)), quantiles * np.sqrt(n - 1) * scaled)
    return _report(state, confidence, interval, errors, bounds, notes)


def _studentized_quantiles(state: PairedMoments, grams: tuple[np.ndarray, np.ndarray], confidence: float) -> np.ndarray:
    """Return the quantiles of ``abs(t)`` of the seven statistics over bootstrap samples, infinite where undefined."""
    counts, central = grams
    values = _statistics(state.seconds(state.exponents) / state.count)
    with np.errstate(all="ignore"):
        replicated = _statistics(np.moveaxis(central[:, 0, 4:], -1, 0) / counts)
        errors = _delta_errors(central, counts) * _slopes(replicated)
        moves = [scale(row) - scale(value) for scale, row, value in zip(_SCALES, replicated, values, strict=True)]
        t = abs(np.stack(moves)) / errors
    return np.quantile(np.where(np.isfinite(t), t, np.inf), confidence, axis=1, method="higher")


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
    sums = _resampled(monomials, replicates, seed)
    count, means, second = sums[:, 0], sums[:, 1:4].T, sums[:, 4:].T
    with np.errstate(all="ignore"):
        central = second - means[[0, 1, 2, 0]] * means[[0, 1, 2, 1]] / count
        central[:3][central[:3] < 64 * _EPS * second[:3]] = 0.0  # all samples that were drawn are equal
        return _statistics(central / (count - 1))


def _resampled_grams(monomials: np.ndarray, replicates: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts and central Gram matrices ``[replicates, 8, 8]`` of every bootstrap sample."""
    first, second = np.triu_indices(len(monomials))
    sums = np.zeros((replicates, len(first)))
    for start in range(0, monomials.shape[1], CHUNK):
        part = monomials[:, start : start + CHUNK]
        sums += _resampled(part[first] * part[second], replicates, seed, start)
    grams = np.empty((replicates, len(monomials), len(monomials)))
    grams[:, first, second] = grams[:, second, first] = sums
    with np.errstate(all="ignore"):
        maps = translation(-grams[:, 0, 1:4] / grams[:, :1, 0], PairedMoments.pairs)
        central = maps @ grams @ np.swapaxes(maps, 1, 2)
    raw, spread = grams[:, 0, 4:7], central[:, 0, 4:7]
    spread[spread < 64 * _EPS * raw] = 0.0  # all samples that were drawn are equal
    return grams[:, 0, 0], central


def _resampled(rows: np.ndarray, replicates: int, seed: int, offset: int = 0) -> np.ndarray:
    """Return the sums of rows ``[k, n]`` over every bootstrap sample, ``[replicates, k]``; ``offset`` is the first."""
    sums, bits = np.zeros((replicates, len(rows))), np.random.Philox(0)
    for start in range(0, rows.shape[1], CHUNK):
        part = rows[:, start : start + CHUNK]
        for replicate in range(replicates):
            sums[replicate] += part @ _poisson(seed, replicate, offset + start, part.shape[1], bits)
    return sums


def _poisson(seed: int, replicate: int, start: int, size: int, bits: np.random.Philox | None = None) -> np.ndarray:
    """Return the Poisson(1) weights of samples ``start`` to ``start + size`` in one replicate.

    They depend on (seed, replicate, sample) only: Philox computes the four numbers of any counter value directly. A
    generator ``bits`` is set to this place, which is faster than a new one.
    """
    bits = np.random.Philox(0) if bits is None else bits
    state = bits.state
    state["state"]["counter"][:] = (start // 4, 0, 0, 0)
    state["state"]["key"][:] = (seed, replicate)
    state["buffer_pos"] = 4  # nothing is left of numbers that were computed before
    bits.state = state
    uniform = (bits.random_raw(size) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(_POISSON, uniform, side="right").astype(np.float64)


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
    """Return all estimates in the units of the losses; where a variance is zero, those that remain defined."""
    n, (e_l, e_r, e_d) = state.count, state.exponents
    values = _statistics(state.seconds(state.exponents) / (n - 1))
    test = _pitman_morgan(state, values)
    notes, known = list(notes), np.array([interval == "bootstrap" or not note for note in notes])
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

    ``t = (corr - kappa / 2) sqrt((n - 2) / (1 - corr^2))`` with kappa = sd r / sd l needs no variance of 2 l - r.
    """
    n, correlation = state.count, values[4]
    with np.errstate(all="ignore"):
        kappa = np.ldexp(np.sqrt(values[1] / values[0]), state.exponents[1] - state.exponents[0])
        t = float((correlation - kappa / 2) * np.sqrt(n - 2) / np.sqrt(1 - correlation**2))
    reason = "" if n > 2 else f"the test needs n >= 3, got {n}"
    if n > 2 and np.isnan(t):
        reason = "the losses or the reference losses are all equal, or l_ref = 2 l"
    return PitmanMorgan(t, 2 * float(special.stdtr(n - 2, -abs(t))) if n > 2 else np.nan, n - 2, reason)


def _check_confidence(confidence: float) -> None:
    if not isinstance(confidence, Real):
        raise TypeError(f"confidence must be a number in (0, 1), got {confidence!r}: 0.95 gives 95% intervals")
    if not 0 < float(confidence) < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}: 0.95 gives 95% intervals")


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"losses must have at least 2 samples, got {count}: one has no variance")


def _integer(value: SupportsIndex, name: str, low: int, end: int, meaning: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}: {meaning}") from None
    if not low <= number < end:
        raise ValueError(f"{name} must be in [{low}, {end}), got {number}: {meaning}")
    return number
