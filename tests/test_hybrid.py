"""The hybrid of ball and penalty: sup <p, z> - strength D(p) subject to D(p) <= radius.

Its solution is the penalty's where that lies inside the ball, else the ball's; its dual is
min over tau >= strength of Pen_tau(z) + (tau - strength) radius (Yang, opt4ml.org, section 6.5; Levy et al. 2020).
"""

import math

import numpy as np
import oracles
import problems
import pytest
import torch
from families import EVERY, KINDS, SMOOTH, SMOOTH_KINDS, thorough, thorough_items
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import scale_of, tensor, value_tolerance
from scipy.optimize import minimize_scalar
from torch.autograd import grad, gradcheck, gradgradcheck

from drrho import KL, ChiSquare, CVaR, constrained_risk, hybrid_risk, penalized_risk

EPS = 2.0**-52
CHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}
every_kind = pytest.mark.parametrize("name", thorough(KINDS))
every_smooth = pytest.mark.parametrize("name", thorough(SMOOTH_KINDS))
SHORT = {
    name: problems.HARD[name][:24]
    for name in ("pair", "exponential", "tied maxima", "two values", "one low", "offset -1e8", "scale 1e-150")
}
every_short_row = pytest.mark.parametrize("losses", thorough_items(SHORT, "exponential", "tied maxima"))


def law(examples=25):
    """A deterministic hypothesis test."""
    return settings(derandomize=True, deadline=None, max_examples=examples, database=None)


def close(actual, expected, tolerance):
    __tracebackhide__ = True
    assert np.all(np.abs(np.asarray(actual) - np.asarray(expected)) <= np.asarray(tolerance)), (
        f"{actual} differs from {expected} by more than {tolerance}"
    )


def hybrid(name, losses, radius, strength):
    return hybrid_risk(tensor(losses), EVERY[name], radius, strength)


def reached(name, weights):
    phi = oracles.total_variation_phi if name == "tv" else SMOOTH[name].phi
    return oracles.divergence(phi, weights.tolist())


@every_smooth
@every_short_row
def test_it_is_the_penalty_inside_the_ball_and_the_ball_outside(losses, name):
    spread = losses.max() - losses.min()
    for relative_strength in (0.1, 1.0):
        strength = relative_strength * spread
        penalized = penalized_risk(tensor(losses), EVERY[name], strength)
        inside = reached(name, penalized.weights)
        wide = hybrid(name, losses, inside * (1 + 1e-6) + 1e-12, strength)
        close(wide.value, penalized.value, value_tolerance(losses))
        close(wide.premium, penalized.premium, 1e-11 * penalized.premium)
        close(wide.weights, penalized.weights, 1e-11)
        assert wide.strength == strength
        tight = inside / 2
        narrow, constrained = (
            hybrid(name, losses, tight, strength),
            constrained_risk(tensor(losses), EVERY[name], tight),
        )
        close(narrow.value, constrained.value - strength * tight, value_tolerance(losses))
        close(narrow.weights, constrained.weights, 1e-11)
        assert narrow.strength > strength
        close(narrow.strength, constrained.strength, 1e-8 * constrained.strength)
        premium = constrained.premium - strength * tight
        close(narrow.premium, premium, 1e-11 * constrained.premium)
        assert abs(narrow.gap) <= value_tolerance(losses)
        assert abs(wide.gap) <= value_tolerance(losses)


@every_kind
@law(12)
@given(losses=problems.rows(), radius=problems.radii(-8, 1), strength=problems.radii(-2, 4))
def test_on_drawn_rows(name, losses, radius, strength):
    if name == "cvar":
        return
    risk = hybrid(name, losses, radius, strength)
    assert reached(name, risk.weights) <= radius * (1 + 1e-9) + 1e-15
    assert abs(risk.gap) <= value_tolerance(losses)
    assert risk.strength >= strength or min(losses) == max(losses)
    penalized = penalized_risk(tensor(losses), EVERY[name], strength)
    constrained = constrained_risk(tensor(losses), EVERY[name], radius)
    tolerance = value_tolerance(losses) + 1e-12 * strength * radius
    # Strictly below its two relaxations, and above the ball's weights, which are feasible.
    assert risk.value <= penalized.value + tolerance
    assert risk.value <= constrained.value + tolerance
    assert risk.value >= constrained.value - strength * radius - tolerance
    if reached(name, penalized.weights) <= radius * (1 - 1e-9):
        close(risk.value, penalized.value, tolerance)
    elif reached(name, penalized.weights) > radius * (1 + 1e-9) + 1e-15:
        close(risk.value, constrained.value - strength * radius, tolerance)


ORACLES = {
    "kl": (oracles.kl_ball, oracles.kl_penalty),
    "chi2": (oracles.chi_square_ball, oracles.chi_square_penalty),
    "order 0.5": (lambda z, r: oracles.power_ball(z, r, 0.5), lambda z, s: oracles.power_penalty(z, s, 0.5)),
    "order -1": (lambda z, r: oracles.power_ball(z, r, -1.0), lambda z, s: oracles.power_penalty(z, s, -1.0)),
    "capped kl 0.3": (
        lambda z, r: oracles.capped_kl_ball(z, r, 0.3),
        lambda z, s: oracles.capped_kl_penalty(z, s, 0.3),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
@law(20)
@given(losses=problems.rows(varied=True), radius=problems.radii(-6, 0.5), strength=problems.radii(-1, 3))
def test_against_the_oracles(name, losses, radius, strength):
    ball, penalty = ORACLES[name]
    expected, price = penalty(losses, strength), 0.0
    if reached(name, np.asarray(expected.weights) * (1 - 1e-16)) > radius:
        expected, price = ball(losses, radius), strength * radius
    risk = hybrid(name, losses, radius, strength)
    close(risk.value, expected.value - price, value_tolerance(losses) + EPS * price)
    close(risk.premium, expected.premium - price, 1e-11 * expected.premium)
    close(risk.weights, expected.weights, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "chi2", "order 0.5", "tv", "capped kl 0.3", "jensen-shannon"])
@pytest.mark.parametrize("radius, strength", [(0.05, 0.2), (0.05, 50.0), (0.4, 0.1), (0.6, 2.0)])
def test_value_is_the_minimum_of_its_scalar_dual(name, radius, strength):
    losses = problems.HARD["exponential"]

    def objective(tau):
        return penalized_risk(tensor(losses), EVERY[name], tau).value.item() + (tau - strength) * radius

    spread = losses.max() - losses.min()
    # The minimum lies below spread / radius: there the price alone exceeds the range.
    best = minimize_scalar(
        objective, bounds=(strength, strength + spread / radius), method="bounded", options={"xatol": 1e-9}
    )
    least = min(best.fun, objective(strength))
    risk = hybrid(name, losses, radius, strength)
    assert risk.value <= least + value_tolerance(losses)
    # A minimizer known to 1e-9 of its range, times a slope that vanishes there (for TV: at most one).
    close(risk.value, least, value_tolerance(losses) + (2e-8 * spread if name == "tv" else 1e-10 * spread))
    close(objective(risk.strength.item()), risk.value, value_tolerance(losses) + (1e-9 * spread if name == "tv" else 0))


@every_kind
@every_short_row
def test_without_strength_it_is_the_ball(losses, name):
    risk, constrained = hybrid(name, losses, 0.1, 0.0), constrained_risk(tensor(losses), EVERY[name], 0.1)
    close(risk.value, constrained.value, value_tolerance(losses))
    close(risk.premium, constrained.premium, 1e-11 * constrained.premium)
    close(risk.weights, constrained.weights, 1e-11)


@every_kind
@every_short_row
def test_without_radius_it_is_the_mean(losses, name):
    if name == "cvar":
        pytest.skip("has no radius")
    risk = hybrid(name, losses, 0.0, 0.5)
    close(risk.value, losses.mean(), value_tolerance(losses))
    close(risk.weights, 1 / len(losses), 1e-13)
    assert risk.premium == 0.0
    assert not torch.stack([risk.threshold, risk.strength, risk.gap]).isnan().any()


@every_kind
@pytest.mark.parametrize("n", [1, 2, 7])
def test_constant_losses(n, name):
    risk = hybrid_risk(torch.full((n,), -3.25, dtype=torch.float64), EVERY[name], 0.1, 0.5)
    assert risk.value == -3.25
    assert risk.premium == 0.0
    close(risk.weights, 1 / n, 1e-15)
    assert not torch.stack([risk.threshold, risk.strength, risk.gap]).isnan().any()


@pytest.mark.parametrize("alpha", [0.05, 0.35, 1.0])
def test_radius_and_strength_have_no_effect_on_cvar(alpha):
    losses = tensor(problems.HARD["normal"])
    risk, tail = hybrid_risk(losses, CVaR(alpha), 0.1, 0.7), constrained_risk(losses, CVaR(alpha))
    close(risk.value, tail.value, value_tolerance(losses))
    close(risk.weights, tail.weights, 1e-13)


@every_kind
@law(12)
@given(losses=problems.rows(), shift=st.sampled_from([-(2**30), 1, 10**6]), exponent=st.sampled_from([-40, 3, 40]))
def test_shift_and_scale(name, losses, shift, exponent):
    factor = 2.0**exponent
    plain = hybrid(name, losses, 0.1, 1.5)
    moved = hybrid_risk(tensor(losses) + shift, EVERY[name], 0.1, 1.5)
    close(moved.value, plain.value + shift, value_tolerance(losses) + 1e-12 * abs(shift))
    close(moved.weights, plain.weights, 1e-10)
    scaled = hybrid_risk(tensor(losses) * factor, EVERY[name], 0.1, 1.5 * factor)
    close(scaled.value / factor, plain.value, value_tolerance(losses))
    close(scaled.weights, plain.weights, 1e-10)


@every_kind
def test_batch_is_its_rows(name):
    generator = torch.Generator().manual_seed(3)
    losses = torch.randn(2, 3, 9, dtype=torch.float64, generator=generator)
    losses[0, 1] = 4.0
    radius, strength = tensor([[1e-6], [0.3]]), tensor([0.05, 1.0, 30.0])
    batch = hybrid_risk(losses, EVERY[name], radius, strength)
    for i, j in np.ndindex(2, 3):
        row = hybrid_risk(losses[i, j], EVERY[name], radius[i].item(), strength[j].item())
        close(batch.value[i, j], row.value, value_tolerance(losses[i, j]))
        close(batch.weights[i, j], row.weights, 1e-11)
        close(batch.strength[i, j], row.strength, 1e-8 * row.strength)


# --- derivatives ------------------------------------------------------------------------------------------------


def generic(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def parameter(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# Row by row: the ball binds, the penalty decides.
@pytest.mark.slow
@every_smooth
def test_value_in_losses_radius_and_strength(name):
    losses, radius, strength = generic(2, 4), parameter([0.1, 0.5]), parameter([0.05, 9.0])

    def value(z, r, lam):
        return hybrid_risk(z, EVERY[name], r, lam).value

    risk = hybrid_risk(losses, EVERY[name], radius, strength)
    assert (risk.strength > strength).tolist() == [True, False]
    assert gradcheck(value, (losses, radius, strength), **CHECK)
    assert gradgradcheck(value, (losses, radius, strength), **CHECK)


@every_smooth
def test_weights_in_losses(name):
    losses, radius, strength = generic(2, 5), tensor([0.02, 0.5]), tensor([0.1, 9.0])
    assert gradcheck(lambda z: hybrid_risk(z, EVERY[name], radius, strength).weights, losses, **CHECK)


@every_smooth
@law(12)
@given(losses=problems.rows(varied=True), radius=problems.radii(-6, 0.5), strength=problems.radii(-1, 3))
def test_gradient_is_weights_multiplier_and_minus_the_divergence(name, losses, radius, strength):
    z, r, lam = tensor(losses).requires_grad_(), parameter(radius), parameter(strength)
    risk = hybrid_risk(z, EVERY[name], r, lam)
    by_losses, by_radius, by_strength = grad(risk.value, (z, r, lam))
    assert torch.allclose(by_losses, risk.weights, rtol=1e-12, atol=1e-14)
    close(by_radius, risk.strength.item() - strength, 1e-12 * risk.strength.item())
    divergence = reached(name, risk.weights)
    close(by_strength, -divergence, 1e-9 * divergence + 1e-15)


@pytest.mark.parametrize("name", ["kl", "chi2", "order 0.5"])
def test_premium_has_the_gradient_of_value_less_mean(name):
    losses = generic(6)
    for radius, strength in ((0.02, 0.1), (0.5, 9.0)):
        risk = hybrid_risk(losses, EVERY[name], radius, strength)
        (gradient,) = grad(risk.premium, losses)
        close(gradient, risk.weights.detach() - 1 / 6, 1e-14)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [KL(), ChiSquare()], ids=["kl", "chi2"])
def test_bad_parameters_are_refused_by_name(divergence):
    losses = tensor([0.5, -1.0, 2.0])
    for bad in (-0.25, math.nan):
        with pytest.raises(ValueError, match="radius") as caught:
            hybrid_risk(losses, divergence, bad, 1.0)
        assert str(bad) in str(caught.value)
        with pytest.raises(ValueError, match="strength") as caught:
            hybrid_risk(losses, divergence, 0.1, bad)
        assert str(bad) in str(caught.value)
    with pytest.raises(ValueError, match="strength"):
        hybrid_risk(losses, divergence, 0.1, math.inf)
    with pytest.raises(ValueError, match="losses"):
        hybrid_risk(tensor([math.nan, 1.0]), divergence, 0.1, 1.0)
    with pytest.raises(ValueError, match="strength"):
        hybrid_risk(torch.zeros(2, 3), divergence, 0.1, torch.ones(3))


def test_scale_of_results_is_the_scale_of_the_losses():
    for name in ("scale 1e-150", "scale 1e150"):
        losses = problems.HARD[name]
        spread = losses.max() - losses.min()
        risk, unit = (hybrid_risk(tensor(losses / by), KL(), 0.1, 0.2 * spread / by) for by in (1.0, spread))
        close(risk.value / spread, unit.value, 1e-12 * scale_of(losses / spread))
