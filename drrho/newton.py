"""Newton's method for the risk of a linear predictor, with a lower bound on the minimum."""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from drrho.pointwise import Array, PointLoss, Slopes, Squared
from drrho.smoothing import InnerMaximum

_EPS = float(np.finfo(np.float64).eps)
_AT_MAXIMUM = 5  # steps at the hard maximum, which has no curvature, after which Newton's method is given up
_BALANCED = 1e-11  # of a sum of slopes, relative to its terms: what a change of the weights in that digit makes zero
_REPAIRS = 8  # Newton steps of the weighted problem, towards slopes at which its dual is finite


class LinearProblem:
    """Features in columns that are centered (where there is an intercept to take it up) and scaled, and the penalty."""

    def __init__(
        self,
        features: Array,
        targets: Array,
        reference_losses: Array | None,
        q: Array,
        l2: float,
        fit_intercept: bool,
    ) -> None:
        n, d = features.shape
        self.y, self.q = targets, q
        self.reference = np.zeros(n) if reference_losses is None else reference_losses
        self.center = q @ features if fit_intercept else np.zeros(d)
        x = features - self.center
        self.scale = np.sqrt(q @ np.square(x))
        idle = self.scale <= 1e-12 * np.abs(features).max(axis=0, initial=0)
        x[:, idle], self.scale[idle] = 0.0, 1.0
        self.x = np.column_stack([x / self.scale, np.ones(n)]) if fit_intercept else x / self.scale
        self.fit_intercept, self.outputs = fit_intercept, targets.shape[1]
        price = l2 / np.square(self.scale)
        self.price = np.repeat(np.append(price, 0.0) if fit_intercept else price, self.outputs)

    def start(self, loss: PointLoss) -> Array:
        """Return the w of no features."""
        w = np.zeros((self.x.shape[1], self.outputs))
        if self.fit_intercept and isinstance(loss, Squared):
            w[-1] = self.q @ self.y
        return w.reshape(-1)

    def predictions(self, w: Array) -> Array:
        """Return predictions ``[n, k]``."""
        return self.x @ w.reshape(-1, self.outputs)

    def in_given_units(self, w: Array) -> tuple[Array, Array]:
        """Return coefficients ``[d, k]`` and intercept ``[k]``."""
        w = w.reshape(-1, self.outputs)
        coefficients = w[: len(self.scale)] / self.scale[:, None]
        shift = w[-1] if self.fit_intercept else np.zeros(self.outputs)
        return coefficients, shift - self.center @ coefficients

    def gradient(self, weighted_slopes: Array) -> Array:
        """Return the gradient in w of ``sum_i <slopes_i, f_i>``."""
        return (self.x.T @ weighted_slopes).reshape(-1)

    def gradient_size(self, weighted_slopes: Array, chosen: np.ndarray) -> Array:
        """Return the sum of the sizes of the terms of which those entries of that gradient are the sum."""
        chosen = chosen.reshape(-1, self.outputs)
        columns = chosen.any(1)
        sizes = np.zeros(chosen.shape)
        sizes[columns] = np.abs(self.x[:, columns]).T @ np.abs(weighted_slopes)
        return sizes[chosen]


class State:
    """Losses, worst case and derivatives at one w."""

    def __init__(self, problem: LinearProblem, loss: PointLoss, risk: InnerMaximum, w: Array) -> None:
        self.problem, self.loss, self.inner, self.w = problem, loss, risk, w
        slopes = loss.slopes(problem.predictions(w), problem.y)
        assert slopes is not None
        self.slopes = slopes
        self.excess = slopes.values - problem.reference
        self.worst = risk.at(self.excess)
        self.risk, self.weights = self.worst.value, self.worst.weights
        self.objective = self.risk + float(problem.price @ np.square(w)) / 2
        self.size = max(abs(self.risk), float(self.excess.max() - self.excess.min()))

    def gradient(self) -> Array:
        """Of the risk and the penalty."""
        weighted = self.weights[:, None] * self.slopes.gradient
        return self.problem.gradient(weighted) + self.problem.price * self.w

    def hessian(self) -> Array:
        """Of the risk and the penalty: curvature of the losses under the weights, and answer of the weights."""
        hessian = _weighted_curvature(self.problem, self.weights, self.slopes) + np.diag(self.problem.price)
        for h, a in self.worst.responses:
            mass = h.sum()
            if mass <= 0:
                continue
            x, gradient = self.problem.x, self.slopes.gradient
            if np.count_nonzero(h) < len(h) / 2:
                rows = np.flatnonzero(h)
                x, gradient, h, a = x[rows], gradient[rows], h[rows], None if a is None else a[rows]
            jacobian = (x[:, :, None] * gradient[:, None, :]).reshape(len(x), -1)
            jacobian -= (h @ jacobian) / mass
            hessian += jacobian.T @ (h[:, None] * jacobian)
            if a is None:
                continue
            deviation = a - (h @ a) / mass
            stiffness = h @ np.square(deviation)
            if stiffness > 0:
                along = (h * deviation) @ jacobian
                hessian -= np.outer(along, along) / stiffness
        return hessian

    def gap(self) -> float:
        """Risk and penalty less their minimum, by the local quadratic model of the weighted problem."""
        gradient, price = self.gradient(), self.problem.price
        if price.all():
            below = float((np.square(gradient) / price).sum()) / 2
        else:
            curvature = _weighted_curvature(self.problem, self.weights, self.slopes) + np.diag(price)
            below = float(gradient @ np.linalg.lstsq(curvature, gradient, rcond=1e-13)[0]) / 2
        return self.risk - self.worst.attained + below

    def lower_bound(self, loss: PointLoss) -> float:
        """Return a lower bound, to rounding, on the minimum of ``<p, losses> + penalty`` for these weights p.

        By Fenchel duality ``min_w <p, loss(X w) - reference> + <price, w^2> / 2`` is at least ``-<p, conjugate(s)> -
        <p, reference> - <1 / price, g^2> / 2``, ``g = X' (p s)``, for any slopes s, provided that g is 0 where the
        price is. Slopes at w fail this by the gradient there; Newton steps of the weighted problem change them so that
        it holds. Zero slopes are tried as well: no loss is negative.
        """
        problem, p = self.problem, self.weights
        best = offset = -float(p @ problem.reference)
        w, slopes = self.w, self.slopes
        for repair in range(_REPAIRS):
            curvature = _weighted_curvature(problem, p, slopes)
            free = problem.price <= 1e-12 * np.diagonal(curvature)
            s = loss.allowed(slopes.gradient, problem.y)
            gradient = problem.gradient(p[:, None] * s)
            if (np.abs(gradient[free]) <= _BALANCED * problem.gradient_size(p[:, None] * s, free)).all():
                penalty = float((np.square(gradient[~free]) / problem.price[~free]).sum()) / 2
                bound = offset - float(p @ loss.conjugate(s, problem.y)) - penalty
                if bound <= best + 1e-3 * abs(self.objective - best):
                    return max(best, bound)
                best = bound
            price = np.where(free, 0.0, problem.price)
            w = w - np.linalg.lstsq(curvature + np.diag(price), gradient + price * w, rcond=1e-13)[0]
            slopes = self.loss.slopes(problem.predictions(w), problem.y)
            assert slopes is not None
        return best


def _weighted_curvature(problem: LinearProblem, weights: Array, slopes: Slopes) -> Array:
    """Of the losses under the weights, ``[d k, d k]``."""
    x, outputs, curvature = problem.x, problem.outputs, slopes.curvature
    weighted = weights.reshape(-1, *[1] * (curvature.ndim - 1)) * curvature
    rows = np.flatnonzero(weighted.reshape(len(x), -1).any(1))
    if len(rows) < len(x) / 2:
        x, weighted = x[rows], weighted[rows]
    hessian = np.zeros((x.shape[1], outputs, x.shape[1], outputs))
    for k in range(outputs):
        if weighted.ndim == 2:
            hessian[:, k, :, k] = x.T @ (weighted[:, k, None] * x)
            continue
        for j in range(k + 1):
            hessian[:, k, :, j] = hessian[:, j, :, k] = x.T @ (weighted[:, k, j, None] * x)
    size = x.shape[1] * outputs
    return hessian.reshape(size, size)


def newton(
    problem: LinearProblem, loss: PointLoss, risk: InnerMaximum, w: Array, most: int, close: float, exact: bool
) -> tuple[State, int]:
    """Minimize from w; return where it ended, and the number of steps.

    It ends when a step promises to lower the objective by less than ``close``, relative to the size of the losses. An
    exact risk may have no curvature at its hard maximum, at which it is given up.
    """
    state = State(problem, loss, risk, w)
    damping, stuck, polished = 0.0, 0, 0
    for step in range(most):
        stuck += exact and not state.worst.responses
        if stuck > _AT_MAXIMUM:
            return state, step
        gradient, hessian = state.gradient(), state.hessian()
        trace = max(float(np.trace(hessian)), _EPS if exact else 1e-3 * state.size) / len(state.w)
        while True:
            try:
                factor = cho_factor(hessian + (damping + 16 * _EPS) * trace * np.eye(len(state.w)))
                move = -cho_solve(factor, gradient)
            except LinAlgError:
                damping = max(10 * damping, 1e-10)
                continue
            break
        decrease = -float(gradient @ move)
        if DBG: print(f'   {step} dec {decrease:.2e} close {close*state.size:.2e} damp {damping:.1e} obj {state.objective:.12g} |g| {abs(gradient).max():.2e} inner {(state.slopes.curvature!=0).sum()} pol {polished}')
        if decrease <= close * state.size:
            # Objectives no longer tell two points apart here, while a Newton step still squares the error.
            moved = State(problem, loss, risk, state.w + move)
            if exact:
                return (moved, step + 1) if moved.gap() <= state.gap() else (state, step)
            left = moved.gradient()
            remaining = float(left @ cho_solve(factor, left))
            if not remaining < decrease:
                return state, step
            state = moved
            polished += 1
            if polished >= POLISH and remaining > 1e-2 * decrease or remaining <= 1e-20*state.size: return state, step + 1
            continue
        length, moved = 1.0, None
        while length > 1e-3:
            candidate = State(problem, loss, risk, state.w + length * move)
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


POLISH = 2
DBG=0
