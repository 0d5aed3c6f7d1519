"""Newton's method for the risk of a linear predictor, with a lower bound on the minimum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from drrho.pointwise import Array, PointLoss, Slopes, SmoothedHinge, Squared
from drrho.smoothing import ExactRisk, InnerMaximum, Response

_EPS = float(np.finfo(np.float64).eps)
_AT_MAXIMUM = 5  # steps at the hard maximum, which has no curvature, after which Newton's method is given up
_BALANCED = 1e-11  # of a sum of slopes, relative to its terms: what a change of the weights in that digit makes zero
_SQUARED = 0.01  # a Newton step that leaves more of the promised decrease has not squared the error
_BLOCK = 2048  # rows
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
        """Return the sum of the sizes of the terms of which those entries of that gradient are the sum.

        Over outputs the largest counts, because slopes in one may be moved to another.
        """
        chosen = chosen.reshape(-1, self.outputs)
        columns = chosen.any(1)
        sizes = np.zeros(chosen.shape)
        sizes[columns] = (np.abs(self.x[:, columns]).T @ np.abs(weighted_slopes)).max(axis=1, keepdims=True)
        return sizes[chosen]


class State:
    """Losses, worst case and derivatives at one w."""

    def __init__(self, problem: LinearProblem, loss: PointLoss, risk: InnerMaximum, w: Array) -> None:
        self.problem, self.loss, self.w = problem, loss, w
        self.slopes = _slopes(problem, loss, w)
        self.excess = self.slopes.values - problem.reference
        self.worst = risk.at(self.excess)
        self.weights = self.worst.weights
        self.objective = self.worst.value + float(problem.price @ np.square(w)) / 2
        self.size = max(abs(self.worst.value), float(self.excess.max() - self.excess.min()))

    @cached_property
    def gradient(self) -> Array:
        """Of the risk and the penalty."""
        weighted = self.weights[:, None] * self.slopes.gradient
        return self.problem.gradient(weighted) + self.problem.price * self.w

    @cached_property
    def curvature(self) -> Array:
        """Of the losses under the weights, ``[d k, d k]``."""
        return _weighted_curvature(self.problem, self.weights, self.slopes)

    def hessian(self) -> Array:
        """Of the risk and the penalty: curvature of the losses under the weights, and answer of the weights."""
        hessian = self.curvature + np.diag(self.problem.price)
        for response in self.worst.responses:
            hessian += self._answer(response)
        return hessian

    def _answer(self, response: Response) -> Array:
        h, a = response
        outputs, answer = self.problem.outputs, np.zeros((len(self.w), len(self.w)))
        mass = h.sum()
        if mass <= 0:
            return answer
        mean = self.problem.gradient(h[:, None] * self.slopes.gradient) / mass
        along, deviation = np.zeros(len(self.w)), None if a is None else a - (h @ a) / mass
        for rows in _blocks(h > 0):
            x, gradient = self.problem.x[rows], self.slopes.gradient[rows]
            jacobian = (x[:, :, None] * gradient[:, None, :]).reshape(len(x), -1) if outputs > 1 else x * gradient
            root = np.sqrt(h[rows])
            jacobian -= mean
            jacobian *= root[:, None]
            answer += jacobian.T @ jacobian
            if deviation is not None:
                along += (root * deviation[rows]) @ jacobian
        if deviation is not None:
            stiffness = h @ np.square(deviation)
            if stiffness > 0:
                answer -= np.outer(along, along) / stiffness
        return answer

    def gap(self) -> float:
        """Risk and penalty less their minimum, by the local quadratic model of the weighted problem."""
        gradient, price = self.gradient, self.problem.price
        if price.all():
            below = float((np.square(gradient) / price).sum()) / 2
        else:
            curvature = self.curvature + np.diag(price)
            below = float(gradient @ np.linalg.lstsq(curvature, gradient, rcond=1e-13)[0]) / 2
        return self.worst.value - self.worst.attained + below

    def lower_bound(self, loss: PointLoss) -> float:
        """Return a lower bound on the minimum over w of ``<p, losses> + penalty`` for the weights p of this state.

        By Fenchel duality ``min_w <p, loss(X w) - reference> + <price, w^2> / 2`` is at least ``-<p, conjugate(s)> -
        <p, reference> - <1 / price, g^2> / 2`` with ``g = X' (p s)``, for any slopes s for which g is 0 where the price
        is (up to 1e-11 of its terms: weights that differ by as much make it so). Newton steps of this weighted problem
        (in the state's loss, which may be a smoothed one) lead to such slopes. That no loss is negative is a bound too.
        """
        problem, p = self.problem, self.weights
        best = offset = -float(p @ problem.reference)
        w, slopes, curvature = self.w, self.slopes, self.curvature
        for _ in range(_REPAIRS):
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
            slopes = _slopes(problem, self.loss, w)
            curvature = _weighted_curvature(problem, p, slopes)
        return best


def _slopes(problem: LinearProblem, loss: PointLoss, w: Array) -> Slopes:
    slopes = loss.slopes(problem.predictions(w), problem.y)
    assert slopes is not None
    return slopes


def _blocks(chosen: np.ndarray) -> Iterator[slice | np.ndarray]:
    """Return the chosen rows in parts that stay in the cache; all rows, if half of them are chosen."""
    count = np.count_nonzero(chosen)
    if count < len(chosen) / 2:
        rows = np.flatnonzero(chosen)
        yield from (rows[first : first + _BLOCK] for first in range(0, count, _BLOCK))
    else:
        yield from (slice(first, first + _BLOCK) for first in range(0, len(chosen), _BLOCK))


def _weighted_curvature(problem: LinearProblem, weights: Array, slopes: Slopes) -> Array:
    outputs, curvature = problem.outputs, slopes.curvature
    weighted = weights.reshape(-1, *[1] * (curvature.ndim - 1)) * curvature
    width = problem.x.shape[1]
    total = np.zeros((width, outputs, width, outputs))
    for rows in _blocks(np.asarray(weighted.reshape(len(weighted), -1).any(1))):
        x, here = problem.x[rows], weighted[rows]
        for k in range(outputs):
            if here.ndim == 2:
                weighted_x = np.sqrt(here[:, k, None]) * x
                total[:, k, :, k] += weighted_x.T @ weighted_x
                continue
            for j in range(k + 1):
                part = x.T @ (here[:, k, j, None] * x)
                total[:, k, :, j] += part
                if j < k:
                    total[:, j, :, k] += part
    return total.reshape(width * outputs, -1)


def newton(
    problem: LinearProblem, loss: PointLoss, risk: InnerMaximum, w: Array, most: int, close: float
) -> tuple[State, int]:
    """Minimize from w; return where it ended, and the number of steps.

    It ends with a step that promises to lower the objective by less than ``close``, relative to the size of the losses;
    a smoothed risk is piecewise smooth, and steps follow as long as each of them still squares the error. An exact risk
    has no curvature at its hard maximum, at which it is given up.
    """
    exact = isinstance(risk, ExactRisk) and not isinstance(loss, SmoothedHinge)
    state = State(problem, loss, risk, w)
    damping, stuck = 0.0, 0
    for step in range(most):
        stuck += exact and risk.has_maximum and not state.worst.responses
        if stuck > _AT_MAXIMUM:
            return state, step
        gradient, hessian = state.gradient, state.hessian()
        unit = max(float(np.trace(hessian)), _EPS, 0.0 if exact else 1e-3 * state.size) / len(state.w)
        factor, damping = _factor(hessian, unit, damping)
        move = -cho_solve(factor, gradient)
        decrease = -float(gradient @ move)
        if decrease <= close * state.size:
            # Objectives no longer tell two points apart here, while a Newton step still squares the error.
            moved = State(problem, loss, risk, state.w + move)
            if exact:
                return (moved, step + 1) if moved.gap() <= state.gap() else (state, step)
            remaining = float(moved.gradient @ cho_solve(factor, moved.gradient))
            if remaining >= decrease:
                return state, step
            state = moved
            if remaining > _SQUARED * decrease or remaining <= _EPS**2 * state.size:
                return state, step + 1
            continue
        moved, length = _line_search(problem, loss, risk, state, move, decrease)
        if moved is None:
            if damping > 1e6 or decrease <= 64 * _EPS * (abs(state.objective) + state.size):
                return state, step
            damping = max(100 * damping, 1e-8)
            continue
        state = moved
        damping = damping / 10 if length == 1.0 and damping > 1e-12 else (damping if damping > 1e-12 else 0.0)
    return state, most


def _factor(hessian: Array, unit: float, damping: float) -> tuple[tuple[Array, bool], float]:
    """Return a Cholesky factor, and the damping, in the unit, that it took."""
    while True:
        try:
            return cho_factor(hessian + (damping + 16 * _EPS) * unit * np.eye(len(hessian))), damping
        except LinAlgError:
            damping = max(10 * damping, 1e-10)


def _line_search(
    problem: LinearProblem, loss: PointLoss, risk: InnerMaximum, state: State, move: Array, decrease: float
) -> tuple[State | None, float]:
    """Return the state after as much of the move as lowers the objective (None: none does), and how much that is."""
    length = 1.0
    while length > 1e-3:
        moved = State(problem, loss, risk, state.w + length * move)
        if moved.objective <= state.objective - 1e-4 * length * decrease:
            return moved, length
        length /= 2
    return None, length
