"""Smoothed risks: below the risk by what is promised, with derivatives, and exact at the worst case's own center."""

import numpy as np
import pytest
from scipy.optimize import linprog

from drrho import KL, CappedKL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk
from drrho.smoothing import ExactRisk, SmoothedTails, smoothed_risk

CASES = {
    "KL": (KL(), 0.3),
    "KL past the maximum": (KL(), 20.0),
    "chi-square": (ChiSquare(), 3.0),
    "Hellinger": (CressieRead(0.5), 0.2),
    "capped KL": (CappedKL(0.3), 5.0),
    "CVaR": (CVaR(0.3), 0.0),
    "CVaR of one": (CVaR(1e-3), 0.0),
    "total variation": (TotalVariation(), 0.2),
    "total variation past the maximum": (TotalVariation(), 3.0),
}
every_case = pytest.mark.parametrize("divergence, radius", CASES.values(), ids=CASES)
uniform_or_not = pytest.mark.parametrize("weighted", [False, True])


def losses(seed=0, n=17):
    rng = np.random.default_rng(seed)
    z, base = rng.exponential(size=n), rng.dirichlet(np.full(n, 3.0))
    z[3] = z[5]
    return z, base


@every_case
@uniform_or_not
def test_it_is_below_the_risk_by_at_most_the_strength(divergence, radius, weighted):
    z, base = losses()
    q, base = (base, base) if weighted else (np.full(len(z), 1 / len(z)), None)
    risk = constrained_risk(z, divergence, radius, base_weights=base).value.item()
    rounding = 1e-9 if isinstance(divergence, CappedKL) else 1e-12  # the generic solver's, at thresholds far away
    for strength in (1.0, 1e-3, 1e-7):
        worst = smoothed_risk(divergence, radius, q, base, strength).at(z)
        parts = 2 if isinstance(divergence, TotalVariation) else 1
        assert -rounding <= risk - worst.value <= parts * strength + rounding
        assert worst.weights.sum() == pytest.approx(1, abs=1e-13) and worst.weights.min() >= 0
        # The weights are those of the risk's own set: none attain more than the risk.
        assert worst.value - rounding <= worst.weights @ z <= risk + rounding


@every_case
@uniform_or_not
def test_responses_are_derivatives_of_the_weights(divergence, radius, weighted):
    z, base = losses(1)
    q, base = (base, base) if weighted else (np.full(len(z), 1 / len(z)), None)
    risk = smoothed_risk(divergence, radius, q, base, 0.1)
    direction, step = np.random.default_rng(2).normal(size=len(z)), 1e-6
    above, below = risk.at(z + step * direction), risk.at(z - step * direction)
    expected = (above.weights - below.weights) / (2 * step)
    found = np.zeros_like(z)
    for h, a in risk.at(z).responses:
        if not h.any():
            continue
        change = h * (direction - h @ direction / h.sum())
        if a is not None:
            along = h * (a - h @ a / h.sum())
            change -= along * (along @ direction) / (along @ (a - h @ a / h.sum()))
        found += change
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (above.value - below.value) / (2 * step) == pytest.approx(risk.at(z).weights @ direction, abs=1e-8)


@every_case
def test_centers_approach_the_worst_case(divergence, radius):
    z, _ = losses(3)
    q = np.full(len(z), 1 / len(z))
    exact = constrained_risk(z, divergence, radius).value.item()
    risk = smoothed_risk(divergence, radius, q, None, 0.3)
    below = []
    for _ in range(30):
        below.append(exact - risk.at(z).weights @ z)
        risk = risk.recentered(z, 0.3)
    assert (np.diff(below) <= 1e-12).all()  # the method of multipliers ascends
    assert below[-1] <= 1e-2 * max(below[0], 1e-10)


def test_total_variation_is_a_maximum_and_a_tail():
    z, base = losses(4)
    n, radius = len(z), 0.37
    # p with sum |p - q| <= 2 radius: variables p and bounds u on |p - q|
    identity = np.eye(n)
    above = np.block([[identity, -identity], [-identity, -identity], [np.zeros((1, n)), np.ones((1, n))]])
    limits = np.concatenate([base, -base, [2 * radius]])
    total = np.concatenate([np.ones(n), np.zeros(n)])[None]
    program = linprog(-np.concatenate([z, np.zeros(n)]), above, limits, total, [1.0])
    smoothed = smoothed_risk(TotalVariation(), radius, base, base, 1e-9)
    assert isinstance(smoothed, SmoothedTails) and len(smoothed.tails) == 2
    assert smoothed.at(z).value == pytest.approx(-program.fun, abs=1e-8)


@pytest.mark.parametrize("divergence", [ChiSquare(), TotalVariation(), CVaR(1.0)])
def test_a_mean_is_not_smoothed(divergence):
    z, _ = losses()
    risk = smoothed_risk(divergence, 0.0, np.full(len(z), 1 / len(z)), None, 1.0)
    assert isinstance(risk, ExactRisk)
    assert risk.at(z).value == pytest.approx(z.mean(), rel=1e-15)


def test_constant_losses():
    for divergence, radius in CASES.values():
        risk = smoothed_risk(divergence, radius, np.full(5, 0.2), None, 0.1)
        worst = risk.at(np.full(5, 3.0))
        assert worst.value == pytest.approx(3.0, rel=1e-14)
        np.testing.assert_allclose(worst.weights, 0.2, rtol=1e-12)
        assert all(np.isfinite(response.h).all() for response in worst.responses)
        assert np.isfinite(risk.recentered(np.full(5, 3.0), 0.01).at(np.arange(5.0)).value)
