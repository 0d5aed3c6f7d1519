"""The bounds: coverage by exact enumeration, mutants that must fail it, laws of scaling, and what is refused."""

import functools
import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import hard_cases, radii, rows, scale_of
from scipy.stats import binom, multinomial

from drrho import ChiSquare, constrained_risk
from drrho.bounds import (
    better_than_reference,
    drrho_certificate,
    empirical_bernstein,
    lipschitz_cover_log,
    mean_coverage,
    rho_scales,
    variance_sandwich,
)
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
from drrho.statements import Bound, Status

RNG = np.random.default_rng(0)
TARGET, REFERENCE = RNG.uniform(size=200), RNG.uniform(size=200)
plain_bernstein = functools.partial(empirical_bernstein, tight=False)
plain_certificate = functools.partial(drrho_certificate, tight=False)


def certificate(losses, **options):
    return drrho_certificate(losses, None, **options)


def check_sandwich(losses, *, rho=None, radius=None):
    sandwich = variance_sandwich(losses, rho=rho, radius=radius)
    tolerance = 1e-12 * scale_of(losses) + 1e-300
    assert sandwich.lower <= sandwich.chord + tolerance
    assert sandwich.lower_duchi_namkoong <= sandwich.lower + tolerance
    assert sandwich.chord <= sandwich.premium + tolerance
    assert sandwich.premium <= sandwich.upper + tolerance
    assert sandwich.upper <= sandwich.upper_duchi_namkoong
    return sandwich


# The sandwich


@given(rows(max_size=12), radii(-8, 2))
def test_sandwich_holds_for_any_losses(losses, radius):
    sandwich = check_sandwich(losses, radius=radius)
    sd, d = np.std(losses), np.mean(losses) - min(losses)
    quarter = sd * math.sqrt(2 * radius) - d * radius / 2  # the same lower bound in the shape of Duchi & Namkoong's
    assert sandwich.lower >= quarter - 1e-12 * scale_of(losses)


@pytest.mark.parametrize("radius", [0.0, 1e-9, 0.01, 1.0, 100.0])
@pytest.mark.parametrize(("name", "losses"), hard_cases())
def test_sandwich_on_hard_cases(name, losses, radius):
    check_sandwich(losses, radius=radius)


@given(rows(min_size=2, varied=True))
def test_premium_is_the_standard_deviation_exactly_up_to_rho_pos(losses):
    rho_pos = rho_scales(losses).rho_pos
    below = variance_sandwich(losses, rho=0.999 * rho_pos)
    above = variance_sandwich(losses, rho=2 * rho_pos)
    assert below.exact and not above.exact
    tolerance = 1e-12 * scale_of(losses)
    assert below.premium == pytest.approx(below.upper_duchi_namkoong, abs=tolerance)
    assert above.premium < above.upper_duchi_namkoong - tolerance


@pytest.mark.parametrize("shift", [0.0, -1e6, 1e3])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
@pytest.mark.parametrize("rho", [0.3, 5.0, 300.0])
def test_sandwich_follows_shift_and_scale(shift, scale, rho):
    losses = RNG.exponential(size=30)
    still, moved = variance_sandwich(losses, rho=rho), variance_sandwich(scale * (losses + shift), rho=rho)
    for name in ("lower", "chord", "premium", "upper", "lower_duchi_namkoong", "upper_duchi_namkoong"):
        expected = scale * getattr(still, name)
        assert getattr(moved, name) == pytest.approx(expected, abs=1e-11 * scale * (abs(shift) + 1))


def test_chord_meets_the_premium_at_rho_max():
    losses = [0.0, 1.0, 4.0, 4.0, 9.0, 9.0]
    at_the_end = variance_sandwich(losses, rho=rho_scales(losses).rho_max)
    assert at_the_end.chord == pytest.approx(at_the_end.premium) == 9 - np.mean(losses)


def test_a_wider_range_lowers_the_lower_bound_of_duchi_and_namkoong_only():
    losses = RNG.uniform(size=50)
    narrow, wide = (variance_sandwich(losses, rho=0.5, value_range=M) for M in (1.0, 1.5))
    assert narrow.lower_duchi_namkoong - wide.lower_duchi_namkoong == pytest.approx(2 * 0.5 * 0.5 / 50)
    assert narrow.lower == wide.lower


# The scales of rho


def test_scales_of_rho():
    losses = np.repeat([0.0, 1.0, 3.0], [10, 20, 2])
    scales = rho_scales(losses, confidence=0.95, models=7, delta=0.1)
    d = losses.mean()
    assert scales.rho_t == pytest.approx(1.6448536269514722**2 / 2)
    assert scales.rho_0 == pytest.approx(32 * math.log(140) / 31)
    assert scales.rho_pos == pytest.approx(32 * losses.var() / (2 * d**2))
    assert scales.rho_max == 32 * 15 / 2
    for rho in (0.99 * scales.rho_max, scales.rho_max):
        value = constrained_risk(losses, ChiSquare(), rho / 32).value.item()
        assert (value == 3.0) == (rho == scales.rho_max)


def test_regimes_of_rho_are_named():
    losses = np.repeat([0.0, 1.0, 3.0], [10, 20, 2])
    scales = rho_scales(losses)
    assert scales.rho_0 < scales.rho_pos < scales.rho_max
    assert "exactly mean + s" in scales.describe(scales.rho_pos)
    assert "lost their weight" in scales.describe(1.01 * scales.rho_pos)
    assert "the maximum" in scales.describe(scales.rho_max)
    assert "certified with probability >= 1 - 0.05" in scales.describe(scales.rho_0)
    assert "certified only" in scales.describe(0.9 * scales.rho_0)
    assert "none" in scales.describe(0.1)
    assert "0.95" in scales.describe(scales.rho_t)
    assert "all losses are equal" in rho_scales([2.0, 2.0]).describe(1.0)


def test_coverage_of_the_mean():
    assert mean_coverage(1.6448536269514722**2 / 2).value == pytest.approx(0.95)
    assert mean_coverage(0.0).value == 0.5
    t = 1.729132811521367  # 95 % of Student's t with 19 degrees
    assert mean_coverage(20 / 19 * t**2 / 2, n=20).value == pytest.approx(0.95)
    assert mean_coverage(1.0, n=10**7).value == pytest.approx(mean_coverage(1.0).value, abs=1e-6)


# Coverage, exactly


def bernoulli_failure(upper_bound, n):
    """Return the largest probability, over laws of losses in {0, 1}, that the mean exceeds its bound.

    The bound is a function of the number k of ones. As p grows, failing k are added where p passes a bound, and
    between such points fewer ones get less likely: the supremum is just above one of the bounds.
    """
    bounds = np.array([upper_bound(np.repeat([0.0, 1.0], [n - k, k])) for k in range(n + 1)])
    grid = np.concatenate([np.logspace(-6, 0, 100, endpoint=False), np.nextafter(bounds, 2)])
    grid = grid[(grid > 0) & (grid < 1)]
    pmf = binom.pmf(np.arange(n + 1), n, grid[:, None])
    return float((pmf * (grid[:, None] > bounds)).sum(1).max())


def without(bound, name):
    """Return a mutant of a bound: a term is missing."""

    def mutant(losses, **options):
        terms = dict(bound(losses, **options).terms)
        del terms[name]
        return sum(terms.values())

    return mutant


def with_a_seventh_of_the_range(losses, **options):
    bound = plain_bernstein(losses, **options)
    return bound.value - bound.terms["7 B L/(3 (n - 1))"] * 6 / 7


def robust_risk_alone(losses, **options):
    return certificate(losses, **options).terms["F_rho"]


COVERING = {
    "plain": (plain_bernstein, 0.0024),
    "tight": (empirical_bernstein, 0.0044),
    "certificate": (functools.partial(certificate, tight=False), 0.0017),
    "sharp certificate": (certificate, 0.0024),
}
MUTANTS = {
    "no additive term": (without(plain_bernstein, "7 B L/(3 (n - 1))"), 1.0),
    "no variance term": (without(plain_bernstein, "sqrt(2 V L/n)"), 0.340),
    "additive term BL/(3n)": (with_a_seventh_of_the_range, 1 / math.e),
    "robust risk alone": (robust_risk_alone, 1.0),
}


@pytest.mark.parametrize("name", COVERING)
def test_failures_stay_below_delta(name):
    bound, expected = COVERING[name]
    failure = bernoulli_failure(lambda losses: float(bound(losses, value_range=1, delta=0.1)), n=1000)
    assert failure <= 0.1
    assert failure == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", MUTANTS)
def test_weaker_constants_are_caught(name):
    bound, expected = MUTANTS[name]
    failure = bernoulli_failure(lambda losses: float(bound(losses, value_range=1, delta=0.1)), n=1000)
    assert failure > 0.1
    assert failure == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("n", [2, 3, 8, 25])
@pytest.mark.parametrize("name", COVERING)
def test_failures_stay_below_delta_in_small_samples(name, n):
    bound, _ = COVERING[name]
    for delta in (0.5, 0.9):  # where there is the least room
        assert bernoulli_failure(lambda losses, d=delta: float(bound(losses, value_range=1, delta=d)), n) <= delta


def differences(n):
    """All samples of a difference of 0-1 losses, up to order: counts of (-1, 0, 1)."""
    return [(low, n - low - high, high) for low in range(n + 1) for high in range(n + 1 - low)]


LAWS = [(0.5, 0.0, 0.5), (0.01, 0.98, 0.01), (0.0, 0.99, 0.01), (0.3, 0.4, 0.3), (0.05, 0.9, 0.05), (0.0, 0.5, 0.5)]


def class_failure(bound, n, delta):
    """Return the largest probability, over laws, that one of two models exceeds its bound.

    Their losses are Z and -Z, differences of 0-1 losses; all samples of Z are enumerated.
    """
    counts = differences(n)
    options = {"value_range": 2, "delta": delta, "models": 2}
    ours = np.array([float(bound(np.repeat([-1.0, 0.0, 1.0], count), **options)) for count in counts])
    place = {count: i for i, count in enumerate(counts)}
    theirs = ours[[place[count[::-1]] for count in counts]]
    failures = []
    for law in LAWS:
        mu = law[2] - law[0]
        failures.append(multinomial.pmf(counts, n, law)[(mu > ours) | (-mu > theirs)].sum())
    return max(failures)


@pytest.mark.parametrize("name", COVERING)
def test_failures_of_a_class_stay_below_delta(name):
    bound, _ = COVERING[name]
    assert class_failure(bound, n=40, delta=0.1) <= 0.1
    assert class_failure(bound, n=40, delta=0.5) <= 0.5


@pytest.mark.parametrize("name", ["no additive term", "robust risk alone"])
def test_weaker_constants_are_caught_in_a_class(name):
    bound, _ = MUTANTS[name]
    assert class_failure(bound, n=40, delta=0.1) > 0.5


# The oracle inequality


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
    for law in LAWS:
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


def test_where_the_reference_comes_from_is_printed():
    options = {"value_range": 2, "models": 9}
    for compare in (drrho_certificate, better_than_reference):
        said = str(compare(TARGET, REFERENCE, reference_independent=True, **options))
        assert "the reference was fixed without looking at the sample" in said
        said = str(compare(TARGET, REFERENCE, reference_independent=False, **options))
        assert "may depend on the sample" in said and "N^2" in said
    assert "reference" not in str(empirical_bernstein(TARGET, value_range=1))


def test_a_dependent_reference_costs_the_union_over_pairs():
    for n_models in (2, 50):
        dependent = drrho_certificate(TARGET, REFERENCE, value_range=2, models=n_models, reference_independent=False)
        squared = drrho_certificate(TARGET, REFERENCE, value_range=2, models=n_models**2, reference_independent=True)
        assert dependent.value == squared.value
        dependent, squared = (
            better_than_reference(TARGET, REFERENCE, value_range=2, models=m, reference_independent=independent).bound
            for m, independent in ((n_models, False), (n_models**2, True))
        )
        assert dependent.value == squared.value
        options = {"n": 100, "value_range": 2}
        dependent = excess_over_reference(models=n_models, reference_independent=False, **options)
        assert dependent.value == excess_over_reference(models=n_models**2, **options).value
        oracle = oracle_inequality(
            models=n_models, reference_independent=False, standard_deviation=1.0, delta=0.1, **options
        )
        assert oracle.terms["sigma sqrt(2 L2/n)"] == pytest.approx(math.sqrt(2 * math.log(4 * n_models / 0.1) / 100))
        expected = 17 / 6 * 2 * math.log(4 * n_models**2 / 0.1) / 99
        assert oracle.terms["(17/6) B L1/(n - 1)"] == pytest.approx(expected)


# Laws of the bounds


FROM_DATA = {
    "plain": plain_bernstein,
    "tight": empirical_bernstein,
    "two-sided": functools.partial(empirical_bernstein, two_sided=True),
    "certificate": functools.partial(certificate, tight=False),
    "sharp certificate": certificate,
}
from_data = pytest.mark.parametrize("bound", FROM_DATA.values(), ids=FROM_DATA)


@from_data
def test_monotone_in_delta_models_range_and_n(bound):
    def falls(values):
        return all(a > b for a, b in pairwise(values))

    assert falls([bound(TARGET, value_range=1, delta=delta).value for delta in (1e-12, 0.01, 0.1, 0.9)])
    assert falls([bound(TARGET, value_range=1, models=models).value for models in (10**9, 100, 2, 1)])
    assert falls([bound(TARGET, value_range=length).value for length in (8, 2, 1)])
    assert falls([bound(np.tile(TARGET, copies), value_range=1).value for copies in (1, 2, 10)])
    assert falls([bound(TARGET, value_range=1, resolution=eps).value for eps in (0.1, 0.01, 0.0)])


@from_data
@pytest.mark.parametrize("scale", [2.0**-20, 0.5, 3.0, 1e6])
def test_scaling_losses_and_range_scales_the_bound(bound, scale):
    scaled = bound(scale * TARGET, value_range=scale, models=3).value
    assert scaled == pytest.approx(scale * bound(TARGET, value_range=1, models=3).value, rel=1e-12)


@from_data
def test_finite_without_variance_and_at_two_samples(bound):
    for losses in ([0.25] * 9, [0.25, 0.25], [0.0, 1.0]):
        value = bound(losses, value_range=1).value
        assert math.isfinite(value) and value > np.mean(losses)


@from_data
def test_terms_sum_to_the_value(bound):
    answer = bound(TARGET, value_range=(0, 1), models=10, resolution=1e-3)
    assert isinstance(answer, Bound)
    assert float(answer) == answer.value == pytest.approx(sum(answer.terms.values()), rel=1e-15)


@given(rows(min_size=2), st.floats(1e-9, 0.999), st.integers(1, 10**12), st.floats(1, 10))
@settings(max_examples=60)
def test_order_of_the_bounds(losses, delta, models, wider):
    """Tight below plain below the sharp certificate below the certificate: that is how they are proven."""
    length = wider * max(max(losses) - min(losses), 1e-3)
    values = [bound(losses, value_range=length, delta=delta, models=models).value for bound in (
        empirical_bernstein, plain_bernstein, certificate, functools.partial(certificate, tight=False))]  # fmt: skip
    slack = 1e-12 * (scale_of(losses) + abs(values[-1]))
    assert all(low <= high + slack for low, high in pairwise(values))


@pytest.mark.parametrize("two_sided", [False, True])
def test_empirical_bernstein_in_numbers(two_sided):
    n, models, delta, length = 200, 12, 0.03, 1.5
    log_term = math.log((4 if two_sided else 2) * models / delta)
    options = {"value_range": length, "models": models, "delta": delta, "two_sided": two_sided}
    variance, b = TARGET.var(ddof=1), length * math.sqrt(log_term / (n // 2))
    plain = TARGET.mean() + math.sqrt(2 * variance * log_term / n) + 7 * length * log_term / (3 * (n - 1))
    assert plain_bernstein(TARGET, **options).value == pytest.approx(plain, rel=1e-14)
    sigma = b / 2 + math.sqrt(variance + b**2 / 4)
    tight = TARGET.mean() + sigma * math.sqrt(2 * log_term / n) + length * log_term / (3 * n)
    bound = empirical_bernstein(TARGET, **options)
    assert bound.value == pytest.approx(tight, rel=1e-14)
    assert ("abs(R - mean)" in bound.statement) == two_sided


def test_certificate_in_numbers():
    n, models, delta = 200, 12, 0.03
    log_term = math.log(2 * models / delta)
    rho = n * log_term / (n - 1)
    options = {"value_range": 2, "models": models, "delta": delta, "reference_independent": True}
    value = constrained_risk(TARGET - REFERENCE, ChiSquare(), rho / n).value.item()
    plain = plain_certificate(TARGET, REFERENCE, **options)
    assert plain.value == pytest.approx(value + 17 / 6 * 2 * log_term / (n - 1))
    assert drrho_certificate(TARGET, REFERENCE, **options).value == pytest.approx(value + 14 / 3 * log_term / (n - 1))
    larger = plain_certificate(TARGET, REFERENCE, rho=2 * rho, **options)
    assert larger.value > plain.value and larger.confidence == plain.confidence
    losses = np.repeat([0.0, 1.0], [1, 99])  # rho_pos < rho: d stands in for B
    sharp = certificate(losses, value_range=3)
    assert sharp.terms["slack of F_rho"] == pytest.approx(0.99 * math.log(40) / (2 * 99))


def test_a_small_rho_gives_the_confidence_it_implies():
    n, models, rho = 200, 10, 5.0
    options = {"value_range": 2, "models": models, "reference_independent": True}
    bound = drrho_certificate(TARGET, REFERENCE, rho=rho, delta=0.01, **options)
    implied = 2 * models * math.exp(-rho * (n - 1) / n)
    assert bound.confidence == pytest.approx(1 - implied)
    assert "implied by rho = 5" in bound.statement
    same = drrho_certificate(TARGET, REFERENCE, delta=implied, **options)
    assert bound.value == pytest.approx(same.value)
    oracle = oracle_inequality(n=n, rho=rho, value_range=2, standard_deviation=0.1, models=models, delta=0.01)
    assert oracle.confidence == pytest.approx(1 - 2 * implied)


def test_better_than_the_reference():
    better = REFERENCE.clip(0, 0.1)
    certified = better_than_reference(better, REFERENCE, value_range=(-1, 1), models=100, reference_independent=True)
    assert certified and certified.bound.value < 0 and str(certified).startswith("certified")
    excess = empirical_bernstein(better - REFERENCE, value_range=2, models=100)
    assert certified.bound.value == excess.value
    certificate = drrho_certificate(better, REFERENCE, value_range=2, models=100, reference_independent=True)
    assert certified.bound.value < certificate.value < 0
    undecided = better_than_reference(REFERENCE, REFERENCE, value_range=2, reference_independent=True)
    assert not undecided and "NOT certified" in str(undecided)


def test_infinite_classes_by_covers():
    resolution = 1 / 200
    log_models = lipschitz_cover_log(dimension=10, radius=2.0, lipschitz=3.0, resolution=resolution)
    assert log_models == pytest.approx(10 * math.log(1 + 2 * 2 * 3 * 200))
    options = {"value_range": 2, "log_models": log_models}
    for independent, cost in ((True, 2 * resolution), (False, 4 * resolution)):
        bound = drrho_certificate(
            TARGET, REFERENCE, resolution=resolution, reference_independent=independent, **options
        )
        assert bound.terms["cover"] == pytest.approx(cost)
    assert math.isfinite(empirical_bernstein(TARGET, value_range=1, log_models=1e9).value)
    assert empirical_bernstein(TARGET, value_range=1, log_models=math.log(7)).value == pytest.approx(
        empirical_bernstein(TARGET, value_range=1, models=7).value
    )


def test_a_cover_pays_for_the_distance_to_it():
    """What the bound says of a member of the cover, and what it says of a model at that distance."""
    resolution = 0.01
    for bound in FROM_DATA.values():
        member = TARGET + resolution * np.sign(RNG.normal(size=200))
        of_member = bound(member, value_range=1.1, models=5).value
        of_model = bound(TARGET, value_range=1.1, models=5, resolution=resolution).value
        assert of_model >= of_member + resolution


def test_what_a_cover_costs():
    resolution, log_term, n = 0.01, math.log(40), 200
    bernstein = empirical_bernstein(TARGET, value_range=1, resolution=resolution)
    assert bernstein.terms["cover"] == pytest.approx(resolution * (2 + math.sqrt(2 * log_term / (n - 1))))
    # d and rho_pos are those of the model, not of the member of the cover that the proof is about
    covered = certificate(TARGET, value_range=1, resolution=resolution)
    d = TARGET.mean() - TARGET.min()
    assert certificate(TARGET, value_range=1).terms["slack of F_rho"] == 0
    assert covered.terms["slack of F_rho"] == pytest.approx((d + 2 * resolution) * log_term / (2 * (n - 1)))


# Comparisons and sample sizes


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


# What is printed, and what is refused


THEORY = {"n": 1000, "value_range": 2, "standard_deviation": 0.1, "models": 1}
PRINTED = [
    (lambda: empirical_bernstein(TARGET, value_range=1), "guarantee"),
    (lambda: drrho_certificate(TARGET, REFERENCE, value_range=2, reference_independent=True), "guarantee"),
    (lambda: better_than_reference(TARGET, REFERENCE, value_range=2, reference_independent=True), "guarantee"),
    (lambda: variance_sandwich(TARGET, rho=1.0), "guarantee"),
    (lambda: rho_scales(TARGET), "asymptotic"),
    (lambda: rho_scales(TARGET), "guarantee"),
    (lambda: mean_coverage(1.0), "asymptotic"),
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


def test_float32_losses_on_the_edge_of_their_range_are_inside():
    losses = torch.tensor([0.1, 0.0], dtype=torch.float32, requires_grad=True)  # 0.1 is rounded up
    assert empirical_bernstein(losses, value_range=0.1).value > 0
    assert empirical_bernstein(losses, value_range=(0, 0.1)).value > 0


bernstein = functools.partial(empirical_bernstein, TARGET, value_range=1)
certify = functools.partial(drrho_certificate, TARGET, REFERENCE, value_range=2, reference_independent=True)
REFUSED = [
    (lambda: empirical_bernstein([0.5], value_range=1), "at least 2 entries, got 1"),
    (lambda: empirical_bernstein([[0.5, 1.0]], value_range=1), r"losses must have shape \[n\].*\[1, 2\]"),
    (lambda: empirical_bernstein([0.5, math.nan], value_range=1), "losses must be finite, got nan"),
    (lambda: empirical_bernstein([0.0, 1.5], value_range=1), "value_range is 1 but the losses go from 0 to 1.5"),
    (lambda: empirical_bernstein([0.5, 1.5], value_range=(0, 1)), r"value_range is \(0, 1\).*0.5 to 1.5"),
    (lambda: empirical_bernstein([0.0, 0.0], value_range=(1, 0)), "value_range is"),
    (lambda: empirical_bernstein([0.0, 0.0], value_range=(0, 0)), "value_range must be finite and > 0, got 0"),
    (lambda: empirical_bernstein([0.0, 0.0], value_range=(0, 1, 2)), r"value_range.*\(0, 1, 2\)"),
    (lambda: bernstein(delta=0.0), r"delta must be in \(0, 1\), got 0.0"),
    (lambda: bernstein(delta=1.0), r"delta must be in \(0, 1\), got 1.0"),
    (lambda: bernstein(delta=math.nan), r"delta must be in \(0, 1\), got nan"),
    (lambda: bernstein(models=0), "models must be an integer >= 1, got 0"),
    (lambda: bernstein(models=3, log_models=1.0), "models=3 and log_models=1.0"),
    (lambda: bernstein(log_models=-1.0), "log_models must be finite and >= 0, got -1.0"),
    (lambda: bernstein(resolution=-0.1), "resolution must be finite and >= 0, got -0.1"),
    (lambda: drrho_certificate([0.0, 1.0], [0.0] * 3, value_range=2, reference_independent=True), r"\[2\], got \[3\]"),
    (lambda: drrho_certificate(TARGET, REFERENCE, value_range=1, reference_independent=True), "value_range is 1"),
    (lambda: drrho_certificate(TARGET, REFERENCE, value_range=2), "reference_independent must be True or False"),
    (lambda: certificate(TARGET, value_range=1, reference_independent=True), "reference_independent must be left out"),
    (lambda: drrho_certificate(TARGET, REFERENCE, value_range=2, reference_independent=False), "models must be >= 2"),
    (lambda: better_than_reference(TARGET, None, value_range=2, reference_independent=True), "reference_losses"),
    (lambda: certify(rho=0.5), "rho must be > 0.69.*got 0.5.*implied confidence is not positive"),
    (lambda: certify(rho=-1.0), "rho must be finite and >= 0, got -1.0"),
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
    (lambda: variance_sandwich([0.0, 1.0]), "exactly one of rho"),
    (lambda: variance_sandwich([0.0, 1.0], rho=1, radius=1), "exactly one of rho"),
    (lambda: variance_sandwich([0.0, 1.0], radius=-1.0), "radius must be finite and >= 0, got -1.0"),
    (lambda: variance_sandwich([0.0, 2.0], radius=1.0, value_range=1), "value_range is 1"),
    (lambda: rho_scales([0.0, 1.0], confidence=0.3), r"confidence must be in \[0.5, 1\), got 0.3"),
    (lambda: rho_scales([0.0]), "at least 2 entries, got 1"),
    (lambda: mean_coverage(-1.0), "rho must be finite and >= 0, got -1.0"),
    (lambda: mean_coverage(1.0, n=1), "n must be >= 2, got 1"),
    (lambda: lipschitz_cover_log(0, 1.0, 1.0, 0.1), "dimension must be >= 1, got 0"),
    (lambda: lipschitz_cover_log(3, 1.0, 1.0, 0.0), "resolution must be finite and > 0, got 0.0"),
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


def test_integer_tensors_are_refused():
    with pytest.raises(TypeError, match="losses must have a floating dtype"):
        empirical_bernstein(torch.tensor([0, 1]), value_range=1)
    with pytest.raises(TypeError, match="value_range must be a number, got 'wide'"):
        empirical_bernstein([0.0, 1.0], value_range="wide")
