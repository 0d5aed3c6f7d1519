"""Choose rho and the coefficient of the reference from data, and references for data that the reference saw.

`choose_rho` compares candidates by held-out losses; `calibrated_rho` is the rho at which the robust risk covers the
expected loss with the probability asked for; `choose_coefficient` says how much of the reference to subtract; and
`cross_fitted` computes reference losses of every sample by a reference that was trained without it.
``drrho/CHOOSING.md`` says which of them answers which question.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from drrho.divergences import KL, ChiSquare, Divergence
from drrho.moments import as_pair
from drrho.reference import excess_losses
from drrho.risk import constrained_risk
from drrho.statements import ModelClass, as_bounded_row, level
from drrho.validation import ArrayLike, as_losses
from drrho.variance import Estimate, variance_reduction

__all__ = [
    "CalibratedRho",
    "CoefficientChoice",
    "RhoChoice",
    "calibrated_rho",
    "choose_coefficient",
    "choose_rho",
    "cross_fitted",
    "folds_of",
]

Rows = NDArray[np.intp]


def folds_of(n: int, folds: int = 5, seed: int = 0) -> list[tuple[Rows, Rows]]:
    """Return ``folds`` pairs of training and held-out rows: every row of 0 .. n - 1 is held out once.

    Raises
    ------
    ValueError
        If folds is not in [2, n].

    Examples
    --------
    >>> from drrho.choosing import folds_of
    >>> [held_out.tolist() for train, held_out in folds_of(6, folds=3)]
    [[2, 3], [4, 5], [0, 1]]
    """
    n, folds = operator.index(n), operator.index(folds)
    if not 2 <= folds <= n:
        raise ValueError(
            f"folds must be in [2, n = {n}], got {folds}: each needs rows to train on and rows to hold out"
        )
    order = np.random.default_rng(seed).permutation(n)
    return [(np.sort(np.setdiff1d(order, part)), np.sort(part)) for part in np.array_split(order, folds)]


#: A number of folds, or pairs of training and held-out rows, of which every row is held out once.
Folds: TypeAlias = "int | Sequence[tuple[Rows, Rows]]"


def _splits(folds: Folds, n: int, seed: int) -> Sequence[tuple[Rows, Rows]]:
    if isinstance(folds, int | np.integer):
        return folds_of(n, int(folds), seed)
    held_out = np.concatenate([np.asarray(test) for _, test in folds]) if len(folds) else np.empty(0, dtype=int)
    if not np.array_equal(np.sort(held_out), np.arange(n)):
        raise ValueError(
            f"folds must hold out each of the {n} rows once, got {len(folds)} parts with {len(held_out)} rows, "
            f"{len(np.unique(held_out))} of them different"
        )
    return folds


def cross_fitted(
    losses_of: Callable[[Rows, Rows], ArrayLike], n: int, *, folds: Folds = 5, seed: int = 0
) -> NDArray[np.float64]:
    """Return losses ``[n]`` of models that were trained without the sample in question.

    ``losses_of(training_rows, held_out_rows)`` trains a model on the first rows and returns its losses on the second.
    A reference that was trained on the same samples has losses that are too small on them, so that excess losses tell
    which samples it remembers; cross-fitted losses do not have this fault. Within a fold the reference is independent
    of the samples: a bound of `drrho.bounds` with ``reference_independent=True`` holds for each fold at delta / folds,
    and the average of these bounds, weighted by the folds' sizes, for the average of the references' risks.

    Raises
    ------
    ValueError
        If folds is not in [2, n], folds do not hold out each row once, or the returned losses are not one finite number
        for each held-out row.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.choosing import cross_fitted
    >>> y = np.array([1.0, 2.0, 4.0, 8.0])
    >>> cross_fitted(lambda train, held_out: (y[held_out] - y[train].mean()) ** 2, 4, folds=4).round(2).tolist()
    [13.44, 5.44, 0.11, 32.11]
    """
    held_out = np.empty(operator.index(n))
    for train, test in _splits(folds, n, seed):
        row, _ = as_bounded_row(losses_of(train, test), "losses_of")
        if len(row) != len(test):
            raise ValueError(f"losses_of must return a loss for each of the {len(test)} held-out rows, got {len(row)}")
        held_out[test] = row.numpy()
    return held_out


@dataclass(frozen=True)
class RhoChoice:
    """The chosen rho, and what every candidate had on held-out samples.

    Attributes
    ----------
    rho : float
        The choice, and ``best``, the candidate with the least mean.
    candidates, means, differences, errors : tuple of float
        Candidates in ascending order; means of their held-out losses; means of these minus those of the best, sample
        by sample; standard errors of these differences.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.choosing import choose_rho
    >>> y = np.random.default_rng(0).exponential(size=60)
    >>> choice = choose_rho([0.0, 10.0], lambda rho, train, held_out: (y[held_out] - y[train].mean() - rho) ** 2, 60)
    >>> choice.rho, choice.best, [round(mean, 2) for mean in choice.means]
    (0.0, 0.0, [1.24, 101.24])
    """

    rho: float
    best: float
    candidates: tuple[float, ...]
    means: tuple[float, ...]
    differences: tuple[float, ...]
    errors: tuple[float, ...]
    n: int

    def __float__(self) -> float:
        return self.rho

    def __str__(self) -> str:
        lines = [
            f"rho = {self.rho:.6g}, the smallest that is within a standard error of the best, {self.best:.6g}, "
            f"by held-out losses of {self.n} samples",
            f"  {'rho':>10} {'held-out':>12} {'worse by':>12} {'std. error':>12}",
        ]
        rows = zip(self.candidates, self.means, self.differences, self.errors, strict=True)
        lines += [f"  {rho:>10.4g} {mean:>12.6g} {more:>12.4g} {error:>12.4g}" for rho, mean, more, error in rows]
        return "\n".join(lines)


def choose_rho(
    candidates: Sequence[float],
    losses_of: Callable[[float, Rows, Rows], ArrayLike],
    n: int,
    *,
    folds: Folds = 5,
    seed: int = 0,
    sample_weight: ArrayLike | None = None,
) -> RhoChoice:
    """Choose rho by cross-validation: the smallest candidate within a standard error of the least held-out loss.

    ``losses_of(rho, training_rows, held_out_rows)`` trains with rho on the first rows and returns the losses on the
    second; return ``abs`` or clipped losses, or only those of a group, to choose for another purpose. All candidates
    have the same folds, and are compared sample by sample: the standard error is that of the difference to the best
    candidate (Breiman et al. 1984 have the rule). rho = 0 is the average loss, so that robustness is chosen only where
    it is seen to help. Folds train on fewer samples, with radius ``rho / n`` of theirs.

    Parameters
    ----------
    candidates : sequence of float
        Different numbers >= 0, such as ``[0, 0.5, 1.35, 5, 20]``; 1.35 is `drrho.bounds.rho_scales`' rho_t.
    losses_of : callable
        As above; returns ``[held out]``.
    n : int
        Number of samples.
    folds : int or sequence of (training rows, held-out rows)
        How many folds `folds_of` makes, or the folds, such as those of a splitter of scikit-learn.
    seed : int
        As for `folds_of`.
    sample_weight : tensor, array or sequence ``[n]``, optional
        How often each sample counts, >= 0, with a sum above 1; by default once.

    Raises
    ------
    ValueError
        For no candidates, negative or equal ones, and as for `cross_fitted`.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.choosing import choose_rho
    >>> y = np.random.default_rng(0).exponential(size=60)
    >>> def losses_of(rho, train, held_out):
    ...     return (y[held_out] - y[train].mean() - 0.1 * rho) ** 2  # whatever is trained with rho
    >>> choose_rho([0.0, 1.0, 10.0], losses_of, 60).rho
    0.0
    """
    rhos = sorted(float(rho) for rho in candidates)
    if not rhos or not all(0 <= rho < math.inf for rho in rhos) or len(set(rhos)) < len(rhos):
        raise ValueError(f"candidates must be different numbers >= 0, got {list(candidates)}")

    def trained_with(rho: float) -> Callable[[Rows, Rows], ArrayLike]:
        return lambda train, test: losses_of(rho, train, test)

    held_out = np.stack([cross_fitted(trained_with(rho), n, folds=folds, seed=seed) for rho in rhos])
    counts = np.ones(n) if sample_weight is None else as_bounded_row(sample_weight, "sample_weight")[0].numpy()
    total = float(counts.sum())
    if counts.shape != (n,) or not (counts >= 0).all() or not total > 1:
        raise ValueError(f"sample_weight must hold {n} numbers >= 0 with a sum above 1, got a sum of {total}")
    means = held_out @ counts / total
    best = int(means.argmin())
    apart = held_out - held_out[best]
    behind = apart @ counts / total
    errors = np.sqrt(np.square(apart - behind[:, None]) @ counts / (total - 1) / total)
    return RhoChoice(
        rho=rhos[int(np.argmax(behind <= errors))],
        best=rhos[best],
        candidates=tuple(rhos),
        means=tuple(means.tolist()),
        differences=tuple(behind.tolist()),
        errors=tuple(errors.tolist()),
        n=n,
    )


@dataclass(frozen=True)
class CalibratedRho:
    """The rho whose robust risk covers the expected loss with the confidence asked for.

    Attributes
    ----------
    rho : float
        By the bootstrap; asymptotic, like ``normal``.
    coverage : float
        Share of bootstrap samples whose robust risk at rho is at least the mean.
    normal : float
        ``z^2 / 2``, the limit for many samples and divergences with ``phi''(1) = 1``.
    guaranteed : float or None
        ``n log(2 N / delta) / (n - 1)``, at which `drrho.bounds.drrho_certificate` holds with this confidence for the
        balls of chi-square and KL and for every sample size; None for others, of which nothing is proven.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.choosing import calibrated_rho
    >>> calibrated = calibrated_rho(np.random.default_rng(0).normal(size=200), replicates=199)
    >>> round(calibrated.normal, 2), round(calibrated.guaranteed, 2), calibrated.n
    (1.35, 3.71, 200)
    """

    rho: float
    coverage: float
    normal: float
    guaranteed: float | None
    n: int
    confidence: float

    def __float__(self) -> float:
        return self.rho

    def __str__(self) -> str:
        lines = [
            f"rho for which F_rho covers the expected loss with confidence {self.confidence:.6g}, n = {self.n}",
            f"  {self.rho:>12.6g}  [asymptotic] by the bootstrap, of whose samples it covers {self.coverage:.6g}",
            f"  {self.normal:>12.6g}  [asymptotic] for nearly normal means, z^2 / 2",
        ]
        if self.guaranteed is not None:
            lines.append(f"  {self.guaranteed:>12.6g}  [guarantee] with the additive term of drrho_certificate")
        return "\n".join(lines)


def calibrated_rho(
    losses: ArrayLike,
    reference_losses: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    divergence: Divergence | None = None,
    models: int | None = None,
    log_models: float | None = None,
    replicates: int = 999,
    seed: int = 0,
) -> CalibratedRho:
    """Return the least rho with ``mean <= F_rho(bootstrap sample)`` for the share ``confidence`` of bootstrap samples.

    F_rho is the risk over the ball of radius rho / n. Where all worst-case weights of the chi-square ball are positive
    this is the studentized bootstrap's upper bound of the mean (Hall 1988), which follows the skewness of the losses as
    ``z^2 / 2`` does not: for 20 exponential losses F_rho covers the mean with probability .88 at ``z^2 / 2`` and .93
    here. It is valid for one model that was fixed in advance. For a model that was chosen from many, take
    ``guaranteed``.

    Parameters
    ----------
    losses, reference_losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses of the model, and of the reference if the risk is that of excess losses.
    confidence : float
        In [0.5, 1).
    divergence : Divergence
        By default `ChiSquare`; `KL` and others have rhos of their own for heavy tails. It must have a radius.
    models, log_models
        N of ``guaranteed``, as for `drrho.bounds.empirical_bernstein`.
    replicates, seed : int
        Number of bootstrap samples, and their seed.

    Raises
    ------
    ValueError
        For n < 2, an argument out of range, equal losses, or losses so few that no rho reaches the confidence.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.choosing import calibrated_rho
    >>> calibrated = calibrated_rho(np.random.default_rng(0).exponential(size=40))
    >>> round(calibrated.normal, 3), calibrated.rho > calibrated.normal
    (1.353, True)
    """
    row, _ = as_bounded_row(losses, "losses")
    if reference_losses is not None:
        row = excess_losses(row, as_bounded_row(reference_losses, "reference_losses")[0])
    n, scale = len(row), row.max() - row.min()
    if n < 2 or scale == 0:
        raise ValueError(f"losses must be at least 2 that differ, got {n} with a range of {scale.item():.6g}")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be in [0.5, 1), got {confidence}: it is that of a one-sided bound")
    union = ModelClass.of(models, log_models)
    if operator.index(replicates) < 2:
        raise ValueError(f"replicates must be >= 2, got {replicates}: it is the number of bootstrap samples")
    chosen = ChiSquare() if divergence is None else divergence
    if not chosen.has_radius:
        raise ValueError(f"divergence must have balls of more than one radius, got {chosen!r}: it has no rho")
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)
    base, mean = torch.from_numpy(counts / n), row.mean()
    repeated = row.expand(replicates, n)

    def coverage(rho: float) -> float:
        values = constrained_risk(repeated, chosen, rho / n, base_weights=base).value
        return (values >= mean - 1e-12 * scale).double().mean().item()

    quantile = math.sqrt(2) * torch.special.erfinv(torch.tensor(2 * confidence - 1, dtype=torch.float64)).item()
    low, high = 0.0, quantile**2 / 2 + 2.0**-10
    while coverage(high) < confidence:
        low, high = high, 2 * high
        if high > 1e6 * n:
            raise ValueError(f"losses must be more than {n} for confidence {confidence}: no rho covers in enough "
                             "bootstrap samples; use guaranteed bounds of drrho.bounds")  # fmt: skip
    while high - low > 0.005 * high and high > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if coverage(middle) >= confidence else (middle, high)
    return CalibratedRho(
        rho=high,
        coverage=coverage(high),
        normal=quantile**2 / 2,
        guaranteed=level(math.log(2) + union.log_count, n, 1 - confidence).rho
        if isinstance(chosen, ChiSquare | KL)
        else None,
        n=n,
        confidence=confidence,
    )


@dataclass(frozen=True)
class CoefficientChoice:
    """How much of the reference to subtract, and why.

    Attributes
    ----------
    coefficient : float
        The choice, in [0, 1].
    best : Estimate
        c* = Cov(l, r) / V(r), which minimizes V(l - c r), with its interval.
    whole, fitted : float
        Held-out V(l - r) / V(l), and held-out V(l - c r) / V(l) for the c* of the other folds, cut to [0, 1].
    reason : str
        Why this coefficient was chosen.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.choosing import choose_coefficient
    >>> losses = np.random.default_rng(0).exponential(size=100)
    >>> choice = choose_coefficient(losses, losses - 0.1)  # it explains all variance
    >>> choice.coefficient, choice.n
    (1.0, 100)
    """

    coefficient: float
    best: Estimate
    whole: float
    fitted: float
    reason: str
    n: int

    def __float__(self) -> float:
        return self.coefficient

    def __str__(self) -> str:
        return "\n".join(
            [
                f"coefficient {self.coefficient:.4g}: {self.reason}",
                f"  best coefficient {self.best.value:.4g}, interval {self.best.low:.4g} to {self.best.high:.4g}",
                f"  held-out variance relative to that of the losses, {self.n} samples: {self.whole:.4g} with all of "
                f"the reference, {self.fitted:.4g} with the best coefficient of the other folds",
            ]
        )


def choose_coefficient(
    losses: ArrayLike, reference_losses: ArrayLike, *, confidence: float = 0.95, folds: int = 5, seed: int = 0
) -> CoefficientChoice:
    """Choose c in [0, 1] for the excess losses ``losses - c reference_losses``, by their held-out variance.

    The variance is least at c* = Cov(l, r) / V(r). The choice is 0 where the reference does not reduce the held-out
    variance; 1 where all of it reduces the variance and the interval of c* holds 1 or lies above it, because "not worse
    than the reference" is proven for c = 1 only (`drrho.efficiency.excess_over_reference`); and c* otherwise. In
    contrastive training, where c changes with the model, `drrho.coefficient.AdaptiveCoefficient` follows it.

    Parameters
    ----------
    losses, reference_losses : tensors, arrays or sequences of one shape
        Losses of a model that is typical of training and of the reference, on samples that neither was trained on, n >=
        2 folds of them. For samples that the reference saw use `cross_fitted` losses.
    confidence : float
        That of the interval of c*, in (0, 1).
    folds, seed : int
        As for `folds_of`.

    Raises
    ------
    ValueError
        For shapes that differ, too few samples, losses or reference losses that are all equal, or an argument out of
        range.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho.choosing import choose_coefficient
    >>> rng = np.random.default_rng(0)
    >>> reference = rng.exponential(size=300)
    >>> choice = choose_coefficient(0.4 * reference + 0.2 * rng.exponential(size=300), reference)
    >>> round(choice.coefficient, 1), choice.fitted < choice.whole
    (0.4, True)
    """
    best = variance_reduction(losses, reference_losses, confidence=confidence).coefficient
    target, reference = (
        as_losses(row, "losses").flatten().double().numpy() for row in as_pair(losses, reference_losses)
    )
    n = len(target)
    if n < 2 * operator.index(folds):
        raise ValueError(f"losses must have at least 2 folds = {2 * folds} entries, got {n}: folds have variances")
    parts = folds_of(n, folds, seed)
    if np.ptp(target) == 0 or not math.isfinite(best.value):
        raise ValueError("losses and reference_losses must not be all equal: no part of the reference helps then")

    def variance(coefficients: Sequence[float]) -> float:
        excess = [(target - c * reference)[test] for c, (_, test) in zip(coefficients, parts, strict=True)]
        return sum(((part - part.mean()) ** 2).sum() for part in excess) / (n - folds)

    spread = [max(float(reference[train].var()), 2.0**-1022) for train, _ in parts]
    covariances = [float(((reference - reference[train].mean()) * target)[train].mean()) for train, _ in parts]
    fitted = [min(max(c / v, 0.0), 1.0) for c, v in zip(covariances, spread, strict=True)]
    plain = variance([0.0] * folds)
    whole_ratio, fitted_ratio = float(variance([1.0] * folds) / plain), float(variance(fitted) / plain)
    if min(whole_ratio, fitted_ratio) >= 1:
        coefficient, reason = 0.0, "the reference does not reduce the held-out variance"
    elif whole_ratio < 1 and not best.high < 1:
        coefficient = 1.0
        reason = "all of the reference reduces the variance, and the interval of the best coefficient allows 1"
        reason += f" (there is none: {best.reason})" if best.reason else ""
    else:
        coefficient = min(max(best.value, 0.0), 1.0)
        reason = "a part of the reference reduces the variance, and more than all of it"
    return CoefficientChoice(coefficient, best, whole_ratio, fitted_ratio, reason, n)
