"""Exact solutions of rows of losses: weights, multipliers and a certificate.

A divergence whose risk has an algorithm of its own registers it with ``solve_ball`` and ``solve_penalty``, functions
of normalized rows (`rows.Rows`); any other is solved by `generic`. Nothing here is recorded by autograd:
derivatives come from the optimality conditions (``drrho/optimum.py``).
"""

from __future__ import annotations

from functools import singledispatch

import numpy as np

from drrho.divergences import KL, ChiSquare, CressieRead, Divergence, TotalVariation
from drrho.solvers.chi_square import chi_square_ball, chi_square_penalty
from drrho.solvers.cressie_read import PathTilt, cressie_read_ball, cressie_read_penalty
from drrho.solvers.generic import generic_ball, generic_penalty
from drrho.solvers.kl import kl_ball, kl_penalty
from drrho.solvers.rows import Dual, Rows
from drrho.solvers.tail import TotalVariationTilt, total_variation_ball, total_variation_penalty

__all__ = ["Dual", "Rows", "solve_ball", "solve_penalty"]

#: Tilt (ratio minus one) and ratio of losses where phi*' of the dual variables gives them badly or not at all; or None.
Found = tuple[TotalVariationTilt | PathTilt | None, Dual]


@singledispatch
def solve_ball(divergence: Divergence, rows: Rows, radius: np.ndarray) -> Found:
    """Maximize ``<p, d>`` over the simplex subject to ``D(p || q) <= radius``, ``radius`` ``[rows]``."""
    return None, generic_ball(divergence, rows, radius)


@singledispatch
def solve_penalty(divergence: Divergence, rows: Rows, strength: np.ndarray) -> Found:
    """Maximize ``<p, d> - strength * D(p || q)`` over the simplex, ``strength`` ``[rows]``."""
    return None, generic_penalty(divergence, rows, strength)


@solve_ball.register
def _(divergence: KL, rows: Rows, radius: np.ndarray) -> Found:
    return None, kl_ball(rows, radius)


@solve_penalty.register
def _(divergence: KL, rows: Rows, strength: np.ndarray) -> Found:
    return None, kl_penalty(rows, strength)


@solve_ball.register
def _(divergence: ChiSquare, rows: Rows, radius: np.ndarray) -> Found:
    return None, chi_square_ball(rows, radius)


@solve_penalty.register
def _(divergence: ChiSquare, rows: Rows, strength: np.ndarray) -> Found:
    return None, chi_square_penalty(rows, strength)


@solve_ball.register
def _(divergence: TotalVariation, rows: Rows, radius: np.ndarray) -> Found:
    return total_variation_ball(rows, radius)


@solve_penalty.register
def _(divergence: TotalVariation, rows: Rows, strength: np.ndarray) -> Found:
    return total_variation_penalty(rows, strength)


@solve_ball.register
def _(divergence: CressieRead, rows: Rows, radius: np.ndarray) -> Found:
    if divergence.order in (1.0, 2.0):
        return solve_ball(KL() if divergence.order == 1 else ChiSquare(), rows, radius)
    return cressie_read_ball(divergence, rows, radius)


@solve_penalty.register
def _(divergence: CressieRead, rows: Rows, strength: np.ndarray) -> Found:
    if divergence.order in (1.0, 2.0):
        return solve_penalty(KL() if divergence.order == 1 else ChiSquare(), rows, strength)
    return cressie_read_penalty(divergence, rows, strength)
