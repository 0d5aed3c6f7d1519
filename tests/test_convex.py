"""Conic programs against closed forms, against the exact risks, and against the optimality conditions."""

import importlib
import math
import re
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from families import LeCam, thorough
from programs import ALL, SOLVER, WITH_RADIUS, base_weights, name
from scipy.optimize import brentq, minimize
from scipy.special import expit

from drrho import (
    KL,
    CappedKL,
    ChiSquare,
    CressieRead,
    CVaR,
    TotalVariation,
    constrained_risk,
    convex,
    drrho_risk,
    hybrid_risk,
    penalized_risk,
)
from drrho.convex import minimize_linear, robust_risk

WEIGHTS = 1e-4  # the maximum over weights is flat: an error of the value counts with its root
QUICK = [KL(), CVaR(0.23), CressieRead(0.5)]


def rows(n, count, seed=0):
    rng = np.random.default_rng(seed)
    laws = [rng.normal, rng.exponential, lambda size: rng.standard_t(2, size=size)]
    return [laws[i % 3](size=n) for i in range(count)]


# One row -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.05, 0.7])
@pytest.mark.parametrize("radius", [1e-4, 0.02, 0.4, 5.0])
@pytest.mark.parametrize("divergence", thorough(WITH_RADIUS, QUICK), ids=name)
def test_two_losses_have_a_closed_form(divergence, radius, mean):
    """Of losses 0 and 1, the risk is the largest x with mean phi(x / mean) + (1 - mean) phi(...) <= radius."""

    def excess(x):
        ratios = torch.tensor([(1 - x) / (1 - mean), x / mean], dtype=torch.float64)
        return float(divergence.phi(ratios) @ torch.tensor([1 - mean, mean], dtype=torch.float64)) - radius

    top = min(1.0, mean / divergence.alpha) if isinstance(divergence, CappedKL) else 1.0
    expected = top if excess(top) <= 0 else brentq(excess, mean, min(top, 1 - 1e-15), xtol=1e-14)
    risk = robust_risk([0.0, 1.0], divergence, radius=radius, base_weights=[1 - mean, mean])
    assert abs(risk.value - expected) <= SOLVER
    assert abs(risk.weights[1] - expected) <= SOLVER


@pytest.mark.parametrize(("mean", "radius"), [(0.1, 0.05), (0.1, 1.0), (0.6, 0.01), (0.6, 3.0)])
def test_two_losses_by_formula(mean, radius):
    def risk(divergence, **given):
        return robust_risk([0.0, 1.0], divergence, base_weights=[1 - mean, mean], **given).value

    root = mean + math.sqrt(2 * radius * mean * (1 - mean))
    assert abs(risk(ChiSquare(), radius=radius) - min(1, root)) <= SOLVER
    assert abs(risk(TotalVariation(), radius=radius) - min(1, mean + radius)) <= SOLVER
    assert abs(risk(CVaR(0.4)) - min(1, mean / 0.4)) <= SOLVER
    assert abs(risk(KL(), strength=radius) - radius * math.log(1 - mean + mean * math.exp(1 / radius))) <= SOLVER


@pytest.mark.parametrize("count", [1, 3, 9.5, 20])
def test_tails_by_sorting(count):
    z = rows(20, 1)[0]
    z.sort()
    whole = int(count)
    worst = (z[20 - whole :].sum() + (count - whole) * (z[19 - whole] if whole < 20 else 0)) / count
    assert abs(robust_risk(z, CVaR(count / 20)).value - worst) <= SOLVER * np.ptp(z)
    radius = 1 - count / 20
    moved = radius * z[-1] + (1 - radius) * worst
    assert abs(robust_risk(z, TotalVariation(), radius=radius).value - moved) <= SOLVER * np.ptp(z)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["radius", "strength", "both"])
@pytest.mark.parametrize("divergence", thorough(ALL, QUICK), ids=name)
def test_agrees_with_the_exact_risks(divergence, given):
    for i, z in enumerate([rows(7, 1)[0], rows(40, 3, seed=2)[2]]):
        q = base_weights(len(z)) if i % 2 else None
        for size in (1e-3, 0.1, 2.0):
            if given == "radius":
                exact = constrained_risk(z, divergence, size, base_weights=q)
                solved = robust_risk(z, divergence, radius=size, base_weights=q)
            elif given == "strength":
                exact = penalized_risk(z, divergence, size * np.ptp(z), base_weights=q)
                solved = robust_risk(z, divergence, strength=size * np.ptp(z), base_weights=q)
            else:
                exact = hybrid_risk(z, divergence, size, 0.2 * np.ptp(z), base_weights=q)
                solved = robust_risk(z, divergence, radius=size, strength=0.2 * np.ptp(z), base_weights=q)
            assert abs(solved.value - exact.value.item()) <= SOLVER * np.ptp(z)
            np.testing.assert_allclose(solved.weights, exact.weights.numpy(), atol=WEIGHTS)
            assert solved.weights.dtype == np.float64
            assert solved.weights.min() >= 0
            assert abs(solved.weights.sum() - 1) <= 1e-12


PREMIUM_ERRORS = re.findall(r"^(1\S*) +(\S+) +(\S+)$", convex.__doc__ or "", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("radius", "kl", "chi_square"), [tuple(map(float, line)) for line in PREMIUM_ERRORS])
def test_premium_errors_of_the_table(radius, kl, chi_square):
    assert len(PREMIUM_ERRORS) == 9
    for divergence, error in [(KL(), kl), (ChiSquare(), chi_square)]:
        for z in rows(100, 9):
            exact = constrained_risk(z, divergence, radius).premium.item()
            solved = robust_risk(z, divergence, radius=radius)
            assert abs(solved.value - z.mean() - exact) <= 3 * error * exact + 1e-12 * np.abs(z).max()


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"radius": 0.1}, {"strength": 0.7}, {"radius": 0.1, "strength": 0.1}])
@pytest.mark.parametrize(("scale", "shift"), [(1, 1e6), (1, -1e8), (1e-8, 0), (1e4, -1e5), (1e-150, 0), (1e150, 0)])
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CressieRead(0.5), CressieRead(3)], ids=name)
def test_follows_shift_and_scale(divergence, scale, shift, given):
    z = rows(12, 1)[0]
    still = robust_risk(z, divergence, **given)
    given = {key: value * scale if key == "strength" else value for key, value in given.items()}
    moved = robust_risk(scale * z + shift, divergence, **given)
    assert abs(moved.value - (scale * still.value + shift)) <= SOLVER * scale + 1e-15 * abs(shift)
    np.testing.assert_allclose(moved.weights, still.weights, atol=WEIGHTS)


@pytest.mark.parametrize("divergence", thorough(ALL, QUICK), ids=name)
def test_samples_without_base_weight_take_no_part(divergence):
    z, q = rows(8, 1)[0], base_weights(8)
    apart = robust_risk(z, divergence, radius=0.2, base_weights=q)
    mixed = robust_risk([50.0, *z, -70.0], divergence, radius=0.2, base_weights=[0.0, *q, 0.0])
    assert abs(mixed.value - apart.value) <= SOLVER * np.ptp(z)
    np.testing.assert_allclose(mixed.weights, [0, *apart.weights, 0], atol=WEIGHTS)
    assert mixed.weights[0] == mixed.weights[-1] == 0


def test_integer_base_weights_are_repetitions():
    z, counts = np.array([0.0, 1.0, 3.0]), np.array([3, 2, 1])
    once = robust_risk(z, KL(), radius=0.3, base_weights=counts / 6)
    repeated = robust_risk(np.repeat(z, counts), KL(), radius=0.3)
    assert abs(once.value - repeated.value) <= SOLVER
    np.testing.assert_allclose(once.weights, np.add.reduceat(repeated.weights, [0, 3, 5]), atol=WEIGHTS)


@pytest.mark.parametrize("divergence", thorough(WITH_RADIUS, QUICK), ids=name)
@pytest.mark.parametrize(("z", "radius"), [([2.5] * 4, 0.1), ([7.0], 0.3), ([0.0, 1.0, 5.0], 0.0)])
def test_mean_without_a_solver(divergence, z, radius):
    risk = robust_risk(z, divergence, radius=radius, solver="no such solver")
    assert risk.value == pytest.approx(np.mean(z), rel=4e-16)
    assert risk.status == "optimal"
    np.testing.assert_array_equal(risk.weights, np.full(len(z), 1 / len(z)))


@pytest.mark.parametrize(
    "divergence", [KL(), ChiSquare(), TotalVariation(), CressieRead(0.5), CressieRead(3)], ids=name
)
def test_large_radius_and_no_price_give_the_maximum(divergence):
    z = rows(15, 1)[0]
    assert abs(robust_risk(z, divergence, radius=200.0).value - z.max()) <= SOLVER * np.ptp(z)
    assert abs(robust_risk(z, divergence, strength=0.0).value - z.max()) <= SOLVER * np.ptp(z)


def test_tensors_lists_and_integers_are_accepted():
    z = [0.0, 1.0, 2.0, 3.0]
    expected = robust_risk(z, ChiSquare(), radius=0.1)
    tensor = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    assert abs(robust_risk(tensor, ChiSquare(), radius=torch.tensor(0.1)).value - expected.value) <= SOLVER
    assert robust_risk([0, 1, 2, 3], ChiSquare(), radius=0.1).value == expected.value
    assert robust_risk(z, CVaR(torch.tensor(0.5))).value == pytest.approx(2.5, abs=SOLVER)


# Linear models -------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    features: np.ndarray
    targets: np.ndarray
    reference: np.ndarray


def data(loss, n=60, d=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.array([1.0, 4.0, 0.2])[:d] + np.array([0.0, 2.0, 0.0])[:d]
    signal = x @ np.array([1.0, -0.4, 2.0])[:d] + 0.5
    if loss == "squared":
        y = signal + rng.standard_t(4, size=n)
        return Data(x, y, (y - 0.8 * signal - np.sin(3 * x[:, 0])) ** 2)
    y = np.where(signal + 1.5 * rng.normal(size=n) > 0, 1.0, -1.0)
    return Data(x, y, np.logaddexp(0, -y * (0.5 * signal + np.sin(3 * x[:, 0]))))


def loss_and_slope(loss, prediction, target):
    """Losses and their derivatives with respect to the prediction."""
    if loss == "squared":
        return (target - prediction) ** 2, -2 * (target - prediction)
    if loss == "logistic":
        return np.logaddexp(0, -target * prediction), -target * expit(-target * prediction)
    return np.maximum(0, 1 - target * prediction), -target * (target * prediction < 1)


def exact(z, divergence, *, radius=None, strength=None, base_weights=None):
    if strength is not None:
        return penalized_risk(z, divergence, strength, base_weights=base_weights)
    return constrained_risk(z, divergence, radius or 0.0, base_weights=base_weights)


LOSSES = ["squared", "logistic", "hinge"]
every_loss = pytest.mark.parametrize("loss", LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"radius": 0.02}, {"radius": 0.5}, {"strength": 0.8}], ids=str)
@every_loss
@pytest.mark.parametrize("divergence", thorough(ALL, QUICK), ids=name)
def test_minimum_is_the_exact_risk_and_stationary(divergence, loss, given):
    x, y, reference = data(loss)
    q = base_weights(len(y)) if "strength" in given else None
    fit = minimize_linear(
        x,
        y,
        divergence,
        loss=loss,
        reference_losses=reference,
        l2=0.1,
        fit_intercept=True,
        base_weights=q,
        **(given if divergence.has_radius else {}),
    )
    prediction = x @ fit.coefficients + fit.intercept
    losses, slope = loss_and_slope(loss, prediction, y)
    np.testing.assert_allclose(fit.losses, losses, rtol=1e-12, atol=1e-12)
    excess = losses - reference
    ridge = 0.05 * fit.coefficients @ fit.coefficients
    risk = exact(excess, divergence, base_weights=q, **given)
    size = np.ptp(excess)
    assert abs(fit.value - risk.value.item() - ridge) <= SOLVER * size

    # The dual weights are a worst case, at which the gradient vanishes.
    assert abs(fit.weights.sum() - 1) <= 1e-12
    reached = fit.weights @ excess
    if "strength" in given and divergence.has_radius:
        ratios = fit.weights / (1 / len(y) if q is None else q)
        base = torch.full((len(y),), 1 / len(y), dtype=torch.float64) if q is None else torch.tensor(q)
        if isinstance(divergence, CappedKL):
            ratios = np.minimum(ratios, 1 / divergence.alpha)
        reached -= given["strength"] * (base @ divergence.phi(torch.tensor(ratios))).item()
    assert abs(reached - risk.value.item()) <= 1e-4 * size
    if loss != "hinge":  # which has kinks at the optimum
        inputs = np.column_stack([x, np.ones(len(y))])
        gradient = inputs.T @ (fit.weights * slope) + 0.1 * np.append(fit.coefficients, 0)
        magnitude = np.abs(inputs).T @ np.abs(fit.weights * slope)
        assert np.abs(gradient / magnitude).max() <= 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"radius": 0.05}, {"strength": 2.0}], ids=str)
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize(
    "divergence", [KL(), ChiSquare(), CressieRead(0.5), CressieRead(0), CressieRead(1.5)], ids=name
)
def test_gradient_of_the_exact_risk_vanishes(divergence, loss, given):
    """By Danskin it is sum_i p_i grad loss_i, with p of the library's own solvers and autograd through them."""
    x, y, reference = data(loss)
    fit = minimize_linear(x, y, divergence, loss=loss, reference_losses=reference, l2=0.1, **given)
    theta = torch.tensor(fit.coefficients, requires_grad=True)
    prediction, target = torch.tensor(x) @ theta, torch.tensor(y)
    losses = (target - prediction) ** 2 if loss == "squared" else torch.nn.functional.softplus(-target * prediction)
    risk = exact(losses - torch.tensor(reference), divergence, **given)
    (gradient,) = torch.autograd.grad(risk.value + 0.05 * theta @ theta, theta)
    slope = loss_and_slope(loss, prediction.detach().numpy(), y)[1]
    magnitude = np.abs(x).T @ np.abs(risk.weights.detach().numpy() * slope)
    assert np.abs(gradient.numpy() / magnitude).max() <= 2e-4
    np.testing.assert_allclose(fit.weights, risk.weights.detach().numpy(), atol=WEIGHTS)


@pytest.mark.slow
@every_loss
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.23), TotalVariation(), CressieRead(0.5)], ids=name)
def test_no_other_model_has_a_smaller_risk(divergence, loss):
    x, y, reference = data(loss)
    given = {"radius": 0.1} if divergence.has_radius else {}
    fit = minimize_linear(x, y, divergence, loss=loss, reference_losses=reference, l2=0.1, **given)
    rng = np.random.default_rng(5)
    spread = 10.0 ** rng.uniform(-6, 1, size=(400, 1))
    others = fit.coefficients + spread * rng.normal(size=(400, x.shape[1]))
    losses = loss_and_slope(loss, others @ x.T, y)[0]
    risks = constrained_risk(losses - reference, divergence, 0.1).value.numpy() + 0.05 * np.square(others).sum(-1)
    assert risks.min() >= fit.value - SOLVER * np.ptp(fit.losses - reference)


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("given", [{"radius": 0.0}, {"rho": 0}, {"radius": 1e-9}, {"strength": 1e7}], ids=str)
def test_without_a_ball_it_is_least_squares(given, fit_intercept):
    x, y, _ = data("squared")
    fit = minimize_linear(x, y, ChiSquare(), fit_intercept=fit_intercept, **given)
    inputs = np.column_stack([x, np.ones(len(y))]) if fit_intercept else x
    solution, (residual,), *_ = np.linalg.lstsq(inputs, y, rcond=None)
    expected, intercept = (solution[:-1], solution[-1]) if fit_intercept else (solution, 0.0)
    np.testing.assert_allclose(fit.coefficients, expected, atol=1e-3)
    assert fit.intercept == pytest.approx(intercept, abs=1e-3)
    assert fit.value == pytest.approx(residual / len(y), rel=1e-4)


def test_ridge_leaves_the_intercept_alone():
    x, y, _ = data("squared")
    fit = minimize_linear(x, y, KL(), radius=0.0, l2=3.0, fit_intercept=True)
    centered = x - x.mean(0)
    expected = np.linalg.solve(2 * centered.T @ centered / len(y) + 3.0 * np.eye(3), 2 * centered.T @ y / len(y))
    np.testing.assert_allclose(fit.coefficients, expected, atol=1e-4)
    assert fit.intercept == pytest.approx(y.mean() - x.mean(0) @ expected, abs=1e-4)


def test_logistic_regression_by_another_optimizer():
    x, y, _ = data("logistic")

    def objective(theta):
        margin = y * (x @ theta)
        gradient = -x.T @ (y * expit(-margin)) / len(y) + 0.1 * theta
        return np.logaddexp(0, -margin).mean() + 0.05 * theta @ theta, gradient

    expected = minimize(objective, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-10})
    for given in ({"divergence": CVaR(1.0)}, {"divergence": KL(), "radius": 0.0}):
        fit = minimize_linear(x, y, loss="logistic", l2=0.1, **given)
        np.testing.assert_allclose(fit.coefficients, expected.x, atol=1e-4)
        assert fit.value == pytest.approx(expected.fun, abs=SOLVER)


@every_loss
def test_constant_reference_is_plain_robust_optimization(loss):
    x, y, _ = data(loss)
    given = {"loss": loss, "rho": 2.0, "l2": 0.01}
    plain = minimize_linear(x, y, ChiSquare(), **given)
    steered = minimize_linear(x, y, ChiSquare(), reference_losses=np.full(len(y), 5.0), **given)
    assert steered.value == pytest.approx(plain.value - 5, abs=SOLVER * np.ptp(plain.losses))
    np.testing.assert_allclose(steered.coefficients, plain.coefficients, atol=1e-4)
    same = minimize_linear(x, y, ChiSquare(), loss=loss, radius=2 / len(y), l2=0.01)
    assert same.value == pytest.approx(plain.value, abs=1e-12)


@every_loss
def test_only_the_excess_matters(loss):
    """Adding any c(x_i) to the losses of both models changes neither the risk nor the weights."""
    x, y, reference = data(loss)
    fit = minimize_linear(x, y, ChiSquare(), loss=loss, rho=2.0, reference_losses=reference, l2=0.1)
    both = 10 * np.sin(x[:, 0])
    risk = drrho_risk(fit.losses + both, reference + both, ChiSquare(), rho=2.0)
    ridge = 0.05 * fit.coefficients @ fit.coefficients
    assert abs(risk.value.item() + ridge - fit.value) <= SOLVER * np.ptp(fit.losses - reference)
    np.testing.assert_allclose(risk.weights.numpy(), fit.weights, atol=WEIGHTS)


@pytest.mark.slow
@every_loss
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), TotalVariation(), CVaR(0.3)], ids=name)
def test_never_worse_than_a_reference_of_the_same_class(divergence, loss):
    """The excess of the reference itself is 0 and so is its risk."""
    x, y, _ = data(loss)
    reference = loss_and_slope(loss, x @ np.array([0.7, -0.2, 1.0]), y)[0]
    for radius in (1e-3, 0.1):
        given = {"radius": radius} if divergence.has_radius else {}
        fit = minimize_linear(x, y, divergence, loss=loss, reference_losses=reference, **given)
        assert fit.value <= SOLVER * np.ptp(reference)


@every_loss
def test_base_weights_are_repetitions(loss):
    x, y, reference = data(loss, n=20)
    counts = np.random.default_rng(7).integers(0, 4, size=20)
    given = {"loss": loss, "radius": 0.1, "l2": 0.1, "fit_intercept": True}
    weighted = minimize_linear(x, y, KL(), reference_losses=reference, base_weights=counts / counts.sum(), **given)
    repeated = minimize_linear(
        np.repeat(x, counts, axis=0), np.repeat(y, counts), KL(), reference_losses=np.repeat(reference, counts), **given
    )
    assert weighted.value == pytest.approx(repeated.value, abs=SOLVER * np.ptp(weighted.losses))
    np.testing.assert_allclose(weighted.coefficients, repeated.coefficients, atol=1e-4)
    assert (weighted.weights[counts == 0] == 0).all()
    assert weighted.losses.shape == (20,)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.23), CressieRead(3)], ids=name)
def test_units_of_targets_and_features(divergence):
    x, y, reference = data("squared")
    size, widths = 1e4, np.array([1e-3, 1e5, 1.0])
    given = {"fit_intercept": True} | ({"radius": 0.1} if divergence.has_radius else {})
    fit = minimize_linear(x, y, divergence, reference_losses=reference, **given)
    scaled = minimize_linear(
        widths * x + 1e3, size * y - 1e6, divergence, reference_losses=size**2 * reference, **given
    )
    np.testing.assert_allclose(scaled.coefficients * widths / size, fit.coefficients, atol=1e-3)
    assert scaled.value / size**2 == pytest.approx(fit.value, rel=1e-5, abs=SOLVER * np.ptp(fit.losses))


def test_constant_features_beside_an_intercept():
    x, y, _ = data("squared")
    x = x.copy()
    x[:, 1] = 7.1
    fit = minimize_linear(x, y, KL(), radius=0.1, fit_intercept=True)
    bare = minimize_linear(x[:, [0, 2]], y, KL(), radius=0.1, fit_intercept=True)
    np.testing.assert_allclose(fit.coefficients[[0, 2]], bare.coefficients, atol=1e-6)
    assert abs(fit.coefficients[1]) <= 1e-6
    constant = minimize_linear(x, np.full(len(y), 3.0), KL(), radius=0.1, fit_intercept=True)
    assert constant.intercept == pytest.approx(3.0)
    assert constant.value == pytest.approx(0.0, abs=1e-9)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0, 1.0]], KL(), {"radius": 0.1}), ValueError, r"losses must have shape one row \[n\].*got \[1, 2\]"),
        (([0.0, math.nan], KL(), {"radius": 0.1}), ValueError, "losses must be finite"),
        (([-1e308, 1e308], KL(), {"radius": 0.1}), ValueError, "finite range"),
        (([0.0, 1.0], KL(), {"radius": -0.1}), ValueError, "radius must be finite and >= 0, got -0.1"),
        (([0.0, 1.0], KL(), {"strength": math.inf}), ValueError, "strength must be finite and >= 0, got inf"),
        (([0.0, 1.0], KL(), {"radius": [0.1, 0.2]}), TypeError, r"radius must be a number, got \[0.1, 0.2\]"),
        (([0.0, 1.0], KL(), {}), ValueError, r"give radius, strength or both: KL\(\) needs one"),
        (([0.0, 1.0], "KL", {"radius": 0.1}), TypeError, "divergence must be a Divergence.*'KL'"),
        (([0.0, 1.0], CVaR(torch.tensor([0.1, 0.2])), {}), ValueError, r"alpha must be one number here.*\[2\]"),
        (([0.0, 1.0], KL(), {"radius": 1, "base_weights": [1.0]}), ValueError, r"base_weights.*n = 2, got \[1\]"),
        (([0.0, 1.0], KL(), {"radius": 1, "base_weights": [2, 3]}), ValueError, "base_weights must sum to 1, got 5"),
        (([0.0, 1.0], KL(), {"radius": 1, "base_weights": [2, -1]}), ValueError, "base_weights must be >= 0, got -1"),
        (([0.0, 1.0], LeCam(), {"radius": 1}), TypeError, "divergence_expression supports CVaR, CappedKL, .*KL"),
    ],
)
def test_refusals_of_robust_risk(arguments, error, message):
    losses, divergence, given = arguments
    with pytest.raises(error, match=message):
        robust_risk(losses, divergence, **given)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": [1.0, 2.0, 3.0]}, ValueError, r"features must have shape \[n, d\], got \[3\]"),
        ({"targets": [1.0, 2.0]}, ValueError, r"targets must have shape \[n\] or \[n, k\] with n = 3, got \[2\]"),
        ({"reference_losses": [1.0]}, ValueError, r"reference_losses must have shape \[n\] with n = 3, got \[1\]"),
        ({"loss": "absolute"}, ValueError, "loss must be one of squared, logistic, hinge, got 'absolute'"),
        ({"loss": "hinge"}, ValueError, "targets must be -1 or 1 for the hinge loss, got 0.0"),
        ({"l2": -1.0}, ValueError, "l2 must be finite and >= 0, got -1.0"),
        ({"rho": 1.0}, ValueError, "give exactly one of radius, rho .*radius=0.1, rho=1.0 and strength=None"),
        ({"radius": None}, ValueError, "give exactly one of radius, rho"),
        ({"radius": None, "rho": -1}, ValueError, "rho must be finite and >= 0, got -1.0"),
        ({"radius": None, "strength": 0.0}, ValueError, "strength must be > 0, got 0"),
        ({"divergence": LeCam()}, TypeError, "conjugate_expression supports CVaR.*register"),
        ({"divergence": None}, TypeError, "divergence must be a Divergence"),
    ],
)
def test_refusals_of_minimize_linear(changed, error, message):
    given = {"features": [[1.0], [2.0], [3.0]], "targets": [0.0, 1.0, 1.0], "divergence": KL(), "radius": 0.1}
    with pytest.raises(error, match=message):
        minimize_linear(**(given | changed))


def test_errors_name_solver_and_status():
    with pytest.raises(RuntimeError, match=r"NONE gave no solution, status solver_error: .*not installed"):
        robust_risk([0.0, 1.0], KL(), radius=0.1, solver="none")
    with pytest.raises(RuntimeError, match="SCIPY gave no solution, status solver_error: "):
        robust_risk([0.0, 1.0], KL(), radius=0.1, solver="SCIPY")
    with pytest.raises(RuntimeError, match="CLARABEL gave no solution, status user_limit"):
        robust_risk([0.0, 1.0, 2.0], KL(), radius=0.1, max_iter=2)


def test_another_solver_and_its_options():
    z = rows(10, 1)[0]
    expected = constrained_risk(z, ChiSquare(), 0.1).value.item()
    assert robust_risk(z, ChiSquare(), radius=0.1, solver="SCS", eps=1e-9).value == pytest.approx(expected, abs=1e-6)
    rough = robust_risk(z, ChiSquare(), radius=0.1, solver="SCS", max_iters=4)
    assert rough.status == "optimal_inaccurate"  # and no warning, which would be an error here
    assert robust_risk(z, CVaR(0.3), solver="SCIPY").weights == pytest.approx(
        constrained_risk(z, CVaR(0.3)).weights.numpy(), abs=1e-12
    )


def test_missing_cvxpy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    monkeypatch.delitem(sys.modules, "drrho.convex")
    with pytest.raises(ImportError, match=r"pip install drrho\[convex\]"):
        importlib.import_module("drrho.convex")
