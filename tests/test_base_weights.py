"""Base weights q: the ball is around q, a zero weight means an absent sample, whole numbers mean repetition.

Drawn base weights are whole multiples of a power of two, so that they sum to one exactly and the mean they define
has no rounding of its own.
"""

import math

import numpy as np
import oracles
import problems
import pytest
import torch
from families import EVERY, KINDS, SMOOTH, SMOOTH_KINDS, thorough
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import scale_of, tensor, value_tolerance
from torch.autograd import grad, gradcheck, gradgradcheck

from drrho import (
    KL,
    CappedKL,
    ChiSquare,
    CressieRead,
    CVaR,
    TotalVariation,
    constrained_risk,
    drrho_risk,
    hybrid_risk,
    penalized_risk,
)

EPS = 2.0**-52
CHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}


def _hybrid(losses, divergence, parameter, **kwargs):
    return hybrid_risk(losses, divergence, parameter, 0.3, **kwargs)


SOLVERS = {"ball": (constrained_risk, 0.2), "penalty": (penalized_risk, 1.5), "hybrid": (_hybrid, 0.2)}
every_kind = pytest.mark.parametrize("name", thorough(KINDS))
every_solver = pytest.mark.parametrize("solve, parameter", SOLVERS.values(), ids=SOLVERS)
every_smooth = pytest.mark.parametrize("name", thorough(SMOOTH_KINDS))


def law(examples=20):
    """A deterministic hypothesis test."""
    return settings(derandomize=True, deadline=None, max_examples=examples, database=None)


def close(actual, expected, tolerance):
    __tracebackhide__ = True
    assert np.all(np.abs(np.asarray(actual) - np.asarray(expected)) <= np.asarray(tolerance)), (
        f"{actual} differs from {expected} by more than {tolerance}"
    )


@st.composite
def weighted_rows(draw, low=0, max_size=8, **kwargs):
    """A row and repetitions of its samples, a power of two in all."""
    losses = draw(problems.rows(max_size=max_size, **kwargs))
    counts = draw(st.lists(st.integers(low, 4), min_size=len(losses), max_size=len(losses)))
    last = max(i for i in range(len(losses)) if counts[i] > 0) if any(counts) else 0
    counts[last] += 2 ** math.ceil(math.log2(max(sum(counts), 1))) - sum(counts)
    return losses, counts


def base_of(counts):
    return np.array(counts) / sum(counts)


def assert_same(one, two, losses):
    """Two solutions of one problem, up to their weights' arrangement."""
    __tracebackhide__ = True
    close(one.value, two.value, value_tolerance(losses))
    close(one.premium, two.premium, 1e-11 * two.premium + EPS * scale_of(losses))
    close(one.strength, two.strength, 1e-8 * two.strength)


# --- laws -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_kind
@every_solver
@law(12)
@given(row=weighted_rows())
def test_whole_numbers_mean_repetition(row, solve, parameter, name):
    losses, counts = row
    weighted = solve(tensor(losses), EVERY[name], parameter, base_weights=base_of(counts))
    repeated = solve(tensor(np.repeat(losses, counts)), EVERY[name], parameter)
    assert_same(weighted, repeated, losses)
    pieces = np.split(repeated.weights.numpy(), np.cumsum(counts)[:-1])
    close(weighted.weights, [piece.sum() for piece in pieces], 1e-11)


@pytest.mark.slow
@every_kind
@every_solver
@law(10)
@given(losses=problems.rows(max_size=6), absent=st.lists(st.sampled_from([-1e9, -3.0, 0.0, 1.5, 1e9]), max_size=3))
def test_a_zero_weight_means_an_absent_sample(losses, absent, solve, parameter, name):
    n = len(losses)
    base = np.concatenate([np.full(n, 1 / n), np.zeros(len(absent))])
    padded = tensor([*losses, *absent]).requires_grad_()
    with_them = solve(padded, EVERY[name], parameter, base_weights=base)
    without = solve(tensor(losses), EVERY[name], parameter)
    detached = type(with_them)(*(field.detach() for field in with_them))
    assert_same(detached, without, losses)
    close(detached.weights[:n], without.weights, 1e-11)
    assert torch.all(detached.weights[n:] == 0.0)
    close(detached.threshold, without.threshold, 1e-8 * (scale_of(losses) + without.strength))
    assert abs(detached.gap) <= value_tolerance(losses)
    (gradient,) = grad(with_them.value, padded, create_graph=True)
    assert torch.all(gradient[n:] == 0.0)
    if gradient.requires_grad:
        (second,) = grad(gradient.square().sum(), padded)
        assert torch.isfinite(second).all()
        assert torch.all(second[n:] == 0.0)


@every_kind
@every_solver
def test_equal_weights_are_the_default(solve, parameter, name):
    for n in (1, 7, 16):
        losses = tensor(problems.HARD["normal"][:n])
        plain, weighted = (
            solve(losses, EVERY[name], parameter, base_weights=q) for q in (None, torch.full((n,), 1 / n).double())
        )
        assert_same(weighted, plain, losses)
        close(weighted.weights, plain.weights, 1e-12)


@every_kind
@every_solver
@pytest.mark.parametrize("case", ["normal", "ties everywhere", "offset -1e8", "one high", "heavy tail"])
def test_premium_is_the_value_less_the_weighted_mean(case, solve, parameter, name):
    losses = problems.HARD[case]
    counts = 1 + np.arange(len(losses)) % 4
    counts[0] += 256 - counts.sum()
    base = base_of(counts)
    risk = solve(tensor(losses), EVERY[name], parameter, base_weights=base)
    close(risk.value, base @ losses + risk.premium, value_tolerance(losses))
    close(risk.weights.sum(), 1.0, 1e-12)
    assert risk.weights.min() >= 0
    assert risk.premium >= 0
    assert abs(risk.gap) <= value_tolerance(losses)


@every_kind
@law(15)
@given(row=weighted_rows())
def test_zero_radius_is_the_weighted_mean(row, name):
    losses, counts = row
    if name == "cvar":
        return
    risk = constrained_risk(tensor(losses), EVERY[name], 0.0, base_weights=base_of(counts))
    close(risk.value, base_of(counts) @ losses, value_tolerance(losses))
    close(risk.weights, base_of(counts), 1e-15)
    assert risk.premium == 0.0


@pytest.mark.parametrize(
    "name", thorough([k for k in SMOOTH if k not in ("order 0", "order -1") and "capped" not in k])
)
@law(15)
@given(row=weighted_rows(varied=True))
def test_radius_past_the_maximal_one_gives_the_maximum_of_the_support(row, name):
    losses, counts = row
    base = base_of(counts)
    support = np.array(losses)[base > 0]
    maximal = oracles.maximal_radius(SMOOTH[name].phi, losses, base)
    risk = constrained_risk(tensor(losses), EVERY[name], maximal * (1 + 1e-9) + 1e-300, base_weights=base)
    if support.min() < support.max():
        assert risk.value == support.max()
    tied = base * (np.array(losses) == support.max())
    close(risk.weights, tied / tied.sum(), 1e-12)


# --- oracles --------------------------------------------------------------------------------------------------


def assert_agrees(risk, expected, losses, relative=1e-11, weights=1e-10):
    __tracebackhide__ = True
    close(risk.value, expected.value, value_tolerance(losses))
    close(risk.premium, expected.premium, relative * expected.premium + 1e-300)
    close(risk.weights, expected.weights, weights)


BALLS = {
    "kl": (KL(), oracles.kl_ball),
    "chi2": (ChiSquare(), oracles.chi_square_ball),
    "tv": (TotalVariation(), oracles.total_variation_ball),
    "capped kl": (CappedKL(0.3), lambda z, r, q: oracles.capped_kl_ball(z, r, 0.3, q)),
    "order 1.5": (CressieRead(1.5), lambda z, r, q: oracles.power_ball(z, r, 1.5, q)),
    "order 0.5": (CressieRead(0.5), lambda z, r, q: oracles.power_ball(z, r, 0.5, q)),
    "order 0": (CressieRead(0.0), lambda z, r, q: oracles.power_ball(z, r, 0.0, q)),
    "order -1": (CressieRead(-1.0), lambda z, r, q: oracles.power_ball(z, r, -1.0, q)),
}
PENALTIES = {
    "kl": (KL(), oracles.kl_penalty),
    "chi2": (ChiSquare(), oracles.chi_square_penalty),
    "capped kl": (CappedKL(0.3), lambda z, s, q: oracles.capped_kl_penalty(z, s, 0.3, q)),
    "order 3": (CressieRead(3.0), lambda z, s, q: oracles.power_penalty(z, s, 3.0, q)),
    "order 0.5": (CressieRead(0.5), lambda z, s, q: oracles.power_penalty(z, s, 0.5, q)),
    "order -1": (CressieRead(-1.0), lambda z, s, q: oracles.power_penalty(z, s, -1.0, q)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BALLS)
@law(20)
@given(row=weighted_rows(), radius=problems.radii(-8, 0.5))
def test_ball_against_its_oracle(name, row, radius):
    losses, counts = row
    divergence, oracle = BALLS[name]
    risk = constrained_risk(tensor(losses), divergence, radius, base_weights=base_of(counts))
    assert_agrees(risk, oracle(losses, radius, base_of(counts)), losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", PENALTIES)
@law(25)
@given(row=weighted_rows(), strength=problems.radii(-2, 2))
def test_penalty_against_its_oracle(name, row, strength):
    losses, counts = row
    divergence, oracle = PENALTIES[name]
    risk = penalized_risk(tensor(losses), divergence, strength, base_weights=base_of(counts))
    # Order 3 takes square roots of differences: eps there is 1e-8 in a ratio, and second order in the value.
    assert_agrees(risk, oracle(losses, strength, base_of(counts)), losses, weights=1e-7 if name == "order 3" else 1e-10)


@pytest.mark.slow
@law(60)
@given(row=weighted_rows(), strength=problems.radii(-2, 3))
def test_total_variation_penalty_is_a_weighted_mean_of_lifted_losses(row, strength):
    losses, counts = row
    risk = penalized_risk(tensor(losses), TotalVariation(), strength, base_weights=base_of(counts))
    expected = oracles.total_variation_penalty(losses, strength, base_of(counts))
    close(risk.value, expected.value, value_tolerance(losses))


@pytest.mark.slow
@law(80)
@given(row=weighted_rows(), alpha=problems.alphas)
def test_cvar_against_its_oracle(row, alpha):
    losses, counts = row
    risk = constrained_risk(tensor(losses), CVaR(alpha), base_weights=base_of(counts))
    assert_agrees(risk, oracles.cvar(losses, alpha, base_of(counts)), losses)


@every_smooth
@law(12)
@given(row=weighted_rows(varied=True), radius=problems.radii(-8, 0.5))
def test_ball_is_certified(name, row, radius):
    losses, counts = row
    base = base_of(counts)
    assume(np.ptp(np.array(losses)[base > 0]) > 0)
    risk = constrained_risk(tensor(losses), EVERY[name], radius, base_weights=base)
    _, phi, conjugate, cap = SMOOTH[name]
    proof = oracles.certify(
        phi, conjugate, losses, risk.weights.tolist(), risk.strength.item(), risk.threshold.item(), radius, base, cap
    )
    assert proof.divergence <= radius * (1 + 1e-9) + 1e-15
    rounding = 4 * EPS * (base @ np.abs(losses - base @ losses))
    assert proof.bound - proof.primal <= 1e-11 * proof.bound + rounding
    close(risk.premium, proof.bound, 1e-11 * proof.bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "chi2", "order 0.5", "tv"])
def test_weights_that_are_not_dyadic(name):
    losses, base = problems.HARD["normal"], np.random.default_rng(1).dirichlet(np.ones(60))
    divergence, oracle = BALLS[name]
    for radius in (1e-4, 0.3):
        expected = oracle(losses.tolist(), radius, base)
        risk = constrained_risk(tensor(losses), divergence, radius, base_weights=base)
        assert_agrees(risk, expected, losses)


@pytest.mark.slow
@pytest.mark.parametrize("smallest", [1e-12, 1e-30])
@pytest.mark.parametrize("name", ["kl", "chi2", "order 0.5", "capped kl", "tv"])
def test_a_tiny_weight_on_the_largest_loss(name, smallest):
    losses, base = [0.0, 1.0, 2.0, 3.0], np.array([0.25, 0.25, 0.5, smallest])
    divergence, oracle = BALLS[name]
    for radius in (1e-3, 0.4, 3.0):
        expected = oracle(losses, radius, base)
        risk = constrained_risk(tensor(losses), divergence, radius, base_weights=base)
        close(risk.value, expected.value, value_tolerance(losses))
        close(risk.weights, expected.weights, 1e-10)


@pytest.mark.parametrize("smallest", [1e-60, 1e-100, 1e-300])
@pytest.mark.parametrize("radius", [1e-3, 0.4, 3.0])
def test_a_vanishing_weight_is_no_weight_to_chi_square(radius, smallest):
    # At most sqrt(2 radius weight) can move to it.
    losses = [0.0, 1.0, 2.0, 3.0]
    risk, without = (
        constrained_risk(tensor(losses), ChiSquare(), radius, base_weights=[0.25, 0.25, 0.5, last])
        for last in (smallest, 0.0)
    )
    close(risk.value, without.value, value_tolerance(losses))
    close(risk.weights, without.weights, 1e-12)


# --- batches, types, rho ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "chi2", "cvar", "tv", "order 0.5", "capped kl 0.3", "le cam"])
@every_solver
@pytest.mark.parametrize("shape", [(9,), (2, 1, 9), (2, 3, 9)])
def test_batch_of_base_weights_is_its_rows(shape, solve, parameter, name):
    generator = torch.Generator().manual_seed(5)
    losses = torch.randn(2, 3, 9, dtype=torch.float64, generator=generator)
    counts = torch.randint(0, 5, shape, generator=generator).double()
    counts[..., 0] += 64 - counts.sum(-1)
    base = counts / 64
    batch = solve(losses, EVERY[name], parameter, base_weights=base)
    everywhere = base.expand(2, 3, 9)
    for index in np.ndindex(2, 3):
        row = solve(losses[index], EVERY[name], parameter, base_weights=everywhere[index])
        close(batch.value[index], row.value, value_tolerance(losses[index]))
        close(batch.premium[index], row.premium, 1e-11 * row.premium + 1e-300)
        close(batch.weights[index], row.weights, 1e-11)


@every_solver
@pytest.mark.parametrize("convert", [list, tuple, np.array, tensor, lambda q: tensor(q, torch.float32)])
def test_base_weights_of_any_type(convert, solve, parameter):
    losses, base = tensor([1.0, -2.0, 0.5]), [0.25, 0.5, 0.25]
    expected = solve(losses, KL(), parameter, base_weights=tensor(base))
    given_so = solve(losses, KL(), parameter, base_weights=convert(base))
    assert torch.equal(given_so.value, expected.value)
    assert given_so.value.dtype == torch.float64


def test_base_weights_rounded_to_float32_are_accepted():
    losses = tensor(problems.HARD["normal"])
    base = torch.rand(60, generator=torch.Generator().manual_seed(0))
    base /= base.sum()
    exact = base.double() / base.double().sum()
    for divergence in (KL(), ChiSquare(), CVaR(0.2)):
        rounded = constrained_risk(losses, divergence, 0.3, base_weights=base)
        close(rounded.value, constrained_risk(losses, divergence, 0.3, base_weights=exact).value, 2e-6)
        close(rounded.weights.sum(), 1.0, 1e-12)


def test_rho_is_the_radius_times_the_number_of_samples():
    losses, reference = (
        torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    base = tensor([1, 1, 2, 4, 0, 3, 3, 2]) / 16
    steered = drrho_risk(losses, reference, ChiSquare(), rho=2.0, base_weights=base)
    plain = constrained_risk(losses - reference, ChiSquare(), 0.25, base_weights=base)
    assert torch.equal(steered.value, plain.value)
    assert torch.equal(steered.weights, plain.weights)
    same = drrho_risk(losses, reference, ChiSquare(), radius=0.25, base_weights=base)
    assert torch.equal(steered.value, same.value)


# --- derivatives ------------------------------------------------------------------------------------------------

BASE = torch.tensor([[1.0, 4, 3, 0, 6, 2], [3, 3, 3, 3, 2, 2]], dtype=torch.float64) / 16


def generic(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.slow
@every_smooth
def test_derivatives_of_the_ball(name):
    radius = torch.tensor([0.02, 0.2], dtype=torch.float64, requires_grad=True)

    def value(z, r):
        return constrained_risk(z, EVERY[name], r, base_weights=BASE).value

    assert gradcheck(value, (generic(2, 6), radius), **CHECK)
    assert gradgradcheck(value, (generic(2, 6), radius), **CHECK)


@pytest.mark.slow
@every_smooth
def test_derivatives_of_the_penalty(name):
    strength = torch.tensor([0.8, 3.0], dtype=torch.float64, requires_grad=True)

    def value(z, lam):
        return penalized_risk(z, EVERY[name], lam, base_weights=BASE).value

    assert gradcheck(value, (generic(2, 6), strength), **CHECK)
    assert gradgradcheck(value, (generic(2, 6), strength), **CHECK)


@every_kind
@every_solver
def test_gradients_of_value_and_premium(solve, parameter, name):
    losses = generic(2, 6)
    risk = solve(losses, EVERY[name], parameter, base_weights=BASE)
    (by_value,) = grad(risk.value.sum(), losses, retain_graph=True)
    (by_premium,) = grad(risk.premium.sum(), losses)
    close(by_value, risk.weights.detach(), 1e-13)
    close(by_premium, risk.weights.detach() - BASE, 1e-13)


# --- refusals ---------------------------------------------------------------------------------------------------


def assert_refused(call, *mentions, error=ValueError):
    __tracebackhide__ = True
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value).lower()
    for mention in mentions:
        assert str(mention).lower() in message, f"{message!r} does not mention {mention!r}"


@every_solver
def test_base_weights_must_be_a_distribution(solve, parameter):
    losses = tensor([0.5, -1.0, 2.0, 0.0])

    def call(base):
        return lambda: solve(losses, KL(), parameter, base_weights=base)

    assert_refused(call([0.5, 0.5, 0.25, 0.0]), "base_weights", "sum", 1.25)
    assert_refused(call([0.0, 0.0, 0.0, 0.0]), "base_weights", "sum")
    assert_refused(call([0.25, 0.25, 0.25, 0.25 + 2e-6]), "base_weights", "sum")
    assert_refused(call([0.75, -0.25, 0.25, 0.25]), "base_weights", -0.25)
    assert_refused(call([math.nan, 0.5, 0.25, 0.25]), "base_weights", "nan")
    assert_refused(call([math.inf, 0.5, 0.25, 0.25]), "base_weights", "inf")
    assert_refused(call([0.5, 0.25, 0.25]), "base_weights", 3)
    assert_refused(call(torch.full((2, 4), 0.25, dtype=torch.float64)), "base_weights", 2)
    assert_refused(call(["a", "b", "c", "d"]), "base_weights", error=TypeError)


@every_solver
def test_one_bad_row_of_base_weights(solve, parameter):
    losses = torch.zeros(3, 4, dtype=torch.float64)
    base = torch.full((3, 4), 0.25, dtype=torch.float64)
    base[1, 2] = 0.5
    assert_refused(lambda: solve(losses, ChiSquare(), parameter, base_weights=base), "base_weights", "sum", 1.25)


def test_base_weights_go_by_name():
    with pytest.raises(TypeError):
        constrained_risk(tensor([0.0, 1.0]), KL(), 0.1, tensor([0.5, 0.5]))
