"""What a sample proves about a mean: variance sandwich, scales of rho, empirical Bernstein and DRRho certificates.

Notation: n losses ``z_i`` (excess losses ``losses - reference_losses`` where there is a reference), their mean, ``s``
their standard deviation with 1/n, ``V = n s^2 / (n - 1)``, ``d = mean - min``, ``u = max - mean``; ``F_rho`` is the
chi-square risk with ``phi(t) = (t - 1)^2 / 2`` and radius ``rho / n``; N models; ``B`` the length of an interval,
known before seeing the sample, that holds every ``z``: 2M for excess losses when the losses lie in [0, M], 2b when
``abs(losses - reference_losses) <= b``, M without a reference. Bounds have the unit of the losses.

Every answer carries its `Status`, in the object and in its printed form. Functions of supplied population quantities
(oracle inequalities, sample sizes) are in `drrho.efficiency`.

There is **no bound here** for CVaR, KL and other divergences, a learned temperature, contrastive or minibatch risks,
or dependent samples: the proofs are about the chi-square ball, independent samples of one law, and a class of models
that a union bound or a cover can count.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from scipy.special import ndtri, stdtr
from torch import Tensor

from drrho.divergences import ChiSquare
from drrho.reference import excess_losses
from drrho.risk import constrained_risk
from drrho.validation import as_losses


class Status(str, Enum):
    """What a number may be called."""

    GUARANTEE = "guarantee"  # proven for every n under the printed assumptions, computed from data alone
    PLUG_IN = "plug-in"  # a proven formula into which an estimate was put: no guarantee
    ASYMPTOTIC = "asymptotic"  # holds in the limit of many samples
    THEORY = "theory"  # proven, but a function of population quantities that the caller supplied


@dataclass(frozen=True)
class Bound:
    """A number with the inequality it stands for.

    Attributes
    ----------
    value : float
        The bound, in units of loss (a probability where ``statement`` says so); also ``float(bound)``.
    status : Status
        Whether it is a guarantee.
    statement : str
        The inequality, with its numbers.
    terms : mapping of str to float
        The summands of ``value``.
    confidence : float
        Probability, at least, with which the statement holds over draws of the sample.
    assumptions : tuple of str
        What was taken for granted. Everything else was checked.
    source : str
        Where the proof is.
    """

    value: float
    status: Status
    statement: str
    terms: Mapping[str, float]
    confidence: float
    assumptions: tuple[str, ...]
    source: str

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        terms = [f"  {amount:>12.6g}  {name}" for name, amount in self.terms.items()]
        return "\n".join([f"[{self.status.value}] {self.statement}", *terms, *page_end(self.assumptions, self.source)])


def right_side(terms: Mapping[str, float]) -> str:
    """Return ``a + b + c = value``, the terms by name and their sum."""
    return f"{' + '.join(terms)} = {math.fsum(terms.values()):.6g}"


def page_end(assumptions: tuple[str, ...], source: str) -> list[str]:
    """Return the closing lines of a printed statement."""
    return [*(f"  assumes: {assumption}" for assumption in assumptions), f"  source: {source}"]


def variance_sandwich(
    losses: Any, *, rho: float | None = None, radius: float | None = None, value_range: Any = None
) -> Sandwich:
    """Enclose the premium ``F_rho - mean`` of the chi-square risk by multiples of the standard deviation.

    With ``T = sqrt(2 radius)``, for every row of losses, without any probability::

        min(T s, s^2 / d)                   <=  F_rho - mean  <=  min(T s, u)
        max(T s - 2 M radius, 0)            <=  F_rho - mean  <=  T s             losses in an interval of length M

    The first line is derived here. Upper: ``D <= radius`` says ``norm(p - 1/n) <= T / sqrt(n)``; then Cauchy-Schwarz.
    Lower: ``p_i = 1/n + e (z_i - mean)`` is feasible for ``e n s <= T`` and ``e n d <= 1`` and gains ``e n s^2``. It
    implies ``T s - d radius / 2``, a quarter of the slack of the second line (Duchi & Namkoong, arXiv 1610.02581,
    Theorem 1). The premium is concave in T, ``T s`` up to ``T_pos = s / d`` and u from ``T_max = sqrt(n / ties - 1)``
    on, so the chord between the two lies below it.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``
        Any finite losses, excess losses included.
    rho, radius : float
        Exactly one, >= 0: ``rho = n radius``.
    value_range : float or (low, high)
        M for the second line; the range of the sample unless given.

    Raises
    ------
    ValueError
        For losses that are not one row, not exactly one of rho and radius, or losses outside value_range.
    """
    sample = Sample.of(losses, fewest=1)
    if (rho is None) == (radius is None):
        raise ValueError(f"give exactly one of rho (radius * n) and radius, got rho={rho} and radius={radius}")
    if rho is not None:
        radius = as_number(rho, "rho", "is n times the radius of the ball", inclusive=True) / sample.n
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
    """The premium ``F_rho - mean`` between its bounds, in units of loss; see `variance_sandwich`.

    ``chord`` is the sharpest lower bound. ``exact`` says that ``rho <= rho_pos``: all worst-case weights are positive,
    and the premium equals ``sqrt(2 rho / n) s``; otherwise it is strictly smaller.
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
    losses: Any,
    *,
    confidence: float = 0.95,
    models: int | None = None,
    log_models: float | None = None,
    delta: float = 0.05,
) -> RhoScales:
    """Return the four values of rho at which the meaning of ``F_rho`` changes, to be read beside any rho.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses, or excess losses, of one model.
    confidence : float
        In [0.5, 1): the coverage aimed at by ``rho_t``.
    models, log_models, delta
        As for `empirical_bernstein`, for ``rho_0``.

    Raises
    ------
    ValueError
        For n < 2 or an argument outside its interval.
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
        ``z_confidence^2 / 2``: from here on F_rho covers the mean with this confidence, asymptotically.
    rho_0 : float
        ``n log(2 N / delta) / (n - 1)``: from here on `drrho_certificate` holds with probability 1 - delta.
    rho_pos : float
        ``n s^2 / (2 d^2)``: up to here F_rho is exactly ``mean + s sqrt(2 rho / n)``. Infinite for constant losses.
    rho_max : float
        ``n (n / ties - 1) / 2``: from here on F_rho is the maximum.
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
        """Return in which regime rho lies: what F_rho is, and what it covers."""
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

    While ``rho <= rho_pos``, ``mean <= F_rho`` says that the t-statistic is at most ``sqrt(2 rho)``. With ``n`` the
    answer is that of Student's t with n - 1 degrees, exact for normal losses and asymptotic for others: for an
    exponential law, aiming at 0.95, it is about 0.88 at n = 20 and 0.93 at n = 200.

    Raises
    ------
    ValueError
        For rho < 0 or n < 2.
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
    losses: Any,
    *,
    value_range: Any,
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

    The first is Maurer & Pontil (2009), Theorem 4; the second, never larger, is derived here. Proof: Bernstein's
    inequality for the mean; V as a U-statistic of ``n // 2`` independent pairs gives ``sigma^2 - V <= sigma b``, of
    which ``sigma`` is solved for. Each event fails with probability ``exp(-L)`` at most. The choice of the model may
    depend on the sample in any way.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses of the model in question.
    value_range : float or (low, high)
        B, or the interval itself, known before seeing the sample.
    delta : float
        In (0, 1): probability of failure.
    models, log_models : int or float
        N >= 1, or log N where N is too large to write; at most one. Neither means one model, fixed in advance.
    resolution : float
        For an infinite class: the N models cover it to within this sup-norm distance of losses, which costs
        ``resolution (2 + sqrt(2 L / (n - 1)))``. `lipschitz_cover_log` counts covers.
    tight : bool
        Which of the two.
    two_sided : bool
        Bound ``abs(R - mean)`` too, by ``value - mean``.

    Raises
    ------
    ValueError
        For n < 2, losses outside value_range, or an argument outside its interval.
    """
    sample = Sample.of(losses)
    union = ModelClass.of(models, log_models, resolution)
    length = range_length(value_range, sample)
    factor = 4 if two_sided else 2
    at = level(math.log(factor) + union.log_count, sample.n, delta)
    terms = _bernstein(sample, length, at.log_term, union, tight)
    source = "derived here, after Maurer & Pontil 2009" if tight else "Maurer & Pontil 2009, Theorem 4"
    return _guarantee("abs(R - mean) + mean" if two_sided else "R", terms, at, sample, length, union, source)


def _bernstein(sample: Sample, length: float, log_term: float, union: ModelClass, tight: bool) -> dict[str, float]:
    n = sample.n
    sd = sample.sd * math.sqrt(n / (n - 1))
    if tight:
        half = length * math.sqrt(log_term / (n // 2)) / 2
        terms = {
            "mean": sample.mean,
            "(b/2 + sqrt(V + b^2/4)) sqrt(2 L/n)": (half + math.hypot(sd, half)) * math.sqrt(2 * log_term / n),
            "B L/(3 n)": length * log_term / (3 * n),
        }
    else:
        terms = {
            "mean": sample.mean,
            "sqrt(2 V L/n)": sd * math.sqrt(2 * log_term / n),
            "7 B L/(3 (n - 1))": 7 * length * log_term / (3 * (n - 1)),
        }
    if union.shift > 0:  # mean and R move by the shift at most, sqrt(V) by sqrt(n / (n - 1)) times it
        terms["cover"] = union.shift * (2 + math.sqrt(2 * log_term / (n - 1)))
    return terms


def drrho_certificate(
    losses: Any,
    reference_losses: Any,
    *,
    value_range: Any,
    reference_independent: bool | None = None,
    rho: float | None = None,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
    tight: bool = True,
) -> Bound:
    """Bound ``R(theta) - R(theta_ref)`` from above by the DRRho risk, the objective that is minimized.

    With ``L = log(2 N / delta)`` and ``rho >= rho_0 = n L / (n - 1)``, with probability >= 1 - delta, for all N
    models, whichever the sample made you choose::

        R(theta) - R(theta_ref) <= F_rho(theta) + (17/6) B L / (n - 1)

    Derived here: at rho_0 the deviation of the empirical Bernstein inequality is ``sqrt(2 rho_0 / n) s``, which
    `variance_sandwich` bounds by the premium plus ``d L / (2 (n - 1))``, and ``1/2 + 7/3 = 17/6``. On the same event,
    with ``tight``, d replaces B in the half, and the half vanishes if ``rho_0 <= rho_pos``. A report on one model
    should rather quote `better_than_reference`, which is never larger but for what a cover costs it.

    For a bound on ``R(theta)`` itself add `empirical_bernstein` of the reference, on its own evaluation set with its
    own delta; the probabilities of failure add up.

    Parameters
    ----------
    losses, reference_losses : tensor, array or sequence, ``[n]``, n >= 2
        On the same samples in the same order; ``reference_losses=None`` bounds ``R(theta)``, without a reference.
    value_range : float or (low, high)
        B or the interval for ``losses - reference_losses``: 2M in length when losses lie in [0, M].
    reference_independent : bool
        Whether the reference was fixed without looking at this sample. If not, both models must belong to the class
        of N and the union is over pairs: N^2 for N, and twice the resolution. To be said whenever there is one.
    rho : float
        Default rho_0. A smaller one gives the bound at the confidence it implies, ``delta = 2 N exp(-rho (n-1)/n)``.
    delta, models, log_models
        As for `empirical_bernstein`.
    resolution : float
        As for `empirical_bernstein`; it costs ``2 resolution``, F_rho being 1-Lipschitz.
    tight : bool
        Whether to sharpen the half.

    Raises
    ------
    ValueError
        As for `empirical_bernstein`; for lengths that differ, a reference of unsaid origin, or a rho too small for any
        confidence.

    Examples
    --------
    >>> from drrho.bounds import drrho_certificate
    >>> losses, reference = [0.0, 1.0] * 500, [0.0, 1.0, 1.0, 1.0] * 250
    >>> bound = drrho_certificate(losses, reference, value_range=(-1, 1), models=10, reference_independent=True)
    >>> bound.status.value, round(bound.value, 4)
    ('guarantee', -0.1746)
    """
    sample, union = _compared(losses, reference_losses, reference_independent, models, log_models, resolution)
    n = sample.n
    length = range_length(value_range, sample)
    at = level(math.log(2) + union.log_count, n, delta, rho)
    # The proof passes through the ball of the smallest rho, so that decides whether the half is needed.
    smallest_t = math.sqrt(2 * at.log_term / (n - 1))
    slack = length
    if tight:
        exact = union.shift == 0 and smallest_t * sample.below <= sample.sd
        slack = 0.0 if exact else min(length, sample.below + 2 * union.shift)
    terms = {
        "F_rho": constrained_risk(sample.losses, ChiSquare(), at.rho / n).value.item(),
        "slack of F_rho": slack * at.log_term / (2 * (n - 1)),
        "7 B L/(3 (n - 1))": 7 * length * at.log_term / (3 * (n - 1)),
    }
    if union.shift > 0:
        terms["cover"] = 2 * union.shift
    what = "R(theta)" if reference_losses is None else "R(theta) - R(theta_ref)"
    source = "derived here from Maurer & Pontil 2009 and the variance sandwich; objective of Wei et al., ICML 2025"
    return _guarantee(what, terms, at, sample, length, union, source, f"rho = {at.rho:.6g}, ")


def better_than_reference(
    losses: Any,
    reference_losses: Any,
    *,
    value_range: Any,
    reference_independent: bool,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
) -> Improvement:
    """Certify that a model is strictly better than its reference: an upper bound on the difference of risks is < 0.

    The bound is the tight `empirical_bernstein` of the excess losses; parameters and errors are those of
    `drrho_certificate`. Nothing certified is no evidence that the model is worse.
    """
    if reference_losses is None:
        raise ValueError("reference_losses must be given, got None: there is nothing to be better than")
    sample, union = _compared(losses, reference_losses, reference_independent, models, log_models, resolution)
    length = range_length(value_range, sample)
    at = level(math.log(2) + union.log_count, sample.n, delta)
    terms = _bernstein(sample, length, at.log_term, union, tight=True)
    source = "derived here, after Maurer & Pontil 2009"
    bound = _guarantee("R(theta) - R(theta_ref)", terms, at, sample, length, union, source)
    return Improvement(certified=bound.value < 0, bound=bound)


@dataclass(frozen=True)
class Improvement:
    """Whether a model is certified better than its reference, and the `Bound` on ``R(theta) - R(theta_ref)``."""

    certified: bool
    bound: Bound

    def __bool__(self) -> bool:
        return self.certified

    def __str__(self) -> str:
        verdict = "certified" if self.certified else "NOT certified"
        return f"{verdict}: strictly better than the reference\n{self.bound}"


def lipschitz_cover_log(dimension: int, radius: float, lipschitz: float, resolution: float) -> float:
    """Return an upper bound on ``log N``, N models that cover a ball of parameters to within ``resolution``.

    ``log N <= p log(1 + 2 A Lip / resolution)`` for losses that are Lip-Lipschitz in p parameters of norm at most A,
    the same norm for both: a maximal separated set in the ball is a cover, and disjoint half-balls around its members
    fit in a ball. Pass it as ``log_models`` with the same ``resolution``; 1 / n is a usual one.

    Raises
    ------
    ValueError
        For a dimension < 1, or another argument that is not positive.
    """
    if operator.index(dimension) < 1:
        raise ValueError(f"dimension must be >= 1, got {dimension}: it counts parameters")
    radius = as_number(radius, "radius", "is the largest norm of the parameters")
    lipschitz = as_number(lipschitz, "lipschitz", "bounds the slope of the loss in the parameters")
    resolution = as_number(resolution, "resolution", "is the sup-norm distance to the cover")
    return dimension * math.log1p(2 * radius * lipschitz / resolution)


@dataclass(frozen=True)
class ModelClass:
    """What a union bound is taken over: N models, or pairs of them, and how far the class may be from them.

    ``reference_independent`` is None without a reference; False means that it, too, was chosen from the class.
    """

    log_models: float
    resolution: float
    reference_independent: bool | None
    words: str

    @staticmethod
    def of(
        models: int | None,
        log_models: float | None,
        resolution: float = 0.0,
        *,
        reference_independent: bool | None = None,
    ) -> ModelClass:
        """Check and name the class."""
        if models is not None and log_models is not None:
            raise ValueError(f"give models or log_models, not both: got models={models} and log_models={log_models}")
        resolution = as_number(resolution, "resolution", "is the sup-norm distance to the cover", inclusive=True)
        if log_models is not None:
            log_models = as_number(log_models, "log_models", "is the log of the number of models", inclusive=True)
            words = f"for all N = exp({log_models:.6g}) models at once"
        else:
            count = 1 if models is None else models
            if isinstance(count, bool) or operator.index(count) < 1:
                raise ValueError(f"models must be an integer >= 1, got {models}: it counts the models of the class")
            log_models = math.log(count)
            words = f"for all N = {count} models at once" if count > 1 else "for one model fixed in advance"
        if reference_independent is False:
            if log_models < math.log(2):
                raise ValueError(
                    f"models must be >= 2 with reference_independent=False, got {'1' if models is None else models}: "
                    "count the class that both model and reference were chosen from"
                )
            words += ", as model and as reference (N^2 for N)"
        return ModelClass(log_models, resolution, reference_independent, words)

    @property
    def pairs(self) -> bool:
        """Whether the union is over models and references."""
        return self.reference_independent is False

    @property
    def log_count(self) -> float:
        """Log of the number of statements united: N, or N^2 for pairs."""
        return self.log_models * (2 if self.pairs else 1)

    @property
    def shift(self) -> float:
        """Sup-norm distance of (excess) losses to those of the cover."""
        return self.resolution * (2 if self.pairs else 1)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What it takes for granted."""
        taken = []
        if self.reference_independent:
            taken.append("the reference was fixed without looking at the sample")
        if self.pairs:
            taken.append("theta and theta_ref both belong to the class; theta_ref may depend on the sample")
        if self.resolution > 0:
            taken.append(f"the N models, members of the class, cover it to within {self.resolution:.6g} in sup norm")
        return tuple(taken)


class Level(NamedTuple):
    """A log term, the rho that goes with it, the probability of failure, and the one asked for."""

    log_term: float
    rho: float
    delta: float
    asked: float

    @property
    def words(self) -> str:
        """How sure it is."""
        words = f"with probability >= 1 - {self.delta:.6g}"
        if self.delta == self.asked:
            return words
        return f"{words} (implied by rho = {self.rho:.6g}, too small for 1 - {self.asked:.6g})"


def level(log_count: float, n: int, delta: float, rho: float | None = None) -> Level:
    """Return ``L = log(count / delta)`` and ``rho >= n L / (n - 1)``; a smaller rho lowers L and so the confidence.

    Raises
    ------
    ValueError
        If delta is not in (0, 1), or rho is too small for any confidence.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}: it is the probability of failure")
    log_term = log_count - math.log(delta)
    smallest = n * log_term / (n - 1)
    if rho is None:
        return Level(log_term, smallest, delta, delta)
    rho = as_number(rho, "rho", "is n times the radius of the ball", inclusive=True)
    if rho >= smallest:
        return Level(log_term, rho, delta, delta)
    log_term = rho * (n - 1) / n
    if log_term <= log_count:
        raise ValueError(
            f"rho must be > {n * log_count / (n - 1):.6g}, got {rho}: below it the implied confidence is not positive "
            f"(confidence 1 - {delta:.6g} needs rho >= {smallest:.6g})"
        )
    return Level(log_term, rho, math.exp(log_count - log_term), delta)


@dataclass(frozen=True)
class Sample:
    """One row of losses in float64 and its moments; ``rounding`` is what its own type may have added to a loss."""

    losses: Tensor
    rounding: float
    n: int
    low: float
    high: float
    mean: float
    sd: float
    below: float
    above: float
    ties: int

    @staticmethod
    def of(losses: Any, reference_losses: Any = None, *, fewest: int = 2) -> Sample:
        """Check one row of losses, or of excess losses if there is a reference, and measure it."""
        row, rounding = _row(losses, "losses")
        if reference_losses is not None:
            reference, more = _row(reference_losses, "reference_losses")
            row, rounding = excess_losses(row, reference), rounding + more
        if row.numel() < fewest:
            raise ValueError(f"losses must have at least {fewest} entries, got {row.numel()}: one has no variance")
        low, high = row.min(), row.max()
        below = (row - low).mean()  # measured from the minimum, constant losses have no spread at all
        centered = row - low - below
        scale = centered.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        return Sample(
            losses=row,
            rounding=rounding,
            n=row.numel(),
            low=low.item(),
            high=high.item(),
            mean=(low + below).item(),
            sd=(scale * (centered / scale).square().mean().sqrt()).item(),
            below=below.item(),
            above=(high - low - below).item(),
            ties=int((row == high).sum()),
        )


def _row(losses: Any, name: str) -> tuple[Tensor, float]:
    given = as_losses(losses, name)
    if given.ndim != 1:
        raise ValueError(f"{name} must have shape [n], one loss per sample, got {list(given.shape)}")
    row = given.detach().to("cpu", torch.float64)
    return row, 4 * torch.finfo(given.dtype).eps * row.abs().max().item()


def _compared(
    losses: Any,
    reference_losses: Any,
    independent: bool | None,
    models: int | None,
    log_models: float | None,
    resolution: float,
) -> tuple[Sample, ModelClass]:
    if (reference_losses is None) != (independent is None):
        raise ValueError(
            f"reference_independent must be True or False, got {independent}: say whether the reference was fixed "
            "without looking at this sample"
            if reference_losses is not None
            else f"reference_independent must be left out without reference_losses, got {independent}"
        )
    union = ModelClass.of(models, log_models, resolution, reference_independent=independent)
    return Sample.of(losses, reference_losses), union


def _guarantee(
    what: str,
    terms: dict[str, float],
    at: Level,
    sample: Sample,
    length: float,
    union: ModelClass,
    source: str,
    numbers: str = "",
) -> Bound:
    return Bound(
        value=math.fsum(terms.values()),
        status=Status.GUARANTEE,
        statement=f"{what} <= {right_side(terms)} {at.words}, {union.words}; "
        f"{numbers}L = {at.log_term:.6g}, n = {sample.n}, B = {length:.6g}",
        terms=terms,
        confidence=1 - at.delta,
        assumptions=(
            "independent samples of one law",
            f"every loss of which R is the mean lies in an interval of length B = {length:.6g}, known in advance",
            *union.assumptions,
        ),
        source=source,
    )


def range_length(value_range: Any, sample: Sample | None = None) -> float:
    """Return the length B of a declared range, a number or (low, high), that must hold the sample.

    Raises
    ------
    ValueError
        If the range is empty or not finite, or the sample leaves it by more than the rounding of its type.
    """
    if isinstance(value_range, tuple | list):
        if len(value_range) != 2:
            raise ValueError(f"value_range must be a length or (low, high), got {value_range}")
        low, high = map(float, value_range)
        if sample is not None and (sample.low < low - sample.rounding or sample.high > high + sample.rounding):
            raise ValueError(
                f"value_range is ({low:.6g}, {high:.6g}) but the losses go from {sample.low:.6g} to {sample.high:.6g}: "
                "it must hold all losses, those not seen too"
            )
        return as_number(high - low, "value_range", "is an interval (low, high) with low < high, of that length")
    length = as_number(value_range, "value_range", "is the length of an interval that holds all losses")
    if sample is not None and sample.high - sample.low > length + 2 * sample.rounding:
        raise ValueError(
            f"value_range is {length:.6g} but the losses go from {sample.low:.6g} to {sample.high:.6g}, a range of "
            f"{sample.high - sample.low:.6g}: it must hold all losses, those not seen too"
        )
    return length


def as_number(value: Any, name: str, meaning: str, *, inclusive: bool = False) -> float:
    """Return a finite number > 0, or >= 0 if ``inclusive``, or say by name why not."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}: it {meaning}") from error
    if not 0 <= number < math.inf or (number == 0 and not inclusive):
        raise ValueError(f"{name} must be finite and {'>= 0' if inclusive else '> 0'}, got {value}: it {meaning}")
    return number


def as_sample_size(n: int) -> int:
    """Return n, an integer >= 2, or say why not."""
    if operator.index(n) < 2:
        raise ValueError(f"n must be >= 2, got {n}: it counts samples, and one has no variance")
    return n
