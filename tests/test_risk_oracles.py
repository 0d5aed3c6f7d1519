"""The exact risks against independent solvers: mpmath on every hard row, cvxpy on a few tiny problems."""

import math

import numpy as np
import oracles
import problems
import pytest
from families import thorough_items
from hypothesis import given, settings
from problems import hard_cases, ratio_tolerance, tensor, value_tolerance

from drrho import KL, ChiSquare, CVaR, constrained_risk, penalized_risk

BALLS = {"kl": (KL(), oracles.kl_ball), "chi2": (ChiSquare(), oracles.chi_square_ball)}
PENALTIES = {"kl": (KL(), oracles.kl_penalty), "chi2": (ChiSquare(), oracles.chi_square_penalty)}
every_hard_row = pytest.mark.parametrize("losses", thorough_items(dict(hard_cases()), "tied maxima", "offset 1e8"))
law = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def assert_agrees(risk, expected, losses, temperature=math.inf):
    __tracebackhide__ = True
    n = len(losses)
    assert abs(risk.value.item() - expected.value) <= value_tolerance(losses)
    # Relative to the premium itself: the mean takes no part in it. A constant row has none.
    assert abs(risk.premium.item() - expected.premium) <= 1e-11 * expected.premium + 1e-300
    ratios = n * expected.weights
    excess = np.abs(n * risk.weights.numpy() - ratios) - ratio_tolerance(losses, ratios, temperature)
    assert excess.max() <= 0, f"n p off by {excess.max()} more than allowed at {excess.argmax()}"


@pytest.mark.slow
@pytest.mark.parametrize("name", BALLS)
@pytest.mark.parametrize("radius", problems.RADII)
@every_hard_row
def test_ball_on_hard_rows(losses, radius, name):
    divergence, oracle = BALLS[name]
    risk = constrained_risk(tensor(losses), divergence, radius)
    temperature = risk.strength.item() if name == "kl" else math.inf
    assert_agrees(risk, oracle(losses.tolist(), radius), losses, temperature)


@pytest.mark.parametrize("alpha", [*problems.ALPHAS, 1 - 2.0**-30])
@every_hard_row
def test_cvar_on_hard_rows(losses, alpha):
    assert_agrees(constrained_risk(tensor(losses), CVaR(alpha)), oracles.cvar(losses, alpha), losses)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("relative_strength", [0.0, 1e-6, 1e-3, 0.1, 1.0, 30.0, 1e8])
@every_hard_row
def test_penalty_on_hard_rows(losses, relative_strength, name):
    divergence, oracle = PENALTIES[name]
    strength = relative_strength * ((losses.max() - losses.min()) or 1.0)
    risk = penalized_risk(tensor(losses), divergence, strength)
    temperature = strength if name == "kl" else math.inf
    assert_agrees(risk, oracle(losses.tolist(), strength), losses, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("name", BALLS)
@law
@given(losses=problems.rows(), radius=problems.radii())
def test_ball_on_drawn_rows(name, losses, radius):
    divergence, oracle = BALLS[name]
    risk = constrained_risk(tensor(losses), divergence, radius)
    temperature = risk.strength.item() if name == "kl" else math.inf
    assert_agrees(risk, oracle(losses, radius), losses, temperature)


@law
@given(losses=problems.rows(), alpha=problems.alphas)
def test_cvar_on_drawn_rows(losses, alpha):
    assert_agrees(constrained_risk(tensor(losses), CVaR(alpha)), oracles.cvar(losses, alpha), losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", PENALTIES)
@law
@given(losses=problems.rows(), strength=problems.radii(-5, 6))
def test_penalty_on_drawn_rows(name, losses, strength):
    divergence, oracle = PENALTIES[name]
    risk = penalized_risk(tensor(losses), divergence, strength)
    temperature = strength if name == "kl" else math.inf
    assert_agrees(risk, oracle(losses, strength), losses, temperature)


@pytest.mark.slow
@pytest.mark.parametrize("name", BALLS)
@pytest.mark.parametrize("radius", [1e-14, 1e-8, 1e-3, 1.0])
def test_ball_on_a_thousand_losses(name, radius):
    losses = np.random.default_rng(20).exponential(size=1000)
    divergence, oracle = BALLS[name]
    risk = constrained_risk(tensor(losses), divergence, radius)
    temperature = risk.strength.item() if name == "kl" else math.inf
    assert_agrees(risk, oracle(losses.tolist(), radius), losses, temperature)


# A conic solver's own accuracy, with radii it can resolve.
TINY = [
    np.array([0.3, -1.2, 0.8, 0.8, -0.1]),
    np.array([-2.0, -1.0, -4.0]),
    np.array([1.0, 1.1, 5.0, 0.0, 2.0, 2.0]),
]
SOLVER = 1e-6


def assert_agrees_with_conic(risk, expected, losses):
    __tracebackhide__ = True
    spread = losses.max() - losses.min()
    assert abs(risk.value.item() - expected.value) <= SOLVER * spread
    # Weights within sqrt of the value's accuracy: the objective is flat to second order on the ball.
    assert np.abs(risk.weights.numpy() - expected.weights).max() <= math.sqrt(SOLVER)


@pytest.mark.parametrize("name", BALLS)
@pytest.mark.parametrize("radius", [0.01, 0.2])
@pytest.mark.parametrize("losses", TINY)
def test_ball_against_its_primal_definition(losses, radius, name):
    pytest.importorskip("cvxpy")
    risk = constrained_risk(tensor(losses), BALLS[name][0], radius)
    assert_agrees_with_conic(risk, oracles.conic(name, losses, radius=radius), losses)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("strength", [0.3, 2.0])
@pytest.mark.parametrize("losses", TINY)
def test_penalty_against_its_primal_definition(losses, strength, name):
    pytest.importorskip("cvxpy")
    risk = penalized_risk(tensor(losses), PENALTIES[name][0], strength)
    assert_agrees_with_conic(risk, oracles.conic(name, losses, strength=strength), losses)


@pytest.mark.parametrize("alpha", [0.15, 0.4, 0.9])
@pytest.mark.parametrize("losses", TINY)
def test_cvar_against_its_primal_definition(losses, alpha):
    pytest.importorskip("cvxpy")
    risk = constrained_risk(tensor(losses), CVaR(alpha))
    expected = oracles.conic("cvar", losses, alpha=alpha)
    assert abs(risk.value.item() - expected.value) <= SOLVER * (losses.max() - losses.min())
