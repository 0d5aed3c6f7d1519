"""Cressie-Read divergences by the kernels for a GPU, against mpmath."""

import numpy as np
import oracles
import pytest
import torch
from interpreted import DEVICE, by_device_kernels

from drrho import CressieRead, constrained_risk, penalized_risk

pytest.importorskip("triton")

LOSSES = np.random.default_rng(2).normal(size=25)


def solved(risk, *given):
    z = torch.from_numpy(LOSSES).to(DEVICE)
    with by_device_kernels():
        return risk(z, *given)


@pytest.mark.parametrize("order", [1.5, 3.0, 0.5, -1.0, 0.0, 1.2])
def test_ball(order):
    found, expected = solved(constrained_risk, CressieRead(order), 0.2), oracles.power_ball(LOSSES, 0.2, order)
    np.testing.assert_allclose(found.value.item(), expected.value, rtol=1e-13)
    np.testing.assert_allclose(found.premium.item(), expected.premium, rtol=1e-10)
    np.testing.assert_allclose(found.weights.cpu(), expected.weights, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("order", [1.5, 3.0, 0.5, -1.0, 0.0, 1.2])
def test_penalty(order):
    found, expected = solved(penalized_risk, CressieRead(order), 0.3), oracles.power_penalty(LOSSES, 0.3, order)
    np.testing.assert_allclose(found.value.item(), expected.value, rtol=1e-13)
    np.testing.assert_allclose(found.premium.item(), expected.premium, rtol=1e-10)
    np.testing.assert_allclose(found.weights.cpu(), expected.weights, rtol=1e-9, atol=1e-13)
