"""Exact solutions of normalized rows: losses in, density ratios and dual variables out.

Every solver takes ``d`` of shape ``[rows, n]``: losses minus their row's maximum, divided by their row's
range, so that ``-1 <= d <= 0`` and brackets and tolerances are the same numbers for every input. Rows whose
answer is the mean or the maximum are answered by the caller and never arrive here. Nothing is recorded by
autograd: derivatives come from the optimality conditions (``risk.py``).

A new divergence registers two functions with ``solve_constrained`` and ``solve_penalized``.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from drrho.divergences import KL, ChiSquare, CVaR, Divergence, expm1_minus, kl_of_log_ratio

_NEWTON_ITERATIONS = 40  # then bisection; four to eight suffice away from plateaus
_MAX_ITERATIONS = 400
_LONGEST_STEP = 10.0  # in log b, while there is no upper bracket


class Dual(NamedTuple):
    """Solution of normalized rows.

    ``tilt`` ``[rows, n]`` is ``n p - 1``, which keeps the digits that ``p`` loses when it is nearly uniform;
    ``threshold`` and ``strength`` ``[rows]`` are the multipliers eta and lambda in units of ``d``;
    ``saturated`` ``[rows]`` marks rows that rounding has put at the hard maximum.
    """

    tilt: Tensor
    threshold: Tensor
    strength: Tensor
    saturated: Tensor


@singledispatch
def solve_constrained(divergence: Divergence, d: Tensor, radius: Tensor) -> Dual:
    """Maximize ``<p, d>`` over the simplex subject to ``D(p || 1/n) <= radius``, ``radius`` ``[rows]``."""
    raise TypeError(f"divergence must have a registered solver, got {type(divergence).__name__}")


@singledispatch
def solve_penalized(divergence: Divergence, d: Tensor, strength: Tensor) -> Dual:
    """Maximize ``<p, d> - strength * D(p || 1/n)`` over the simplex, ``strength`` ``[rows]``."""
    raise TypeError(f"divergence must have a registered solver, got {type(divergence).__name__}")


# --- KL ---------------------------------------------------------------------------------------------------


def _log_ratio(d: Tensor, y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``u = log(n p)`` for ``p ~ exp(b d)``, and the log normalizer ``log mean exp(b d)``.

    For b <= 1 the centered ``y = d - mean(d)`` is used: its log-mean-exp is of second order, and is summed as
    such. For larger b the maximum is the origin, so that close competitors at the top keep their distance.
    """
    small = b <= 1
    x = torch.where(small, b, 0.0)[:, None] * y
    psi = torch.log1p(expm1_minus(x).mean(-1))
    far = torch.where(small, 0.0, b)[:, None] * d
    top = torch.logsumexp(far, -1) - math.log(d.shape[-1])
    u = torch.where(small[:, None], x - psi[:, None], far - top[:, None])
    return u, torch.where(small, psi + b * d.mean(-1), top)


@solve_constrained.register
def _kl_constrained(divergence: KL, d: Tensor, radius: Tensor) -> Dual:
    """Solve ``log KL(p_b) = log radius`` for ``p_b ~ exp(b d)`` in ``x = log b`` by safeguarded Newton.

    ``KL(p_b)`` increases with slope ``d log KL / d log b = b^2 Var_b(d) / KL``, which tends to 2 for small b.
    Since the variance under any weights is at most 1/4 (range 1), ``b >= sqrt(8 radius)``.
    """
    y = d - d.mean(-1, keepdim=True)
    target = torch.log(radius)
    low = 0.5 * (math.log(8.0) + target)
    spread = y.square().mean(-1).sqrt()
    x = torch.maximum(low, 0.5 * (math.log(2.0) + target) - torch.log(spread))
    high = torch.full_like(x, torch.inf)
    ceiling = 0.97 * math.log(torch.finfo(d.dtype).max)
    tolerance = 450 * torch.finfo(d.dtype).eps
    for iteration in range(_MAX_ITERATIONS):
        b = torch.exp(x)
        u, normalizer = _log_ratio(d, y, b)
        ratio = torch.exp(u)
        divergence_at_b = kl_of_log_ratio(u).mean(-1)
        residual = torch.log(divergence_at_b) - target
        low = torch.where(residual < 0, x, low)
        high = torch.where(residual < 0, high, x)
        saturated = x >= ceiling
        resolution = 4 * torch.finfo(d.dtype).eps * x.abs().clamp(min=1)
        done = (residual.abs() <= tolerance) | (high - low <= resolution) | saturated
        if bool(done.all()):
            break
        center = (ratio * y).mean(-1, keepdim=True)
        slope = b * b * (ratio * (y - center).square()).mean(-1) / divergence_at_b
        newton = x - residual / slope
        bounded = torch.where(torch.isfinite(high), (low + high) / 2, x + _LONGEST_STEP)
        # KL has plateaus in b, between the gaps of close losses: a flat slope must not throw x out of reach, and
        # rounding there can let Newton creep, while halving the bracket cannot.
        within = (newton > low) & (newton < torch.minimum(high, x + _LONGEST_STEP))
        trusted = within & (iteration < _NEWTON_ITERATIONS)
        step = torch.where(trusted, newton, bounded).clamp(max=ceiling)
        x = torch.where(done, x, step)
    else:
        raise RuntimeError(f"the KL ball's multiplier did not converge in {_MAX_ITERATIONS} iterations")
    return Dual(torch.expm1(u), normalizer / b, 1 / b, saturated)


@solve_penalized.register
def _kl_penalized(divergence: KL, d: Tensor, strength: Tensor) -> Dual:
    """Return ``p = softmax(d / strength)``; the value is ``strength * log mean exp(d / strength)``."""
    y = d - d.mean(-1, keepdim=True)
    b = 1 / strength
    u, normalizer = _log_ratio(d, y, b)
    return Dual(torch.expm1(u), normalizer / b, strength, torch.zeros_like(strength, dtype=torch.bool))


# --- chi-square -------------------------------------------------------------------------------------------


def _active_moments(d: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and standard deviation (1/count) of the active entries of each row."""
    count = active.sum(-1).to(d.dtype)
    mean = torch.where(active, d, 0.0).sum(-1) / count
    deviation = torch.where(active, d - mean[:, None], 0.0).square().sum(-1) / count
    return count, mean, deviation.sqrt()


@solve_constrained.register
def _chi_square_constrained(divergence: ChiSquare, d: Tensor, radius: Tensor) -> Dual:
    """Shrink the support to ``{d > eta}`` until it stays, ``eta = mean - std / sqrt(c)`` of the support.

    With k of n losses in the support, ``c = (k/n)(1 + 2 radius) - 1`` and ``n p = (n/k)(1 + sqrt(c)(d - mean)/std)``.
    Finite and exact: including an entry below the final threshold only lowers the threshold, so nothing that
    belongs to the support is ever dropped (the argument of Michelot 1986 for simplex projection).
    """
    n = d.shape[-1]
    active = torch.ones_like(d, dtype=torch.bool)
    while True:
        count, mean, deviation = _active_moments(d, active)
        c = (count - n) / n + 2 * radius * (count / n)
        saturated = (c <= 0) | (deviation <= 0)
        root = torch.where(saturated, 1.0, c).sqrt()
        spread = torch.where(saturated, 1.0, deviation)
        threshold = mean - spread / root
        kept = active & ((d > threshold[:, None]) | saturated[:, None])
        if bool((kept == active).all()):
            break
        active = kept
    tilt = ((n - count) / count)[:, None] + (n / count * root / spread)[:, None] * (d - mean[:, None])
    strength = count / n * spread / root
    return Dual(torch.where(active, tilt, -1.0), threshold + strength, strength, saturated)


@solve_penalized.register
def _chi_square_penalized(divergence: ChiSquare, d: Tensor, strength: Tensor) -> Dual:
    """Project ``d / (n strength)`` on the simplex: ``n p = n/k + (d - mean) / strength`` on the support of k losses."""
    n = d.shape[-1]
    active = torch.ones_like(d, dtype=torch.bool)
    while True:
        count, mean, _ = _active_moments(d, active)
        threshold = mean - strength * (n / count)
        kept = active & (d > threshold[:, None])
        if bool((kept == active).all()):
            break
        active = kept
    tilt = ((n - count) / count)[:, None] + (d - mean[:, None]) / strength[:, None]
    saturated = torch.zeros_like(strength, dtype=torch.bool)
    return Dual(torch.where(active, tilt, -1.0), threshold + strength, strength, saturated)


# --- CVaR -------------------------------------------------------------------------------------------------


def _cvar(divergence: CVaR, d: Tensor, parameter: Tensor) -> Dual:
    """Select the worst ``alpha n`` losses; the fraction left at the boundary is shared equally among its ties."""
    n = d.shape[-1]
    tail = divergence.alpha * n  # never rounded: value and weights are continuous in alpha
    whole = math.floor(tail)
    position = min(n, whole + 1 if tail > whole else whole)
    threshold = torch.kthvalue(d, n - position + 1, dim=-1).values
    above = d > threshold[:, None]
    tied = d == threshold[:, None]
    higher, equal = above.sum(-1).to(d.dtype), tied.sum(-1).to(d.dtype)
    if divergence.alpha > 0.5:  # the same number twice; near alpha = 1 the second form would cancel
        left_over = (n - higher - equal) - (1 - divergence.alpha) * (n - equal)
    else:
        left_over = (tail - higher) - equal * divergence.alpha
    boundary = left_over / (equal * divergence.alpha)
    full = (1 - divergence.alpha) / divergence.alpha
    tilt = torch.where(above, full, torch.where(tied, boundary[:, None], -1.0)).to(d.dtype)
    zero = torch.zeros_like(threshold)
    return Dual(tilt, threshold, zero, torch.zeros_like(threshold, dtype=torch.bool))


solve_constrained.register(CVaR, _cvar)
solve_penalized.register(CVaR, _cvar)
