"""Divergences and their conjugates as expressions of cvxpy (the extra ``convex``), for conic programs.

`divergence_expression` states ``D(p || q)`` of decision variables p, `conjugate_expression` the dual of a robust risk.
`drrho.convex` solves programs that are made of them, and exports both names.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch
from typing import NamedTuple

import cvxpy as cp
import numpy as np
import torch
from cvxpy.atoms.affine.sum import Sum

from drrho.divergences import KL, CappedKL, ChiSquare, CressieRead, CVaR, Divergence, TotalVariation


class Formulation(NamedTuple):
    """An expression of cvxpy, and the constraints under which it has the stated value.

    Examples
    --------
    >>> import cvxpy as cp
    >>> import numpy as np
    >>> from drrho import KL
    >>> from drrho.convex import divergence_expression
    >>> p, q = cp.Variable(3), np.full(3, 1 / 3)
    >>> expression, constraints = divergence_expression(KL(), p, q)
    >>> problem = cp.Problem(cp.Maximize(p[0]), [cp.sum(p) == 1, expression <= 0.1, *constraints])
    >>> round(float(problem.solve()), 3)
    0.552
    """

    expression: cp.Expression
    constraints: list[cp.Constraint]


@singledispatch
def divergence_expression(divergence: Divergence, p: cp.Expression, q: np.ndarray) -> Formulation:
    """Express ``D(p || q) = sum_i q_i phi(p_i / q_i)`` in cvxpy, convex in ``p``.

    Parameters
    ----------
    divergence : Divergence
        ``KL()``, ``ChiSquare()``, ``CVaR(alpha)``, ``CressieRead(order)``, ``TotalVariation()``, ``CappedKL(alpha)``,
        or an instance of a registered class.
    p : cvxpy expression ``[n]``
        Affine. The caller adds the constraints ``p >= 0`` and ``sum p = 1``.
    q : ndarray ``[n]``
        Base weights, >= 0 and of sum 1. The constraints set p to 0 where q is 0.

    Returns
    -------
    Formulation
        ``expression`` is D under ``constraints``, provided that D is minimized or bounded from above.

    Raises
    ------
    TypeError
        For a divergence whose class is not registered.

    Notes
    -----
    KL and Burg's order 0 need exponential cones, chi-square a second-order cone, the other Cressie-Read orders power
    cones, and total variation and CVaR linear constraints (Ben-Tal et al. 2013).

    A divergence of your own is registered by its class. `robust_risk` then accepts it, and q has no zeros there::

        @divergence_expression.register
        def _(divergence: JensenShannon, p, q) -> Formulation:
            t = cp.multiply(1 / q, p)
            middle = (1 + t) / 2
            return Formulation(q @ (cp.rel_entr(t, middle) + cp.rel_entr(1, middle)), [])

    Examples
    --------
    The weights closest to uniform in chi-square for which the mean of x is 2:

    >>> import cvxpy as cp
    >>> import numpy as np
    >>> from drrho import ChiSquare
    >>> from drrho.convex import divergence_expression
    >>> x, p = np.array([0.0, 1.0, 2.0, 3.0]), cp.Variable(4, nonneg=True)
    >>> distance, constraints = divergence_expression(ChiSquare(), p, np.full(4, 0.25))
    >>> problem = cp.Problem(cp.Minimize(distance), [cp.sum(p) == 1, x @ p == 2, *constraints])
    >>> _ = problem.solve(solver="CLARABEL")
    >>> [round(float(weight), 4) for weight in p.value], round(float(problem.value), 4)
    ([0.1, 0.2, 0.3, 0.4], 0.1)
    """
    raise TypeError(_unsupported(divergence, "divergence_expression", divergence_expression.registry))


@singledispatch
def conjugate_expression(
    divergence: Divergence, scores: cp.Expression, strength: cp.Expression, q: np.ndarray
) -> Formulation:
    """Express ``sum_i q_i strength phi*(scores_i / strength)`` in cvxpy, jointly convex in scores and strength.

    Both robust risks are minima of ``conjugate_expression(losses - nu) + nu [+ strength * radius]`` over a threshold
    nu, that of a ball also over the strength >= 0 (Ben-Tal et al. 2013). The expression is nondecreasing in the scores,
    so losses may be replaced by upper bounds, which keeps a minimization over a model convex.

    Parameters
    ----------
    divergence : Divergence
        As for `divergence_expression`.
    scores : cvxpy expression ``[n]``
        Affine.
    strength : cvxpy expression, scalar
        Affine, >= 0 in every feasible point. A divergence without radius (CVaR) ignores it.
    q : ndarray ``[n]``
        Base weights, > 0.

    Returns
    -------
    Formulation
        ``expression`` is the mean under ``constraints``, provided that it is minimized or bounded from above.

    Raises
    ------
    TypeError
        For a divergence whose class is not registered; ``conjugate_expression.register`` adds one, for
        `minimize_linear`.

    Examples
    --------
    The KL risk of losses that are decision variables themselves, x and 1 - x with x in [0, 0.25]:

    >>> import cvxpy as cp
    >>> import numpy as np
    >>> from drrho import KL
    >>> from drrho.convex import conjugate_expression
    >>> x, threshold, strength = cp.Variable(), cp.Variable(), cp.Variable(nonneg=True)
    >>> losses = cp.hstack([x, 1 - x])
    >>> mean, constraints = conjugate_expression(KL(), losses - threshold, strength, np.full(2, 0.5))
    >>> risk = mean + threshold + 0.1 * strength
    >>> problem = cp.Problem(cp.Minimize(risk), [x >= 0, x <= 0.25, *constraints])
    >>> _ = problem.solve(solver="CLARABEL")
    >>> round(float(x.value), 4), round(float(problem.value), 4)
    (0.25, 0.6099)
    """
    raise TypeError(_unsupported(divergence, "conjugate_expression", conjugate_expression.registry))


# phi of the ratio t = p / q, averaged over q -------------------------------------------------------------------------


def _ratio(p: cp.Expression, q: np.ndarray) -> tuple[cp.Expression, np.ndarray, list[cp.Constraint]]:
    """Return p / q where q > 0, that part of q, and the constraint that p is 0 elsewhere."""
    q = np.asarray(q, dtype=np.float64)
    inside, outside = np.flatnonzero(q > 0), np.flatnonzero(q == 0)
    if len(outside) == 0:
        return cp.multiply(1 / q, p), q, []
    return cp.multiply(1 / q[inside], p[inside]), q[inside], [p[outside] == 0]


@divergence_expression.register
def _(divergence: KL, p: cp.Expression, q: np.ndarray) -> Formulation:
    t, q, constraints = _ratio(p, q)
    return Formulation(q @ cp.rel_entr(t, np.ones(len(q))), constraints)


@divergence_expression.register
def _(divergence: ChiSquare, p: cp.Expression, q: np.ndarray) -> Formulation:
    t, q, constraints = _ratio(p, q)
    return Formulation(Sum(cp.square(cp.multiply(np.sqrt(q), t - 1))) / 2, constraints)


@divergence_expression.register
def _(divergence: CVaR, p: cp.Expression, q: np.ndarray) -> Formulation:
    return Formulation(cp.Constant(0.0), [p <= np.asarray(q) / _tail_fraction(divergence)])


@divergence_expression.register
def _(divergence: CappedKL, p: cp.Expression, q: np.ndarray) -> Formulation:
    distance, constraints = divergence_expression(KL(), p, q)
    return Formulation(distance, [*constraints, p <= np.asarray(q) / _tail_fraction(divergence)])


@divergence_expression.register
def _(divergence: TotalVariation, p: cp.Expression, q: np.ndarray) -> Formulation:
    _, _, constraints = _ratio(p, q)
    return Formulation(cp.norm1(p - q) / 2, constraints)


@divergence_expression.register
def _(divergence: CressieRead, p: cp.Expression, q: np.ndarray) -> Formulation:
    k = divergence.order
    if k in (1, 2):
        return divergence_expression(KL() if k == 1 else ChiSquare(), p, q)
    t, q, constraints = _ratio(p, q)
    one = np.ones(len(q))
    if k == 0:
        return Formulation(q @ cp.rel_entr(one, t), constraints)
    power = cp.Variable(len(q))  # bounds t^k from its convex side
    if k > 1:
        # Terms q t^k without a coefficient, because large t cost the solver digits in measurements.
        cone = cp.PowCone3D(power, one, cp.multiply(q ** (1 / k), t), 1 / k)
        return Formulation((Sum(power) - 1) / (k * (k - 1)), [*constraints, cone])
    cone = cp.PowCone3D(t, one, power, k) if k > 0 else cp.PowCone3D(power, t, one, 1 / (1 - k))
    return Formulation((q @ power - 1) / (k * (k - 1)), [*constraints, cone])


# strength * phi*(scores / strength), averaged over q -----------------------------------------------------------------
#
# Term i is stated as width phi*(s / width) with width = q_i strength and s = q_i scores_i: in measurements the solver
# keeps more digits than with terms of order one that are weighted by q.


@conjugate_expression.register
def _(divergence: KL, scores: cp.Expression, strength: cp.Expression, q: np.ndarray) -> Formulation:
    bound, width = cp.Variable(len(q)), strength * q  # bound >= width (exp(s / width) - 1)
    return Formulation(Sum(bound), [cp.ExpCone(cp.multiply(q, scores), width, bound + width)])


@conjugate_expression.register
def _(divergence: ChiSquare, scores: cp.Expression, strength: cp.Expression, q: np.ndarray) -> Formulation:
    # phi*(s) = e + e^2 / 2 with e = max(s, -1) has no cancellation at large strength, ((1 + s)_+^2 - 1) / 2 has
    e, square = cp.Variable(len(q)), cp.Variable()
    cone = cp.quad_over_lin(cp.multiply(1 / np.sqrt(q), e), strength) <= square
    return Formulation(Sum(e) + square / 2, [e >= cp.multiply(q, scores), e >= -strength * q, cone])


@conjugate_expression.register
def _(divergence: CVaR, scores: cp.Expression, strength: cp.Expression, q: np.ndarray) -> Formulation:
    return Formulation(q @ cp.pos(scores) / _tail_fraction(divergence), [])


@conjugate_expression.register
def _(divergence: CappedKL, scores: cp.Expression, strength: cp.Expression, q: np.ndarray) -> Formulation:
    beyond = cp.Variable(len(q), nonneg=True)  # the part of the scores above the cap
    mean, constraints = conjugate_expression(KL(), scores - beyond, strength, q)
    return Formulation(mean + q @ beyond / _tail_fraction(divergence), constraints)


@conjugate_expression.register
def _(divergence: TotalVariation, scores: cp.Expression, strength: cp.Expression, q: np.ndarray) -> Formulation:
    return Formulation(q @ cp.maximum(scores, -strength / 2), [scores <= strength / 2])


@conjugate_expression.register
def _(divergence: CressieRead, scores: cp.Expression, strength: cp.Expression, q: np.ndarray) -> Formulation:
    k = divergence.order
    if k in (1, 2):
        return conjugate_expression(KL() if k == 1 else ChiSquare(), scores, strength, q)
    s, width = cp.multiply(q, scores), strength * q
    if k == 0:
        return Formulation(Sum(cp.rel_entr(width, width - s)), [])
    bound = cp.Variable(len(q))
    power = width + k * bound  # bound >= width phi*(s / width) = (power - width) / k, power = base^(k / (k - 1)) width
    if k > 1:
        e = cp.Variable(len(q))  # max(s, -width / (k - 1))
        base = width + (k - 1) * e
        return Formulation(Sum(bound), [e >= s, base >= 0, cp.PowCone3D(power, width, base, (k - 1) / k)])
    base = width + (k - 1) * s
    cone = cp.PowCone3D(power, base, width, 1 - k) if k > 0 else cp.PowCone3D(base, width, power, k / (k - 1))
    return Formulation(Sum(bound), [cone])


def _tail_fraction(divergence: CVaR | CappedKL) -> float:
    alpha = torch.as_tensor(divergence.alpha)
    if alpha.numel() != 1:
        raise ValueError(f"alpha must be one number here, got the shape {list(alpha.shape)}")
    return float(divergence.alpha)


def _unsupported(divergence: Divergence, name: str, registered: Iterable[type]) -> str:
    supported = sorted(kind.__name__ for kind in registered if kind is not object)
    return f"{name} supports {', '.join(supported)}, got {divergence!r}: register its class with @{name}.register"
