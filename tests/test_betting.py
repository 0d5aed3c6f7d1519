"""Betting: exact coverage by enumeration, width against Clopper-Pearson, laws, ends of the range, and refusals."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from drrho import betting
from drrho.betting import capital_bound, confidence_sequence, mean_interval

P_GRID = np.concatenate([[1e-6, 1e-4, 1e-3, 0.01], np.linspace(0.02, 0.98, 49), [0.99, 0.999]])


def sequences(values, n):
    """All samples of n values, in order."""
    return np.array(list(itertools.product(values, repeat=n)))


def clopper_pearson(ones, n, delta):
    low = stats.beta.ppf(delta / 2, ones, n - ones + 1) if ones else 0.0
    high = stats.beta.ppf(1 - delta / 2, ones + 1, n - ones) if ones < n else 1.0
    return low, high


@pytest.mark.parametrize("delta", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_failures_stay_below_delta_over_all_bernoulli_sequences(n, delta):
    """Between bounds that occur the failure grows with p, so that p just above each of them is the worst."""
    samples = sequences([0.0, 1.0], n)
    bounds, ones = capital_bound(samples, -math.log(delta)), samples.sum(1)
    laws = np.concatenate([P_GRID, np.unique(bounds[bounds < 1]) + 1e-9])
    failures = [(p**ones * (1 - p) ** (n - ones))[bounds < p].sum() for p in laws]
    assert max(failures) <= delta * (1 + 1e-6)
    assert max(failures) > delta / 4 or n < 5  # and not for want of sharpness


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.05, 0.4])
def test_failures_stay_below_delta_over_all_sequences_of_three_values(delta):
    n, values = 7, np.array([0.0, 0.3, 1.0])
    places = sequences([0, 1, 2], n)
    bounds = capital_bound(values[places], -math.log(delta))
    for law in [(0.5, 0, 0.5), (0.2, 0.8, 0), (0, 0.9, 0.1), (0, 0.99, 0.01), (0.3, 0.4, 0.3), (0.05, 0.05, 0.9)]:
        probability = np.array(law)[places].prod(1)
        assert probability[bounds < np.dot(law, values)].sum() <= delta


def test_failures_at_any_time_stay_below_delta_over_all_bernoulli_sequences():
    n, delta = 8, 0.3
    samples = sequences([0.0, 1.0], n)
    bounds, guess = np.ones(len(samples)), np.ones(len(samples))
    for time in range(1, n + 1):
        guess = betting._mixture_bound(samples[:, :time], -math.log(delta), guess)
        bounds = np.minimum(bounds, guess)
    ones = samples.sum(1)
    for p in np.concatenate([P_GRID, np.unique(bounds[bounds < 1]) + 1e-9]):
        assert (p**ones * (1 - p) ** (n - ones))[bounds < p].sum() <= delta * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [lambda rng, s: rng.beta(0.1, 2, s), lambda rng, s: 1 - rng.beta(0.1, 2, s),
                                  lambda rng, s: 0.5 + 0.01 * rng.uniform(-1, 1, s)])  # fmt: skip
def test_failures_stay_below_delta_for_skewed_and_narrow_losses(draw):
    rng, delta, runs = np.random.default_rng(5), 0.1, 400
    mean = draw(rng, 10**6).mean()
    failures = (capital_bound(draw(rng, (runs, 40)), -math.log(delta)) < mean - 1e-3).sum()
    assert failures <= runs * delta + 4 * math.sqrt(runs * delta * (1 - delta))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "p"), [(10, 0.3), (20, 0.5), (20, 0.05), (100, 0.02), (200, 0.1), (1000, 0.5)])
def test_width_is_close_to_clopper_pearson(n, p):
    """The target is 1.15; the standard error of the average is below 0.015. Empirical Bernstein has 1.8 to 2."""
    rng = np.random.default_rng(n)
    samples = (rng.random((200 if n < 1000 else 60, n)) < p).astype(float)
    log_target = math.log(40)
    ours = capital_bound(samples, log_target) - 1 + capital_bound(1 - samples, log_target)
    exact = [np.diff(clopper_pearson(int(ones), n, 0.05)) for ones in samples.sum(1)]
    assert ours.mean() / np.mean(exact) < 1.18


def test_many_losses_need_little_more_than_a_z_interval():
    rng = np.random.default_rng(2)
    losses = rng.beta(2, 5, size=200_000)
    interval = mean_interval(losses, value_range=(0, 1))
    assert (interval.high - interval.low) / (2 * 1.96 * losses.std() / math.sqrt(200_000)) < 1.3
    assert interval.low < 2 / 7 < interval.high


@pytest.mark.parametrize("n", [2, 10, 300])
def test_losses_at_the_ends_of_their_range(n):
    zeros = mean_interval(np.zeros(n), value_range=(0, 1))
    exact = clopper_pearson(0, n, 0.05)[1]
    assert zeros.low == 0 and exact <= zeros.high < 1.25 * exact
    ones = mean_interval(np.ones(n), value_range=(0, 1))
    assert ones.high == 1 and ones.low == pytest.approx(1 - zeros.high, rel=1e-6)
    assert capital_bound(np.full((1, n), 0.5), math.log(20))[0] > 0.5


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (1e6, 1e6 + 2), (-3e-6, 1e-6)])
def test_intervals_follow_shift_and_scale(low, high):
    units = np.random.default_rng(1).integers(0, 65, size=40) / 64
    still = mean_interval(units, value_range=(0, 1))
    moved = mean_interval(low + (high - low) * units, value_range=(low, high))
    np.testing.assert_allclose((np.array(moved) - low) / (high - low), still, atol=1e-6)


def test_the_mirror_image_has_the_mirrored_interval():
    units = np.random.default_rng(1).beta(0.5, 1, size=60)
    low, high = mean_interval(units, value_range=(0, 1))
    assert mean_interval(-units, value_range=(-1, 0)) == pytest.approx((-high, -low), abs=1e-6)


def test_the_order_of_the_losses_is_drawn_by_the_seed():
    losses = np.repeat([0.0, 1.0], 50)  # sorted, as a data set by class
    intervals = [mean_interval(losses, value_range=(0, 1), seed=seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert all(interval.low < 0.5 < interval.high for interval in intervals)


@pytest.mark.parametrize("log_target", [0.5, 3.0, 230.0, 1e4])
def test_bounds_are_finite_and_monotone_in_the_level(log_target):
    rows = np.random.default_rng(0).random((3, 50)) ** 4
    bound, lower = capital_bound(rows, log_target), capital_bound(rows, log_target / 2)
    assert np.all((rows.mean(1) / 2 < bound) & (bound <= 1)) and np.all(lower <= bound + 1e-3)


def test_a_sequence_narrows_and_holds():
    rng = np.random.default_rng(0)
    losses = rng.uniform(-1, 1, size=3000)
    sequence = confidence_sequence(losses, value_range=(-1, 1), delta=0.01)
    assert sequence.times == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3000)
    assert all(low <= 0 <= high for low, high in zip(sequence.low, sequence.high, strict=True))
    assert np.all(np.diff(sequence.high) <= 0) and np.all(np.diff(sequence.low) >= 0)
    earlier = confidence_sequence(losses[:256], value_range=(-1, 1), delta=0.01)
    assert earlier.high == sequence.high[:9]  # later losses do not change what was said
    fixed = mean_interval(losses, value_range=(-1, 1), delta=0.01)
    assert fixed.high - fixed.low < sequence.high[-1] - sequence.low[-1] < 2 * (fixed.high - fixed.low)
    assert "[guarantee]" in str(sequence) and "3,000 losses" in str(sequence)


UNITS = [0.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(UNITS, value_range=1), r"value_range must be the interval \(low, high\) itself, got 1"),
        (lambda: mean_interval(UNITS, value_range=(0, 0.9)), r"value_range is \(0, 0.9\).*0 to 1"),
        (lambda: mean_interval([0.5], value_range=(0, 1)), "at least 2 entries, got 1"),
        (lambda: mean_interval(UNITS, value_range=(0, 1), delta=1.0), r"delta must be in \(0, 1\), got 1.0"),
        (lambda: confidence_sequence(UNITS, value_range=(0, 1), times=[2, 2]), r"times must be increasing.*\(2, 2\)"),
        (lambda: confidence_sequence(UNITS, value_range=(0, 1), times=[4]), r"in \[1, 3\], got \(4,\)"),
        (lambda: confidence_sequence(UNITS, value_range=(0, 1), times=[]), r"times must be increasing"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
