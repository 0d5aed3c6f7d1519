"""phi-divergences ``D(p || q) = sum_i q_i phi(p_i / q_i)``, one small frozen class each.

A class states ``phi`` (convex, ``phi(1) = 0`` its minimum), its conjugate ``phi*(s) = sup_{t >= 0} t s - phi(t)``
and the conjugate's gradient; everything else is derived unless a closed form is more accurate.
Normalization is ``phi''(1) = 1`` for the smooth ones (Cressie & Read 1984; Yang, opt4ml.org, chapter 2.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_SERIES_BELOW = 0.1  # |argument| under which a series replaces a difference that cancels


class Divergence(ABC):
    """The protocol of a phi-divergence; all methods act elementwise on tensors."""

    #: Whether a finite positive radius means something; False where D takes only the values 0 and infinity.
    has_radius: bool = True

    @abstractmethod
    def phi(self, t: Tensor) -> Tensor:
        """Return ``phi(t)`` of the density ratio ``t``; infinite outside its domain."""

    @abstractmethod
    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``phi*(s) = sup_{t >= 0} t s - phi(t)``."""

    @abstractmethod
    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return the maximizing ratio ``t`` of ``phi*(s)``."""

    @abstractmethod
    def curvature(self, t: Tensor) -> Tensor:
        """Return the second derivative of ``phi*`` where its gradient is ``t``: how fast ratios react to losses."""

    def phi_of_tilt(self, e: Tensor) -> Tensor:
        """Return ``phi(1 + e)``; override where ``1 + e`` would round digits of a small ``e`` away."""
        return self.phi(1 + e)

    def perspective(self, s: Tensor, strength: Tensor) -> Tensor:
        """Return ``strength * phi*(s / strength)``; at strength 0 its limit, 0 for s <= 0 and infinity above."""
        positive = strength > 0
        scale = torch.where(positive, strength, 1.0)
        limit = torch.where(s > 0, torch.inf, 0.0).to(s.dtype)
        return torch.where(positive, scale * self.conjugate(s / scale), limit)

    def maximal_radius(self, share: Tensor) -> Tensor:
        """Return the least D of weights that sit on the maximal losses only.

        ``share`` is the fraction of losses tied at the maximum: D of the uniform distribution on them,
        ``share * phi(1 / share) + (1 - share) * phi(0)``. At that radius the risk has reached the maximum.
        """
        off = self.phi(torch.zeros_like(share))
        return share * self.phi(1 / share) + torch.where(share < 1, (1 - share) * off, 0.0)


@dataclass(frozen=True)
class KL(Divergence):
    """Kullback-Leibler: ``phi(t) = t log t - t + 1``, so ``D(p || q) = sum_i p_i log(p_i / q_i)``."""

    def phi(self, t: Tensor) -> Tensor:
        """Return ``t log t - t + 1``."""
        return self.phi_of_tilt(t - 1)

    def phi_of_tilt(self, e: Tensor) -> Tensor:
        """Return ``(1 + e) log(1 + e) - e``, to full relative accuracy also near ``e = 0``."""
        near = e.abs() < _SERIES_BELOW
        series = kl_of_log_ratio(torch.log1p(torch.where(near, e, 0.0)))
        t = (1 + e).clamp(min=0)
        return torch.where(e < -1, torch.inf, torch.where(near, series, torch.special.xlogy(t, t) - e))

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``exp(s) - 1``."""
        return torch.expm1(s)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``exp(s)``."""
        return torch.exp(s)

    def curvature(self, t: Tensor) -> Tensor:
        """Return ``t``."""
        return t

    def maximal_radius(self, share: Tensor) -> Tensor:
        """Return ``log(1 / share)``."""
        return -torch.log(share)


@dataclass(frozen=True)
class ChiSquare(Divergence):
    """Chi-square: ``phi(t) = (t - 1)^2 / 2``; half of Pearson's statistic divided by n."""

    def phi(self, t: Tensor) -> Tensor:
        """Return ``(t - 1)^2 / 2``."""
        return self.phi_of_tilt(t - 1)

    def phi_of_tilt(self, e: Tensor) -> Tensor:
        """Return ``e^2 / 2``."""
        return torch.where(e < -1, torch.inf, e * e / 2)

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``((1 + s)_+^2 - 1) / 2``, written so that small ``s`` keeps its digits."""
        return torch.where(s > -1, s + s * s / 2, -0.5)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``(1 + s)_+``."""
        return (1 + s).clamp(min=0)

    def curvature(self, t: Tensor) -> Tensor:
        """Return 1 on the support, 0 elsewhere."""
        return (t > 0).to(t.dtype)

    def maximal_radius(self, share: Tensor) -> Tensor:
        """Return ``(1 / share - 1) / 2``."""
        return (1 / share - 1) / 2


@dataclass(frozen=True)
class CVaR(Divergence):
    """Conditional value at risk: ``phi(t) = 0`` for ``0 <= t <= 1 / alpha``, infinite beyond.

    Parameters
    ----------
    alpha : float
        The tail fraction in (0, 1]: the risk is the mean of the worst ``alpha * n`` losses, the boundary
        loss counted by its fraction (Rockafellar & Uryasev 2000). ``alpha = k / n`` is the mean of the top k.
        D is 0 or infinite, so a radius has no effect.
    """

    alpha: float
    has_radius = False

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {self.alpha}: it is the fraction of losses in the tail")

    def phi(self, t: Tensor) -> Tensor:
        """Return 0 where ``0 <= t <= 1 / alpha`` (to eight rounding errors, as weights carry some), else infinity."""
        allowed = (1 + 8 * torch.finfo(t.dtype).eps) / self.alpha
        return torch.where((t < 0) | (t > allowed), torch.inf, 0.0).to(t.dtype)

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``s_+ / alpha``."""
        return s.clamp(min=0) / self.alpha

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``1 / alpha`` for positive ``s``, else 0."""
        return (s > 0).to(s.dtype) / self.alpha

    def curvature(self, t: Tensor) -> Tensor:
        """Return 0: the risk is piecewise linear."""
        return torch.zeros_like(t)

    def perspective(self, s: Tensor, strength: Tensor) -> Tensor:
        """Return ``s_+ / alpha`` whatever the strength: the conjugate is positively homogeneous."""
        return self.conjugate(s)


def kl_of_log_ratio(u: Tensor) -> Tensor:
    """Return ``phi_KL(exp(u)) = u exp(u) - exp(u) + 1`` without cancellation near ``u = 0``."""
    near = u.abs() < 1.1 * _SERIES_BELOW
    v = torch.where(near, u, 0.0)
    # phi(e^u) = sum_{k >= 0} u^(k + 2) (k + 1) / (k + 2)!
    series = torch.zeros_like(v)
    coefficients = [0.5]
    for k in range(1, 10):
        coefficients.append(coefficients[-1] * (k + 1) / (k * (k + 2)))
    for coefficient in reversed(coefficients):
        series = series * v + coefficient
    return torch.where(near, v * v * series, u * torch.exp(u) - torch.expm1(u))


def expm1_minus(x: Tensor) -> Tensor:
    """Return ``exp(x) - 1 - x`` without cancellation near ``x = 0``."""
    near = x.abs() < _SERIES_BELOW
    v = torch.where(near, x, 0.0)
    series = torch.zeros_like(v)
    coefficients = [0.5]
    for k in range(1, 10):
        coefficients.append(coefficients[-1] / (k + 2))
    for coefficient in reversed(coefficients):
        series = series * v + coefficient
    return torch.where(near, v * v * series, torch.expm1(x) - x)
