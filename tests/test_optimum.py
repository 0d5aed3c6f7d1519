"""Derivatives of the exact risks: the envelope gradient, its derivative, and those in radius and strength.

Rows are generic (no ties, no sample on the edge of a support), where the value is twice differentiable; at
ties and at the hard maximum only the canonical subgradient, the returned weights, is asked for.
"""

import oracles
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from drrho import KL, ChiSquare, CressieRead, CVaR, constrained_risk, hybrid_risk, penalized_risk

BALLS = {"kl": KL(), "chi2": ChiSquare()}
CHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}
every_ball = pytest.mark.parametrize("name", BALLS)


def generic(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).requires_grad_()


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# The small radii keep every chi-square weight positive, the large ones drop samples.
@pytest.mark.slow
@every_ball
@pytest.mark.parametrize("radius", [1e-6, 1e-2, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(5,), (2, 4)])
def test_ball_value_and_weights(name, radius, shape):
    def value(z):
        return constrained_risk(z, BALLS[name], radius).value

    def weights(z):
        return constrained_risk(z, BALLS[name], radius).weights

    losses = generic(*shape)
    assert gradcheck(value, losses, **CHECK)
    assert gradgradcheck(value, losses, **CHECK)
    assert gradcheck(weights, losses, **CHECK)


@pytest.mark.slow
@every_ball
@pytest.mark.parametrize("strength", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(5,), (2, 4)])
def test_penalized_value_and_weights(name, strength, shape):
    def value(z):
        return penalized_risk(z, BALLS[name], strength).value

    def weights(z):
        return penalized_risk(z, BALLS[name], strength).weights

    losses = generic(*shape)
    assert gradcheck(value, losses, **CHECK)
    assert gradgradcheck(value, losses, **CHECK)
    assert gradcheck(weights, losses, **CHECK)


@pytest.mark.parametrize("alpha", [0.1, 0.37, 0.5, 1.0])
def test_cvar_value(alpha):
    def value(z):
        return constrained_risk(z, CVaR(alpha)).value

    assert gradcheck(value, generic(2, 5), **CHECK)


@every_ball
def test_ball_value_in_losses_and_radius(name):
    def value(z, radius):
        return constrained_risk(z, BALLS[name], radius).value

    losses, radius = generic(3, 5), parameter([0.01, 0.2, 0.7])
    assert gradcheck(value, (losses, radius), **CHECK)
    assert gradgradcheck(value, (losses, radius), **CHECK)


@every_ball
def test_penalized_value_in_losses_and_strength(name):
    def value(z, strength):
        return penalized_risk(z, BALLS[name], strength).value

    losses, strength = generic(3, 5), parameter([0.2, 1.0, 8.0])
    assert gradcheck(value, (losses, strength), **CHECK)
    assert gradgradcheck(value, (losses, strength), **CHECK)


@pytest.mark.slow
@every_ball
@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(losses=problems.rows(), radius=problems.radii(-10, 2), upstream=st.sampled_from([1.0, -3.0]))
def test_gradient_is_the_weights_also_at_ties(name, losses, radius, upstream):
    z, r = tensor(losses).requires_grad_(), parameter(radius)
    risk = constrained_risk(z, BALLS[name], r)
    by_losses, by_radius = grad(risk.value * upstream, (z, r))
    assert torch.allclose(by_losses, upstream * risk.weights, rtol=1e-12, atol=1e-14)
    if min(losses) < max(losses):
        assert torch.allclose(by_radius, upstream * risk.strength, rtol=1e-12, atol=0.0)
    else:
        assert by_radius == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.35, 1.0])
@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(losses=problems.rows())
def test_gradient_of_cvar_is_its_weights(alpha, losses):
    z = tensor(losses).requires_grad_()
    risk = constrained_risk(z, CVaR(alpha))
    assert torch.allclose(grad(risk.value, z)[0], risk.weights, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@every_ball
@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(losses=problems.rows(), strength=problems.radii(-2, 3))
def test_penalized_gradient_is_the_weights_and_minus_the_divergence(name, losses, strength):
    z, lam = tensor(losses).requires_grad_(), parameter(strength)
    risk = penalized_risk(z, BALLS[name], lam)
    by_losses, by_strength = grad(risk.value, (z, lam))
    assert torch.allclose(by_losses, risk.weights, rtol=1e-12, atol=1e-14)
    reached = oracles.divergence(name, risk.weights.tolist())
    assert abs(by_strength.item() + reached) <= 1e-9 * reached + 1e-15


@every_ball
@pytest.mark.parametrize("radius", [1e-8, 1e-3, 0.4])
def test_strength_is_the_derivative_in_the_radius(name, radius):
    losses = generic(20).detach()
    step = radius * 1e-4
    high, low = (constrained_risk(losses, BALLS[name], radius + s).premium.item() for s in (step, -step))
    expected = (high - low) / (2 * step)
    assert abs(constrained_risk(losses, BALLS[name], radius).strength.item() - expected) <= 1e-6 * expected


@every_ball
@pytest.mark.parametrize("losses", [[3.0], [2.0, 2.0], [1.0, 1.0, -4.0], [0.0, -1.0]])
@pytest.mark.parametrize("radius", [0.0, 1e-300, 100.0])
def test_first_and_second_derivatives_stay_finite_in_degenerate_rows(name, losses, radius):
    z = tensor(losses).requires_grad_()
    risk = constrained_risk(z, BALLS[name], radius)
    (first,) = grad(risk.value, z, create_graph=True)
    assert torch.allclose(first, risk.weights, rtol=1e-12, atol=1e-14)
    if first.requires_grad:
        (second,) = grad(first @ torch.arange(1.0, len(losses) + 1, dtype=torch.float64), z, allow_unused=True)
        assert second is None or torch.isfinite(second).all()


@every_ball
def test_derivative_in_the_radius_is_zero_at_the_maximum(name):
    radius = parameter(100.0)
    risk = constrained_risk(tensor([1.0, 1.0, -4.0]), BALLS[name], radius)
    assert grad(risk.value, radius)[0] == 0.0


@every_ball
def test_a_degenerate_row_does_not_spoil_its_neighbours(name):
    losses = generic(4, 5).detach()
    losses[1] = 2.0
    losses[2, :2] = 7.0
    alone = losses[3].clone().requires_grad_()
    losses.requires_grad_()
    radius = torch.tensor([0.0, 0.3, 50.0, 0.3], dtype=torch.float64)
    direction = torch.arange(5.0, dtype=torch.float64)

    def second(value, z):
        (first,) = grad(value, z, create_graph=True)
        return grad((first * direction).sum(), z)[0]

    together = second(constrained_risk(losses, BALLS[name], radius).value.sum(), losses)
    assert torch.isfinite(together).all()
    expected = second(constrained_risk(alone, BALLS[name], 0.3).value, alone)
    assert torch.allclose(together[3], expected, rtol=1e-9, atol=1e-12)


@every_ball
@pytest.mark.parametrize("scale", [1e-8, 1e8, 1e-100])
def test_second_derivative_scales_inversely_with_the_losses(name, scale):
    losses = generic(6).detach()
    direction = torch.arange(6.0, dtype=torch.float64)

    def second(factor):
        z = (losses * factor).requires_grad_()
        (first,) = grad(constrained_risk(z, BALLS[name], 0.2).value, z, create_graph=True)
        return grad(first @ direction, z)[0] * factor

    assert torch.allclose(second(scale), second(1.0), rtol=1e-8, atol=1e-10)


@every_ball
def test_batch_gradient_is_the_weights_of_each_row(name):
    losses, radius = generic(2, 3, 6), parameter([[0.1], [0.6]])
    risk = constrained_risk(losses, BALLS[name], radius)
    upstream = torch.arange(1.0, 7, dtype=torch.float64).reshape(2, 3)
    by_losses, by_radius = grad((risk.value * upstream).sum(), (losses, radius))
    assert torch.allclose(by_losses, upstream[..., None] * risk.weights, rtol=1e-12, atol=1e-14)
    assert by_radius.shape == radius.shape
    assert torch.allclose(by_radius, (upstream * risk.strength).sum(-1, keepdim=True), rtol=1e-12)


@every_ball
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_the_losses(name, dtype):
    losses = generic(8).detach().to(dtype).requires_grad_()
    for risk in (constrained_risk(losses, BALLS[name], 0.2), penalized_risk(losses, BALLS[name], 0.7)):
        (gradient,) = grad(risk.value, losses)
        assert gradient.dtype == dtype
        assert torch.allclose(gradient.float(), risk.weights.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)], ids=["kl", "chi2", "cvar"])
def test_a_model_can_be_trained_on_the_value(divergence):
    features = generic(30, 3, seed=1).detach()
    targets = features @ tensor([1.0, -2.0, 0.5])
    parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameters], lr=0.02)
    history = []
    for _ in range(60):
        value = constrained_risk(
            (features @ parameters - targets) ** 2, divergence, 0.0 if divergence == CVaR(0.3) else 0.2
        ).value
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert history[-1] < 0.05 * history[0]


# --- float32 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40,), (3, 40)])
@pytest.mark.parametrize("kind", ["ball", "penalty", "hybrid"])
@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CressieRead(1.5)], ids=["kl", "chi2", "order 1.5"])
def test_derivatives_in_float32_are_those_of_the_same_losses_in_float64(divergence, kind, shape):
    narrow = torch.randn(shape, generator=torch.Generator().manual_seed(4))

    def derivatives(dtype):
        z = narrow.to(dtype, copy=True).requires_grad_()
        radius, strength = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.2, 0.7))
        parameters = {"ball": (radius,), "penalty": (strength,), "hybrid": (radius, strength)}[kind]
        solve = {"ball": constrained_risk, "penalty": penalized_risk, "hybrid": hybrid_risk}[kind]
        risk = solve(z, divergence, *parameters)
        assert risk.value.dtype == risk.weights.dtype == dtype
        inputs = (z, *parameters)
        only = torch.autograd.grad(solve(z, divergence, *(p.detach() for p in parameters)).value.sum(), z)
        first = torch.autograd.grad(risk.value.sum(), inputs, create_graph=True)
        mixed = torch.autograd.grad(
            (risk.weights * z.detach().sin()).sum() + risk.threshold.sum(), z, retain_graph=True
        )
        direction = narrow.to(dtype).cos()
        second = torch.autograd.grad((first[0] * direction).sum() + first[1].sum(), inputs, allow_unused=True)
        return [*only, *first, *mixed, *second]

    for found, expected in zip(derivatives(torch.float32), derivatives(torch.float64), strict=True):
        if expected is None:
            assert found is None
            continue
        scale = expected.abs().max().item() + 1e-3
        assert (found.double() - expected.double()).abs().max().item() <= 2e-6 * scale


def test_weights_that_were_changed_are_no_gradient():
    losses = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    risk = constrained_risk(losses, KL(), 0.1)
    with torch.no_grad():
        risk.weights.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        risk.value.backward()
