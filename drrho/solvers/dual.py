"""What a solver of a ball or a penalty finds: multipliers of the rows, and what tells a loss's weight from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers.rows import Rows, column, some


class Exponents(NamedTuple):
    """What phi* is taken of, ``s = (d - origin) / strength + offset``, ``[rows]`` each.

    A threshold that lies next to a loss, as seen from a small strength, has no digits left for the exponent of that
    loss: there the offset at the loss has them, and ``threshold = origin - strength * offset``.
    """

    origin: np.ndarray
    strength: np.ndarray
    offset: np.ndarray

    @property
    def threshold(self) -> np.ndarray:
        """The threshold, as far as it has digits."""
        return self.origin - self.strength * self.offset

    def of(self, d: Tensor) -> Tensor:
        """Return the exponents of losses ``[rows, width]``, a new tensor."""
        s = (d - column(self.origin, d.device)).div_(column(self.strength, d.device))
        return s.add_(column(self.offset, d.device)) if some(self.offset != 0) else s


class Dual(NamedTuple):
    """Multipliers of rows in units of ``d``, float64 ``[rows]`` on the host.

    ``distance`` is D at them where the solver knows it better than a sum over the weights would, else None;
    ``saturated`` marks rows that rounding has put at the hard maximum. ``anchor`` is where the exponents are known
    best and what they are there, origin and offset; None: zero at the threshold.
    """

    threshold: np.ndarray
    strength: np.ndarray
    distance: np.ndarray | None
    saturated: np.ndarray
    anchor: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def exponents(self) -> Exponents:
        """The exponents at these multipliers."""
        origin, offset = self.anchor or (self.threshold, np.zeros_like(self.threshold))
        return Exponents(origin, self.strength, offset)


class Tilt(Protocol):
    """The density ratios of solved rows as a function of their losses, in two forms that keep different digits."""

    def tilt(self, d: Tensor) -> Tensor:
        """Return the ratio minus one of losses ``[rows, width]``, as a new tensor."""
        ...

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return the ratio of losses ``[rows, width]`` whose ``tilt`` is known."""
        ...


class Found(NamedTuple):
    """What solves some rows; or should do so, if there is a ``better``, to be called where that is not enough.

    ``is_rough`` says that it may solve them nearly only, so that digits can be gained.
    """

    tilt: Tilt
    dual: Dual
    better: Callable[[], Found] | None = None
    is_rough: bool = False


class ConjugateTilt(NamedTuple):
    """The ratios ``phi*'(s)`` of any divergence.

    ``fine`` says that ratios may be so close to one that their distance from it needs a form of its own. What
    underflows is the smallest of ratios rather than zero, where phi may be infinite.
    """

    divergence: Divergence
    exponents: Exponents
    fine: bool

    def tilt(self, d: Tensor) -> Tensor:
        """Return ``phi*'(s) - 1``."""
        s = self.exponents.of(d)
        return self.divergence.tilt_(s) if self.fine else s.copy_(self.divergence.conjugate_gradient(s)).sub_(1)

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return one plus the tilt, or where that is small, and phi perhaps steep, what it is made of."""
        small = tilt < -0.5
        if self.divergence.cressie_read_order is not None or not small.any():
            return tilt + 1
        ratio = self.divergence.conjugate_gradient(self.exponents.of(d))
        if not math.isfinite(float(self.divergence.phi(ratio.new_zeros(1))[0])):
            ratio = ratio.clamp(min=torch.finfo(ratio.dtype).tiny)
        return torch.where(small, ratio, tilt + 1)


class MixedTilt(NamedTuple):
    """Between two tilts: the second times ``share`` ``[rows]``, plus the first times what is left of one.

    Where ratios are so steep in the threshold that they jump from one number to the next, both sides of the jump
    maximize the Lagrangian to rounding, and so does, as that is concave, any mean of them.
    """

    first: Tilt
    second: Tilt
    share: np.ndarray

    def tilt(self, d: Tensor) -> Tensor:
        """Return the tilt of losses ``[rows, width]``."""
        return torch.lerp(self.first.tilt(d), self.second.tilt(d), self._share(d))

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return the ratio of losses ``[rows, width]``."""
        first, second = (side.ratio(d, side.tilt(d)) for side in (self.first, self.second))
        return torch.lerp(first, second, self._share(d))

    def _share(self, d: Tensor) -> Tensor:
        return torch.as_tensor(column(self.share, d.device), dtype=d.dtype)


class AtPole(NamedTuple):
    """Tilts to which something is added at the maximum, ``[rows]``: there phi* has an end, and its slope none."""

    inner: ConjugateTilt
    added: np.ndarray

    def tilt(self, d: Tensor) -> Tensor:
        """Return the tilt of losses ``[rows, width]``."""
        return self.inner.tilt(d).add_((d == 0).to(d.dtype).mul_(column(self.added, d.device)))

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return one plus the tilt."""
        return tilt + 1


class BalancedPoint(NamedTuple):
    """A strength at which the ratios' mean is one, ``[rows]`` each, and by how much D misses the radius there.

    It is one by the offset ``low``, or by a ``share`` of the ratios at ``high`` and the rest at ``low``; ``added`` is
    what the maximum's ratio has beyond that at ``high``.
    """

    value: np.ndarray  # log D - log radius
    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    share: np.ndarray
    added: np.ndarray
    distance: np.ndarray

    @classmethod
    def none(cls, size: int) -> BalancedPoint:
        """Return what any balanced point is closer than."""
        return cls(np.full(size, np.inf), np.full(size, np.nan), *(np.zeros(size) for _ in range(5)))

    def where(self, chosen: np.ndarray, other: BalancedPoint) -> BalancedPoint:
        """Return this in the rows chosen and another in the others."""
        return BalancedPoint(*(np.where(chosen, ours, theirs) for ours, theirs in zip(self, other, strict=True)))

    def found(self, divergence: Divergence, saturated: np.ndarray, *, fine: bool) -> Found:
        """Return the multipliers with their ratios."""
        zero, strength = np.zeros_like(self.x), np.exp(self.x)
        first = ConjugateTilt(divergence, Exponents(zero, strength, self.low), fine)
        dual = Dual(-strength * self.low, strength, self.distance, saturated, (zero, self.low))
        if not some(self.share != 0):
            return Found(first, dual)
        second = ConjugateTilt(divergence, Exponents(zero, strength, self.high), fine)
        tilt = MixedTilt(first, AtPole(second, self.added) if some(self.added != 0) else second, self.share)
        return Found(tilt, dual._replace(distance=None))


def by_conjugate(divergence: Divergence, rows: Rows, dual: Dual, *, fine: bool = True) -> Found:
    """Return multipliers with the ratios that phi* gives at them."""
    return Found(ConjugateTilt(divergence, dual.exponents, fine), dual)
