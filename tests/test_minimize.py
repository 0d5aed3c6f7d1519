"""Exact minimizers of linear predictors: derivatives of the losses, and optimality of the Newton method's answer."""

import numpy as np
import pytest
from scipy.optimize import minimize

from drrho import KL, ChiSquare, CressieRead, constrained_risk
from drrho.minimize import minimize_risk
from drrho.pointwise import Hinge, Logistic, Squared

RNG = np.random.default_rng(0)


def targets(loss, n, k):
    if isinstance(loss, Squared):
        return RNG.normal(size=(n, k))
    return RNG.choice([-1.0, 1.0], size=(n, 1)) if k == 1 else np.eye(k)[RNG.integers(k, size=n)]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("loss", [Squared(), Logistic()], ids=lambda loss: loss.name)
def test_slopes_are_derivatives_of_the_values(loss, k):
    f, y, h = RNG.normal(size=(7, k)), targets(loss, 7, k), 1e-5
    slopes = loss.slopes(f, y)
    np.testing.assert_array_equal(slopes.values, loss.values(f, y))
    curvature = slopes.curvature if slopes.curvature.ndim == 3 else slopes.curvature[:, :, None] * np.eye(k)
    for column in range(k):
        step = h * np.eye(k)[column]
        above, below = loss.slopes(f + step, y), loss.slopes(f - step, y)
        np.testing.assert_allclose(slopes.gradient[:, column], (above.values - below.values) / (2 * h), atol=1e-9)
        np.testing.assert_allclose(curvature[:, column], (above.gradient - below.gradient) / (2 * h), atol=1e-9)


def test_the_hinge_loss_has_kinks():
    f = np.array([[2.0], [0.5], [-1.0]])
    assert Hinge().values(f, np.ones((3, 1))).tolist() == [0.0, 0.5, 2.0]
    assert Hinge().slopes(f, np.ones((3, 1))) is None


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CressieRead(0.5)], ids=["kl", "chi2", "hellinger"])
@pytest.mark.parametrize("loss", [Squared(), Logistic()], ids=lambda loss: loss.name)
def test_the_minimum_is_that_of_another_optimizer(loss, divergence):
    x, y, l2, radius = RNG.normal(size=(40, 2)), targets(loss, 40, 1), 0.1, 0.05
    reference = 0.3 * np.abs(RNG.normal(size=40))
    fit = minimize_risk(
        x,
        y,
        loss,
        divergence,
        radius=radius,
        reference_losses=reference,
        l2=l2,
        fit_intercept=True,
        base_weights=None,
        tolerance=1e-9,
        max_iterations=50,
    )

    def objective(w):
        losses = loss.values((x @ w[:2] + w[2])[:, None], y) - reference
        return constrained_risk(losses, divergence, radius).value.item() + l2 / 2 * w[:2] @ w[:2]

    found = np.array([*fit.coefficients[:, 0], fit.intercept[0]])
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    best = minimize(objective, np.zeros(3), method="Nelder-Mead", options=options)
    assert objective(found) <= best.fun + 1e-12
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    assert fit.risk == pytest.approx(objective(found) - l2 / 2 * found[:2] @ found[:2], rel=1e-12)
    assert 0 <= fit.duality_gap <= 1e-8 and fit.iterations >= 1
    assert fit.weights.sum() == pytest.approx(1.0) and fit.weights.min() >= 0
