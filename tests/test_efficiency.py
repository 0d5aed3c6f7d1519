"""Oracle inequalities and sample sizes: refuted alternatives, exact enumeration, numbers, and what is refused."""

import math

import mpmath
import numpy as np
import pytest
import torch
from problems import DIFFERENCE_LAWS, differences
from scipy.stats import binom, multinomial

from drrho import ChiSquare, constrained_risk
from drrho.efficiency import (
    crossover_samples,
    duchi_namkoong_oracle,
    exactness_probability,
    excess_over_best,
    excess_over_reference,
    oracle_inequality,
    samples_to_match_reference,
    samples_under_bernstein_condition,
)
from drrho.statements import Status


def two_point_risks(values, n, rho):
    """Return F_rho of n losses that take two values, for every number k of the higher one."""
    share = np.arange(n + 1) / n
    z = torch.tensor(values, dtype=torch.float64).expand(n + 1, 2)
    weights = torch.tensor(np.stack([1 - share, share], axis=1))
    return constrained_risk(z, ChiSquare(), rho / n, base_weights=weights).value.numpy()


@pytest.mark.parametrize(("n", "expected"), [(1000, 0.2335), (10000, 0.4090)])
def test_coefficient_one_is_refuted_and_the_implemented_one_holds(n, expected):
    """The reference, and one model that is better by sigma sqrt(2 rho / n) + (C + 1) / n, with losses +- sigma."""
    rho, constant, sigma = 5.0, 10.0, 0.5
    advantage = sigma * math.sqrt(2 * rho / n) + (constant + 1) / n
    keeps_reference = two_point_risks([-advantage - sigma, -advantage + sigma], n, rho) > 0
    excess_over_theta = np.where(keeps_reference, advantage, 0.0)
    probability = binom.pmf(np.arange(n + 1), n, 0.5)

    coefficient_one = sigma * math.sqrt(2 * rho / n) + constant / n
    refuted = probability[excess_over_theta > coefficient_one].sum()
    assert refuted == pytest.approx(expected, abs=1e-4)

    bound = oracle_inequality(n=n, rho=rho, value_range=2 * sigma, standard_deviation=sigma, models=2)
    assert refuted > 1 - bound.confidence
    assert probability[excess_over_theta > bound.value].sum() == 0


def test_the_minimizer_of_a_class_of_three_obeys_the_oracle_inequality():
    """Losses Z, -Z and 0 (the reference), enumerated; the bound is the best over comparators."""
    n, delta = 30, 0.5
    counts = differences(n)
    rho = n * math.log(4 * 3 / delta) / (n - 1)
    risks = np.array([[np.repeat([-1.0, 0, 1], c), np.repeat([-1.0, 0, 1], c[::-1])] for c in counts])
    ours, theirs = constrained_risk(risks, ChiSquare(), rho / n).value.numpy().T
    chosen = np.argmin([ours, theirs, np.zeros_like(ours)], axis=0)
    for law in DIFFERENCE_LAWS:
        mu = law[2] - law[0]
        sigma = math.sqrt(law[2] + law[0] - mu**2)
        options = {"n": n, "value_range": 2, "models": 3, "delta": delta}
        bound = min(
            float(oracle_inequality(risk=risk, standard_deviation=sd, **options))
            for risk, sd in ((mu, sigma), (-mu, sigma), (0.0, 0.0))
        )
        failing = np.array([mu, -mu, 0.0])[chosen] > bound
        assert multinomial.pmf(counts, n, law)[failing].sum() <= delta


def test_oracle_inequality_in_numbers():
    n, rho, delta, sigma, B = 500, 30.0, 0.02, 0.3, 2.0
    bound = oracle_inequality(
        n=n, rho=rho, delta=delta, models=9, standard_deviation=sigma, value_range=B, risk=0.1, resolution=1e-3
    )
    l1, l2 = mpmath.log(36 / delta), mpmath.log(4 / delta)
    expected = 0.1 + sigma * (1 + mpmath.sqrt(l2 / rho)) * mpmath.sqrt(2 * rho / n) + 2e-3
    expected += B * (mpmath.mpf(17) / 6 * l1 / (n - 1) + l2 / (3 * n) + mpmath.sqrt(rho * l2) / n)
    assert bound.value == pytest.approx(float(expected), rel=1e-14)
    simplified = oracle_inequality(
        n=n, rho=rho, delta=delta, models=9, standard_deviation=sigma, value_range=B, risk=0.1, simplified=True
    )
    assert simplified.value == pytest.approx(0.1 + 2 * sigma * math.sqrt(2 * rho / n) + 25 / 6 * B * rho / n)
    assert bound.value - 2e-3 < simplified.value


def test_duchi_namkoong_oracle_in_numbers_and_never_sharper():
    options = {"n": 10**5, "value_range": 1.0, "standard_deviation": 0.2, "models": 100, "delta": 0.05}
    bound = duchi_namkoong_oracle(**options)
    t = math.log(2 * 301 / 0.05)
    expected = 2 * 0.2 * math.sqrt(18 * t / 1e5) + 19 * 9 * t / 3e5
    assert bound.value == pytest.approx(expected)
    assert oracle_inequality(**options).value < bound.value
    assert math.isfinite(duchi_namkoong_oracle(n=7, value_range=2, standard_deviation=0.1, models=1).value)


def test_excess_over_best_with_and_without_a_reference():
    options = {"n": 1000, "loss_range": 1.0, "models": 20}
    alone = excess_over_best(standard_deviation=0.4, reference=False, **options)
    guided = excess_over_best(standard_deviation=0.1, reference=True, **options)
    for bound, sd, length in ((alone, 0.4, 1.0), (guided, 0.1, 2.0)):
        expected = oracle_inequality(n=1000, value_range=length, standard_deviation=sd, models=20)
        assert bound.value == expected.value
    assert "theta*" in guided.statement
    assert "reference" in " ".join(guided.assumptions) and "reference" not in " ".join(alone.assumptions)


@pytest.mark.parametrize("excess_sd", [0.0, 0.05, 0.3999])
def test_bounds_cross_where_it_is_said(excess_sd):
    options = {"loss_range": 1.0, "models": 20, "delta": 0.1}
    n = crossover_samples(standard_deviation=0.4, excess_standard_deviation=excess_sd, **options).samples
    for size, pays in ((n - 1, False), (n, True), (3 * n, True)):
        guided = excess_over_best(n=size, standard_deviation=excess_sd, reference=True, **options)
        alone = excess_over_best(n=size, standard_deviation=0.4, reference=False, **options)
        assert (guided.value < alone.value) == pays


def test_bounds_never_cross_without_less_variance():
    never = crossover_samples(loss_range=1, standard_deviation=0.2, excess_standard_deviation=0.2, models=5)
    assert never.samples == math.inf and "inf" in str(never)


def test_excess_over_reference_says_how_little_it_says():
    bound = excess_over_reference(n=1000, value_range=2, models=10)
    assert bound.status is Status.GUARANTEE
    assert bound.value == pytest.approx(17 / 6 * 2 * math.log(400) / 999)
    assert "not worse" in str(bound) and "n = 0" in str(bound)
    assert excess_over_reference(n=1000, value_range=2, models=10, reference_excess=0.1).status is Status.THEORY


def test_samples_to_match_a_reference():
    size = samples_to_match_reference(10**6, loss_range=1.0, models=1000, delta=0.05)
    assert (size.samples, size.baseline) == (13045, 250000)
    assert "13,045" in str(size) and "250,000" in str(size)
    options = {"loss_range": 2.0, "models": 1000, "constant": 5.0}
    small, large = (samples_to_match_reference(m, **options) for m in (10**4, 10**6))
    assert large.samples - 1 == pytest.approx(10 * (small.samples - 1), rel=1e-2)
    target = 2 * 5.0 / 1e3
    bound = excess_over_reference(n=large.samples, value_range=4.0, models=1000, reference_excess=target / 2)
    assert target - 1e-5 < bound.value <= target
    log_term = math.log(40000)
    assert 2.0 * math.sqrt(2 * log_term / large.baseline) <= target * (1 + 1e-12)


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("b0", [0.1, 10.0])
def test_samples_under_a_bernstein_condition_suffice(b0, fraction):
    excess, options = 0.05, {"models": 50, "delta": 0.1}
    size = samples_under_bernstein_condition(
        excess, bernstein_constant=b0, loss_range=1.0, fraction=fraction, **options
    )
    bound = oracle_inequality(
        n=size.samples, value_range=2, standard_deviation=math.sqrt(b0 * excess), simplified=True, **options
    )
    assert bound.value <= fraction * excess * (1 + 1e-9)


def test_exactness_is_likely():
    n, p, rho = 400, 0.5, 10.0
    bound = exactness_probability(rho=rho, n=n, value_range=1, standard_deviation=0.5)
    k = np.arange(1, n)
    exact = rho <= n * (1 - k / n) / (2 * k / n)  # rho_pos of k ones among n
    assert binom.pmf(k, n, p)[exact].sum() >= bound.value == pytest.approx(1 - math.exp(-200 / 16))


THEORY = {"n": 1000, "value_range": 2, "standard_deviation": 0.1, "models": 1}


def test_a_dependent_reference_costs_the_union_over_pairs():
    for n_models in (2, 50):
        options = {"n": 100, "value_range": 2}
        dependent = excess_over_reference(models=n_models, reference_independent=False, **options)
        assert dependent.value == excess_over_reference(models=n_models**2, **options).value
        oracle = oracle_inequality(
            models=n_models, reference_independent=False, standard_deviation=1.0, delta=0.1, **options
        )
        assert oracle.terms["sigma sqrt(2 L2/n)"] == pytest.approx(math.sqrt(2 * math.log(4 * n_models / 0.1) / 100))
        expected = 17 / 6 * 2 * math.log(4 * n_models**2 / 0.1) / 99
        assert oracle.terms["(17/6) B L1/(n - 1)"] == pytest.approx(expected)


def test_a_small_rho_gives_the_confidence_it_implies():
    n, models, rho = 200, 10, 5.0
    implied = 2 * models * math.exp(-rho * (n - 1) / n)
    oracle = oracle_inequality(n=n, rho=rho, value_range=2, standard_deviation=0.1, models=models, delta=0.01)
    assert oracle.confidence == pytest.approx(1 - 2 * implied)


PRINTED = [
    (lambda: oracle_inequality(**THEORY), "theory"),
    (lambda: oracle_inequality(estimated=True, **THEORY), "plug-in"),
    (lambda: duchi_namkoong_oracle(**THEORY), "theory"),
    (lambda: duchi_namkoong_oracle(estimated=True, **THEORY), "plug-in"),
    (
        lambda: excess_over_best(n=9, loss_range=1, standard_deviation=1, models=5, reference=True, estimated=True),
        "plug-in",
    ),
    (lambda: excess_over_reference(n=9, value_range=1, models=5), "guarantee"),
    (lambda: exactness_probability(rho=0.56, n=10, value_range=1, standard_deviation=0.5), "theory"),
    (lambda: crossover_samples(loss_range=1, standard_deviation=1, excess_standard_deviation=0.1, models=5), "theory"),
    (lambda: samples_to_match_reference(100, loss_range=1, models=5), "theory"),
    (lambda: samples_under_bernstein_condition(0.1, bernstein_constant=1, loss_range=1, models=5), "theory"),
]


@pytest.mark.parametrize(("make", "status"), PRINTED)
def test_printed_form_says_its_status(make, status):
    printed = str(make())
    assert f"[{status}]" in printed
    assert status == "plug-in" or "[plug-in]" not in printed


REFUSED = [
    (lambda: oracle_inequality(rho=0.1, **THEORY), "rho must be > 1.38.*got 0.1.*implied confidence"),
    (lambda: oracle_inequality(**{**THEORY, "n": 1}), "n must be >= 2, got 1"),
    (lambda: oracle_inequality(**{**THEORY, "standard_deviation": -1.0}), "standard_deviation.*got -1.0"),
    (
        lambda: oracle_inequality(**{**THEORY, "models": 2}, reference_independent=False, resolution=0.1),
        "resolution must be 0.*got 0.1",
    ),
    (lambda: duchi_namkoong_oracle(rho=10, **THEORY), "rho must be >= 9 t.*got 10.*implied confidence is 0"),
    (lambda: duchi_namkoong_oracle(**{**THEORY, "n": 6}), "n must be >= 8 M.*= 6.30.*got 6"),
    (lambda: exactness_probability(rho=0.57, n=10, value_range=1, standard_deviation=0.5), "rho must be <=.*got 0.57"),
    (lambda: oracle_inequality(**{**THEORY, "models": None}), "models or log_models, got neither"),
    (lambda: excess_over_reference(n=9, value_range=1), "models or log_models, got neither"),
    (lambda: samples_to_match_reference(0, loss_range=1, models=5), "reference_samples must be finite and > 0, got 0"),
    (
        lambda: samples_under_bernstein_condition(0.1, bernstein_constant=1, loss_range=1, fraction=2.0),
        r"fraction must be in \(0, 1\], got 2.0",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
