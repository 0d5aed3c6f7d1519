"""Statistics of a study against scipy, closed forms and simulations."""

import numpy as np
import pytest
from scipy import stats

from experiments.clip.study.statistics import (
    compare_exponents,
    data_saved,
    paired_difference,
    paired_ratio,
    power_law_fit,
)


def scores(seed, n=8):
    rng = np.random.default_rng(seed)
    common = rng.normal(0.3, 0.02, n)
    return common + rng.normal(0.05, 0.01, n), common + rng.normal(0, 0.01, n)


def test_the_interval_of_a_difference_is_the_paired_tests():
    a, b = scores(0)
    found = paired_difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.t == pytest.approx((np.mean(a - b), *expected))
    assert (found.mean, found.n) == pytest.approx((np.mean(a - b), 8))
    assert found.bootstrap.low < found.mean < found.bootstrap.high
    assert found.bootstrap == pytest.approx(found.t, abs=np.std(a - b, ddof=1))
    back = paired_difference(b, a)
    assert (back.t.mean, back.t.low, back.t.high) == pytest.approx((-found.t.mean, -found.t.high, -found.t.low))
    assert paired_difference(a, a).bootstrap == (0, 0, 0)


@pytest.mark.slow
def test_intervals_of_differences_hold_the_true_one():
    covered = np.array([
        [interval.low <= 0.05 <= interval.high for interval in (found.t, found.bootstrap)]
        for found in (paired_difference(*scores(seed), replicates=300) for seed in range(300))
    ]).mean(0)  # fmt: skip
    assert 0.92 <= covered[0] <= 0.98  # standard error 0.013
    assert 0.84 <= covered[1] <= 0.97  # of 8 seeds, a bootstrap is too short


def test_fiellers_ends_are_where_the_paired_test_refuses():
    a, b = scores(1)
    ratio, low, high = paired_ratio(a, b)
    assert low < ratio < high
    assert ratio == pytest.approx(a.mean() / b.mean())
    for end in (low, high):
        assert stats.ttest_rel(a, end * b).pvalue == pytest.approx(0.05, rel=1e-6)
    assert paired_ratio(a, b - b.mean() + 1e-4)[1:] == (-np.inf, np.inf)


def test_data_saved_is_where_the_curves_meet():
    fractions = np.array([0.125, 0.25, 0.5, 1.0])
    noise = np.random.default_rng(2).normal(0, 0.005, 6)
    steered = (0.5 + 0.1 * np.log2(fractions))[:, None] + noise
    # A level of 0.35 is met half way, in logarithms, between 1/4 and 1/2; noise that both share does not move it.
    found = data_saved(fractions, steered, 0.35 + noise)
    assert found.fraction == pytest.approx([2**-1.5] * 3)
    assert (found.note, found.at_most, found.more_than_all) == ("", 0, 0)
    found = data_saved(fractions, steered, np.full(6, 0.1) + noise)
    assert (found.fraction.mean, found.note, found.at_most) == (0.125, "at most", 1)
    found = data_saved(fractions, steered, np.full(6, 0.6) + noise)
    assert (found.fraction.mean, found.note, found.more_than_all) == (np.inf, "more than all", 1)
    # Near an end, the interval says by infinity that all data may not suffice.
    found = data_saved(fractions, steered, 0.497 + np.random.default_rng(3).normal(0, 0.02, 6))
    assert 0 < found.more_than_all < 1
    assert np.isinf(found.fraction.high) and found.fraction.low < 1


@pytest.mark.parametrize("rule", ["best-of-bins", "all"])
def test_an_exact_power_law_is_recovered(rule):
    compute = np.geomspace(1e12, 1e17, 11)
    error = np.repeat((3 * compute**-0.12)[:, None], 4, axis=1)
    fit = power_law_fit(compute, error, rule, replicates=20)
    assert fit.exponent == pytest.approx([-0.12] * 3)
    assert fit.coefficient == pytest.approx([3] * 3)
    assert fit.at(compute) == pytest.approx(np.stack([error[:, 0]] * 3))
    assert len(fit.points) == (5 if rule == "best-of-bins" else 11)


def test_the_best_of_each_bin_is_fitted():
    compute = np.repeat(np.geomspace(1e12, 1e17, 5), 3)
    best = 3 * compute**-0.12
    error = best * np.tile([1.0, 1.5, 2.0], 5)  # two worse ones at the same compute
    assert power_law_fit(compute, error[:, None], replicates=2).coefficient.mean == pytest.approx(3)
    everything = power_law_fit(compute, error[:, None], "all", replicates=2)
    assert everything.coefficient.mean == pytest.approx(3 * 3 ** (1 / 3))  # the geometric mean of 1, 1.5 and 2
    slope, intercept = np.polyfit(np.log(compute), np.log(error), 1)
    assert (everything.exponent.mean, np.log(everything.coefficient.mean)) == pytest.approx((slope, intercept))


@pytest.mark.slow
def test_exponents_are_compared_on_the_same_seeds():
    rng, compute = np.random.default_rng(4), np.geomspace(1, 1e4, 9)
    noise = np.exp(rng.normal(0, 0.1, (9, 6)))
    fits = [power_law_fit(compute, 0.9 * compute[:, None] ** a * noise, "all") for a in (-0.12, -0.11)]
    found = compare_exponents(*fits)
    assert found.difference == pytest.approx([-0.01] * 3, abs=2e-3)  # what both share cancels
    assert found.probability_less == 1
    assert fits[0].exponent.high > fits[1].exponent.low  # though the intervals overlap


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paired_difference([0.1], [0.2]), "a and b must be scores of the same seeds, at least 2"),
        (lambda: paired_difference([0.1, np.nan], [0.2, 0.1]), "a must be finite, got nan"),
        (lambda: data_saved([1.0, 0.5], [[1], [1]], [1]), "fractions must be positive and ascending"),
        (lambda: data_saved([0.5, 1.0], [[1, 2], [1, 2]], [1]), r"steered must be \[fractions, seeds\] = \(2, 1\)"),
        (lambda: power_law_fit([1, 2], [[0.1], [0.0]]), "error must be positive, as its logarithm is fitted, got 0"),
        (lambda: power_law_fit([2, 2], [[0.1], [0.2]]), "compute must differ among the points that are fitted"),
        (lambda: power_law_fit([1, 2], [[0.1], [0.2]], "none"), "rule must be 'best-of-bins' or 'all', got 'none'"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
