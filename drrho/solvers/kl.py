"""KL: weights ``p ~ q exp(b d)``, found for a ball by safeguarded Newton on one variable, in closed form for a price."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import SERIES_BELOW, expm1_minus
from drrho.solvers.rows import Dual, Rows

_NEWTON_ITERATIONS = 40  # then bisection; three to eight suffice away from plateaus
_MAX_ITERATIONS = 400
_LONGEST_STEP = 10.0  # in log b, while there is no upper bracket
_CEILING = 0.97 * math.log(np.finfo(np.float64).max)
_TOLERANCE = 450 * np.finfo(np.float64).eps  # on log D
_FAR = 30.0  # exponent at the maximum beyond which the mean is no origin for the sums
_SAMPLING = 16
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
    iteration starts from the solution of a sixteenth of the losses.
    """
    start = None
    sample = rows.sample(_SAMPLING)
    if sample is not None:
        start, _, _ = _solve(sample, radius, None, tolerance=1e-3, iterations=12)
    x, path, saturated = _solve(rows, radius, start, tolerance=_TOLERANCE, iterations=_MAX_ITERATIONS)
    b = np.exp(x)
    return Dual(path.normalizer / b, 1 / b, path.distance, saturated)


def _solve(
    rows: Rows, radius: np.ndarray, start: np.ndarray | None, *, tolerance: float, iterations: int
) -> tuple[np.ndarray, _Path, np.ndarray]:
    tilted = _Tilted(rows)
    target = np.log(radius)
    low = 0.5 * (math.log(8.0) + target)
    high = np.full_like(low, np.inf)
    with np.errstate(divide="ignore"):  # a sample may be constant
        x = 0.5 * (math.log(2.0) + target) - np.log(tilted.deviation) if start is None else start
    x = np.minimum(np.maximum(low, x), _CEILING)
    for iteration in range(iterations):
        path = tilted(np.exp(x))
        with np.errstate(divide="ignore", invalid="ignore"):
            residual = np.log(path.distance) - target
            newton = x - residual / path.slope
        low = np.where(residual < 0, x, low)
        high = np.where(residual < 0, high, x)
        saturated = x >= _CEILING
        resolution = 4 * np.finfo(np.float64).eps * np.maximum(np.abs(x), 1)
        # Where no series is used, D carries the rounding of its square root.
        reached = np.abs(residual) <= tolerance + 2 * np.finfo(np.float64).eps / np.sqrt(np.maximum(radius, _FINE**2))
        done = reached | (high - low <= resolution) | saturated
        if bool(done.all()):
            return x, path, saturated
        bounded = np.where(np.isfinite(high), (low + np.minimum(high, _CEILING)) / 2, x + _LONGEST_STEP)
        # KL has plateaus in b, between the gaps of close losses: a flat slope must not throw x out of reach, and
        # rounding there can let Newton creep, while halving the bracket cannot.
        within = (newton > low) & (newton < np.minimum(high, x + _LONGEST_STEP))
        trusted = within & (iteration < _NEWTON_ITERATIONS)
        x = np.where(done, x, np.minimum(np.where(trusted, newton, bounded), _CEILING))
    if iterations < _MAX_ITERATIONS:
        return x, path, saturated
    raise RuntimeError(f"the KL ball's multiplier did not converge in {_MAX_ITERATIONS} iterations")


class _Tilted:
    """Sums over ``exp(b d)`` of rows, about their mean while that is near enough to the maximum, else about that."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.center = rows.host_means(rows.d)[0]
        self.y = rows.d - rows.column(self.center)
        self.shift, self.square = rows.host_means(self.y, (self.y, self.y))
        self.deviation = np.sqrt(self.square)

    def __call__(self, b: np.ndarray) -> _Path:
        near = b * -self.center <= _FAR
        if near.all():
            return self._near(self.rows, self.y, b, slice(None))
        if not near.any():
            return self._far(self.rows, b)
        rows_near, rows_far = self.rows.select(near), self.rows.select(~near)
        result = _Path(*(np.empty_like(b) for _ in range(3)))
        y = self.rows._replace(d=self.y).select(near).d
        for chosen, part in ((near, self._near(rows_near, y, b[near], near)), (~near, self._far(rows_far, b[~near]))):
            for field, solved in zip(result, part, strict=True):
                field[chosen] = solved
        return result

    def _near(self, rows: Rows, y: Tensor, b: np.ndarray, chosen) -> _Path:
        """With ``E = exp(b y) - 1`` all sums are of positive terms, but that of E, which is of second order."""
        shift, square = self.shift[chosen], self.square[chosen]
        x = y * rows.column(b)
        # sum E - sum b y loses what E's rounding is relative to its square; a series keeps it.
        fine = bool((b * np.sqrt(square) < _FINE).any())
        second = rows.host_means(_excess_exponential(x, b))[0] if fine else None
        e = x.expm1_()
        ye = y * e
        first, *moments = rows.host_means(e, ye, (ye, y))
        excess = first - b * shift if second is None else second  # mean of exp(b y) - 1 - b y
        mass = 1 + excess
        psi = np.log1p(excess)
        gain = moments[0] / mass
        variance = (moments[1] + square) / mass - gain * gain
        distance = b * gain - psi
        return _Path(distance, b * b * variance / distance, psi + b * self.center[chosen])

    @staticmethod
    def _far(rows: Rows, b: np.ndarray) -> _Path:
        e = (rows.d * rows.column(b)).exp_()
        de = rows.d * e
        mass, first, second = rows.host_means(e, de, (de, rows.d))
        gain = first / mass
        distance = b * gain - np.log(mass)
        with np.errstate(invalid="ignore"):
            slope = b * b * (second / mass - gain * gain) / distance
        return _Path(distance, slope, np.log(mass))


def _excess_exponential(x: Tensor, b: np.ndarray) -> Tensor:
    """Return ``exp(x) - 1 - x`` for ``|x| <= b``: a series alone where it suffices, which needs no further memory."""
    if float(b.max()) > SERIES_BELOW:
        return expm1_minus(x)
    total = torch.full_like(x, 1 / math.factorial(11))
    for k in range(8, -1, -1):
        total.mul_(x).add_(1 / math.factorial(k + 2))
    return total.mul_(x).mul_(x)
