"""phi-divergences ``D(p || q) = sum_i q_i phi(p_i / q_i)``, one small frozen class each.

A class states ``phi`` (convex, ``phi(1) = 0`` its minimum), its conjugate ``phi*(s) = sup_{t >= 0} t s - phi(t)``
and the conjugate's gradient; everything else is derived unless a closed form is more accurate or faster.
Normalization is ``phi''(1) = 1`` for the smooth ones (Cressie & Read 1984; Yang, opt4ml.org, chapter 2.2).

A divergence of your own needs just the three functions, elementwise on tensors:

>>> import torch
>>> from drrho import Divergence, constrained_risk
>>> class JensenShannon(Divergence):
...     def phi(self, t):
...         return torch.special.xlogy(t, t) - (1 + t) * torch.log((1 + t) / 2)
...     def conjugate(self, s):
...         return torch.where(s < math.log(2), -torch.log(2 - torch.exp(s)), torch.inf)
...     def conjugate_gradient(self, s):
...         return torch.exp(s) / (2 - torch.exp(s))
>>> round(constrained_risk([0.0, 1.0, 2.0, 3.0], JensenShannon(), 0.05).value.item(), 4)
1.9939
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from drrho.validation import refuse, values_are_readable

__all__ = ["KL", "CVaR", "CappedKL", "ChiSquare", "CressieRead", "Divergence", "TotalVariation"]

SERIES_BELOW = 0.1  # |argument| under which a series or a quadrature replaces a difference that cancels


def _gauss(points: int) -> tuple[tuple[float, float], ...]:
    """Return nodes and weights of Gauss and Legendre's rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return tuple(zip(((1 + nodes) / 2).tolist(), (weights / 2).tolist(), strict=True))


# Exact to rounding for the analytic integrands below, at arguments under a number: what is singular at a distance of
# 1/2 or more leaves an error of 1e-17.
_RULES = ((0.002, _gauss(3)), (0.03, _gauss(5)), (SERIES_BELOW, _gauss(7)))


_FUNCTIONS = ("phi", "conjugate", "conjugate_gradient", "cressie_read_order", "tail_fraction")


class Divergence(ABC):
    """The protocol of a phi-divergence; all methods act elementwise on tensors.

    ``phi`` must be strictly convex where it is finite, for the weights to be a function of the dual variables
    (`CVaR` and `TotalVariation`, which are not, have algorithms of their own). What is declared beside the functions
    holds for any phi unless a class says otherwise; which algorithm solves its risks is declared in
    ``solvers/algorithms.py``.

    Examples
    --------
    >>> import torch
    >>> from drrho import Divergence, constrained_risk
    >>> class Hellinger(Divergence):  # phi and its conjugate; the generic solver does the rest
    ...     def phi(self, t):
    ...         return 2 * (t.sqrt() - 1) ** 2
    ...     def conjugate(self, s):
    ...         return torch.where(s < 2, 2 * s / (2 - s), torch.inf)
    ...     def conjugate_gradient(self, s):
    ...         return torch.where(s < 2, 4 / (2 - s) ** 2, torch.inf)
    >>> risk = constrained_risk([0.0, 1.0, 3.0], Hellinger(), 0.1)
    >>> round(risk.value.item(), 6), abs(risk.gap.item()) < 1e-9
    (1.901433, True)
    """

    #: Whether a finite positive radius means something; False where D takes only the values 0 and infinity.
    has_radius: ClassVar[bool] = True
    #: Whether the penalty's weights are ``q exp((losses - threshold) / strength)``, whose normalizer is a mean that
    #: can be estimated over minibatches.
    has_exponential_weights: ClassVar[bool] = False

    def __init_subclass__(cls, **options: object) -> None:
        """Refuse a class with another phi than that of the library's divergence from which it is derived."""
        super().__init_subclass__(**options)
        if cls.__module__ == __name__:
            return
        parent = next(base for base in cls.__mro__ if base.__module__ == __name__)
        changed = [name for name in _FUNCTIONS if getattr(cls, name) is not getattr(parent, name)]
        if changed and parent is not Divergence:
            raise TypeError(
                f"{cls.__name__} must not change {changed[0]} of {parent.__name__}, whose closed forms it would "
                "inherit: derive it from drrho.Divergence"
            )

    @property
    def cressie_read_order(self) -> float | None:
        """The order k for which ``phi*(s) = (t - 1) + (k - 1) phi(t)`` at ``t = phi*'(s)``, if there is one."""
        return None

    @property
    def has_kinks(self) -> bool:
        """Whether the gradient of the risk jumps as the losses change, so that second derivatives tell nothing."""
        return False

    @property
    def tail_fraction(self) -> float | Tensor | None:
        """The alpha whose inverse bounds the density ratio, if there is a bound: ``phi(t)`` is infinite beyond it."""
        return None

    def with_tail_fraction(self, alpha: float | Tensor) -> Divergence:
        """Return the same divergence with another tail fraction; only asked of one that has a `tail_fraction`."""
        raise TypeError(f"{self} has no tail fraction to replace by {alpha}")

    def slope_at_cap(self) -> float | Tensor:
        """Return ``phi'(1 / alpha)`` from the left; only asked of a divergence with a `tail_fraction`."""
        return 0.0

    @abstractmethod
    def phi(self, t: Tensor) -> Tensor:
        """Return ``phi(t)`` of the density ratio ``t``; infinite outside its domain."""

    @abstractmethod
    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``phi*(s) = sup_{t >= 0} t s - phi(t)``; infinite outside its domain."""

    @abstractmethod
    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return the maximizing ratio ``t`` of ``phi*(s)``."""

    def curvature(self, s: Tensor) -> Tensor:
        """Return the second derivative of ``phi*``: how fast ratios react to losses."""
        _, pull, *_ = torch.func.vjp(self.conjugate_gradient, s)
        return pull(torch.ones_like(s))[0]

    def ratio_and_curvature(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``phi*'(s)`` and ``phi*''(s)``, evaluated together where the second is derived from the first."""
        if type(self).curvature is not Divergence.curvature:
            return self.conjugate_gradient(s), self.curvature(s)
        ratio, pull, *_ = torch.func.vjp(self.conjugate_gradient, s)
        return ratio, pull(torch.ones_like(s))[0]

    def tilt(self, s: Tensor) -> Tensor:
        """Return ``phi*'(s) - 1``, to full relative accuracy also near ``s = 0``: the integral of the curvature."""
        (integral,) = self._integrals(s, lambda x: (1.0,))
        return self._if_near(s, s * integral, self.conjugate_gradient(s) - 1)

    def tilt_(self, s: Tensor) -> Tensor:
        """Overwrite s by `tilt` of it."""
        return s.copy_(self.tilt(s))

    def cost(self, s: Tensor) -> Tensor:
        """Return ``phi(phi*'(s))``, to full relative accuracy also near ``s = 0``: there ``d phi = s phi*''(s) ds``."""
        (integral,) = self._integrals(s, lambda x: (x,))
        return self._if_near(s, s.square() * integral, s * self.conjugate_gradient(s) - self.conjugate(s))

    def tilt_and_cost(self, s: Tensor, ratio: Tensor, conjugate: Tensor) -> tuple[Tensor, Tensor]:
        """Return `tilt` and `cost`, where ``phi*'(s)`` and ``phi*(s)`` are known."""
        kind = type(self)
        if kind.tilt is not Divergence.tilt or kind.cost is not Divergence.cost:
            return self.tilt(s), self.cost(s)
        first, second = self._integrals(s, lambda x: (1.0, x))
        return self._if_near(s, s * first, ratio - 1), self._if_near(s, s.square() * second, s * ratio - conjugate)

    def rough_bend(self, s: Tensor) -> Tensor:
        """Return ``phi*(s) - s``, to the rounding of ``phi*``."""
        return self.conjugate(s) - s

    def bend(self, s: Tensor) -> Tensor:
        """Return ``phi*(s) - s``, to full relative accuracy also near ``s = 0``."""
        (integral,) = self._integrals(s, lambda x: (1 - x,))
        return self._if_near(s, s.square() * integral, self.rough_bend(s))

    def averaged_bend(self, s: Tensor) -> Tensor:
        """Return ``phi*(s) - s``, to the rounding of s: the integral of the ratios, which costs less than `bend`."""
        (integral,) = self._integrals(s, lambda x: (1.0,), lambda s: self.conjugate_gradient(s) - 1)
        return self._if_near(s, s * integral, self.rough_bend(s))

    def _integrals(
        self,
        s: Tensor,
        of: Callable[[float], tuple[float, ...]],
        function: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Return integrals over x in [0, 1] of a function of s x, ``phi*''``, times functions of x, for s near zero."""
        rules = [rule for _, rule in _RULES]
        if values_are_readable() and s.numel():
            largest = float(s.abs().amax())
            rules = [rule for limit, rule in _RULES if largest < limit] or rules[-1:]
        else:
            rules = rules[-1:]
        inside = torch.where(s.abs() < SERIES_BELOW, s, 0.0)
        totals: list[Tensor] = []
        for x, weight in rules[0]:
            values = (function or self.curvature)(inside * x)
            terms = [values * (weight * factor) for factor in of(x)]
            totals = [total.add_(term) for total, term in zip(totals, terms, strict=True)] if totals else terms
        return totals

    @staticmethod
    def _if_near(s: Tensor, smooth: Tensor, direct: Tensor) -> Tensor:
        """Return a quadrature near zero, if it is one of this function: a kink of phi* between 0 and s would show."""
        agree = (smooth - direct).abs() <= 64 * torch.finfo(direct.dtype).eps
        return torch.where((s.abs() < SERIES_BELOW) & agree, smooth, direct)

    def phi_of_tilt(self, e: Tensor) -> Tensor:
        """Return ``phi(1 + e)``; override where ``1 + e`` would round digits of a small ``e`` away."""
        return self.phi(1 + e)

    def maximal_radius(self, share: np.ndarray) -> np.ndarray:
        """Return the least D of weights that sit on the maximal losses only, float64 ``[rows]``.

        ``share`` is the base weight of the losses tied at the maximum: D of the base distribution restricted to
        them, ``share * phi(1 / share) + (1 - share) * phi(0)``. At that radius the risk has reached the maximum.
        """
        ties = torch.from_numpy(np.asarray(share, dtype=np.float64))
        off = torch.where(ties < 1, (1 - ties) * self.phi(torch.zeros_like(ties)), 0.0)
        return (ties * self.phi(1 / ties) + off).numpy()


def check_divergence(divergence: object) -> None:
    """Raise a `TypeError` for what is no divergence, such as its name or class."""
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be a Divergence such as KL() or ChiSquare(), got {divergence!r}")


@dataclass(frozen=True)
class CressieRead(Divergence):
    """Power divergence of order k: ``phi(t) = (t^k - k t + k - 1) / (k (k - 1))``, with its limits at k = 0 and 1.

    Order 2 is chi-square, 1 Kullback-Leibler, 1/2 (squared) Hellinger, 0 Burg's or reverse KL, -1 Neyman's.

    Parameters
    ----------
    order : float
        k, any finite number. For k <= 0 no weight can be zero and no finite radius reaches the maximum.

    Notes
    -----
    With ``base = 1 + (k - 1) s``: ``t = base^(1 / (k - 1))``, ``phi*'' = t / base`` and ``k phi = s t - (t - 1)``.
    Source: Cressie & Read (1984); Duchi & Namkoong, arXiv 1810.08750.

    Examples
    --------
    >>> from drrho import ChiSquare, CressieRead, constrained_risk
    >>> losses = [0.0, 1.0, 3.0]
    >>> round(constrained_risk(losses, CressieRead(0.5), 0.1).value.item(), 6)  # Hellinger
    1.901433
    >>> constrained_risk(losses, CressieRead(2.0), 0.1).value == constrained_risk(losses, ChiSquare(), 0.1).value
    tensor(True)
    """

    order: float

    def __post_init__(self) -> None:
        if not isinstance(self.order, Real) or isinstance(self.order, bool):
            raise TypeError(f"order must be a number, got {self.order!r}")
        if not math.isfinite(self.order):
            raise ValueError(f"order must be a finite number, got {self.order}")
        object.__setattr__(self, "order", float(self.order))

    @property
    def cressie_read_order(self) -> float:
        """The order."""
        return self.order

    def phi(self, t: Tensor) -> Tensor:
        """Return ``(t^k - k t + k - 1) / (k (k - 1))``, near t = 1 to full relative accuracy."""
        k, e = self.order, t - 1
        near = e.abs() < SERIES_BELOW
        inside = torch.where(near, e, 0.0)
        # phi(1 + e) = integral of (e - v) phi''(1 + v) over v from 0 to e, and phi''(t) = t^(k - 2)
        series = inside.square() * sum(w * (1 - x) * (1 + inside * x) ** (k - 2) for x, w in _RULES[-1][1])
        # Divided differences of powers keep their digits next to the orders 0 and 1, where they become logarithms.
        logarithm = torch.log(torch.where(t > 0, t, 1.0))
        if min(abs(k), abs(k - 1)) > 0.1:
            far = (torch.where(t > 0, t, 1.0) ** k - k * e - 1) / (k * (k - 1))
        elif k < 0.5:
            far = (difference_quotient(k, logarithm) - e) / (k - 1)
        else:
            far = (t * difference_quotient(k - 1, logarithm) - e) / k
        far = torch.where(t > 0, far, 1 / k if k > 0 else torch.inf)
        return torch.where(t < 0, torch.inf, torch.where(near, series, far))

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``(base^(k / (k - 1)) - 1) / k``, for k < 1 infinite from ``s = 1 / (1 - k)`` (k > 0) or beyond it."""
        k = self.order
        value = difference_quotient(k, self._log_ratio(s))
        if k >= 1:
            return value
        base = 1 + (k - 1) * s
        return torch.where((base < 0) | ((base == 0) & (k >= 0)), torch.inf, value)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``base_+^(1 / (k - 1))``."""
        return torch.exp(self._log_ratio(s))

    def tilt(self, s: Tensor) -> Tensor:
        """Return ``base_+^(1 / (k - 1)) - 1``."""
        return torch.expm1(self._log_ratio(s))

    def curvature(self, s: Tensor) -> Tensor:
        """Return ``base^(1 / (k - 1) - 1)``, 0 where base is not positive."""
        log_ratio = self._log_ratio(s)
        return torch.where(log_ratio > -torch.inf, torch.exp((2 - self.order) * log_ratio), 0.0)

    def rough_bend(self, s: Tensor) -> Tensor:
        """Return ``phi*(s) - s``."""
        k = self.order
        if k <= 0 or k == 1:
            return self.conjugate(s) - s
        return self._log_ratio(s).mul_(k).expm1_().div_(k).sub_(s)  # infinite where it should be

    def maximal_radius(self, share: np.ndarray) -> np.ndarray:
        """Return ``(share^(1 - k) - 1) / (k (k - 1))``, infinite for k <= 0."""
        k, log_ratio = self.order, -np.log(share)
        if k <= 0:
            return np.where(share < 1, np.inf, 0.0)
        with np.errstate(over="ignore"):
            return log_ratio if k == 1 else np.expm1((k - 1) * log_ratio) / (k * (k - 1))

    def _log_ratio(self, s: Tensor) -> Tensor:
        if self.order == 1:
            return s
        return torch.log1p(((self.order - 1) * s).clamp(min=-1)) / (self.order - 1)


@dataclass(frozen=True)
class KL(Divergence):
    """Kullback-Leibler: ``phi(t) = t log t - t + 1``, so ``D(p || q) = sum_i p_i log(p_i / q_i)``.

    Examples
    --------
    >>> from drrho import KL, penalized_risk
    >>> risk = penalized_risk([0.0, 1.0, 3.0], KL(), strength=1.0)  # log mean exp, and softmax weights
    >>> round(risk.value.item(), 6), [round(weight, 3) for weight in risk.weights.tolist()]
    (2.071234, [0.042, 0.114, 0.844])
    """

    has_exponential_weights = True

    @property
    def cressie_read_order(self) -> float:
        """Order 1."""
        return 1.0

    def phi(self, t: Tensor) -> Tensor:
        """Return ``t log t - t + 1``, near t = 1 to full relative accuracy."""
        e = t - 1
        near = e.abs() < SERIES_BELOW
        u = torch.log1p(torch.where(near, e, 0.0))
        # phi(e^u) = sum_{k >= 0} u^(k + 2) (k + 1) / (k + 2)!
        series = u.square() * _power_series(u, [(k + 1) / math.factorial(k + 2) for k in range(11)])
        positive = t.clamp(min=0)
        return torch.where(t < 0, torch.inf, torch.where(near, series, torch.special.xlogy(positive, positive) - e))

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``exp(s) - 1``."""
        return torch.expm1(s)

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``exp(s)``."""
        return torch.exp(s)

    def curvature(self, s: Tensor) -> Tensor:
        """Return ``exp(s)``."""
        return torch.exp(s)

    def tilt(self, s: Tensor) -> Tensor:
        """Return ``exp(s) - 1``."""
        return torch.expm1(s)

    def tilt_(self, s: Tensor) -> Tensor:
        """Overwrite s by ``exp(s) - 1``."""
        return s.expm1_()

    def maximal_radius(self, share: np.ndarray) -> np.ndarray:
        """Return ``log(1 / share)``."""
        return -np.log(share)


@dataclass(frozen=True)
class ChiSquare(Divergence):
    """Chi-square: ``phi(t) = (t - 1)^2 / 2``; half of Pearson's statistic divided by n.

    Examples
    --------
    >>> from drrho import ChiSquare, constrained_risk
    >>> risk = constrained_risk([0.0, 1.0, 3.0], ChiSquare(), radius=0.1)
    >>> round(risk.value.item(), 6), [round(weight, 3) for weight in risk.weights.tolist()]
    (1.891107, [0.174, 0.293, 0.533])
    """

    @property
    def cressie_read_order(self) -> float:
        """Order 2."""
        return 2.0

    def phi(self, t: Tensor) -> Tensor:
        """Return ``(t - 1)^2 / 2``."""
        return torch.where(t < 0, torch.inf, self.phi_of_tilt(t - 1))

    def phi_of_tilt(self, e: Tensor) -> Tensor:
        """Return ``e^2 / 2``."""
        return e.square().div_(2)

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``((1 + s)_+^2 - 1) / 2``, written so that small ``s`` keeps its digits."""
        e = self.tilt(s)
        return e + e.square() / 2

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``(1 + s)_+``."""
        return (1 + s).clamp(min=0)

    def curvature(self, s: Tensor) -> Tensor:
        """Return 1 on the support, 0 elsewhere."""
        return (s > -1).to(s.dtype)

    def tilt(self, s: Tensor) -> Tensor:
        """Return ``max(s, -1)``."""
        return s.clamp(min=-1)

    def tilt_(self, s: Tensor) -> Tensor:
        """Overwrite s by ``max(s, -1)``."""
        return s.clamp_(min=-1)

    def cost(self, s: Tensor) -> Tensor:
        """Return ``max(s, -1)^2 / 2``."""
        return self.tilt(s).square() / 2

    def maximal_radius(self, share: np.ndarray) -> np.ndarray:
        """Return ``(1 / share - 1) / 2``."""
        return (1 / share - 1) / 2


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Total variation: ``phi(t) = |t - 1| / 2``, so D is half the L1 distance, at most 1.

    The ball of radius r moves the mass of the r smallest losses to the largest:
    ``r max + (1 - r) CVaR_{1 - r}``; the penalty replaces every loss by ``max(loss, max - strength)``.

    Examples
    --------
    >>> from drrho import TotalVariation, constrained_risk
    >>> risk = constrained_risk([0.0, 1.0, 3.0], TotalVariation(), radius=0.1)  # a tenth of the mass moves
    >>> [round(weight, 3) for weight in risk.weights.tolist()]
    [0.233, 0.333, 0.433]
    """

    @property
    def has_kinks(self) -> bool:
        """True: the risk is piecewise linear."""
        return True

    def phi(self, t: Tensor) -> Tensor:
        """Return ``|t - 1| / 2``."""
        return torch.where(t < 0, torch.inf, self.phi_of_tilt(t - 1))

    def phi_of_tilt(self, e: Tensor) -> Tensor:
        """Return ``|e| / 2``."""
        return e.abs() / 2

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``max(s, -1/2)``, infinite above 1/2 (to eight rounding errors, as dual variables carry some)."""
        limit = 0.5 + 8 * torch.finfo(s.dtype).eps
        return torch.where(s > limit, torch.inf, s.clamp(-0.5, 0.5))

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return 1 between -1/2 and 1/2, 0 below (set-valued at both ends: 1 is returned)."""
        return (s >= -0.5).to(s.dtype)

    def curvature(self, s: Tensor) -> Tensor:
        """Return 0: the risk is piecewise linear."""
        return torch.zeros_like(s)

    def maximal_radius(self, share: np.ndarray) -> np.ndarray:
        """Return ``1 - share``."""
        return 1 - share


@dataclass(frozen=True)
class _Capped(Divergence):
    """What divergences with a tail fraction share."""

    alpha: float | Tensor

    def __post_init__(self) -> None:
        alpha, message = self.alpha, "alpha must lie in (0, 1], got {}: it is the fraction of losses in the tail"
        if not isinstance(alpha, Tensor):
            if not isinstance(alpha, Real) or isinstance(alpha, bool):
                raise TypeError(f"alpha must be a number or a tensor, got {alpha!r}")
            if not 0 < alpha <= 1:
                raise ValueError(message.format(alpha))
        elif values_are_readable():  # otherwise the solver, which sees values, refuses them
            refuse(~((alpha > 0) & (alpha <= 1)), alpha.detach(), message)

    @property
    def tail_fraction(self) -> float | Tensor:
        """The fraction given."""
        return self.alpha

    def with_tail_fraction(self, alpha: float | Tensor) -> Divergence:
        """Return the same divergence with another tail fraction."""
        return replace(self, alpha=alpha)


@dataclass(frozen=True)
class CVaR(_Capped):
    """Conditional value at risk: ``phi(t) = 0`` for ``0 <= t <= 1 / alpha``, infinite beyond.

    Parameters
    ----------
    alpha : float or tensor broadcasting to the leading dimensions of the losses
        The tail fraction in (0, 1]: the risk is the mean of the worst ``alpha * n`` losses, the boundary
        loss counted by its fraction (Rockafellar & Uryasev 2000). ``alpha = k / n`` is the mean of the top k.
        D is 0 or infinite, so a radius has no effect. The value is differentiable in a tensor ``alpha``.

    Examples
    --------
    >>> from drrho import CVaR, constrained_risk
    >>> constrained_risk([0.0, 1.0, 3.0, 8.0], CVaR(alpha=0.5)).value.item()  # the mean of the worst half
    5.5
    """

    has_radius = False

    @property
    def has_kinks(self) -> bool:
        """Whether alpha is less than one: at one the risk is the mean."""
        return bool(self.alpha != 1)

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

    def curvature(self, s: Tensor) -> Tensor:
        """Return 0: the risk is piecewise linear."""
        return torch.zeros_like(s)


@dataclass(frozen=True)
class CappedKL(_Capped):
    """KL with the density ratio capped: ``phi(t) = t log t - t + 1`` for ``0 <= t <= 1 / alpha``, infinite beyond.

    Its penalty is the KL-regularized CVaR of Levy et al. (2020), a smooth form of CVaR; its ball lies in both the
    KL ball and CVaR's, and from the radius of CVaR's own weights on it is CVaR.

    Parameters
    ----------
    alpha : float or tensor broadcasting to the leading dimensions of the losses
        The tail fraction in (0, 1]. The value is differentiable in a tensor ``alpha``.

    Examples
    --------
    >>> from drrho import CappedKL, penalized_risk
    >>> risk = penalized_risk([0.0, 1.0, 3.0, 8.0], CappedKL(alpha=0.5), strength=1.0)  # no weight above 2 / n
    >>> [round(weight, 3) for weight in risk.weights.tolist()]
    [0.021, 0.057, 0.422, 0.5]
    """

    def phi(self, t: Tensor) -> Tensor:
        """Return ``t log t - t + 1``, infinite beyond ``1 / alpha`` (to eight rounding errors)."""
        allowed = (1 + 8 * torch.finfo(t.dtype).eps) / self.alpha
        return torch.where(t > allowed, torch.inf, KL().phi(t))

    def conjugate(self, s: Tensor) -> Tensor:
        """Return ``exp(s) - 1`` up to ``s = log(1 / alpha)``, and its tangent from there on."""
        limit = self.slope_at_cap()
        return torch.expm1(torch.minimum(s, limit)) + (s - limit).clamp(min=0) / self.alpha

    def conjugate_gradient(self, s: Tensor) -> Tensor:
        """Return ``min(exp(s), 1 / alpha)``."""
        return torch.exp(torch.minimum(s, self.slope_at_cap()))

    def curvature(self, s: Tensor) -> Tensor:
        """Return ``exp(s)`` below the cap, 0 above."""
        return torch.where(s < self.slope_at_cap(), torch.exp(torch.minimum(s, self.slope_at_cap())), 0.0)

    def tilt(self, s: Tensor) -> Tensor:
        """Return ``min(exp(s), 1 / alpha) - 1``."""
        return torch.expm1(torch.minimum(s, self.slope_at_cap()))

    def slope_at_cap(self) -> Tensor:
        """Return ``log(1 / alpha)``."""
        return -torch.log(torch.as_tensor(self.alpha, dtype=torch.float64))


_Numbers = TypeVar("_Numbers", Tensor, np.ndarray)


def difference_quotient(power: float, logarithm: _Numbers) -> _Numbers:
    """Return ``(t^power - 1) / power`` for ``t = exp(logarithm)``; its limit at power 0."""
    if power == 0:
        return logarithm
    if isinstance(logarithm, Tensor):
        return torch.expm1(power * logarithm) / power
    return np.expm1(power * logarithm) / power


def expm1_minus(x: Tensor) -> Tensor:
    """Return ``exp(x) - 1 - x`` without cancellation near ``x = 0``."""
    near = x.abs() < SERIES_BELOW
    v = torch.where(near, x, 0.0)
    series = v.square() * _power_series(v, [1 / math.factorial(k + 2) for k in range(10)])
    return torch.where(near, series, torch.expm1(x) - x)


def _power_series(x: Tensor, coefficients: list[float]) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total.mul_(x).add_(coefficient)
    return total
