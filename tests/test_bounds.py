"""The bounds: coverage by exact enumeration, mutants that must fail it, laws of scaling, and what is refused."""

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import thorough
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DIFFERENCE_LAWS, differences, hard_cases, radii, rows, scale_of
from scipy.stats import binom, multinomial

from drrho import KL, ChiSquare, CVaR, constrained_risk
from drrho.bounds import (
    better_than_reference,
    drrho_certificate,
    empirical_bernstein,
    lipschitz_cover_log,
    mean_coverage,
    rho_scales,
    variance_sandwich,
)
from drrho.statements import Bound

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@given(rows(max_size=12), radii(-8, 2))
def test_the_kl_ball_is_near_the_standard_deviation_too(losses, radius):
    """premium >= sqrt(2 radius) s - d radius / 2, as for the chi-square ball."""
    premium = constrained_risk(losses, KL(), radius).premium.item()
    d = np.mean(losses) - min(losses)
    assert premium >= np.std(losses) * math.sqrt(2 * radius) - d * radius / 2 - 1e-12 * scale_of(losses)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_constant_of_the_kl_ball_is_one_half(share):
    """Losses 0 and 1 are the worst by the proof; with the share of ones the least constant comes close to 1/2."""
    sd, d, radii_tried = math.sqrt(share * (1 - share)), share, np.logspace(-6, 2, 120)
    losses = np.broadcast_to([0.0, 1.0], (120, 2))
    risk = constrained_risk(losses, KL(), torch.tensor(radii_tried), base_weights=[1 - share, share])
    needed = (sd * np.sqrt(2 * radii_tried) - risk.premium.numpy()) / (d * radii_tried)
    assert needed.max() <= 0.5 and (share < 0.1 or needed.max() > 0.49)


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
    "KL certificate": (functools.partial(certificate, divergence=KL(), tight=False), 0.00163),
    "sharp KL certificate": (functools.partial(certificate, divergence=KL()), 0.00221),
}
MUTANTS = {
    "no additive term": (without(plain_bernstein, "7 B L/(3 (n - 1))"), 1.0),
    "no variance term": (without(plain_bernstein, "sqrt(2 V L/n)"), 0.340),
    "additive term BL/(3n)": (with_a_seventh_of_the_range, 1 / math.e),
    "robust risk alone": (robust_risk_alone, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough(COVERING, ["tight"]))
def test_failures_stay_below_delta(name):
    bound, expected = COVERING[name]
    failure = bernoulli_failure(lambda losses: float(bound(losses, value_range=1, delta=0.1)), n=1000)
    assert failure <= 0.1
    assert failure == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough(MUTANTS, ["no variance term"]))
def test_weaker_constants_are_caught(name):
    bound, expected = MUTANTS[name]
    failure = bernoulli_failure(lambda losses: float(bound(losses, value_range=1, delta=0.1)), n=1000)
    assert failure > 0.1
    assert failure == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("n", [2, 3, 8, 25])
@pytest.mark.parametrize("name", thorough(COVERING, ["tight"]))
def test_failures_stay_below_delta_in_small_samples(name, n):
    bound, _ = COVERING[name]
    for delta in (0.5, 0.9):  # where there is the least room
        assert bernoulli_failure(lambda losses, d=delta: float(bound(losses, value_range=1, delta=d)), n) <= delta


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
    for law in DIFFERENCE_LAWS:
        mu = law[2] - law[0]
        failures.append(multinomial.pmf(counts, n, law)[(mu > ours) | (-mu > theirs)].sum())
    return max(failures)


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough(COVERING, ["tight"]))
def test_failures_of_a_class_stay_below_delta(name):
    bound, _ = COVERING[name]
    assert class_failure(bound, n=40, delta=0.1) <= 0.1
    assert class_failure(bound, n=40, delta=0.5) <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no additive term", "robust risk alone"])
def test_weaker_constants_are_caught_in_a_class(name):
    bound, _ = MUTANTS[name]
    assert class_failure(bound, n=40, delta=0.1) > 0.5


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


# Laws of the bounds


FROM_DATA = {
    "plain": plain_bernstein,
    "tight": empirical_bernstein,
    "two-sided": functools.partial(empirical_bernstein, two_sided=True),
    "certificate": functools.partial(certificate, tight=False),
    "sharp certificate": certificate,
    "KL certificate": functools.partial(certificate, divergence=KL(), tight=False),
    "sharp KL certificate": functools.partial(certificate, divergence=KL()),
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


@pytest.mark.slow
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


def test_better_than_the_reference():
    better = REFERENCE.clip(0, 0.1)
    options = {"value_range": (-1, 1), "models": 100, "reference_independent": True}
    sharpest = better_than_reference(better, REFERENCE, **options)
    certified = better_than_reference(better, REFERENCE, method="bernstein", **options)
    assert certified and certified.bound.value < 0 and str(certified).startswith("certified")
    excess = empirical_bernstein(better - REFERENCE, value_range=2, models=100)
    assert sharpest.bound.value < certified.bound.value == excess.value
    assert sharpest.bound.method == "betting" and "method: betting" in str(sharpest)
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


PRINTED = [
    (lambda: empirical_bernstein(TARGET, value_range=1), "guarantee"),
    (lambda: drrho_certificate(TARGET, REFERENCE, value_range=2, reference_independent=True), "guarantee"),
    (lambda: better_than_reference(TARGET, REFERENCE, value_range=2, reference_independent=True), "guarantee"),
    (lambda: variance_sandwich(TARGET, rho=1.0), "guarantee"),
    (lambda: rho_scales(TARGET), "asymptotic"),
    (lambda: rho_scales(TARGET), "guarantee"),
    (lambda: mean_coverage(1.0), "asymptotic"),
]


@pytest.mark.parametrize(("make", "status"), PRINTED)
def test_printed_form_says_its_status(make, status):
    printed = str(make())
    assert f"[{status}]" in printed
    assert status == "plug-in" or "[plug-in]" not in printed


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
    (lambda: variance_sandwich([0.0, 1.0]), "exactly one of rho"),
    (lambda: variance_sandwich([0.0, 1.0], rho=1, radius=1), "exactly one of rho"),
    (lambda: variance_sandwich([0.0, 1.0], radius=-1.0), "radius must be finite and >= 0, got -1.0"),
    (lambda: variance_sandwich([0.0, 2.0], radius=1.0, value_range=1), "value_range is 1"),
    (lambda: rho_scales([0.0, 1.0], confidence=0.3), r"confidence must be in \[0.5, 1\), got 0.3"),
    (lambda: rho_scales([0.0]), "at least 2 entries, got 1"),
    (lambda: mean_coverage(-1.0), "rho must be finite and >= 0, got -1.0"),
    (lambda: mean_coverage(1.0, n=1), "n must be >= 2, got 1"),
    (lambda: certify(divergence=CVaR(0.1)), r"divergence must be ChiSquare\(\) or KL\(\), got CVaR"),
    (lambda: lipschitz_cover_log(0, 1.0, 1.0, 0.1), "dimension must be >= 1, got 0"),
    (lambda: lipschitz_cover_log(3, 1.0, 1.0, 0.0), "resolution must be finite and > 0, got 0.0"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
