"""What theory predicts for the minimizer of a DRRho risk, and how many samples it needs.

Oracle inequalities and sample sizes for ``theta~``, a minimizer of ``F_rho`` over a class of N models, as functions of
population quantities that the caller supplies (a standard deviation, a risk). Their `Status` is theory, or plug-in if
the caller says that a quantity is an estimate. The notation is that of `drrho.bounds`, which holds the guarantees from
data alone. ``R*`` is the least risk in the class, and ``theta*`` the model that attains it.

There is **no bound here** for CVaR, KL and other divergences (`drrho.robust_bounds` has some), a learned temperature,
contrastive or minibatch risks, or dependent samples. If training stops before the minimum, the excess of ``F_rho`` over
its minimum has to be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from drrho.statements import (
    Bound,
    ModelClass,
    Status,
    ValueRange,
    as_flag,
    as_number,
    as_sample_size,
    level,
    page_end,
    range_length,
    right_side,
)

__all__ = [
    "SampleSize",
    "crossover_samples",
    "duchi_namkoong_oracle",
    "exactness_probability",
    "excess_over_best",
    "excess_over_reference",
    "oracle_inequality",
    "samples_to_match_reference",
    "samples_under_bernstein_condition",
]

_MINIMIZER = (
    "independent samples of one law",
    "theta~ minimizes F_rho over the whole class; an optimization error is to be added",
)


def _model_class(
    models: int | None,
    log_models: float | None,
    resolution: float = 0.0,
    reference_independent: bool | None = True,
) -> ModelClass:
    if models is None and log_models is None:
        raise ValueError("give models or log_models, got neither: theta~ is a minimizer over a class")
    return ModelClass.of(models, log_models, resolution, reference_independent=reference_independent)


def oracle_inequality(
    *,
    n: int,
    value_range: ValueRange,
    standard_deviation: float,
    risk: float | None = None,
    rho: float | None = None,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
    reference_independent: bool | None = True,
    estimated: bool = False,
    simplified: bool = False,
) -> Bound:
    """Bound the risk of the minimizer by the risk of any one model theta plus its standard deviation.

    With ``L1 = log(4 N / delta)``, ``L2 = log(4 / delta)``, ``rho >= n L1 / (n - 1)`` and ``sigma^2`` the variance of
    ``loss(theta) - loss(theta_ref)``, with probability >= 1 - delta::

        R(theta~) <= R(theta) + sigma (1 + sqrt(L2 / rho)) sqrt(2 rho / n)
                     + B ((17/6) L1 / (n - 1) + L2 / (3 n) + sqrt(rho L2) / n)
                  <= R(theta) + 2 sigma sqrt(2 rho / n) + (25/6) B rho / n              simplified=True

    Derived here: `drrho.bounds.drrho_certificate` at delta / 2, ``F_rho(theta~) <= F_rho(theta)``, the upper side of
    `drrho.bounds.variance_sandwich`, and for this one theta Bernstein's inequality and
    ``s <= sigma + B sqrt(L2 / (2 n))`` at delta / 4 each. The coefficient ``1 + sqrt(L2 / rho)``, at most 2, cannot
    be 1 with a constant C that is valid for all laws: if the class has the reference and one model that is better by
    ``sigma sqrt(2 rho / n) + (C + 1) / n``, the minimizer is the reference half of the time.

    Parameters
    ----------
    n : int
        Number of samples, >= 2.
    value_range : float or (low, high)
        B: for excess losses 2M when losses lie in [0, M], for plain losses M.
    standard_deviation : float
        sigma of the excess loss of theta (without a reference, of its loss).
    risk : float
        R(theta). Without it the bound is on ``R(theta~) - R(theta)``.
    rho : float
        By default the smallest allowed. A smaller one gives the bound with the confidence that it implies.
    delta, models, log_models, resolution
        As for `drrho.bounds.empirical_bernstein`; the cover costs ``2 resolution``.
    reference_independent : bool
        Whether the reference was fixed without looking at the sample; None without a reference. If it was not,
        ``L1 = log(4 N^2 / delta)`` and ``L2 = log(4 N / delta)``, for finite classes only.
    estimated : bool
        Whether standard_deviation or risk is an estimate.
    simplified : bool
        Use the second form.

    Raises
    ------
    ValueError
        For an argument outside its interval, or a rho too small for any confidence.

    Examples
    --------
    >>> from drrho.efficiency import oracle_inequality
    >>> bound = oracle_inequality(n=10_000, value_range=1.0, standard_deviation=0.1, risk=0.2, models=100)
    >>> round(bound.value, 4)  # the best model's risk is 0.2
    0.2105
    """
    union = _model_class(models, log_models, resolution, reference_independent)
    if union.shift > 0 and union.pairs:
        raise ValueError(f"resolution must be 0 with reference_independent=False, got {resolution}: nothing is proven")
    sigma = as_number(standard_deviation, "standard_deviation", "is that of the (excess) loss of theta", inclusive=True)
    length = range_length(value_range)
    at = level(math.log(4) + union.log_count, as_sample_size(n), delta, rho)
    log_fixed = math.log(4) - math.log(at.delta) + (union.log_models if union.pairs else 0.0)
    if simplified:
        slope = {"2 sigma sqrt(2 rho/n)": 2 * sigma * math.sqrt(2 * at.rho / n)}
        rest = {"(25/6) B rho/n": 25 * length * at.rho / (6 * n)}
    else:
        slope, rest = _oracle_terms(n, at.rho, at.log_term, log_fixed, sigma, length)
    terms = {**slope, **rest}
    if union.shift > 0:
        terms["cover"] = 2 * union.shift
    coefficient = 2 if simplified else 1 + math.sqrt(log_fixed / at.rho)
    numbers = (
        f"sigma = {sigma:.6g} with coefficient {coefficient:.6g} of sqrt(2 rho/n), rho = {at.rho:.6g}, "
        f"L1 = {at.log_term:.6g}, L2 = {log_fixed:.6g}, n = {n}, B = {length:.6g}"
    )
    source = "derived here; statement with unspecified constants: Wei et al., ICML 2025"
    return _minimizer_bound(risk, terms, at.words, at.delta, numbers, union, estimated, source)


def _minimizer_bound(
    risk: float | None,
    terms: dict[str, float],
    probability: str,
    delta: float,
    numbers: str,
    union: ModelClass,
    estimated: bool,
    source: str,
) -> Bound:
    what = "R(theta~) - R(theta)"
    if risk is not None:
        what, terms = "R(theta~)", {"R(theta)": float(risk), **terms}
    return Bound(
        value=math.fsum(terms.values()),
        status=Status.PLUG_IN if estimated else Status.THEORY,
        statement=f"{what} <= {right_side(terms)} {probability}, {union.words}; {numbers}",
        terms=terms,
        confidence=1 - delta,
        assumptions=(*_MINIMIZER, _supplied(estimated), *union.assumptions),
        source=source,
    )


def _oracle_terms(
    n: int, rho: float, log_all: float, log_fixed: float, sigma: float, length: float
) -> tuple[dict[str, float], dict[str, float]]:
    slope = {
        "sigma sqrt(2 rho/n)": sigma * math.sqrt(2 * rho / n),
        "sigma sqrt(2 L2/n)": sigma * math.sqrt(2 * log_fixed / n),
    }
    rest = {
        "(17/6) B L1/(n - 1)": 17 * length * log_all / (6 * (n - 1)),
        "B L2/(3 n)": length * log_fixed / (3 * n),
        "B sqrt(rho L2)/n": length * math.sqrt(rho * log_fixed) / n,
    }
    return slope, rest


def _supplied(estimated: bool) -> str:
    return "the supplied numbers are estimates: this is no guarantee" if estimated else "the supplied numbers are exact"


def duchi_namkoong_oracle(
    *,
    n: int,
    value_range: ValueRange,
    standard_deviation: float,
    risk: float | None = None,
    rho: float | None = None,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
    estimated: bool = False,
) -> Bound:
    """Bound the risk of the minimizer as Duchi & Namkoong do, for comparison with `oracle_inequality`.

    With ``delta = 2 (3 N + 1) exp(-t)``, ``t >= log 12``, ``n >= 8 M^2 / t`` and ``rho >= 9 t``, with probability
    >= 1 - delta (arXiv 1610.02581, Theorem 3, inequality 16; M is value_range, and the condition on n is as printed
    there, for losses in any unit)::

        R(theta~) <= R(theta) + 2 sqrt(2 rho sigma^2 / n) + 19 M rho / (3 n) + (2 + 4 sqrt(2 t / n)) resolution

    Parameters
    ----------
    n, value_range, standard_deviation, risk, estimated
        As for `oracle_inequality`; losses may be excess losses of a reference fixed in advance.
    rho : float
        By default ``9 t``, the smallest allowed.
    delta, models, log_models, resolution
        As for `oracle_inequality`; the cover must hold on every sample.

    Raises
    ------
    ValueError
        For an argument outside its interval, or n or rho below the theorem's minimum.

    Examples
    --------
    >>> from drrho.efficiency import duchi_namkoong_oracle, oracle_inequality
    >>> known = {"n": 10_000, "value_range": 1.0, "standard_deviation": 0.1, "risk": 0.2, "models": 100}
    >>> duchi_namkoong_oracle(**known).value > oracle_inequality(**known).value
    True
    """
    union = _model_class(models, log_models, resolution)
    sigma = as_number(standard_deviation, "standard_deviation", "is that of the (excess) loss of theta", inclusive=True)
    length = range_length(value_range)
    log_count = math.log(6) + union.log_models + math.log1p(math.exp(-union.log_models) / 3)
    t = level(log_count, as_sample_size(n), delta).log_term  # at least log 12: log_count is at least log 8
    if n < 8 * length**2 / t:
        raise ValueError(f"n must be >= 8 M^2 / t = {8 * length**2 / t:.6g}, got {n}: the theorem asks for it")
    rho = 9 * t if rho is None else as_number(rho, "rho", "is n times the radius of the ball")
    if rho < 9 * t:
        implied = 1 - math.exp(min(log_count - rho / 9, 0.0))
        raise ValueError(f"rho must be >= 9 t = {9 * t:.6g}, got {rho}: its implied confidence is {implied:.6g}")
    terms = {
        "2 sigma sqrt(2 rho/n)": 2 * sigma * math.sqrt(2 * rho / n),
        "19 M rho/(3 n)": 19 * length * rho / (3 * n),
    }
    if resolution > 0:
        terms["cover"] = (2 + 4 * math.sqrt(2 * t / n)) * resolution
    numbers = f"sigma = {sigma:.6g}, rho = {rho:.6g}, t = {t:.6g}, n = {n}, M = {length:.6g}"
    source = "Duchi & Namkoong, arXiv 1610.02581, Theorem 3 (16)"
    probability = f"with probability >= 1 - {delta:.6g}"
    return _minimizer_bound(risk, terms, probability, delta, numbers, union, estimated, source)


def excess_over_best(
    *,
    n: int,
    loss_range: float,
    standard_deviation: float,
    reference: bool,
    rho: float | None = None,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    estimated: bool = False,
) -> Bound:
    """Bound ``R(theta~) - R*`` by `oracle_inequality` with theta*, with or without a reference.

    A reference replaces the standard deviation of ``loss(theta*)`` by that of ``loss(theta*) - loss(theta_ref)`` (their
    squared ratio is the variance reduction) and doubles the range; `crossover_samples` returns the n from which on the
    reference lowers the bound.

    Parameters
    ----------
    loss_range : float
        M, the length of an interval that holds all losses (not excess losses).
    standard_deviation : float
        That of ``loss(theta*) - loss(theta_ref)`` with a reference, otherwise of ``loss(theta*)``.
    reference : bool
        Whether there is a reference, independent of the sample.
    n, rho, delta, models, log_models, estimated
        As for `oracle_inequality`.

    Examples
    --------
    >>> from drrho.efficiency import excess_over_best
    >>> known = {"n": 10_000, "loss_range": 1.0, "models": 100}
    >>> round(excess_over_best(standard_deviation=0.5, reference=False, **known).value, 4)
    0.0393
    >>> round(excess_over_best(standard_deviation=0.1, reference=True, **known).value, 4)  # of the excess loss
    0.0138
    """
    length = as_number(loss_range, "loss_range", "is the length of an interval that holds all losses")
    reference = as_flag(reference, "reference")
    bound = oracle_inequality(
        n=n,
        value_range=2 * length if reference else length,
        standard_deviation=standard_deviation,
        rho=rho,
        delta=delta,
        models=models,
        log_models=log_models,
        reference_independent=True if reference else None,
        estimated=estimated,
    )
    return replace(bound, statement=f"for theta = theta*, of risk R*: {bound.statement}")


def excess_over_reference(
    *,
    n: int,
    value_range: ValueRange,
    reference_excess: float | None = None,
    rho: float | None = None,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
    reference_independent: bool = True,
) -> Bound:
    """Bound how much worse than its reference a minimizer can be if the reference is in the class.

    With ``L = log(2 N / delta)`` and ``rho >= n L / (n - 1)``, with probability >= 1 - delta::

        R(theta~) - R* <= (R(theta_ref) - R*) + (17/6) B L / (n - 1)

    Derived here: ``F_rho(theta_ref) = 0`` for every sample, so ``F_rho(theta~) <= 0`` in
    `drrho.bounds.drrho_certificate`. The bound says only "not worse": the reference itself achieves it with n = 0. For
    improvement see `excess_over_best` and `drrho.bounds.better_than_reference`.

    Parameters
    ----------
    reference_excess : float
        ``R(theta_ref) - R*`` >= 0. Without it the bound is on ``R(theta~) - R(theta_ref)`` and a guarantee, since it
        contains no unknown quantity.
    n, value_range, rho, delta, models, log_models
        As for `oracle_inequality`; value_range is that of the excess losses.
    resolution, reference_independent
        As for `drrho.bounds.drrho_certificate`.

    Raises
    ------
    ValueError
        As for `oracle_inequality`.

    Examples
    --------
    >>> from drrho.efficiency import excess_over_reference
    >>> round(excess_over_reference(n=10_000, value_range=(-1, 1), models=100).value, 4)
    0.0047
    """
    union = _model_class(models, log_models, resolution, reference_independent)
    length = range_length(value_range)
    at = level(math.log(2) + union.log_count, as_sample_size(n), delta, rho)
    terms = {"(17/6) B L/(n - 1)": 17 * length * at.log_term / (6 * (n - 1))}
    if union.shift > 0:
        terms["cover"] = 2 * union.shift
    what, status = "R(theta~) - R(theta_ref)", Status.GUARANTEE
    if reference_excess is not None:
        excess = as_number(reference_excess, "reference_excess", "is R(theta_ref) - R*", inclusive=True)
        terms = {"R(theta_ref) - R*": excess, **terms}
        what, status = "R(theta~) - R*", Status.THEORY
    return Bound(
        value=math.fsum(terms.values()),
        status=status,
        statement=f"{what} <= {right_side(terms)} {at.words}, {union.words}; rho = {at.rho:.6g}, "
        f"L = {at.log_term:.6g}, n = {n}, B = {length:.6g}. This says 'not worse than the reference' only: returning "
        "the reference itself satisfies it with n = 0",
        terms=terms,
        confidence=1 - at.delta,
        assumptions=(*_MINIMIZER, "the reference is in the class", *union.assumptions),
        source="derived here; statement with unspecified constants: Wei et al., ICML 2025",
    )


def exactness_probability(*, rho: float, n: int, value_range: ValueRange, standard_deviation: float) -> Bound:
    """Return a lower bound on the probability that ``F_rho`` is exactly ``mean + s sqrt(2 rho / n)``.

    It is ``1 - exp(-(n // 2) sigma^2 / (4 B^2))`` if ``rho <= (n - 1) sigma^2 / (4 B^2)``. Derived here: then
    ``V >= sigma^2 / 2`` implies ``rho <= rho_pos``, and V is rarely smaller. The constants are better than those of
    Duchi & Namkoong, arXiv 1610.02581, Theorem 1 (11).

    Raises
    ------
    ValueError
        If rho is larger than that.

    Examples
    --------
    >>> from drrho.efficiency import exactness_probability
    >>> round(exactness_probability(rho=1.0, n=10_000, value_range=1.0, standard_deviation=0.3).value, 4)
    1.0
    """
    rho = as_number(rho, "rho", "is n times the radius of the ball", inclusive=True)
    sigma = as_number(standard_deviation, "standard_deviation", "is that of the law")
    length = range_length(value_range)
    largest = (as_sample_size(n) - 1) * (sigma / length) ** 2 / 4
    if rho > largest:
        raise ValueError(f"rho must be <= (n - 1) sigma^2 / (4 B^2) = {largest:.6g}, got {rho}: nothing is proven")
    probability = -math.expm1(-(n // 2) * (sigma / length) ** 2 / 4)
    return Bound(
        value=probability,
        status=Status.THEORY,
        statement=f"P(F_rho = mean + s sqrt(2 rho/n)) >= {probability:.6g}, for one model fixed in advance; "
        f"rho = {rho:.6g}, n = {n}, sigma = {sigma:.6g}, B = {length:.6g}",
        terms={"1 - exp(-(n // 2) sigma^2/(4 B^2))": probability},
        confidence=probability,
        assumptions=("independent samples of one law", "the supplied numbers are exact"),
        source="derived here, after Duchi & Namkoong, arXiv 1610.02581, Theorem 1",
    )


@dataclass(frozen=True)
class SampleSize:
    """A number of samples that suffices for a statement.

    Attributes
    ----------
    samples : int, or float infinity if no number suffices
        The number of samples; also ``float(size)``.
    baseline : int or None
        The number that empirical risk minimization without a reference needs for the same, where it is known.
    status, statement, confidence, assumptions, source
        As for `drrho.bounds.Bound`.
    inputs : mapping of str to float
        The numbers from which ``samples`` is computed.

    Examples
    --------
    >>> from drrho.efficiency import samples_to_match_reference
    >>> size = samples_to_match_reference(1_000_000, loss_range=1.0, models=100)
    >>> size.samples < 1_000_000, size.status.value
    (True, 'theory')
    """

    samples: float
    baseline: int | None
    status: Status
    statement: str
    inputs: Mapping[str, float]
    confidence: float
    assumptions: tuple[str, ...]
    source: str

    def __float__(self) -> float:
        return float(self.samples)

    def __str__(self) -> str:
        lines = [f"[{self.status.value}] {self.statement}", f"  {self.samples:>12,}  samples"]
        if self.baseline is not None:
            lines.append(f"  {self.baseline:>12,}  samples without a reference (ERM, by Hoeffding's inequality)")
        lines.append("  from: " + ", ".join(f"{name} = {amount:.6g}" for name, amount in self.inputs.items()))
        return "\n".join([*lines, *page_end(self.assumptions, self.source)])


def crossover_samples(
    *,
    loss_range: float,
    standard_deviation: float,
    excess_standard_deviation: float,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    estimated: bool = False,
) -> SampleSize:
    """Return the smallest n from which on the bound on ``R(theta~) - R*`` is smaller with the reference than without.

    The function compares `excess_over_best` with and without a reference, each at its smallest rho. The reference
    multiplies the leading term by ``excess_standard_deviation / standard_deviation`` and doubles the range. The ratio
    of range to deviation terms falls with n, so there is one crossover; if the standard deviation is not smaller there
    is none, and samples is infinite. The bounds cross at this n; the risks themselves may cross elsewhere.

    Parameters
    ----------
    loss_range : float
        M, the length of an interval that holds all losses.
    standard_deviation, excess_standard_deviation : float
        Those of ``loss(theta*)`` and of ``loss(theta*) - loss(theta_ref)``.
    delta, models, log_models, estimated
        As for `oracle_inequality`.

    Examples
    --------
    >>> from drrho.efficiency import crossover_samples
    >>> size = crossover_samples(loss_range=1.0, standard_deviation=0.5, excess_standard_deviation=0.1, models=100)
    >>> size.samples
    135
    """
    union = _model_class(models, log_models)
    length = as_number(loss_range, "loss_range", "is the length of an interval that holds all losses")
    plain = as_number(standard_deviation, "standard_deviation", "is that of the loss of theta*", inclusive=True)
    excess = as_number(
        excess_standard_deviation, "excess_standard_deviation", "is that of the excess loss of theta*", inclusive=True
    )

    def reference_pays(n: int) -> bool:
        at = level(math.log(4) + union.log_count, n, delta)
        slope, rest = _oracle_terms(n, at.rho, at.log_term, math.log(4) - math.log(delta), 1.0, 1.0)
        return length * sum(rest.values()) < (plain - excess) * sum(slope.values())

    return SampleSize(
        samples=_smallest(reference_pays) if excess < plain else math.inf,
        baseline=None,
        status=Status.PLUG_IN if estimated else Status.THEORY,
        statement="from here on the bound on R(theta~) - R* is smaller with the reference than without, "
        f"each with probability >= 1 - {delta:.6g}, {union.words}",
        inputs={"sd of loss": plain, "sd of excess loss": excess, "M": length, "delta": delta},
        confidence=1 - delta,
        assumptions=(*_MINIMIZER, _supplied(estimated), *union.assumptions),
        source="derived here",
    )


def _smallest(holds: Callable[[int], bool]) -> int:
    """Return the smallest n >= 2 for which a condition holds that is monotone in n."""
    high = 2
    while not holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rounded_up(samples: float) -> int:
    """Round up to an integer, except where only a rounding error lies above an integer."""
    return math.ceil(samples * (1 - 1e-13))


def samples_to_match_reference(
    reference_samples: float,
    *,
    loss_range: float,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    constant: float | None = None,
) -> SampleSize:
    """Return how many samples bring the minimizer to the rate of a reference that was trained on m samples.

    If ``R(theta_ref) - R* <= C0 / sqrt(m)``, then by `excess_over_reference`::

        n >= 1 + (17/6) B L sqrt(m) / C0,  L = log(2 N / delta), B = 2 M    gives    R(theta~) - R* <= 2 C0 / sqrt(m)

    with probability >= 1 - delta, which is of the order of sqrt(m). Empirical risk minimization from scratch needs
    ``M^2 L m / (2 C0^2)`` samples for the same by Hoeffding's inequality, of the order of m. Derived here. Both numbers
    are sufficient by these bounds, not necessary, and the reference alone already achieves half of the target.

    Parameters
    ----------
    reference_samples : int or float
        m, the size of the reference's own, independent training set.
    loss_range : float
        M, the length of an interval that holds all losses.
    constant : float
        C0, in units of loss; by default ``M sqrt(2 L)``.
    delta, models, log_models
        As for `drrho.bounds.empirical_bernstein`.

    Examples
    --------
    >>> from drrho.efficiency import samples_to_match_reference
    >>> size = samples_to_match_reference(10**6, loss_range=1.0, models=1000)
    >>> size.samples, size.baseline
    (13045, 250000)
    """
    m = as_number(reference_samples, "reference_samples", "is the size of the reference's training set")
    length = as_number(loss_range, "loss_range", "is the length of an interval that holds all losses")
    union = _model_class(models, log_models)
    log_term = level(math.log(2) + union.log_count, 2, delta).log_term
    if constant is None:
        constant = length * math.sqrt(2 * log_term)
    constant = as_number(constant, "constant", "is C0 in R(theta_ref) - R* <= C0 / sqrt(m)")
    target = 2 * constant / math.sqrt(m)
    return SampleSize(
        samples=_rounded_up(1 + 17 * 2 * length * log_term * math.sqrt(m) / (6 * constant)),
        baseline=_rounded_up((length / constant) ** 2 * log_term * m / 2),
        status=Status.THEORY,
        statement=f"R(theta~) - R* <= 2 C0/sqrt(m) = {target:.6g} with probability >= 1 - {delta:.6g}, {union.words}; "
        "the reference alone has C0/sqrt(m)",
        inputs={"m": m, "C0": constant, "L": log_term, "M": length, "delta": delta},
        confidence=1 - delta,
        assumptions=(
            *_MINIMIZER,
            f"R(theta_ref) - R* <= C0/sqrt(m) = {target / 2:.6g}",
            "the reference is in the class",
            *union.assumptions,
            "rho >= n L/(n - 1)",
        ),
        source="derived here",
    )


def samples_under_bernstein_condition(
    reference_excess: float,
    *,
    bernstein_constant: float,
    loss_range: float,
    fraction: float = 1.0,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
) -> SampleSize:
    """Return how many samples bring the minimizer to a fraction of its reference's excess risk.

    If ``Var(loss(theta_ref) - loss(theta*)) <= b0 (R(theta_ref) - R*)``, the simplified `oracle_inequality` with
    theta* says ``R(theta~) - R* <= 2 sqrt(2 b0 rho e / n) + (25/6) B rho / n`` with ``e = R(theta_ref) - R*`` and
    ``B = 2 M``. Each of the two terms is at most ``f e / 2`` if ``n >= rho max(32 b0 / f^2, 25 B / (3 f)) / e``; at
    the smallest rho, ``n L1 / (n - 1)``, this is ``n >= 1 + L1 max(32 b0 / f^2, 25 B / (3 f)) / e``. Derived here.

    Parameters
    ----------
    reference_excess : float
        e > 0.
    bernstein_constant : float
        b0 > 0, in units of loss.
    loss_range : float
        M, the length of an interval that holds all losses.
    fraction : float
        Target f in (0, 1]: the minimizer's excess risk as a fraction of the reference's.
    delta, models, log_models
        As for `oracle_inequality`.

    Examples
    --------
    >>> from drrho.efficiency import samples_under_bernstein_condition
    >>> size = samples_under_bernstein_condition(0.01, bernstein_constant=1.0, loss_range=1.0, models=100)
    >>> round(size.samples)
    28761
    """
    excess = as_number(reference_excess, "reference_excess", "is R(theta_ref) - R*")
    b0 = as_number(bernstein_constant, "bernstein_constant", "bounds variance over excess risk")
    length = as_number(loss_range, "loss_range", "is the length of an interval that holds all losses")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}: it is of the reference's excess risk")
    union = _model_class(models, log_models)
    log_term = level(math.log(4) + union.log_count, 2, delta).log_term
    needed = max(32 * b0 / fraction**2, 25 * 2 * length / (3 * fraction)) / excess
    return SampleSize(
        samples=_rounded_up(1 + log_term * needed),
        baseline=None,
        status=Status.THEORY,
        statement=f"R(theta~) - R* <= {fraction:.6g} (R(theta_ref) - R*) = {fraction * excess:.6g} "
        f"with probability >= 1 - {delta:.6g}, {union.words}",
        inputs={"e": excess, "b0": b0, "f": fraction, "L1": log_term, "M": length, "delta": delta},
        confidence=1 - delta,
        assumptions=(
            *_MINIMIZER,
            "Var(loss(theta_ref) - loss(theta*)) <= b0 (R(theta_ref) - R*)",
            *union.assumptions,
            "rho = n L1/(n - 1)",
        ),
        source="derived here",
    )
