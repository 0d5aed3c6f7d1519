"""Inputs on which published phi-divergence software gives a wrong number, NaN or an exception, each by name.

The failures were measured on fast-dro (an absolute tolerance, nonnegative losses assumed), skfolio's EVaR and
sqwash's superquantiles; rows are 1000 exponential losses unless a test says otherwise.
"""

import math

import numpy as np
import oracles
import pytest
import torch
from problems import tensor, value_tolerance

from drrho import KL, ChiSquare, CressieRead, CVaR, Divergence, constrained_risk, drrho_risk, penalized_risk

BALLS = {"kl": (KL(), oracles.kl_ball), "chi2": (ChiSquare(), oracles.chi_square_ball)}
every_ball = pytest.mark.parametrize("name", BALLS)


def exponential(n=1000, seed=0):
    return np.random.default_rng(seed).exponential(size=n)


def close(actual, expected, tolerance):
    __tracebackhide__ = True
    assert abs(float(actual) - float(expected)) <= tolerance, f"{float(actual)} is not {float(expected)}"


@pytest.mark.parametrize("n, rho", [(1_000, 1.0), (10_000, 1.0), (100_000, 10.0), (100_000, 1e-3)])
def test_whole_premium_is_captured_at_radius_rho_over_n(n, rho):
    losses = exponential(n)
    sd, below = losses.std(), losses.mean() - losses.min()
    root = math.sqrt(2 * rho / n)
    assert root < sd / below  # every weight positive, so that the premium is the variance term exactly
    risk = drrho_risk(tensor(losses), torch.zeros(n, dtype=torch.float64), ChiSquare(), rho=rho)
    close(risk.premium, root * sd, 1e-11 * root * sd)
    close(risk.value, losses.mean() + root * sd, value_tolerance(losses))


@pytest.mark.slow
@every_ball
def test_radius_of_1e_8_is_not_lost_in_a_tolerance(name):
    losses, radius = exponential(), 1e-8
    divergence, oracle = BALLS[name]
    risk = constrained_risk(tensor(losses), divergence, radius)
    expected = oracle(losses.tolist(), radius)
    close(risk.premium, expected.premium, 1e-11 * expected.premium)
    close(oracles.divergence(name, risk.weights.tolist()), radius, 1e-9 * radius)


@every_ball
def test_all_losses_negative(name):
    losses = exponential()
    shift = losses.max() + 1.0
    positive = constrained_risk(tensor(losses), BALLS[name][0], 1.0)
    negative = constrained_risk(tensor(losses - shift), BALLS[name][0], 1.0)
    close(negative.value, positive.value.item() - shift, 1e-12 * 4 * shift)
    assert negative.value > (losses - shift).mean() + 0.5


@every_ball
def test_maximum_exactly_zero(name):
    losses = -exponential()
    losses[17] = 0.0
    risk = constrained_risk(tensor(losses), BALLS[name][0], 1.0)
    lifted = constrained_risk(tensor(losses + 32.0), BALLS[name][0], 1.0)
    close(risk.value, lifted.value.item() - 32.0, 1e-12 * 100)
    assert losses.mean() + 0.3 < risk.value < 0.0


@every_ball
@pytest.mark.parametrize("offset", [2.0**20, -(2.0**20), 1e6])
def test_large_offset_keeps_the_premium(name, offset):
    losses = np.round(exponential() * 2**20) / 2**20 + offset
    assert len(np.unique(losses)) > 900
    for radius in (1e-3, 1.0):
        still = constrained_risk(tensor(losses - offset), BALLS[name][0], radius)
        moved = constrained_risk(tensor(losses), BALLS[name][0], radius)
        close(moved.premium, still.premium, 1e-11 * still.premium.item())


@every_ball
@pytest.mark.parametrize("scale", [1e4, 1e-8])
def test_scale_of_the_losses_does_not_matter(name, scale):
    losses = exponential()
    plain = constrained_risk(tensor(losses), BALLS[name][0], 1e-2)
    scaled = constrained_risk(tensor(losses * scale), BALLS[name][0], 1e-2)
    close(scaled.value / scale, plain.value, value_tolerance(losses))
    close(scaled.premium / scale, plain.premium, 1e-11 * plain.premium.item())


@every_ball
def test_float32_with_an_offset_of_1e4(name):
    losses = tensor(exponential() + 1e4, torch.float32)
    single = constrained_risk(losses, BALLS[name][0], 0.1)
    double = constrained_risk(losses.double(), BALLS[name][0], 0.1)
    assert single.value == double.value.float()
    close(single.premium, double.premium, 1e-6 * double.premium.item())


@every_ball
@pytest.mark.parametrize("radius", [500.0, 1e4, 1e300])
def test_radius_beyond_the_maximal_one(name, radius):
    losses = exponential()
    risk = constrained_risk(tensor(losses), BALLS[name][0], radius)
    assert risk.value == losses.max()
    assert risk.weights.argmax() == losses.argmax()
    assert risk.weights.max() == 1.0
    assert risk.strength == 0.0


@pytest.mark.slow
@every_ball
@pytest.mark.parametrize("radius", [2.2, 4.4, 4.6, 1e3])
def test_tenth_of_the_losses_tied_at_the_maximum(name, radius):
    losses = exponential()
    losses[::10] = 9.0
    risk = constrained_risk(tensor(losses), BALLS[name][0], radius)
    expected = BALLS[name][1](losses.tolist(), radius)
    close(risk.value, expected.value, value_tolerance(losses))
    tied = risk.weights[::10]
    assert torch.all(tied == tied[0])
    close(risk.weights.sum(), 1.0, 1e-12)


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)], ids=["kl", "chi2", "cvar"])
@pytest.mark.parametrize("loss", [5.0, 0.0, -5.0])
def test_single_loss(divergence, loss):
    risks = [constrained_risk(tensor([loss]), divergence, 0.0)]
    if not isinstance(divergence, CVaR):
        risks += [
            constrained_risk(tensor([loss]), divergence, 0.5),
            penalized_risk(tensor([loss]), divergence, 0.5),
        ]
    for risk in risks:
        assert risk.value == loss
        assert risk.weights.tolist() == [1.0]
        assert risk.premium == 0.0


@pytest.mark.slow
@every_ball
@pytest.mark.parametrize(
    "losses, plateau",
    [([0.0, -2.0, 1 / 64], 3 / 2), ([0.0, 0.0, 0.0, 1 / 64, -211 / 64], 5 / 4), ([0.0, -1.0, 1e-6, -1.0], 2)],
)
def test_close_losses_at_the_top_above_a_distant_one(name, losses, plateau):
    # Leaving out the distant loss costs one radius, over a wide interval of temperatures; past it, a search that
    # trusts slopes meets rounding noise.
    kl, chi2 = math.log(plateau), (plateau - 1) / 2
    for excess in (0.5, 0.9, 1.1, 1.5, 2.3):
        radius = {"kl": kl, "chi2": chi2}[name] * excess
        risk = constrained_risk(tensor(losses), BALLS[name][0], radius)
        expected = BALLS[name][1](losses, radius)
        close(risk.value, expected.value, value_tolerance(losses))
        assert np.allclose(risk.weights, expected.weights, rtol=0, atol=1e-10)


def test_cvar_boundary_sample_takes_its_fraction():
    risk = constrained_risk(tensor([3.0, 1.0, 4.0, 2.0]), CVaR(0.4))
    assert np.allclose(risk.weights, [0.6 / 1.6, 0.0, 1 / 1.6, 0.0], rtol=1e-14, atol=0)
    close(risk.value, (4 + 0.6 * 3) / 1.6, 1e-14)


def test_cvar_boundary_ties_share_the_fraction():
    risk = constrained_risk(tensor([3.0, 3.0, 4.0, 3.0, 0.0]), CVaR(0.5))
    assert np.allclose(risk.weights, [0.2, 0.2, 0.4, 0.2, 0.0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("alpha", [1e-12, 1e-4, 0.000999, 0.001])
def test_cvar_of_less_than_one_sample_is_the_maximum(alpha):
    losses = exponential() - 3
    risk = constrained_risk(tensor(losses), CVaR(alpha))
    assert risk.value == losses.max()
    assert risk.weights[losses.argmax()] == 1.0


def test_cvar_of_everything_is_the_mean():
    losses = exponential() - 3
    risk = constrained_risk(tensor(losses), CVaR(1.0))
    close(risk.value, losses.mean(), 1e-14 * 10)
    assert np.allclose(risk.weights, 1e-3, rtol=1e-14, atol=0)
    assert risk.premium == 0.0


@every_ball
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_penalized_weights_sum_to_one_at_an_offset_of_1e4(name, dtype):
    losses = tensor(exponential() + 1e4, dtype)
    for strength in (1e-2, 1.0, 100.0):
        risk = penalized_risk(losses, BALLS[name][0], strength)
        close(risk.weights.double().sum(), 1.0, 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_weights_do_not_vanish_at_strength_1e_3(dtype):
    losses = tensor(exponential() - 3, dtype)
    risk = penalized_risk(losses, KL(), 1e-3)
    close(risk.weights.sum(), 1.0, 2e-6)
    expected = oracles.kl_penalty(losses.double().tolist(), 1e-3)
    close(risk.value, expected.value, value_tolerance(losses, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("losses", [[800.0, 0.0, 900.0], [-800.0, -900.0, -1000.0]])
def test_kl_penalty_does_not_overflow_without_a_shift(losses, dtype):
    risk = penalized_risk(torch.tensor(losses, dtype=dtype), KL(), 1.0)
    close(risk.value, max(torch.tensor(losses, dtype=dtype).double()) - math.log(3), 2e-6 * 2000)
    assert risk.weights.argmax() == np.argmax(losses)
    assert torch.isfinite(risk.weights).all()


@pytest.mark.slow
def test_radius_far_below_what_a_conic_solver_resolves():
    losses = exponential(200)
    for radius in (1e-12, 1e-8, 1e-5):
        for divergence, oracle in BALLS.values():
            expected = oracle(losses.tolist(), radius)
            close(
                constrained_risk(tensor(losses), divergence, radius).premium,
                expected.premium,
                1e-11 * expected.premium,
            )


@pytest.mark.parametrize(
    "order, share, strength", [(-50, 1e-8, 0.1), (-12, 1e-24, 0.1), (0, 1e-300, 0.1), (-1, 1e-300, 0.1)]
)
def test_a_penalty_below_order_zero_where_the_maximum_has_hardly_any_weight(order, share, strength):
    """Against the concave maximum over the weight of the larger loss; it was minus infinity, with an infinite gap."""
    from scipy.optimize import minimize_scalar

    def phi(t):
        if order == 0:
            return t - 1 - math.log(t)
        return (math.exp(order * math.log(t)) - order * t + order - 1) / (order * (order - 1))

    def value(x):
        return x - strength * ((1 - share) * phi((1 - x) / (1 - share)) + share * phi(x / share))

    best = minimize_scalar(lambda x: -value(x), bounds=(1e-6, 0.999), method="bounded", options={"xatol": 1e-12})
    risk = penalized_risk([0.0, 1.0], CressieRead(order), strength, base_weights=[1 - share, share])
    close(risk.value, -best.fun, 1e-10)
    assert abs(risk.gap) <= 1e-10


def test_the_maximum_without_a_price_is_refused_where_phi_is_infinite_there():
    class Bounded(Divergence):
        """(t - 1)^2 / 2 on [0, 1.5]."""

        def phi(self, t):
            return torch.where((t < 0) | (t > 1.5 * (1 + 1e-14)), torch.inf, (t - 1) ** 2 / 2)

        def conjugate_gradient(self, s):
            return (1 + s).clamp(0, 1.5)

        def conjugate(self, s):
            t = self.conjugate_gradient(s)
            return t * s - (t - 1) ** 2 / 2

    losses = [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"strength must be > 0 .* its phi is infinite at 4"):
        penalized_risk(losses, Bounded(), 0)
    close(penalized_risk(losses, Bounded(), 1e-12).value, 2.125, 1e-9)
    close(penalized_risk([1.0, 1.0, 3.0, 3.0, 3.0], Bounded(), 1e-12).value, 2.8, 1e-9)
    assert penalized_risk([2.0, 2.0], Bounded(), 0).value == 2
