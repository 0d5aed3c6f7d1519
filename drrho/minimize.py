"""Exact minimizers of robust risks of linear predictors, by Newton's method and with a duality gap.

Where the risk is smooth, Newton's method minimizes it. Where risk or loss has kinks (CVaR, total variation, the hinge
loss, a radius at which the hard maximum counts), it minimizes smoothed risks (``smoothing.py``), whose strength falls
and whose center follows the worst case. Either way the answer is certified: weights p of the inner maximum and slopes
of the losses give a lower bound on the minimum by Fenchel duality (`drrho.newton.State.lower_bound`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from drrho.divergences import Divergence
from drrho.newton import LinearProblem, State, newton
from drrho.pointwise import Array, Hinge, PointLoss, SmoothedHinge
from drrho.smoothing import ExactRisk, SmoothedRisk, smoothed_risk

_EPS = float(np.finfo(np.float64).eps)
_CLOSE = 1e-12  # decrease promised by a Newton step, relative to the risk, from which it is the last
_SMOOTH_STEPS = 50  # of Newton's method on the risk itself, where that is smooth
_ACCEPTED = 1e-6  # gap relative to the losses' size above which there is no answer, whatever the tolerance
_INEXACT = 0.01  # accuracy of a smoothed minimum relative to the gap so far; and again where that gave no higher bound
_MOST_ACCURATE = 1e-8
_FALLS, _LOWERED, _LOWEST = 0.5, 0.3, 1e-7  # the strength is lowered where the gap fell less, by this factor, to this
_WEAK = 1e-4  # strength below which a bound that no longer rises is a matter of float64: weights jump with the rounding
_IDLE = 5  # smoothed minima without a smaller gap after which an accepted one is not improved


class LinearFit(NamedTuple):
    """What `minimize_risk` finds.

    Attributes
    ----------
    coefficients : ndarray ``[d, k]``
    intercept : ndarray ``[k]``
    risk : float
        The robust risk of the excess losses there, without the penalty.
    weights : ndarray ``[n]``
        Weights of the saddle point.
    duality_gap : float
        Bound on how far risk plus penalty is above its minimum (its infimum, if there is none), to rounding.
    iterations : int
        Newton steps.
    """

    coefficients: Array
    intercept: Array
    risk: float
    weights: Array
    duality_gap: float
    iterations: int


def minimize_risk(
    features: Array,
    targets: Array,
    loss: PointLoss,
    divergence: Divergence,
    *,
    radius: float,
    reference_losses: Array | None,
    l2: float,
    fit_intercept: bool,
    base_weights: Array | None,
    tolerance: float,
    max_iterations: int,
) -> LinearFit:
    """Minimize ``sup_p <p, loss(X W + b, y) - reference> + (l2 / 2) ||W||^2`` over ``D(p || q) <= radius``.

    Parameters
    ----------
    features, targets : ndarray ``[n, d]``, ``[n, k]``
    loss : PointLoss
    divergence, radius
        As for `constrained_risk`.
    reference_losses : ndarray ``[n]`` or None
    l2 : float
        Price of the squared coefficients; the intercept has none.
    fit_intercept : bool
    base_weights : ndarray ``[n]`` or None
        q; ``1/n`` if None.
    tolerance : float
        Duality gap at which to stop, relative to the risk or the spread of the excess losses.
    max_iterations : int
        Newton steps.

    Raises
    ------
    RuntimeError
        If the gap is above the tolerance, and above 1e-6, after that many steps. Without a penalty there may be no
        minimum; the infimum is approached (losses of separable classes fall to 0), which the gap says.

    Notes
    -----
    The second derivative of the risk is that of its optimality conditions (as in ``optimum.py``): with
    ``a = (z - eta) / lambda`` and ``h = q phi*''(a) / lambda`` it is ``diag(h) - h h' / sum h - c c' / sum(h a^2)``,
    ``c = h a`` centered. Where it is only piecewise continuous (chi-square) this is a semismooth Newton method,
    safeguarded by a line search.

    Where there are kinks the risk is smoothed by a proximal term around weights that follow the worst case, and so is
    the hinge loss: the method of multipliers on the dual (Rockafellar 1976), each step a Newton method. The dual value
    rises from step to step; the strength of the smoothing is lowered where it rises too slowly.
    """
    n = len(features)
    q = np.full(n, 1 / n) if base_weights is None else base_weights
    problem = LinearProblem(features, targets, reference_losses, q, l2, fit_intercept)
    search = _Search(problem, loss, divergence, radius, base_weights, tolerance)
    if not isinstance(loss, Hinge) and not divergence.has_kinks:
        search.minimize_exactly(min(max_iterations, _SMOOTH_STEPS))
    search.minimize_smoothed(max_iterations)
    if not search.gap <= max(search.goal, _ACCEPTED * search.size):
        raise RuntimeError(
            f"no minimum found in {search.steps} steps: the duality gap is {search.gap:.3g}, losses have the size "
            f"{search.size:.3g}. Raise max_iter={max_iterations}"
            + (" or give l2 > 0: without a penalty there may be no minimum" if l2 == 0 else "")
        )
    coefficients, intercept = problem.in_given_units(search.w)
    return LinearFit(coefficients, intercept, search.risk, search.weights, max(search.gap, 0.0), search.steps)


class _Search:
    """The best predictor so far, and the highest lower bound on the minimum."""

    def __init__(
        self,
        problem: LinearProblem,
        loss: PointLoss,
        divergence: Divergence,
        radius: float,
        base: Array | None,
        tolerance: float,
    ) -> None:
        self.problem, self.loss, self.divergence, self.radius = problem, loss, divergence, radius
        self.base, self.tolerance = base, tolerance
        self.exact = ExactRisk(divergence, radius, base)
        self.steps, self.weights = 0, problem.q
        self.objective, self.bound = np.inf, -float(problem.q @ problem.reference)  # no loss is negative
        self._visit(problem.start(loss))
        self.rounding = 64 * _EPS * self.unit

    @property
    def gap(self) -> float:
        """Bound on how far the best predictor is from the minimum."""
        return self.objective - self.bound

    @property
    def goal(self) -> float:
        """The gap at which to stop."""
        return max(self.tolerance * self.size, self.rounding)

    def _visit(self, w: Array) -> None:
        """Take w if it is the best so far."""
        losses = self.loss.values(self.problem.predictions(w), self.problem.y)
        excess = losses - self.problem.reference
        risk = self.exact.at(excess).value
        penalty = float(self.problem.price @ np.square(w)) / 2
        objective = risk + penalty
        if objective < self.objective:
            self.w, self.risk, self.objective = w, risk, objective
            self.size = max(abs(risk), float(np.ptp(excess)), penalty)
            self.unit = max(self.size, float(losses.max()))  # > 0 unless the gap is 0

    def _certify(self, state: State) -> bool:
        """Return whether the lower bound has risen."""
        self._visit(state.w)
        bound = state.lower_bound(self.loss)
        risen = bound > self.bound
        if risen:
            self.bound, self.weights = bound, state.weights
        return risen

    def minimize_exactly(self, most: int) -> None:
        """Run Newton's method on the risk itself."""
        state, self.steps = newton(self.problem, self.loss, self.exact, self.w, most, _CLOSE)
        self._certify(state)

    def minimize_smoothed(self, most: int) -> None:
        """Run Newton's method on smoothed risks, whose strength is lowered as long as the gap falls too slowly."""
        level, accuracy, w, last, idle = 1.0, 1.0, self.w, np.inf, 0
        risk = smoothed_risk(self.divergence, self.radius, self.problem.q, self.base, level * self.unit)
        active = np.zeros_like(self.problem.y)
        while not self.gap <= self.goal and self.steps < most:
            loss = self.loss
            if isinstance(loss, Hinge):
                loss = SmoothedHinge(2 * level * self.unit / self.problem.outputs, active)
            close = accuracy * _INEXACT * min(level, self.gap / self.unit)
            state, taken = newton(self.problem, loss, risk, w, most - self.steps, close)
            self.steps += max(taken, 1)
            w = state.w
            risen = self._certify(state)
            if not risen and accuracy > _MOST_ACCURATE:
                accuracy *= _INEXACT
                continue
            accuracy, idle = 1.0, idle + 1 if self.gap > 0.9 * last else 0
            if idle > _IDLE and self.gap <= _ACCEPTED * self.size:
                return
            if not risen and level < _WEAK:
                level /= _LOWERED**2
            elif not self.gap <= _FALLS * last:
                level = max(_LOWERED * level, _LOWEST)
            last = self.gap
            if isinstance(risk, SmoothedRisk):
                risk = risk.recentered(state.excess, level * self.unit)
            if isinstance(loss, SmoothedHinge):
                active = loss.active(self.problem.predictions(w), self.problem.y)
