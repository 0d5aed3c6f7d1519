"""Ends of a parameter's range, and weights in the ball, as the kernels for a GPU answer."""

import numpy as np
import oracles
import pytest
import torch
from interpreted import DEVICE, by_device_kernels

from drrho import KL, ChiSquare, CressieRead, constrained_risk

pytest.importorskip("triton")

LOSSES = np.random.default_rng(2).normal(size=25)


def solved(risk, *given):
    z = torch.from_numpy(LOSSES).to(DEVICE)
    with by_device_kernels():
        return risk(z, *given)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CressieRead(1.5)], ids=repr)
def test_a_wide_ball_reaches_the_maximum(divergence):
    z = torch.tensor([[3.0, 1.0, 3.0, 0.0], [2.0, -1.0, 0.5, 1.0]], device=DEVICE, dtype=torch.float64)
    with by_device_kernels():
        risk = constrained_risk(z, divergence, 50.0)
    assert risk.weights.tolist() == [[0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert risk.value.tolist() == [3.0, 2.0]
    assert risk.strength.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CressieRead(1.5)], ids=repr)
def test_a_ball_of_radius_zero_gives_the_mean(divergence):
    risk = solved(constrained_risk, divergence, 0.0)
    np.testing.assert_allclose(risk.value.item(), LOSSES.mean(), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(risk.weights.cpu(), 1 / 25, rtol=1e-15)


@pytest.mark.parametrize("divergence, phi", [(KL(), "kl"), (ChiSquare(), "chi2")], ids=["KL", "chi-square"])
def test_weights_sum_to_one_and_lie_in_the_ball(divergence, phi):
    weights = solved(constrained_risk, divergence, 0.3).weights.cpu().numpy()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-14)
    assert oracles.divergence(phi, weights) <= 0.3 * (1 + 1e-13)
