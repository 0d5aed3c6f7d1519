"""The report of a reference's variance reduction against two-pass formulas, brute force and simulation."""

import math
from functools import reduce

import numpy as np
import pytest
from problems import paired_sample
from scipy import special, stats

from drrho import variance
from drrho.moments import PairedMoments, merge, moments, paired_moments
from drrho.variance import stream_variance_reduction, variance_reduction

FIELDS = ("losses", "reference", "excess", "covariance", "correlation", "ratio", "coefficient")
METHODS = ("jackknife", "delta", "bootstrap", "studentized")
SCALES = {
    **dict.fromkeys(("losses", "reference", "excess", "ratio"), (np.log, np.exp)),
    **dict.fromkeys(("covariance", "coefficient"), (np.positive, np.positive)),
    "correlation": (np.arctanh, np.tanh),
}
every_method = pytest.mark.parametrize("interval", METHODS)


def direct(losses, reference):
    """The seven estimates by two passes."""
    v_l, v_r, v_d = (np.var(x, ddof=1) for x in (losses, reference, losses - reference))
    c = np.cov(losses, reference)[0, 1]
    return dict(zip(FIELDS, (v_l, v_r, v_d, c, c / math.sqrt(v_l * v_r), v_d / v_l, c / v_r), strict=True))


def numbers(report):
    return np.array([getattr(report, field)[:4] for field in FIELDS])


def test_the_excess_does_not_cancel():
    reference = paired_sample()[1] + 1e8
    losses = reference + np.random.default_rng(1).integers(-4, 5, size=60) / 2**20
    report = variance_reduction(losses, reference)
    assert report.excess.value == pytest.approx(np.var(losses - reference, ddof=1), rel=1e-12)
    assert report.ratio.value == pytest.approx(report.excess.value / report.losses.value, rel=1e-12)


# Estimates


@every_method
@pytest.mark.parametrize("n", [3, 17, 60])
def test_estimates_by_two_passes(n, interval):
    losses, reference = paired_sample(n)
    report = variance_reduction(losses, reference, interval=interval, replicates=50)
    for field, value in direct(losses, reference).items():
        assert getattr(report, field).value == pytest.approx(value, rel=1e-12), field
    assert (report.n, report.interval, report.confidence) == (n, interval, 0.95)


def test_identities():
    losses, reference = paired_sample()
    assert variance_reduction(losses, losses).ratio.value == 0
    assert variance_reduction(losses, np.full(60, 0.1)).ratio[:4] == (1, 1, 1, 0)
    for b in (-3.0, 2.0, *np.random.default_rng(5).normal(size=20)):
        linear = variance_reduction(losses, b * losses)
        assert linear.coefficient.value == pytest.approx(1 / b, rel=1e-13)
        assert linear.correlation.value == math.copysign(1, b) and "linear function" in linear.correlation.reason
    report = variance_reduction(losses, reference)
    v_l, v_r, v_d = report.losses.value, report.reference.value, report.excess.value
    assert v_d == pytest.approx(v_l + v_r - 2 * report.covariance.value, rel=1e-12)
    kappa = math.sqrt(v_r / v_l)
    assert report.ratio.value == pytest.approx(1 + kappa**2 - 2 * report.correlation.value * kappa, rel=1e-12)
    least = moments(losses - report.coefficient.value * reference).variance
    assert least == pytest.approx(v_l * (1 - report.correlation.value**2), rel=1e-12)
    assert all(moments(losses - c * reference).variance >= least * (1 - 1e-14) for c in np.linspace(-2, 3, 51))


def test_the_ratio_finds_the_variance_of_added_noise():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=200_000)
    report = variance_reduction(reference + 0.5 * rng.normal(size=200_000), reference)
    assert report.interval == "jackknife"
    assert abs(report.ratio.value - 0.2) < 5 * report.ratio.standard_error < 0.005


@every_method
@pytest.mark.parametrize("scale", [1e-150, -3.0, 1e150])
def test_a_report_follows_scale_and_shift(scale, interval):
    expected = numbers(variance_reduction(*paired_sample(), interval=interval, replicates=50))
    moved = numbers(variance_reduction(*paired_sample(scale=scale), interval=interval, replicates=50))
    np.testing.assert_allclose(moved[:4] / scale / scale, expected[:4], rtol=1e-9)
    np.testing.assert_allclose(moved[4:], expected[4:], rtol=1e-9)
    losses, reference = (np.round(row * 2**20) / 2**20 for row in paired_sample())
    expected = numbers(variance_reduction(losses, reference, interval=interval, replicates=50))
    moved = numbers(variance_reduction(losses + 1e8, reference - 1e8, interval=interval, replicates=50))
    np.testing.assert_allclose(moved, expected, rtol=1e-9)


def test_two_models_of_very_different_scale():
    losses, reference = paired_sample()
    report = variance_reduction(losses, 1e-140 * reference)
    assert report.ratio.value == pytest.approx(1, abs=1e-12)
    assert report.coefficient.value == pytest.approx(1e140 * direct(losses, reference)["coefficient"], rel=1e-12)
    assert report.pitman_morgan.p_value < 1e-6


# Intervals


@pytest.mark.parametrize("outlier", [None, 1e8])
@pytest.mark.parametrize("n", [3, 5, 40])
def test_jackknife_is_leave_one_out(n, outlier):
    losses, reference = paired_sample(n, seed=n)
    if outlier:
        losses[1] = outlier
    report = variance_reduction(losses, reference, interval="jackknife", confidence=0.9)
    others = [direct(np.delete(losses, i), np.delete(reference, i)) for i in range(n)]
    quantile = stats.t.ppf(0.95, n - 1)
    for field, value in direct(losses, reference).items():
        estimate, (scale, back) = getattr(report, field), SCALES[field]
        row = np.array([other[field] for other in others])
        assert estimate.standard_error == pytest.approx(math.sqrt((n - 1) ** 2 / n * np.var(row, ddof=1)), rel=1e-6)
        with np.errstate(divide="ignore"):
            inside = abs(row) < 1 - 1e-14 if field == "correlation" else np.isfinite(row)
        if not inside.all():  # two points always have correlation 1
            assert math.isnan(estimate.low) and "without some sample" in estimate.reason
            continue
        reach = quantile * math.sqrt((n - 1) ** 2 / n * np.var(scale(row), ddof=1))
        assert estimate.low == pytest.approx(back(scale(value) - reach), rel=1e-6)
        assert estimate.high == pytest.approx(back(scale(value) + reach), rel=1e-6)


def influences(losses, reference):
    """The influence functions of the seven estimates."""
    x, y = losses - losses.mean(), reference - reference.mean()
    u, v = x / x.std(), y / y.std()
    correlation, coefficient = (u * v).mean(), (x * y).mean() / y.var()
    return {
        "losses": x**2,
        "reference": y**2,
        "excess": (x - y) ** 2,
        "covariance": x * y,
        "correlation": u * v - correlation * (u**2 + v**2) / 2,
        "ratio": (x - y).var() / x.var() * ((x - y) ** 2 / (x - y).var() - x**2 / x.var()),
        "coefficient": y * (x - coefficient * y) / y.var(),
    }


def test_delta_against_the_influence_functions():
    losses, reference = paired_sample(700)
    n, report = 700, variance_reduction(losses, reference, interval="delta")
    influence = influences(losses, reference)
    for field, psi in influence.items():
        estimate, (scale, back) = getattr(report, field), SCALES[field]
        assert estimate.standard_error == pytest.approx(psi.std() / math.sqrt(n), rel=1e-10), field
        step = 1e-6 * estimate.value
        slope = (scale(estimate.value + step) - scale(estimate.value - step)) / (2 * step)
        reach = special.ndtri(0.975) * estimate.standard_error * slope
        assert estimate.low == pytest.approx(back(scale(estimate.value) - reach), rel=1e-8)
        assert estimate.high == pytest.approx(back(scale(estimate.value) + reach), rel=1e-8)


def test_a_stream_gives_the_delta_report():
    losses, reference = paired_sample(300)
    parts = [paired_moments(losses[i::3], reference[i::3]) for i in range(3)]
    streamed = stream_variance_reduction(reduce(merge, parts), confidence=0.8)
    whole = variance_reduction(losses, reference, interval="delta", confidence=0.8)
    np.testing.assert_allclose(numbers(streamed), numbers(whole), rtol=1e-10)


def test_the_methods_agree_on_a_large_sample():
    losses, reference = paired_sample(4000)
    jackknife, delta, bootstrap, studentized = (
        numbers(variance_reduction(losses, reference, interval=method, replicates=400)) for method in METHODS
    )
    np.testing.assert_allclose(studentized[:, 1:3], delta[:, 1:3], rtol=0.05)
    np.testing.assert_allclose(jackknife[:, 1:], delta[:, 1:], rtol=0.03)
    np.testing.assert_allclose(bootstrap[:, 1:3], delta[:, 1:3], rtol=0.05)
    np.testing.assert_allclose(bootstrap[:, 3], delta[:, 3], rtol=4 / math.sqrt(2 * 400))


@pytest.mark.slow
def test_coverage_of_the_ratio():
    """600 nominal 95% intervals at n = 200: four binomial standard errors are 3.6 points; half as long ones fail."""
    n, runs, rng = 200, 600, np.random.default_rng(3)
    truth, hits, halved = 0.36 / 1.36, 0, 0
    for _ in range(runs):
        reference = rng.normal(size=n)
        losses = reference + 0.6 * rng.laplace(scale=math.sqrt(0.5), size=n)
        ratio = variance_reduction(losses, reference, replicates=199).ratio
        hits += ratio.low <= truth <= ratio.high
        halved += abs(math.log(ratio.value / truth)) <= math.log(ratio.high / ratio.low) / 4
    assert 0.914 <= hits / runs <= 0.986
    assert halved / runs < 0.80


def test_bootstrap_is_seeded_and_does_not_see_chunks(monkeypatch):
    losses, reference = paired_sample(101)

    def bounds(seed):
        return numbers(variance_reduction(losses, reference, interval="bootstrap", replicates=100, seed=seed))[:, 1:]

    first = bounds(5)
    assert np.array_equal(first, bounds(5))
    assert np.all(first != bounds(6))
    monkeypatch.setattr(variance, "CHUNK", 16)
    np.testing.assert_allclose(bounds(5), first, rtol=1e-10)


def test_bootstrap_weights_are_poisson_by_sample():
    weights = np.array([variance._poisson(7, replicate, 0, 1000) for replicate in range(100)])
    np.testing.assert_array_equal(variance._poisson(7, 3, 512, 300), weights[3, 512:812])
    counts = np.bincount(weights.astype(int).ravel(), minlength=6)
    expected = stats.poisson(1).pmf(np.arange(5)) * weights.size
    assert stats.chisquare([*counts[:5], counts[5:].sum()], [*expected, weights.size - expected.sum()]).pvalue > 1e-3
    assert abs(np.corrcoef(weights[:2])[0, 1]) < 5 / math.sqrt(1000)


def test_bootstrap_by_repeating_samples():
    """Brute force: repeat every sample as its weight says, and Efron's formulas (1987, 2.3 and 7.3) on that."""
    losses, reference = paired_sample(25, seed=4)
    report = variance_reduction(losses, reference, interval="bootstrap", replicates=300, seed=9, confidence=0.9)
    rows = np.array([variance._poisson(9, replicate, 0, 25).astype(int) for replicate in range(300)])
    replicated = [direct(np.repeat(losses, row), np.repeat(reference, row)) for row in rows]
    others = [direct(np.delete(losses, i), np.delete(reference, i)) for i in range(25)]
    for field, value in direct(losses, reference).items():
        estimate, row = getattr(report, field), np.array([other[field] for other in replicated])
        acceleration = stats.skew([-other[field] for other in others]) / (6 * math.sqrt(25))
        bias = stats.norm.ppf((row < value).mean())
        for bound, z in zip(estimate[1:3], (bias - 1.6448536269514722, bias + 1.6448536269514722), strict=True):
            level = stats.norm.cdf(bias + z / (1 - acceleration * z))
            assert bound == pytest.approx(np.quantile(row, level), rel=1e-9), field
        assert estimate.standard_error == pytest.approx(row.std(), rel=1e-9)


@pytest.mark.parametrize("n", [10, 500, 999, 9_999])
def test_auto_does_not_leave_the_studentized_interval_for_the_delta_method(n):
    report = variance_reduction(*paired_sample(n), replicates=20)
    expected = variance_reduction(*paired_sample(n), interval="studentized", replicates=20)
    assert report.interval == "studentized" and np.array_equal(numbers(report), numbers(expected))
    for outside in (9, 10_000):
        assert variance_reduction(*paired_sample(outside)).interval == "jackknife"


def with_one_over_n(losses, reference):
    """The seven estimates, variances and covariance with 1/n."""
    factors = dict.fromkeys(FIELDS[:4], 1 - 1 / len(losses))
    return {field: value * factors.get(field, 1) for field, value in direct(losses, reference).items()}


def test_studentized_by_repeating_samples():
    """Brute force: repeat every sample as its weight says, and divide each move by its own delta-method error."""
    losses, reference = paired_sample(25, seed=4)
    report = variance_reduction(losses, reference, interval="studentized", replicates=300, seed=9, confidence=0.9)
    jackknife = variance_reduction(losses, reference, interval="jackknife", confidence=0.9)
    rows = np.array([variance._poisson(9, replicate, 0, 25).astype(int) for replicate in range(300)])
    replicated = [(np.repeat(losses, row), np.repeat(reference, row)) for row in rows]
    whole = with_one_over_n(losses, reference)
    for field in FIELDS:
        (scale, _), t = SCALES[field], []
        for sample in replicated:
            value, step = with_one_over_n(*sample)[field], 1e-6
            slope = (scale(value * (1 + step)) - scale(value * (1 - step))) / (2 * step * value)
            error = influences(*sample)[field].std() / math.sqrt(len(sample[0])) * slope
            t.append(abs(scale(value) - scale(whole[field])) / error)
        quantile = np.quantile(t, 0.9, method="higher")
        estimate, by_jackknife = getattr(report, field), getattr(jackknife, field)
        assert estimate.standard_error == by_jackknife.standard_error
        widened = quantile / stats.t.ppf(0.95, 24)
        for ours, theirs in zip(estimate[1:3], by_jackknife[1:3], strict=True):
            expected = scale(estimate.value) + widened * (scale(theirs) - scale(estimate.value))
            assert scale(ours) == pytest.approx(expected, rel=1e-6), field


def skewed_losses(rng, n):
    """Cross-entropies of a good classifier: most are nearly 0. The ratio of the variances is 1.396."""
    margin = rng.normal(size=n)
    target, reference = 6 + 3 * (0.8 * margin + 0.6 * rng.normal(size=n)), 5 + 3 * margin
    return np.logaddexp(0, -target), np.logaddexp(0, -reference)


@pytest.mark.slow
def test_coverage_for_losses_of_a_good_classifier():
    """400 intervals at n = 100: four binomial standard errors of .95 are 4.4 points; the jackknife has .88."""
    rng, hits, truth = np.random.default_rng(3), 0, 1.396
    for _ in range(400):
        ratio = variance_reduction(*skewed_losses(rng, 100), replicates=199).ratio
        hits += bool(ratio.reason) or ratio.low <= truth <= ratio.high
    assert 0.91 <= hits / 400 <= 0.99


def test_too_few_hard_samples_to_tell():
    losses, reference = paired_sample(100)
    losses[3] = 100.0
    for report in (variance_reduction(losses, reference), stream_variance_reduction(paired_moments(losses, reference))):
        for field in ("losses", "excess", "correlation", "ratio"):
            estimate = getattr(report, field)
            assert math.isnan(estimate.low) and math.isnan(estimate.high), field
            assert estimate.reason.startswith("too few hard samples to tell"), field
        assert math.isfinite(report.reference.low) and "without an interval" in str(report)
    assert math.isfinite(variance_reduction(losses, reference, interval="jackknife").ratio.low)
    reference[3] = 100.0  # the model does as badly there as the reference: the excess has no such sample
    assert math.isfinite(variance_reduction(losses, reference).excess.low)


@pytest.mark.parametrize(("n", "share"), [(149, "0.02"), (2000, "0.0015")])
def test_the_report_says_what_may_be_missing(n, share):
    """The probability that a kind of this share is not among n samples is 5%."""
    assert 0.95 < 1 - (1 - float(share)) ** n < 0.955
    assert f"rarer than {share} of all" in str(variance_reduction(*paired_sample(n), replicates=20))


def test_bootstrap_leaves_out_samples_without_variance():
    report = variance_reduction(*np.random.default_rng(1).normal(size=(2, 3)), interval="bootstrap", replicates=200)
    drawn = [(variance._poisson(0, replicate, 0, 3) > 0).sum() for replicate in range(200)]
    undefined = sum(count < 2 for count in drawn)
    assert f"undefined in {undefined} of 200 bootstrap samples" in report.ratio.reason


# The test of equal variances


def test_pitman_morgan_is_the_correlation_of_2l_minus_r_and_r():
    losses, reference = paired_sample()
    report = variance_reduction(losses, reference)
    expected = stats.pearsonr(2 * losses - reference, reference)
    test = report.pitman_morgan
    assert test.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert test.degrees_of_freedom == 58
    correlation = expected.statistic
    assert test.statistic == pytest.approx(correlation * math.sqrt(58 / (1 - correlation**2)), rel=1e-10)


@pytest.mark.slow
def test_pitman_morgan_is_uniform_where_the_variances_are_equal():
    rng, values = np.random.default_rng(2), []
    for _ in range(300):
        reference = rng.normal(size=30)
        report = variance_reduction(reference / 2 + rng.normal(size=30), reference, interval="delta")
        values.append(report.pitman_morgan.p_value)
    assert stats.kstest(values, "uniform").pvalue > 1e-3


# Data without an answer


@every_method
@pytest.mark.parametrize(
    "losses, reference, missing, values",
    [
        (
            [1.0, 1.0, 1.0, 1.0],
            [1.0, 2.0, 3.0, 5.0],
            ("losses", "correlation", "ratio"),
            {"losses": 0, "coefficient": 0},
        ),
        ([1.0, 2.0, 3.0, 5.0], [0.1] * 4, ("reference", "correlation", "coefficient"), {"reference": 0, "ratio": 1}),
        ([1.0, 2.0, 3.0, 5.0], [2.0, 3.0, 4.0, 6.0], ("excess", "correlation", "ratio"), {"excess": 0, "ratio": 0}),
        ([7.0, 7.0, 7.0], [2.0, 2.0, 2.0], ("losses", "reference", "excess", "ratio", "coefficient"), {}),
    ],
)
def test_zero_variance_is_named(losses, reference, missing, values, interval):
    report = variance_reduction(losses, reference, interval=interval, replicates=50)
    for field in missing:
        estimate = getattr(report, field)
        assert math.isnan(estimate.low) and math.isnan(estimate.high) and math.isnan(estimate.standard_error)
        assert estimate.reason and estimate.reason in str(report)
    for field, value in values.items():
        assert getattr(report, field).value == value


def test_an_undefined_ratio_is_nan():
    assert math.isnan(variance_reduction([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]).ratio.value)
    assert math.isnan(variance_reduction([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]).coefficient.value)


@every_method
def test_two_samples_have_estimates_but_no_interval(interval):
    report = variance_reduction([1.0, 2.0], [3.0, 3.5], interval=interval)
    assert report.ratio.value == pytest.approx(0.25)
    assert all(math.isnan(getattr(report, field).low) for field in FIELDS)
    assert "n >= 3" in report.ratio.reason and "n >= 3" in report.pitman_morgan.reason


def test_a_sample_that_carries_all_variance_is_reported():
    losses, reference = [0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.1, 0.5, 0.2]
    estimate = variance_reduction(losses, reference, interval="jackknife").losses
    assert math.isnan(estimate.low) and "without some sample" in estimate.reason
    assert "bootstrap samples" in variance_reduction(losses, reference, interval="bootstrap").ratio.reason


# Showing it


def test_the_table_is_aligned_and_complete():
    losses, reference = paired_sample()
    lines = str(variance_reduction(losses, reference, confidence=0.9)).splitlines()
    assert "60 samples, 90% intervals (studentized)" in lines[0]
    assert len({len(line) for line in lines[1:9]}) == 1
    assert "two-sided p" in lines[9] and "%" in lines[10]


def test_the_plot_shows_variances_and_ratio():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = variance_reduction(*paired_sample())
    ax = report.plot()
    assert ax.get_xlabel() and "variance" in ax.get_ylabel()
    assert f"{report.ratio.value:.3g}" in ax.get_title()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), numbers(report)[:3, 0])
    assert variance_reduction([1.0, 2.0], [1.0, 2.0]).plot(ax) is ax
    ax.figure.canvas.draw()
    pyplot.close(ax.figure)


# Refusals

GOOD = [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: variance_reduction([1.0], [2.0]), ValueError, "losses .* at least 2 samples, got 1"),
        (lambda: stream_variance_reduction(PairedMoments.empty()), ValueError, "losses .* at least 2 samples, got 0"),
        (lambda: variance_reduction(GOOD, GOOD[:2]), ValueError, r"reference_losses .* \[3\], got \[2\]"),
        (lambda: variance_reduction(GOOD, [1.0, math.nan, 2.0]), ValueError, "reference_losses .* nan at index"),
        (
            lambda: variance_reduction(GOOD, GOOD, confidence=1.0),
            ValueError,
            r"confidence must lie in \(0, 1\), got 1.0",
        ),
        (lambda: variance_reduction(GOOD, GOOD, confidence=math.nan), ValueError, "confidence .* got nan"),
        (lambda: stream_variance_reduction(paired_moments(GOOD, GOOD), 95), ValueError, "confidence .* got 95"),
        (lambda: variance_reduction(GOOD, GOOD, confidence="high"), TypeError, "confidence .* got 'high'"),
        (
            lambda: variance_reduction(GOOD, GOOD, interval="exact"),
            ValueError,
            "interval must be 'auto', .* got 'exact'",
        ),
        (lambda: variance_reduction(GOOD, GOOD, replicates=1), ValueError, "replicates .* got 1"),
        (lambda: variance_reduction(GOOD, GOOD, replicates=2.5), TypeError, "replicates must be an integer, got 2.5"),
        (lambda: variance_reduction(GOOD, GOOD, seed=-1), ValueError, "seed .* got -1"),
    ],
)
def test_refusals_name_argument_value_and_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()
