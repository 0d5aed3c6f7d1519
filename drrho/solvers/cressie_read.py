"""Cressie-Read divergences: weights on a one-parameter path of powers, whose parameter is found by Newton.

With ``w = v - d`` for orders k < 1 and ``w = (v + d)_+`` for k > 1, the optimal ratios are ``t ~ w^(1 / (k - 1))``,
``v > 0``: the distance of the maximum from the pole of phi*', or from the edge of the support. Powers of w are taken
about the mean, ``w = V (1 -+ y / V)``, where losses matter that lie there, else about the maximum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import SERIES_BELOW, CressieRead, difference_quotient, expm1_minus
from drrho.solvers.rows import Block, Dual, Rows

_MAX_ITERATIONS = 400
_NEWTON_ITERATIONS = 50  # then bisection
_LONGEST_STEP = 10.0  # in log v, while a bracket is open
_EPS = np.finfo(np.float64).eps
_TOLERANCE = 450 * _EPS
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

    def ratio(self, d: Tensor) -> Tensor:
        """Return the ratio, which may be so small that its tilt is -1."""
        return self._log_ratio(d).exp_()

    def _log_ratio(self, d: Tensor) -> Tensor:
        origin, unit, log_total = (_column(field, d) for field in (self.origin, self.unit, self.log_total))
        return _exponent(self.order, (d - origin).div_(unit)).sub_(log_total)


class _Path(NamedTuple):
    """At given v, ``[rows]``: D, ``d log D / d log v``, log of the mean power of w itself, its slope, and the tilt."""

    distance: np.ndarray
    slope: np.ndarray
    log_power: np.ndarray
    log_power_slope: np.ndarray
    found: PathTilt


def cressie_read_ball(divergence: CressieRead, rows: Rows, radius: np.ndarray) -> tuple[PathTilt, Dual]:
    """Solve ``log D = log radius`` in ``log v``; D falls in v, with slope -2 at the far end."""
    target = np.log(radius)
    # Far out, ratios are 1 + y / |k - 1| V.
    tolerated = _TOLERANCE + 4 * _EPS / np.sqrt(np.maximum(radius, _FINE**2))

    def residual(path: _Path):
        return np.log(path.distance) - target, path.slope

    def start(sums: _Sums):
        unit = sums.deviation / (abs(divergence.order - 1) * np.sqrt(2 * radius))
        return np.maximum(unit + _sign(divergence) * sums.center, 1e-3 * unit)

    return _solve(divergence, rows, start, residual, tolerated, None)


def cressie_read_penalty(divergence: CressieRead, rows: Rows, strength: np.ndarray) -> tuple[PathTilt, Dual]:
    """Solve ``mean t = 1`` in ``log v`` for ``t = (kappa w)^(1 / (k - 1))``, ``kappa = |k - 1| / strength``."""
    k = divergence.order
    unit = strength / abs(k - 1)

    def residual(path: _Path):
        rising = path.log_power - np.log(unit) / (k - 1)
        return (rising, path.log_power_slope) if k < 1 else (-rising, -path.log_power_slope)

    def start(sums: _Sums):
        return np.maximum(unit + _sign(divergence) * sums.center, 1e-3 * unit)

    return _solve(divergence, rows, start, residual, np.full_like(strength, _TOLERANCE), unit)


def _sign(divergence: CressieRead) -> int:
    """Whether ``V = v - mean`` (k < 1, so ``v = V + mean``) or ``V = v + mean``."""
    return 1 if divergence.order < 1 else -1


def _solve(divergence: CressieRead, rows: Rows, start, residual, tolerated, unit) -> tuple[PathTilt, Dual]:
    """Find the root of a residual that falls in ``x = log v``."""
    with np.errstate(all="ignore"):
        sample = rows.sample()
        x = None
        if sample is not None:
            x = _iterate(
                divergence, _Sums(divergence, sample), start, residual, np.full_like(tolerated, 1e-3), None, 40
            )[0]
        sums = _Sums(divergence, rows)
        x, path = _iterate(divergence, sums, start, residual, tolerated, x, _MAX_ITERATIONS)
        k = divergence.order
        # t^(k - 1) = kappa w = total^(1 - k) w / unit, and 1 + (k - 1) (d - threshold) / strength
        _, origin, scale, log_total = path.found
        threshold = origin - _sign(divergence) * scale * np.expm1((k - 1) * log_total)
        if unit is None:
            unit = np.exp((k - 1) * log_total) * scale
    saturated = (x <= _ENDS[0]) | (x >= _ENDS[1])
    return path.found, Dual(threshold, abs(k - 1) * unit, path.distance, saturated)


def _iterate(divergence, sums, start, residual, tolerated, x, iterations) -> tuple[np.ndarray, _Path]:
    x = np.log(start(sums)) if x is None else x
    low, high = np.full_like(x, -np.inf), np.full_like(x, np.inf)
    for iteration in range(iterations):
        path = sums(np.exp(x))
        value, slope = residual(path)
        positive = value > 0
        low, high = np.where(positive, x, low), np.where(positive, high, x)
        done = (np.abs(value) <= tolerated) | (high - low <= 4 * _EPS * np.maximum(np.abs(x), 1))
        done |= (x <= _ENDS[0]) | (x >= _ENDS[1])
        if done.all():
            # Where no number of this precision gives the radius, the next larger v: D is below it.
            beyond = (np.abs(value) > tolerated) & positive & np.isfinite(high)
            return (
                (x, path) if not beyond.any() else (np.where(beyond, high, x), sums(np.exp(np.where(beyond, high, x))))
            )
        newton = x - value / slope
        away = np.where(positive, x + _LONGEST_STEP, x - _LONGEST_STEP)
        bounded = np.where(np.isfinite(low + high), (low + high) / 2, away)
        trusted = (newton > low) & (newton < high) & (np.abs(newton - x) <= _LONGEST_STEP)
        x = np.where(done, x, np.clip(np.where(trusted & (iteration < _NEWTON_ITERATIONS), newton, bounded), *_ENDS))
    if iterations < _MAX_ITERATIONS:
        return x, sums(np.exp(x))
    raise RuntimeError(f"the multipliers of {divergence} did not converge in {iterations} iterations")


class _Sums:
    """Sums over powers of w of rows, as functions of v."""

    def __init__(self, divergence: CressieRead, rows: Rows) -> None:
        self.order, self.sign, self.rows = divergence.order, _sign(divergence), rows
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
        # About the mean while it has a power at all, and the maximum is not too close to the pole.
        central = v > 1e-3 * unit if self.order < 1 else unit > -0.3 * self.center
        if central.all() or not central.any():
            return self._sums(v, bool(central[0]), slice(None))
        parts = [
            (chosen, self._sums(v[chosen], first, chosen)) for first, chosen in ((True, central), (False, ~central))
        ]
        fields = [np.empty_like(v) for _ in range(7)]
        for chosen, part in parts:
            flat = (*part[:4], *part.found[1:])
            for field, solved in zip(fields, flat, strict=True):
                field[chosen] = solved
        distance, slope, log_power, log_power_slope, *path = fields
        return _Path(distance, slope, log_power, log_power_slope, PathTilt(self.order, path[0], path[1], path[2]))

    def _sums(self, v: np.ndarray, central: bool, chosen) -> _Path:
        k, sign = self.order, self.sign
        rows = self.rows if isinstance(chosen, slice) else self.rows.select(chosen)
        center = self.center[chosen]
        origin = center if central else np.zeros_like(center)
        unit = v - sign * origin
        zero, scale = rows.column(origin), rows.column(unit)
        logarithmic = abs(k) < 0.25
        fine = central and bool((self.deviation[chosen] < _FINE * abs(k - 1) * unit).any())
        fine = fine and (k < 1 or bool((unit > 1 + center).all()))  # nothing outside the support

        def sums(block: Block):
            x = (block.d - zero).div_(scale)
            exponent = _exponent(k, x)
            ratio = torch.exp(exponent)
            power = torch.expm1(exponent) if central else ratio
            reciprocal = ratio.div_(x.mul(-sign).add_(1)) if central else ratio / x.mul(-sign).add_(1)
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
        w_mean, h_mean = unit * (1 - sign * tilted_x), reciprocal / (total * unit)
        kappa = rate / unit
        slope = v * kappa * (1 - w_mean * h_mean) / (k - 1) ** 2 / distance
        if fine:
            slope = np.full_like(slope, -2.0) * v / unit  # where it would cancel
        log_power = log_total + np.log(unit) / (k - 1)
        found = PathTilt(k, origin, unit, log_total)
        return _Path(distance, slope, log_power, v * h_mean / (k - 1), found)


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


def _column(per_row: np.ndarray, like: Tensor) -> float | Tensor:
    return float(per_row[0]) if len(per_row) == 1 else torch.from_numpy(per_row).to(like.device)[:, None]
