"""Risks whose certificate was once wrong, or hard to reach: each by name, with its right value and its gap."""

import numpy as np
import pytest
import torch
from families import JensenShannon
from problems import scale_of

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk, penalized_risk

EPS = 2.0**-52


def certified(risk, losses):
    """The gap is not below the rounding of the losses."""
    __tracebackhide__ = True
    assert torch.isfinite(risk.value)
    assert risk.gap >= -4 * EPS * scale_of(losses)
    return risk


@pytest.mark.parametrize("radius", [1e-14, 1e-8, 1e-3, 0.19, 0.2, 0.21, 0.45])
def test_total_variation_moves_a_tiny_mass_of_base_weights(radius):
    losses, base = [0.0, 1.0, 2.0], [0.2, 0.3, 0.5]
    risk = certified(constrained_risk(losses, TotalVariation(), radius, base_weights=base), losses)
    expected = 2 * min(radius, 0.2) + max(radius - 0.2, 0)
    assert abs(risk.premium.item() - expected) <= 1e-11 * expected
    moved = 0.5 * np.abs(risk.weights.numpy() - base).sum()
    assert abs(moved - radius) <= 4 * EPS + 1e-11 * radius


@pytest.mark.parametrize("radius", [1e-14, 1e-9])
@pytest.mark.parametrize("n", [7, 200_000])
def test_total_variation_moves_a_tiny_mass_of_uniform_losses(n, radius):
    losses = np.random.default_rng(0).normal(size=n)
    losses[3], losses[5] = -8.0, 8.0
    risk = certified(constrained_risk(losses, TotalVariation(), radius), losses)
    assert abs(risk.premium.item() - 16 * radius) <= 1e-11 * 16 * radius
    batch = constrained_risk(np.stack([losses, losses]), TotalVariation(), radius)
    np.testing.assert_allclose(batch.premium, 16 * radius, rtol=1e-11)


EVERY = [CressieRead(0.5), TotalVariation(), CappedKL(0.5), KL(), ChiSquare(), JensenShannon()]


@pytest.mark.parametrize("divergence", EVERY, ids=lambda divergence: type(divergence).__name__)
def test_a_range_below_the_normal_numbers(divergence):
    risk = penalized_risk([1e-310, 0.0], divergence, 0.7)
    assert abs(risk.value.item() - 5e-311) <= 1e-323
    assert risk.premium == 0
    assert risk.gap == 0
    assert risk.weights.tolist() == [0.5, 0.5]
    ball = constrained_risk([1e-310, 0.0], divergence, 0.01)
    assert 5e-311 < ball.value < 1e-310
    tail = penalized_risk([1e-310, 0.0], CVaR(0.5), 0.7)
    assert abs(tail.value.item() - 1e-310) <= 1e-323


@pytest.mark.parametrize("divergence", EVERY, ids=lambda divergence: type(divergence).__name__)
@pytest.mark.parametrize("strength", [1.0, 1e3, 1e10, 1e100])
def test_the_gap_of_a_strength_far_beyond_the_range_is_rounding_of_the_losses(divergence, strength):
    losses = [1.0, 0.0, 0.3]
    risk = certified(penalized_risk(losses, divergence, strength), losses)
    assert risk.gap <= 4 * EPS * scale_of(losses)
