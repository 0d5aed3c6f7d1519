"""Independent solvers of ONE row: slow, plain, and built otherwise than a fast solver would be.

The scalar duals run in mpmath with 50 digits, by bisection only; CVaR sorts exact rationals; cvxpy is
given the primal problem as it is defined. Every solver takes a sequence of floats and returns an `Answer`
of floats. Conventions: chi-square phi(t) = (t - 1)^2 / 2, KL phi(t) = t log t - t + 1, `radius` bounds the
divergence itself, `alpha` is the tail fraction (Duchi & Namkoong, arXiv 1610.02581; Rockafellar & Uryasev
2000).
"""

from fractions import Fraction
from typing import NamedTuple

import mpmath as mp
import numpy as np

DIGITS = 50


class Answer(NamedTuple):
    """Value, value minus mean (each rounded once, at the end), and the worst-case weights."""

    value: float
    premium: float
    weights: np.ndarray


def _gaps(losses):
    """Distances below the maximum in high precision, and the number of exact ties at the maximum."""
    top = max(losses)
    gaps = [mp.mpf(top) - mp.mpf(z) for z in losses]
    return gaps, sum(gap == 0 for gap in gaps)


def _answer(losses, weights, penalty=0):
    mean = mp.fsum(map(mp.mpf, losses)) / len(losses)
    premium = mp.fsum(p * (mp.mpf(z) - mean) for p, z in zip(weights, losses, strict=True)) - penalty
    return Answer(float(mean + premium), float(premium), np.array([float(p) for p in weights]))


def _mean(losses):
    mean = float(mp.fsum(map(mp.mpf, losses)) / len(losses))
    return Answer(mean, 0.0, np.full(len(losses), 1 / len(losses)))


def _maximum(losses):
    gaps, ties = _gaps(losses)
    return _answer(losses, [mp.mpf(gap == 0) / ties for gap in gaps])


def _root(increasing, start):
    """The x > 0 where an increasing function changes sign: doubling, then bisection on log x to 22 digits."""
    low = high = mp.mpf(start)
    while increasing(low) > 0:
        low /= 16
    while increasing(high) < 0:
        high *= 16
    while high - low > mp.mpf(10) ** -22 * high:
        middle = mp.sqrt(low * high)
        if increasing(middle) > 0:
            high = middle
        else:
            low = middle
    return mp.sqrt(low * high)


def divergence(name, weights):
    """D(p || 1/n) of given float weights in high precision."""
    with mp.workdps(DIGITS):
        ratios = [mp.mpf(float(p)) * len(weights) for p in weights]
        if name == "chi2":
            terms = [(t - 1) ** 2 / 2 for t in ratios]
        else:
            terms = [(t * mp.log(t) if t > 0 else mp.mpf(0)) - t + 1 for t in ratios]
        return float(mp.fsum(terms) / len(ratios))


def dual(name, losses, strength, threshold, radius=0.0):
    """The dual objective strength * mean phi*((z - threshold) / strength) + threshold + strength * radius."""
    with mp.workdps(DIGITS):
        lam, nu = mp.mpf(strength), mp.mpf(threshold)
        scaled = [(mp.mpf(z) - nu) / lam for z in losses]
        conjugate = {"kl": mp.expm1, "chi2": lambda s: (max(1 + s, 0) ** 2 - 1) / 2}[name]
        mean = mp.fsum(conjugate(s) for s in scaled) / len(scaled)
        return float(lam * mean + nu + lam * mp.mpf(radius))


def kl_ball(losses, radius):
    """max <p, z> over KL(p || 1/n) <= radius: bisection on the inverse temperature of the softmax."""
    with mp.workdps(DIGITS):
        gaps, ties = _gaps(losses)
        n, target = len(losses), mp.mpf(radius)
        if target <= 0 or ties == n:
            return _mean(losses)
        if target >= mp.log(mp.mpf(n) / ties):
            return _maximum(losses)

        def tilt(inverse_temperature):
            raw = [mp.exp(-inverse_temperature * gap) for gap in gaps]
            total = mp.fsum(raw)
            return [w / total for w in raw], total

        def excess(inverse_temperature):
            weights, total = tilt(inverse_temperature)
            tilted = mp.fsum(p * gap for p, gap in zip(weights, gaps, strict=True))
            return mp.log(n / total) - inverse_temperature * tilted - target

        return _answer(losses, tilt(_root(excess, mp.sqrt(8 * target) / max(gaps)))[0])


def chi_square_ball(losses, radius):
    """max <p, z> in the chi-square ball: bisection on mean (z - eta)_+^2 / (mean (z - eta)_+)^2 = 1 + 2 r."""
    with mp.workdps(DIGITS):
        gaps, ties = _gaps(losses)
        n, target = len(losses), 1 + 2 * mp.mpf(radius)
        if radius <= 0 or ties == n:
            return _mean(losses)
        if target * ties >= n:
            return _maximum(losses)

        def positive_parts(depth):
            return [max(depth - gap, mp.mpf(0)) for gap in gaps]

        def excess(inverse_depth):
            parts = positive_parts(1 / inverse_depth)
            return n * mp.fsum(x * x for x in parts) / mp.fsum(parts) ** 2 - target

        parts = positive_parts(1 / _root(excess, 1 / max(gaps)))
        total = mp.fsum(parts)
        return _answer(losses, [x / total for x in parts])


def cvar(losses, alpha):
    """Mean of the largest alpha * n losses, the boundary sample in part, by sorting exact rationals."""
    exact = [Fraction(float(z)) for z in losses]
    n = len(exact)
    budget = Fraction(alpha) * n
    weights = [Fraction(0)] * n
    for level in sorted(set(exact), reverse=True):
        tied = [i for i in range(n) if exact[i] == level]
        taken = min(Fraction(len(tied)), budget)
        for i in tied:
            weights[i] = taken / (len(tied) * Fraction(alpha) * n)
        budget -= taken
    mean = sum(exact) / n
    premium = sum(p * (z - mean) for p, z in zip(weights, exact, strict=True))
    return Answer(float(mean + premium), float(premium), np.array([float(p) for p in weights]))


def kl_penalty(losses, strength):
    """max <p, z> - strength * KL(p || 1/n) = strength * log mean exp(z / strength)."""
    with mp.workdps(DIGITS):
        if strength == 0:
            return _maximum(losses)
        gaps, _ = _gaps(losses)
        lam, n = mp.mpf(strength), len(losses)
        raw = [mp.exp(-gap / lam) for gap in gaps]
        total = mp.fsum(raw)
        weights = [w / total for w in raw]
        kl = mp.log(n / total) - mp.fsum(p * gap for p, gap in zip(weights, gaps, strict=True)) / lam
        return _answer(losses, weights, lam * kl)


def chi_square_penalty(losses, strength):
    """max <p, z> - strength * chi2(p || 1/n): bisection on eta until sum (z - eta)_+ = n * strength."""
    with mp.workdps(DIGITS):
        if strength == 0:
            return _maximum(losses)
        gaps, _ = _gaps(losses)
        lam, n = mp.mpf(strength), len(losses)

        def weights_at(depth):
            return [max(depth - gap, mp.mpf(0)) / (n * lam) for gap in gaps]

        weights = weights_at(_root(lambda depth: mp.fsum(weights_at(depth)) - 1, lam))
        chi2 = mp.fsum((n * p - 1) ** 2 for p in weights) / (2 * n)
        return _answer(losses, weights, lam * chi2)


def bernoulli_kl_root(mean, radius):
    """The x >= mean with x log(x / mean) + (1 - x) log((1 - x) / (1 - mean)) = radius, or 1."""
    with mp.workdps(DIGITS):
        a, target = mp.mpf(mean), mp.mpf(radius)
        if target >= -mp.log(a):
            return 1.0
        low, high = a, mp.mpf(1)
        for _ in range(200):
            x = (low + high) / 2
            kl = x * mp.log(x / a) + (1 - x) * mp.log((1 - x) / (1 - a))
            low, high = (x, high) if kl < target else (low, x)
        return float(low)


def conic(name, losses, *, radius=None, strength=None, alpha=None):
    """The primal problem as defined, handed to cvxpy: accurate to about 1e-6 of the range."""
    import cvxpy as cp

    z = np.asarray(losses, dtype=float)
    n = len(z)
    p = cp.Variable(n, nonneg=True)
    uniform = np.full(n, 1 / n)
    divergences = {"kl": cp.sum(cp.kl_div(p, uniform)), "chi2": cp.sum_squares(n * p - 1) / (2 * n)}
    constraints, objective = [cp.sum(p) == 1], p @ z
    if alpha is not None:
        constraints.append(p <= 1 / (alpha * n))
    elif radius is not None:
        constraints.append(divergences[name] <= radius)
    else:
        objective = objective - strength * divergences[name]
    problem = cp.Problem(cp.Maximize(objective), constraints)
    problem.solve(solver=cp.CLARABEL)
    return Answer(float(problem.value), float(problem.value - z.mean()), np.asarray(p.value))
