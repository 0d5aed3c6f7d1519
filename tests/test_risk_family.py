"""Risks of the Cressie-Read family, total variation, capped KL and divergences a user wrote.

Against mpmath by bisection, and by certificate: for the returned weights and multipliers the primal and the dual
objective are evaluated in high precision; weak duality then proves the value, whatever found it. Sources: Cressie &
Read 1984; Ben-Tal et al. 2013; Levy et al. 2020 (capped KL); Duchi & Namkoong, arXiv 1610.02581 (expansion).
"""

import math

import mpmath as mp
import numpy as np
import oracles
import problems
import pytest
import torch
from families import CAPPED, EVERY, KINDS, ORDERS, SMOOTH, SMOOTH_KINDS, USERS, thorough, thorough_items
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import hard_cases, scale_of, tensor, value_tolerance

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk, penalized_risk

EPS = 2.0**-52
every_kind = pytest.mark.parametrize("name", thorough(KINDS))
every_smooth = pytest.mark.parametrize("name", thorough(SMOOTH))
every_smooth_kind = pytest.mark.parametrize("name", thorough(SMOOTH_KINDS))
every_order = pytest.mark.parametrize("order", thorough(ORDERS, [0.5]))
every_order_of_its_own = pytest.mark.parametrize(
    "order", thorough([order for order in ORDERS if order not in (1, 2)], [0.5])
)
VARIED = hard_cases(varied=True)
every_varied_row = pytest.mark.parametrize("losses", thorough_items(dict(VARIED), "tied maxima", "offset 1e8"))
# A dozen samples keep the character of a row and the bisections short.
SHORT = {
    name: np.concatenate([z[:4], z[4:][-8:]])
    for name, z in VARIED
    if name
    in (
        *("pair", "normal", "heavy tail", "tied maxima", "tied minima", "ties everywhere", "one high", "one low"),
        *("offset 1e6", "offset -1e8", "scale 1e-150", "geometric approach", "close pair at the top"),
    )
}
every_short_row = pytest.mark.parametrize("losses", thorough_items(SHORT, "tied maxima"))


def law(examples=25):
    """A deterministic hypothesis test."""
    return settings(derandomize=True, deadline=None, max_examples=examples, database=None)


def close(actual, expected, tolerance):
    __tracebackhide__ = True
    assert np.all(np.abs(np.asarray(actual) - np.asarray(expected)) <= np.asarray(tolerance)), (
        f"{actual} differs from {expected} by more than {tolerance}"
    )


def ball(name, losses, radius):
    return constrained_risk(tensor(losses), EVERY[name], radius)


def penalty(name, losses, strength):
    return penalized_risk(tensor(losses), EVERY[name], strength)


def ratios(risk):
    return risk.weights.numpy() * risk.weights.shape[-1]


def iterated_tolerance(losses):
    """Absolute tolerance on a value that an iteration found."""
    return 10 * value_tolerance(losses)


def accuracy(reached):
    """Relative accuracy promised of a premium at this divergence."""
    return 1e-11 if reached >= 1e-8 else 1e-9


def power_tolerance(ratio, order):
    """Tolerance on n p of order k: ratio^(k - 1) is what is computed, to a few roundings of its largest value."""
    if order <= 1:
        return 1e-10 * (1 + ratio)
    inner = ratio ** (order - 1)
    return (inner + 64 * EPS * inner.max()) ** (1 / (order - 1)) - ratio + 1e-10


def maximum(name, losses):
    """The radius from which on the ball is as good as none."""
    if name in CAPPED:
        weights = oracles.cvar(losses, EVERY[name].alpha).weights
        return oracles.divergence("kl", weights)
    return oracles.maximal_radius(SMOOTH[name].phi, losses)


def assert_certified(name, losses, risk, radius=None):
    """The weights are feasible and what they attain is within the promised accuracy of the dual bound."""
    __tracebackhide__ = True
    _, phi, conjugate, cap = SMOOTH[name]
    strength, threshold = risk.strength.item(), risk.threshold.item()
    proof = oracles.certify(phi, conjugate, losses, risk.weights.tolist(), strength, threshold, radius, cap=cap)
    reached = proof.divergence
    if radius is not None:
        assert reached <= radius * (1 + 1e-9) + 1e-15
        if radius < maximum(name, losses) * (1 - 1e-9):
            assert abs(reached - radius) <= 1e-9 * radius + 1e-15
    # A stored weight is rounded, by eps of itself.
    z = np.asarray(losses, dtype=float)
    rounding = 4 * EPS * np.abs(z - z.mean()).mean()
    tolerance = accuracy(reached if radius is None else radius) * proof.bound + 1e-300
    assert proof.bound - proof.primal <= tolerance + rounding
    close(risk.premium.item(), proof.bound, tolerance)
    close(risk.value.item(), z.mean() + proof.bound, iterated_tolerance(losses))
    # A plain formula of phi* has the rounding of a number near one, and the dual multiplies it by the strength.
    plain = 16 * EPS * strength if name in USERS else 0.0
    assert abs(risk.gap.item()) <= iterated_tolerance(losses) + plain


# --- certificates on every hard row -------------------------------------------------------------------------


@every_smooth
@every_short_row
def test_ball_is_certified(losses, name):
    radii = [1e-10, 1e-8, 1e-3, 0.5]
    batch = constrained_risk(tensor(losses).expand(len(radii), -1), EVERY[name], tensor(radii))
    for i, radius in enumerate(radii):
        assert_certified(name, losses.tolist(), type(batch)(*(field[i] for field in batch)), radius)


@every_smooth
@every_short_row
def test_penalty_is_certified(losses, name):
    spread = losses.max() - losses.min()
    strengths = [1e-2 * spread, 0.3 * spread, 5.0 * spread, 1e3 * spread]
    batch = penalized_risk(tensor(losses).expand(len(strengths), -1), EVERY[name], tensor(strengths))
    for i, strength in enumerate(strengths):
        risk = type(batch)(*(field[i] for field in batch))
        close(risk.strength, strength, 0.0)
        assert_certified(name, losses.tolist(), risk)


@pytest.mark.slow
@every_smooth_kind
@law(20)
@given(losses=problems.rows(varied=True), radius=problems.radii(-8, 1))
def test_ball_is_certified_on_drawn_rows(name, losses, radius):
    assert_certified(name, losses, ball(name, losses, radius), radius)


@every_smooth_kind
@law(15)
@given(losses=problems.rows(varied=True), strength=problems.radii(-2, 4))
def test_penalty_is_certified_on_drawn_rows(name, losses, strength):
    risk = penalty(name, losses, strength)
    assert risk.strength == strength
    assert_certified(name, losses, risk)


@pytest.mark.parametrize("name", ["kl", "chi2"])
@every_short_row
def test_named_balls_keep_their_digits_at_the_smallest_radii(losses, name):
    oracle = {"kl": oracles.kl_ball, "chi2": oracles.chi_square_ball}[name]
    for radius in (1e-14, 1e-11):
        expected = oracle(losses.tolist(), radius).premium
        close(ball(name, losses, radius).premium.item(), expected, 1e-11 * expected)


# --- bisection in mpmath ------------------------------------------------------------------------------------


def assert_agrees(risk, expected, losses, weight_tolerance, relative):
    __tracebackhide__ = True
    close(risk.value.item(), expected.value, iterated_tolerance(losses))
    close(risk.premium.item(), expected.premium, relative * expected.premium + 1e-300)
    close(ratios(risk), len(losses) * expected.weights, weight_tolerance)


@every_order_of_its_own
@pytest.mark.parametrize("radius", [1e-8, 1e-3, 0.3, 2.0])
@every_short_row
def test_power_ball(losses, radius, order):
    expected = oracles.power_ball(losses.tolist(), radius, order)
    risk = constrained_risk(tensor(losses), CressieRead(order), radius)
    assert_agrees(risk, expected, losses, power_tolerance(len(losses) * expected.weights, order), accuracy(radius))


@every_order_of_its_own
@pytest.mark.parametrize("relative_strength", [0.0, 1e-3, 0.1, 30.0])
@every_short_row
def test_power_penalty(losses, relative_strength, order):
    strength = relative_strength * (losses.max() - losses.min())
    expected = oracles.power_penalty(losses.tolist(), strength, order)
    risk = penalized_risk(tensor(losses), CressieRead(order), strength)
    assert_agrees(risk, expected, losses, power_tolerance(len(losses) * expected.weights, order), 1e-11)


@pytest.mark.slow
@every_order_of_its_own
@law(15)
@given(losses=problems.rows(), radius=problems.radii(-8, 1))
def test_power_ball_on_drawn_rows(order, losses, radius):
    expected = oracles.power_ball(losses, radius, order)
    risk = constrained_risk(tensor(losses), CressieRead(order), radius)
    assert_agrees(risk, expected, losses, power_tolerance(len(losses) * expected.weights, order), accuracy(radius))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", thorough([0.02, 0.3, 1.0], [0.3]))
@pytest.mark.parametrize("radius", [1e-8, 1e-3, 0.3, 2.0])
@every_short_row
def test_capped_kl_ball(losses, radius, alpha):
    expected = oracles.capped_kl_ball(losses.tolist(), radius, alpha)
    risk = constrained_risk(tensor(losses), CappedKL(alpha), radius)
    assert ratios(risk).max() <= 1 / alpha * (1 + 1e-12)
    assert_agrees(risk, expected, losses, 1e-10 * (1 + len(losses) * expected.weights), accuracy(radius))


# The threshold is known to a rounding error of the range: where the losses that are not capped lie much
# closer together than that, their exponents are as uncertain as their closeness is to it.
_unresolved = pytest.mark.xfail(strict=True, reason="an exponent relative to the mean loses a tight cluster's digits")


@pytest.mark.slow
@pytest.mark.parametrize("closeness", [1e-3, 1e-6, pytest.param(1e-8, marks=_unresolved)])
@pytest.mark.parametrize("radius", [0.52, 0.6, 0.8])
def test_capped_kl_ball_below_a_capped_loss_far_above(radius, closeness):
    # The top loss is at its cap, and the rest of the radius is spent among the close ones.
    losses = np.array([1.0, 4 * closeness, 3 * closeness, closeness, 0.0])
    expected = oracles.capped_kl_ball(losses.tolist(), radius, 0.3)
    risk = constrained_risk(tensor(losses), CappedKL(0.3), radius)
    assert ratios(risk).max() <= 1 / 0.3 * (1 + 1e-12)
    assert_agrees(risk, expected, losses, 1e-10 * (1 + 5 * expected.weights), 1e-11)


@pytest.mark.parametrize("alpha", thorough([0.02, 0.3, 1.0], [0.3]))
@pytest.mark.parametrize("relative_strength", [0.0, 1e-3, 0.1, 30.0])
@every_short_row
def test_capped_kl_penalty(losses, relative_strength, alpha):
    strength = relative_strength * (losses.max() - losses.min())
    expected = oracles.capped_kl_penalty(losses.tolist(), strength, alpha)
    risk = penalized_risk(tensor(losses), CappedKL(alpha), strength)
    exponents = 8 * EPS * (1 + 1 / relative_strength) if relative_strength else 0.0
    tolerance = 1e-10 + (1e-10 + exponents) * len(losses) * expected.weights
    assert_agrees(risk, expected, losses, tolerance, 1e-11)


@pytest.mark.parametrize("radius", [0.0, 1e-8, 1e-3, 0.025, 0.3, 0.5, 0.95, 0.975, 1.0, 3.0])
@every_varied_row
def test_total_variation_ball(losses, radius):
    expected = oracles.total_variation_ball(losses.tolist(), radius)
    risk = constrained_risk(tensor(losses), TotalVariation(), radius)
    assert oracles.divergence("tv", risk.weights.tolist()) <= radius * (1 + 1e-9) + 1e-15
    assert_agrees(risk, expected, losses, 1e-12 * len(losses), 1e-11)
    assert abs(risk.gap.item()) <= value_tolerance(losses)


@pytest.mark.parametrize("relative_strength", [0.0, 1e-3, 0.1037, 0.77, 1.0, 2.0])
@every_varied_row
def test_total_variation_penalty(losses, relative_strength):
    strength = relative_strength * (losses.max() - losses.min())
    expected = oracles.total_variation_penalty(losses.tolist(), strength)
    risk = penalized_risk(tensor(losses), TotalVariation(), strength)
    close(risk.value.item(), expected.value, value_tolerance(losses))
    close(risk.premium.item(), expected.premium, 1e-11 * expected.premium + 4 * EPS * scale_of(losses))
    if np.abs(losses.max() - losses - strength).min() > 1e-12 * scale_of(losses):  # else any part may move
        close(ratios(risk), len(losses) * expected.weights, 1e-12 * len(losses))
    assert abs(risk.gap.item()) <= value_tolerance(losses)


@pytest.mark.slow
@law(60)
@given(losses=problems.rows(varied=True), radius=st.floats(1e-8, 1.2), strength=st.floats(1e-3, 2000))
def test_total_variation_on_drawn_rows(losses, radius, strength):
    expected = oracles.total_variation_ball(losses, radius)
    risk = constrained_risk(tensor(losses), TotalVariation(), radius)
    assert_agrees(risk, expected, losses, 1e-12 * len(losses), 1e-11)
    assert risk.value == penalized_risk(tensor(losses), TotalVariation(), 0.0).value or radius < 1
    expected = oracles.total_variation_penalty(losses, strength)
    close(penalized_risk(tensor(losses), TotalVariation(), strength).value.item(), expected.value, 1e-12 * 4000)


@law(40)
@given(losses=problems.rows(varied=True), share=st.floats(0.01, 0.99))
def test_total_variation_strength_is_the_depth_of_the_mass_that_moves_next(losses, share):
    levels = np.sort(losses)
    moved = share * len(losses)
    assume(abs(moved - round(moved)) > 1e-6)
    risk = constrained_risk(tensor(losses), TotalVariation(), share)
    close(risk.strength.item(), levels[-1] - levels[math.floor(moved)], 1e-12 * scale_of(losses))


@pytest.mark.slow
@pytest.mark.parametrize("name, order", [("user kl", 1.0), ("user chi2", 2.0), ("user hellinger", 0.5)])
@pytest.mark.parametrize("radius", [1e-8, 0.3])
@every_short_row
def test_user_ball(losses, radius, name, order):
    expected = oracles.power_ball(losses.tolist(), radius, order)
    tolerance = power_tolerance(len(losses) * expected.weights, order)
    assert_agrees(ball(name, losses, radius), expected, losses, tolerance, accuracy(radius))


# --- user classes and the library's own -----------------------------------------------------------------------

TWINS = pytest.mark.parametrize(
    "name, named", [("user kl", KL()), ("user chi2", ChiSquare()), ("user hellinger", CressieRead(0.5))]
)


def assert_same(one, two, losses, relative):
    __tracebackhide__ = True
    close(one.value, two.value, value_tolerance(losses))
    close(one.premium, two.premium, relative * two.premium + 1e-300)
    close(ratios(one), ratios(two), 1e-10 * (1 + ratios(two)))
    close(one.strength, two.strength, 1e-8 * two.strength)
    close(one.threshold, two.threshold, 1e-8 * (two.strength + scale_of(losses)))


@pytest.mark.slow
@TWINS
@law(25)
@given(losses=problems.rows(varied=True), radius=problems.radii(-8, 1))
def test_user_ball_equals_the_named_one(name, named, losses, radius):
    maximal = maximum(name, losses)
    assume(abs(radius - maximal) > 1e-6 * maximal)  # there the strength goes to 0, and not linearly
    assert_same(ball(name, losses, radius), constrained_risk(tensor(losses), named, radius), losses, 1e-11)


@pytest.mark.slow
@TWINS
@law(20)
@given(losses=problems.rows(varied=True), strength=problems.radii(-1, 4))
def test_user_penalty_equals_the_named_one(name, named, losses, strength):
    one, two = penalty(name, losses, strength), penalized_risk(tensor(losses), named, strength)
    assert_same(one, two, losses, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("order, named", [(1.0, KL()), (2.0, ChiSquare())])
@law(40)
@given(losses=problems.rows(varied=True), radius=problems.radii(-8, 1), strength=problems.radii(-1, 4))
def test_named_members_of_the_family(order, named, losses, radius, strength):
    member = CressieRead(order)
    assert_same(
        constrained_risk(tensor(losses), member, radius), constrained_risk(tensor(losses), named, radius), losses, 1e-11
    )
    assert_same(
        penalized_risk(tensor(losses), member, strength), penalized_risk(tensor(losses), named, strength), losses, 1e-11
    )


@pytest.mark.slow
@pytest.mark.parametrize("pole", [0.0, 1.0])
@pytest.mark.parametrize("step", [1e-10, -1e-10, 1e-6, -1e-6, 1e-3])
@pytest.mark.parametrize("radius", [1e-4, 0.3])
def test_orders_next_to_a_pole_of_the_formula(radius, step, pole):
    losses = SHORT["heavy tail"]
    expected = oracles.power_ball(losses.tolist(), radius, pole + step)
    risk = constrained_risk(tensor(losses), CressieRead(pole + step), radius)
    assert_agrees(risk, expected, losses, 1e-10 * (1 + len(losses) * expected.weights), 1e-11)


# --- laws -----------------------------------------------------------------------------------------------------

RISKS = {f"{name} ball": (constrained_risk, name, 0.2) for name in KINDS} | {
    f"{name} penalty": (penalized_risk, name, 1.5) for name in KINDS
}
every_risk = pytest.mark.parametrize("solve, name, parameter", thorough_items(RISKS, "order 0.5 penalty"))


@every_risk
@law(12)
@given(losses=problems.rows(), shift=st.sampled_from([-(2**30), -1000, 1, 10**6, 2**32]))
def test_value_follows_a_shift_and_weights_stay(losses, shift, solve, name, parameter):
    still, moved = (solve(tensor(losses) + by, EVERY[name], parameter) for by in (0, shift))
    close(moved.value, still.value + shift, value_tolerance(losses) + 1e-12 * abs(shift))
    close(ratios(moved), ratios(still), 1e-10 * (1 + ratios(still)))
    close(moved.premium, still.premium, 1e-11 * still.premium.item() + EPS * scale_of(losses))


@every_risk
@pytest.mark.parametrize("exponent", [-400, 3])
@law(5)
@given(losses=problems.rows())
def test_scaling_losses_scales_the_value(losses, exponent, solve, name, parameter):
    factor = 2.0**exponent
    plain = solve(tensor(losses), EVERY[name], parameter)
    scaled = solve(tensor(losses) * factor, EVERY[name], parameter if solve is constrained_risk else parameter * factor)
    close(scaled.value / factor, plain.value, value_tolerance(losses))
    close(scaled.premium / factor, plain.premium, 1e-11 * plain.premium + EPS * scale_of(losses))
    close(ratios(scaled), ratios(plain), 1e-10 * (1 + ratios(plain)))
    close(scaled.strength / factor, plain.strength, 1e-8 * plain.strength)


@every_risk
@law(8)
@given(losses=problems.rows(), seed=st.integers(0, 99))
def test_order_of_the_samples_does_not_matter(losses, seed, solve, name, parameter):
    order = np.random.default_rng(seed).permutation(len(losses))
    plain, shuffled = (solve(z, EVERY[name], parameter) for z in (tensor(losses), tensor(losses)[order]))
    close(shuffled.value, plain.value, value_tolerance(losses))
    close(ratios(shuffled), ratios(plain)[order], 1e-10 * (1 + ratios(plain)[order]))


@every_risk
@law(10)
@given(losses=problems.rows(min_size=2))
def test_weights_are_comonotone_and_ties_share_exactly(losses, solve, name, parameter):
    weights = solve(tensor(losses), EVERY[name], parameter).weights.numpy()
    order = np.argsort(losses)
    ordered, values = weights[order], np.array(losses)[order]
    assert weights.min() >= 0
    close(weights.sum(), 1.0, 1e-12)
    assert np.all(np.diff(ordered) * len(losses) >= -1e-12)
    tied = np.diff(values) == 0
    assert np.all(ordered[1:][tied] == ordered[:-1][tied])


@every_risk
@law(8)
@given(pair=problems.pairs())
def test_risk_is_convex_and_one_lipschitz(pair, solve, name, parameter):
    first, second = map(tensor, pair)
    tolerance = value_tolerance(pair[0]) + value_tolerance(pair[1])
    one, two, middle = (solve(z, EVERY[name], parameter) for z in (first, second, (first + second) / 2))
    assert middle.value <= (one.value + two.value) / 2 + tolerance
    assert (one.value - two.value).abs() <= (first - second).abs().max() + tolerance
    assert two.value >= one.value + one.weights @ (second - first) - tolerance


@every_smooth_kind
@law(15)
@given(losses=problems.rows(), low=problems.radii(-8, 1), high=problems.radii(-8, 1), share=st.floats(0, 1))
def test_ball_risk_grows_and_is_concave_in_the_radius(name, losses, low, high, share):
    low, high = sorted((low, high))
    middle = share * low + (1 - share) * high
    first, between, last = (ball(name, losses, r).premium.item() for r in (low, middle, high))
    tolerance = value_tolerance(losses)
    assert first - tolerance <= between <= last + tolerance
    assert between >= share * first + (1 - share) * last - tolerance


@every_smooth_kind
@law(15)
@given(losses=problems.rows(varied=True), radius=problems.radii(-6, 1), strength=problems.radii(-2, 3))
def test_penalty_and_ball_are_dual(name, losses, radius, strength):
    constrained = ball(name, losses, radius)
    tolerance = value_tolerance(losses)
    assert penalty(name, losses, strength).value + strength * radius >= constrained.value - tolerance
    lam = constrained.strength.item()
    penalized = penalty(name, losses, lam)
    if radius < maximum(name, losses) * (1 - 1e-6):
        assert lam > 0
        close(penalized.value + lam * radius, constrained.value, tolerance + 1e-12 * lam * radius)
    else:
        assert lam <= 1e-3 * scale_of(losses)


# --- degenerate rows and the ends of the parameter range ------------------------------------------------------


@every_kind
@pytest.mark.parametrize("losses", [z for _, z in hard_cases()], ids=[k for k, _ in hard_cases()])
def test_zero_radius_is_the_mean(losses, name):
    if name == "cvar":
        pytest.skip("has no radius")
    risk = ball(name, losses, 0.0)
    close(risk.value, losses.mean(), value_tolerance(losses))
    close(ratios(risk), 1.0, 1e-12)
    assert risk.premium == 0.0
    assert not torch.stack([risk.threshold, risk.strength, risk.gap]).isnan().any()


@every_risk
@pytest.mark.parametrize("constant", [0.0, -3.25, 0.1, -1e8, 1e150])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_constant_losses_have_no_premium(constant, n, solve, name, parameter):
    risk = solve(torch.full((n,), constant, dtype=torch.float64), EVERY[name], parameter)
    close(risk.value, constant, 1e-15 * abs(constant))
    close(ratios(risk), 1.0, 1e-14)
    close(risk.premium, 0.0, 1e-15 * abs(constant))
    assert not torch.stack([risk.threshold, risk.strength, risk.gap]).isnan().any()


@pytest.mark.parametrize("name", thorough([k for k in KINDS if k not in ("order 0", "order -1", "cvar")]))
@pytest.mark.parametrize("excess", [1 + 1e-9, 1e6])
@every_short_row
def test_radius_past_the_maximal_one(losses, excess, name):
    if name in CAPPED:
        radius, alpha = maximum(name, losses.tolist()) * excess, EVERY[name].alpha
        expected = oracles.cvar(losses.tolist(), alpha)
        risk = ball(name, losses, radius)
        close(risk.value, expected.value, value_tolerance(losses))
        close(risk.premium, expected.premium, 1e-11 * expected.premium)
        close(ratios(risk), len(losses) * expected.weights, 1e-10 * len(losses))
        return
    tied = losses == losses.max()
    radius = excess * ((1 - tied.mean()) if name == "tv" else maximum(name, losses.tolist()))
    risk = ball(name, losses, radius)
    assert risk.value == losses.max()
    assert risk.strength == 0.0
    assert risk.threshold == losses.max()
    close(ratios(risk), tied * len(losses) / tied.sum(), 1e-12 * len(losses))


@pytest.mark.parametrize("name", thorough([k for k in SMOOTH_KINDS if k not in ("order 0", "order -1")]))
@every_short_row
def test_radius_next_to_the_maximal_one(losses, name):
    maximal = maximum(name, losses.tolist())
    for shortfall in (0.0, 1e-15, 1e-9, 1e-3):
        radius = maximal * (1 - shortfall)
        risk = ball(name, losses, radius)
        assert all(torch.isfinite(field).all() for field in risk)
        assert oracles.divergence(SMOOTH[name].phi, risk.weights.tolist()) <= radius * (1 + 1e-9)
        # Above order 2 a sample enters with an infinite slope: eps in the threshold is its root in the ratios.
        spread, largest = losses.max() - losses.min(), ratios(risk).max()
        resolved = spread * largest * (16 * EPS) ** 0.5 if name == "order 3" else 0.0
        assert risk.value <= losses.max() + iterated_tolerance(losses) + resolved
        assert abs(risk.gap) <= iterated_tolerance(losses) + resolved
        if shortfall == 1e-3:
            assert risk.strength > 0


@pytest.mark.parametrize("order", [0.0, -1.0])
@pytest.mark.parametrize("radius", [10.0])
@every_short_row
def test_no_finite_radius_reaches_the_maximum_from_order_zero_down(losses, radius, order):
    risk = constrained_risk(tensor(losses), CressieRead(order), radius)
    expected = oracles.power_ball(losses.tolist(), radius, order)
    assert risk.weights.min() > 0
    assert risk.strength > 0
    reached = oracles.divergence(oracles.power_phi(order), risk.weights.tolist())
    assert abs(reached - radius) <= 1e-9 * radius
    assert_agrees(risk, expected, losses, 1e-10 * (1 + len(losses) * expected.weights), 1e-11)


@every_kind
@every_short_row
def test_strength_runs_from_the_maximum_to_the_mean(losses, name):
    spread = losses.max() - losses.min()
    hard = penalty(name, losses, 0.0)
    alpha = getattr(EVERY[name], "alpha", None)
    expected = oracles.total_variation_penalty(losses.tolist(), 0.0)
    if alpha is not None:
        expected = oracles.cvar(losses.tolist(), alpha)
    close(hard.value, expected.value, value_tolerance(losses) if alpha else 0.0)
    close(ratios(hard), len(losses) * expected.weights, 1e-12 * len(losses))
    if name != "cvar":
        weak = penalty(name, losses, 1e9 * spread)
        close(weak.value, losses.mean(), value_tolerance(losses) + 2e-9 * spread)
        close(ratios(weak), 1.0, 4e-9)  # the curvature of Jensen-Shannon is 1/2


# --- orders between the risks ---------------------------------------------------------------------------------


@pytest.mark.slow
@law(60)
@given(losses=problems.rows(), radius=problems.radii(-8, 1), pair=st.sampled_from([(3, 2), (2, 1.5), (1.5, 0.5)]))
def test_balls_of_lower_order_contain_those_of_higher_order(losses, radius, pair):
    k, j = pair
    inner = constrained_risk(tensor(losses), CressieRead(k), radius)
    outer = ((1 + k * (k - 1) * radius) ** ((j - 1) / (k - 1)) - 1) / (j * (j - 1)) * (1 + 1e-12)
    assert inner.value <= constrained_risk(tensor(losses), CressieRead(j), outer).value + 2 * value_tolerance(losses)
    outer = math.log1p(k * (k - 1) * radius) / (k - 1) * (1 + 1e-12)
    assert inner.value <= constrained_risk(tensor(losses), KL(), outer).value + 2 * value_tolerance(losses)


@pytest.mark.slow
@law(60)
@given(losses=problems.rows(), radius=problems.radii(-8, 0.2))
def test_total_variation_bounds_kl_and_chi_square(losses, radius):
    bound = constrained_risk(tensor(losses), TotalVariation(), math.sqrt(radius / 2) * (1 + 1e-12)).value
    for divergence in (KL(), ChiSquare()):
        assert constrained_risk(tensor(losses), divergence, radius).value <= bound + value_tolerance(losses)


@pytest.mark.slow
@law(60)
@given(losses=problems.rows(), radius=problems.radii(-8, 1), alpha=problems.alphas)
def test_capped_kl_lies_below_kl_and_cvar(losses, radius, alpha):
    tolerance = 2 * value_tolerance(losses)
    capped = constrained_risk(tensor(losses), CappedKL(alpha), radius)
    assert capped.value <= constrained_risk(tensor(losses), KL(), radius).value + tolerance
    assert capped.value <= constrained_risk(tensor(losses), CVaR(alpha)).value + tolerance
    if radius >= math.log(1 / alpha):  # KL(p || q) <= log(1 / alpha) under the cap
        close(capped.value, constrained_risk(tensor(losses), CVaR(alpha)).value, tolerance)


@every_kind
@law(25)
@given(losses=problems.rows(), radius=problems.radii(-8, 1))
def test_value_lies_between_mean_and_maximum(name, losses, radius):
    risk = ball(name, losses, radius)
    assert np.mean(losses) - value_tolerance(losses) <= risk.value <= max(losses) + value_tolerance(losses)
    assert risk.premium >= 0


@every_order
@pytest.mark.parametrize("case", ["normal", "exponential", "narrow excess", "scale 1e4", "tied maxima"])
def test_small_radius_expansion(order, case):
    z, radius = problems.HARD[case], 1e-8
    y = z - z.mean()
    sd = y.std()
    skew, kurtosis = (y**3).mean() / sd**3, (y**4).mean() / sd**4
    expansion = sd * math.sqrt(2 * radius) + (2 - order) / 3 * skew * sd * radius
    premium = constrained_risk(tensor(z), CressieRead(order), radius).premium
    close(premium, expansion, 10 * (1 + skew**2 + kurtosis) * sd * radius**1.5)


def test_small_radius_expansion_with_curvature_one_half():
    z, radius = problems.HARD["exponential"], 1e-10
    risk = ball("jensen-shannon", z, radius)
    close(risk.premium, z.std() * math.sqrt(2 * radius / 0.5), 20 * z.std() * radius)


@law(40)
@given(losses=problems.rows(varied=True), share=st.floats(1e-7, 1.0))
def test_total_variation_is_linear_while_only_the_minimum_gives(losses, share):
    z = np.array(losses)
    radius = share * (z == z.min()).mean()
    risk = constrained_risk(tensor(losses), TotalVariation(), radius)
    close(risk.premium, radius * (z.max() - z.min()), 1e-11 * radius * (z.max() - z.min()))


@pytest.mark.parametrize("ones, n", [(1, 2), (1, 20), (7, 20), (19, 20)])
@every_order
def test_two_points(order, ones, n):
    """Losses 0 and 1: the value x solves a phi(x / a) + (1 - a) phi((1 - x) / (1 - a)) = radius."""
    losses, phi = np.repeat([1.0, 0.0], [ones, n - ones]), oracles.power_phi(order)
    for radius in (1e-8, 1e-2, 0.4):
        with mp.workdps(oracles.DIGITS):
            a = mp.mpf(ones) / n

            def reached(x, a=a):
                return a * phi(x / a) + (1 - a) * phi((1 - x) / (1 - a))

            low, high = a, mp.mpf(1)
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if reached(middle) < radius else (low, middle)
            premium = float(high - a)
        risk = constrained_risk(tensor(losses), CressieRead(order), radius)
        close(risk.premium, premium, 1e-11 * premium)


# --- other inputs -----------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("case", ["normal", "ties everywhere", "narrow excess"])
def test_float32_is_float32_accurate(case, name):
    losses = tensor(problems.HARD[case], torch.float32)
    for solve, parameter in ((constrained_risk, 0.2), (penalized_risk, 0.7)):
        single, double = (solve(z, EVERY[name], parameter) for z in (losses, losses.double()))
        assert all(field.dtype == torch.float32 for field in single)
        close(single.value.double(), double.value, value_tolerance(losses, torch.float32))
        close(single.premium.double(), double.premium, 1e-5 * double.premium.item() + 2.0**-23 * scale_of(losses))
        close(single.weights.sum(), 1.0, 2e-6)
    small = constrained_risk(losses, EVERY[name], 1e-6)
    expected = constrained_risk(losses.double(), EVERY[name], 1e-6)
    close(small.premium.double(), expected.premium, 1e-5 * expected.premium.item())


@every_kind
def test_batch_is_its_rows(name):
    generator = torch.Generator().manual_seed(3)
    losses = torch.randn(2, 3, 9, dtype=torch.float64, generator=generator)
    losses[..., 1] = losses[..., 0]
    losses[0, 1] = 4.0  # a constant row among the others
    losses[1, 2] *= 1e-8
    radius = tensor([[0.0, 1e-8, 1e-2], [0.3, 1e-5, 40.0]])
    if name == "order 0" or name == "order -1":
        radius[1, 2] = 4.0
    strength = tensor([[0.2, 1.0, 30.0], [0.2, 1.0, 30e-8]])
    for solve, parameter in ((constrained_risk, radius), (penalized_risk, strength)):
        batch = solve(losses, EVERY[name], parameter)
        assert batch.weights.shape == losses.shape
        for index in np.ndindex(2, 3):
            row = solve(losses[index], EVERY[name], parameter.expand(2, 3)[index].item())
            close(batch.value[index], row.value, value_tolerance(losses[index]))
            close(batch.premium[index], row.premium, 1e-11 * row.premium.item() + 1e-300)
            close(batch.weights[index], row.weights, 1e-11)
            assert batch.strength[index].isfinite() == row.strength.isfinite()
            if row.strength.isfinite():
                close(batch.strength[index], row.strength, 1e-8 * row.strength)
