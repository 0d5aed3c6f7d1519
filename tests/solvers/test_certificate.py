"""The gap of a certificate bounds by how much the returned weights miss the optimum."""

import numpy as np
import pytest
from problems import normalized_rows

from drrho import KL, CappedKL, ChiSquare, CressieRead
from drrho.solvers.certificate import Bound, certified
from drrho.solvers.ends import ends_of_ball, ends_of_penalty, least_divergent_maximizer
from drrho.solvers.generic import generic_ball, generic_penalty

LOSSES = np.random.default_rng(2).normal(size=(4, 30))
SPAN = np.ptp(LOSSES, axis=1)
STRENGTH = np.array([0.2, 0.5, 2.0, 9.0])


RADIUS = np.array([0.01, 0.05, 0.1, 0.3])


def penalty(divergence):
    rows, bound = normalized_rows(LOSSES), Bound(divergence, STRENGTH / SPAN, STRENGTH)
    maximizer = least_divergent_maximizer(rows, divergence)
    found = generic_penalty(divergence, rows, bound.parameter)
    return certified(rows, SPAN, bound, found, ends_of_penalty(SPAN, bound.parameter, maximizer), maximizer)


def ball(divergence, factor):
    """The weights of a penalty whose strength is the ball's multiplier times a factor."""
    rows = normalized_rows(LOSSES)
    maximizer = least_divergent_maximizer(rows, divergence)
    best = generic_ball(divergence, rows, RADIUS).dual.strength
    found = generic_penalty(divergence, rows, factor * best)
    return certified(rows, SPAN, Bound(divergence, RADIUS), found, ends_of_ball(SPAN, RADIUS, maximizer), maximizer)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CressieRead(1.5), CappedKL(0.3)], ids=repr)
@pytest.mark.parametrize("factor", [1.01, 1.3, 4.0])
def test_the_gap_bounds_the_error_inside_the_ball(divergence, factor):
    exact, inside = ball(divergence, 1.0), ball(divergence, factor)
    assert np.all(np.abs(exact.gap.numpy()) <= 1e-12 * SPAN)
    assert np.all(inside.distance.numpy() < RADIUS)
    error = exact.value - inside.value
    assert (error > 0).all()
    assert (inside.gap >= error).all()


@pytest.mark.parametrize("divergence", [KL(), CressieRead(1.5), CappedKL(0.3)], ids=repr)
def test_value_is_that_of_the_weights(divergence):
    found = penalty(divergence)
    weights = found.weights.numpy()
    distance = divergence.phi(found.weights * LOSSES.shape[1]).mean(1).numpy()
    assert np.all(np.abs(found.gap.numpy()) <= 1e-13 * SPAN)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-11)
    np.testing.assert_allclose(found.value, (weights * LOSSES).sum(1) - STRENGTH * distance, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.premium, found.value.numpy() - LOSSES.mean(1), rtol=0, atol=1e-13)
    assert found.strength.tolist() == STRENGTH.tolist()
