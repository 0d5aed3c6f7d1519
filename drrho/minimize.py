"""Exact minimizers of robust risks of linear predictors, by Newton's method and with a duality gap.

Where the risk is smooth, Newton's method minimizes it. Where risk or loss has kinks (CVaR, total variation, the hinge
loss, a radius at which the hard maximum counts), it minimizes smoothed risks (``smoothing.py``), whose strength falls and
whose center follows the worst case. Either way the answer is certified: weights p of the inner maximum and slopes of the
losses give a lower bound on the minimum by Fenchel duality (`drrho.newton.State.lower_bound`).
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
        Bound on how far risk plus penalty is above its minimum; NaN where a conic program was solved, whose solver
        stops at a gap of its own (about 1e-8). With ``l2 = 0`` the part that an imperfect stationarity makes is that
        of the local quadratic model (exact for the squared loss).
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

    Raises
    ------
    RuntimeError
        If neither Newton's method nor the conic solver gets there.
    ImportError
        Where cvxpy is needed and missing.

    Notes
    -----
    The second derivative of the risk is that of its optimality conditions (as in ``optimum.py``): with
    ``a = (z - eta) / lambda`` and ``h = q phi*''(a) / lambda`` it is ``diag(h) - h h' / sum h - c c' / sum(h a^2)``,
    ``c = h a`` centered. Where it is only piecewise continuous (chi-square) this is a semismooth Newton method,
    safeguarded by a line search.
    """
    n = len(features)
    q = np.full(n, 1 / n) if base_weights is None else base_weights
    problem = LinearProblem(features, targets, reference_losses, q, l2, fit_intercept)
    search = _Search(problem, loss, divergence, radius, base_weights, tolerance)
    steps = 0
    if not isinstance(loss, Hinge) and not divergence.has_kinks:
        state, steps = newton(
            problem, loss, search.risk, search.w, min(max_iterations, _SMOOTH_STEPS), _CLOSE, exact=radius > 0
        )
        search.certify(state)
    steps = search.smoothed(steps, max_iterations)
    if not search.done:
        raise RuntimeError(search.failure(steps, max_iterations))
    coefficients, intercept = problem.in_given_units(search.w)
    return LinearFit(coefficients, intercept, search.value, search.weights, max(search.gap, 0.0), steps)


class _Search:
    """The best predictor so far, and the highest lower bound."""

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
        self.risk = ExactRisk(divergence, radius, base)
        self.w = problem.start(loss)
        self.bound, self.objective, self.weights = -np.inf, np.inf, problem.q
        value, spread = self._evaluate(self.w)
        self.rounding = 64 * _EPS * max(abs(value), spread)

    def _evaluate(self, w: Array):
        excess = self.loss.values(self.problem.predictions(w), self.problem.y) - self.problem.reference
        value = self.risk.at(excess).value
        return value, float(np.ptp(excess))

    def certify(self, state: State) -> None:
        """Take the predictor and the lower bound of a state where they are better."""
        value, spread = self._evaluate(state.w)
        objective = value + float(self.problem.price @ np.square(state.w)) / 2
        if objective < self.objective:
            self.w, self.value, self.objective, self.size = state.w, value, objective, max(abs(value), spread)
        bound = state.lower_bound(self.loss)
        if bound > self.bound:
            self.bound, self.weights = bound, state.weights

    @property
    def gap(self) -> float:
        return self.objective - self.bound

    @property
    def done(self) -> bool:
        return self.gap <= max(self.tolerance * self.size, self.rounding)

    def failure(self, steps, most) -> str:
        return f"no minimum: gap {self.gap} size {self.size}"

    def smoothed(self, steps: int, most: int) -> int:
        import time
        problem = self.problem
        w = self.w
        value, spread = self._evaluate(w)
        self.size = max(abs(value), spread)
        level = START
        risk = smoothed_risk(self.divergence, self.radius, problem.q, self.base, level * self.size)
        active, last = np.zeros_like(problem.y), np.inf
        while not (self.bound > -np.inf and self.done) and steps < most:
            loss = self.loss
            if isinstance(loss, Hinge):
                loss = SmoothedHinge(2 * level * self.size / problem.outputs, active)
            t = time.perf_counter()
            state, taken = newton(problem, loss, risk, w, most - steps, CLOSE * min(level, (self.gap / self.size) if np.isfinite(self.gap) else 1.0), exact=False)
            t2 = time.perf_counter()
            steps += taken
            self.certify(state)
            w = state.w
            if VERBOSE: print(f"  level {level:.1e} steps {taken} gap {self.gap / self.size:.2e} size {self.size:.2e} newton {t2-t:.2f}s certify {time.perf_counter()-t2:.2f}s")
            if not self.gap <= KEEP * last: level = max(level * FACTOR, FLOOR)
            last = self.gap
            if isinstance(risk, SmoothedRisk):
                risk = risk.recentered(state.excess, level * self.size)
            if isinstance(loss, SmoothedHinge):
                active = loss.active(problem.predictions(w), problem.y)
        return steps
START, FACTOR, CLOSE, KEEP, FLOOR, VERBOSE = 1.0, 0.3, 1e-2, 0.5, 1e-7, False
