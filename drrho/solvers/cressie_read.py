"""Cressie-Read divergences: weights on a one-parameter path of powers, whose parameter is found by Newton.

With ``w = v - d`` for orders k < 1 and ``w = (v + d)_+`` for k > 1, the optimal ratios are ``t ~ w^(1 / (k - 1))``,
``v > 0``: the distance of the maximum from the pole of phi*', or from the edge of the support. Powers of w are taken
about the mean, ``w = V (1 -+ y / V)``, where losses matter that lie there, else about the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import SERIES_BELOW, Divergence, difference_quotient, expm1_minus
from drrho.solvers.dual import Dual, Found, MixedTilt
from drrho.solvers.root import EPS, Bracket, Residual, Root, Safeguard, find_root
from drrho.solvers.rows import Block, Chosen, Rows, by_parts, column, some

_ITERATIONS = 400
_STARTING_ITERATIONS = 41  # on a part of the losses
_NEWTON_ITERATIONS = 50  # then bisection
_SHARES = 60  # passes to mix two sides of a jump
_LONGEST_STEP = 10.0  # in log v
_TOLERANCE = 450 * EPS
_FAR = 30.0  # exponent at the maximum beyond which the mean is no origin for the sums
_NEAR_ONE = 0.1  # distance of the order from one below which the moments of w are differences that cancel
_FINE = 1e-3  # spread of the exponents below which series replace differences
_ENDS = (math.log(1e-290), math.log(1e290))


class PathTilt(NamedTuple):
    """Ratios ``(w / unit)^(1 / (k - 1)) / total`` minus one, ``[rows]`` numbers for a row each."""

    order: float
    origin: np.ndarray  # of d in w: the mean, or the maximum, which is 0
    unit: np.ndarray  # w at the origin
    log_total: np.ndarray  # log of the mean power

    def tilt(self, d: Tensor) -> Tensor:
        """Return the tilt of losses ``[rows, width]``."""
        return self._log_ratio(d).expm1_()

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return the ratio, which may be so small that its tilt is -1."""
        return self._log_ratio(d).exp_() if bool((tilt < -0.5).any()) else tilt + 1

    def _log_ratio(self, d: Tensor) -> Tensor:
        origin, unit, log_total = (column(field, d.device) for field in (self.origin, self.unit, self.log_total))
        return _exponent(self.order, (d - origin).div_(unit)).sub_(log_total)


class _Path(NamedTuple):
    """At given v, ``[rows]``: D, ``d log D / d log v``, the slope of the mean; those of `PathTilt`.

    The mean is ``(k - 1) log(mean power of w)``, also over log v.
    """

    distance: np.ndarray
    slope: np.ndarray
    mean_slope: np.ndarray
    origin: np.ndarray
    unit: np.ndarray
    log_total: np.ndarray


_ValueAndSlope = Callable[[_Path], tuple[np.ndarray, np.ndarray]]


def cressie_read_ball(divergence: Divergence, rows: Rows, radius: np.ndarray) -> Found:
    """Solve ``log D = log radius`` in ``log v``; D falls in v, with slope -2 at the far end."""
    target = np.log(radius)
    # Far out, ratios are 1 + y / |k - 1| V.
    tolerated = _TOLERANCE + 4 * EPS / np.sqrt(np.maximum(radius, _FINE**2))

    def residual(path: _Path) -> tuple[np.ndarray, np.ndarray]:
        return np.log(path.distance) - target, path.slope

    def start(sums: _Sums) -> np.ndarray:
        unit = sums.deviation / (abs(sums.order - 1) * np.sqrt(2 * radius))
        return np.maximum(unit + sums.sign * sums.center, 1e-3 * unit)

    return _solve(divergence, rows, start, residual, tolerated, None)


def cressie_read_penalty(divergence: Divergence, rows: Rows, strength: np.ndarray) -> Found:
    """Solve ``mean t = 1`` in ``log v`` for ``t = (kappa w)^(1 / (k - 1))``, ``kappa = |k - 1| / strength``.

    In the form ``(mean t)^(k - 1) = 1``: next to order 1 the mean itself is a large power of v.
    """
    k = _order_of(divergence)
    unit = strength / abs(k - 1)

    def residual(path: _Path) -> tuple[np.ndarray, np.ndarray]:
        return np.log(unit / path.unit) - (k - 1) * path.log_total, -path.mean_slope

    def start(sums: _Sums) -> np.ndarray:
        return np.maximum(unit + sums.sign * sums.center, 1e-3 * unit)

    return _solve(divergence, rows, start, residual, np.full_like(strength, _TOLERANCE), unit)


def _solve(
    divergence: Divergence,
    rows: Rows,
    start: Callable[[_Sums], np.ndarray],
    residual: _ValueAndSlope,
    tolerance: np.ndarray,
    unit: np.ndarray | None,
) -> Found:
    """Find the root of a residual that falls in ``x = log v``."""
    k = _order_of(divergence)
    with np.errstate(all="ignore"):
        sums, condensed, bracket = _Sums(k, rows), rows.condensed(), Bracket.open(len(tolerance))
        if condensed is None:
            x = np.log(start(sums))
        else:
            part, rough = _Sums(k, condensed), np.full_like(tolerance, 1e-3)
            around = Bracket.open(len(tolerance))
            x = _iterate(part, np.log(start(part)), around, residual, rough, _STARTING_ITERATIONS, None)[0].x
        failure = f"the multipliers of {divergence} did not converge in {_ITERATIONS} iterations"
        (x, saturated), path = _iterate(sums, x, bracket, residual, tolerance, _ITERATIONS, failure)
        if unit is None and k < 1:  # weights of 1e-290 beside the maximum's may be in the ball
            saturated = saturated & ~(residual(path)[0] <= 0)
        missed = (
            (np.abs(residual(path)[0]) > tolerance) & (bracket.low > -np.inf) & (bracket.high < np.inf) & ~saturated
        )
        if k > 2 and some(missed):
            low, high = (sums(np.exp(np.where(missed, end, x))) for end in (bracket.low, bracket.high))
            return _across_a_jump(divergence, rows, low, high, missed, saturated, unit, residual)
        # t^(k - 1) = kappa w = total^(1 - k) w / unit, and 1 + (k - 1) s, where s = (d - threshold) / strength
        offset = np.expm1((1 - k) * path.log_total) / (k - 1)
        if unit is None:
            unit = np.exp((k - 1) * path.log_total) * path.unit
        strength = abs(k - 1) * unit
        threshold = path.origin - strength * offset
    return Found(_tilt(k, path), Dual(threshold, strength, path.distance, saturated, (path.origin, offset)))


def _tilt(order: float, path: _Path) -> PathTilt:
    return PathTilt(order, path.origin, path.unit, path.log_total)


def _across_a_jump(
    divergence: Divergence,
    rows: Rows,
    low: _Path,
    high: _Path,
    missed: np.ndarray,
    saturated: np.ndarray,
    unit: np.ndarray | None,
    residual: _ValueAndSlope,
) -> Found:
    """Mix the ratios on both sides of a v between which there is no number that has the mean or the divergence.

    Above order 2 the ratio of a loss leaves zero with an infinite slope in v: from one number to the next by 0.1 at
    order 20. The other losses' ratios are powers of the same w on both sides, so that their mean is of that form too.
    """
    k = _order_of(divergence)
    log_power = [path.log_total + np.log(path.unit) / (k - 1) for path in (low, high)]
    first, second = _tilt(k, low), _tilt(k, high)
    if unit is None:
        share, distance = _share_of_radius(divergence, rows, first, second, low, residual, missed)
        # The mean of the factors by which powers of w are divided
        log_factor = -log_power[0] + np.log1p(share * np.expm1(log_power[0] - log_power[1]))
        unit = np.exp((1 - k) * log_factor)
    else:
        below, above = (np.expm1(power - np.log(unit) / (k - 1)) for power in log_power)  # of the means from one
        share = np.where(missed, np.clip(-below / (above - below) * (1 + above), 0, 1), 0.0)
        mixed = MixedTilt(first, second, share)
        (distance,) = rows.host_means(lambda block: (divergence.phi_of_tilt(mixed.tilt(block.d)),))
        distance = np.where(missed, distance, low.distance)
    strength, offset = (k - 1) * unit, (high.unit / unit - 1) / (k - 1)
    threshold = high.origin - strength * offset
    tilt = MixedTilt(first, second, share)
    return Found(tilt, Dual(threshold, strength, distance, saturated, (high.origin, offset)))


def _share_of_radius(
    divergence: Divergence,
    rows: Rows,
    first: PathTilt,
    second: PathTilt,
    low: _Path,
    residual: _ValueAndSlope,
    missed: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of the second side makes D the radius, and D there; nothing of it where it was not missed."""
    k, distance = _order_of(divergence), low.distance

    def function(share: np.ndarray) -> Residual:
        nonlocal distance

        def sums(block: Block):
            one, other = first.tilt(block.d), second.tilt(block.d)
            tilt = torch.lerp(one, other, torch.as_tensor(rows.column(share), dtype=one.dtype))
            slope = (tilt + 1).clamp_(min=0).pow_(k - 1).sub_(1).div_(k - 1)
            return divergence.phi_of_tilt(tilt), (slope, other.sub_(one))

        found, slope = rows.host_means(sums)
        distance = np.where(missed, found, low.distance)
        value, _ = residual(low._replace(distance=distance))
        return Residual(np.where(missed, value, 0.0), -value * distance / slope)

    guard = Safeguard(np.full_like(distance, _TOLERANCE), _SHARES, None, _SHARES, (1.0, 1.0), (0.0, 1.0))
    start = Bracket(np.full_like(distance, -EPS), np.full_like(distance, 1 + EPS))
    share = find_root(function, np.where(missed, 0.5, 0.0), start, guard).x
    return share, distance


def _order_of(divergence: Divergence) -> float:
    order = divergence.cressie_read_order
    assert order is not None
    return order


def _iterate(
    sums: _Sums,
    x: np.ndarray,
    bracket: Bracket,
    residual: _ValueAndSlope,
    tolerance: np.ndarray,
    iterations: int,
    failure: str | None,
) -> tuple[Root, _Path]:
    guard = Safeguard(tolerance, iterations, failure, _NEWTON_ITERATIONS, (_LONGEST_STEP, _LONGEST_STEP), _ENDS)
    path = None

    def function(x: np.ndarray) -> Residual:
        nonlocal path
        path = sums(np.exp(x))
        value, slope = residual(path)
        return Residual(np.fmax(value, -np.inf), -value / slope)

    # Where no number of this precision gives the radius, the next larger v: D is below it.
    root = find_root(function, x, bracket, guard, from_above=True)
    assert path is not None
    return root, path


class _Sums:
    """Sums over powers of w of rows, as functions of v."""

    def __init__(self, order: float, rows: Rows) -> None:
        self.order, self.rows = order, rows
        self.sign = 1 if self.order < 1 else -1  # whether V = v - mean or V = v + mean
        self.center, _ = rows.mean_and_ties()
        origin = rows.column(self.center)

        def spread_out(block: Block):
            y = block.d - origin
            return y, (y, y)

        shift, square = rows.host_means(spread_out)
        self.center = self.center + shift
        self.deviation = np.sqrt(square)

    def __call__(self, v: np.ndarray) -> _Path:
        unit = v - self.sign * self.center
        # About the mean while it has a power at all, and the maximum is not too close to the pole, nor its power large.
        central = v > 1e-3 * unit if self.order < 1 else unit > -0.3 * self.center
        central &= np.log(v / np.where(central, unit, v)) / (self.order - 1) <= _FAR
        about_mean, about_top = (partial(self._sums, v, central=part) for part in (True, False))
        return _Path(*by_parts(central, about_mean, about_top))

    def _sums(self, v: np.ndarray, chosen: Chosen, *, central: bool) -> _Path:
        k, sign, rows = self.order, self.sign, self.rows.select(chosen)
        center, v = self.center[chosen], v[chosen]
        origin = center if central else np.zeros_like(center)
        unit = v - sign * origin
        zero, scale = rows.column(origin), rows.column(unit)
        logarithmic, near_one = abs(k) < 0.25, abs(k - 1) < _NEAR_ONE
        fine = central and bool((self.deviation[chosen] < _FINE * abs(k - 1) * unit).any())
        fine = fine and (k < 1 or bool((unit > 1 + center).all()))  # nothing outside the support

        def sums(block: Block):
            x = (block.d - zero).div_(scale)
            exponent = _exponent(k, x)
            ratio = torch.exp(exponent)
            power = torch.expm1(exponent) if central else ratio
            reciprocal = ratio.div_(x.mul(-sign).add_(1)) if central else ratio / x.mul(-sign).add_(1)
            if near_one:
                reciprocal.mul_(x).mul_(x)
            if k > 1:  # no weight, though the exponent may be less than one
                reciprocal.masked_fill_(x <= -1, 0.0)
            logarithm = (difference_quotient(k, exponent),) if logarithmic else ()
            return power, (power, x), reciprocal, x, *logarithm, *(_nonlinear(k, x, exponent) if fine else ())

        mass, gain, reciprocal, linear, *rest = rows.host_means(sums)
        quotient = rest.pop(0) if logarithmic else None
        if central:  # the mean of x is zero, and what is linear in x with it
            linear = linear / abs(k - 1)
            mass = rest[0] if fine else mass - linear
            quotient = rest[1] if fine else None if quotient is None else quotient - linear
            log_total = np.log1p(mass)
        else:
            log_total = np.log(mass)
        total = np.exp(log_total)
        tilted_x = gain / total  # mean of t x
        rate = np.exp((1 - k) * log_total)
        if logarithmic:
            assert quotient is not None
            # (mean t^k - 1) / k, by the quotients of powers, which are logarithms at k = 0
            distance = (np.exp(-k * log_total) * quotient - difference_quotient(-k, log_total)) / (k - 1)
        else:
            # mean t^k - 1, where t^(k - 1) = total^(1 - k) (1 -+ x)
            distance = (np.expm1((1 - k) * log_total) - sign * rate * tilted_x) / (k * (k - 1))
        # With W = mean(t w), H = mean(t / w): dD / d log v = v kappa / (k - 1)^2 (W H - 1), negative
        w_mean, h_mean = 1 - sign * tilted_x, reciprocal / total  # over unit
        if near_one:  # the sum was of x^2 / (1 -+ x), and 1 / (1 -+ x) = 1 +- x + x^2 / (1 -+ x)
            curved = h_mean
            h_mean = 1 + sign * tilted_x + curved
            spread = curved * w_mean - tilted_x**2
        else:
            spread = w_mean * h_mean - 1
        slope = -v * rate / unit * spread / (k - 1) ** 2 / distance
        if fine:
            slope = np.full_like(slope, -2.0) * v / unit  # where it would cancel
        return _Path(distance, slope, v * h_mean / unit, origin, unit, log_total)


def _exponent(order: float, x: Tensor) -> Tensor:
    """Return the log of ``(1 -+ x)_+^(1 / (k - 1))``, for ``w = unit (1 -+ x)``."""
    return torch.log1p((x if order > 1 else -x).clamp(min=-1)).div_(order - 1)


def _nonlinear(order: float, x: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``power - 1 - x / |k - 1|`` and ``(power^k - 1) / k - x / |k - 1|`` without cancellation."""
    nonlinear = _log1p_minus(x if order > 1 else -x) / (order - 1)
    quotient = expm1_minus(order * exponent) / order if order else 0.0
    return expm1_minus(exponent) + nonlinear, nonlinear + quotient


def _log1p_minus(x: Tensor) -> Tensor:
    """Return ``log(1 + x) - x`` without cancellation near 0."""
    near = x.abs() < SERIES_BELOW
    inside = torch.where(near, x, 0.0)
    total = torch.zeros_like(x)
    for j in range(16, 1, -1):
        total.add_((-1) ** (j + 1) / j).mul_(inside)
    return torch.where(near, total.mul_(inside), torch.log1p(x.clamp(min=-1)) - x)
