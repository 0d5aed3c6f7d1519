"""What a solver of a ball or a penalty finds: multipliers of the rows, and what tells a loss's weight from them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from drrho.divergences import Divergence
from drrho.solvers.rows import Rows


class Dual(NamedTuple):
    """Multipliers of rows in units of ``d``, float64 ``[rows]`` on the host.

    ``distance`` is D at them where the solver knows it better than a sum over the weights would, else None;
    ``saturated`` marks rows that rounding has put at the hard maximum.
    """

    threshold: np.ndarray
    strength: np.ndarray
    distance: np.ndarray | None
    saturated: np.ndarray


class Tilt(Protocol):
    """The density ratios of solved rows as a function of their losses, in two forms that keep different digits."""

    def tilt(self, d: Tensor) -> Tensor:
        """Return the ratio minus one of losses ``[rows, width]``, as a new tensor."""
        ...

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return the ratio of losses ``[rows, width]`` whose ``tilt`` is known."""
        ...


class Found(NamedTuple):
    """What solves some rows."""

    tilt: Tilt
    dual: Dual


class ConjugateTilt(NamedTuple):
    """The ratios ``phi*'((d - threshold) / strength)`` of any divergence.

    ``fine`` says that ratios may be so close to one that their distance from it needs a form of its own.
    """

    divergence: Divergence
    threshold: float | Tensor
    strength: float | Tensor
    fine: bool

    def tilt(self, d: Tensor) -> Tensor:
        """Return ``phi*'(s) - 1``."""
        s = (d - self.threshold).div_(self.strength)
        return self.divergence.tilt_(s) if self.fine else s.copy_(self.divergence.conjugate_gradient(s)).sub_(1)

    def ratio(self, d: Tensor, tilt: Tensor) -> Tensor:
        """Return one plus the tilt."""
        return tilt + 1


def by_conjugate(divergence: Divergence, rows: Rows, dual: Dual, *, fine: bool = True) -> Found:
    """Return multipliers with the ratios that phi* gives at them."""
    return Found(ConjugateTilt(divergence, rows.column(dual.threshold), rows.column(dual.strength), fine), dual)
