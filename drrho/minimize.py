"""Exact minimizers of robust risks of linear predictors: Newton's method with a duality gap, or a conic program.

For weights p of the worst case at a predictor w, ``min_w' <p, excess(w')> + penalty(w')`` bounds the optimum from
below, and w itself attains it once the weighted gradient vanishes: no second problem has to be solved for the
certificate. Where risk or loss has kinks (CVaR, total variation, a radius at which the hard maximum counts, the hinge
loss) there is no such Newton method, and `drrho.convex` solves the problem.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import expit, log_softmax, softmax

from drrho.divergences import Divergence
from drrho.risk import constrained_risk

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_CLOSE = 1e-12  # decrease promised by a Newton step, relative to the risk, from which it is the last
_AT_MAXIMUM = 5  # steps at the hard maximum, which has no curvature, after which Newton's method is given up


class Slopes(NamedTuple):
    """Losses at predictions ``f`` ``[n, k]``, with their derivatives in f.

    ``curvature`` is ``[n, k, k]``, or ``[n, k]`` where it is diagonal.
    """

    values: Array
    gradient: Array
    curvature: Array


class PointLoss(ABC):
    """A loss of predictions ``f`` ``[n, k]`` and targets ``y`` of the same shape, convex in f."""

    #: What `drrho.convex` calls it.
    name: Literal["squared", "logistic", "hinge"]

    @abstractmethod
    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""

    def slopes(self, f: Array, y: Array) -> Slopes | None:
        """Return losses with derivatives; None where there are kinks."""
        return None


class Squared(PointLoss):
    """``sum_k (y_k - f_k)^2``."""

    name = "squared"

    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""
        return np.square(y - f).sum(1)

    def slopes(self, f: Array, y: Array) -> Slopes:
        """Return losses with derivatives."""
        return Slopes(self.values(f, y), 2 * (f - y), np.full_like(f, 2.0))


class Logistic(PointLoss):
    """``log(1 + exp(-y f))`` of labels -1 and 1 (k = 1), or the cross-entropy of softmax(f) with one-hot y."""

    name = "logistic"

    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""
        return np.logaddexp(0, -y * f)[:, 0] if f.shape[1] == 1 else -(log_softmax(f, axis=1) * y).sum(1)

    def slopes(self, f: Array, y: Array) -> Slopes:
        """Return losses with derivatives."""
        values = self.values(f, y)
        if f.shape[1] == 1:
            wrong = expit(-y * f)
            return Slopes(values, -y * wrong, wrong * (1 - wrong))
        chance = softmax(f, axis=1)
        curvature = np.eye(f.shape[1]) * chance[:, None, :] - chance[:, :, None] * chance[:, None, :]
        return Slopes(values, chance - y, curvature)


class Hinge(PointLoss):
    """``sum_k max(0, 1 - y_k f_k)`` of labels -1 and 1."""

    name = "hinge"

    def values(self, f: Array, y: Array) -> Array:
        """Return the losses ``[n]``."""
        return np.maximum(0, 1 - y * f).sum(1)


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
    problem = _Problem(features, targets, loss, divergence, radius, reference_losses, l2, fit_intercept, base_weights)
    steps = 0
    if problem.smooth:
        state, steps = problem.newton(max_iterations)
        gap = state.gap()
        if gap <= tolerance * state.size:
            coefficients, intercept = problem.in_given_units(state.w)
            return LinearFit(coefficients, intercept, state.risk, state.weights, max(gap, 0.0), steps)
    from drrho.convex import minimize_linear  # an optional dependency

    found = minimize_linear(
        features,
        targets if targets.shape[1] > 1 else targets[:, 0],
        divergence,
        loss=loss.name,
        radius=radius if divergence.has_radius else None,
        reference_losses=reference_losses,
        l2=l2,
        fit_intercept=fit_intercept,
        base_weights=base_weights,
    )
    coefficients, intercept = found.coefficients.reshape(-1, problem.outputs), np.atleast_1d(found.intercept)
    excess = loss.values(features @ coefficients + intercept, targets) - problem.reference
    risk = float(constrained_risk(excess, divergence, radius, base_weights=base_weights).value)
    return LinearFit(coefficients, intercept, risk, found.weights, math.nan, steps)


class _Problem:
    """The problem in columns that are centered (where there is an intercept to take it up) and scaled."""

    def __init__(
        self,
        features: Array,
        targets: Array,
        loss: PointLoss,
        divergence: Divergence,
        radius: float,
        reference_losses: Array | None,
        l2: float,
        fit_intercept: bool,
        base: Array | None,
    ) -> None:
        n, d = features.shape
        self.y, self.loss, self.divergence, self.radius, self.base = targets, loss, divergence, radius, base
        self.reference = np.zeros(n) if reference_losses is None else reference_losses
        q = np.full(n, 1 / n) if base is None else base
        self.center = q @ features if fit_intercept else np.zeros(d)
        x = features - self.center
        self.scale = np.sqrt(q @ np.square(x))
        idle = self.scale <= 1e-12 * np.abs(features).max(axis=0, initial=0)
        x[:, idle], self.scale[idle] = 0.0, 1.0
        self.x = np.column_stack([x / self.scale, np.ones(n)]) if fit_intercept else x / self.scale
        self.fit_intercept, self.outputs = fit_intercept, targets.shape[1]
        price = l2 / np.square(self.scale)
        self.price = np.repeat(np.append(price, 0.0) if fit_intercept else price, self.outputs)
        self.q = q
        #: Whether Newton's method may be tried.
        self.smooth = type(loss).slopes is not PointLoss.slopes and (not divergence.has_kinks)

    def start(self) -> Array:
        w = np.zeros((self.x.shape[1], self.outputs))
        if self.fit_intercept and isinstance(self.loss, Squared):
            w[-1] = self.q @ self.y
        return w.reshape(-1)

    def in_given_units(self, w: Array) -> tuple[Array, Array]:
        w = w.reshape(-1, self.outputs)
        coefficients = w[: len(self.scale)] / self.scale[:, None]
        shift = w[-1] if self.fit_intercept else np.zeros(self.outputs)
        return coefficients, shift - self.center @ coefficients

    def newton(self, most: int) -> tuple[_State, int]:
        """Minimize; return where it ended, and the number of steps."""
        state = _State(self, self.start())
        damping, stuck = 0.0, 0
        for step in range(most):
            stuck += state.h is None and self.radius > 0
            if stuck > _AT_MAXIMUM:
                return state, step
            gradient, hessian = state.gradient(), state.hessian()
            trace = max(float(np.trace(hessian)), _EPS) / len(state.w)
            while True:
                try:
                    factor = cho_factor(hessian + (damping + 16 * _EPS) * trace * np.eye(len(state.w)))
                    move = -cho_solve(factor, gradient)
                except LinAlgError:
                    damping = max(10 * damping, 1e-10)
                    continue
                break
            decrease = -float(gradient @ move)
            if decrease <= _CLOSE * state.size:
                # Objectives no longer tell two points apart here, while a Newton step still squares the error.
                moved = _State(self, state.w + move)
                return (moved, step + 1) if moved.gap() <= state.gap() else (state, step)
            length, moved = 1.0, None
            while length > 1e-3:
                candidate = _State(self, state.w + length * move)
                if candidate.objective <= state.objective - 1e-4 * length * decrease:
                    moved = candidate
                    break
                length /= 2
            if moved is None:
                if damping > 1e6 or decrease <= 64 * _EPS * (abs(state.objective) + state.size):
                    return state, step
                damping = max(100 * damping, 1e-8)
                continue
            state = moved
            damping = damping / 10 if length == 1.0 and damping > 1e-12 else (damping if damping > 1e-12 else 0.0)
        return state, most


class _State:
    """Losses, worst case and derivatives at one w."""

    def __init__(self, problem: _Problem, w: Array) -> None:
        self.problem, self.w = problem, w
        slopes = problem.loss.slopes(problem.x @ w.reshape(-1, problem.outputs), problem.y)
        assert slopes is not None
        self.slopes = slopes
        excess = torch.from_numpy(slopes.values - problem.reference)
        worst = constrained_risk(excess, problem.divergence, problem.radius, base_weights=problem.base)
        self.risk, self.weights = float(worst.value), worst.weights.numpy()
        self.primal = float(self.weights @ excess.numpy())
        self.objective = self.risk + float(problem.price @ np.square(w)) / 2
        self.size = max(abs(self.risk), float(excess.max() - excess.min()))
        strength = float(worst.strength)
        self.h = self.a = None
        if 0 < strength < math.inf:  # neither the maximum nor the mean
            a = (excess - worst.threshold) / strength
            if problem.base is not None:  # a sample without base weight may lie outside the domain of phi*
                a = torch.where(torch.from_numpy(problem.q) > 0, a, 0.0)
            self.h, self.a = problem.q * problem.divergence.curvature(a).numpy() / strength, a.numpy()

    def gradient(self) -> Array:
        """Of the risk and the penalty."""
        weighted = self.weights[:, None] * self.slopes.gradient
        return (self.problem.x.T @ weighted).reshape(-1) + self.problem.price * self.w

    def hessian(self) -> Array:
        """Of the risk and the penalty: curvature of the losses under the weights, and answer of the weights."""
        hessian = self._weighted_curvature()
        if self.h is None or self.a is None or (mass := self.h.sum()) <= 0:
            return hessian
        x = self.problem.x
        jacobian = (x[:, :, None] * self.slopes.gradient[:, None, :]).reshape(len(x), -1)
        jacobian -= (self.h @ jacobian) / mass
        deviation = self.a - (self.h @ self.a) / mass
        hessian += jacobian.T @ (self.h[:, None] * jacobian)
        stiffness = self.h @ np.square(deviation)
        if stiffness > 0:
            along = (self.h * deviation) @ jacobian
            hessian -= np.outer(along, along) / stiffness
        return hessian

    def _weighted_curvature(self) -> Array:
        x, outputs, curvature = self.problem.x, self.problem.outputs, self.slopes.curvature
        weighted = self.weights.reshape(-1, *[1] * (curvature.ndim - 1)) * curvature
        hessian = np.zeros((x.shape[1], outputs, x.shape[1], outputs))
        for k in range(outputs):
            if weighted.ndim == 2:
                hessian[:, k, :, k] = x.T @ (weighted[:, k, None] * x)
                continue
            for j in range(k + 1):
                hessian[:, k, :, j] = hessian[:, j, :, k] = x.T @ (weighted[:, k, j, None] * x)
        return hessian.reshape(len(self.w), -1) + np.diag(self.problem.price)

    def gap(self) -> float:
        """Risk and penalty less a lower bound on their minimum: how far below w the weighted problem may still go."""
        gradient, price = self.gradient(), self.problem.price
        if price.all():
            below = float((np.square(gradient) / price).sum()) / 2
        else:
            below = float(gradient @ np.linalg.lstsq(self._weighted_curvature(), gradient, rcond=1e-13)[0]) / 2
        return self.risk - self.primal + below
