"""KL: weights ``p ~ q exp(b d)``, whose one variable is found for a ball by safeguarded Newton."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import SERIES_BELOW, expm1_minus
from drrho.solvers.rows import Block, Dual, Rows, some

_NEWTON_ITERATIONS = 40  # then bisection; three to eight suffice away from plateaus
_MAX_ITERATIONS = 400
_LONGEST_STEP = 10.0  # in log b, while there is no upper bracket
_EPS = np.finfo(np.float64).eps
_CEILING = 0.97 * math.log(np.finfo(np.float64).max)
_TOLERANCE = 450 * _EPS  # on log D
_SQUARED = 1e-9  # a residual whose square is far within the tolerance, whatever the curvature
_FAR = 30.0  # exponent at the maximum beyond which the mean is no origin for the sums
_FINE = 1e-3  # standard deviation of the exponent below which a series replaces a difference


class _Path(NamedTuple):
    """``p ~ q exp(b d)`` at given b: D, ``d log D / d log b`` and ``log mean exp(b d)``, each ``[rows]``."""

    distance: np.ndarray
    slope: np.ndarray
    normalizer: np.ndarray


def kl_ball(rows: Rows, radius: np.ndarray) -> Dual:
    """Solve ``log KL(p_b) = log radius`` for ``p_b ~ q exp(b d)`` in ``x = log b`` by safeguarded Newton.

    ``KL(p_b)`` increases with slope ``d log KL / d log b = b^2 Var_b(d) / KL``, which tends to 2 for small b.
    Since the variance under any weights is at most 1/4 (range 1), ``b >= sqrt(8 radius)``. On long rows the
    iteration starts from the solution of a weighted part of the losses.
    """
    start = None
    sample = rows.sample()
    with np.errstate(divide="ignore", invalid="ignore"):
        if sample is not None:
            start, _, _ = _solve(sample, radius, None, tolerance=1e-3, iterations=12)
        x, path, saturated = _solve(rows, radius, start, tolerance=_TOLERANCE, iterations=_MAX_ITERATIONS)
    b = np.exp(x)
    return Dual(path.normalizer / b, 1 / b, path.distance, saturated)


def kl_penalty(rows: Rows, strength: np.ndarray) -> Dual:
    """Return the threshold ``strength * log mean exp(d / strength)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        path = _Tilted(rows)(1 / strength)
    return Dual(path.normalizer * strength, strength, path.distance, np.zeros(len(strength), dtype=bool))


def _solve(
    rows: Rows, radius: np.ndarray, start: np.ndarray | None, *, tolerance: float, iterations: int
) -> tuple[np.ndarray, _Path, np.ndarray]:
    tilted = _Tilted(rows)
    target = np.log(radius)
    low = 0.5 * (math.log(8.0) + target)
    high = np.full_like(low, np.inf)
    x = 0.5 * (math.log(2.0) + target) - np.log(tilted.deviation) if start is None else start
    x = np.minimum(np.maximum(low, x), _CEILING)
    # Where no series is used, D carries the rounding of its square root.
    tolerated = tolerance + 2 * _EPS / np.sqrt(np.maximum(radius, _FINE**2))
    for iteration in range(iterations):
        path = tilted(np.exp(x))
        residual = np.log(path.distance) - target
        newton = x - residual / path.slope
        below = residual < 0
        low, high = np.where(below, x, low), np.where(below, high, x)
        saturated = x >= _CEILING
        done = (np.abs(residual) <= tolerated) | (high - low <= 4 * _EPS * np.maximum(np.abs(x), 1)) | saturated
        if not some(~done):
            return x, path, saturated
        nearly = np.abs(residual) <= _SQUARED
        if start is not None and not some(~(done | nearly & (newton > low) & (newton < high))):
            # On long rows a pass is worth saving: the next residual is the square of this one, and D and the
            # normalizer, whose slope is b E_p[d], are followed there.
            step = np.where(done, 0.0, newton - x)
            normalizer = path.normalizer + (path.distance + path.normalizer) * step
            return x + step, _Path(np.where(done, path.distance, radius), path.slope, normalizer), saturated
        bounded = np.where(high < np.inf, (low + np.minimum(high, _CEILING)) / 2, x + _LONGEST_STEP)
        # KL has plateaus in b, between the gaps of close losses: a flat slope must not throw x out of reach, and
        # rounding there can let Newton creep, while halving the bracket cannot.
        trusted = (newton > low) & (newton < np.minimum(high, x + _LONGEST_STEP)) & (iteration < _NEWTON_ITERATIONS)
        x = np.where(done, x, np.minimum(np.where(trusted, newton, bounded), _CEILING))
    if iterations == _MAX_ITERATIONS:
        raise RuntimeError(f"the KL ball's multiplier did not converge in {iterations} iterations")
    return x, tilted(np.exp(x)), np.zeros_like(x, dtype=bool)


class _Tilted:
    """Sums over ``exp(b d)`` of rows, about their mean while that is near enough to the maximum, else about that."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.center, _ = rows.mean_and_ties()
        origin = rows.column(self.center)

        def spread_out(block: Block):
            y = block.d - origin
            return y, (y, y)

        self.shift, self.square = rows.host_means(spread_out)
        self.deviation = np.sqrt(self.square)

    def __call__(self, b: np.ndarray) -> _Path:
        near = b * -self.center <= _FAR
        if not some(~near):
            return self._near(b, slice(None))
        if not some(near):
            return self._far(b, slice(None))
        result = _Path(*(np.empty_like(b) for _ in range(3)))
        for chosen, part in ((near, self._near), (~near, self._far)):
            for field, solved in zip(result, part(b[chosen], chosen), strict=True):
                field[chosen] = solved
        return result

    def _near(self, b: np.ndarray, chosen) -> _Path:
        """With ``E = exp(b y) - 1`` all sums are of positive terms, but that of E, which is of second order."""
        center, shift, square = self.center[chosen], self.shift[chosen], self.square[chosen]
        rows = self.rows if isinstance(chosen, slice) else self.rows.select(chosen)
        origin, rate, largest = rows.column(center), rows.column(b), float(b.max())
        # sum E - sum b y loses what E's rounding is relative to its square; a series keeps it.
        fine = some(b * np.sqrt(square) < _FINE)

        def sums(block: Block):
            y = block.d - origin
            x = y * rate
            excess = (_excess_exponential(x, largest),) if fine else ()
            e = x.expm1_()
            ye = y * e
            return e, ye, (ye, y), *excess

        first, gain, second, *excess = rows.host_means(sums)
        beyond = excess[0] if fine else first - b * shift  # mean of exp(b y) - 1 - b y
        mass = 1 + beyond
        psi, gain = np.log1p(beyond), gain / mass
        variance = (second + square) / mass - gain * gain
        distance = b * gain - psi
        return _Path(distance, b * b * variance / distance, psi + b * center)

    def _far(self, b: np.ndarray, chosen) -> _Path:
        rows = self.rows if isinstance(chosen, slice) else self.rows.select(chosen)
        rate = rows.column(b)

        def sums(block: Block):
            e = (block.d * rate).exp_()
            de = block.d * e
            return e, de, (de, block.d)

        mass, gain, second = rows.host_means(sums)
        gain, psi = gain / mass, np.log(mass)
        distance = b * gain - psi
        return _Path(distance, b * b * (second / mass - gain * gain) / distance, psi)


def _excess_exponential(x: Tensor, largest: float) -> Tensor:
    """Return ``exp(x) - 1 - x`` for ``|x| <= largest``: by a series alone where that suffices."""
    if largest > SERIES_BELOW:
        return expm1_minus(x)
    total = torch.full_like(x, 1 / math.factorial(11))
    for k in range(8, -1, -1):
        total.mul_(x).add_(1 / math.factorial(k + 2))
    return total.mul_(x).mul_(x)
