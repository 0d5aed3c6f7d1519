"""Bounds on the robust risk of the law: coverage by exact enumeration, mutants, formulas of others, and refusals."""

import functools
import math

import numpy as np
import pytest
import torch
from problems import DIFFERENCE_LAWS, differences
from scipy import stats

from drrho import KL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk, penalized_risk
from drrho.robust_bounds import robust_risk_bound, worse_sample
from drrho.statements import Sample

LOSSES = np.random.default_rng(0).beta(1, 3, size=200)
RISKS = {
    "KL ball": (KL(), {"radius": 0.2}),
    "KL penalty": (KL(), {"strength": 0.3}),
    "chi-square ball": (ChiSquare(), {"radius": 0.2}),
    "CVaR": (CVaR(0.2), {}),
    "Hellinger ball": (CressieRead(0.5), {"radius": 0.1}),
    "total variation": (TotalVariation(), {"radius": 0.1}),
    "mean": (KL(), {"radius": 0.0}),
}
every_risk = pytest.mark.parametrize("name", RISKS)


def risk_of_the_law(name, values, chances):
    """Robust risks of laws with these values and chances ``[laws, values]``."""
    divergence, options = RISKS[name]
    chances = torch.as_tensor(np.atleast_2d(chances))
    atoms = torch.tensor(values, dtype=torch.float64).expand(chances.shape)
    solve = penalized_risk if "strength" in options else constrained_risk
    return solve(atoms, divergence, *options.values(), base_weights=chances).value.numpy()


@every_risk
@pytest.mark.parametrize(
    ("n", "delta"), [(3, 0.5), *(pytest.param(20, delta, marks=pytest.mark.slow) for delta in (0.1, 0.8))]
)
def test_failures_stay_below_delta_for_bernoulli_losses(name, n, delta):
    divergence, options = RISKS[name]
    bounds = np.array([
        robust_risk_bound(np.repeat([0.0, 1.0], [n - k, k]), divergence, value_range=1, delta=delta, **options).value
        for k in range(n + 1)
    ])  # fmt: skip
    p = np.concatenate([[1e-5, 1e-3], np.linspace(0.01, 0.99, 50)])
    truth = risk_of_the_law(name, [0.0, 1.0], np.stack([1 - p, p], axis=1))
    failures = (stats.binom.pmf(np.arange(n + 1), n, p[:, None]) * (bounds < truth[:, None] - 1e-12)).sum(1)
    assert failures.max() <= delta


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KL ball", "CVaR"])
def test_failures_of_a_class_stay_below_delta(name):
    """Losses Z and -Z, differences of 0-1 losses, all samples enumerated: the probability that one of both fails."""
    n, delta = 14, 0.5
    divergence, options = RISKS[name]
    counts = differences(n)
    ours = np.array([
        robust_risk_bound(np.repeat([-1.0, 0.0, 1.0], count), divergence, value_range=(-1, 1), delta=delta, models=2,
                          **options).value
        for count in counts
    ])  # fmt: skip
    place = {count: i for i, count in enumerate(counts)}
    theirs = ours[[place[count[::-1]] for count in counts]]
    for law in DIFFERENCE_LAWS:
        if min(law) == 0:
            law = np.array(law) + 1e-9
            law /= law.sum()
        truth = risk_of_the_law(name, [-1.0, 0.0, 1.0], [law, law[::-1]])
        failing = (truth[0] > ours + 1e-9) | (truth[1] > theirs + 1e-9)
        assert stats.multinomial.pmf(counts, n, law)[failing].sum() <= delta


@pytest.mark.parametrize("name", ["KL ball", "CVaR"])
def test_the_risk_of_the_sample_alone_is_no_bound(name):
    n, p = 20, 0.01
    divergence, options = RISKS[name]
    truth = risk_of_the_law(name, [0.0, 1.0], [1 - p, p])[0]
    bound = functools.partial(robust_risk_bound, divergence=divergence, value_range=1, **options)
    empirical = [bound(np.repeat([0.0, 1.0], [n - k, k])).terms["R_D of the sample"] for k in range(n + 1)]
    assert stats.binom.pmf(np.arange(n + 1), n, p)[np.array(empirical) < truth].sum() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KL ball", "CVaR", "chi-square ball"])
def test_failures_stay_below_delta_for_skewed_losses(name):
    rng, delta, runs = np.random.default_rng(3), 0.3, 200
    divergence, options = RISKS[name]
    truth = constrained_risk(rng.beta(0.3, 3, size=10**6), divergence, *options.values()).value.item()
    draws = rng.beta(0.3, 3, size=(runs, 60))
    failures = sum(
        robust_risk_bound(row, divergence, value_range=(0, 1), delta=delta, **options).value < truth for row in draws
    )
    assert failures <= runs * delta


def test_the_worse_sample_dominates_as_the_proof_says():
    sample = Sample.of(LOSSES)
    log_term, n = math.log(40), 200
    atoms, weights = (row.numpy() for row in worse_sample(sample, 1.0, log_term))
    assert weights.sum() == pytest.approx(1, rel=1e-14) and weights.min() > 0 and atoms[-1] == 1
    below = np.array([weights[atoms <= z + 1e-15].sum() for z in np.sort(LOSSES)])
    expected = np.arange(1, n + 1) / n - math.sqrt(log_term / (2 * n))
    top = np.arange(151, 201)
    expected[150:] = np.maximum(expected[150:], stats.beta.ppf(1 / 40 / 50, top, n - top + 1))
    np.testing.assert_allclose(below, np.maximum.accumulate(expected.clip(0)), atol=1e-11)


def test_cvar_in_numbers_and_sharper_than_brown():
    alpha, n = 0.2, 200
    bound = robust_risk_bound(LOSSES, CVaR(alpha), value_range=(0, 1))
    assert bound.terms["R_D of the sample"] == pytest.approx(np.sort(LOSSES)[-40:].mean())
    atoms, weights = (row.numpy() for row in worse_sample(Sample.of(LOSSES), 1.0, math.log(40)))
    tail = [eta + (weights * (atoms - eta).clip(0)).sum() / alpha for eta in atoms]
    assert bound.value == pytest.approx(min(tail), rel=1e-10)
    assert bound.terms["worse sample"] < math.sqrt(math.log(40) / (2 * n)) / alpha
    assert bound.terms["worse sample"] < math.sqrt(5 * math.log(60) / (alpha * n))


def test_radius_zero_bounds_the_mean():
    bound = robust_risk_bound(LOSSES, KL(), radius=0.0, value_range=(0, 1))
    assert LOSSES.mean() < bound.value < LOSSES.mean() + math.sqrt(math.log(40) / 400)


@every_risk
def test_laws(name):
    divergence, options = RISKS[name]
    bound = functools.partial(robust_risk_bound, divergence=divergence, **options)
    value = bound(LOSSES, value_range=(0, 1)).value
    assert value == pytest.approx(sum(bound(LOSSES, value_range=(0, 1)).terms.values()))
    assert (
        bound(LOSSES, value_range=(0, 1), delta=1e-6).value > value < bound(LOSSES, value_range=(0, 1), models=9).value
    )
    assert value < bound(LOSSES, value_range=(0, 1.5)).value
    assert bound(np.tile(LOSSES, 9), value_range=(0, 1)).value < value
    covered = bound(LOSSES, value_range=(0, 1), models=9, resolution=0.01)
    assert covered.value == pytest.approx(bound(LOSSES, value_range=(0, 1), models=9).value + 0.02)
    assert bound(LOSSES[::-1].copy(), value_range=(0, 1)).value == pytest.approx(value, rel=1e-12)
    if "strength" not in options:
        assert bound(4 * LOSSES - 8, value_range=(-8, -4)).value == pytest.approx(4 * value - 8, rel=1e-9)


def test_excess_losses_of_a_reference():
    reference = np.random.default_rng(1).beta(1, 3, size=200)
    options = {"radius": 0.1, "value_range": (-1, 1)}
    excess = robust_risk_bound(LOSSES, KL(), reference_losses=reference, reference_independent=True, **options)
    assert excess.value == robust_risk_bound(LOSSES - reference, KL(), **options).value
    dependent = robust_risk_bound(
        LOSSES, KL(), reference_losses=reference, reference_independent=False, models=5, **options
    )
    assert dependent.value == robust_risk_bound(LOSSES - reference, KL(), models=25, **options).value
    assert "CVaR(alpha=0.2) risk of the law <= " in str(robust_risk_bound(LOSSES, CVaR(0.2), value_range=1))
    assert "[guarantee] KL() risk of the law, radius 0.1" in str(excess) and "fixed without looking" in str(excess)


def test_many_models_and_few_losses_give_the_end_of_the_range():
    assert robust_risk_bound([0.0, 0.5], CVaR(0.5), value_range=(0, 1), log_models=1e6).value == 1
    assert robust_risk_bound([0.0, 0.5], KL(), radius=0.1, value_range=2).value <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robust_risk_bound([0.5], KL(), radius=1.0, value_range=1), "at least 2 entries, got 1"),
        (lambda: robust_risk_bound(LOSSES, KL(), radius=1.0, value_range=(0, 0.5)), r"value_range is \(0, 0.5\)"),
        (
            lambda: robust_risk_bound(LOSSES, KL(), radius=1.0, strength=1.0, value_range=1),
            "give one of radius and strength, got radius=1.0",
        ),
        (lambda: robust_risk_bound(LOSSES, KL(), value_range=1), "give one of radius and strength, got radius=None"),
        (lambda: robust_risk_bound(LOSSES, KL(), radius=-1.0, value_range=1), "radius"),
        (
            lambda: robust_risk_bound(LOSSES, CVaR(0.5), strength=1.0, value_range=1),
            r"radius and strength must be left out for CVaR\(alpha=0.5\), .* got radius=None and strength=1.0",
        ),
        (lambda: robust_risk_bound(LOSSES, KL(), radius=1.0, value_range=1, delta=2.0), "delta must be in"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
