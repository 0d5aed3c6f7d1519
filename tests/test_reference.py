"""Laws of the excess losses and of the DRRho risk: only the difference to the reference counts."""

import numpy as np
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import tensor, value_tolerance

from drrho import KL, ChiSquare, CVaR, constrained_risk, drrho_risk, excess_losses

RISKS = {
    "kl": (KL(), {"rho": 1.5}),
    "kl radius": (KL(), {"radius": 0.2}),
    "chi2": (ChiSquare(), {"rho": 1.5}),
    "chi2 radius": (ChiSquare(), {"radius": 0.2}),
    "cvar": (CVaR(0.4), {}),
}
every_risk = pytest.mark.parametrize("divergence, size", RISKS.values(), ids=RISKS.keys())
law = settings(derandomize=True, deadline=None, max_examples=30, database=None)


def close(actual, expected, tolerance):
    __tracebackhide__ = True
    assert np.abs(np.asarray(actual) - np.asarray(expected)).max() <= tolerance


@law
@given(pair=problems.pairs())
def test_excess_is_the_difference(pair):
    losses, reference = map(tensor, pair)
    assert torch.equal(excess_losses(losses, reference), losses - reference)
    assert torch.equal(excess_losses(losses, reference, coefficient=0.5), losses - 0.5 * reference)
    assert torch.equal(excess_losses(losses, reference, 0.0), losses)


def test_excess_accepts_numpy_lists_and_keeps_the_dtype():
    assert torch.equal(excess_losses([3.0, 1.0], np.array([1.0, 4.0])), tensor([2.0, -3.0]))
    losses, reference = tensor([3.0, 1.0], torch.float32), tensor([1.0, 4.0], torch.float32)
    assert excess_losses(losses, reference).dtype == torch.float32


@every_risk
def test_reference_receives_no_gradient(divergence, size):
    losses, reference = (tensor(problems.HARD[case][:30]).requires_grad_() for case in ("normal", "exponential"))
    risk = drrho_risk(losses, reference, divergence, **size)
    (risk.value + excess_losses(losses, reference, 0.7).sum()).backward()
    assert reference.grad is None or not reference.grad.any()
    close(losses.grad - 1, risk.weights.detach(), 1e-12)


@every_risk
@law
@given(pair=problems.pairs())
def test_drrho_risk_is_the_ball_risk_of_the_excess(divergence, size, pair):
    losses, reference = map(tensor, pair)
    radius = size.get("radius", size.get("rho", 0.0) / len(losses))
    steered = drrho_risk(losses, reference, divergence, **size)
    direct = constrained_risk(losses - reference, divergence, radius)
    close(steered.value, direct.value, value_tolerance(losses - reference))
    close(steered.weights, direct.weights, 1e-12)


@pytest.mark.slow
@every_risk
@law
@given(pair=problems.pairs(), data=st.data())
def test_what_both_models_share_cancels(divergence, size, pair, data):
    losses, reference = map(tensor, pair)
    common = tensor([data.draw(st.integers(-(2**20), 2**20)) for _ in pair[0]])
    plain = drrho_risk(losses, reference, divergence, **size)
    shared = drrho_risk(losses + common, reference + common, divergence, **size)
    assert torch.equal(shared.value, plain.value)
    assert torch.equal(shared.weights, plain.weights)


@pytest.mark.slow
@every_risk
@law
@given(losses=problems.rows())
def test_a_model_equal_to_its_reference_has_no_risk(divergence, size, losses):
    risk = drrho_risk(tensor(losses), tensor(losses), divergence, **size)
    assert risk.value == 0.0
    assert risk.premium == 0.0
    close(risk.weights * len(losses), 1.0, 1e-14)


@pytest.mark.slow
@every_risk
@law
@given(losses=problems.rows(), constant=st.integers(-1000, 1000))
def test_a_constant_reference_only_shifts(divergence, size, losses, constant):
    steered = drrho_risk(
        tensor(losses), torch.full((len(losses),), float(constant), dtype=torch.float64), divergence, **size
    )
    plain = drrho_risk(tensor(losses), torch.zeros(len(losses), dtype=torch.float64), divergence, **size)
    close(steered.value, plain.value - constant, value_tolerance(losses) + 1e-12 * abs(constant))
    close(steered.weights, plain.weights, 1e-10)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi2"])
def test_rho_is_the_radius_times_the_number_of_samples(divergence):
    losses, reference = tensor(problems.HARD["normal"]), tensor(problems.HARD["exponential"])
    by_rho = drrho_risk(losses, reference, divergence, rho=3.0)
    by_radius = drrho_risk(losses, reference, divergence, radius=3.0 / 60)
    close(by_rho.value, by_radius.value, 1e-14)
    rows = drrho_risk(losses.reshape(4, 15), reference.reshape(4, 15), divergence, rho=tensor([0.1, 1.0, 5.0, 100.0]))
    last = drrho_risk(losses[45:], reference[45:], divergence, radius=100.0 / 15)
    close(rows.value[3], last.value, 1e-13)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi2"])
def test_derivative_in_rho(divergence):
    losses, reference = tensor(problems.HARD["normal"]), tensor(problems.HARD["exponential"])
    rho = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    risk = drrho_risk(losses, reference, divergence, rho=rho)
    (by_rho,) = torch.autograd.grad(risk.value, rho)
    close(by_rho, risk.strength.detach() / 60, 1e-12 * risk.strength.item())


@pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi2"])
def test_learnable_samples_gain_weight(divergence):
    # Equal target losses: the sample that the reference finds easiest is the one most worth learning.
    losses, reference = torch.full((4,), 2.0, dtype=torch.float64), tensor([1.9, 0.1, 1.0, 2.5])
    weights = drrho_risk(losses, reference, divergence, rho=1.0).weights
    assert weights.argsort(descending=True).tolist() == [1, 2, 0, 3]
