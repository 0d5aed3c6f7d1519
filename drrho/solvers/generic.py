"""Any strictly convex phi: safeguarded Newton on threshold and strength together, from phi* and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from drrho.divergences import Divergence
from drrho.solvers.rows import Block, Dual, Rows

_NEWTON_ITERATIONS = 60  # of one strength; then bisection
_MAX_ITERATIONS = 2000
_LONGEST_STEP = 2.0  # in log strength
_FLOOR = np.log(1e-290)
_EPS = np.finfo(np.float64).eps
_FINE = 1e-2  # spread of (d - eta) / lambda below which differences are replaced by quadratures
_FINE_LONG = 3e-4  # the same on long rows, whose rounding averages out


class _Moments(NamedTuple):
    """At given multipliers, with ``s = (d - threshold) / strength`` and ``h = phi*''(s)``, each ``[rows]``."""

    surplus: np.ndarray  # mean of the ratios, minus one
    distance: np.ndarray
    h: np.ndarray
    hs: np.ndarray
    hss: np.ndarray


def generic_ball(divergence: Divergence, rows: Rows, radius: np.ndarray) -> Dual:
    """Solve ``mean t = 1`` and ``D = radius`` for ``t = phi*'((d - threshold) / strength)``.

    Both are monotone: the mean in the threshold, and D, at the threshold that gives mean 1, in the strength, with
    ``d log D / d log strength = -mean(h) Var_h(s) / D``.
    """
    return _solve(divergence, rows, radius=radius, strength=None)


def generic_penalty(divergence: Divergence, rows: Rows, strength: np.ndarray) -> Dual:
    """Solve ``mean t = 1`` for ``t = phi*'((d - threshold) / strength)``."""
    return _solve(divergence, rows, radius=None, strength=strength)


def _solve(divergence: Divergence, rows: Rows, *, radius: np.ndarray | None, strength: np.ndarray | None) -> Dual:
    mean, _ = rows.mean_and_ties()
    origin = rows.column(mean)

    def spread_out(block: Block):
        y = block.d - origin
        return ((y, y),)

    deviation = np.sqrt(rows.host_means(spread_out)[0])
    if strength is not None:
        x = np.log(strength)
    else:
        assert radius is not None
        at_zero = float(divergence.curvature(torch.zeros(1, dtype=torch.float64))[0])
        x = np.log(deviation) + 0.5 * np.log((at_zero if 0 < at_zero < np.inf else 1.0) / (2 * radius))
        x = np.maximum(x, np.log(-4 * mean))  # the maximum must lie in the domain of phi*
    start = _State(x, mean.copy())
    sample = rows.sample()
    if sample is not None:
        begun = _iterate(divergence, sample, start, deviation, radius, tolerance=1e-3, attempts=30).state
        start = _State(x if radius is None else begun.x, begun.threshold)
    state, distance, saturated, fine = _iterate(
        divergence, rows, start, deviation, radius, tolerance=1e-13, attempts=_MAX_ITERATIONS
    )
    return Dual(state.threshold, np.exp(state.x), distance, saturated, fine)


class _State(NamedTuple):
    x: np.ndarray  # log strength
    threshold: np.ndarray


class _Outcome(NamedTuple):
    state: _State
    distance: np.ndarray
    saturated: np.ndarray
    fine: bool


def _iterate(
    divergence: Divergence,
    rows: Rows,
    state: _State,
    deviation: np.ndarray,
    radius: np.ndarray | None,
    *,
    tolerance: float,
    attempts: int,
) -> _Outcome:
    x, threshold = state
    size, finest = len(x), _FINE if rows.count < 2**17 else _FINE_LONG
    x_low, x_high = np.full(size, -np.inf), np.full(size, np.inf)
    low, high = np.full(size, -1.0), np.zeros(size)  # of the threshold at this strength
    tries = np.zeros(size, dtype=int)  # at this strength
    while True:
        attempts -= 1
        strength = np.exp(x)
        fine = bool((deviation / strength < finest).any())
        moments = _moments(divergence, rows, threshold, strength, fine=fine)
        tries += 1
        with np.errstate(all="ignore"):
            # Newton on log mean t, which is closer to a line than the mean
            step = np.log1p(moments.surplus) * (1 + moments.surplus) * strength / moments.h
            spread = moments.hss / moments.h - (moments.hs / moments.h) ** 2
        low = np.where(moments.surplus > 0, np.maximum(low, threshold), low)
        high = np.where(moments.surplus <= 0, np.minimum(high, threshold), high)
        usable = np.isfinite(step) & np.isfinite(moments.h) & np.isfinite(moments.distance)
        # Newton squares the error, measured against the spread of the losses or, if that is less, the strength.
        scale = np.minimum(deviation, strength)
        settled = usable & (np.abs(step) <= np.maximum(1e-7 * scale, 4 * _EPS * np.abs(threshold)))
        collapsed = high - low <= 4 * _EPS * np.abs(low)
        balanced = settled | collapsed | (tolerance > 1e-9) & usable & (np.abs(step) <= 1e-3 * scale)
        step = np.where(usable & ~collapsed, step, 0.0)
        saturated = np.zeros(size, dtype=bool)
        with np.errstate(all="ignore"):  # D at the threshold that the step leads to
            distance = moments.distance - moments.hs * step / strength
            distance = np.where(distance > 0, distance, moments.distance)
        if radius is None:
            done = balanced
            next_x = x
        else:
            with np.errstate(all="ignore"):
                residual = np.log(distance) - np.log(radius)
                newton = x + residual * distance / (moments.h * spread)
            x_low = np.where(balanced & (residual > 0), x, x_low)
            x_high = np.where(balanced & (residual <= 0), x, x_high)
            saturated = balanced & (x <= _FLOOR)
            reached = np.abs(residual) <= tolerance + 4 * _EPS / np.sqrt(np.maximum(radius, finest**2))
            done = balanced & (reached | saturated | (x_high - x_low <= 4 * _EPS * np.maximum(np.abs(x), 1)))
            longest = np.clip(newton, x - _LONGEST_STEP, x + _LONGEST_STEP)
            inside = np.isfinite(newton) & (longest > x_low) & (longest < x_high)
            away = np.where(residual > 0, x + _LONGEST_STEP, x - _LONGEST_STEP)
            with np.errstate(invalid="ignore"):
                halved = np.where(np.isfinite(x_low + x_high), (x_low + x_high) / 2, away)
            next_x = np.maximum(np.where(inside, longest, halved), _FLOOR)
        if done.all() or (attempts == 0 and tolerance > 1e-9):
            lost = collapsed & ~(np.abs(moments.surplus) < 1e-6) & ~saturated
            if tolerance < 1e-9 and lost.any():
                raise RuntimeError(
                    f"no threshold of {divergence} makes the weights sum to 1: the nearest is off by "
                    f"{moments.surplus[lost][0]:.3g}, since conjugate_gradient jumps there; phi must be strictly convex"
                )
            return _Outcome(_State(x, np.where(collapsed, threshold, threshold + step)), distance, saturated, fine)
        if attempts == 0:
            raise RuntimeError(
                f"the multipliers of {divergence} did not converge in {_MAX_ITERATIONS} passes: phi must be strictly "
                "convex, and conjugate and conjugate_gradient must belong to it"
            )
        # Rows in balance take a step in the strength, the others in the threshold alone.
        moved = balanced & ~done
        proposal = threshold + step
        with np.errstate(all="ignore"):  # d threshold / d strength = -E_h[s]: followed on a logarithmic scale
            elasticity = np.clip(-moments.hs / moments.h * strength / proposal, 0.0, 1.0)
            followed = proposal * np.exp(elasticity * (next_x - x))
        proposal = np.where(moved & np.isfinite(followed), followed, proposal)
        low, high = np.where(moved, -1.0, low), np.where(moved, 0.0, high)
        tries = np.where(moved, 0, tries)
        x = np.where(moved, next_x, x)
        trusted = (proposal > low) & (proposal < high) & (usable | moved) & (tries < _NEWTON_ITERATIONS)
        # A threshold close to the maximum is close on its own scale: halve the exponent, not the number.
        with np.errstate(invalid="ignore"):
            middle = np.where((high < 0) & (low < 4 * high), -np.sqrt(low * high), (low + high) / 2)
        threshold = np.where(done, threshold + step, np.where(trusted, proposal, middle))


def _moments(
    divergence: Divergence, rows: Rows, threshold: np.ndarray, strength: np.ndarray, *, fine: bool
) -> _Moments:
    origin, unit = rows.column(threshold), rows.column(strength)

    def sums(block: Block):
        s = (block.d - origin).div_(unit)
        conjugate = divergence.conjugate(s)
        ratio, h = divergence.ratio_and_curvature(s)
        if fine:
            tilt, cost = divergence.tilt(s), divergence.cost(s)
        else:
            tilt, cost = ratio - 1, s * ratio - conjugate
        hs = h * s
        return tilt, cost, h, hs, (hs, s), conjugate

    surplus, distance, h, hs, hss, conjugate = rows.host_means(sums)
    # Beyond the domain of phi*: the threshold is too low.
    outside = ~np.isfinite(conjugate)
    surplus = np.where(outside | np.isnan(surplus), np.inf, surplus)
    return _Moments(surplus, np.where(outside, np.nan, distance), h, hs, hss)
