"""Newton's method for linear predictors: Hessians by differences, and lower bounds that are below every objective."""

import numpy as np
import pytest

from drrho import KL, ChiSquare, CVaR, TotalVariation
from drrho.newton import LinearProblem, State, newton
from drrho.pointwise import Hinge, Logistic, SmoothedHinge, Squared
from drrho.smoothing import ExactRisk, smoothed_risk

RNG = np.random.default_rng(0)


def problem(loss, k=1, l2=0.1, n=40, d=2):
    x = RNG.normal(size=(n, d)) * [1.0, 100.0] + 3
    if isinstance(loss, Squared):
        y = RNG.normal(size=(n, k))
    else:
        one_hot = isinstance(loss, Logistic) and k > 1
        y = np.eye(k)[RNG.integers(k, size=n)] if one_hot else RNG.choice([-1.0, 1.0], size=(n, k))
    return LinearProblem(x, y, 0.3 * np.abs(RNG.normal(size=n)), np.full(n, 1 / n), l2, True)


def smooth(loss, shape):
    return SmoothedHinge(0.5, RNG.uniform(size=shape)) if isinstance(loss, Hinge) else loss


RISKS = {
    "exact": lambda q: ExactRisk(ChiSquare(), 0.05, None),
    "ball": lambda q: smoothed_risk(KL(), 20.0, q, None, 1.0),
    "tail": lambda q: smoothed_risk(CVaR(0.3), 0.0, q, None, 1.0),
    "two tails": lambda q: smoothed_risk(TotalVariation(), 0.3, q, None, 1.0),
}
LOSSES = [(Squared(), 1), (Squared(), 2), (Logistic(), 1), (Logistic(), 3), (Hinge(), 1), (Hinge(), 3)]
every_problem = pytest.mark.parametrize("loss, k", LOSSES, ids=lambda value: getattr(value, "name", value))
every_risk = pytest.mark.parametrize("risk", RISKS.values(), ids=RISKS)


@every_problem
@every_risk
def test_gradient_and_hessian_are_derivatives(loss, k, risk):
    data = problem(loss, k)
    loss, risk = smooth(loss, data.y.shape), risk(data.q)
    w, step = 0.2 * RNG.normal(size=3 * k), 1e-7
    state = State(data, loss, risk, w)
    hessian = state.hessian()
    for column, unit in enumerate(np.eye(3 * k)):
        above, below = (State(data, loss, risk, w + sign * step * unit) for sign in (1, -1))
        assert state.gradient[column] == pytest.approx((above.objective - below.objective) / (2 * step), abs=1e-6)
        np.testing.assert_allclose(hessian[column], (above.gradient - below.gradient) / (2 * step), atol=2e-5)


def test_a_long_hessian_is_the_sum_of_its_blocks(monkeypatch):
    data = problem(Squared(), 2, n=300)
    state = State(data, Squared(), RISKS["ball"](data.q), 0.1 * RNG.normal(size=6))
    whole = state.hessian()
    monkeypatch.setattr("drrho.newton._BLOCK", 64)
    again = State(data, Squared(), RISKS["ball"](data.q), state.w)
    np.testing.assert_allclose(again.hessian(), whole, rtol=1e-12, atol=1e-12)


@every_problem
@every_risk
@pytest.mark.parametrize("l2", [0.0, 1e-3, 1.0])
def test_lower_bounds_are_below_every_weighted_objective(loss, k, risk, l2):
    data = problem(loss, k, l2)
    smoothed, risk = smooth(loss, data.y.shape), risk(data.q)
    for state in (
        State(data, smoothed, risk, 0.2 * RNG.normal(size=3 * k)),
        newton(data, smoothed, risk, data.start(loss), 30, 1e-12)[0],
    ):
        bound = state.lower_bound(loss)
        for size in (0.0, 1e-3, 0.1, 1.0, 10.0):
            w = state.w + size * RNG.normal(size=3 * k)
            losses = loss.values(data.predictions(w), data.y) - data.reference
            assert state.weights @ losses + data.price @ np.square(w) / 2 >= bound - 1e-11


@pytest.mark.parametrize("loss, k", LOSSES[:4], ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_the_lower_bound_is_tight_at_the_minimum(loss, k, l2):
    data = problem(loss, k, l2)
    state, _ = newton(data, loss, RISKS["exact"](data.q), data.start(loss), 50, 1e-12)
    assert 0 <= state.objective - state.lower_bound(loss) + 1e-13 <= 1e-10
