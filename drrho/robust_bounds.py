"""Bounds on the robust risk of the law from a sample, for every divergence: KL and chi-square balls, CVaR, penalties.

`drrho.bounds` bounds the expected loss. Here the quantity of interest is the robust risk itself,
``R_D(P) = max E_Q loss over Q with D(Q || P) <= radius`` (or the penalty, or CVaR), of the law P of the losses: what a
model that is trained with a fixed radius has to expect on another sample.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import special

from drrho.divergences import CVaR, Divergence
from drrho.risk import constrained_risk, penalized_risk
from drrho.statements import Bound, Sample, ValueRange, as_interval, compared, guarantee, level, range_length
from drrho.validation import ArrayLike

__all__ = ["robust_risk_bound"]

_SHARE = 4  # of the order statistics, one in this many, from the top: where binomial tails are sharper than DKW


def robust_risk_bound(
    losses: ArrayLike,
    divergence: Divergence,
    *,
    value_range: ValueRange,
    radius: float | None = None,
    strength: float | None = None,
    reference_losses: ArrayLike | None = None,
    reference_independent: bool | None = None,
    delta: float = 0.05,
    models: int | None = None,
    log_models: float | None = None,
    resolution: float = 0.0,
) -> Bound:
    """Bound the robust risk of the law of the losses from above by that of a worse sample.

    With probability >= 1 - delta, for all N models at once, with ``L = log(2 N / delta)`` and sorted losses z_i::

        R_D(P) <= R_D(G)        G: z_i has probability g_i - g_(i-1), and b, the end of the range, has 1 - g_n
        g_i = max(i / n - sqrt(L / (2 n)), q_i)         q_i: quantile of Beta(i, n - i + 1) at delta / (2 N m)

    where the second entry is used for the m = n // 4 largest losses only. Derived here. With probability
    >= 1 - delta / 2 the distribution function of P is at least ``i / n - sqrt(L / (2 n))`` at z_i for all i (Dvoretzky,
    Kiefer & Wolfowitz 1956, constant of Massart 1990). It is at least q_i at one z_i except with probability
    ``delta / (2 N m)``, because there it is at least the i-th of n sorted uniform numbers (Clopper & Pearson 1934). So
    P is stochastically dominated by G. Robust risks depend on the law of the losses alone and increase with them: a
    density of D <= radius for smaller losses is one for the larger ones that they are coupled to. For radius 0 this is
    the bound of Anderson (1969) on the mean; for CVaR with the first entry alone that of Thomas & Learned-Miller
    (2019), which says ``CVaR(P) <= CVaR(sample) + B sqrt(L / (2 n)) / alpha``. Brown (2007) has
    ``B sqrt(5 log(3 / delta) / (alpha n))`` instead.

    Parameters
    ----------
    losses : tensor, array or sequence, ``[n]``, n >= 2
        Losses of the model in question.
    divergence : Divergence
        ``KL()``, ``ChiSquare()``, ``CVaR(alpha)``, or any other.
    value_range : float or (low, high)
        The interval that holds all (excess) losses, known before seeing the sample, or its length.
    radius, strength : float
        One of them: that of `drrho.constrained_risk`, which does not shrink with n, or of `drrho.penalized_risk`.
        Neither for CVaR.
    reference_losses, reference_independent
        As for `drrho.bounds.drrho_certificate`; the risk is then that of the excess losses.
    delta, models, log_models
        As for `drrho.bounds.empirical_bernstein`.
    resolution : float
        As for `drrho.bounds.empirical_bernstein`; it costs ``2 resolution``, because R_D is 1-Lipschitz in the largest
        difference of losses.

    Raises
    ------
    ValueError
        As for `drrho.bounds.drrho_certificate`, `drrho.constrained_risk` and `drrho.penalized_risk`.

    Examples
    --------
    >>> from drrho import KL, CVaR
    >>> from drrho.robust_bounds import robust_risk_bound
    >>> losses = [0.0, 0.1, 0.2, 0.3] * 250
    >>> bound = robust_risk_bound(losses, KL(), radius=0.1, value_range=(0, 1))
    >>> round(bound.terms["R_D of the sample"], 3), round(bound.value, 3), bound.status.value
    (0.199, 0.241, 'guarantee')
    >>> round(robust_risk_bound(losses, CVaR(0.25), value_range=(0, 1)).value, 3)
    0.326
    """
    if isinstance(divergence, CVaR):
        if radius is not None or strength is not None:
            raise ValueError(
                f"radius and strength must be left out for {divergence}, which has neither, got radius={radius} and "
                f"strength={strength}"
            )
    elif (radius is None) == (strength is None):
        raise ValueError(f"give one of radius and strength, got radius={radius} and strength={strength}")
    sample, union = compared(losses, reference_losses, reference_independent, models, log_models, resolution)
    length = range_length(value_range, sample)
    at = level(math.log(2) + union.log_count, sample.n, delta)
    end = as_interval(value_range, sample)[1] if isinstance(value_range, tuple | list) else sample.low + length
    atoms, weights = worse_sample(sample, max(end, sample.high), at.log_term)

    def risk(values: torch.Tensor, base_weights: torch.Tensor | None) -> float:
        if strength is not None:
            return penalized_risk(values, divergence, strength, base_weights=base_weights).value.item()
        bound_of_ball = 0.0 if radius is None else radius
        return constrained_risk(values, divergence, bound_of_ball, base_weights=base_weights).value.item()

    empirical = risk(sample.losses, None)
    terms = {"R_D of the sample": empirical, "worse sample": risk(atoms, weights) - empirical}
    if union.shift > 0:
        terms["cover"] = 2 * union.shift
    size = f", strength {strength}" if strength is not None else "" if radius is None else f", radius {radius}"
    what = f"{divergence!r} risk of the law{size}"
    source = "derived here; Massart 1990, Clopper & Pearson 1934; for CVaR Thomas & Learned-Miller 2019"
    return guarantee(what, terms, at, sample, length, union, source)


def worse_sample(sample: Sample, end: float, log_term: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses and weights of the law G of `robust_risk_bound` for ``L = log_term``, without atoms of weight 0."""
    n = sample.n
    ordered = np.sort(sample.losses.numpy())
    below = np.arange(1, n + 1) / n - math.sqrt(log_term / (2 * n))
    top = np.arange(n - n // _SHARE + 1, n + 1)
    if len(top) and log_term + math.log(len(top)) < 700:
        quantiles = special.betaincinv(top, n - top + 1.0, math.exp(-log_term) / len(top))
        below[-len(top) :] = np.maximum(below[-len(top) :], quantiles * (1 - 1e-12))  # quantiles are rounded
    below = np.maximum.accumulate(below.clip(min=0))
    weights = np.diff(np.concatenate([[0.0], below, [1.0]]))
    kept = weights > 0
    return torch.from_numpy(np.append(ordered, end)[kept]), torch.from_numpy(weights[kept] / weights.sum())
