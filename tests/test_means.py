"""The choice among bounds on a mean: coverage by exact enumeration, who is sharpest where, and what is refused."""

import math

import numpy as np
import pytest
from scipy import stats

from drrho.betting import capital_bound
from drrho.bounds import empirical_bernstein
from drrho.means import METHODS, mean_bound

RNG = np.random.default_rng(0)
TARGET, REFERENCE = RNG.uniform(size=200), RNG.uniform(size=200)


@pytest.mark.parametrize("method", ["hoeffding", "bernstein", "smaller"])
@pytest.mark.parametrize(("n", "delta"), [(3, 0.5), (25, 0.1), (25, 0.9)])
def test_failures_stay_below_delta(method, n, delta):
    bounds = [
        float(mean_bound(np.repeat([0.0, 1.0], [n - k, k]), value_range=1, delta=delta, method=method))
        for k in range(n + 1)
    ]
    for p in np.concatenate([[1e-6, 1e-3], np.linspace(0.01, 0.99, 99), np.array(bounds)[np.less(bounds, 1)] + 1e-9]):
        assert stats.binom.pmf(np.arange(n + 1), n, p)[np.array(bounds) < p].sum() <= delta


def test_bernstein_does_not_lose_to_hoeffding_at_one_half():
    """The smaller of both costs little beside the better one; betting is below all of them."""
    for losses in (np.repeat([0.0, 1.0], 500), np.repeat([0.0, 1.0], [990, 10])):
        value = {m: mean_bound(losses, value_range=(0, 1), method=m).value - losses.mean() for m in METHODS}
        best = min(value["hoeffding"], value["bernstein"])
        assert best <= value["smaller"] < 1.25 * best
        assert value["auto"] == value["betting"] < 0.9 * best
    losses = np.repeat([0.0, 1.0], 500)
    assert (
        mean_bound(losses, value_range=1, method="hoeffding").value < empirical_bernstein(losses, value_range=1).value
    )


def test_the_result_says_which_method_was_used():
    half, rare = np.repeat([0.0, 1.0], 500), np.repeat([0.0, 1.0], [990, 10])
    assert mean_bound(half, value_range=1).method == "hoeffding"
    assert mean_bound(rare, value_range=1).method == "bernstein"
    assert mean_bound(rare, value_range=(0, 1)).method == "betting"
    assert mean_bound(rare, value_range=(0, 1), resolution=0.01).method == "bernstein"
    for bound in (mean_bound(half, value_range=1), mean_bound(rare, value_range=(0, 1))):
        assert f"method: {bound.method}" in str(bound) and "[guarantee]" in str(bound)
        assert bound.confidence == 0.95 and math.fsum(bound.terms.values()) == pytest.approx(bound.value, rel=1e-12)
    assert "1 - 0.05" in mean_bound(half, value_range=1).statement


def test_bernstein_is_the_bound_of_that_name():
    for options in ({"models": 7}, {"models": 3, "resolution": 0.01}):
        expected = empirical_bernstein(TARGET, value_range=1, **options).value
        assert mean_bound(TARGET, value_range=1, method="bernstein", **options).value == expected
    hoeffding = mean_bound(TARGET, value_range=(0, 1.5), models=4, delta=0.1, method="hoeffding").value
    assert hoeffding == pytest.approx(TARGET.mean() + 1.5 * math.sqrt(math.log(40) / 400), rel=1e-14)


def test_a_class_of_models_costs_its_logarithm():
    one, many = (mean_bound(TARGET, value_range=(0, 1), models=models).value for models in (1, 10**6))
    assert one < many < TARGET.mean() + math.sqrt(math.log(20e6) / 400) + 0.02
    assert many == mean_bound(TARGET, value_range=(0, 1), delta=0.05 / 10**6).value


@pytest.mark.slow
@pytest.mark.parametrize(("worse", "better"), [(0.05, 0.10), (0.02, 0.05), (0.2, 0.3)])
def test_twice_the_samples_of_a_z_test_certify(worse, better):
    """Differences of 0-1 losses; the z-test certifies half of the time with ``(1.645 sd / mean)^2`` samples."""
    rng, mean = np.random.default_rng(1), better - worse
    n = math.ceil(2 * 1.645**2 * (better + worse - mean**2) / mean**2)
    outcomes = rng.choice([-1.0, 0.0, 1.0], p=[better, 1 - better - worse, worse], size=(60, n))
    assert (capital_bound((outcomes + 1) / 2, math.log(20)) < 0.5).mean() >= 0.4
    assert sum(mean_bound(row, value_range=2).value < 0 for row in outcomes) <= 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_bound(TARGET, value_range=1, method="best"), "method must be one of 'auto', .*got 'best'"),
        (lambda: mean_bound(TARGET, value_range=1, method="betting"), "value_range must be the interval"),
        (lambda: mean_bound(TARGET, value_range=(0, 1), resolution=0.1, method="betting"), "resolution must be 0.*0.1"),
        (lambda: mean_bound(TARGET, value_range=(0, 0.5)), r"value_range is \(0, 0.5\)"),
        (lambda: mean_bound(TARGET, value_range=1, delta=0.0), r"delta must be in \(0, 1\), got 0.0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
