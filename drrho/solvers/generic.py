"""Any strictly convex phi: safeguarded Newton on threshold and strength together, from phi* and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from drrho.divergences import Divergence
from drrho.solvers.dual import Dual, Found, by_conjugate
from drrho.solvers.root import EPS, Bracket, Residual, Root, Safeguard, find_root
from drrho.solvers.rows import Block, Rows

_ITERATIONS = 2000
_STARTING_ITERATIONS = 30  # on a part of the losses
_NEWTON_ITERATIONS = 60  # of the threshold at one strength; then bisection
_LONGEST_STEP = 2.0  # in log strength
_FLOOR = float(np.log(1e-290))
_TOLERANCE = 1e-13  # on log D
_ROUGH = 1e-3  # the same, and on the threshold, for a start
_FINE = 1e-2  # spread of (d - eta) / lambda below which differences are replaced by quadratures
_FINE_LONG = 3e-4  # the same on long rows, whose rounding averages out


def generic_ball(divergence: Divergence, rows: Rows, radius: np.ndarray) -> Found:
    """Solve ``mean t = 1`` and ``D = radius`` for ``t = phi*'((d - threshold) / strength)``.

    Both are monotone: the mean in the threshold, and D, at the threshold that gives mean 1, in the strength, with
    ``d log D / d log strength = -mean(h) Var_h(s) / D``.
    """
    deviation = _deviation(rows)
    at_zero = float(divergence.curvature(torch.zeros(1, dtype=torch.float64))[0])
    x = np.log(deviation) + 0.5 * np.log((at_zero if 0 < at_zero < np.inf else 1.0) / (2 * radius))
    x = np.maximum(x, np.log(-4 * rows.mean_and_ties()[0]))  # the maximum must lie in the domain of phi*
    return _solve(divergence, rows, deviation, x, radius)


def generic_penalty(divergence: Divergence, rows: Rows, strength: np.ndarray) -> Found:
    """Solve ``mean t = 1`` for ``t = phi*'((d - threshold) / strength)``."""
    return _solve(divergence, rows, _deviation(rows), np.log(strength), None)


def _deviation(rows: Rows) -> np.ndarray:
    origin = rows.column(rows.mean_and_ties()[0])

    def spread_out(block: Block):
        y = block.d - origin
        return ((y, y),)

    return np.sqrt(rows.host_means(spread_out)[0])


def _solve(
    divergence: Divergence, rows: Rows, deviation: np.ndarray, x: np.ndarray, radius: np.ndarray | None
) -> Found:
    """Find ``x = log strength`` from where it is given, or leave it there: without a radius."""
    threshold, sample = rows.mean_and_ties()[0].copy(), rows.sample()
    with np.errstate(all="ignore"):
        if sample is not None:
            start = _Balance(divergence, sample, threshold, deviation, radius, rough=True)
            x, threshold = start.solve(x).x, start.balanced_threshold
        balance = _Balance(divergence, rows, threshold, deviation, radius, rough=False)
        x, saturated = balance.solve(x)
    balance.refuse_jumps(saturated)
    dual = Dual(balance.balanced_threshold, np.exp(x), balance.distance, saturated)
    return by_conjugate(divergence, rows, dual, fine=balance.fine)


class _Balance:
    """``log D - log radius`` as a function of x, log strength: known once the threshold makes the ratios' mean one.

    Each call is one pass over the losses and a Newton step of the threshold, with a bracket of its own, which starts
    anew when the strength moves. A radius of None asks for the threshold only.
    """

    def __init__(
        self,
        divergence: Divergence,
        rows: Rows,
        threshold: np.ndarray,
        deviation: np.ndarray,
        radius: np.ndarray | None,
        *,
        rough: bool,
    ) -> None:
        self.divergence, self.rows, self.radius, self.rough = divergence, rows, radius, rough
        self.threshold, self.deviation = threshold, deviation
        self.finest = _FINE if rows.count < 2**17 else _FINE_LONG
        self.bracket = Bracket(np.full(len(threshold), -1.0), np.zeros(len(threshold)))
        self.tries = np.zeros(len(threshold), dtype=int)  # at this strength

    def solve(self, x: np.ndarray) -> Root:
        """Find the strength, or the threshold at the strength given."""
        tolerance = np.full_like(x, _ROUGH if self.rough else _TOLERANCE)
        if self.radius is not None:
            tolerance += 4 * EPS / np.sqrt(np.maximum(self.radius, self.finest**2))
        iterations = _STARTING_ITERATIONS if self.rough else _ITERATIONS
        failure = (
            f"the multipliers of {self.divergence} did not converge in {iterations} passes: phi must be strictly "
            "convex, and conjugate and conjugate_gradient must belong to it"
        )
        guard = Safeguard(
            tolerance=tolerance,
            iterations=iterations,
            failure=None if self.rough else failure,
            newton_iterations=iterations,
            longest=(_LONGEST_STEP, _LONGEST_STEP),
            ends=(-np.inf if self.radius is None else _FLOOR, np.inf),
        )
        return find_root(self, x, Bracket.open(len(x)), guard, follow=self.follow)

    def __call__(self, x: np.ndarray) -> Residual:
        strength = np.exp(x)
        self.fine = bool((self.deviation / strength < self.finest).any())
        moments = _moments(self.divergence, self.rows, self.threshold, strength, fine=self.fine)
        self.tries += 1
        # Newton on log mean t, which is closer to a line than the mean
        step = np.log1p(moments.surplus) * (1 + moments.surplus) * strength / moments.h
        self.bracket.narrow(self.threshold, moments.surplus > 0, moments.surplus <= 0)
        usable = np.isfinite(step) & np.isfinite(moments.h) & np.isfinite(moments.distance)
        # Newton squares the error, measured against the spread of the losses or, if that is less, the strength.
        scale = np.minimum(self.deviation, strength)
        converged = usable & (np.abs(step) <= np.maximum(1e-7 * scale, 4 * EPS * np.abs(self.threshold)))
        self.collapsed = self.bracket.collapsed(np.abs(self.bracket.low))
        self.balanced = converged | self.collapsed | self.rough & usable & (np.abs(step) <= _ROUGH * scale)
        self.usable, self.moments = usable, moments
        self.step = np.where(usable & ~self.collapsed, step, 0.0)
        distance = moments.distance - moments.hs * self.step / strength  # at the threshold that the step leads to
        self.distance = np.where(distance > 0, distance, moments.distance)
        if self.radius is None:
            return Residual(np.zeros_like(x), np.zeros_like(x), self.balanced)
        value = np.log(self.distance) - np.log(self.radius)
        spread = moments.hss / moments.h - (moments.hs / moments.h) ** 2
        newton = value * self.distance / (moments.h * spread)
        limited = np.where(np.isfinite(newton), np.clip(newton, -_LONGEST_STEP, _LONGEST_STEP), np.nan)
        return Residual(value, limited, self.balanced)

    @property
    def balanced_threshold(self) -> np.ndarray:
        """The threshold that the last step leads to."""
        return np.where(self.collapsed, self.threshold, self.threshold + self.step)

    def follow(self, x: np.ndarray, following: np.ndarray, moved: np.ndarray) -> None:
        """Move the threshold: with the strength in the rows that are moved, by its own step in the others."""
        proposal, moments = self.threshold + self.step, self.moments
        # d threshold / d strength = -E_h[s]: followed on a logarithmic scale
        elasticity = np.clip(-moments.hs / moments.h * np.exp(x) / proposal, 0.0, 1.0)
        followed = proposal * np.exp(elasticity * (following - x))
        proposal = np.where(moved & np.isfinite(followed), followed, proposal)
        low, high = np.where(moved, -1.0, self.bracket.low), np.where(moved, 0.0, self.bracket.high)
        self.bracket, self.tries = Bracket(low, high), np.where(moved, 0, self.tries)
        trusted = self.bracket.contains(proposal) & (self.usable | moved) & (self.tries < _NEWTON_ITERATIONS)
        # A threshold close to the maximum is close on its own scale: halve the exponent, not the number.
        middle = np.where((high < 0) & (low < 4 * high), -np.sqrt(low * high), (low + high) / 2)
        done = self.balanced & ~moved
        self.threshold = np.where(done, self.threshold + self.step, np.where(trusted, proposal, middle))

    def refuse_jumps(self, saturated: np.ndarray) -> None:
        """Refuse a threshold at which the ratios jump over the mean 1."""
        lost = self.collapsed & ~(np.abs(self.moments.surplus) < 1e-6) & ~saturated
        if lost.any():
            raise RuntimeError(
                f"no threshold of {self.divergence} makes the weights sum to 1: the nearest is off by "
                f"{self.moments.surplus[lost][0]:.3g}, since conjugate_gradient jumps there; phi must be strictly "
                "convex"
            )


class _Moments(NamedTuple):
    """At given multipliers, with ``s = (d - threshold) / strength`` and ``h = phi*''(s)``, each ``[rows]``."""

    surplus: np.ndarray  # mean of the ratios, minus one
    distance: np.ndarray
    h: np.ndarray
    hs: np.ndarray
    hss: np.ndarray


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
