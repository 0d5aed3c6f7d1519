"""Worst cases of excess losses as a minimization over a model sees them: exact, and smoothed by a proximal term.

A risk ``max_{p in B} <p, z>`` has kinks where several weights are worst: at ties of CVaR and total variation, and where
a ball reaches the hard maximum. The smoothed risk ``max_{p in B} <p, z> - strength * B(p, center)``, with a Bregman
distance B from the weights of an earlier iterate, has a Lipschitz gradient, is at most the risk, and less by at most
``strength`` times the largest distance in B: the method of multipliers, in which the center approaches the worst case
(Rockafellar 1976; Censor & Zenios 1992; smoothing by a fixed center: Nesterov 2005).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import singledispatch
from typing import NamedTuple

import numpy as np
import torch

from drrho.divergences import KL, CVaR, Divergence, TotalVariation
from drrho.pointwise import Array
from drrho.risk import constrained_risk, hybrid_risk

_EPS = float(np.finfo(np.float64).eps)


class Response(NamedTuple):
    """How weights answer changes of the losses: ``dp = h (dz - d eta - a d lambda)`` with ``sum dp = 0``.

    Where ``a`` is given, lambda is that of a ball and follows from ``<a, dp> = 0``.
    """

    h: Array
    a: Array | None


class WorstCase(NamedTuple):
    """A risk of losses z ``[n]``.

    Attributes
    ----------
    value : float
        The risk.
    attained : float
        What the weights attain of it; the difference from ``value`` is rounding.
    weights : ndarray ``[n]``
    responses : tuple of Response
        Their sum is the derivative of the weights; empty where they do not move.
    """

    value: float
    attained: float
    weights: Array
    responses: tuple[Response, ...]


class InnerMaximum(ABC):
    """A maximum over weights, as a function of the losses."""

    #: Whether there may be losses at which the weights do not answer to changes although they are not constant.
    has_maximum = False

    @abstractmethod
    def at(self, z: Array) -> WorstCase:
        """Solve for losses ``[n]``."""


class ExactRisk(InnerMaximum):
    """`constrained_risk`."""

    def __init__(self, divergence: Divergence, radius: float, base: Array | None) -> None:
        self.divergence, self.radius, self.base = divergence, radius, base
        self.has_maximum = radius > 0

    def at(self, z: Array) -> WorstCase:
        """Solve for losses ``[n]``."""
        excess = torch.from_numpy(z)
        worst = constrained_risk(excess, self.divergence, self.radius, base_weights=self.base)
        weights = worst.weights.numpy()
        responses: tuple[Response, ...] = ()
        strength = float(worst.strength)
        if 0 < strength < math.inf:  # neither the maximum nor the mean
            a = _exponents(excess, float(worst.threshold), strength, self.base)
            q = 1 / len(z) if self.base is None else self.base
            responses = (Response(q * _curvature(self.divergence, a) / strength, a.numpy()),)
        return WorstCase(float(worst.value), float(weights @ z), weights, responses)


def _exponents(z: torch.Tensor, threshold: float, strength: float, base: Array | None) -> torch.Tensor:
    a = (z - threshold) / strength
    # A sample without base weight may lie outside the domain of phi*.
    return a if base is None else torch.where(torch.from_numpy(base) > 0, a, 0.0)


def _curvature(divergence: Divergence, a: torch.Tensor) -> Array:
    """Return ``phi*''``, which is infinite where a sample enters the support above order 2: there, a large number."""
    return divergence.curvature(a).clamp(max=1e15).numpy()


class SmoothedRisk(InnerMaximum):
    """A smoothed risk; its strength bounds how far it may lie below the risk if the center is q, in units of loss."""

    @abstractmethod
    def recentered(self, z: Array, strength: float) -> SmoothedRisk:
        """Return the risk with its center at the weights for losses z, and another strength."""


class SmoothedBall(SmoothedRisk):
    """``max <p, z> - price (D(p || q) - <center, p>)`` over ``D(p || q) <= radius``.

    Parameters
    ----------
    divergence, radius, q, base
        The ball; ``base`` is None where q is uniform.
    price : float
        > 0.
    center : ndarray ``[n]``
        A subgradient of ``phi`` at the ratios ``p / q`` of the center; 0 for q itself.
    """

    def __init__(
        self, divergence: Divergence, radius: float, q: Array, base: Array | None, price: float, center: Array
    ) -> None:
        self.divergence, self.radius, self.q, self.base = divergence, radius, q, base
        self.price, self.center = price, center

    def at(self, z: Array) -> WorstCase:
        """Solve for losses ``[n]``."""
        a, multiplier, value, weights = self._solve(z)
        h = self.q * _curvature(self.divergence, torch.from_numpy(a)) / multiplier
        outside = multiplier > self.price * (1 + 16 * _EPS)
        return WorstCase(value, value, weights, (Response(h, a if outside else None),))

    def recentered(self, z: Array, strength: float) -> SmoothedBall:
        """Return the risk with its center at the weights for losses z, and another strength.

        Where the ball is far from its maximum, its own multiplier makes the risk smooth, and a price far above that
        would only slow the center down.
        """
        price = _ball_price(self.divergence, self.radius, self.q, strength)
        own = constrained_risk(torch.from_numpy(z), self.divergence, self.radius, base_weights=self.base).strength
        deviation = math.sqrt(float(self.q @ np.square(z - self.q @ z)))
        if math.sqrt(2 * self.radius) * float(own) > 0.1 * deviation:  # 1 where the ball is small
            price = min(max(0.3 * float(own), 0.01 * price), price)
        return SmoothedBall(self.divergence, self.radius, self.q, self.base, price, self._solve(z)[0])

    def _solve(self, z: Array) -> tuple[Array, float, float, Array]:
        shifted = torch.from_numpy(z + self.price * self.center)
        worst = hybrid_risk(shifted, self.divergence, self.radius, self.price, base_weights=self.base)
        multiplier = float(worst.strength)
        a = _exponents(shifted, float(worst.threshold), multiplier, self.base).numpy()
        return a, multiplier, float(worst.value), worst.weights.numpy()


class Tail(NamedTuple):
    """``share * max <q t, z> - (price / 2) <q, (t - center)^2>`` over ratios ``0 <= t <= cap`` of mean 1."""

    share: float
    cap: float
    price: float
    center: Array


class SmoothedTails(SmoothedRisk):
    """The sum of means of worst tails, each smoothed by the squared distance of its ratios from their center.

    CVaR is one, total variation two: ``(1 - r) CVaR_{1 - r} + r max``.
    """

    def __init__(self, q: Array, tails: list[Tail]) -> None:
        self.q, self.tails = q, tails

    def at(self, z: Array) -> WorstCase:
        """Solve for losses ``[n]``."""
        value, weights, responses = 0.0, np.zeros(len(z)), []
        for tail in self.tails:
            ratio = _capped(z, self.q, tail)
            held = self.q * ratio
            value += tail.share * float(held @ z - tail.price / 2 * (self.q @ np.square(ratio - tail.center)))
            weights += tail.share * held
            inside = (ratio > 0) & (ratio < tail.cap)
            responses.append(Response(np.where(inside, self.q * (tail.share / tail.price), 0.0), None))
        return WorstCase(value, value, weights, tuple(responses))

    def recentered(self, z: Array, strength: float) -> SmoothedTails:
        """Return the risk with its center at the weights for losses z, and another strength."""
        return SmoothedTails(
            self.q,
            [
                tail._replace(price=_tail_price(strength, tail.cap), center=_capped(z, self.q, tail))
                for tail in self.tails
            ],
        )


def _tail_price(strength: float, cap: float) -> float:
    """Return the strength over the largest chi-square distance of ratios up to the cap from 1."""
    return 2 * strength / max(cap - 1, _EPS)


def _ball_price(divergence: Divergence, radius: float, q: Array, strength: float) -> float:
    """Return the strength over the largest D in the ball."""
    least = np.array([np.min(q[q > 0])])
    return strength / min(radius, float(divergence.maximal_radius(least)[0]))


def _capped(z: Array, q: Array, tail: Tail) -> Array:
    """Return ``t = clip(center + (z - eta) / price, 0, cap)`` with eta such that ``<q, t> = 1``.

    ``<q, t>`` falls in eta and is piecewise linear: Newton's method, in a bracket. What rounding of eta leaves is taken
    from the ratios between the limits.
    """
    v = tail.center + z / tail.price
    low, high = float(v.min()) - 1, float(v.max())
    eta = float(q @ v) - 1
    for _ in range(200):
        ratio, surplus, slope = _clipped(v, q, tail.cap, eta)
        low, high = (eta, high) if surplus > 0 else (low, eta)
        following = eta + surplus / slope if slope > 0 else math.inf
        if not low < following < high:
            following = (low + high) / 2
        if abs(surplus) <= 4 * _EPS or following == eta or not low < following < high:
            break
        eta = following
    ratio, surplus, slope = _clipped(v, q, tail.cap, eta)
    if slope > 0:
        inside = (ratio > 0) & (ratio < tail.cap)
        ratio[inside] = np.clip(ratio[inside] - surplus / slope, 0, tail.cap)
    return ratio


def _clipped(v: Array, q: Array, cap: float, eta: float) -> tuple[Array, float, float]:
    """Return ``t = clip(v - eta, 0, cap)``, ``<q, t> - 1`` and minus its slope in eta."""
    ratio = v - eta
    slope = float(q @ ((ratio > 0) & (ratio < cap)))
    np.clip(ratio, 0, cap, out=ratio)
    return ratio, float(q @ ratio) - 1, slope


@singledispatch
def smoothed_risk(divergence: Divergence, radius: float, q: Array, base: Array | None, strength: float) -> InnerMaximum:
    """Return the risk smoothed around q, or the risk itself where it is a mean."""
    if radius == 0 or np.count_nonzero(q) == 1:
        return ExactRisk(divergence, radius, base)
    least = np.array([np.min(q[q > 0])])
    if radius >= divergence.maximal_radius(least)[0]:  # all distributions, which are KL's ball as well
        divergence, radius = KL(), float(KL().maximal_radius(least)[0])
    price = _ball_price(divergence, radius, q, strength)
    return SmoothedBall(divergence, radius, q, base, price, np.zeros(len(q)))


@smoothed_risk.register
def _(divergence: CVaR, radius: float, q: Array, base: Array | None, strength: float) -> InnerMaximum:
    if not divergence.has_kinks:
        return ExactRisk(divergence, radius, base)
    return _tails(q, {float(divergence.alpha): 1.0}, strength)


@smoothed_risk.register
def _(divergence: TotalVariation, radius: float, q: Array, base: Array | None, strength: float) -> InnerMaximum:
    if radius == 0:
        return ExactRisk(divergence, radius, base)
    moved = min(radius, 1.0)
    return _tails(q, {1 - moved: 1 - moved, 0.0: moved}, strength)


def _tails(q: Array, shares: dict[float, float], strength: float) -> SmoothedTails:
    """Start at q; ``shares`` are those of the tails by their fractions, 0 for the maximum."""
    least = float(np.min(q[q > 0]))
    caps = {1 / max(alpha, least): share for alpha, share in shares.items() if share > 0}
    return SmoothedTails(
        q, [Tail(share, cap, _tail_price(strength, cap), np.ones(len(q))) for cap, share in caps.items()]
    )
