"""Bounds on a mean from a sample: variance sandwich, scales of rho, empirical Bernstein and DRRho certificates.

Notation: n losses ``z_i`` (excess losses ``losses - reference_losses`` where there is a reference), their mean, ``s``
their standard deviation with 1/n, ``V = n s^2 / (n - 1)``, ``d = mean - min``, ``u = max - mean``; ``F_rho`` is the
chi-square risk with ``phi(t) = (t - 1)^2 / 2`` and radius ``rho / n``; N models; ``B`` the length of an interval,
known before seeing the sample, that contains every ``z``: 2M for excess losses when the losses lie in [0, M], 2b when
``abs(losses - reference_losses) <= b``, M without a reference. Bounds have the unit of the losses.

Every result states its `Status`, in the object and in its printed form. Functions of supplied population quantities
(oracle inequalities, sample sizes) are in `drrho.efficiency`.

The chi-square and the KL ball have a certificate here, and `drrho.robust_bounds` bounds the robust risk of the law for
every divergence. There is **no bound** for a learned temperature, contrastive or minibatch risks, or dependent samples:
the proofs are about independent samples of one law, and a class of models that a union bound or a cover can count.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from scipy.special import ndtri, stdtr

from drrho.divergences import KL, ChiSquare, Divergence
from drrho.means import bernstein_terms, bound_of, with_cover
from drrho.risk import constrained_risk
from drrho.statements import (
    Bound,
    ModelClass,
    Sample,
    Status,
    ValueRange,
    as_number,
    as_sample_size,
    compared,
    guarantee,
    level,
    range_length,
)
from drrho.validation import ArrayLike

__all__ = [
    "Improvement",
    "RhoScales",
    "Sandwich",
    "better_than_reference",
    "drrho_certificate",
    "empirical_bernstein",
    "lipschitz_cover_log",
    "mean_coverage",
    "rho_scales",
    "variance_sandwich",
]


def variance_sandwich(
    losses: ArrayLike, *, rho: float | None = None, radius: float | None = None, value_range: ValueRange | None = None
) -> Sandwich:
    """Bound the premium ``F_rho - mean`` of the chi-square risk from both sides by multiples of the standard deviation.

    With ``T = sqrt(2 radius)`` these bounds hold for every row of losses, with certainty::

        min(T s, s^2 / d)                   <=  F_rho - mean  <=  min(T s, u)
        max(T s - 2 M radius, 0)            <=  F_rho - mean  <=  T s             losses in an interval of length M

    The first line is derived here. Upper bound: ``D <= radius`` means ``norm(p - 1/n) <= T / sqrt(n)``; apply
    Cauchy-Schwarz. Lower bound: ``p_i = 1/n + e (z_i - mean)`` is feasible for ``e n s <= T`` and ``e n d <= 1`` and
    gains ``e n s^2``. It implies ``T s - d radius / 2``, a quarter of the slack of the second line (Duchi & Namkoong,
    arXiv 1610.02581, Theorem 1). The premium is concave in T, equal to ``T s`` up to ``T_pos = s / d`` and to u from
    ``T_max = sqrt(n / ties - 1)`` on, so it lies above the chord between these two points.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``
        Finite losses or excess losses.
    rho, radius : float
        Exactly one, >= 0: ``rho = n radius``.
    value_range : float or (low, high)
        M of the second line; by default the range of the sample.

    Raises
    ------
    ValueError
        For losses that are not one row, not exactly one of rho and radius, or losses outside value_range.

    Examples
    --------
    >>> from drrho.bounds import variance_sandwich
    >>> sandwich = variance_sandwich([0.0, 1.0, 2.0, 5.0], rho=2.0)
    >>> [round(value, 4) for value in (sandwich.lower, sandwich.premium, sandwich.upper)]
    [1.75, 1.8685, 1.8708]
    """
    sample = Sample.of(losses, fewest=1)
    if rho is not None and radius is None:
        radius = as_number(rho, "rho", "is n times the radius of the ball", inclusive=True) / sample.n
    elif radius is None or rho is not None:
        raise ValueError(f"give exactly one of rho (radius * n) and radius, got rho={rho} and radius={radius}")
    radius = as_number(radius, "radius", "bounds D_phi(p || 1/n)", inclusive=True)
    length = sample.high - sample.low if value_range is None else range_length(value_range, sample)

    sd, below, above = sample.sd, sample.below, sample.above
    t, t_max = math.sqrt(2 * radius), math.sqrt(sample.n / sample.ties - 1)
    exact = t * below <= sd
    full_gain = 0.0 if below == 0 else sd * (sd / below)
    if exact:
        chord = t * sd
    elif t >= t_max:
        chord = above
    else:
        t_pos = sd / below
        chord = full_gain + (t - t_pos) / (t_max - t_pos) * (above - full_gain)
    return Sandwich(
        mean=sample.mean,
        standard_deviation=sd,
        rho=radius * sample.n,
        premium=constrained_risk(sample.losses, ChiSquare(), radius).premium.item(),
        lower=min(t * sd, full_gain),
        upper=min(t * sd, above),
        chord=chord,
        lower_duchi_namkoong=max(t * sd - 2 * length * radius, 0.0),
        upper_duchi_namkoong=t * sd,
        exact=exact,
    )


@dataclass(frozen=True)
class Sandwich:
    """The premium ``F_rho - mean`` and its bounds, in units of loss; see `variance_sandwich`.

    ``chord`` is the sharpest lower bound. ``exact`` says whether ``rho <= rho_pos``: all worst-case weights are then
    positive, and the premium equals ``sqrt(2 rho / n) s``; otherwise it is strictly smaller.

    Examples
    --------
    >>> from drrho.bounds import variance_sandwich
    >>> sandwich = variance_sandwich([0.0, 1.0, 2.0, 5.0], rho=2.0)
    >>> sandwich.lower < sandwich.premium < sandwich.upper, sandwich.exact
    (True, False)
    """

    mean: float
    standard_deviation: float
    rho: float
    premium: float
    lower: float
    upper: float
    chord: float
    lower_duchi_namkoong: float
    upper_duchi_namkoong: float
    exact: bool
    status: Status = Status.GUARANTEE

    def __str__(self) -> str:
        relation = "equals" if self.exact else "is strictly below"
        return "\n".join(
            [
                f"[{self.status.value}] for these losses, no probability involved: rho = {self.rho:.6g}, "
                f"mean {self.mean:.6g}, standard deviation {self.standard_deviation:.6g}",
                f"  {self.lower_duchi_namkoong:>12.6g}  lower bound of Duchi & Namkoong",
                f"  {self.lower:>12.6g}  lower bound min(T s, s^2 / d)",
                f"  {self.chord:>12.6g}  lower bound by concavity",
                f"  {self.premium:>12.6g}  premium F_rho - mean, which {relation} T s, T = sqrt(2 rho / n)",
                f"  {self.upper:>12.6g}  upper bound min(T s, u)",
                f"  {self.upper_duchi_namkoong:>12.6g}  upper bound T s of Duchi & Namkoong",
                "  source: derived here; Duchi & Namkoong, arXiv 1610.02581, Theorem 1",
            ]
        )


def rho_scales(
    losses: ArrayLike,
    *,
    confidence: float = 0.95,
    models: int | None = None,
    log_models: float | None = None,
    delta: float = 0.05,
) -> RhoScales:
    """Return the four values of rho at which the meaning of ``F_rho`` changes.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses, or excess losses, of one model.
    confidence : float
        Coverage that ``rho_t`` aims at, in [0.5, 1).
    models, log_models, delta
        As for `empirical_bernstein`, for ``rho_0``.

    Raises
    ------
    ValueError
        For n < 2 or an argument outside its interval.

    Examples
    --------
    >>> from drrho.bounds import rho_scales
    >>> scales = rho_scales([0.0, 1.0, 1.0, 2.0] * 25, confidence=0.95, models=10)
    >>> [round(value, 3) for value in (scales.rho_t, scales.rho_0, scales.rho_pos, scales.rho_max)]
    [1.353, 6.052, 25.0, 150.0]
    """
    sample = Sample.of(losses)
    n = sample.n
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be in [0.5, 1), got {confidence}: one-sided coverage is Phi(sqrt(2 rho))")
    union = ModelClass.of(models, log_models)
    return RhoScales(
        rho_t=float(ndtri(confidence)) ** 2 / 2,
        rho_0=level(math.log(2) + union.log_count, n, delta).rho,
        rho_pos=math.inf if sample.below == 0 else n * (sample.sd / sample.below) ** 2 / 2,
        rho_max=n * (n / sample.ties - 1) / 2,
        n=n,
        confidence=confidence,
        delta=delta,
        union=union,
    )


@dataclass(frozen=True)
class RhoScales:
    """Four scales of rho for one row of losses.

    Attributes
    ----------
    rho_t : float
        ``z_confidence^2 / 2``: for rho at least this, F_rho asymptotically covers the mean with this confidence.
    rho_0 : float
        ``n log(2 N / delta) / (n - 1)``: for rho at least this, `drrho_certificate` holds with probability 1 - delta.
    rho_pos : float
        ``n s^2 / (2 d^2)``: up to this rho F_rho is exactly ``mean + s sqrt(2 rho / n)``; infinite for constant losses.
    rho_max : float
        ``n (n / ties - 1) / 2``: for rho at least this, F_rho is the maximum.

    Examples
    --------
    >>> from drrho.bounds import rho_scales
    >>> scales = rho_scales([0.0, 1.0, 1.0, 2.0] * 25)
    >>> round(scales.rho_t, 3), scales.n, scales.confidence  # the quantile of the normal law, halved and squared
    (1.353, 100, 0.95)
    """

    rho_t: float
    rho_0: float
    rho_pos: float
    rho_max: float
    n: int
    confidence: float
    delta: float
    union: ModelClass

    def describe(self, rho: float) -> str:
        """Describe the regime of rho: the form of F_rho and its coverage."""
        rho = as_number(rho, "rho", "is n times the radius of the ball", inclusive=True)
        if self.rho_max == 0:
            shape = "all losses are equal, F_rho is their mean at every rho"
        elif rho <= self.rho_pos:
            shape = "rho <= rho_pos, F_rho is exactly mean + s sqrt(2 rho / n)"
        elif rho < self.rho_max:
            shape = "rho_pos < rho < rho_max, low losses have lost their weight and F_rho < mean + s sqrt(2 rho / n)"
        else:
            shape = "rho >= rho_max, F_rho is the maximum"
        gaussian = f"[asymptotic] F_rho covers the mean with probability {float(mean_coverage(rho)):.6g}"
        implied = math.exp(min(math.log(2) + self.union.log_count - rho * (self.n - 1) / self.n, 0.0))
        if rho >= self.rho_0:
            finite = f"[guarantee] rho >= rho_0, certified with probability >= 1 - {self.delta:.6g}"
        elif implied < 1:
            finite = f"[guarantee] rho < rho_0, certified only with probability >= 1 - {implied:.6g}"
        else:
            finite = "[guarantee] none: rho is too small for any confidence"
        return f"rho = {rho:.6g}: {shape}; {gaussian}; {finite}"

    def __str__(self) -> str:
        return "\n".join(
            [
                f"scales of rho, n = {self.n}",
                f"  {self.rho_t:>12.6g}  rho_t    [asymptotic] coverage {self.confidence:.6g} of the mean from here on",
                f"  {self.rho_0:>12.6g}  rho_0    [guarantee] certificate with probability >= 1 - {self.delta:.6g} "
                f"from here on, {self.union.words}",
                f"  {self.rho_pos:>12.6g}  rho_pos  [guarantee] exactly mean + s sqrt(2 rho / n) up to here",
                f"  {self.rho_max:>12.6g}  rho_max  [guarantee] the maximum from here on",
            ]
        )


def mean_coverage(rho: float, *, n: int | None = None) -> Bound:
    """Return the one-sided coverage ``P(mean of the law <= F_rho) = Phi(sqrt(2 rho))`` in the limit of many samples.

    For ``rho <= rho_pos``, ``mean <= F_rho`` means that the t-statistic is at most ``sqrt(2 rho)``. With ``n`` the
    coverage is that of Student's t with n - 1 degrees of freedom, exact for normal losses and asymptotic for others:
    for an exponential law and a nominal coverage of 0.95 it is about 0.88 at n = 20 and 0.93 at n = 200.

    Raises
    ------
    ValueError
        For rho < 0 or n < 2.

    Examples
    --------
    >>> from drrho.bounds import mean_coverage
    >>> round(mean_coverage(1.353).value, 3)
    0.95
    """
    rho = as_number(rho, "rho", "is n times the radius of the ball", inclusive=True)
    if n is None:
        name, coverage = "Phi(sqrt(2 rho))", 0.5 * math.erfc(-math.sqrt(rho))
    else:
        as_sample_size(n)
        name = f"Student's t with {n - 1} degrees at sqrt(2 rho (n - 1) / n)"
        coverage = float(stdtr(n - 1, math.sqrt(2 * rho * (n - 1) / n)))
    return Bound(
        value=coverage,
        status=Status.ASYMPTOTIC,
        statement=f"P(R <= F_rho) is about {coverage:.6g} at rho = {rho:.6g}, one model fixed in advance",
        terms={name: coverage},
        confidence=coverage,
        assumptions=("finite variance", "rho <= rho_pos", "many samples" if n is None else "nearly normal losses"),
        source="Duchi & Namkoong, arXiv 1610.02581; derived here from the t-statistic",
    )


def empirical_bernstein(
    losses: ArrayLike,
    *,
    value_range: ValueRange,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
    tight: bool = True,
    two_sided: bool = False,
) -> Bound:
    """Bound the expected loss from above by its sample mean, variance and range.

    With ``L = log(2 N / delta)`` (4 instead of 2 if two-sided), with probability >= 1 - delta, for all N models::

        R <= mean + sqrt(2 V L / n) + 7 B L / (3 (n - 1))                             tight=False
        R <= mean + (b/2 + sqrt(V + b^2/4)) sqrt(2 L / n) + B L / (3 n)               tight=True, b = B sqrt(L/(n//2))

    The first is Maurer & Pontil (2009), Theorem 4; the second, never larger, is derived here. Proof: apply Bernstein's
    inequality to the mean; V as a U-statistic of ``n // 2`` independent pairs gives ``sigma^2 - V <= sigma b``, which
    is solved for ``sigma``. Each event fails with probability at most ``exp(-L)``. The choice of the model may depend
    on the sample in any way.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses of the model in question.
    value_range : float or (low, high)
        B, or the interval itself, known before seeing the sample.
    delta : float
        Probability of failure, in (0, 1).
    models, log_models : int or float
        Number of models N >= 1, or log N for large N; at most one of the two. Without both, one model fixed in advance.
    resolution : float
        For an infinite class: the N models cover it to within this sup-norm distance of losses, which costs
        ``resolution (2 + sqrt(2 L / (n - 1)))``. `lipschitz_cover_log` counts the models of a cover.
    tight : bool
        Use the second bound.
    two_sided : bool
        Also bound ``abs(R - mean)``, by ``value - mean``.

    Raises
    ------
    ValueError
        For n < 2, losses outside value_range, or an argument outside its interval.

    Examples
    --------
    >>> from drrho.bounds import empirical_bernstein
    >>> round(empirical_bernstein([0.0, 1.0] * 500, value_range=(0, 1)).value, 4)
    0.548
    >>> round(empirical_bernstein([0.0, 1.0] * 500, value_range=(0, 1), models=1000).value, 4)  # for all of 1000 models
    0.5877
    """
    sample = Sample.of(losses)
    union = ModelClass.of(models, log_models, resolution)
    length = range_length(value_range, sample)
    factor = 4 if two_sided else 2
    at = level(math.log(factor) + union.log_count, sample.n, delta)
    terms = (bernstein_terms if tight else _plain_terms)(sample, length, at.log_term, union)
    source = "derived here, after Maurer & Pontil 2009" if tight else "Maurer & Pontil 2009, Theorem 4"
    return guarantee("abs(R - mean) + mean" if two_sided else "R", terms, at, sample, length, union, source)


def _plain_terms(sample: Sample, length: float, log_term: float, union: ModelClass) -> dict[str, float]:
    n = sample.n
    terms = {
        "mean": sample.mean,
        "sqrt(2 V L/n)": sample.sd * math.sqrt(n / (n - 1)) * math.sqrt(2 * log_term / n),
        "7 B L/(3 (n - 1))": 7 * length * log_term / (3 * (n - 1)),
    }
    return with_cover(terms, n, log_term, union)


def drrho_certificate(
    losses: ArrayLike,
    reference_losses: ArrayLike | None,
    *,
    value_range: ValueRange,
    reference_independent: bool | None = None,
    rho: float | None = None,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
    tight: bool = True,
    divergence: Divergence | None = None,
) -> Bound:
    """Bound ``R(theta) - R(theta_ref)`` from above by the DRRho risk, the objective that is minimized.

    With ``L = log(2 N / delta)`` and ``rho >= rho_0 = n L / (n - 1)``, with probability >= 1 - delta, for all N
    models at once, so also for one that was chosen with the sample::

        R(theta) - R(theta_ref) <= F_rho(theta) + (17/6) B L / (n - 1)         chi-square or KL ball

    Derived here: at rho_0 the deviation of the empirical Bernstein inequality is ``sqrt(2 rho_0 / n) s``, which
    `variance_sandwich` bounds by the premium plus ``d L / (2 (n - 1))``, and ``1/2 + 7/3 = 17/6``. On the same event,
    with ``tight``, d replaces B in the term with factor 1/2, which vanishes if ``rho_0 <= rho_pos``. For a report on
    one model use `better_than_reference`, which is sharper.

    The KL ball has the same lower bound of its premium; the proof is at `_slack`.

    For a bound on ``R(theta)`` itself add `empirical_bernstein` of the reference, on its own evaluation set with its
    own delta; the probabilities of failure add up.

    Parameters
    ----------
    losses, reference_losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses on the same samples in the same order; with ``reference_losses=None`` the bound is on ``R(theta)``.
    value_range : float or (low, high)
        B or the interval for ``losses - reference_losses``, of length 2M when losses lie in [0, M].
    reference_independent : bool
        Whether the reference was fixed without looking at this sample; required with a reference. If it was not, both
        models must belong to the class of N, and the union is over pairs: N^2 instead of N, and twice the resolution.
    rho : float
        By default rho_0. A smaller one gives the bound with the confidence that it implies,
        ``delta = 2 N exp(-rho (n-1)/n)``.
    delta, models, log_models
        As for `empirical_bernstein`.
    resolution : float
        As for `empirical_bernstein`; it costs ``2 resolution``, because F_rho is 1-Lipschitz.
    tight : bool
        Whether to sharpen the term with factor 1/2.
    divergence : Divergence
        ``ChiSquare()``, the default, or ``KL()``; for the robust risk of the law itself, under any divergence, see
        `drrho.robust_bounds.robust_risk_bound`.

    Raises
    ------
    ValueError
        As for `empirical_bernstein`; for lengths that differ, a reference without ``reference_independent``, a rho
        too small for any confidence, or another divergence.

    Examples
    --------
    >>> from drrho.bounds import drrho_certificate
    >>> losses, reference = [0.0, 1.0] * 500, [0.0, 1.0, 1.0, 1.0] * 250
    >>> bound = drrho_certificate(losses, reference, value_range=(-1, 1), models=10, reference_independent=True)
    >>> bound.status.value, round(bound.value, 4)
    ('guarantee', -0.1746)
    """
    sample, union = compared(losses, reference_losses, reference_independent, models, log_models, resolution)
    n = sample.n
    length = range_length(value_range, sample)
    at = level(math.log(2) + union.log_count, n, delta, rho)
    ball = ChiSquare() if divergence is None else divergence
    if not isinstance(ball, ChiSquare | KL):
        raise ValueError(f"divergence must be ChiSquare() or KL(), got {ball!r}: nothing is proven for others here")
    risk = constrained_risk(sample.losses, ball, at.rho / n).value.item()
    terms = {
        "F_rho": risk,
        "slack of F_rho": _slack(sample, length, at.log_term, union, ball, risk, tight),
        "7 B L/(3 (n - 1))": 7 * length * at.log_term / (3 * (n - 1)),
    }
    if union.shift > 0:
        terms["cover"] = 2 * union.shift
    what = "R(theta)" if reference_losses is None else "R(theta) - R(theta_ref)"
    source = "derived here from Maurer & Pontil 2009 and the variance sandwich; objective of Wei et al., ICML 2025"
    return guarantee(what, terms, at, sample, length, union, source, f"{ball!r}, rho = {at.rho:.6g}, ")


def _slack(
    sample: Sample, length: float, log_term: float, union: ModelClass, ball: Divergence, risk: float, tight: bool
) -> float:
    """Return by how much F_rho may fall short of ``mean + s sqrt(2 rho_0 / n)``.

    The proof uses the ball of the smallest rho, which therefore decides whether the chi-square ball falls short at all.

    The KL ball has ``premium >= T s - d T^2 / 2``, ``T^2 = 2 rho / n``, as the chi-square ball has. By duality this
    says that the cumulant function K of ``x = z - mean`` is at least ``max over T of h (T s - d T^2 / 2) - T^2 / 2 =
    (h s)^2 / (2 + h d)`` at h > 0. Of all laws on x >= -d with mean 0 and variance s^2, K is least for that with
    atoms -d and ``s^2 / d``: the parabola that meets exp(h x) at -d and touches it at ``s^2 / d`` lies below it, by
    the remainder of Hermite's interpolation. For this law, with d = 1 and c = 1 + s^2, ``K' = s^2 (1 - 1 / (1 +
    (exp(c h) - 1) / c))``. The denominator is at least ``1 + h + h^2 / 2 >= (1 + h / 2)^2``, and ``s^2 (1 - 1 / (1 +
    h / 2)^2)`` is the derivative of ``(h s)^2 / (2 + h)``; both functions are 0 at h = 0.
    """
    smallest_t, factor = math.sqrt(2 * log_term / (sample.n - 1)), log_term / (2 * (sample.n - 1))
    if not tight:
        return length * factor
    if union.shift > 0:
        return min(length, sample.below + 2 * union.shift) * factor
    if isinstance(ball, KL):
        return min(sample.below * factor, max(sample.mean + smallest_t * sample.sd - risk, 0.0))
    return 0.0 if smallest_t * sample.below <= sample.sd else min(length, sample.below) * factor


def better_than_reference(
    losses: ArrayLike,
    reference_losses: ArrayLike,
    *,
    value_range: ValueRange,
    reference_independent: bool,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
    method: str = "auto",
    seed: int = 0,
) -> Improvement:
    """Certify that a model is strictly better than its reference: an upper bound on the difference of risks is < 0.

    The bound is the `drrho.means.mean_bound` of the excess losses: by betting if value_range is the interval
    ``(low, high)``, which needs 1.3 to 2 times the samples of a z-test where that needs a hundred, and otherwise the
    smaller of empirical Bernstein and Hoeffding, which need 6 to 12 times as many. The printed bound says which. Other
    parameters and errors are those of `drrho_certificate`. A failed certification is no evidence that the model is
    worse.

    To decide while samples come in, use `drrho.betting.confidence_sequence` of the excess losses.

    Examples
    --------
    >>> from drrho.bounds import better_than_reference
    >>> errors, reference_errors = [0.0, 0.0, 0.0, 1.0] * 250, [0.0, 1.0] * 500
    >>> verdict = better_than_reference(errors, reference_errors, value_range=(-1, 1), reference_independent=True)
    >>> verdict.certified, round(verdict.bound.value, 3)
    (True, -0.222)
    """
    if reference_losses is None:
        raise ValueError("reference_losses must be given, got None: there is nothing to be better than")
    sample, union = compared(losses, reference_losses, reference_independent, models, log_models, resolution)
    bound = bound_of(sample, value_range, delta, union, "R(theta) - R(theta_ref)", method, seed)
    return Improvement(certified=bound.value < 0, bound=bound)


@dataclass(frozen=True)
class Improvement:
    """Whether a model is certified better than its reference, and the `Bound` on ``R(theta) - R(theta_ref)``.

    Examples
    --------
    >>> from drrho.bounds import better_than_reference
    >>> losses, reference = [0.0, 1.0], [0.1, 1.0]  # better, but two samples prove nothing
    >>> improvement = better_than_reference(losses, reference, value_range=(-1, 1), reference_independent=True)
    >>> improvement.certified, improvement.bound.value > 0
    (False, True)
    """

    certified: bool
    bound: Bound

    def __bool__(self) -> bool:
        return self.certified

    def __str__(self) -> str:
        verdict = "certified" if self.certified else "NOT certified"
        return f"{verdict}: strictly better than the reference\n{self.bound}"


def lipschitz_cover_log(dimension: int, radius: float, lipschitz: float, resolution: float) -> float:
    """Return an upper bound on ``log N``, where N models cover a ball of parameters to within ``resolution``.

    ``log N <= p log(1 + 2 A Lip / resolution)`` for losses that are Lip-Lipschitz in p parameters of norm at most A,
    the same norm for both: a maximal separated set in the ball is a cover, and disjoint balls of half the distance
    around its members fit in a larger ball. Pass the result as ``log_models`` with the same ``resolution``; 1 / n is
    a usual choice.

    Raises
    ------
    ValueError
        For a dimension < 1, or another argument that is not positive.

    Examples
    --------
    >>> from drrho.bounds import empirical_bernstein, lipschitz_cover_log
    >>> log_models = lipschitz_cover_log(dimension=10, radius=1.0, lipschitz=1.0, resolution=0.01)
    >>> round(log_models, 2)
    53.03
    >>> losses = [0.0, 1.0] * 50_000
    >>> round(empirical_bernstein(losses, value_range=(0, 1), log_models=log_models, resolution=0.01).value, 3)
    0.538
    """
    if operator.index(dimension) < 1:
        raise ValueError(f"dimension must be >= 1, got {dimension}: it counts parameters")
    radius = as_number(radius, "radius", "is the largest norm of the parameters")
    lipschitz = as_number(lipschitz, "lipschitz", "bounds the slope of the loss in the parameters")
    resolution = as_number(resolution, "resolution", "is the sup-norm distance to the cover")
    return dimension * math.log1p(2 * radius * lipschitz / resolution)
