"""Laws of the exact risks: what must hold for every row of losses, whatever the algorithm.

The drawn rows are multiples of 1/64, so that shifts and scalings by powers of two are exact and a law is
tested, not the rounding of its input. Sources: Duchi & Namkoong, arXiv 1610.02581 (variance expansion);
Rockafellar & Uryasev 2000 (CVaR); Ben-Tal et al. 2013 (phi-divergence duals).
"""

import math
from functools import partial

import numpy as np
import oracles
import problems
import pytest
import torch
from families import thorough_items
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import hard_cases, ratio_tolerance, rows, tensor, value_tolerance

from drrho import KL, ChiSquare, CVaR, RobustRisk, constrained_risk, penalized_risk

BALLS = {"kl": KL(), "chi2": ChiSquare()}
RISKS = {
    "kl ball small": partial(constrained_risk, divergence=KL(), radius=1e-6),
    "kl ball": partial(constrained_risk, divergence=KL(), radius=0.3),
    "chi2 ball small": partial(constrained_risk, divergence=ChiSquare(), radius=1e-6),
    "chi2 ball": partial(constrained_risk, divergence=ChiSquare(), radius=0.7),
    "cvar": partial(constrained_risk, divergence=CVaR(0.35)),
    "cvar thin": partial(constrained_risk, divergence=CVaR(0.05)),
    "kl penalty": partial(penalized_risk, divergence=KL(), strength=1.5),
    "chi2 penalty": partial(penalized_risk, divergence=ChiSquare(), strength=0.8),
}

every_risk = pytest.mark.parametrize("solve", thorough_items(RISKS, "kl ball", "cvar"))
every_ball = pytest.mark.parametrize("name", BALLS.keys())
HARD = hard_cases()
every_hard_row = pytest.mark.parametrize("losses", thorough_items(dict(HARD), "tied maxima", "offset 1e8"))


def law(examples=25):
    """A deterministic hypothesis test."""
    return settings(derandomize=True, deadline=None, max_examples=examples, database=None)


def ball(name, losses, radius):
    return constrained_risk(tensor(losses), BALLS[name], radius)


def ratios(risk):
    return risk.weights.numpy().astype(float) * risk.weights.shape[-1]


def close(actual, expected, tolerance):
    __tracebackhide__ = True
    assert np.all(np.abs(np.asarray(actual) - np.asarray(expected)) <= np.asarray(tolerance)), (
        f"{actual} differs from {expected} by more than {tolerance}"
    )


# --- what is returned ---------------------------------------------------------------------------------------


@every_risk
@every_hard_row
def test_result_is_a_distribution_that_attains_the_value(losses, solve):
    risk = solve(tensor(losses))
    assert isinstance(risk, RobustRisk)
    assert risk._fields == ("value", "weights", "premium", "threshold", "strength", "gap")
    assert risk.weights.shape == losses.shape
    assert all(field.shape == () for field in risk if field is not risk.weights)
    assert all(field.dtype == torch.float64 for field in risk)
    assert torch.isfinite(risk.value)
    assert torch.isfinite(risk.premium)
    weights = risk.weights.numpy()
    assert weights.min() >= 0.0
    close(weights.sum(), 1.0, 1e-12)
    close(losses.mean() + risk.premium, risk.value, value_tolerance(losses))
    if "strength" not in solve.keywords:
        close(weights @ losses, risk.value, value_tolerance(losses))


@every_risk
@every_hard_row
def test_gap_certifies_the_value(losses, solve):
    assert abs(solve(tensor(losses)).gap.item()) <= value_tolerance(losses)


@every_risk
@every_hard_row
def test_value_lies_between_mean_and_maximum(losses, solve):
    risk = solve(tensor(losses))
    tolerance = value_tolerance(losses)
    assert losses.mean() - tolerance <= risk.value <= losses.max() + tolerance
    assert risk.premium >= 0.0


@every_ball
@every_hard_row
@pytest.mark.parametrize("radius", problems.RADII)
def test_ball_is_respected_and_its_boundary_reached(losses, name, radius):
    risk = ball(name, losses, radius)
    reached = oracles.divergence(name, risk.weights.tolist())
    assert reached <= radius * (1 + 1e-9) + 1e-15
    if losses.min() < losses.max() and radius < problems.maximal_radius(name, losses) * (1 - 1e-9):
        assert abs(reached - radius) <= 1e-9 * radius + 1e-15


@every_hard_row
@pytest.mark.parametrize("alpha", problems.ALPHAS)
def test_cvar_weights_are_capped(losses, alpha):
    risk = constrained_risk(tensor(losses), CVaR(alpha))
    assert ratios(risk).max() <= 1 / alpha * (1 + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "chi2"])
@law(60)
@given(losses=rows(varied=True), radius=problems.radii())
def test_ball_dual_at_the_returned_multipliers(name, losses, radius):
    assume(radius < problems.maximal_radius(name, losses) * (1 - 1e-6))
    risk = ball(name, losses, radius)
    assert risk.strength > 0
    dual = oracles.dual(name, losses, risk.strength.item(), risk.threshold.item(), radius)
    close(dual, risk.value, value_tolerance(losses))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "chi2"])
@law(60)
@given(losses=rows(), strength=problems.radii(-4, 4))
def test_penalized_dual_at_the_returned_multipliers(name, losses, strength):
    risk = penalized_risk(tensor(losses), BALLS[name], strength)
    hard = risk.strength.item() == 0.0
    if not hard:
        assert risk.strength.item() == strength
    dual = oracles.dual(name, losses, strength, risk.threshold.item())
    close(dual, risk.value, value_tolerance(losses))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "chi2"])
@law(60)
@given(losses=rows(), radius=problems.radii(), strength=problems.radii(-2, 3), share=st.floats(-1, 2))
def test_weak_duality(name, losses, radius, strength, share):
    threshold = min(losses) + share * (max(losses) - min(losses))
    dual = oracles.dual(name, losses, strength, threshold, radius)
    assert dual >= ball(name, losses, radius).value - value_tolerance(losses)


@law(60)
@given(losses=rows(), alpha=problems.alphas)
def test_cvar_dual_at_the_returned_threshold(losses, alpha):
    risk = constrained_risk(tensor(losses), CVaR(alpha))
    eta = risk.threshold.item()
    assert risk.strength == 0.0
    assert min(losses) <= eta <= max(losses)
    # Above a threshold that is a quantile by a rounding error only, 1/alpha multiplies nothing.
    dual = eta + np.maximum(np.array(losses) - eta, 0).mean() / alpha
    close(dual, risk.value, value_tolerance(losses))


# --- shifts, scales, orders ---------------------------------------------------------------------------------


@every_risk
@law()
@given(losses=rows(), shift=st.sampled_from([-(2**30), -1000, 1, 10**6, 2**32]))
def test_value_follows_a_shift_and_weights_stay(losses, shift, solve):
    still, moved = solve(tensor(losses)), solve(tensor(losses) + shift)
    close(moved.value, still.value + shift, value_tolerance(losses) + 1e-12 * abs(shift))
    close(ratios(moved), ratios(still), 1e-10 * (1 + ratios(still)))
    close(moved.premium, still.premium, 1e-11 * still.premium.item())


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [-400, -30, -1, 5, 40, 400])
@pytest.mark.parametrize(
    "divergence, radius",
    [(KL(), 0.3), (ChiSquare(), 1e-6), (ChiSquare(), 0.7), (CVaR(0.35), 0.0), (CVaR(1.0), 0.0)],
)
@law(15)
@given(losses=rows())
def test_scaling_losses_scales_the_value(losses, divergence, radius, exponent):
    factor = 2.0**exponent
    plain = constrained_risk(tensor(losses), divergence, radius)
    scaled = constrained_risk(tensor(losses) * factor, divergence, radius)
    if isinstance(divergence, KL):
        close(scaled.value / factor, plain.value, value_tolerance(losses))
        close(ratios(scaled), ratios(plain), 1e-10 * (1 + ratios(plain)))
    else:
        assert scaled.value == plain.value * factor
        assert scaled.premium == plain.premium * factor
        assert torch.equal(scaled.weights, plain.weights)


@every_ball
@law()
@given(losses=rows(), strength=problems.radii(-2, 3), factor=st.sampled_from([1e-8, 0.37, 3.0, 1e6, 1e100]))
def test_scaling_losses_and_strength_scales_the_penalized_value(name, losses, strength, factor):
    plain = penalized_risk(tensor(losses), BALLS[name], strength)
    scaled = penalized_risk(tensor(losses) * factor, BALLS[name], strength * factor)
    close(scaled.value / factor, plain.value, value_tolerance(losses))
    temperature = strength if name == "kl" else math.inf
    # A factor that is no power of two rounds every loss, by eps of its own size.
    rounding = 4 * 2.0**-52 * problems.scale_of(losses) / strength * len(losses)
    close(ratios(scaled), ratios(plain), ratio_tolerance(losses, ratios(plain), temperature) + rounding)


@every_risk
@law()
@given(losses=rows(), data=st.data())
def test_larger_losses_have_a_larger_risk(losses, data, solve):
    raised = [z + data.draw(st.integers(0, 128)) / 64 for z in losses]
    tolerance = value_tolerance(raised) + value_tolerance(losses)
    assert solve(tensor(losses)).value <= solve(tensor(raised)).value + tolerance


@every_ball
@law()
@given(losses=rows(), low=problems.radii(), high=problems.radii())
def test_value_grows_with_the_radius(name, losses, low, high):
    low, high = sorted((low, high))
    assert ball(name, losses, low).premium <= ball(name, losses, high).premium + value_tolerance(losses)


@every_ball
@law()
@given(losses=rows(), low=problems.radii(-5, 5), high=problems.radii(-5, 5))
def test_penalized_value_falls_with_the_strength(name, losses, low, high):
    low, high = sorted((low, high))
    weak, strong = (penalized_risk(tensor(losses), BALLS[name], strength) for strength in (low, high))
    assert weak.value >= strong.value - value_tolerance(losses)


@law(50)
@given(losses=rows(), one=problems.alphas, two=problems.alphas)
def test_cvar_falls_with_the_tail_fraction(losses, one, two):
    thin, wide = (constrained_risk(tensor(losses), CVaR(a)).value for a in sorted((one, two)))
    assert thin >= wide - value_tolerance(losses)


@every_risk
@law()
@given(pair=problems.pairs())
def test_risk_is_convex_and_one_lipschitz(pair, solve):
    first, second = map(tensor, pair)
    tolerance = value_tolerance(pair[0]) + value_tolerance(pair[1])
    one, two, middle = solve(first), solve(second), solve((first + second) / 2)
    assert middle.value <= (one.value + two.value) / 2 + tolerance
    assert (one.value - two.value).abs() <= (first - second).abs().max() + tolerance
    assert two.value >= one.value + one.weights @ (second - first) - tolerance  # subgradient, also at ties


@every_ball
@law()
@given(pair=problems.pairs(), radius=problems.radii(-3, 1))
def test_ball_risk_is_subadditive(name, pair, radius):
    first, second = pair
    together = [a + b for a, b in zip(first, second, strict=True)]
    apart = ball(name, first, radius).value + ball(name, second, radius).value
    assert ball(name, together, radius).value <= apart + value_tolerance(first) + value_tolerance(second)


@every_risk
@law()
@given(losses=rows(), seed=st.integers(0, 99))
def test_order_of_the_samples_does_not_matter(losses, seed, solve):
    order = np.random.default_rng(seed).permutation(len(losses))
    plain, shuffled = solve(tensor(losses)), solve(tensor(losses)[order])
    close(shuffled.value, plain.value, value_tolerance(losses))
    close(ratios(shuffled), ratios(plain)[order], 1e-10 * (1 + ratios(plain)[order]))


@every_risk
@law(40)
@given(losses=rows(min_size=2))
def test_weights_are_comonotone_and_ties_share_exactly(losses, solve):
    weights = solve(tensor(losses)).weights.numpy()
    order = np.argsort(losses)
    ordered, values = weights[order], np.array(losses)[order]
    assert np.all(np.diff(ordered) * len(losses) >= -1e-12)
    tied = np.diff(values) == 0
    assert np.all(ordered[1:][tied] == ordered[:-1][tied])


@every_risk
@law()
@given(losses=rows(max_size=6), copies=st.integers(2, 5))
def test_replicated_samples_change_nothing_at_equal_radius(losses, copies, solve):
    once, tiled = solve(tensor(losses)), solve(tensor(losses).repeat(copies))
    close(tiled.value, once.value, value_tolerance(losses))
    close(ratios(tiled).reshape(copies, -1), ratios(once), 1e-10 * (1 + ratios(once)))


# --- degenerate rows and the ends of the parameter range ----------------------------------------------------


@every_ball
@every_hard_row
def test_zero_radius_is_the_mean(losses, name):
    risk = ball(name, losses, 0.0)
    close(risk.value, losses.mean(), value_tolerance(losses))
    close(ratios(risk), 1.0, 1e-12)
    assert risk.premium == 0.0


@every_ball
@every_hard_row
@pytest.mark.parametrize("excess", [1 + 1e-12, 1.5, 1e6])
def test_radius_past_the_maximal_one_gives_the_maximum_bitwise(losses, name, excess):
    risk = ball(name, losses, problems.maximal_radius(name, losses) * excess + 1e-300)
    if losses.min() < losses.max():
        assert risk.value == losses.max()
        assert risk.strength == 0.0
        assert risk.threshold == losses.max()
    else:
        close(risk.value, losses.max(), value_tolerance(losses))
    tied = losses == losses.max()
    close(ratios(risk), tied * len(losses) / tied.sum(), 1e-12 * len(losses))


@pytest.mark.slow
@every_ball
@law(60)
@given(losses=rows(varied=True))
def test_radius_short_of_the_maximal_one_stays_below_the_maximum(name, losses):
    risk = ball(name, losses, problems.maximal_radius(name, losses) * (1 - 1e-3))
    assert risk.value < max(losses)
    assert risk.strength > 0


@pytest.mark.slow
@every_ball
@pytest.mark.parametrize("losses", [z for _, z in hard_cases(varied=True)], ids=[k for k, _ in hard_cases(varied=True)])
def test_radius_next_to_the_maximal_one(losses, name):
    maximal = problems.maximal_radius(name, losses)
    for shortfall in (0.0, 1e-15, 1e-12, 1e-9, 1e-6):
        risk = ball(name, losses, maximal * (1 - shortfall))
        assert all(torch.isfinite(field).all() for field in risk)
        assert oracles.divergence(name, risk.weights.tolist()) <= maximal * (1 + 1e-9)
        assert risk.value <= losses.max() + value_tolerance(losses)


@every_risk
@pytest.mark.parametrize("constant", [0.0, -3.25, 0.1, 1e-300, -1e8, 1e150])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_constant_losses_have_no_premium(constant, n, solve):
    risk = solve(torch.full((n,), constant, dtype=torch.float64))
    close(risk.value, constant, 1e-15 * abs(constant))
    close(ratios(risk), 1.0, 1e-14)
    close(risk.premium, 0.0, 1e-15 * abs(constant))
    assert not torch.stack([risk.threshold, risk.strength, risk.gap]).isnan().any()


@every_ball
@every_hard_row
def test_strength_runs_from_the_maximum_to_the_mean(losses, name):
    spread = losses.max() - losses.min()
    hard = penalized_risk(tensor(losses), BALLS[name], 0.0)
    close(hard.value, losses.max(), 0.0 if spread else value_tolerance(losses))
    tied = losses == losses.max()
    close(ratios(hard), tied * len(losses) / tied.sum(), 1e-12 * len(losses))
    weak = penalized_risk(tensor(losses), BALLS[name], 1e9 * (spread or 1.0))
    close(weak.value, losses.mean(), value_tolerance(losses) + 1e-9 * spread)
    close(ratios(weak), 1.0, 2e-9)


@every_ball
@pytest.mark.parametrize("strength", [1e-300, 1e-12, 1e-3])
def test_tiny_strength_does_not_overflow(name, strength):
    risk = penalized_risk(tensor([1e4, -1e4, 0.0, 1e4 - 1]), BALLS[name], strength)
    close(risk.value, 1e4, 1e-12 * 3e4 + 2 * strength)
    close(risk.weights.numpy(), [1.0, 0.0, 0.0, 0.0], 1e-12)


# --- closed forms -------------------------------------------------------------------------------------------

MEANS = [(1, 2), (1, 20), (7, 20), (19, 20), (1, 1000)]


@pytest.mark.parametrize("ones, n", MEANS)
@pytest.mark.parametrize("radius", [1e-12, 1e-4, 0.03, 0.4, 3.0, 20.0])
def test_two_point_closed_forms(ones, n, radius):
    losses = np.repeat([1.0, 0.0], [ones, n - ones])
    a = ones / n
    close(ball("chi2", losses, radius).value, min(1.0, a + math.sqrt(2 * radius * a * (1 - a))), 2e-12)
    close(ball("kl", losses, radius).value, oracles.bernoulli_kl_root(a, radius), 2e-12)


@pytest.mark.parametrize("ones, n", MEANS)
@pytest.mark.parametrize("alpha", problems.ALPHAS)
def test_two_point_cvar(ones, n, alpha):
    losses = np.repeat([1.0, 0.0], [ones, n - ones])
    close(constrained_risk(tensor(losses), CVaR(alpha)).value, min(1.0, ones / n / alpha), 2e-12)


@law(50)
@given(losses=rows())
def test_cvar_of_a_whole_number_of_samples_is_their_mean(losses):
    n = len(losses)
    ordered = np.sort(losses)[::-1]
    for k in range(1, n + 1):
        value = constrained_risk(tensor(losses), CVaR(k / n)).value
        close(value, ordered[:k].mean(), value_tolerance(losses))


@law(30)
@given(losses=rows(min_size=2))
def test_tail_mass_times_cvar_is_linear_between_whole_samples(losses):
    n = len(losses)
    ordered = np.sort(losses)[::-1]
    for j in range(n):
        for part in (1e-9, 0.25, 0.9):
            alpha = (j + part) / n
            expected = (ordered[:j].sum() + part * ordered[j]) / (j + part)
            close(constrained_risk(tensor(losses), CVaR(alpha)).value, expected, value_tolerance(losses))


@pytest.mark.parametrize("alpha", [0.05, 0.35, 1.0])
def test_penalized_cvar_is_cvar(alpha):
    losses = tensor(problems.HARD["normal"])
    penalized, constrained = penalized_risk(losses, CVaR(alpha), 0.7), constrained_risk(losses, CVaR(alpha))
    close(penalized.value, constrained.value, value_tolerance(losses))
    close(ratios(penalized), ratios(constrained), 1e-10)


@law(50)
@given(losses=rows(varied=True), stretch=st.floats(1.0, 1e4))
def test_strong_chi_square_penalty_is_half_the_variance(losses, stretch):
    z = np.array(losses)
    strength = stretch * (z.mean() - z.min())
    risk = penalized_risk(tensor(losses), ChiSquare(), strength)
    close(risk.premium, z.var() / (2 * strength), 1e-11 * z.var() / (2 * strength))


@law(50)
@given(losses=rows(varied=True), share=st.floats(0.01, 1.0))
def test_weak_chi_square_penalty_is_the_maximum_less_its_price(losses, share):
    levels = np.unique(losses)
    ties, n = losses.count(levels[-1]), len(losses)
    strength = share * (1 - 1e-12) * ties / n * (levels[-1] - levels[-2])
    risk = penalized_risk(tensor(losses), ChiSquare(), strength)
    close(risk.value, levels[-1] - strength * (n / ties - 1) / 2, value_tolerance(losses))


@law(50)
@given(losses=rows(), strength=problems.radii(-3, 4))
def test_kl_penalty_is_log_mean_exp(losses, strength):
    z = tensor(losses) / strength
    expected = strength * (z.logsumexp(-1) - math.log(len(losses)))
    risk = penalized_risk(tensor(losses), KL(), strength)
    close(risk.value, expected, value_tolerance(losses) + 1e-15 * strength)
    close(risk.weights, z.softmax(-1), ratio_tolerance(losses, risk.weights, strength))


@law(60)
@given(losses=rows(varied=True), radius=problems.radii())
def test_kl_temperature_bound(losses, radius):
    risk = ball("kl", losses, radius)
    spread = max(losses) - min(losses)
    assert 0 <= risk.strength <= spread / math.sqrt(8 * radius) * (1 + 1e-9)
    if risk.strength > 0:
        softmax = (tensor(losses) / risk.strength).softmax(-1)
        close(risk.weights, softmax, 1e-10 + 1e-9 * softmax)
        assert ball("kl", losses, radius * 1.1).strength < risk.strength


@law(40)
@given(losses=rows(varied=True), radius=problems.radii(-6, 1))
def test_chi_square_weights_are_affine_on_their_support(losses, radius):
    risk = ball("chi2", losses, radius)
    assume(risk.strength > 0)
    z = np.array(losses)
    expected = np.maximum(1 + (z - risk.threshold.item()) / risk.strength.item(), 0)
    # Strength and threshold are rounded, which alone moves the ratio by eps times their quotient.
    rounding = 8 * 2.0**-52 * (np.abs(z).max() + abs(risk.threshold.item())) / risk.strength.item()
    close(ratios(risk), expected, 1e-10 * (1 + expected) + rounding)


# --- links between the risks --------------------------------------------------------------------------------


@pytest.mark.slow
@every_ball
@law(50)
@given(losses=rows(varied=True), radius=problems.radii(-8, 1))
def test_penalty_at_the_dual_strength_gives_the_ball_weights(name, losses, radius):
    assume(radius < problems.maximal_radius(name, losses) * (1 - 1e-6))
    constrained = ball(name, losses, radius)
    strength = constrained.strength.item()
    penalized = penalized_risk(tensor(losses), BALLS[name], strength)
    close(ratios(penalized), ratios(constrained), ratio_tolerance(losses, ratios(constrained), strength))
    close(
        penalized.value + strength * radius,
        constrained.value,
        value_tolerance(losses) + 1e-12 * strength * radius,
    )


@pytest.mark.slow
@every_ball
@law(50)
@given(losses=rows(), radius=problems.radii(-8, 1), strength=problems.radii(-3, 4))
def test_penalty_plus_its_price_bounds_the_ball(name, losses, radius, strength):
    penalized = penalized_risk(tensor(losses), BALLS[name], strength)
    assert penalized.value + strength * radius >= ball(name, losses, radius).value - value_tolerance(losses)


@pytest.mark.slow
@every_ball
@law(50)
@given(losses=rows(), low=problems.radii(-8, 1), high=problems.radii(-8, 1), share=st.floats(0, 1))
def test_ball_risk_is_concave_in_the_radius(name, losses, low, high, share):
    middle = share * low + (1 - share) * high
    chord = share * ball(name, losses, low).premium + (1 - share) * ball(name, losses, high).premium
    assert ball(name, losses, middle).premium >= chord - value_tolerance(losses)


@law(50)
@given(losses=rows(), low=st.floats(0, 5), high=st.floats(0, 5), share=st.floats(0, 1))
def test_chi_square_risk_is_concave_in_the_root_of_the_radius(losses, low, high, share):
    def premium(root):
        return ball("chi2", losses, root**2 / 2).premium

    chord = share * premium(low) + (1 - share) * premium(high)
    assert premium(share * low + (1 - share) * high) >= chord - value_tolerance(losses)


@pytest.mark.slow
@every_ball
@law(50)
@given(losses=rows(), low=problems.radii(-3, 3), high=problems.radii(-3, 3), share=st.floats(0, 1))
def test_penalized_risk_is_convex_in_the_strength(name, losses, low, high, share):
    def value(strength):
        return penalized_risk(tensor(losses), BALLS[name], strength).value

    chord = share * value(low) + (1 - share) * value(high)
    assert value(share * low + (1 - share) * high) <= chord + value_tolerance(losses)


@pytest.mark.slow
@law(80)
@given(losses=rows(), radius=problems.radii(-8, 2), alpha=problems.alphas)
def test_order_of_the_divergences(losses, radius, alpha):
    tolerance = 2 * value_tolerance(losses)
    tail = constrained_risk(tensor(losses), CVaR(alpha)).value
    assert ball("chi2", losses, radius).premium <= ball("kl", losses, math.log1p(2 * radius)).premium + tolerance
    assert ball("kl", losses, math.log1p(2 * radius)).premium <= ball("kl", losses, 2 * radius).premium + tolerance
    assert tail <= ball("kl", losses, abs(math.log(alpha)) * (1 + 1e-15)).value + tolerance
    assert tail <= ball("chi2", losses, (1 / alpha - 1) / 2 * (1 + 1e-15)).value + tolerance


@law(60)
@given(losses=rows(), radius=problems.radii(-8, math.log10(0.499)))
def test_pinsker(losses, radius):
    # Total variation: the worst case moves the lowest mass sqrt(r / 2) to the maximum.
    moved = math.sqrt(radius / 2)
    total_variation = moved * max(losses) + (1 - moved) * oracles.cvar(losses, 1 - moved).value
    for name in BALLS:
        assert ball(name, losses, radius).value <= total_variation + value_tolerance(losses)


# --- variance expansion (Duchi & Namkoong, arXiv 1610.02581) ------------------------------------------------


@pytest.mark.slow
@law(100)
@given(losses=rows(varied=True), radius=problems.radii(-10, 1.5))
def test_chi_square_premium_is_between_its_variance_bounds(losses, radius):
    z, root = np.array(losses), math.sqrt(2 * radius)
    sd, below, above = z.std(), z.mean() - z.min(), z.max() - z.mean()
    premium = ball("chi2", losses, radius).premium
    tolerance = 1e-12 * (z.max() - z.min()) + 1e-12 * root * sd
    lower = max(root * sd - below * root**2 / 4, min(root * sd, sd**2 / below))
    published = max(root * sd - (z.max() - z.min()) * root**2, 0.0)  # theorem 1, inequality (10)
    assert published <= lower + tolerance
    assert lower - tolerance <= premium <= min(root * sd, above) + tolerance


@law(60)
@given(losses=rows(varied=True), share=st.floats(1e-6, 1.0))
def test_chi_square_premium_equals_its_variance_term_while_all_weights_are_positive(losses, share):
    z = np.array(losses)
    root = share * z.std() / (z.mean() - z.min())
    premium = ball("chi2", losses, root**2 / 2).premium
    close(premium, root * z.std(), 1e-11 * root * z.std())


@law(60)
@given(losses=rows(min_size=3, varied=True))
def test_chi_square_premium_is_below_its_variance_term_past_that_radius(losses):
    z = np.array(losses)
    root = math.sqrt(2) * z.std() / (z.mean() - z.min())
    assert ball("chi2", losses, root**2 / 2).premium < root * z.std() * (1 - 1e-9)


@law(60)
@given(losses=rows(varied=True), share=st.floats(0, 1))
def test_chi_square_premium_is_above_its_chord(losses, share):
    z = np.array(losses)
    sd, below, above = z.std(), z.mean() - z.min(), z.max() - z.mean()
    first, last = sd / below, math.sqrt(2 * problems.maximal_radius("chi2", losses))
    chord = sd**2 / below + share * (above - sd**2 / below)
    root = first + share * (last - first)
    assert ball("chi2", losses, root**2 / 2).premium >= chord - value_tolerance(losses)


@pytest.mark.parametrize("name, slope", [("kl", 1 / 3), ("chi2", 0.0)])
@pytest.mark.parametrize("case", ["normal", "exponential", "narrow excess", "scale 1e4", "tied maxima"])
def test_small_radius_expansion(name, slope, case):
    z, radius = problems.HARD[case], 1e-8
    y = z - z.mean()
    sd = y.std()
    skew, kurtosis = (y**3).mean() / sd**3, (y**4).mean() / sd**4
    expansion = sd * math.sqrt(2 * radius) + slope * skew * sd * radius
    close(ball(name, z, radius).premium, expansion, 10 * (1 + skew**2 + kurtosis) * sd * radius**1.5)


# --- batches and dtypes -------------------------------------------------------------------------------------


def _batch(shape, n=9):
    generator = torch.Generator().manual_seed(3)
    losses = torch.randn(*shape, n, dtype=torch.float64, generator=generator)
    losses[..., 1] = losses[..., 0]
    return losses


def _assert_rows_agree(batch, row, losses):
    tolerance = value_tolerance(losses)
    close(batch.value, row.value, tolerance)
    close(batch.premium, row.premium, 1e-11 * row.premium.item() + 1e-300)
    close(batch.weights, row.weights, 1e-11)
    close(batch.threshold, row.threshold, 1e-9 * (1 + row.threshold.abs().item()))
    close(batch.strength, row.strength, 1e-9 * (1 + row.strength.item()))


@every_ball
@pytest.mark.parametrize("radius_shape", [(), (3,), (2, 1), (2, 3)])
def test_batch_of_balls_is_its_rows(name, radius_shape):
    losses = _batch((2, 3))
    losses[0, 1] = 4.0  # a constant row among the others
    losses[1, 2] *= 1e-8
    generator = torch.Generator().manual_seed(4)
    radius = 10.0 ** (torch.rand(radius_shape, dtype=torch.float64, generator=generator) * 10 - 8)
    batch = constrained_risk(losses, BALLS[name], radius)
    assert batch.weights.shape == (2, 3, 9)
    assert all(field.shape == (2, 3) for field in batch if field is not batch.weights)
    expanded = radius.expand(2, 3)
    for i in range(2):
        for j in range(3):
            row = constrained_risk(losses[i, j], BALLS[name], expanded[i, j].item())
            _assert_rows_agree(RobustRisk(*(field[i, j] for field in batch)), row, losses[i, j])


@every_ball
@pytest.mark.parametrize("strength_shape", [(), (3,), (2, 1), (2, 3)])
def test_batch_of_penalties_is_its_rows(name, strength_shape):
    losses = _batch((2, 3))
    generator = torch.Generator().manual_seed(4)
    strength = 10.0 ** (torch.rand(strength_shape, dtype=torch.float64, generator=generator) * 4 - 2)
    batch = penalized_risk(losses, BALLS[name], strength)
    expanded = strength.expand(2, 3)
    for i in range(2):
        for j in range(3):
            row = penalized_risk(losses[i, j], BALLS[name], expanded[i, j].item())
            _assert_rows_agree(RobustRisk(*(field[i, j] for field in batch)), row, losses[i, j])


def test_batch_of_cvar_is_its_rows():
    losses = _batch((2, 1, 4))
    batch = constrained_risk(losses, CVaR(0.3))
    assert batch.value.shape == (2, 1, 4)
    for index in np.ndindex(2, 1, 4):
        row = constrained_risk(losses[index], CVaR(0.3))
        _assert_rows_agree(RobustRisk(*(field[index] for field in batch)), row, losses[index])


@every_ball
def test_radii_from_nothing_to_past_the_maximum_in_one_batch(name):
    losses = _batch((1,), n=12)[0]
    radius = torch.tensor([0.0, 1e-14, 1e-8, 1e-2, 1.0, 3.0, 100.0], dtype=torch.float64)
    batch = constrained_risk(losses.expand(7, 12), BALLS[name], radius)
    for i, r in enumerate(radius.tolist()):
        row = constrained_risk(losses, BALLS[name], r)
        close(batch.value[i], row.value, value_tolerance(losses))
        close(batch.weights[i], row.weights, 1e-11)


@every_risk
def test_empty_batch(solve):
    risk = solve(torch.zeros(0, 5, dtype=torch.float64))
    assert risk.value.shape == (0,)
    assert risk.weights.shape == (0, 5)


@every_risk
def test_strided_losses(solve):
    losses = _batch((6,), n=6)
    close(solve(losses.T).value, solve(losses.T.contiguous()).value, 1e-13)
    close(solve(losses[:, ::2]).value, solve(losses[:, ::2].contiguous()).value, 1e-13)


@every_risk
def test_losses_are_left_as_they_were(solve):
    losses = _batch((2,))
    before = losses.clone()
    solve(losses)
    assert torch.equal(losses, before)


@every_risk
@pytest.mark.parametrize(
    "case", ["normal", "exponential", "all negative", "ties everywhere", "tied maxima", "narrow excess"]
)
def test_float32_agrees_with_float64(case, solve):
    losses = tensor(problems.HARD[case], torch.float32)
    single, double = solve(losses), solve(losses.double())
    assert all(field.dtype == torch.float32 for field in single)
    close(single.value.double(), double.value, value_tolerance(losses, torch.float32))
    temperature = solve.keywords.get("strength", double.strength.item())
    tolerance = ratio_tolerance(losses, ratios(double), temperature, torch.float32)
    close(ratios(single), ratios(double), tolerance)
    close(single.weights.sum(), 1.0, 2e-6)


@pytest.mark.parametrize("name", ["kl", "chi2"])
@pytest.mark.parametrize("radius", [1e-8, 1e-3, 0.3])
def test_float32_premium_is_float32_accurate(name, radius):
    losses = tensor(problems.HARD["normal"] + 100, torch.float32)
    single = constrained_risk(losses, BALLS[name], radius)
    double = constrained_risk(losses.double(), BALLS[name], radius)
    close(single.premium.double(), double.premium, 2e-6 * double.premium.item())


@every_risk
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype, solve):
    losses = tensor(problems.HARD["normal"]).to(dtype)
    half, double = solve(losses), solve(losses.double())
    assert all(field.dtype == torch.float32 for field in half)
    close(half.value.double(), double.value, value_tolerance(losses.double(), torch.float32))
    temperature = solve.keywords.get("strength", double.strength.item())
    close(
        ratios(half),
        ratios(double),
        ratio_tolerance(losses.double(), ratios(double), temperature, torch.float32),
    )


@every_risk
@pytest.mark.parametrize(
    "losses",
    [[0.5, -1.0, 2.0], [[0.0, 1.0], [2.0, 5.0]], np.float32([1, 2, 4]), np.array([0.25, 3.0]), [1, 2, 4]],
)
def test_numpy_and_lists_give_float64_tensors(losses, solve):
    risk = solve(losses)
    expected = solve(torch.tensor(np.asarray(losses, dtype=np.float64)))
    assert all(isinstance(field, torch.Tensor) and field.dtype == torch.float64 for field in risk)
    assert torch.equal(risk.value, expected.value)
    assert torch.equal(risk.weights, expected.weights)


# --- the divergences themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [KL(), ChiSquare(), CVaR(0.3)], ids=["kl", "chi2", "cvar"])
def test_divergence_and_conjugate_are_a_fenchel_pair(divergence):
    s = torch.linspace(-4, 3, 71, dtype=torch.float64)
    s = s[s != 0]
    t = divergence.conjugate_gradient(s)
    close(divergence.conjugate(s), s * t - divergence.phi(t), 1e-12 * 30)
    other = torch.linspace(0, 3, 61, dtype=torch.float64)[:, None]
    assert torch.all(divergence.conjugate(s) >= s * other - divergence.phi(other) - 1e-12)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert divergence.conjugate(zero) == 0
    assert divergence.phi(one) == 0


def test_divergences_by_their_formulas():
    t = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    close(ChiSquare().phi(t), [0.5, 0.125, 0.0, 0.5], 1e-15)
    close(KL().phi(t), [1.0, 0.5 - 0.5 * math.log(2), 0.0, 2 * math.log(2) - 1], 1e-15)
    assert CVaR(0.75).phi(t).tolist() == [0.0, 0.0, 0.0, math.inf]


@pytest.mark.parametrize("offset", [1e-12, -1e-9, 1e-6, -1e-4, 5e-3, 0.02, -0.3])
def test_phi_near_one_does_not_cancel(offset):
    t = 1 + offset
    e = t - 1  # exact
    with oracles.mp.workdps(50):
        x = oracles.mp.mpf(t)
        kl = float(x * oracles.mp.log(x) - x + 1)
    close(KL().phi(tensor([t])), kl, 1e-12 * kl)
    close(ChiSquare().phi(tensor([t])), e * e / 2, 1e-14 * e * e)


def test_divergences_are_values():
    assert KL() == KL()
    assert CVaR(0.1) == CVaR(alpha=0.1) != CVaR(0.2)
    assert len({KL(), KL(), ChiSquare(), CVaR(0.1), CVaR(0.1)}) == 3
