"""Which algorithm solves the risks of a divergence: the one place where the library's divergences are told apart.

A divergence that is not registered is solved by `generic` from phi* and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from drrho.divergences import KL, CappedKL, ChiSquare, CressieRead, CVaR, Divergence, TotalVariation
from drrho.solvers.chi_square import chi_square_ball, chi_square_penalty
from drrho.solvers.closed import solve_cvar, solve_kl_penalty
from drrho.solvers.cressie_read import cressie_read_ball, cressie_read_penalty
from drrho.solvers.dual import Found
from drrho.solvers.generic import generic_ball, generic_penalty
from drrho.solvers.kl import kl_ball, kl_penalty
from drrho.solvers.problem import Problem, Solution
from drrho.solvers.rows import Rows
from drrho.solvers.tail import total_variation_ball, total_variation_penalty

#: Takes normalized rows and their radii or strengths, ``[rows]``, to multipliers and weights.
Solver = Callable[[Divergence, Rows, np.ndarray], Found]


class ClosedForm(Protocol):
    """A solution of rows as they are, without iteration; strength None: over the ball of any radius."""

    def __call__(
        self, z: Tensor, strength: Tensor | None, alpha: Tensor | None, base: Tensor | None, problem: Problem
    ) -> Solution:
        """Solve rows ``z`` ``[rows, n]``."""
        ...


class Algorithm(NamedTuple):
    """What solves the risks of one divergence: the first that applies of kernel, closed form and iteration."""

    ball: Solver = generic_ball
    penalty: Solver = generic_penalty
    closed_ball: ClosedForm | None = None
    closed_penalty: ClosedForm | None = None
    #: The divergence's number in ``kernels.c``.
    kernel: int | None = None


_GENERIC = Algorithm()
_CHI_SQUARE = Algorithm(chi_square_ball, chi_square_penalty, kernel=0)
_KL = Algorithm(kl_ball, kl_penalty, kernel=1)


_POWER = Algorithm(cressie_read_ball, cressie_read_penalty, kernel=5)
_NAMED: dict[float | None, Algorithm] = {1.0: _KL, 2.0: _CHI_SQUARE}


def _of_order(divergence: Divergence) -> Algorithm:
    return _NAMED.get(divergence.cressie_read_order, _POWER)


_REGISTERED: dict[type[Divergence], Algorithm | Callable[[Divergence], Algorithm]] = {
    KL: _KL._replace(closed_penalty=solve_kl_penalty),
    ChiSquare: _CHI_SQUARE,
    CVaR: Algorithm(closed_ball=solve_cvar, closed_penalty=solve_cvar, kernel=2),
    TotalVariation: Algorithm(total_variation_ball, total_variation_penalty, kernel=3),
    CappedKL: Algorithm(kernel=4),
    CressieRead: _of_order,
}


def algorithm_of(divergence: Divergence) -> Algorithm:
    """Return the algorithm registered for the divergence's class, or for the nearest class it derives from.

    A class derived from a registered one may change phi, of which the kernels know nothing: it has none.
    """
    for kind in type(divergence).__mro__:
        found = _REGISTERED.get(kind)
        if found is not None:
            algorithm = found if isinstance(found, Algorithm) else found(divergence)
            return algorithm if kind is type(divergence) else algorithm._replace(kernel=None)
    return _GENERIC
