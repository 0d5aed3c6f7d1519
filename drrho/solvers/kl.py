"""KL: weights ``p ~ q exp(b d)``, whose one variable is the root of a function for a ball."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import SERIES_BELOW, Divergence, expm1_minus
from drrho.solvers.dual import Dual, Found, by_conjugate
from drrho.solvers.root import EPS, Bracket, Residual, Root, Safeguard, find_root
from drrho.solvers.rows import Block, Chosen, Rows, by_parts, some

_ITERATIONS = 400
_STARTING_ITERATIONS = 13  # on a part of the losses
_NEWTON_ITERATIONS = 40  # then bisection; three to eight suffice away from plateaus
_LONGEST_STEP = 10.0  # in log b, while there is no upper bracket
_CEILING = 0.97 * math.log(np.finfo(np.float64).max)
_TOLERANCE = 450 * EPS  # on log D
_FAR = 30.0  # exponent at the maximum beyond which the mean is no origin for the sums
_FINE = 1e-3  # standard deviation of the exponent below which a series replaces a difference


class _Path(NamedTuple):
    """``p ~ q exp(b d)`` at given b: D, ``d log D / d log b`` and ``log mean exp(b d)``, each ``[rows]``."""

    distance: np.ndarray
    slope: np.ndarray
    normalizer: np.ndarray


def kl_ball(divergence: Divergence, rows: Rows, radius: np.ndarray) -> Found:
    """Solve ``log KL(p_b) = log radius`` for ``p_b ~ q exp(b d)`` in ``x = log b``.

    ``KL(p_b)`` increases with slope ``d log KL / d log b = b^2 Var_b(d) / KL``, which tends to 2 for small b.
    Since the variance under any weights is at most 1/4 (range 1), ``b >= sqrt(8 radius)``. On long rows the
    iteration starts from the solution of a weighted part of the losses.
    """
    start, condensed = None, rows.condensed()
    with np.errstate(divide="ignore", invalid="ignore"):
        if condensed is not None:
            start = _solve(_Shortfall(condensed, radius), None, 1e-3, _STARTING_ITERATIONS, failure=None).x
        shortfall = _Shortfall(rows, radius)
        failure = f"the KL ball's multiplier did not converge in {_ITERATIONS} iterations"
        x, saturated = _solve(shortfall, start, _TOLERANCE, _ITERATIONS, failure)
    b, path = np.exp(x), shortfall.path
    return by_conjugate(divergence, rows, Dual(path.normalizer / b, 1 / b, path.distance, saturated))


def kl_penalty(divergence: Divergence, rows: Rows, strength: np.ndarray) -> Found:
    """Return the threshold ``strength * log mean exp(d / strength)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        path = _Tilted(rows)(1 / strength)
    none = np.zeros(len(strength), dtype=bool)
    return by_conjugate(divergence, rows, Dual(path.normalizer * strength, strength, path.distance, none))


def _solve(
    shortfall: _Shortfall, start: np.ndarray | None, tolerance: float, iterations: int, failure: str | None
) -> Root:
    radius = shortfall.radius
    low = 0.5 * (math.log(8.0) + shortfall.target)
    x = 0.5 * (math.log(2.0) + shortfall.target) - np.log(shortfall.tilted.deviation) if start is None else start
    guard = Safeguard(
        # Where no series is used, D carries the rounding of its square root.
        tolerance=tolerance + 2 * EPS / np.sqrt(np.maximum(radius, _FINE**2)),
        iterations=iterations,
        failure=failure,
        newton_iterations=_NEWTON_ITERATIONS,
        longest=(np.inf, _LONGEST_STEP),
        ends=(-np.inf, _CEILING),
    )
    return find_root(
        shortfall,
        np.minimum(np.maximum(low, x), _CEILING),
        Bracket(low, np.full_like(low, np.inf)),
        guard,
        finish=None if start is None else shortfall.follow,  # on long rows a pass is worth saving
    )


class _Shortfall:
    """``log radius - log KL(p_b)`` as a function of ``x = log b``."""

    def __init__(self, rows: Rows, radius: np.ndarray) -> None:
        self.radius, self.target, self.tilted = radius, np.log(radius), _Tilted(rows)

    def __call__(self, x: np.ndarray) -> Residual:
        self.path = self.tilted(np.exp(x))
        value = self.target - np.log(self.path.distance)
        return Residual(np.fmax(value, -np.inf), value / self.path.slope)  # NaN: x is too large

    def follow(self, step: np.ndarray, done: np.ndarray) -> None:
        """Follow D and the normalizer, whose slope is ``b E_p[d]``, to the end of a small step in x."""
        distance, slope, normalizer = self.path
        normalizer = normalizer + (distance + normalizer) * step
        self.path = _Path(np.where(done, distance, self.radius), slope, normalizer)


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
        fields = by_parts(near, lambda rows: self._near(b[rows], rows), lambda rows: self._far(b[rows], rows))
        return _Path(*fields)

    def _near(self, b: np.ndarray, chosen: Chosen) -> _Path:
        """With ``E = exp(b y) - 1`` all sums are of positive terms, but that of E, which is of second order."""
        center, shift, square = self.center[chosen], self.shift[chosen], self.square[chosen]
        rows = self.rows.select(chosen)
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

    def _far(self, b: np.ndarray, chosen: Chosen) -> _Path:
        rows = self.rows.select(chosen)
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
