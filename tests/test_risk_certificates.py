"""Risks whose certificate was once wrong, or hard to reach: each by name, with its right value and its gap."""

import mpmath as mp
import numpy as np
import oracles
import pytest
import torch
from families import JensenShannon, LeCam, UserHellinger
from problems import scale_of, tensor

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk, penalized_risk
from drrho.solvers import native
from drrho.solvers.rows import Rows
from experiments.benchmarks import certificates, users

EPS = 2.0**-52


def certified(risk, losses):
    """The gap is not below the rounding of the losses."""
    __tracebackhide__ = True
    assert torch.isfinite(risk.value)
    assert risk.gap >= -4 * EPS * scale_of(losses)
    return risk


@pytest.mark.parametrize("radius", [1e-14, 1e-8, 1e-3, 0.19, 0.2, 0.21, 0.45])
def test_total_variation_moves_a_tiny_mass_of_base_weights(radius):
    losses, base = [0.0, 1.0, 2.0], [0.2, 0.3, 0.5]
    risk = certified(constrained_risk(losses, TotalVariation(), radius, base_weights=base), losses)
    expected = 2 * min(radius, 0.2) + max(radius - 0.2, 0)
    assert abs(risk.premium.item() - expected) <= 1e-11 * expected
    moved = 0.5 * np.abs(risk.weights.numpy() - base).sum()
    assert abs(moved - radius) <= 4 * EPS + 1e-11 * radius


@pytest.mark.parametrize("radius", [1e-14, 1e-9])
@pytest.mark.parametrize("n", [7, 200_000])
def test_total_variation_moves_a_tiny_mass_of_uniform_losses(n, radius):
    losses = np.random.default_rng(0).normal(size=n)
    losses[3], losses[5] = -8.0, 8.0
    risk = certified(constrained_risk(losses, TotalVariation(), radius), losses)
    assert abs(risk.premium.item() - 16 * radius) <= 1e-11 * 16 * radius
    batch = constrained_risk(np.stack([losses, losses]), TotalVariation(), radius)
    np.testing.assert_allclose(batch.premium, 16 * radius, rtol=1e-11)


EVERY = [CressieRead(0.5), TotalVariation(), CappedKL(0.5), KL(), ChiSquare(), JensenShannon()]


@pytest.mark.parametrize("divergence", EVERY, ids=lambda divergence: type(divergence).__name__)
def test_a_range_below_the_normal_numbers(divergence):
    risk = penalized_risk([1e-310, 0.0], divergence, 0.7)
    assert abs(risk.value.item() - 5e-311) <= 1e-323
    assert risk.premium == 0
    assert abs(risk.gap.item()) <= 1e-322
    assert risk.weights.tolist() == [0.5, 0.5]
    ball = constrained_risk([1e-310, 0.0], divergence, 0.01)
    assert 5e-311 < ball.value < 1e-310
    tail = penalized_risk([1e-310, 0.0], CVaR(0.5), 0.7)
    assert abs(tail.value.item() - 1e-310) <= 1e-323


@pytest.mark.parametrize("divergence", EVERY, ids=lambda divergence: type(divergence).__name__)
@pytest.mark.parametrize("strength", [1.0, 1e3, 1e10, 1e100])
def test_the_gap_of_a_strength_far_beyond_the_range_is_rounding_of_the_losses(divergence, strength):
    losses = [1.0, 0.0, 0.3]
    risk = certified(penalized_risk(losses, divergence, strength), losses)
    assert risk.gap <= 4 * EPS * scale_of(losses)


# --- a phi of the user's, with a pole in phi* -------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes over rows of the length given."""
    counted = {}
    means = Rows.means

    def counting(rows, terms):
        counted[rows.count] = counted.get(rows.count, 0) + 1
        return means(rows, terms)

    monkeypatch.setattr(Rows, "means", counting)
    return counted


@pytest.mark.parametrize("seed, n, value", [(6, 50_000, 1.52172819519), (2, 200_000, 1.58009833824)])
def test_le_cam_ball_on_a_long_row(seed, n, value, passes):
    losses = np.random.default_rng(seed).exponential(size=n)
    risk = certified(constrained_risk(losses, LeCam(), 0.05), losses)
    assert passes[n] <= 60
    assert abs(risk.value.item() - value) <= 1e-11
    assert risk.gap <= 1e-11
    reached = LeCam().phi(risk.weights * n).mean().item()
    assert abs(reached - 0.05) <= 1e-9 * 0.05


@pytest.mark.parametrize("n", [10_000, 100_000, pytest.param(300_000, marks=pytest.mark.slow)])
def test_jensen_shannon_ball_takes_few_passes(n, passes):
    losses = np.random.default_rng(0).exponential(size=n)
    risk = certified(constrained_risk(losses, JensenShannon(), 0.01), losses)
    assert passes[n] <= 60
    assert risk.gap <= 1e-11


def test_a_user_s_hellinger_on_a_long_row_is_that_of_cressie_read(passes):
    losses = np.random.default_rng(0).normal(size=100_000)
    risk = certified(constrained_risk(losses, UserHellinger(), 0.3), losses)
    assert passes[100_000] <= 60
    expected = constrained_risk(losses, CressieRead(0.5), 0.3)
    assert abs(risk.value - expected.value) <= 1e-11


def test_a_maximum_of_hardly_any_base_weight():
    losses = [1.9262504, 0.5338496, 0.8419819, 0.5816086, 0.6489227]
    base = [1.7583e-10, 1.7371e-4, 0.99095037, 6.3501e-3, 0.0]
    base[4] = 1 - sum(base)
    risk = certified(constrained_risk(losses, LeCam(), 8e-4, base_weights=base), losses)
    assert risk.gap <= 1e-11


# --- Cressie-Read next to order one, and of high orders -----------------------------------------------------------


@pytest.mark.parametrize("order", [1 + 2.0**-52, 1 - 2.0**-53, 1 + 1e-9, 1.001, 0.995])
def test_cressie_read_next_to_order_one(order):
    losses = [0.0, 1.0]
    risk = certified(constrained_risk(losses, CressieRead(order), 0.1), losses)
    expected = oracles.power_ball(losses, 0.1, order)
    assert abs(risk.value.item() - expected.value) <= 1e-12
    assert order > 1.01 or abs(risk.value.item() - 0.71979) <= 1e-3
    z = np.random.default_rng(0).normal(size=30)
    span = np.ptp(z)
    for radius in (0.9, 0.99):
        certified(constrained_risk(z, CressieRead(order), radius * np.log(30)), z)
    strong, hard = (certified(penalized_risk(z, CressieRead(order), price * span), z) for price in (1e-3, 1e-6))
    assert z.max() >= hard.value >= strong.value


def test_a_small_price_next_to_order_one():
    losses = [0.0, 1.0, 2.0]
    risk = certified(penalized_risk(losses, CressieRead(0.999999), 1e-3), losses)
    expected = penalized_risk(tensor(losses), KL(), 1e-3)
    assert abs(risk.value - expected.value) <= 1e-8
    assert abs(risk.threshold - expected.threshold) <= 1e-8
    assert risk.gap <= 1e-14


JUMPING = [0.989713033285805, -0.1642945926252907, -1.0743648582284346, 0.8730421526217066, -1.2803944147145731]


@pytest.mark.parametrize("order, strength", [(20, 0.3), (10, 0.3), (6, 0.1), (50, 1e-3)])
def test_high_orders_across_the_jump_of_a_ratio(order, strength):
    risk = certified(penalized_risk(JUMPING, CressieRead(order), strength), JUMPING)
    with mp.workdps(150):
        k, price, z = mp.mpf(order), mp.mpf(strength), [mp.mpf(loss) for loss in JUMPING]

        def ratios(threshold):
            return [max(1 + (k - 1) * (loss - threshold) / price, 0) ** (1 / (k - 1)) for loss in z]

        low, high = mp.mpf(-50), max(z)
        for _ in range(480):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(ratios(middle)) > len(z) else (low, middle)
        best, phi = ratios(high), oracles.power_phi(order)
        expected = sum(t * loss - price * phi(t) for t, loss in zip(best, z, strict=True)) / len(z)
    assert abs(risk.value.item() - float(expected)) <= 1e-14 * scale_of(JUMPING)


@pytest.mark.parametrize("order", [6.0, 20.0, 50.0])
@pytest.mark.parametrize("share", [1e-4, 0.1, 0.9])
def test_balls_of_high_orders_are_certified(order, share):
    largest = float(CressieRead(order).maximal_radius(np.array(0.2)))
    risk = certified(constrained_risk(JUMPING, CressieRead(order), share * largest), JUMPING)
    assert risk.gap <= 1e-11


# --- a search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", certificates.DRAWS)
def test_random_certificates_hold(name):
    said = []
    row = certificates.search(name, 12, 1, certificates.SIZES[:5], said.append)
    assert row.gap_below_4_eps == row.wrong == row.refused == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("name", certificates.DRAWS)
def test_many_random_certificates_hold(name):
    said = []
    row = certificates.search(name, 20, 2, certificates.SIZES[:6], said.append)
    assert row.gap_below_4_eps == row.wrong == row.refused == 0, said


# --- users' phi at the edges of what float64 holds -----------------------------------------------------------------


def judged(problem, divergence, exact):
    """The answer, whose value primal and dual prove in extended precision."""
    __tracebackhide__ = True
    risk = problem.solve(divergence)
    verdict = certificates.judge(problem, exact, risk)
    assert verdict.error <= verdict.allowed
    assert risk.gap >= -4 * EPS * scale_of(problem.losses)
    return risk


TANGENT = {  # losses and radii next to the largest, where a ratio rises from zero as the power 2/3
    "2": ([-1.00063688, -2.90923104], 0.4875787000115074),
    "3": ([-1000.01656442, 999.98343558, 1999.98343558], 1.1189739793492486),
    "5": ([5078020.1169795, 16085504.868746, 3234827.62975973, 2416498.34858014, 3037927.21165834], 2.714757257054016),
}


@pytest.mark.parametrize("size", TANGENT)
def test_a_ratio_that_rises_vertically_from_zero(size):
    losses, radius = TANGENT[size]
    problem = certificates.Problem(np.array(losses), None, True, radius)
    judged(problem, users.Alpha(4.0), certificates.power(2.5))


def test_two_losses_of_which_one_has_hardly_any_weight():
    losses, radius = TANGENT["2"]
    risk = constrained_risk(losses, users.Alpha(4.0), radius)
    with mp.workdps(50):
        k = mp.mpf(2.5)
        phi = lambda t: (t**k - k * t + k - 1) / (k * (k - 1))  # noqa: E731
        low, high = mp.mpf(0), mp.mpf(1)
        for _ in range(160):  # the smaller ratio, at which D is the radius
            middle = (low + high) / 2
            low, high = (middle, high) if (phi(2 - middle) + phi(middle)) / 2 > radius else (low, middle)
        expected = (losses[0] * (2 - low) + losses[1] * low) / 2
    assert abs(risk.value.item() - float(expected)) <= 1e-9 * np.ptp(losses)


UNDERFLOWING = {  # losses, base weights and radii of Jeffreys' balls that leave the smaller losses less than 1e-86
    "2": ([4.0, 2.0], [0.9995, 0.0005], 0.9999530298982366),
    "3": ([10000.0, -10000.0, -20000.0], [0.99886324, 0.0008358834, 0.0003008766], 0.9998272753377331),
    "5": ([1350.9, 1350.9, 507.1, -520.1, -520.1], [0.02372, 0.94735, 0.00058, 0.02829, 0.00006], 5.745633277784095),
}


@pytest.mark.parametrize("size", UNDERFLOWING)
def test_a_ball_whose_smaller_weights_underflow(size):
    losses, base, radius = UNDERFLOWING[size]
    problem = certificates.Problem(np.array(losses), np.array(base) / np.sum(base), True, radius)
    risk = judged(problem, users.Jeffreys(), certificates.JEFFREYS)
    assert abs(risk.value.item() - max(losses)) <= 4 * EPS * scale_of(losses)
    assert (risk.weights > 0).all() and abs(risk.weights.sum().item() - 1) <= 4 * EPS


@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_ball_whose_other_weights_are_of_1e_290(with_kernels, monkeypatch):
    """At small orders they still make out a part of D: the maximum alone is not in the ball."""
    if not with_kernels:
        monkeypatch.setattr(native, "library", None)
    base = np.array([4.83061907e-06, 2.05830729e-03, 9.97936862e-01])
    losses, order = np.array([7966.80891326, -2957.00436458, -8058.52247045]), 0.018132658966225623
    problem = certificates.Problem(losses, base / base.sum(), True, 56.16713682689649)
    risk = judged(problem, CressieRead(order), certificates.power(order))
    assert abs(risk.value.item() - losses[0]) <= 4 * EPS * scale_of(losses)
    assert (risk.weights > 0).all() and risk.weights[1:].sum() < 1e-280


def test_a_maximum_of_hardly_any_base_weight_next_to_a_pole():
    base = np.array([5e-10, 0.4, 0.6])
    problem = certificates.Problem(np.array([1.0, 0.0, -1e-5]), base / base.sum(), True, 1 - 5.36e-6)
    judged(problem, users.Triangular(), certificates.TRIANGULAR)


@pytest.mark.slow
def test_long_rows_next_to_the_largest_radius():
    rng = np.random.default_rng(3)
    losses = np.exp(3 * rng.normal(size=10_000))
    largest = float(users.Alpha(4.0).maximal_radius(np.array(1e-4)))
    judged(certificates.Problem(losses, None, True, largest * (1 - 1e-9)), users.Alpha(4.0), certificates.power(2.5))


def test_the_hard_maximum_of_many_ties_has_no_negative_gap():
    losses = np.random.default_rng(0).integers(-2, 3, size=10_000) * 1e-8
    risk = judged(certificates.Problem(losses, None, True, 3.8), users.Alpha(0.0), certificates.power(0.5))
    assert risk.value.item() == losses.max() and 0 <= risk.gap.item() <= 1e-13 * losses.max()


RARE = {  # losses, base weights of which the maximum has hardly any, and radii next to the largest
    "2": ([363.48409715, 363.28409715], [3.39969452e-11, 1.0], 2123593562.6950204),
    "3": ([730139.8, 374827.3, -3053438.5], [1.56432288e-12, 0.227853215, 0.772146785], 319604524697.1272),
    "3, closer": ([188.82317791, 8.58012542, 7.92144731], [7.40668729e-13, 0.795333756, 0.204666244], 453836.0438),
}


@pytest.mark.parametrize("name", RARE)
def test_a_chi_square_ball_around_a_maximum_of_hardly_any_base_weight(name):
    losses, base, radius = RARE[name]
    problem = certificates.Problem(np.array(losses), np.array(base) / np.sum(base), True, radius)
    judged(problem, ChiSquare(), certificates.power(2))


@pytest.mark.parametrize("kind", [float, np.float32], ids=["float64", "float32"])
def test_a_gap_is_not_negative_where_large_terms_of_d_cancel(kind):
    """The kernel's D of a loss of little weight is a difference of numbers ten thousand times as large."""
    losses = np.array([0.00956938, 0.08408765, 0.00480066, 0.01447484, 0.0053358], kind)
    base = np.array([6.32066489e-08, 9.56025449e-06, 6.60577059e-03, 9.84708151e-01, 8.67645538e-03])
    for order in (3.7845292144409726, 4.5, 6.0):
        for strength in (1e-4, 2.607513984310683e-4, 1e-3):
            risk = penalized_risk(torch.tensor(losses), CressieRead(order), strength, base_weights=base / base.sum())
            assert risk.gap >= -4 * torch.finfo(risk.gap.dtype).eps * (losses.max() + np.ptp(losses))
