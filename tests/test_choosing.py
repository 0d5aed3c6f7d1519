"""Choosing rho and coefficient: against brute force and known answers, coverage by simulation, and what is refused."""

import math

import numpy as np
import pytest

from drrho import KL, ChiSquare, CressieRead, CVaR, TotalVariation, constrained_risk
from drrho.bounds import rho_scales
from drrho.choosing import calibrated_rho, choose_coefficient, choose_rho, cross_fitted, folds_of

RNG = np.random.default_rng(0)
LOSSES = RNG.exponential(size=60)


def test_every_row_is_held_out_once():
    parts = folds_of(17, 5, seed=3)
    assert sorted(np.concatenate([test for _, test in parts]).tolist()) == list(range(17))
    for train, test in parts:
        assert sorted([*train, *test]) == list(range(17)) and 3 <= len(test) <= 4
    again, other = folds_of(17, 5, seed=3), folds_of(17, 5, seed=4)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(parts, again, strict=True))
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(parts, other, strict=True))


def test_cross_fitted_losses_are_those_of_models_that_did_not_see_the_sample():
    y = RNG.normal(size=20)
    leave_one_out = cross_fitted(lambda train, test: (y[test] - y[train].mean()) ** 2, 20, folds=20)
    expected = [(y[i] - np.delete(y, i).mean()) ** 2 for i in range(20)]
    np.testing.assert_allclose(leave_one_out, expected, rtol=1e-12)


def test_a_reference_that_remembers_its_samples_is_seen_through():
    """Nearest neighbors have no loss on their own samples; on samples they did not see, they are no use."""
    x, y = RNG.normal(size=(80, 3)), RNG.normal(size=80)

    def neighbor(train, test):
        nearest = np.square(x[test][:, None] - x[train]).sum(2).argmin(1)
        return (y[test] - y[train][nearest]) ** 2

    everything = np.arange(80)
    assert neighbor(everything, everything).max() == 0
    assert cross_fitted(neighbor, 80).mean() > 1.3 * y.var()


def shrunken(rho, train, test, y=LOSSES):
    """Held-out losses of a mean that rho shifts: the best rho is 0."""
    return (y[test] - y[train].mean() - 0.1 * rho) ** 2


def test_rho_is_the_smallest_within_a_standard_error_of_the_best():
    choice = choose_rho([9.0, 0.0, 1.0, 0.25], shrunken, 60)
    held_out = np.stack([cross_fitted(lambda *rows, rho=rho: shrunken(rho, *rows), 60) for rho in choice.candidates])
    best = held_out.mean(1).argmin()
    assert choice.candidates == (0, 0.25, 1, 9) and choice.best == choice.candidates[best]
    np.testing.assert_allclose(choice.means, held_out.mean(1), rtol=1e-12)
    apart = held_out - held_out[best]
    np.testing.assert_allclose(choice.errors, apart.std(1, ddof=1) / math.sqrt(60), rtol=1e-12)
    within = apart.mean(1) <= apart.std(1, ddof=1) / math.sqrt(60)
    assert float(choice) == choice.candidates[int(np.argmax(within))]
    assert "rho = 0" in str(choice) and len(str(choice).splitlines()) == 6


def test_a_rho_that_helps_is_chosen():
    """The held-out loss falls with rho on every sample, so no smaller candidate is within a standard error."""
    choice = choose_rho([0.0, 1.0, 2.0], lambda rho, train, test: LOSSES[test] * (3 - rho), 60)
    assert choice.rho == choice.best == 2


def test_one_candidate_is_the_choice():
    assert choose_rho([3.0], shrunken, 60).rho == 3


@pytest.mark.parametrize("divergence", [None, KL()])
def test_calibrated_rho_is_the_least_that_covers(divergence):
    calibrated = calibrated_rho(LOSSES, divergence=divergence, replicates=200, seed=4)
    counts = np.random.default_rng(4).multinomial(60, np.full(60, 1 / 60), size=200)
    share = {}
    for rho in (calibrated.rho, 0.98 * calibrated.rho):
        covered = [
            constrained_risk(np.repeat(LOSSES, row), divergence or ChiSquare(), rho / 60).value.item() >= LOSSES.mean()
            for row in counts
        ]
        share[rho] = np.mean(covered)
    assert share[calibrated.rho] == pytest.approx(calibrated.coverage)
    assert share[calibrated.rho] >= 0.95 > share[0.98 * calibrated.rho]


def test_calibrated_rho_of_symmetric_losses_is_the_normal_one():
    losses = RNG.normal(size=300)
    calibrated = calibrated_rho(losses, replicates=499)
    assert calibrated.normal == pytest.approx(rho_scales(losses).rho_t, rel=1e-12)
    assert calibrated.rho == pytest.approx(calibrated.normal, rel=0.3)
    assert calibrated.guaranteed == pytest.approx(rho_scales(losses).rho_0, rel=1e-12)
    assert "[asymptotic]" in str(calibrated) and "[guarantee]" in str(calibrated)


@pytest.mark.parametrize(("scale", "shift"), [(2.0**-20, 0.0), (8.0, 16.0), (-4.0, 0.0)])
def test_calibrated_rho_follows_scale_and_shift(scale, shift):
    losses = np.round(LOSSES * 2**20) / 2**20
    if scale < 0:
        losses, scale = -losses, -scale
    moved = calibrated_rho(scale * losses + shift, replicates=100)
    assert moved.rho == pytest.approx(calibrated_rho(losses, replicates=100).rho, rel=1e-9)


def test_calibrated_rho_of_excess_losses():
    reference = RNG.exponential(size=60)
    ours = calibrated_rho(LOSSES, reference, replicates=100, models=50)
    assert ours.rho == calibrated_rho(LOSSES - reference, replicates=100).rho
    assert ours.guaranteed == pytest.approx(60 * math.log(2 * 50 / 0.05) / 59)


@pytest.mark.slow
def test_calibration_covers_skewed_losses():
    """At n = 20 the normal rho covers with probability .88; four standard errors of .93 are 5 points."""
    rng, hits = np.random.default_rng(7), np.zeros(2)
    for _ in range(300):
        losses = rng.exponential(size=20)
        calibrated = calibrated_rho(losses, replicates=199)
        hits += [constrained_risk(losses, ChiSquare(), rho / 20).value.item() >= 1
                 for rho in (calibrated.rho, calibrated.normal)]  # fmt: skip
    ours, normal = hits / 300
    assert ours > 0.89 and ours > normal + 0.02


@pytest.mark.parametrize(
    ("slope", "noise", "expected"), [(0.4, 0.2, "c*"), (1.0, 0.2, 1), (1.5, 0.2, 1), (0.0, 1.0, 0), (-0.5, 0.2, 0)]
)
def test_the_coefficient_is_what_reduces_the_variance(slope, noise, expected):
    rng = np.random.default_rng(5)
    reference = rng.exponential(size=400)
    losses = slope * reference + noise * rng.exponential(size=400)
    choice = choose_coefficient(losses, reference)
    best = np.cov(losses, reference)[0, 1] / reference.var(ddof=1)
    assert choice.best.value == pytest.approx(best, rel=1e-12)
    assert float(choice) == pytest.approx(best if expected == "c*" else expected, rel=1e-12)
    assert choice.whole == pytest.approx(np.var(losses - reference) / np.var(losses), rel=0.05)
    if expected == 0:
        assert min(choice.whole, choice.fitted) >= 1 - 1e-9 and "does not reduce" in choice.reason
    else:
        assert choice.fitted < 1 and choice.reason in str(choice)


def test_without_an_interval_all_of_the_reference_is_kept_where_it_helps():
    losses, reference = RNG.exponential(size=(2, 100)) * 0.01
    losses[7] = reference[7] = 50.0
    choice = choose_coefficient(losses, reference)
    assert choice.coefficient == 1 and "too few hard samples to tell" in choice.reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: folds_of(3, 4), r"folds must be in \[2, n = 3\], got 4"),
        (lambda: folds_of(3, 1), r"folds must be in \[2, n = 3\], got 1"),
        (lambda: cross_fitted(lambda a, b: [0.0], 10), "each of the 2 held-out rows, got 1"),
        (lambda: cross_fitted(lambda a, b: [math.nan, 1.0], 10), "losses_of must be finite"),
        (lambda: choose_rho([], shrunken, 60), r"candidates must be different numbers >= 0, got \[\]"),
        (lambda: choose_rho([1.0, 1.0], shrunken, 60), r"candidates must be different.*\[1.0, 1.0\]"),
        (lambda: choose_rho([-1.0], shrunken, 60), r"candidates must be different.*\[-1.0\]"),
        (lambda: calibrated_rho([1.0]), "losses must be at least 2 that differ, got 1"),
        (lambda: calibrated_rho([1.0, 1.0]), "losses must be at least 2 that differ, got 2 with a range of 0"),
        (lambda: calibrated_rho([0.0, 0.0, 1.0]), "losses must be more than 3"),
        (lambda: calibrated_rho(LOSSES, confidence=0.3), r"confidence must be in \[0.5, 1\), got 0.3"),
        (lambda: calibrated_rho(LOSSES, replicates=1), "replicates must be >= 2, got 1"),
        (lambda: choose_coefficient(LOSSES, LOSSES[:5]), r"reference_losses must have the shape of losses"),
        (lambda: choose_coefficient(LOSSES[:9], LOSSES[:9]), "at least 2 folds = 10 entries, got 9"),
        (lambda: choose_coefficient(LOSSES, np.ones(60)), "must not be all equal"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_count_as_repetitions():
    rng = np.random.default_rng(3)
    held = rng.exponential(size=(3, 20)) + np.array([0.1, 0.0, 0.05])[:, None]
    counts = rng.integers(1, 4, size=20)
    own = {0.0: held[0], 1.0: held[1], 2.0: held[2]}
    splits = folds_of(20, 4)
    weighted = choose_rho(list(own), lambda rho, train, test: own[rho][test], 20, folds=splits, sample_weight=counts)
    copies = np.repeat(np.arange(20), counts)
    folds = [(np.flatnonzero(np.isin(copies, train)), np.flatnonzero(np.isin(copies, test))) for train, test in splits]
    repeated = choose_rho(list(own), lambda rho, train, test: own[rho][copies[test]], len(copies), folds=folds)
    assert weighted.rho == repeated.rho
    for field in ("means", "differences", "errors"):
        assert getattr(weighted, field) == pytest.approx(getattr(repeated, field), rel=1e-12)
    with pytest.raises(ValueError, match="sample_weight must hold 20 numbers"):
        choose_rho(list(own), lambda rho, train, test: own[rho][test], 20, sample_weight=-counts)


def test_no_rho_is_guaranteed_for_a_divergence_of_which_nothing_is_proven():
    losses = np.random.default_rng(0).exponential(size=60)
    for divergence in (ChiSquare(), KL()):
        assert "[guarantee]" in str(calibrated_rho(losses, divergence=divergence, replicates=99))
    for divergence in (TotalVariation(), CressieRead(1.5)):
        calibrated = calibrated_rho(losses, divergence=divergence, replicates=99)
        assert calibrated.guaranteed is None and "[guarantee]" not in str(calibrated)
    with pytest.raises(ValueError, match="divergence must have balls of more than one radius"):
        calibrated_rho(losses, divergence=CVaR(0.1))
