"""CVaR and total variation by the kernels for a GPU, against exact rationals."""

import numpy as np
import oracles
import pytest
import torch
from interpreted import DEVICE, by_device_kernels

from drrho import CVaR, TotalVariation, constrained_risk, penalized_risk

pytest.importorskip("triton")

LOSSES = np.random.default_rng(2).normal(size=25)


def solved(risk, *given):
    z = torch.from_numpy(LOSSES).to(DEVICE)
    with by_device_kernels():
        return risk(z, *given)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.77, 1.0])
def test_cvar(alpha):
    found, expected = solved(constrained_risk, CVaR(alpha)), oracles.cvar(LOSSES, alpha)
    np.testing.assert_allclose(found.value.item(), expected.value, rtol=1e-14)
    np.testing.assert_allclose(found.weights.cpu(), expected.weights, rtol=1e-12, atol=1e-15)
    assert found.threshold.item() == np.sort(LOSSES)[::-1][int(np.ceil(alpha * 25)) - 1]


@pytest.mark.parametrize("radius", [1e-6, 0.2, 0.99])
def test_ball(radius):
    found, expected = solved(constrained_risk, TotalVariation(), radius), oracles.total_variation_ball(LOSSES, radius)
    np.testing.assert_allclose(found.value.item(), expected.value, rtol=1e-13)
    np.testing.assert_allclose(found.premium.item(), expected.premium, rtol=1e-10)
    np.testing.assert_allclose(found.weights.cpu(), expected.weights, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("strength", [0.0, 0.1, 1e4])
def test_penalty(strength):
    found, expected = (
        solved(penalized_risk, TotalVariation(), strength),
        oracles.total_variation_penalty(LOSSES, strength),
    )
    np.testing.assert_allclose(found.value.item(), expected.value, rtol=1e-13)
    np.testing.assert_allclose(found.premium.item(), expected.premium, rtol=1e-10)
    np.testing.assert_allclose(found.weights.cpu(), expected.weights, rtol=1e-9, atol=1e-13)
