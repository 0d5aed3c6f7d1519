"""Upper bounds on a mean by several methods, and the choice among them; `drrho.bounds` has the notation."""

from __future__ import annotations

import math
from dataclasses import replace

from drrho.betting import capital_bound, shuffled_units
from drrho.statements import (
    Bound,
    Level,
    ModelClass,
    Sample,
    ValueRange,
    as_interval,
    guarantee,
    level,
    range_length,
)
from drrho.validation import ArrayLike

__all__ = ["mean_bound"]

METHODS = ("auto", "betting", "smaller", "bernstein", "hoeffding")

_SOURCES = {
    "betting": "betting for a fixed number of samples, derived here; Waudby-Smith & Ramdas 2024",
    "bernstein": "derived here, after Maurer & Pontil 2009",
    "hoeffding": "Hoeffding 1963",
}


def mean_bound(
    losses: ArrayLike,
    *,
    value_range: ValueRange,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
    method: str = "auto",
    seed: int = 0,
) -> Bound:
    """Bound the expected loss from above by the sharpest method that applies; the result's ``method`` says which.

    With probability >= 1 - delta, for all N models, with ``L = log(N / delta)``::

        R <= the m that betting refutes at level delta / N                       "betting"
        R <= the tight `drrho.bounds.empirical_bernstein`                        "bernstein"
        R <= mean + B sqrt(L / (2 n))                                            "hoeffding"
        R <= the smaller of the last two, each at delta / 2                      "smaller"

    Betting is nearly always the sharpest, by a factor of 1.2 to 5 of what is added to the mean, and at many samples it
    is the z-test at most 1.2 times over. It needs the interval of the losses, not only its length, and no cover: "auto"
    is betting if value_range is an interval and resolution is 0, and "smaller" otherwise. This choice does not look at
    the losses. Empirical Bernstein alone is worse than Hoeffding where the variance is close to B^2 / 4.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses, or excess losses, of the model in question.
    value_range : float or (low, high)
        The interval that holds all losses, known before seeing the sample, or its length B.
    delta, models, log_models, resolution
        As for `drrho.bounds.empirical_bernstein`.
    method : {"auto", "betting", "smaller", "bernstein", "hoeffding"}
        Fixed before seeing the sample.
    seed : int
        Key of the order of the bets, as for `drrho.betting.mean_interval`.

    Raises
    ------
    ValueError
        As for `drrho.bounds.empirical_bernstein`; for betting with a length or with a cover.

    Examples
    --------
    >>> from drrho.means import mean_bound
    >>> losses = [0.0, 1.0] * 500
    >>> for method in ("betting", "bernstein", "hoeffding"):
    ...     print(method, round(mean_bound(losses, value_range=(0, 1), method=method).value, 3))
    betting 0.525
    bernstein 0.548
    hoeffding 0.539
    """
    union = ModelClass.of(models, log_models, resolution)
    return bound_of(Sample.of(losses), value_range, delta, union, "R", method, seed)


def bound_of(
    sample: Sample, value_range: ValueRange, delta: float, union: ModelClass, what: str, method: str, seed: int
) -> Bound:
    """Return `mean_bound` for a checked sample and class."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    length = range_length(value_range, sample)
    if method == "auto":
        is_interval = isinstance(value_range, tuple | list)
        method = "betting" if is_interval and union.shift == 0 else "smaller"
    if method == "betting":
        if union.shift > 0:
            raise ValueError(f"resolution must be 0 for betting, got {union.resolution}: use method='smaller'")
        at = level(union.log_count, sample.n, delta)
        low, high = as_interval(value_range, sample)
        units = shuffled_units(sample, low, high, seed)
        value = low + length * float(capital_bound(units[None], at.log_term)[0])
        terms = {"mean": sample.mean, "betting": value - sample.mean}
        return _guaranteed(what, terms, at, sample, length, union, method)
    if method == "smaller":
        halves = [bound_of(sample, value_range, delta / 2, union, what, each, seed) for each in _SPLIT]
        best = min(halves, key=float)
        statement = f"{best.statement}; the smaller of two bounds, which hold together with probability 1 - {delta:.6g}"
        return replace(best, confidence=1 - delta, statement=statement)
    if method == "bernstein":
        at = level(math.log(2) + union.log_count, sample.n, delta)
        return _guaranteed(what, bernstein_terms(sample, length, at.log_term, union), at, sample, length, union, method)
    at = level(union.log_count, sample.n, delta)
    terms = {"mean": sample.mean, "B sqrt(L/(2 n))": length * math.sqrt(at.log_term / (2 * sample.n))}
    if union.shift > 0:
        terms["cover"] = 2 * union.shift
    return _guaranteed(what, terms, at, sample, length, union, method)


_SPLIT = ("bernstein", "hoeffding")


def _guaranteed(
    what: str, terms: dict[str, float], at: Level, sample: Sample, length: float, union: ModelClass, method: str
) -> Bound:
    return replace(guarantee(what, terms, at, sample, length, union, _SOURCES[method]), method=method)


def bernstein_terms(sample: Sample, length: float, log_term: float, union: ModelClass) -> dict[str, float]:
    """Return the terms of the tight empirical Bernstein bound."""
    n = sample.n
    sd = sample.sd * math.sqrt(n / (n - 1))
    half = length * math.sqrt(log_term / (n // 2)) / 2
    terms = {
        "mean": sample.mean,
        "(b/2 + sqrt(V + b^2/4)) sqrt(2 L/n)": (half + math.hypot(sd, half)) * math.sqrt(2 * log_term / n),
        "B L/(3 n)": length * log_term / (3 * n),
    }
    return with_cover(terms, n, log_term, union)


def with_cover(terms: dict[str, float], n: int, log_term: float, union: ModelClass) -> dict[str, float]:
    """Add what the distance to a cover costs: the mean and R move by it, sqrt(V) by sqrt(n / (n - 1)) times it."""
    if union.shift > 0:
        terms["cover"] = union.shift * (2 + math.sqrt(2 * log_term / (n - 1)))
    return terms
