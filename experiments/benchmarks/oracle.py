"""Premiums in extended precision, by other means than the library's: scalar equations over centered losses.

A premium is risk minus mean. Balls are solved along the one-parameter path of optimal weights, on which D decreases, by
a bracketed secant in ``numpy.longdouble`` (64-bit significand on x86, where it reaches 1e-11; plain double elsewhere).
`disagreement` holds them against the one-variable dual problems, minimized by bisection in 50 digits of mpmath.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Extended = np.longdouble
_RESOLUTION = 1e-14  # of log D at the solution; the premium's relative error is about half of it
#: Type, first step and resolution: a cheap solution brackets the fine one.
_STAGES = ((np.float64, 0.5, 1e-7), (Extended, 1e-6, _RESOLUTION))
_MAX_STEPS = 200


class Path(NamedTuple):
    """Optimal weights of one divergence's balls: a scalar moves them from the maximum to uniform."""

    weigh: Callable[[Any, Any], tuple[Any, Any]]
    """Maps losses of mean 0 and the path's scalar to ``n p - 1`` and D."""
    maximal_radius: Callable[[Any], Any]
    """Maps the share of losses tied at the maximum to the radius from which the risk is the maximum."""


def _chi_square(z: Any, x: Any) -> tuple[Any, Any]:
    ratio = np.maximum(z - z.max() + np.exp(x), 0)  # p ~ (z - eta)_+, eta = max - e^x
    center = ratio.mean()
    tilt = (ratio - center) / center
    return tilt, (tilt * tilt).mean() / 2


def _kl(z: Any, x: Any) -> tuple[Any, Any]:
    exponent = z / np.exp(x)  # p ~ exp(z / tau), tau = e^x
    growth = np.expm1(exponent)
    center = growth.mean()
    tilt = (growth - center) / (1 + center)
    log_ratio = exponent - np.log1p(center)
    return tilt, (tilt * log_ratio).mean() + log_ratio.mean()


def _hellinger(z: Any, x: Any) -> tuple[Any, Any]:
    root = 1 / (z.max() - z + np.exp(x))  # p ~ (eta - z)^-2, eta = max + e^x
    root /= np.sqrt((root * root).mean())
    return (root - 1) * (root + 1), 2 * ((root - 1) ** 2).mean()


PATHS = {
    "chi-square": Path(_chi_square, lambda share: (1 / share - 1) / 2),
    "KL": Path(_kl, lambda share: -np.log(share)),
    "Hellinger": Path(_hellinger, lambda share: 4 * (1 - np.sqrt(share))),
}


def ball_premium(losses: Any, divergence: str, radius: float) -> Any:
    """Return ``max <p, losses> - mean`` over ``D(p || 1/n) <= radius`` for a divergence of ``PATHS``."""
    z, path = _centered(losses), PATHS[divergence]
    bound = Extended(radius)
    if bound >= path.maximal_radius((z == z.max()).mean(dtype=Extended)):
        return z.max()

    x = np.log(z.std() / np.sqrt(2 * bound))  # exact for small radii
    for dtype, step, resolution in _STAGES:
        x = _solve(path, z.astype(dtype), dtype(bound), dtype(x), step, resolution)
    tilt, _ = path.weigh(z, x)
    return (tilt * z).mean()


def cvar_premium(losses: Any, alpha: float) -> Any:
    """Return the mean of the worst ``alpha * n`` losses, the boundary one by its fraction, minus the mean of all."""
    z = np.sort(_centered(losses))[::-1]
    tail = Extended(alpha) * len(z)
    whole = int(np.floor(tail))
    boundary = (tail - whole) * z[whole] if whole < len(z) else 0
    return (z[:whole].sum() + boundary) / tail


def kl_penalty_premium(losses: Any, strength: float) -> Any:
    """Return ``strength * log mean exp(losses / strength) - mean``."""
    z = _centered(losses)
    return Extended(strength) * np.log1p(np.expm1(z / Extended(strength)).mean())


def power_penalty_premium(losses: Any, strength: float, order: float) -> Any:
    """Return ``max <p, losses> - strength * D - mean`` for chi-square (order 2) or Cressie-Read of order 1.5."""
    z, price = _centered(losses), Extended(strength)
    power = 1 / (Extended(order) - 1)

    def ratio(threshold: Any) -> Any:
        return np.maximum(1 + (z - threshold) / (price * power), 0) ** power

    # With the threshold at the mean the ratios' mean is >= 1 (Jensen): the root is above.
    threshold = _root(lambda nu: ratio(nu).mean() - 1, z.mean(), z.max() / 8, _RESOLUTION)
    tilt = ratio(threshold) - 1
    return (tilt * z).mean() - price * power_divergence(tilt, order)


def power_divergence(tilt: Any, order: float) -> Any:
    """Return D of ``n p - 1`` for chi-square (order 2) or Cressie-Read of order 1.5."""
    if order == 2:
        return (tilt * tilt).mean() / 2
    root_tilt = tilt / (np.sqrt(1 + tilt) + 1)
    return (root_tilt**2 * (root_tilt + Extended(1.5))).mean() / Extended(0.75)


def disagreement(losses: Any, radii: tuple[float, ...]) -> float:
    """Return the largest relative difference from mpmath's minimum of the dual, over divergences and radii."""
    z = _centered(losses)
    worst = 0.0
    for divergence in PATHS:
        for radius in radii:
            dual = _dual_premium(z, divergence, radius)
            worst = max(worst, abs(float(_exactly(ball_premium(z, divergence, radius)) / dual - 1)))
    return worst


def _solve(path: Path, z: Any, bound: Any, start: Any, step: float, resolution: float) -> Any:
    return _root(lambda x: np.log(path.weigh(z, x)[1] / bound), start, step, resolution)


def _centered(losses: Any) -> Any:
    z = np.asarray(losses).astype(Extended)
    z = z - z.mean()
    return z - z.mean()


def _root(function: Callable[[Any], Any], start: Any, step: float, resolution: float) -> Any:
    """Return the zero of a decreasing function: a bracket grown from a guess, then Illinois' secant and halving."""
    low = high = start
    at_low = at_high = function(start)
    reach = step
    while at_low < 0:
        high, at_high = low, at_low
        low, reach = low - reach, 2 * reach
        at_low = function(low)
    while at_high > 0:
        low, at_low = high, at_high
        high, reach = high + reach, 2 * reach
        at_high = function(high)
    for count in range(_MAX_STEPS):
        if min(abs(at_low), abs(at_high)) <= resolution:
            return low if abs(at_low) < abs(at_high) else high
        secant = (low * at_high - high * at_low) / (at_high - at_low)
        x = (low + high) / 2 if count % 4 == 3 or not low < secant < high else secant
        if not low < x < high:
            return x
        value = function(x)
        if abs(value) <= resolution:
            return x
        if value > 0:
            low, at_low, at_high = x, value, at_high / 2
        else:
            high, at_high, at_low = x, value, at_low / 2
    raise RuntimeError(f"the oracle did not converge in {_MAX_STEPS} steps")


def _dual_premium(z: Any, divergence: str, radius: float) -> Any:
    """Return the minimum of the dual over its one variable, in 50 digits, for centered losses."""
    from mpmath import mp

    with mp.workdps(50):
        losses, r = [_exactly(loss) for loss in z], mp.mpf(radius)
        top = max(losses)

        def mean(values: Any) -> Any:
            return mp.fsum(values) / len(losses)

        # Each: the dual's value and its slope's sign, at a distance e^x from the end that is the hard maximum.
        def chi_square(x: Any) -> tuple[Any, Any]:
            eta = top - mp.exp(x)
            above = [max(loss - eta, 0) for loss in losses]
            norm = mp.sqrt((1 + 2 * r) * mean(a * a for a in above))
            return eta + norm, (1 + 2 * r) * mean(above) - norm

        def kl(x: Any) -> tuple[Any, Any]:
            tau = mp.exp(x)
            weights = [mp.exp((loss - top) / tau) for loss in losses]
            normalizer = mp.log(mean(weights))
            gain = mean(w * (loss - top) for w, loss in zip(weights, losses, strict=True)) / mean(weights)
            return top + tau * (normalizer + r), tau * (normalizer + r) - gain

        def hellinger(x: Any) -> tuple[Any, Any]:
            eta, share = top + mp.exp(x), (1 - r / 4) ** 2
            inverse = [1 / (eta - loss) for loss in losses]
            return eta - share / mean(inverse), mean(inverse) ** 2 - share * mean(i * i for i in inverse)

        solve = {"chi-square": chi_square, "KL": kl, "Hellinger": hellinger}[divergence]
        low, high = mp.mpf(-60), mp.mpf(60)
        for _ in range(170):
            middle = (low + high) / 2
            low, high = (low, middle) if solve(middle)[1] > 0 else (middle, high)
        return solve(low)[0] - mean(losses)


def _exactly(value: Any) -> Any:
    """Return an mpmath number equal to an extended one."""
    from mpmath import mp

    high = float(value)
    return mp.mpf(high) + mp.mpf(float(value - Extended(high)))
