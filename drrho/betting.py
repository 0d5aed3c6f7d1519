"""Bounds on the mean of bounded losses by betting: for a fixed number of samples, and valid at all times at once.

To test that the mean of losses ``x`` in [0, 1] is at least m, start with capital 1 and bet that the next loss is below
m: the capital is multiplied by ``1 + lambda_t (m - x_t)``. The bet ``lambda_t >= 0`` may depend on earlier losses only,
and is at most ``1 / (1 - m)``, so that the capital stays positive. If the mean is at least m, the capital W_t(m) is a
nonnegative supermartingale, and by Ville's inequality ``P(max_t W_t(m) >= 1 / delta) <= delta`` (Waudby-Smith & Ramdas
2024). So with probability 1 - delta the mean is below every m at which the capital reached 1 / delta.

Here lambda_t is a function of earlier losses alone, cut off at ``0.95 / (1 - m)``. Every factor then increases with m,
so what is refuted is an interval, and its end is found by root finding. No part of this depends on how well lambda_t is
chosen; that only decides how sharp the bound is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from drrho.statements import Sample, Status, ValueRange, as_interval, as_probability, page_end
from drrho.validation import ArrayLike

__all__ = ["ConfidenceSequence", "Interval", "confidence_sequence", "mean_interval"]

Array = NDArray[np.float64]

_CUT = 0.95  # of the bet at which one loss can take all
_ENDS = 0.375  # losses at each end of the range that are added to the moments
_BLOCKS = 256  # over which a bet is constant
_BETS = 24  # constant bets of a mixture: enough for 2^44 losses
_WEIGHT = sum(1 / (k + 2) for k in range(_BETS))
_GUARD = 1e-9  # of the logarithm of the capital, above its rounding errors
_SMALLEST = 1e-300


class Interval(NamedTuple):
    """An interval that holds the mean, in units of the losses.

    Examples
    --------
    >>> from drrho.betting import mean_interval
    >>> interval = mean_interval([0.0, 1.0] * 100, value_range=(0, 1))
    >>> interval.low < 0.5 < interval.high, round(interval.high - interval.low, 2)
    (True, 0.16)
    """

    low: float
    high: float


def mean_interval(losses: ArrayLike, *, value_range: ValueRange, delta: float = 0.05, seed: int = 0) -> Interval:
    """Return an interval that holds the expected loss with probability >= 1 - delta, for this number of samples.

    Both ends are those of `capital_bound` at delta / 2. On Bernoulli losses the interval is on average 1.03 to 1.15
    times as wide as that of Clopper & Pearson, which knows that they are Bernoulli; on other losses it adapts to their
    variance.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``, n >= 2
        Independent losses of one law, of a model that was fixed without them.
    value_range : (low, high)
        The interval that holds all losses, known before seeing the sample.
    delta : float
        Probability of failure, in (0, 1).
    seed : int
        Key of the order in which the losses are bet on. They are shuffled, so that no order of theirs matters; another
        seed gives another interval, and choosing the best of several is not allowed.

    Raises
    ------
    ValueError
        For n < 2, losses outside value_range, a value_range that is a length, or delta outside of (0, 1).

    Examples
    --------
    >>> from drrho.betting import mean_interval
    >>> low, high = mean_interval([0.0, 1.0] * 100, value_range=(0, 1))
    >>> round(low, 2), round(high, 2)
    (0.41, 0.57)
    """
    sample = Sample.of(losses)
    low, high = as_interval(value_range, sample)
    units = shuffled_units(sample, low, high, seed)
    ends = capital_bound(np.stack([units, 1 - units]), math.log(2) - math.log(as_probability(delta)))
    return Interval(low + (high - low) * (1 - float(ends[1])), low + (high - low) * float(ends[0]))


@dataclass(frozen=True)
class ConfidenceSequence:
    """Intervals that hold the mean at all times at once with probability ``confidence``, in units of the losses.

    ``low[j]`` and ``high[j]`` are from the first ``times[j]`` losses; they may be looked at as often as wished, and
    sampling may stop when they say what is wanted.

    Examples
    --------
    >>> from drrho.betting import confidence_sequence
    >>> sequence = confidence_sequence([0.0, 1.0] * 200, value_range=(0, 1), times=[100, 400])
    >>> sequence.times, [round(end, 2) for end in sequence.low], [round(end, 2) for end in sequence.high]
    ((100, 400), [0.33, 0.41], [0.66, 0.59])
    >>> sequence.status.value
    'guarantee'
    """

    times: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    confidence: float
    assumptions: tuple[str, ...] = (
        "independent losses of one law, in the order in which they were drawn",
        "every loss lies in the declared interval, known in advance",
    )
    source: str = "mixture of constant bets; Waudby-Smith & Ramdas 2024, Orabona & Jun 2023"
    status: Status = Status.GUARANTEE

    def __str__(self) -> str:
        head = f"[{self.status.value}] the mean lies in all these intervals with probability >= {self.confidence:.6g}"
        columns = zip(self.times, self.low, self.high, strict=True)
        rows = [f"  {time:>12,} losses: {low:.6g} to {high:.6g}" for time, low, high in columns]
        return "\n".join([head, *rows, *page_end(self.assumptions, self.source)])


def confidence_sequence(
    losses: ArrayLike, *, value_range: ValueRange, delta: float = 0.05, times: Sequence[int] | None = None
) -> ConfidenceSequence:
    """Return intervals that hold the expected loss with probability >= 1 - delta at all times together.

    The capital is the mixture of those of the constant bets ``0.95 / 2^k / (1 - m)``, k = 0, 1, .. up to half the
    logarithm of the time, with weights in proportion to ``1 / (k + 2)``. The price of being valid at all times: on
    Bernoulli losses the intervals are 1.3 to 1.6 times as wide as that of Clopper & Pearson, which is valid for one
    number of samples only, and 1.2 to 1.5 times as wide as `mean_interval`.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses in the order in which they were drawn, which must not depend on their values.
    value_range, delta
        As for `mean_interval`.
    times : sequence of int
        Numbers of losses after which an interval is computed, in [1, n]; by default 1, 2, 4, .. and n. Every interval
        is intersected with those of earlier times.

    Raises
    ------
    ValueError
        As for `mean_interval`, or for times that are not increasing numbers in [1, n].

    Examples
    --------
    >>> from drrho.betting import confidence_sequence
    >>> sequence = confidence_sequence([0.0] * 50, value_range=(0, 1))  # stop whenever the upper end is low enough
    >>> next(time for time, high in zip(sequence.times, sequence.high) if high < 0.2)
    32
    """
    sample = Sample.of(losses)
    low, high = as_interval(value_range, sample)
    n, log_target = sample.n, math.log(2) - math.log(as_probability(delta))
    if times is None:
        times = [*(2**k for k in range((n - 1).bit_length())), n]
    times = tuple(map(operator.index, times))
    if not times or times[0] < 1 or times[-1] > n or any(a >= b for a, b in pairwise(times)):
        raise ValueError(f"times must be increasing numbers of losses in [1, {n}], got {times}")
    units = ((sample.losses.numpy() - low) / (high - low)).clip(0, 1)
    ends, both = np.ones((len(times), 2)), np.stack([units, 1 - units])
    guess = np.ones(2)
    for k, time in enumerate(times):
        guess = np.minimum(guess, _mixture_bound(both[:, :time], log_target, guess))
        ends[k] = guess
    return ConfidenceSequence(
        times=times,
        low=tuple((low + (high - low) * (1 - ends[:, 1])).tolist()),
        high=tuple((low + (high - low) * ends[:, 0]).tolist()),
        confidence=1 - delta,
    )


def _mixture_bound(units: Array, log_target: float, guess: Array) -> Array:
    """Return the least m at which the mixture of constant bets reached the target after these losses, by rows."""
    time = units.shape[1]
    k = np.arange(2 + time.bit_length() // 2)
    log_weights = -np.log(k + 2.0) - math.log(_WEIGHT)
    starts = np.arange(min(time, _BLOCKS)) * time // min(time, _BLOCKS)  # of blocks after which the capital is seen

    def reached(m: Array) -> Array:
        unit_bets = _CUT / (1 - m[:, None] + _SMALLEST)
        grown = (np.log1p(0.5**power * unit_bets * (m[:, None] - units)) for power in k)
        capitals = np.stack([np.add.reduceat(part, starts, axis=1).cumsum(1) for part in grown])
        mixed = np.logaddexp.reduce(capitals + log_weights[:, None, None])
        return mixed.max(1) - log_target - _GUARD

    return _crossing(reached, guess, abs(guess - units.mean(1)) + 1e-9)


def shuffled_units(sample: Sample, low: float, high: float, seed: int) -> Array:
    """Return the losses in units of their range, as numbers in [0, 1], in an order that depends on the seed only."""
    units = ((sample.losses.numpy() - low) / (high - low)).clip(0, 1)
    return np.random.default_rng(seed).permutation(units)


def capital_bound(units: Array, log_target: float) -> Array:
    """Return upper bounds on the means of rows of numbers in [0, 1], each with probability >= 1 - exp(-log_target).

    The bets aim at the target at the end: they replicate an option that pays the target if the sum of the losses stays
    below a threshold, priced for losses of two values that have the mean m and the other moments of the losses so far.
    For Bernoulli losses and known parameters this is the most powerful test. For many losses of any law it becomes the
    z-test, where bets that do not look at the capital reached so far need 2.2 times the samples (delta = 0.05). Voracek
    & Orabona (2025) recalculate bets in this way for sub-Gaussian losses.

    Parameters
    ----------
    units : array, ``[rows, n]``
        Rows of numbers in [0, 1], in the order in which they are bet on.
    log_target : float
        ``log(1 / delta)``.
    """
    n = units.shape[1]
    blocks = min(n, _BLOCKS)
    edges = np.unique(np.rint(n * np.sin(np.pi / 2 * np.arange(blocks + 1) / blocks) ** 2).astype(int))
    if n <= _BLOCKS:
        edges = np.arange(n + 1)
    bets = np.empty((len(units), len(edges) - 1))
    sums, capital, target = np.zeros((3, len(units))), _Capital.at_start(len(units)), np.ones(len(units))
    for k, (start, end) in enumerate(pairwise(edges)):
        bets[:, k], target = _replicating_bets(sums, start, n, capital, log_target)
        part = units[:, start:end]
        sums += np.stack([part.sum(1), (part**2).sum(1), (part**3).sum(1)])
        if end >= 1.5 * capital.exact_at or end - start == 1:
            capital = _Capital.of(units[:, :end], np.repeat(bets[:, : k + 1], np.diff(edges[: k + 2]), 1), target)
        else:
            capital = capital.moved(target, _Capital.of(part, bets[:, k : k + 1], target))
    return _refuted_from(units, np.repeat(bets, np.diff(edges), axis=1), log_target, target)


class _Capital(NamedTuple):
    """The logarithm of the capital as a function of m: value and two derivatives at ``center``, by row."""

    center: Array
    value: Array
    slope: Array
    curvature: Array
    exact_at: int  # the number of losses at which the expansion was last computed from all of them

    @staticmethod
    def at_start(rows: int) -> _Capital:
        zeros = np.zeros(rows)
        return _Capital(zeros + 0.5, zeros, zeros, zeros, 0)

    @staticmethod
    def of(units: Array, bets: Array, center: Array) -> _Capital:
        """Expand the capital after these losses and bets ``[rows, n]`` (or one bet for all) at ``center``."""
        cut = np.minimum(bets, _CUT / (1 - center[:, None] + _SMALLEST))
        factors = 1 + cut * (center[:, None] - units)
        pulls = cut / factors
        return _Capital(center, np.log(factors).sum(1), pulls.sum(1), -(pulls**2).sum(1), units.shape[1])

    def moved(self, center: Array, block: _Capital) -> _Capital:
        """Return the expansion at another center and after one more block of losses."""
        step = center - self.center
        value = self.value + self.slope * step + self.curvature * step**2 / 2 + block.value
        slope = self.slope + self.curvature * step + block.slope
        return _Capital(center, value, slope, self.curvature + block.curvature, self.exact_at)

    def log_at(self, m: Array) -> Array:
        """Return the parabola, and its maximum from there on."""
        furthest = np.where(self.curvature < 0, -self.slope / np.minimum(self.curvature, -_SMALLEST), np.inf)
        step = np.minimum(m - self.center, furthest)
        return self.value + self.slope * step + self.curvature * step**2 / 2


def _replicating_bets(sums: Array, seen: int, n: int, capital: _Capital, log_target: float) -> tuple[Array, Array]:
    """Return the bets on the next losses, and the m at which they aim: the bound if things go on as before.

    The law of two values has a share q of the upper one and a distance ``width`` between them. With ``left`` losses to
    come, of which a share q will be upper ones, the capital that is needed now is the target times the probability
    under m that there are no more. The moments include 3/8 of a loss at each end of the range.
    """
    first, second, third = (sums + _ENDS) / (seen + 2 * _ENDS)
    variance = np.maximum(second - first**2, 1e-12)
    skewness = (third - 3 * first * second + 2 * first**3) / variance**1.5
    share = ((1 - skewness / np.sqrt(skewness**2 + 4)) / 2).clip(1e-9, 1 - 1e-9)
    width = np.sqrt(variance / (share * (1 - share)))
    left = n - seen
    upper = left * share

    def shortfall(m: Array) -> tuple[Array, Array, Array]:
        under = (share + (m - first) / width).clip(1e-12, 1 - 1e-12)
        log_price = np.log(special.betainc(left - upper, upper + 1, 1 - under) + _SMALLEST)
        return log_price - (capital.log_at(m) - log_target), under, log_price

    low, high = first, np.ones_like(first)
    for _ in range(10 + n.bit_length() // 2):  # to within a thousandth of the width that an interval has
        middle = (low + high) / 2
        short = shortfall(middle)[0] > 0
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    _, under, log_price = shortfall(high)
    log_mass = special.gammaln(left) - special.gammaln(upper + 1) - special.gammaln(left - upper)
    log_mass = log_mass + upper * np.log(under) + (left - 1 - upper) * np.log1p(-under)
    return np.exp(np.minimum(log_mass - log_price, 600)) / width, high


def _refuted_from(units: Array, bets: Array, log_target: float, guess: Array) -> Array:
    """Return the least m at which the capital reached the target at some time, by rows."""

    def reached(m: Array) -> Array:
        cut = np.minimum(bets, _CUT / (1 - m[:, None] + _SMALLEST))
        return np.log1p(cut * (m[:, None] - units)).cumsum(1).max(1) - log_target - _GUARD

    return _crossing(reached, guess, abs(guess - units.mean(1)) + 1e-9)


def _crossing(reached: Callable[[Array], Array], guess: Array, spread: Array) -> Array:
    """Return where an increasing function of m in [0, 1] becomes nonnegative, from above; 1 where it never does.

    It is evaluated at what is returned, and within 1e-5 ``spread`` below it is negative.
    """
    low, high, reach = guess, guess, spread / 64
    at_low = at_high = reached(guess)
    while np.any(((at_low >= 0) & (low > 0)) | ((at_high < 0) & (high < 1))):
        low, high = (
            np.where(at_low >= 0, (low - reach).clip(0), low),
            np.where(at_high < 0, (high + reach).clip(0, 1), high),
        )
        at_low, at_high, reach = reached(low), reached(high), 4 * reach
    was_above = np.zeros(guess.shape, dtype=bool)
    for step in range(60):  # regula falsi by the rule of Illinois, and bisection where it is slow
        done = (at_high < 0) | (at_low >= 0) | (high - low <= 1e-5 * spread)
        if done.all():
            break
        with np.errstate(invalid="ignore"):
            secant = high - at_high * (high - low) / (at_high - at_low)
        middle = np.where(done, high, secant if step < 30 else (low + high) / 2)
        value = reached(middle)
        above = value >= 0
        at_low = np.where(above, np.where(was_above, at_low / 2, at_low), value)
        at_high = np.where(above, value, np.where(was_above, at_high, at_high / 2))
        low, high, was_above = np.where(above, low, middle), np.where(above, middle, high), above
    return np.where(at_high < 0, 1.0, high)
