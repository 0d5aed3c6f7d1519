"""Divergences as users write them, from phi, its conjugate and the conjugate's gradient, and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drrho import Divergence


class LeCam(Divergence):
    """``(t - 1)^2 / (t + 1)``, the triangular discrimination: its conjugate is infinite beyond 1."""

    def phi(self, t: Tensor) -> Tensor:
        """Return ``(t - 1)^2 / (t + 1)``."""
        return torch.where(t < 0, torch.inf, (t - 1) ** 2 / (t.clamp(min=0) + 1))

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``4 - s - 4 sqrt(1 - s)``, -1 below -3."""
        inner = 4 - s - 4 * torch.sqrt((1 - s).clamp(min=0))
        return torch.where(s > 1, torch.inf, torch.where(s > -3, inner, -1.0))

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``2 / sqrt(1 - s) - 1``, 0 below -3."""
        return torch.where(s > 1, torch.inf, (2 / torch.sqrt((1 - s).clamp(min=0)) - 1).clamp(min=0))


class Triangular(LeCam):
    """``(t - 1)^2 / (2 (t + 1))``, half of it: curvature 1/2 at one."""

    def phi(self, t: Tensor) -> Tensor:
        """Return half of Le Cam's."""
        return super().phi(t) / 2

    def conjugate(self, s: Tensor) -> Tensor:
        """Return half of Le Cam's at ``2 s``."""
        return super().conjugate(2 * s) / 2

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return Le Cam's at ``2 s``."""
        return super().conjugate_gradient(2 * s)


class JensenShannon(Divergence):
    """``t log t - (1 + t) log((1 + t) / 2)``: its conjugate is infinite from log 2 on."""

    def phi(self, t: Tensor) -> Tensor:
        """Return ``t log t - (1 + t) log((1 + t) / 2)``."""
        u = t.clamp(min=0)
        return torch.where(t < 0, torch.inf, torch.xlogy(u, u) - (1 + u) * torch.log((1 + u) / 2))

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``-log(2 - exp(s))``."""
        rest = 2 - torch.exp(s)
        return torch.where(rest > 0, -torch.log(rest.clamp(min=0)), torch.inf)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``exp(s) / (2 - exp(s))``."""
        rest = 2 - torch.exp(s)
        return torch.where(rest > 0, torch.exp(s) / rest, torch.inf)


class Jeffreys(Divergence):
    """``(t - 1) log t``: symmetric Kullback-Leibler, curvature 1/2 at one, infinite at zero."""

    def phi(self, t: Tensor) -> Tensor:
        """Return ``(t - 1) log t``."""
        return torch.where(t > 0, (t - 1) * torch.log(t.clamp(min=0)), torch.inf)

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``s t - phi(t)`` at the maximizing t."""
        t = self.conjugate_gradient(s)
        return t - 1 + torch.log(t)  # as s = log t + 1 - 1 / t

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return the t of ``log t + 1 - 1 / t = s``: for ``v = -log t``, ``v + exp(v) = 1 - s``, by Newton."""
        target = 1 - s
        v = torch.where(target > 1, torch.log(target.clamp(min=1)), target - 1)
        for _ in range(12):
            v = v - (v + torch.exp(v) - target) / (1 + torch.exp(v))
        return torch.exp(-v)

    def curvature(self, s: Tensor) -> Tensor:
        """Return ``1 / phi''(t)``."""
        t = self.conjugate_gradient(s)
        return t * t / (1 + t)


class SymmetricChiSquare(Divergence):
    """``(t - 1)^2 + (t - 1)^2 / t``: curvature 1/4 at one, infinite at zero."""

    def phi(self, t: Tensor) -> Tensor:
        """Return ``(t - 1)^2 (1 + 1 / t)``."""
        return torch.where(t > 0, (t - 1) ** 2 * (1 + 1 / t), torch.inf)

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``s t - phi(t)`` at the maximizing t, where ``s = 2 t - 1 - 1 / t^2``."""
        t = self.conjugate_gradient(s)
        return (t - 1) * (t + 1 + 2 / t)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return the t of ``2 t - 1 - 1 / t^2 = s``, by Newton on a concave function, from below."""
        target = 1 + s
        t = torch.where(target > 2, target / 2, (1 + (2 - target).clamp(min=0)).rsqrt())
        for _ in range(12):
            t = t - (2 * t - target - t**-2) / (2 + 2 * t**-3)
        return t

    def curvature(self, s: Tensor) -> Tensor:
        """Return ``1 / phi''(t)``."""
        return 1 / (2 + 2 * self.conjugate_gradient(s) ** -3)


class Alpha(Divergence):
    """Amari's alpha divergence ``4 (1 - t^((1 + a) / 2)) / (1 - a^2)``, less its tangent at one.

    That of Cressie-Read's order ``(1 + a) / 2``.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha, self.order = alpha, (1 + alpha) / 2

    def __repr__(self) -> str:
        return f"Alpha({self.alpha:g})"

    def phi(self, t: Tensor) -> Tensor:
        """Return ``(t^k - k t + k - 1) / (k (k - 1))``."""
        k = self.order
        zero = 1 / k if k > 0 else math.inf
        inner = (t.clamp(min=1e-300) ** k - k * t + k - 1) / (k * (k - 1))
        return torch.where(t < 0, torch.inf, torch.where(t > 0, inner, zero))

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``((1 + (k - 1) s)^(k / (k - 1)) - 1) / k``."""
        k, base = self.order, 1 + (self.order - 1) * s
        inner = (base.clamp(min=0) ** (k / (k - 1)) - 1) / k
        return inner if k > 1 else torch.where((base < 0) | ((base == 0) & (k > 0)), torch.inf, inner)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``(1 + (k - 1) s)^(1 / (k - 1))``."""
        return (1 + (self.order - 1) * s).clamp(min=0) ** (1 / (self.order - 1))
